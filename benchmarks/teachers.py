"""What other teachers and other losses give: accuracy of one student, by method, on scikit-learn's digits or on cats and dogs.

    python benchmarks/teachers.py digits [seeds]                 # a quarter of an hour on two cores
    python benchmarks/teachers.py pets [seeds] --images FOLDER --others CIFAR100.zip     # an hour

It writes benchmarks/teachers_digits.csv or teachers_pets.csv, a row for each run, and goes on where it was stopped. Each seed has its own student, and a
teacher is trained once, when it is first needed. "Shuffled classes" is the first teacher with its last layer in another order: its rows equal those of
SoftTarget. "Ten more classes" has also learned digits that lie on their side, or ten classes of CIFAR-100. The students of digits have 200 labels. Those
with images without labels see 800 more images, in as many steps. "160 labels" are 5 % of the cats and dogs, in as many steps as with all. Cats and dogs
are 32 pixels wide, and named as in fastai's PETS. Their teachers learn with random flips and shifts, students do not. Weights are those of the papers,
but for Attention on the digits, where 1000 is too much: 10.
"""
import argparse, io, zipfile
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, accuracy, set_seed
from fastai.layers import ConvLayer
from fastdistill.all import *
from fastdistill.digits import digits_cnn
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

class Augment(Callback):
    "Random flips, and shifts of up to four pixels, of the training images"
    def before_batch(self):
        if not self.training: return
        x = self.xb[0] if torch.rand(()) < .5 else self.xb[0].flip(3)
        i,j = torch.randint(9, (2,)).tolist()
        self.learn.xb = (nn.functional.pad(x, (4,4,4,4))[...,i:i+x.shape[2],j:j+x.shape[3]],)

class Task:
    "Data, networks and layers of one experiment"
    def __init__(self, train, valid, vocab, more, student, teacher, layers, embedding, epochs, lr, attention, augment=()):
        self.train,self.valid,self.vocab,self.more = train,valid,vocab,more
        self.student,self.teacher,self.layers,self.embedding = student,teacher,layers,embedding
        self.epochs,self.lr,self.attention,self.augment = epochs,lr,attention,augment

    def dls(self, more=False, n=None, unlabelled=False):
        "With `more`, ten classes are added; with `n`, so many items to train on; `unlabelled`: the others without labels"
        (x,y),vocab = self.train,list(self.vocab)
        if unlabelled: y = torch.where(torch.arange(len(y)) < n, y, -100)
        elif n: x,y = x[:n],y[:n]
        if more:
            x,y = torch.cat([x, self.more[0]]),torch.cat([y, self.more[1]])
            vocab += [f'other {i}' for i in range(10)]
        dls = DataLoaders(DataLoader(TensorDataset(x, y), bs=50, shuffle=True), DataLoader(TensorDataset(*self.valid), bs=500))
        dls.vocab = vocab
        return dls

    def learner(self, model, **kwargs):
        return Learner(self.dls(**kwargs), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def digits():
    from sklearn.datasets import load_digits
    x,y = load_digits(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(x))
    x,y = torch.tensor(x[order]).float().view(-1, 1, 8, 8)/16,torch.tensor(y[order])
    (xt,yt),valid = (x[:1000],y[:1000]),(x[1000:],y[1000:])
    more = xt.rot90(1, (2,3)),yt+10
    def net(width, n): return digits_cnn(width) if n == 10 else _with_classes(digits_cnn(width), n)
    layers = ['0','1','2']
    return Task((xt,yt), valid, '0123456789', more, partial(net, 4), partial(net, 32), layers, '4', (60,20), 1e-2, 10), 200

def _with_classes(model, n):
    model[-1] = nn.Linear(model[-1].in_features, n)
    return model

def load_image(f, size=32):
    "The middle of a photograph, so many pixels wide: (3, size, size), bytes"
    im = Image.open(f).convert('RGB')
    side = min(im.size)
    left,top = (im.width-side)//2,(im.height-side)//2
    im = im.crop((left, top, left+side, top+side)).resize((size,size), Image.BILINEAR)
    return torch.tensor(np.array(im)).permute(2, 0, 1)

def cats_and_dogs(images):
    "Photographs and labels in an order that is always the same"
    files = sorted(Path(images).glob('*.jpg'))
    order = np.random.default_rng(1).permutation(len(files))
    x = torch.stack([load_image(files[i]) for i in order])
    return x,torch.tensor([int(files[i].name[0].islower()) for i in order])

def normalised(x):
    mean,std = (torch.tensor(o).view(3, 1, 1) for o in ((.485,.456,.406),(.229,.224,.225)))
    return (x/255 - mean)/std

def pets(images, others):
    x,y = cats_and_dogs(images)
    with zipfile.ZipFile(others) as z:
        names = sorted(n for n in z.namelist() if n.endswith('.png') and n.split('/')[-3] == 'train')
        classes = sorted({n.split('/')[-2] for n in names})[::10]
        found = [(load_image(io.BytesIO(z.read(n))), 2+classes.index(c)) for n in names if (c := n.split('/')[-2]) in classes]
    more = torch.stack([x for x,_ in found[::2]]),torch.tensor([y for _,y in found[::2]])
    n = len(x)*4//5
    def net(w, n):
        stages = ConvLayer(3, w, stride=2),ConvLayer(w, 2*w, stride=2),ConvLayer(2*w, 4*w, stride=2)
        return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4*w, n))
    return Task((normalised(x[:n]),y[:n]), (normalised(x[n:]),y[n:]), ('cat','dog'), (normalised(more[0]),more[1]), partial(net, 16),
                partial(net, 48), ['0','1','2'], '4', (10,40), 3e-3, 1000, [Augment()]), None

