"Comparing after a fit: tables against plain computations, nothing changed, and the report in a real browser."
import re, shutil, subprocess
from copy import deepcopy
from html.parser import HTMLParser
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, error_rate, set_seed
from fastai.callback.progress import CSVLogger
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDL
from matplotlib.text import Text
from conftest import data, learner, loaders, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.cli import digits_learner
from test_check import everything, same

@pytest.fixture(scope='module')
def learners():
    set_seed(0)
    def fit(width):
        learn = learner(net(width), data(64, 16))
        learn.fit(2, 1e-2)
        return learn
    return dict(teacher=fit(8), scratch=[fit(4), fit(4), fit(4)], distilled=[fit(4), fit(4), fit(4)])

@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close('all')

def answers(learn):
    x,y = learn.dls.valid.one_batch()
    with torch.no_grad(): return learn.model.eval()(x),y

@given(arrays(np.float32, (40,3), elements=st.floats(-30, 30, width=32)), st.integers(1, 20), st.randoms(use_true_random=False))
def test_calibration_error_is_that_of_a_plain_loop(logits, n_bins, random):
    targ = np.array([random.randrange(3) for _ in range(40)])
    p = torch.tensor(logits).softmax(1)
    conf,pred = (o.numpy() for o in p.max(1))
    bins = [[] for _ in range(n_bins)]
    for c,right in zip(conf, pred == targ): bins[min(n_bins, max(1, int(np.ceil(np.float32(c)*np.float32(n_bins)))))-1].append((c, right))
    want = sum(abs(np.mean([r for _,r in b]) - np.mean([c for c,_ in b]))*len(b)/40 for b in bins if b)
    assert calibration_error(torch.tensor(logits), torch.tensor(targ), n_bins) == pytest.approx(want, abs=1e-4)

def test_agreement():
    a,b = torch.randn(2, 30, 4)
    p,q = (o.softmax(1).double().numpy() for o in (a,b))
    assert agreement(a, b) == pytest.approx(((p.argmax(1) == q.argmax(1)).mean(), (q*np.log(q/p)).sum(1).mean()), abs=1e-5)
    assert agreement(a, a) == pytest.approx((1, 0), abs=1e-6)

def test_compare_against_plain_computations(learners):
    table = compare(learners, baseline='scratch', n=2)
    for name,ls in learners.items():
        ls = ls if isinstance(ls, list) else [ls]
        outs = [answers(l) for l in ls]
        accs,eces = [(o.argmax(1) == y).float().mean().item() for o,y in outs],[calibration_error(o, y) for o,y in outs]
        losses = [F.cross_entropy(o, y).item() for o,y in outs]
        for column,values in (('accuracy',accs),('calibration error',eces),('valid_loss',losses)):
            assert table.loc[name,column] == pytest.approx(np.mean(values), abs=1e-5)
            if len(ls) > 1: assert table.loc[name,f'{column} ±'] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        assert table.loc[name,'parameters'] == sum(p.numel() for p in ls[0].model.parameters())
        assert table.loc[name,'MB'] == pytest.approx(sum(t.numel()*t.element_size() for t in ls[0].model.state_dict().values())/1e6)
    teacher = answers(learners['teacher'])[0]
    both = [agreement(answers(l)[0], teacher) for l in learners['distilled']]
    assert table.loc['distilled',['agreement','KL from the teacher']].tolist() == pytest.approx(np.mean(both, axis=0).tolist(), abs=1e-5)
    gains = [(answers(d)[0].argmax(1) == answers(d)[1]).float().mean() - (answers(s)[0].argmax(1) == answers(s)[1]).float().mean() for d,s in zip(learners['distilled'], learners['scratch'])]
    assert table.loc['distilled','gain in accuracy'] == pytest.approx(np.mean(gains), abs=1e-6) and table.loc['distilled','gain in accuracy ±'] == pytest.approx(np.std(gains, ddof=1), abs=1e-6)
    assert (table[['ms per item, batch of 1','ms per item, batch of 64']] > 0).all(axis=None) and pd.isna(table.loc['teacher','agreement'])

def test_multiply_adds_by_hand(learners):
    "Two strided convolutions of 3×3 on 8×8 images, and a linear layer"
    table = compare(dict(a=learners['teacher']), n=1)
    assert table.loc['a','million multiply-adds'] == pytest.approx((16*9*2*8 + 4*9*8*16 + 64*3)/1e6)

