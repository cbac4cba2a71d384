"What users add to a fit still means what it meant: precision, losses, loggers, frozen groups, compiled and checkpointed students."
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch
import fastai.callback.channelslast     # gives Learner its to_channelslast
import pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.basics import (Callback, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, SGD, params,
                           set_seed)
from fastai.callback.all import (CSVLogger, CutMix, EarlyStoppingCallback, MixedPrecision, MixUp, ModelToHalf,
                                 NonNativeMixedPrecision, ReduceLROnPlateau, ShowGraphCallback)
from torch import nn
from torch.utils.checkpoint import checkpoint
from conftest import QuietLearner, data, learner, mlp, n_hooks, net, same_state, state
from fastdistill.all import *
from test_callback import Gradients, close, grads_by_hand, one_batch

KD = KnowledgeDistillationCallback
stages = ['0','1']
def everything(teacher, **kw): return KD(teacher, [SoftTarget, Match(Attention, '0', '0', weight=10), Match(FitNet, '1', '1')], **kw)

# --- precision: fastai's callbacks in their own order, with the CPU's autocast in place of the GPU's ---

class OnCPU(MixedPrecision):
    "`MixedPrecision` for a device that it does not know"
    def before_fit(self):
        self.dtype = torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16
        self.autocast = torch.autocast('cpu', dtype=self.dtype)
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', enabled=self.dtype == torch.float16, **self.kwargs),[]

class NonNativeOnCPU(NonNativeMixedPrecision):
    "`NonNativeMixedPrecision` where it would insist on a GPU"
    def before_fit(self):
        with patch.object(type(self.dls), 'device', SimpleNamespace(type='cuda')): super().before_fit()

class GradientsOfAll(Callback):
    "Unscaled gradients of student and projectors in the order of the optimizer"
    order = 100
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append([p.grad.float().clone() for g in self.opt.param_lists for p in g])

def precisions(): return {'fp16': [OnCPU('fp16', init_scale=1024.)], 'bf16': [OnCPU('bf16')], 'non-native': [ModelToHalf(), NonNativeOnCPU(loss_scale=256, dynamic=False)]}

@pytest.mark.parametrize('name', precisions())
def test_precision(teacher, name):
    "Teacher in the student's precision, losses in float32, gradients (projectors' too) unscaled before the step and near those of float32"
    before,steps,answers,inside = state(teacher),{},[],[]
    def loss(s, t): inside.append((s.dtype,t.dtype,torch.is_autocast_enabled('cpu'))); return (s-t).square().mean()
    handle = teacher.register_forward_hook(lambda m,i,o: answers.append(o.dtype))
    for kind,cbs in (('float32',[]), (name,precisions()[name])):
        set_seed(0, reproducible=True)
        g,kd = GradientsOfAll(),KD(teacher, [SoftTarget, loss, Match(loss, '4', '4'), Match(FitNet, '1', '1')])
        learn = learner(net(), one_batch(), opt_func=partial(SGD, mom=0.), cbs=[*cbs,g,kd])
        learn.fit(2, 1e-2)
        steps[kind] = [torch.cat([x.flatten() for x in s]) for s in g.steps]
        assert learn.recorder.values[-1][0] == pytest.approx(sum(learn.recorder.values[-1][-2:])/2, rel=1e-3)
    handle.remove()
    want = torch.bfloat16 if name == 'bf16' else torch.float16
    assert answers == [torch.float32]*2 + [want]*2 and set(inside) == {(torch.float32,torch.float32,False)}
    for a,b in zip(steps['float32'], steps[name], strict=True):
        assert torch.cosine_similarity(a, b, dim=0) > 0.99 and b.norm()/a.norm() == pytest.approx(1, abs=0.05)
    assert same_state(teacher, before) and teacher.training and next(teacher.parameters()).dtype == torch.float32

class Overflow(Callback):
    "The gradients of the first batch become infinite before anybody looks at them"
    order = 4
    def before_step(self):
        if self.train_iter == 0:
            for p in self.model.parameters(): p.grad.fill_(float('inf'))

