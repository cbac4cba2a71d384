"What the benchmarks share: rows timed in turns, peak memory, the machine's name."
import re, time, warnings
from pathlib import Path
import pandas as pd
import torch

def sync(device):
    if device != 'cpu': torch.cuda.synchronize()

def time_rounds(rows, rounds, device):
    "Seconds of each row (name -> function) in each round, in rotating order; three rounds more, which come first, warm up"
    names,res = list(rows),[]
    for r in range(rounds+3):
        times = {}
        for name in names[r%len(names):] + names[:r%len(names)]:
            sync(device); start = time.perf_counter()
            rows[name]()
            sync(device); times[name] = time.perf_counter()-start
        res.append(times)
    return pd.DataFrame(res[3:], columns=names)

def peak_mb(device):
    "Peak of this process so far: resident memory (Linux), on a GPU allocated memory"
    if device != 'cpu': return torch.cuda.max_memory_allocated()/2**20
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def waits(step):
    "How often the host waits for the GPU in one step, as PyTorch tells; it does not tell of events"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try: step()
        finally: torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing CUDA operation' in str(w.message) for w in found)

def machine(device):
    where = torch.cuda.get_device_name() if device != 'cpu' else f'CPU, {torch.get_num_threads()} threads'
    return f'{where}, torch {torch.__version__}'
