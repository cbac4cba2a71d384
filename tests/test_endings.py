"How a fit ends, and what is left: interruptions, exports and copies right after them, several learners, another teacher in the middle."
import pickle, subprocess, sys
from copy import deepcopy
import pytest, torch
from fastai.basics import Callback, CancelBatchException, DataLoaders, Learner, load_learner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from conftest import data, learner, n_hooks, net, same_state, state
from fastdistill.all import *
from test_callback import exportable, one_batch

KD = KnowledgeDistillationCallback
stages = ['0','1']
events = ['before_epoch','before_train','before_batch','after_pred','after_loss','before_backward','after_backward','before_step','after_step','after_batch','after_train',
          'before_validate','after_validate','after_epoch']

def interrupt(event, order=60, ex=KeyboardInterrupt, n=1):
    def stop(self):
        if event == 'before_epoch' or self.train_iter >= n: raise ex
    cb = Callback(**{event: stop})
    cb.order = order
    return cb

def interrupted(learn, *args, **kwargs):
    with pytest.raises((KeyboardInterrupt,RuntimeError)): learn.fit(2, cbs=interrupt(*args, **kwargs))
    return learn

class Names(pickle.Unpickler):
    "Which modules a file of `torch.save` asks for"
    def find_class(self, module, name):
        self.modules.add(module)
        return super().find_class(module, name)

def modules_of(file):
    import types
    seen = set()
    class Unpickler(Names): modules = seen
    fake = types.ModuleType('pickling')
    fake.Unpickler,fake.load = Unpickler,pickle.load
    torch.load(file, pickle_module=fake, weights_only=False)
    return {m for m in seen if m.split('.')[0] == 'fastdistill'}

# --- Ctrl-C, then ... ---

@pytest.mark.parametrize('order', [-20,4,8,60])
@pytest.mark.parametrize('event', events)
def test_nothing_is_left_after_ctrl_c(teacher, event, order):
    "At once, not only when the next fit starts; the optimizer and what the learner saves are the student's"
    learn = learner(cbs=KD(teacher, [SoftTarget, Match(FitNet, stages, stages)]))
    before,attributes = state(teacher),set(learn.__dict__)
    interrupted(learn, event, order)
    n = len(list(learn.model.parameters()))
    assert n_hooks(learn.model, teacher) == 0 and teacher.training and same_state(teacher, before)
    assert learn.metrics.attrgot('name') == ['accuracy'] and [len(g) for g in learn.opt.param_lists] == [n] == [len(list(learn.parameters()))]
    assert '_with_events' not in learn.__dict__ and 'parameters' not in learn.__dict__
    assert set(learn.__dict__) - attributes <= {'train_iter','pct_train','epoch','loss','loss_grad','pred','xb','yb','dl','iter','n_iter','smooth_loss','final_record'}

@pytest.mark.parametrize('ex', [KeyboardInterrupt, RuntimeError('somebody else'), CancelBatchException])
@pytest.mark.parametrize('event', ['after_pred','before_step','after_step','after_epoch'])
def test_export_after_an_interruption_is_the_student_alone(teacher, event, ex, tmp_path):
    sizes = {}
    for name,cbs in dict(alone=None, kd=KD(teacher, [SoftTarget, Match(VID, stages, stages)])).items():
        learn = learner(path=tmp_path, dls=exportable(), cbs=cbs)
        try: learn.fit(2, cbs=interrupt(event, ex=ex))
        except (KeyboardInterrupt,RuntimeError,CancelBatchException): pass
        opt,dls = learn.opt.state_dict(),learn.dls
        learn.export(f'{name}.pkl')
        assert learn.dls is dls and learn.opt.state_dict().keys() == opt.keys() and len(learn.opt.state_dict()['state']) == len(opt['state'])
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
    assert sizes['kd'] - sizes['alone'] < 1000 and not modules_of(tmp_path/'kd.pkl')
    loaded = load_learner(tmp_path/'kd.pkl')
    assert same_state(loaded.model, state(learn.model)) and n_hooks(loaded.model) == 0 and loaded.metrics.attrgot('name') == ['accuracy']