@pytest.mark.parametrize('name', ['fp16','non-native'])
def test_a_step_that_overflows_skips_the_projectors(teacher, name):
    "They do not move, and nothing of their skipped gradient is in the next step"
    def fit(lr, overflow=True):
        set_seed(0, reproducible=True)
        cbs = [OnCPU('fp16', init_scale=256.)] if name == 'fp16' else [ModelToHalf(), NonNativeOnCPU(max_loss_scale=256.)]
        kd,seen,grads = KD(teacher, FitNet, '1', '1'),[],[]
        class Projectors(Callback):
            order = 50
            def before_backward(self): seen.append([p.detach().clone() for p in kd.trained.params])
            def after_backward(self): grads.append([p.grad.clone() for p in kd.trained.params])
        learner(net(), data(16, 8, shuffle=False), opt_func=partial(SGD, mom=0.), cbs=[*cbs, kd, Projectors(), *([Overflow()] if overflow else [])]).fit(1, lr)
        return seen,grads
    (first,second),_ = fit(0.1)
    assert all(map(torch.equal, first, second))
    (first,second),_ = fit(0.1, overflow=False)
    assert not all(map(torch.equal, first, second))
    skipped,taken = (fit(0., o)[1][1] for o in (True,False))     # where no step moves anything, the second batch's gradients differ in their scale alone
    for a,b in zip(skipped, taken): torch.testing.assert_close(2*a, b, rtol=1e-2, atol=1e-3)

def test_channels_last(teacher):
    "The student's layout does not matter to teacher, features and gradients"
    g = [Gradients(),Gradients()]
    for o,channels_last in zip(g, (False,True)):
        set_seed(0, reproducible=True)
        learn = learner(net(), one_batch(), cbs=[o, everything(teacher)])
        if channels_last: learn.to_channelslast(use_amp=False)
        learn.fit(1)
        assert next(learn.model.parameters()).is_contiguous(memory_format=torch.channels_last) == channels_last
    close(g[0].steps[0], g[1].steps[0])

# --- the task's loss, whatever it is ---

weights = torch.tensor([1.,2.,3.])
@pytest.mark.parametrize('loss_func,by_hand', [
    (CrossEntropyLossFlat(), F.cross_entropy),
    (LabelSmoothingCrossEntropy(eps=.2), lambda p,y: .8*F.cross_entropy(p, y) - .2*p.log_softmax(1).mean(1).mean()),
    (CrossEntropyLossFlat(weight=weights), lambda p,y: (weights[y]*-p.log_softmax(1).gather(1, y[:,None])[:,0]).sum()/weights[y].sum()),
    (nn.MultiMarginLoss(), lambda p,y: F.multi_margin_loss(p, y))], ids=['plain','smoothing','weighted','of PyTorch'])
def test_objective_for_every_loss(teacher, loss_func, by_hand):
    dls,model,g = one_batch(),net(),Gradients()
    hand = deepcopy(model).train()
    learn = QuietLearner(dls, model, loss_func=loss_func, cbs=[g, KD(teacher, weight=.3)])
    learn.fit(1)
    x,y = dls.train.one_batch()
    s,t = hand(x),teacher.eval()(x).detach()
    task = by_hand(s, y)
    (.7*task + .3*25*F.kl_div(F.log_softmax(s/5, 1), F.softmax(t/5, 1), reduction='batchmean')).backward()
    close(g.steps[0], [p.grad for p in hand.parameters()])
    assert learn.recorder.values[0][-2] == pytest.approx(task.item(), rel=1e-4) and learn.loss_func is loss_func

@pytest.mark.parametrize('mix', [None,MixUp,CutMix])
def test_losses_of_single_items_and_the_loss_function_come_back(teacher, mix):
    "`get_preds(with_loss=True)` switches the reduction off, MixUp exchanges the function: each is undone beside the callback"
    loss_func = CrossEntropyLossFlat()
    learn = QuietLearner(data(), net(), loss_func=loss_func, cbs=[KD(teacher)] + ([mix()] if mix else []))
    learn.fit(1)
    preds,targs,losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(losses, F.nll_loss(preds.log(), targs, reduction='none'), rtol=1e-4, atol=1e-5)
    assert learn.loss_func is loss_func and loss_func.reduction == 'mean'
    learn.fit(1)

# --- groups of parameters ---

def halves(model): return [params(model[:1]), params(model[1:])]

