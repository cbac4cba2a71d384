"What the callback reads and reports: one transfer a step, answers that are not finite, float64, labels of other shapes, recordings checked where the teacher would be asked."
import warnings
from copy import deepcopy
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, TfmdDL, accuracy
from fastai.callback.all import GradientAccumulation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import QuietLearner, data, learner, loaders, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.losses.base import registered_losses
from loss_cases import is_on_logits, small, without

KD = KnowledgeDistillationCallback
stages = ['0','1']

# --- reads ---

class Reads(TorchDispatchMode):
    "Counts numbers that are read from the device: `item`, `float`, `bool`, an `if`"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

class Counts(Callback):
    "Reads of each step up to the backward pass, and in all"
    order = 100
    def before_fit(self): self.before,self.whole,self.reads = [],[],self.counter.n
    def before_backward(self): self.before.append(self.counter.n - self.reads)
    def after_batch(self):
        if self.training: self.whole.append(self.counter.n - self.reads)
        self.reads = self.counter.n

@pytest.mark.parametrize('terms', [None, [SoftTarget], [SoftTarget, DecoupledKD, Match(Attention, stages, stages)], [Match(FitNet, stages, stages), Match(VID, '1', '1')]])
def test_one_transfer_a_step(teacher, terms, monkeypatch):
    "No number is read before the backward pass; after it all parts of the loss together, once. fastai reads one of its own"
    lists,tolist = [],torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda self: lists.append(1) or tolist(self))
    kd,found = [] if terms is None else [KD(teacher, terms)],[]
    for cbs in ([], kd):
        counts,n = Counts(),len(lists)
        with Reads() as counts.counter: learner(dls=data(40), cbs=[counts,*cbs]).fit(1)
        found.append((counts.before[1:], counts.whole[1:], len(lists)-n))
    (_,alone,n_alone),(before,whole,n) = found     # the first batch is looked at: what looks wrong in it?
    assert before == [0]*4 and whole == alone and n - n_alone == 5*len(kd)

def test_the_counter_counts(teacher):
    "It sees a read by somebody else in the middle"
    counts = Counts()
    with Reads() as counts.counter: learner(cbs=[counts, KD(teacher), Callback(after_loss=lambda self: self.loss.item())]).fit(1)
    assert set(counts.before[1:]) == {1}

# --- the parts of the loss ---

@pytest.mark.parametrize('acc', [1,2])
def test_parts_equal_a_plain_loop(teacher, acc):
    "Averages of the parts of each batch, from losses computed by hand; with accumulation as well, where half the batches take no step"
    dls = data(40, shuffle=False)
    kd,task,distill = KD(teacher, [SoftTarget(T=2), Match(nn.MSELoss(), '4', '4', weight=3)], weight=.3),[],[]
    def see(self):
        if not self.training: return
        with torch.no_grad(): t = deepcopy(teacher).eval()(self.x)
        task.append(F.cross_entropy(self.pred, self.y).item())
        kl = F.kl_div(F.log_softmax(self.pred/2, 1), F.softmax(t/2, 1), reduction='batchmean').item()
        distill.append((4*kl, 3*F.mse_loss(self.pred, t).item()))
    cb = Callback(after_pred=see)
    learn = learner(dls=dls, cbs=[kd, cb, *[GradientAccumulation(8*acc)]*(acc > 1)])
    learn.fit(1)
    def smooth(xs):
        total,res = 0.,[]
        for i,x in enumerate(xs):
            total = .98*total + .02*x
            res.append(total/(1-.98**(i+1)))
        return res
    want = dict(task_loss=task, kd_loss=[sum(o) for o in distill], SoftTarget=[o[0] for o in distill], MSELoss=[o[1] for o in distill])
    assert [*kd.losses] == [*want]
    for k,v in want.items(): np.testing.assert_allclose(kd.losses[k], smooth(v), rtol=1e-4)
    np.testing.assert_allclose(learn.recorder.values[0][-2:], [kd.losses['task_loss'][-1], kd.losses['kd_loss'][-1]], rtol=1e-6)

