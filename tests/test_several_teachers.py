"A teacher for each term: each is asked once a batch in its own way, a step is the one by hand, all are left as found."
import pickle
from types import SimpleNamespace
from copy import copy, deepcopy
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback, load_learner, set_seed
from fastai.callback.mixup import MixUp
from torch import nn
from conftest import data, learner, loaders, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.in_use import networks_in_use
from fastdistill.losses.projected import Projected
from fastdistill.objective import Objective
from recording_helpers import cnn, images, refuses, SameBatches
from test_measure import Permuted
from test_callback import close, exportable, Gradients, one_batch

KD = KnowledgeDistillationCallback

class Counted(nn.Module):
    "Counts its forward passes, of which each has to be in evaluation mode and without gradients"
    def __init__(self, model):
        super().__init__()
        self.model,self.n = model,0
    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.n += 1
        return self.model(x)

class Part(Callback):
    "A part of the batch, at each step"
    def __init__(self, f): self.f,self.seen = f,[]
    def before_backward(self): self.seen.append(self.f(self.knowledge_distillation.batch))

def outputs(model, layers, x):
    "What some layers return, and the logits last: a plain loop over a `Sequential`"
    found = {}
    for i,m in enumerate(model):
        x = m(x)
        if str(i) in layers: found[str(i)] = x
    return [found[l] for l in layers] + [x]

def as_found(*models):
    "Call it before a fit; what it returns asserts that the networks are the same after it"
    before = [(state(m), [p.training for p in m.modules()]) for m in models]
    def check():
        for m,(weights,modes) in zip(models, before):
            assert same_state(m, weights) and [p.training for p in m.modules()] == modes and n_hooks(m) == 0
            assert all(p.grad is None for p in m.parameters())
        assert not networks_in_use()
    return check

# --- a step is the one by hand ---

def test_a_step_equals_hand_computed():
    "Two teachers with inputs of their own, features of each through projectors, and predictions of a third"
    a,b,c,model = (net(n).double() for n in (8,6,5,4))
    x,y = one_batch().train.one_batch()
    x = x.double()
    dls = loaders(list(zip(x, y)), list(zip(x, y)), 16, shuffle=False)
    ta,tb,g,hand = Teacher(a, input_tfm=lambda x: 2-x),Teacher(b, input_tfm=lambda x: x.flip(-1)),Gradients(),deepcopy(model).train()
    terms = [Match(nn.MSELoss(), ['0','1'], ['0','1'], 2., projector=True, teacher=ta), Match(SoftTarget(T=3)),
             Match(Similarity, '1', '1', teacher=tb), Match(nn.MSELoss(), '0', '0', .5, projector=True, teacher=tb)]
    kd,built,check = KD(c, terms, weight=.7),[],as_found(a, b, c)
    def keep(batch): built.append(deepcopy(batch.trained.for_batch(terms, batch.features, batch.learn.model)))
    learner(model, dls, cbs=g).fit(1, cbs=[kd, Part(keep)])
    check()
    ea,eb,ec = (deepcopy(m).eval() for m in (a,b,c))
    s0,s1,pred = outputs(hand, ['0','1'], x)
    with torch.no_grad(): (a0,a1,_),(b0,b1,_),t = outputs(ea, ['0','1'], 2-x),outputs(eb, ['0','1'], x.flip(-1)),ec(x)
    def mse(p, s, t): return (p.projector.double()(s) - t).square().mean()
    first,_,_,last = built[0]
    soft = 9*F.kl_div(F.log_softmax(pred/3, 1), F.softmax(t/3, 1), reduction='batchmean')
    def gram(f): return F.normalize(f.flatten(1) @ f.flatten(1).T)
    similarity = (gram(s1) - gram(b1)).square().sum()/len(x)**2
    kd_loss = 2*(mse(first[0], s0, a0) + mse(first[1], s1, a1)) + soft + similarity + .5*mse(last[0], s0, b0)
    (.3*F.cross_entropy(pred, y) + .7*kd_loss).backward()
    assert kd.losses['kd_loss'][0] == pytest.approx(kd_loss.item(), rel=1e-6)
    for got,p in zip(g.steps[0], hand.parameters()): torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-7)

