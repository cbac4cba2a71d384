"""What a recorded teacher costs: a student's epoch with it, the making of it, the opening of a large one.

    python benchmarks/recording.py [--rounds 5]        # writes benchmarks/recording.csv
    python benchmarks/recording.py --scale             # a thousand to a million items; writes recording_scale.csv

ResNet34 -> ResNet18, 64 px, batch 64, random crops and augmentation, on images of noise. Each round runs an epoch of
every row, in rotating order; a ratio is taken within its round. Images are loaded in the process that trains.
"""
import argparse, subprocess, sys, tempfile
from functools import partial
from pathlib import Path
from fastai.vision.all import *
from fastdistill.all import *
from fastdistill.recording.files import Files
import recording_scale
from timing import machine, time_rounds
from torchvision import models

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--batches', type=int, default=30, help='in an epoch')
    p.add_argument('--epochs', type=int, default=3, help='recorded')
    p.add_argument('--rounds', type=int, help='5 by default, 151 with --scale')
    p.add_argument('--scale', action='store_true', help='recordings of a thousand to a million items, without images')
    return p.parse_args()

def make_dls(args):
    n = args.batch*args.batches
    pixels = np.random.default_rng(0).integers(0, 256, (n+1,80,80,3), dtype=np.uint8)
    block = DataBlock((ImageBlock,CategoryBlock(vocab=list(range(10)))), get_items=lambda _: list(range(n+1)),
                      get_x=lambda i: pixels[i], get_y=lambda i: i%10, splitter=IndexSplitter([n]),
                      item_tfms=RandomResizedCrop(64), batch_tfms=aug_transforms())
    return block.dataloaders(None, bs=args.batch, num_workers=0)

def epoch(dls, teacher=None):
    "Function that trains a student for an epoch, without validation"
    cbs = None if teacher is None else KnowledgeDistillationCallback(teacher, SoftTarget)
    learn = Learner(dls, models.resnet18(num_classes=10), cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    learn._do_epoch_validate = lambda *_: None
    return partial(learn.fit, 1)

def rows(args, folder):
    dls,teacher = make_dls(args),models.resnet34(num_classes=10)
    def load():
        for _ in range(args.epochs):
            for b in dls.train: pass
    @torch.no_grad()
    def forward():
        teacher.eval()
        for _ in range(args.epochs):
            for x,_ in dls.train: teacher(x)
    def record(path): return record_teacher(teacher, dls, path, n_epoch=args.epochs)
    folders = (folder/str(i) for i in range(10**6))
    return {'student alone': epoch(dls), 'student and teacher': epoch(dls, teacher),
            'student and recorded teacher': epoch(dls, record(folder/'rec')),
            'loading': load, 'loading and teacher forward': forward, 'recording': lambda: record(next(folders))}

def open_large(folder):
    "Seconds and megabytes that a million answers of a thousand classes take to be opened, in a process of its own"
    rec = TeacherRecording(folder/'rec')
    Files.create(folder/'large', {**rec.header, 'rows':1_000_000, 'answers':[{**rec.header['answers'][0], 'shape':[1000]}]}).finish()
    code = f"""
import resource, time
from fastdistill.recording import TeacherRecording
before,start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,time.perf_counter()
TeacherRecording({str(folder/'large')!r})
print(time.perf_counter()-start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)"""
    python = [sys.executable, '-W', 'ignore', '-c', code]
    return map(float, subprocess.run(python, capture_output=True, text=True, check=True).stdout.split())

def main():
    args = parse()
    if args.scale: return recording_scale.main(args.rounds or 151)
    args.rounds = args.rounds or 5
    with tempfile.TemporaryDirectory() as folder:
        times = time_rounds(rows(args, Path(folder)), args.rounds, 'cpu')
        seconds,mb = open_large(Path(folder))
    res = []
    for row in times:
        one_epoch = 'student' in row
        over = 'student alone' if one_epoch else 'loading and teacher forward'
        n = args.batches if one_epoch else args.batches*args.epochs
        ratio = times[row]/times[over]
        res.append(dict(row=row, ms_per_batch=1e3*times[row].median()/n, ratio_to=over,
                        ratio=ratio.median(), min=ratio.min(), max=ratio.max()))
    table = pd.DataFrame(res).round(3)
    print(f'ResNet34 -> ResNet18, 64 px, batch {args.batch}, {args.batches} batches an epoch, '
          f'{args.epochs} epochs recorded, {machine("cpu")}; medians of {args.rounds} rounds')
    print(table.to_string(index=False))
    print(f'A million answers of a thousand classes, 2 GB: opened in {1e3*seconds:.1f} ms, {mb:.1f} MB more of memory')
    table.assign(machine=machine('cpu'), rounds=args.rounds).to_csv(Path(__file__).with_suffix('.csv'), index=False)

if __name__ == '__main__': main()
