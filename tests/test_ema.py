"A teacher that follows the student: its average against plain loops, what moves it and what must not, saved and resumed."
import pickle
from copy import copy, deepcopy
from functools import partial
import pytest, torch
import torch.nn.functional as F
from fastai.basics import (Adam, Callback, CancelFitException, CancelTrainException, CrossEntropyLossFlat, DataLoaders, Flatten, L, Learner, Lookahead, OptimWrapper, RAdam,
                           SGD, params, set_seed)
from fastai.callback.all import ActivationStats, GradientAccumulation, MixedPrecision, ModelResetter, hook_output
from fastai.callback.core import CancelBackwardException, CancelBatchException, CancelStepException
from fastai.callback import schedule     # gives Learner its `lr_find`
from fastai.text.models.awdlstm import AWD_LSTM
from torch import nn
from conftest import data, free_port, learner, loaders, mlp, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.layers import unwrap_model
from test_trained import exportable
import distributed_ema
from test_distributed import finish, here, start

KD = KnowledgeDistillationCallback

class Counts(nn.Module):
    "Buffers that have no average, and one that has"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.tensor(0))
        self.register_buffer('mask', torch.tensor([True,False]))
        self.register_buffer('mean', torch.zeros((), dtype=torch.float64))
    def forward(self, x):
        if self.training:
            self.n += 5; self.mask.logical_not_(); self.mean.add_(x.detach().mean())
        return x

class Students(Callback):
    "The student at the start and after each step that was taken, in a way that fastai's events do not share"
    order = 90
    def before_fit(self):
        if not hasattr(self, 'seen'): self.seen = [state(unwrap_model(self.model))]
        step = self.opt.step
        def stepped(*args, **kwargs):
            step(*args, **kwargs)
            self.seen.append(state(unwrap_model(self.model)))
        self.undo,self.opt.step = step,stepped
    def after_fit(self): self.opt.step = self.undo

def averaged(students, decay):
    "By a plain loop; whole numbers and Booleans are those of the last student"
    avg = {k:v.clone() for k,v in students[0].items()}
    for s in students[1:]:
        for k,v in s.items(): avg[k] = decay*avg[k] + (1-decay)*v if v.is_floating_point() else v.clone()
    return avg

def close_to(model, want, **kw):
    kw = kw or dict(rtol=1e-5, atol=1e-6)
    got = state(model)
    assert got.keys() == want.keys()
    for k in want: torch.testing.assert_close(got[k], want[k], **kw)

def test_equals_a_loop_by_hand():
    "Students and averages of two epochs, batch norm and all, in float64"
    def double(): return nn.Sequential(Counts(), net(4)).double()
    model,hand = double(),double()
    hand.load_state_dict(state(model))
    items = [(x.double(),y) for x,y in data(24, 8).train.dataset]
    ema,learn = EMATeacher(0.9),learner(model, loaders(items, items, 8, shuffle=False), opt_func=SGD)
    learn.loss_func = F.cross_entropy     # fastai computes its own in float32, and so does its recorder
    learn.remove_cb(learn.recorder)
    learn.fit(2, 0.1, cbs=KD(ema, SoftTarget(T=2), weight=0.4))
    avg,opt = deepcopy(hand).eval(),torch.optim.SGD(hand.parameters(), 0.1)
    for _ in range(2):
        for i in range(0, 24, 8):
            x,y = torch.stack([o[0] for o in items[i:i+8]]),torch.stack([o[1] for o in items[i:i+8]])
            pred = hand(x)
            with torch.no_grad(): p = F.softmax(avg(x)/2, 1)
            kl = (p*(p.log() - F.log_softmax(pred/2, 1))).sum(1).mean()
            (0.6*F.cross_entropy(pred, y) + 0.4*4*kl).backward()
            opt.step(); opt.zero_grad()
            now = averaged([state(avg),state(hand)], 0.9)
            avg.load_state_dict(now)
    for got,want in ((learn.model, hand), (ema.model, avg)): close_to(got, state(want), rtol=1e-12, atol=1e-12)
    assert ema.steps == 6 and ema.model[0].n == 30 and not ema.model.training and n_hooks(ema.model) == 0