def test_table_as_it_is_shown_and_stored(learners, tmp_path):
    table = compare(learners, n=2)
    assert isinstance(table, pd.DataFrame) and table.index.tolist() == list(learners)
    shown = table.shown()
    assert shown.columns.tolist() == list(learners) and shown.loc['accuracy','scratch'].startswith(f"{table.loc['scratch','accuracy']:.3f} ± ") and float(shown.loc['accuracy','scratch'].split('± ')[1]) == pytest.approx(table.loc['scratch','accuracy ±'], abs=1e-3)
    assert 'nan' not in repr(table).lower() and '3 seeds' in repr(table) and 'median of 2 passes on cpu' in repr(table) and '<table' in table._repr_html_()
    table.to_csv(tmp_path/'a.csv')
    assert np.allclose(pd.read_csv(tmp_path/'a.csv', index_col=0), table, equal_nan=True)
    assert not isinstance(table[['accuracy']], type(table))     # a part is a plain DataFrame

def test_comparing_changes_nothing(learners, tmp_path):
    learn,teacher = learners['distilled'][0],learners['teacher'].model
    learn.add_cb(CSVLogger(tmp_path/'log.csv'))
    found = everything(learn, teacher)
    compare(learners, n=1)
    interp = DistillationInterpretation.from_learners(learners['teacher'], learn, learners['scratch'][0])
    interp.plot_disagreements(2), interp.plot_attention([0], '0', '0'), interp.per_class()
    now = everything(learn, teacher)
    found['cbs'],now['cbs'] = ([type(cb) for cb in o['cbs']] for o in (found, now))     # fastai's no_bar puts a new bar back
    learn.remove_cb(CSVLogger)
    assert not list(tmp_path.iterdir())
    for k in found: assert same(found[k], now[k]), k

def test_mistakes_of_compare(learners):
    with pytest.raises(ValueError, match='dictionary from names'): compare({})
    with pytest.raises(ValueError, match='dictionary from names'): compare(dict(a=net()))
    with pytest.raises(ValueError, match="one of teacher, scratch, distilled, but got 'best'"): compare(learners, baseline='best')
    other = learner(net(4), loaders(*[list(learners['teacher'].dls.valid_ds)[:8]]*2, 8))
    with pytest.raises(ValueError, match='other was measured on other labels than teacher'): compare(dict(teacher=learners['teacher'], other=other))

def test_baseline_with_other_metrics(learners):
    "A gain in each metric that both have"
    a,b,c = learner(net(4)),learner(net(4)),learner(net(4))
    b.metrics,c.metrics = [accuracy,error_rate],[error_rate]
    table = compare(dict(a=a, b=b, c=c), baseline='b', n=1)
    acc = {k:(answers(l)[0].argmax(1) == answers(l)[1]).float().mean().item() for k,l in dict(a=a, b=b, c=c).items()}
    assert table.loc['a','gain in accuracy'] == pytest.approx(acc['a']-acc['b']) and table.loc['c','gain in error_rate'] == pytest.approx(acc['b']-acc['c'])
    assert pd.isna(table.loc['c','gain in accuracy']) and pd.isna(table.loc['a','gain in error_rate'])

