"One small real fit of each kind of data, on data that the test makes, through fastai's own loaders and learners."
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, RandomSplitter, accuracy, accuracy_multi,
                           set_seed)
from fastai.callback.rnn import ModelResetter, RNNCallback
from PIL import Image
from torch import nn
from conftest import n_hooks, same_state, state
from fastdistill.all import *
from fastdistill.data import get_logits

KD = KnowledgeDistillationCallback

class First(Callback):
    "The first batch as the loss saw it: inputs, predictions, labels and the parts of the loss"
    order = KD.order + .5
    def after_loss(self):
        if self.training and not hasattr(self, 'parts'):
            self.x,self.s,self.y = [x.clone() for x in self.xb],self.pred.detach().clone(),self.yb
            self.parts = {k:v.item() for k,v in self.knowledge_distillation.batch.parts.items()}

def kl(s, t, T=5., axis=1):
    "Hinton's loss, in NumPy and float64; all axes but that of the classes are items"
    s,t = (np.moveaxis(o.detach().cpu().numpy().astype(np.float64), axis, -1).reshape(-1, o.shape[axis])/T for o in (s,t))
    ls,lt = (o - np.log(np.exp(o - o.max(1, keepdims=True)).sum(1, keepdims=True)) - o.max(1, keepdims=True) for o in (s,t))
    return T*T*(np.exp(lt)*(lt-ls)).sum(1).mean()

def attention(s, t):
    "Squared difference of the maps' unit vectors, in NumPy and float64"
    s,t = (o.square().mean(1).flatten(1).cpu().numpy().astype(np.float64) for o in (s,t))
    s,t = (o/np.sqrt((o*o).sum(1, keepdims=True)) for o in (s,t))
    return ((s-t)**2).mean()

def features(model, names, x):
    "What these layers of the model return, kept by PyTorch's own hooks"
    seen,layers = {},dict(model.named_modules())
    handles = [layers[n].register_forward_hook(lambda m,i,o,n=n: seen.update({n:o.clone()})) for n in names]
    with torch.no_grad(): model(*x)
    for h in handles: h.remove()
    return [seen[n] for n in names]

def fits(learn, kd, model, epochs=1):
    "Fit, and check what holds for every kind of data; returns the first batch and the teacher's answer to it"
    found,student = state(model),state(learn.model)
    modes,hooks,first = [m.training for m in model.modules()],n_hooks(learn.model, model),First()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=[kd,first])
    assert same_state(model, found) and [m.training for m in model.modules()] == modes and n_hooks(learn.model, model) == hooks
    assert not same_state(learn.model, student) and all(np.isfinite(v) for v in learn.recorder.values[-1])
    with learn.no_bar(), learn.no_logging():
        assert learn.recorder.values[-1][1] == pytest.approx(learn.validate()[0], rel=1e-4)     # without the teacher
        preds,_ = learn.get_preds(reorder=False)
    assert len(preds) and torch.isfinite(preds).all()
    model.eval()
    getattr(model, 'reset', lambda: None)()
    with torch.no_grad(): answer = get_logits(model(*first.x))
    return first,answer

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Twelve noisy pictures of each of two colours"
    path,rng = tmp_path_factory.mktemp('pictures'),np.random.RandomState(0)
    for c,name in enumerate(('red','blue')):
        (path/name).mkdir()
        for i in range(12):
            a = rng.randint(0, 120, (32,32,3)); a[...,2*c] += 100
            Image.fromarray(a.astype(np.uint8)).save(path/name/f'{i}.png')
    return path

def test_vision(pictures):
    from fastai.vision.all import ImageDataLoaders, Normalize, aug_transforms, imagenet_stats, vision_learner
    from torchvision.models import resnet18
    dls = ImageDataLoaders.from_folder(pictures, valid_pct=.33, seed=0, bs=8, num_workers=0, batch_tfms=[*aug_transforms(size=64), Normalize.from_stats(*imagenet_stats)],
                                       device=torch.device('cpu'))
    teacher = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    learn = Learner(dls, resnet18(num_classes=2), metrics=accuracy)
    stages,blocks,found = [f'layer{i}' for i in range(1,5)],[f'0.{i}' for i in range(4,8)],deepcopy(learn.model).train()
    assert set(stages) <= set(get_model_layers(learn.model)) and set(blocks) <= set(get_model_layers(teacher.model))
    first,answer = fits(learn, KD(teacher, [SoftTarget, Match(Attention, stages, blocks, weight=9.)]), teacher.model)
    maps = [attention(*o) for o in zip(features(found, stages, first.x), features(teacher.model, blocks, first.x), strict=True)]
    assert min(maps) > 1e-4 and first.parts['kd_loss'] == pytest.approx(kl(first.s, answer) + 9*sum(maps), rel=1e-3)
    learn.predict(next((pictures/'red').iterdir()))
    fits(learn, KD(teacher, Attention, stages, blocks, weight=.9), teacher.model)