def test_no_decay_is_the_last_student():
    ema,learn = EMATeacher(0),learner()
    learn.fit(1, cbs=KD(ema))
    assert same_state(ema.model, state(learn.model)) and ema.model is not learn.model

def cancels(event, ex, which, order):
    n = [0]
    def cancel(self):
        if not self.training: return
        n[0] += 1
        if n[0] % 2 == which: raise ex()
    cb = Callback(**{event:cancel})
    cb.order = order
    return cb

cases = dict(plain=([], 6), accumulated=([GradientAccumulation(16)], 3), skipped_early=([cancels('before_step', CancelStepException, 0, 1)], 3),
             skipped_late=([cancels('before_step', CancelStepException, 1, 60)], 3), no_batch=([cancels('after_loss', CancelBatchException, 0, 60)], 3),
             batch_before=([cancels('before_batch', CancelBatchException, 0, -5)], 3), no_backward=([cancels('before_backward', CancelBackwardException, 0, 60)], 6))

@pytest.mark.parametrize('cbs,n', cases.values(), ids=cases)
def test_moves_at_each_step_and_at_no_other_time(cbs, n):
    ema,seen,learn = EMATeacher(0.7),Students(),learner(dls=data(24, 8))
    learn.fit(2, 1e-2, cbs=[KD(ema),seen,*cbs])
    assert ema.steps == len(seen.seen)-1 == n
    close_to(ema.model, averaged(seen.seen, 0.7))

def test_scaled_gradients_that_overflow():
    "fastai's mixed precision skips a step by an exception, and its scaler needs a GPU: what it raises, it raises here"
    class Overflow(MixedPrecision):
        def before_fit(self): self.k = 0
        def before_batch(self): pass
        def after_pred(self): pass
        def after_loss(self): pass
        def before_backward(self): pass
        def after_step(self): pass
        def after_fit(self): pass
        def before_step(self):
            self.k += 1
            if self.k in (1,4): raise CancelStepException()
    ema,seen,learn = EMATeacher(0.7),Students(),learner()
    learn.fit(2, 1e-2, cbs=[KD(ema),seen,Overflow()])
    assert ema.steps == len(seen.seen)-1 == 4
    close_to(ema.model, averaged(seen.seen, 0.7))

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW), lambda *a, **k: Lookahead(RAdam(*a, **k), k=2)])
def test_any_optimizer(opt_func):
    ema,seen,learn = EMATeacher(0.7),Students(),learner(opt_func=opt_func)
    learn.fit(2, 1e-2, cbs=[KD(ema),seen])
    close_to(ema.model, averaged(seen.seen, 0.7))

# --- from fit to fit ---

@pytest.mark.parametrize('on_learner', [True,False])
def test_goes_on_with_the_same_student(on_learner):
    ema,seen = EMATeacher(0.7),Students()
    kd = KD(ema)
    learn = learner(dls=data(shuffle=False), cbs=[kd,seen] if on_learner else None)
    for _ in range(2): learn.fit(1, 1e-2, cbs=None if on_learner else [kd,seen])
    assert ema.steps == 6
    model = ema.model
    close_to(model, averaged(seen.seen, 0.7))
    learn.fit(1, cbs=None if on_learner else kd)
    assert ema.model is model
    another = learner()
    another.fit(1, cbs=KD(ema))     # another student
    assert ema.steps == 3 and ema.model is not model

def test_fine_tune_with_frozen_layers():
    def split(m): return L(m[0], m[1:]).map(params)
    ema,seen,learn = EMATeacher(0.7),Students(),learner(splitter=split)
    learn.fine_tune(1, 1e-2, cbs=[KD(ema),seen])
    assert ema.steps == 6
    close_to(ema.model, averaged(seen.seen, 0.7))
    frozen = learner()
    for p in frozen.model[0][0].parameters(): p.requires_grad_(False)
    ema = EMATeacher(0.7)
    frozen.fit(1, cbs=KD(ema))
    assert torch.equal(ema.model[0][0].weight, frozen.model[0][0].weight) and not ema.model[0][0].weight.requires_grad

