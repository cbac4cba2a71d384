"Several processes: they record together, and share the batches of a recording."
import os, signal, types
import numpy as np, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, set_seed, SGD
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter
from fastdistill.callback import KnowledgeDistillationCallback
from fastdistill.losses import SoftTarget
from fastdistill.objective import Match
from fastdistill.recording import record_teacher, TeacherRecording
from fastdistill.recording.batches import Seeded
from fastcore.foundation import L
from torch import distributed, nn
from conftest import data, mlp, QuietLearner
from forked import run_forked
from recording_helpers import arrays, cnn, Counting, images, language_model, refuses, text_learner, texts

epochs = dict(n_epoch=2, dtype=torch.float32)

def a_cnn():
    set_seed(7)
    return cnn()

def an_mlp():
    set_seed(7)
    return mlp()

def same_files(path, other):
    a,b = (arrays(TeacherRecording(o)) for o in (path,other))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

class Fails(nn.Module):
    "Stops at the n-th question"
    def __init__(self, model, n, stop): super().__init__(); self.model,self.n,self.stop = model,n,stop
    def forward(self, x):
        self.n -= 1
        if not self.n: self.stop()
        return self.model(x)

def out_of_memory(): raise ValueError('out of memory')
def dies(): os.kill(os.getpid(), signal.SIGKILL)

# What each process does

def record(rank, folder, name, kind='pictures', stop=None, at=5, who=1):
    "Loads with a worker in the second process; 'stop' is what process `who` does when it is asked for the `at`-th time"
    teacher,dls = (an_mlp(),data(25)) if kind == 'items' else (a_cnn(),images(rank%2))
    if rank == who and stop: teacher = Fails(teacher, at, stop)
    elif stop: teacher = Fails(teacher, -1, stop)     # the same name in the header
    return record_teacher(teacher, dls, folder/name, cbs=MixUp() if kind == 'blends' else None, **epochs).header

def refused(rank, folder):
    found = []
    def error(f):
        try: f()
        except Exception as e: found.append(f'{type(e).__name__}: {e}')
    dls = texts()
    error(lambda: record_teacher(text_learner(dls, language_model()), dls, folder/'t'))
    error(lambda: record_teacher(nn.Sequential(nn.Embedding(12,4), nn.Linear(4,12)), dls, folder/'t'))
    error(lambda: record_teacher(a_cnn(), images(), folder/'one', n_epoch=3))
    return found,distributed.is_initialized()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Recorded by one process"
    folder = tmp_path_factory.mktemp('recordings')
    record(0, folder, 'one')
    record(0, folder, 'one_items', 'items')
    record(0, folder, 'one_blends', 'blends')
    return folder

# Recording

@pytest.mark.parametrize('world,kind', [(2,'pictures'),(2,'items'),(2,'blends'),(3,'pictures')])
def test_several_record_what_one_records(folder, tmp_path, world, kind):
    "Bit for bit; one of them speaks"
    found = run_forked(world, record, tmp_path, tmp_path, 'r', kind)
    for _,error,_ in found: assert error is None, error
    same_files(tmp_path/'r', folder/dict(pictures='one', items='one_items', blends='one_blends')[kind])
    assert {o.name for o in tmp_path.iterdir()} == {'r',*[f'said_{r}' for r in range(world)]}
    assert found[0][2].startswith('r: 2') and not any(out for *_,out in found[1:])

@pytest.mark.parametrize('who', [0,1])
def test_a_process_that_fails_ends_all(folder, tmp_path, who):
    "At once, with its reason; then one process completes what two began"
    found = run_forked(2, record, tmp_path, tmp_path, 'r', 'pictures', out_of_memory, 4, who)
    errors = [error for _,error,_ in found]
    assert errors[who].startswith('ValueError: ') and 'out of memory' in errors[who]
    assert errors[1-who].startswith(f'RuntimeError: Process {who} of 2 has failed: ValueError: ') and 'out of memory' in errors[1-who]
    refuses(lambda: TeacherRecording(tmp_path/'r'), 'is not whole')
    record(0, tmp_path, 'r', stop=out_of_memory, who=1)
    same_files(tmp_path/'r', folder/'one')

