"""Cats and dogs: how near a ResNet18 comes to its teacher, a ResNet34, and how soon.

    python benchmarks/cats_and_dogs.py FOLDER --images IMAGES [--seeds 0 1 2] [--only NAME]     # parts may run side by side

Photographs, split, networks and 64 pixels are those of the page "Cats and dogs"; the teacher learns for 25 epochs with crops. FOLDER keeps it and its recordings.
Rows go to benchmarks/cats_and_dogs.csv, one for each epoch; a run that has its row is not repeated. `seconds` are those of this process's
computing on one thread: training without validation, since the start of the fit. Rows of method "recording" are the time that the teacher's answers
took. "Fixed" images are the middle of each photograph, recorded once. "Crops" are squares of 64 of 72 pixels, half of them mirrored: five epochs are
recorded and repeated, and the student alone sees the same. "Average" is the moving average (0.99) of the student's weights, judged at the end.
benchmarks/cats_and_dogs_first.csv has an earlier run on another machine, with another teacher.
"""
import argparse, time
from functools import cached_property, partial
from pathlib import Path
import torch
from fastai.vision.all import *
from fastdistill.all import *
from fastdistill.objective import Objective
from torchvision.models import resnet18
from batches import loader, windows
from runs import Runs
from teachers import load_image, normalised
from timing import machine

layers = ['layer1','layer2','layer3','layer4'],['0.4','0.5','0.6','0.7']

def read(images):
    "The page's training and validation set, 72 pixels wide, and labels"
    files = get_image_files(images).sorted()
    x,y = torch.stack([load_image(f, 72) for f in files]),torch.tensor([int(f.name[0].isupper()) for f in files])
    return [(x[i],y[i]) for i in map(list, RandomSplitter(seed=42)(files))]

def middle(x): return F.interpolate(x.float(), 64, mode='area')

def crops(x): return windows(x, 64).float()

class Seconds(Callback):
    "Computing time of training, and accuracy after each epoch"
    order = 100
    def before_fit(self): self.spent,self.rows = 0,[]
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.spent += time.process_time()-self.start
    def after_validate(self): self.rows.append((self.spent,self.recorder.log[self.recorder.metric_names.index('accuracy')]))

class Average(Callback):
    def before_fit(self): self.model_avg = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.99), use_buffers=True)
    def after_step(self): self.model_avg.update_parameters(self.model)

# name -> images, epochs, arguments of the objective or nothing
def both(): return [Match(SoftTarget(T=4), weight=.9), Match(Attention, *layers, weight=1000)]
methods = {'alone, fixed images': (middle, 10, None),
           'Attention and SoftTarget, fixed images, 4 epochs': (middle, 4, both),
           'alone, fixed images, 4 epochs': (middle, 4, None),
           'Attention and SoftTarget, fixed images': (middle, 10, both),
           'Attention and SoftTarget, crops, 15 epochs': (crops, 15, both),
           'alone, crops, 15 epochs': (crops, 15, None)}

class Experiment:
    def __init__(self, folder, images):
        self.folder,self.images,self.runs = folder,images,Runs(Path(__file__).with_suffix('.csv'), 'seed','method','epoch')

    @cached_property
    def data(self): return read(self.images)

    def dls(self, tfm):
        return DataLoaders(*(loader(*part, 64, compose(f, normalised), shuffle=i==0) for i,(part,f) in enumerate(zip(self.data, (tfm,middle)))))

    def learner(self, model, tfm):
        return Learner(self.dls(tfm), model.to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

    def add(self, seed, method, epoch, acc, seconds):
        self.runs.add(seed=seed, method=method, epoch=epoch, accuracy=acc, seconds=seconds, machine=machine('cpu'))

    @cached_property
    def teacher(self):
        file = self.folder/'teacher.pth'
        set_seed(42)
        learn = self.learner(create_vision_model(resnet34, 2, pretrained=False), crops)
        if file.exists(): learn.model.load_state_dict(torch.load(file))
        else:
            with learn.no_bar(): learn.fit_one_cycle(25, 1e-3, cbs=(seconds := Seconds()))
            torch.save(learn.model.state_dict(), file)
            self.add(0, 'teacher', 25, learn.recorder.values[-1][2], seconds.spent)
        return learn.model

    def recording(self, tfm):
        path = self.folder/f'{tfm.__name__}.rec'
        if path.exists(): return TeacherRecording(path)
        n,teacher = 1 if tfm is middle else 5,self.teacher     # which may be trained now: that is not counted
        start = time.process_time()
        rec = record_teacher(teacher, self.dls(tfm), path, n_epoch=n, loss=both())
        self.add(0, f'recording, {tfm.__name__}', n, None, time.process_time()-start)
        return rec

    def run(self, seed, name):
        tfm,n_epoch,loss = methods[name]
        if self.runs.has(seed=seed, method=name, epoch=n_epoch): return
        rec = self.recording(tfm)
        # the student alone sees the batches of the recording where they differ from epoch to epoch
        kd = loss and Objective(loss(), weight=1., task_weight=.1) or tfm is crops and Objective(SoftTarget, weight=0.)
        set_seed(seed)
        learn = self.learner(resnet18(num_classes=2), tfm)
        cbs = [seconds := Seconds(), avg := Average(), *([KnowledgeDistillationCallback(rec, kd)] if kd else [])]
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-3, cbs=cbs)
        for i,(spent,acc) in enumerate(seconds.rows): self.add(seed, name, i+1, acc, spent)
        learn.model = avg.model_avg.module
        with learn.no_bar(), learn.no_logging(): self.add(seed, f'{name}, average', n_epoch, learn.validate()[1], seconds.spent)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--images', type=Path, required=True, help='folder of cats and dogs, named as in PETS')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--only', nargs='+', choices=list(methods), default=list(methods), metavar='NAME')
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    e = Experiment(args.folder, args.images)
    for name in args.only:
        for seed in args.seeds: e.run(seed, name)
    t = e.runs.table
    last = t[t.epoch == t.groupby('method').epoch.transform('max')]
    print(last.groupby('method', sort=False)[['accuracy','seconds']].agg(['mean','std','count']).to_string(float_format='{:.4f}'.format))

if __name__ == '__main__': main()