@pytest.mark.parametrize('ex', [KeyboardInterrupt, CancelFitException, CancelTrainException, ZeroDivisionError])
@pytest.mark.parametrize('event', ['after_pred','before_step','after_batch'])
def test_interrupted_and_gone_on(ex, event):
    def stop(self):
        if self.training and self.train_iter == 1: raise ex('stop')
    cb = Callback(**{event:stop})
    cb.order = 60
    ema,seen = EMATeacher(0.7),Students()
    learn = learner(cbs=[KD(ema),seen])
    try: learn.fit(1, 1e-2, cbs=cb)
    except (KeyboardInterrupt,ZeroDivisionError): learn.opt.step = seen.undo
    assert n_hooks(ema.model, learn.model) == 0 and not ema.model.training
    learn.fit(1, 1e-2)
    assert ema.steps == len(seen.seen)-1
    close_to(ema.model, averaged(seen.seen, 0.7))

def test_a_fit_that_fails_before_its_first_step_leaves_no_average():
    ema,learn = EMATeacher(),learner()
    with pytest.raises(KeyError, match="teacher Sequential has no layer 'nose'"): learn.fit(1, cbs=KD(ema, Attention, '0', 'nose'))
    assert ema.steps == 0
    with pytest.raises(ValueError, match='The first fit makes the network'): ema(torch.randn(1,2,8,8))

@pytest.mark.parametrize('before', [0,1])
def test_trials_leave_it(before):
    ema,learn = EMATeacher(0.7),learner()
    kd = KD(ema, [SoftTarget, Match(Attention, '0', '0')])
    if before: learn.fit(1, cbs=kd)
    found,model = state(ema.model),ema.model
    def same():
        assert ema.steps == 3*before and n_hooks(ema.model, learn.model) == 0
        if before: assert ema.model is model and same_state(ema.model, found)
    def lr_find():
        with learn.added_cbs(kd): learn.lr_find(num_it=8, show_plot=False)
    def check(): learn.distill_check(kd, n=1)
    def find(): learn.weight_finder(kd, weights=[0.5], n_epoch=2)
    for trial in (lr_find, check, find):
        trial()
        same()
    def interrupt(self): raise KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), learn.added_cbs([kd,Callback(after_backward=interrupt)]): learn.lr_find(num_it=8, show_plot=False)
    same()

def test_a_trial_follows_too():
    "Within `lr_find` the average moves"
    ema,seen = EMATeacher(0.7),[]
    learn = learner(cbs=KD(ema))
    def look(self): seen.append(ema.model[0][0].weight.sum().item())
    with learn.added_cbs(Callback(after_batch=look)): learn.lr_find(num_it=8, show_plot=False)
    assert len(set(seen)) > 4 and ema.steps == 0

def test_check_before_and_after_a_fit():
    ema,learn = EMATeacher(0.5),learner(mlp(), data(64, 16))
    kd = KD(ema, [SoftTarget, Match(FitNet, '1', '1')])
    check = learn.distill_check(kd, n=1)
    assert len(check.warnings) == 1 and 'starts as the student' in check.warnings[0] and check.models.parameters.nunique() == 2
    learn.fit(1, cbs=kd)
    assert not [w for w in learn.distill_check(kd, n=1).warnings if 'starts as' in w]

def test_a_new_student_gets_no_warnings(recwarn):
    learner(dls=data(256, 64)).fit(1, cbs=KD(EMATeacher()))
    assert not [w for w in recwarn if 'teacher' in str(w.message)]

# --- saved ---

@pytest.mark.parametrize('terms', [SoftTarget, [SoftTarget, Match(FitNet, '0', '0')]], ids=['average','and_projectors'])
def test_resumed_equals_uninterrupted(terms, tmp_path):
    "Two epochs, or one, files, new objects and another one: bit for bit"
    start = state(net())
    def new():
        learn,ema = learner(net(), data(shuffle=False), path=tmp_path),EMATeacher(0.7)
        learn.model.load_state_dict(start)
        return learn,ema,KD(ema, terms)
    def seeded(): return Callback(before_epoch=lambda self: set_seed(1))
    learn,whole,kd = new()
    for _ in range(2): learn.fit(1, 1e-2, cbs=[kd,seeded()])
    one,ema,kd = new()
    one.fit(1, 1e-2, cbs=[kd,seeded()])
    one.save('student'); kd.save(tmp_path/'kd.pth')
    two,ema,kd = new()
    two.create_opt(); two.load('student', weights_only=False); kd.load(tmp_path/'kd.pth')
    assert ema.steps == 3
    two.fit(1, 1e-2, cbs=[kd,seeded()])
    assert ema.steps == 6 and same_state(two.model, state(learn.model)) and same_state(ema.model, state(whole.model))

