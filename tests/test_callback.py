"The callback inside fastai's loop: gradients by hand, who sees what, what is left behind."
import pickle
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from fastai.basics import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelStepException, CancelTrainException, CancelValidException, Datasets, Transform, load_learner, set_seed)
from fastai.callback.all import (CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, SaveModelCallback, SchedCos, SchedLin)
from torch import nn
from conftest import data, learner, loaders, mlp, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.in_use import networks_in_use

KD = KnowledgeDistillationCallback
stages = ['0','1']

class Gradients(Callback):
    "Keep the gradients with which the optimizer would step"
    order = 100
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append([p.grad.clone() for p in self.model.parameters()])

# --- gradients ---

def grads_by_hand(model, teacher, x, y, weight, task_weight, T=5., pairs=(), at_weight=0.):
    "Gradients of the objective with PyTorch alone; `pairs` of functions from input to feature, for attention"
    model.zero_grad()
    with torch.no_grad(): t = teacher(x)
    s = model(x)
    loss = task_weight*F.cross_entropy(s, y)
    p = F.softmax(t/T, 1)
    loss = loss + weight*T*T*(p*(p.log() - F.log_softmax(s/T, 1))).sum()/len(x)
    for f_s,f_t in pairs:
        with torch.no_grad(): a_t = f_t(x).square().mean(1).flatten(1)
        a_s = f_s(x).square().mean(1).flatten(1)
        d = a_s/a_s.norm(dim=1, keepdim=True) - a_t/a_t.norm(dim=1, keepdim=True)
        loss = loss + weight*at_weight*d.square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]

def close(a, b): 
    for x,y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)

def one_batch(n=16, bs=16): return data(n, bs=bs, shuffle=False)

@pytest.mark.parametrize('kw,w,tw', [({}, .5, .5), (dict(weight=.9), .9, .1), (dict(weight=3., task_weight=.5), 3., .5),
                                     (dict(weight=1.), 1., 0.), (dict(weight=SchedLin(.2,.6)), .2, .8)])
def test_step_equals_hand_computed(teacher, kw, w, tw):
    dls,model = one_batch(),net()
    hand,g = deepcopy(model).train(),Gradients()
    learner(model, dls, cbs=[g, KD(teacher, SoftTarget, **kw)]).fit(1)
    close(g.steps[0], grads_by_hand(hand, teacher.eval(), *dls.train.one_batch(), w, tw))

def test_feature_step_equals_hand_computed():
    "In-place activations after the layers, one layer in two pairs, summed over pairs, beside a loss on predictions"
    class Smooth(nn.Module):    # no batch norm: the hand-made features come from a second forward pass
        def __init__(self, w):
            super().__init__()
            self.a,self.b,self.head = nn.Conv2d(2,w,3,stride=2,padding=1),nn.Conv2d(w,w,3,padding=1),nn.Linear(16*w,3)
        def fa(self, x): return self.a(x)
        def fb(self, x): return self.b(F.relu(self.fa(x)))
        def forward(self, x): return self.head(F.relu_(self.b(F.relu_(self.a(x)))).flatten(1))
    dls,model,teacher = one_batch(),Smooth(3),Smooth(6)
    hand,g = deepcopy(model),Gradients()
    kd = KD(teacher, [SoftTarget, Match(Attention, ['b','a','b'], ['a','b','b'], weight=7)], weight=.3, task_weight=2.)
    learner(model, dls, cbs=[g, kd]).fit(1)
    pairs = [(hand.fb, teacher.fa), (hand.fa, teacher.fb), (hand.fb, teacher.fb)]
    close(g.steps[0], grads_by_hand(hand, teacher, *dls.train.one_batch(), .3, 2., pairs=pairs, at_weight=7))

@pytest.mark.parametrize('order', [0,1])
def test_accumulated_gradients_equal_the_big_batch(order):
    small,big,model,teacher = one_batch(bs=4),one_batch(),mlp(),mlp(9)
    hand,g = deepcopy(model),Gradients()
    cbs = [GradientAccumulation(16), KD(teacher, weight=.7)]
    learner(model, small, cbs=[g]+(cbs if order else cbs[::-1])).fit(1)
    assert len(g.steps) == 1
    close(g.steps[0], grads_by_hand(hand, teacher, *big.train.one_batch(), .7, .3))