def test_fit_after_an_interruption_is_the_fit_without_one(teacher):
    "Bit for bit, the weights of a fresh learner put in between"
    ends = []
    for stop in (False,True):
        torch.manual_seed(0)
        start = state(net())
        learn = learner(dls=data(shuffle=False), cbs=KD(teacher, [SoftTarget, Match(Attention, stages, stages)]))
        if stop: interrupted(learn, 'after_backward')
        learn.model.load_state_dict(start)
        learn.opt = None
        for p in learn.model.parameters(): p.grad = None     # fastai leaves those of an interrupted step
        learn.fit(1)
        ends.append((state(learn.model), learn.recorder.values[-1]))
    assert all(torch.equal(v, ends[1][0][k]) for k,v in ends[0][0].items()) and ends[0][1] == ends[1][1]

@pytest.mark.parametrize('event', events)
@pytest.mark.parametrize('copy', [deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=['deepcopy','pickle'])
def test_copies_right_after_ctrl_c(teacher, event, copy):
    "They work, or raise fastai's own error, as they do without the callback; copies train on and hold no hooks"
    found = {}
    for name,cbs in dict(alone=None, kd=KD(teacher, [SoftTarget, Match(FitNet, stages, stages)])).items():
        learn = interrupted(learner(dls=exportable(), cbs=cbs), event)
        try: found[name] = copy(learn)
        except (TypeError,RuntimeError) as e: found[name] = str(e)
    alone,kd = found['alone'],found['kd']
    if isinstance(alone, str):
        assert kd == alone
        return
    assert same_state(kd.model, state(learn.model)) and n_hooks(kd.model) == 0 and kd.metrics.attrgot('name') == ['accuracy']
    kd.knowledge_distillation.teacher = teacher     # a pickle holds none
    kd.fit(1)
    assert 'kd_loss' in kd.recorder.metric_names

def test_save_after_ctrl_c_holds_no_projector(teacher, tmp_path):
    learn = interrupted(learner(path=tmp_path, cbs=KD(teacher, FitNet, stages, stages)), 'after_step', 4)
    file = learn.save('student')
    saved = torch.load(file, weights_only=False)
    assert len(saved['opt']['state']) == len(list(learn.model.parameters()))
    learner(path=tmp_path).load('student', weights_only=False).fit(1)

def test_export_in_the_middle_of_a_fit(teacher, tmp_path):
    "By a callback of the user's, between epochs: loads, predicts and trains, and asks for nothing of ours"
    def export(self):
        if self.epoch == 0: self.learn.export('middle.pkl')
    learn = learner(path=tmp_path, dls=exportable(), cbs=KD(teacher, FitNet, stages, stages))
    torch.manual_seed(0)
    learn.fit(2, cbs=Callback(after_epoch=export))
    assert not modules_of(tmp_path/'middle.pkl')
    loaded = load_learner(tmp_path/'middle.pkl')
    loaded.cbs.items[:] = [cb for cb in loaded.cbs if type(cb) is not Callback or cb.learn is None]
    loaded.dls = data()
    loaded.fit(1)

script = '''
import sys
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'fastdistill': raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
import torch
from fastai.basics import load_learner
import test_callback_items
learn = load_learner(sys.argv[1])
with learn.no_bar(): print(learn.predict(3)[0])
'''

def test_loads_where_this_package_is_not_installed(teacher, tmp_path):
    "In a process that cannot import it"
    items = tmp_path/'test_callback_items.py'
    items.write_text('from fastai.basics import Transform\nimport torch\nclass Item(Transform):\n    def encodes(self, i:int): return torch.full((2,8,8), i/24)\n'
                     'class Class(Transform):\n    def encodes(self, i:int): return torch.tensor(i%3)\n')
    sys.path.insert(0, str(tmp_path))
    try:
        import test_callback_items as t
        from fastai.basics import CrossEntropyLossFlat, Datasets, accuracy
        dsets = Datasets(list(range(24)), [[t.Item()],[t.Class()]], splits=[range(16),range(16,24)])
        learn = Learner(dsets.dataloaders(bs=8, num_workers=0, device=torch.device('cpu')), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path,
                        cbs=KD(teacher, [SoftTarget, Match(FitNet, stages, stages)]))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        learn.export('student.pkl')
    finally: sys.path.remove(str(tmp_path))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(tmp_path/'student.pkl')], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

# --- copies ---

