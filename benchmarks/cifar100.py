"""CIFAR-100, the field's own benchmark: what each loss gives a student, at the weight of its paper and at the one that `weight_finder` proposes.

    python benchmarks/cifar100.py FOLDER --images cifar100.zip                       # ResNet20 -> ResNet8, three epochs, on a CPU
    python benchmarks/cifar100.py FOLDER --images cifar100.zip --budget paper        # ResNet32x4 -> ResNet8x4, 240 epochs, on a GPU
    python benchmarks/cifar100.py FOLDER --images cifar100.zip --seeds 1 --only DIST # a part; parts may run side by side
    python benchmarks/cifar100.py FOLDER --images cifar100.zip --finder 47500        # weights proposed by longer fits

The archive holds cifar100/train/class/name.png and the same for test. FOLDER keeps the teacher and its recording. Rows go to benchmarks/cifar100_cpu.csv
or cifar100_paper.csv; a run that has its row is not repeated. The recipe is that of the reference tables: SGD, learning rate 0.05, momentum 0.9, weight decay
5e-4, batches of 64, a tenth of the rate after 150, 180 and 210 of 240 epochs, random crops with a padding of four pixels, and flips. A shorter budget
has the same schedule in less time. The accuracy is that of the last epoch.

Processors round differently, so the same code and seed give another teacher on another machine. The CPU's teacher is kept in benchmarks/cifar100_resnet20.pth,
and all students in cifar100_cpu.csv learn from it. Delete both to begin with a new one. cifar100_cpu_first.csv has students of an earlier teacher.

On a CPU one recording of the teacher, with crops and flips, serves all students; the student alone sees the same batches. OFD compares features before
their activation and asks the teacher itself. "Four times the task loss" has no teacher: it shows what a larger gradient does alone. On a GPU the images
lie on the device, students train in bfloat16, and the teacher, `Teacher(fast=True)`, is asked in each batch. Steps of 64 images are small for a GPU; with
`--batch 256` the learning rate is four times as large, and rises to it during the first 2 % of the training.
"""
import argparse, time, zipfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
import numpy as np, pandas as pd, torch
import torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from fastai.callback.channelslast import *
from fastdistill.all import *
from fastdistill.objective import Objective
from PIL import Image
from batches import loader, windows
from cifar_nets import make
from runs import Runs
from timing import machine

here = Path(__file__).parent

@dataclass
class Budget:
    teacher:str; student:str; teacher_epochs:int; epochs:int; recorded:bool; batch:int=64; finder:int=10_000

budgets = dict(cpu=Budget('resnet20', 'resnet8', 8, 3, True), paper=Budget('resnet32x4', 'resnet8x4', 240, 240, False))

# ---- data

def read_images(archive, folder):
    "Two pairs of images (N, 3, 32, 32), bytes, and classes; read once, and kept in the folder"
    file = folder/'images.pt'
    if not file.exists():
        with zipfile.ZipFile(archive) as z:
            names = sorted(n for n in z.namelist() if n.endswith('.png'))
            classes = sorted({n.split('/')[-2] for n in names})
            def part(split):
                found = [n for n in names if n.split('/')[-3] == split]
                x = np.stack([np.array(Image.open(z.open(n)).convert('RGB')) for n in found])
                return torch.tensor(x).permute(0, 3, 1, 2).contiguous(),torch.tensor([classes.index(n.split('/')[-2]) for n in found])
            torch.save([part('train'), part('test')], file)
    return torch.load(file)

mean,std = (torch.tensor(o).view(3, 1, 1) for o in ((.5071,.4867,.4408),(.2675,.2565,.2761)))

def normalised(x): return (x.float()/255 - mean.to(x.device)) / std.to(x.device)

def crop_and_flip(x):
    "Each image moved by up to four pixels, half of them mirrored; borders are black, as in the recipe"
    return windows(F.pad(x, (4,4,4,4)), 32)

augmented = compose(crop_and_flip, normalised)

def loaders(train, valid, bs=64):
    dls = DataLoaders(loader(*train, bs, augmented, shuffle=True), loader(*valid, 500, normalised), device=train[0].device)
    dls.c = 100
    return dls

# ---- training

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException

def steps(pct, bs=64):
    "The learning rate of the recipe, at a share of the training; with larger batches it is larger, and starts small"
    rise = min(1., pct/.02) if bs > 64 else 1.
    return .05*bs/64 * rise * .1**sum(pct >= e/240 for e in (150,180,210))

def learner(dls, model):
    sgd = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, weight_decay=5e-4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=sgd, metrics=accuracy, lr=.05)
    if next(iter(dls.train))[0].is_cuda: learn.to_bf16().to_channelslast(to_fp16=False)
    else: model.to(memory_format=torch.channels_last)
    return learn

