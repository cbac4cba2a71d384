"""On a GPU that is not there: PyTorch's `FakeTensorMode` has the shapes, types and devices of all tensors, but no numbers.

A tensor that was left on the CPU is an error here, and so is a number that the host reads, which would wait for a GPU. What has no counterpart without
numbers has a stand-in: `Module.to` gives a module new parameters, a backward pass is a walk from node to node, as PyTorch's engine asks the
driver for its streams, and in a fit `HostReads` answers each read with 0 and counts it. What this mode cannot do is `Teacher(model, fast=True)`, which
measures times, a recording, which compares its inputs on the host, and values. `tests/test_gpu.py` has what needs a real GPU.
"""
import pytest, torch
import fastai.callback.all     # gives Learner its to_fp16 and the like
from fastai.basics import Callback, DataLoaders, TfmdDL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import QuietLearner, n_hooks, net
from fastdistill.all import *
from fastdistill.losses.base import loss_needs, registered_losses
from loss_cases import every, is_on_logits, is_on_values, kinds

fake = pytest.importorskip('torch._subclasses.fake_tensor', reason='this PyTorch has no FakeTensorMode')
pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='a PyTorch for CPUs alone has no gradients of CUDA tensors')
cuda = torch.device('cuda')
precisions = [torch.float32,torch.float16,torch.bfloat16]

# --- stand-ins ---

def to(self, *args, **kwargs):
    "`Module.to`, which cannot exchange the tensors of a parameter in this mode"
    device,dtype,_,layout = torch._C._nn._parse_to(*args, **kwargs)
    def moved(t):
        t = t.detach().to(device=device, dtype=dtype if t.is_floating_point() else None)
        return t.contiguous(memory_format=layout) if layout and t.ndim == 4 else t
    for m in self.modules():
        for k,p in m._parameters.items():
            if p is None: continue
            new = moved(p)
            if (new.device,new.dtype,new.stride()) != (p.device,p.dtype,p.stride()): m._parameters[k] = nn.Parameter(new, p.requires_grad)
        for k,b in m._buffers.items(): m._buffers[k] = b if b is None else moved(b)
    return self

class Event:
    "`torch.cuda.Event`"
    def record(self): pass
    def synchronize(self): pass

class HostReads(TorchDispatchMode):
    "Count how often the host reads from the GPU, or waits while it writes to it; each number that is read is 0"
    def __init__(self):
        super().__init__()
        self.reads = self.writes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name,kwargs = func.overloadpacket.__name__,kwargs or {}
        if name == '_local_scalar_dense': self.reads += args[0].device.type == 'cuda'
        if name == '_to_copy':
            ends = args[0].device.type,torch.device(kwargs.get('device') or args[0].device).type
            self.reads += ends == ('cuda','cpu')
            self.writes += ends == ('cpu','cuda') and not kwargs.get('non_blocking')
        if name != '_local_scalar_dense': return func(*args, **kwargs)
        return False if args[0].dtype == torch.bool else 0. if args[0].is_floating_point() else 0

@pytest.fixture
def gpu(monkeypatch):
    "A machine with a fake GPU: what is made inside is on the CPU, as always, or on it with `with cuda:`"
    monkeypatch.setattr(nn.Module, 'to', to)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    for name in ('get_rng_state','set_rng_state'): monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)     # otherwise autocast does nothing
    monkeypatch.setattr(fake.FakeTensorMode, '__deepcopy__', lambda self, _: self, raising=False)     # copies of tensors are in the same mode
    with fake.FakeTensorMode(): yield

def nodes(loss):
    "Those of its graph, each before the ones that it needs"
    found,seen = [],set()
    def visit(node):
        if node is None or node in seen: return
        seen.add(node)
        for n,_ in node.next_functions: visit(n)
        found.append(node)
    visit(loss.grad_fn)
    return found[::-1]

def backward(loss):
    "`loss.backward()`"
    grads = {(loss.grad_fn,0):torch.ones_like(loss)}
    for node in nodes(loss):
        own = [grads.get((node,i)) for i in range(len(node._input_metadata))]
        if hasattr(node, 'variable'):
            p,g = node.variable,own[0].detach()
            p.grad = g if p.grad is None else p.grad+g
            continue
        found = node(*own)
        for (n,i),g in zip(node.next_functions, found if isinstance(found, tuple) else [found]):
            if n is None or g is None: continue
            meta = n._input_metadata[i]
            g = g.sum_to_size(tuple(meta.shape)).to(meta.dtype)
            grads[n,i] = grads[n,i]+g if (n,i) in grads else g

def test_a_walk_through_the_graph_gives_the_gradients_of_backward():
    x,model = torch.randn(4,2,8,8),net()
    def loss(): return (model(x).log_softmax(1).square().sum() + model(x).std())/3
    loss().backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    backward(loss())
    for p,g in zip(model.parameters(), want): torch.testing.assert_close(p.grad, g)

# --- the checks can fail ---

