"Losses over several layers, the input of a layer, and losses with a memory of each item: inside a fit."
import copy
import pytest, torch
import torch.nn.functional as F
from fastai.basics import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, SGD, accuracy,
                           set_seed)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastdistill.all import *
from fastdistill.epoch import ItemNumbers
from fastdistill.layers import FeatureHooks, get_layer
from fastdistill.losses.base import Loss
from torch import nn
from torch.utils.data import TensorDataset

n = 23
def dls(bs=4, num_workers=0, **kwargs):
    "Each input is its number in the training set"
    x = torch.arange(float(n))[:,None].expand(n, 3)
    train = TensorDataset(x, torch.arange(n)%2)
    return DataLoaders(DataLoader(train, bs=bs, shuffle=True, num_workers=num_workers, **kwargs), DataLoader(train, bs=bs))

def net(): return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
def learner(d=None, **kwargs): return Learner(d or dls(), net(), loss_func=CrossEntropyLossFlat(), **kwargs)
def fit(learn, kd, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=kd, **kwargs)

class Remember(Loss):
    "Remembers for each item its input, which the teacher returns"
    on_features,needs_items = False,True
    def build(self, student, teacher, n_items):
        self.register_buffer('memory', teacher.new_zeros(n_items))
        self.register_buffer('times', teacher.new_zeros(n_items))
    def forward(self, student, teacher, items):
        with torch.no_grad():
            self.memory[items] = teacher[:,0]
            self.times[items] += 1
        return F.mse_loss(student, teacher)

class First2(nn.Module):
    def forward(self, x): return x[:,:2]

def memory(kd): return kd.trained.losses[0][0]

@pytest.mark.parametrize('kw', [dict(), dict(num_workers=2), dict(drop_last=True), dict(bs=1)])
def test_items_have_the_numbers_of_the_training_set(kw):
    kd = KnowledgeDistillationCallback(First2(), Remember)
    learn = learner(dls(**kw))
    fit(learn, kd, 3)
    m = memory(kd)
    assert len(m.memory) == n and m.times.sum() == 3*(20 if 'drop_last' in kw else n)
    seen = m.times > 0
    assert torch.equal(m.memory[seen], torch.arange(float(n))[seen])
    assert 'get_idxs' not in vars(learn.dls.train)     # the loader is as it was

def test_the_order_of_the_items_does_not_change():
    class Seen(Callback):
        def before_fit(self): self.x = []
        def before_batch(self):
            if self.training: self.x += self.xb[0][:,0].tolist()
    found = []
    for loss in (SoftTarget, Remember):
        set_seed(3)
        learn,seen = learner(),Seen()
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, cbs=[seen, KnowledgeDistillationCallback(First2(), loss)])
        found.append(seen.x)
    assert found[0] == found[1]

@pytest.mark.parametrize('n_epoch', [1, 3])
def test_a_recording_knows_the_numbers(tmp_path, n_epoch):
    d = dls()
    if n_epoch > 1: d.train.after_batch = lambda b: (b[0] + torch.rand(())*1e-3, b[1])
    rec = record_teacher(First2(), d, tmp_path/'r', n_epoch=n_epoch)
    kd = KnowledgeDistillationCallback(rec, Remember)
    fit(learner(d), kd, n_epoch)
    m = memory(kd)
    assert (m.times == n_epoch).all()
    assert (m.memory - torch.arange(float(n))).abs().max() < 0.02

def test_the_memory_is_saved_and_goes_on(tmp_path):
    kd = KnowledgeDistillationCallback(First2(), Remember)
    fit(learner(), kd)
    kd.save(tmp_path/'kd.pth')
    again = KnowledgeDistillationCallback(First2(), Remember)
    again.load(tmp_path/'kd.pth')
    fit(learner(), again, 2)
    assert (memory(again).times == 3).all() and (memory(kd).times == 1).all()

def test_nothing_stays_of_a_trial():
    kd = KnowledgeDistillationCallback(First2(), Remember)
    learn = learner(cbs=kd)
    fit(learn, None)
    before = memory(kd).times.clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
    assert torch.equal(memory(kd).times, before)

