"Losses against the formulas of the papers in NumPy, and properties over random shapes and values."
from copy import deepcopy
import numpy as np
import pytest, torch
from hypothesis import assume, given, settings, strategies as st
from scipy.special import softmax
from torch import nn
from torch.autograd import gradcheck
import formulas as np_
from fastdistill import losses
from fastdistill.losses import *

def randn(seed, *shape, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def built(loss, s, t): return loss.build(s.detach(), t) if hasattr(loss, 'build') else loss
def np64(*xs): return [x.detach().double().numpy() for x in xs]

sizes,seeds,temps = st.integers(1,4),st.integers(0,10**6),st.floats(0.5,20)
dtypes = st.sampled_from([torch.float32,torch.float64])

def check(got, want, dtype, scale=1.):
    "Equal up to the rounding of numbers of size `scale`"
    digits = 1e-6 if dtype==torch.float32 else 1e-14
    assert got.item() == pytest.approx(want, rel=1e3*digits, abs=10*digits*scale) and got.dtype == dtype and got.ndim == 0

# --- each against its formula ---

on_logits = {
    'SoftTarget':              (lambda T: SoftTarget(T), lambda s,t,y,T: np_.soft_target(s, t, T)),
    'SoftTarget standardised': (lambda T: SoftTarget(T, standardize=True), lambda s,t,y,T: np_.soft_target_standardized(s, t, T)),
    'Logits':                  (lambda T: Logits(), lambda s,t,y,T: np_.logits(s, t)),
    'HardTarget':              (lambda T: HardTarget(), lambda s,t,y,T: np_.hard_target(s, t)),
    'DecoupledKD':             (lambda T: DecoupledKD(T, alpha=.5, beta=3), lambda s,t,y,T: np_.decoupled_kd(s, t, y, T, .5, 3)),
    'DecoupledKD standardised':(lambda T: DecoupledKD(T, standardize=True), lambda s,t,y,T: np_.decoupled_kd(np_.zscore(s), np_.zscore(t), y, T, 1, 8)),
    'NormalizedKD':            (lambda T: NormalizedKD(T, gamma=2.5), lambda s,t,y,T: np_.normalized_kd(s, t, y, T, 2.5)),
    'DIST':                    (lambda T: DIST(T, beta=2, gamma=.5), lambda s,t,y,T: np_.dist(s, t, T, 2, .5)),
    'MultiLabelSoftTarget':    (lambda T: MultiLabelSoftTarget(T), lambda s,t,y,T: np_.multi_label(s, t, T)),
}
def labels(loss, y): return [y]*getattr(loss, 'needs_targ', False)

@pytest.mark.parametrize('name', on_logits)
@settings(deadline=None, max_examples=40)
@given(b=st.integers(2,5), c=st.integers(3,12), seed=seeds, T=temps, dtype=dtypes)
def test_on_logits_equal_the_formula(name, b, c, seed, T, dtype):
    make,formula = on_logits[name]
    s,t = 3*randn(seed, b, c, dtype=dtype),3*randn(seed+1, b, c, dtype=dtype)
    y = torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))
    loss = make(T)
    # what is left of probabilities that are all but equal has fewer digits the higher the temperature
    check(loss(s, t, *labels(loss, y)), formula(*np64(s, t), y.numpy(), T), dtype, scale=100*max(1,T)**2*(1+T*(name=='DIST')))

@pytest.mark.parametrize('loss,formula,args', [(DecoupledKD(3, 2, 5), np_._decoupled, (3,2,5)), (NormalizedKD(2), np_._normalized, (2,1.5))])
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

