"One process that looks at a fit inside `distrib_ctx`: `torchrun distributed_check.py OUT` writes what it found to OUT/check_RANK.pth."
import sys
import torch
from fastai.torch_core import rank_distrib, set_seed
from conftest import data, learner, loaders, n_hooks, net, state
from fastdistill.all import *
from fastdistill.experiment import start_processes

def small():
    items = data(64, 8).train.dataset
    return loaders(items, items, 8)

def look():
    set_seed(0, reproducible=True)
    student,teacher = net(4),net(8)
    teacher.requires_grad_(False)
    learn = learner(student, small())
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Match(FitNet, '1', '1')])
    before,dls = [state(student),state(teacher)],list(learn.dls.loaders)
    with learn.distrib_ctx(sync_bn=False):
        check = learn.distill_check(kd, n=1)
        rows = len(learn.weight_finder(kd, weights=[0.5]).table)
    same = all(torch.equal(v, b[k]) for m,b in zip((student,teacher), before) for k,v in m.state_dict().items())
    same = same and learn.model is student and all(a is b for a,b in zip(learn.dls.loaders, dls)) and not n_hooks(student, teacher)
    return dict(models=check.models[['parameters','valid_loss','accuracy']].to_dict('index'), warnings=check.warnings, same=same, rows=rows)

if __name__ == '__main__':
    start_processes()
    torch.save(look(), f'{sys.argv[1]}/check_{rank_distrib()}.pth')
    torch.distributed.destroy_process_group()