def test_clipped_gradients():
    dls,model,teacher = one_batch(),mlp(),mlp(9)
    hand,g = deepcopy(model),Gradients()
    learner(model, dls, cbs=[g, GradientClip(0.01), KD(teacher, weight=.7)]).fit(1)
    want = grads_by_hand(hand, teacher, *dls.train.one_batch(), .7, .3)
    norm = torch.cat([w.flatten() for w in want]).norm()
    close(g.steps[0], [w*0.01/norm for w in want])

def test_pairs_in_the_order_given():
    seen = []
    def loss(s, t): seen.append((s.shape[1], t.shape[1])); return s.mean()
    learner(net(4), cbs=KD(net(8), loss, ['1','0','1'], ['0','0','1'], weight=.1)).fit(1)
    assert seen[:3] == [(8,8),(4,8),(8,16)]

def test_loss_with_labels():
    seen = []
    def loss(s, t, y): seen.append(y); return s.mean()
    loss.needs_targ = True
    learner(dls=one_batch(), cbs=KD(net(8), loss)).fit(1)
    assert torch.equal(seen[0], one_batch().train.one_batch()[1])

# --- nothing changes that should not ---

def test_teacher_is_left_as_found():
    teacher = net(8, dropout=.5).train()
    teacher[1].eval()
    before = state(teacher)
    learner(cbs=KD(teacher, [SoftTarget, Match(Attention, stages, stages)])).fit(2)
    assert same_state(teacher, before) and all(p.grad is None for p in teacher.parameters())
    assert [m.training for m in teacher] == [True,False,True,True,True] and n_hooks(teacher) == 0

@pytest.mark.parametrize('cbs', [[], [MixUp()], [CutMix()]])
def test_weight_zero_is_the_plain_fit_bit_for_bit(teacher, cbs):
    "Dropout and MixUp draw the same random numbers with and without the callback"
    res = []
    for kd in ([], [KD(teacher, [SoftTarget, Match(Attention, stages, stages)], weight=0)]):
        set_seed(3, reproducible=True)
        learn = learner(net(dropout=.5))
        learn.fit_one_cycle(2, 1e-2, cbs=cbs+kd)
        res.append((state(learn.model), learn.recorder.values, learn.loss_func))
    assert all(torch.equal(v, res[1][0][k]) for k,v in res[0][0].items())
    assert all(a == b[:3] for a,b in zip(res[0][1], res[1][1], strict=True))

def test_validation_is_the_tasks_own(teacher):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    kd = KD(teacher, [SoftTarget, Match(Attention, stages, stages)], weight=.9)
    learn = learner(cbs=kd)
    learn.fit(2)
    train_loss,valid_loss,acc,task_loss,kd_loss = learn.recorder.values[-1]
    assert len(calls) == 2*3    # training batches only
    x,y = learn.dls.valid.one_batch()
    with torch.no_grad(): pred = learn.model.eval()(x)
    assert valid_loss == pytest.approx(F.cross_entropy(pred, y).item(), rel=1e-5)
    assert train_loss == pytest.approx(.1*task_loss + .9*kd_loss, rel=1e-4)
    assert learn.validate() == [valid_loss, acc]
    with learn.removed_cbs(kd): assert learn.validate() == [valid_loss, acc]
    assert len(calls) == 6

def test_predictions_without_labels(teacher):
    learn = learner(cbs=KD(teacher, Attention, stages, stages))
    learn.fit(1)
    x = [b[0] for b in learn.dls.valid_ds]
    preds,targs = learn.get_preds(dl=learn.dls.test_dl([(o,) for o in x]))
    assert preds.shape == (16,3)
    preds2,_,losses = learn.get_preds(with_loss=True)
    assert torch.equal(preds, preds2) and losses.shape == (16,)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_inputs_reach_both(teacher, mix):
    model,seen = net(),dict(s=[], t=[])
    for k,m in dict(s=model, t=teacher).items(): m.register_forward_pre_hook(lambda m,i,k=k: seen[k].append((m is teacher or m.training, i[0].clone())))
    dls = data()
    plain = torch.cat([b[0] for b in dls.train])
    learner(model, dls).fit(1, cbs=[KD(teacher), mix(1.)])     # listed before the mix
    trained = [x for training,x in seen['s'] if training]
    assert len(trained) == 3 and all(torch.equal(a, b[1]) for a,b in zip(trained, seen['t'], strict=True))
    assert sum((plain==x).flatten(1).all(1).any().item() for x in torch.cat(trained)) < 24     # some images are mixed

