"Losses against the formulas of the papers in NumPy, by hand, and on labels and arguments of every kind."
import json, re, runpy
from copy import deepcopy
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from hypothesis import assume, given, settings, strategies as st
from scipy.special import softmax
from torch import nn
import formulas as np_
from loss_cases import *

root = Path(__file__).resolve().parent.parent

# --- one place to add a loss ---

def test_every_loss_is_public_and_has_a_formula():
    from fastdistill import losses
    assert {n for n in losses.__all__ if isinstance(c := getattr(losses, n), type) and issubclass(c, Loss)} == {'Loss','Projected',*registered_losses}
    assert all(getattr(losses, n) is c for n,c in registered_losses.items())
    assert set(np_.formulas) == set(registered_losses), 'tests/formulas.py has a formula for each loss'

def test_every_loss_has_a_row_in_the_table():
    cells = json.loads((root/'nbs/losses/base.ipynb').read_text())['cells']
    text = next(t for c in cells if '## All losses' in (t := ''.join(c['source'])))
    rows = re.findall(r'^\| `(\w+)` \|.*?\| (yes|no) \| (.*?) \|', text.split('### Weights for other data')[0], flags=re.M)
    assert [n for n,*_ in rows] == list(registered_losses)
    words = {2:'vectors', 3:'sequences', 4:'maps'}
    for name,targ,takes in rows:
        needs = loss_needs(registered_losses[name]())
        assert needs.needs_targ == (targ == 'yes')
        if needs.kinds: assert {k for k,w in words.items() if w in takes} == set(needs.kinds)

@pytest.mark.parametrize('name', registered_losses)
def test_a_loss_says_what_it_needs(name):
    needs = loss_needs(registered_losses[name]())
    assert bool(needs.kinds) == (needs.on_features is not False)
    if needs.on_features is False and name not in ('Logits','TeacherBounded'): assert needs.axis == 1 and needs.single_label is not None
    assert not needs.builds or needs.trains

@pytest.fixture
def script(monkeypatch):
    "What a file of benchmarks/ defines; it runs nothing"
    monkeypatch.syspath_prepend(root/'benchmarks')
    return lambda name: runpy.run_path(str(root/f'benchmarks/{name}.py'))

def test_a_new_loss_joins_the_benchmarks(script):
    "With settings for a loss that they do not name; losses that they leave out cannot run there"
    class OnMaps(Cosine): least_positions = 2
    class OnVectors(Cosine): kinds = (2,)
    class OnLogits(SoftTarget): pass
    bench = script('losses')
    found = bench['settings']([*registered_losses.values(), OnMaps, OnVectors, OnLogits])
    assert {type(loss) for loss,_ in found} == {*registered_losses.values(), OnMaps, OnLogits} - {MultiLabelSoftTarget,TeacherBounded}     # a digit has one class
    (a,b),(c,d) = ([kw for (loss,_),kw in found.items() if type(loss) is cls] for cls in (OnMaps,OnLogits))
    assert [kw['weight'] for kw in (a,b,c,d)] == [.1,1,.1,1] and {kw['task_weight'] for kw in (a,b,c,d)} == {1.}
    assert isinstance(a['loss'].loss, Projected) and len(a['loss'].student_layers) == 3 and isinstance(c['loss'], OnLogits)
    assert {type(loss) for loss in script('loss_cost')['every']} == {*registered_losses.values()} - {TeacherBounded}     # which takes values

