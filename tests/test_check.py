"Looking before a fit: each warning is provoked and silent on a sound set-up, nothing is changed by looking."
import random, re, warnings
from collections import namedtuple
from contextlib import suppress
from copy import deepcopy
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientClip
from fastai.basics import AvgMetric, Callback, CrossEntropyLossFlat, Learner, noop, set_seed
from fastai.callback.schedule import SchedCos
from fastai.data.transforms import Normalize
from torch import nn
from torch.nn import functional as F
from conftest import data, free_port, learner, loaders, mlp, n_hooks, net, same_state, state
from test_applications import language_dls, text_learner, texts
from fastdistill.all import *
from fastdistill.digits import digits_learner

@pytest.fixture(scope='module')
def trained():
    "A teacher that knows, and its data: 256 images in batches of 64"
    set_seed(0)
    learn = learner(net(8), data(256, 64))
    learn.fit(10, 1e-2)
    assert learn.validate()[1] > 0.9
    return learn

class Permuted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x).roll(1, 1)

class Inverted(Permuted):
    def forward(self, x): return self.model(5-3*x)

def new(trained): return learner(net(4), trained.dls)

def everything(learn, teacher):
    "What could be changed by looking"
    return dict(student=state(learn.model), teacher=state(teacher), grads=[None if p.grad is None else p.grad.clone() for p in learn.model.parameters()],
                modes=[m.training for o in (learn.model,teacher) for m in o.modules()], opt=learn.opt, opt_state=deepcopy(learn.opt.state_dict()) if learn.opt else None,
                hypers=deepcopy(learn.opt.hypers) if learn.opt else None, metrics=list(learn.metrics), cbs=list(learn.cbs), keys=set(learn.__dict__), recorder=dict(learn.recorder.__dict__),
                smooth=dict(learn.recorder.smooth_loss.__dict__), hooks=n_hooks(learn.model, teacher), random=random.getstate(), numpy=str(np.random.get_state()), torch=torch.get_rng_state(),
                loaders=[dl.rng.getstate() for dl in learn.dls.loaders])

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b

def kinds(teacher):
    return {'predictions':KnowledgeDistillationCallback(teacher, SoftTarget), 'features':KnowledgeDistillationCallback(teacher, Attention, ['0','1'], ['0','1'], weight=0.9),
            'trained loss':KnowledgeDistillationCallback(teacher, [Match(FitNet, '1', '1'), SoftTarget])}

@pytest.mark.parametrize('kind', ['predictions','features','trained loss'])
@pytest.mark.parametrize('before', ['new','fitted','attached','failed'])
@pytest.mark.parametrize('look', ['check','find'])
def test_looking_changes_nothing(trained, kind, before, look, tmp_path):
    teacher = net(8)
    learn,kd = new(trained),kinds(teacher)[kind]
    if before != 'new': learn.fit(1, 1e-2, cbs=kd)
    if before == 'attached': learn.add_cbs([kd, GradientClip(), MixUp(), CSVLogger(tmp_path/'log.csv')])
    next(learn.model.parameters()).grad = torch.ones(4, 2, 3, 3)
    list(learn.model.modules())[2].eval()
    trained_losses = deepcopy(kd._trained.state_dict()) if kd._trained else None
    found = everything(learn, teacher)
    args = [] if before == 'attached' else [kd]
    if before == 'failed':
        learn.metrics.append(AvgMetric(lambda p, y: 1/0))
        with pytest.raises(ZeroDivisionError): learn.distill_check(kd) if look == 'check' else learn.weight_finder(kd)
        learn.metrics.pop()
    elif look == 'check': learn.distill_check(*args, n=1)
    else: learn.weight_finder(*args, weights=[0.5], lr=1e-1)
    now = everything(learn, teacher)
    for k in found: assert same(found[k], now[k]), k
    assert (kd._trained.state_dict() if kd._trained else None) is None if trained_losses is None else same(trained_losses, kd._trained.state_dict())
    assert not list(tmp_path.iterdir())     # loggers were told that this is a trial