def test_sequences_of_different_length():
    "A last batch of shorter sequences, as a language model has it: its labels are compared, token by token"
    def sequences(*lengths): return [[(torch.arange(n).add(i) % 5, torch.arange(n).add(i+1) % 5) for i in range(4)] for n in lengths]
    def model(items):
        dl = TfmdDL([o for b in items for o in b], bs=4, num_workers=0, device='cpu')
        return Learner(DataLoaders(dl, dl), nn.Sequential(nn.Embedding(5,6), nn.Linear(6,5)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    items = sequences(7,7,3)
    a,b = model(items),model(items)
    table = compare(dict(teacher=a, student=b), n=1)
    with torch.no_grad(): want = np.mean([(a.model(x).argmax(1) == y).float().mean() for batch in items for x,y in batch])     # fastai's: each item counts once
    assert table.loc['teacher','accuracy'] == pytest.approx(want, abs=1e-6) and 'agreement' not in table
    with pytest.raises(ValueError, match='measured on other labels'): compare(dict(teacher=a, student=model(sequences(7,7,4))), n=1)

@pytest.mark.parametrize('n_inp', [1,2])
def test_loaders_of_pytorch(n_inp):
    "With one input and with two, beside a learner with fastai's loaders"
    class Sum(nn.Module):
        def __init__(self): super().__init__(); self.net = net(4)
        def forward(self, *xs): return self.net(sum(xs))
    items = [(*[x]*n_inp, y) for x,y in data().train_ds]
    ours = learner(Sum(), loaders(items, items, 8))
    theirs = learner(Sum(), DataLoaders(TorchDL(items, 8, shuffle=True), TorchDL(items, 10)))
    theirs.model.load_state_dict(ours.model.state_dict())
    columns = ['valid_loss','accuracy','calibration error','million multiply-adds']
    for table in (compare(dict(a=ours, b=theirs), n=1), compare(dict(a=ours, b=theirs), n=1, dl=theirs.dls.train)):
        assert table.loc['a',columns].tolist() == pytest.approx(table.loc['b',columns].tolist(), abs=1e-6) and (table['ms per item, batch of 64'] > 0).all()
    logits = ours.model.eval()(*[torch.stack(o) for o in list(zip(*items))[:n_inp]])
    assert table.loc['b','calibration error'] == pytest.approx(calibration_error(logits, torch.stack([i[-1] for i in items])), abs=1e-6)

def test_nothing_to_measure_on():
    "An empty validation set, and none at all"
    items = list(data().train_ds)
    empty,none = learner(net(), loaders(items, items[:1], 8)),learner(net(), loaders(items, items, 8))
    empty.dls = DataLoaders(empty.dls.train, TfmdDL([], bs=8, num_workers=0, do_setup=False))
    none.dls = DataLoaders(none.dls.train)
    for learn in (empty,none):
        with pytest.raises(ValueError, match='b has no items to be measured on.*with `dl`'): compare(dict(a=learner(), b=learn), n=1)
        assert compare(dict(b=learn), n=1, dl=learn.dls.train).loc['b','accuracy'] >= 0
        with pytest.raises(ValueError, match='empty loader'): DistillationInterpretation.from_learners(net(), learn, dl=TfmdDL([], bs=8, num_workers=0, do_setup=False))

@pytest.mark.parametrize('default', [torch.float32,torch.float64])
def test_double_precision(default):
    "Models and inputs in float64, whatever the default is"
    items = [(x.double(), y) for x,y in data().train_ds]
    torch.set_default_dtype(default)
    try:
        a,b = (learner(net(w).double(), loaders(items, items, 8)) for w in (8,4))
        table = compare(dict(teacher=a, student=b), baseline='student', n=1)
        DistillationInterpretation.from_learners(a, b).plot_attention([0], '0', '0')
    finally: torch.set_default_dtype(torch.float32)
    logits = [answers(l)[0] for l in (a,b)]
    assert logits[0].dtype == torch.float64
    assert table['calibration error'].tolist() == pytest.approx([calibration_error(o, answers(a)[1]) for o in logits], abs=1e-6)
    p,q = (o.softmax(1).numpy() for o in logits)
    assert table.loc['student','KL from the teacher'] == pytest.approx((p*np.log(p/q)).sum(1).mean(), abs=1e-5)

def test_learners_of_several_processes(learners):
    "One whose validation set is split between processes is measured on all of it, as the others are"
    class DistributedTrainer(Callback):     # stands in for fastai's
        def before_validate(self): self.learn.dl = [tuple(o[:8] for o in self.dl.one_batch())]
    learn = learners['distilled'][0]
    want = compare(dict(teacher=learners['teacher'], student=learn), n=1)
    learn.add_cb(DistributedTrainer())
    table = compare(dict(teacher=learners['teacher'], student=learn), n=1)
    assert learn.distributed_trainer in learn.cbs
    learn.remove_cb(DistributedTrainer)
    for c in ('accuracy','agreement','calibration error'): assert table.loc['student',c] == pytest.approx(want.loc['student',c])

def test_values_have_neither_calibration_nor_agreement():
    items = [(torch.randn(6), torch.rand(3)) for _ in range(32)]
    learn = Learner(loaders(items, items, 16), nn.Linear(6, 3), loss_func=F.mse_loss)
    table = compare(dict(teacher=learn), n=1)
    assert 'calibration error' not in table and table.loc['teacher','valid_loss'] > 0

def test_interpretation_against_plain_computations(learners):
    teacher,student,scratch = learners['teacher'],learners['distilled'][0],learners['scratch'][0]
    interp = DistillationInterpretation.from_learners(teacher, student, scratch)
    (t,y),(s,_),(a,_) = map(answers, (teacher,student,scratch))
    p,q = (o.softmax(1).numpy() for o in (t,s))
    kl = (p*np.log(p/q)).sum(1)
    found = interp.disagreements()
    assert found.item.tolist() == np.argsort(-kl).tolist() and found.KL.tolist() == pytest.approx(sorted(kl, reverse=True), abs=1e-4)
    assert found.label.tolist() == [str(y[i].item()) for i in found.item] and found.student.tolist() == [str(q[i].argmax()) for i in found.item]
    matrix = interp.agreement_matrix()
    for i in range(3):
        for j in range(3): assert matrix.iat[i,j] == ((p.argmax(1) == i) & (q.argmax(1) == j)).sum()
    table = interp.per_class()
    for c,row in table.iterrows():
        here = y == int(c)
        assert row['items'] == here.sum() and row.student == pytest.approx((s[here].argmax(1) == y[here]).float().mean().item())
        assert row.gain == pytest.approx(row.student - (a[here].argmax(1) == y[here]).float().mean().item())
    assert torch.allclose(interp.probabilities(4)['teacher'], (t/4).softmax(1), atol=1e-6)
    assert interp.top_losses(1)[0].item() == pytest.approx(F.cross_entropy(s, y, reduction='none').max().item(), abs=1e-5)

def test_pictures_show_what_they_say(learners):
    interp = DistillationInterpretation.from_learners(learners['teacher'].model, learners['distilled'][0])     # a module does as well
    fig = interp.plot_dark_knowledge([3,1], T=2)
    bars = {c.get_label():[b.get_height() for b in c] for c in fig.axes[1].containers}
    assert list(bars) == ['teacher','student'] and bars['student'] == pytest.approx(interp.probabilities(2)['student'][3].tolist())
    fig = interp.plot_attention([0,2], ['0','1'], ['0','1'])
    x = learners['teacher'].dls.valid.one_batch()[0]
    with torch.no_grad(): features = learners['teacher'].model[0](x[[0,2]])
    assert np.allclose(fig.axes[1].images[0].get_array(), (features[0]**2).mean(0), atol=1e-5) and fig.axes[2].get_title() == 'student 0'
    bars = {c.get_label():[b.get_height() for b in c] for c in interp.plot_per_class().containers}
    assert bars == {k:interp.per_class()[k].tolist() for k in ('teacher','student')}
    assert interp.plot_agreement().get_xlabel() == 'student says'
    with pytest.raises(ValueError, match='from 0 to 15'): interp.plot_dark_knowledge([16])
    with pytest.raises(ValueError, match='as many student layers'): interp.plot_attention([0], ['0','1'], ['0'])
    with pytest.raises(ValueError, match='Expected images'): interp.plot_attention([0], ['4'], ['4'])

def interpretation(teacher, student, targ, vocab=None):
    "One of these answers, given as logits"
    interp = DistillationInterpretation.__new__(DistillationInterpretation)
    interp.logits,interp.targ,interp.ignore,interp.vocab = dict(teacher=teacher, student=student),targ,-100,vocab
    return interp

def test_many_classes():
    "Of 1,000 those that are confused most: a small picture"
    n,gen = 1000,np.random.RandomState(0)
    pairs = gen.permutation(n)[:24].reshape(12,2)     # (what the teacher says, what the student says)
    t = np.concatenate([np.arange(n), np.repeat(pairs[:,0], 3)])
    s = np.concatenate([np.arange(n), np.repeat(pairs[:,1], 3)])
    interp = interpretation(*(F.one_hot(torch.tensor(o), n).float() for o in (t,s)), torch.tensor(t), [f'class {i}' for i in range(n)])
    ax = interp.plot_agreement(most=24)
    shown = sorted(pairs.flatten())
    for names in (ax.get_xticklabels(), ax.get_yticklabels()): assert [o.get_text() for o in names] == [f'class {i}' for i in shown]
    want = [[((t == a) & (s == b)).sum() for b in shown] for a in shown]
    assert np.allclose(np.expm1(ax.images[0].get_array()), want) and ax.get_title() == 'The 24 of 1000 classes that they confuse most'
    assert {(int(o.get_position()[1]), int(o.get_position()[0]), int(o.get_text())) for o in ax.texts} == {(i, j, want[i][j]) for i in range(24) for j in range(24) if want[i][j]}
    ax = interp.plot_per_class(most=12)
    assert [o.get_text() for o in ax.get_xticklabels()] == [f'class {i}' for i in sorted(pairs[:,0])]
    for fig in plt.get_fignums(): assert max(plt.figure(fig).get_size_inches()) < 15

def test_names_are_no_formulas(tmp_path):
    "Classes, items and layers whose names Matplotlib takes for formulas are drawn as they are, also in axes of the user's"
    names = [r'$\frac$','$5 or $6','a_b']
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.add_module('$\\frac$', net(4)[0]); self.head = nn.Sequential(nn.Flatten(), nn.Linear(64,3))
        def forward(self, x): return self.head(self._modules['$\\frac$'](x))
    learn = learner(Odd())
    interp = DistillationInterpretation.from_learners(Odd(), learn)
    interp.vocab = names
    axes = [plt.subplots()[1] for _ in range(2)]
    figs = [interp.plot_agreement().figure, interp.plot_per_class().figure, interp.plot_agreement(axes[0]).figure, interp.plot_per_class(axes[1]).figure,
            interp.plot_disagreements(2), interp.plot_attention([0], '$\\frac$', '$\\frac$')]
    write_report(tmp_path/'report.html', names[0], [(names[0], fig, names[0]) for fig in figs])
    assert (tmp_path/'report.html').read_text(encoding='utf-8').count('<img') == 6
    for fig in figs: assert not any(t.get_parse_math() for t in fig.findobj(Text) if '$' in t.get_text())     # as they were drawn
    assert [o.get_text() for o in axes[0].get_xticklabels()] == [o.get_text() for o in axes[1].get_xticklabels()] == names

def test_interpretation_of_images(tmp_path):
    "Items that are decoded, with names of classes"
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, imagenet_stats, vision_learner
    from PIL import Image
    from torchvision.models import resnet18
    for i in range(24):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (40,40,3), dtype=np.uint8)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    teacher,student = vision_learner(dls, resnet18, pretrained=False),Learner(dls, resnet18(num_classes=2))
    interp = DistillationInterpretation.from_learners(teacher, student)
    fig = interp.plot_disagreements(5)
    image,items = np.asarray(fig.axes[0].images[0].get_array()),interp.disagreements(5)
    file = dls.valid.items[items.item[0]]
    assert abs(image/255 - np.asarray(Image.open(file).resize((32,32), Image.BILINEAR))/255).mean() < 0.02     # decoded
    assert fig.axes[0].get_title() == f'item {items.item[0]}: {file.parent.name}' and set(items.teacher) <= {'a','b'}

class Noisy:
    "Items that are drawn anew each time, as augmentations draw them"
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i][0] + torch.randn(2,8,8), self.items[i][1]

