"A student of a recorded teacher is the student of a live one."
import gc, pickle, random, types
from copy import copy, deepcopy
from threading import Event, Thread
import fastai.callback.schedule
import numpy as np, pytest, torch
from fastai.basics import Callback, set_seed
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
import fastdistill.check
from fastdistill.callback import KnowledgeDistillationCallback
from fastdistill.losses import Attention, SoftTarget
from fastdistill.objective import Match
from fastdistill.recording import record_teacher
from torch import nn
from conftest import data, learner, loaders, net, same_state, state
from recording_helpers import arrays, cnn, fit, images, language_model, SameBatches, text_learner, texts

@pytest.mark.parametrize('workers', [0,2])
@pytest.mark.parametrize('accumulate', [False,True])
def test_bit_for_bit_as_a_teacher_that_runs(tmp_path, workers, accumulate):
    "Recorded with another number of workers"
    dls,teacher,ends = images(workers),cnn(),[]
    rec = record_teacher(teacher, images(2-workers), tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order']
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        cbs = cbs + [GradientAccumulation(8)]*accumulate
        learn = fit(answers, dls, 3, cnn(dropout=0.5), cbs=cbs)     # longer than the recording
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
            if self.training: asked.append((self.knowledge_distillation.batch.answer, teacher(self.x).detach()))
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
    # the bias before a batch norm has a gradient of noise alone
    assert all(torch.allclose(p, q, atol=1e-4) for p,q in zip(a.parameters(), b.parameters())) and drawn == also

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

def test_recording_leaves_all_as_it_was(tmp_path):
    dls,teacher = images(),cnn(dropout=0.5)
    teacher[0].eval()
    set_seed(4)
    dls.train.rng = random.Random(4)
    def modes(): return [m.training for m in teacher.modules()]
    def draw(): return torch.rand(1),np.random.rand(),random.random(),dls.train.rng.random()
    before,modes_before,expected = state(teacher),modes(),draw()
    set_seed(4)
    dls.train.rng = random.Random(4)
    record_teacher(teacher, dls, tmp_path/'r', n_epoch=2)
    assert draw() == expected
    assert same_state(teacher, before) and modes() == modes_before and all(p.grad is None for p in teacher.parameters())

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
    assert dls.train.rng.random() == other.random() and rec.epoch is None
    fit(rec, dls)

@pytest.mark.parametrize('mix', [(),(MixUp(),)], ids=['plain','MixUp'])
@pytest.mark.parametrize('what', ['fit','check','copied callback'])
def test_two_fits_at_once(tmp_path, mix, what):
    "A recording serves several fits that run at the same time: here one inside the other"
    dls,terms = images(),[Match(SoftTarget), Match(Attention, '0', '0')]
    rec = record_teacher(cnn(), dls, tmp_path/'r', n_epoch=2, loss=terms, cbs=list(mix))
    def start(cbs=()):
        set_seed(3)
        return learner(cnn(), images(), cbs=[*map(copy, mix), *cbs])
    def plain(rec):
        learn = start()
        learn.fit(2, cbs=KnowledgeDistillationCallback(rec, terms))
        return learn
    class Inside(Callback):
        def after_step(self):
            if self.epoch or self.iter != 2: return
            if what == 'check': start().distill_check(KnowledgeDistillationCallback(rec, terms))
            elif what == 'fit': ends.append(plain(rec))
            else: start().fit(1, cbs=deepcopy(kd))
    want,ends,kd = plain(rec),[],KnowledgeDistillationCallback(rec, terms)
    learn = start()
    learn.fit(2, cbs=[kd,Inside()])
    assert all(same_state(want.model, state(l.model)) for l in (learn,*ends))

def test_two_threads(tmp_path):
    "One fit goes on where the other has ended"
    dls,began,ended,ends = data(),Event(),Event(),[]
    rec = record_teacher(net(8), dls, tmp_path/'r', loss=[Match(SoftTarget), Match(Attention, '0.0', '0.0')])
    weights = state(net())
    def train(cb=None):
        model = net()
        model.load_state_dict(weights)
        learn = learner(model, data(shuffle=False), cbs=cb)
        learn.fit(2, cbs=KnowledgeDistillationCallback(rec, Attention, '0.0', '0.0'))
        ends.append(learn)
    def wait(self):
        if self.training and self.iter == 1: began.set(); ended.wait(20)
    train()
    t = Thread(target=train, args=[Callback(after_pred=wait)])
    t.start(); began.wait(20)
    train()
    ended.set(); t.join(20)
    assert len(ends) == 3 and all(same_state(ends[0].model, state(l.model)) for l in ends[1:])

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
    assert (tmp_path/'2'/'predictions.npy').stat().st_size < (tmp_path/'None'/'predictions.npy').stat().st_size

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

# Language models

@pytest.mark.parametrize('shuffle,workers', [(True,0),(True,2),(False,0)])
def test_language_model_as_one_that_runs(tmp_path, shuffle, workers):
    dls,ends = texts(shuffle, workers=workers),[]
    teacher = text_learner(dls, language_model(10))
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and rec.header['answers'][0]['shape'] == [6,12]
    for answers,cbs in (rec,[]),(teacher,[SameBatches(rec)]):
        set_seed(5)
        learn = text_learner(dls, language_model())
        learn.fit(3, cbs=[KnowledgeDistillationCallback(answers, SoftTarget(axis=-1)), *cbs])
        ends.append(state(learn.model))
    assert same_state(learn.model, ends[0])
    again = record_teacher(teacher, texts(shuffle, workers=workers), tmp_path/'s', n_epoch=2, dtype=torch.float32)
    assert all(np.array_equal(a, arrays(again)[k], equal_nan=k == 'logits') for k,a in arrays(rec).items())

def test_language_model_answers_by_a_plain_loop(tmp_path):
    "The last batch is shorter. What is kept is right, and the other words have the probability that they had"
    dls,seen,n_items = texts(),[],[]
    teacher = text_learner(dls, language_model(10))
    rec = record_teacher(teacher, dls, tmp_path/'r', topk=5, axis=-1)
    class Keep(Callback):
        order = 60
        def after_pred(self):
            if self.training: seen.append((self.x.clone(), self.knowledge_distillation.batch.answer))
    text_learner(dls, language_model()).fit(2, cbs=[KnowledgeDistillationCallback(rec, SoftTarget(axis=-1)), Keep()])
    n = len(dls.train)
    assert len(seen) == 2*n and len({x.shape for x,_ in seen}) == 2
    model = teacher.model.eval()
    for epoch in seen[:n],seen[n:]:
        model.reset()
        for x,got in epoch:
            want = model(x)[0].detach().softmax(-1)
            top = want.topk(5).indices
            assert got.shape == want.shape
            assert torch.allclose(got.softmax(-1).gather(-1, top), want.gather(-1, top), atol=1e-3)

# Progress

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
