"""What a training batch costs with a teacher beside it, as a ratio to the floor: student step alone + teacher forward alone.

    python benchmarks/step_cost.py                                     # ResNet34 -> ResNet18, 64 px, batch 64, on the CPU
    python benchmarks/step_cost.py --only recorded                     # with a recorded teacher alone
    python benchmarks/step_cost.py --teacher resnet18 --only EMA       # with the average of the student as its teacher
    python benchmarks/step_cost.py --peers --save benchmarks/step_cost.csv   # with fasterai's callback beside (pip install fasterai); for the front page
    python benchmarks/step_cost.py --small                             # a student of 1,702 parameters, one thread, beside a loop written by hand
    python benchmarks/step_cost.py --device cuda --precision bf16 --teacher resnet50 --size 224
    python benchmarks/step_cost.py --small --device cuda               # where launching the operations takes the time

Each round times one batch of every row, in rotating order, inside fastai's own training loop; a ratio is taken within its round.
Peak memory of a row is what it adds to the resident memory of a fresh process (on Linux; on a GPU: the peak of allocated memory).
On a GPU the tables also show how often the host waits for it in a step, as PyTorch tells (`torch.cuda.set_sync_debug_mode`, which leaves out
events), and the ratios that we want to keep.
"""
import argparse, io, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.all import *
from fastai.data.load import DataLoader
from torchvision import models
from fastdistill.digits import digits_cnn, digits_dls
from fastdistill.all import Attention, EMATeacher, KnowledgeDistillationCallback, Match, SoftTarget, Teacher, TeacherRecording, record_teacher
from timing import machine, peak_mb, time_rounds, waits

layers = [f'layer{i}' for i in range(1,5)]
alone = 'student alone','teacher forward alone'     # the floor
to_floor,to_student = 'ratio to floor','ratio to student alone'
limits = {'SoftTarget':(1.03,to_floor), 'Attention, 4 layers':(1.06,to_floor), 'SoftTarget, fast teacher':(.9,to_floor),
          'Attention, 4 layers, fast teacher':(.9,to_floor), 'SoftTarget, recorded teacher':(1.03,to_student), 'Attention, 4 layers, recorded teacher':(1.03,to_student)}

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--teacher', default='resnet34', help='torchvision model with layer1 to layer4')
    p.add_argument('--student', default='resnet18', help='likewise')
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--size', type=int, default=64, help='pixels')
    p.add_argument('--classes', type=int, default=10)
    p.add_argument('--device', default='cpu')
    p.add_argument('--precision', default='fp32', choices=['fp32','fp16','bf16'], help='fp16 and bf16: mixed, on a GPU')
    p.add_argument('--rounds', type=int, help='20, or 400 with --small')
    p.add_argument('--peers', action='store_true', help='time fasterai too')
    p.add_argument('--only', default='', help='rows whose names contain this, beside student and teacher alone')
    p.add_argument('--small', action='store_true', help='networks of the digits, batch 50, in float32; on a CPU one thread')
    p.add_argument('--save', metavar='FILE', help='also write the table to a CSV file')
    p.add_argument('--memory_of', help=argparse.SUPPRESS)
    p.add_argument('--recording', help=argparse.SUPPRESS)
    args = p.parse_args()
    args.rounds = args.rounds or (400 if args.small else 20)
    if args.precision != 'fp32' and args.device == 'cpu': p.error("fastai's mixed precision needs a GPU")
    return args

def make_teacher(args): return getattr(models, args.teacher)(num_classes=args.classes).to(args.device)

