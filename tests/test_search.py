"A weight and a temperature by short fits, judged by a metric."
import random
from copy import deepcopy
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.basics import accuracy, Callback, Learner, set_seed
from fastai.callback.tracker import TerminateOnNaNCallback
from torch import nn
from torch.nn import functional as F
from conftest import data, learner, loaders, net
from test_applications import language_dls, text_learner, texts
from fastdistill.all import *
from fastdistill.check import weak_teacher
from fastdistill.measure import comp_for
from fastdistill.search import WeightSearch

def new(trained): return learner(net(4), trained.dls)

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

def test_weight_finder_gives_each_fit_the_same_texts(texts):
    from fastai.text.all import language_model_learner
    dls,seen = language_dls(texts),[]
    learn,teacher = (text_learner(language_model_learner, dls, n) for n in (6,12))
    learn.add_cb(Callback(before_batch=lambda self: seen.append(self.xb[0].tolist()) if self.training else None))
    with learn.no_bar(): learn.weight_finder(KnowledgeDistillationCallback(teacher, SoftTarget(axis=-1)), weights=[0.5,0.9])
    n = len(dls.train)
    assert len(seen) == 3*n and seen[:n] == seen[n:2*n] == seen[2*n:]

def test_weight_finder_suggests_the_best(trained):
    def search(monitor, *values): return WeightSearch(pd.DataFrame([{'weight':w, 'T':t, 'seed':s, monitor:v} for w,t,s,v in values]), monitor)
    rows = (0.,None,0,.6),(0.,None,1,.8),(.3,1,0,.5),(.3,1,1,.7),(.3,4,0,.9),(.3,4,1,.8)
    assert search('accuracy', *rows).suggestion == dict(weight=.3, T=4)
    assert search('error_rate', *rows).suggestion == dict(weight=.3, T=1)
    alone = search('accuracy', *rows[:4])
    assert alone.suggestion == dict(weight=0) and 'No weight is better' in repr(alone) and '2 seeds' in alone._repr_html_()
    assert len(search('accuracy', *rows).plot().lines) == 2*2+1

def test_weight_finder_says_if_the_best_weight_is_at_an_end():
    def text(*accuracies):
        weights = [0.,.1,.3,.9][:len(accuracies)]
        return repr(WeightSearch(pd.DataFrame({'weight':weights, 'seed':0, 'accuracy':accuracies}), 'accuracy'))
    assert 'No weight between 0 and this one was tried' in text(.5,.8,.7,.6)
    assert 'No larger weight was tried' in text(.5,.6,.7,.8)
    for between in (text(.5,.6,.8,.7), text(.9,.6,.8,.7), text(.5,.6)): assert 'was tried' not in between

def test_a_weight_with_which_a_fit_diverged_is_never_the_best():
    "pandas would leave NaN out of a mean, so that one good seed of two would do"
    def search(*losses): return WeightSearch(pd.DataFrame(dict(weight=[0.,0.,.5,.5], seed=[0,1,0,1], valid_loss=losses)), 'valid_loss')
    one = search(1., 1.2, np.nan, .5)
    assert one.suggestion == dict(weight=0) and one.means['mean'].isna().tolist() == [False,True]
    assert '1 of 4 fits ended with nan as valid_loss' in repr(one)
    every = search(*[np.nan]*4)
    assert '4 of 4 fits ended with nan' in repr(every) and '4 of 4' in every._repr_html_()
    with pytest.raises(ValueError, match='No weight can be suggested: 4 of 4 fits'): every.suggestion
    assert 'Best' not in repr(search(np.nan, 1., .5, np.nan))     # no weight has all its seeds
    for found in (one, every): plt.close(found.plot().figure)

@pytest.mark.parametrize('n_epoch, first', [(1,0),(2,1)], ids=['first epoch','second epoch'])
def test_weight_finder_goes_on_where_a_fit_ends_because_it_diverged(trained, n_epoch, first):
    "`TerminateOnNaNCallback` ends such a fit, before its first row or after it"
    def break_at(self):
        kd = getattr(self.learn, 'knowledge_distillation', None)
        if self.training and self.epoch == first and kd.weight == .9: self.learn.loss_grad = self.learn.loss = self.loss*np.nan
    learn = Learner(data(), net(), loss_func=F.cross_entropy, metrics=accuracy, cbs=[TerminateOnNaNCallback(), Callback(before_backward=break_at)])
    with learn.no_bar(): found = learn.weight_finder(KnowledgeDistillationCallback(trained), weights=[.5,.9], n_epoch=n_epoch)
    assert found.table.accuracy.isna().tolist() == [False,False,True] and '1 of 3 fits ended with nan' in repr(found)