def train(learn, n_epoch, cbs=()):
    "Accuracy after the last epoch, and seconds of computing of this process"
    start = time.process_time()
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, cbs=[ParamScheduler(dict(lr=partial(steps, bs=learn.dls.bs))), NoValidation(), *listify(cbs)])
        seconds = time.process_time()-start
        return learn.validate()[1],seconds

# ---- losses

@dataclass
class Method:
    "A loss at the weight of its paper; `warm_up`: the weight grows during the first twelfth; `live`: a recording would be too large"
    loss:object; weight:float; task_weight:float|None=1.; warm_up:bool=False; live:bool=False
    def objective(self, weight=None):
        w = self.weight if weight is None else weight
        return Objective(self.loss, weight=partial(growing, w) if self.warm_up else w, task_weight=self.task_weight)
    @property
    def weights(self):
        "What `weight_finder` tries"
        return [.1,.3,.5,.7,.9] if self.task_weight is None else [self.weight*o for o in (1/30,1/10,1/3,1,3)]

def growing(weight, pct): return weight*min(12*pct, 1)

stages = ['layer1','layer2','layer3']

def methods(b):
    "Name -> `Method`, those first that everybody knows"
    def last(net): return f'{len(getattr(make(net), "layer1"))-1}'
    def before_act(net): return [f'{s}.{last(net)}.act:input' for s in stages]
    def on(loss, layers=stages): return Match(loss, layers, layers)
    thin = 'x' not in b.student
    return {'SoftTarget': Method(SoftTarget(T=4), .9, None),
            'SoftTarget, standardised': Method(SoftTarget(T=2, standardize=True), 9., .1),
            'DecoupledKD': Method(DecoupledKD(beta=2 if thin else 8), 1., warm_up=True),
            'DIST': Method(DIST(), 2.),
            'Attention': Method(on(Attention), 1000.),
            'FitNet': Method(on(FitNet, ['layer2']), 100.),
            'Similarity': Method(on(Similarity, ['layer3']), 3000.),
            'RKD': Method(on(RKD, ['layer3']), 1.),
            'VID': Method(on(VID), 1.),
            'CRD': Method(on(CRD, ['layer3']), .8),
            'ReviewKD': Method(on(ReviewKD), .6 if thin else 5., warm_up=True),
            'MultiLevel': Method(MultiLevel(batch=1/3, classes=1/3), 1.35, .2),
            'NST': Method(on(NST), 50.),
            'PKT': Method(on(PKT, ['layer3']), 30000.),
            'NormalizedKD': Method(NormalizedKD(gamma=3.5, T=3), 1.),
            'MGD': Method(on(MGD(mask=.15, channels=True), ['layer3']), mgd_weight(b)),
            'OFD': Method([Match(OFD, s, t, weight=w) for s,t,w in zip(before_act(b.student), before_act(b.teacher), ofd_weights(b))], 1., live=True),
            # no distillation: does a larger gradient do the same?
            'four times the task loss': Method(SoftTarget(), 0., 4.)}

def sizes(net):
    "Numbers in the output of each stage"
    widths = [getattr(make(net), s)[-1].conv2.out_channels for s in stages]
    return [w*(32 >> i)**2 for i,w in enumerate(widths)]

def ofd_weights(b): return [size*2.**(i-3)/1000 for i,size in enumerate(sizes(b.teacher), 1)]
def mgd_weight(b): return 7e-5*sizes(b.teacher)[-1]

# ---- the experiment