def test_teacher_answers_under_the_learners_autocast_losses_do_not(teacher):
    "The order of the events, proved on the CPU: a callback that does what MixedPrecision does, with the CPU's autocast"
    class CPUAutocast(Callback):
        order = 10
        def before_batch(self): self.ctx = torch.autocast('cpu', dtype=torch.bfloat16); self.ctx.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.ctx.__exit__(None, None, None)
    answers,inside = [],[]
    teacher.register_forward_hook(lambda m,i,o: answers.append(o.dtype))
    def loss(s, t): inside.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))); return (s-t).square().mean()
    learner(cbs=[CPUAutocast(), KD(teacher, [loss, Match(loss, '4', '4')])]).fit(1)
    assert set(answers) == {torch.bfloat16} and set(inside) == {(torch.float32,torch.float32,False)}
    assert not torch.is_autocast_enabled('cpu')

def test_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(4,3)
        def forward(self, a, b): return self.l(a+b)
    gen = torch.Generator().manual_seed(0)
    items = [(torch.randn(4, generator=gen), torch.randn(4, generator=gen), torch.tensor(i%3)) for i in range(16)]
    learn = learner(Two(), loaders(items, items, 8, n_inp=2), cbs=KD(Two()))
    learn.fit(1)
    assert learn.recorder.values[0][-1] > 0

def test_teacher_may_answer_in_an_object(teacher):
    class Wrapped(nn.Module):
        def __init__(self): super().__init__(); self.m = teacher
        def forward(self, x): return SimpleNamespace(logits=self.m(x), hidden=None)
    values = []
    for t in (teacher, Wrapped()):
        set_seed(0, reproducible=True)
        learn = learner(cbs=KD(t))
        learn.fit(1)
        values.append(learn.recorder.values)
    assert values[0] == values[1]

# --- every kind of fit ---

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fine_tune','fit_flat_cos'])
def test_every_fit(teacher, fit):
    learn = learner(cbs=KD(teacher, [SoftTarget, Match(Attention, stages, stages)]))
    getattr(learn, fit)(2)
    assert list(learn.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','time']
    assert len(learn.recorder.values[-1]) == 5 and learn.metrics.attrgot('name') == ['accuracy'] and n_hooks(learn.model, teacher) == 0

def test_lr_find(teacher):
    learn = learner(cbs=KD(teacher, Attention, stages, stages))
    before = state(learn.model)
    assert learn.lr_find(num_it=8, show_plot=False).valley > 0
    assert same_state(learn.model, before) and n_hooks(learn.model, teacher) == 0 and teacher.training
    assert learn.metrics.attrgot('name') == ['accuracy']

def test_columns_can_be_monitored(teacher, tmp_path):
    learn = learner(path=tmp_path, cbs=KD(teacher))
    stop = EarlyStoppingCallback(monitor='kd_loss', min_delta=1e9, patience=1)
    learn.fit(5, cbs=[SaveModelCallback(monitor='task_loss', fname='best'), stop])
    assert len(learn.recorder.values) == 2 and (tmp_path/'models/best.pth').exists()

def test_train_metrics_leave_validations_columns_empty(teacher):
    learn = learner(cbs=KD(teacher))
    learn.recorder.train_metrics = True
    learn.fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert row['train_kd_loss'] > 0 and row['train_task_loss'] > 0 and row['valid_kd_loss'] is row['valid_task_loss'] is None

def test_weights_follow_their_schedules(teacher):
    seen,kd = [],KD(teacher, weight=SchedCos(0,.8), task_weight=SchedLin(1,.5))
    learner(cbs=[kd, Callback(before_batch=lambda self: seen.append(kd.weights))]).fit(2)
    train = [seen[i] for i in (0,1,2,4,5,6)]     # the fourth and the last batch validate
    for i,(w,tw) in enumerate(train):
        assert w == pytest.approx(SchedCos(0,.8)(i/6), abs=1e-6) and tw == pytest.approx(1-.5*i/6, abs=1e-6)

def test_weights_may_be_set_in_the_middle_of_a_fit(teacher):
    "From the next batch on; a weight that makes no sense is refused, and the old one stays"
    kd,seen = KD(teacher, weight=.2),[]
    def change(self):
        if self.training and self.train_iter == 1: kd.weight = .9
    def keep(self):
        if self.training: seen.append((kd.weights, self.learn.loss.item(), *(v.item() for v in kd.batch.parts.values())))
    learner(cbs=[kd, Callback(before_batch=change), Callback(before_backward=keep)]).fit(1)
    assert [w for (w,_),*_ in seen] == [.2,.9,.9]
    for (w,tw),loss,task,kd_loss,*_ in seen: assert loss == pytest.approx(w*kd_loss + tw*task, rel=1e-5)
    for bad in (-1, 2, 'much'):
        with pytest.raises(ValueError, match='finite number'): kd.weight = bad
    assert kd.weight == .9 and kd.weights == (.9, pytest.approx(.1))

def test_start_epoch(teacher):
    learn = learner(cbs=KD(teacher))
    learn.fit(3, start_epoch=2)
    assert len(learn.recorder.losses) == 3 and n_hooks(learn.model, teacher) == 0

# --- how fits end ---

def ends(ex, event='after_loss', at=1):
    "Callback that raises `ex` in training batch `at`, after the distillation callback"
    def raise_(self):
        if self.training and self.train_iter == at: raise ex
    cb = Callback(**{event: raise_})
    cb.order = 40
    return cb

@pytest.mark.parametrize('ex,event', [(CancelBatchException,'after_pred'), (CancelBatchException,'after_loss'), (CancelBackwardException,'before_backward'),
    (CancelStepException,'before_step'), (CancelTrainException,'after_loss'), (CancelEpochException,'after_loss'), (CancelFitException,'after_loss')])
def test_cancelled(teacher, ex, event):
    kd = KD(teacher, [SoftTarget, Match(Attention, stages, stages)])
    hooks = []
    learn = learner(cbs=[kd, ends(ex, event), Callback(before_batch=lambda self: hooks.append((self.training, n_hooks(self.model, teacher))))])
    learn.fit(2)
    assert {n for training,n in hooks if training} == {5} and {n for training,n in hooks if not training} <= {0}
    assert n_hooks(learn.model, teacher) == 0 and teacher.training and learn.metrics.attrgot('name') == ['accuracy']
    assert kd.batch is None
    learn.fit(1)
    assert list(learn.recorder.metric_names).count('kd_loss') == 1

def test_cancelled_validation(teacher):
    learn = learner(cbs=[KD(teacher), Callback(before_validate=lambda self: (_ for _ in ()).throw(CancelValidException()))])
    learn.fit(1)
    assert n_hooks(learn.model, teacher) == 0

@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError('somebody else')])
def test_interrupted_with_the_callback_on_the_fit(teacher, ex):
    learn = learner()
    with pytest.raises(type(ex) if isinstance(ex, Exception) else ex):
        learn.fit(2, cbs=[KD(teacher, [SoftTarget, Match(Attention, stages, stages)]), ends(ex)])
    assert n_hooks(learn.model, teacher) == 0 and teacher.training and learn.metrics.attrgot('name') == ['accuracy']

