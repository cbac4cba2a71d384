"Two processes on the CPU: the gradients of one process with the joined batch, projectors in step, one voice."
import os, subprocess, sys
from copy import deepcopy
from pathlib import Path
import pytest, torch
from fastai.basics import SGD
from torch import nn
import distributed_run
from conftest import free_port, learner, n_hooks, net, same_state, state
from fastdistill.all import *
from test_callback import Gradients, close, one_batch

KD = KnowledgeDistillationCallback
here = Path(__file__).parent
script = str(here/'distributed_run.py')

def start(*args):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(here), *sys.path]), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def finish(process):
    out,err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What each of two processes saw in each scenario, and what they printed"
    pytest.importorskip('accelerate')
    out = tmp_path_factory.mktemp('two')
    printed = finish(start('--nproc_per_node', 2, '--master_port', free_port(), script, out, *distributed_run.scenarios))
    return {n:[torch.load(out/f'{n}_{r}.pth') for r in (0,1)] for n in distributed_run.scenarios},printed,out

@pytest.mark.parametrize('name', distributed_run.scenarios)
def test_gradients_are_those_of_the_joined_batch(two, name, tmp_path):
    "Student's and projectors', step by step, and so are the weights in the end"
    ranks = two[0][name]
    one = distributed_run.fit(tmp_path, name, ranks[0]['start'])
    assert len(one['grads']) == {'plain':4,'accumulate':2,'clip':4}[name] and one['start'].keys() == ranks[0]['start'].keys()
    for rank in ranks:
        assert len(rank['grads']) == len(one['grads'])
        for a,b in zip(rank['grads'], one['grads']): close(a, b)
        for k in ('student','projectors'): close(rank[k].values(), one[k].values())
    if name == 'clip': assert all(torch.stack([g.norm() for g in step]).norm() <= 0.0501 for step in one['grads'])

def test_projectors_stay_the_same_in_all_processes(two):
    "Bit for bit, though each process drew its own: they start, step and keep their optimizer's state together"
    for a,b in two[0].values():
        for k in ('start','student','projectors'): assert all(torch.equal(a[k][n], b[k][n]) for n in a[k])
        assert all(map(torch.equal, a['momenta'], b['momenta'])) and not all(torch.equal(a['start'][n], a['projectors'][n]) for n in a['start'])

def test_hooks_are_on_the_inner_module(two):
    for ranks in two[0].values():
        for r in ranks: assert r['hooks'] == {3} and r['hooks_left'] == 0 and r['plain']

def test_the_first_process_speaks_and_writes(two):
    _,printed,out = two
    rows = [l for l in printed.splitlines() if l.startswith('[')]
    assert len(rows) == 2*len(distributed_run.scenarios) and all(len(r.split(',')) == 7 for r in rows)
    assert {f.name for f in out.glob('kd_*')} == {f'kd_{n}_0.pth' for n in distributed_run.scenarios}
    for a,b in two[0].values(): assert a['names'] == b['names'] == ['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','time']

def test_two_nodes(two, tmp_path):
    "`torchrun` on two machines of one process each, both this one: the same as two processes of one"
    port = free_port()
    nodes = [start('--nnodes', 2, '--node_rank', r, '--nproc_per_node', 1, '--master_addr', '127.0.0.1', '--master_port', port, script, tmp_path, 'plain') for r in (0,1)]
    for n in nodes: finish(n)
    for r in (0,1):
        node = torch.load(tmp_path/f'plain_{r}.pth')
        for k in ('student','projectors'): close(node[k].values(), two[0]['plain'][r][k].values())

def test_projectors_synchronise_their_batch_norm_where_the_student_does(teacher):
    g = [Gradients(),Gradients()]
    model = net()
    for o,convert in zip(g, (lambda m: m, nn.SyncBatchNorm.convert_sync_batchnorm)):
        torch.manual_seed(0)
        kd = KD(teacher, FitNet, ['0','1'], ['0','1'])
        learner(convert(deepcopy(model)), one_batch(), opt_func=SGD, cbs=[kd,o]).fit(1)
        norms = [m for m in kd._trained.losses.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 2 and {isinstance(m, nn.SyncBatchNorm) for m in norms} == {o is g[1]}
    close(*[o.steps[0] for o in g])

def test_data_parallel(teacher):
    "Hooks on copies that run on several GPUs would keep one part of the batch: refused, before anything changes"
    wrapped = nn.DataParallel(net())
    learn = learner(wrapped)     # without GPUs it calls the model itself
    learn.fit(1, cbs=KD(teacher, [SoftTarget, Match(Attention, '0', '0')]))
    wrapped.device_ids = [0,1]
    before = state(wrapped)
    with pytest.raises(ValueError, match='layers of a student in `nn.DataParallel` cannot be hooked.*2 GPUs.*distrib_ctx'): learn.fit(1, cbs=KD(teacher, Attention, '0', '0'))
    assert same_state(wrapped, before) and n_hooks(wrapped, teacher) == 0
    several = nn.DataParallel(teacher)
    several.device_ids = [0,1]
    with pytest.raises(ValueError, match='layers of a teacher in `nn.DataParallel`'): learner().fit(1, cbs=KD(several, Attention, '0', '0'))