def test_some_rows_of_a_benchmark_again(script):
    "They take the place of the old ones, new ones stand in order, and the others do not change"
    rows = script('rows')
    table = pd.read_csv(root/'benchmarks/losses.csv')
    order,names = [*dict.fromkeys(table.loss[1:])],['SoftTarget','FitNet','PKT']
    again = table[[True,*(bool(re.match('SoftTarget|FitNet|PKT', loss)) for loss in table.loss[1:])]].assign(accuracy=.5)
    found = rows['replace_rows'](table, again, names, order)
    pd.testing.assert_frame_equal(found.drop(columns='accuracy'), table.drop(columns='accuracy'))
    new = found.loss.isin(again.loss[1:])
    assert (found.accuracy[new] == .5).all() and (found.accuracy[~new] == table.accuracy[~new]).all() and not new[0]
    pd.testing.assert_frame_equal(rows['replace_rows'](table[~table.loss.isin(again.loss[1:])], table[table.loss.isin(again.loss)| (table.index == 0)], names, order), table)
    assert rows['names_one_of']('Projected(Cosine()), 4', ['Cosine']) and not rows['names_one_of']('MultiLabelSoftTarget(T=1.0)', names)

def test_a_loss_of_ones_own_is_not_registered():
    before = dict(registered_losses)
    class Own(Loss): pass
    class Better(SoftTarget): pass
    assert registered_losses == before and loss_needs(Better()).single_label

def test_needs_of_anything_that_can_be_called():
    def loss(s, t, y): return 0.
    assert not any(getattr(loss_needs(loss), k) for k in ('on_features','needs_targ','single_label','axis','same_channels','kinds','T','standardize','builds','trains'))
    loss.needs_targ,loss.on_features = True,True
    needs = loss_needs(partial(loss, y=0))
    assert needs.needs_targ and needs.on_features
    loss.needs_targ = False
    assert not needs.needs_targ and needs.on_features     # read each time
    assert loss_needs(nn.Linear(1, 1)).trains and not loss_needs(nn.Linear(1, 1).requires_grad_(False)).trains and not loss_needs(nn.MSELoss()).trains
    loss.build = lambda s, t: None
    assert not loss_needs(loss).builds     # only a module is built
    with pytest.raises(AttributeError, match='temperature'): loss_needs(loss).temperature
    needs = loss_needs(SoftTarget(3, standardize=True))
    needs.loss.T = 5
    assert (needs.T,needs.standardize,needs.axis) == (5,True,1) and deepcopy(needs).T == 5

def test_a_projector_asks_for_the_labels_that_its_loss_needs():
    def loss(s, t, y): return ((s-t).flatten(1).mean(1)*y).mean()
    loss.needs_targ = True
    x,y = torch.ones(2,3,4,4),torch.tensor([0,1])
    assert loss_needs(Projected(loss)).needs_targ and not loss_needs(Projected(nn.MSELoss())).needs_targ
    assert Projected(loss).build(x, x)(x, x, y).isfinite()

@pytest.mark.parametrize('loss', every, ids=repr)
def test_a_loss_prints_its_options(loss): assert eval(repr(loss)).__dict__.keys() == loss.__dict__.keys() and repr(eval(repr(loss))) == repr(loss)

def test_how_losses_are_printed():
    assert [repr(l) for l in (SoftTarget(), SoftTarget(2., standardize=True, axis=-1), FitNet(), Projected(Cosine()))] == [
        'SoftTarget(T=5.0)', 'SoftTarget(T=2.0, standardize=True)', 'FitNet()', 'Projected(Cosine())']
    x = torch.ones(2,3)
    assert repr(VID(4.).build(x, x)) == 'VID(init_variance=4.0)'

# --- each against its formula ---

variants = registered + [SoftTarget(standardize=True), DecoupledKD(alpha=.5, beta=3), DecoupledKD(standardize=True), NormalizedKD(gamma=2.5), DIST(beta=2, gamma=.5),
                         TeacherBounded(.5), Attention(3), ActivationBoundaries(1.5), VID(init_variance=3), RKD(7, 0), RKD(0, 3),
                         MultiLevel((1,3.5), batch=2, classes=.5), MultiLevel(standardize=True), MGD(.7), MGD(.3, channels=True), one_pair['ReviewKD'](2), one_pair['CRD'](5, .5, .2, 3)]

def at_temperature(loss, T):
    "A copy of it at this temperature, where it has one"
    loss = deepcopy(loss)
    if loss_needs(loss).T is not None: loss.T = T
    return loss

