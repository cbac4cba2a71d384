"ONNX files: they answer as the learner does, at any batch size, or they are not written."
import json, re, subprocess, sys
from pathlib import Path
import nbformat, numpy as np, onnxruntime as ort, pytest, torch
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, load_learner
from fastai.vision.all import Flip, ImageDataLoaders, Normalize, Resize, aug_transforms, imagenet_stats
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDL
from conftest import data, learner, loaders, net
from fastdistill.all import *
from fastdistill.deploy.runtime import OnnxModel
from test_applications import tabular, text_learner
from test_untouched import everything, same

def run(file, *arrays):
    "What onnxruntime answers, without any code of ours"
    session = ort.InferenceSession(str(file))
    return session.run(None, {i.name:a for i,a in zip(session.get_inputs(), arrays)})[0]

def facts(file): return json.loads(ort.InferenceSession(str(file)).get_modelmeta().custom_metadata_map['fastdistill'])

def names(folder): return sorted(f.name for f in folder.iterdir())

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Twelve pictures of other sizes, high, wide and square, of two classes, as JPEG"
    path,rng = tmp_path_factory.mktemp('photos'),np.random.RandomState(0)
    for i in range(12):
        h,w = rng.randint(30, 90, 2) if i else (50,50)
        Image.fromarray(rng.randint(0, 256, (h,w,3), dtype=np.uint8)).save(path/f'{"犬 ä" if i%2 else "Katze"}_{i}.jpg')
    return path

def photo_dls(path, *tfms, **kwargs):
    files = sorted(path.glob('*.jpg'))
    return ImageDataLoaders.from_name_func(path, files, lambda f: f.split('_')[0], seed=0, valid_pct=0.5, bs=4, item_tfms=Resize(32),
                                           batch_tfms=tfms or [Normalize.from_stats(*imagenet_stats)], num_workers=0, device=torch.device('cpu'), **kwargs)

def photo_learner(path, *tfms):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    learn = Learner(photo_dls(path, *tfms), model)
    with learn.no_bar(), torch.no_grad():
        model[-1].weight *= 30
        logits = torch.cat([model.eval()(x.as_subclass(torch.Tensor)) for x,_ in learn.dls.valid])
        model[-1].bias[0] -= (logits[:,0] - logits[:,1]).mean()     # some are taken for either class
    return learn