@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError('somebody else')])
def test_interrupted_with_the_callback_on_the_learner(teacher, ex):
    learn = learner(cbs=KD(teacher, [SoftTarget, Match(Attention, stages, stages)]))
    with pytest.raises(type(ex) if isinstance(ex, Exception) else ex): learn.fit(2, cbs=ends(ex))
    assert len(learn.validate()) == 2     # cleans up as well, without columns of its own
    assert n_hooks(learn.model, teacher) == 0 and teacher.training
    with pytest.raises(type(ex) if isinstance(ex, Exception) else ex): learn.fit(2, cbs=ends(ex))
    hooks = []
    learn.fit(1, cbs=Callback(after_pred=lambda self: hooks.append(n_hooks(self.model, teacher))))
    assert hooks[0] == 5 and hooks[-1] == 0     # none while validating; the fifth looks at the inputs
    assert list(learn.recorder.metric_names).count('kd_loss') == 1
    learn.remove_cb(KD)
    assert n_hooks(learn.model, teacher) == 0 and teacher.training

# --- bad input: before the first step, and nothing changed ---

class NoLogits(nn.Module):
    def forward(self, x): return dict(scores=x)

shared = net()
bad = {
    'no teacher':        (lambda: KD('resnet34'), TypeError, '`nn.Module` or a `Learner`, but got str'),
    'layers differ':     (lambda: KD(net(8), Attention, ['0','1'], ['0']), ValueError, r"2, \['0', '1'\], and 1, \['0'\]"),
    'no teacher layers': (lambda: KD(net(8), Attention, ['0']), ValueError, r"1, \['0'\], and 0"),
    'layers, logits':    (lambda: KD(net(8), SoftTarget, '0', '0'), ValueError, 'SoftTarget.* compares predictions'),
    'no layers':         (lambda: KD(net(8), Attention), ValueError, 'Attention.* compares features.*get_model_layers'),
    'layers of a list':  (lambda: KD(net(8), [SoftTarget, Attention], '0', '0'), ValueError, 'own `Match'),
    'no loss':           (lambda: KD(net(8), []), ValueError, 'at least one loss'),
    'loss not callable': (lambda: KD(net(8), 'SoftTarget'), TypeError, "callable.*'SoftTarget'"),
    'misspelt option':   (lambda: KD(net(8), partial(SoftTarget, temp=3)), TypeError, 'temp'),
    'T':                 (lambda: KD(net(8), partial(SoftTarget, T=0)), ValueError, 'T=0'),
    'p':                 (lambda: KD(net(8), partial(Attention, p=.5), '0', '0'), ValueError, 'p=0.5'),
    'weight negative':   (lambda: KD(net(8), weight=-.1), ValueError, 'weight .*at least 0.*-0.1'),
    'weight NaN':        (lambda: KD(net(8), weight=float('nan')), ValueError, 'weight .*nan'),
    'weight inf':        (lambda: KD(net(8), weight=float('inf')), ValueError, 'weight .*inf'),
    'weight text':       (lambda: KD(net(8), weight='0.5'), ValueError, "weight .*'0.5'"),
    'weight too large':  (lambda: KD(net(8), weight=2), ValueError, 'at most 1.*task_weight'),
    'schedule':          (lambda: KD(net(8), weight=SchedLin(0,2)), ValueError, 'at most 1'),
    'task weight':       (lambda: KD(net(8), task_weight=-1), ValueError, 'task_weight .*-1'),
    'match weight':      (lambda: KD(net(8), Match(SoftTarget, weight=-1)), ValueError, 'weight of a Match .*-1'),
    'teacher layer':     (lambda: KD(net(8), Attention, '0', '00'), KeyError, "teacher Sequential has no layer '00'.*0"),
    'student layer':     (lambda: KD(net(8), Attention, '1.3', '0'), KeyError, "student Sequential has no layer '1.3'.*1.2"),
    'empty layer':       (lambda: KD(net(8), Attention, '', '0'), KeyError, "student Sequential has no layer ''"),
    'student':           (lambda: KD(shared), ValueError, 'is the student or has weights in common'),
    'student wrapped':   (lambda: KD(nn.DataParallel(shared).cpu()), ValueError, 'is the student or has weights in common'),
    'shared part':       (lambda: KD(nn.Sequential(shared[0], *net(4)[1:])), ValueError, 'weights in common'),
    'classes':           (lambda: KD(nn.Sequential(nn.Flatten(), nn.Linear(128,5))), ValueError, r'student \(8, 3\) and teacher \(8, 5\).*number of classes'),
    'classes, MSE':      (lambda: KD(nn.Sequential(nn.Flatten(), nn.Linear(128,1)), nn.MSELoss()), ValueError, r'\(8, 3\) and teacher \(8, 1\)'),
    'no logits':         (lambda: KD(NoLogits()), TypeError, "keys \\['scores'\\]"),
    'not a map':         (lambda: KD(net(8), Attention, '0', '4'), ValueError, r"layers '0' and '4', student \(8, 4, 4, 4\) and teacher \(8, 3\)"),
    'channels, MSE':     (lambda: KD(net(8), nn.MSELoss(), '0', '0'), ValueError, r"student \(8, 4, 4, 4\) and teacher \(8, 8, 4, 4\)"),
    'no scalar':         (lambda: KD(net(8), nn.MSELoss(reduction='none')), ValueError, 'scalar'),
    'no scalar tensor':  (lambda: KD(net(8), lambda s,t: 0.), ValueError, 'scalar tensor, but got 0.0'),
    'loss fails':        (lambda: KD(net(8), lambda s,t: 1/0), ZeroDivisionError, r'lambda.* cannot compare predictions, student \(8, 3\)'),
    'loss asserts':      (lambda: KD(net(8), lambda s,t: (_ for _ in ()).throw(AssertionError())), AssertionError, 'cannot compare predictions'),
}

