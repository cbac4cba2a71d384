"""Where distillation helps on scikit-learn's digits, and where it does not: accuracy by labels, epochs and method.

    python benchmarks/digits.py [seeds]        # a quarter of an hour on two cores; writes benchmarks/digits.csv

Made on another random split (split=1) than the demonstration of the `fastdistill` command (split=0).
"""
import sys
from pathlib import Path
import pandas as pd
from fastdistill.objective import Match
from fastdistill.experiment import distill_digits
from fastdistill.losses import Attention, SoftTarget

stages = ['0','1','2']
methods = {'scratch': {},
           **{f'SoftTarget T={T}': dict(loss=SoftTarget(T=T), weight=0.9) for T in (4,10)},
           **{f'Attention ×{w}': dict(loss=Match(Attention, stages, stages, weight=w), weight=1., task_weight=1.) for w in (1,10,100)}}
seeds,rows = int(sys.argv[1]) if len(sys.argv) > 1 else 3,[]
for n in (200,1000):
    for epochs in (30,60,100):
        runs,*_ = distill_digits(epochs, seeds, n, split=1, methods=methods)
        last = runs[runs.epoch==epochs].groupby('method', sort=False).accuracy.agg(['mean','std'])
        rows += [dict(labels=n, epochs=epochs, method=m.removeprefix('student, '), accuracy=a, spread=s, seeds=seeds) for m,(a,s) in last.iterrows()]
table = pd.DataFrame(rows).round(4)
table.to_csv(Path(__file__).with_suffix('.csv'), index=False)
print(table.to_string(index=False))
