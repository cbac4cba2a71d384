"Losses that train: their parameters in the learner's optimizer, followed by a plain PyTorch loop; what is saved, and what is not."
import importlib.util, pickle
from copy import deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Adam, Callback, CancelStepException, OptimWrapper, SGD, load_learner, ranger
from fastai.callback.all import GradientAccumulation, GradientClip, SaveModelCallback
from torch import nn
from conftest import data, learner, n_hooks, net, same_state, state
from fastdistill import objective
from fastdistill.all import *
from test_callback import exportable

KD = KnowledgeDistillationCallback
stages = ['0','1']
sgd = partial(SGD, mom=0.)

class Seen(Callback):
    "Copies of student and losses before the first step, and the learning rate of each step"
    order = 50
    def before_fit(self): self.lrs,self.start = [],None
    def before_backward(self):
        if self.start is None: self.start = deepcopy(self.model),deepcopy(self.knowledge_distillation.trained.losses)
    def before_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])

def fitnet(teacher, **kwargs): return KD(teacher, FitNet, stages, stages, **kwargs)

def params(learn): return [p for g in learn.opt.param_lists for p in g]

def by_hand(student, losses, teacher, batches, lrs, clip=None, acc=1):
    "Plain SGD on 0.7 of the cross-entropy and 0.3 of the mean squared error of two stages, projected as 1×1 convolution, norm, ReLU"
    trained,step = [*student.parameters(),*losses.parameters()],0
    for i,(x,y) in enumerate(batches):
        fs,ft,s,t = [],[],x,x
        for k in range(2):
            s = student[k](s); fs.append(s)
            with torch.no_grad(): t = teacher[k](t); ft.append(t)
        for k in range(2,5): s = student[k](s)
        kd = 0.
        for l,a,b in zip(losses[0], fs, ft):
            conv,norm,relu = l.projector
            kd = kd + (relu(norm(conv(a))) - b).square().mean()
        ((0.7*F.cross_entropy(s, y) + 0.3*kd)/acc).backward()
        if (i+1) % acc: continue
        if clip: nn.utils.clip_grad_norm_(trained, clip)
        with torch.no_grad():
            for p in trained:
                p -= lrs[step]*p.grad
                p.grad = None
        step += 1
    return student,losses

@pytest.mark.parametrize('fit,cbs,kw', [('fit',[],{}), ('fit_one_cycle',[],{}), ('fit',[GradientClip(0.02)],dict(clip=0.02)),
                                        ('fit',[GradientAccumulation(16)],dict(acc=2))])
def test_equals_a_plain_loop(teacher, fit, cbs, kw):
    "Student and projectors after some steps: schedule, clipping by the norm of all gradients, accumulation"
    dls,seen = data(32, shuffle=False),Seen()
    kd = fitnet(teacher, weight=.3)
    learn = learner(dls=dls, opt_func=sgd, wd=0., cbs=[kd,seen])
    getattr(learn, fit)(1, 1e-1, cbs=cbs)
    started = [p.clone() for p in seen.start[1].parameters()]     # by_hand trains the copies in place
    student,losses = by_hand(*seen.start, deepcopy(teacher).eval(), list(dls.train), seen.lrs, **kw)
    assert len(started) == 6 and all(not torch.equal(p, q) for p,q in zip(started, losses.parameters(), strict=True))
    for got,want in ((learn.model,student), (kd.trained.losses,losses)):
        for (k,p),q in zip(got.named_parameters(), want.parameters(), strict=True): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=k)

def test_variance_trains(teacher):
    kd = KD(teacher, VID, stages, stages)
    learn = learner(cbs=kd)
    learn.fit(2, 1e-2)
    for l in kd.trained.losses[0]: assert (l.variance - 5).abs().max() > 1e-3
    assert learn.recorder.values[1][-1] < learn.recorder.values[0][-1]

