"Kinds of data and teachers that can be recorded."
import itertools, random
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, set_seed, TfmdDL
from fastai.callback.data import WeightedDL
from fastai.callback.rnn import ModelResetter
from fastai.tabular.all import Categorify, CategoryBlock as Category, Normalize, tabular_learner, TabularDataLoaders
from fastai.text.data import pad_input, SortedDL
from fastdistill.callback import KnowledgeDistillationCallback
from fastdistill.recording import record_teacher
from fastdistill.recording.batches import Seeded
from fastdistill.teacher import Teacher
from torch import nn
from conftest import data, learner, loaders, net, QuietLearner, same_state, state
from recording_helpers import arrays, fit, is_another, refuses, SameBatches

# Data

def test_tables(tmp_path):
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(40), b=rng.choice(list('xyz'), 40), y=rng.choice(['no','yes'], 40)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,Normalize], cat_names='b', cont_names='a', y_names='y',
                                     y_block=Category(), bs=8, valid_idx=range(32,40))
    teacher = tabular_learner(dls, layers=[20])
    rec = record_teacher(teacher, dls, tmp_path/'r', dtype=torch.float32)
    assert rec.header['any_order'] and rec.header['vocab'] == ['no','yes']
    student = tabular_learner(dls, layers=[5])
    with student.no_bar(), student.no_logging(): student.fit(2, cbs=KnowledgeDistillationCallback(rec))
    dls.train.items['a'] += 1
    refuses(lambda: student.fit(1, cbs=KnowledgeDistillationCallback(rec)), '8 of 8 items differ')

@pytest.mark.parametrize('cat_names,cont_names', [('b',[]), ([],'a')])
def test_tables_of_one_kind_of_columns(tmp_path, cat_names, cont_names):
    "The inputs of the other kind have no numbers; each change of these is seen all the same"
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(40), b=rng.choice(list('xyz'), 40), y=rng.choice(['no','yes'], 40)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=cat_names, cont_names=cont_names, y_names='y',
                                     y_block=Category(), bs=8, valid_idx=range(32,40))
    teacher,student = (tabular_learner(dls, layers=[n], config=dict(use_bn=False, bn_cont=False)) for n in (20,5))
    rec = record_teacher(teacher, dls, tmp_path/'r', dtype=torch.float32)
    (got,),_ = rec.files.read(range(32))
    cats,conts = (torch.tensor(dls.train.items[c].values) for c in (dls.cat_names,dls.cont_names))
    with torch.no_grad(): want = teacher.model.eval()(cats.long(), conts.float())
    assert torch.allclose(got, want, atol=1e-6)
    def fit():
        with student.no_bar(), student.no_logging(): student.fit(2, cbs=KnowledgeDistillationCallback(rec))
    fit()
    dls.train.items['b' if cat_names else 'a'] = 0
    refuses(fit, 'items differ')

def padded(items):
    loaders = [SortedDL(items, bs=4, shuffle=s, before_batch=pad_input, num_workers=0) for s in (True,False)]
    return DataLoaders(*loaders, device=torch.device('cpu'))

def test_padded_texts_are_recorded_in_batches(tmp_path):
    "What an item looks like depends on the longest beside it"
    items = [(torch.randint(1, 20, (int(n),)), int(n)%3) for n in torch.randint(2, 15, (32,))]
    dls = padded(items)
    class Bag(nn.Module):
        def __init__(self): super().__init__(); self.e,self.l = nn.Embedding(20,4),nn.Linear(4,3)
        def forward(self, x): return self.l(self.e(x.long()).mean(1))
    rec = record_teacher(Bag(), dls, tmp_path/'r', n_epoch=2)
    assert not rec.header['any_order']
    fit(rec, dls, 3, Bag())
    equal = [(torch.randint(1, 20, (6,)), i%3) for i in range(32)]
    dls = padded(equal)
    assert record_teacher(Bag(), dls, tmp_path/'s').header['any_order']

def test_weighted_items(tmp_path):
    items = data().train.dataset
    for name,noisy in ('plain',None),('noisy',lambda o: o + torch.rand(1) if o.ndim else o):
        dl = WeightedDL(items, bs=8, wgts=list(range(24)), shuffle=True, num_workers=0, after_item=noisy)
        dls = DataLoaders(dl, data().valid, device=torch.device('cpu'))
        rec = record_teacher(net(), dls, tmp_path/name, n_epoch=2)
        assert rec.header['any_order'] == (noisy is None)
        fit(rec, dls, 3, net())

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
    train,valid = cls(items, bs=4, shuffle=True, num_workers=0),TfmdDL(items, bs=24, num_workers=0)
    dls = DataLoaders(train, valid, device=torch.device('cpu'))
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

# Teachers

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
    xs = [b[0] for e in range(2) for b in Seeded(dls.train, 0, e)]
    want = torch.cat([model.l(x) + 1 + i%4 for i,x in enumerate(xs)]).detach()
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), want)
    no_resetter = QuietLearner(dls, model, loss_func=CrossEntropyLossFlat())
    refuses(lambda: record_teacher(no_resetter, dls, tmp_path/'s'),
            'answers the same batch differently', 'with a `ModelResetter`')

def test_ensemble_and_fast_teacher(tmp_path):
    dls,(a,b) = data(),(net(),net(8))
    rec = record_teacher([a,b], dls, tmp_path/'r', dtype=torch.float32)
    x = torch.stack([o[0] for o in dls.train.dataset])
    want = (a.eval()(x) + b.eval()(x))/2
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), want.detach(), atol=1e-6)
    rec = record_teacher(Teacher(a, fast=True, tolerance=0), dls, tmp_path/'s')
    assert rec.header['teacher'] == 'Sequential'
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']).float(), a(x).detach(), atol=1e-2)

def test_batch_norm_without_statistics_is_recorded_in_batches(tmp_path, capsys):
    dls,ends = data(shuffle=True),[]
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    teacher = nn.Sequential(nn.Conv2d(2,4,3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144,3))
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and 'depends on the others in its batch' in capsys.readouterr().out
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = learner(net(), dls)
        learn.fit(3, cbs=[KnowledgeDistillationCallback(answers), *cbs])
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])
    assert record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32).header == rec.header

def quantised(name):
    class Words(nn.Module):
        def __init__(self): super().__init__(); self.rnn,self.out = nn.LSTM(2, 6, batch_first=True),nn.Linear(6,3)
        def forward(self, x): return self.out(self.rnn(x)[0][:,-1])
    layers,quantize = nn.Sequential(nn.Linear(2,8), nn.ReLU(), nn.Linear(8,3)),torch.ao.quantization.quantize_dynamic
    if name == 'dynamic': return quantize(layers, {nn.Linear})
    if name == 'lstm': return nn.Sequential(nn.Unflatten(1, (1,2)), quantize(Words(), {nn.Linear,nn.LSTM}))
    model = torch.ao.quantization.QuantWrapper(layers).eval()
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
    is_another(lambda: record_teacher(quantised(name), dls, tmp_path/'r', dtype=torch.float32), 'weights: ')
