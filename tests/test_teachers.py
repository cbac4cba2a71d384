"Every kind of teacher: its logits are found, its answers repeat, it is left as it was found; several as one."
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, set_seed
from torch import nn
from conftest import data, learner, loaders, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.data import describe_data, get_logits
from test_callback import close, exportable, grads_by_hand, Gradients, one_batch

KD = KnowledgeDistillationCallback

def images(size=32, n=8):
    "Noise in three channels, three classes"
    gen = torch.Generator().manual_seed(0)
    items = list(zip(torch.randn(n, 3, size, size, generator=gen), torch.randint(3, (n,), generator=gen)))
    return DataLoaders.from_dsets(items, items, bs=n//2, shuffle=False, num_workers=0, device=torch.device('cpu'))

def small(): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def distils(teacher, model, dls, student, logits=lambda out: out, **kwargs):
    "Fit, and compare the loss of the first batch with PyTorch's divergence from the plain model's logits; it is left as found, twice"
    x = dls.train.one_batch()[0]
    found,modes,hooks = state(model),[m.training for m in model.modules()],n_hooks(model)
    plain = deepcopy(model).eval()
    with torch.no_grad(): s,t = deepcopy(student).train()(x),logits(plain(kwargs.get('inputs', x)))
    want = 25*F.kl_div(F.log_softmax(s/5, 1), F.log_softmax(t/5, 1), reduction='batchmean', log_target=True).item()
    learn,kd = Learner(dls, student, loss_func=CrossEntropyLossFlat()),KD(teacher, SoftTarget)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=kd)
    assert kd.losses['kd_loss'][0] == pytest.approx(want, rel=1e-3) and want > 0
    assert same_state(model, found) and [m.training for m in model.modules()] == modes and n_hooks(model) == hooks
    assert all(p.grad is None for p in model.parameters())
    return learn

# --- where models come from ---

@pytest.mark.parametrize('name', ['resnet18','mobilenet_v3_small','googlenet'])
def test_torchvision(name):
    "In-place activations; one answers a tuple of its own while training"
    from torchvision import models
    model = models.get_model(name, num_classes=3, **(dict(init_weights=False, aux_logits=True) if name == 'googlenet' else {}))
    distils(model, model, images(64), small())

def test_timm():
    timm = pytest.importorskip('timm')
    model = timm.create_model('resnet10t', num_classes=3)
    distils(model, model, images(), small())

def vit():
    transformers = pytest.importorskip('transformers')
    return transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, num_labels=3))

def test_transformers():
    model = vit()
    distils(model, model, images(), small(), logits=lambda out: out.logits)

