"A folder of images: the data, networks and losses by name."
import sys
import numpy as np, pytest, torch
from PIL import Image
from fastdistill.images import distill_images, image_dls, image_loss, image_losses, image_teacher, plain_model
from fastdistill.losses.projected import Projected

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Ten red and ten blue pictures of 40 pixels, in train and valid"
    path,rng = tmp_path_factory.mktemp('images'),np.random.RandomState(0)
    for split in ('train','valid'):
        for c,name in enumerate(('red','blue')):
            (path/split/name).mkdir(parents=True)
            for i in range(10):
                a = rng.randint(0, 100, (40,40,3)); a[...,2*c] += 100
                Image.fromarray(a.astype(np.uint8)).save(path/split/name/f'{i}.png')
    return path

@pytest.mark.parametrize('name', ['DecoupledKD','ChannelWise'])
def test_a_loss_by_its_name(images, name):
    "On a teacher with other channels, whose head is fastai's"
    layers = dict(student_layers=['features.3'], teacher_layers=['0.5']) if name=='ChannelWise' else {}
    runs,learners,_ = distill_images(images, 'resnet18', 'mobilenet_v3_small', from_scratch=True, loss=name,
                                     epochs=1, seeds=1, size=32, bs=8, **layers)
    assert list(learners) == ['student, scratch',f'student, {name}'] and runs.accuracy.between(0, 1).all()

def test_every_loss_has_its_name():
    for name,loss in image_losses.items():
        layers = {} if loss.on_features is False else dict(student_layers='0', teacher_layers='0')
        match = image_loss(name, **layers)
        assert loss.__name__ == name and isinstance(match.loss, Projected) == loss.same_channels
    assert image_loss('DIST', 2).loss.T == 2 and image_loss('DIST').loss.T == 4

def test_random_split_is_the_same_every_time(images):
    a,b = (image_dls(images/'train', 32, 4, valid_pct=0.25) for _ in range(2))
    assert list(a.valid_ds.items) == list(b.valid_ds.items) and len(a.valid_ds) == 5

def test_no_head(images, monkeypatch):
    "What fastai says where it cannot take an architecture apart is one line"
    def fails(*_, **__): raise RuntimeError('sizes do not match\nat layer 3')
    monkeypatch.setattr('fastai.vision.all.vision_learner', fails)
    with pytest.raises(ValueError, match='cannot put a head of its own on googlenet .sizes do not match.. Try it as timm:NAME'): image_teacher(image_dls(images, 32, 8), 'googlenet')

def test_no_download(images, monkeypatch):
    "Without network, the ImageNet weights are an error with a cure"
    from urllib.error import URLError
    def offline(*_, **__): raise URLError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(images/'no_cache'))
    with pytest.raises(ValueError, match='--teacher_weights.*--from_scratch'): image_teacher(image_dls(images, 32, 8), 'resnet18')

def test_timm_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ValueError, match='pip install timm'): plain_model('timm:resnet18', 2)
