"fasterai's callbacks beside ours: pruning, sparsifying and quantisation-aware training of the student."
import warnings
from functools import partial
import pytest, torch
from torch import nn
pytest.importorskip('fasterai', reason='what makes students smaller in another way')
from fastai.basics import Callback
from fasterai.core.criteria import large_final
from fasterai.core.schedule import agp, one_shot
from fasterai.prune.prune_callback import PruneCallback
from fasterai.quantize.quantize_callback import QuantizeCallback
from fasterai.sparse.sparsify_callback import SparsifyCallback
from conftest import data, learner, n_hooks, same_state, state
from fastdistill.all import *

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
    with pytest.raises(ValueError, match=f"student GraphModule calls .* rewritten without '{layer}'. Name one that it calls: {near}.$"):
        learn.fit(1, cbs=[quantize(), KD(net(24), Attention, layer, '0')])
    assert n_hooks(learn.model) == 0

def test_an_error_of_the_first_batch_is_not_hidden():
    "though the forward pass has given the observers' buffers another size; they are put back"
    learn,found = learner(net(16)),[]
    keep = Callback(before_batch=lambda self: found.append(state(self.model)))
    with pytest.raises(ValueError, match=r"(?s)Cosine\(\) cannot compare layers '0.0' and '0'.*same number of channels.*epoch 0, batch 0"):
        learn.fit(1, cbs=[quantize(), keep, KD(net(24), Cosine, '0.0', '0')])
    assert any(not v.numel() for v in found[0].values()) and same_state(learn.model, found[0])

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
