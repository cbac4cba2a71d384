"Looking before a fit: each warning is provoked, and a sound set-up has none."
import re
from copy import deepcopy
import pytest, torch
from fastai.basics import set_seed
from fastai.callback.schedule import SchedCos
from fastai.data.transforms import Normalize
from torch import nn
from torch.nn import functional as F
from conftest import data, free_port, learner, loaders, mlp, n_hooks, net, same_state, state
from test_measure import Permuted
from fastdistill.all import *

class Inverted(Permuted):
    def forward(self, x): return self.model(5-3*x)

def new(trained): return learner(net(4), trained.dls)

def test_norms_by_hand(trained):
    "The gradient of each term, by a backward pass of its own"
    dls = loaders(*[[(x, y) for x,y in trained.dls.train_ds]]*2, bs=256, shuffle=False)
    model = mlp()
    learn = learner(deepcopy(model), dls)
    check = learn.distill_check(KnowledgeDistillationCallback(trained, [SoftTarget(T=3), Match(nn.MSELoss(), weight=2)], weight=0.7))
    x,y = dls.one_batch()
    trained.model.eval()
    with torch.no_grad(): t = trained.model(x)
    def norm(loss):
        grads = torch.autograd.grad(loss(model(x)), list(model.parameters()))
        return sum((g**2).sum() for g in grads).sqrt().item()
    kl = lambda s: 9*F.kl_div((s/3).log_softmax(1), (t/3).softmax(1), reduction='batchmean')
    want = [0.3*norm(lambda s: F.cross_entropy(s, y)), 0.7*norm(kl), 0.7*2*norm(lambda s: F.mse_loss(s, t))]
    assert check.terms['gradient norm'].tolist() == pytest.approx(want, rel=1e-4)
    assert check.terms['weighted loss'].tolist() == pytest.approx([0.3*F.cross_entropy(model(x), y).item(), 0.7*kl(model(x)).item(), 1.4*F.mse_loss(model(x), t).item()], rel=1e-4)
    assert check.models.loc['teacher','accuracy'] == pytest.approx(trained.validate()[1], abs=0.1)
    assert check.models.loc['student','parameters'] == sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize('default', [torch.float32,torch.float64])
def test_models_in_float64(trained, default):
    "Norms and losses in full precision, by hand; float64 may be PyTorch's default as well"
    items = [(x.double(), y) for x,y in trained.dls.train_ds][:64]
    x,y = torch.stack([x for x,_ in items]),torch.stack([y for _,y in items])
    teacher,model = deepcopy(trained.model).double().eval(),mlp().double()
    learn = learner(deepcopy(model), loaders(items, items, 64, shuffle=False))
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget(T=3), Match(nn.MSELoss(), weight=1e-30)])
    found = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        check = learn.distill_check(kd, n=1)
        table = learn.weight_finder(kd, weights=[0.5], temperatures=[2]).table
        pairs = match_layers(net(4).double(), KnowledgeDistillationCallback(teacher).teacher, x)
    finally: torch.set_default_dtype(found)
    def norm(loss): return sum((g**2).sum() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)).sqrt().item()
    s,t = model(x),teacher(x).detach()
    kl,mse = 9*F.kl_div((s/3).log_softmax(1), (t/3).softmax(1), reduction='batchmean'),F.mse_loss(s, t)
    ce = F.cross_entropy(s.float(), y)     # as fastai computes it
    assert check.terms['loss'].tolist() == pytest.approx([ce.item(), kl.item(), mse.item()], rel=1e-12)
    assert check.terms['gradient norm'].tolist() == pytest.approx([0.5*norm(ce), 0.5*norm(kl), 0.5e-30*norm(mse)], rel=1e-12, abs=0)
    assert check.models.loc['teacher','valid_loss'] == pytest.approx(F.cross_entropy(t, y).item(), rel=1e-6)
    assert table.notna().valid_loss.all() and list(pairs) == [['0','1'],['0','1']]

def test_teacher_metrics_are_its_own(trained):
    check = new(trained).distill_check(KnowledgeDistillationCallback(trained, SoftTarget))
    assert check.models.loc['teacher',['valid_loss','accuracy']].tolist() == pytest.approx(list(trained.validate()))
    assert check.warnings == [] and 'Nothing looks wrong' in repr(check) and 'accuracy' in check._repr_html_()

def test_suggested_weight_makes_gradients_equal(trained):
    def ratio(**kw):
        set_seed(0)
        c = new(trained).distill_check(KnowledgeDistillationCallback(trained, Match(SoftTarget, weight=1e-3), **kw))
        return c.terms['gradient norm'][1]/c.terms['gradient norm'][0],c.warnings
    r,(text,) = ratio()
    assert r < 1/30 and 'the task loss is' in text
    w = dict((k, float(v)) for k,v in (o.split('=') for o in text.split('; ')[1].split(' would')[0].split(', ')))
    assert ratio(**w)[0] == pytest.approx(1, rel=0.1) and not ratio(**w)[1]

def test_schedules_are_judged_where_they_end(trained):
    assert new(trained).distill_check(KnowledgeDistillationCallback(trained, SoftTarget, weight=SchedCos(0, .5))).warnings == []
    assert 'weight of the distillation loss is 0' in new(trained).distill_check(KnowledgeDistillationCallback(trained, SoftTarget, weight=0)).warnings[0]

silent = lambda t: KnowledgeDistillationCallback(t, SoftTarget)

