"Recordings of features: fits as with a teacher that runs, what is kept, and what is refused."
from copy import deepcopy
from functools import partial
import math
import numpy as np, pytest, torch
from fastai.basics import Callback, set_seed
from fastdistill.all import *
from fastdistill.losses.base import FeatureLoss, registered_losses
from fastdistill.recording.files import Files
from fastdistill.recording.kept import Kept
from torch import nn
from conftest import data, learner
from recording_helpers import cnn, fit, images, refuses, SameBatches

KD = KnowledgeDistillationCallback

def wide():
    "A teacher with more channels than the student"
    return nn.Sequential(nn.Conv2d(3,6,3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Identity(), nn.Linear(24,3))

terms = [Match(SoftTarget), Match(Attention, '0', '0'), Match(RKD, '2', '2'), Match(FitNet, '0', '0'),
         Match(Similarity, '2', '2'), Match(VID, '1', '1'), Match(Cosine, '1', '1', projector=True)]

def distil(dls, kd, *cbs, n_epoch=2):
    set_seed(1)
    learn = learner(cnn(dropout=0.5), dls, cbs=[kd, *cbs])
    learn.fit(n_epoch)
    return learn

def same(a, b): return all(map(torch.equal, a.model.parameters(), b.model.parameters()))

@pytest.mark.parametrize('workers', [0,2])
def test_bit_for_bit_as_a_teacher_that_runs(tmp_path, workers):
    "Predictions, a map of attention, vectors, whole features, features with projectors; cropped and turned images"
    dls,teacher = images(workers),wide()
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, loss=terms, dtype=torch.float32)
    a = distil(dls, KD(rec, terms, weight=0.6))
    b = distil(dls, KD(teacher, terms, weight=0.6), SameBatches(rec))
    assert same(a, b)
    la,lb = a.knowledge_distillation.losses,b.knowledge_distillation.losses
    assert la.keys() == lb.keys() and all(la[k] == lb[k] for k in la)

@pytest.mark.parametrize('m', terms[1:], ids=repr)
def test_one_term_alone(tmp_path, m):
    "No predictions are kept; the validation loss is the task's, as ever"
    dls,teacher = images(),wide()
    rec = record_teacher(teacher, dls, tmp_path/'r', 2, m, dtype=torch.float32)
    assert all(k.layer for k in rec.kept) and not (tmp_path/'r'/'predictions.npy').exists()
    assert same(distil(dls, KD(rec, m)), distil(dls, KD(teacher, m), SameBatches(rec)))
    refuses(lambda: KD(rec, SoftTarget), 'compares predictions', 'expected a recording of predictions')

def test_arguments_of_the_callback(tmp_path):
    "The layers of the student do not matter; a whole objective works; what is kept does not depend on the way"
    dls,teacher = images(),wide()
    ways = [dict(loss=Attention, student_layers=['0','1'], teacher_layers=['0','1']), dict(loss=Attention, teacher_layers=['0','1']),
            dict(loss=[Match(Attention, '5', '0'), Match(Attention, '5', '1')]), dict(loss=KD(teacher, Attention, ['0','1'], ['0','1']).objective)]
    kept = [list(map(str, record_teacher(teacher, dls, tmp_path/str(i), **w).kept)) for i,w in enumerate(ways)]
    assert all(k == ['0 (attention map, p=2)','1 (attention map, p=2)'] for k in kept)