on_features = {   # loss, formula, kinds of features by their number of axes, same channels?
    'Attention':            (lambda: Attention(), lambda s,t: np_.attention(s, t, 2), (4,), False),
    'Attention, p=3':       (lambda: Attention(3), lambda s,t: np_.attention(s, t, 3), (4,), False),
    'FitNet':               (lambda: FitNet(), np_.fitnet, (2,3,4), True),
    'Cosine':               (lambda: Cosine(), np_.cosine, (2,3,4), True),
    'ActivationBoundaries': (lambda: ActivationBoundaries(), lambda s,t: np_.activation_boundaries(s, t, 1), (2,3,4), True),
    'ActivationBoundaries, margin 1.5': (lambda: ActivationBoundaries(1.5), lambda s,t: np_.activation_boundaries(s, t, 1.5), (2,3,4), True),
    'ChannelWise':          (lambda: ChannelWise(3), lambda s,t: np_.channel_wise(s, t, 3), (3,4), True),
    'Similarity':           (lambda: Similarity(), np_.similarity, (2,3,4), False),
    'RKD, distance':        (lambda: RKD(7, 0), lambda s,t: 7*np_.rkd_distance(s, t), (2,3,4), False),
    'RKD, angle':           (lambda: RKD(0, 3), lambda s,t: 3*np_.rkd_angle(s, t), (2,3,4), False),
    'PKT':                  (lambda: PKT(), np_.pkt, (2,3,4), False),
}
@st.composite
def feature_shapes(draw, kinds, same, least=2):
    "Shapes of student and teacher: any channels and map sizes, unless they have to be the same"
    b,n = draw(st.integers(2,4)),draw(st.integers(least,5))
    cs = draw(st.integers(1,5)); ct = cs if same else draw(st.integers(1,5))
    def of(kind, c): return {2:(b,c), 3:(b,n,c), 4:(b,c,draw(st.integers(least,5)),draw(st.integers(1,5)))}[kind]
    kind = draw(st.sampled_from(kinds))
    return of(kind, cs),of(kind, ct)

@pytest.mark.parametrize('name', on_features)
@settings(deadline=None, max_examples=40)
@given(d=st.data(), seed=seeds, dtype=dtypes)
def test_on_features_equal_the_formula(name, d, seed, dtype):
    make,formula,kinds,same = on_features[name]
    a,b = d.draw(feature_shapes(kinds, same))
    if name=='PKT': assume(min(x[2 if len(x)==3 else 1] for x in (a,b)) > 2)     # opposite vectors: the logarithm of little more than eps
    s,t = randn(seed, *a, dtype=dtype),randn(seed+1, *b, dtype=dtype)
    check(make()(s, t), formula(*np64(s, t)), dtype, scale=30)

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
def test_vid_equals_the_formula(d, seed, dtype):
    a,b = d.draw(feature_shapes((2,3,4), False))
    s,t = randn(seed, *a, dtype=dtype),randn(seed+1, *b, dtype=dtype)
    vid = VID(init_variance=3).build(s, t)
    vid.scale.data += randn(seed, *vid.scale.shape, dtype=dtype)
    if s.ndim == 4: s_,t_ = (torch.tensor(x, dtype=dtype) for x in np_.same_size(*np64(s, t)))
    else: s_,t_ = s,t
    variance = np.log1p(np.exp(*np64(vid.scale))) + 1e-5
    check(vid(s, t), np_.vid(*np64(vid.mean(s_)), variance, *np64(t_)), dtype, scale=30)
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

# --- what holds for all of them ---

every = [SoftTarget(), SoftTarget(2, standardize=True), Logits(), HardTarget(), DecoupledKD(), DecoupledKD(standardize=True), NormalizedKD(), DIST(), MultiLabelSoftTarget(),
         Attention(), Attention(1), FitNet(), Cosine(), ActivationBoundaries(), VID(), ChannelWise(), Similarity(), RKD(), PKT(), Projected(FitNet())]
zero_at_equality = [l for l in every if not isinstance(l, (HardTarget,NormalizedKD,ActivationBoundaries,VID,Projected))]
def is_on_logits(loss): return getattr(loss, 'on_features', True) is False
def shapes(loss, kind=4): return [(3,5)]*2 if is_on_logits(loss) else {2:[(3,5)]*2, 3:[(3,4,5)]*2, 4:[(3,5,4,4)]*2}[kind]
def call(loss, s, t): return built(loss, s, t)(s, t, *labels(loss, torch.arange(3)%5))

