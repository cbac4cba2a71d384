"A teacher with the classes in another order, or with more of them, teaches bit for bit what one with the student's classes teaches."
import pickle, warnings
from copy import deepcopy
from functools import partial
from threading import Barrier, Thread
from types import SimpleNamespace
import numpy as np, pytest, torch
from fastai.basics import (BCEWithLogitsLossFlat, CategoryMap, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, accuracy_multi, load_learner,
                           set_seed)
from fastai.distributed import DistributedDL
from fastai.text.data import LMDataLoader
from torch import nn
from conftest import QuietLearner, data, learner, loaders, mlp, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.callback import KnowledgeDistillationCallback as KD
from fastdistill.measure import started, validate_teacher
from fastdistill.teacher import classes_of

names,order = ['ant','bee','cow'],[2,0,1]     # of the student; which of them the shuffled teacher's logits stand for
shuffled = [names[i] for i in order]

class Reordered(nn.Module):
    "The logits of a model in another order, between those of other classes"
    def __init__(self, model, order=order, more=0, axis=1): super().__init__(); self.model,self.order,self.more,self.axis = model,order,more,axis
    def forward(self, *xb):
        logits = self.model(*xb).index_select(self.axis, torch.tensor(self.order))
        others = [torch.full_like(logits.narrow(self.axis, 0, 1), v) for v in range(self.more)]
        return torch.cat([*others[::2], logits, *others[1::2]], self.axis)

def with_more(names, n): return [*[f'x{i}' for i in range(0, n, 2)], *names, *[f'x{i}' for i in range(1, n, 2)]]

def named(dls=None, vocab=names):
    "Loaders that know their classes, with the items in order"
    dls = data(shuffle=False) if dls is None else dls
    dls.vocab = vocab
    for dl in dls.loaders: dl.vocab = vocab
    return dls

def losses(kd, dls=None, n_epoch=2, model=None, **kwargs):
    "All parts of the loss of a fit with the same seeds, and the student's weights"
    set_seed(1, reproducible=True)
    learn = learner(model or net(4), named() if dls is None else dls, **kwargs)
    learn.fit(n_epoch, cbs=kd)
    return kd.losses,{k:v.tolist() for k,v in learn.model.state_dict().items()}

def lines(capsys): return [l for l in capsys.readouterr().out.splitlines() if 'by name' in l]

@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, nn.MSELoss(), [SoftTarget, Match(Attention, '0', '0')]], ids=str)
@pytest.mark.parametrize('more', [0,10])
def test_the_loss_is_that_of_a_teacher_in_order(teacher, capsys, loss, more):
    in_order = losses(KD(teacher, loss, weight=.7))
    assert not lines(capsys)
    other = Reordered(teacher, more=more)
    if isinstance(loss, list): loss = [SoftTarget, Match(Attention, '0', 'model.0')]
    kd = KD(Teacher(other, vocab=with_more(shuffled, more)), loss, weight=.7)
    assert losses(kd) == in_order
    assert len(lines(capsys)) == 1
    assert losses(kd) == in_order     # the next fit says it again
    (line,) = lines(capsys)
    assert line == ('Teacher Reordered: its logits are put into the order of the student\'s 3 classes, by name' if not more else
                    'Teacher Reordered: of its 13 classes, the student has 3: its logits are cut to them, by name')

def test_a_learner_brings_its_names(teacher, capsys):
    by_learner = learner(Reordered(teacher), named(vocab=shuffled))
    assert losses(KD(by_learner)) == losses(KD(teacher))
    assert len(lines(capsys)) == 1
    by_learner.dls.vocab = ['a','b','c']
    assert losses(KD(Teacher(by_learner, vocab=shuffled))) == losses(KD(teacher))