def test_a_copied_learner_trains_with_the_teacher(teacher):
    "The copy's step is the original's; the projector goes along, and the two do not share it"
    learn = learner(dls=one_batch(), cbs=KD(teacher, [SoftTarget, Match(FitNet, stages, stages)]))
    learn.fit(1)
    learn.loss_grad = None     # fastai alone could not be copied with it
    other = deepcopy(learn)
    kd,copied = learn.knowledge_distillation,other.knowledge_distillation
    assert copied is not kd and copied.learn is other and copied.teacher.model is teacher
    for l in (learn,other): l.fit(1)
    assert same_state(other.model, state(learn.model)) and same_state(copied.trained.losses, state(kd.trained.losses))
    assert not {id(p) for p in copied.trained.params} & {id(p) for p in kd.trained.params}

def test_a_copy_of_one_of_two_learners_trains_with_the_teacher(teacher):
    "Also if the last fit was the other's"
    kd = KD(teacher)
    a,b = learner(cbs=kd),learner(cbs=kd)
    a.fit(1)
    copied = deepcopy(b)
    copied.fit(1)
    assert copied.knowledge_distillation.learn is copied and 'kd_loss' in copied.recorder.metric_names and kd.learn is a

def test_a_pickle_of_one_of_two_learners_is_of_this_one(teacher):
    "Also if the last fit was the other's; it asks for its teacher"
    kd = KD(teacher)
    a,b = learner(cbs=kd),learner(cbs=kd)
    for last in (a,b):
        last.fit(1)
        loaded = pickle.loads(pickle.dumps(a))
        with pytest.raises(ValueError, match='loaded without one'): loaded.fit(1)
        loaded.knowledge_distillation.teacher = teacher
        loaded.fit(1)
        assert loaded.knowledge_distillation.learn is loaded and 'kd_loss' in loaded.recorder.metric_names

def test_export_of_one_of_two_learners_is_the_student_alone(teacher, tmp_path):
    kd = KD(teacher)
    a,b = (learner(path=tmp_path, dls=exportable(), cbs=kd) for _ in range(2))
    for last in (a,b):
        last.fit(1)
        a.export('a.pkl')
        assert not modules_of(tmp_path/'a.pkl')
        assert same_state(load_learner(tmp_path/'a.pkl').model, state(a.model))

def test_a_pickled_callback_asks_for_its_teacher(teacher):
    kd = pickle.loads(pickle.dumps(KD(teacher)))
    with pytest.raises(ValueError, match=r'loaded without one.*`callback.teacher = \.\.\.`'): learner().fit(1, cbs=kd)
    with pytest.raises(KeyError, match='teacher Sequential has no layer'): pickle.loads(pickle.dumps(KD(teacher, Attention, '1', '1'))).teacher = nn.Sequential(nn.Flatten())
    kd.teacher = teacher
    learner().fit(1, cbs=kd)

def test_a_pickled_learner_does_not_train_without_its_teacher(teacher):
    loaded = pickle.loads(pickle.dumps(learner(cbs=KD(teacher))))
    with pytest.raises(ValueError, match='loaded without one'): loaded.fit(1)
    kd = loaded.knowledge_distillation
    kd.teacher = teacher
    other = learner()
    other.fit(1, cbs=kd)     # lent, and given back
    loaded.fit(1)
    assert kd.learn is loaded and 'kd_loss' in other.recorder.metric_names and 'kd_loss' in loaded.recorder.metric_names

@pytest.mark.parametrize('look', [lambda learn: learn.validate(), lambda learn: learn.get_preds(), lambda learn: learn.get_preds(inner=True)])
def test_a_look_at_the_validation_set_between_two_epochs(teacher, look):
    "The columns stay, the fit goes on with its teacher, and all is undone at its end"
    class Look(Callback):
        def after_train(self): look(self.learn)
    learn = learner(cbs=KD(teacher, [SoftTarget, Match(FitNet, stages, stages)]))
    learn.fit(3, cbs=Look())
    kd = learn.knowledge_distillation
    assert learn.recorder.metric_names[-3:-1] == ['task_loss','kd_loss'] and len(kd.losses['kd_loss']) == 3*len(learn.dls.train)
    assert learn.metrics.attrgot('name') == ['accuracy'] and n_hooks(learn.model, teacher) == 0 and '_with_events' not in learn.__dict__

class Stream(IterableDataset):
    def __iter__(self): return iter(data().train_ds)

def test_a_learner_whose_data_have_no_length_can_be_pickled(teacher):
    dl = DataLoader(Stream(), 8)
    loaded = pickle.loads(pickle.dumps(learner(dls=DataLoaders(dl, dl), cbs=KD(teacher))))
    assert type(loaded.knowledge_distillation) is KD

