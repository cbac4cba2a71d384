"Whatever is not as it was recorded is an error."
import shutil
from types import SimpleNamespace
import pytest, torch
from fastai.basics import Callback, DataLoaders, TfmdDL
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.vision.all import TensorImage, Transform
from fastdistill import recording
from fastdistill.callback import KnowledgeDistillationCallback as KD
from fastdistill.history import Transfer
from fastdistill.losses import Attention, SoftTarget
from fastdistill.objective import Match
from fastdistill.recording import record_teacher
from fastdistill.recording.files import part_of
from fastdistill.ensemble import Ensemble
from fastdistill.teacher import Teacher
from torch import nn
from conftest import data, learner, loaders, net, same_state, state
from recording_helpers import brighter, cnn, Counting, fit, images, is_another, refuses, refuses_the_second_batch
import recording_helpers

def test_another_setup_is_refused_before_the_first_batch(tmp_path):
    rec = record_teacher(cnn(), images(), tmp_path/'r')
    refuses(lambda: fit(rec, images(bs=5)), 'batch size: 4 when it was recorded, 5 now')
    refuses(lambda: fit(rec, images(shuffle=False)), 'shuffle: True when it was recorded, False now')
    some = record_teacher(net(), data(24), tmp_path/'s')
    refuses(lambda: learner(dls=data(32)).fit(1, cbs=KD(some)), 'items: 24 when it was recorded, 32 now')
    other = images()
    other.vocab[:] = ['a','b','c']
    model = cnn()
    before = state(model)
    refuses(lambda: fit(rec, other, model=model), "classes: ['0', '1', '2'] when it was recorded, ['a', 'b', 'c'] now")
    assert same_state(model, before)

class Darker(Transform):
    order = 20     # of tensors
    def encodes(self, x:TensorImage): return x//2

def test_another_batch_stops_the_fit(tmp_path, monkeypatch):
    rec = record_teacher(cnn(), images(), tmp_path/'r')
    darker = images()
    darker.train.after_item.add(Darker())
    refuses(lambda: fit(rec, darker), '4 of 4 items differ', 'Data or transforms have changed', '(epoch 0, batch 0)')
    edited = [p if i != 7 else p ^ 1 for i,p in enumerate(recording_helpers.pictures)]
    monkeypatch.setattr(recording_helpers, 'pictures', edited)
    refuses(lambda: fit(rec, images()), '1 of 4 items differ', 'Data or transforms have changed')
    monkeypatch.undo()
    fit(rec, images())
    monkeypatch.setattr(recording.same, 'version', lambda name: '0.1')
    monkeypatch.setattr(recording_helpers, 'pictures', [p[::-1].copy() for p in recording_helpers.pictures])
    refuses(lambda: fit(rec, images()), 'fastai', '0.1 now')

def test_changed_inputs_stop_the_fit_in_any_order(tmp_path):
    dls = data()
    rec = record_teacher(net(), dls, tmp_path/'r')
    changed = data()
    changed.train.dataset[3][0][0,0,0] += 1
    refuses(lambda: learner(dls=changed).fit(1, cbs=KD(rec)), '1 of 8 items differ')
    class Brighter(Callback):
        def before_batch(self): self.learn.xb = (self.x + 0.1,)
    refuses(lambda: learner(dls=dls).fit(1, cbs=[KD(rec), Brighter()]), '8 of 8 items differ')

class Late(Transfer):
    "Arrives as from a GPU: when somebody waits for it"
    def __init__(self, sent):
        super().__init__(sent)
        self.arrived = SimpleNamespace(synchronize=lambda: None)

def test_checksums_that_arrive_late_stop_the_fit_before_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.replay, 'Transfer', Late)
    rec = record_teacher(net(), data(), tmp_path/'r')
    refuses_the_second_batch(learner(dls=data()), rec)
    learner(dls=data()).fit(2, cbs=KD(rec))

def test_inputs_in_half_precision_are_refused(tmp_path):
    rec = record_teacher(net(), data(), tmp_path/'r')
    learn = learner(dls=data())
    learn.dl = learn.dls.train
    learn.add_cb(NonNativeMixedPrecision())     # a fit with it needs a GPU
    refuses(lambda: rec.batches(learn), 'to half precision first. Use `to_fp16`')

def test_what_cannot_be_replayed(tmp_path):
    dls = data()
    rec = record_teacher(net(), dls, tmp_path/'r')
    for mix in MixUp(),CutMix():
        refuses(lambda: learner(dls=dls).fit(1, cbs=[KD(rec), mix]), type(mix).__name__, 'has no answers to blends')
    refuses(lambda: KD(rec, Attention, '0', '0'), 'Attention', 'it holds: predictions')
    refuses(lambda: KD(rec, [SoftTarget, Match(nn.MSELoss(), '0', '0')]), 'expected a recording of 0', 'it holds: predictions')
    refuses(lambda: Ensemble([net(), rec]), '`record_teacher` takes a list')
    plain = DataLoaders(*[torch.utils.data.DataLoader(dls.train.dataset, batch_size=8) for _ in range(2)])
    refuses(lambda: learner(dls=plain).fit(1, cbs=KD(rec)), 'fastai, but got torch', error=TypeError)