def test_what_is_kept_by_a_plain_loop(tmp_path):
    dls,teacher = data(),nn.Sequential(nn.Conv2d(2,5,3), nn.ReLU(), nn.Flatten(), nn.Linear(180,3)).eval()
    losses = [Match(SoftTarget), Match(Attention(p=3), '0', '0'), Match(PKT, '1', '1'), Match(Cosine, '2', '2')]
    rec = record_teacher(teacher, dls, tmp_path/'r', loss=losses, dtype=torch.float32)
    assert list(map(str, rec.kept)) == ['predictions', '0 (attention map, p=3)', '1 (mean over positions)', '2']
    x = torch.stack([o[0] for o in dls.train.dataset])
    with torch.no_grad():
        f = teacher[0](x)
        strength = f.abs().pow(3).mean(1, keepdim=True)     # in units of a power of two near its length
        unit = torch.tensor([2.**(math.floor(math.log2(s.square().sum().sqrt().item()))+1) for s in strength])
        want = teacher(x),strength/unit.view(-1,1,1,1),f.relu().mean((2,3)),f.relu().flatten(1)
    for i,w in enumerate(want):
        (got,),whole = rec.files.read(range(len(x)), i)
        assert whole.all() and torch.allclose(got, w, atol=1e-6)

@pytest.mark.parametrize('p,weak', [(1,1e-4),(2,1e-3),(4,0.05)])
def test_maps_of_weak_items_in_float16(tmp_path, p, weak):
    "A loss compares the map of each item in its own units, so an item that is 1,000 times weaker than others counts as much"
    class Dims(nn.Module):
        "The layer is weaker for images that are dark"
        def __init__(self): super().__init__(); self.c,self.a,self.l = nn.Conv2d(2,5,3),nn.Identity(),nn.Linear(180,3)
        def forward(self, x):
            f = self.c(x)
            return self.l(self.a(f*torch.where(x.mean((1,2,3), keepdim=True) > 0.3, 1., weak)).flatten(1))
    dls,teacher = data(shuffle=False),Dims()
    rec = record_teacher(teacher, dls, tmp_path/'r', loss=Attention(p), teacher_layers='a', dtype=torch.float16)
    x = torch.stack([o[0] for o in dls.train.dataset])
    with torch.no_grad(): teacher.eval()(x); f = teacher.c(x)     # a map does not depend on how strong its item is
    want = nn.functional.normalize(f.abs().pow(p).mean(1).flatten(1))
    (got,),_ = rec.files.read(range(len(x)))
    assert torch.allclose(nn.functional.normalize(got.float().flatten(1)), want, atol=1e-3)

@pytest.mark.parametrize('name', [k for k,v in registered_losses.items() if hasattr(v, 'reduce_teacher') and not v.needs_items])
def test_reduced_is_the_same_loss(name):
    "For each loss that reduces, and remembers nothing: equal values and gradients, half precision as well"
    loss = registered_losses[name]()
    for size,dtype in ((4,torch.float32), (6,torch.float32), (4,torch.float16)):     # a student's map may be larger
        s = torch.randn(5,3,size,size).to(dtype).requires_grad_()
        t = torch.randn(5,7,4,4).to(dtype)
        a,b = loss(s, t),Match(loss, '0', '0').compare([s], [Kept('0', 'x', loss).of(t)], reduced=True)[0]
        assert torch.equal(a, b) and torch.equal(*(torch.autograd.grad(o, s)[0] for o in (a,b)))

def test_maps_larger_than_the_students_need_whole_features(tmp_path):
    "`Attention` makes features smaller before it squares them"
    dls,teacher = images(),wide()
    m = Match(Attention, '2', '0')
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, m, dtype=torch.float32)
    refuses(lambda: distil(dls, KD(rec, m), n_epoch=1), 'not larger', '(4, 1, 6, 6)', '(4, 4, 2, 2)', 'reduce=False')
    rec = record_teacher(teacher, dls, tmp_path/'w', 1, m, dtype=torch.float32, reduce=False)
    assert same(distil(dls, KD(rec, m), n_epoch=1), distil(dls, KD(teacher, m), SameBatches(rec), n_epoch=1))

def test_whole_features_serve_all_losses(tmp_path):
    dls,teacher = images(),wide()
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, Cosine, '0', '0', dtype=torch.float32)
    for loss in Attention,RKD,Similarity,partial(Attention, p=4):
        m = Match(loss, '0', '0')
        assert same(distil(dls, KD(rec, m), n_epoch=1), distil(dls, KD(teacher, m), SameBatches(rec), n_epoch=1))