def test_a_tensor_on_the_cpu_is_an_error(gpu):
    with pytest.raises(RuntimeError, match='device'): nn.Linear(2, 3)(torch.ones(4,2, device=cuda))
    with pytest.raises(RuntimeError, match='device'): torch.ones(3, device=cuda) + torch.ones(3)

@pytest.mark.parametrize('read', [lambda x: x.sum().item(), lambda x: bool(x.sum()), lambda x: x[x > 0], lambda x: x.sum().cpu().tolist()])
def test_a_number_that_the_host_reads_is_an_error(gpu, read):
    with pytest.raises((fake.DataDependentOutputException, fake.DynamicOutputShapeException)): read(torch.ones(3, device=cuda))

@pytest.mark.parametrize('dtype', precisions[1:])
def test_autocast_is_on(gpu, dtype):
    with torch.autocast('cuda', dtype): assert nn.Linear(2, 3, device=cuda)(torch.ones(4,2, device=cuda)).dtype == dtype

# --- losses ---

def features(kind, *channels, **kwargs):
    "Of the kind 2 a vector, 3 a sequence, 4 a map"
    return [torch.randn({2:(6,c), 3:(6,4,c), 4:(6,c,4,4)}[kind], device=cuda, **kwargs) for c in channels]

def inputs(loss, kind, dtype=torch.float32):
    "A term as in a fit; the student's leaves, and for each layer its feature and the teacher's; labels; numbers of items"
    needs = loss_needs(loss)
    names = [] if is_on_logits(loss) else ['a','b'] if needs.all_layers else ['a']
    n,same = max(1, len(names)),is_on_logits(loss) or needs.same_channels
    leaves,t = features(kind, *[5]*n, requires_grad=True),features(kind, *[5 if same else 7]*n, dtype=dtype)
    targ = [torch.randn(6, 5, device=cuda) if is_on_values(loss) else torch.arange(6, device=cuda)%5] if needs.needs_targ else []
    items = torch.arange(6, device=cuda) if needs.needs_items else None
    return Match(loss, names, names), leaves, [x.to(dtype) for x in leaves], t, targ, items

def of_fit(loss): return registered_losses.get(type(loss).__name__, type(loss)) if type(loss).__name__ in ('CRD','ReviewKD') else loss
losses = [of_fit(loss) for loss in every]     # without the wrappers that let a loss be called with a pair
losses = [loss() if isinstance(loss, type) else loss for loss in losses]
def case(loss, kind, *more): return pytest.param(loss, kind, *more, id=f'{loss}-{kind}d' + ''.join(f'-{o}' for o in more))

def test_all_losses_are_here(): assert {*registered_losses} <= {type(loss).__name__ for loss in losses}

@pytest.mark.parametrize('loss,kind,dtype', [case(loss, k, d) for loss in losses for k in kinds(loss) for d in precisions if k == max(kinds(loss)) or d == torch.float16])
def test_a_loss(gpu, loss, kind, dtype):
    "Forward and backward; what reads a number is an error"
    m,leaves,s,t,targ,items = inputs(loss, kind, dtype)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        with HostReads() as once: built = m.build(s, t, 20)
        value = m(s, t, *targ, items=items, losses=built)
    assert value.device.type == 'cuda' and value.dtype == torch.float32 and value.ndim == 0
    assert once.reads == (isinstance(loss, FitNet) and kind == 4)     # which looks whether the teacher's features come from a ReLU
    assert all(x.device.type == 'cuda' for x in built.state_dict().values())
    backward(value)
    for p in [*leaves, *built.parameters()]: assert p.grad.device.type == 'cuda' and p.grad.shape == p.shape and p.grad.dtype == torch.float32

@pytest.mark.parametrize('loss,kind', [case(loss, max(kinds(loss))) for loss in losses])
def test_a_teacher_on_the_cpu_is_found(gpu, loss, kind):
    m,_,s,t,targ,items = inputs(loss, kind)
    with HostReads(): built = m.build(s, t, 20)
    with pytest.raises(RuntimeError, match='device'): m(s, [x.cpu() for x in t], *targ, items=items, losses=built)

@pytest.mark.parametrize('loss', [l for l in losses if hasattr(l, 'reduce_teacher')], ids=repr)
def test_a_loss_of_what_a_recording_keeps(gpu, loss):
    m,leaves,s,t,targ,items = inputs(loss, 4)
    built = m.build(s, t, 20)
    value = m(s, [loss.reduce_teacher(x) for x in t], *targ, items=items, losses=built, reduced=True)
    backward(value)
    assert value.device.type == 'cuda' and all(x.grad.device.type == 'cuda' for x in leaves)

@pytest.mark.parametrize('loss', [DecoupledKD(), NormalizedKD()], ids=repr)
def test_blended_labels_are_counted_on_the_host(gpu, loss):
    "Under MixUp: how many labels have a share is not known to the host before it asks, and the rows of these losses are as many"
    m,_,s,t,*_ = inputs(loss, 2)
    with pytest.raises(fake.DynamicOutputShapeException, match='nonzero'): m(s, t, torch.rand(6,5, device=cuda))

