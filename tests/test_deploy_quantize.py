"int8 files: calibrated on training items as validation would show them, and measured on the others."
import re
import numpy as np, onnx, onnxruntime as ort, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat
from fastai.vision.all import Flip, Normalize, RandomResizedCrop, imagenet_stats
from onnxruntime import quantization
from torch import nn
from torch.utils.data import DataLoader as TorchDL
from conftest import data, learner, loaders, net
from fastdistill.all import *
from fastdistill.deploy.quantize import training_inputs
from test_applications import tabular
from test_deploy_export import facts, middle, names, photo_learner, photos, run

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "A learner that knows, and its file"
    torch.manual_seed(0)
    learn = learner(net(8), data(256, 64))
    learn.fit(5, 1e-2)
    return learn,export_onnx(learn, tmp_path_factory.mktemp('fitted')/'a.onnx')

class Read(list):
    "Items that remember which of them were asked for"
    def __init__(self, items): super().__init__(items); self.seen = []
    def __getitem__(self, i): self.seen.append(i); return super().__getitem__(i)

@pytest.fixture
def calibrated(monkeypatch):
    "What the calibration reads: a list of dictionaries of arrays"
    found,quantize_static = [],quantization.quantize_static
    def spy(model, out, reader, **kwargs):
        while (b := reader.get_next()) is not None: found.append(b)
        class Again(quantization.CalibrationDataReader):
            left = iter(found)
            def get_next(self): return next(self.left, None)
        return quantize_static(model, out, Again(), **kwargs)
    monkeypatch.setattr(quantization, 'quantize_static', spy)
    return found

def test_an_int8_file(fitted, tmp_path, capfd):
    learn,file = fitted
    small = quantize_onnx(file, learn.dls, tmp_path/'b ä.onnx', n=50)
    out,err = capfd.readouterr()
    assert names(tmp_path) == ['b ä.onnx'] and not err
    graph = onnx.load(small).graph
    assert {i.data_type for i in graph.initializer if len(i.dims) > 1} == {onnx.TensorProto.INT8}
    assert all(np.abs(onnx.numpy_helper.to_array(i)).max() <= 64 for i in graph.initializer if len(i.dims) > 1)     # seven bits
    x,y = (torch.cat(o).numpy() for o in zip(*learn.dls.valid))
    before,after = (run(f, x) for f in (file,small))
    assert np.abs(before - after).max() < 0.2*before.std()
    accs = [(o.argmax(1) == y).mean() for o in (after,before)]
    assert out.endswith(f'On 16 items of dls.valid: accuracy {accs[0]:.3f} instead of {accs[1]:.3f}, same decisions for {(before.argmax(1) == after.argmax(1)).mean():.1%}.\n')
    assert {**facts(file), 'calibrated_on':50} == facts(small)
    assert all(len(run(small, np.zeros((n,2,8,8), np.float32))) == n for n in (1,3,64))

@pytest.mark.parametrize('n', [1,10,1000])
def test_which_items_calibrate(n, tmp_path, calibrated):
    "Training items, each once, from the first to the last; no validation item"
    items = list(data(40).train_ds)
    train,valid = Read(items[:30]),Read(items[30:])
    learn = learner(net(), loaders(train, valid, 8))
    file = export_onnx(learn, tmp_path/'a.onnx')
    train.seen,valid.seen = [],[]
    list(training_inputs(learn.dls, n))
    assert train.seen == {1:[0], 10:[0,3,6,10,13,16,19,23,26,29], 1000:list(range(30))}[n] and valid.seen in ([],[0])     # fastai looks at the types of the first
    if n != 10: return     # once is enough
    asked,valid.seen = list(train.seen),[]
    quantize_onnx(file, learn.dls, n=n)
    got = np.concatenate([b['input'] for b in calibrated])
    assert (got == torch.stack([items[i][0] for i in asked]).numpy()).all()
    assert sorted(valid.seen) == list(range(10))     # each once, to measure

@pytest.mark.parametrize('pixels', [False,True])
def test_images_without_augmentation(pixels, photos, tmp_path, calibrated):
    "The middle of each photograph, though training takes random parts of it and flips them"
    learn = photo_learner(photos, Flip(p=1.), Normalize.from_stats(*imagenet_stats))

    file = export_onnx(learn, tmp_path/'a.onnx', pixels=pixels)
    state = torch.get_rng_state()
    quantize_onnx(file, learn.dls)
    assert torch.equal(state, torch.get_rng_state()) and learn.dls.train_ds.split_idx == 0     # nothing has changed
    want = np.stack([middle(f) for f in learn.dls.train_ds.items])
    got = np.concatenate([next(iter(b.values())) for b in calibrated])
    if not pixels:
        mean,std = (np.array(o).reshape(3,1,1) for o in imagenet_stats)
        want = (want.transpose(0,3,1,2)/255 - mean)/std
    assert got.dtype == (np.uint8 if pixels else np.float32) and got.shape == want.shape and np.allclose(got, want, atol=1e-5)