@pytest.mark.parametrize('loss', zero_at_equality, ids=repr)
def test_zero_where_equal(loss):
    for scale in (0.1,1,100):
        x = scale*randn(0, *shapes(loss)[0])
        assert call(loss, x, x).item() == pytest.approx(0, abs=1e-10)
        x.requires_grad_()
        assert torch.autograd.grad(call(loss, x, x.detach()), x)[0].abs().max() < 1e-6

def test_cross_entropies_are_the_teachers_entropy_where_equal():
    "The gradient is 0 there, up to the part of the label, which would have it surer"
    x,y = randn(0, 3, 5).requires_grad_(),torch.arange(3)
    others = NormalizedKD(T=2, gamma=1)(x, x.detach(), y) + (x.softmax(1)*x.log_softmax(1)).gather(1, y[:,None]).mean()
    assert torch.autograd.grad(NormalizedKD(T=2)(x, x.detach(), y), x)[0].abs().max() > 0
    p = [softmax(np.delete(r, c)/2) for r,c in zip(*np64(x), y)]
    assert others.item() == pytest.approx(4*np.mean([-(q*np.log(q)).sum() for q in p]))

@pytest.mark.parametrize('kind', [2,3,4])
@pytest.mark.parametrize('loss', every, ids=repr)
def test_gradients(loss, kind):
    if is_on_logits(loss) and kind != 2 or isinstance(loss, Attention) and kind != 4 or isinstance(loss, ChannelWise) and kind == 2: return
    s,t = (randn(i, *o) for i,o in enumerate(shapes(loss, kind)))
    loss = built(loss, s, t)
    assert gradcheck(lambda x: loss(x, t, *labels(loss, torch.arange(3)%5)), s.requires_grad_())
    for p in loss.parameters():
        def of(v): return torch.func.functional_call(loss, {next(n for n,o in loss.named_parameters() if o is p):v}, (s.detach(), t))
        assert gradcheck(of, p.detach().clone().requires_grad_())

@pytest.mark.parametrize('loss', every, ids=repr)
@settings(deadline=None, max_examples=25)
@given(seed=seeds, power=st.floats(-4,4), dtype=st.sampled_from([torch.float16,torch.bfloat16,torch.float32]))
def test_always_finite_and_close_to_float64(loss, seed, power, dtype):
    "In any precision and inside autocast the loss is computed in float32"
    if dtype == torch.float16: power = max(power, -2)    # where scale does not matter to a loss its gradient grows as inputs shrink, beyond float16's largest number
    s,t = ((randn(seed+i, *o)*10**power).to(dtype) for i,o in enumerate(shapes(loss)))
    s.requires_grad_()
    loss = built(loss, s.float(), t.float())
    with torch.autocast('cpu', dtype=torch.bfloat16): val = loss(s, t, *labels(loss, torch.arange(3)%5))
    assert val.isfinite() and val.dtype == torch.float32
    assert torch.autograd.grad(val, s)[0].isfinite().all()
    if not isinstance(loss, (VID,Projected)) and not (isinstance(loss, DIST) and abs(power) > 1):     # correlations of probabilities that are all but equal, or 0 and 1, are rounding
        want = loss(s.double(), t.double(), *labels(loss, torch.arange(3)%5)).item()
        assert val.item() == pytest.approx(want, rel=1e-3, abs=1e-4*(1+getattr(loss, 'T', 1)**2))

@pytest.mark.parametrize('loss', every, ids=repr)
def test_constant_input_is_finite(loss):
    "A dead layer, a student that says nothing, items that are all the same"
    a,b = shapes(loss)
    for s,t in ((torch.zeros(a),randn(0, *b, dtype=torch.float32)), (randn(0, *a, dtype=torch.float32),torch.zeros(b)), (torch.zeros(a),torch.zeros(b)), (torch.ones(a),torch.ones(b))):
        s.requires_grad_()
        val = call(loss, s, t)
        grad = torch.autograd.grad(val, s)[0]
        assert val.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e3