@pytest.mark.parametrize('loss', [l for l in variants if is_on_logits(l)], ids=repr)
@settings(deadline=None, max_examples=40)
@given(b=st.integers(2,5), c=st.integers(3,12), seed=seeds, T=temps, dtype=dtypes)
def test_on_logits_equal_the_formula(loss, b, c, seed, T, dtype):
    s,t = 3*randn(seed, b, c, dtype=dtype),3*randn(seed+1, b, c, dtype=dtype)
    y = labels(loss, s, seed)
    loss = at_temperature(loss, T)
    # what is left of probabilities that are all but equal has fewer digits the higher the temperature
    scale = 100*max(1,T)**2*(1+T*isinstance(loss, DIST))
    check(loss(s, t, *y), np_.expected(loss, *np64(s, t), *(x.numpy() for x in y)), dtype, scale)

@pytest.mark.parametrize('loss,formula,args', [(DecoupledKD(3, 2, 5), np_.decoupled_item, (3,2,5)), (NormalizedKD(2), np_.normalized_item, (2,1.5))])
@settings(deadline=None, max_examples=30)
@given(b=sizes, c=st.integers(2,6), seed=seeds, zeros=st.booleans())
def test_probabilities_as_labels(loss, formula, args, b, c, seed, zeros):
    s,t,y = 3*randn(seed, b, c),3*randn(seed+1, b, c),randn(seed+2, b, c).softmax(1)
    if zeros: y = y*(y == y.amax(1, keepdim=True)); y = y/y.sum(1, keepdim=True)
    check(loss(s, t, y), np_.of_probabilities(formula, *np64(s, t, y), *args), torch.float64, 100)

@settings(deadline=None, max_examples=40)
@given(st.integers(1,5), st.integers(1,4), seeds, st.floats(0,3), dtypes)
def test_teacher_bounded_equals_the_formula(b, c, seed, margin, dtype):
    s,t,y = (randn(seed+i, b, c, dtype=dtype) for i in range(3))
    check(TeacherBounded(margin)(s, t, y), np_.teacher_bounded(*np64(s, t, y), margin), dtype)
    check(TeacherBounded(margin)(s[:,0], t[:,0], y[:,:1]), np_.teacher_bounded(*np64(s[:,:1], t[:,:1], y[:,:1]), margin), dtype)

@pytest.mark.parametrize('loss', [l for l in variants if not is_on_logits(l)], ids=repr)
@settings(deadline=None, max_examples=40)
@given(d=st.data(), seed=seeds, T=temps, dtype=dtypes)
def test_on_features_equal_the_formula(loss, d, seed, T, dtype):
    "`FitNet` without a projector"
    needs = loss_needs(loss)
    a,b = d.draw(feature_shapes(needs.kinds, needs.same_channels or isinstance(loss, FitNet), needs.least_items, needs.least_positions))
    if isinstance(loss, PKT): assume(min(x[2 if len(x)==3 else 1] for x in (a,b)) > 2)     # opposite vectors: the logarithm of little more than eps
    if isinstance(loss, (OFD,ReviewKD)): assume(a[0]*np.prod(np.minimum(a[2:], b[2:])) > 1)     # for batch norm
    s,t = randn(seed, *a, dtype=dtype),randn(seed+1, *b, dtype=dtype)
    loss = built(at_temperature(loss, T), s, t)
    check(loss(s, t), np_.expected(loss, *np64(s, t)), dtype, scale=30*max(1, (needs.T or 0) and T/3)**2)

def test_attention_pools_the_features_first():
    "Features of opposite signs cancel where they are pooled: one in the corner is left"
    s = torch.tensor([[1.,-1.,2.,0.],[1.,-1.,0.,0.]], dtype=torch.float64).view(1,1,2,4)
    same,corner = torch.tensor([[1.,1.]]).double().view(1,1,1,2),torch.tensor([[0.,1.]]).double().view(1,1,1,2)
    for x in (s,s.mT):
        a,b = (same,corner) if x is s else (same.mT,corner.mT)
        assert Attention()(x, b) == 0 == Attention()(b, x)
        assert Attention()(x, a).item() == pytest.approx((1/2 + (1-1/2**.5)**2)/2)

