"""`find_student` against an exhaustive search on the digits: six widths, three losses, two weights. Writes budget.csv.

The exhaustive search does not train the student alone, so the fits of the student alone are not counted in the time of `find_student` either.
"""
import argparse, contextlib, io, tempfile, time
from functools import partial
from pathlib import Path
import pandas as pd, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, set_seed
from fastai.callback.schedule import *
from fastdistill.budget import find, find_student
from fastdistill.budget.candidates import measure_students
from fastdistill.digits import digits_cnn, digits_dls
from fastdistill.experiment import train_students, with_teacher
from fastdistill.losses import Attention, DecoupledKD, SoftTarget
from fastdistill.objective import Match
from fastdistill.recording import record_teacher

widths,weights,lr = (2,4,6,8,12,16),(0.5,0.9),1e-2
stages = ['0','1','2']
losses = dict(SoftTarget=SoftTarget(T=10), DecoupledKD=DecoupledKD(), Attention=Match(Attention, stages, stages, weight=10))
students = {f'width {w}':partial(digits_cnn, w) for w in widths}
budgets = dict(all=1., half=0.02)     # MB: all six fit, and the first three

def in_memory(n):
    "The digits as tensors: fastai's transforms would take most of the time of these small networks"
    def items(dl): return list(zip(*(torch.cat(o) for o in zip(*dl))))
    dls = digits_dls(n)
    train,valid = (items([(b[0].clone(),b[1].clone()) for b in dl]) for dl in (dls.train.new(shuffle=False, drop_last=False),dls.valid))
    return DataLoaders(TfmdDL(train, bs=50, shuffle=True, drop_last=True, num_workers=0), TfmdDL(valid, bs=len(valid), num_workers=0))

def learner(dls, width): return Learner(dls, digits_cnn(width), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def quietly(f, *args, **kwargs):
    "What a function returns, and its seconds of CPU time"
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()): found = f(*args, **kwargs)
    return found,time.process_time()-start

def exhaustive(teacher, dls, epochs, folder):
    "Each combination trained in full: rows"
    candidates,rec = measure_students(students, dls, max_mb=1, loss_func=CrossEntropyLossFlat(), metrics=accuracy),record_teacher(
        teacher, dls, folder, loss=list(losses.values()))
    rows = []
    for s,l,w in ((s, l, w) for s in students for l in losses for w in weights):
        methods = with_teacher(rec, {l:dict(loss=losses[l], weight=w)})
        (runs,_),seconds = quietly(train_students, partial(candidates.learner, s), methods, epochs, lr, 3)
        last = runs[runs.epoch == epochs].accuracy
        rows.append({'search':'exhaustive', 'MB':candidates.table.MB[s], 'student':s, 'loss':l, 'weight':w, 'accuracy':last.mean(),
                     '±':last.std(), 'CPU seconds':seconds})
        print(rows[-1], flush=True)
    return rows

alone = []     # CPU seconds of the fits of the student alone

def timed(new_student, methods, *args, **kwargs):
    "`train_students`, which notes the time of a student alone"
    start = time.process_time()
    found = train_students(new_student, methods, *args, **kwargs)
    if 'student, scratch' in methods: alone.append(time.process_time()-start)
    return found

def searched(teacher, dls, epochs, max_mb, seed, short, finalists):
    "A row for one search"
    with tempfile.TemporaryDirectory() as folder:
        found,seconds = quietly(find_student, teacher, dls, max_mb=max_mb, students=students, losses=losses, weights=weights, n_epoch=epochs,
                                trial_epochs=short, finalists=finalists, lr=lr, folder=folder, seed=seed)
    seconds -= alone.pop()
    last = found.runs[(found.runs.epoch == epochs) & (found.runs.method != 'student, scratch')].accuracy
    of_three = found.finals.sort_index().head(3).accuracy.max()     # in the order of the short fits
    return {'search':f'find_student, seed {seed}', **found.best, 'accuracy':last.mean(), '±':last.std(), 'CPU seconds':seconds,
            'of three finalists':of_three, 'epochs of short fits':int(found.trials.epochs.sum()), 'short fits':len(found.trials), 'finished':int(found.trials.finished.sum())}

def show_list():
    "The default students for images of 64 pixels and two classes, on this machine"
    items = [(torch.randn(3, 64, 64), i%2) for i in range(8)]
    dls = DataLoaders(*[TfmdDL(items, bs=8, num_workers=0) for _ in range(2)])
    dls.c = 2
    print(measure_students(None, dls, max_mb=1000, loss_func=CrossEntropyLossFlat()))

def main(epochs:int, short:int, finalists:int, seeds:int, out:Path):
    torch.set_num_threads(1)
    find.train_students = timed
    from fastai.basics import defaults
    defaults.callbacks = [c for c in defaults.callbacks if c.__name__ != 'ProgressCallback']
    set_seed(0, reproducible=True)
    teacher = learner(in_memory(1000), 32)
    with teacher.no_logging(): teacher.fit_one_cycle(20, lr)
    print(f'teacher: accuracy {teacher.validate()[1]:.3f}', flush=True)
    dls = in_memory(200)
    if out.exists(): rows = [r for r in pd.read_csv(out).to_dict('records') if r['search'] == 'exhaustive']
    else:
        with tempfile.TemporaryDirectory() as folder: rows = exhaustive(teacher, dls, epochs, Path(folder)/'teacher')
        pd.DataFrame(rows).to_csv(out, index=False)
    every = pd.DataFrame(rows)
    for name,mb in budgets.items():
        fits = every[every.MB <= mb]
        best = fits.loc[fits.accuracy.idxmax()]
        print(f'\nup to {mb:g} MB: {len(fits)} combinations, {fits["CPU seconds"].sum():.0f} s; best: {best.to_dict()}')
        for seed in range(seeds):
            row = searched(teacher, dls, epochs, mb, seed, short, finalists)
            row |= {'budget MB':mb, 'share of the time':row['CPU seconds']/fits['CPU seconds'].sum(),
                    'behind the best':best.accuracy-row['accuracy'], '± of the best':best['±']}
            rows.append(row)
            print(row, flush=True)
            pd.DataFrame(rows).round(4).to_csv(out, index=False)
    pd.DataFrame(rows).round(4).to_csv(out, index=False)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--epochs', type=int, default=60, help='of a fit in full')
    p.add_argument('--short', type=int, default=30, help='epochs of a short fit')
    p.add_argument('--finalists', type=int, default=5, help='combinations that are trained in full')
    p.add_argument('--seeds', type=int, default=3, help='searches, each with another seed')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'), help='file to write; an exhaustive search in it is kept')
    p.add_argument('--list', action='store_true', help='only measure the default students for images')
    args = vars(p.parse_args())
    if args.pop('list'): show_list()
    else: main(**args)
