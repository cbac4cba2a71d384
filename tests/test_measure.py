"The teacher by the student's loss and metrics, whatever the models return."
from collections import namedtuple
from types import SimpleNamespace
import pytest, torch
from fastai.basics import AvgMetric, CrossEntropyLossFlat, Learner, noop
from torch import nn
from torch.nn import functional as F
from conftest import learner, loaders, net
from test_applications import language_dls, text_learner, texts
from fastdistill.all import *

class Permuted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x).roll(1, 1)

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
