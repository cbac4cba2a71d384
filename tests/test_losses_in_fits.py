"Losses that train, draw or remember something of their own, inside a fit."
import pickle
import pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner, SGD, set_seed
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.nn.functional import normalize
from torchvision.models import resnet18
import memory_run
from conftest import data, learner, net, free_port
from fastdistill.all import *
from test_distributed import finish, start, here

KD = KnowledgeDistillationCallback
def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)

def loss_of(kd): return kd.trained.losses[0][0]

terms = dict(MGD=lambda: Match(MGD, ['0','1'], ['0','1']), NST=lambda: Match(NST, '1', '1'), MultiLevel=lambda: MultiLevel(), OFD=lambda: Match(OFD, '0', '0'),
             ReviewKD=lambda: Match(ReviewKD, ['0','1'], ['0','1']), CRD=lambda: Match(CRD(negatives=8, dim=4), '1', '1'))

@pytest.mark.parametrize('cbs', [[], [GradientAccumulation(16)]], ids=['plain','accumulate'])
@pytest.mark.parametrize('name', terms)
def test_it_is_fitted_repeated_saved_and_leaves_nothing(teacher, name, cbs, tmp_path):
    def one(saved=None):
        set_seed(0)
        kd,student = KD(teacher, terms[name](), weight=.1, task_weight=1.),net(4)
        if saved: kd.load(saved)
        learn = learner(student, data(bs=8), opt_func=SGD)
        fit(learn, cbs=[kd, *cbs])
        assert all(torch.isfinite(p).all() for p in student.parameters())
        return kd,student,learn
    (kd,student,learn),(_,again,_) = one(),one()
    for a,b in zip(student.parameters(), again.parameters()): assert torch.equal(a, b)     # a seed repeats it
    assert not any(k.startswith(('projector','embed','memory','fusions')) for k in student.state_dict())
    if not kd.trained.losses[0]: return
    kd.save(tmp_path/'kd.pth')
    trained = {k:v.clone() for k,v in kd.trained.losses.state_dict().items()}
    saved = torch.load(tmp_path/'kd.pth')['losses']
    assert trained.keys() == saved.keys() and all(torch.equal(v, saved[k]) for k,v in trained.items())
    learn.add_cb(kd)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)     # a trial trains a copy
    assert all(torch.equal(v, trained[k]) for k,v in kd.trained.losses.state_dict().items())
    one(tmp_path/'kd.pth')
    pickle.loads(pickle.dumps(learn))

@pytest.mark.parametrize('name', ['MGD','CRD'])
def test_what_it_draws_is_not_drawn_from_another_fit(teacher, name):
    "`untouched` puts the random numbers back"
    kd,learn = KD(teacher, terms[name](), weight=.1),learner(net(4), data(bs=8))
    before = torch.get_rng_state()
    with untouched(learn): fit(learn, cbs=kd)
    assert torch.equal(before, torch.get_rng_state())

def test_a_loss_with_a_memory_starts_from_the_whole_training_set(teacher):
    kd,learn = KD(teacher, terms['CRD'](), weight=.1, task_weight=1.),learner(net(4), data(bs=8))
    fit(learn, cbs=kd)
    n,crd = len(learn.dls.train.dataset),loss_of(kd)
    assert crd.memory_student.shape == crd.memory_teacher.shape == (n,4) and crd.log_z.shape == (2,)
    assert not any(p is b for p in kd.trained.params for b in crd.buffers())     # nothing trains the memories
    for m in (crd.memory_student,crd.memory_teacher): torch.testing.assert_close(m.norm(dim=1), torch.ones(n))