def test_weight_finder_goes_on_after_a_weight_that_is_too_large(trained):
    "A loss that overflows ends its fit with an error, and the other weights are still tried; an error of all weights is raised"
    def overflows(s, t): return (s-t).square().mean() * (np.inf if over(trying[0]) else 1)
    trying = [0.]
    def note(self): trying[0] = getattr(getattr(self.learn, 'knowledge_distillation', None), 'weight', 0.)
    learn = learner(net(), data(), cbs=Callback(before_fit=note))
    over = lambda weight: weight == .9
    found = learn.weight_finder(KnowledgeDistillationCallback(trained, overflows), weights=[.5,.9])
    assert found.table.accuracy.isna().tolist() == [False,False,True] and '1 of 3 fits ended with nan' in repr(found)
    assert len(learn.weight_finder(KnowledgeDistillationCallback(trained, overflows), weights=[]).table) == 1
    over = lambda weight: True
    with pytest.raises(ValueError, match='overflows is inf'): learn.weight_finder(KnowledgeDistillationCallback(trained, overflows), weights=[.5,.9])

def test_a_weight_search_that_is_stopped_shows_what_it_found(trained, capsys):
    def stop(self):
        if getattr(getattr(self.learn, 'knowledge_distillation', None), 'weight', 0) == .9: raise KeyboardInterrupt
    learn = learner(net(), data(), cbs=Callback(before_epoch=stop))
    before = deepcopy(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt): learn.weight_finder(KnowledgeDistillationCallback(trained), weights=[.5,.9])
    out = capsys.readouterr().out
    assert 'Stopped after 2 of 3 fits.' in out and '0.5' in out and 'by accuracy' in out
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_weights_of_other_magnitudes_are_drawn_on_a_log_scale():
    for weights,scale in (([0.,.1,.9],'linear'), ([0.,1.,30.],'log'), ([0.],'linear')):
        ax = WeightSearch(pd.DataFrame(dict(weight=weights, seed=0, accuracy=.5)), 'accuracy').plot()
        assert ax.get_xscale() == scale
        plt.close(ax.figure)

def test_less_is_better_for_some_metrics():
    "Each of fastai's metrics is judged the right way; where a name does not tell, `valid_loss` decides or the user says"
    from fastai import metrics as M
    less = {'_rmse','_exp_rmspe','perplexity','error_rate','brier_score_loss','hamming_loss','mse','mae','msle'}
    made = [M.rmse, M.exp_rmspe, M.Perplexity(), M.accuracy, M.error_rate, M.top_k_accuracy, M.BrierScore(), M.F1Score(), M.HammingLoss(), M.RocAuc(), M.MatthewsCorrCoef(), M.mse, M.mae,
            M.msle, M.ExplainedVariance(), M.R2Score(), M.PearsonCorrCoef(), M.SpearmanCorrCoef(), M.foreground_acc, M.Dice(), M.DiceMulti(), M.JaccardCoeff(), M.CorpusBLEUMetric()]
    names = Learner(data(), net(), loss_func=F.cross_entropy, metrics=made).metrics.attrgot('name')
    assert less <= set(names) and len(names) == 23
    for name in names:
        assert comp_for(name) is (np.less if name in less else np.greater), name
        found = WeightSearch(pd.DataFrame({'weight':[0.,.3,.6], 'seed':0, name:[2.,1.,3.]}), name)
        assert found.suggestion == dict(weight=.3 if name in less else .6), name
        def check(teacher, student): return weak_teacher(pd.DataFrame({'valid_loss':[1.,1.], name:[teacher,student]}, index=['teacher','student']), (0,0,0))
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
        assert any('already better than the teacher (deviation' in w for w in learn.distill_check(kd, n=1, comp=np.less).warnings)
        assert not any('better than the teacher' in w for w in learn.distill_check(kd, n=1, comp=np.greater).warnings)

def test_weight_finder_mistakes(trained):
    learn,kd = new(trained),KnowledgeDistillationCallback(trained, Logits)
    with pytest.raises(ValueError, match='Expected a loss with a temperature'): learn.weight_finder(kd, temperatures=[2])
    with pytest.raises(ValueError, match="one of train_loss, valid_loss, accuracy, but got 'f1'"): learn.weight_finder(kd, monitor='f1')
