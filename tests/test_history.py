"The parts of the loss: recorded at each batch, drawn as curves."
from types import SimpleNamespace
import numpy as np, pytest
from fastai.basics import Callback, Learner
from fastai.callback.schedule import SchedCos
from conftest import learner, net
from fastdistill.all import *

def new(trained): return learner(net(4), trained.dls)

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
    with pytest.raises(ValueError, match='Expected ShowDistillationGraph with a'): fit()
