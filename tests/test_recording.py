"Recorded answers: the same batches come again, and whatever is not the same is found out."
import fcntl, gc, hashlib, itertools, os, pickle, random, shutil, signal, subprocess, sys, types
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, set_seed, TfmdDL
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import CutMix, MixUp
import fastai.callback.schedule
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.tabular.all import Categorify, CategoryBlock as Category, Normalize, TabularDataLoaders, tabular_learner
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.text.data import LMDataLoader, pad_input, SortedDL
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.vision.all import aug_transforms, CategoryBlock, DataBlock, ImageBlock, IndexSplitter, RandomResizedCrop
from fastdistill import recording
from fastdistill.callback import KnowledgeDistillationCallback, Match
from fastdistill.losses import Attention, SoftTarget
from fastdistill.recording import _checksums as checksums, record_teacher, TeacherRecording
from fastdistill.teacher import Ensemble, Teacher
from hypothesis import given, strategies as st
from torch import nn
from conftest import QuietLearner, data, learner, loaders, mlp, net, same_state, state

pictures = [np.random.RandomState(i).randint(0, 255, (20,15,3), dtype=np.uint8) for i in range(28)]
def picture(i): return pictures[i]
def kind(i): return i%3
def numbers(_): return list(range(28))

def images(workers=0, bs=4, **kwargs):
    "20 pictures, cropped one by one, turned in batches"
    block = DataBlock((ImageBlock,CategoryBlock), get_items=numbers, get_x=picture, get_y=kind, splitter=IndexSplitter(list(range(20, 28))),
                      item_tfms=RandomResizedCrop(8), batch_tfms=aug_transforms())
    return block.dataloaders(None, bs=bs, num_workers=workers, device=torch.device('cpu'), **kwargs)

def cnn(dropout=0.): return nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16,3))

def fit(rec, dls, n_epoch=1, model=None, **kwargs):
    learn = QuietLearner(dls, model or cnn(), loss_func=CrossEntropyLossFlat())
    learn.fit(n_epoch, cbs=[KnowledgeDistillationCallback(rec, **kwargs.pop('kd', {})), *kwargs.pop('cbs', [])], **kwargs)
    return learn

class SameBatches(Callback):
    "A teacher that runs, on the batches that a recording hands out"
    def __init__(self, rec): self.rec = rec
    def before_train(self): self.learn.dl = self.rec.batches(self.learn)

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('accumulate', [False,True])
def test_bit_for_bit_as_a_teacher_that_runs(tmp_path, workers, accumulate):
    dls,teacher,ends = images(workers),cnn(),[]
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order']
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = fit(answers, dls, 3, cnn(dropout=0.5), cbs=cbs + [GradientAccumulation(8)]*accumulate)     # longer than the recording
        ends.append((state(learn.model), torch.rand(1), np.random.rand(), random.random()))
    assert same_state(learn.model, ends[0][0]) and ends[0][1:] == ends[1][1:]

def test_epochs_differ_and_come_again(tmp_path):
    dls,seen = images(),[]
    class Keep(Callback):
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.iter, self.x.clone()))
    rec = record_teacher(cnn(), dls, tmp_path/'r', n_epoch=2)
    fit(rec, dls, 3, cbs=[Keep()])
    fit(rec, dls, 2, cbs=[Keep()], start_epoch=1)
    xs = [torch.stack([x for _,_,x in seen[5*e:5*e+5]]) for e in range(4)]
    assert len(seen) == 20 and not torch.equal(xs[0], xs[1]) and torch.equal(xs[0], xs[2]) and torch.equal(xs[1], xs[3])

def test_answers_belong_to_the_inputs(tmp_path):
    "Asked again by a plain loop"
    dls,teacher,asked = images(),cnn(),[]
    class Ask(Callback):
        order = 60
        def after_pred(self):
            if self.training: asked.append((self.knowledge_distillation._answer, teacher(self.x).detach()))
    for dtype,eps in (torch.float32,0.),(torch.float16,1e-3):
        rec = record_teacher(teacher, dls, tmp_path/f'{eps}', n_epoch=2, dtype=dtype)
        fit(rec, dls, 2, cbs=[Ask()])
        assert len(asked) == 10 and all((a-b).abs().max() <= eps for a,b in asked)
        asked.clear()

def test_any_order(tmp_path):
    "25 items in batches of 8, the last of which training drops: all have been asked for"
    dls = data(25)
    teacher = net(8)
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=7, dtype=torch.float32)
    assert rec.header['any_order'] and rec.header['n_epoch'] == 1 and rec.header['rows'] == 25
    ends = []
    for t in rec,teacher:
        set_seed(2)
        dls.train.rng = random.Random(2)
        learn = learner(net(dropout=0.5), dls)
        learn.fit(4, cbs=KnowledgeDistillationCallback(t))
        ends.append((learn.model, torch.rand(1), dls.train.rng.random()))
    (a,*drawn),(b,*also) = ends
    assert all(torch.allclose(p, q, atol=1e-5) for p,q in zip(a.parameters(), b.parameters())) and drawn == also

def test_weight_0_is_a_plain_fit(tmp_path):
    dls,ends = data(),[]
    rec = record_teacher(net(8), dls, tmp_path/'r')
    for cbs in [],[KnowledgeDistillationCallback(rec, weight=0)]:
        set_seed(2)
        dls.train.rng = random.Random(2)
        learn = learner(net(dropout=0.5), dls)
        learn.fit(2, cbs=cbs)
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])

@pytest.mark.parametrize('workers', [0,2])
def test_random_states_are_those_of_an_ordinary_epoch(tmp_path, workers):
    items = list(zip(torch.randn(20,2), torch.arange(20)))
    dl,ends = TfmdDL(items, bs=4, shuffle=True, num_workers=workers),[]
    for batches in dl,recording._Seeded(dl, 0, 0):
        set_seed(3)
        dl.rng = random.Random(3)
        for b in batches: pass
        ends.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert ends[0] == ends[1]

