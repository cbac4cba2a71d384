"One process of a distributed fit: `torchrun distributed_run.py OUT SCENARIO...` writes what it saw of each to OUT/SCENARIO_RANK.pth. Alone it fits the joined batches."
import sys, time
from functools import partial
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, Learner, SGD, accuracy, set_seed
from fastai.callback.all import GradientAccumulation, GradientClip
from fastai.torch_core import distrib_barrier, num_distrib, rank_distrib
from torch import nn
from conftest import data, loaders, n_hooks
from fastdistill.all import *
from fastdistill.layers import unwrap_model
from fastdistill.experiment import start_processes

scenarios = {'plain': lambda n: [], 'accumulate': lambda n: [GradientAccumulation(n)], 'clip': lambda n: [GradientClip(0.05)], 'loaded': lambda n: [], 'compiled': lambda n: []}
options = {'compiled': dict(dynamo_backend='eager')}     # accelerate compiles around `DistributedDataParallel`

def conv_net(width):
    "Without batch norm: the gradient of a batch is the mean of its halves' gradients"
    return nn.Sequential(nn.Conv2d(2, width, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(width, 2*width, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8*width, 3))

class Steps(Callback):
    "Start of the projectors, and the gradients of each step"
    order = 100
    def before_fit(self): self.grads,self.start,self.hooks = [],None,set()
    def before_backward(self):
        self.hooks.add((type(self.model).__name__,n_hooks(unwrap_model(self.model))))
        if self.start is None: self.start = {k:v.clone() for k,v in self.knowledge_distillation.trained.losses.state_dict().items()}
    def before_step(self): self.grads.append([p.grad.clone() for g in self.opt.param_lists for p in g])

def saved_and_loaded(kd, file):
    "What each process loads, right after the first one has saved slowly"
    state_dict = kd.trained.state_dict
    def slow_state_dict():
        time.sleep(0.5)
        return state_dict()
    kd.trained.state_dict = slow_state_dict
    kd.save(file)
    try: kd.load(file)
    except FileNotFoundError as e: return repr(e)
    finally: distrib_barrier()
    return kd.trained.saved['losses']

def fit(out, scenario, saved=None):
    "Saved: the file from which the projectors start"
    set_seed(0, reproducible=True)
    items,bs = data(16, 16, shuffle=False).train.dataset,4
    if num_distrib() < 2:     # each process has a half: the first batches of both are one batch here
        items,bs = [items[i] for i in [*range(0,4),*range(8,12),*range(4,8),*range(12,16)]],8
    student,teacher = conv_net(4),conv_net(8)
    learn,steps = Learner(loaders(items, items, bs, shuffle=False), student, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=0.9)),Steps()
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Match(VID, ['1','3'], ['1','3']), Match(Attention, '3', '3')])
    if saved: kd.load(saved)
    torch.manual_seed(rank_distrib())     # the processes draw different projectors
    cbs = [kd, steps, *scenarios[scenario](2*bs)]
    with learn.no_bar():
        if num_distrib() < 2: learn.fit(2, 0.1, cbs=cbs)
        else:
            from accelerate.state import AcceleratorState
            AcceleratorState._reset_state()     # it keeps the options of the first time
            with learn.distrib_ctx(sync_bn=False, **options.get(scenario, {})): learn.fit(2, 0.1, cbs=cbs)
    seen = dict(grads=steps.grads, start=steps.start, student=student.state_dict(), projectors=kd.trained.losses.state_dict(), momenta=[s['grad_avg'] for s in kd.trained.states.values()],
                hooks=steps.hooks, hooks_left=n_hooks(student, teacher), plain=learn.model is student, names=list(learn.recorder.metric_names), values=[list(map(float, v)) for v in learn.recorder.values])
    seen['loaded'] = saved_and_loaded(kd, f'{out}/kd_{scenario}.pth')
    return seen

if __name__ == '__main__':
    start_processes()
    out,*names = sys.argv[1:]
    for name in names: torch.save(fit(out, name, f'{out}/kd_plain.pth' if name == 'loaded' else None), f'{out}/{name}_{rank_distrib()}.pth')
    torch.distributed.destroy_process_group()