def test_one_term_with_a_whole_feature_and_a_reduced_one(tmp_path):
    dls,teacher = images(),wide()
    both = [Match(Attention, ['0','1'], ['0','1']), Match(FitNet, '1', '1')]
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, both, dtype=torch.float32)
    assert list(map(str, rec.kept)) == ['0 (attention map, p=2)','1']
    assert same(distil(dls, KD(rec, both), n_epoch=1), distil(dls, KD(teacher, both), SameBatches(rec), n_epoch=1))

def test_refusals(tmp_path):
    "What is missing is said when the callback is made; what is held is listed"
    dls,teacher = images(),wide()
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, [Match(SoftTarget), Match(Attention, '0', '0')])
    holds = 'it holds: predictions; 0 (attention map, p=2)'
    refuses(lambda: KD(rec, Attention(p=4), '0', '0'), '0 (attention map, p=4)', holds)
    refuses(lambda: KD(rec, Attention, '0', '1'), 'recording of 1 (attention map, p=2)', holds)
    refuses(lambda: KD(rec, FitNet, '0', '0'), 'recording of 0,', holds)
    with pytest.raises(KeyError, match='has no layer'): record_teacher(teacher, dls, tmp_path/'n', loss=Attention, teacher_layers='nothing')
    refuses(lambda: record_teacher(teacher, dls, tmp_path/'n', loss=Attention, teacher_layers='5'), 'with 4 axes', 'shape (4, 3)')
    refuses(lambda: record_teacher([teacher,teacher], dls, tmp_path/'n', loss=Attention, teacher_layers='0'), 'start with the number', error=KeyError)
    refuses(lambda: record_teacher(teacher, dls, tmp_path/'n', loss=Attention, teacher_layers='0', topk=2), 'topk only where predictions')
    with pytest.raises(TypeError, match='blend inputs'): record_teacher(teacher, dls, tmp_path/'n', loss=Attention, teacher_layers='0', cbs=[Callback()])
    assert [f.name for f in tmp_path.iterdir()] == ['r']
    assert not any(m._forward_hooks for m in teacher.modules())

class Halves(FeatureLoss, registered=False):
    "A loss of a user that says in one method what it needs"
    def reduce_teacher(self, fm_teacher): return fm_teacher.flatten(1)[:,:8]
    def forward(self, s, t): return (s.flatten(1)[:,:8] - t.flatten(1)[:,:8]).square().mean()

def test_a_loss_of_your_own(tmp_path):
    dls,teacher,m = images(),wide(),Match(Halves, '0', '0')
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, m, dtype=torch.float32)
    assert list(map(str, rec.kept)) == ['0 (Halves())'] and rec.header['answers'][0]['shape'] == [8]
    assert same(distil(dls, KD(rec, m), n_epoch=1), distil(dls, KD(teacher, m), SameBatches(rec), n_epoch=1))

class Sums(RKD, registered=False):
    "Vectors that are made in another way than those of the class that it extends"
    def reduce_teacher(self, fm_teacher): return fm_teacher.sum((2,3))
    def forward(self, s, t): return self.compare(s.sum((2,3)), self.reduce_teacher(t))
    def forward_reduced(self, s, reduced): return self.compare(s.sum((2,3)), reduced)

class Louder(Attention, registered=False):
    def attention_map(self, fm): return fm.abs().exp().mean(1, keepdim=True)

@pytest.mark.parametrize('one,other', [(RKD(),Sums()), (Attention(),Louder())], ids=str)
def test_two_reductions_are_two_things(tmp_path, one, other):
    "Losses that take other parts of a feature do not share what was recorded, though their texts are the same"
    dls,teacher = images(),wide()
    both = [Match(one, '0', '0'), Match(other, '0', '0')]
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, both, dtype=torch.float32)
    assert len(rec.kept) == 2
    assert same(distil(dls, KD(rec, both), n_epoch=1), distil(dls, KD(teacher, both), SameBatches(rec), n_epoch=1))
    rec = record_teacher(teacher, dls, tmp_path/'one', 1, both[0])
    KD(rec, Match(deepcopy(one), '0', '0'))     # no error
    refuses(lambda: KD(rec, both[1]), 'expected a recording of 0 (', 'but it holds: 0 (')

