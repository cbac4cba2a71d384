"""Few labels, many images: a student of cats and dogs that has the labels of 5 % of its images, with and without a teacher.

    python benchmarks/unlabelled.py [--folder IMAGES] [--seeds 3]        # writes benchmarks/unlabelled.csv

The images are those of `untar_data(URLs.PETS)`, or of a folder with the same names: the name of a cat's begins with a capital letter. They are read once,
at 48 pixels. The teacher stands in for a foundation model: it has trained on all labels. All students take the same number of steps. A seed draws the
labelled images, the student's weights and the batches.
"""
import argparse, platform, time
from pathlib import Path
import numpy as np, pandas as pd
from fastai.vision.all import *
from fastdistill.all import KnowledgeDistillationCallback, SoftTarget, add_unlabelled

size,bs,share,epochs,teacher_epochs = 48,64,0.05,6,8

def read(files):
    "All images in one tensor, (N, 3, size, size), of bytes"
    crop = Resize(size)
    return torch.stack([torch.from_numpy(np.array(crop(PILImage.create(f)))).permute(2, 0, 1) for f in files])

def data(files, images, labelled, valid):
    "Items are numbers of images"
    x_tfms = [lambda i: TensorImage(images[i])]
    y_tfms = [lambda i: 'cat' if files[i].name[0].isupper() else 'dog', Categorize(vocab=['cat','dog'])]
    n = len(labelled)
    dsets = Datasets([*labelled,*valid], [x_tfms,y_tfms], splits=[range(n),range(n, n+len(valid))])
    tfms = [IntToFloatTensor(), Normalize.from_stats(*imagenet_stats), *aug_transforms(max_rotate=10, max_warp=0)]
    return dsets.dataloaders(bs=bs, val_bs=200, num_workers=0, device='cpu', after_batch=tfms)

def network(width, n):
    "Three stages of `n` residual blocks"
    blocks,a = [ConvLayer(3, width, stride=2)],width
    for b in (width,2*width,4*width):
        blocks += [ResBlock(1, a if i == 0 else b, b, stride=2 if i == 0 and b > width else 1) for i in range(n)]
        a = b
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, 2)).to(memory_format=torch.channels_last)

class OnlyTrain(Callback):
    "Each epoch of few images would validate on many"
    def before_validate(self): raise CancelValidException()

def train(dls, net, n_epoch, *cbs):
    "Train with `fit_one_cycle`, and print the accuracy on the validation set"
    learn,start = Learner(dls, net, metrics=accuracy, cbs=[ChannelsLast()]),time.process_time()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(n_epoch, 3e-3, cbs=[OnlyTrain(),*cbs])
        learn.accuracy = learn.validate()[1]
    learn.seconds = time.process_time() - start
    print(f'{len(dls.train_ds)} images, {n_epoch} epochs: {learn.accuracy:.4f} ({learn.seconds:.0f} s of processor time)', flush=True)
    return learn

def students(files, images, train_items, valid, seed, teacher):
    "Name -> trained learner"
    labelled = np.random.RandomState(seed).permutation(train_items)[:round(share*len(train_items))].tolist()
    few,every = data(files, images, labelled, valid),data(files, images, train_items, valid)
    both = add_unlabelled(few, [i for i in train_items if i not in labelled])
    longer = round(epochs*len(both.train)/len(few.train))     # as many steps
    def kd(): return KnowledgeDistillationCallback(teacher, SoftTarget(T=4), weight=0.9)
    n = len(labelled)
    runs = {f'{n} labels':(few,longer), f'{n} labels, teacher':(few,longer,kd()), f'{n} labels, teacher on all images':(both,epochs,kd()),
            'all labels':(every,epochs)}
    res = {}
    for name,(dls,*args) in runs.items():
        set_seed(seed, reproducible=True)
        res[name] = train(dls, network(16, 1), *args)
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--folder', help='images; by default those of the Oxford pets')
    p.add_argument('--seeds', type=int, default=3)
    args = p.parse_args()
    files = get_image_files(args.folder or untar_data(URLs.PETS)/'images').sorted()
    images,order = read(files),np.random.RandomState(42).permutation(len(files)).tolist()
    valid,train_items = order[:len(order)//5],order[len(order)//5:]
    set_seed(42, reproducible=True)
    teacher = train(data(files, images, train_items, valid), network(32, 1), teacher_epochs)
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}'
    rows = [dict(method='teacher, all labels', seed=42, accuracy=teacher.accuracy, seconds=teacher.seconds)]
    for seed in range(args.seeds):
        found = students(files, images, train_items, valid, seed, teacher)
        rows += [dict(method=k, seed=seed, accuracy=l.accuracy, seconds=l.seconds) for k,l in found.items()]
        table = pd.DataFrame(rows).assign(images=len(train_items), valid=len(valid), machine=machine)
        table.to_csv(Path(__file__).with_suffix('.csv'), index=False, float_format='%.4f')
    print(table.groupby('method', sort=False).accuracy.agg(['mean','std']).round(4))

if __name__ == '__main__': main()
