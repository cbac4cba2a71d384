"Losses that need labels, in real fits: integers, probabilities, MixUp and CutMix; learners of several labels and of values."
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from fastai.basics import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, MSELossFlat)
from fastai.callback.all import CutMix, MixUp, SchedLin, combine_scheds
from torch import nn
from conftest import QuietLearner, data, learner, loaders, mlp, net, same_state, state
from fastdistill.all import *
from formulas import decoupled_kd, multi_label, normalized_kd, teacher_bounded

KD = KnowledgeDistillationCallback

class Batches(Callback):
    "What the losses of each training batch were computed from, and what came out"
    order = 60
    def before_fit(self): self.seen = []
    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): answer = self.teacher_model(self.x)
        self.seen.append(dict(s=self.pred.detach().double().numpy(), t=answer.double().numpy(), y=self.y, kd_loss=self.knowledge_distillation.batch.parts['kd_loss'].item(),
                              task_loss=self.knowledge_distillation.batch.parts['task_loss'].item(), mix=self.mix_of(self.learn)))
    @staticmethod
    def mix_of(learn):
        mix = next((cb for cb in learn.cbs if isinstance(cb, (MixUp,CutMix))), None)
        return mix and (mix.yb1[0], mix.lam)

def seen(teacher, loss, dls=None, model=None, loss_func=None, cbs=(), **kwargs):
    "The training batches of one epoch"
    rec = Batches()
    rec.teacher_model = teacher.eval()
    learn = learner(model, dls, cbs=[rec, KD(teacher, loss, **kwargs)])
    if loss_func is not None: learn.loss_func,learn.metrics = loss_func,[]
    learn.fit(1, cbs=list(cbs))
    return rec.seen

losses = {'DKD': (DecoupledKD(T=3, alpha=2, beta=5), lambda s,t,y: decoupled_kd(s, t, y, 3, 2, 5)),
          'NKD': (NormalizedKD(T=2, gamma=1.5), lambda s,t,y: normalized_kd(s, t, y, 2, 1.5))}

@pytest.mark.parametrize('name', losses)
@pytest.mark.parametrize('loss_func', [None, LabelSmoothingCrossEntropy(), CrossEntropyLossFlat(weight=torch.tensor([1.,2.,3.]))])
def test_integer_labels(teacher, name, loss_func):
    loss,formula = losses[name]
    for b in seen(teacher, loss, loss_func=loss_func): assert b['kd_loss'] == pytest.approx(formula(b['s'], b['t'], b['y'].numpy()), rel=1e-4)

@pytest.mark.parametrize('name', losses)
@pytest.mark.parametrize('mix', [MixUp(0.7), CutMix()])
def test_the_mixture_that_the_task_uses(teacher, name, mix):
    "Item by item the mean of the losses of both labels, as the task's: MixUp has a share for each item, CutMix one for all"
    loss,formula = losses[name]
    batches = seen(teacher, loss, cbs=[mix])
    for b in batches:
        (y1,lam),y = b['mix'],b['y']
        lam = lam.expand(len(y)).numpy()
        def mixture(f): return np.mean([(1-w)*f(i, y1[i]) + w*f(i, y[i]) for i,w in enumerate(lam)])
        assert b['kd_loss'] == pytest.approx(mixture(lambda i,c: formula(b['s'][i:i+1], b['t'][i:i+1], np.array([c]))), rel=1e-4)
        assert b['task_loss'] == pytest.approx(mixture(lambda i,c: F.cross_entropy(torch.tensor(b['s'][i]), torch.as_tensor(c)).item()), rel=1e-4)
    assert any((b['mix'][0] != b['y']).any() for b in batches)

def soft_data():
    items = [(x, F.one_hot(y, 3)*0.8 + 0.2/3) for x,y in data().train_ds]
    return loaders(items, items[:16], 8)

@pytest.mark.parametrize('name', losses)
def test_probabilities_as_labels(teacher, name):
    "The mean over the labels, as cross-entropy has it"
    loss,formula = losses[name]
    for b in seen(teacher, loss, soft_data(), loss_func=nn.CrossEntropyLoss()):
        want = np.mean([sum(b['y'][i,c].item()*formula(b['s'][i:i+1], b['t'][i:i+1], np.array([c])) for c in range(3)) for i in range(8)])
        assert b['kd_loss'] == pytest.approx(want, rel=1e-4)

