"MixUp and CutMix: recorded, and drawn again in a fit."
import pickle, random
from copy import deepcopy
import fastai.callback.schedule
import numpy as np, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, set_seed, TfmdDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastdistill.callback import KnowledgeDistillationCallback as KD
from fastdistill.losses import Attention, FitNet, SoftTarget
from fastdistill.objective import Match
from fastdistill.recording import record_teacher
from fastdistill.recording.batches import Seeded
from torch import nn
from conftest import data, learner, net, QuietLearner, same_state, state
from recording_helpers import arrays, cnn, Counting, fit, images, is_another, refuses, SameBatches

float32 = dict(dtype=torch.float32, n_epoch=2)

class Keep(Callback):
    order = 60
    def before_fit(self): self.seen = []
    def after_pred(self):
        if self.training: self.seen.append(self.x.as_subclass(torch.Tensor).clone())

class HalfMixUp(MixUp):
    "Blends some batches"
    def __init__(self, p=0.5):
        super().__init__(0.4)
        self.p = p
    def before_batch(self):
        self.yb1,self.lam = self.yb,torch.ones(len(self.y))
        if np.random.rand() < self.p: super().before_batch()

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('mix', [MixUp,CutMix,HalfMixUp])
def test_bit_for_bit_as_a_teacher_that_runs(tmp_path, workers, mix):
    "Recorded with other workers, and with blends of half a step"
    teacher,ends = cnn(),[]
    rec = record_teacher(teacher, images(2-workers), tmp_path/'r', cbs=mix(), **float32)
    dls = images(workers)
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        keep = Keep()
        cbs = cbs + [mix(), keep] + [GradientAccumulation(8)]*workers
        learn = fit(answers, dls, 3, cnn(dropout=0.5), cbs=cbs)
        ends.append((state(learn.model), torch.stack(keep.seen), torch.rand(1), np.random.rand(), random.random()))
    (model,seen,*drawn),(_,others,*also) = ends
    assert same_state(learn.model, model) and torch.equal(seen, others) and drawn == also
    plain = torch.stack([x.as_subclass(torch.Tensor) for e in (0,1,0) for x,_ in Seeded(dls.train, 0, e)])
    changed = (seen != plain).flatten(1).any(1)
    assert changed.any() and not (mix is HalfMixUp and changed.all())
    assert torch.equal(seen[:5], seen[10:]) and not torch.equal(seen[:5], seen[5:10])

def test_features_of_blended_inputs(tmp_path):
    teacher,dls,ends = cnn(),images(),[]
    losses = [SoftTarget,Match(Attention, '0', '0'),Match(FitNet, '2', '2')]
    rec = record_teacher(teacher, dls, tmp_path/'r', loss=losses, cbs=MixUp(), **float32)
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = QuietLearner(dls, cnn(dropout=0.5), CrossEntropyLossFlat())
        learn.fit(3, cbs=[KD(answers, losses), MixUp(), *cbs])
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])

def test_blends_by_a_plain_loop(tmp_path):
    "What the teacher was asked is a blend of the batch with itself in another order"
    teacher,dls = cnn(),images()
    rec = record_teacher(teacher, dls, tmp_path/'r', cbs=MixUp(1.), **float32)
    answers = torch.from_numpy(arrays(rec)['logits']).split(4)
    keep = Keep()
    fit(rec, dls, 2, cbs=[MixUp(1.), keep])
    batches = [x.as_subclass(torch.Tensor) for e in range(2) for x,_ in Seeded(dls.train, 0, e)]
    for x,seen,answer in zip(batches, keep.seen, answers):
        assert torch.equal(teacher(seen), answer)
        for i,item in enumerate(seen):
            def rest(j):
                "How far the item is from the best blend of i and j, and the share of i"
                a,b = item-x[j],x[i]-x[j]
                lam = (a*b).sum()/(b*b).sum().clamp(min=1e-9)
                return (a - lam*b).abs().max().item(),lam.item()
            errors = [rest(j) for j in range(4)]
            error,lam = min(errors)
            assert error < 1e-4 and (-1e-3 < lam <= 1.001)