def test_without_a_teacher_of_the_callback():
    "Predictions of two teachers, with weights: as those of one after the other"
    a,b,model,dls,g = net(8),net(6),net(),one_batch(),Gradients()
    x,y = dls.train.one_batch()
    hand = deepcopy(model).train()
    kd = KD(None, [Match(Logits, weight=3, teacher=a), Match(Logits, teacher=b)], weight=1, task_weight=1)
    learner(model, dls, cbs=g).fit(1, cbs=kd)
    pred = hand(x)
    with torch.no_grad(): ta,tb = deepcopy(a).eval()(x),deepcopy(b).eval()(x)
    (F.cross_entropy(pred, y) + 3*F.mse_loss(pred, ta) + F.mse_loss(pred, tb)).backward()
    close(g.steps[0], [p.grad for p in hand.parameters()])
    assert kd.teacher is None and repr(kd.objective) == '1 * task_loss + 1 * (3 * Logits() from Sequential + Logits() from Sequential)'
    assert kd.objective.names == ['Logits from Sequential 1','Logits from Sequential 2']

def test_a_term_that_names_the_callbacks_own_teacher_changes_nothing():
    ends = []
    for named in (None,'net','teacher'):
        set_seed(1)
        own = net(8)
        teacher = Teacher(own)
        m = Match(FitNet, '0', '0', teacher={None:None, 'net':own, 'teacher':teacher}[named])
        learn = learner(net())
        learn.fit(2, cbs=KD(teacher, [SoftTarget,m]))
        ends.append(state(learn.model))
    assert all(torch.equal(v, o[k]) for o in ends[1:] for k,v in ends[0].items())

@pytest.mark.parametrize('dtype', [None,torch.bfloat16])
def test_each_in_its_own_precision(dtype):
    a,b = net(8),net(8)
    part = Part(lambda batch: [t[0].dtype for _,t in batch.features])
    learner().fit(1, cbs=[KD(a, [Match(FitNet, '1', '1'), Match(FitNet, '1', '1', teacher=Teacher(b, dtype=dtype, channels_last=True))]), part])
    assert part.seen[0] == [torch.float32, dtype or torch.float32] and b[0][0].weight.is_contiguous()

# --- once a batch ---

def test_each_is_asked_once_a_batch():
    a,b = Counted(net(8)),Counted(net(6))
    ta,twice = Teacher(a, input_tfm=lambda x: x),Teacher(b, dtype=torch.float32)
    terms = [SoftTarget, Match(Attention, '0', 'model.0', teacher=ta), Match(SoftTarget(T=2), teacher=ta),
             Match(Attention, '1', 'model.1', teacher=b), Match(Logits, teacher=b), Match(Logits, teacher=twice)]
    learner().fit(1, cbs=KD(ta, terms))
    assert (a.n, b.n) == (3, 6)     # three batches; `twice` has an option, so it is another teacher

def test_the_same_networks_in_two_lists_are_one_ensemble():
    a,b = Counted(net(8)),Counted(net(6))
    learner().fit(1, cbs=KD([a,b], [SoftTarget, Match(Logits, teacher=[a,b])]))
    assert (a.n, b.n) == (3, 3)
    learner().fit(1, cbs=KD([a,b], [SoftTarget, Match(Logits, teacher=Ensemble([a,b], [1,2])), Match(Logits, teacher=[b,a])]))
    assert (a.n, b.n) == (12, 12)

def test_a_learner_and_its_network_are_one_teacher():
    own = learner(Counted(net(8)))
    learner().fit(1, cbs=KD(own, [SoftTarget, Match(Attention, '0', 'model.0', teacher=own.model), Match(Logits, teacher=own)]))
    assert own.model.n == 3

def test_a_teacher_that_no_term_asks_is_not_asked():
    a,b = Counted(net(8)),net(6)
    learner().fit(1, cbs=KD(a, Match(SoftTarget, teacher=b)))
    assert a.n == 0

