"What goes wrong in the middle: killed processes, Ctrl-C, numbers that are not finite, exceptions, and hundreds of fits in a row."
import gc, math, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException)
from fastai.callback.all import GradientAccumulation, GradientClip, MixUp
from hypothesis import given, settings, strategies as st
from torch import nn
from conftest import data, learner, n_hooks, net, same_state, state
from fastdistill.all import *

KD = KnowledgeDistillationCallback
stages = ['0','1']

# --- a killed process ---

script = '''
import os, random, signal, sys
import torch
from fastai.basics import Callback, set_seed
from fastai.callback.all import SaveModelCallback, SchedCos
from conftest import data, learner, net
from fastdistill.all import *
out,start,kill = sys.argv[1],int(sys.argv[2]),sys.argv[3]
torch.set_num_threads(1)

class Epochs(Callback):
    "Each epoch draws from its own seed; all that a resumed fit needs is saved after it"
    order = -100
    def before_epoch(self):
        set_seed(self.epoch, reproducible=True)
        self.dls.train.rng = random.Random(self.epoch)
    def before_backward(self):
        if self.epoch == 2 and self.iter == 1 and kill == 'kill': os.kill(os.getpid(), signal.SIGKILL)
    def after_epoch(self): self.knowledge_distillation.save(f'{out}/kd_{self.epoch}.pth')

set_seed(0, reproducible=True)
teacher,student = net(8),net(dropout=.3)
kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Match(FitNet, '0', '0'), Match(VID, '1', '1')], weight=SchedCos(.2,.8))
learn = learner(student, data(), path=out)
if start:
    learn.load(f'model_{start-1}', weights_only=False)
    kd.load(f'{out}/kd_{start-1}.pth')
learn.fit_one_cycle(4, 1e-2, start_epoch=start, cbs=[Epochs(), kd, SaveModelCallback(every_epoch=True, with_opt=True)])
torch.save((student.state_dict(), kd.trained.losses.state_dict(), learn.recorder.values[-1]), f'{out}/end.pth')
'''

def run(out, start, kill=''):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]), PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-c', script, str(out), str(start), kill], env=env, capture_output=True, text=True, timeout=300)

@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    "Bit for bit: student, projectors, their optimizer and the schedules; only the epoch that was killed is run again"
    (whole := tmp_path/'whole').mkdir()
    (killed := tmp_path/'killed').mkdir()
    done = run(whole, 0)
    assert done.returncode == 0, done.stderr
    assert run(killed, 0, 'kill').returncode == -signal.SIGKILL
    assert {f.name for f in killed.iterdir()} == {'models','kd_0.pth','kd_1.pth'} and {f.name for f in (killed/'models').iterdir()} == {'model_0.pth','model_1.pth'}
    done = run(killed, 2)
    assert done.returncode == 0, done.stderr
    a,b = (torch.load(o/'end.pth', weights_only=False) for o in (whole,killed))
    for x,y in zip(a[:2], b[:2]):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert a[2][1:3] == b[2][1:3]     # valid_loss and accuracy; train_loss is an average over the batches of this process

def test_a_save_that_dies_leaves_what_was_saved_before(teacher, tmp_path):
    kd,file = KD(teacher, FitNet, '0', '0'),tmp_path/'kd.pth'
    learner().fit(1, cbs=kd)
    kd.save(file)
    saved = file.read_bytes()
    class Dies:
        def __reduce_ex__(self, protocol): raise OSError('no space left')
    kd.trained.state_dict = lambda: dict(losses=Dies())
    with pytest.raises(OSError, match='no space'): kd.save(file)
    assert file.read_bytes() == saved

class Evil:
    "A pickle that runs code when it is read"
    def __reduce__(self): return os.mkdir, (self.path,)

def test_a_file_of_weights_cannot_run_code(teacher, tmp_path):
    evil = Evil()
    evil.path = str(tmp_path/'evil')
    torch.save(dict(losses=evil, states=None), tmp_path/'kd.pth')
    with pytest.raises(Exception, match='[Ww]eights.only'): KD(teacher, FitNet, '0', '0').load(tmp_path/'kd.pth')
    assert not (tmp_path/'evil').exists()

# --- numbers that are not finite ---