@pytest.mark.parametrize('loss', [l for l in every if is_on_logits(l)], ids=repr)
@pytest.mark.parametrize('big', [1e4,6e4])
def test_extreme_logits(loss, big):
    s = torch.tensor([[big,-big,0.],[0.,big,-big],[big,0.,0.]], requires_grad=True)
    for t in (-s.detach(), s.detach(), torch.zeros(3,3)):
        val = loss(s, t, *labels(loss, torch.tensor([0,1,2])))
        assert val.isfinite() and torch.autograd.grad(val, s)[0].isfinite().all()

def test_extreme_logits_by_hand(): assert SoftTarget(1)(torch.tensor([[1e4,-1e4,0.]]), torch.tensor([[-1e4,1e4,0.]])).item() == pytest.approx(2e4)

def test_gradient_of_soft_target_by_hand():
    "d/ds of the loss is T (softmax(s/T) - softmax(t/T)) / B"
    s,t,T = randn(0, 4, 6).requires_grad_(),randn(1, 4, 6),3.
    SoftTarget(T)(s,t).backward()
    np.testing.assert_allclose(s.grad, T*(softmax(s.detach()/T, axis=1) - softmax(t/T, axis=1))/4, rtol=1e-9)

def test_full_precision_wraps_any_loss():
    seen = []
    def loss(s, t): seen.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))); return (s-t).sum()
    with torch.autocast('cpu', dtype=torch.bfloat16): full_precision(loss)(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    assert seen == [(torch.float32, torch.float64, False)]

def test_fastais_kinds_of_tensors():
    from fastai.torch_core import TensorCategory, TensorImage
    s,t,y = TensorImage(randn(0, 3, 5)),TensorImage(randn(1, 3, 5)),TensorCategory(torch.arange(3))
    assert type(DecoupledKD()(s, t, y)) is torch.Tensor and DecoupledKD()(s, t, y) == DecoupledKD()(*(x.as_subclass(torch.Tensor) for x in (s, t, y)))

# --- tiny numbers ---

def float32_and_64(loss, s, t, *targ):
    "Value and gradient of each, of the same numbers"
    for x in (s, s.double()):
        x = x.detach().requires_grad_()
        val = loss(x, t.to(x.dtype), *targ)
        yield val.item(),torch.autograd.grad(val, x)[0].double()

def same_as_float64(loss, s, t, *targ, rtol=1e-4):
    (v,g),(w,h) = float32_and_64(loss, s, t, *targ)
    assert g.isfinite().all() and v == pytest.approx(w, rel=rtol, abs=rtol)
    torch.testing.assert_close(g, h, rtol=0, atol=rtol*h.abs().max().item() + 1e-20)     # Attention(3)'s is 0 in float32 below 1e-22
    return g

tiny = {'all': lambda s,x: s*x, 'one item': lambda s,x: torch.cat([s[:1]*x, s[1:]]), 'one position': lambda s,x: torch.cat([s[...,:1]*x, s[...,1:]], -1)}
@pytest.mark.parametrize('where', tiny)
@pytest.mark.parametrize('loss', [Cosine(),Similarity(),RKD(1,0),RKD(0,1),PKT(),Attention(),Attention(1),Attention(3)], ids=repr)
@settings(deadline=None, max_examples=15)
@given(power=st.floats(-28,-3), seed=seeds)
def test_tiny_features(loss, where, power, seed):
    "Where squares are 0 in float32"
    s,t = (randn(seed+i, 3, 5, 4, 4, dtype=torch.float32) for i in range(2))
    if isinstance(loss, Similarity): power = max(power, -14 if where == 'all' else -28)     # a product of two features has to be above 1e-30
    x = 10**power
    g = same_as_float64(loss, tiny[where](s, x), t, rtol=2e-3)
    if where == 'all' and not isinstance(loss, Attention):     # the gradient of a loss that ignores the scale grows as the scale shrinks
        _,(_,want) = float32_and_64(loss, s, t)
        torch.testing.assert_close(g*x, want, rtol=0, atol=2e-3*want.abs().max().item())

@settings(deadline=None, max_examples=40)
@given(power=st.floats(-29,4), seed=seeds, kind=st.sampled_from([2,3,4]))
def test_gradient_of_cosine_by_hand(power, seed, kind):
    "Of a position: (cos(s,t) s/|s| - t/|t|)/|s|, divided by their number"
    shape = {2:(3,5), 3:(3,4,5), 4:(3,5,2,2)}[kind]
    s,t = randn(seed, *shape, dtype=torch.float32)*10**power,randn(seed+1, *shape, dtype=torch.float32)
    (_,g),_ = float32_and_64(Cosine(), s, t)
    a,b,g = map(np_.positions, np64(s, t, g))
    length,unit = np.linalg.norm(a, axis=-1, keepdims=True),b/np.linalg.norm(b, axis=-1, keepdims=True)
    cos = (a/length*unit).sum(-1, keepdims=True)
    want = (cos*a/length - unit)/length/cos.size
    np.testing.assert_allclose(g*length, want*length, rtol=0, atol=1e-6)

def test_cosine_of_what_an_activation_leaves():
    "softplus(-40) is 4e-18: the gradient of what goes in is of an ordinary size"
    t = randn(1, 3, 5, dtype=torch.float32)
    for x in (-20,-30,-40,-60):
        before = randn(0, 3, 5, dtype=torch.float32) + x
        g = same_as_float64(lambda s, t: Cosine()(torch.nn.functional.softplus(s), t), before, t)
        assert 1e-3 < g.abs().max() < 1

def test_what_is_0_or_nearly_has_an_ordinary_gradient():
    for x in (0.,1e-31,1e-38,1e-45):
        for loss in (Cosine(),Similarity(),RKD(),PKT()):
            s = torch.full((3,5), x).requires_grad_()
            g = torch.autograd.grad(loss(s, randn(0, 3, 5, dtype=torch.float32)), s)[0]
            assert g.isfinite().all() and g.abs().max() < 100

@pytest.mark.parametrize('down', [10,30,50,60])
def test_dist_of_a_class_that_is_all_but_impossible(down):
    "exp(-60) squared is 0 in float32"
    s,t = randn(0, 4, 6, dtype=torch.float32),randn(1, 4, 6, dtype=torch.float32)
    s[:,2] -= down
    same_as_float64(DIST(1), s, t)
    assert DIST(1)(s, t).item() == pytest.approx(np_.dist(*np64(s, t), 1, 1, 1), rel=1e-4)

@settings(deadline=None, max_examples=30)
@given(power=st.floats(-28,3), seed=seeds)
def test_standardised_tiny_logits(power, seed):
    s,t = randn(seed, 4, 6, dtype=torch.float32)*10**power,randn(seed+1, 4, 6, dtype=torch.float32)
    for loss in (SoftTarget(2, standardize=True),DecoupledKD(standardize=True)): same_as_float64(loss, s, t, *labels(loss, torch.arange(4)), rtol=2e-3)

# --- float64 ---

@pytest.fixture(params=[torch.float32,torch.float64], ids=str)
def default_dtype(request):
    "PyTorch's default for new tensors"
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)