def callbacks(args):
    "Row -> function that makes the callback of its fit"
    rows = {'student alone': lambda: None,
            'SoftTarget': lambda: KnowledgeDistillationCallback(make_teacher(args), SoftTarget),
            'Attention, 4 layers': lambda: KnowledgeDistillationCallback(make_teacher(args), Attention, layers, layers, weight=0.9),
            'Attention, layers 1 and 2': lambda: KnowledgeDistillationCallback(make_teacher(args), Attention, layers[:2], layers[:2], weight=0.9),
            'SoftTarget, fast teacher': lambda: KnowledgeDistillationCallback(Teacher(make_teacher(args), fast=True), SoftTarget),
            'Attention, 4 layers, fast teacher': lambda: KnowledgeDistillationCallback(Teacher(make_teacher(args), fast=True), Attention, layers, layers, weight=0.9),
            'SoftTarget, recorded teacher': lambda: KnowledgeDistillationCallback(TeacherRecording(args.recording), SoftTarget),
            'Attention, 4 layers, recorded teacher': lambda: KnowledgeDistillationCallback(TeacherRecording(args.recording), Attention, layers, layers, weight=0.9)}
    if args.teacher == args.student: rows['SoftTarget, EMATeacher'] = lambda: KnowledgeDistillationCallback(EMATeacher(), SoftTarget)
    if args.peers:
        import fasterai.distill.all as fa
        rows['fasterai SoftTarget'] = lambda: fa.KnowledgeDistillationCallback(make_teacher(args), fa.SoftTarget)
        rows['fasterai Attention, 4 layers'] = lambda: fa.KnowledgeDistillationCallback(make_teacher(args), fa.Attention, layers, layers, weight=0.9)
    return rows

def make_batch(args):
    gen = torch.Generator().manual_seed(0)
    x,y = torch.randn(args.batch, 3, args.size, args.size, generator=gen),torch.randint(args.classes, (args.batch,), generator=gen)
    return x.to(args.device),y.to(args.device)

def make_dls(args, batch):
    "Loaders of this batch alone"
    dl = DataLoader(list(zip(*batch)), bs=args.batch)
    return DataLoaders(dl, dl, device=torch.device(args.device))

def training_step(args, cb, batch):
    "Function that trains one batch in a learner stopped in the middle of its first epoch"
    torch.manual_seed(0)
    learn = Learner(make_dls(args, batch), getattr(models, args.student)(num_classes=args.classes).to(args.device), loss_func=CrossEntropyLossFlat(), cbs=cb)
    if args.precision != 'fp32': getattr(learn, f'to_{args.precision}')()
    return started(learn)

def started(learn):
    "Function that trains one batch of a learner"
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    learn.create_opt()
    learn.n_epoch,learn.dl,learn.n_iter,learn.epoch = 1,learn.dls.train,10**6,0
    learn(['before_fit','before_epoch','before_train'])
    batch = next(iter(learn.dl))     # loading it is no part of the step
    def step():
        learn.train_iter = max(1, learn.train_iter)     # a fit looks at its first batch more closely
        learn.one_batch(1, batch)
    learn.one_batch(0, batch)
    return step

def forward_step(args, batch):
    "Function that lets the teacher answer one batch"
    model,dtype = make_teacher(args).eval(),dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[args.precision]
    @torch.no_grad()
    def step():
        with torch.autocast(args.device, dtype=dtype, enabled=args.precision != 'fp32'): model(batch[0])
    return step

def steps(args, batch, only=None):
    "Row -> function that does one step of it"
    new = {name:lambda cb=cb: training_step(args, cb(), batch) for name,cb in callbacks(args).items()}
    new['teacher forward alone'] = lambda: forward_step(args, batch)
    def asked(name): return name == only if only else args.only in name or name in alone
    return {name:f() for name,f in new.items() if asked(name)}

def peak_memory(args):
    "Megabytes that row `args.memory_of` adds at its peak, in this process"
    batch = make_batch(args)
    if args.device == 'cpu': torch.nn.Conv2d(3, 3, 3)(batch[0][:1]).sum().backward()     # the libraries themselves
    before = peak_mb(args.device)
    for f in steps(args, batch, only=args.memory_of).values():
        for _ in range(4): f()
    return peak_mb(args.device) - before

def memory_of(args, row):
    "`peak_memory` in a process of its own"
    command = [sys.executable, __file__, *sys.argv[1:], '--recording', args.recording, '--memory_of', row]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split('MB ')[-1])

