"""Bean leaves: in which settings distillation helps, each against the student alone with the same images, augmentation and epochs.

    python benchmarks/beans_settings.py FOLDER --images BEANS [--seeds 0 1 2 3 4] [--only GROUP]     # parts may run side by side

BEANS has train/class/name.jpg, validation/... and test/.... Images have 64 pixels; in training they are turned by any angle, shifted, scaled and mirrored.
Teachers are three ResNet18, 40 epochs, whose answers to ten epochs of such images are recorded and repeated. Students are MobileNetV2, some of a quarter of
the width. With "10 % of the labels" the student sees all images, but only 103 labels; alone it takes as many steps with these 103. FOLDER keeps teachers and
recordings. Rows go to benchmarks/beans_settings.csv: `valid` is the accuracy on 133 photographs, `test` on 128, after the last epoch.

The first two groups and the last three were run on different days, with teachers that were trained anew: both kinds of rows are in the table.
"""
import argparse, math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
import torch
from fastai.vision.all import *
from fastdistill.all import *
from fastdistill.objective import Objective
from torchvision.models import mobilenet_v2, resnet18
from batches import loader
from cats_and_dogs import Seconds, middle
from runs import Runs
from teachers import load_image
from timing import machine

def read(images):
    "Split -> images (N, 3, 72, 72), bytes, and labels, in an order that is always the same"
    classes = sorted(p.name for p in (images/'train').iterdir())
    def part(split):
        files = get_image_files(images/split).sorted()
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        return torch.stack([load_image(files[i], 72) for i in order]),torch.tensor([classes.index(files[i].parent.name) for i in order])
    return {split:part(split) for split in ('train','validation','test')}

def normalised(x): return x/127.5 - 1

def turned(x):
    "A window of 70 to 100 % of the side, turned by any angle, moved by up to a twentieth of the side; half of them are mirrored"
    n = len(x)
    angle,scale,flip = 2*math.pi*torch.rand(n),1 - .3*torch.rand(n),1 - 2.*(torch.rand(n) < .5)
    cos,sin,(dx,dy) = angle.cos()*scale,angle.sin()*scale,(torch.rand(2, n)-.5)/5
    theta = torch.stack([torch.stack([cos*flip, -sin, dx], 1), torch.stack([sin*flip, cos, dy], 1)], 1)
    return F.grid_sample(x.float(), F.affine_grid(theta, (n,3,64,64), align_corners=False), padding_mode='reflection', align_corners=False)

augmented,plain = compose(turned, normalised),compose(middle, normalised)

stages = ['features.3','features.6','features.13','features.17'],['layer1','layer2','layer3','layer4']
def label_free(loss=SoftTarget(T=1)): return Objective(loss, weight=1., task_weight=0.)
def soft(T=4, weight=.9): return Objective(SoftTarget(T=T), weight=weight)
def beside(*others): return Objective([Match(SoftTarget(T=4), weight=.9), *others], weight=1., task_weight=.1)

narrow,full = partial(mobilenet_v2, width_mult=.25, num_classes=3),partial(mobilenet_v2, num_classes=3)

@dataclass
class Setting:
    "`teacher`: one, three or none; `n_labels`: of the student; `only_labelled`: it sees no other images"
    student:object; epochs:int; objective:object=None; teacher:str='one'; mixup:bool=False; n_labels:int|None=None; only_labelled:bool=False

def settings():
    "Group -> name -> `Setting`; the first of each group is the student alone"
    one,short = partial(Setting, narrow, 20),partial(Setting, narrow, 20, n_labels=103)
    return {'a quarter of the width, 20 epochs': {
                'alone': one(),
                "SoftTarget, T=5, half and half (the guide's)": one(soft(5, .5)),
                'SoftTarget, T=4': one(soft()),
                'SoftTarget, T=1, no labels': one(label_free()),
                'Attention and SoftTarget': one(beside(Match(Attention, *stages, weight=1000))),
                'RKD and SoftTarget': one(beside(Match(RKD, 'features.18', 'layer4'))),
                'three teachers, SoftTarget, T=4': one(soft(), teacher='three'),
                'three teachers, SoftTarget, T=1, no labels': one(label_free(), teacher='three')},
            'the same with MixUp': {
                'alone': one(mixup=True),
                'three teachers, SoftTarget, T=1, no labels': one(label_free(), teacher='three', mixup=True)},
            '10 % of the labels': {
                'alone': short(only_labelled=True),
                'SoftTarget, T=4': short(soft()),     # with T=1 and no labels, this is the fit of the first group
                'three teachers, SoftTarget, T=4': short(soft(), teacher='three')},
            'full width, 20 epochs': {
                'alone': Setting(full, 20),
                'SoftTarget, T=4': Setting(full, 20, soft()),
                'Attention and SoftTarget': Setting(full, 20, beside(Match(Attention, *stages, weight=1000)))},
            'a quarter of the width, 60 epochs': {
                'alone': Setting(narrow, 60),
                'SoftTarget, T=4': Setting(narrow, 60, soft()),
                'Attention and SoftTarget': Setting(narrow, 60, beside(Match(Attention, *stages, weight=1000)))}}

