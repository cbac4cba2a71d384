"""Every loss on scikit-learn's digits, at the weight of its paper and at others: accuracy of the student.

    python benchmarks/losses.py [seeds]        # ten minutes on two cores; writes benchmarks/losses.csv

Student and teacher are those of the `fastdistill` command: 200 labels, 60 epochs, the teacher has 1000; on another random split (split=1).
The task loss has weight 1, unless the paper shares the weight (SoftTarget and HardTarget, where it is 1 - weight).
A new loss of the package needs a line with its weights in `grid`.
"""
import sys
from pathlib import Path
import pandas as pd
from fastdistill.all import Match
from fastdistill.losses import *
from fastdistill.losses.base import registered_losses

stages,before_relu = ['0','1','2'],['0.1','1.1','2.1']
def share(loss, *weights): return {(loss,w):dict(loss=loss, weight=w) for w in weights}
def add(loss, *weights): return {(loss,w):dict(loss=loss, weight=w, task_weight=1.) for w in weights}
def features(loss, layers, *weights):
    match = Match(loss, layers, layers, projector=loss_needs(loss).same_channels)
    return {(loss,w):dict(loss=match, weight=w, task_weight=1.) for w in weights}

grid = {**share(SoftTarget(T=4), .5, .9),
        **share(SoftTarget(T=10), .5, .9),
        **add(SoftTarget(T=2, standardize=True), 1., 10.),
        **add(Logits(), .1, 1.),
        **share(HardTarget(), .5, .9),
        **add(DecoupledKD(T=4, alpha=1, beta=2), .1, 1.),
        **add(DecoupledKD(), .1, 1.),
        **add(NormalizedKD(), .1, 1.),
        **add(DIST(), .2, 2.),
        **features(Attention(), stages, 10., 1000.),
        **features(FitNet(), stages[1:2], 1., 100.),
        **features(Cosine(), stages[1:2], .1, 1.),
        **features(ActivationBoundaries(margin=2.), before_relu, .1, 1.),
        **features(VID(), stages, .1, 1.),
        **features(ChannelWise(), stages, .1, 1.),
        **features(Similarity(), stages[2:], 30., 3000.),
        **features(RKD(), stages[2:], .1, 1.),
        **features(PKT(), stages[2:], 300., 30000.)}
needed = {cls for cls in registered_losses.values() if loss_needs(cls).single_label is not False}     # a digit has one class
missing = needed - {type(loss) for loss,_ in grid}
if missing: raise SystemExit(f'Expected weights in `grid` for {", ".join(sorted(cls.__name__ for cls in missing))}')

def named(loss, weight): return f'{loss!r}, weight {weight:g}'

def main(seeds=3):
    from fastdistill.cli import distill_digits
    methods = {'scratch':{}, **{named(*k):kw for k,kw in grid.items()}}
    runs,*_ = distill_digits(60, seeds, 200, split=1, methods=methods)
    last = runs[runs.epoch==60].groupby('method', sort=False).accuracy.agg(['mean','std'])
    last.index = last.index.str.removeprefix('student, ')
    rows = [('scratch', None, *last.loc['scratch'])] + [(repr(loss), w, *last.loc[named(loss, w)]) for loss,w in grid]
    table = pd.DataFrame(rows, columns=['loss','weight','accuracy','spread']).assign(seeds=seeds).round(4)
    table['gain'] = (table.accuracy - table.accuracy[0]).round(4)
    table.to_csv(Path(__file__).with_suffix('.csv'), index=False)
    print(table.to_string(index=False))

if __name__ == '__main__': main(*map(int, sys.argv[1:]))