def test_a_fit_after_looking_is_the_fit_without(trained):
    "Bit for bit, with the same shuffles"
    ends = []
    for look in (False, True):
        set_seed(3)
        learn = learner(net(4, dropout=0.2), data(64, 16))
        kd = KnowledgeDistillationCallback(trained, SoftTarget)
        if look: learn.distill_check(kd), learn.weight_finder(kd, weights=[0.3])
        learn.fit(2, 1e-2, cbs=kd)
        ends.append(state(learn.model))
    assert same(*ends)

def test_the_curves_of_a_fit_outlive_the_check(trained):
    learn,kd = new(trained),kinds(net(8))['trained loss']
    learn.fit(2, 1e-2, cbs=kd)
    losses,trained_losses = deepcopy(kd.losses),kd._trained
    def fails(self): raise RuntimeError('stop')
    failing = learner(net(4), learn.dls, cbs=Callback(after_loss=fails))
    for look in (lambda: learn.distill_check(kd, n=1), lambda: new(trained).distill_check(kd, n=1), lambda: learn.weight_finder(kd, weights=[0.5]), lambda: failing.distill_check(kd)):
        with suppress(RuntimeError): look()
        assert kd.losses == losses and kd._trained is trained_losses and kd._student() is learn.model
    assert list(kd.plot_losses(skip_start=0).lines[0].get_ydata()) == losses['task_loss']

def order(dl):
    "The next epoch's batches"
    return [[o.tolist() for o in b] for b in dl]

@pytest.mark.parametrize('kind', ['language model','PyTorch','generator'])
@pytest.mark.parametrize('look', ['check','find'])
def test_loaders_go_on_as_if_nobody_had_looked(texts, trained, kind, look):
    from fastai.basics import DataLoaders
    from torch.utils.data import DataLoader
    def make():
        set_seed(0)
        if kind == 'language model':
            from fastai.text.all import language_model_learner
            dls = language_dls(texts)
            return text_learner(language_model_learner, dls, 6),KnowledgeDistillationCallback(text_learner(language_model_learner, dls, 12), SoftTarget(axis=-1))
        items = [(x,y) for x,y in trained.dls.train_ds][:32]
        gen = torch.Generator().manual_seed(3) if kind == 'generator' else None
        return learner(net(4), DataLoaders(DataLoader(items, 8, shuffle=True, generator=gen), DataLoader(items, 8))),KnowledgeDistillationCallback(net(8))
    ends = []
    for looks in (False,True):
        learn,kd = make()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=kd)
            if looks and look == 'check': learn.distill_check(kd, n=1)
            elif looks: learn.weight_finder(kd, weights=[0.5], n_epoch=2)
            ends.append((order(learn.dls.train), random.random(), np.random.rand(), torch.rand(1).item()))
    assert ends[0] == ends[1]

def test_a_loader_that_is_given_goes_on_as_well(trained):
    learn,dl = new(trained),data(64, 16).train
    state = dl.rng.getstate()
    learn.distill_check(KnowledgeDistillationCallback(trained), dl=dl, n=1)
    assert dl.rng.getstate() == state
    x,y = trained.dls.valid.one_batch()
    check = learn.distill_check(KnowledgeDistillationCallback(trained), dl=[(x,y)], n=1)
    assert check.models.loc['teacher', 'valid_loss'] == pytest.approx(trained.validate()[0])

def test_weight_finder_gives_each_fit_the_same_texts(texts):
    from fastai.text.all import language_model_learner
    dls,seen = language_dls(texts),[]
    learn,teacher = (text_learner(language_model_learner, dls, n) for n in (6,12))
    learn.add_cb(Callback(before_batch=lambda self: seen.append(self.xb[0].tolist()) if self.training else None))
    with learn.no_bar(): learn.weight_finder(KnowledgeDistillationCallback(teacher, SoftTarget(axis=-1)), weights=[0.5,0.9])
    n = len(dls.train)
    assert len(seen) == 3*n and seen[:n] == seen[n:2*n] == seen[2*n:]

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
    assert any('better than the teacher already' in w for w in found)
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
    assert any('other classes' in w for w in other.warnings)
    assert check(data(256, 64), normalised(0.)).data.same.tolist() == ['not known']*3