def test_a_loss_of_ones_own_with_parameters(teacher):
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(3))
        def forward(self, s, t): return F.mse_loss(self.scale*s, t)
    mine = Scaled()
    kd = KD(teacher, [mine, Match(nn.MSELoss(), '0', '1', projector=True)])
    learner(cbs=kd).fit(1, 1e-2)
    trained = kd.trained.losses
    assert torch.equal(mine.scale, torch.ones(3)) and not torch.equal(trained[0][0].scale, mine.scale)
    assert trained[1][0].projector[0].weight.shape == (16,4,1,1)

def test_a_frozen_network_in_a_loss_is_not_copied(teacher):
    frozen = nn.Linear(3, 3).requires_grad_(False)
    class Perceptual(nn.Module):
        def __init__(self): super().__init__(); self.net = frozen
        def forward(self, s, t): return F.mse_loss(self.net(s), self.net(t))
    kd = KD(teacher, Perceptual)
    learner(cbs=kd).fit(1)
    assert kd.matches[0].loss.net is frozen and not kd.trained.params

@pytest.mark.parametrize('opt_func', [Adam, SGD, ranger, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=torch.optim.SGD)])
def test_optimizer_is_the_students_between_batches(teacher, opt_func, tmp_path):
    "With every optimizer: in the last group while the step is taken, in nothing that is saved"
    seen = []
    class Groups(Callback):
        order = 100
        def before_step(self): seen.append(('step', len(params(self.learn)), len(list(self.learn.parameters()))))
        def after_batch(self): seen.append(('between', len(params(self.learn)), len(list(self.learn.parameters()))))
    kd = fitnet(teacher)
    learn = learner(path=tmp_path, opt_func=opt_func, cbs=[kd,Groups()])
    learn.fit_one_cycle(3, 1e-2, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    first = [p.clone() for p in kd.trained.params]
    learn.fit(3, 1e-2)
    n = len(list(learn.model.parameters()))
    assert {o for o in seen if o[0]=='step'} == {('step',n+6,n+6)} and {o for o in seen if o[0]=='between'} == {('between',n,n)}
    assert all(not torch.equal(a, b) for a,b in zip(first, kd.trained.params))
    other = learner(path=tmp_path, opt_func=opt_func)
    other.load('model_2', weights_only=False).fit(1)
    slow = getattr(learn.opt, 'slow_weights', None)
    assert slow is None or len(slow[-1]) == n

@pytest.mark.parametrize('wd_bn_bias', [False,True])
def test_weight_decay(teacher, wd_bn_bias):
    "With weight 0 there is decay alone: of the convolutions by 1-lr*wd at each of six steps, of norms only where the learner wants it"
    seen,kd = Seen(),fitnet(teacher, weight=0)
    learner(opt_func=sgd, wd=0.1, wd_bn_bias=wd_bn_bias, cbs=[kd,seen]).fit(2, 0.5)
    for (name,p),q in zip(kd.trained.losses.named_parameters(), seen.start[1].parameters(), strict=True):
        torch.testing.assert_close(p, q*0.95**6 if p.ndim > 1 or wd_bn_bias else q, msg=name)

def test_last_group_of_discriminative_rates(teacher):
    seen = []
    class Rates(Callback):
        order = 100
        def before_step(self): seen.append([len(g) for g in self.opt.param_lists])
    learn = learner(splitter=lambda m: [list(m[0].parameters()),list(m[1:].parameters())], cbs=[fitnet(teacher),Rates()])
    learn.fine_tune(1)
    assert seen[0] == seen[-1] == [4,6+6] and [len(g) for g in learn.opt.param_lists] == [4,6]
    assert learn.opt.frozen_idx == 0

@pytest.mark.parametrize('order', [1,9])
def test_a_skipped_step_skips_the_projectors(teacher, order):
    "Whether the step is cancelled before or after the callback's turn: nothing moves, and no gradient is left for the next step"
    def skip(self): raise CancelStepException()
    cb,seen,kd = Callback(before_step=skip),Seen(),fitnet(teacher)
    cb.order = order
    learn = learner(cbs=[kd,seen])
    learn.fit(1, 1e-1, cbs=cb)
    for a,b in zip(kd.trained.losses.parameters(), seen.start[1].parameters()): assert torch.equal(a, b) and not a.grad.any()

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.Adam)])
def test_resumed_equals_uninterrupted(teacher, opt_func, tmp_path):
    "Bit for bit, from what was saved after the second of four epochs"
    def new(): return learner(net(), data(shuffle=False), path=tmp_path, opt_func=opt_func)
    start,(one,two) = state(net()),(new(), new())
    for l in (one,two): l.model.load_state_dict(start)
    kd = KD(teacher, [Match(FitNet, '0', '0'), Match(VID, '1', '1')])
    class SaveProjectors(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch == 1: self.knowledge_distillation.save(tmp_path/'kd.pth')
    one.fit_one_cycle(4, 1e-2, cbs=[kd, SaveProjectors(), SaveModelCallback(every_epoch=True, with_opt=True)])
    two.load('model_1', weights_only=False)
    kd2 = KD(teacher, [Match(FitNet, '0', '0'), Match(VID, '1', '1')])
    kd2.load(tmp_path/'kd.pth')
    two.fit_one_cycle(4, 1e-2, start_epoch=2, cbs=kd2)
    assert same_state(two.model, state(one.model)) and same_state(kd2.trained.losses, state(kd.trained.losses))

def test_saving_and_loading_say_what_is_missing(teacher, tmp_path):
    kd = fitnet(teacher)
    with pytest.raises(ValueError, match='Nothing to save'): kd.save(tmp_path/'kd.pth')
    torch.save(net().state_dict(), tmp_path/'student.pth')
    with pytest.raises(ValueError, match='student.pth: expected what .*save'): kd.load(tmp_path/'student.pth')
    learn = learner(cbs=kd)
    learn.fit(1)
    kd.save(tmp_path/'kd.pth')
    other = KD(teacher, FitNet, '0', '0')
    other.load(tmp_path/'kd.pth')
    with pytest.raises(ValueError, match='(?s)Make a new callback.*Unexpected key'): learner().fit(1, cbs=other)

def test_what_leaves_holds_no_projector(teacher, tmp_path):
    sizes = {}
    for name,cbs in {'alone': None, 'kd': KD(teacher, VID, stages, stages)}.items():
        learn = learner(path=tmp_path, dls=exportable(), cbs=cbs)
        learn.fit(1)
        learn.export(f'{name}.pkl'); learn.save(name)
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
        sizes[name,'opt'] = len(torch.load(tmp_path/'models'/f'{name}.pth', weights_only=False)['opt']['state'])
    assert sizes['kd'] - sizes['alone'] < 3000 and sizes['kd','opt'] == sizes['alone','opt']
    assert b'fastdistill' not in (tmp_path/'kd.pkl').read_bytes()
    kd = pickle.loads(pickle.dumps(deepcopy(learn.knowledge_distillation)))
    assert kd.trained.losses is None and kd.trained.saved is None

def test_lr_find_leaves_the_projectors(teacher):
    kd = fitnet(teacher)
    learn = learner(cbs=kd)
    learn.lr_find(num_it=8, show_plot=False)
    assert kd.trained.losses is None
    learn.fit(1)
    before,trained = state(kd.trained.losses),kd.trained
    learn.lr_find(num_it=8, show_plot=False)
    assert kd.trained is trained and same_state(trained.losses, before)
    learn.fit(1)
    assert not same_state(trained.losses, before)

def test_projectors_belong_to_a_student_and_a_teacher(teacher):
    kd,learn = fitnet(teacher),learner()
    learn.fit(1, cbs=kd); first = kd.trained
    learn.fit(1, cbs=kd); assert kd.trained is first
    learner().fit(1, cbs=kd); second = kd.trained
    assert second is not first
    kd.teacher = net(16)
    learn.fit(1, cbs=kd)
    assert kd.trained.losses[0][0].projector[0].weight.shape == (16,4,1,1)

@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError('somebody else')])
@pytest.mark.parametrize('event', ['after_backward','after_step'])
def test_interrupted(teacher, ex, event):
    def raise_(self): raise ex
    learn = learner(cbs=fitnet(teacher))
    n = len(list(learn.model.parameters()))
    with pytest.raises(type(ex) if isinstance(ex, Exception) else ex): learn.fit(1, cbs=Callback(**{event: raise_}))
    assert len(params(learn)) == len(list(learn.parameters())) == n and n_hooks(learn.model, teacher) == 0
    learn.fit(1)
    assert len(params(learn)) == n

