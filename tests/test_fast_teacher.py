"A teacher that takes less time: its own precision and layout, chosen by timing, and layers that nobody looks at do not run."
import gc, time, weakref
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.vision.learner import create_vision_model
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18
from conftest import data, learner, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.layers import FeatureHooks
from fastdistill.partial_forward import StopForward, StopProof, stop_after
from test_callback import Gradients, close, grads_by_hand, one_batch

KD = KnowledgeDistillationCallback
stages = ['0','1']
def strides(model): return [p.stride() for p in model.parameters()]

# --- precision and layout ---

@pytest.mark.parametrize('dtype,channels_last', [(torch.bfloat16,False), (torch.bfloat16,True), (None,True), (torch.float32,True), (torch.float16,False)])
def test_precision_and_layout(teacher, dtype, channels_last):
    "The answers are those of the plain model within the precision; weights and layout are as found"
    x,before,layout,seen = torch.randn(4,2,8,8),state(teacher),strides(teacher),[]
    want = deepcopy(teacher).eval()(x)
    fast = Teacher(teacher, dtype=dtype, channels_last=channels_last)
    def last(t): return t.is_contiguous(memory_format=torch.channels_last)
    handle = teacher.register_forward_hook(lambda m,i,o: seen.append((o.dtype, last(m[0][0].weight), last(i[0]))))
    fast.start('cpu')
    got = fast(x)
    fast.stop()
    handle.remove()
    eps = {torch.bfloat16:5e-2,torch.float16:1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(got.float(), want, rtol=eps, atol=eps)
    assert seen == [(dtype or torch.float32, channels_last, channels_last)] and same_state(teacher, before) and strides(teacher) == layout and teacher.training

def test_a_teacher_found_with_the_channels_last_stays_so(teacher):
    teacher.to(memory_format=torch.channels_last)
    layout = strides(teacher)
    for fast in (Teacher(teacher, channels_last=True), Teacher(teacher), Teacher(Sleeps(teacher, last_ms=30), fast=True)):
        learner().fit(1, cbs=KD(fast))
        assert strides(teacher) == layout
    assert not fast.channels_last     # chosen against, and still the weights' own layout

def test_full_precision_beside_a_student_in_half(teacher):
    x = torch.randn(4,2,8,8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert Teacher(teacher)(x).dtype == torch.bfloat16
        assert Teacher(teacher, dtype=torch.float32)(x).dtype == torch.float32
    assert Teacher(teacher, dtype=torch.float32)(x.half()).dtype == torch.float32

def test_gradients_with_a_teacher_in_bfloat16(teacher):
    "Those of the hand-computed step with its answers, losses in float32"
    dls,model,g = one_batch(),net(),Gradients()
    hand,plain = deepcopy(model).train(),deepcopy(teacher).eval()
    def answer(x):
        with torch.autocast('cpu', dtype=torch.bfloat16): return plain(x).float()
    learner(model, dls, cbs=[g, KD(Teacher(teacher, dtype=torch.bfloat16))]).fit(1)
    close(g.steps[0], grads_by_hand(hand, answer, *dls.train.one_batch(), .5, .5))

@pytest.mark.parametrize('kw,ex,msg', [(dict(dtype='bfloat16'), TypeError, "floating-point type.*but got 'bfloat16'"), (dict(dtype=torch.int8), TypeError, 'floating-point'),
                                       (dict(fast=True, channels_last=True), ValueError, 'either fast=True'), (dict(fast=True, dtype=torch.bfloat16), ValueError, 'either fast=True')])
def test_bad_choice(teacher, kw, ex, msg):
    with pytest.raises(ex, match=msg): Teacher(teacher, **kw)

# --- fast=True ---

class Sleeps(nn.Module):
    "Takes `ms` longer in float32, `last_ms` with the channels last; in bfloat16 its logits are `off` by so much, or it fails"
    def __init__(self, model, ms=0, half_ms=0, last_ms=0, off=0., fails=False):
        super().__init__()
        self.model,self.ms,self.half_ms,self.last_ms,self.off,self.fails = model,ms,half_ms,last_ms,off,fails
        self.calls = 0
    def forward(self, x):
        half = torch.is_autocast_enabled('cpu')
        self.calls += 1
        if half and self.fails: raise RuntimeError('no such kernel')
        time.sleep(((self.half_ms if half else self.ms) + self.last_ms*(not x.is_contiguous()))/1000)
        out = self.model(x)
        return out + self.off*out.float().std() if half else out

@pytest.mark.parametrize('kw,dtype', [(dict(ms=30), torch.bfloat16), (dict(half_ms=30), None), (dict(ms=30, off=.5), None), (dict(ms=30, fails=True), None)],
                         ids=['half is faster','half is slower','half is wrong','half is unknown'])
def test_fast_takes_what_is_faster_and_close_enough(teacher, kw, dtype, capsys):
    model = Sleeps(teacher, **kw)
    before,fast = state(model),Teacher(model, fast=True)
    learn = learner(cbs=KD(fast))
    learn.fit(1)
    printed,calls = capsys.readouterr().out,model.calls
    assert fast.dtype == dtype and printed.count('Teacher Sleeps: ') == 1 and ('bfloat16' in printed) == (dtype is not None)
    assert same_state(model, before) and n_hooks(model, learn.model) == 0 and all(p.is_contiguous() for p in model.parameters())
    learn.fit(1)     # the choice stays
    assert model.calls == calls + 3 and capsys.readouterr().out == ''

def test_fast_with_layers(teacher):
    "Hooks stay where they are, and the choice's own forward passes leave nothing in them"
    steps,student = [],net()
    for t in (Teacher(teacher), Teacher(teacher, fast=True, tolerance=0.)):     # nothing in bfloat16 is that close
        g = Gradients()
        learner(deepcopy(student), one_batch(), cbs=g).fit(2, cbs=KD(t, [SoftTarget, Match(Attention, stages, stages)]))
        steps.append(g.steps)
    for a,b in zip(*steps): close(a, b)

def test_fast_members_of_an_ensemble(teacher, capsys):
    learner().fit(1, cbs=KD([Teacher(Sleeps(teacher, ms=20), fast=True), net(8)]))
    assert capsys.readouterr().out.count('Teacher Sleeps: bfloat16') == 1

def test_fast_without_images():
    "Nothing to lay out: precision alone is timed"
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    fast = Teacher(Sleeps(model, ms=20), fast=True)
    fast.start('cpu')
    assert fast.choose(torch.randn(5,4)) and (fast.dtype,fast.channels_last) == (torch.bfloat16,False) and not fast.choose(torch.randn(5,4))
    fast.stop()

def test_fast_with_weights_in_half_precision(teacher):
    "There is no float32 to compare with: its own answers are"
    fast = Teacher(teacher.half(), input_tfm=lambda x: x.half(), fast=True)
    learner().fit(1, cbs=KD(fast))
    assert not fast.fast and fast.dtype in (None,torch.bfloat16)

def test_choosing_leaves_no_hidden_state():
    class Remembers(nn.Module):
        "Answers with all inputs since its reset"
        def __init__(self): super().__init__(); self.seen = 0.; self.w = nn.Parameter(torch.ones(1))
        def reset(self): self.seen = 0.
        def forward(self, x): self.seen = self.seen + x; return self.w*self.seen
    fast,x = Teacher(Remembers(), fast=True, tolerance=1e9),torch.randn(4,3)
    fast.start('cpu', reset=True)
    fast.choose(x)
    torch.testing.assert_close(fast(x), x)
    fast.stop()

# --- layers that nobody looks at ---

counts = {}
def count(m, i, o): m.n += 1
class Ran(nn.Identity):
    "Its forward passes are counted, outside of the network: one that counts by itself changes, and is not ended early"
    n = property(lambda self: counts.get(id(self), 0), lambda self, n: counts.update({id(self):n}))
    def __init__(self): super().__init__(); self.register_forward_hook(count); self.n = 0

def counted(width=8):
    model = net(width)
    model.add_module('5', Ran())
    return model

def test_a_fast_teacher_ends_early_too():
    teacher = counted()
    fast = Teacher(teacher, fast=True)
    learn = learner()
    learn.fit(1, cbs=KD(fast, Attention, '0', '0'))
    teacher[5].n = 0
    learn.fit(2, cbs=KD(fast, Attention, '0', '0'))
    assert teacher[5].n == 2
    fast.fast,teacher[5].n = True,0     # the passes that choose do not count as a layer's second run
    learn.fit(1, cbs=KD(fast, Attention, '0', '0'))
    assert teacher[5].n == 1 + 16 + 1     # float32 to compare with, four ways four times, the first batch

def test_a_compiled_teacher_runs_through(dynamo):
    "An exception in the middle of compiled code would have it compiled again"
    teacher = counted()
    for t,n in ((teacher,1), (torch.compile(teacher, backend='eager'),3)):
        for _ in range(2):     # the first pass changes a compiled model, so only the second fit could end it early
            teacher[5].n = 0
            learner().fit(1, cbs=KD(t, Attention, '0', '0'))
            assert teacher[5].n == n     # of three batches

@pytest.mark.parametrize('layers', [['0'],['1','0'],['0','0'],['0','0.2']])
def test_forward_ends_behind_the_last_layer(layers):
    "From the second batch of each epoch on, and the student's steps are bit for bit those of whole forward passes"
    states,teacher = [],counted()
    student = net()
    for extra,n in (([],2),([Match(lambda s,t: (s-t).square().mean(), weight=0.)],6)):     # a loss on predictions needs them
        teacher[5].n = 0
        learn = learner(deepcopy(student))
        torch.manual_seed(0); learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=KD(teacher, [Match(Attention, layers, layers), *extra]))
        assert teacher[5].n == n and n_hooks(teacher, learn.model) == 1     # the counter's own
        states.append(state(learn.model))
    assert same_state(learn.model, states[0])
    Teacher(teacher)(torch.randn(2,2,8,8))
    assert teacher[5].n == 7     # by itself it runs through

def test_a_layer_that_runs_twice_counts_with_its_last_output():
    class Two(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.first,self.conv,self.head,self.ran = nn.Conv2d(2,w,3,padding=1),nn.Conv2d(w,w,3,padding=1),nn.Linear(64*w,3),Ran()
        def forward(self, x): return self.ran(self.head(self.conv(self.conv(self.first(x)).relu()).flatten(1)))
    teacher,seen = Two(6),[]
    def loss(s, t): seen.append(t.clone()); return (s.mean()-t.mean()).square()
    learn = learner(dls=one_batch(32, 16))
    learn.fit(1, cbs=KD(teacher, loss, '1', 'conv'))
    x = next(iter(learn.dls.train))[0]
    assert teacher.ran.n == 2
    torch.testing.assert_close(seen[0], teacher.conv(teacher.conv(teacher.first(x)).relu()))

def test_an_error_behind_the_layers_is_still_seen_first(teacher):
    "The first batch runs through: a teacher that cannot answer is no good teacher"
    broken = nn.Sequential(teacher[0], teacher[1], nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match='The teacher Sequential cannot answer'): learner().fit(1, cbs=KD(broken, Attention, '0', '0'))
    assert n_hooks(broken) == 0

# --- a teacher is ended early only where that is proved to change nothing ---

class Twice(nn.Module):
    "Its layer `conv` runs twice where the batch is smaller"
    def __init__(self):
        super().__init__()
        self.conv,self.head = nn.Conv2d(2, 2, 3, padding=1),nn.Linear(128, 3)
    def forward(self, x):
        y = self.conv(x)
        if x.shape[0] < 8: y = self.conv(y)
        return self.head(y.flatten(1))

class Counts(nn.Module):
    "Each answer depends on how many came before"
    def __init__(self):
        super().__init__()
        self.conv,self.head,self.n = nn.Conv2d(2, 2, 3, padding=1),nn.Linear(128, 3),0
    def forward(self, x):
        y = self.conv(x*self.n)
        out = self.head(y.flatten(1))
        self.n += 1
        return out

class Buffer(Counts):
    def __init__(self): super().__init__(); del self.n; self.register_buffer('n', torch.zeros(()))

class Appends(Twice):
    def __init__(self): super().__init__(); self.old = []
    def forward(self, x):
        y = self.conv(x + sum(self.old))
        out = self.head(y.flatten(1))
        self.old.append(out.mean())
        return out

@pytest.mark.parametrize('make', [Twice,Counts,Buffer,Appends])
def test_features_are_those_of_whole_passes(make):
    "Of a plain copy that is asked the same batches, the last of which is smaller"
    teacher,seen,xs = make(),[],[]
    plain,got = deepcopy(teacher).eval(),[]
    def loss(s, t): seen.append(t.clone()); return (s.mean()-t.mean()).square()
    cb = Callback(before_batch=lambda self: xs.append(self.x) if self.training else None)
    learner(dls=data(28, 8, shuffle=False), cbs=cb).fit(1, cbs=KD(teacher, loss, '1', 'conv'))
    assert len(xs) > 2
    plain.conv.register_forward_hook(lambda m, i, o: got.append(o))
    for x,t in zip(xs, seen):
        with torch.no_grad(): plain(x)
        torch.testing.assert_close(t, got[-1])

def test_a_recurrent_teacher():
    "AWD-LSTM takes its hidden state from batch to batch: four batches as an unstopped one sees them"
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder, SequentialRNN
    from fastai.callback.rnn import ModelResetter
    def lm(n): return SequentialRNN(AWD_LSTM(20, 6, n, 2, bidir=False), LinearDecoder(20, 6, 0.))
    torch.manual_seed(0)
    teacher,student,seen,xs,want = lm(8),lm(7),[],[],[]
    plain = lm(8).eval()
    plain.load_state_dict(teacher.state_dict())
    text = torch.randint(20, (4*8,11))
    dls = DataLoaders.from_dsets(*[[(t[:-1],t[1:]) for t in text]]*2, bs=8, shuffle=False, num_workers=0, device=torch.device('cpu'))
    def loss(s, t): seen.append(t.clone()); return (s.mean()-t.mean()).square()
    cb = Callback(before_batch=lambda self: xs.append(self.x) if self.training else None)
    learn = Learner(dls, student, loss_func=lambda p, y: F.cross_entropy(p[0].flatten(0,1), y.flatten()), cbs=[cb, ModelResetter()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(teacher, loss, '0.rnns.0', '0.rnns.0'))
    plain.reset()
    plain[0].rnns[0].register_forward_hook(lambda m, i, o: want.append(o[0]))
    assert len(xs) == len(seen) == 4
    for x,t in zip(xs, seen):
        with torch.no_grad(): plain(x)
        torch.testing.assert_close(t, want[-1])

def test_a_unet_keeps_no_input_alive():
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import resnet18
    teacher = DynamicUnet(nn.Sequential(*list(resnet18().children())[:6]), 2, (32,32))
    items = [(torch.randn(3,32,32), torch.zeros(32,32).long())]*6
    dls = DataLoaders.from_dsets(items, items, bs=2, shuffle=False, num_workers=0, device=torch.device('cpu'))
    refs = []
    def note(self):
        if self.training: refs.append(weakref.ref(self.x))
    student = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1), cbs=Callback(before_batch=note))
    gc.collect(); gc.disable()
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(teacher, Attention, '0', 'layers.0.4'))
        assert len(refs) == 3 and not any(r() is not None for r in refs)
    finally: gc.enable()

