"""What a loss costs: its forward and backward pass, as a ratio to the student's own, at the four stages of a ResNet.

    python benchmarks/loss_cost.py                       # ResNet18, 64 px, batch 64, on the CPU
    python benchmarks/loss_cost.py --device cuda --size 224
    python benchmarks/loss_cost.py --only Attention      # the rows of these losses alone; the others stay as they are in loss_cost.csv

The teacher's features have the student's channels, as ResNet34's have; rows with a projector have a teacher of four times as many, as ResNet50's.
Each round times one pass of every row, in rotating order; a ratio is taken within its round. Peak memory of a row is what it adds to the resident memory
of a fresh process that holds the features (on a GPU: the peak of allocated memory), as a ratio to what the student's own passes add to theirs.
"""
import argparse, subprocess, sys
from copy import deepcopy
from pathlib import Path
import pandas as pd
import torch
import torch.nn.functional as F
from torchvision import models
from fastdistill.losses import *
from fastdistill.losses.base import registered_losses
from rows import names_one_of, replace_rows
from timing import machine, peak_mb, time_rounds

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--size', type=int, default=64, help='pixels')
    p.add_argument('--classes', type=int, default=100)
    p.add_argument('--items', type=int, default=50000, help='size of the training set, for losses with a memory')
    p.add_argument('--device', default='cpu')
    p.add_argument('--rounds', type=int, default=20)
    p.add_argument('--only', nargs='+', metavar='NAME', choices=list(registered_losses), default=[], help='some losses by name')
    p.add_argument('--memory_of', help=argparse.SUPPRESS)
    return p.parse_args()

def can_run(cls):
    "Stages are maps, and the labels are classes, no values as for TeacherBounded"
    needs = loss_needs(cls)
    return not (needs.needs_targ and needs.single_label is False) and (not needs.kinds or 4 in needs.kinds)

variants = {SoftTarget:[SoftTarget(), SoftTarget(standardize=True)], RKD:[RKD(angle=0), RKD()]}
every = [loss for cls in registered_losses.values() if can_run(cls) for loss in variants.get(cls, [cls()])]
on_logits = [loss for loss in every if loss_needs(loss).on_features is False]
on_stages = [loss for loss in every if loss_needs(loss).on_features is not False]
projected = [FitNet(), Projected(ChannelWise())]

def passes(args):
    "Row -> function that makes the function of one forward and backward pass"
    def randn(*shape): return torch.randn(*shape, device=args.device)
    y = torch.randint(args.classes, (args.batch,), device=args.device)
    def student():
        model,x = models.resnet18(num_classes=args.classes).to(args.device),randn(args.batch, 3, args.size, args.size)
        return lambda: F.cross_entropy(model(x), y).backward()
    def build(loss, s, t):
        if not loss_needs(loss).builds: return loss
        s = [x.detach() for x in s] if isinstance(s, list) else s.detach()
        return deepcopy(loss).build(s, t, *[args.items]*loss_needs(loss).needs_items)
    def of(loss, pairs, *targ):
        needs = loss_needs(loss)
        calls = [tuple(map(list, zip(*pairs)))] if needs.all_layers else pairs
        losses = [build(loss, *call) for call in calls]
        if needs.needs_items: targ = (*targ, torch.arange(args.batch, device=args.device))
        def one():
            for s,_ in pairs: s.grad = None
            sum(loss(*call, *targ) for loss,call in zip(losses, calls)).backward()
        return one
    def logits(loss):
        def new():
            s,t = randn(args.batch, args.classes).requires_grad_(),randn(args.batch, args.classes)
            return of(loss, [(s,t)], *[y]*loss_needs(loss).needs_targ)
        return new
    def stages(loss, times=1):
        def new():
            sizes = [(64*2**i, -(-args.size//(4*2**i))) for i in range(4)]
            return of(loss, [(randn(args.batch, c, n, n).relu_().requires_grad_(),randn(args.batch, c*times, n, n).relu_()) for c,n in sizes])
        return new
    return {'student': student, **{repr(l):logits(l) for l in on_logits}, **{repr(l):stages(l) for l in on_stages},
            **{f'{l!r}, 4 × the channels':stages(l, 4) for l in projected}}

def peak_memory(args):
    "Megabytes that row `args.memory_of` adds at its peak, beside its model or features"
    if args.device == 'cpu': torch.nn.Conv2d(3, 3, 3)(torch.randn(1, 3, 8, 8)).sum().backward()     # the libraries themselves
    f = passes(args)[args.memory_of]()
    if args.device == 'cpu': Path('/proc/self/clear_refs').write_text('5')     # Linux: the peak starts anew
    else: torch.cuda.reset_peak_memory_stats()
    before = peak_mb(args.device)
    for _ in range(3): f()
    return peak_mb(args.device) - before

def main():
    args = parse()
    if args.memory_of: return print(f'MB {peak_memory(args)}')
    torch.manual_seed(0)
    rows = {name:new for name,new in passes(args).items() if not args.only or name == 'student' or names_one_of(name, args.only)}
    times = time_rounds({name:new() for name,new in rows.items()}, args.rounds, args.device)
    ratio = times.div(times['student'], axis=0)
    table = pd.DataFrame({'ms': 1e3*times.median(), '% of student': 100*ratio.median(), 'min': 100*ratio.min(), 'max': 100*ratio.max()})
    for name in times:
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], '--memory_of', name], capture_output=True, text=True, check=True)
        table.loc[name,'peak MB'] = float(out.stdout.split('MB ')[-1])
    table['% of peak'] = 100*table['peak MB']/table['peak MB'].iloc[0]
    print(f'ResNet18, {args.size} px, batch {args.batch}, {args.classes} classes, fp32, {machine(args.device)}; '
          f'medians of {args.rounds} rounds, min and max of the ratio over rounds')
    print(table.to_string(float_format='{:.2f}'.format))
    file,table = Path(__file__).with_suffix('.csv'),table.round(2).rename_axis('loss').reset_index()
    if args.only: table = replace_rows(pd.read_csv(file), table, args.only, [*passes(args)])
    table.to_csv(file, index=False)

if __name__ == '__main__': main()