@pytest.mark.parametrize('stops', [True,False])
def test_one_network_with_two_inputs(stops):
    "Its layers run twice a batch; each term gets the features of its own teacher"
    model = net(8)
    plain,turned = Teacher(model),Teacher(model, input_tfm=lambda x: -x)
    terms = [Match(FitNet, '0', '0', teacher=plain), Match(FitNet, '0', '0', teacher=turned)] + [Match(SoftTarget, teacher=turned)]*(not stops)
    got = Part(lambda batch: (batch.xb[0], [t[0] for _,t in batch.features], batch.answers))
    learner().fit(2, cbs=[KD(None, terms), got])
    hand = deepcopy(model).eval()
    for x,features,answers in got.seen:
        with torch.no_grad():
            close(features[:2], [hand[0](x), hand[0](-x)])
            close(answers, [hand(x), hand(-x)])     # no pass ends early, as the hooks of one would end the other's
    assert len(got.seen) == 6

# --- the early end is decided for each ---

def test_each_may_end_early_on_its_own():
    a,b,ran = net(8),net(6),dict(a=0, b=0)
    for k,m in dict(a=a, b=b).items():
        def count(*_, k=k): ran[k] += 1
        m[-1].register_forward_hook(count)
    learner().fit(2, cbs=KD(a, [Match(FitNet, '0', '0', teacher=b), Match(FitNet, '0', '0'), SoftTarget]))
    assert ran['a'] == 6 and 1 <= ran['b'] <= 2     # the first pass of a fit, or of each epoch, is whole

# --- layers of the networks of an ensemble ---

def test_layers_of_members():
    "The same step as with a `Match` for each"
    a,b,ends = net(8),net(6),[]
    inputs = Teacher(b, input_tfm=lambda x: 2-x)
    both = Match(FitNet, ['0','1','0'], ['models.0.0','models.1.1','models.1.0'])
    for teacher,terms in (([a,inputs],[SoftTarget,both]), (None,None)):
        set_seed(3)
        part = Part(lambda batch: [batch.xb[0], *[t for _,ts in batch.features for t in ts]])
        if teacher: learner().fit(1, cbs=[KD(teacher, terms), part])
        ends += part.seen
    ea,eb = deepcopy(a).eval(),deepcopy(b).eval()
    for x,pred,a0,b1,b0 in ends:
        with torch.no_grad(): close([pred,a0,b1,b0], [(ea(x) + eb(2-x))/2, ea[0](x), eb[1](eb[0](2-x)), eb[0](2-x)])
    assert len(ends) == 3

def test_layers_of_members_of_members(teacher):
    inner,part = Ensemble([net(6),teacher]),Part(lambda batch: batch.features[0][1][0].shape[1])
    learner().fit(1, cbs=[KD([net(4),inner], FitNet, '0', 'models.1.models.1.0'), part])
    assert part.seen == [8]*3
    assert 'models.1.models.1.0' in get_model_layers(Ensemble([net(4),inner]).model)

def test_compiled_and_wrapped_members_keep_their_names(teacher, dynamo):
    other = torch.compile(net(6), backend='eager')
    learner().fit(1, cbs=KD([teacher,other], [SoftTarget, Match(FitNet, '0', 'models.1.0')]))
    assert n_hooks(teacher, other) == 0

def test_names_that_no_member_has(teacher):
    for name in ('0.0','models.2.0','models.0','models.x.0',3):
        refuses(lambda: KD([teacher,net(6)], Attention, '0', name), 'start with the number', "'models.0.0", error=KeyError)
    refuses(lambda: KD([teacher,net(6)], Attention, '0', 'models.1.9'), "has no layer '9'", "start with 'models.1.'", error=KeyError)

def test_a_network_that_is_in_an_ensemble_twice(teacher):
    "Its features could be those of either pass"
    members = [net(4), teacher, Teacher(teacher, input_tfm=lambda x: -x)]
    refuses(lambda: KD(members, Attention, '0', 'models.1.0'), 'compares features: expected networks without common parts', '`deepcopy`')
    learner().fit(1, cbs=KD(members, [SoftTarget, Match(Attention, '0', 'models.0.0')]))