class Returns(FeatureLoss, registered=False):
    def __init__(self, what): super().__init__(); self.what = what
    def reduce_teacher(self, fm_teacher): return self.what(fm_teacher)
    def forward(self, s, t): return 0*s.sum()

@pytest.mark.parametrize('what,got', [(lambda f: f.flatten(1).argmax(1),'(4,) int64'), (lambda f: f > 0,'(4, 6, 6, 6) bool'),
                                      (torch.fft.fft2,'(4, 6, 6, 6) complex64'), (lambda f: f.mean((0,2,3)),'(6,) float32'),
                                      (torch.mean,'() float32'), (lambda f: (f,f),'tuple of 2 items')])
def test_only_rows_of_floating_point_numbers_are_kept(tmp_path, what, got):
    "Others would come back as other numbers, such as complex ones without their imaginary part"
    dls,m = images(),Match(Returns(what), '0', '0')
    refuses(lambda: record_teacher(wide(), dls, tmp_path/'r', 1, m), 'a row for each item', '(4, ...)', f'but got {got}')
    assert not list(tmp_path.iterdir())

def test_layer_without_rows_for_items(tmp_path):
    "A layer that mixes the items of a batch returns as many rows at first, but not for a batch that is shorter"
    class Mixes(nn.Module):
        def __init__(self): super().__init__(); self.c,self.m = wide(),nn.Identity()
        def forward(self, x):
            self.m(x.flatten(1)[:,:8].T)
            return self.c(x)
    refuses(lambda: record_teacher(Mixes(), images(bs=8, drop_last=False), tmp_path/'r', 1, Match(lambda s,t: s.sum(), 'm', 'm')),
            'a row for each item', '(4, ...)', 'but got (8, 4) float32')

def test_sizes_are_printed_before_anything_is_written(tmp_path, capsys, monkeypatch):
    printed,create = [],Files.create
    monkeypatch.setattr(Files, 'create', lambda *args: printed.append(capsys.readouterr().out) or create(*args))
    record_teacher(wide(), images(), tmp_path/'r', 3, [Match(SoftTarget), Match(Attention, '0', '0')])
    out, = printed
    assert 'r: 20 items in 3 epochs of batches, 5.4 kB' in out
    assert '  predictions: shape (3,) in float16, 6.0 bytes for an item\n' in out
    assert '  0 (attention map, p=2): shape (1, 6, 6) in float16, 72.0 bytes for an item\n' in out

def test_distill_check_shows_what_was_recorded(tmp_path):
    dls,teacher = images(),wide()
    rec = record_teacher(teacher, dls, tmp_path/'r', 1, Attention, ['0'], ['0'])
    learn = learner(cnn(), dls)
    check = learn.distill_check(KD(rec, Attention, ['0'], ['0']))
    row = check.terms[check.terms.term == 'Attention'].iloc[0]
    assert row['shape '] == (1,6,6) and row.adapted == 'attention map, p=2'

def test_interrupted_and_completed(tmp_path):
    "Features go on where they stopped"
    dls,teacher,n = images(),wide(),[0]
    def stop(m, x):
        n[0] += 1
        if n[0] == 5: raise KeyboardInterrupt
    h = teacher.register_forward_pre_hook(stop)
    def record(path): return record_teacher(teacher, dls, tmp_path/path, 2, [Match(Attention, '0', '0'), Match(SoftTarget)], dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt): record('r')
    a = record('r')
    assert n[0] == 5 + 2 + 10-2     # asked twice about the first batch, each time
    h.remove()
    b = record('whole')
    for name in ('inputs','feature0','predictions'): assert np.array_equal(np.load(a.path/f'{name}.npy'), np.load(b.path/f'{name}.npy'))
