"Several processes that start fast: copies of this one, which talk as those of `torchrun` do."
import contextlib, io, multiprocessing, os, pickle
import torch
from torch.distributed import TCPStore
from conftest import free_port

def _child(rank, world, port, f, args, file):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE='True', TORCHELASTIC_RESTART_COUNT='0')
    torch.set_num_threads(1)
    out,found,error = io.StringIO(),None,None
    with contextlib.redirect_stdout(out):
        try: found = f(rank, *args)
        except BaseException as e: error = f'{type(e).__name__}: {e}'
    file.write_bytes(pickle.dumps((found,error,out.getvalue())))

def run_forked(world, f, folder, *args, timeout=120):
    "Call `f(rank, *args)` in each of `world` processes: for each what it returned, its error, what it printed; or its exit code"
    port,context = free_port(),multiprocessing.get_context('fork')
    store = TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False)     # as `torchrun` keeps one
    files = [folder/f'said_{r}' for r in range(world)]
    for file in files: file.unlink(missing_ok=True)
    children = [context.Process(target=_child, args=(r,world,port,f,args,files[r])) for r in range(world)]
    for c in children: c.start()
    for c in children: c.join(timeout)
    hanging = [r for r,c in enumerate(children) if c.is_alive()]
    for r in hanging: children[r].kill()
    del store
    assert not hanging, f'processes {hanging} hang'
    return [pickle.loads(file.read_bytes()) if file.exists() else c.exitcode for c,file in zip(children, files)]