def test_a_process_that_fails_before_the_first_batch(tmp_path):
    found = run_forked(2, record, tmp_path, tmp_path, 'r', 'pictures', out_of_memory, 1)
    assert ['out of memory' in error for _,error,_ in found] == [True,True]
    assert not {o.name for o in tmp_path.iterdir()} & {'r','r.part'}

@pytest.mark.slow
@pytest.mark.parametrize('who', [0,1])
def test_a_process_that_is_killed(folder, tmp_path, who):
    "Nothing that was whole is lost; three processes complete what two began"
    found = run_forked(2, record, tmp_path, tmp_path, 'r', 'pictures', dies, 5, who)
    assert found[who] == -signal.SIGKILL and 'has ended without a word' in found[1-who][1]
    refuses(lambda: TeacherRecording(tmp_path/'r'), 'is not whole')
    found = run_forked(3, record, tmp_path, tmp_path, 'r', 'pictures', dies, 5, 3)
    for _,error,_ in found: assert error is None, error
    same_files(tmp_path/'r', folder/'one')

def test_two_complete_what_one_began(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(a_cnn(), 5), images(), tmp_path/'r', **epochs)
    found = run_forked(2, complete, tmp_path, tmp_path)
    assert [n for n,*_ in found] == [1+3+2,1+2+2]     # of two epochs, and two looks at the first batch
    same_files(tmp_path/'r', folder/'one')

def complete(rank, folder):
    counting = Counting(a_cnn())
    record_teacher(counting, images(), folder/'r', **epochs)
    return counting.n

def test_what_several_processes_cannot_record(folder):
    for found,error,_ in run_forked(2, refused, folder, folder):
        recurrent,stream,another = found[0]
        assert recurrent.startswith('ValueError: A recurrent teacher') and '2 processes cannot share' in recurrent
        assert stream.startswith('ValueError: Several processes') and 'stream of texts' in stream
        assert another.startswith('FileExistsError: ') and 'n_epoch: 2 when it was recorded, 3 now' in another
        assert not found[1]     # the group that was made is gone

# Replaying

class Double(nn.Module):
    "Computes in float64"
    def __init__(self, n_in):
        super().__init__()
        set_seed(3)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(n_in,4), nn.Tanh(), nn.Linear(4,3)).double()
    def forward(self, x): return self.layers(x.double())

class Gradients(Callback):
    order = 100
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append([p.grad.clone() for p in self.model.parameters()])

def cross_entropy(pred, y):
    "In float64, while fastai's recorder gets float32"
    return nn.functional.cross_entropy(pred, y).float()

def mse(pred, answer): return ((pred - answer)**2).mean()

def replay(rank, folder):
    "Record, and gradients of each step of one epoch with each recording"
    from fastdistill.experiment import start_processes     # with accelerate
    record(rank, folder, 'two')
    start_processes()
    record(rank, folder, 'two_items', 'items')     # in a group that is there
    found = {}
    for name in 'one','two','one_items','one_blends':
        set_seed(11+rank)     # each process has other random states
        dls = data(25) if name == 'one_items' else images(2*rank)
        if name == 'one_items': dls.train.rng.seed(5+rank)
        blends = [MixUp()] if name == 'one_blends' else []
        loss = CrossEntropyLossFlat() if blends else cross_entropy
        learn,steps = QuietLearner(dls, Double(128 if name == 'one_items' else 192), loss, opt_func=SGD),Gradients()
        kd = KnowledgeDistillationCallback(TeacherRecording(folder/name), mse, task_weight=1.)
        with learn.distrib_ctx(sync_bn=False): learn.fit(1, 0.1, cbs=[kd, steps, *blends])
        found[name] = steps.steps
    learn = QuietLearner(images(), Double(192), CrossEntropyLossFlat(), cbs=ModelResetter())
    try:
        with learn.distrib_ctx(sync_bn=False): learn.fit(1, cbs=KnowledgeDistillationCallback(TeacherRecording(folder/'one')))
    except ValueError as e: found['recurrent'] = str(e)
    distributed.destroy_process_group()
    return found