def test_recording_leaves_all_as_it_was(tmp_path):
    dls,teacher = images(),cnn(dropout=0.5)
    teacher[0].eval()
    set_seed(4)
    dls.train.rng = random.Random(4)
    before,modes,expected = state(teacher),[m.training for m in teacher.modules()],(torch.rand(1), np.random.rand(), random.random(), random.Random(4).random())
    set_seed(4)
    record_teacher(teacher, dls, tmp_path/'r', n_epoch=2)
    assert (torch.rand(1), np.random.rand(), random.random(), dls.train.rng.random()) == expected
    assert same_state(teacher, before) and modes == [m.training for m in teacher.modules()] and all(p.grad is None for p in teacher.parameters())

def test_an_interrupted_replay_leaves_the_loader_alone(tmp_path):
    dls = images()
    rec = record_teacher(cnn(), dls, tmp_path/'r')
    class Stop(Callback):
        def after_loss(self):
            if self.training and self.iter == 2: raise KeyboardInterrupt
    set_seed(1)
    dls.train.rng = random.Random(1)
    with pytest.raises(KeyboardInterrupt): fit(rec, dls, cbs=[Stop()])
    gc.collect()
    other = random.Random(1)
    other = random.Random(other.randint(0, 2**32-1))
    other.sample(range(20), 20)
    assert dls.train.rng.random() == other.random() and rec._batches is None
    fit(rec, dls)

# Checksums

def plain_checksum(*arrays):
    "By whole numbers of Python, an item's arrays"
    total = 1
    for a in arrays:
        b = a.tobytes()
        b += bytes(-len(b)%8)
        words = [int.from_bytes(b[i:i+8], 'little', signed=True) for i in range(0, len(b), 8)]
        r = np.random.RandomState(len(words)).bytes(8*len(words))
        factors = [int.from_bytes(r[i:i+8], 'little', signed=True) | 1 for i in range(0, len(r), 8)]
        total = total*1_000_003 + sum((w ^ (w>>32))*f for w,f in zip(words, factors))
    return (total + 2**63)%2**64 - 2**63

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.uint8,torch.int64,torch.bool,torch.float64])
@pytest.mark.parametrize('shape', [(3,5,5),(1,),(),(2,4),(7,200,200)])
def test_checksums_by_hand(dtype, shape):
    x = (100*torch.randn(3, *shape)).to(dtype)
    assert checksums(x).tolist() == [plain_checksum(o.numpy()) for o in x]
    y = torch.arange(3)
    assert checksums(x, dict(y=y, z=[x,'text'])).tolist() == [plain_checksum(a.numpy(), b.numpy(), a.numpy()) for a,b in zip(x,y)]