@pytest.mark.parametrize('fit', ['fine_tune','fit_one_cycle','fit_flat_cos'])
def test_weight_zero_is_the_plain_fit_with_groups(teacher, fit):
    "Frozen groups, discriminative rates and schedules are the student's own, though projectors train in its optimizer"
    states = []
    for cbs in ([], [everything(teacher, weight=0.)]):
        set_seed(0, reproducible=True)
        learn = learner(net(), data(), splitter=halves)
        if fit == 'fit_one_cycle': learn.freeze()
        getattr(learn, fit)(2, slice(1e-4,1e-2) if fit != 'fine_tune' else 1e-2, cbs=cbs)
        states.append(state(learn.model))
    assert same_state(learn.model, states[0])

def test_frozen_body(teacher):
    "Of a layer that nothing trains the features are compared all the same; what trains gets the gradients of its own terms"
    dls,model,g = one_batch(),mlp(),Gradients()
    teacher = mlp(7)
    for p in model[1].parameters(): p.requires_grad_(False)
    hand,losses = deepcopy(model),[]
    g.before_step = lambda: g.steps.append([p.grad.clone() for p in model[3].parameters()])
    def feature(s, t): losses.append(s.requires_grad); return (s.mean()-t.mean()).square()
    learner(model, dls, cbs=[g, KD(teacher, [SoftTarget, Match(feature, '1', '1')])]).fit(1)
    for p in hand[1].parameters(): p.requires_grad_(True)     # the hand computes all and looks at the head
    close(g.steps[0], grads_by_hand(hand, teacher.eval(), *dls.train.one_batch(), .5, .5)[2:])
    assert losses == [False] and all(p.grad is None for p in model[1].parameters())

# --- loggers and trackers ---

def test_csv_and_columns(teacher, tmp_path):
    learn = learner(path=tmp_path, cbs=[KD(teacher, weight=.3), CSVLogger()])
    learn.fit(3)
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log.columns) == ['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','time'] and len(log) == 3
    assert log.train_loss.values == pytest.approx((.7*log.task_loss + .3*log.kd_loss).values, rel=1e-5)
    assert log.valid_loss.iloc[-1] == pytest.approx(learn.validate()[0], rel=1e-5)

@pytest.mark.parametrize('monitor', ['valid_loss','kd_loss'])
def test_learning_rate_falls_and_training_stops(teacher, monitor):
    learn = learner(cbs=KD(teacher))
    learn.fit(3, 1e-2, cbs=ReduceLROnPlateau(monitor=monitor, min_delta=1e9, patience=1))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-4)
    learn.fit(5, cbs=EarlyStoppingCallback(monitor=monitor, min_delta=1e9, patience=2))
    assert len(learn.recorder.values) == 3

def test_graph_shows_the_objective_and_the_tasks_validation(teacher):
    learn,drawn = learner(cbs=KD(teacher)),[]
    def graph(self, graphs, *args): drawn.append([list(map(float, ys)) for _,ys in graphs])
    from fastai.learner import Learner
    with learn.no_logging(), patch('fastprogress.fastprogress.ConsoleMasterBar.update_graph', graph, create=True): Learner.fit(learn, 2, cbs=ShowGraphCallback())
    train,valid = drawn[-1]
    assert train == [float(o) for o in learn.recorder.losses] and valid == [v[1] for v in learn.recorder.values]