class WritesOver(nn.Sequential):
    def forward(self, x): return super().forward(x.mul_(2))

@pytest.mark.parametrize('kind', ['fastai','pytorch'])
def test_all_models_answer_the_same_items(kind):
    "Three copies of one network agree on a loader that shuffles and augments, and pictures belong to the answers"
    items,model = list(data().train_ds),WritesOver(net(4))
    dls = loaders(Noisy(items), Noisy(items), 10, drop_last=True) if kind == 'fastai' else DataLoaders(*[TorchDL(Noisy(items), 10, shuffle=True)]*2)
    teacher,student,scratch = (learner(deepcopy(model), data()) for _ in range(3))
    student.dls = dls
    interp = DistillationInterpretation.from_learners(teacher, student, scratch, dl=dls.train)
    assert interp.targ.tolist() == [y.item() for _,y in items]
    for k in ('teacher','scratch'): assert torch.equal(interp.logits[k], interp.logits['student'])
    fig = interp.plot_dark_knowledge([17,3])
    (x,),_ = interp._batch([17,3])
    with torch.no_grad(): assert torch.allclose(model.eval()(x.clone()), interp.logits['student'][[17,3]], atol=1e-5)
    assert np.allclose(fig.axes[2].images[0].get_array(), x[1].mean(0)) and fig.axes[2].get_title() == f'item 3: {items[3][1]}'