class Breaks(nn.Module):
    "A model whose answer to its `at`th batch holds `value`"
    def __init__(self, model, value=float('nan'), at=1):
        super().__init__()
        self.model,self.value,self.at,self.n = model,value,at,0
    def forward(self, x):
        out = self.model(x)
        self.n += 1
        return out.index_fill(0, torch.tensor([0]), self.value) if self.n == self.at+1 else out

@pytest.mark.parametrize('value', [float('nan'),float('inf'),-float('inf')])
@pytest.mark.parametrize('on', ['fit','learner'])
def test_teacher_that_is_not_finite(teacher, value, on):
    "The error names callback, loss and batch; the step is not taken, and both models can be used"
    broken = Breaks(teacher, value)
    kd = KD(broken, [Match(Attention, '0', 'model.0'), SoftTarget(T=3)])
    learn,states = learner(cbs=kd if on == 'learner' else None),[]
    after = Callback(after_step=lambda self: states.append(state(self.model)))
    with pytest.raises(ValueError, match=r"(?s)`KnowledgeDistillationCallback`.*SoftTarget\(T=3.*is (nan|inf).*the teacher's answer is not finite.*epoch 0, batch 1"):
        learn.fit(2, cbs=[after] + ([kd] if on == 'fit' else []))
    assert len(states) == 1 and all(torch.equal(p, states[0][n]) for n,p in learn.model.named_parameters()) and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    assert n_hooks(learn.model, broken) == 0 and teacher.training
    learn.fit(1, cbs=KD(teacher) if on == 'fit' else None)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_loss_that_is_not_finite(teacher):
    def log_ratio(s, t): return (s.sum() - s.sum() - 1).log()
    learn = learner()
    with pytest.raises(ValueError, match=r'log_ratio is nan, though what it compares is finite \(epoch 0, batch 0\)'): learn.fit(1, cbs=KD(teacher, [SoftTarget, log_ratio]))
    def whole(s, t): return s.square().mean()/0
    with pytest.raises(ValueError, match=r'whole is inf'): learn.fit(1, cbs=KD(teacher, whole, '0', '0'))
    learn.fit(1, cbs=KD(teacher))

def test_student_that_is_not_finite_is_left_to_the_fit(teacher):
    "Gradient scalers skip such steps, `TerminateOnNaNCallback` ends the fit: both see what they would see without a teacher"
    from fastai.callback.all import TerminateOnNaNCallback
    learn,losses = learner(Breaks(net())),[]
    learn.fit(1, cbs=[KD(teacher), TerminateOnNaNCallback(), Callback(before_backward=lambda self: losses.append(self.learn.loss.item()))])
    assert [math.isnan(l) for l in losses] == [False,True] and n_hooks(learn.model, teacher) == 0

# --- exceptions ---

def test_exception_in_a_loss(teacher):
    calls = []
    def fails(s, t):
        calls.append(1)
        if len(calls) == 3: raise ZeroDivisionError('by chance')
        return (s-t).square().mean()
    learn = learner()
    with pytest.raises(ZeroDivisionError, match=r"(?s)`KnowledgeDistillationCallback`.*fails cannot compare layers '4' and '4', student \(8, 3\).*by chance.*epoch 0, batch 2"):
        learn.fit(2, cbs=KD(teacher, fails, '4', '4'))
    assert n_hooks(learn.model, teacher) == 0 and teacher.training
    learn.fit(1, cbs=KD(teacher, fails, '4', '4'))

@pytest.mark.parametrize('whose', ['student','teacher'])
def test_exception_in_a_hook(teacher, whose):
    "Somebody else's hook: the teacher's is named with what was asked, the student's is fastai's own business"
    learn = learner()
    model = learn.model if whose == 'student' else teacher
    def fails(m, i, o): raise RuntimeError('hook of somebody else')
    handle = model[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match='(?s)hook of somebody else' + ('.*epoch 0, batch 0' if whose == 'teacher' else '')):
        learn.fit(1, cbs=KD(teacher, Attention, stages, stages))
    handle.remove()
    assert n_hooks(learn.model, teacher) == 0 and teacher.training
    learn.fit(1, cbs=KD(teacher, Attention, stages, stages))

# --- memory ---