class Experiment:
    def __init__(self, b, folder, archive, device, file):
        self.b,self.folder,self.device = b,folder,device
        parts = read_images(archive, folder)
        self.train,self.test = ([o.to(device) for o in part] for part in parts)
        self.runs,self.weights = Runs(file, 'seed','method','weight_of'),Runs(file.with_name(f'{file.stem}_weights{self.longer}.csv'), 'method','weight')

    @property
    def longer(self): return '' if self.b.finder == Budget.finder else f'_{self.b.finder}'

    @property
    def dls(self): return loaders(self.train, self.test, self.b.batch)

    @cached_property
    def teacher(self):
        b,name = self.b,f'{self.b.teacher}.pth'
        kept = here/f'cifar100_{name}'
        file = kept if b.recorded and kept.exists() else self.folder/name
        set_seed(100)
        model = make(b.teacher).to(self.device)
        if file.exists(): model.load_state_dict(torch.load(file, map_location=self.device))
        else:
            acc,seconds = train(learner(self.dls, model), b.teacher_epochs)
            torch.save(model.state_dict(), file)
            self.runs.add(**self.row(0, 'teacher', None, None, acc, seconds))
        return model

    @cached_property
    def answers(self):
        "The teacher, or what is recorded of it"
        if not self.b.recorded: return Teacher(self.teacher, fast=True)
        if (path := self.folder/'teacher.rec').exists(): return TeacherRecording(path)
        terms = [SoftTarget(), *(Match(FitNet, s, s) for s in stages)]     # the features whole
        return record_teacher(self.teacher, self.dls, path, n_epoch=self.b.epochs, loss=terms)

    def row(self, seed, method, weight_of, weight, acc, seconds):
        b = self.b
        net,epochs = (b.teacher,b.teacher_epochs) if method == 'teacher' else (b.student,b.epochs)
        return dict(seed=seed, method=method, weight_of=weight_of or '-', weight=weight, accuracy=acc, seconds=seconds, network=net, epochs=epochs, batch=b.batch, machine=machine(self.device))

    def run(self, seed, name, weight_of, method=None, weight=None):
        if self.runs.has(seed=seed, method=name, weight_of=weight_of or '-'): return
        teacher = self.teacher if method and method.live else self.answers
        objective = method.objective(weight) if method else Objective(SoftTarget, weight=0.)     # alone, on the same batches
        kd = None if method is None and not self.b.recorded else KnowledgeDistillationCallback(teacher, objective)
        set_seed(seed)
        learn = learner(self.dls, make(self.b.student).to(self.device))
        self.runs.add(**self.row(seed, name, weight_of, method and (method.weight if weight is None else weight), *train(learn, self.b.epochs, kd)))

    def proposed(self, name, method):
        "The weight that `weight_finder` proposes: an epoch of 10,000 images (or `finder`) for each weight, judged on 2,500 others, both of the training set"
        t = self.weights.table
        if not (t.method == name).any():
            order = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(0))
            valid,rest = order[10_000:12_500],torch.cat([order[:10_000], order[12_500:]])
            part = [[o[i] for o in self.train] for i in (rest[:self.b.finder],valid)]
            set_seed(0, reproducible=True)
            learn = learner(loaders(*part), make(self.b.student).to(self.device))
            found = learn.weight_finder(KnowledgeDistillationCallback(self.teacher, Objective(method.loss, weight=method.weight, task_weight=method.task_weight)), method.weights)
            for r in found.table.itertuples(): self.weights.add(method=name, weight=r.weight, accuracy=r.accuracy, valid_loss=r.valid_loss)
            t = self.weights.table
        t = t[t.method == name]
        return float(t.weight[t.accuracy.idxmax()])

    def measure(self, seeds, only):
        "First all seeds at the weights of the papers, then at the proposed ones, unless these are the same or 0, the student alone; with longer fits, only proposals"
        chosen = {name: m for name,m in methods(self.b).items() if not only or name in only}
        if self.longer: return [self.proposed(name, m) for name,m in chosen.items() if m.weight]
        for seed in seeds:
            self.run(seed, 'student alone', None)
            for name,m in chosen.items(): self.run(seed, name, 'paper', m)
        for seed in seeds if self.b.recorded else ():
            for name,m in chosen.items():
                w = m.weight and self.proposed(name, m)
                if w and abs(w/m.weight-1) > 1e-6: self.run(seed, name, 'weight_finder', m, w)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--images', required=True, help='zip of CIFAR-100')
    p.add_argument('--budget', choices=list(budgets), default='cpu')
    p.add_argument('--pair', help="teacher and student, such as 'resnet56,resnet20'")
    p.add_argument('--epochs', type=int, help='of the students')
    p.add_argument('--teacher_epochs', type=int, help='of a teacher that is trained')
    p.add_argument('--batch', type=int, help='images in a step, by default 64')
    p.add_argument('--finder', type=int, help='images for each fit of weight_finder, 10000; with another number, only weights are proposed')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--only', nargs='+', default=[], metavar='NAME')
    args = p.parse_args()
    b = budgets[args.budget]
    if args.pair: b.teacher,b.student = args.pair.split(',')
    for name in ('epochs','teacher_epochs','batch','finder'): setattr(b, name, getattr(args, name) or getattr(b, name))
    if unknown := {*args.only} - {*methods(b)}: p.error(f'no {", ".join(unknown)}; there are {", ".join(methods(b))}')
    args.folder.mkdir(parents=True, exist_ok=True)
    e = Experiment(b, args.folder, args.images, 'cuda' if args.budget == 'paper' else 'cpu', here/f'cifar100_{args.budget}.csv')
    if args.budget == 'cpu': torch.set_num_threads(1)
    e.measure(args.seeds, args.only)
    t = e.runs.table
    t = t[t.network == b.student]
    print(t.groupby(['method','weight_of'], sort=False).accuracy.agg(['mean','std','count']).to_string(float_format='{:.4f}'.format))

if __name__ == '__main__': main()