def test_another_training_set_starts_anew():
    kd = KnowledgeDistillationCallback(First2(), Remember)
    learn = learner(cbs=kd)
    fit(learn, None)
    x = torch.rand(5, 3)
    d = TensorDataset(x, torch.zeros(5).long())
    learn.dls = DataLoaders(DataLoader(d, bs=5), DataLoader(d, bs=5))
    with pytest.warns(UserWarning, match='has 5 items, and 23 before'): fit(learn, None)
    assert len(memory(kd).times) == 5

def test_a_loader_that_cannot_tell_is_refused():
    d = torch.utils.data.DataLoader(TensorDataset(torch.rand(8, 3), torch.zeros(8).long()), batch_size=4)
    learn = learner(DataLoaders(d, d))
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='that draws numbered items'): fit(learn, KnowledgeDistillationCallback(First2(), Remember))
    assert all(torch.equal(a, b) for a,b in zip(before.values(), learn.model.cpu().state_dict().values()))

def test_an_error_takes_the_numbering_off():
    class Fails(Callback):
        def after_pred(self): raise RuntimeError('no')
    learn = learner()
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[Fails(), KnowledgeDistillationCallback(First2(), Remember)])
    assert 'get_idxs' not in vars(learn.dls.train)

def test_own_order_of_a_loader_is_kept():
    d = DataLoader(list(range(10)), bs=5)
    d.get_idxs = lambda: [9,8,7,6,5,4,3,2,1,0]
    own = d.get_idxs
    items = ItemNumbers(d)
    assert [items(i, b).tolist() for i,b in enumerate(d)] == [[9,8,7,6,5],[4,3,2,1,0]]
    items.remove()
    assert d.get_idxs is own

@pytest.mark.parametrize('cbs', [[GradientAccumulation(8)], [MixUp(0.4)], [MixedPrecision()]])
def test_with_other_callbacks(cbs):
    kd = KnowledgeDistillationCallback(First2(), Remember)
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[kd, *cbs])
    assert (memory(kd).times == 2).all()

def test_labels_come_before_numbers():
    class Both(Loss):
        on_features,needs_targ,needs_items,single_label = False,True,True,True
        def forward(self, student, teacher, targ, items):
            assert torch.equal(targ, items%2)
            return F.mse_loss(student, teacher)
    fit(learner(), KnowledgeDistillationCallback(First2(), Both))

# Several layers at once

class MeanOfAll(Loss):
    "Squared error of the mean of all features, with a scale that is trained"
    on_features,all_layers = True,True
    def build(self, students, teachers):
        self.channels = [s.shape[1] for s in students],[t.shape[1] for t in teachers]
        self.scale = nn.Parameter(students[0].new_ones(len(teachers)))
    def forward(self, students, teachers):
        s = sum(s.mean() for s in students)
        t = sum(w*t.mean() for w,t in zip(self.scale, teachers))
        return (s-t).square()

def test_a_step_over_several_layers_equals_one_by_hand():
    torch.manual_seed(0)
    teacher,learn = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),learner()
    learn.dls.train.shuffle,learn.opt_func = False,SGD
    by_hand,scale = copy.deepcopy(learn.model),torch.ones(3, requires_grad=True)
    x,y = next(iter(learn.dls.train))
    s0 = by_hand[0](x); out = by_hand[2](by_hand[1](s0))
    with torch.no_grad(): t0 = teacher[0](x); t2 = teacher[2](t0.relu()); t4 = teacher[4](t2.relu())
    kd_loss = (s0.mean() + out.mean() - scale[0]*t0.mean() - scale[1]*t2.mean() - scale[2]*t4.mean())**2
    (0.3*F.cross_entropy(out, y) + 0.7*kd_loss).backward()
    with torch.no_grad():
        for p in (*by_hand.parameters(),scale): p -= 0.1*p.grad
    kd = KnowledgeDistillationCallback(teacher, MeanOfAll, ['0','2'], ['0','2','4'], weight=0.7)
    class Stop(Callback):
        def after_batch(self): raise CancelFitException()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1, cbs=[kd, Stop()])
    for a,b in zip(by_hand.parameters(), learn.model.parameters()): assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(scale, kd.trained.losses[0][0].scale, atol=1e-6)
    assert kd.trained.losses[0][0].channels == ([4,2],[6,5,2])

def test_the_check_and_columns_take_several_layers():
    teacher = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    learn = learner(metrics=accuracy)
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Match(MeanOfAll, ['0','2'], ['0'])])
    with learn.no_bar(), learn.no_logging(): found = learn.distill_check(kd)
    row = found.terms.iloc[2]
    assert (row['student layer'],row['teacher layer'],row['shape ']) == ('0, 2','0',[(6,)])
    assert '0, 2' in repr(found) and '0, 2' in found._repr_html_()

