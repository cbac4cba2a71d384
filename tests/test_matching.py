"Layers that correspond, in networks of many kinds."
import pytest, torch
from torch import nn
from conftest import learner, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.layers import get_layer

def test_match_layers_of_torchvision():
    from fastai.vision.all import create_vision_model, mobilenet_v3_small, resnet18, resnet34
    x = torch.randn(2, 3, 64, 64)
    student,teacher = resnet18(num_classes=2),create_vision_model(resnet34, 2, pretrained=False)
    teacher.train()
    before = state(teacher)
    pairs = match_layers(student, teacher, x)
    assert list(pairs) == [['layer1','layer2','layer3','layer4'],['0.4','0.5','0.6','0.7']] and set(pairs.table.channels) == {'same'}
    assert same_state(teacher, before) and all(m.training for m in teacher.modules()) and n_hooks(student, teacher) == 0
    table = match_layers(mobilenet_v3_small(num_classes=2), teacher, x).table
    assert table['teacher layer'].tolist() == ['0.4','0.5','0.6','0.7'] and set(table.channels) == {'need a projector'}
    assert [a[1:] for a in table['shape']] == [b[1:] for b in table['shape ']]     # the same resolution
    for choices in table['or of the teacher']: assert set(choices.split(', ')) <= set(get_model_layers(teacher))

def test_match_layers_feeds_the_callback(trained):
    learn = learner(net(4), trained.dls)
    x = learn.dls.one_batch()[0]
    learn.fit(1, cbs=KnowledgeDistillationCallback(trained, Attention, *match_layers(learn, trained, x), weight=0.9))
    half = Teacher(trained, input_tfm=lambda x: x)
    assert list(match_layers(learn, half, x)) == [['0','1'],['0','1']]

def test_match_layers_of_transformers():
    "Blocks at the same share of the depth"
    transformers = pytest.importorskip('transformers')
    def vit(n, width): return transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=width, num_hidden_layers=n, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16))
    s,t = match_layers(vit(2, 8), vit(6, 16), torch.randn(1, 3, 32, 32))
    assert [n[-1] for n in s] == ['0','1'] and [n[-1] for n in t] == ['2','5']

def swin(n=1):
    from torchvision.models import SwinTransformer
    return SwinTransformer(patch_size=[4,4], embed_dim=16, depths=[n]*3, num_heads=[1]*3, window_size=[4,4], num_classes=3)

def test_maps_with_the_channels_last_are_not_paired():
    "Swin's stages are (B, H, W, C): with 16 channels at 16×16 the shape alone would not tell"
    from torchvision.models import resnet18
    x,student,teacher = torch.randn(2, 3, 64, 64),resnet18(num_classes=3),swin()
    assert layer_shapes(teacher, x).set_index('layer')['shape']['features.1'] == (2,16,16,16)
    before = state(teacher)
    with pytest.raises(ValueError, match=r"go together.* layers of the teacher, 'features.0' among them, are left out: they return \(B, H, W, C\)"): match_layers(student, teacher, x)
    with pytest.raises(ValueError, match=r"layers of the student.*are left out"): match_layers(teacher, student, x)
    with pytest.raises(ValueError, match=r"layers of the student.*layers of the teacher"): match_layers(teacher, swin(2), x)
    assert same_state(teacher, before) and n_hooks(student, teacher) == 0 and all(m.training for m in teacher.modules())

class Stages(nn.Module):
    "Stages that halve the image; `last`: the first of them returns (B, H, W, C), which the next takes"
    def __init__(self, width, last=False, size=None):
        super().__init__()
        self.convs,self.last,self.size = nn.ModuleList(nn.Sequential(nn.Conv2d(i, width, 3, 2, 1), nn.ReLU()) for i in (3,width,width)),last,size
        if last: self.convs[0].append(Permute(0, 2, 3, 1)), self.convs[1].insert(0, Permute(0, 3, 1, 2))
        self.fc = nn.Linear(width, 3)
    def forward(self, x):
        if self.size and x.shape[-1] != self.size: raise ValueError('another size')
        for c in self.convs: x = c(x)
        return self.fc(x.mean((2,3)))

class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims
    def forward(self, x): return x.permute(self.dims)

def test_match_layers_tells_by_evidence():
    x = torch.randn(2, 3, 32, 32)
    convs = [f'convs.{i}' for i in range(3)]
    pairs = match_layers(Stages(4), Stages(16), x)
    assert list(pairs) == [convs,convs] and not pairs.notes
    pairs = match_layers(Stages(4), Stages(16, last=True), x)     # 16 channels at 16×16
    assert list(pairs) == [convs[1:]]*2 and 'left out: they return (B, H, W, C)' in repr(pairs) and "'convs.0' among them" in pairs._repr_html_().replace('&#x27;', "'")
    with pytest.raises(ValueError, match='cannot tell which are height and width'): match_layers(Stages(4), Stages(16, size=32), x)
    with pytest.raises(ValueError, match='cannot tell which are height and width'): match_layers(Stages(4, size=32), Stages(16), x)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.Linear(256, 3))     # for one size, which the last layer finds
    assert list(match_layers(flat, Stages(16), x)) == [['0','1'],convs[:2]]

def test_maps_are_not_paired_with_sequences():
    from torchvision.models import VisionTransformer, resnet18
    vit = VisionTransformer(image_size=64, patch_size=8, num_layers=2, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=3)
    x,cnn = torch.randn(2, 3, 64, 64),resnet18(num_classes=3)
    for s,t in ((cnn,vit),(vit,cnn)):
        with pytest.raises(ValueError, match='the same kind of features, maps or sequences'): match_layers(s, t, x)
    assert len(match_layers(vit, vit, x).table) == 2

def test_layer_shapes_against_hooks_of_fastai():
    from fastai.callback.hook import hook_outputs
    model,x = nn.Sequential(*list(net().children())[:2]),torch.randn(2, 2, 64, 64)
    table = layer_shapes(model, x)
    with hook_outputs([get_layer(model, n) for n in table.layer], detach=False) as hooks:
        model(x)
        assert table['shape'].tolist() == [tuple(o.shape) for o in hooks.stored]
    leaves = table[~table.block]
    assert leaves.depth.tolist() == pytest.approx([i/6 for i in range(1, 7)]) and table.set_index('layer').depth[['0','1']].tolist() == [0.5,1]
