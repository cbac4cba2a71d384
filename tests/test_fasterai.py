"fasterai's callbacks beside ours: pruning, sparsifying and quantisation-aware training of the student."
import warnings
from copy import deepcopy
from functools import partial
import pytest, torch
from torch import nn
pytest.importorskip('fasterai', reason='what makes students smaller in another way')
from fastai.basics import Callback
from fastai.callback.schedule import *     # gives Learner its lr_find
from fastai.callback.training import GradientAccumulation
from fastai.learner import load_learner
from fasterai.core.criteria import large_final
from fasterai.core.schedule import agp, one_shot
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as TheirKD
from fasterai.prune.prune_callback import PruneCallback
from fasterai.quantize.fake_quantize_callback import FakeQuantizeCallback
from fasterai.quantize.quantize_callback import QuantizeCallback
from fasterai.regularize.regularize_callback import RegularizeCallback
from fasterai.sparse.sparsify_callback import SparsifyCallback
from conftest import data, learner, n_hooks, same_state, state
from fastdistill.all import *
from fastdistill.digits import digits_learner

KD = KnowledgeDistillationCallback
stages = ['0','1']

def net(width):
    "`conftest.net` without in-place operations"
    def stage(a, b): return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b), nn.ReLU())
    return nn.Sequential(stage(2, width), stage(width, 2*width), nn.Flatten(), nn.Linear(8*width, 3))

def prune(ratio=0.5, schedule=agp): return PruneCallback(ratio, schedule, 'local', large_final, example_inputs=torch.randn(2,2,8,8))
def sparsify(): return SparsifyCallback(0.5, 'weight', 'local', large_final, schedule=one_shot)

class Steps(Callback):
    "Whether the optimizer holds student and projectors, all and nothing else, at each step"
    order = 50
    def before_fit(self): self.held = []
    def before_step(self):
        params = [p for g in self.opt.param_lists for p in g]
        own = [*self.model.parameters(), *self.knowledge_distillation.trained.params]
        self.held.append({id(p) for p in params} == {id(p) for p in own} and len(params) == len(own))

def alone(cb, start):
    "The student that the other callback makes without a teacher"
    learn = learner(net(16), data(shuffle=False))
    learn.model.load_state_dict(start)
    learn.fit(2, 1e-2, cbs=cb)
    return learn.model

@pytest.mark.parametrize('make', [prune,sparsify])
@pytest.mark.parametrize('loss', [SoftTarget, Match(Attention, stages, stages)], ids=['SoftTarget','Attention'])
def test_what_trains_nothing_goes_with_pruning(loss, make):
    "Of weight 0 the student is the one without a teacher, bit for bit; of a weight above 0 it is as small"
    start = state(net(16))
    want = alone(make(), start)
    for weight in (0,0.5):
        learn,teacher = learner(net(16), data(shuffle=False)),net(24)
        learn.model.load_state_dict(start)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', '.*other channels')
            learn.fit(2, 1e-2, cbs=[make(), KD(teacher, loss, weight=weight, task_weight=1.), steps := Steps()])
        assert same_state(learn.model, state(want)) == (weight == 0)
        assert [(p.shape,(p==0).sum()) for p in learn.model.parameters()] == [(p.shape,(p==0).sum()) for p in want.parameters()]
        assert all(steps.held) and len(steps.held) == 6 and n_hooks(learn.model, teacher) == 0
    assert sum((p==0).sum() for p in want.parameters()) > 500 if make is sparsify else want[0][0].weight.shape[0] == 8

@pytest.mark.parametrize('loss,made', [(FitNet,'projector'), (VID,'mean'), (partial(Projected, nn.MSELoss()),'projector')],
                         ids=['FitNet','VID','Projected'])
def test_a_projector_is_made_anew_where_pruning_changes_the_channels(loss, made):
    "and the fit says so; the optimizer holds the new one instead of the old one"
    kd,learn,steps = KD(net(24), loss, stages, stages),learner(net(16)),Steps()
    with pytest.warns(UserWarning, match='other channels than before.*starts anew. Prune before the fit'):
        learn.fit(2, 1e-2, cbs=[prune(), kd, steps])
    inputs = [getattr(l, made)[0].weight.shape[1] for l in kd.trained.losses[0]]
    assert inputs == [l[0].weight.shape[0] for l in learn.model[:2]] == [8,16]
    assert all(steps.held) and len([p for g in learn.opt.param_lists for p in g]) == len(list(learn.model.parameters()))