def test_labels_in_a_column_and_labels_that_do_not_count():
    "As tables have them; the loss function says which label it ignores, and items with it are in no accuracy"
    for ignore in (-100, 1):
        items = [(x, torch.tensor([-100 if i == 5 and ignore < 0 else y])) for i,(x,y) in enumerate(data().train_ds)]
        y = torch.cat([y for _,y in items]).numpy()
        learn = learner(net(4), loaders(items, items, 8))
        learn.loss_func = CrossEntropyLossFlat(ignore_index=ignore)
        interp = DistillationInterpretation.from_learners(net(8), learn)
        logits = interp.logits['student']
        p,table = logits.softmax(1).double().numpy(),interp.per_class()
        assert table.index.tolist() == [str(c) for c in range(3) if c != ignore]
        for c,row in table.iterrows(): assert row['items'] == (y == int(c)).sum() and row.student == pytest.approx((p.argmax(1) == y)[y == int(c)].mean())
        want = [0 if c == ignore else -np.log(p[i,c]) for i,c in enumerate(y)]
        assert interp.losses.tolist() == pytest.approx(want, abs=1e-5)
        found = interp.disagreements()
        assert len(found) == 24 and found.label.tolist() == ['' if y[i] == ignore else str(y[i]) for i in found.item]
        assert interp.plot_dark_knowledge([int(np.argmax(y == ignore))]).axes[0].get_title().endswith(': ')
        counts = torch.tensor(y != ignore)
        row = compare(dict(a=learn), n=1).loc['a']
        assert row['calibration error'] == pytest.approx(calibration_error(logits[counts], torch.tensor(y)[counts]), abs=1e-6)