def test_layers_of_transformers():
    "A block answers hidden states, tokens by channels: compared with those of a student of the same kind, which answers in an object too"
    model,student = vit(),vit()
    name = next(n for n in get_model_layers(model) if n.endswith('.1'))
    assert name in get_model_layers(student)
    seen,dls = [],images()
    def tokens(s, t): seen.append((tuple(s.shape),tuple(t.shape),(s-t).square().mean())); return seen[-1][2]
    learn = Learner(dls, student, loss_func=lambda pred, y: F.cross_entropy(get_logits(pred), y))
    before = state(student)
    with torch.no_grad(): s,t = (m(dls.train.one_batch()[0], output_hidden_states=True).hidden_states[2] for m in (deepcopy(student).train(),deepcopy(model).eval()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(model, [SoftTarget, Match(tokens, name, name)]))
    assert {o[:2] for o in seen} == {((4,17,16),(4,17,16))} and not same_state(student, before)
    assert seen[0][2].item() == pytest.approx((s-t).square().mean().item(), rel=1e-4)     # as the library itself hands them out

def test_exported_and_loaded_learner(tmp_path):
    learn = learner(net(8), exportable(), path=tmp_path)
    learn.fit(1)
    learn.export('teacher.pkl')
    loaded = load_learner(tmp_path/'teacher.pkl')
    distils(loaded, loaded.model, one_batch(), net())

def test_compiled(teacher, dynamo):
    distils(torch.compile(teacher, backend='eager'), teacher, one_batch(), net())

def test_layers_of_a_compiled_teacher(teacher, dynamo):
    "Compiled but not run yet: as uncompiled. One that ran: an error that says what to do"
    feature = partial(Match, Attention, ['0','1'], ['0','1'])
    steps,student = [],net()
    for t in (teacher, torch.compile(teacher, backend='eager')):
        learn,g = learner(deepcopy(student), one_batch()),Gradients()
        learn.fit(1, cbs=[g, KD(t, feature())])
        steps.append(g.steps[0])
    close(*steps)
    torch.compiler.reset()
    ran = torch.compile(net(8).eval(), backend='eager')
    with torch.no_grad(): ran(torch.randn(8,2,8,8))
    with pytest.raises(ValueError, match=r"Layer '0' did not run.*teacher Sequential.*torch.compiler.reset\(\)"): learner().fit(1, cbs=KD(ran, feature()))
    torch.compiler.reset()
    learner().fit(1, cbs=KD(ran, feature()))

# --- what models do ---

def test_dropout_and_batch_norm():
    "Answers repeat; the running statistics do not run"
    teacher = Teacher(net(8, dropout=.5))
    teacher.start('cpu')
    x = torch.randn(4,2,8,8)
    a,b = teacher(x),teacher(x)
    teacher.stop()
    assert torch.equal(a, b) and not torch.equal(teacher.model(x), teacher.model(x))
    distils(teacher.model, teacher.model, one_batch(), net())

def test_inplace_activations(teacher):
    "The batch norm before an in-place ReLU is seen as it was: as in a copy that works out of place"
    copy = deepcopy(teacher)
    for stage in copy[:2]: stage[2].inplace = False
    def least(s, t): return (s.min()-t.min()).square()     # negative before the activation, 0 behind it
    steps,student = [],net()
    for t in (teacher,copy):
        g = Gradients()
        learner(deepcopy(student), one_batch(), cbs=g).fit(2, cbs=KD(t, least, ['0.1','1.1'], ['0.1','1.1']))
        steps.append(g.steps)
    for a,b in zip(*steps): close(a, b)

def test_without_parameters():
    class Brightest(nn.Module):
        def forward(self, x): return x[:,0].unflatten(1, (4,2)).mean((2,3))[:,:3]
    distils(Brightest(), Brightest(), one_batch(), net())

@pytest.mark.parametrize('answer', [lambda o: dict(logits=o, loss=None), lambda o: (o,None), lambda o: SimpleNamespace(logits=o)])
def test_wrappings(teacher, answer):
    class Wraps(nn.Module):
        def __init__(self): super().__init__(); self.model = teacher
        def forward(self, x): return answer(self.model(x))
    distils(Wraps(), teacher, one_batch(), net())

# --- other inputs ---

def test_input_tfm():
    "Another size and other statistics: only the teacher's inputs change"
    model,dls = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Flatten(), nn.Linear(64, 3)),images()
    def larger(x): return F.interpolate(x*.5 + .2, size=64)
    distils(Teacher(model, input_tfm=larger), model, dls, small(), inputs=larger(dls.train.one_batch()[0]))

def test_input_tfm_leaves_the_students_step_alone():
    "The student's gradients are those of its own inputs"
    model,dls,student,g = nn.Sequential(nn.Conv2d(2, 4, 4, stride=4), nn.Flatten(), nn.Linear(64, 3)),one_batch(),net(),Gradients()
    def larger(x): return F.interpolate(x*.5 + .2, size=16)
    hand = deepcopy(student).train()
    learner(student, dls, cbs=g).fit(1, cbs=KD(Teacher(model, input_tfm=larger)))
    close(g.steps[0], grads_by_hand(hand, lambda x: model(larger(x)), *dls.train.one_batch(), .5, .5))

def test_several_inputs():
    "A fit in which the teacher needs both inputs of the student"
    class Two(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.a,self.b,self.head = nn.Linear(3, w),nn.Linear(5, w),nn.Linear(w, 3)
        def forward(self, a, b): return self.head(torch.tanh(self.a(a) + self.b(b)))
    class Joined(nn.Module):    # of one input, for the gradients by hand
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x[:,:3], x[:,3:])
    a,b,y = torch.randn(16, 3),torch.randn(16, 5),torch.arange(16) % 3
    items = list(zip(a, b, y))
    student,teacher,g = Two(4),Two(8),Gradients()
    hand = Joined(deepcopy(student))
    learner(student, loaders(items, items, 16, shuffle=False), cbs=g).fit(1, cbs=KD(teacher))
    close(g.steps[0], grads_by_hand(hand, Joined(teacher), torch.cat([a,b], 1), y, .5, .5))

def test_input_tfm_takes_and_gives_several():
    class Two(nn.Module):
        def forward(self, a, b): return torch.cat([a.mean(1, keepdim=True), b.mean(1, keepdim=True)], 1)
    a,b = torch.randn(2,4,3)
    torch.testing.assert_close(Teacher(Two(), input_tfm=lambda a,b: (b,a))(a, b), Two()(b, a))
    with pytest.raises(TypeError, match="input_tfm to be a function of the inputs, but got 'larger'"): Teacher(Two(), input_tfm='larger')

