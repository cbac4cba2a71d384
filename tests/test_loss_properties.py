"Properties of all losses over random shapes and values: gradients, precision, tiny numbers, invariances."
from copy import deepcopy
import inspect
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.autograd import gradcheck
import formulas as np_
from loss_cases import *

# --- all of them ---

zero_at_equality = without(HardTarget, NormalizedKD, ActivationBoundaries, VID, MGD, OFD, ReviewKD, CRD, Projected)

@pytest.mark.parametrize('loss', zero_at_equality, ids=repr)
def test_zero_where_equal(loss):
    for scale in (0.1,1,100):
        x = scale*randn(0, *shapes(loss)[0])
        assert call(loss, x, x).item() == pytest.approx(0, abs=1e-10)
        x.requires_grad_()
        assert torch.autograd.grad(call(loss, x, x.detach()), x)[0].abs().max() < 1e-6

@pytest.mark.parametrize('kind', [2,3,4])
@pytest.mark.parametrize('loss', every, ids=repr)
def test_gradients(loss, kind):
    if kind not in kinds(loss): return
    s,t = (randn(i, *o) for i,o in enumerate(shapes(loss, kind)))
    loss = built(loss, s, t)
    assert gradcheck(lambda x: loss(x, t, *labels(loss, t)), s.requires_grad_())
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
    with torch.autocast('cpu', dtype=torch.bfloat16): val = loss(s, t, *labels(loss, s))
    assert val.isfinite() and val.dtype == torch.float32
    assert torch.autograd.grad(val, s)[0].isfinite().all()
    if not isinstance(loss, (VID,MGD,OFD,ReviewKD,CRD,Projected)) and not (isinstance(loss, DIST) and abs(power) > 1):     # correlations of probabilities that are all but equal, or 0 and 1, are rounding
        want = loss(s.double(), t.double(), *labels(loss, s)).item()
        assert val.item() == pytest.approx(want, rel=1e-3, abs=1e-4*(1+(loss_needs(loss).T or 1)**2))

@pytest.mark.parametrize('loss', every, ids=repr)
def test_constant_input_is_finite(loss):
    "A dead layer, a student that says nothing, items that are all the same"
    a,b = shapes(loss)
    for s,t in ((torch.zeros(a),randn(0, *b, dtype=torch.float32)), (randn(0, *a, dtype=torch.float32),torch.zeros(b)), (torch.zeros(a),torch.zeros(b)), (torch.ones(a),torch.ones(b))):
        s.requires_grad_()
        val = call(loss, s, t)
        grad = torch.autograd.grad(val, s)[0]
        assert val.isfinite() and grad.isfinite().all() and grad.abs().max() < (1e5 if isinstance(loss, ReviewKD) else 1e3)     # two batch norms that divide by the root of 1e-5

@pytest.mark.parametrize('loss', on_logits, ids=repr)
@pytest.mark.parametrize('big', [1e4,6e4])
def test_extreme_logits(loss, big):
    s = torch.tensor([[big,-big,0.],[0.,big,-big],[big,0.,0.]], requires_grad=True)
    for t in (-s.detach(), s.detach(), torch.zeros(3,3)):
        val = loss(s, t, *labels(loss, s))
        assert val.isfinite() and torch.autograd.grad(val, s)[0].isfinite().all()

@pytest.mark.parametrize('loss', without(TeacherBounded, losses=on_logits), ids=repr)     # which takes all values of an item together
def test_positions_count_as_items(loss):
    s,t = randn(0, 3, 5, 2, 4),randn(1, 3, 5, 2, 4)
    flat_s,flat_t = (x.permute(0,2,3,1).reshape(-1,5) for x in (s,t))
    y = labels(loss, s, 1)
    flat_y = [x.flatten() for x in y]
    assert loss(s, t, *y).item() == pytest.approx(loss(flat_s, flat_t, *flat_y).item(), rel=1e-9)
    if loss_needs(loss).axis is None: return
    last = type(loss)(**{k:getattr(loss, k) for k in inspect.signature(type(loss)).parameters} | dict(axis=-1))
    assert last(s.movedim(1,-1), t.movedim(1,-1), *y).item() == pytest.approx(loss(s, t, *y).item(), rel=1e-9)

@pytest.mark.parametrize('loss', on_features, ids=repr)
def test_one_channel_and_one_position(loss):
    "Or as many positions as the loss needs"
    n = loss_needs(loss).least_positions
    for shape in ({2:(2,1), 3:(2,n,1), 4:(2,1,n,1)}[kind] for kind in kinds(loss)):
        s,t = randn(0, *shape).requires_grad_(),randn(1, *shape)
        assert call(loss, s, t).isfinite() and torch.autograd.grad(call(loss, s, t), s)[0].isfinite().all()

@pytest.mark.parametrize('loss', every, ids=repr)
def test_the_smallest_batch(loss):
    "One item, for most of them; a loss that learns nothing from so few needs more, and has to say so"
    s,t = (randn(i, *o)[:loss_needs(loss).least_items] for i,o in enumerate(shapes(loss)))
    val = built(loss, s.requires_grad_(), t)(s, t, *labels(loss, s))
    assert val.isfinite()
    if not isinstance(loss, RKD): assert torch.autograd.grad(val, s)[0].abs().max() > 1e-6     # between two items there is one distance, which is 1 in units of itself