@given(st.data())
def test_checksums_see_each_bit_and_each_exchange(data):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3,4,11), dtype=np.uint8))
    before,bits = checksums(x),data.draw(st.sets(st.integers(0, 351), min_size=1, max_size=4))
    changed = x.clone().flatten(1)
    for bit in bits: changed[1,bit//8] ^= 1 << bit%8
    assert (before == checksums(changed.view_as(x))).tolist() == [True,False,True]
    i,j = data.draw(st.lists(st.integers(0, 43), min_size=2, max_size=2, unique=True))
    changed = x.clone().flatten(1)
    changed[2,[i,j]] = changed[2,[j,i]]
    assert (checksums(changed.view_as(x))[2] == before[2]).item() == (changed[2] == x.flatten(1)[2]).all().item()

def test_checksums_of_strange_inputs():
    x = torch.randn(4, 3, 3)
    assert torch.equal(checksums(x.transpose(1, 2).contiguous().transpose(1, 2)), checksums(x))     # values, not layout
    assert torch.equal(checksums(x[:1].expand(4,3,3)), checksums(x[:1]).expand(4))
    assert (checksums(x, torch.tensor(1.)) != checksums(x, torch.tensor(2.))).all()     # one for the whole batch
    bytes_ = torch.arange(40, dtype=torch.uint8)
    assert torch.equal(checksums(bytes_[3:35].view(4,8)), checksums(bytes_[3:35].clone().view(4,8)))     # not aligned
    with pytest.raises(TypeError, match='tensors in them, but got str'): checksums('text')

# What is found out

def refuses(f, *texts):
    with pytest.raises(ValueError) as e: f()
    for t in texts: assert t in str(e.value)

def test_another_setup_is_refused_before_the_first_batch(tmp_path):
    rec = record_teacher(cnn(), images(), tmp_path/'r')
    refuses(lambda: fit(rec, images(bs=5)), 'batch size: 4 when it was recorded, 5 now')
    refuses(lambda: fit(rec, images(shuffle=False)), 'shuffle: True when it was recorded, False now')
    some = record_teacher(net(), data(24), tmp_path/'s')
    refuses(lambda: learner(dls=data(32)).fit(1, cbs=KnowledgeDistillationCallback(some)), 'items: 24 when it was recorded, 32 now')
    other = images()
    other.vocab[:] = ['a','b','c']
    model = cnn()
    before = state(model)
    refuses(lambda: fit(rec, other, model=model), "classes: ['0', '1', '2'] when it was recorded, ['a', 'b', 'c'] now")
    assert same_state(model, before)

def test_another_batch_stops_the_fit(tmp_path, monkeypatch):
    rec = record_teacher(cnn(), images(), tmp_path/'r')
    refuses(lambda: fit(rec, images(workers=2)), '4 of 4 items differ', 'workers: 0 when it was recorded, 2 now', '(epoch 0, batch 0)')
    monkeypatch.setitem(globals(), 'pictures', [p if i != 7 else p ^ 1 for i,p in enumerate(pictures)])
    refuses(lambda: fit(rec, images()), '1 of 4 items differ', 'Data or transforms have changed')
    monkeypatch.undo()
    fit(rec, images())
    monkeypatch.setattr(recording, 'version', lambda name: '0.1')
    monkeypatch.setitem(globals(), 'pictures', [p[::-1].copy() for p in pictures])
    refuses(lambda: fit(rec, images()), 'fastai', '0.1 now')

def test_changed_inputs_stop_the_fit_in_any_order(tmp_path):
    dls = data()
    rec = record_teacher(net(), dls, tmp_path/'r')
    changed = data()
    changed.train.dataset[3][0][0,0,0] += 1
    refuses(lambda: learner(dls=changed).fit(1, cbs=KnowledgeDistillationCallback(rec)), '1 of 8 items differ')
    class Brighter(Callback):
        def before_batch(self): self.learn.xb = (self.x + 0.1,)
    refuses(lambda: learner(dls=dls).fit(1, cbs=[KnowledgeDistillationCallback(rec), Brighter()]), '8 of 8 items differ')

def test_what_cannot_be_replayed(tmp_path, monkeypatch):
    dls = data()
    rec = record_teacher(net(), dls, tmp_path/'r')
    for mix in MixUp(),CutMix(): refuses(lambda: learner(dls=dls).fit(1, cbs=[KnowledgeDistillationCallback(rec), mix]), type(mix).__name__, 'A teacher that answers blends has to run')
    refuses(lambda: KnowledgeDistillationCallback(rec, Attention, '0', '0'), 'Attention', 'holds predictions only')
    refuses(lambda: KnowledgeDistillationCallback(rec, [SoftTarget, Match(nn.MSELoss(), '0', '0')]), 'holds predictions only')
    refuses(lambda: Ensemble([net(), rec]), '`record_teacher` takes a list')
    plain = DataLoaders(torch.utils.data.DataLoader(dls.train.dataset, batch_size=8), torch.utils.data.DataLoader(dls.train.dataset))
    with pytest.raises(TypeError, match='fastai, but got torch'): learner(dls=plain).fit(1, cbs=KnowledgeDistillationCallback(rec))
    monkeypatch.setattr(recording, 'num_distrib', lambda: 2)
    refuses(lambda: learner(dls=dls).fit(1, cbs=KnowledgeDistillationCallback(rec)), 'one of several')
    refuses(lambda: record_teacher(net(), dls, tmp_path/'s'), 'one of several')

def test_what_cannot_be_recorded(tmp_path):
    dls,path = data(),tmp_path/'r'
    refuses(lambda: record_teacher(net(), dls, path, dtype=torch.bfloat16), 'float16 or torch.float32, but got torch.bfloat16')
    refuses(lambda: record_teacher(net(), dls, path, n_epoch=0), 'at least one epoch')
    refuses(lambda: record_teacher(net(), dls, path, topk=3), 'below the number of classes, 3, but got 3')
    refuses(lambda: record_teacher(net(), dls, path, topk=1, axis=2), "axis to be that of the classes, but got 2 for answers of shape ('B', 3)")
    with pytest.raises(TypeError, match='fastai, but got torch'):
        record_teacher(net(), DataLoaders(torch.utils.data.DataLoader(torch.zeros(4,2)), torch.utils.data.DataLoader(torch.zeros(4,2))), path)
    endless = DataLoaders(TfmdDL((o for o in data().train.dataset), bs=8, num_workers=0), data().valid)
    refuses(lambda: record_teacher(net(), endless, path), 'known size')
    with pytest.raises(TypeError, match='but got str'): record_teacher('net', dls, path)
    assert not list(tmp_path.iterdir())
    class Times(nn.Module):
        def __init__(self, by): super().__init__(); self.net,self.by = net(),by
        def forward(self, x): return self.net(x)*self.by
    refuses(lambda: record_teacher(Times(1e7), dls, tmp_path/'large', dtype=torch.float16), 'would change', 'dtype=torch.float32')
    refuses(lambda: record_teacher(Times(float('nan')), dls, tmp_path/'nan'), 'not finite')
    assert record_teacher(Times(1e7), dls, tmp_path/'large32').header['dtype'] == 'float32'
    rec = record_teacher(net(), dls, path)
    refuses(lambda: record_teacher(rec, dls, tmp_path/'again'), 'Expected networks to record')

def test_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match='would take 528.0 bytes, but 5.0 bytes are free'): record_teacher(net(), data(), tmp_path/'r')
    assert not list(tmp_path.iterdir())

# Damage

@pytest.mark.parametrize('topk', [None,2])
def test_damage_is_an_error_or_without_effect(tmp_path, topk):
    dls = data()
    def train(path):
        set_seed(6)
        dls.train.rng = random.Random(6)
        learn = learner(net(), dls)
        learn.fit(1, cbs=KnowledgeDistillationCallback(TeacherRecording(path)))
        return state(learn.model)
    record_teacher(net(8), dls, tmp_path/'r', topk=topk)
    good,rand,n_errors = train(tmp_path/'r'),random.Random(0),0
    files = sorted(f.name for f in (tmp_path/'r').iterdir())
    assert files == (['checksums.npy','classes.npy','header.json','rest.npy','values.npy'] if topk else ['checksums.npy','header.json','logits.npy'])
    for name in files:
        size = (tmp_path/'r'/name).stat().st_size
        for what in ['cut','cut','gone','longer','zeros'] + ['byte']*12:
            path = tmp_path/'damaged'
            shutil.copytree(tmp_path/'r', path)
            content = bytearray((path/name).read_bytes())
            i = rand.randrange(128 if what == 'zeros' else 0, size)
            if what == 'cut': content = content[:i]
            if what == 'zeros': content[i:] = bytes(size-i)
            if what == 'byte': content[i] ^= 1 << rand.randrange(8)
            (path/name).write_bytes(content)
            if what == 'gone': (path/name).unlink()
            try: got = train(path)
            except ValueError: n_errors += 1
            else: assert all(torch.equal(v, got[k]) for k,v in good.items()), (name, what, i)
            shutil.rmtree(path)
    assert n_errors > 0.8*17*len(files)