def test_half_precision(teacher):
    "Weights of float16 for inputs of float32, and the other way round"
    x,y = torch.randn(4,2,8,8),Teacher(teacher.eval())(torch.zeros(1,2,8,8))
    want = Teacher(teacher)(x)
    half = Teacher(deepcopy(teacher).half(), input_tfm=lambda x: x.half())(x)
    cast = Teacher(teacher)(x.half())
    for got in (half,cast):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=1e-2)
    assert y.dtype == torch.float32

def test_half_precision_fit(teacher):
    half,dls = teacher.half(),one_batch()
    distils(Teacher(half, input_tfm=lambda x: x.half()), half, dls, net(), logits=lambda out: out.float(), inputs=dls.train.one_batch()[0].half())
    assert all(p.dtype == torch.float16 for p in half.parameters())

def test_wrong_inputs_are_named(teacher):
    "The error says which model was asked what, and the learner can be used"
    learn = learner()
    before = state(learn.model)
    with pytest.raises(RuntimeError, match=r'The teacher Sequential cannot answer a batch of inputs \(8, 2, 8, 8\) float32.*input_tfm.*epoch 0, batch 0'):
        learn.fit(1, cbs=KD(nn.Sequential(nn.Conv2d(3, 4, 3))))
    assert same_state(learn.model, before)
    learn.fit(1, cbs=KD(teacher))

# --- ensembles ---

@pytest.mark.parametrize('weights', [None,[3,1],[.25,.75]])
def test_ensemble_step_equals_hand_computed(weights):
    a,b = net(8),net(6)
    dls,model,g = one_batch(),net(),Gradients()
    hand = deepcopy(model).train()
    learner(model, dls, cbs=g).fit(1, cbs=KD([a,b] if weights is None else Ensemble([a,b], weights)))
    wa,wb = dict(zip((None,3,.25), ((.5,.5),(.75,.25),(.25,.75))))[weights and weights[0]]
    a,b = deepcopy(a).eval(),deepcopy(b).eval()
    close(g.steps[0], grads_by_hand(hand, lambda x: wa*a(x) + wb*b(x), *dls.train.one_batch(), .5, .5))

def test_members_with_inputs_of_their_own():
    a,b,dls,model,g = net(8).eval(),net(6).eval(),one_batch(),net(),Gradients()
    hand = deepcopy(model).train()
    learner(model, dls, cbs=g).fit(1, cbs=KD(Ensemble([Teacher(a, input_tfm=lambda x: 2-x), b], [3,1])))
    close(g.steps[0], grads_by_hand(hand, lambda x: .75*a(2-x) + .25*b(x), *dls.train.one_batch(), .5, .5))

def test_members_are_left_as_found():
    a,b = net(8).eval(),net(8)
    b[0].eval()
    before,modes = [state(a),state(b)],[[m.training for m in o.modules()] for o in (a,b)]
    learn = learner()
    learn.fit(1, cbs=KD(Ensemble([a, b, Teacher(b, input_tfm=lambda x: -x), a], [1,1,2,1])))
    for o,state_,mode in zip((a,b), before, modes): assert same_state(o, state_) and [m.training for m in o.modules()] == mode and n_hooks(o) == 0
    ensemble,calls = Ensemble([a,b]),[]
    def stop(self):
        if self.training: calls.append([m.training for m in b.modules()]); raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[KD(ensemble), Callback(after_loss=stop)])
    assert not any(calls[0]) and [m.training for m in b.modules()] == modes[1]

def test_ensembles_that_cannot_be(teacher):
    with pytest.raises(KeyError, match=r"Ensemble\(Sequential, Sequential\) has no layer '0.2'.*start with the number of the network: 'models.0.0.2', 'models.1.0.2'"): KD([teacher,net(8)], Attention, '0', '0.2')
    with pytest.raises(ValueError, match='at least one teacher'): KD([])
    for weights in ([1], [1,0], [1,-1], [1,float('nan')]):
        with pytest.raises(ValueError, match='weight above 0 for each of 2 teachers'): Ensemble([teacher,net(8)], weights)
    with pytest.raises(TypeError, match='but got str'): KD([teacher,'resnet34'])
    learn,other = learner(),nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
    with pytest.raises(ValueError, match=r'same classes, but their logits are of shapes \(8, 3\), \(8, 2\)'): learn.fit(1, cbs=KD([teacher,other]))
    with pytest.raises(ValueError, match='teacher of its own'): learn.fit(1, cbs=KD([teacher,learn.model]))
    assert n_hooks(learn.model, teacher) == 0 and teacher.training

def test_ensemble_set_later(teacher):
    kd = deepcopy(KD(teacher))
    kd.teacher = [teacher,net(8)]
    learner().fit(1, cbs=kd)
    assert repr(kd.teacher) == 'Ensemble(Sequential, Sequential)'