def tensors():
    "How many tensors live, and how many numbers they hold"
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return len(found),sum(o.numel() for o in found)

@pytest.mark.parametrize('on', ['fit','learner'])
def test_ctrl_c_leaves_no_tensors(teacher, on):
    "After an interrupted fit and a whole one as many as after the whole one before: no features, no answers, no second hooks"
    def stop(self):
        if self.training and self.iter == 1: raise KeyboardInterrupt
    kd = KD(teacher, [SoftTarget, Match(Attention, stages, stages), Match(VID, '1', '1')])
    learn = learner(cbs=kd if on == 'learner' else None)
    mine = [kd] if on == 'fit' else []
    learn.fit(1, cbs=mine)
    before = tensors()
    for event in ('after_pred','after_loss','after_backward','after_step'):
        stopper = Callback(**{event: stop})
        stopper.order = 45
        try: learn.fit(1, cbs=[*mine, stopper])
        except KeyboardInterrupt: pass
        else: assert False
        hooks = []
        learn.fit(1, cbs=[*mine, Callback(before_batch=lambda self: hooks.append(n_hooks(self.model, teacher)) if self.training else None)])
        assert set(hooks) == {7} and list(learn.recorder.metric_names).count('kd_loss') == 1
        assert tensors() == before

# --- many fits ---

events = ['before_train','before_batch','after_pred','after_loss','after_backward','before_step','after_step','after_batch','after_train']
interruptions = [KeyboardInterrupt, RuntimeError, CancelFitException, CancelEpochException, CancelTrainException, CancelBatchException, CancelStepException]
terms = [lambda: SoftTarget, lambda: DecoupledKD, lambda: Match(Attention, stages, stages), lambda: Match(FitNet, '1', '0'), lambda: Match(VID, ['0','0.0'], ['0','0.0']),
         lambda: Match(Similarity, '0.1', '1.1')]
extras = [lambda: GradientAccumulation(12), lambda: GradientClip(.1), lambda: MixUp()]

@pytest.mark.slow
def test_hundreds_of_fits():
    "With random losses, layers, callbacks and interruptions: no hook left, no growth of memory, no change of the teacher"
    learn,teacher,alive = learner(net(), data(16)),net(8),[]
    loss_func = learn.loss_func
    before,student = state(teacher),state(learn.model)
    @settings(max_examples=400, deadline=None, database=None)
    @given(st.lists(st.sampled_from(terms), min_size=1, max_size=3), st.lists(st.sampled_from(extras), max_size=2, unique=True), st.booleans(),
           st.none() | st.tuples(st.sampled_from(interruptions), st.sampled_from(events), st.integers(0, 1), st.sampled_from([-20,4,7,40,70])))
    def fit(losses, others, attached, interruption):
        learn.model.load_state_dict(student)
        learn.loss_func = loss_func     # an interrupted MixUp leaves its own
        cbs = [KD(teacher, [l() for l in losses])]
        if attached: learn.add_cbs(cbs)
        own = [] if attached else cbs
        if interruption:
            ex,event,at,order = interruption
            def raise_(self):
                if self.training and self.train_iter == at: raise ex('somebody else')
            own = [*own, Callback(**{event: raise_})]
            own[-1].order = order
        try: learn.fit(1, 1e-3, cbs=[*own, *[o() for o in others]])
        except (KeyboardInterrupt,RuntimeError) as e: assert 'somebody else' in str(e)
        except (CancelFitException,CancelEpochException,CancelTrainException,CancelBatchException,CancelStepException): pass     # raised where fastai does not wait for it
        if attached: learn.remove_cbs(cbs)
        learn.opt.zero_grad()
        assert n_hooks(learn.model, teacher) == 0 and teacher.training and same_state(teacher, before) and all(p.grad is None for p in teacher.parameters())
        assert [len(g) for g in learn.opt.param_lists] == [len(list(learn.model.parameters()))] and learn.metrics.attrgot('name') == ['accuracy']
        assert not any(isinstance(cb, KD) for cb in learn.cbs)
        fit.n = getattr(fit, 'n', 0) + 1
        if fit.n % 80 == 0: alive.append(tensors())
    fit()
    assert len(alive) >= 5 and max(alive[1:]) <= (alive[0][0]+50, alive[0][1]*1.05)