def test_data_described():
    from fastai.data.transforms import CategoryMap
    from fastai.vision.augment import RandomResizedCrop, Resize
    from fastdistill.teacher import describe_data
    def of(vocab=None, *tfms): return describe_data(SimpleNamespace(vocab=vocab, after_item=SimpleNamespace(fs=list(tfms))))
    assert of() == of(3) == of('ab') == {}
    classes = CategoryMap(['b','a'])
    assert of(classes) == of((['the','of'], classes)) == dict(classes=['a','b'])
    odd = SimpleNamespace(size=lambda: 3)
    assert of(None, Resize(64), odd) == dict(size=(64,64)) and of(None, Resize(64), RandomResizedCrop(32)) == dict(size=(32,32))

def test_the_fit_warns_at_its_first_batch(trained):
    bad = KnowledgeDistillationCallback(Permuted(trained.model), SoftTarget)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        new(trained).fit(2, cbs=bad)
    assert len([w for w in found if 'guessing' in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kd in (KnowledgeDistillationCallback(trained, SoftTarget), KnowledgeDistillationCallback(trained, Attention, '0', '0', weight=0.9)): new(trained).fit(1, cbs=kd)
        new(trained).fit(1, cbs=[bad, MixUp()])          # labels are mixed: cannot be told
        small = data(24, 4)
        learner(net(4), small).fit(1, cbs=bad)           # too few

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

@pytest.mark.parametrize('ignore', [-100,1])
def test_labels_that_are_ignored_and_labels_in_a_column(trained, ignore):
    "What the teacher names right on the validation set is counted among the items that count"
    items = list(trained.dls.train_ds)
    def check(teacher, label, n=256):
        labelled = [(x, label(i, y)) for i,(x,y) in enumerate(items)]
        learn = Learner(loaders(labelled, labelled[:n], 64), net(4), loss_func=CrossEntropyLossFlat(ignore_index=ignore))
        with learn.no_bar(): found = learn.distill_check(KnowledgeDistillationCallback(teacher, SoftTarget), n=1)
        return [w for w in found.warnings if 'names the class' in w]
    def some(i, y): return y if i%4 == 0 else torch.tensor(ignore)
    y = torch.stack([some(i, y) for i,(_,y) in enumerate(items)])
    answers = Permuted(trained.model).eval()(torch.stack([x for x,_ in items])).argmax(1)
    k,n = (answers == y)[y != ignore].sum().item(),(y != ignore).sum().item()
    assert check(trained, some) == []
    assert check(Permuted(trained.model), some)[0].startswith(f'On the validation set the teacher names the class of {k} items of {n},')
    assert check(trained, lambda i, y: y[None]) == []
    assert check(Permuted(trained.model), lambda i, y: y[None])[0].startswith('On the validation set')
    assert check(trained, lambda i, y: torch.tensor(ignore)) == []     # nothing to name

def test_check_of_values_and_of_several_labels():
    "Where nothing has one class, nothing is said of classes"
    items = [(torch.randn(6), torch.rand(3)) for _ in range(32)]
    dls = loaders(items, items, 16)
    for loss,kd in ((F.mse_loss, Logits), (F.binary_cross_entropy_with_logits, MultiLabelSoftTarget)):
        learn = Learner(dls, nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), loss_func=loss)
        with learn.no_bar(): check = learn.distill_check(KnowledgeDistillationCallback(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), kd))
        assert not any('class' in w for w in check.warnings) and 'valid_loss' in check.models