@pytest.mark.parametrize('dtype', precisions, ids=str)
@pytest.mark.parametrize('kind', [2,3,4])
def test_a_projector(gpu, kind, dtype):
    m = Match(Cosine, 'a', 'a', projector=True)
    s,t = features(kind, 5, 7, dtype=dtype)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
        built = m.build([s], [t])
        value = m([s], [t], losses=built)
    backward(value)
    for p in built.parameters(): assert p.device.type == p.grad.device.type == 'cuda' and p.dtype == torch.float32

# --- teachers ---

def batch(n=6): return torch.randn(n, 2, 8, 8, device=cuda)

teachers = dict(plain=lambda: Teacher(net()), input_tfm=lambda: Teacher(net(), input_tfm=lambda x: x.flip(-1)/2),
                bfloat16=lambda: Teacher(net(), dtype=torch.bfloat16), channels_last=lambda: Teacher(net(), channels_last=True),
                float32=lambda: Teacher(net(), dtype=torch.float32), ensemble=lambda: Ensemble([net(), Teacher(net(), input_tfm=lambda x: x*2)], [1,2]))

@pytest.mark.parametrize('dtype', precisions, ids=str)
@pytest.mark.parametrize('kind', teachers)
def test_a_teacher_comes_from_the_cpu_and_goes_back(gpu, kind, dtype):
    teacher = teachers[kind]()
    with pytest.raises(RuntimeError): teacher(batch())     # it is still on the CPU
    teacher.start(cuda)
    with torch.autocast('cuda', dtype, enabled=dtype != torch.float32): answer = teacher(batch())
    own = dict(bfloat16=torch.bfloat16, float32=torch.float32).get(kind, dtype)
    assert answer.device.type == 'cuda' and answer.shape == (6,3) and answer.dtype == own and not answer.requires_grad
    assert {p.device.type for p in teacher.model.parameters()} == {'cuda'}
    teacher.stop()
    assert {p.device.type for p in teacher.model.parameters()} == {'cpu'} and all(m.training for m in teacher.model.modules())

# --- a fit ---

class FakeLearner(QuietLearner):
    def _backward(self): backward(self.loss_grad)

class Reads(Callback):
    "How often the host reads or writes in each training batch"
    order = -100
    def __init__(self, mode): self.mode,self.found = mode,[]
    def n(self): return self.mode.reads + self.mode.writes
    def before_batch(self): self.start = self.n()
    def after_batch(self):
        if self.training: self.found.append(self.n() - self.start)

def reads(cbs=None, to=None):
    "After the first batch of a fit, which has a closer look"
    items = [(torch.randn(2,8,8),i%3) for i in range(16)]
    dls = DataLoaders(*[TfmdDL(items, bs=8, shuffle=s, num_workers=0, device=cuda) for s in (True,False)], device=cuda)
    with cuda: learn = FakeLearner(dls, net(), loss_func=nn.CrossEntropyLoss(), cbs=cbs)
    if to: getattr(learn, to)()
    with HostReads() as mode: learn.fit(1, cbs=(count := Reads(mode)))
    assert all(p.device.type == 'cuda' and p.grad is not None for p in learn.model.parameters()) and n_hooks(learn.model) == 0
    return count.found[1:]

def all_kinds():
    "Predictions, labels, layers, a projector, a memory of items, a second teacher"
    return [SoftTarget, DecoupledKD, Match(Attention, ['0','1'], ['0','1']), Match(FitNet, '0', '0'),
            Match(CRD(20, dim=4), '1', '1'), Match(Similarity, '1', '1', teacher=net(6))]

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16'])
def test_a_fit(gpu, to):
    """From start to end, in each step the host reads once more than without a teacher: the parts of the loss, in one transfer.

    Without numbers it shows nothing of their values, and nothing of the concerns about the first batch, which look at them. Losses are trained,
    their parameters join the optimizer; in float16 the scaler of gradients reads on the host as well, and is told that all are finite."""
    kd = KnowledgeDistillationCallback(net(8), all_kinds())
    alone = reads(to=to)
    assert reads(kd, to) == [n+1 for n in alone]
    assert len(kd.trained.params) > 4 and all(p.device.type == p.grad.device.type == 'cuda' for p in kd.trained.params)
    assert {p.device.type for p in kd.teacher.model.parameters()} == {'cpu'}     # where it came from

# PyTorch copies no fake network where there is a real GPU; there, tests/test_gpu.py has an average
a_gpu_is_here = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a real GPU')
teachers_of_fits = dict(ema=lambda: EMATeacher(0.9), ensemble=lambda: [net(8),net(6)], layout=lambda: Teacher(net(8), dtype=torch.bfloat16, channels_last=True))

@pytest.mark.parametrize('kind', [pytest.param('ema', marks=a_gpu_is_here),'ensemble','layout'])
def test_a_fit_with_another_teacher(gpu, kind):
    alone = reads()
    assert reads(KnowledgeDistillationCallback(teachers_of_fits[kind]())) == [n+1 for n in alone]