def test_gradient_of_attention_at_other_sizes():
    "By differences of the formula, for whichever is larger"
    def grad(f, x, d=1e-6):
        def at(i, d): y = x.copy(); y.flat[i] += d; return f(y)
        return np.array([(at(i, d)-at(i, -d))/(2*d) for i in range(x.size)]).reshape(x.shape)
    for a,b in (((2,3,4,4),(2,5,2,2)), ((2,3,2,2),(2,2,5,3)), ((1,2,4,2),(1,2,2,4))):
        s,t = randn(0, *a).requires_grad_(),randn(1, *b)
        Attention()(s, t).backward()
        np.testing.assert_allclose(s.grad, grad(lambda x: np_.attention(x, t.numpy(), 2), s.detach().numpy()), atol=1e-8)

@settings(deadline=None, max_examples=40)
@given(st.data(), seeds, dtypes)
def test_vid_learns_a_variance_of_each_channel(d, seed, dtype):
    a,b = d.draw(feature_shapes((2,3,4), False))
    s,t = randn(seed, *a, dtype=dtype),randn(seed+1, *b, dtype=dtype)
    vid = VID(init_variance=3).build(s, t)
    torch.testing.assert_close(vid.variance, torch.full_like(vid.variance, 3))
    vid.scale.data += randn(seed, *vid.scale.shape, dtype=dtype)
    check(vid(s, t), np_.expected(vid, *np64(s, t)), dtype, scale=30)
    layers = [l for l in vid.mean if not isinstance(l, nn.ReLU)]
    c = b[2 if len(b)==3 else 1]
    assert len(layers) == 3 and all(l.bias is None and l.weight.flatten(1).shape[0] == c for l in layers)

@settings(deadline=None, max_examples=30)
@given(st.data(), seeds)
def test_projected_equals_a_projection_by_hand(d, seed):
    "1×1 convolution, batch norm of the batch's statistics and, after a ReLU, another; linear for the other kinds"
    a,b = d.draw(feature_shapes((2,3,4), False))
    if a[2 if len(a)==3 else 1] == b[2 if len(b)==3 else 1]: return
    s,t = randn(seed, *a),randn(seed+1, *b)
    for target,relu in ((t,False), (t.abs(),True)):
        for loss in (FitNet().build(s, target), Projected(nn.MSELoss()).build(s, target)):
            s_,t_ = np_.same_size(*np64(s, target))
            if s.ndim == 4:
                w,norm = np64(loss.projector[0].weight)[0][:,:,0,0],loss.projector[1]
                p = np.einsum('oc,bchw->bohw', w, s_)
                m,v = p.mean((0,2,3), keepdims=True),p.var((0,2,3), keepdims=True)
                p = (p-m)/np.sqrt(v+norm.eps)
                if relu and isinstance(loss, FitNet): p = np.maximum(p, 0)
            else: p = s_ @ np64(loss.projector[0].weight)[0].T + np64(loss.projector[0].bias)[0]
            check(loss(s, target), np.mean((p-t_)**2), torch.float64, 1e4)

# --- by hand ---

def test_cross_entropies_are_the_teachers_entropy_where_equal():
    "The gradient is 0 there, up to the part of the label, which would have it surer"
    x,y = randn(0, 3, 5).requires_grad_(),torch.arange(3)
    others = NormalizedKD(T=2, gamma=1)(x, x.detach(), y) + (x.softmax(1)*x.log_softmax(1)).gather(1, y[:,None]).mean()
    assert torch.autograd.grad(NormalizedKD(T=2)(x, x.detach(), y), x)[0].abs().max() > 0
    p = [softmax(np.delete(r, c)/2) for r,c in zip(*np64(x), y)]
    assert others.item() == pytest.approx(4*np.mean([-(q*np.log(q)).sum() for q in p]))