@pytest.mark.parametrize('make,ex,msg', bad.values(), ids=bad.keys())
@pytest.mark.parametrize('on', ['fit','learner'])
def test_bad_input(make, ex, msg, on):
    shared.load_state_dict(net().state_dict())
    learn = learner(shared)
    before,kd = state(shared),None
    with pytest.raises(ex, match=f'(?s){msg}'):
        kd = make()
        t_before,modes = state(kd.teacher.model),[m.training for m in kd.teacher.model.modules()]
        if on == 'fit': learn.fit(1, cbs=kd)
        else: learn.add_cb(kd).fit(1)
    assert same_state(shared, before) and n_hooks(shared) == 0 and learn.metrics.attrgot('name') == ['accuracy']
    if kd is not None:
        t = kd.teacher.model
        assert same_state(t, t_before) and n_hooks(t) == 0 and kd.teacher.model not in networks_in_use()
        if 'weights in common' not in msg: assert [m.training for m in t.modules()] == modes

def test_layer_that_does_not_run(teacher):
    class Spare(nn.Module):
        def __init__(self): super().__init__(); self.m,self.spare = net(),nn.Conv2d(2,3,3)
        def forward(self, x): return self.m(x)
    learn = learner(Spare())
    before = state(learn.model)
    with pytest.raises(ValueError, match="Layer 'spare' did not run.*student Spare"): learn.fit(1, cbs=KD(teacher, Attention, 'spare', '0'))
    assert same_state(learn.model, before) and n_hooks(learn.model, teacher) == 0 and teacher.training