class ByHand(Callback):
    "The few lines that one would write without a package"
    def __init__(self, teacher): self.teacher = teacher.eval()
    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): answer = self.teacher(*self.xb)
        kl = F.kl_div(F.log_softmax(self.pred/5, 1), F.softmax(answer/5, 1), reduction='batchmean')*25
        self.learn.loss_grad = 0.5*self.learn.loss_grad + 0.5*kl
        self.learn.loss = self.learn.loss_grad.clone()

def small(args):
    "Networks so small that the cost is that of the calls, not of the numbers"
    if args.device == 'cpu': torch.set_num_threads(1)
    stages,weights = ['0','1','2'],digits_cnn(32).state_dict()
    def teacher():
        model = digits_cnn(32)
        model.load_state_dict(weights)
        return model.to(args.device)
    rows = {'student alone': lambda: None, 'written by hand': lambda: ByHand(teacher()), 'SoftTarget': lambda: KnowledgeDistillationCallback(teacher(), SoftTarget),
            'Attention, 3 layers': lambda: KnowledgeDistillationCallback(teacher(), Attention, stages, stages)}
    def learner(cb):
        torch.manual_seed(0)
        return Learner(digits_dls(1000, bs=50).to(args.device), digits_cnn(4).to(args.device), loss_func=CrossEntropyLossFlat(), cbs=cb)
    step = {name:started(learner(cb())) for name,cb in rows.items()}
    times = time_rounds(step, args.rounds, args.device)
    ratio = times.div(times['written by hand'], axis=0)
    low,high = ratio.quantile(.25),ratio.quantile(.75)
    print(f'1,702 parameters beside a teacher of 94,186, 8 px, batch 50, fp32, {machine(args.device)}; medians of {len(times)} rounds, ratios taken within a round, with their middle half')
    table = pd.DataFrame({'ms': 1e3*times.median(), 'ratio to by hand': ratio.median(), 'from': low, 'to': high})
    if args.device != 'cpu': table['waits'] = {name:waits(f) for name,f in step.items()}
    print(table.to_string(float_format='{:.3f}'.format))

def main():
    args = parse()
    if args.small: return small(args)
    if args.memory_of: return print(f'MB {peak_memory(args)}')
    with tempfile.TemporaryDirectory() as folder:
        args.recording = f'{folder}/teacher.rec'
        batch = make_batch(args)
        with redirect_stdout(io.StringIO()): record_teacher(make_teacher(args), make_dls(args, batch), args.recording, loss=[Match(SoftTarget), Match(Attention, layers, layers)])
        compare(args, batch)

def add_waits_and_limits(table, rows):
    "How often the host waits in a step, what we want a ratio to be at most, and whether it is"
    table['waits'] = {name:waits(f) for name,f in rows.items()}
    for name,(most,of) in limits.items():
        if name in table.index: table.loc[name,'at most'] = f'{most:.2f} of {of.removeprefix("ratio to ")}: {"kept" if table.loc[name,of] <= most else "MISSED"}'
    table.fillna('', inplace=True)

def compare(args, batch):
    "Time all rows, then look at the memory of each"
    rows = steps(args, batch)
    times = time_rounds(rows, args.rounds, args.device)
    floor = sum(times[name] for name in alone)
    ratio = times.div(floor, axis=0)
    table = pd.DataFrame({'ms': 1e3*times.median(), to_floor: ratio.median(), 'min': ratio.min(), 'max': ratio.max()})
    table[to_student] = times.div(times['student alone'], axis=0).median()
    with ThreadPoolExecutor(1 if args.device == 'cpu' else 8) as pool: table['peak MB'] = [*pool.map(partial(memory_of, args), times)]
    table['ratio to peak of alone + alone'] = table['peak MB'] / table['peak MB'][list(alone)].sum()
    if args.device != 'cpu': add_waits_and_limits(table, rows)
    if args.save: table.rename_axis('row').assign(machine=machine(args.device)).to_csv(args.save, float_format='%.4f')
    print(f'{args.teacher} -> {args.student}, {args.size} px, batch {args.batch}, {args.precision}, {machine(args.device)}; '
          f'medians of {args.rounds} rounds, min and max of the ratio over rounds')
    print(table.to_string(float_format='{:.3f}'.format))

if __name__ == '__main__': main()