class Experiment:
    def __init__(self, folder, images):
        self.folder,self.images,self.runs = folder,images,Runs(Path(__file__).with_suffix('.csv'), 'group','method','seed')

    @cached_property
    def data(self): return read(self.images)

    def learner(self, model, n_labels=None, only_labelled=False):
        (x,y),d = self.data['train'],self.data
        if only_labelled: x,y = x[:n_labels],y[:n_labels]
        elif n_labels: y = torch.where(torch.arange(len(y)) < n_labels, y, -100)
        dls = DataLoaders(loader(x, y, 32, augmented, shuffle=True, drop_last=True), *(loader(*d[part], 32, plain) for part in ('validation','test')))
        return Learner(dls, model.to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    def add(self, learn, group, method, seed, epochs, seconds):
        with learn.no_bar(), learn.no_logging(): valid,test = (learn.validate(dl=learn.dls[i])[1] for i in (1,2))
        self.runs.add(group=group, method=method, seed=seed, valid=valid, test=test, epochs=epochs, seconds=seconds, machine=machine('cpu'))

    @cached_property
    def teachers(self):
        res = []
        for i in range(3):
            file,learn = self.folder/f'teacher{i}.pth',self.learner(resnet18(num_classes=3))
            if file.exists(): learn.model.load_state_dict(torch.load(file))
            else:
                set_seed(100+i)
                learn = self.learner(resnet18(num_classes=3))
                with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(40, 1e-3, cbs=(s := Seconds()))
                torch.save(learn.model.state_dict(), file)
                self.add(learn, 'teachers', 'ResNet18', i, 40, s.spent)
            res.append(learn.model.eval())
        return res

    def recording(self, which, mixup):
        path = self.folder/f'{which}{"-mixup" if mixup else ""}.rec'
        if path.exists(): return TeacherRecording(path)
        terms = [SoftTarget()]
        if which == 'one': terms += [Match(Attention, *stages),Match(RKD, 'features.18', 'layer4')]
        return record_teacher(self.teachers[0] if which == 'one' else self.teachers, self.learner(narrow()).dls, path, n_epoch=10, loss=terms, cbs=MixUp(.4) if mixup else None)

    def run(self, seed, group, name):
        s = settings()[group][name]
        if self.runs.has(group=group, method=name, seed=seed): return
        cbs = [seconds := Seconds(), *[MixUp(.4)]*s.mixup]
        if not s.only_labelled:     # alone, it sees the batches that the others see
            cbs.append(KnowledgeDistillationCallback(self.recording(s.teacher, s.mixup), s.objective or Objective(SoftTarget, weight=0.)))
        set_seed(seed)
        learn = self.learner(s.student(), s.n_labels, s.only_labelled)
        epochs = s.epochs*(len(self.data['train'][0])//32)//(s.n_labels//32) if s.only_labelled else s.epochs
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3, cbs=cbs)
        self.add(learn, group, name, seed, epochs, seconds.spent)

def summary(t):
    "Means and spread, and the paired difference to the student alone, of all 261 photographs"
    t = t.assign(both=(133*t.valid + 128*t.test)/261)
    alone = t[t.method == 'alone'].set_index(['group','seed']).both
    t['gain'] = t.both - alone.reindex(pd.MultiIndex.from_frame(t[['group','seed']])).values
    return t.groupby(['group','method'], sort=False).agg(valid=('valid','mean'), test=('test','mean'), both=('both','mean'), spread=('both','std'),
                                                        gain=('gain','mean'), gain_spread=('gain','std'), seeds=('seed','count'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--images', type=Path, required=True)
    p.add_argument('--seeds', type=int, nargs='+', default=range(5))
    p.add_argument('--only', nargs='+', choices=list(settings()), default=list(settings()), metavar='GROUP')
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    e = Experiment(args.folder, args.images)
    for group in args.only:
        for seed in args.seeds:
            for name in settings()[group]: e.run(seed, group, name)
    print(summary(e.runs.table).to_string(float_format='{:.4f}'.format))

if __name__ == '__main__': main()