def test_a_projector_becomes_needed():
    "Student and teacher are of the same width until the student is pruned"
    kd = KD(net(16), FitNet, stages, stages)
    with pytest.warns(UserWarning, match='starts anew'): learner(net(16)).fit(1, 1e-2, cbs=[prune(schedule=one_shot), kd])
    assert [l.projector[0].weight.shape[:2] for l in kd.trained.losses[0]] == [(16,8),(32,16)]

def test_what_still_fits_trains_on():
    "Of two projectors the one whose layer was not pruned is the same, and so is its state in the optimizer"
    kd,first = KD(net(24), [Match(FitNet, '0', '0'), Match(FitNet, '1', '1')]),[]
    keep = Callback(before_backward=lambda self: first.append(self.knowledge_distillation.trained.losses))
    with pytest.warns(UserWarning, match='starts anew'):
        learner(net(16)).fit(1, 1e-2, cbs=[prune({'0.0':0.5}, one_shot), kd, keep])
    (a,b),(a_end,b_end) = ((o[0][0],o[1][0]) for o in (first[0],kd.trained.losses))
    assert a is not a_end and b is b_end and a_end.projector[0].weight.shape[1] == 8
    steps = {id(p):s['step'] for p,s in kd.trained.states.items()}
    assert [steps[id(l.projector[0].weight)] for l in (a_end,b_end)] == [2,3]

def test_pruned_between_two_fits(tmp_path):
    kd,learn = KD(net(24), FitNet, stages, stages),learner(net(16))
    learn.fit(1, 1e-2, cbs=kd)
    learner(learn.model).fit(1, 1e-2, cbs=prune(schedule=one_shot))
    learn.create_opt()
    with pytest.warns(UserWarning, match='starts anew'): learn.fit(1, 1e-2, cbs=kd)
    kd.save(tmp_path/'kd.pth')
    kd.load(tmp_path/'kd.pth')
    learn.fit(1, 1e-2, cbs=kd)
    assert [l.projector[0].weight.shape[1] for l in kd.trained.losses[0]] == [8,16]

# --- quantisation-aware training ---

def quantize(): return QuantizeCallback(backend='x86')

inner = ['0.0','1.0']     # of the stages, which are blocks

@pytest.mark.parametrize('loss', [SoftTarget, Match(Attention, inner, stages), Match(FitNet, inner, stages)],
                         ids=['SoftTarget','Attention','FitNet'])
def test_quantisation_goes_with_a_teacher(loss):
    "The student is quantised in the end; of weight 0 it is the one without a teacher, bit for bit"
    def fit(weight):
        learn = learner(net(16), data(shuffle=False))
        learn.model.load_state_dict(start)
        kd = [] if weight is None else [KD(net(24).eval(), loss, weight=weight, task_weight=1.)]
        learn.fit(2, 1e-2, cbs=[quantize(), *kd])
        return learn.quantized_model
    start,x = state(net(16)),torch.randn(8,2,8,8)
    alone,weightless,taught = [fit(w)(x) for w in (None,0,0.5)]
    assert torch.equal(alone, weightless) and not torch.equal(alone, taught)

@pytest.mark.parametrize('layer,near', [('0','0.0'), ('1','1.0')])
def test_a_block_that_the_rewritten_student_does_not_run(layer, near):
    learn = learner(net(16))
    with pytest.raises(ValueError, match=f"student GraphModule calls .* rewritten without '{layer}'. Name one that it calls: {near}\\.\nMore: "):
        learn.fit(1, cbs=[quantize(), KD(net(24), Attention, layer, '0')])
    assert n_hooks(learn.model) == 0

def test_an_error_of_the_first_batch_is_not_hidden():
    "though the forward pass has given the observers' buffers another size; they are put back"
    learn,found = learner(net(16)),[]
    keep = Callback(before_batch=lambda self: found.append(state(self.model)))
    with pytest.raises(ValueError, match=r"(?s)Cosine\(\) cannot compare layers '0.0' and '0'.*same number of channels.*epoch 0, batch 0"):
        learn.fit(1, cbs=[quantize(), keep, KD(net(24), Cosine, '0.0', '0')])
    assert any(not v.numel() for v in found[0].values()) and same_state(learn.model, found[0])

# --- every teacher, beside every callback ---

def regularize(): return RegularizeCallback(large_final, 'filter', 1e-3)
def fake_quantize(): return FakeQuantizeCallback(weight_bits=8)

makes = dict(prune=prune, sparsify=sparsify, quantize=quantize, regularize=regularize, fake_quantize=fake_quantize)

def recorded(path, *args):
    return record_teacher(net(24), data(shuffle=False), path/'teacher', 2, *args, dtype=torch.float32)

def on(*args): return lambda learn, layers, path: (net(24).eval(),*args,layers,stages)