class Block(nn.Module):
    "Attention over four patches, as in a vision transformer"
    def __init__(self): super().__init__(); self.patches,self.mix,self.head = nn.Conv2d(2, 8, 4, 4),nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),nn.Linear(8, 3)
    def forward(self, x): return self.head(self.mix(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

class Residual(nn.Module):
    "A depthwise convolution with a shortcut, a gate and a hard activation, as in MobileNetV3"
    def __init__(self): super().__init__(); self.a,self.b,self.c,self.head = nn.Conv2d(2, 8, 1),nn.Conv2d(8, 8, 3, padding=1, groups=8),nn.Conv2d(8, 8, 1),nn.Linear(8, 3)
    def forward(self, x):
        x = nn.functional.hardswish(self.a(x))
        y = self.b(x)
        x = x + y*nn.functional.hardsigmoid(self.c(nn.functional.adaptive_avg_pool2d(y, 1)))
        return self.head(x.mean((2,3)))

@pytest.mark.parametrize('make', [Block,Residual])
def test_architectures(make, tmp_path):
    learn = learner(make(), data(64, 16))
    learn.fit(3, 1e-2)
    file = export_onnx(learn, tmp_path/'a.onnx')
    small = quantize_onnx(file, learn.dls)
    x = torch.stack([x for x,_ in learn.dls.train_ds]).numpy()
    a,b = run(file, x),run(small, x)
    assert small.name == 'a-int8.onnx' and np.abs(a - b).mean() < 0.2*a.std()

def test_numbers_and_loaders_of_pytorch(tmp_path, capsys):
    learn = Learner(tabular(lambda x: x[:,:1]), nn.Linear(4, 1), loss_func=MSELossFlat())
    quantize_onnx(export_onnx(learn, tmp_path/'a.onnx'), learn.dls)
    assert re.search(r'answers differ by up to 0\.\d+\.\n', capsys.readouterr().out)
    items = list(data().train_ds)
    learn = learner(net(), DataLoaders(TorchDL(items, 8, shuffle=True), TorchDL(items, 10)))
    quantize_onnx(export_onnx(learn, tmp_path/'b.onnx'), learn.dls)
    assert re.search(r'accuracy \d.\d{3} instead of \d.\d{3}', capsys.readouterr().out)

def test_unlabelled_items_take_no_part(photos, tmp_path, calibrated):
    learn = photo_learner(photos)
    file = export_onnx(learn, tmp_path/'a.onnx')
    quantize_onnx(file, add_unlabelled(learn.dls, learn.dls.valid_ds.items))
    assert sum(len(b['input']) for b in calibrated) == len(learn.dls.train_ds)

def test_mistakes_leave_what_was_there(fitted, photos, tmp_path, monkeypatch):
    learn,file = fitted
    out = tmp_path/'b.onnx'
    out.write_text('older')
    def fails(match, file=file, dls=learn.dls, **kwargs):
        with pytest.raises(ValueError, match=match): quantize_onnx(file, dls, **{'out':out, **kwargs})
        assert names(tmp_path) == ['b.onnx'] and out.read_text() == 'older'
    fails('no such file', tmp_path/'no.onnx')
    fails('cannot load it', out, out=tmp_path/'c.onnx')
    fails('n to be at least 1', n=0)
    fails('another name', out=file)
    fails('ends in .onnx', out=tmp_path/'b.pkl')
    fails('dls.valid is empty', dls=DataLoaders(learn.dls.train, TorchDL([], 8)))
    fails('no validation set', dls=DataLoaders(learn.dls.train))
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(quantization, 'quantize_static', stop)
    with pytest.raises(KeyboardInterrupt): quantize_onnx(file, learn.dls, out)
    assert names(tmp_path) == ['b.onnx'] and out.read_text() == 'older'

def test_other_classes(photos, tmp_path):
    learn,other = photo_learner(photos),photo_learner(photos)
    file = export_onnx(learn, tmp_path/'a.onnx', pixels=True)
    with pytest.raises(ValueError, match='takes plain pixels, but these data have none'): quantize_onnx(file, data())
    other.dls.vocab.items[:] = list(reversed(other.dls.vocab))
    with pytest.raises(ValueError, match="with the classes .*Katze.*but these have"): quantize_onnx(file, other.dls)