bad = {
    'channels':          (lambda t: KD(t, Cosine, '0', '0'), ValueError, r"layers '0' and '0', student \(8, 4, 4, 4\) and teacher \(8, 8, 4, 4\).*projector=True"),
    'kinds':             (lambda t: KD(t, FitNet, '0', '4'), ValueError, r"FitNet\(\) cannot compare layers '0' and '4'.*of the same batch"),
    'kinds, projected':  (lambda t: KD(t, Match(nn.MSELoss(), '0', '4', projector=True)), ValueError, r"Projected\(MSELoss\(\)\) cannot compare layers '0' and '4'"),
    'no layers':         (lambda t: KD(t, Match(nn.MSELoss(), projector=True)), ValueError, r'Projected\(MSELoss\(\)\) compares features'),
    'logits, projected': (lambda t: KD(t, Match(SoftTarget, '0', '0', projector=True)), ValueError, r'compares predictions'),
    'signature':         (lambda t: KD(t, nn.CosineEmbeddingLoss()), TypeError, r'loss\(student, teacher\), but CosineEmbeddingLoss\(\) takes \(input1.*needs_targ = True'),
    'signature, labels': (lambda t: KD(t, partial(labels_only)), TypeError, r'loss\(student, teacher\), but .* takes \(pred, teacher_pred, targ\)'),
    'one argument':      (lambda t: KD(t, lambda s: s.mean()), TypeError, r'takes \(s\)'),
}
def labels_only(pred, teacher_pred, targ): return pred.mean()