@pytest.mark.parametrize('kind', ['classifier','language model','ensemble'])
def test_check_of_texts(texts, kind):
    "The table has what the teacher's own learner finds, hidden states and all; an ensemble answers in the student's form"
    from fastai.text.all import BaseTokenizer, TextDataLoaders, language_model_learner, text_classifier_learner
    if kind == 'language model': dls,make,loss = language_dls(texts),language_model_learner,SoftTarget(axis=-1)
    else:
        dls = TextDataLoaders.from_df(texts, valid_pct=.25, seed=0, text_col='text', label_col='label', bs=10, seq_len=8, tok_tfm=BaseTokenizer(), num_workers=0, device=torch.device('cpu'))
        make,loss = text_classifier_learner,SoftTarget
    teacher,other,learn = (text_learner(make, dls, n) for n in (12,12,6))
    for m in (teacher.model,other.model):
        for p in m.parameters(): p.data *= 3     # answers that differ from the student's
    with learn.no_bar(), teacher.no_bar():
        check = learn.distill_check(KnowledgeDistillationCallback([teacher,other] if kind == 'ensemble' else teacher, loss), n=1)
        found = {who:check.models.loc[who, ['valid_loss','accuracy']].tolist() for who in ('teacher','student')}
        want = dict(teacher=list(teacher.validate()), student=list(learn.validate()))
        if kind == 'ensemble':     # by hand
            batches = [(sum(m.eval()(x)[0] for m in (teacher.model,other.model))/2, y) for x,y in dls.valid]
            pred,y = (torch.cat(o).as_subclass(torch.Tensor) for o in zip(*batches))
            want['teacher'] = [F.cross_entropy(pred, y).item(), (pred.argmax(1) == y).float().mean().item()]
    assert found['teacher'] == pytest.approx(want['teacher'], rel=1e-4) and found['student'] == pytest.approx(want['student'], rel=1e-4)
    assert found['teacher'] != found['student']

class Answer(dict):
    "As the outputs of Hugging Face's models are: a dictionary with attributes"
    def __getattr__(self, name): return self[name]

class Returns(nn.Module):
    "A model that answers in another form"
    def __init__(self, model, form):
        super().__init__()
        self.model,self.form = model,form
    def forward(self, x): return self.form(self.model(x))

Named = namedtuple('Named', 'logits other')
forms = {'dictionary': (lambda p: Answer(logits=p), lambda out: out.logits), 'attribute': (lambda p: SimpleNamespace(logits=p), lambda out: out.logits), 'tuple': (lambda p: (p,2*p), lambda out: out[0]),
         'named tuple': (lambda p: Named(p, 2*p), lambda out: out.logits), 'second head': (lambda p: (p,2*p), lambda out: out[1])}

@pytest.mark.parametrize('form,teacher_too', [(f, True) for f in forms] + [('dictionary',False), ('attribute',False), ('tuple',False), ('named tuple',False)])
def test_check_where_loss_and_metrics_take_what_the_model_returns(trained, form, teacher_too):
    make,take = forms[form]
    learn = Learner(trained.dls, Returns(net(4), make), loss_func=lambda out, y: F.cross_entropy(take(out), y), metrics=AvgMetric(lambda out, y: (take(out).argmax(1) == y).float().mean()))
    teacher = Returns(trained.model, make) if teacher_too else trained.model
    with learn.no_bar(): check = learn.distill_check(KnowledgeDistillationCallback(teacher, SoftTarget), n=1)
    loss,right = trained.validate()
    if form == 'second head': loss = F.cross_entropy(2*trained.get_preds(act=noop)[0], trained.get_preds()[1]).item()
    assert check.models.iloc[0, 3:].tolist() == pytest.approx([loss, right], rel=1e-4) and check.warnings == []

def test_check_of_a_teacher_without_parameters():
    "As a formula is"
    items = [(torch.randn(6), torch.tensor(i%3)) for i in range(64)]
    class Formula(nn.Module):
        def forward(self, x): return x[:,:3] - x[:,3:]
    learn = learner(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), loaders(items, items, 16))
    check = learn.distill_check(KnowledgeDistillationCallback(Formula(), SoftTarget), n=1)
    x,y = learn.dls.valid.one_batch()
    assert check.models.loc['teacher', ['parameters','valid_loss']].tolist() == pytest.approx([0, F.cross_entropy(Formula()(x), y).item()])