def test_no_recording(tmp_path):
    refuses(lambda: TeacherRecording(tmp_path/'none'), 'is no recording')
    (tmp_path/'empty').mkdir()
    refuses(lambda: TeacherRecording(tmp_path/'empty'), 'is no recording')

# Interruptions

class Counting(nn.Module):
    def __init__(self, model, stop=None): super().__init__(); self.model,self.n,self.stop = model,0,stop
    def forward(self, x):
        if self.n == self.stop: raise KeyboardInterrupt
        self.n += 1
        return self.model(x)

def arrays(rec): return {k:np.array(a) for k,a in rec._files.arrays.items()}

@pytest.mark.parametrize('make,n_asked', [(images,10),(data,3)])     # and two looks at the first batch each time
@pytest.mark.parametrize('stop', [0,1,2,3,4,8,11])
def test_goes_on_where_it_stopped(tmp_path, make, n_asked, stop):
    dls,teacher = make(),cnn() if make is images else net(8)
    whole = record_teacher(teacher, dls, tmp_path/'whole', n_epoch=2)
    counting = Counting(teacher, stop)
    if interrupted := stop < n_asked+2:
        with pytest.raises(KeyboardInterrupt): record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
        refuses(lambda: TeacherRecording(tmp_path/'r'), 'is not whole' if stop > 1 else 'is no recording')
        if stop > 1: refuses(lambda: TeacherRecording(tmp_path/'r.part'), 'is not whole')
    counting.stop = None
    rec = record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
    assert counting.n == n_asked + 2 + min(stop, 2)*interrupted and not (tmp_path/'r.part').exists()
    for k,a in arrays(whole).items(): assert np.array_equal(a, arrays(rec)[k])
    asked = counting.n
    assert arrays(record_teacher(counting, dls, tmp_path/'r', n_epoch=2)).keys() == arrays(rec).keys() and counting.n == asked+2     # opened

def test_goes_on_with_the_same_alone(tmp_path, monkeypatch):
    dls,teacher = images(),cnn()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 4), dls, tmp_path/'r', n_epoch=2)
    for change,text in (dict(seed=1),'seed: 0 when'),(dict(n_epoch=3),'n_epoch: 2 when'),(dict(dtype=torch.float32),'dtype: float16 when'):
        with pytest.raises(FileExistsError, match=text): record_teacher(Counting(teacher), dls, tmp_path/'r', **{'n_epoch':2, **change})
    with pytest.raises(FileExistsError, match='weights: '): record_teacher(Counting(cnn()), dls, tmp_path/'r', n_epoch=2)
    monkeypatch.setitem(globals(), 'pictures', pictures[::-1])
    refuses(lambda: record_teacher(Counting(teacher), images(), tmp_path/'r', n_epoch=2), 'not the batch that was recorded')
    monkeypatch.undo()
    record_teacher(Counting(teacher), images(), tmp_path/'r', n_epoch=2)
    with pytest.raises(FileExistsError, match='another recording'): record_teacher(Counting(teacher), dls, tmp_path/'r', n_epoch=1)

killed = '''
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_recording import *
class Dies(nn.Module):
    def __init__(self): super().__init__(); self.model,self.n = cnn(),0
    def forward(self, x):
        self.n += 1
        if self.n == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
        return self.model(x)
set_seed(0)
record_teacher(Dies(), images(), sys.argv[2], n_epoch=2)
'''
def test_killed(tmp_path):
    def run(name, after): return subprocess.run([sys.executable, '-W', 'ignore', '-c', killed, os.path.dirname(__file__), str(tmp_path/name), str(after)], capture_output=True, text=True)
    assert run('r', 8).returncode == -signal.SIGKILL and (tmp_path/'r.part').exists()
    refuses(lambda: TeacherRecording(tmp_path/'r'), 'not whole')
    for name,after in ('r',8),('whole',13):
        done = run(name, after)
        assert done.returncode == 0, done.stderr
    a,b = (arrays(TeacherRecording(tmp_path/o)) for o in ('r','whole'))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

def test_killed_before_it_began(tmp_path):
    (tmp_path/'r.part').mkdir()
    (tmp_path/'r.part'/'logits.npy').write_bytes(b'some')
    record_teacher(net(), data(), tmp_path/'r')
    assert [o.name for o in tmp_path.iterdir()] == ['r']

# The highest logits

def plain_topk(logits, k):
    "Probabilities by NumPy, of one item"
    p = np.exp(logits.astype('float64') - logits.max())
    p /= p.sum()
    top = np.argsort(-p)[:k]
    rest = np.full_like(p, (1 - p[top].sum())/(len(p) - k))
    rest[top] = p[top]
    return rest

@pytest.mark.parametrize('shape,axis', [((6,50),1),((6,50),-1),((4,20,3,5),1),((4,7,20),-1),((4,7,20),2)])
def test_topk_by_numpy(shape, axis):
    logits = 4*torch.randn(*shape)
    stored = recording._encode(logits, torch.float32, 5, axis)
    got = recording._decode(stored, list(shape[1:]), 5, axis)
    want = np.apply_along_axis(plain_topk, axis, logits.numpy(), 5)
    assert got.shape == logits.shape and np.allclose(got.softmax(axis), want, atol=1e-6)
    assert torch.equal(got.topk(5, dim=axis).values, logits.topk(5, dim=axis).values)