def test_proposals_for_an_ensemble():
    a,b,x = net(8),net(6),torch.randn(2,2,8,8)
    model = net()
    s,t = match_layers(model, [a,b], x)
    s1,t1 = match_layers(model, b, x)
    assert t[-len(t1):] == [f'models.1.{n}' for n in t1] and s[-len(s1):] == s1 and t[0].startswith('models.0.')
    learner(model).fit(1, cbs=KD([a,b], Match(FitNet, s, t)))
    check = learner(net()).distill_check(KD([a,b], FitNet, s, t), n=1)
    assert not [w for w in check.warnings if 'of the depth' in w]

# --- as found ---

class Breaks(nn.Module):
    "Raises an exception at the n-th batch"
    def __init__(self, ex, n=2): super().__init__(); self.model,self.ex,self.n = net(4),ex,n
    def forward(self, x):
        self.n -= 1
        if not self.n: raise self.ex('now')
        return self.model(x)

@pytest.mark.parametrize('ex', [KeyboardInterrupt,RuntimeError])
@pytest.mark.parametrize('on', ['fit','learner'])
def test_an_exception_in_one_leaves_all_as_found(ex, on):
    a,b,c = net(8),Breaks(ex),net(6).eval()
    check,kd = as_found(a, b, c),KD(a, [SoftTarget, Match(Logits, teacher=b), Match(FitNet, '0', '0', teacher=c)])
    learn = learner(cbs=[kd] if on == 'learner' else [])
    with pytest.raises(ex): learn.fit(1, cbs=[] if on == 'learner' else kd)
    check()
    learn.fit(1, cbs=[] if on == 'learner' else kd)
    check()

class NoStart(Teacher):
    "Cannot be started"
    def start_for(self, learn, terms=None): raise KeyboardInterrupt('at the start')

@pytest.mark.parametrize('on', ['fit','learner'])
def test_one_started_the_next_fails(on):
    a,b = net(8),net(6)
    check,kd = as_found(a, b),KD(a, [SoftTarget, Match(Logits, teacher=NoStart(b))])
    learn = learner(cbs=[kd] if on == 'learner' else [])
    before = state(learn.model)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[] if on == 'learner' else kd)
    check()
    assert same_state(learn.model, before) and n_hooks(learn.model) == 0

def test_no_teacher_may_share_weights_with_the_student():
    learn,a = learner(),net(8)
    check = as_found(a)
    for other in (learn.model, [a,learn.model], nn.Sequential(learn.model[0])):
        kd = KD(a, [SoftTarget, Match(FitNet, '0', 'models.0.0' if isinstance(other, list) else '0', teacher=other)])
        refuses(lambda: learn.fit(1, cbs=kd), 'teacher of its own', 'weights in common')
        check()

def test_a_network_of_several_teachers_in_mixed_modes():
    a = net(8).eval()
    a[1].train()
    check = as_found(a)
    learner().fit(2, cbs=KD(a, [SoftTarget, Match(Logits, teacher=Teacher(a, channels_last=True)), Match(FitNet, '0', '0', teacher=nn.Sequential(a[0], a[1]))]))
    check()

# --- set, copied, pickled ---

def test_the_callbacks_own_teacher_may_be_set_in_the_middle(teacher):
    other,b,new = net(8),Counted(net(6)),net(5)
    check,names = as_found(teacher, other, b, new),[]
    def swap(self):
        if self.training and self.iter == 1: self.knowledge_distillation.teacher = new
        if self.training: names.append([t.model for t in self.knowledge_distillation.batch.teachers])
    kd = KD(teacher, [SoftTarget, Match(Logits, teacher=b), Match(FitNet, '0', '0', teacher=other)])
    learner().fit(1, cbs=[kd, Callback(before_backward=swap)])
    check()
    assert b.n == 3 and names[0][0] is teacher and names[2][0] is new

def test_the_callbacks_own_may_be_taken_away_where_none_asks_it(teacher):
    kd = KD(teacher, Match(SoftTarget, teacher=net(6)))
    kd.teacher = None
    learner().fit(1, cbs=kd)

def test_no_teacher_at_all():
    refuses(lambda: KD(None), 'Expected a teacher, but got none', 'SoftTarget(T=5.0) has no teacher of its own')
    refuses(lambda: KD(None, [SoftTarget, Match(Logits, teacher=net())]), 'SoftTarget(T=5.0) has no teacher of its own')
    with pytest.raises(TypeError, match='but got str'): Match(SoftTarget, teacher='resnet34')