def test_soft_targets_of_single_labels_are_no_mistake(teacher):
    assert seen(teacher, SoftTarget, soft_data(), loss_func=nn.CrossEntropyLoss())
    assert seen(teacher, SoftTarget, soft_data(), loss_func=BCEWithLogitsLossFlat())

def test_a_loss_of_ones_own_may_take_single_labels(teacher):
    def loss(s, t): return F.mse_loss(s, t)
    loss.single_label = True
    assert seen(teacher, loss, soft_data(), loss_func=nn.CrossEntropyLoss())

def test_a_loss_of_ones_own_gets_the_mixture(teacher):
    got = []
    def loss(s, t, y): got.append(y); return F.cross_entropy(s, y)
    loss.needs_targ = True
    for b,y in zip(seen(teacher, loss, cbs=[MixUp()]), got):
        assert y.shape == (8,3) and torch.allclose(y.sum(1), torch.ones(8)) and b['kd_loss'] == pytest.approx(b['task_loss'], rel=1e-4)

def test_warm_up(teacher):
    "Linear from 0 over the first quarter, then 1; as a function, and of fastai's schedules"
    for weight in (lambda pct: min(1, 4*pct), combine_scheds([.25,.75], [SchedLin(0,1),SchedLin(1,1)])):
        kd,got = KD(teacher, DecoupledKD, weight=weight, task_weight=1.),[]
        class Weights(Callback):
            def after_loss(self):
                if self.training: got.append(kd.weights)
        learner(cbs=[kd,Weights()]).fit(4)
        assert [w for w,_ in got] == pytest.approx([0,1/3,2/3] + [1]*9) and {tw for _,tw in got} == {1.}

# --- labels that the task leaves out ---

def ignoring_data(ignored):
    "Every third item has the label that is left out"
    items = [(x, torch.tensor(ignored) if i%3==0 else y) for i,(x,y) in enumerate(data().train_ds)]
    return loaders(items, items[:16], 8)

@pytest.mark.parametrize('ignored', [-100, -1, 255, 1])
@pytest.mark.parametrize('name', losses)
def test_ignored_labels(teacher, name, ignored):
    "Losses that need labels leave out what the task's loss leaves out: the mean over the other items"
    loss,formula = losses[name]
    for b in seen(teacher, loss, ignoring_data(ignored), loss_func=CrossEntropyLossFlat(ignore_index=ignored)):
        used = b['y'].numpy() != ignored
        assert 0 < used.sum() < 8
        assert b['kd_loss'] == pytest.approx(formula(b['s'][used], b['t'][used], b['y'].numpy()[used]), rel=1e-4)

@pytest.mark.parametrize('task', [partial(F.cross_entropy, ignore_index=255), nn.CrossEntropyLoss(ignore_index=255)])
def test_the_ignored_label_of_functions_and_modules(teacher, task):
    for b in seen(teacher, DecoupledKD(T=3), ignoring_data(255), loss_func=task):
        used = b['y'].numpy() != 255
        assert b['kd_loss'] == pytest.approx(decoupled_kd(b['s'][used], b['t'][used], b['y'].numpy()[used], 3, 1, 8), rel=1e-4)

def test_a_label_that_is_no_class_on_a_gpu_is_suspected(teacher):
    "There the loss is NaN, as no label is read"
    def loss(student, teacher, targ): return student.sum()*torch.nan
    loss.needs_targ = True
    with pytest.raises(ValueError, match='nan, though what it compares is finite. On a GPU that happens where a label is no class'): learner(cbs=KnowledgeDistillationCallback(teacher, loss)).fit(1)

class ForBytes:
    "A task's loss that takes labels in bytes"
    def __init__(self, loss): self.loss,self.ignore_index = loss,loss.ignore_index
    def __call__(self, pred, y): return self.loss(pred, y.long())

@pytest.mark.parametrize('ignored', [-100, 255])
def test_ignored_labels_of_pixels(ignored):
    "A map of labels in bytes, as masks have it"
    def pixels(w): return nn.Sequential(nn.Conv2d(2, w, 3, padding=1), nn.Conv2d(w, 3, 1))
    def mask(x): return torch.where(x[0] > 1, ignored, (x[1] > 0).long()).to(torch.uint8 if ignored == 255 else torch.int64)
    items = [(x, mask(x)) for x,_ in data().train_ds]
    task = ForBytes(nn.CrossEntropyLoss(ignore_index=ignored))
    for b in seen(pixels(9), DecoupledKD(T=3), loaders(items, items[:16], 8), pixels(4), task):
        rows = [b[k].transpose(0,2,3,1).reshape(-1,3) for k in 'st']
        y = b['y'].long().flatten().numpy()
        used = y != ignored
        assert b['kd_loss'] == pytest.approx(decoupled_kd(*[r[used] for r in rows], y[used], 3, 1, 8), rel=1e-4)