def test_tensorboard(teacher, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = learner(cbs=KD(teacher))
    learn.fit(2, cbs=TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    log = EventAccumulator(str(tmp_path)).Reload()
    for i,name in enumerate(['valid_loss','accuracy','task_loss','kd_loss']):
        assert [e.value for e in log.Scalars(name)] == pytest.approx([v[i+1] for v in learn.recorder.values], rel=1e-5)

# --- attached twice, two at once, removed on the way ---

def test_attached_twice_is_refused(teacher):
    kd,other = KD(teacher),KD(net(8))
    for first,second in ((kd,kd), (kd,other)):
        learn = learner(cbs=first)
        before = state(learn.model)
        with pytest.raises(ValueError, match='one KnowledgeDistillationCallback, but the learner has 2.*list of `Match`es.*remove_cb'): learn.fit(1, cbs=second)
        assert same_state(learn.model, before) and n_hooks(learn.model, teacher) == 0 and learn.metrics.attrgot('name') == ['accuracy']
        learn.fit(1)     # the one that was attached goes on
        assert 'kd_loss' in learn.recorder.metric_names and not same_state(learn.model, before)
        learn.remove_cb(KD)
        learn.fit(1)
        assert 'kd_loss' not in learn.recorder.metric_names

@pytest.mark.parametrize('event,order', [('before_batch',0), ('after_pred',-9), ('after_pred',50), ('after_loss',-9), ('after_loss',50), ('before_step',-9),
                                         ('before_step',50), ('after_epoch',0)])
def test_removed_on_the_way(teacher, event, order):
    "From then on the fit is the plain one: the next steps are those of the student alone"
    kd = KD(teacher, [SoftTarget, Match(FitNet, stages, stages)])
    learn = learner(opt_func=partial(SGD, mom=0.))
    losses = []
    def remove(self):
        if self.training == (event != 'after_epoch') and self.learn.train_iter in (1,3) and kd.learn is not None: self.learn.remove_cb(kd)
    cb = Callback(**{event: remove})
    cb.order = order
    class Objective(Callback):
        order = 60
        def after_loss(self):
            if self.training: losses.append((self.learn.loss_grad.item(), F.cross_entropy(self.pred, *self.yb).item()))
    learn.fit(2, cbs=[kd, cb, Objective()])
    assert losses[0][0] != pytest.approx(losses[0][1]) and n_hooks(learn.model, teacher) == 0 and teacher.training
    for mixed,task in losses[4:]: assert mixed == pytest.approx(task)
    assert [len(g) for g in learn.opt.param_lists] == [len(list(learn.model.parameters()))]
    assert 'parameters' not in learn.__dict__ and learn.metrics.attrgot('name') == ['accuracy']

# --- students that are wrapped ---

class Checkpointed(nn.Module):
    "Recomputes its stages in the backward pass"
    def __init__(self, model, **kwargs):
        super().__init__()
        self.model,self.kwargs = model,kwargs
    def forward(self, x):
        for stage in self.model[:2]: x = checkpoint(stage, x, **self.kwargs)
        return self.model[2:](x)

def test_gradient_checkpointing(teacher):
    g = [Gradients(),Gradients()]
    for o,wrap,name in zip(g, (nn.Sequential, partial(Checkpointed, use_reentrant=False)), ('0','model')):
        set_seed(0, reproducible=True)
        layers = [f'{name}.{s}' for s in stages]
        kd = KD(teacher, [SoftTarget, Match(Attention, layers, stages, weight=10), Match(FitNet, layers[1], '1')])
        learn = learner(wrap(net()), one_batch(), cbs=[o,kd])
        learn.fit(1)
        assert n_hooks(learn.model, teacher) == 0
    close(g[0].steps[0], g[1].steps[0])

@pytest.mark.parametrize('kind', ['reentrant','no_grad'])
def test_features_without_a_graph_are_refused(teacher, kind):
    class NoGrad(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x):
            with torch.no_grad(): x = self.model[:2](x)
            return self.model[2:](x)
    student = Checkpointed(net(), use_reentrant=True) if kind == 'reentrant' else NoGrad(net())
    learn = learner(student)
    before = state(student)
    with pytest.raises(ValueError, match=r"student (Checkpointed|NoGrad) to run the layers \['model.1'\].*use_reentrant=False.*epoch 0, batch 0"):
        learn.fit(1, cbs=KD(teacher, Attention, 'model.1', '1'))
    assert same_state(student, before) and n_hooks(student, teacher) == 0
    learn.fit(1, cbs=KD(teacher))     # on predictions it works

def test_compiled_student(teacher, dynamo):
    "The same steps as without compiling, features and all, over several epochs"
    states = []
    for compile_ in (lambda m: m, partial(torch.compile, backend='aot_eager')):
        set_seed(0, reproducible=True)
        model = net()
        learn = learner(compile_(model), data(), opt_func=partial(SGD, mom=0.))
        learn.fit(3, 1e-2, cbs=everything(teacher))
        assert n_hooks(model, teacher) == 0
        states.append(list(model.state_dict().values()))
    for a,b in zip(*states): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_compiled_before(teacher, dynamo):
    "What was compiled without hooks runs without: the error says so, and what to do"
    model = net()
    learn = learner(torch.compile(model, backend='eager'))
    learn.fit(1)
    with pytest.raises(ValueError, match=r"Layer '0' did not run.*torch.compiler.reset\(\).*epoch 0, batch 0"): learn.fit(1, cbs=everything(teacher))
    assert n_hooks(model, teacher) == 0
    learn.fit(1, cbs=KD(teacher))     # predictions need no hooks
    torch.compiler.reset()
    learn.fit(1, cbs=everything(teacher))
