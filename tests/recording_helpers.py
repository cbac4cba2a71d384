"Pictures that are cropped and turned, texts in a stream, and teachers that stop: what the tests of recordings use."
import os, subprocess, sys
import numpy as np, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.text.data import LMDataLoader
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from fastai.vision.all import aug_transforms, CategoryBlock, DataBlock, ImageBlock, IndexSplitter, RandomResizedCrop
from fastdistill.callback import KnowledgeDistillationCallback
from torch import nn
from conftest import QuietLearner

pictures = [np.random.RandomState(i).randint(0, 255, (20,15,3), dtype=np.uint8) for i in range(28)]

def picture(i): return pictures[i]

def kind(i): return i%3

def numbers(_): return list(range(28))

def images(workers=0, bs=4, **kwargs):
    "20 pictures, cropped one by one, turned in batches"
    block = DataBlock((ImageBlock,CategoryBlock), get_items=numbers, get_x=picture, get_y=kind,
                      splitter=IndexSplitter(list(range(20, 28))),
                      item_tfms=RandomResizedCrop(8), batch_tfms=aug_transforms())
    return block.dataloaders(None, bs=bs, num_workers=workers, device=torch.device('cpu'), **kwargs)

def cnn(dropout=0.):
    return nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Dropout(dropout), nn.Linear(16,3))

def fit(rec, dls, n_epoch=1, model=None, cbs=(), **kwargs):
    learn = QuietLearner(dls, model or cnn(), loss_func=CrossEntropyLossFlat())
    learn.fit(n_epoch, cbs=[KnowledgeDistillationCallback(rec), *cbs], **kwargs)
    return learn

class SameBatches(Callback):
    "A teacher that runs, on the batches that a recording hands out"
    def __init__(self, rec): self.rec = rec
    def before_train(self): self.learn.dl = self.rec.batches(self.learn)

def refuses(f, *texts, error=ValueError):
    "`f` raises an error whose message has these texts"
    with pytest.raises(error) as e: f()
    for t in texts: assert t in str(e.value)

def refuses_the_second_batch(learn, rec):
    "Its inputs are changed, so the fit has to end before the step: the student keeps the weights of its first step"
    weights = []
    class Changed(Callback):
        def before_batch(self):
            if self.train_iter == 0: return
            weights[:] = [p.detach().clone() for p in self.model.parameters()]
            self.learn.xb = (self.x + 0.1,)
    refuses(lambda: learn.fit(1, cbs=[KnowledgeDistillationCallback(rec), Changed()]), '8 of 8 items differ', '(epoch 0, batch 1)')
    for p,w in zip(learn.model.parameters(), weights, strict=True): assert torch.equal(p, w) and (p.grad is None or not p.grad.any())

def is_another(f, *texts): refuses(f, 'another recording', *texts, error=FileExistsError)

def arrays(rec): return arrays_in(rec.path)

def arrays_in(path):
    "What a recording has on the disk"
    rows = np.load(path/'predictions.npy')
    return dict(inputs=np.load(path/'inputs.npy'), **{k:rows[k] for k in rows.dtype.names})

def python(code, *args):
    "Run a script in a process of its own"
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], cwd=os.path.dirname(__file__),
                          capture_output=True, text=True)

class Counting(nn.Module):
    "Counts the batches that it answers, and is interrupted before the one after `stop`"
    def __init__(self, model, stop=None): super().__init__(); self.model,self.n,self.stop = model,0,stop
    def forward(self, x):
        if self.n == self.stop: raise KeyboardInterrupt
        self.n += 1
        return self.model(x)

class During(nn.Module):
    "Does something when it is asked for the n-th time"
    def __init__(self, model, n, do): super().__init__(); self.model,self.n,self.do = model,n,do
    def forward(self, x):
        self.n -= 1
        if not self.n: self.do()
        return self.model(x)

def brighter(x): return x + 0.5

def texts(shuffle=True, bs=4, workers=0):
    "Texts of numbers in a stream, whose last batch is shorter than the others"
    rng = np.random.RandomState(0)
    made = [torch.from_numpy(rng.randint(0, 12, rng.randint(5, 30))) for _ in range(13)]
    loaders = [LMDataLoader(made, bs=bs, seq_len=6, shuffle=s, num_workers=workers) for s in (shuffle,False)]
    dls = DataLoaders(*loaders, device=torch.device('cpu'))
    assert dls.train.last_len < 6
    return dls

def language_model(n_hid=8):
    return get_language_model(AWD_LSTM, 12, dict(awd_lstm_lm_config, emb_sz=6, n_hid=n_hid, n_layers=2))

def text_learner(dls, model, **kwargs):
    return QuietLearner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()], **kwargs)