@pytest.mark.parametrize('soft', [False,True], ids=['classes','probabilities'])
@pytest.mark.parametrize('loss', every + [TeacherBounded()], ids=repr)
def test_float64_equals_float32(loss, soft, default_dtype):
    "Values and gradients, those of what is trained included, whatever the default; each in its own type"
    if soft and not hasattr(loss, 'needs_targ'): return
    s,t,found = randn(0, *shapes(loss)[0]),randn(1, *shapes(loss)[1]),[]
    y = randn(2, 3, 5).softmax(1) if soft or isinstance(loss, TeacherBounded) else torch.arange(3)
    weights = built(deepcopy(loss), s.float(), t.float()).state_dict()
    for dtype in (torch.float32,torch.float64):
        x = built(deepcopy(loss), s.to(dtype), t.to(dtype))
        x.load_state_dict(weights)
        a = s.to(dtype).requires_grad_()
        val = x(a, t.to(dtype), *labels(loss, y.to(dtype) if y.is_floating_point() else y))
        grads = torch.autograd.grad(val, [a, *x.parameters()])
        assert all(o.dtype == dtype for o in (val, *grads, *x.parameters()))
        found.append((val.detach().double(), *(g.double() for g in grads)))
    for a,b in zip(*found, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*max(1, b.abs().max().item()))