@pytest.mark.parametrize('ignored', [-100, 255])
@pytest.mark.parametrize('mix', [MixUp(0.7), CutMix()])
@pytest.mark.parametrize('name', losses)
def test_ignored_labels_under_mixup(teacher, name, mix, ignored):
    "As the task's: an item whose label is left out adds nothing to the mean over all"
    loss,formula = losses[name]
    task = CrossEntropyLossFlat(ignore_index=ignored)
    for b in seen(teacher, loss, ignoring_data(ignored), loss_func=task, cbs=[mix]):
        s,t,(y1,lam),y = b['s'],b['t'],b['mix'],b['y']
        lam = lam.expand(len(y)).numpy()
        def of(f, i, c): return 0. if c == ignored else f(i, c)
        def mixture(f): return np.mean([(1-w)*of(f, i, y1[i]) + w*of(f, i, y[i]) for i,w in enumerate(lam)])
        def kd_loss(i, c): return formula(s[i:i+1], t[i:i+1], np.array([c]))
        def task_loss(i, c): return F.cross_entropy(torch.tensor(s[i]), torch.as_tensor(c)).item()
        for k,f in dict(kd_loss=kd_loss, task_loss=task_loss).items(): assert b[k] == pytest.approx(mixture(f), rel=1e-4)

def test_a_loss_of_ones_own_gets_100_for_ignored_labels(teacher):
    got = []
    def loss(s, t, y): got.append(y); return F.cross_entropy(s, y)
    loss.needs_targ = True
    for b,y in zip(seen(teacher, loss, ignoring_data(255), loss_func=CrossEntropyLossFlat(ignore_index=255)), got):
        assert torch.equal(y == -100, b['y'] == 255) and b['kd_loss'] == pytest.approx(b['task_loss'], rel=1e-4)

def test_a_loss_on_features_may_need_labels_behind_a_projector(teacher):
    got,labels = [],[]
    def loss(s, t, y):
        got.append((s.shape, t.shape, y))
        return (s-t)[y==1].square().sum()
    loss.needs_targ = True
    keep = Callback(before_backward=lambda self: labels.append(self.y))
    learner(cbs=[keep, KD(teacher, Match(loss, '1', '1', projector=True))]).fit(1)
    for (s,t,y),want in zip(got, labels, strict=True): assert s == t == (8,16,2,2) and torch.equal(y, want)

# --- several labels, values ---

def multi_data():
    items = [(x, torch.stack([y>0, y<2, y==1]).float()) for x,y in data().train_ds]
    return loaders(items, items[:16], 8)

def value_data(n=1):
    items = [(x, y.float().repeat(n) if n > 1 else y.float()) for x,y in data().train_ds]
    return loaders(items, items[:16], 8)

def test_several_labels(teacher):
    for b in seen(teacher, MultiLabelSoftTarget(T=2), multi_data(), loss_func=BCEWithLogitsLossFlat()):
        assert b['kd_loss'] == pytest.approx(multi_label(b['s'], b['t'], 2), rel=1e-4)

@pytest.mark.parametrize('n', [1,3])
def test_values(n):
    def regress(w): return nn.Sequential(*mlp(w)[:-1], nn.Linear(w, n))
    for b in seen(regress(9), TeacherBounded(margin=.1), value_data(n), regress(5), MSELossFlat()):
        assert b['kd_loss'] == pytest.approx(teacher_bounded(b['s'], b['t'], b['y'].numpy().reshape(8,n), .1), rel=1e-4)

@pytest.mark.parametrize('loss', [SoftTarget, HardTarget, DecoupledKD, NormalizedKD, DIST])
@pytest.mark.parametrize('dls,loss_func', [(multi_data, BCEWithLogitsLossFlat()), (lambda: value_data(3), MSELossFlat())])
def test_the_right_loss_is_named(teacher, loss, dls, loss_func):
    learn = QuietLearner(dls(), net(), loss_func=loss_func)
    before = state(learn.model)
    with pytest.raises(ValueError, match='(?s)one class.*MultiLabelSoftTarget.*TeacherBounded'): learn.fit(1, cbs=KD(teacher, loss))
    assert same_state(learn.model, before)