def test_ensemble_after_load(teacher, tmp_path):
    "An exported learner holds no teacher; with a list of them its step is that of their mean"
    learn = learner(path=tmp_path, dls=exportable(), cbs=KD(net(4)))
    learn.export('student.pkl')
    loaded,other = load_learner(tmp_path/'student.pkl'),net(6)
    loaded.dls,hand,g = one_batch(),deepcopy(loaded.model).train(),Gradients()
    loaded.fit(1, cbs=[g, KD([teacher,other])])
    a,b = deepcopy(teacher).eval(),deepcopy(other).eval()
    close(g.steps[0], grads_by_hand(hand, lambda x: (a(x) + b(x))/2, *loaded.dls.train.one_batch(), .5, .5))

# --- models that were made ready to run elsewhere ---

class Inference(nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    @torch.inference_mode()
    def forward(self, x): return self.model(x)

def quantised(model):
    from torch.ao import quantization as q
    model = nn.Sequential(q.QuantStub(), model, q.DeQuantStub()).eval()
    model.qconfig = q.get_default_qconfig('x86')
    q.prepare(model, inplace=True)
    model(torch.randn(8,2,8,8))
    return q.convert(model)

def exported(model): return torch.export.export(model.eval(), (torch.randn(8,2,8,8),)).module()

ready = dict(exported=exported, frozen=lambda m: torch.jit.freeze(torch.jit.script(m.eval())), scripted=torch.jit.script, inference=Inference, static=quantised,
             dynamic=lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}))

@pytest.mark.parametrize('make', ready.values(), ids=ready)
def test_models_made_ready_to_run(make):
    model,dls,student,seen = make(net(8)),one_batch(8, 8),net(),[]
    x,modes = dls.train.one_batch()[0],[getattr(m, 'training', None) for m in model.modules()]
    def squares(s, t): seen.append(t.clone()); return (s*t).square().mean()     # backward saves the answer
    learner(student, dls).fit(2, cbs=KD(model, squares))
    if hasattr(model, 'eval') and make is not exported: model.eval()
    with torch.no_grad(): torch.testing.assert_close(seen[0], model(x).clone())
    assert len(seen) == 2 and (make is not exported or [m.training for m in model.modules()] == modes)

def test_features_of_a_model_in_inference_mode(teacher):
    "The student ends where it does beside the same network without"
    def loss(s, t): return (s.mean()*t).square().mean()
    ends = []
    for model,layer in ((Inference(teacher), 'model.0'), (teacher, '0')):
        set_seed(0)
        learn = learner(dls=data(shuffle=False))
        learn.fit(1, cbs=KD(model, [Match(loss, '0', layer), SoftTarget]))
        ends.append(learn.model)
    assert same_state(ends[0], state(ends[1]))

# --- sizes ---

@pytest.mark.parametrize('size,want', [(32,(32,32)), ((32,),(32,32)), ([32],(32,32)), ((32,24),(32,24))])
def test_one_number_is_a_square(size, want):
    assert describe_data(SimpleNamespace(after_item=SimpleNamespace(fs=[SimpleNamespace(size=size)])))['size'] == want

# --- a network with several users ---

def same(t): return t
@pytest.mark.parametrize('other', [Teacher, same], ids=['two Teachers','one Teacher'])
@pytest.mark.parametrize('loss,layers', [(SoftTarget,None), (Attention,'0')])
def test_two_threads(teacher, other, loss, layers):
    "The first fit ends while the second goes on: the teacher stays in evaluation mode, and the second learns what it learns alone"
    from threading import Event, Thread
    def alone(cb=None):
        torch.manual_seed(0)
        return learner(net(), data(48, 8, shuffle=False), cbs=cb)
    first = Teacher(teacher)
    second,before,began,ended,modes = other(first if other is same else teacher),state(teacher),Event(),Event(),[]
    plain = alone(); plain.fit(1, cbs=KD(deepcopy(teacher), loss, layers, layers))
    def wait(self):
        if self.training and self.iter == 2: began.set(); ended.wait(20)
        if self.training and self.iter > 2: modes.append(teacher.training)
    a,b = alone(),alone(Callback(before_batch=wait))
    t = Thread(target=lambda: b.fit(1, cbs=KD(second, loss, layers, layers)))
    t.start(); began.wait(20)
    a.fit(1, cbs=KD(first, loss, layers, layers))
    ended.set(); t.join(20)
    assert len(modes) == 3 and not any(modes) and same_state(teacher, before) and teacher.training and n_hooks(teacher) == 0
    for l in (a,b): assert same_state(plain.model, state(l.model))

def test_two_devices_at_a_time(teacher):
    a,b = Teacher(teacher),Teacher(teacher)
    a.start('cpu')
    with pytest.raises(ValueError, match='on meta, but another fit uses it on cpu.*deepcopy'): b.start('meta')
    b.stop()
    assert not teacher.training
    a.stop()
    assert teacher.training
