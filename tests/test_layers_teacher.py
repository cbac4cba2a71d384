"Finding and capturing layers, and the frozen model, where a page would be crowded."
from collections import OrderedDict
import pytest, torch
from torch import nn
from torchvision.models import resnet18
from conftest import n_hooks, net, same_state, state
from fastdistill.data import get_logits
from fastdistill.layers import FeatureHooks, get_layer, get_model_layers, unwrap_model
from fastdistill.teacher import Teacher

def test_names_are_those_of_pytorch():
    model = resnet18()
    names = get_model_layers(model)
    assert names == [n for n,_ in model.named_modules() if n]
    assert get_model_layers(model, get_layer_repr=True) == {n:repr(m) for n,m in model.named_modules() if n}

@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_names_of_wrapped_models(wrap):
    model = net()
    assert unwrap_model(wrap(model)) is model
    assert get_model_layers(wrap(model)) == get_model_layers(model)
    assert get_layer(wrap(model), '1.0') is model[1][0]

@pytest.mark.parametrize('name', ['', '9', '1.9', None, 'layer'])
def test_unknown_name(name):
    with pytest.raises(KeyError, match='no layer .*Nearest names: .*get_model_layers'): get_layer(net(), name)

def test_order_and_repetition():
    model,x = net(),torch.randn(2,2,8,8)
    with FeatureHooks(model, ['4','0','1','0']) as hooks:
        pred = model(x)
        feats = hooks.features
    first = model[0](x)   # batch norm in training mode depends on the batch only
    torch.testing.assert_close(feats[0], pred)
    for f in (feats[1],feats[3]): torch.testing.assert_close(f, first)
    assert feats[2].shape == (2,8,2,2)
    assert n_hooks(model) == 0

@pytest.mark.parametrize('grad', [True,False])
def test_inplace_activation_cannot_change_a_feature(grad):
    model = net().eval()
    with torch.set_grad_enabled(grad), FeatureHooks(model, ['0.1','0.0']) as hooks:
        for _ in range(3):
            x = torch.randn(2,2,8,8)
            model(x)
            bn,conv = hooks.features
            torch.testing.assert_close(bn, model[0][1](model[0][0](x)))
            torch.testing.assert_close(conv, model[0][0](x))
            assert (bn<0).any()
    assert [h.copies for h in hooks] == [True,False]

def test_gradient_flows_through_a_copied_feature():
    model,x = net().eval(),torch.randn(2,2,8,8)
    def grad(feature):
        model.zero_grad()
        feature.square().sum().backward()
        return model[0][0].weight.grad.clone()
    want = grad(model[0][1](model[0][0](x)))
    with FeatureHooks(model, ['0.1']) as hooks:
        for _ in range(2):
            model(x)
            torch.testing.assert_close(grad(hooks.features[0]), want)

class Odd(nn.Module):
    "Returns a dictionary from one layer, nothing from another, and skips a third"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = DictOut(),NoneOut(),nn.Identity()
    def forward(self, x): self.b(x); return self.a(x)['out']
class DictOut(nn.Module):
    def forward(self, x): return dict(out=x)
class NoneOut(nn.Module):
    def forward(self, x): return None

@pytest.mark.parametrize('name,msg', [('a','returned dict'), ('b','returned NoneType'), ('c','did not run')])
def test_layer_without_a_tensor(name, msg):
    model = Odd()
    with FeatureHooks(model, [name], role='student') as hooks:
        model(torch.ones(1,2))
        with pytest.raises(ValueError, match=f"Layer '{name}' ({msg}).*student Odd"): hooks.features

def test_features_are_forgotten():
    model = net()
    with FeatureHooks(model, ['0']) as hooks:
        model(torch.randn(2,2,8,8))
        hooks.clear()
        with pytest.raises(ValueError, match='did not run'): hooks.features

def test_teacher_gives_back_modes_gradients_and_weights():
    model = net(dropout=0.5).train()
    model[1].eval()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before,x = state(model),torch.randn(4,2,8,8)
    teacher = Teacher(model)
    teacher.start('cpu')
    a,b = teacher(x),teacher(x)
    assert torch.equal(a,b) and not a.requires_grad and not any(m.training for m in model.modules())
    teacher.stop(); teacher.stop()
    assert [m.training for m in model] == [True,False,True,True,True]
    assert same_state(model, before) and (model[4].weight.grad==1).all() and model[0][0].weight.grad is None

def test_teacher_takes_every_input():
    class Two(nn.Module):
        def forward(self, a, b): return OrderedDict(loss=torch.tensor(0.), logits=a+b)
    teacher = Teacher(Two())
    teacher.start('cpu')     # no parameters, so no device to come back to
    assert torch.equal(teacher(torch.ones(2,3), torch.ones(2,3)), torch.full((2,3), 2.))
    teacher.stop()

@pytest.mark.parametrize('out', [dict(scores=1), (), [None], 'logits', None])
def test_no_logits(out):
    with pytest.raises(TypeError, match='Expected logits'): get_logits(out)