def test_pickles_hold_no_network_and_say_so(teacher):
    b = net(64)
    kd = KD(teacher, [SoftTarget, Match(FitNet, '0', '0', teacher=b)])
    text = pickle.dumps(kd)
    assert len(text) < 20_000 < len(pickle.dumps(b))
    again = pickle.loads(pickle.dumps(pickle.loads(text)))
    assert repr(again.objective) == repr(kd.objective) and again.matches[1].teacher is None
    again.teacher = teacher
    learn = learner()
    before = state(learn.model)
    refuses(lambda: learn.fit(1, cbs=again), 'Expected the teacher of FitNet() from Sequential', 'callback.matches[1].teacher = ...')
    assert same_state(learn.model, before) and not networks_in_use()
    again.matches[1].teacher = b
    learn.fit(1, cbs=again)
    refuses(lambda: setattr(again.matches[1], 'teacher', teacher), 'keeps its teacher')

def test_a_lost_teacher_that_does_not_fit(teacher):
    again = pickle.loads(pickle.dumps(KD(None, Match(FitNet, '0', '0', teacher=teacher))))
    again.matches[0].teacher = nn.Flatten()
    refuses(lambda: learner().fit(1, cbs=again), "teacher Flatten has no layer '0'", error=KeyError)

def test_an_exported_learner_has_no_trace(teacher, tmp_path):
    learn = learner(path=tmp_path, dls=exportable(), cbs=KD(teacher, Match(Logits, teacher=net(64))))
    learn.fit(1)
    learn.export('student.pkl')
    assert 'fastdistill' not in (tmp_path/'student.pkl').read_bytes().decode('latin1')
    load_learner(tmp_path/'student.pkl')

def test_copies_share_the_network(teacher):
    m = Match(FitNet, '0', '0', teacher=teacher)
    o = Objective([m, SoftTarget])
    for other in (copy(m), deepcopy(m), o.replace(T=2).terms[0], deepcopy(o).terms[0], deepcopy(KD(None, m)).matches[0]):
        assert other is not m and other.teacher is m.teacher and other.teacher.model is teacher
    copied = deepcopy(m)
    assert copied.loss is not m.loss and repr(copied) == repr(m)

def test_fits_of_a_copied_learner(teacher):
    learn = learner(cbs=KD(teacher, [SoftTarget, Match(FitNet, '0', '0', teacher=net(6))]))
    other = deepcopy(learn)
    learn.fit(1), other.fit(1)

# --- what else looks at teachers ---

def test_the_check_names_each(trained):
    bad = Permuted(trained.model)
    helper = nn.Sequential(net(6), nn.Flatten(), nn.Linear(3, 7))
    kd = KD(trained, [SoftTarget, Match(Logits, teacher=bad), Match(FitNet, '1', '0.1', teacher=helper)])
    check = learner(net(4), trained.dls).distill_check(kd, n=1)
    names = ['teacher Sequential 1','teacher Permuted','teacher Sequential 2']
    assert check.models.index.tolist() == [*names,'student',*(f'{n} / student' for n in names)]
    assert check.models.accuracy.isna().tolist()[:4] == [False,False,True,False]     # only features of the third are compared
    assert [w for w in check.warnings if 'teacher Permuted' in w] and not [w for w in check.warnings if 'Sequential 2' in w]
    assert set(check.data.index.get_level_values(0)) <= set(names)
    assert check.terms.term.tolist() == ['task','SoftTarget','Logits from Permuted','FitNet from Sequential']
    assert all(n in repr(check) and n in check._repr_html_() for n in names)

def test_concerns_name_the_teacher(trained):
    other = Teacher(deepcopy(trained.model))
    other.data = dict(size=(32,32))
    helper = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)))
    helper.data = dict(classes=['cat','dog'])     # only its features are compared
    trained.dls.after_item = SimpleNamespace(fs=[SimpleNamespace(size=64)])
    kd = KD(trained, [SoftTarget, Match(SoftTarget(T=1000), teacher=other), Match(PKT, '4', '1', teacher=helper)])
    with pytest.warns(UserWarning) as found: learner(net(4), trained.dls).fit(1, cbs=kd)
    texts = [str(w.message) for w in found if 'teacher' in str(w.message)]
    assert [t for t in texts if t.startswith('The teacher Sequential 2 was trained with size')]
    assert [t for t in texts if 'At T=1000' in t] and not [t for t in texts if 'Sequential 3' in t]