teachers = dict(attention=on(Attention), fitnet=on(FitNet),
                itself=lambda learn, layers, path: (deepcopy(learn.model),),
                itself_attention=lambda learn, layers, path: (deepcopy(learn.model),Attention,layers,stages),
                recording=lambda learn, layers, path: (recorded(path),),
                recorded_attention=lambda learn, layers, path: (recorded(path, Attention, stages, stages),Attention,layers,stages),
                ensemble=lambda learn, layers, path: ([net(24),net(8)],),
                average=lambda learn, layers, path: (EMATeacher(0.5),Logits),
                average_attention=lambda learn, layers, path: (EMATeacher(0.5),Attention,layers,layers))
tested_above = [(m,t) for m in ('prune','sparsify','quantize') for t in ('attention','fitnet')]
refused = [('prune','average'), ('prune','average_attention')]
pairs = [(m,t) for m in makes for t in teachers if (m,t) not in tested_above + refused]

def fit_beside(make, teacher, weight, path, start, cbs=()):
    "What the student answers after a fit; with `weight=None` there is no teacher"
    learn = learner(net(16), data(shuffle=False))
    learn.model.load_state_dict(start)
    args = None if weight is None else teachers[teacher](learn, inner if make == 'quantize' else stages, path)
    kd = [] if args is None else [KD(*args, weight=weight, task_weight=1.)]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*anew')
        learn.fit(2, 1e-2, cbs=[*kd, makes[make](), *cbs])
    return learn.model.eval()(data(shuffle=False).valid.one_batch()[0])

@pytest.mark.parametrize('make,teacher', pairs)
def test_each_teacher_goes_with_each_callback(make, teacher, tmp_path):
    "Of weight 0 the student is the one without a teacher, bit for bit"
    start = state(net(16))
    alone,weightless,taught = [fit_beside(make, teacher, w, tmp_path/str(w), start) for w in (None,0,0.5)]
    assert torch.equal(alone, weightless) and not torch.equal(alone, taught)

@pytest.mark.parametrize('make', makes)
def test_with_accumulated_gradients(make, tmp_path):
    start = state(net(16))
    alone,weightless = [fit_beside(make, 'attention', w, tmp_path, start, [GradientAccumulation(16)]) for w in (None,0)]
    assert torch.equal(alone, weightless)

def test_what_a_regulariser_adds_belongs_to_the_task():
    "`task_weight` multiplies it as well"
    found,kd = [],KD(net(24), Logits, weight=0.3)
    class ByHand(Callback):
        order = KD.order+1
        def after_loss(self):
            if not self.training: return
            task = nn.functional.cross_entropy(self.pred, self.y)
            convs = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
            penalty = sum(1e-3*w.abs().item() for m in convs for w in m.weight.flatten())
            found.append((self.learn.loss_grad.item(), 0.7*(task.item()+penalty) + 0.3*kd.batch.terms()[0].item()))
    learner(net(4)).fit(1, 1e-2, cbs=[kd, regularize(), ByHand()])
    for got,want in found: assert got == pytest.approx(want, rel=1e-5)
    assert len(found) == 3

@pytest.mark.parametrize('make', [m for m in makes if m != 'quantize'])
def test_looking_before_a_fit_changes_nothing(make):
    "The callback is on the learner; fasterai's `QuantizeCallback` would quantise it in `validate`"
    def fit(look):
        learn = learner(net(16), data(shuffle=False))
        learn.model.load_state_dict(start)
        learn.add_cbs([makes[make](), KD(teacher)])
        if look: found.append((learn.distill_check(),learn.weight_finder(weights=[0.5])))
        before = {n:{k:v for k,v in vars(m).items() if isinstance(v, (int,tuple))} for n,m in learn.model.named_modules()}
        assert before == {n:{k:v for k,v in vars(m).items() if isinstance(v, (int,tuple))} for n,m in net(16).named_modules()}
        learn.fit(1, 1e-2)
        return learn.model.eval()(torch.ones(2,2,8,8))
    start,teacher,found = state(net(16)),net(24),[]
    assert torch.equal(fit(True), fit(False)) and len(found[0][1].table) == 2

def test_lr_find_with_the_teacher_before_the_fit():
    "fastai's `lr_find` cannot put back a student that it has pruned or quantised, so fasterai's callback comes later"
    learn,kd = learner(net(16)),KD(net(24))
    before = state(learn.model)
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=4)
    assert same_state(learn.model, before)
    learn.fit(1, cbs=[kd, prune(schedule=one_shot)])
    assert learn.model[0][0].weight.shape[0] == 8

