"What a fit warns of at its first batch: each concern once on a batch that deserves it, and none on a sound one."
import warnings
from types import SimpleNamespace
import pytest, torch
from fastai.callback.mixup import MixUp
from conftest import data, learner, net
from test_measure import Permuted
from fastdistill import concerns
from fastdistill.all import *
from fastdistill.teachers import Teachers

def new(trained): return learner(net(4), trained.dls)

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

def test_a_concern_is_asked_in_a_fit_and_in_the_check(trained, monkeypatch):
    "As soon as it is decorated, and nowhere else"
    monkeypatch.setattr(concerns, 'all_concerns', dict(concerns.all_concerns))
    asked = []
    @concerns.concern
    def never_content(batch):
        asked.append(tuple(batch.answer.shape))
        return ['This batch is too blue.']
    kd = KnowledgeDistillationCallback(trained, SoftTarget)
    with pytest.warns(UserWarning, match='too blue'): new(trained).fit(2, cbs=kd)
    assert asked == [(64,3)]
    assert 'This batch is too blue.' in new(trained).distill_check(kd, n=1).warnings
    new(trained).lr_find(num_it=8, show_plot=False)
    assert len(asked) == 2

def test_a_concern_that_fails_does_not_stop_the_fit(trained, monkeypatch):
    monkeypatch.setattr(concerns, 'all_concerns', dict(concerns.all_concerns))
    @concerns.concern
    def breaks(batch): raise RuntimeError('boom')
    learn = new(trained)
    with pytest.warns(UserWarning, match='`breaks` cannot look at this batch: RuntimeError: boom'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(trained, SoftTarget))
    assert len(learn.recorder.values) == 1

@pytest.mark.parametrize('shape', [(),(5,),(5,2,2)])
def test_answers_of_any_shape_can_be_looked_at(shape):
    "Values, one logit an item, maps of logits"
    answer,losses = torch.rand(20, *shape),[SoftTarget, DecoupledKD, Logits] if shape else [Logits]     # others refuse values
    objective = KnowledgeDistillationCallback(net(4), losses).objective
    for y in (torch.rand(20, *shape), torch.zeros(20).long(), torch.zeros(20, 2, 2).long(), ('a','b')):
        learn = SimpleNamespace(dls=None, cbs=[], loss_func=None)
        teachers = Teachers(objective.terms, Teacher(net(4)))
        batch = SimpleNamespace(learn=learn, teachers=teachers, yb=(y,), answers=[answer], pred=answer,
                                objective=objective, features=[([answer], [answer])]*len(losses))
        texts = concerns.concerns(batch)
        assert not [t for t in texts if 'cannot look' in t], texts