def test_interpretation_needs_classes():
    items = [(torch.randn(6), torch.rand(3)) for _ in range(32)]
    learn = Learner(loaders(items, items, 16), nn.Linear(6, 3), loss_func=nn.MSELoss())
    learn.loss_func.reduction = 'mean'
    with pytest.raises(ValueError, match='one class for each item'): DistillationInterpretation.from_learners(deepcopy(learn), learn)

# the report

class Links(HTMLParser):
    def __init__(self): super().__init__(); self.urls,self.images = [],0
    def handle_starttag(self, tag, attrs):
        self.images += tag == 'img'
        self.urls += [v for k,v in attrs if k in ('src','href')]

@pytest.fixture
def report(tmp_path):
    fig,ax = plt.subplots()
    ax.plot([1,2])
    write_report(tmp_path/'report.html', 'A & B', [('Table <1>', pd.DataFrame(dict(a=[1,2])), ''), ('Figure', fig, 'A line'), ('', 'Some text', '')])
    return tmp_path/'report.html'

def test_report_needs_no_other_file(report):
    links = Links()
    links.feed(report.read_text(encoding='utf-8'))
    assert links.images == 1 and all(u.startswith('data:') for u in links.urls)
    text = report.read_text(encoding='utf-8')
    assert 'A &amp; B' in text and 'Table &lt;1&gt;' in text and 'url(' not in text and not plt.get_fignums()

browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
@pytest.mark.skipif(browser is None, reason='no Chromium on this machine')
def test_report_in_a_browser(report, tmp_path):
    "No failed request, nothing on the console, and pictures that have a size"
    page = report.read_text(encoding='utf-8')
    probe = ("<script>window.onerror=m=>document.title='error '+m;window.onload=()=>{"
             "document.title=[...document.images].map(i=>i.naturalWidth+'x'+i.naturalHeight+' '+i.getBoundingClientRect().width).join(',')"
             "+'|'+performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:')).length}</script>")
    (tmp_path/'probe.html').write_text(page.replace('</body>', probe+'</body>'), encoding='utf-8')
    run = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', f'--user-data-dir={tmp_path/"profile"}', '--virtual-time-budget=3000',
                          '--dump-dom', (tmp_path/'probe.html').as_uri()], capture_output=True, text=True, timeout=120)
    images,requests = re.search(r'<title>(.*)</title>', run.stdout)[1].split('|')
    natural,shown = images.split(' ')
    assert min(map(int, natural.split('x'))) > 100 and float(shown) > 100 and requests == '0'
    assert 'CONSOLE' not in run.stderr and 'ERR_' not in run.stderr