def test_files(teacher, tmp_path):
    file = tmp_path/'kd.pth'
    ema,learn = EMATeacher(0.7),learner()
    kd = KD(ema)
    with pytest.raises(ValueError, match='Nothing to save'): kd.save(file)
    learn.fit(1, cbs=kd)
    kd.save(file)
    assert torch.load(file).keys() == {'losses','states','teachers'}
    kd = KD(EMATeacher())
    kd.load(file); kd.save(tmp_path/'again.pth')     # without a fit in between
    again = torch.load(tmp_path/'again.pth')['teachers']['teacher']
    assert again['steps'] == 3 and same_state(ema.model, again['average'])
    other = KD(teacher)
    with pytest.raises(ValueError, match=r'expected callback\.teacher to be an `EMATeacher`, but got Sequential'): other.load(file)
    none = pickle.loads(pickle.dumps(kd))
    with pytest.raises(ValueError, match='to be an `EMATeacher`, but got None'): none.load(file)
    wider,before = learner(net(6)),state(ema.model)
    with pytest.raises(ValueError, match='average of a student like this one'): wider.fit(1, cbs=kd)
    assert kd.teacher.steps == 3     # still to be used
    kd = KD(teacher, FitNet, '0', '0')
    learner().fit(1, cbs=kd)
    kd.save(file)
    assert torch.load(file).keys() == {'losses','states'}     # as ever
    kd = KD(EMATeacher(), FitNet, '0', '0')
    kd.load(file)
    assert kd.teacher.steps == 0

def test_loaded_and_looked_at_first(tmp_path):
    "A trial between `load` and the fit takes nothing away"
    ema,learn = EMATeacher(0.7),learner()
    kd = KD(ema)
    learn.fit(1, cbs=kd)
    kd.save(tmp_path/'kd.pth')
    kd = KD(EMATeacher(0.7))
    kd.load(tmp_path/'kd.pth')
    learn.distill_check(kd, n=1)
    with learn.added_cbs(kd): learn.lr_find(num_it=4, show_plot=False)
    seen = []
    learn.fit(1, cbs=[kd,Callback(before_batch=lambda self: seen.append(state(kd.teacher.model)))])
    assert all(torch.equal(v, seen[0][k]) for k,v in ema.model.state_dict().items()) and kd.teacher.steps == 6