@pytest.mark.parametrize('loss', every, ids=repr)
@pytest.mark.parametrize('student,teacher', [(torch.float32,torch.float64),(torch.float64,torch.float32),(torch.float16,torch.float64)])
def test_a_teacher_of_another_precision(loss, student, teacher):
    "The gradient is in the student's"
    s,t = randn(0, *shapes(loss)[0]).to(student),randn(1, *shapes(loss)[1]).to(teacher)
    x = built(loss, s.to(torch.promote_types(student, torch.float32)), t)
    val = x(s.requires_grad_(), t, *labels(loss, torch.arange(3)))
    g, = torch.autograd.grad(val, s)
    assert val.isfinite() and g.dtype == student and g.isfinite().all()

# --- invariances that the papers claim ---

@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(1e-3,1e3), st.floats(-50,50))
def test_invariances(seed, scale, shift):
    s,t = randn(seed, 4, 5),randn(seed+1, 4, 5)
    fs,ft = randn(seed, 4, 3, 5, 5),randn(seed+1, 4, 7, 5, 5)
    def same(loss, a, b): assert a == pytest.approx(b, rel=1e-6, abs=1e-9), loss
    for loss in (Attention(), Similarity(), PKT(), RKD()): same(loss, loss(fs, ft).item(), loss(scale*fs, ft/scale).item())
    same('sign', Attention()(fs, ft).item(), Attention()(-fs, ft).item())
    same('rotation', RKD()(s, t).item(), RKD()(shift + s @ torch.linalg.qr(randn(seed, 5, 5))[0], t).item())
    same('scale', Cosine()(s, t).item(), Cosine()(scale*s, t).item())
    for loss in (SoftTarget(2), DecoupledKD(), DIST(), HardTarget(), NormalizedKD()):
        y = labels(loss, torch.arange(4))
        same(loss, loss(s, t, *y).item(), loss(s+shift, t-shift, *y).item())
    # the 1e-7 beside the standard deviation is felt where the scale is small
    assert SoftTarget(2, standardize=True)(s, t).item() == pytest.approx(SoftTarget(2, standardize=True)(scale*s+shift, t*scale).item(), rel=1e-2/min(1,scale)*1e-2)

@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1,1), st.floats(0,.1))
def test_dist_ignores_scale_and_shift_of_the_probabilities(seed, scale, shift):
    p,t = randn(seed, 4, 5).softmax(1),randn(seed+1, 4, 5)
    moved = scale*p + (1-scale)/5     # rows still sum to 1
    assert DIST(1)(moved.log(), t).item() == pytest.approx(DIST(1)(p.log(), t).item(), rel=1e-9)

# --- positions, sizes, edges ---