def test_tabular():
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(colour=rng.choice(['red','green','blue'], 60), size=rng.rand(60), age=rng.rand(60)))
    df['kind'] = np.where((df['size'] > .5) ^ (df.colour == 'red'), 'a', 'b')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify,FillMissing,Normalize], cat_names=['colour'], cont_names=['size','age'], y_names='kind', y_block=None,
                                     valid_idx=list(range(40,60)), bs=10, num_workers=0, device=torch.device('cpu'))
    teacher,learn = tabular_learner(dls, layers=[20,10], metrics=accuracy),tabular_learner(dls, layers=[4], metrics=accuracy)
    first,answer = fits(learn, KD(teacher), teacher.model)
    assert len(first.x) == 2 and first.parts['kd_loss'] == pytest.approx(kl(first.s, answer), rel=1e-3)     # of both inputs

@pytest.fixture(scope='module')
def texts():
    rng = np.random.RandomState(0)
    def text(words): return ' '.join(rng.choice(words, rng.randint(8, 15)))
    rows = [(text(['good','fine','nice','the','a','film']), 'yes') if i%2 else (text(['bad','dull','sad','the','a','film']), 'no') for i in range(40)]
    return pd.DataFrame(rows, columns=['text','label'])

def text_learner(make, dls, n_hid, **kwargs):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
    config = awd_lstm_lm_config if make.__name__.startswith('language') else awd_lstm_clas_config
    return make(dls, AWD_LSTM, pretrained=False, config=dict(config, emb_sz=n_hid, n_hid=n_hid, n_layers=2), metrics=accuracy, **kwargs)

def language_dls(texts):
    from fastai.text.all import BaseTokenizer, TextDataLoaders
    return TextDataLoaders.from_df(texts, valid_pct=.25, seed=0, text_col='text', is_lm=True, bs=4, seq_len=8, tok_tfm=BaseTokenizer(), num_workers=0, device=torch.device('cpu'))

def test_text_classification(texts):
    "The teacher answers tuples, the student's are unpacked by fastai's callback"
    from fastai.text.all import BaseTokenizer, TextDataLoaders, text_classifier_learner
    dls = TextDataLoaders.from_df(texts, valid_pct=.25, seed=0, text_col='text', label_col='label', bs=10, seq_len=8, tok_tfm=BaseTokenizer(), num_workers=0,
                                  device=torch.device('cpu'))
    teacher,learn = (text_learner(text_classifier_learner, dls, n) for n in (12,6))
    assert all(any(isinstance(cb, c) for cb in learn.cbs) for c in (ModelResetter,RNNCallback)) and isinstance(teacher.model(*dls.train.one_batch()[:1]), tuple)
    list(teacher.model[1].modules())[-1].weight.data *= 10     # logits that tell something
    first,answer = fits(learn, KD(teacher), teacher.model)
    assert first.parts['kd_loss'] == pytest.approx(kl(first.s, answer), rel=1e-3)

def test_language_model(texts):
    from fastai.text.all import language_model_learner
    set_seed(0)
    dls = language_dls(texts)
    teacher,learn = (text_learner(language_model_learner, dls, n) for n in (12,6))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match=r'expects the classes along axis 1 of the predictions \(4, 8, \d+\).*labels of shape \(4, 8\).*`SoftTarget\(axis=-1\)`'): learn.fit(1, cbs=KD(teacher))
    teacher.model[1].decoder.weight.data *= 30     # tied to the embedding; logits that tell something
    hidden = []
    def before(m, i): hidden.append(all(not h.any() for layer in m[0].hidden for h in layer))
    handle = teacher.model.register_forward_pre_hook(before)
    teacher.model[0].hidden = [[h+1 for h in layer] for layer in teacher.model[0].hidden]     # as some other text has left it
    first,answer = fits(learn, KD(teacher, SoftTarget(axis=-1)), teacher.model, epochs=2)
    handle.remove()
    n = len(dls.train)
    assert n > 1 and hidden == [True] + [False]*(n-1) + [True] + [False]*(n-1) + [True]     # at the start of each epoch, as the student's; the last is this test's own
    assert first.parts['kd_loss'] == pytest.approx(kl(first.s, answer, axis=-1), rel=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KD(teacher, SoftTarget(axis=-1)))
    assert not any(h.any() for layer in teacher.model[0].hidden for h in layer)     # forgotten at the end