def test_copies_have_their_own():
    ema = EMATeacher(0.7)
    learn = learner(dls=data(shuffle=False), cbs=KD(ema))
    learn.fit(1)
    found,twin = state(ema.model),deepcopy(learn)
    other = twin.knowledge_distillation.teacher
    assert other is not ema and other.steps == 3
    twin.fit(1)
    assert same_state(ema.model, found) and ema.steps == 3 and other.steps == 6
    learn.fit(1)
    assert same_state(ema.model, state(other.model))     # both went on from the same point
    for made in (copy(ema), deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert made.decay == 0.7 and made.steps == 6 and made.model is not ema.model

def test_what_leaves_the_learner_holds_no_average(tmp_path):
    sizes = {}
    for name,cbs in {'alone': None, 'ema': KD(EMATeacher())}.items():
        learn = learner(path=tmp_path, dls=exportable(), cbs=cbs)
        learn.fit(1)
        learn.export(f'{name}.pkl')
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
    assert sizes['ema'] - sizes['alone'] < 1000 and b'fastdistill' not in (tmp_path/'ema.pkl').read_bytes()
    assert pickle.loads(pickle.dumps(learn)).knowledge_distillation.teacher is None

# --- students ---

def test_the_average_is_a_plain_network():
    ema,learn = EMATeacher(0.5),learner(dls=data(64, 16))
    learn.fit(3, 1e-2, cbs=KD(ema))
    loss,acc = learner(ema.model, learn.dls).validate()
    x,y = learn.dls.valid.one_batch()
    assert loss == pytest.approx(F.cross_entropy(ema.model.eval()(x), y).item(), rel=1e-5)
    loaded = net()
    loaded.load_state_dict(ema.model.state_dict())
    assert not {id(p) for p in ema.model.parameters()} & {id(p) for p in learn.model.parameters()}

def test_features():
    "Those of the average, which differ from the student's; projectors train"
    seen = []
    def loss(s, t): seen.append((s.detach(),t)); return (s-t).square().mean()
    ema,learn = EMATeacher(0.9),learner(mlp())
    learn.fit(2, 1e-1, cbs=KD(ema, [Match(loss, ['1','2'], ['1','2']), Match(FitNet, '1', '1')]))
    assert [torch.equal(s, t) for s,t in seen] == [True]*2 + [False]*10
    assert ema.steps == 6

in_parallel = pytest.param(nn.DataParallel, marks=pytest.mark.skipif(torch.cuda.is_available(), reason='it would put the student on the GPU'))

@pytest.mark.parametrize('wrap', [in_parallel, partial(torch.compile, backend='eager')], ids=['DataParallel','compile'])
def test_wrapped_students(wrap, dynamo):
    plain,wrapped = net(),net()
    wrapped.load_state_dict(state(plain))
    a,b = EMATeacher(0.7),EMATeacher(0.7)
    learner(plain, data(shuffle=False)).fit(2, 1e-2, cbs=KD(a))
    learner(wrap(wrapped), data(shuffle=False)).fit(2, 1e-2, cbs=KD(b))
    assert type(b.model) is nn.Sequential
    close_to(b.model, state(a.model), rtol=1e-4, atol=1e-5)

class Texts(nn.Module):
    "Predicts the next word, from a state that goes on from batch to batch"
    def __init__(self, vocab=10):
        super().__init__()
        self.encoder,self.out = AWD_LSTM(vocab, 8, 12, 2, hidden_p=0.1),nn.Linear(8, vocab)
    def forward(self, x): return self.out(self.encoder(x))
    def reset(self): self.encoder.reset()

def texts():
    items = [(o[:-1],o[1:]) for o in torch.randint(10, (24,9))]
    return DataLoaders.from_dsets(items, items, bs=8, num_workers=0, drop_last=True, device=torch.device('cpu'))

def test_recurrent_students():
    "Their hidden state is the student's affair; `deepcopy` alone refuses fastai's"
    ema,learn = EMATeacher(0.7),Learner(texts(), Texts(), loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
    with pytest.raises(RuntimeError, match='deepcopy'): deepcopy(learn.model)
    seen,kd = Students(),KD(ema, SoftTarget(axis=-1))
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.fit(1, 1e-2, cbs=[kd,seen])
        learn.distill_check(kd, n=1)
    assert ema.steps == 6
    close_to(ema.model, averaged(seen.seen, 0.7))

class Unet(nn.Module):
    "Reads an inner layer through a hook, as fastai's `DynamicUnet`"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()),nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 3))
        self.hook = hook_output(self.body[0], detach=False)
    def forward(self, x):
        x = self.body(x)
        return self.head(torch.cat([x, self.hook.stored], 1))

def test_students_that_hook_themselves():
    ema,seen,learn = EMATeacher(0.7),[],learner(Unet())
    learn.fit(1, 1e-2, cbs=[KD(ema),ActivationStats(modules=[learn.model.body[1]])])
    assert ema.model.hook is not learn.model.hook
    x = torch.randn(4,2,8,8)
    inner = ema.model.body[0](x)
    torch.testing.assert_close(ema.model(x), ema.model.head(torch.cat([inner.relu(), inner], 1)))

def test_a_student_that_cannot_be_copied():
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo): raise TypeError('it holds a lock')
    learn = learner(Locked(*net()))
    before = state(learn.model)
    with pytest.raises(ValueError, match='student that can be copied.*Locked raises TypeError: it holds a lock'): learn.fit(1, cbs=KD(EMATeacher()))
    assert same_state(learn.model, before) and n_hooks(learn.model) == 0

def narrower(model): model[-1] = nn.Sequential(nn.Linear(32, 3), nn.Linear(3, 3))

def test_layers_that_change_between_fits_start_the_average_anew():
    ema,learn = EMATeacher(0.7),learner()
    kd = KD(ema)
    learn.fit(1, cbs=kd)
    narrower(learn.model)
    learn.create_opt()
    with pytest.warns(UserWarning, match='its average starts anew'): learn.fit(1, cbs=kd)
    assert ema.steps == 3 and len(ema.model[-1]) == 2

