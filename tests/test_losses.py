"Losses against formulas written with NumPy and SciPy, and properties over random shapes and values."
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.special import rel_entr, softmax
from torch.autograd import gradcheck
from fastdistill.losses import Attention, Logits, SoftTarget, full_precision

def soft_target(s, t, T): return T**2 * rel_entr(softmax(t/T, axis=1), softmax(s/T, axis=1)).sum(1).mean()

def attention(s, t, p):
    "Image by image, in plain loops over positions; the larger map is pooled by plain means"
    def maps(fm): return (np.abs(fm)**p).mean(1)
    def pool(m, h, w):
        H,W = m.shape
        rows = [(i*H//h, -(-(i+1)*H//h)) for i in range(h)]
        cols = [(j*W//w, -(-(j+1)*W//w)) for j in range(w)]
        return np.array([[m[a:b,c:d].mean() for c,d in cols] for a,b in rows])
    total,count = 0.,0
    for a,b in zip(maps(s), maps(t)):
        h,w = (min(x,y) for x,y in zip(a.shape, b.shape))
        a,b = (pool(m, h, w).ravel() for m in (a,b))
        a,b = (m/max(np.linalg.norm(m), 1e-12) for m in (a,b))     # a map that is all but zero is not blown up
        for x,y in zip(a, b): total,count = total + (x-y)**2,count + 1
    return total/count

sizes,seeds = st.integers(1,5),st.integers(0,10**6)
def randn(seed, *shape, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(2,12), seeds, st.floats(0.5,20), st.sampled_from([torch.float32,torch.float64]))
def test_soft_target_equals_scipy(b, c, seed, T, dtype):
    s,t = 3*randn(seed, b, c, dtype=dtype),3*randn(seed+1, b, c, dtype=dtype)
    want = soft_target(s.double().numpy(), t.double().numpy(), T)
    digits = 1e-6 if dtype==torch.float32 else 1e-14     # of probabilities, which T² scales
    assert SoftTarget(T)(s,t).item() == pytest.approx(want, rel=1e3*digits, abs=digits*T**2)

@settings(deadline=None, max_examples=60)
@given(sizes, st.tuples(sizes,sizes,sizes), st.tuples(sizes,sizes,sizes), seeds, st.sampled_from([1,2,3,2.5]))
def test_attention_equals_loops(b, cs, ct, seed, p):
    s,t = randn(seed, b, *cs),randn(seed+1, b, *ct)
    assert Attention(p)(s,t).item() == pytest.approx(attention(s.numpy(), t.numpy(), p), rel=1e-9, abs=1e-12)

@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(2,6), sizes, seeds)
def test_positions_are_averaged(b, c, n, seed):
    s,t = randn(seed, b, c, n, 2),randn(seed+1, b, c, n, 2)
    s2,t2 = (x.permute(0,2,3,1).reshape(-1,c) for x in (s,t))
    for loss in (SoftTarget(2), Logits()): assert loss(s,t).item() == pytest.approx(loss(s2,t2).item(), rel=1e-9)
    assert Logits()(s,t).item() == pytest.approx(np.mean((s-t).numpy()**2), rel=1e-9)
    assert SoftTarget(2, axis=-1)(s2,t2).item() == pytest.approx(SoftTarget(2)(s,t).item(), rel=1e-9)

@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(2,8), seeds, st.floats(-4,4), st.sampled_from([torch.float16,torch.bfloat16,torch.float32]))
def test_never_negative_always_finite(b, c, seed, power, dtype):
    s,t = (randn(seed+i, b, c, 4, 4, dtype=torch.float32)*10**power for i in range(2))
    s,t = s.to(dtype).requires_grad_(),t.to(dtype)
    for loss in (SoftTarget(), Logits(), Attention(), Attention(1)):
        val = loss(s,t)
        assert val.isfinite() and val >= -1e-5 and val.dtype == torch.float32     # rounding, times T² = 25
        assert torch.autograd.grad(val, s)[0].isfinite().all()

@pytest.mark.parametrize('loss', [SoftTarget(), SoftTarget(1), Logits(), Attention(), Attention(3)])
def test_zero_where_equal(loss):
    x = randn(0, 3, 4, 5, 5)*100
    assert loss(x,x).item() == pytest.approx(0, abs=1e-12)

def test_attention_ignores_scale_and_sign():
    s,t = randn(0, 3, 4, 5, 5),randn(1, 3, 7, 5, 5)
    assert Attention()(s,t).item() == pytest.approx(Attention()(-5*s, 0.01*t).item(), rel=1e-9)

@pytest.mark.parametrize('loss,shape', [(SoftTarget(3),(3,4)), (SoftTarget(3),(2,3,2)), (Logits(),(3,4)), (Attention(),(2,3,4,4)), (Attention(3),(2,3,4,4))])
def test_gradients(loss, shape):
    s,t = randn(0, *shape).requires_grad_(),randn(1, *shape)
    assert gradcheck(lambda x: loss(x,t), s)

def test_gradient_of_soft_target_by_hand():
    "d/ds of the loss is T (softmax(s/T) - softmax(t/T)) / B"
    s,t,T = randn(0, 4, 6).requires_grad_(),randn(1, 4, 6),3.
    SoftTarget(T)(s,t).backward()
    np.testing.assert_allclose(s.grad, T*(softmax(s.detach()/T, axis=1) - softmax(t/T, axis=1))/4, rtol=1e-9)

@pytest.mark.parametrize('big', [1e4, 6e4])
def test_extreme_logits(big):
    s,t = torch.tensor([[big,-big,0.]], requires_grad=True),torch.tensor([[-big,big,0.]])
    loss = SoftTarget(1)(s,t)
    assert loss.item() == pytest.approx(2*big)
    loss.backward()
    assert s.grad.isfinite().all()

@pytest.mark.parametrize('loss', [SoftTarget(), Logits(), Attention()])
def test_float32_inside_autocast(loss):
    s,t = randn(0, 4, 3, 6, 6, dtype=torch.bfloat16),randn(1, 4, 3, 6, 6, dtype=torch.bfloat16)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = loss(s,t)
        assert torch.is_autocast_enabled('cpu')
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(loss(s.double(), t.double()).item(), rel=1e-4)

def test_full_precision_wraps_any_loss():
    seen = []
    def loss(s, t): seen.append((s.dtype, t.dtype, torch.is_autocast_enabled('cpu'))); return (s-t).sum()
    with torch.autocast('cpu', dtype=torch.bfloat16): full_precision(loss)(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    assert seen == [(torch.float32, torch.float64, False)]

@pytest.mark.parametrize('make,msg', [
    (lambda: SoftTarget(0), 'T above 0, but got T=0'), (lambda: SoftTarget(-1), 'T=-1'), (lambda: SoftTarget(float('nan')), 'T=nan'),
    (lambda: Attention(0.9), 'p=0.9'), (lambda: Attention(float('nan')), 'p=nan'),
    (lambda: SoftTarget()(torch.ones(2,1), torch.ones(2,1)), 'at least 2 classes'),
    (lambda: SoftTarget()(torch.ones(3), torch.ones(3)), 'Expected logits of one shape'),
    (lambda: Logits()(torch.ones(2,1), torch.ones(2,4)), r'student \(2, 1\) and teacher \(2, 4\)'),
    (lambda: Attention()(torch.ones(2,3,4), torch.ones(2,3,4)), r'student \(2, 3, 4\)'),
    (lambda: Attention()(torch.ones(2,3,4,4), torch.ones(1,3,4,4)), r'teacher \(1, 3, 4, 4\)')])
def test_bad_input(make, msg):
    with pytest.raises(ValueError, match=msg): make()

def test_misspelt_option():
    with pytest.raises(TypeError, match='temperature'): SoftTarget(temperature=3)