def test_numbers_that_are_not_finite_name_the_teacher(teacher):
    broken = net(6)
    broken[-1].weight.data.fill_(float('nan'))
    learn = learner()
    before = state(learn.model)
    refuses(lambda: learn.fit(1, cbs=KD(teacher, [SoftTarget, Match(HardTarget, teacher=broken)])), 'HardTarget() from Sequential', "the teacher's answer is not finite")
    assert same_state(learn.model, before)

def test_weight_finder_and_lr_find(teacher):
    check,b = as_found(teacher),net(6)
    kd = KD(None, [Match(SoftTarget, teacher=teacher), Match(FitNet, '0', '0', teacher=b)])
    learn = learner(cbs=kd)
    found = learn.weight_finder(weights=[.5], temperatures=[1,4])
    assert len(found.table) == 3
    learn.lr_find(num_it=4, show_plot=False)
    check()
    assert kd.matches[0].loss.T == 5 and kd.matches[0].teacher.model is teacher

def test_saved_projectors_come_back(teacher, tmp_path):
    b = net(6)
    def new(): return KD(teacher, [Match(FitNet, '0', '0'), Match(FitNet, '0', '0', teacher=b)])
    kd,learn = new(),learner()
    learn.fit(1, cbs=kd)
    kd.save(tmp_path/'kd.pth')
    again = new()
    again.load(tmp_path/'kd.pth')
    learn.fit(1, lr=0., cbs=again)
    weights = [p.shape[0] for p in kd.trained.losses.parameters() if p.ndim == 4]
    assert weights == [8,6] and len(kd.trained.params) == len(again.trained.params)

# --- recordings ---

exact = dict(dtype=torch.float32)

@pytest.mark.parametrize('mix', [None,MixUp])
@pytest.mark.parametrize('n_epoch', [1,2])
def test_two_recordings_and_a_network_as_networks(tmp_path, mix, n_epoch):
    "Bit for bit: crops that are drawn anew in each epoch, blended or not"
    a,b,c,dls,ends = cnn(),cnn(),cnn(),images(),[]
    def terms(b): return [SoftTarget, Match(FitNet, '0', '0', teacher=b), Match(Logits, teacher=b), Match(Logits, teacher=c)]
    def cbs(): return [mix()] if mix else []
    ra = record_teacher(a, dls, tmp_path/'a', n_epoch, cbs=cbs(), **exact)
    rb = record_teacher(Teacher(b), dls, tmp_path/'b', n_epoch, loss=[Logits, Match(FitNet, '0', '0')], cbs=cbs(), **exact)
    for own,other,more in (ra,rb,[]),(a,rb,[]),(ra,b,[]),(a,b,[SameBatches(ra)]):
        set_seed(5)
        part,learn = Part(lambda batch: torch.stack(batch.terms()).detach()),learner(cnn(dropout=.5), dls)
        learn.fit(3, cbs=[KD(own, terms(other)), part, *cbs(), *more])
        ends.append((state(learn.model), torch.stack(part.seen)))
    for weights,seen in ends[1:]:
        torch.testing.assert_close(seen, ends[0][1], rtol=1e-6, atol=1e-7)
        for k,v in weights.items(): torch.testing.assert_close(v, ends[0][0][k], rtol=1e-5, atol=1e-6)

def test_recordings_of_items_in_any_order(tmp_path, teacher):
    dls,b = data(),net(6)
    ra,rb = record_teacher(teacher, dls, tmp_path/'a'),record_teacher(b, dls, tmp_path/'b', seed=3)
    learner(dls=dls).fit(2, cbs=KD(ra, [SoftTarget, Match(Logits, teacher=rb)]))
    learner(dls=dls).fit(1, cbs=KD(ra, [SoftTarget, Match(Logits, teacher=ra), Match(Logits, teacher=TeacherRecording(tmp_path/'a'))]))

