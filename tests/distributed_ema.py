"One process of a fit with an `EMATeacher`: `torchrun distributed_ema.py OUT` writes its student and its average to OUT/ema_RANK.pth. Alone it fits the joined batches."
import sys
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, SGD, set_seed
from fastai.torch_core import num_distrib, rank_distrib
from torch import nn
from conftest import data, loaders, net
from fastdistill.all import *
from fastdistill.experiment import start_processes
from distributed_run import conv_net

def fit(out, model):
    set_seed(0, reproducible=True)
    items,bs = data(16, 16, shuffle=False).train.dataset,4
    if num_distrib() < 2:     # each process has a half: the first batches of both are one batch here
        items,bs = [items[i] for i in [*range(0,4),*range(8,12),*range(4,8),*range(12,16)]],8
    student,ema = model(4),EMATeacher(0.7)
    learn,kd = Learner(loaders(items, items, bs, shuffle=False), student, loss_func=CrossEntropyLossFlat(), opt_func=SGD),KnowledgeDistillationCallback(ema, SoftTarget, weight=0.9)
    def train():
        for _ in range(2): learn.fit(1, 0.1, cbs=kd)
    with learn.no_bar(), learn.no_logging():
        if num_distrib() < 2: train()
        else:
            with learn.distrib_ctx(sync_bn=False): train()
    kd.save(f'{out}/{model.__name__}.pth')
    again = KnowledgeDistillationCallback(EMATeacher(0.7))
    again.load(f'{out}/{model.__name__}.pth')
    return dict(student=student.state_dict(), average=ema.model.state_dict(), steps=ema.steps, kind=type(ema.model).__name__, loaded=again.teacher.state_dict())

if __name__ == '__main__':
    start_processes()
    found = {model.__name__:fit(sys.argv[1], model) for model in (conv_net,net)}
    torch.save(found, f'{sys.argv[1]}/ema_{rank_distrib()}.pth')
    torch.distributed.destroy_process_group()