def test_an_exported_learner_brings_its_names(tmp_path):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter
    from recording_helpers import cnn, kind, numbers, picture
    def dls(vocab):
        block = DataBlock((ImageBlock,CategoryBlock(vocab=vocab, sort=False)), get_items=numbers,
                          get_x=picture, get_y=kind, splitter=IndexSplitter(list(range(20, 28))))
        return block.dataloaders(None, bs=4, num_workers=0, device=torch.device('cpu'))
    model = cnn()
    def fit(teacher):
        set_seed(1, reproducible=True)
        learn = QuietLearner(dls([0,1,2]), cnn(), loss_func=CrossEntropyLossFlat())
        learn.fit(1, cbs=(kd := KD(teacher)))
        return kd.losses
    Learner(dls([2,0,1]), OfThree(model), loss_func=CrossEntropyLossFlat(), path=tmp_path).export()
    assert fit(load_learner(tmp_path/'export.pkl')) == fit(model)

class OfThree(Reordered):
    def __init__(self, model): super().__init__(model, [2,0,1])

def test_nothing_is_said_where_nothing_is_done(teacher, capsys):
    for vocab in names,np.array(names),tuple(names),CategoryMap(names): losses(KD(Teacher(teacher, vocab=vocab)), n_epoch=1)
    losses(KD(Teacher(Reordered(teacher), vocab=shuffled)), dls=data(shuffle=False), n_epoch=1)     # the student's classes have no names
    losses(KD(Reordered(teacher)), n_epoch=1)                                            # nor has the teacher's
    assert not lines(capsys)

def test_trials_say_nothing(teacher, capsys):
    kd = KD(Teacher(Reordered(teacher), vocab=shuffled))
    learn = learner(net(4), named())
    learn.lr_find(num_it=4, show_plot=False)
    learn.add_cb(kd)
    learn.lr_find(num_it=4, show_plot=False)
    learn.distill_check(n=1)
    learn.weight_finder(weights=[.5])
    assert not lines(capsys)
    learn.fit(1)
    assert len(lines(capsys)) == 1

def test_names_are_compared_as_text(teacher):
    assert losses(KD(Teacher(Reordered(teacher), vocab=['2','0',1])), dls=named(vocab=[0,1,2])) == losses(KD(teacher))
    assert losses(KD(Teacher(Reordered(teacher, [1,0]+[2]), vocab=['True','False','None'])), dls=named(vocab=[False,True,None])) == losses(KD(teacher))

def test_an_unknown_class_stops_the_fit_before_it_starts(teacher):
    model,before = net(4),None
    before,t = state(model),state(teacher)
    def refused(loss, *layers, teacher=teacher, vocab=('ants','bee','dog')):
        learn = learner(model, named())
        with pytest.raises(ValueError) as e: learn.fit(1, cbs=KD(Teacher(teacher, vocab=vocab), loss, *layers))
        assert same_state(model, before) and not n_hooks(model, teacher) and teacher.training
        return str(e.value)
    text = refused(SoftTarget)
    assert "it does not know 'ant', 'cow'. Nearest: 'ants'." in text and "Its classes are 'ants', 'bee', 'dog'" in text
    refused([Match(Attention, '0', '0'), Match(SoftTarget)])
    assert 'Nearest' not in refused(SoftTarget, vocab=['1','2','3'])
    assert "'c9' and 990 more" in refused(SoftTarget, vocab=[f'c{i}' for i in range(1000)])
    ensemble = KD([Teacher(teacher), Teacher(net(4), vocab=['ant','bee','cat'])])
    with pytest.raises(ValueError, match="does not know 'cow'"): learner(model, named()).fit(1, cbs=ensemble)
    assert teacher.training and same_state(teacher, t)