# layers

def test_match_layers_of_torchvision():
    from fastai.vision.all import create_vision_model, mobilenet_v3_small, resnet18, resnet34
    x = torch.randn(2, 3, 64, 64)
    student,teacher = resnet18(num_classes=2),create_vision_model(resnet34, 2, pretrained=False)
    teacher.train()
    before = state(teacher)
    pairs = match_layers(student, teacher, x)
    assert list(pairs) == [['layer1','layer2','layer3','layer4'],['0.4','0.5','0.6','0.7']] and set(pairs.table.channels) == {'same'}
    assert same_state(teacher, before) and all(m.training for m in teacher.modules()) and n_hooks(student, teacher) == 0
    table = match_layers(mobilenet_v3_small(num_classes=2), teacher, x).table
    assert table['teacher layer'].tolist() == ['0.4','0.5','0.6','0.7'] and set(table.channels) == {'need a projector'}
    assert [a[1:] for a in table['shape']] == [b[1:] for b in table['shape ']]     # the same resolution
    for choices in table['or of the teacher']: assert set(choices.split(', ')) <= set(get_model_layers(teacher))

def test_match_layers_feeds_the_callback(trained):
    learn = new(trained)
    x = learn.dls.one_batch()[0]
    learn.fit(1, cbs=KnowledgeDistillationCallback(trained, Attention, *match_layers(learn, trained, x), weight=0.9))
    half = Teacher(trained, input_tfm=lambda x: x)
    assert list(match_layers(learn, half, x)) == [['0','1'],['0','1']]

def test_match_layers_of_transformers():
    "Blocks at the same share of the depth"
    transformers = pytest.importorskip('transformers')
    def vit(n, width): return transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=width, num_hidden_layers=n, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16))
    s,t = match_layers(vit(2, 8), vit(6, 16), torch.randn(1, 3, 32, 32))
    assert [n[-1] for n in s] == ['0','1'] and [n[-1] for n in t] == ['2','5']

def swin(n=1):
    from torchvision.models import SwinTransformer
    return SwinTransformer(patch_size=[4,4], embed_dim=16, depths=[n]*3, num_heads=[1]*3, window_size=[4,4], num_classes=3)

def test_maps_with_the_channels_last_are_not_paired():
    "Swin's stages are (B, H, W, C): with 16 channels at 16×16 the shape alone would not tell"
    from torchvision.models import resnet18
    x,student,teacher = torch.randn(2, 3, 64, 64),resnet18(num_classes=3),swin()
    assert layer_shapes(teacher, x).set_index('layer')['shape']['features.1'] == (2,16,16,16)
    before = state(teacher)
    with pytest.raises(ValueError, match=r"go together.* layers of the teacher, 'features.0' among them, are left out: they return \(B, H, W, C\)"): match_layers(student, teacher, x)
    with pytest.raises(ValueError, match=r"layers of the student.*are left out"): match_layers(teacher, student, x)
    with pytest.raises(ValueError, match=r"layers of the student.*layers of the teacher"): match_layers(teacher, swin(2), x)
    assert same_state(teacher, before) and n_hooks(student, teacher) == 0 and all(m.training for m in teacher.modules())

class Stages(nn.Module):
    "Stages that halve the image; `last`: the first of them returns (B, H, W, C), which the next takes"
    def __init__(self, width, last=False, size=None):
        super().__init__()
        self.convs,self.last,self.size = nn.ModuleList(nn.Sequential(nn.Conv2d(i, width, 3, 2, 1), nn.ReLU()) for i in (3,width,width)),last,size
        if last: self.convs[0].append(Permute(0, 2, 3, 1)), self.convs[1].insert(0, Permute(0, 3, 1, 2))
        self.fc = nn.Linear(width, 3)
    def forward(self, x):
        if self.size and x.shape[-1] != self.size: raise ValueError('another size')
        for c in self.convs: x = c(x)
        return self.fc(x.mean((2,3)))

class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims
    def forward(self, x): return x.permute(self.dims)