@pytest.mark.parametrize('make', ['prune','sparsify','regularize','fake_quantize'])
def test_the_student_is_exported(make, tmp_path):
    "and its weights are saved; neither has a trace of the teacher"
    learn,x = digits_learner(4),torch.randn(4,1,8,8)
    cb = PruneCallback(0.5, agp, 'local', large_final, example_inputs=x) if make == 'prune' else makes[make]()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=[cb, KD(digits_learner(8))])
    want = learn.model.cpu().eval()(x)
    learn.export(tmp_path/'student.pkl')
    assert torch.equal(load_learner(tmp_path/'student.pkl').model.eval()(x), want)
    learn.save(tmp_path/'student')
    with torch.no_grad(): next(learn.model.parameters()).zero_()
    learn.load(tmp_path/'student', weights_only=False)
    assert torch.equal(learn.model.eval()(x), want)

def test_an_int8_student_is_written_as_torchscript(tmp_path):
    "PyTorch cannot load it from a pickle"
    model,x = quantised().quantized_model.eval(),torch.randn(4,2,8,8)
    torch.jit.trace(model, x).save(tmp_path/'student.pt')
    assert torch.equal(torch.jit.load(tmp_path/'student.pt')(x), model(x))

# --- what cannot work says so before the first step ---

def refuses(cbs, text, learn=None):
    learn = learn or learner(net(16))
    before = state(learn.model)
    with pytest.raises(ValueError, match=text): learn.fit(1, 1e-2, cbs=cbs(learn))
    assert same_state(learn.model, before) and n_hooks(learn.model) == 0

@pytest.mark.parametrize('args', [(), (Attention,'0','0')], ids=['SoftTarget','Attention'])
def test_an_average_of_a_student_that_is_pruned(args):
    refuses(lambda learn: [KD(EMATeacher(), *args), prune()],
            r'(?s)keeps the shapes.*EMATeacher\(0.999\) averages them, but PruneCallback prunes it.*Prune before the fit')

def test_the_student_is_no_teacher_of_itself():
    refuses(lambda learn: [KD(learn.model), prune()], '(?s)Sequential is the student.*A `deepcopy` of the student would do')

def test_another_library_distils_as_well():
    "Its callback has the same name; one without `after_loss` only looks on"
    theirs = TheirKD(net(24), lambda pred, teacher_pred, **kwargs: nn.functional.mse_loss(pred, teacher_pred))
    refuses(lambda learn: [theirs, KD(net(24))], r'(?s)also has fasterai\.distill\.\S+Callback.*distilled twice.*Leave out one')
    looks_on = Callback()
    looks_on.teacher = net(24)
    learner(net(16)).fit(1, cbs=[looks_on, KD(net(24))])

def test_losses_that_were_saved_before_pruning(tmp_path):
    kd,learn = KD(net(24), FitNet, stages, stages),learner(net(16))
    learn.fit(1, cbs=kd)
    kd.save(tmp_path/'kd.pth')
    learner(learn.model).fit(1, cbs=prune(schedule=one_shot))
    kd.load(tmp_path/'kd.pth')
    refuses(lambda _: kd, '(?s)saved for these losses and channels.*before pruning.*Make a new callback', learner(learn.model))
    learner(learn.model).fit(1, cbs=KD(net(24), FitNet, stages, stages))

def test_a_student_that_was_quantised_has_nothing_to_train():
    learn = quantised()
    before = learn.model
    with pytest.raises(ValueError, match='(?s)a student with parameters, but GraphModule has none, as after quantisation'): learn.fit(1, cbs=KD(net(24)))
    assert learn.model is before

# --- what comes out of it, measured ---

def quantised():
    learn = learner(net(16), data(shuffle=False))
    learn.fit(1, 1e-2, cbs=[quantize(), KD(net(24))])
    return learn

def test_a_quantised_student_is_compared_and_interpreted(trained):
    "It has no parameters, where fastai looks for the device: figures are those of plain loops over its packed weights and its answers"
    learn,dl = quantised(),data(shuffle=False).valid
    model,(x,y) = learn.quantized_model.eval(),dl.one_batch()
    assert not list(model.parameters())
    packed = [t for m in model.modules() if hasattr(m, 'out_features') or hasattr(m, 'out_channels') for t in m._weight_bias()]
    before = dict(vars(learn))
    for order in (('teacher','student'),('student','teacher')):
        both = dict(teacher=trained, student=learn)
        row = compare({k:both[k] for k in order}, dl=dl).loc['student']
        assert row.parameters == sum(t.numel() for t in packed) and row.MB < row.parameters*1.1e-6
        assert row.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    found = DistillationInterpretation.from_learners(trained, learn, dl=dl)
    torch.testing.assert_close(found.logits['student'], model(x))
    assert DistillationInterpretation.from_learners(learn, trained, dl=dl).logits['teacher'].equal(model(x))
    assert vars(learn) == before