def test_layers_that_change_in_an_epoch_are_an_error():
    ema,learn = EMATeacher(0.7),learner()
    def prune(self):
        if self.training and self.train_iter == 1: narrower(self.model)
    with pytest.raises(ValueError, match=r'keep the shapes.*EMATeacher\(0.7\).*\(epoch 0, batch 1\)'): learn.fit(1, cbs=[KD(ema),Callback(after_loss=prune)])
    assert n_hooks(learn.model, ema.model) == 0

def test_set_in_the_middle_of_a_fit(teacher):
    ema,learn = EMATeacher(0.7),learner(dls=data(shuffle=False))
    kd = KD(teacher)
    def change(self):
        if self.training and self.train_iter == 2: kd.teacher = ema
    learn.fit(2, cbs=[kd,Callback(after_batch=change)])
    assert ema.steps == 4

# --- what cannot be ---

@pytest.mark.parametrize('decay', [1, 1.5, -0.1, '0.9', None, float('nan')])
def test_wrong_decay(decay):
    with pytest.raises(ValueError, match='decay to be a number from 0 to below 1'): EMATeacher(decay)

def test_refused(teacher, tmp_path):
    for ema in (EMATeacher(), EMATeacher()):
        with pytest.raises(ValueError, match='networks that stay as they are, but got one that follows'): Ensemble([teacher, ema])
        with pytest.raises(ValueError, match=r'stay as they are to record, but got EMATeacher\(0.999\)'): record_teacher(ema, data(), tmp_path/'r')
        learner().fit(1, cbs=KD(ema))
    assert not (tmp_path/'r').exists()

def test_one_student_at_a_time():
    ema,(one,two) = EMATeacher(),(learner(), learner())
    def nested(self):
        if self.training and self.train_iter == 1: two.fit(1, cbs=KD(ema))
    with pytest.raises(ValueError, match='follow one student at a time'): one.fit(1, cbs=[KD(ema),Callback(after_pred=nested)])

# --- several processes ---

@pytest.mark.slow
def test_two_processes(tmp_path):
    "All keep the same average, that of one process with the joined batches; statistics of batch norm are each process's own, and the first one's are saved"
    pytest.importorskip('accelerate')
    finish(start('--nproc_per_node', 2, '--master_port', free_port(), str(here/'distributed_ema.py'), tmp_path))
    ranks = [torch.load(tmp_path/f'ema_{r}.pth') for r in (0,1)]
    alone = distributed_ema.fit(tmp_path, distributed_ema.conv_net)
    for r in ranks:
        one = r['conv_net']
        assert one['steps'] == alone['steps'] == 4 and one['kind'] == 'Sequential'
        for part in ('student','average'):
            for k,v in one[part].items(): torch.testing.assert_close(v, alone[part][k], rtol=1e-4, atol=1e-6)
        for name,found in r.items():
            for k,v in found['average'].items():
                if 'running' not in k: assert torch.equal(v, ranks[0][name]['average'][k])
                assert torch.equal(found['loaded']['average'][k], ranks[0][name]['average'][k])

# --- an average named by a Match ---

def test_an_average_beside_another_teacher(teacher, tmp_path):
    "It follows, is saved and resumed, belongs to its callback, and stays after a trial"
    def new():
        ema = EMATeacher(0.7)
        return ema,KD(teacher, [SoftTarget, Match(Logits, teacher=ema)])
    (ema,kd),learn = new(),learner()
    with learn.no_bar(): learn.fit(1, cbs=kd)
    assert ema.steps == 3
    kd.save(tmp_path/'kd.pth')
    assert torch.load(tmp_path/'kd.pth')['teachers'].keys() == {'matches[1].teacher'}
    again,kd2 = new()
    kd2.load(tmp_path/'kd.pth')
    assert again.steps == 3
    other = deepcopy(kd).matches[1].teacher
    assert other is not ema and other.steps == 3 and same_state(ema.model, other.state_dict()['average'])
    before = state(ema.model)
    with learn.no_bar(): learn.distill_check(kd)
    assert ema.steps == 3 and same_state(ema.model, before)
    learn.fit(1, cbs=kd)
    assert ema.steps == 6