def middle(photo, size=32):
    "The middle square of a photograph, in plain Pillow"
    img = Image.open(photo)
    side = min(img.size)
    left,top = ((o-side)//2 for o in img.size)
    return np.asarray(img.crop((left,top,left+side,top+side)).resize((size,size), Image.BILINEAR))

def test_the_file_answers_as_the_learner(tmp_path, capfd):
    learn = learner(net(dropout=0.5))
    learn.fit(1, 1e-2)
    list(learn.model.modules())[2].eval()
    found = everything(learn, learn.model)
    capfd.readouterr()
    file = export_onnx(learn, str(tmp_path/'a b.ä.onnx'), opset=20)
    now = everything(learn, learn.model)
    for k in found: assert same(found[k], now[k]), k
    out,err = capfd.readouterr()
    assert re.fullmatch(r'.*a b.ä.onnx: 0.0\d+ MB, opset 20.\nLargest difference from the learner on 16 items \de-\d\d, same decisions for 100%.\n', out) and not err
    assert file == tmp_path/'a b.ä.onnx' and names(tmp_path) == ['a b.ä.onnx']
    for n in (1,3,64):
        x = torch.randn(n, 2, 8, 8)
        with torch.no_grad(): want = learn.model.eval()(x)
        assert np.allclose(run(file, x.numpy()), want, atol=1e-5)
    import onnx
    graph = onnx.load(file)
    assert graph.opset_import[0].version == 20 and not any(n.op_type == 'BatchNormalization' for n in graph.graph.node)
    assert facts(file)['parameters'] == sum(p.numel() for p in learn.model.parameters()) and facts(file)['returns'] == 'logits'

def test_pixels_and_probabilities(photos, tmp_path):
    "From files to probabilities, by Pillow and NumPy"
    learn = photo_learner(photos, Flip(p=1.), Normalize.from_stats(*imagenet_stats))
    file = export_onnx(learn, tmp_path/'a.onnx', pixels=True, probs=True)
    about = facts(file)
    assert about['classes'] == ['Katze','犬 ä'] == list(learn.dls.vocab) and about['size'] == [32,32] and about['pixels'] and about['returns'] == 'softmax'
    with learn.no_bar(): want,_ = learn.get_preds()
    x = np.stack([middle(f) for f in learn.dls.valid_ds.items])
    assert np.allclose(run(file, x), want, atol=1e-5) and np.allclose(run(file, x[:1]), want[:1], atol=1e-5)
    model = OnnxModel(file, learn.dls)     # from a learner's batch back to pixels
    xb,_ = learn.dls.valid.one_batch()
    assert (model.inputs(xb)[0] == x[:len(xb)]).all() and torch.allclose(model(xb).softmax(1), want[:len(xb)], atol=1e-5)

def test_the_program_of_the_page(photos, tmp_path):
    "It runs where neither fastai nor PyTorch can be imported, and decides as the learner does on files of any shape"
    page = nbformat.read(Path(__file__).parents[1]/'nbs/tutorials/out_of_the_door.ipynb', 4)
    program, = [c.source.partition('\n')[2] for c in page.cells if c.source.startswith('%%writefile')]
    assert len([l for l in program.splitlines() if l.strip()]) <= 25 and max(map(len, program.splitlines())) <= 88
    (tmp_path/'classify.py').write_text(program, encoding='utf-8')
    learn = photo_learner(photos)
    file = export_onnx(learn, tmp_path/'a.onnx', pixels=True, probs=True)
    without = '''
import runpy, sys
class Blocked:
    def find_spec(self, name, *args):
        if name.partition('.')[0] in ('torch','torchvision','fastai','fastcore','fastdistill'): raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
assert not {'torch','fastai','fastdistill'} & set(sys.modules)
'''
    files = learn.dls.valid_ds.items
    done = subprocess.run([sys.executable, '-X', 'utf8', '-c', without, tmp_path/'classify.py', file, *files], capture_output=True, encoding='utf-8', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with learn.no_bar(): want,_ = learn.get_preds()
    said = [line.split('\t') for line in done.stdout.splitlines()]
    assert [c for _,c,_ in said] == [learn.dls.vocab[i] for i in want.argmax(1)] and len({c for _,c,_ in said}) == 2
    assert [float(p) for *_,p in said] == pytest.approx(want.max(1)[0].tolist(), abs=1e-4) and [f for f,*_ in said] == list(map(str, files))

class Answers(nn.Module):
    def __init__(self): super().__init__(); self.net = net()
    def forward(self, x): return dict(aux=x, logits=self.net(x)),x

def test_models_that_return_more(tmp_path):
    learn = learner(Answers())
    x,_ = learn.dls.valid.one_batch()
    assert np.allclose(run(export_onnx(learn, tmp_path/'a.onnx'), x.numpy()), learn.model.net.eval()(x).detach(), atol=1e-5)

def test_half_precision(tmp_path):
    learn = learner(net().half())
    file = export_onnx(learn, tmp_path/'a.onnx', tol=0.02)
    x,_ = learn.dls.valid.one_batch()
    with torch.no_grad(): assert np.allclose(run(file, x.numpy()), learn.model.eval()(x.half()).float(), atol=0.02)
    assert next(learn.model.parameters()).dtype == torch.float16

def test_tables(tmp_path):
    "Two inputs by their names"
    import pandas as pd
    from fastai.tabular.all import Categorify, CategoryBlock, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(colour=rng.choice(['red','green','blue'], 40), size=rng.rand(40), kind=rng.choice(['a','b'], 40)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['colour'], cont_names=['size'], y_names='kind', y_block=CategoryBlock(),
                                     valid_idx=list(range(30,40)), bs=10, num_workers=0, device=torch.device('cpu'))
    learn = tabular_learner(dls, layers=[4], n_out=2)
    file = export_onnx(learn, tmp_path/'a.onnx', probs=True)
    session = ort.InferenceSession(file)
    assert [i.name for i in session.get_inputs()] == ['x_cat','x_cont'] and facts(file)['classes'] == ['a','b']
    with learn.no_bar(): want,_ = learn.get_preds()
    xb = dls.valid.one_batch()[:2]
    assert np.allclose(run(file, *(x.numpy() for x in xb)), want, atol=1e-5)

class Words(nn.Module):
    "The mean of the vectors of the words that are no padding"
    def __init__(self): super().__init__(); self.words,self.head = nn.Embedding(100, 6),nn.Linear(6, 2)
    def forward(self, x):
        there = (x != 1)[...,None].float()
        return self.head((self.words(x)*there).sum(1)/there.sum(1))

@pytest.fixture
def text_dls():
    import pandas as pd
    from fastai.text.all import BaseTokenizer, TextDataLoaders
    df = pd.DataFrame(dict(text=['good film'*(1+i%3) if i%2 else 'bad '*(2+i%5) for i in range(24)], label=['yes' if i%2 else 'no' for i in range(24)]))
    return TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_pct=.25, seed=0, bs=4, tok_tfm=BaseTokenizer(), num_workers=0, device=torch.device('cpu'))

def test_texts_of_any_length(text_dls, tmp_path):
    learn = Learner(text_dls, Words(), loss_func=CrossEntropyLossFlat())
    file = export_onnx(learn, tmp_path/'a.onnx')
    for b,n in ((1,1),(5,3),(2,30)):
        x = torch.randint(2, 100, (b,n))
        assert np.allclose(run(file, x.numpy()), learn.model(x).detach(), atol=1e-5)

def test_fastai_s_recurrent_networks_cannot_be_exported(text_dls, tmp_path):
    from fastai.text.all import text_classifier_learner
    learn = text_learner(text_classifier_learner, text_dls, 6)
    with learn.no_bar(): before = learn.validate()
    with pytest.raises(ValueError, match=r'a choice depends on the values of the inputs, at fastai/text/models/awdlstm.py:\d+ in forward|Overloaded torch operator'): export_onnx(learn, tmp_path/'a.onnx')
    with learn.no_bar(): assert learn.validate() == before and not names(tmp_path)

class Plain(nn.Module):
    "A model of one function"
    def __init__(self, f): super().__init__(); self.f,self.a = f,nn.Linear(128, 3)
    def forward(self, x): return self.f(self.a(x.flatten(1)))

def eigenvalues(x): return torch.linalg.eigvals(x[:,None]*x[...,None]).real
def fixed(x): return x.expand(16, 3) + x.view(16, -1)
def noisy(x): return nn.functional.dropout(x, training=True)
def choose(x): return x if x.sum() > 0 else 2*x
def of_the_batch(x): return x - x.mean(0)
def not_finite(x): return x/(x - x)

@pytest.mark.parametrize('f,match', [
    (eigenvalues, 'ONNX has no operator for aten.linalg_eig. Replace this part'),
    (choose, 'a choice depends on the values of the inputs, at test_deploy_export.py:.* if x.sum'),
    (of_the_batch, 'depends on the other items of its batch'),
    (noisy, 'depends on the other items of its batch|differs from the learner'),
    (not_finite, 'not finite'),
    (fixed, 'a batch of 1')])
def test_what_cannot_be_exported(f, match, tmp_path):
    (tmp_path/'a.onnx').write_text('older')
    with pytest.raises(ValueError, match=match): export_onnx(learner(Plain(f)), tmp_path/'a.onnx')
    assert names(tmp_path) == ['a.onnx'] and (tmp_path/'a.onnx').read_text() == 'older'

def test_batch_norm_without_running_statistics(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match='batch norm without running statistics|a batch of 1'): export_onnx(learner(model), tmp_path/'a.onnx')

def test_a_difference_leaves_the_older_file(photos, tmp_path):
    "A resize of the batch is not in the file"
    learn = photo_learner(photos, *aug_transforms(size=24), Normalize.from_stats(*imagenet_stats))
    (tmp_path/'a.onnx').write_text('older')
    with pytest.raises(ValueError, match='differs from the learner by up to .*only IntToFloatTensor and Normalize'): export_onnx(learn, tmp_path/'a.onnx', pixels=True)
    assert names(tmp_path) == ['a.onnx'] and (tmp_path/'a.onnx').read_text() == 'older'

def test_ctrl_c(tmp_path, monkeypatch):
    learn = learner()
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(torch.onnx, 'export', stop)
    with pytest.raises(KeyboardInterrupt): export_onnx(learn, tmp_path/'a.onnx')
    assert not names(tmp_path) and learn.model.training

def test_mistakes_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, 'export', None)     # which is not reached
    learn = learner()
    def fails(match, file='a.onnx', learn=learn, **kwargs):
        with pytest.raises(ValueError, match=match): export_onnx(learn, tmp_path/file, **kwargs)
    fails('ends in .onnx', 'a.pkl')
    fails('Make it first', 'no/a.onnx')
    (tmp_path/'b.onnx').mkdir()
    fails('is a folder', 'b.onnx')
    fails('no `IntToFloatTensor`', pixels=True)
    fails('MSELoss.*Expected a loss with a softmax', learn=Learner(learn.dls, net(), loss_func=MSELossFlat()), probs=True)
    items = list(learn.dls.train_ds)
    empty = learner(net(), DataLoaders(learn.dls.train, TorchDL([], 8)))
    fails('`dls.valid` is empty.*test_dl', learn=empty)
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"need onnxscript .*pip install 'fastdistill\[deploy\]'"): export_onnx(learn, tmp_path/'a.onnx')