@pytest.mark.parametrize('make,ex,msg', bad.values(), ids=bad.keys())
def test_bad_input(teacher, make, ex, msg):
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ex, match=f'(?s){msg}'): learn.fit(1, cbs=make(teacher))
    assert same_state(learn.model, before) and n_hooks(learn.model, teacher) == 0

def test_features_that_change_under_the_same_student_are_an_error(teacher):
    "A projector that was made for other channels is not made anew for each batch"
    class Varying(nn.Module):
        n = 4
        def forward(self, x):
            self.n -= 1
            return x[:,:self.n]
    student = net()
    student.add_module('5', nn.Sequential(seen := Varying()))
    student.forward = lambda x: (seen(student[0](x)), student[4](student[3](student[2](student[1](student[0](x))))))[1]
    with pytest.raises(RuntimeError, match=r"layers '5.0' and '0', student \(8, 2, 4, 4\).*to have 3 channels"):
        learner(student).fit(1, cbs=KD(teacher, FitNet, '5.0', '0'))

def test_projectors_are_float32_whatever_the_features():
    m = Match(FitNet, 'a', 'b')
    s,t = torch.randn(2, 3, 4, 4).half(),torch.randn(2, 5, 4, 4).half()
    losses = m.build([s], [t])
    assert {p.dtype for p in losses.parameters()} == {torch.float32}
    with torch.autocast('cpu', dtype=torch.bfloat16): assert m([s], [t], losses=losses).dtype == torch.float32

# --- a Match is no loss ---

def loaded_anew():
    "The module of `Match` a second time, as a reload makes it"
    spec = importlib.util.spec_from_file_location(objective.__name__, objective.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_a_match_in_a_match_is_refused():
    with pytest.raises(TypeError, match='got a Match of mse_loss. Give a Match its layers and its weight in one call'):
        Match(Match(F.mse_loss, '3', '3'), weight=2)

def test_a_match_from_before_a_reload_is_refused(teacher):
    for m in (Match(F.mse_loss, '0', '0'), type('Mine', (Match,), {})(F.mse_loss, '0', '0')):
        with pytest.raises(TypeError, match='before fastdistill was reloaded has to be made again'):
            loaded_anew().Objective(m)