@pytest.mark.parametrize('loss', [l for l in every if is_on_logits(l)], ids=repr)
def test_positions_count_as_items(loss):
    s,t = randn(0, 3, 5, 2, 4),randn(1, 3, 5, 2, 4)
    flat_s,flat_t = (x.permute(0,2,3,1).reshape(-1,5) for x in (s,t))
    y = torch.randint(5, (3,2,4), generator=torch.Generator().manual_seed(0))
    assert loss(s, t, *labels(loss, y)).item() == pytest.approx(loss(flat_s, flat_t, *labels(loss, y.flatten())).item(), rel=1e-9)
    if not hasattr(loss, 'axis'): return
    last = type(loss)(**{k:getattr(loss, k) for k in ('T','standardize') if hasattr(loss, k)}, axis=-1)
    assert last(s.movedim(1,-1), t.movedim(1,-1), *labels(loss, y)).item() == pytest.approx(loss(s, t, *labels(loss, y)).item(), rel=1e-9)

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
    "An index error would break the process's GPU and a look would wait for it: the loss of such a label is NaN, of the others what it was"
    label,share = losses._class_labels(torch.tensor([1,-100,3]), 5, torch.float64)
    assert label[[0,2]].tolist() == [1,3] and share.tolist() == [.5,0,.5]
    with torch.device('meta'): y = torch.tensor([-1,255])
    label,share = losses._class_labels(y, 5, torch.float32)     # as on a GPU: anything that looks at a number raises
    assert label.shape == share.shape == (2,)
    if torch.cuda.is_available():
        s,t = (randn(i, 4, 5).cuda().requires_grad_() for i in range(2))
        for loss in (DecoupledKD(),NormalizedKD()):
            torch.cuda.set_sync_debug_mode('error')
            try: val = loss(s, t, torch.tensor([1,-100,255,2], device='cuda'))
            finally: torch.cuda.set_sync_debug_mode('default')
            assert val.isnan()

def test_two_classes():
    s,t,y = randn(0, 4, 2),randn(1, 4, 2),torch.tensor([0,1,1,0])
    assert DecoupledKD(3, alpha=2)(s, t, y).item() == pytest.approx(2*SoftTarget(3)(s, t).item())
    assert NormalizedKD(2)(s, t, y).item() == pytest.approx(-(t.softmax(1)*s.log_softmax(1)).gather(1, y[:,None]).mean().item())
    assert DIST(2)(s, t).isfinite() and HardTarget()(s, t).isfinite()

@pytest.mark.parametrize('loss', [FitNet(), Cosine(), ActivationBoundaries(), Similarity(), PKT(), RKD(), VID(), Projected(nn.MSELoss())], ids=repr)
def test_one_channel_and_one_position(loss):
    for shape in ((2,1,1,1), (2,1,1), (2,1)):
        s,t = randn(0, *shape).requires_grad_(),randn(1, *shape)
        assert call(loss, s, t).isfinite() and torch.autograd.grad(call(loss, s, t), s)[0].isfinite().all()

@pytest.mark.parametrize('loss', [l for l in every if not isinstance(l, (DIST,Similarity,PKT,RKD,Projected))], ids=repr)
def test_batch_of_one(loss):
    s,t = (randn(i, *o)[:1] for i,o in enumerate(shapes(loss)))
    assert built(loss, s, t)(s, t, *labels(loss, torch.tensor([2]))).isfinite()

