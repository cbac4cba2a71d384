"Small real and made data, small networks, quiet learners."
import matplotlib
matplotlib.use('agg')
import os, socket, warnings
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, set_seed
from hypothesis import settings
from torch import nn

if 'PYTEST_XDIST_WORKER' in os.environ:     # the threads of several workers would wait for each other
    os.environ.setdefault('OMP_NUM_THREADS', '1')     # for the processes that tests start
    torch.set_num_threads(1)

settings.register_profile('same', derandomize=True)     # the same examples each time; --hypothesis-profile=default draws new ones
settings.load_profile('same')
warnings.filterwarnings('ignore', message='.*torch.jit.script.*')

def net(width=4, dropout=0.):
    "Three-class network with batch norm, an in-place activation and two named stages, for inputs (B, 2, 8, 8)"
    def stage(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
    return nn.Sequential(stage(2, width), stage(width, 2*width), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8*width, 3))

def mlp(width=5):
    "Three-class network without batch norm, for inputs (B, 2, 8, 8): its batch gradient is the mean of its items' gradients"
    return nn.Sequential(nn.Flatten(), nn.Linear(128, width), nn.Tanh(), nn.Linear(width, 3))

def loaders(items, valid, bs, shuffle=True, **kwargs):
    "DataLoaders on the CPU, without workers; all of `valid` is one batch"
    kwargs = dict(num_workers=0, device=torch.device('cpu'), **kwargs)
    return DataLoaders(TfmdDL(items, bs=bs, shuffle=shuffle, **kwargs), TfmdDL(valid, bs=len(valid), **kwargs), device=torch.device('cpu'))

def data(n=24, bs=8, shuffle=True):
    "Images of noise, the class in the brightness of one half"
    gen = torch.Generator().manual_seed(1)
    y = torch.randint(3, (n,), generator=gen)
    x = torch.randn(n, 2, 8, 8, generator=gen)
    x[:,0,:4] += y.view(-1,1,1).float()
    items = list(zip(x, y))
    return loaders(items, items[:16], bs, shuffle)

class QuietLearner(Learner):
    "A learner that shows neither bars nor tables"
    def fit(self, *args, **kwargs):
        with self.no_bar(), self.no_logging(): return super().fit(*args, **kwargs)
    def validate(self, *args, **kwargs):
        with self.no_bar(): return super().validate(*args, **kwargs)
    def get_preds(self, *args, **kwargs):
        with self.no_bar(): return super().get_preds(*args, **kwargs)

def learner(model=None, dls=None, **kwargs):
    return QuietLearner(data() if dls is None else dls, net() if model is None else model, loss_func=CrossEntropyLossFlat(),
                        metrics=accuracy, **kwargs)

@pytest.fixture
def few_passes(monkeypatch):
    "`compare` times two forward passes of each model instead of thirty"
    from fastdistill import compare
    time_forward = compare.time_forward
    monkeypatch.setattr(compare, 'time_forward', lambda call, xb, n: time_forward(call, xb, 2))

def n_hooks(*models): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())

def state(model): return {k:v.clone() for k,v in model.state_dict().items()}

def same_state(model, before): return all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture
def dynamo():
    "What is compiled starts anew, and is forgotten"
    torch.compiler.reset()
    yield
    torch.compiler.reset()

@pytest.fixture(autouse=True)
def _seed(): set_seed(0, reproducible=True)

@pytest.fixture
def teacher(): return net(8)

@pytest.fixture(scope='module')
def trained():
    "A learner that knows: 256 images in batches of 64"
    set_seed(0)
    learn = learner(net(8), data(256, 64))
    learn.fit(10, 1e-2)
    assert learn.validate()[1] > 0.9
    return learn
