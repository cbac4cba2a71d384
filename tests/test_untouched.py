"Looking changes nothing: weights, callbacks, loaders and random states are as they were."
import random
from contextlib import suppress
from copy import deepcopy
import numpy as np, pytest, torch
from fastai.basics import AvgMetric, Callback, DataLoaders, set_seed
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientClip
from torch import nn
from conftest import data, learner, n_hooks, net, same_state, state
from test_applications import language_dls, text_learner, texts
from fastdistill.all import *
from fastdistill.untouched import untouched

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
    trained_losses = None if kd.trained.losses is None else state(kd.trained.losses)
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
    assert kd.trained.losses is None if trained_losses is None else same_state(kd.trained.losses, trained_losses)
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
    losses,trained_losses = deepcopy(kd.losses),kd.trained
    def fails(self): raise RuntimeError('stop')
    failing = learner(net(4), learn.dls, cbs=Callback(after_loss=fails))
    for look in (lambda: learn.distill_check(kd, n=1), lambda: new(trained).distill_check(kd, n=1), lambda: learn.weight_finder(kd, weights=[0.5]), lambda: failing.distill_check(kd)):
        with suppress(RuntimeError): look()
        assert kd.losses == losses and kd.trained is trained_losses and kd.trained.belongs_to(learn.model)
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

def test_parts_that_a_fit_replaces_come_back(trained):
    "As `distrib_ctx` replaces batch norm by its synchronised version"
    learn = new(trained)
    parts = list(learn.model.named_modules())
    with untouched(learn): learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)
    assert list(learn.model.named_modules()) == parts
    buffers = list(learn.model.buffers())
    with untouched(learn): learn.model[0][1].running_mean = torch.ones(4)
    assert all(a is b for a,b in zip(learn.model.buffers(), buffers))
