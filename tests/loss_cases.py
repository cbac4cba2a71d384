"Every loss of the package, what to call it with, and numbers to compare: for the tests of losses."
from copy import deepcopy
import numpy as np
import pytest, torch
from hypothesis import strategies as st
from torch import nn
from fastdistill.losses import *
from fastdistill.losses.base import registered_losses

def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
def memories(loss): return {k:b for k,b in loss.named_buffers() if k.startswith('memory')}
def keep_memories(loss, _): loss.before = {k:b.clone() for k,b in memories(loss).items()}
def restore_memories(loss, *_):
    for k,b in memories(loss).items(): b.copy_(loss.before[k])

def built(loss, s, t):
    "As `Match` does; a call draws the same each time, and remembers nothing"
    if not loss_needs(loss).builds: return loss
    loss = deepcopy(loss).build(s.detach(), t)
    loss.register_forward_pre_hook(lambda *_: torch.manual_seed(0) and None)
    loss.register_forward_pre_hook(keep_memories)
    loss.register_forward_hook(restore_memories)
    return loss
def np64(*xs): return [x.detach().double().numpy() for x in xs]

sizes,seeds,temps = st.integers(1,4),st.integers(0,10**6),st.floats(0.5,20)
dtypes = st.sampled_from([torch.float32,torch.float64])

def check(got, want, dtype, scale=1.):
    "Equal up to the rounding of numbers of size `scale`"
    digits = 1e-6 if dtype==torch.float32 else 1e-14
    assert got.item() == pytest.approx(want, rel=1e3*digits, abs=10*digits*scale) and got.dtype == dtype and got.ndim == 0

# A new loss joins these lists by itself. Tests take what a loss can do from its attributes, or name the losses that they leave out, so that a new one
# is not left out by accident. They name the losses that they test only where a paper claims something of a loss, or where the numbers are worked out by hand.
def on_a_pair(cls):
    "The same class, which can be called and built with two tensors, as most losses are"
    needs = loss_needs(cls())
    if not (needs.all_layers or needs.needs_items): return cls
    def twice(x): return [x,x] if needs.all_layers else x
    class OnAPair(cls, registered=False):
        def build(self, s, t): return super().build(twice(s), twice(t), *[7]*needs.needs_items)
        def forward(self, s, t): return super().forward(twice(s), twice(t), *[torch.arange(len(s))]*needs.needs_items)
    OnAPair.__name__ = cls.__name__
    return OnAPair

one_pair = {name:on_a_pair(cls) for name,cls in registered_losses.items()}
small = dict(CRD=dict(negatives=20, dim=4))     # what would be slow to differentiate
registered = [cls(**small.get(name, {})) for name,cls in one_pair.items()]
every = registered + [SoftTarget(2, standardize=True), DecoupledKD(standardize=True), Attention(1), Projected(FitNet()), MultiLevel(standardize=True), MGD(.3, channels=True)]
def is_on_logits(loss): return loss_needs(loss).on_features is False
def is_on_values(loss): return is_on_logits(loss) and loss_needs(loss).needs_targ and loss_needs(loss).single_label is False
def kinds(loss): return (2,) if is_on_logits(loss) else loss_needs(loss).kinds

def without(*classes, losses=every): return [l for l in losses if not isinstance(l, classes)]
on_logits = [l for l in every if is_on_logits(l)]
on_features = [l for l in every if not is_on_logits(l)]

def shapes(loss, kind=None):
    "Of student and teacher, a batch of three"
    kind = max(kinds(loss)) if kind is None else kind
    return [{2:(3,5), 3:(3,4,5), 4:(3,5,4,4)}[kind]]*2

def labels(loss, s, seed=None):
    "In a list, and none for a loss that needs none; without `seed` the classes 0, 1, 2, ..."
    if not loss_needs(loss).needs_targ: return []
    if is_on_values(loss): return [randn(seed or 2, *s.shape).to(s)]
    items = s.select(1, 0).shape
    if seed is None: return [(torch.arange(items.numel())%s.shape[1]).view(items)]
    return [torch.randint(s.shape[1], items, generator=torch.Generator().manual_seed(seed))]

def call(loss, s, t): return built(loss, s, t)(s, t, *labels(loss, s))

@st.composite
def feature_shapes(draw, kinds, same, items=2, least=2):
    "Shapes of student and teacher, of at least so many items and positions: any channels and map sizes, unless they have to be the same"
    b,n = draw(st.integers(items,4)),draw(st.integers(least,5))
    cs = draw(st.integers(1,5)); ct = cs if same else draw(st.integers(1,5))
    def of(kind, c): return {2:(b,c), 3:(b,n,c), 4:(b,c,draw(st.integers(least,5)),draw(st.integers(1,5)))}[kind]
    kind = draw(st.sampled_from(kinds))
    return of(kind, cs),of(kind, ct)