# --- answers that are not finite ---

class Breaks(nn.Module):
    "A model whose answer, or first stage, holds `value` at its `at`th batch"
    def __init__(self, model, value, stage, at=1):
        super().__init__()
        self.model,self.value,self.at,self.n,self.stage = model,value,at,0,stage
        self.first = nn.Identity()
    def spoil(self, x): return x.index_fill(0, torch.tensor([0]), self.value) if self.n == self.at+1 else x
    def forward(self, x):
        self.n += 1
        if not self.stage: return self.spoil(self.model(x))
        x = self.first(self.spoil(self.model[0](x)))
        return self.model[1:](x).nan_to_num()

hidden = {'HardTarget': (lambda: HardTarget, None), 'TeacherBounded': (lambda: TeacherBounded, None), 'ActivationBoundaries': (lambda: ActivationBoundaries, ('0','first'))}

@pytest.mark.parametrize('value', [float('nan'),float('inf'),-float('inf')])
@pytest.mark.parametrize('name', hidden)
def test_losses_that_hide_what_is_not_finite(name, value):
    "argmax and comparisons turn it into finite numbers; the step is not taken"
    make,layers = hidden[name]
    teacher = Breaks(net(4), value, bool(layers)).eval()
    model,kw = net(4),{}
    if name == 'TeacherBounded': kw = dict(loss_func=lambda p, y: F.mse_loss(p, F.one_hot(y, 3).float()))
    dls = data(32)
    term = Match(make(), *layers) if layers else make()
    if name == 'TeacherBounded':
        items = [(x, F.one_hot(torch.tensor(int(y)), 3).float()) for x,y in data(32).train.dataset]
        dls,kw = loaders(items, items[:8], 8),dict(loss_func=F.mse_loss)
    learn = QuietLearner(dls, model, **{'loss_func':CrossEntropyLossFlat(), **kw})
    steps = []
    with pytest.raises(ValueError, match=rf"(?s){name}.* is (\S+), but the teacher's answer is not finite.*epoch 0, batch 1"):
        learn.fit(1, cbs=[KD(teacher, term), Callback(after_step=lambda self: steps.append(state(self.model)))])
    assert len(steps) == 1 and all(torch.equal(p, steps[0][n]) for n,p in model.named_parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()) and n_hooks(model, teacher) == 0

def test_large_answers_are_finite():
    "Their sum would overflow"
    class Large(nn.Module):
        def forward(self, x): return torch.full((len(x),3), 3e38)
    learn = learner()
    learn.fit(1, cbs=KD(Large(), HardTarget))
    assert all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('acc', [8,32])
def test_not_finite_while_gradients_accumulate(teacher, acc):
    "Found at the batch, not at the step; nothing of it stays in the gradients"
    learn = learner(dls=data(32))
    with pytest.raises(ValueError, match="(?s)the teacher's answer is not finite.*epoch 0, batch 2"):
        learn.fit(1, cbs=[KD(Breaks(teacher, float('nan'), False, at=2)), GradientAccumulation(acc)])
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())

# --- float64 ---

@pytest.mark.parametrize('loss', without(TeacherBounded), ids=repr)     # which takes values
def test_float64_models_train(loss):
    "Two epochs; the gradients of the distillation loss are not those of float32 rounded up"
    items = [(x.double(), y) for x,y in data(16).train.dataset]
    dls,teacher = loaders(items, items, 8, shuffle=False),net(4).double()
    if loss_needs(loss).all_layers or loss_needs(loss).needs_items:     # here as a fit calls it
        loss = registered_losses[type(loss).__name__](**small.get(type(loss).__name__, {}))
    layers = () if is_on_logits(loss) else (['0','1'],)*2
    learn,grads = learner(net(4).double(), dls),[]
    kd = KD(teacher, Match(loss, *layers), task_weight=0)
    learn.fit(2, cbs=[kd, Callback(before_step=lambda self: grads.extend(p.grad.clone() for p in self.model.parameters()))])
    assert all(g.dtype == torch.float64 for g in grads) and any((g != g.float().double()).any() for g in grads)
    assert len(kd.losses['kd_loss']) == 4 and np.isfinite(learn.recorder.values[-1][-1])