@pytest.mark.parametrize('loss', on_features, ids=repr)
def test_as_few_positions_as_it_needs(loss):
    "A loss that learns nothing from so few needs more, and has to say so"
    n = loss_needs(loss).least_positions
    for shape in ({2:(4,5), 3:(4,n,5), 4:(4,5,n,1)}[kind] for kind in kinds(loss)):
        s,t = randn(0, *shape).requires_grad_(),randn(1, *shape)
        assert torch.autograd.grad(call(loss, s, t), s)[0].abs().max() > 1e-6

# --- tiny numbers ---

def float32_and_64(loss, s, t, *targ):
    "Value and gradient of each, of the same numbers"
    for x in (s, s.double()):
        x = x.detach().requires_grad_()
        f = deepcopy(loss).to(x.dtype) if isinstance(loss, nn.Module) else loss
        val = f(x, t.to(x.dtype), *targ)
        yield val.item(),torch.autograd.grad(val, x)[0].double()

def same_as_float64(loss, s, t, *targ, rtol=1e-4):
    (v,g),(w,h) = float32_and_64(loss, s, t, *targ)
    assert g.isfinite().all() and v == pytest.approx(w, rel=rtol, abs=rtol)
    torch.testing.assert_close(g, h, rtol=0, atol=rtol*h.abs().max().item() + 1e-20)     # Attention(3)'s is 0 in float32 below 1e-22
    return g

def ignores_scale(loss, s, t):
    loss,s,t = deepcopy(loss).double(),s.double(),t.double()
    return loss(3*s, t).item() == pytest.approx(loss(s, t).item(), rel=1e-9)

tiny = {'all': lambda s,x: s*x, 'one item': lambda s,x: torch.cat([s[:1]*x, s[1:]]), 'one position': lambda s,x: torch.cat([s[...,:1]*x, s[...,1:]], -1)}
@pytest.mark.parametrize('where', tiny)
@pytest.mark.parametrize('loss', [*on_features,RKD(1,0),RKD(0,1),Attention(3)], ids=repr)
@settings(deadline=None, max_examples=15)
@given(power=st.floats(-28,-3), seed=seeds)
def test_tiny_features(loss, where, power, seed):
    "Where squares are 0 in float32"
    s,t = (randn(seed+i, *o, dtype=torch.float32) for i,o in enumerate(shapes(loss)))
    loss = built(loss, s, t)
    if isinstance(loss, Similarity): power = max(power, -14 if where == 'all' else -28)     # a product of two features has to be above 1e-30
    x = 10**power
    g = same_as_float64(loss, tiny[where](s, x), t, rtol=2e-3)
    if where == 'all' and ignores_scale(loss, s, t) and not isinstance(loss, Attention):     # its gradient grows as the scale shrinks; Attention's stops, where the norm is below 1e-12
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

@pytest.mark.parametrize('loss', [l for l in on_features if repr(l) != 'Attention(p=1)'], ids=repr)     # |x| divided by a norm of at least 1e-12: the slope at 0 is 1e12
def test_what_is_0_or_nearly_has_an_ordinary_gradient(loss):
    for kind in kinds(loss):
        a,b = shapes(loss, kind)
        for x in (0.,1e-31,1e-38,1e-45):
            s = torch.full(a, x).requires_grad_()
            g = torch.autograd.grad(call(loss, s, randn(0, *b, dtype=torch.float32)), s)[0]
            assert g.isfinite().all() and g.abs().max() < (1e5 if isinstance(loss, ReviewKD) else 100)     # two batch norms

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
    for loss in (SoftTarget(2, standardize=True),DecoupledKD(standardize=True)): same_as_float64(loss, s, t, *labels(loss, s), rtol=2e-3)

# --- float64 ---

@pytest.fixture(params=[torch.float32,torch.float64], ids=str)
def default_dtype(request):
    "PyTorch's default for new tensors"
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)

@pytest.mark.parametrize('soft', [False,True], ids=['classes','probabilities'])
@pytest.mark.parametrize('loss', every, ids=repr)
def test_float64_equals_float32(loss, soft, default_dtype):
    "Values and gradients, those of what is trained included, whatever the default; each in its own type"
    if soft and (not loss_needs(loss).needs_targ or is_on_values(loss)): return
    s,t,found = randn(0, *shapes(loss)[0]),randn(1, *shapes(loss)[1]),[]
    y = [randn(2, 3, 5).softmax(1)] if soft else labels(loss, s)
    weights = built(deepcopy(loss), s.float(), t.float()).state_dict()
    for dtype in (torch.float32,torch.float64):
        x = built(deepcopy(loss), s.to(dtype), t.to(dtype))
        x.load_state_dict(weights)
        a = s.to(dtype).requires_grad_()
        val = x(a, t.to(dtype), *(o.to(dtype) if o.is_floating_point() else o for o in y))
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
    val = x(s.requires_grad_(), t, *labels(loss, s))
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
        y = labels(loss, s)
        same(loss, loss(s, t, *y).item(), loss(s+shift, t-shift, *y).item())
    # the 1e-7 beside the standard deviation is felt where the scale is small
    assert SoftTarget(2, standardize=True)(s, t).item() == pytest.approx(SoftTarget(2, standardize=True)(scale*s+shift, t*scale).item(), rel=1e-2/min(1,scale)*1e-2)

@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.1,1), st.floats(0,.1))
def test_dist_ignores_scale_and_shift_of_the_probabilities(seed, scale, shift):
    p,t = randn(seed, 4, 5).softmax(1),randn(seed+1, 4, 5)
    moved = scale*p + (1-scale)/5     # rows still sum to 1
    assert DIST(1)(moved.log(), t).item() == pytest.approx(DIST(1)(p.log(), t).item(), rel=1e-9)