def test_topk_in_a_fit(tmp_path):
    "9 of 10 classes: only the last one is not known, but its mass is; so nothing is lost"
    items = [(torch.randn(2,8,8), i%10) for i in range(20)]
    dls,teacher = loaders(items, items, 5),nn.Sequential(nn.Flatten(), nn.Linear(128,10))
    ends = []
    for topk in None,9,2:
        rec = record_teacher(teacher, dls, tmp_path/f'{topk}', dtype=torch.float32, topk=topk)
        set_seed(1)
        dls.train.rng = random.Random(1)
        learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(128,10)), dls)
        learn.fit(2, cbs=KnowledgeDistillationCallback(rec, weight=1))
        ends.append(nn.utils.parameters_to_vector(learn.model.parameters()))
    assert torch.allclose(ends[0], ends[1], atol=1e-5) and not torch.allclose(ends[0], ends[2], atol=1e-3)
    assert (tmp_path/'2'/'classes.npy').stat().st_size < (tmp_path/'None'/'logits.npy').stat().st_size

# Other loaders, other answers

def test_tables(tmp_path):
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(40), b=rng.choice(list('xyz'), 40), y=rng.choice(['no','yes'], 40)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names='b', cont_names='a', y_names='y', y_block=Category(), bs=8, valid_idx=range(32,40))
    teacher = tabular_learner(dls, layers=[20])
    rec = record_teacher(teacher, dls, tmp_path/'r', dtype=torch.float32)
    assert rec.header['any_order'] and rec.header['setup']['classes'] == ['no','yes']
    student = tabular_learner(dls, layers=[5])
    with student.no_bar(), student.no_logging(): student.fit(2, cbs=KnowledgeDistillationCallback(rec))
    dls.train.items['a'] += 1
    refuses(lambda: student.fit(1, cbs=KnowledgeDistillationCallback(rec)), '8 of 8 items differ')

def test_padded_texts_are_recorded_in_batches(tmp_path):
    "What an item looks like depends on the longest beside it"
    items = [(torch.randint(1, 20, (int(n),)), int(n)%3) for n in torch.randint(2, 15, (32,))]
    dls = DataLoaders(*[SortedDL(items, bs=4, shuffle=s, before_batch=pad_input, num_workers=0) for s in (True,False)], device=torch.device('cpu'))
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.e,self.l = nn.Embedding(20,4),nn.Linear(4,3)
        def forward(self, x): return self.l(self.e(x.long()).mean(1))
    rec = record_teacher(Bag(), dls, tmp_path/'r', n_epoch=2)
    assert not rec.header['any_order']
    fit(rec, dls, 3, Bag())
    equal = [(torch.randint(1, 20, (6,)), i%3) for i in range(32)]
    dls = DataLoaders(*[SortedDL(equal, bs=4, shuffle=s, before_batch=pad_input, num_workers=0) for s in (True,False)], device=torch.device('cpu'))
    assert record_teacher(Bag(), dls, tmp_path/'s').header['any_order']

def test_weighted_items(tmp_path):
    items = data().train.dataset
    for name,noisy in ('plain',None),('noisy',lambda o: o + torch.rand(1) if o.ndim else o):
        dl = WeightedDL(items, bs=8, wgts=list(range(24)), shuffle=True, num_workers=0, after_item=noisy)
        dls = DataLoaders(dl, data().valid, device=torch.device('cpu'))
        rec = record_teacher(net(), dls, tmp_path/name, n_epoch=2)
        assert rec.header['any_order'] == (noisy is None)
        fit(rec, dls, 3, net())

@pytest.mark.parametrize('n_out', [(),(1,),(3,4,4)])
def test_shapes_of_answers(tmp_path, n_out):
    class Out(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(2, int(np.prod(n_out)))
        def forward(self, x): return self.l(x).reshape(len(x), *n_out)
    items = list(zip(torch.randn(16,2), torch.randn(16,*n_out)))
    dls = loaders(items, items, 4)
    rec = record_teacher(Out(), dls, tmp_path/'r')
    learn = QuietLearner(dls, Out(), loss_func=nn.MSELoss())
    learn.fit(1, cbs=KnowledgeDistillationCallback(rec, nn.MSELoss()))

def test_answers_of_changing_shape(tmp_path):
    items = [(torch.randn(4 if i < 16 else 5, 2), 0) for i in range(24)]
    dls = loaders(items, items[:1], 8, shuffle=False)
    refuses(lambda: record_teacher(nn.Linear(2,3), dls, tmp_path/'r'), 'expected one of shape (8, 4, 3)', 'but got (8, 5, 3)')

def test_recurrent_teacher_starts_each_epoch_anew(tmp_path):
    class Remembers(nn.Module):
        def __init__(self): super().__init__(); self.l,self.n = nn.Linear(2,3),0.
        def reset(self): self.n = 0.
        def forward(self, x):
            self.n += 1
            return self.l(x) + self.n
    items = list(zip(torch.randn(16,2), torch.arange(16)%3))
    dls,model = loaders(items, items, 4),Remembers()
    teacher = QuietLearner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and model.n == 0
    xs = [b[0] for e in range(2) for b in recording._Seeded(dls.train, 0, e)]
    want = torch.cat([model.l(x) + 1 + i%4 for i,x in enumerate(xs)]).detach()
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), want)
    refuses(lambda: record_teacher(QuietLearner(dls, model, loss_func=CrossEntropyLossFlat()), dls, tmp_path/'s'), 'answers the same batch differently', 'with a `ModelResetter`')

def test_ensemble_and_fast_teacher(tmp_path):
    dls,(a,b) = data(),(net(),net(8))
    rec = record_teacher([a,b], dls, tmp_path/'r', dtype=torch.float32)
    x = torch.stack([o[0] for o in dls.train.dataset])
    want = (a.eval()(x) + b.eval()(x))/2
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), want.detach(), atol=1e-6)
    rec = record_teacher(Teacher(a, fast=True, tolerance=0), dls, tmp_path/'s')
    assert rec.header['teacher'] == 'Sequential' and torch.allclose(torch.from_numpy(arrays(rec)['logits']).float(), a(x).detach(), atol=1e-2)