@pytest.mark.parametrize('name,kd,msg', [
    ('order', lambda t: KnowledgeDistillationCallback(Permuted(t.model), SoftTarget), 'than guessing would'),
    ('inputs', lambda t: KnowledgeDistillationCallback(Inverted(t.model), SoftTarget), 'than guessing would'),
    ('flat', lambda t: KnowledgeDistillationCallback(t, SoftTarget(T=500)), 'are flat'),
    ('weight', lambda t: KnowledgeDistillationCallback(t, Match(SoftTarget, weight=1e-3)), 'task loss is .* times as large'),
    ('other weight', lambda t: KnowledgeDistillationCallback(t, SoftTarget, weight=1000, task_weight=1), 'distillation loss is .* times as large'),
    ('depth', lambda t: KnowledgeDistillationCallback(t, Attention, '0.0', '1.2', weight=0.9), 'of the depth'),
])
def test_each_warning(trained, name, kd, msg):
    found = new(trained).distill_check(kd(trained)).warnings
    assert any(re.search(msg, w) for w in found), found
    assert new(trained).distill_check(silent(trained)).warnings == []

def test_no_gradient(trained):
    learn = new(trained)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    found = learn.distill_check(KnowledgeDistillationCallback(trained, Attention, '0', '0', weight=0.9)).warnings
    assert any('does not reach the student' in w for w in found)

def test_student_better_than_teacher(trained):
    weak = learner(net(8), trained.dls)
    weak.fit(1, 1e-3)
    student = learner(deepcopy(trained.model), trained.dls)
    found = student.distill_check(KnowledgeDistillationCallback(weak, SoftTarget)).warnings
    assert any('already better than the teacher' in w for w in found)
    assert new(trained).distill_check(silent(trained)).warnings == []

def test_labels_that_are_none(trained):
    items = [(x, torch.tensor(0)) for x,_ in trained.dls.train_ds]
    learn = learner(net(4), loaders(items, items[:64], 64))
    assert any('looks at the labels' in w for w in learn.distill_check(KnowledgeDistillationCallback(trained, DecoupledKD)).warnings)
    assert not any('looks at the labels' in w for w in learn.distill_check(silent(trained)).warnings)

def normalised(mean, vocab='abc'):
    dls = data(256, 64)
    for dl in dls.loaders: dl.after_batch.add(Normalize.from_stats([mean]*2, [1.]*2, cuda=False))
    dls.vocab = list(vocab)
    return dls

def test_data_that_differ(trained):
    def check(teacher_dls, dls, **kw):
        teacher = Teacher(learner(deepcopy(trained.model), teacher_dls), **kw)
        return learner(net(4), dls).distill_check(KnowledgeDistillationCallback(teacher, SoftTarget))
    sound = check(normalised(0.), normalised(0.))
    assert sound.warnings == [] and sound.data.same.tolist() == ['yes']*3
    assert check(normalised(0.), normalised(.02)).warnings == []     # of a batch each, perhaps
    shifted = check(normalised(0.), normalised(.1))
    assert sum('normalise them again' in w for w in shifted.warnings) == 1 and shifted.data.same['mean'] == 'no'
    assert not any('normalise' in w for w in check(normalised(0.), normalised(.1), input_tfm=lambda x: x+.1).warnings)
    other = check(normalised(0.), normalised(0., 'bca'))
    assert not any('trained with classes' in w for w in other.warnings) and other.data.same['classes'] == 'by name'
    assert any('another order' in w for w in other.warnings)     # the names are wrong: this teacher knew them in the student's order
    assert check(data(256, 64), normalised(0.)).data.same.tolist() == ['not known']*3

def test_what_the_fit_raises_the_check_raises(trained):
    learn = new(trained)
    before = state(learn.model)
    with pytest.raises(KeyError, match='Nearest names'): learn.distill_check(KnowledgeDistillationCallback(trained, Attention, '9', '0'))
    with pytest.raises(ValueError, match='number of classes'): learn.distill_check(KnowledgeDistillationCallback(nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), SoftTarget))
    with pytest.raises(ValueError, match='but got none'): learn.distill_check()
    assert same_state(learn.model, before) and n_hooks(learn.model, trained.model) == 0

def test_check_of_a_recording(trained, tmp_path):
    learn = new(trained)
    rec = record_teacher(trained, learn.dls, tmp_path/'a.rec')
    check = learn.distill_check(KnowledgeDistillationCallback(rec, SoftTarget))
    assert check.warnings == [] and check.models.loc['teacher'].isna()['accuracy']

@pytest.mark.slow
def test_looking_in_two_processes(tmp_path):
    "With a frozen teacher: each process knows the numbers of the whole validation set, and nothing is changed"
    pytest.importorskip('accelerate')
    import distributed_check
    from test_distributed import finish, here, start
    finish(start('--nproc_per_node', 2, '--master_port', free_port(), here/'distributed_check.py', tmp_path))
    set_seed(0, reproducible=True)
    models = dict(student=net(4), teacher=net(8))
    dls = distributed_check.small()
    k = round(64*learner(models['teacher'], dls).validate()[1])
    for r in (0,1):
        got = torch.load(tmp_path/f'check_{r}.pth', weights_only=False)
        for who,model in models.items():
            want = [sum(p.numel() for p in model.parameters()), *learner(model, dls).validate()]
            assert list(got['models'][who].values()) == pytest.approx(want, rel=1e-4)
        assert got['same'] and got['rows'] == 2 and any(w.startswith(f'On the validation set the teacher names the class of {k} items of 64,') for w in got['warnings'])