def test_losses_on_features_need_no_class(teacher, capsys):
    want = losses(KD(teacher, Attention, '0', '0'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for vocab in (['x','y','z'], shuffled, ['ant','ant','bee']): assert losses(KD(Teacher(teacher, vocab=vocab), Attention, '0', '0')) == want
    assert not lines(capsys)

def test_a_teacher_of_other_classes_is_not_said_to_guess(trained):
    teacher,dls = Teacher(trained.model, vocab=['x','y','z']),named(data(256, 64))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(net(4), dls).fit(1, cbs=KD(teacher, Attention, '0', '0', weight=.9))
    check = learner(net(4), dls).distill_check(KD(teacher, Attention, '0', '0', weight=.9), n=1)
    assert check.data.same['classes'] == 'no' and np.isnan(check.models.loc['teacher','accuracy']) and check.warnings == []

def test_names_that_are_there_twice(teacher):
    double = ['ant','bee','ant']
    def fit(vocab, of_student=names): return losses(KD(Teacher(teacher, vocab=vocab)), dls=named(vocab=of_student), n_epoch=1)
    with pytest.raises(ValueError, match="each class of the teacher to have a name of its own, but it has several that are called 'ant'"): fit([*double,'cow'])
    with pytest.raises(ValueError, match="each class of the student to have a name of its own, but it has several that are called 'ant'"): fit(['bee','ant'], double)
    fit(double, double)     # nothing has to be found by name
    more = Reordered(teacher, [0,1,2,0,0])
    assert losses(KD(Teacher(more, vocab=[*names,'x','x'])), n_epoch=1) == losses(KD(teacher), n_epoch=1)     # they are cut away

def test_vocabularies_that_do_not_fit_the_logits(teacher):
    with pytest.raises(ValueError, match=r'teacher Sequential to return a logit for each of its 4 classes.*got logits of shape \(8, 3\)'):
        losses(KD(Teacher(teacher, vocab=[*shuffled,'dog'])), n_epoch=1)
    with pytest.raises(ValueError, match="does not know 'bee'"): losses(KD(Teacher(teacher, vocab=shuffled[:2])), n_epoch=1)
    for vocab in 'abc',[],3,{}:
        with pytest.raises(ValueError, match='Expected vocab to be a list of the names of the classes, but got'): Teacher(teacher, vocab=vocab)
    binary = nn.Sequential(nn.Flatten(), nn.Linear(128, 1))
    with pytest.raises(ValueError, match='each of its 2 classes'):     # one logit for two classes cannot be reordered
        losses(KD(Teacher(binary, vocab=['no','yes']), nn.MSELoss()), dls=named(vocab=['yes','no']), model=nn.Sequential(nn.Flatten(), nn.Linear(128, 1)))

def test_a_stopped_teacher_answers_in_its_own_order(teacher):
    t,x = Teacher(Reordered(teacher), vocab=shuffled),torch.randn(4, 2, 8, 8)
    learn = learner(net(4), named())
    with started(t, learn): assert len(t.alignments) == 1 and torch.equal(t(x), teacher(x))
    teacher.eval()
    assert t.alignments == [] and torch.equal(t(x), teacher(x)[:,order])
    with pytest.raises(RuntimeError), started(t, learn): raise RuntimeError
    assert t.alignments == []
    for other in pickle.loads(pickle.dumps(t)),deepcopy(t): assert other.data == {'classes':shuffled}

def test_a_fit_that_is_interrupted_forgets_the_classes(teacher):
    t = Teacher(Reordered(teacher), vocab=shuffled)
    def stop(batch): raise KeyboardInterrupt
    class Stops(KD):
        def after_loss(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learner(net(4), named()).fit(1, cbs=Stops(t))
    assert t.alignments == []

def test_one_teacher_in_two_threads_with_other_classes(teacher):
    shared,gate,found = Teacher(Reordered(teacher), vocab=shuffled),Barrier(2),{}
    vocabs = [names,['bee','ant','cow']]
    class Waits(nn.Module):
        def __init__(self): super().__init__(); self.m = mlp()
        def forward(self, x):
            if self.training: gate.wait(20)     # both train before either goes on
            return self.m(x)
    learners = [learner(Waits(), named(vocab=v)) for v in vocabs]
    starts = [deepcopy(l.model.state_dict()) for l in learners]
    def train(i, teacher=shared):
        learners[i].fit(2, cbs=(kd := KD(teacher, weight=1.)))
        return [l for l in kd.losses['kd_loss']]
    threads = [Thread(target=lambda i: found.update({i:train(i)}), args=[i]) for i in (0,1)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert sorted(found) == [0,1] and shared.alignments == []
    gate.wait = lambda timeout: None
    for i,l in enumerate(learners):     # the same fit alone, with a teacher that has the classes in order
        l.model.load_state_dict(starts[i])
        l.opt = None
        in_order = Reordered(teacher, [names.index(c) for c in vocabs[i]])
        assert found[i] == train(i, Teacher(in_order))
    with started(shared, learners[0]), started(deepcopy(shared), learners[1]) as other:
        x = torch.randn(4, 2, 8, 8)
        assert torch.equal(other(x), shared(x)[:,[1,0,2]])

def test_threads_see_their_own_order(teacher):
    "Both have started one `Teacher`; each asks it when the other has started, and again when the first has stopped"
    shared,x,answers,gate = Teacher(Reordered(teacher), vocab=shuffled),torch.randn(4, 2, 8, 8),{},Barrier(2)
    def ask(i, vocab):
        learn = SimpleNamespace(model=net(), cbs=[], dls=SimpleNamespace(vocab=vocab), loss_func=None)
        with started(shared, learn):
            gate.wait(20)
            first = shared(x)
            gate.wait(20)
            if i: gate.wait(20)
            answers[i] = first,shared(x) if i else first
        if not i: gate.wait(20)
    threads = [Thread(target=ask, args=[i, v]) for i,v in enumerate((names, ['cow','ant']))]
    for t in threads: t.start()
    for t in threads: t.join(60)
    want = teacher.eval()(x)
    assert torch.equal(answers[0][0], want) and all(torch.equal(a, want[:,[2,0]]) for a in answers[1])

# --- kinds of logits ---

def fits(dls, teacher, student, loss, loss_func, vocab=None, n_epoch=1, metrics=None):
    set_seed(1, reproducible=True)
    learn = QuietLearner(dls, deepcopy(student), loss_func=loss_func, metrics=metrics)
    learn.fit(n_epoch, cbs=(kd := KD(Teacher(teacher, vocab=vocab), loss)))
    return kd.losses,learn

def test_several_labels_for_an_item():
    items = [(torch.randn(6), (torch.rand(3) > .5).float()) for _ in range(16)]
    dls,teacher,student = named(loaders(items, items, 8, False)),nn.Linear(6, 3),nn.Linear(6, 3)
    fit = partial(fits, dls, student=student, loss=MultiLabelSoftTarget, loss_func=BCEWithLogitsLossFlat())
    assert fit(Reordered(teacher, more=2), vocab=with_more(shuffled, 2))[0] == fit(teacher)[0]

@pytest.mark.parametrize('width', [3,5])     # with 3, the size does not tell the axis of the classes
def test_maps_have_the_classes_along_axis_1(width):
    items = [(torch.randn(2, 4, width), torch.randint(3, (4,width))) for _ in range(16)]
    dls,teacher,student = named(loaders(items, items, 8, False)),nn.Conv2d(2, 3, 1),nn.Conv2d(2, 3, 1)
    fit = partial(fits, dls, student=student, loss=SoftTarget, loss_func=CrossEntropyLossFlat(axis=1))
    assert fit(Reordered(teacher), vocab=shuffled)[0] == fit(teacher)[0]

@pytest.mark.parametrize('length', [3,5])
def test_tokens_have_the_classes_along_the_last_axis(length):
    items = [(torch.randn(length, 2), torch.randint(3, (length,))) for _ in range(16)]
    dls,teacher,student = named(loaders(items, items, 8, False)),nn.Linear(2, 3),nn.Linear(2, 3)
    fit = partial(fits, dls, student=student, loss=SoftTarget(axis=-1), loss_func=CrossEntropyLossFlat())
    want,learn = fit(teacher)
    assert fit(Reordered(teacher, axis=2), vocab=shuffled)[0] == want
    assert fit(Reordered(teacher, axis=2, more=4), vocab=with_more(shuffled, 4))[0] == want
    mse = partial(fits, dls, student=student, loss=nn.MSELoss(), loss_func=CrossEntropyLossFlat())     # the task knows the axis
    assert mse(Reordered(teacher, axis=2), vocab=shuffled)[0] == mse(teacher)[0]
    values,_ = validate_teacher(learn, Teacher(Reordered(teacher, axis=2), vocab=shuffled), dls.valid)
    assert values == validate_teacher(learn, Teacher(teacher), dls.valid)[0]

class Wrapped(nn.Module):
    "A model that returns its logits in a tuple, a dictionary or an object"
    def __init__(self, model, wrap): super().__init__(); self.model,self.wrap = model,wrap
    def forward(self, x): return self.wrap(self.model(x))

class Output:
    def __init__(self, logits): self.logits,self.hidden = logits,None

@pytest.mark.parametrize('wrap', [lambda o: (o, o.sum()), lambda o: dict(logits=o, loss=None), Output], ids=['tuple','dictionary','object'])
def test_outputs_of_many_kinds(trained, wrap):
    dls = named(data(64, 16))
    def quality(model, vocab=None):
        learn = learner(Wrapped(net(4), wrap), dls)
        learn.loss_func = lambda out, y: nn.functional.cross_entropy(out[0] if isinstance(out, tuple) else out['logits'] if isinstance(out, dict) else out.logits, y)
        learn.metrics = []
        return validate_teacher(learn, Teacher(Wrapped(model, wrap), vocab=vocab), dls.valid)
    assert quality(Reordered(trained.model, more=2), with_more(shuffled, 2)) == quality(trained.model)

def test_language_models_are_warned_of_their_inputs():
    rng,words = np.random.RandomState(0),['xxpad','a','b','c']
    def dls(vocab):
        made = [torch.from_numpy(rng.randint(0, 4, 20)) for _ in range(6)]
        res = DataLoaders(*[LMDataLoader(made, bs=2, seq_len=5, num_workers=0) for _ in (0,1)], device=torch.device('cpu'))
        res.vocab = vocab
        return res
    def model(): return nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    def fit(teacher_vocab, teacher=None, **kwargs):
        learn = QuietLearner(dls(words), model(), loss_func=CrossEntropyLossFlat())
        teacher = Teacher(Learner(dls(teacher_vocab), teacher or model(), loss_func=CrossEntropyLossFlat()), **kwargs)
        learn.fit(1, cbs=KD(teacher, SoftTarget(axis=-1)))
    with pytest.warns(UserWarning, match='trained with tokens'): fit(words[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(list(words))
        fit(words[::-1], input_tfm=lambda x: 3-x)
    with pytest.raises(ValueError, match="does not know 'b'"): fit(['xxpad','a','c','d'])

def test_loaders_of_several_processes_name_the_classes():
    items = list(zip(torch.randn(8, 2), torch.arange(8)%3))
    class Items(list): vocab = names
    dls = DataLoaders(TfmdDL(Items(items), bs=2, num_workers=0, do_setup=False), TfmdDL(Items(items), bs=2, num_workers=0, do_setup=False))
    assert classes_of(dls).names == names
    dls.loaders = [DistributedDL(dl, 0, 2) for dl in dls.loaders]
    assert classes_of(dls).names == names

def test_a_fast_teacher_is_aligned(teacher, capsys):
    slow = Teacher(Reordered(teacher), vocab=shuffled, fast=True, tolerance=0.)
    assert losses(KD(slow)) == losses(KD(Teacher(teacher, dtype=torch.float32)))
    assert len(lines(capsys)) == 1 and not slow.fast

# --- ensembles ---

def test_members_in_different_orders(teacher, capsys):
    other = net(4)
    kd = KD([Teacher(Reordered(teacher), vocab=shuffled), Teacher(Reordered(other, [1,2,0], more=2), vocab=with_more(['bee','cow','ant'], 2))])
    assert losses(kd) == losses(KD([teacher, other]))
    assert len(lines(capsys)) == 2

def test_a_member_without_names_stays_as_it_is(teacher, capsys):
    other = net(4)
    assert losses(KD(Ensemble([Reordered(teacher), other], [2,1]))) != losses(KD(Ensemble([teacher, other], [2,1])))
    mixed = Ensemble([Teacher(Reordered(teacher), vocab=shuffled), other], [2,1])
    assert losses(KD(mixed)) == losses(KD(Ensemble([teacher, other], [2,1]))) and len(lines(capsys)) == 1
    large = nn.Sequential(nn.Flatten(), nn.Linear(128, 5))
    with pytest.raises(ValueError, match='same classes, but their logits are of shapes'):
        losses(KD([Teacher(Reordered(teacher), vocab=shuffled), large]))

def test_nothing_tells_the_order_of_an_ensemble(teacher):
    members = [Teacher(teacher, vocab=names), Teacher(net(4), vocab=shuffled)]
    with pytest.raises(ValueError, match="same classes in one order.*'ant', 'bee', 'cow'.*'cow', 'ant', 'bee'"): losses(KD(members), dls=data(shuffle=False))
    losses(KD([members[0], net(4)]), dls=data(shuffle=False), n_epoch=1)
    assert teacher.training

# --- recordings ---

def record(teacher, path, dls=None, **kwargs): return record_teacher(teacher, named() if dls is None else dls, path, dtype=torch.float32, **kwargs)

def test_recordings_keep_the_classes(teacher, tmp_path, capsys):
    shuffle = Teacher(Reordered(teacher, more=2), vocab=with_more(shuffled, 2))
    rec,want = record(shuffle, tmp_path/'r'),record(teacher, tmp_path/'w')
    assert len(lines(capsys)) == 1
    assert rec.header['vocab'] == names and want.header['vocab'] is None and rec.header['answers'][0]['shape'] == [3]
    assert losses(KD(rec)) == losses(KD(want)) and not lines(capsys)
    other = ['bee','cow','ant']
    assert losses(KD(rec), dls=named(vocab=other)) == losses(KD(Teacher(teacher, vocab=names)), dls=named(vocab=other))
    assert len(lines(capsys)) == 2
    assert losses(KD(rec)) == losses(KD(want))     # and in the first order again
    with pytest.raises(ValueError, match="does not know 'dog'"): losses(KD(rec), dls=named(vocab=['ant','bee','dog']))
    with pytest.raises(ValueError, match='classes: .* when it was recorded'): losses(KD(want), dls=named(vocab=other))

@pytest.mark.parametrize('more', [0,10])
def test_the_highest_logits_are_those_of_the_student(teacher, tmp_path, more):
    shuffle = Teacher(Reordered(teacher, more=more), vocab=with_more(shuffled, more))
    rec,want = (record(t, tmp_path/p, topk=2) for t,p in ((shuffle,'r'),(teacher,'w')))
    assert losses(KD(rec)) == losses(KD(want))
    other = ['cow','bee','ant']
    swapped = losses(KD(rec), dls=named(vocab=other))
    assert swapped == losses(KD(record(Teacher(teacher, vocab=names), tmp_path/'o', named(vocab=other), topk=2)), dls=named(vocab=other))

def test_recording_without_names_of_the_data(teacher, tmp_path):
    "What was recorded is then the teacher's own order"
    rec = record(Teacher(Reordered(teacher), vocab=shuffled), tmp_path/'r', data(shuffle=False))
    assert rec.header['vocab'] == shuffled
    assert losses(KD(rec)) == losses(KD(record(teacher, tmp_path/'w')))

def test_recordings_of_features_have_no_classes(teacher, tmp_path):
    strange = Teacher(teacher, vocab=['x','y','z'])
    args = Attention,'0','0'
    rec = record(strange, tmp_path/'r', loss=args[0], teacher_layers='0')
    assert rec.header['vocab'] is None
    assert losses(KD(rec, *args)) == losses(KD(record(teacher, tmp_path/'w', loss=args[0], teacher_layers='0'), *args))
    with pytest.raises(ValueError, match="does not know 'ant'"): record(strange, tmp_path/'x')
    assert not (tmp_path/'x').exists() and not n_hooks(teacher)

def test_recorded_ensembles_and_recordings_of_other_classes(teacher, tmp_path):
    other = net(4)
    members = [Teacher(Reordered(teacher), vocab=shuffled), Teacher(Reordered(other, [1,2,0]), vocab=['bee','cow','ant'])]
    rec = record(members, tmp_path/'r')
    assert losses(KD(rec)) == losses(KD(record([teacher, other], tmp_path/'w')))
    with pytest.raises(ValueError, match='same classes in one order'): record(members, tmp_path/'o', data(shuffle=False))
    with pytest.raises(FileExistsError, match='vocab'): record(members, tmp_path/'r', named(vocab=['cow','bee','ant']))

# --- what looks at a teacher besides a fit ---

def test_the_check_sees_aligned_answers(trained):
    dls = named(data(256, 64))
    def check(teacher): return learner(net(4), dls).distill_check(KD(teacher), n=1)
    set_seed(0); want = check(trained.model)
    set_seed(0); found = check(Teacher(Reordered(trained.model, more=3), vocab=with_more(shuffled, 3)))
    assert found.warnings == want.warnings == [] and found.data.same['classes'] == 'by name'
    for c in ('valid_loss','accuracy'): assert found.models.loc['teacher',c] == want.models.loc['teacher',c]
    assert found.terms.loss.tolist() == want.terms.loss.tolist()

def test_interpretation_sees_aligned_answers(trained):
    student = learner(net(4), named(data(64, 16)))
    want = DistillationInterpretation.from_learners(trained.model, student)
    shuffle = Reordered(trained.model)
    by_learner = learner(shuffle, named(data(64, 16), shuffled))
    for teacher in Teacher(shuffle, vocab=shuffled),by_learner,[Teacher(shuffle, vocab=shuffled), trained.model]:
        found = DistillationInterpretation.from_learners(teacher, student)
        assert torch.allclose(found.logits['teacher'], want.logits['teacher']) and found.agreement_matrix().equals(want.agreement_matrix())
    assert found.teacher is not by_learner and DistillationInterpretation.from_learners(by_learner, student).teacher is by_learner
    other = learner(trained.model, named(data(64, 16), ['x','y','z']))
    with pytest.raises(ValueError, match="does not know 'ant'"): DistillationInterpretation.from_learners(other, student)

def test_compare_measures_by_name(trained):
    dls = named(data(64, 16))
    student = learner(net(4), dls)
    def table(teacher): return compare(dict(teacher=teacher, student=student), dl=dls.valid, batch_sizes=(2,), n=1)
    want = table(learner(trained.model, dls))
    found = table(learner(Reordered(trained.model, more=2), named(data(64, 16), with_more(shuffled, 2))))
    for c in ('valid_loss','accuracy','calibration error'): assert found.loc['teacher',c] == want.loc['teacher',c]
    for c in ('agreement','KL from the teacher'): assert found.loc['student',c] == want.loc['student',c]
    with pytest.raises(ValueError, match="teacher cannot be measured on these items, which have other classes: .*does not know 'ant'"):
        table(learner(trained.model, named(data(64, 16), ['x','y','z'])))