def test_float64_step_equals_hand_computed():
    items = [(x.double(), y) for x,y in data(16).train.dataset]
    dls,teacher,model = loaders(items, items, 16, shuffle=False),net(8).double(),net().double()
    hand,grads = deepcopy(model).train(),[]
    x,y = dls.train.one_batch()
    with torch.no_grad(): p = F.softmax(deepcopy(teacher).eval()(x)/5, 1)
    (.7*25*(p*(p.log() - F.log_softmax(hand(x)/5, 1))).sum()/16).backward()
    kd = KD(teacher, weight=.7, task_weight=0)     # fastai computes the task's loss in float32
    learner(model, dls).fit(1, cbs=[kd, Callback(before_step=lambda self: grads.extend(p.grad.clone() for p in self.model.parameters()))])
    for g,p in zip(grads, hand.parameters(), strict=True): torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-13)

# --- labels ---

class Right(nn.Module):
    "A teacher that knows the class: it is in the input's last channel"
    def forward(self, x): return 9*F.one_hot(x[:,0,0,0].long(), 10).float()

class Wrong(nn.Module):
    def forward(self, x): return 9*F.one_hot((x[:,0,0,0].long()+1)%10, 10).float()

def labelled(ignored, column, ignore_index=-100, n=64):
    "Items whose class is their brightness; some labels ignored, and (B, 1) as tables have them"
    y = torch.arange(n)%10
    x = y.float().view(-1,1,1,1).expand(-1,2,8,8).clone()
    y = torch.where(torch.arange(n) < ignored, ignore_index, y)
    items = list(zip(x, y[:,None] if column else y))
    return loaders(items, items, n, shuffle=False)

def warned(learn, kd):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        learn.fit(1, cbs=kd)
    return [str(w.message) for w in found if 'teacher' in str(w.message) or 'labels' in str(w.message)]

@pytest.mark.parametrize('ignore_index', [-100,255])
@pytest.mark.parametrize('column', [False,True])
@pytest.mark.parametrize('ignored', [0,50])
def test_guessing_is_judged_by_the_labels_that_count(ignored, column, ignore_index):
    def loss(p, y): return F.cross_entropy(p, y.flatten(), ignore_index=ignore_index)
    loss.ignore_index = ignore_index
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
    def fit(teacher): return warned(QuietLearner(labelled(ignored, column, ignore_index), model, loss_func=loss), KD(teacher))
    assert fit(Right()) == []
    found = fit(Wrong())
    assert len(found) == (ignored == 0) and all(f'the class of 0 items of {64-ignored}' in f for f in found)     # 14 are too few to tell

def test_one_label_for_all_is_seen_in_a_column():
    items = [(torch.rand(2,8,8), torch.tensor([3])) for _ in range(32)]
    learn = QuietLearner(loaders(items, items, 32), nn.Sequential(nn.Flatten(), nn.Linear(128, 10)), loss_func=CrossEntropyLossFlat())
    assert any('all 32 of this batch are 3' in o for o in warned(learn, KD(Right(), DecoupledKD)))

# --- recordings ---

class Darker(Callback):
    "Changes the inputs after this package's callback has seen the batch come"
    order = 50
    def before_batch(self): self.learn.xb = (self.x/2,)

def test_a_recording_is_checked_where_the_teacher_would_be_asked(teacher, tmp_path):
    dls = data()
    rec = record_teacher(teacher, dls, tmp_path/'rec', dtype=torch.float32)
    learner(dls=dls).fit(1, cbs=KD(rec))
    learn = learner(dls=dls)
    before = state(learn.model)
    with pytest.raises(ValueError, match=r'(?s)not the batch that was recorded.*8 of 8 items differ.*epoch 0, batch 0'): learn.fit(1, cbs=[KD(rec), Darker()])
    assert same_state(learn.model, before)