x4,x3,x2 = torch.ones(2,3,4,4),torch.ones(2,4,3),torch.ones(2,3)
@pytest.mark.parametrize('make,msg', [
    (lambda: SoftTarget(0), 'above 0, but got T=0'), (lambda: SoftTarget(-1), 'T=-1'), (lambda: SoftTarget(float('nan')), 'T=nan'), (lambda: DIST(T=float('inf')), 'T=inf'),
    (lambda: DecoupledKD(T=0), 'T=0'), (lambda: DecoupledKD(beta=-1), 'beta=-1'), (lambda: DecoupledKD(alpha=-1), 'alpha=-1'), (lambda: NormalizedKD(gamma=-1), 'gamma=-1'),
    (lambda: NormalizedKD(T=0), 'T=0'), (lambda: DIST(gamma=-1), 'gamma=-1'), (lambda: MultiLabelSoftTarget(T=0), 'T=0'), (lambda: TeacherBounded(-1), 'margin=-1'),
    (lambda: Attention(0.9), 'p=0.9'), (lambda: Attention(float('nan')), 'p=nan'), (lambda: ActivationBoundaries(-1), 'margin=-1'), (lambda: ChannelWise(0), 'T=0'),
    (lambda: VID(init_variance=0), 'init_variance=0'), (lambda: VID(eps=0), 'eps=0'), (lambda: RKD(distance=-1), 'distance=-1'), (lambda: RKD(angle=-1), 'angle=-1'), (lambda: PKT(0), 'eps=0'),
    *[(lambda l=l: l()(torch.ones(2,1), torch.ones(2,1), *labels(l(), torch.zeros(2).long())), '2 classes.*MultiLabelSoftTarget.*TeacherBounded') for l in (SoftTarget,HardTarget,DecoupledKD,NormalizedKD,DIST)],
    (lambda: SoftTarget()(torch.ones(3), torch.ones(3)), 'Expected logits of one shape'),
    (lambda: SoftTarget(standardize=True)(torch.ones(2,2), torch.ones(2,2)), 'at least 3 classes'), (lambda: DecoupledKD(standardize=True)(torch.ones(2,2), torch.ones(2,2), torch.ones(2).long()), 'at least 3 classes'),
    (lambda: Logits()(torch.ones(2,1), torch.ones(2,4)), r'student \(2, 1\) and teacher \(2, 4\)'), (lambda: MultiLabelSoftTarget()(x2, torch.ones(2,1)), 'one shape'),
    (lambda: DIST()(x2[:1], x2[:1]), 'at least 2 items.*drop_last'),
    *[(lambda l=l, y=y: l()(x2, x2, y), r'integer labels \(2,\) or probabilities \(2, 3\).*, but got') for l in (DecoupledKD,NormalizedKD) for y in (torch.ones(3).long(), torch.ones(2), torch.ones(2,4))],
    (lambda: TeacherBounded()(x2, x2, torch.ones(2)), r'as many values.*target \(2,\)'), (lambda: TeacherBounded()(x2, torch.ones(2,1), x2), 'as many values'),
    *[(lambda l=l: l()(x4, x3), 'same batch, but got') for l in (Attention,FitNet,Cosine,ActivationBoundaries,ChannelWise,Similarity,RKD,PKT)],
    *[(lambda l=l: l()(x4, x4[:1]), r'same batch, but got.*teacher \(1, 3, 4, 4\)') for l in (Attention,FitNet,Cosine,ActivationBoundaries,ChannelWise,Similarity,RKD,PKT)],
    *[(lambda l=l: l()(x4[None], x4[None]), r'same batch, but got') for l in (Attention,FitNet,Cosine,ChannelWise,Similarity,RKD,PKT)],
    *[(lambda l=l: l()(x, x), 'Expected feature maps') for l in (Attention,) for x in (x2,x3)], (lambda: ChannelWise()(x2, x2), 'Expected sequences'),
    *[(lambda l=l: l()(x4, torch.ones(2,5,4,4)), 'same number of channels.*projector=True') for l in (FitNet,Cosine,ActivationBoundaries,ChannelWise)],
    *[(lambda l=l: l()(x3, torch.ones(2,5,3)), 'same number of tokens') for l in (FitNet,Cosine,ActivationBoundaries,ChannelWise)],
    (lambda: Attention()(x4, x4[:,:,:1,:1]), 'at least 2 positions.*earlier layer'), (lambda: ChannelWise()(x4, x4[:,:,:1,:1]), 'at least 2 positions'),
    *[(lambda l=l: l()(x2[:1], x2[:1]), 'at least 2 items.*drop_last') for l in (Similarity,RKD,PKT)],
    *[(lambda l=l: l(x4, x4), r'build\(student, teacher\)') for l in (VID(), Projected(nn.MSELoss()))], (lambda: VID().build(x4, x3), 'same batch'), (lambda: create_projector(x4, x2), 'same batch')])
def test_bad_input(make, msg):
    with pytest.raises(ValueError, match=f'(?s){msg}'): make()

def test_misspelt_option():
    with pytest.raises(TypeError, match='temperature'): SoftTarget(temperature=3)

def test_labels_are_needed():
    for loss in (DecoupledKD(), NormalizedKD(), TeacherBounded()):
        with pytest.raises(TypeError, match='targ'): loss(x2, x2)