def test_match_layers_tells_by_evidence():
    x = torch.randn(2, 3, 32, 32)
    convs = [f'convs.{i}' for i in range(3)]
    pairs = match_layers(Stages(4), Stages(16), x)
    assert list(pairs) == [convs,convs] and not pairs.notes
    pairs = match_layers(Stages(4), Stages(16, last=True), x)     # 16 channels at 16×16
    assert list(pairs) == [convs[1:]]*2 and 'left out: they return (B, H, W, C)' in repr(pairs) and "'convs.0' among them" in pairs._repr_html_().replace('&#x27;', "'")
    with pytest.raises(ValueError, match='cannot be told'): match_layers(Stages(4), Stages(16, size=32), x)
    with pytest.raises(ValueError, match='cannot be told'): match_layers(Stages(4, size=32), Stages(16), x)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(256, 3))     # for one size, which the last layer finds
    assert list(match_layers(flat, Stages(16), x)) == [['0','1'],convs[:2]]

def test_maps_are_not_paired_with_sequences():
    from torchvision.models import VisionTransformer, resnet18
    vit = VisionTransformer(image_size=64, patch_size=8, num_layers=2, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=3)
    x,cnn = torch.randn(2, 3, 64, 64),resnet18(num_classes=3)
    for s,t in ((cnn,vit),(vit,cnn)):
        with pytest.raises(ValueError, match='the same kind of features, maps or sequences'): match_layers(s, t, x)
    assert len(match_layers(vit, vit, x).table) == 2

def test_layer_shapes_against_hooks_of_fastai():
    from fastai.callback.hook import hook_outputs
    model,x = nn.Sequential(*list(net().children())[:2]),torch.randn(2, 2, 64, 64)
    table = layer_shapes(model, x)
    with hook_outputs([get_layer(model, n) for n in table.layer], detach=False) as hooks:
        model(x)
        assert table['shape'].tolist() == [tuple(o.shape) for o in hooks.stored]
    leaves = table[~table.block]
    assert leaves.depth.tolist() == pytest.approx([i/6 for i in range(1, 7)]) and table.set_index('layer').depth[['0','1']].tolist() == [0.5,1]

# weight_finder

def test_weight_finder_against_fits_by_hand(trained):
    "Each row is what a fit of a fresh copy ends with"
    set_seed(0)
    model = net(4)
    learn = learner(deepcopy(model), data(64, 16))
    found = learn.weight_finder(KnowledgeDistillationCallback(trained, SoftTarget), weights=[0.8], temperatures=[2], n_epoch=2, lr=1e-2, seeds=2)
    assert found.table.weight.tolist() == [0,0,.8,.8] and found.table.seed.tolist() == [0,1,0,1]
    for row in found.table.itertuples():
        other = learner(deepcopy(model), data(64, 16))
        for dl in other.dls.loaders: dl.rng = random.Random(row.seed)
        set_seed(row.seed)
        other.fit_one_cycle(2, 1e-2, cbs=KnowledgeDistillationCallback(trained, SoftTarget(T=2), weight=0.8) if row.weight else [])
        assert list(other.recorder.values[-1][1:3]) == pytest.approx([row.valid_loss, row.accuracy], abs=1e-6)
    assert len(found.means) == 2 and set(found.means) == {'weight','T','mean','std'}

def test_weight_finder_suggests_the_best(trained):
    from fastdistill.check import WeightSearch
    def search(monitor, *values): return WeightSearch(pd.DataFrame([{'weight':w, 'T':t, 'seed':s, monitor:v} for w,t,s,v in values]), monitor)
    rows = (0.,None,0,.6),(0.,None,1,.8),(.3,1,0,.5),(.3,1,1,.7),(.3,4,0,.9),(.3,4,1,.8)
    assert search('accuracy', *rows).suggestion == dict(weight=.3, T=4)
    assert search('error_rate', *rows).suggestion == dict(weight=.3, T=1)
    alone = search('accuracy', *rows[:4])
    assert alone.suggestion == dict(weight=0) and 'No weight is better' in repr(alone) and '2 seeds' in alone._repr_html_()
    assert len(search('accuracy', *rows).plot().lines) == 2*2+1