# --- what leaves the learner ---

class Item(Transform):
    def encodes(self, i:int): return torch.full((2,8,8), float(i))
class Class(Transform):
    def encodes(self, i:int): return torch.tensor(i%3)

def exportable():
    dsets = Datasets(list(range(24)), [[Item()],[Class()]], splits=[range(16),range(16,24)])
    return dsets.dataloaders(bs=8, num_workers=0, device=torch.device('cpu'))

def test_export_and_pickle_hold_no_teacher(tmp_path):
    sizes = {}
    for name,cbs in {'alone': None, 'kd': KD(net(64), [SoftTarget, Match(Attention, stages, stages)], weight=SchedCos(0,.5))}.items():
        learn = learner(path=tmp_path, dls=exportable(), cbs=cbs)
        learn.fit(1)
        learn.export(f'{name}.pkl')
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
    assert sizes['kd'] - sizes['alone'] < 3000 < sum(p.numel()*4 for p in net(64).parameters())
    loaded = load_learner(tmp_path/'kd.pkl')
    x = torch.randn(4,2,8,8)
    torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))
    preds,_ = loaded.get_preds(dl=[(x,)], reorder=False)
    assert preds.shape == (4,3)
    loaded.dls = data()
    loaded.fit(1)     # alone
    assert list(loaded.recorder.metric_names) == ['epoch','train_loss','valid_loss','accuracy','time']
    loaded.fit(1, cbs=KD(net(8)))

@pytest.mark.parametrize('copy', [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_the_callback(teacher, copy):
    "A pickle holds no teacher; a copy in memory has the same one, which is not copied"
    kd = copy(KD(teacher, [SoftTarget(T=3), Match(Attention, '0', '1')], weight=.7))
    assert (kd.teacher is None or copy is deepcopy and kd.teacher.model is teacher) and kd.weight == .7 and kd.matches[0].loss.T == 3 and kd.matches[1].teacher_layers == ['1']

def test_saved_weights_are_the_students(teacher, tmp_path):
    learn = learner(path=tmp_path, cbs=KD(teacher))
    learn.fit(1)
    file = learn.save('student')
    assert set(torch.load(file, weights_only=False)['model']) == set(learn.model.state_dict())
    learn.load('student')

def test_a_subclass_beside_the_callback_is_a_second_one(teacher):
    "In either order"
    class Mine(KD): pass
    for a,b in ((KD,Mine),(Mine,KD)):
        with pytest.raises(ValueError, match='Expected one KnowledgeDistillationCallback, but the learner has 2'):
            learner(cbs=a(teacher)).fit(1, cbs=b(teacher))

def test_an_objective_in_place_of_a_loss(teacher):
    "As it is; other layers and weights would be ignored, so they are refused"
    kd = KD(teacher, Attention, stages, stages, weight=.7)
    other = KD(teacher, kd.objective)
    assert other.objective is kd.objective and other.weight == .7 and other.matches[0].student_layers == stages
    learner().fit(1, cbs=other)
    for kw in (dict(weight=.9), dict(task_weight=1.), dict(student_layers='0', teacher_layers='0')):
        with pytest.raises(ValueError, match='in the `Objective`, but got them as arguments too'): KD(teacher, kd.objective, **kw)

def test_one_callback_for_two_learners(teacher):
    kd = KD(teacher, Attention, stages, stages)
    for _ in range(2):
        learn = learner()
        learn.fit(1, cbs=kd)
        assert n_hooks(learn.model, teacher) == 0 and kd.learn is None