@pytest.fixture(scope='module')
def replayed(folder):
    pytest.importorskip('accelerate')
    found = run_forked(2, replay, folder, folder)
    for _,error,_ in found: assert error is None, error
    return [o for o,*_ in found]

def plain_loop(batches, model, teacher, lr):
    "Gradients of steps on two batches each, whose losses are averaged"
    for pair in batches:
        losses = []
        for b in pair:
            x,y = (o.as_subclass(torch.Tensor) for o in b)
            pred = model(x)
            losses.append(nn.functional.cross_entropy(pred, y) + 0.5*mse(pred, teacher(x).detach()))
        grads = torch.autograd.grad(sum(losses)/2, list(model.parameters()))
        yield grads
        with torch.no_grad():
            for p,g in zip(model.parameters(), grads): p -= lr*g

def close(found, want, eps=1e-12):
    assert len(found) == len(want)
    for a,b in zip(found, want):
        for p,q in zip(a, b): assert (p-q).abs().max() <= eps

@pytest.mark.parametrize('name', ['one','two'])
def test_gradients_are_those_of_one_process_that_accumulates(replayed, name):
    "Five batches: the last step goes on with the first one"
    b = list(Seeded(images().train, 0, 0))
    want = list(plain_loop([(b[0],b[1]),(b[2],b[3]),(b[4],b[0])], Double(192), a_cnn().eval(), 0.1))
    for found in replayed: close(found[name], want)

def test_blends_are_the_same_in_all_processes(replayed):
    "The checksums of their inputs have been looked at"
    for a,b in zip(*[found['one_blends'] for found in replayed]): assert all(map(torch.equal, a, b))
    for found in replayed: assert 'A recurrent model' in found['recurrent'] and '2 processes cannot' in found['recurrent']

def test_any_order_is_that_of_the_first_process(replayed):
    set_seed(11)
    dls = data(25)
    dls.train.rng.seed(5)
    b = list(dls.train)
    assert len(b) == 4
    want = list(plain_loop([(b[0],b[1]),(b[2],b[3])], Double(128), an_mlp().eval(), 0.1))
    for found in replayed: close(found['one_items'], want, 1e-7)     # the teacher was asked in other batches, in float32

def draw(rank, folder, name):
    "The share of one of four processes, without a student"
    from fastai.distributed import DistributedDL     # needs accelerate
    distributed.init_process_group('gloo')
    rec,dls,seen = TeacherRecording(folder/name),images() if name == 'two' else data(25),[]
    wrapped = DistributedDL(dls.train)     # its own order would need a GPU
    batches = rec.batches(types.SimpleNamespace(dls=dls, dl=wrapped, epoch=1, cbs=L()))
    with rec.hooks(Match(SoftTarget)):
        for xb,_ in batches:
            rec.check(xb)
            seen.append((xb, rec(xb)))
    distributed.destroy_process_group()
    return len(batches),seen

def test_four_processes(folder, replayed):
    found = run_forked(4, draw, folder, folder, 'two')
    want,teacher = list(Seeded(images().train, 0, 1)),a_cnn().eval()
    for rank,((n,seen),error,_) in enumerate(found):
        assert n == len(seen) == 2
        for (x,answer),i in zip(seen, [rank,(rank+4)%5]):
            assert torch.equal(x, want[i][0]) and torch.equal(answer, teacher(x))
    same_files(folder/'two_items', folder/'one_items')
    found = run_forked(4, draw, folder, folder, 'two_items')
    items = torch.cat([x for o,*_ in found for x,_ in o[1]])
    assert len(items.unique(dim=0)) == 25 and [o[0] for o,*_ in found] == [1]*4
