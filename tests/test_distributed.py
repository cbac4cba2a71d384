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
from test_callback import close, one_batch

KD = KnowledgeDistillationCallback
here = Path(__file__).parent
script = str(here/'distributed_run.py')

def start(*args):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(here), *sys.path]), PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def finish(process):
    try: out,err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()     # and its workers with it
        out,err = process.communicate()
    assert process.returncode == 0, out + err
    return out

def rows(printed): return [l for l in printed.splitlines() if l.startswith('[')]

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What each of two processes saw in each scenario, and what they printed"
    pytest.importorskip('accelerate')
    out = tmp_path_factory.mktemp('two')
    printed = finish(start('--nproc_per_node', 2, '--master_port', free_port(), script, out, *distributed_run.scenarios))
    return {n:[torch.load(out/f'{n}_{r}.pth') for r in (0,1)] for n in distributed_run.scenarios},printed,out

@pytest.mark.parametrize('name', distributed_run.scenarios)
def test_gradients_are_those_of_the_joined_batch(two, name, tmp_path):
    "Student's and projectors', step by step, and so are the weights in the end, and what is logged"
    ranks,saved = two[0][name],two[2]/'kd_plain.pth'
    if name != 'loaded':
        saved = tmp_path/'start.pth'
        torch.save(dict(losses=ranks[0]['start'], states=None), saved)
    one = distributed_run.fit(tmp_path, name, saved)
    assert len(one['grads']) == (2 if name == 'accumulate' else 4) and one['start'].keys() == ranks[0]['start'].keys()
    for rank in ranks:
        assert len(rank['grads']) == len(one['grads'])
        for a,b in zip(rank['grads'], one['grads']): close(a, b)
        for k in ('student','projectors'): close(rank[k].values(), one[k].values())
        assert rank['values'] == [pytest.approx(v, rel=1e-4) for v in one['values']]
    if name == 'clip': assert all(torch.stack([g.norm() for g in step]).norm() <= 0.0501 for step in one['grads'])

def test_projectors_stay_the_same_in_all_processes(two):
    "Bit for bit, though each process drew its own: they start, step and keep their optimizer's state together"
    for a,b in two[0].values():
        for k in ('start','student','projectors'): assert all(torch.equal(a[k][n], b[k][n]) for n in a[k])
        assert len(a['momenta']) == len(b['momenta']) == len(a['projectors']) and all(map(torch.equal, a['momenta'], b['momenta']))
        assert not all(torch.equal(a['start'][n], a['projectors'][n]) for n in a['start'])

def test_all_processes_load(two):
    "What the first one has saved"
    saved = torch.load(two[2]/'kd_plain.pth')['losses']
    for r in two[0]['loaded']: assert r['start'].keys() == saved.keys() and all(torch.equal(r['start'][n], saved[n]) for n in saved)

def test_processes_wait_for_the_one_that_saves(two):
    "What each loads right after is what the first one has trained"
    for ranks in two[0].values():
        for r in ranks: assert r['loaded'].keys() == ranks[0]['projectors'].keys() and all(torch.equal(v, ranks[0]['projectors'][k]) for k,v in r['loaded'].items())

def test_hooks_are_on_the_inner_module(two):
    for name,ranks in two[0].items():
        wrapper = 'OptimizedModule' if name == 'compiled' else 'DistributedDataParallel'
        for r in ranks: assert r['hooks'] == {(wrapper,3)} and r['hooks_left'] == 0 and r['plain']

def test_the_first_process_speaks_and_writes(two):
    _,printed,out = two
    assert len(rows(printed)) == 2*len(distributed_run.scenarios) and all(len(r.split(',')) == 7 for r in rows(printed))
    assert {f.name for f in out.glob('kd_*')} == {f'kd_{n}.pth' for n in distributed_run.scenarios}
    for a,b in two[0].values(): assert a['names'] == b['names'] == ['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','time']

@pytest.mark.slow
def test_two_nodes(two, tmp_path):
    "`torchrun` on two machines of one process each, both this one: the same as two processes of one"
    port = free_port()
    nodes = [start('--nnodes', 2, '--node_rank', r, '--nproc_per_node', 1, '--master_addr', '127.0.0.1', '--master_port', port, script, tmp_path, 'plain') for r in (0,1)]
    try: assert [len(rows(finish(n))) for n in nodes] == [2,0]
    finally:
        for n in nodes: n.terminate()     # where the other one failed
    assert [f.name for f in tmp_path.glob('kd_*')] == ['kd_plain.pth']
    for r in (0,1):
        node = torch.load(tmp_path/f'plain_{r}.pth')
        for k in ('student','projectors'): close(node[k].values(), two[0]['plain'][r][k].values())

def test_projectors_synchronise_their_batch_norm_where_the_student_does(teacher):
    g = [distributed_run.Steps(),distributed_run.Steps()]
    model = net()
    for o,convert in zip(g, (lambda m: m, nn.SyncBatchNorm.convert_sync_batchnorm)):
        torch.manual_seed(0)
        kd = KD(teacher, FitNet, ['0','1'], ['0','1'])
        learner(convert(deepcopy(model)), one_batch(), opt_func=SGD, cbs=[kd,o]).fit(1)
        norms = [m for m in kd.trained.losses.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 2 and {isinstance(m, nn.SyncBatchNorm) for m in norms} == {o is g[1]}
    assert len(g[0].grads[0]) == len(list(model.parameters())) + 6
    close(*[o.grads[0] for o in g])

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
    for m in (wrapped,several): m.forward = lambda x, m=m: m.module(x)     # stands in for the GPUs
    with pytest.raises(ValueError, match='layers of a teacher in `nn.DataParallel`'): learner().fit(1, cbs=KD(several, Attention, '0', '0'))
    learn.fit(1, cbs=KD(several, SoftTarget))
    assert not same_state(wrapped, before)     # predictions are gathered