def train(learn, epochs, lr, cbs=None):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return learn

class Teachers:
    "Each is trained when it is first asked for"
    def __init__(self, task): self.task = task

    def _new(self, seed, **kwargs):
        set_seed(seed, reproducible=True)
        task,n = self.task,len(self.task.vocab) + 10*bool(kwargs)
        return train(task.learner(task.teacher(n), **kwargs), task.epochs[1], task.lr, list(task.augment))

    @cached_property
    def first(self): return self._new(100)
    @cached_property
    def second(self): return self._new(101)
    @cached_property
    def more(self): return self._new(102, more=True)

    @cached_property
    def shuffled(self):
        "The first teacher with its classes in another order"
        order = torch.tensor([3,1,4,0,5,9,2,6,8,7] if len(self.task.vocab) == 10 else [1,0])
        model = deepcopy(self.first.model)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad(): last.weight.copy_(last.weight[order]); last.bias.copy_(last.bias[order])
        return Teacher(model, vocab=[self.task.vocab[i] for i in order])

def methods(task, t):
    "Name -> function that makes the arguments of the callback; `None` to train alone"
    soft,l,embed = SoftTarget(T=4),task.layers,[task.embedding]*2
    def at(**kwargs): return Match(Attention, l, l, weight=task.attention, **kwargs)
    def with_soft(): return t.first,soft,None,None,.9
    few = {'160 labels, student alone': lambda: None,
           '160 labels, SoftTarget': with_soft,
           '160 labels, SoftTarget, and images without labels': with_soft}
    return {'student alone': lambda: None,
            'SoftTarget': with_soft,
            **({'SoftTarget, and images without labels': with_soft} if len(task.vocab) == 10 else few),
            'Attention': lambda: (t.first, at(), None, None, 1., 1.),
            'SoftTarget and Attention': lambda: (t.first, [Match(soft), at()], None, None, .9, .1),
            'ensemble of two, SoftTarget': lambda: ([t.first,t.second], soft, None, None, .9),
            'two teachers, Attention to each': lambda: (t.first, [at(), at(teacher=t.second)], None, None, 1., 1.),
            'two teachers, SoftTarget and Attention to each':
                lambda: ([t.first,t.second], [Match(soft), at(teacher=t.first), at(teacher=t.second)], None, None, .9, .1),
            'shuffled classes, SoftTarget': lambda: (t.shuffled, soft, None, None, .9),
            'ten more classes, SoftTarget': lambda: (t.more, soft, None, None, .9),
            'EMATeacher(0.99), SoftTarget': lambda: (EMATeacher(0.99), SoftTarget(T=1), None, None, .5, 1.),
            'CRD': lambda: (t.first, Match(CRD, *embed), None, None, .8, 1.),
            'CRD and SoftTarget': lambda: (t.first, [Match(soft), Match(CRD, *embed, weight=.8)], None, None, 1., 1.),
            'ReviewKD': lambda: (t.first, Match(ReviewKD, l, l), None, None, 1., 1.),
            'ReviewKD and SoftTarget': lambda: (t.first, [Match(soft), Match(ReviewKD, l, l)], None, None, 1., 1.)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('task', choices=['digits','pets'])
    p.add_argument('seeds', type=int, nargs='?', default=3)
    p.add_argument('--images', help='folder of cats and dogs')
    p.add_argument('--others', help='zip of CIFAR-100, with folders train/class')
    args = p.parse_args()
    file = Path(__file__).with_name(f'teachers_{args.task}.csv')
    rows = pd.read_csv(file).to_dict('records') if file.exists() else []
    done = {(r['seed'],r['method']) for r in rows}
    task,labels = digits() if args.task == 'digits' else pets(args.images, args.others)
    found = Teachers(task)
    for name in ('first','second','more'):
        if (0,f'teacher: {name}') in done: continue
        x,y = task.valid
        model = getattr(found, name).model.eval()
        with torch.no_grad(): logits = model(x)
        right = logits[:,:len(task.vocab)].argmax(1) == y
        rows.append(dict(seed=0, method=f'teacher: {name}', accuracy=right.float().mean().item()))
    for seed in range(args.seeds):
        for name,new in methods(task, found).items():
            if (seed,name) in done: continue
            n = 160 if name.startswith('160 labels') else labels
            unlabelled = 'without labels' in name
            kd = new()     # trains the teacher, if need be
            set_seed(seed, reproducible=True)
            learn = task.learner(task.student(len(task.vocab)), n=n, unlabelled=unlabelled)
            epochs = task.epochs[0]     # as many steps with few images as with all
            if n == 160 and not unlabelled: epochs = epochs*len(task.train[0])//n
            if labels and unlabelled: epochs = epochs*n//len(task.train[0])
            train(learn, epochs, task.lr, None if kd is None else KnowledgeDistillationCallback(*kd))
            rows.append(dict(seed=seed, method=name, accuracy=learn.recorder.values[-1][2]))
            pd.DataFrame(rows).to_csv(file, index=False, float_format='%.4f')
            print(seed, name, f'{rows[-1]["accuracy"]:.4f}', flush=True)
    table = pd.DataFrame(rows).groupby('method', sort=False).accuracy.agg(['mean','std','count'])
    print(table.to_string(float_format='{:.4f}'.format))

if __name__ == '__main__': main()