def test_regularisation_of_recurrent_students_is_part_of_the_task(texts):
    "Weight 0 is the plain fit bit for bit, with AR and TAR on"
    from fastai.text.all import language_model_learner
    states = []
    for alpha,cbs in ((2.,True), (2.,False), (0.,False)):
        set_seed(0, reproducible=True)
        dls = language_dls(texts)
        teacher,learn = (text_learner(language_model_learner, dls, n, alpha=alpha, beta=alpha) for n in (12,6))
        set_seed(1, reproducible=True)
        dls.train.rng.seed(1)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=[KD(teacher, SoftTarget(axis=-1), weight=0.)] if cbs else [])
        states.append(state(learn.model))
    assert same_state(learn.model, states[2])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]) and not all(torch.equal(states[1][k], states[2][k]) for k in states[1])

def test_segmentation():
    from fastai.vision.all import DataBlock, ImageBlock, MaskBlock, PILImage, PILMask, unet_learner
    from torchvision.models import resnet18
    def image(i): return Image.fromarray((np.random.RandomState(i).rand(32,32,3)*100 + 100*mask(i)[...,None]).astype(np.uint8))
    def mask(i): a = np.zeros((32,32), np.uint8); a[4+i%3:20+i%3,4:20] = 1; return a
    block = DataBlock(blocks=(ImageBlock,MaskBlock(codes=['back','thing'])), get_x=lambda i: PILImage.create(image(i)), get_y=lambda i: PILMask.create(mask(i)), splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(list(range(10)), bs=4, num_workers=0, device=torch.device('cpu'))
    teacher = unet_learner(dls, resnet18, pretrained=False, n_out=2)
    student = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1), nn.PixelShuffle(2))
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(axis=1))
    first,answer = fits(learn, KD(teacher), teacher.model)
    assert first.s.shape == (4,2,32,32) and first.parts['kd_loss'] == pytest.approx(kl(first.s, answer), rel=1e-3)
    first,answer = fits(learn, KD(teacher, ChannelWise(T=2)), teacher.model)
    assert first.parts['kd_loss'] == pytest.approx(kl(first.s.flatten(0, 1).flatten(1), answer.flatten(0, 1).flatten(1), T=2), rel=1e-3)     # a distribution for each channel
    found = deepcopy(student)
    first,_ = fits(learn, KD(teacher, ChannelWise(T=2), '0', 'layers.0.0'), teacher.model)
    (s,),(t,) = features(found, ['0'], first.x),features(teacher.model, ['layers.0.0'], first.x)
    assert s.shape == t.shape == (4,64,16,16) and first.parts['kd_loss'] == pytest.approx(kl(s.flatten(0, 1).flatten(1), t.flatten(0, 1).flatten(1), T=2), rel=1e-3)

def tabular(y):
    "DataLoaders of items of four numbers"
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    items = list(zip(x, y(x)))
    return DataLoaders.from_dsets(items[:30], items[30:], bs=10, num_workers=0, device=torch.device('cpu'))

def net(n_out, width): return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, n_out))

def test_several_labels():
    learn = Learner(tabular(lambda x: (x[:,:3] > 0).float()), net(3, 4), loss_func=BCEWithLogitsLossFlat(), metrics=accuracy_multi)
    teacher = net(3, 16)
    first,answer = fits(learn, KD(teacher, MultiLabelSoftTarget), teacher)
    p,q = (torch.sigmoid(o.double()).numpy() for o in (answer,first.s))
    assert first.parts['kd_loss'] == pytest.approx((p*np.log(p/q) + (1-p)*np.log((1-p)/(1-q))).sum(1).mean(), rel=1e-4)

@pytest.mark.parametrize('loss,by_hand', [(TeacherBounded, lambda s,t,y: np.where((s-y)**2 > (t-y)**2, (s-y)**2, 0).sum(1).mean()), (Logits, lambda s,t,y: ((s-t)**2).mean())])
def test_values(loss, by_hand):
    learn = Learner(tabular(lambda x: x[:,:1]*2 + x[:,1:2]), net(1, 4), loss_func=MSELossFlat())
    teacher = net(1, 16)
    first,answer = fits(learn, KD(teacher, loss), teacher)
    assert first.parts['kd_loss'] == pytest.approx(by_hand(*(o.double().numpy() for o in (first.s,answer,first.y[0]))), rel=1e-4)