class Orig(nn.Module):
    "Keeps its input on itself until its end, as fastai's `SequentialEx` does"
    def __init__(self): super().__init__(); self.conv,self.head = nn.Conv2d(2, 2, 3, padding=1),nn.Linear(128, 3)
    def forward(self, x):
        x.orig = x
        y = self.head(self.conv(x).flatten(1))
        x.orig = None
        return y

@pytest.mark.parametrize('model,layers,safe', [
    (lambda: resnet18(), ['layer1'], True), (lambda: resnet18(), ['layer1','layer1.0.bn1','layer4'], True), (lambda: mobilenet_v3_small(), ['features.3'], True),
    (lambda: create_vision_model(resnet18, 3, pretrained=False), ['0.4'], True), (lambda: xresnet18(), ['4'], True), (lambda: nn.DataParallel(resnet18()), ['layer2'], True),
    (Orig, ['conv'], False), (Twice, ['conv'], False)])
def test_what_is_ended_early(model, layers, safe):
    model = model().eval()
    x,ran = torch.randn(2, 2 if isinstance(model, (Orig,Twice)) else 3, *[8 if isinstance(model, (Orig,Twice)) else 64]*2),n_hooks(model)
    before = state(model)
    with torch.no_grad(), FeatureHooks(model, layers) as hooks:
        proof = StopProof(model)
        model(x)
        whole = hooks.features
        assert proof([hooks]) == safe
        if safe:
            assert stop_after([hooks])
            hooks.clear()
            with pytest.raises(StopForward): model(x)
            for a,b in zip(whole, hooks.features): assert torch.equal(a, b)
    assert same_state(model, before) and n_hooks(model) == ran