def test_the_sum_before_a_blocks_last_relu():
    "As `OFD` gets it in torchvision's ResNets: computed by hand; with the margin of a batch norm and of the features"
    set_seed(0)
    teacher,student = resnet18(num_classes=3).eval(),resnet18(num_classes=3)
    x,y = torch.randn(4,3,32,32),torch.tensor([0,1,2,0])
    block,seen = teacher.layer1[1],[]
    def sums(b, inp): return b.bn2(b.conv2(b.relu(b.bn1(b.conv1(inp))))) + inp
    with torch.no_grad(): want = sums(block, teacher.layer1[0](teacher.maxpool(teacher.relu(teacher.bn1(teacher.conv1(x))))))
    class Seen(OFD):
        def build(self, s, t): seen.append(t); return super().build(s, t)
    from fastai.basics import DataLoader, DataLoaders
    items = [*zip(x, y)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4))
    for loss in (Seen(), Seen(block.bn2)):
        learn,kd = Learner(dls, student, loss_func=CrossEntropyLossFlat()),KD(teacher, loss, 'layer1.1.relu:input', 'layer1.1.relu:input', weight=1., task_weight=1.)
        fit(learn, cbs=kd)
        torch.testing.assert_close(seen[-1], want, rtol=1e-4, atol=1e-5)
        assert (loss_of(kd).margin < 0).all() and len(kd.trained.params) == 3     # a convolution and its batch norm

def test_stages_and_the_pooling_layer_are_reviewed():
    set_seed(0)
    teacher,student = resnet18(num_classes=3),resnet18(num_classes=3)
    from fastai.basics import DataLoader, DataLoaders
    items = [*zip(torch.randn(8,3,64,64), torch.arange(8)%3)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=4))
    stages = ['layer1','layer2','layer3','layer4','avgpool']
    kd = KD(teacher, ReviewKD(channels=16), stages, stages, weight=1., task_weight=1.)
    fit(Learner(dls, student, loss_func=CrossEntropyLossFlat()), cbs=kd)
    assert [f.attend is None for f in loss_of(kd).fusions] == [False]*4 + [True]
    with pytest.raises(ValueError, match='a stage of the teacher.*got 2 and 1|ReviewKD.*but got 2 and 1'): fit(Learner(dls, student, loss_func=CrossEntropyLossFlat()), cbs=KD(teacher, ReviewKD, stages[:2], stages[:1]))

@pytest.mark.slow
def test_one_memory_in_two_processes(tmp_path):
    "Both have the vectors of all items, also of those that the other one has seen; with a learning rate of 0, computed by hand"
    finish(start('--nproc_per_node', 2, '--master_port', free_port(), here/'memory_run.py', tmp_path))
    a,b = (torch.load(tmp_path/f'memory_{r}.pth') for r in (0,1))
    for k in ('start','end'): assert a[k].keys() == b[k].keys() and all(torch.equal(a[k][n], b[k][n]) for n in a[k])
    x = memory_run.inputs()
    for who in ('student','teacher'):
        before,after = (a[k][f'memory_{who}'] for k in ('start','end'))
        e = normalize(nn.functional.linear(memory_run.features(who, x), a['start'][f'embed_{who}.weight'], a['start'][f'embed_{who}.bias']))
        torch.testing.assert_close(after, normalize(before + e), rtol=1e-4, atol=1e-5)

def test_a_recording_keeps_vectors_for_the_loss_with_a_memory(teacher, tmp_path):
    "As with the live teacher, to the last digits"
    found = []
    for recorded in (False,True):
        set_seed(0)
        dls,args = data(bs=8, shuffle=False),(CRD(negatives=8, dim=4), ['1'], ['1'])
        kd = KD(record_teacher(teacher, dls, tmp_path/'r', 2, *args) if recorded else teacher, *args, weight=.1, task_weight=1.)
        set_seed(0)
        fit(Learner(dls, net(4), loss_func=CrossEntropyLossFlat(), opt_func=SGD), n=2, cbs=kd)
        found.append(loss_of(kd).state_dict())
    for k in found[0]: torch.testing.assert_close(*[f[k] for f in found], rtol=1e-3, atol=1e-4)
