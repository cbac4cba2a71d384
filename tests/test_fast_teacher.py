"A teacher that takes less time: its own precision and layout, chosen by timing, and layers that nobody looks at do not run."
import time
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback
from torch import nn
from conftest import learner, n_hooks, net, same_state, state
from fastdistill.all import *
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

class Ran(nn.Module):
    "Counts its forward passes"
    def __init__(self): super().__init__(); self.n = 0
    def forward(self, x): self.n += 1; return x

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

def test_a_compiled_teacher_runs_through(teacher, dynamo):
    "An exception in the middle of compiled code would have it compiled again"
    ends = []
    cb = Callback(after_loss=lambda self: ends.append(self.knowledge_distillation._hooks[1][0].last_of) if self.training else None)
    cb.order = KD.order - .5
    for t in (teacher, torch.compile(teacher, backend='eager')): learner(cbs=cb).fit(1, cbs=KD(t, Attention, '0', '0'))
    assert all(ends[:3]) and ends[3:] == [()]*3

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
        assert teacher[5].n == n and n_hooks(teacher, learn.model) == 0
        states.append(state(learn.model))
    assert same_state(learn.model, states[0])
    Teacher(teacher)(torch.randn(2,2,8,8))
    assert teacher[5].n == 7     # by itself it runs through

def test_a_layer_that_runs_twice_counts_with_its_last_output():
    class Twice(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.first,self.conv,self.head,self.ran = nn.Conv2d(2,w,3,padding=1),nn.Conv2d(w,w,3,padding=1),nn.Linear(64*w,3),Ran()
        def forward(self, x): return self.ran(self.head(self.conv(self.conv(self.first(x)).relu()).flatten(1)))
    teacher,seen = Twice(6),[]
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