def test_loaded_learners(photos, tmp_path):
    "They have no items: a `dl` has"
    photo_learner(photos).export(tmp_path/'a.pkl')
    learn = load_learner(tmp_path/'a.pkl')
    with pytest.raises(ValueError, match='test_dl'): export_onnx(learn, tmp_path/'a.onnx')
    dl = learn.dls.test_dl(sorted(photos.glob('*.jpg'))[:3])
    export_onnx(learn, tmp_path/'a.onnx', pixels=True, dl=dl)
    assert names(tmp_path) == ['a.onnx','a.pkl']

@pytest.mark.parametrize('loss,y,n_out,undo', [(BCEWithLogitsLossFlat(), lambda x: (x[:,:3] > 0).float(), 3, torch.sigmoid), (MSELossFlat(), lambda x: x[:,:1], 1, None)])
def test_several_labels_and_numbers(loss, y, n_out, undo, tmp_path, capsys):
    learn = Learner(tabular(y), nn.Linear(4, n_out), loss_func=loss)
    file = export_onnx(learn, tmp_path/'a.onnx', probs=undo is not None)
    x,_ = learn.dls.valid.one_batch()
    want = learn.model(x).detach()
    assert np.allclose(run(file, x.numpy()), undo(want) if undo else want, atol=1e-5) and torch.allclose(OnnxModel(file)(x), want, atol=1e-4)
    assert ('decisions' in capsys.readouterr().out) == (n_out > 1)

def test_a_file_as_a_model_can_be_copied(tmp_path):
    import copy, pickle
    learn = learner()
    model = OnnxModel(export_onnx(learn, tmp_path/'a.onnx'))
    x,_ = learn.dls.valid.one_batch()
    for other in (copy.deepcopy(model),pickle.loads(pickle.dumps(model))): assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match=r"takes .*\['?s?\d*'?.*, 2, 8, 8.*but got \(16, 2, 9, 9\) float32|takes .* but got"): model(torch.zeros(16, 2, 9, 9))