def test_recordings_that_do_not_go_together(tmp_path):
    a,b,dls = cnn(),cnn(),images()
    ra = record_teacher(a, dls, tmp_path/'a', 2)
    others = dict(seed=record_teacher(b, dls, tmp_path/'s', 2, seed=1), epochs=record_teacher(b, dls, tmp_path/'e', 3),
                  blend=record_teacher(b, dls, tmp_path/'m', 2, cbs=MixUp()))
    learn = learner(cnn(), dls)
    learn.fit(2, cbs=KD(ra, [SoftTarget, Match(Logits, teacher=others['epochs'])]))     # the first two epochs are the same
    before = state(learn.model)
    def fit(n, other, cbs=()): return lambda: learn.fit(n, cbs=[KD(ra, [SoftTarget, Match(Logits, teacher=others[other])]), *cbs])
    refuses(fit(2, 'seed'), 'recordings of the same batches', 'seed 0 and 1', 'same seed')
    refuses(fit(3, 'epochs'), 'epochs [0, 1, 0] and [0, 1, 2]', 'as many epochs')
    refuses(fit(2, 'blend'), 'was made with MixUp')
    refuses(fit(2, 'blend', [MixUp()]), 'no answers to blends')
    other = learner(cnn(), images(bs=5))
    refuses(lambda: other.fit(1, cbs=KD(ra, [SoftTarget, Match(Logits, teacher=others['seed'])])), 'batch size: 4')
    assert same_state(learn.model, before) and n_hooks(learn.model) == 0

def test_a_fit_with_a_recording_keeps_its_teachers(tmp_path):
    a,b,dls = cnn(),cnn(),images()
    rb = record_teacher(b, dls, tmp_path/'b', 2)
    def swap(self): self.knowledge_distillation.teacher = cnn()
    learn = learner(cnn(), dls)
    refuses(lambda: learn.fit(1, cbs=[KD(a, [SoftTarget, Match(Logits, teacher=rb)]), Callback(after_pred=swap)]), 'between two fits')
    assert n_hooks(learn.model, a) == 0 and a.training and rb.epoch is None

def test_two_fits_share_a_recording(tmp_path, teacher):
    "One inside the other"
    dls = data()
    rec = record_teacher(teacher, dls, tmp_path/'r')
    m = Match(Logits, teacher=rec)
    def again(self):
        if self.training and self.iter == 1: learner(dls=data()).fit(1, cbs=KD(None, m))
    learner(dls=dls).fit(1, cbs=[KD(None, m), Callback(before_backward=again)])

def test_what_is_recorded_of_several(tmp_path, teacher):
    "The terms that ask the teacher that is recorded"
    dls,b = data(),net(6)
    terms = [SoftTarget, Match(FitNet, '0', '0', teacher=b), Match(PKT, '1', '1')]
    def kept(teacher, name, terms=terms): return {k.layer for k in record_teacher(teacher, dls, tmp_path/name, loss=terms).kept}
    assert kept(teacher, 'a') == {None,'1'} and kept(b, 'b') == {'0'} and kept(net(5), 'c') == {None,'1'}
    own = Teacher(b, input_tfm=lambda x: -x)
    assert kept(own, 'd', [SoftTarget, Match(FitNet, '0', '0', teacher=own)]) == {'0'}
    refuses(lambda: kept(teacher, 'e', Match(SoftTarget, teacher=b)), 'Expected a loss that asks Sequential')
    assert not (tmp_path/'e').exists()

def test_features_of_members_are_recorded(tmp_path, teacher):
    dls,b = data(),net(6)
    terms = [SoftTarget, Match(FitNet, ['0','0'], ['models.0.0','models.1.0'])]
    rec = record_teacher([teacher, Teacher(b, input_tfm=lambda x: -x)], dls, tmp_path/'r', loss=terms, **exact)
    ends = []
    for t in (rec,[teacher, Teacher(b, input_tfm=lambda x: -x)]):
        set_seed(2)
        kd = KD(t, terms)
        learner(dls=data(shuffle=False)).fit(1, cbs=kd)
        ends.append(kd.losses['kd_loss'])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