def test_less_is_better_for_some_metrics():
    "Each of fastai's metrics is judged the right way; where a name does not tell, `valid_loss` decides or the user says"
    from fastai import metrics as M
    from fastdistill.check import WeightSearch, _of_models
    less = {'_rmse','_exp_rmspe','perplexity','error_rate','brier_score_loss','hamming_loss','mse','mae','msle'}
    made = [M.rmse, M.exp_rmspe, M.Perplexity(), M.accuracy, M.error_rate, M.top_k_accuracy, M.BrierScore(), M.F1Score(), M.HammingLoss(), M.RocAuc(), M.MatthewsCorrCoef(), M.mse, M.mae,
            M.msle, M.ExplainedVariance(), M.R2Score(), M.PearsonCorrCoef(), M.SpearmanCorrCoef(), M.foreground_acc, M.Dice(), M.DiceMulti(), M.JaccardCoeff(), M.CorpusBLEUMetric()]
    names = Learner(data(), net(), loss_func=F.cross_entropy, metrics=made).metrics.attrgot('name')
    assert less <= set(names) and len(names) == 23
    for name in names:
        found = WeightSearch(pd.DataFrame({'weight':[0.,.3,.6], 'seed':0, name:[2.,1.,3.]}), name)
        assert found.suggestion == dict(weight=.3 if name in less else .6), name
        def check(teacher, student): return _of_models(pd.DataFrame({'valid_loss':[1.,1.], name:[teacher,student]}, index=['teacher','student']), (0,0,0))
        assert bool(check(2., 1.)) == (name in less) == (not check(1., 2.)), name

def regression():
    "A sound teacher of a sum, data, and a metric: the mean absolute error under a name"
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    items = list(zip(x, x.sum(1, keepdim=True)))
    teacher = nn.Linear(4, 1, bias=False)
    nn.init.ones_(teacher.weight)
    def student(metric): return Learner(loaders(items, items, 16), nn.Linear(4, 1), loss_func=nn.MSELoss(), metrics=metric)
    return teacher,student

def deviation(pred, y): return (pred - y).abs().mean()

@pytest.mark.parametrize('metric,kw,monitor', [('mae', {}, 'mae'), ('rmse', {}, '_rmse'), (deviation, {}, 'valid_loss'), (deviation, dict(comp=np.less), 'deviation')])
def test_metrics_where_less_is_better(metric, kw, monitor):
    from fastai import metrics as M
    teacher,student = regression()
    learn,kd = student(getattr(M, metric) if isinstance(metric, str) else metric),KnowledgeDistillationCallback(teacher, nn.MSELoss())
    with learn.no_bar():
        assert not any('better than the teacher' in w for w in learn.distill_check(kd, n=1, **kw).warnings)
        found = learn.weight_finder(kd, weights=[0.5,1.], lr=0.1, **kw)
    assert found.monitor == monitor
    assert found.suggestion['weight'] == found.table.weight[found.table[monitor].argmin()]
    if not kw and callable(metric):
        with pytest.raises(ValueError, match="comp=np.less or comp=np.greater: the name 'deviation'"): learn.weight_finder(kd, monitor='deviation')

def test_comp_says_which_student_is_better():
    teacher,student = regression()
    learn,kd = student(deviation),KnowledgeDistillationCallback(nn.Linear(4, 1), nn.MSELoss())
    nn.init.ones_(learn.model.weight), nn.init.zeros_(learn.model.bias)
    with learn.no_bar():
        assert any('valid_loss' in w for w in learn.distill_check(kd, n=1).warnings)
        assert any('better than the teacher already (deviation' in w for w in learn.distill_check(kd, n=1, comp=np.less).warnings)
        assert not any('better than the teacher' in w for w in learn.distill_check(kd, n=1, comp=np.greater).warnings)