def test_lr_find_two_fits_and_pickles(tmp_path):
    dls = data()
    rec = record_teacher(net(8), dls, tmp_path/'r')
    learn = learner(dls=dls, cbs=KnowledgeDistillationCallback(rec))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
    learn.fit(1)
    learn.fit(1)
    assert b'TeacherRecording' not in pickle.dumps(learn.knowledge_distillation)
    again = pickle.loads(pickle.dumps(rec))
    assert len(pickle.dumps(rec)) < 1000 and again.header == rec.header
    assert repr(rec) == f'TeacherRecording({tmp_path}/r: Sequential, 1 epoch of 24 items)'

def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    "100,000 answers of a thousand classes: 200 MB"
    h = dict(TeacherRecording(record_teacher(net(), data(), tmp_path/'r').path).header, rows=100_000, shape=[1000])
    files = recording._Files.create(tmp_path/'large.part', h)
    files.finish(tmp_path/'large')
    code = f'''
import resource
from fastdistill.recording import TeacherRecording
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rec = TeacherRecording({str(tmp_path/'large')!r})
print(rec._files.arrays['logits'].nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''
    nbytes,kilobytes = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert int(nbytes) == 200_000_000 and int(kilobytes) < 20_000

# What a teacher says is part of what it is

class Fixed(nn.Module):
    "The same weights, another activation"
    def __init__(self, act, layers): super().__init__(); self.layers,self.act = layers,act
    def forward(self, x): return self.layers[1](self.act(self.layers[0](x.flatten(1))))

def brighter(x): return x + 0.5
def same(x): return x

@pytest.mark.parametrize('topk', [None,2])
@pytest.mark.parametrize('make', [data,images])
def test_the_same_weights_with_other_answers_are_another_teacher(tmp_path, make, topk):
    dls,n_in = make(),128 if make is data else 192
    layers = nn.ModuleList([nn.Linear(n_in,20), nn.Linear(20,3)])
    a,b = Fixed(torch.relu, layers),Fixed(torch.tanh, nn.ModuleList([nn.Linear(n_in,20), nn.Linear(20,3)]))
    pairs = [(a,Fixed(nn.functional.gelu, layers)), (Ensemble([a,b]),Ensemble([a,b], [3,1])), (Teacher(a, same),Teacher(a, brighter)), (Teacher(a),Teacher(a, brighter))]
    for i,(first,other) in enumerate(pairs):
        rec = record_teacher(first, dls, tmp_path/f'{i}', topk=topk)
        with pytest.raises(FileExistsError, match='another recording.*answers to the first batch'): record_teacher(other, dls, tmp_path/f'{i}', topk=topk)
        assert record_teacher(first, dls, tmp_path/f'{i}', topk=topk).header == rec.header

def test_another_teacher_does_not_go_on(tmp_path):
    dls,teacher = images(),cnn()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 4), dls, tmp_path/'r', n_epoch=2)
    with pytest.raises(FileExistsError, match='answers to the first batch'): record_teacher(Teacher(Counting(teacher), brighter), dls, tmp_path/'r', n_epoch=2)
    record_teacher(Counting(teacher), dls, tmp_path/'r', n_epoch=2)

def test_changed_data_are_found_when_a_recording_is_opened(tmp_path, monkeypatch):
    teacher = cnn()
    record_teacher(teacher, images(), tmp_path/'r')
    monkeypatch.setitem(globals(), 'pictures', pictures[::-1])
    refuses(lambda: record_teacher(teacher, images(), tmp_path/'r'), 'not the batch that was recorded')

# Precision

class Affine(nn.Module):
    def __init__(self, scale, shift): super().__init__(); self.net,self.scale,self.shift = mlp(),scale,shift
    def forward(self, x): return self.net(x)*self.scale + self.shift

@pytest.mark.parametrize('scale,shift,dtype', [(1,0,'float16'), (30,0,'float16'), (1,2000,'float32'), (1e-8,0,'float32'), (1e7,0,'float32')])
@pytest.mark.parametrize('topk', [None,2])
def test_precision_that_answers_need(tmp_path, scale, shift, dtype, topk):
    "Compared with what the teacher says to a plain loop, in shares of what NumPy finds as standard deviation"
    dls,teacher = data(),Affine(scale, shift)
    rec = record_teacher(teacher, dls, tmp_path/'r', topk=topk)
    want = teacher(torch.stack([o[0] for o in dls.train.dataset])).detach().numpy()
    assert rec.header['dtype'] == dtype
    if topk is None: assert np.abs(arrays(rec)['logits'] - want).max() <= 0.01*want.std()
    else: assert np.abs(arrays(rec)['values'] - -np.sort(-want, 1)[:,:2]).max() <= 0.01*want.std()
    if dtype == 'float32': refuses(lambda: record_teacher(teacher, dls, tmp_path/'half', topk=topk, dtype=torch.float16), 'would change', 'dtype=torch.float32')

def test_precision_within_an_item_counts(tmp_path):
    "Items lie far apart, the classes of each do not"
    items = [(torch.full((2,), 500.*i), i%3) for i in range(16)]
    layer = nn.Linear(2, 3)
    nn.init.ones_(layer.weight), nn.init.normal_(layer.bias)
    assert record_teacher(layer, loaders(items, items, 4), tmp_path/'r').header['dtype'] == 'float32'

def test_a_later_batch_that_float16_does_not_hold(tmp_path):
    items = [(torch.randn(2) + (3000 if i >= 16 else 0), i%3) for i in range(24)]
    refuses(lambda: record_teacher(nn.Linear(2,3), loaders(items, items, 8), tmp_path/'r'), 'would change', 'dtype=torch.float32')

def test_almost_equal_answers_do_not_stop_it(tmp_path):
    "A last batch of one item, whose two classes are equally likely"
    items = [(torch.randn(2), i%2) for i in range(16)] + [(torch.zeros(2), 0)]
    layer = nn.Linear(2, 2)
    with torch.no_grad(): layer.bias.copy_(torch.tensor([5., 5.0001]))
    assert record_teacher(layer, loaders(items, items, 8), tmp_path/'r').header['rows'] == 17

# Answers that depend on more than an item

def test_batch_norm_without_statistics_is_recorded_in_batches(tmp_path, capsys):
    dls,ends = data(shuffle=True),[]
    teacher = nn.Sequential(nn.Conv2d(2,4,3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(144,3))
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and 'depends on the others in its batch' in capsys.readouterr().out
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = learner(net(), dls)
        learn.fit(3, cbs=[KnowledgeDistillationCallback(answers), *cbs])
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])
    assert record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32).header == rec.header

def test_answers_drawn_at_random_are_refused(tmp_path):
    class Draws(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return nn.functional.dropout(self.net(x), training=True)
    for dls in data(),images(): refuses(lambda: record_teacher(Draws() if dls.train.bs == 8 else nn.Sequential(nn.Conv2d(3,2,1), Draws()), dls, tmp_path/'r'), 'answers the same batch differently')
    assert not list(tmp_path.iterdir())

# Language models

def texts(shuffle=True, bs=4, workers=0):
    "Texts of numbers in a stream, whose last batch is shorter than the others"
    rng = np.random.RandomState(0)
    made = [torch.from_numpy(rng.randint(0, 12, rng.randint(5, 30))) for _ in range(13)]
    dls = DataLoaders(*[LMDataLoader(made, bs=bs, seq_len=6, shuffle=s, num_workers=workers) for s in (shuffle,False)], device=torch.device('cpu'))
    assert dls.train.last_len < 6
    return dls

def language_model(n_hid=8): return get_language_model(AWD_LSTM, 12, dict(awd_lstm_lm_config, emb_sz=6, n_hid=n_hid, n_layers=2))

def text_learner(dls, model, **kwargs): return QuietLearner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()], **kwargs)

@pytest.mark.parametrize('shuffle,workers', [(True,0),(True,2),(False,0)])
def test_language_model_as_one_that_runs(tmp_path, shuffle, workers):
    dls,ends = texts(shuffle, workers=workers),[]
    teacher = text_learner(dls, language_model(10))
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and rec.header['shape'] == [6,12]
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = text_learner(dls, language_model())
        learn.fit(3, cbs=[KnowledgeDistillationCallback(answers, SoftTarget(axis=-1)), *cbs])
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])
    again = record_teacher(teacher, texts(shuffle, workers=workers), tmp_path/'s', n_epoch=2, dtype=torch.float32)
    assert all(np.array_equal(a, arrays(again)[k], equal_nan=k == 'logits') for k,a in arrays(rec).items())

def test_language_model_answers_by_a_plain_loop(tmp_path):
    "The likely words, in batches of which the last is shorter; what is kept is right, the rest has the mass that it had"
    dls,seen,n_items = texts(),[],[]
    teacher = text_learner(dls, language_model(10))
    rec = record_teacher(teacher, dls, tmp_path/'r', topk=5, axis=-1)
    class Keep(Callback):
        order = 60
        def after_pred(self):
            if self.training: seen.append((self.x.clone(), self.knowledge_distillation._answer))
    text_learner(dls, language_model()).fit(2, cbs=[KnowledgeDistillationCallback(rec, SoftTarget(axis=-1)), Keep()])
    n = len(dls.train)
    assert len(seen) == 2*n and len({x.shape for x,_ in seen}) == 2
    model = teacher.model.eval()
    for epoch in seen[:n],seen[n:]:
        model.reset()
        for x,got in epoch:
            want = model(x)[0].detach().softmax(-1)
            top = want.topk(5).indices
            assert got.shape == want.shape and torch.allclose(got.softmax(-1).gather(-1, top), want.gather(-1, top), atol=1e-3)

def test_texts_keep_their_order(tmp_path):
    "Recording changes nothing; replaying shuffles as an ordinary epoch does"
    dls,orders = texts(),[]
    teacher = text_learner(dls, language_model(10))
    random.seed(3)
    dls.train.get_idxs()
    def order(): return list(dls.train.items.idxs),dls.train.create_item(0)[0].tolist()
    before = order()
    assert before[0] != sorted(before[0])
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2)
    assert order() == before
    for batches in dls.train,recording._Seeded(dls.train, 0, 0):
        dls.train.items.idxs[:] = before[0]
        dls.train.make_chunks()
        random.seed(4)
        for b in batches: pass
        orders.append(order())
    assert orders[0] == orders[1] != before

# Disks and processes

def test_space_is_taken_at_the_start(tmp_path):
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(net(), 2), data(4000), tmp_path/'r')
    for file in (tmp_path/'r.part').glob('*.npy'): assert 512*file.stat().st_blocks >= file.stat().st_size > 10_000

limited = '''
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_recording import *
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: record_teacher(net(), data(4000), sys.argv[2])
except OSError as e: print(e)
'''
def test_space_that_is_not_there(tmp_path):
    "No file may be larger than 20 kB"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', limited, os.path.dirname(__file__), str(tmp_path/'r')], capture_output=True, text=True)
    assert 'would take 88.0 kB, which cannot be had: File too large' in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())

class During(nn.Module):
    "Does something when it is asked for the n-th time"
    def __init__(self, model, n, do): super().__init__(); self.model,self.n,self.do = model,n,do
    def forward(self, x):
        self.n -= 1
        if not self.n: self.do()
        return self.model(x)

def test_two_recorders_at_one_path(tmp_path):
    dls,teacher = data(),net()
    def second():
        with pytest.raises(FileExistsError, match='Another process is recording .*Wait until'): record_teacher(teacher, dls, tmp_path/'r')
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from test_recording import *; record_teacher(net(), data(), sys.argv[1])', str(tmp_path/'r')],
                              cwd=os.path.dirname(__file__), capture_output=True, text=True)
        assert 'FileExistsError: Another process is recording' in done.stderr
        asked.append(1)
    asked = []
    rec = record_teacher(During(teacher, 4, second), dls, tmp_path/'r', dtype=torch.float32)
    assert asked and sorted(f.name for f in (tmp_path/'r').iterdir()) == ['checksums.npy','header.json','logits.npy'] and len(list(tmp_path.iterdir())) == 1
    x = torch.stack([o[0] for o in dls.train.dataset])
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), teacher.eval()(x).detach(), atol=1e-6)

def test_one_finishes_while_another_looks(tmp_path):
    dls,teacher = data(),net()
    def other(): record_teacher(teacher, dls, tmp_path/'r')
    looks = During(teacher, 1, other)
    with pytest.raises(FileExistsError, match='another recording'): record_teacher(looks, dls, tmp_path/'r')     # of a `Sequential`
    assert [o.name for o in tmp_path.iterdir()] == ['r']

def test_a_lock_that_was_left_behind(tmp_path):
    dls,teacher = data(),net()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 3), dls, tmp_path/'r')
    assert not (tmp_path/'r.part'/'lock').exists()
    (tmp_path/'r.part'/'lock').touch()     # as a process that was killed leaves it
    with (tmp_path/'r.part'/'lock').open('a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match='Another process'): record_teacher(Counting(teacher), dls, tmp_path/'r')
    record_teacher(Counting(teacher), dls, tmp_path/'r')
    assert [o.name for o in tmp_path.iterdir()] == ['r']

# Other teachers, other loaders, other places

def quantised(name):
    class Words(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.out = nn.LSTM(2, 6, batch_first=True),nn.Linear(6,3)
        def forward(self, x): return self.out(self.rnn(x)[0][:,-1])
    if name == 'dynamic': return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2,8), nn.ReLU(), nn.Linear(8,3)), {nn.Linear})
    if name == 'lstm': return nn.Sequential(nn.Unflatten(1, (1,2)), torch.ao.quantization.quantize_dynamic(Words(), {nn.Linear,nn.LSTM}))
    model = torch.ao.quantization.QuantWrapper(nn.Sequential(nn.Linear(2,8), nn.ReLU(), nn.Linear(8,3))).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig('fbgemm')
    torch.ao.quantization.prepare(model, inplace=True)(torch.randn(16,2))
    return torch.ao.quantization.convert(model)

@pytest.mark.parametrize('name', ['dynamic','static','lstm'])
def test_quantised_teachers(tmp_path, name):
    items = list(zip(torch.randn(24,2), torch.arange(24)%3))
    dls,model = loaders(items, items, 8),quantised(name)
    rec = record_teacher(model, dls, tmp_path/'r', dtype=torch.float32)
    want = torch.cat([model(x) for x in torch.stack([x for x,_ in items]).split(8)])
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), want, atol=1e-5)
    assert record_teacher(model, dls, tmp_path/'r', dtype=torch.float32).header == rec.header
    with pytest.raises(FileExistsError, match='weights: '): record_teacher(quantised(name), dls, tmp_path/'r', dtype=torch.float32)

def test_digest_of_plain_weights_is_what_it_was():
    "Recordings of earlier versions open"
    model = nn.Linear(2, 3)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(0.5)
    want = hashlib.sha256()
    for k,shape in ('weight',(3,2)),('bias',(3,)): want.update(f'{k} {shape} torch.float32'.encode() + np.full(shape, 0.5, 'float32').tobytes())
    assert recording._digest_model(model) == want.hexdigest()

class ShortEpochs(TfmdDL):
    "Three batches an epoch"
    def __len__(self): return 3
    def __iter__(self): yield from itertools.islice(super().__iter__(), 3)

class WrongLength(TfmdDL):
    "One that shows a bar of its own length"
    def __len__(self): return 2

@pytest.mark.parametrize('cls,n,any_order', [(ShortEpochs,12,False),(WrongLength,24,True)])
def test_loaders_with_a_length_of_their_own(tmp_path, cls, n, any_order):
    items,ends = list(zip(torch.randn(24,2), torch.arange(24)%3)),[]
    dls = DataLoaders(cls(items, bs=4, shuffle=True, num_workers=0), TfmdDL(items, bs=24, num_workers=0), device=torch.device('cpu'))
    teacher = nn.Linear(2,3)
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert (rec.header['rows'],rec.header['any_order']) == (n,any_order)
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        dls.train.rng = random.Random(5)
        learn = QuietLearner(dls, nn.Linear(2,3), loss_func=CrossEntropyLossFlat())
        learn.fit(3, cbs=[KnowledgeDistillationCallback(answers), *cbs])
        ends.append(state(learn.model))
    assert all(torch.allclose(v, ends[0][k], atol=1e-5) for k,v in learn.model.state_dict().items())

@pytest.mark.parametrize('seconds', [0.01,0.3,0.7,1.5])
def test_a_log_gets_a_line_a_second_at_most(tmp_path, monkeypatch, capsys, seconds):
    "By a clock that the teacher turns"
    now = [0.]
    monkeypatch.setattr('fastprogress.fastprogress.time', types.SimpleNamespace(time=lambda: now[0]))
    def turn(model, x, out): now[0] += seconds
    model = nn.Linear(2, 3)
    model.register_forward_hook(turn)
    items = [(torch.randn(2), 0)]*40
    record_teacher(model, loaders(items, items, 1), tmp_path/'r')
    n = capsys.readouterr().out.count('/40 ')
    assert n <= 40*seconds + 3
