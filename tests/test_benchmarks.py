"The experiments of `benchmarks/`, on a handful of made images: their data, their networks, and that each method runs."
import io, subprocess, sys, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import set_seed
from PIL import Image

folder = Path(__file__).parents[1]/'benchmarks'

@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(folder)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

def picture(size, seed): return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size,size,3), dtype=np.uint8))

@pytest.mark.parametrize('name,millions', [('resnet20',.28), ('resnet56',.86), ('resnet8x4',1.23), ('resnet32x4',7.43), ('wrn16-2',.70), ('wrn40-2',2.26)])
def test_networks_have_the_published_sizes(name, millions):
    "Parameters as the reference tables give them, in millions; shapes of the stages as the papers do"
    from cifar_nets import make
    net,shapes = make(name).eval(),[]
    assert round(sum(p.numel() for p in net.parameters())/1e6, 2) == millions
    for i in (1,2,3): getattr(net, f'layer{i}').register_forward_hook(lambda m,i,o: shapes.append(tuple(o.shape[2:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2,100) and shapes == [(32,32),(16,16),(8,8)]

def test_networks_that_do_not_exist():
    from cifar_nets import make
    with pytest.raises(ValueError, match='No resnet19'): make('resnet19')

def test_crops_and_flips_by_hand():
    "Each image is cut out of its padded self, and mirrored or not: one of 162 ways, the same as Pillow's crop and flip"
    from cifar100 import crop_and_flip
    set_seed(0)
    x = torch.randint(1, 256, (40,3,32,32), dtype=torch.uint8)
    out,ways = crop_and_flip(x),[]
    for a,b in zip(x, out):
        im = Image.fromarray(np.pad(a.permute(1, 2, 0).numpy(), ((4,4),(4,4),(0,0))))
        same = [(i,j,f) for i in range(9) for j in range(9) for f in (False,True)
                if np.array_equal(np.array(im.crop((j,i,j+32,i+32)))[:,::-1 if f else 1], b.permute(1, 2, 0).numpy())]
        assert len(same) == 1
        ways += same
    assert len({w[:2] for w in ways}) > 20 and 8 < sum(w[2] for w in ways) < 32

def test_learning_rate_of_the_recipe():
    from cifar100 import steps
    assert [round(steps(e/240), 7) for e in (0,149,150,179,180,209,210,240)] == [.05,.05,.005,.005,.0005,.0005,.00005,.00005]

def test_optimiser_is_that_of_pytorch():
    "Five steps of the benchmark's learner equal a plain loop with momentum and decay of all parameters"
    from cifar100 import NoValidation, learner, loaders, normalised, steps
    from fastai.callback.schedule import ParamScheduler
    x,y = torch.randint(0, 256, (64,3,32,32), dtype=torch.uint8),torch.randint(3, (64,))
    def net():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3), torch.nn.BatchNorm1d(3))
    dls = loaders((x,y), (x,y))
    dls.train.after_batch,dls.train.shuffle = lambda b: (normalised(b[0]),b[1]),False
    learn = learner(dls, net())
    with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=[ParamScheduler(dict(lr=steps)), NoValidation()])
    model,moving = net().train(),None
    for e in range(5):
        loss = torch.nn.functional.cross_entropy(model(normalised(x)), y)
        grads = [g + 5e-4*p for g,p in zip(torch.autograd.grad(loss, list(model.parameters())), model.parameters())]
        moving = grads if moving is None else [.9*m + g for m,g in zip(moving, grads)]
        with torch.no_grad():
            for p,m in zip(model.parameters(), moving): p -= steps(e/5)*m
    for p,q in zip(learn.model.parameters(), model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

@pytest.mark.slow
def test_cifar100_runs_each_method(tmp_path):
    import cifar100
    with zipfile.ZipFile(tmp_path/'images.zip', 'w') as z:
        for split,n in (('train',2),('test',1)):
            for i in range(100*n):
                out = io.BytesIO()
                picture(32, i).save(out, 'png')
                z.writestr(f'cifar100/{split}/class{i%100:02}/{i}.png', out.getvalue())
    b = cifar100.Budget('resnet8', 'resnet8', 1, 1, True)
    e = cifar100.Experiment(b, tmp_path, tmp_path/'images.zip', 'cpu', tmp_path/'runs.csv')
    assert [tuple(o.shape) for o in (*e.train,*e.test)] == [(200,3,32,32),(200,),(100,3,32,32),(100,)] and e.train[1].bincount().tolist() == [2]*100
    for w in ('DIST','Attention'): e.weights.add(method=w, weight=.5, accuracy=.1, valid_loss=1.)
    e.measure([0], ['DIST','Attention'])
    t = e.runs.table
    assert list(t.method+' '+t.weight_of) == ['teacher -','student alone -','DIST paper','Attention paper','DIST weight_finder','Attention weight_finder']
    assert list(t.weight.dropna()) == [2,1000,.5,.5] and t.accuracy.between(0, 1).all()
    for name,m in cifar100.methods(b).items(): e.run(0, name, 'paper', m)
    assert {*e.runs.table.method} == {'teacher','student alone',*cifar100.methods(b)}
    n = len(e.runs.table)
    e.run(0, 'DIST', 'paper', cifar100.methods(b)['DIST'])
    assert len(e.runs.table) == n     # a run that has its row is not repeated
    longer = cifar100.Experiment(replace(b, finder=150), tmp_path, tmp_path/'images.zip', 'cpu', tmp_path/'runs.csv')
    longer.weights.add(method='DIST', weight=.7, accuracy=.1, valid_loss=1.)
    assert longer.measure([0], ['DIST']) == [.7] and (tmp_path/'runs_weights_150.csv').exists() and len(e.runs.table) == n     # no student
    e = cifar100.Experiment(cifar100.budgets['cpu'], tmp_path, tmp_path/'images.zip', 'cpu', tmp_path/'others.csv')
    kept = torch.load(cifar100.here/'cifar100_resnet20.pth')     # the teacher of the published table
    assert all(torch.equal(v, kept[k]) for k,v in e.teacher.state_dict().items()) and not len(e.runs.table)

@pytest.mark.slow
def test_cats_and_dogs_runs_each_method(tmp_path, monkeypatch):
    import cats_and_dogs as c
    (tmp_path/'images').mkdir()
    for i in range(40):
        for name in ('Cat','dog'): picture(80, i).save(tmp_path/f'images/{name}_{i}.jpg')
    e = c.Experiment(tmp_path, tmp_path/'images')
    e.runs.file = tmp_path/'runs.csv'
    e.__dict__['teacher'] = c.create_vision_model(c.resnet34, 2, pretrained=False)
    (x,y),(vx,vy) = e.data
    assert len(x) == 64 and len(vx) == 16 and x.shape[1:] == (3,72,72)
    page = c.ImageDataLoaders.from_name_func(tmp_path/'images', c.get_image_files(tmp_path/'images').sorted(), lambda f: f[0].isupper(), seed=42)
    assert list(vy) == [int(f.name[0].isupper()) for f in page.valid_ds.items]     # the page's split and order
    monkeypatch.setattr(c, 'methods', {name:(tfm,1,loss) for name,(tfm,_,loss) in c.methods.items()})
    for name in c.methods: e.run(0, name)
    t = e.runs.table
    assert {*t.method} == {*c.methods, *(f'{m}, average' for m in c.methods), 'recording, middle', 'recording, crops'} and (t.seconds > 0).all()
    out = c.crops(torch.arange(72.).expand(8, 3, 72, 72))
    assert out.shape == (8,3,64,64) and (out.diff(dim=3).abs() == 1).all()     # neighbours stay neighbours

@pytest.mark.slow
def test_beans_settings_run(tmp_path, monkeypatch):
    import beans_settings as c
    for split,n in (('train',40),('validation',6),('test',6)):
        for i in range(n):
            file = tmp_path/'beans'/split/f'class{i%3}'/f'{i}.jpg'
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(72, i).save(file)
    e = c.Experiment(tmp_path, tmp_path/'beans')
    e.runs.file = tmp_path/'runs.csv'
    for i in range(3): torch.save(c.resnet18(num_classes=3).state_dict(), tmp_path/f'teacher{i}.pth')
    all = c.settings()
    for group in all.values():
        for s in group.values(): s.epochs,s.student = 1,c.narrow
    all['10 % of the labels']['alone'].n_labels = 33
    monkeypatch.setattr(c, 'settings', lambda: all)
    assert all.keys() == {g for g in all if all[g]['alone'].objective is None}     # each group has something to compare with
    _,y = e.learner(c.narrow(), n_labels=33).dls.train.create_batch(list(range(40)))
    assert (y == -100).tolist() == [False]*33 + [True]*7
    for group in all:
        for name in all[group]: e.run(0, group, name)
    assert len(e.runs.table) == sum(map(len, all.values()))

@pytest.mark.parametrize('angle,flip,by_hand', [(0,.9,lambda x: x), (0,.1,lambda x: x.flip(3)), (.25,.9,lambda x: x.rot90(-1, (2,3))), (.5,.9,lambda x: x.flip(2, 3))])
def test_turned_leaves_by_hand(angle, flip, by_hand, monkeypatch):
    "Drawn numbers that turn or mirror the image exactly, without scaling or moving it; both senses of a quarter turn are as likely"
    from beans_settings import torch as t, turned
    x,drawn = torch.randint(0, 256, (1,3,64,64), dtype=torch.uint8),iter([angle, 0., flip, .5])
    monkeypatch.setattr(t, 'rand', lambda *size: torch.full(size, next(drawn)))
    out,want = turned(x),by_hand(x).float()
    other = x.rot90(1, (2,3)).float() if angle == .25 else want
    assert min((out-want).abs().max(), (out-other).abs().max()) < .1

def test_gain_of_bean_leaves_by_hand():
    from beans_settings import summary
    rows = [('g','alone',0,.5,.5), ('g','alone',1,.7,.5), ('g','with',0,.6,.5), ('g','with',1,.7,.75)]
    t = summary(pd.DataFrame(rows, columns=['group','method','seed','valid','test'])).loc[('g','with')]
    gains = [133*.1/261, 128*.25/261]
    assert t.gain == pytest.approx(np.mean(gains)) and t.gain_spread == pytest.approx(np.std(gains, ddof=1)) and t.seeds == 2

def test_rows_of_several_processes(tmp_path):
    "No row is lost, and none is written twice"
    from runs import Runs
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nfrom runs import Runs\nr = Runs({str(tmp_path/'r.csv')!r}, 'seed', 'method')\n" \
           "for i in range(20): r.add(seed=i, method=sys.argv[1], accuracy=i/20)"
    processes = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, m], stdout=subprocess.DEVNULL) for m in 'ab']
    assert [p.wait() for p in processes] == [0,0]
    runs = Runs(tmp_path/'r.csv', 'seed', 'method')
    assert sorted(zip(runs.table.method, runs.table.seed)) == [(m,i) for m in 'ab' for i in range(20)]
    assert runs.has(seed=3, method='a') and not runs.has(seed=20, method='a') and not Runs(tmp_path/'none.csv', 'seed').has(seed=1)
    with pytest.raises(ValueError, match='columns'): runs.add(seed=1, method='a')