def test_extreme_logits_by_hand(): assert SoftTarget(1)(torch.tensor([[1e4,-1e4,0.]]), torch.tensor([[-1e4,1e4,0.]])).item() == pytest.approx(2e4)

def test_gradient_of_soft_target_by_hand():
    "d/ds of the loss is T (softmax(s/T) - softmax(t/T)) / B"
    s,t,T = randn(0, 4, 6).requires_grad_(),randn(1, 4, 6),3.
    SoftTarget(T)(s,t).backward()
    np.testing.assert_allclose(s.grad, T*(softmax(s.detach()/T, axis=1) - softmax(t/T, axis=1))/4, rtol=1e-9)

# --- precision ---

def test_full_precision_wraps_any_loss():
    seen = []
    def loss(s, t): seen.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))); return (s-t).sum()
    with torch.autocast('cpu', dtype=torch.bfloat16): full_precision(loss)(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    assert seen == [(torch.float32, torch.float64, False)]

def test_full_precision_casts_lists_and_tuples():
    from collections import namedtuple
    from fastai.torch_core import TensorImage
    Pair = namedtuple('Pair', 'one two')
    half,seen = torch.ones(2, dtype=torch.bfloat16),[]
    def loss(students, teachers, n): seen.append((students, teachers, torch.is_autocast_enabled('cpu'))); return n
    with torch.autocast('cpu', dtype=torch.bfloat16): assert full_precision(loss)([half,(half,half.double())], Pair(TensorImage(half), 'x'), 3) == 3
    (a,(b,c)),teachers,autocast = seen[0]
    assert [x.dtype for x in (a, b, c, teachers.one)] == [torch.float32,torch.float32,torch.float64,torch.float32] and not autocast
    assert type(teachers) is Pair and type(teachers.one) is torch.Tensor and teachers.two == 'x'

def test_the_device_is_that_of_the_first_tensor_also_in_a_list():
    "Autocast of the CPU is on and off; on another device it has no say"
    def loss(*args): return torch.is_autocast_enabled('cpu')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert not full_precision(loss)([3,[torch.ones(1)]], 4) and not full_precision(loss)(1)
        assert full_precision(loss)(['x',[torch.ones(1, device='meta')]], torch.ones(1))

def test_fastais_kinds_of_tensors():
    from fastai.torch_core import TensorCategory, TensorImage
    s,t,y = TensorImage(randn(0, 3, 5)),TensorImage(randn(1, 3, 5)),TensorCategory(torch.arange(3))
    assert type(DecoupledKD()(s, t, y)) is torch.Tensor and DecoupledKD()(s, t, y) == DecoupledKD()(*(x.as_subclass(torch.Tensor) for x in (s, t, y)))

@pytest.mark.parametrize('student,teacher', [(torch.float32,torch.float64),(torch.float64,torch.float32),(torch.float16,torch.float64),(torch.float32,torch.float32)])
def test_aligned_features_can_be_multiplied(student, teacher):
    "In the more precise of their types; the gradient is in the student's"
    from fastdistill.losses.base import FeatureLoss
    class Products(FeatureLoss):
        @full_precision
        def forward(self, s, t):
            a,b = self.aligned(s, t)
            if s.dtype == t.dtype: assert a is s and b is t
            return (a @ b.mT).square().mean()
    s,t = randn(0, 3, 4, 5).to(student).requires_grad_(),randn(1, 3, 4, 5).to(teacher)
    val = Products()(s, t)
    g, = torch.autograd.grad(val, s)
    assert val.dtype == torch.promote_types(torch.promote_types(student, teacher), torch.float32) and g.dtype == student
    a,b = np64(s, t)
    assert val.item() == pytest.approx(((a @ b.swapaxes(1, 2))**2).mean(), rel=1e-5)

# --- labels and arguments ---

def test_probabilities_with_positions():
    s,t = randn(0, 3, 5, 2, 4),randn(1, 3, 5, 2, 4)
    y = torch.randint(5, (3,2,4), generator=torch.Generator().manual_seed(0))
    for loss in (DecoupledKD(),NormalizedKD()):
        assert loss(s, t, torch.nn.functional.one_hot(y, 5).movedim(-1,1).double()).item() == pytest.approx(loss(s, t, y).item(), rel=1e-9)

def test_labels_to_ignore():
    s,t,y = randn(0, 4, 5),randn(1, 4, 5),torch.tensor([1,-100,2,-100])
    for loss in (DecoupledKD(),NormalizedKD()):
        assert loss(s, t, y).item() == pytest.approx(loss(s[::2], t[::2], y[::2]).item())
        assert loss(s, t, torch.full((4,), -100)).item() == 0

@pytest.mark.parametrize('label', [-1,255,5,-99,-101,2**40])
@pytest.mark.parametrize('loss', [DecoupledKD(),DecoupledKD(standardize=True),NormalizedKD()], ids=repr)
def test_labels_that_are_no_class(loss, label):
    s,t = randn(0, 4, 5),randn(1, 4, 5)
    with pytest.raises(ValueError, match=rf'labels from 0 to 4, or -100.*\[{label}\]'): loss(s, t, torch.tensor([1,-100,label,2]))
    s,t = (x.view(1,4,5).movedim(1,-1) for x in (s,t))     # with positions
    with pytest.raises(ValueError, match=rf'\[{label}\]'): loss(s, t, torch.tensor([[1,-100,label,2]]))

@pytest.mark.parametrize('loss', [DecoupledKD(),NormalizedKD()], ids=repr)
def test_small_types_of_labels(loss):
    "255 is no class, and no -1 either, in a mask of bytes"
    s,t,y = randn(0, 4, 5),randn(1, 4, 5),torch.tensor([1,0,4,2])
    for dtype in (torch.uint8,torch.int8,torch.int32): assert loss(s, t, y.to(dtype)) == loss(s, t, y)
    with pytest.raises(ValueError, match=r'\[255\]'): loss(s, t, torch.tensor([1,0,255,2], dtype=torch.uint8))

def test_labels_on_a_gpu_are_not_looked_at():
    "An index error would break the process's GPU and a look would wait for it: the loss of such a label is NaN there"
    for loss in (DecoupledKD(),DecoupledKD(standardize=True),NormalizedKD()):
        with torch.device('meta'): val = loss(torch.ones(4,5), torch.ones(4,5), torch.ones(4).long())     # anything that looks at a number raises
        assert val.is_meta and val.ndim == 0
        if torch.cuda.is_available():
            s,t = (randn(i, 4, 5).cuda().requires_grad_() for i in range(2))
            y = [torch.tensor(o, device='cuda') for o in ([1,-100,255,2], [1,-100,0,2])]
            torch.cuda.set_sync_debug_mode('error')
            try: vals = [loss(s, t, o) for o in y]
            finally: torch.cuda.set_sync_debug_mode('default')
            assert vals[0].isnan()
            torch.testing.assert_close(vals[1].cpu(), loss(s.cpu(), t.cpu(), y[1].cpu()))

def test_two_classes():
    s,t,y = randn(0, 4, 2),randn(1, 4, 2),torch.tensor([0,1,1,0])
    assert DecoupledKD(3, alpha=2)(s, t, y).item() == pytest.approx(2*SoftTarget(3)(s, t).item())
    assert NormalizedKD(2)(s, t, y).item() == pytest.approx(-(t.softmax(1)*s.log_softmax(1)).gather(1, y[:,None]).mean().item())
    assert DIST(2)(s, t).isfinite() and HardTarget()(s, t).isfinite()

def classes(**attributes):
    "The registered losses that say so of themselves"
    return [l for l in one_pair.values() if all(getattr(loss_needs(l), k) == v for k,v in attributes.items())]

def too_few(loss, kind, items=0, positions=0):
    "Call it with so many items or positions fewer than it needs; one of the two features has more positions"
    needs = loss_needs(loss)
    b,n = 3 if positions else needs.least_items-items,needs.least_positions-positions
    def of(n): return torch.ones({2:(b,3), 3:(b,n,3), 4:(b,3,n,1)}[kind])
    call(loss, of(n), of(n+(kind == 4)))

def test_which_losses_compare_items_and_positions():
    assert {DIST,Similarity,RKD,PKT} <= {*classes(least_items=2)} and {Attention,ChannelWise} <= {*classes(least_positions=2)}
    assert not [l for l in features if loss_needs(l).least_positions > 1 and 2 in loss_needs(l).kinds], 'a vector has one position'

features = [l for l in one_pair.values() if loss_needs(l).kinds]
x4,x3,x2 = torch.ones(2,3,4,4),torch.ones(2,4,3),torch.ones(2,3)
@pytest.mark.parametrize('make,msg', [
    (lambda: SoftTarget(0), 'above 0, but got T=0'), (lambda: SoftTarget(-1), 'T=-1'), (lambda: SoftTarget(float('nan')), 'T=nan'), (lambda: DIST(T=float('inf')), 'T=inf'),
    (lambda: DecoupledKD(T=0), 'T=0'), (lambda: DecoupledKD(beta=-1), 'beta=-1'), (lambda: DecoupledKD(alpha=-1), 'alpha=-1'), (lambda: NormalizedKD(gamma=-1), 'gamma=-1'),
    (lambda: NormalizedKD(T=0), 'T=0'), (lambda: DIST(gamma=-1), 'gamma=-1'), (lambda: MultiLabelSoftTarget(T=0), 'T=0'), (lambda: TeacherBounded(-1), 'margin=-1'),
    (lambda: Attention(0.9), 'p=0.9'), (lambda: Attention(float('nan')), 'p=nan'), (lambda: ActivationBoundaries(-1), 'margin=-1'), (lambda: ChannelWise(0), 'T=0'),
    (lambda: VID(init_variance=0), 'init_variance=0'), (lambda: VID(eps=0), 'eps=0'), (lambda: RKD(distance=-1), 'distance=-1'), (lambda: RKD(angle=-1), 'angle=-1'), (lambda: PKT(0), 'eps=0'),
    *[(lambda l=l: l()(torch.ones(2,1), torch.ones(2,1), *labels(l(), torch.ones(2,1))), '2 classes.*MultiLabelSoftTarget.*TeacherBounded') for l in classes(single_label=True)],
    *[(lambda l=l, T=T: l(T=T), f'above 0, but got T={T}') for l in registered_losses.values() if loss_needs(l()).T for T in (0,-1,float('nan'),float('inf'))],
    (lambda: MultiLevel(()), 'at least one temperature'), (lambda: MultiLevel((2,0)), 'temperature=0'), (lambda: MultiLevel(batch=-1), 'batch=-1'), (lambda: MultiLevel(classes=-1), 'classes=-1'),
    (lambda: MultiLevel(standardize=True)(torch.ones(2,2), torch.ones(2,2)), 'at least 3 classes'), *[(lambda m=m: MGD(m), f'below 1, but got mask={m}') for m in (1,-.1,float('nan'))],
    (lambda: ReviewKD(0), 'channels=0'), *[(lambda l=l: call(l, x4[:1,:,:1,:1], x4[:1,:2,:1,:1]), 'several items or positions.*drop_last') for l in (FitNet(), OFD(), one_pair['ReviewKD'](), Projected(nn.MSELoss()))],
    *[(lambda kw=kw: CRD(**kw), 'but got') for kw in (dict(negatives=0), dict(tau=0), dict(momentum=1), dict(momentum=-.1), dict(dim=0))],
    (lambda: SoftTarget()(torch.ones(3), torch.ones(3)), 'Expected logits of one shape'),
    (lambda: SoftTarget(standardize=True)(torch.ones(2,2), torch.ones(2,2)), 'at least 3 classes'), (lambda: DecoupledKD(standardize=True)(torch.ones(2,2), torch.ones(2,2), torch.ones(2).long()), 'at least 3 classes'),
    (lambda: Logits()(torch.ones(2,1), torch.ones(2,4)), r'student \(2, 1\) and teacher \(2, 4\)'), (lambda: MultiLabelSoftTarget()(x2, torch.ones(2,1)), 'one shape'),
    *[(lambda l=l, y=y: l()(x2, x2, y), r'integer labels \(2,\) or probabilities \(2, 3\).*, but got') for l in (DecoupledKD,NormalizedKD) for y in (torch.ones(3).long(), torch.ones(2), torch.ones(2,4))],
    (lambda: TeacherBounded()(x2, x2, torch.ones(2)), r'as many values.*target \(2,\)'), (lambda: TeacherBounded()(x2, torch.ones(2,1), x2), 'as many values'),
    *[(lambda l=l: call(l(), x4, x3), 'same batch, but got') for l in features],
    *[(lambda l=l: call(l(), x4, x4[:1]), r'same batch, but got.*teacher \(1, 3, 4, 4\)') for l in features],
    *[(lambda l=l: call(l(), x4[None], x4[None]), r'same batch, but got') for l in features],
    *[(lambda l=l, x=x: l()(x, x), 'same batch, but got') for l in features for k,x in {2:x2, 3:x3, 4:x4}.items() if k not in loss_needs(l).kinds],
    *[(lambda l=l, x=x: l()(x, x), 'Expected feature maps') for l in classes(kinds=(4,)) for x in (x2,x3)], *[(lambda l=l: l()(x2, x2), 'Expected sequences') for l in classes(kinds=(3,4))],
    *[(lambda l=l: l()(x4, torch.ones(2,5,4,4)), 'same number of channels.*projector=True') for l in [FitNet, *classes(same_channels=True)]],
    *[(lambda l=l: l()(x3, torch.ones(2,5,3)), 'same number of tokens') for l in [FitNet, *classes(same_channels=True)] if 3 in loss_needs(l).kinds],
    *[(lambda l=l, k=k: too_few(l(), k, positions=1), f'at least {loss_needs(l).least_positions} positions.*earlier layer') for l in features if loss_needs(l).least_positions > 1 for k in loss_needs(l).kinds],
    *[(lambda l=l, k=k: too_few(l(), k, items=1), f'at least {loss_needs(l).least_items} items.*drop_last') for l in registered_losses.values() if loss_needs(l).least_items > 1 for k in kinds(l())],
    *[(lambda l=l: l(x4, x4), r'build\(student, teacher\)') for l in (VID(), MGD(), OFD(), one_pair['ReviewKD'](), Projected(nn.MSELoss()))], (lambda: one_pair['CRD']()(x4, x4), r'build\(student, teacher, n_items\)'), (lambda: CRD().build(x4, x4, 1), 'at least 2 items, but got 1'),
    *[(lambda y=y: CRD().build(x4, x4, 5)(x4, x4, y), m) for y,m in ((torch.tensor([0,5]), 'from 0 to 4, but got 0 to 5'), (torch.tensor([-1,2]), 'got -1 to 2'), (torch.tensor([0]), 'each of 2 items'), (torch.zeros(2), 'each of 2 items'))],
    (lambda: ReviewKD().build([x4,x4], [x4]), 'but got 2 and 1'), (lambda: ReviewKD().build([], []), 'but got 0 and 0'), (lambda: OFD(nn.BatchNorm2d(4)).build(x4, x4), 'batch norm of 3 channels, but got 4'),
    (lambda: VID().build(x4, x3), 'same batch'), (lambda: create_projector(x4, x2), 'same batch')])
def test_bad_input(make, msg):
    with pytest.raises(ValueError, match=f'(?s){msg}'): make()

def test_misspelt_option():
    with pytest.raises(TypeError, match='temperature'): SoftTarget(temperature=3)

def test_labels_are_needed():
    for loss in classes(needs_targ=True):
        with pytest.raises(TypeError, match='targ'): loss()(x2, x2)
