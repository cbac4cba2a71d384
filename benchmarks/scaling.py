"""How the cost of a step grows with the batch, the layers compared, the classes and the teacher: a ratio to the floor for each.

    python benchmarks/scaling.py            # ResNet18 as the student, 64 px, on the CPU: about five minutes; writes scaling.csv
    python benchmarks/scaling.py --device cuda
    python benchmarks/scaling.py --sweep teacher --out teacher.csv

On Linux, MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 before the command has the C library keep large buffers
instead of fetching them from the system anew, which is slow and comes and goes; scaling.csv was written so.

Rows are timed in turns, as in step_cost.py. What is not swept has the default below.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
from fastdistill.all import Attention, KnowledgeDistillationCallback, Match, SoftTarget, Teacher
from step_cost import forward_step, make_batch, make_teacher, training_step
from timing import machine, time_rounds

default = dict(teacher='resnet34', student='resnet18', batch=64, size=64, classes=10, precision='fp32', layers=0)
sweeps = {'batch': [8,16,32,64,128], 'layers': [0,1,2,4,8], 'classes': [10,100,1000,10000], 'teacher': [f'resnet{n}' for n in (18,34,50,101,152)]}
blocks = [f'layer{i}.{j}' for j in (1,0) for i in (4,3,2,1)]     # of both networks

def callback(args, **kwargs):
    terms = [SoftTarget] + [Match(Attention, b, b) for b in blocks[:args.layers]]
    return KnowledgeDistillationCallback(Teacher(make_teacher(args), **kwargs), terms)

def measure(args, rounds):
    "A row for each way of training: milliseconds, and ratio to the floor of its round (median, min, max)"
    batch = make_batch(args)
    steps = {'student alone': training_step(args, None, batch), 'distilled': training_step(args, callback(args), batch),
             'fast teacher': training_step(args, callback(args, fast=True), batch), 'teacher forward alone': forward_step(args, batch)}
    times = time_rounds(steps, rounds, args.device)
    ratio = times.div(times['student alone'] + times['teacher forward alone'], axis=0)
    return pd.DataFrame({'ms': 1e3*times.median(), 'ratio': ratio.median(), 'min': ratio.min(), 'max': ratio.max()}).rename_axis('row').reset_index()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu')
    p.add_argument('--rounds', type=int, default=8)
    p.add_argument('--sweep', nargs='*', choices=list(sweeps), default=list(sweeps))
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'scaling.csv')
    opts,tables = p.parse_args(),[]
    for name in opts.sweep:
        for v in sweeps[name]:
            table = measure(SimpleNamespace(**{**default, name: v, 'device': opts.device}), opts.rounds)
            tables.append(table.assign(sweep=name, value=v, machine=machine(opts.device), rounds=opts.rounds))
            print(f'{name} {v}\n{table.to_string(index=False, float_format="{:.3f}".format)}', flush=True)
    pd.concat(tables).to_csv(opts.out, index=False, float_format='%.4f')

if __name__ == '__main__': main()