@pytest.mark.parametrize('kind', ['classes','one-hot','values'])
def test_kinds_of_labels(tmp_path, kind):
    y = torch.arange(24)%3
    y,loss = dict(classes=(y,CrossEntropyLossFlat()), values=(y.float()[:,None].expand(-1,3),nn.MSELoss()),
                  **{'one-hot':(nn.functional.one_hot(y, 3).float(),nn.BCEWithLogitsLoss())})[kind]
    items = list(zip(torch.randn(24,2,8,8), y))
    dls = DataLoaders(TfmdDL(items, bs=8, shuffle=True, num_workers=0), TfmdDL(items, bs=8, num_workers=0), device=torch.device('cpu'))
    rec = record_teacher(net(8), dls, tmp_path/'r', cbs=CutMix)
    assert not rec.header['any_order'] and rec.header['blends'] == ['CutMix(alpha=1)']
    QuietLearner(dls, net(), loss).fit(2, cbs=[KD(rec, nn.MSELoss()), CutMix()])

def test_other_blends_are_refused_before_the_first_step(tmp_path):
    dls,model = images(),cnn()
    blended,plain = (record_teacher(cnn(), dls, tmp_path/n, cbs=c) for n,c in (('blended',MixUp()),('plain',None)))
    before = state(model)
    refuses(lambda: fit(blended, dls, model=model), 'was made with MixUp(alpha=0.4), but this fit has no blends', 'cbs=[..., MixUp(alpha=0.4)]')
    for mix in MixUp(0.2),CutMix(0.4): refuses(lambda: fit(blended, dls, model=model, cbs=[mix]), f'{type(mix).__name__}(alpha=', 'record the teacher again')
    refuses(lambda: fit(plain, dls, model=model, cbs=[CutMix()]), 'CutMix(alpha=1) blends inputs', 'has no answers to blends', 'cbs=CutMix(alpha=1)')
    assert same_state(model, before)
    refuses(lambda: record_teacher(cnn(), dls, tmp_path/'r', cbs=[MixUp(), GradientAccumulation(8)]), 'but got GradientAccumulation', error=TypeError)
    some = record_teacher(cnn(), dls, tmp_path/'half', cbs=HalfMixUp(0.25))
    refuses(lambda: fit(some, dls, cbs=[HalfMixUp()]), 'HalfMixUp(p=0.25)', 'HalfMixUp(p=0.5)')

def test_another_blend_is_another_recording(tmp_path):
    teacher,dls = cnn(),images()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 4), dls, tmp_path/'r', cbs=MixUp(), n_epoch=2)
    for cbs in None,MixUp(0.5): is_another(lambda: record_teacher(Counting(teacher), dls, tmp_path/'r', cbs=cbs, n_epoch=2), 'blends: ')
    rec = record_teacher(Counting(teacher), dls, tmp_path/'r', cbs=MixUp(), n_epoch=2)
    whole = record_teacher(teacher, dls, tmp_path/'whole', cbs=MixUp(), n_epoch=2)
    assert all(np.array_equal(a, arrays(whole)[k]) for k,a in arrays(rec).items())

class Copies(Callback):
    "Copies the blends of an epoch at its start"
    order = 60
    def __init__(self, copies, stop=False): self.copies,self.stop = copies,stop
    def before_train(self):
        assert 'before_batch' in vars(self.learn.mix_up)
        if not self.stop: self.copies += [deepcopy(self.learn.mix_up), pickle.loads(pickle.dumps(self.learn.mix_up))]
    def after_loss(self):
        if self.training and self.stop: raise KeyboardInterrupt

def test_a_blend_is_left_alone(tmp_path):
    "After a fit, one that is interrupted, `lr_find` and while a teacher is recorded; copies and pickles do not know of it"
    dls,mix = images(),MixUp()
    learn = QuietLearner(dls, cnn(), CrossEntropyLossFlat(), cbs=mix)
    before = dict(vars(mix))
    rec = record_teacher(cnn(), dls, tmp_path/'r', cbs=mix)
    assert vars(mix) == before and mix.learn is learn
    copies = []
    kd = KD(rec)
    learn.fit(1, cbs=[kd, Copies(copies)])
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(kd): learn.lr_find(num_it=7, show_plot=False)
    assert 'before_batch' not in vars(mix)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[kd, Copies(copies, stop=True)])
    learn.loss_func = CrossEntropyLossFlat()     # fastai leaves that of the blend there
    assert 'before_batch' not in vars(mix) and len(copies) == 2
    for c in copies:
        assert getattr(c.before_batch, '__func__', None) is MixUp.before_batch
    seen = []
    for cbs in [],[Keep()]:     # an ordinary fit afterwards
        set_seed(3)
        dls.train.rng = random.Random(3)
        learn.fit(1, cbs=cbs)
        seen.append(torch.rand(1))
    assert seen[0] == seen[1]
