"""Every loss on scikit-learn's digits, at the weight of its paper and at others: accuracy of the student.

    python benchmarks/losses.py [seeds]                  # ten minutes on two cores; writes benchmarks/losses.csv
    python benchmarks/losses.py --only Cosine FitNet     # the rows of these losses alone; the others stay as they are in the file

Student and teacher are those of the `fastdistill` command: 200 labels, 60 epochs, the teacher has 1000; on another random split (split=1).
The task loss has weight 1, unless the paper shares the weight (SoftTarget and HardTarget, where it is 1 - weight).
A loss that `grid` does not name gets the weights .1 and 1; on features it compares all stages, with a projector if it needs the same channels.
"""
import argparse
from pathlib import Path
import pandas as pd
from fastdistill.all import Match
from fastdistill.losses import *
from fastdistill.losses.base import registered_losses
from rows import names_one_of, replace_rows

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
        **features(PKT(), stages[2:], 300., 30000.),
        **features(NST(), stages, 5., 50.),
        **features(OFD(), before_relu, .1, 1.),
        **features(CRD(), stages[2:], .08, .8)}

def can_run(cls):
    "A digit has one class, and the stages of the networks are maps"
    needs = loss_needs(cls)
    return needs.single_label is not False and (not needs.kinds or 4 in needs.kinds)

def settings(losses):
    "Those of `grid`, and two of each loss that it does not name"
    named = {type(loss) for loss,_ in grid}
    new = [cls() for cls in losses if cls not in named and can_run(cls)]
    def default(loss): return add(loss, .1, 1.) if loss_needs(loss).on_features is False else features(loss, stages, .1, 1.)
    return {**grid, **{k:kw for loss in new for k,kw in default(loss).items()}}

def named(loss, weight): return f'{loss!r}, weight {weight:g}'

def measure(losses, seeds):
    "Accuracy of each setting, and of the student alone in the first row"
    from fastdistill.cli import distill_digits
    methods = {'scratch':{}, **{named(*k):kw for k,kw in losses.items()}}
    runs,*_ = distill_digits(60, seeds, 200, split=1, methods=methods)
    last = runs[runs.epoch==60].groupby('method', sort=False).accuracy.agg(['mean','std'])
    last.index = last.index.str.removeprefix('student, ')
    rows = [('scratch', None, *last.loc['scratch'])] + [(repr(loss), w, *last.loc[named(loss, w)]) for loss,w in losses]
    table = pd.DataFrame(rows, columns=['loss','weight','accuracy','spread']).assign(seeds=seeds).round(4)
    table['gain'] = (table.accuracy - table.accuracy[0]).round(4)
    return table

def main():
    losses = settings(registered_losses.values())
    names = list(dict.fromkeys(type(loss).__name__ for loss,_ in losses))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('seeds', type=int, nargs='?', default=3)
    p.add_argument('--only', nargs='+', metavar='NAME', choices=names, default=[], help=f'some of {", ".join(names)}')
    args,file = p.parse_args(),Path(__file__).with_suffix('.csv')
    some = {(loss,w):kw for (loss,w),kw in losses.items() if not args.only or names_one_of(repr(loss), args.only)}
    table = measure(some, args.seeds)
    print(table.to_string(index=False))
    if args.only:
        old = pd.read_csv(file)
        if old.accuracy[0] != table.accuracy[0]: print(f'From scratch the file has {old.accuracy[0]}, from another machine or other seeds: run all rows to compare them')
        table = replace_rows(old, table, args.only, [repr(loss) for loss,_ in losses])
    table.to_csv(file, index=False)

if __name__ == '__main__': main()