def test_what_cannot_be_recorded(tmp_path):
    dls,path = data(),tmp_path/'r'
    def record(dls=dls, teacher=None, **kwargs): return record_teacher(teacher or net(), dls, path, **kwargs)
    refuses(lambda: record(dtype=torch.bfloat16), 'float16 or torch.float32, but got torch.bfloat16')
    refuses(lambda: record(n_epoch=0), 'at least one epoch')
    for k in 'n_epoch','first_epoch','seed':
        for v in 1.5,'2',None: refuses(lambda: record(**{k:v}), f'Expected {k} to be a whole number, but got {v!r}', error=TypeError)
    refuses(lambda: record(topk=1.5), 'whole number above 0')
    refuses(lambda: record(topk=3), 'below the number of classes, 3, but got 3')
    refuses(lambda: record(topk=1, axis=2), "axis to be that of the classes, but got 2 for answers of shape ('B', 3)")
    plain = DataLoaders(*[torch.utils.data.DataLoader(torch.zeros(4,2)) for _ in range(2)])
    refuses(lambda: record(plain), 'fastai, but got torch', error=TypeError)
    endless = DataLoaders(TfmdDL((o for o in data().train.dataset), bs=8, num_workers=0), data().valid)
    refuses(lambda: record(endless), 'known size')
    refuses(lambda: record(teacher='net'), 'but got str', error=TypeError)
    assert not list(tmp_path.iterdir())
    class Times(nn.Module):
        def __init__(self, by): super().__init__(); self.net,self.by = net(),by
        def forward(self, x): return self.net(x)*self.by
    refuses(lambda: record(teacher=Times(1e7), dtype=torch.float16), 'would change', 'dtype=torch.float32')
    shutil.rmtree(part_of(path))     # of the larger answers
    refuses(lambda: record(teacher=Times(float('nan'))), 'not finite')
    assert record_teacher(Times(1e7), dls, tmp_path/'large32').header['answers'][0]['dtype'] == 'float32'
    rec = record_teacher(net(), dls, path)
    refuses(lambda: record_teacher(rec, dls, tmp_path/'again'), 'Expected networks that stay as they are to record')

def test_answers_of_changing_shape(tmp_path):
    items = [(torch.randn(4 if i < 16 else 5, 2), 0) for i in range(24)]
    dls = loaders(items, items[:1], 8, shuffle=False)
    refuses(lambda: record_teacher(nn.Linear(2,3), dls, tmp_path/'r'),
            'expected one of shape (8, 4, 3)', 'but got (8, 5, 3)')

def test_answers_drawn_at_random_are_refused(tmp_path):
    class Draws(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return nn.functional.dropout(self.net(x), training=True)
    for dls,teacher in (data(),Draws()),(images(),nn.Sequential(nn.Conv2d(3,2,1), Draws())):
        refuses(lambda: record_teacher(teacher, dls, tmp_path/'r'), 'answers the same batch differently')
    assert not list(tmp_path.iterdir())

# Another teacher, other data

class Fixed(nn.Module):
    "The same weights, another activation"
    def __init__(self, act, layers): super().__init__(); self.layers,self.act = layers,act
    def forward(self, x): return self.layers[1](self.act(self.layers[0](x.flatten(1))))

def same(x): return x

@pytest.mark.parametrize('topk', [None,2])
@pytest.mark.parametrize('make', [data,images])
def test_the_same_weights_with_other_answers_are_another_teacher(tmp_path, make, topk):
    dls,n_in = make(),128 if make is data else 192
    layers = nn.ModuleList([nn.Linear(n_in,20), nn.Linear(20,3)])
    a,b = Fixed(torch.relu, layers),Fixed(torch.tanh, nn.ModuleList([nn.Linear(n_in,20), nn.Linear(20,3)]))
    pairs = [(a,Fixed(nn.functional.gelu, layers)), (Ensemble([a,b]),Ensemble([a,b], [3,1])),
             (Teacher(a, same),Teacher(a, brighter)), (Teacher(a),Teacher(a, brighter))]
    for i,(first,other) in enumerate(pairs):
        rec = record_teacher(first, dls, tmp_path/f'{i}', topk=topk)
        is_another(lambda: record_teacher(other, dls, tmp_path/f'{i}', topk=topk), 'predictions in the first batch')
        assert record_teacher(first, dls, tmp_path/f'{i}', topk=topk).header == rec.header

def test_another_teacher_does_not_go_on(tmp_path):
    dls,teacher = images(),cnn()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 4), dls, tmp_path/'r', n_epoch=2)
    other = Teacher(Counting(teacher), brighter)
    is_another(lambda: record_teacher(other, dls, tmp_path/'r', n_epoch=2), 'predictions in the first batch')
    record_teacher(Counting(teacher), dls, tmp_path/'r', n_epoch=2)

def test_changed_data_are_found_when_a_recording_is_opened(tmp_path, monkeypatch):
    teacher = cnn()
    record_teacher(teacher, images(), tmp_path/'r')
    monkeypatch.setattr(recording_helpers, 'pictures', recording_helpers.pictures[::-1])
    refuses(lambda: record_teacher(teacher, images(), tmp_path/'r'), 'not the batch that was recorded')