# --- several learners ---

def asked(learn, kd):
    "How many batches a fit of one epoch has the teacher answer"
    n,model = [],kd.teacher.model
    handle = model.register_forward_pre_hook(lambda m, i: n.append(1))
    learn.fit(1)
    handle.remove()
    assert ('kd_loss' in learn.recorder.metric_names) == (len(n) > 0)
    return len(n)

def test_lent_to_another_learner(teacher):
    kd = KD(teacher)
    a,b = learner(cbs=kd),learner()
    b.fit(1, cbs=kd)
    assert 'kd_loss' in b.recorder.metric_names and kd.learn is a
    assert asked(a, kd) == 3 and asked(b, kd) == 0
    with pytest.raises(KeyboardInterrupt): b.fit(1, cbs=[kd, interrupt('after_loss')])
    assert asked(a, kd) == 3 and a.metrics.attrgot('name') == b.metrics.attrgot('name') == ['accuracy']

def test_on_two_learners(teacher):
    "Each trains with its teacher, in any order, validates without, and lets go of it"
    kd = KD(teacher, Attention, stages, stages)
    a,b = learner(cbs=kd),learner(cbs=kd)
    assert [asked(l, kd) for l in (a,b,a,a,b)] == [3]*5
    assert len(a.validate()) == len(b.validate()) == 2
    interrupted(a, 'after_loss')
    assert [asked(l, kd) for l in (b,a)] == [3,3]
    b.remove_cb(kd)
    assert asked(a, kd) == 3 and asked(b, kd) == 0
    a.remove_cb(kd)
    assert kd.learn is None and asked(a, kd) == 0

def test_learners_that_cannot_be_told_apart(teacher):
    "Without fastai's own callbacks nothing says whose fit starts"
    from fastai.basics import CrossEntropyLossFlat
    kd = KD(teacher)
    a,b = (Learner(data(), net(), loss_func=CrossEntropyLossFlat(), default_cbs=False, cbs=kd) for _ in range(2))
    with pytest.raises(ValueError, match='on one learner, but 2 hold it'): a.fit(1)

def test_a_cell_that_is_run_again(teacher):
    kd = KD(teacher)
    for _ in range(3):
        learn = learner(cbs=kd)
        assert asked(learn, kd) == 3

# --- another teacher ---

def test_another_teacher_in_the_middle_of_a_fit(teacher):
    "The first goes home at once, and the second answers from the next batch on"
    other,answered = net(16).eval(),[]
    kd = KD(teacher, [SoftTarget, Match(FitNet, '0', '0')])
    def swap(self):
        if self.training and self.iter == 1: self.knowledge_distillation.teacher = other
    for name,m in dict(first=teacher, second=other).items(): m.register_forward_pre_hook(lambda m, x, name=name: answered.append(name))
    learn = learner(cbs=[kd, Callback(after_batch=swap)])
    seen = []
    learn.fit(1, cbs=Callback(before_batch=lambda self: seen.append((n_hooks(teacher), teacher.training)) if self.training else None))
    assert answered == ['first']*2 + ['second'] and seen[-1] == (1,True)
    assert kd.trained.losses[1][0].projector[0].weight.shape[0] == 16
    assert n_hooks(learn.model) == 0 and n_hooks(teacher, other) == 2 and teacher.training and not other.training

# --- a student that writes over its inputs ---

class Subtracts(nn.Module):
    "Normalises its input in place"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(x.sub_(3))

def test_a_student_that_writes_over_its_inputs(teacher):
    learn = learner(Subtracts(net()))
    before = state(learn.model)
    with pytest.raises(ValueError, match=r'(?s)Expected Subtracts to leave its inputs as they are.*`x = x - mean`.*epoch 0, batch 0'): learn.fit(1, cbs=KD(teacher))
    assert same_state(learn.model, before) and n_hooks(learn.model, teacher) == 0

def test_callbacks_may_write_over_inputs(teacher):
    "Student and teacher see the same then"
    class Writes(Callback):
        order = 50
        def before_batch(self): self.xb[0].sub_(3)
    seen = []
    teacher.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    learner(cbs=[KD(teacher), Writes(), Callback(after_pred=lambda self: seen.append(self.x.clone()) if self.training else None)]).fit(1)
    assert len(seen) == 6 and all(torch.equal(a, b) for a,b in zip(seen[::2], seen[1::2]))
