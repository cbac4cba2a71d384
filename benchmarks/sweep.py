"""One teacher, five students: with a teacher that runs, and with one recorded once for all. Total time and accuracies, on real photographs.

    python benchmarks/sweep.py [seeds]        # cats and dogs, 64 px, crops and augmentation; writes benchmarks/sweep.csv

A ResNet34 is trained first, for which no time is counted. The students are fastai's XResNet18 at five widths.
"""
import sys, tempfile, time
from pathlib import Path
import pandas as pd
from fastai.vision.all import *
from fastdistill.all import *
from timing import machine

n_epoch,teacher_epochs,widths = 4,8,(0.125,0.25,0.5,0.75,1.)

def make_dls():
    path = untar_data(URLs.PETS)/'images'
    return ImageDataLoaders.from_name_func(path, get_image_files(path).sorted(), lambda f: f[0].isupper(), seed=42, item_tfms=RandomResizedCrop(64, min_scale=0.5),
                                           batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)])

def distil(dls, width, seed, teacher):
    "Accuracy of a student, and seconds"
    set_seed(seed)
    learn,start = Learner(dls, XResNet(ResBlock, 1, [2,2,2,2], n_out=2, widen=width), metrics=accuracy),time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-3, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(T=4), weight=0.9))
    return learn.recorder.values[-1][2],time.perf_counter()-start

def main(seeds=1):
    set_seed(0)
    dls,rows = make_dls(),[]
    teacher = vision_learner(dls, resnet34, pretrained=False, metrics=accuracy)
    with teacher.no_bar(), teacher.no_logging(): teacher.fit_one_cycle(teacher_epochs, 1e-3)
    print(f'teacher: accuracy {teacher.validate()[1]:.3f} on {len(dls.valid_ds)} photographs')
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rec = record_teacher(teacher, dls, Path(folder)/'teacher.rec', n_epoch=n_epoch)
        rows.append(dict(what='recording', seconds=time.perf_counter()-start))
        for seed in range(seeds):
            for width in widths:
                for what,answers in ('live',teacher),('recorded',rec):
                    acc,seconds = distil(dls, width, seed, answers)
                    rows.append(dict(what=what, seed=seed, width=width, accuracy=acc, seconds=seconds))
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows).assign(machine=machine('cpu'))
    table.round(4).to_csv(Path(__file__).with_suffix('.csv'), index=False)
    print(table.pivot_table(index='width', columns='what', values=['accuracy','seconds']).round(3).to_string())
    total = table.groupby('what').seconds.sum()
    print(f'{len(widths)*seeds} students, {n_epoch} epochs: {total["live"]:.0f} s live; {total["recorded"]:.0f} s recorded and {total["recording"]:.0f} s to record')

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
