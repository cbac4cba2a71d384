"One process of a distributed fit with a loss that has a memory: `torchrun memory_run.py OUT` writes it to OUT/memory_RANK.pth."
import sys
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, SGD, TfmdDL
from fastai.torch_core import rank_distrib
from torch import nn
from fastdistill.all import *
from fastdistill.experiment import start_processes

n,width = 12,dict(student=3, teacher=6)
def inputs(): return torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
def network(who):
    torch.manual_seed(width[who])
    return nn.Sequential(nn.Linear(5, width[who]), nn.Tanh(), nn.Linear(width[who], 2))
def features(who, x):
    with torch.no_grad(): return network(who)[:2](x)

class Watched(CRD):
    "Keeps how it was before its first batch"
    start = None
    def forward(self, *args):
        if self.start is None: self.start = {k:v.clone() for k,v in self.state_dict().items()}
        return super().forward(*args)

def look():
    items,cpu = [*zip(inputs(), torch.arange(n)%2)],torch.device('cpu')
    dls = DataLoaders(*[TfmdDL(items, bs=3, shuffle=shuffle, num_workers=0, device=cpu) for shuffle in (True,False)], device=cpu)
    learn = Learner(dls, network('student'), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    kd = KnowledgeDistillationCallback(network('teacher'), Watched(negatives=5, dim=4), '1', '1', weight=1., task_weight=1.)
    torch.manual_seed(rank_distrib())     # the processes draw different memories
    with learn.distrib_ctx(sync_bn=False), learn.no_bar(), learn.no_logging(): learn.fit(1, 0., cbs=kd)
    crd = kd.trained.losses[0][0]
    return dict(start=crd.start, end=crd.state_dict())

if __name__ == '__main__':
    start_processes()
    torch.save(look(), f'{sys.argv[1]}/memory_{rank_distrib()}.pth')
    torch.distributed.destroy_process_group()