def test_weight_finder_mistakes(trained):
    learn,kd = new(trained),KnowledgeDistillationCallback(trained, Logits)
    with pytest.raises(ValueError, match='no temperature'): learn.weight_finder(kd, temperatures=[2])
    with pytest.raises(ValueError, match="one of train_loss, valid_loss, accuracy, but got 'f1'"): learn.weight_finder(kd, monitor='f1')

# the parts of the loss

def test_losses_of_each_batch(trained):
    learn = new(trained)
    kd = KnowledgeDistillationCallback(trained, [SoftTarget, Match(Attention, '0', '0', weight=5), Match(Attention, '1', '1')], weight=0.4)
    seen = []
    learn.fit(2, 1e-2, cbs=[kd, Callback(before_backward=lambda self: seen.append(self.learn.loss.item()))])
    assert list(kd.losses) == ['task_loss','kd_loss','SoftTarget','Attention 1','Attention 2'] and {len(v) for v in kd.losses.values()} == {8} == {len(learn.recorder.losses)}
    assert [.6*t + .4*k for t,k in zip(kd.losses['task_loss'], kd.losses['kd_loss'])] == pytest.approx([l.item() for l in learn.recorder.losses], rel=1e-4)
    assert [sum(o) for o in zip(*list(kd.losses.values())[2:])] == pytest.approx(kd.losses['kd_loss'], rel=1e-4)
    beta,mean = 0.98,0.     # smoothed as fastai does, by hand
    for i,l in enumerate(seen): mean = beta*mean + (1-beta)*l
    assert learn.recorder.losses[-1].item() == pytest.approx(mean/(1-beta**8), rel=1e-4)
    lines = {l.get_label():l.get_ydata() for l in kd.plot_losses(skip_start=0).lines}
    assert list(lines) == list(kd.losses) and list(lines['kd_loss']) == kd.losses['kd_loss']
    learn.fit(1, 1e-2, cbs=kd)
    assert len(kd.losses['kd_loss']) == 4     # of the last fit

def test_schedule_is_drawn_as_it_runs(trained):
    kd,seen = KnowledgeDistillationCallback(trained, SoftTarget, weight=SchedCos(0.1, .9)),[]
    new(trained).fit(4, cbs=[kd, Callback(before_batch=lambda self: seen.append((self.pct_train, *self.knowledge_distillation.weights)))])
    w,tw = (l.get_xydata() for l in kd.plot_schedule().lines)
    for pct,a,b in seen: assert (a, b) == pytest.approx((np.interp(pct, *w.T), np.interp(pct, *tw.T)), abs=1e-3)

def test_live_graph(trained):
    "What the bar of a notebook gets"
    drawn = []
    class Bar:
        hide_graph,names = False,['train','valid']
        def update_graph(self, *args): drawn.append((list(self.names), *args))
    def fit(*cbs):
        learn = new(trained)
        if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
        learn.progress = SimpleNamespace(mbar=Bar())
        with learn.no_logging(): Learner.fit(learn, 2, cbs=[ShowDistillationGraph(), *cbs])
    fit(KnowledgeDistillationCallback(trained, SoftTarget))
    assert [names for names,*_ in drawn] == [['train','valid','task','kd']]*2
    (_,lines,(x0,x1),(y0,y1)) = drawn[-1]
    assert [len(y) for _,y in lines] == [8,2,8,8] and (x0,x1,y0) == (0,8,0) and y1 == max(max(y) for _,y in lines)
    with pytest.raises(ValueError, match='beside ShowDistillationGraph'): fit()

# several processes

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

def test_parts_that_a_fit_replaces_come_back(trained):
    "As `distrib_ctx` replaces batch norm by its synchronised version"
    from fastdistill.check import untouched
    learn = new(trained)
    parts = list(learn.model.named_modules())
    with untouched(learn): learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    assert list(learn.model.named_modules()) == parts
    buffers = list(learn.model.buffers())
    with untouched(learn): learn.model[0][1].running_mean = torch.ones(4)
    assert all(a is b for a,b in zip(learn.model.buffers(), buffers))