def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='names of layers'): Match(MeanOfAll)
    with pytest.raises(ValueError, match='as many'): Match(MeanOfAll, ['0'])
    with pytest.raises(ValueError, match='no projector'): Match(MeanOfAll, ['0'], ['0'], projector=True)
    class Fails(MeanOfAll):
        def forward(self, students, teachers): raise ValueError('no')
    m = Match(Fails, ['0','2'], ['1'])
    with pytest.raises(ValueError, match=r"layers \['0', '2'\] and \['1'\], student \[\(1, 2\), \(1, 3\)\] and teacher \[\(4,\)\]: no"):
        m([torch.zeros(1,2),torch.zeros(1,3)], [torch.zeros(4)])
    with pytest.raises(TypeError, match='items'):
        f = lambda s, t: s
        f.needs_items = True
        Match(f)

def test_several_layers_from_a_recording(tmp_path):
    teacher = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    d = dls()
    rec = record_teacher(teacher, d, tmp_path/'r', loss=MeanOfAll, teacher_layers=['0','2'], dtype=torch.float32)
    found = []
    for t in (teacher,rec):
        set_seed(0)
        learn,kd = learner(),KnowledgeDistillationCallback(t, MeanOfAll, ['0'], ['0','2'])
        fit(learn, kd)
        found.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    assert torch.allclose(*found, atol=1e-6)

def test_half_precision_reaches_lists():
    class Dtype(MeanOfAll):
        def forward(self, students, teachers):
            assert {x.dtype for x in (*students,*teachers)} == {torch.float32}
            return super().forward(students, teachers)
    m = Match(Dtype, ['0'], ['0','1'])
    xs = [torch.rand(2, 3).half() for _ in range(3)]
    assert m(xs[:1], xs[1:], losses=m.build(xs[:1], xs[1:])).dtype == torch.float32

# The input of a layer

def test_the_input_of_a_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    assert get_layer(model, '1:input') is model[1]
    with FeatureHooks(model, ['1:input','1','0:input']) as hooks:
        for _ in range(2):     # the second time without copies where none are needed
            model(x)
            before,after,first = hooks.features
            assert torch.equal(before, model[0](x)) and torch.equal(after, before.relu()) and torch.equal(first, x)
    assert not model[1]._forward_pre_hooks and not model[1]._forward_hooks

def test_gradients_flow_through_the_input():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(5, 3)
    with FeatureHooks(model, ['1:input'], with_graph=True) as hooks:
        model(x)
        hooks.features[0].sum().backward()
    assert torch.allclose(model[0].weight.grad, x.sum(0).expand(4, 3))

def test_keyword_inputs_and_none():
    class Outer(nn.Module):
        def __init__(self): super().__init__(); self.inner = Inner()
        def forward(self, x): return self.inner(hidden=x)
    class Inner(nn.Module):
        def forward(self, hidden=None): return hidden*2
    with FeatureHooks(Outer(), ['inner:input']) as hooks:
        m = hooks[0].m
        m(hidden=torch.ones(2))
        assert hooks.features[0].tolist() == [1,1]
        hooks.clear()
        m.forward = lambda: None
        m()
        with pytest.raises(ValueError, match='no tensor'): hooks.features

def test_a_wrong_name_is_told():
    with pytest.raises(KeyError, match="no layer '7:input'"): get_layer(net(), '7:input')
    with pytest.raises(KeyError): get_layer(net(), ':input')

def test_a_fit_with_inputs_of_layers(tmp_path):
    teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    d = dls()
    rec = record_teacher(teacher, d, tmp_path/'r', loss=nn.MSELoss(), student_layers='1:input', teacher_layers='1:input', dtype=torch.float32)
    found = []
    for t,layer in ((teacher,'1:input'), (rec,'1:input'), (teacher,'0')):
        set_seed(0)
        learn = learner()
        learn.model[1].inplace = layer != '0'
        teacher[1].inplace = layer != '0'
        fit(learn, KnowledgeDistillationCallback(t, nn.MSELoss(), layer, layer))
        found.append(torch.cat([p.flatten() for p in learn.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)     # batches of another size are rounded differently
    assert torch.equal(found[0], found[2])
