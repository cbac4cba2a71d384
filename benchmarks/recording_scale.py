"Whether a recording of a million items costs more per batch than one of a thousand. Run by `recording.py --scale`."
import multiprocessing, re, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastdistill.recording import TeacherRecording
from fastdistill.recording.answers import AnswerFormat
from fastdistill.recording.files import Files, recording_nbytes
from fastdistill.recording.fingerprints import checksums
from fastdistill.recording.kept import Kept
from timing import machine

sizes,classes,topk,batch = (1_000,10_000,100_000,1_000_000),1000,10,64
imagenet,epochs = 1_281_167,300

def header(n):
    "Of a recording of `n` items, without teacher and images"
    stored = {**Kept().header, **AnswerFormat((classes,), topk=topk).header}
    return dict(teacher='made up', weights='', n_epoch=1, first_epoch=0, rows=n, any_order=True, seed=0, inputs='',
                setup={}, environment={}, whole=False, answers=[stored])

def memory():
    "MB that this process has for itself, and MB of files that are mapped into it (Linux)"
    status = Path('/proc/self/status').read_text()
    return [int(re.search(rf'{k}:\s+(\d+)', status)[1])/1024 for k in ('RssAnon','RssFile')]

class Scene:
    "A recording of `n` items with made-up answers, which is written and read in batches"
    def __init__(self, n, folder):
        torch.set_num_threads(1)
        self.n,self.rng,self.next = n,np.random.default_rng(0),0
        self.logits,self.inputs = [torch.randn(batch, classes) for _ in range(20)],checksums(torch.randn(batch, 8))
        self.files = Files.create(Path(folder)/str(n), header(n))
        self.write(range(-(-n//batch)))
        self.files.finish()
        self.written = self.files     # still open for writing, under its new name
        start = time.perf_counter()
        rec = TeacherRecording(Path(folder)/str(n))
        self.open_s,self.files = time.perf_counter()-start,rec.folders[0]

    def rows(self, i): return np.arange(i*batch, min((i+1)*batch, self.n))

    def write(self, numbers):
        files = getattr(self, 'written', self.files)
        for i in numbers:
            rows = self.rows(i)
            answers = files.formats[0].encode(self.logits[i%20][:len(rows)])
            files.write(rows, self.inputs[:len(rows)], [answers])

    def read(self, batches):
        for rows in batches:
            self.files.input_checksums(rows)
            arrays,whole = self.files.read(rows)
            assert whole.all()
            self.files.formats[0].decode(arrays)

    def numbers(self, n):
        "The next `n` whole batches in order"
        last = self.n//batch
        self.next += n
        return [i%last for i in range(self.next-n, self.next)]

    def round(self, n):
        "Microseconds of a batch for each way, on the CPU and on the clock; what is drawn at random is drawn before"
        anywhere = self.rng.integers(0, self.n//batch, n).tolist()
        shuffled = [self.rng.integers(0, self.n, batch) for _ in range(n)]
        in_order = self.numbers(n)
        ways = dict(write=(self.write,in_order), write_anywhere=(self.write,anywhere),
                    read=(self.read,[self.rows(i) for i in in_order]), read_shuffled=(self.read,shuffled))
        res = {}
        for k,(f,x) in ways.items():
            cpu,clock = time.process_time(),time.perf_counter()
            f(x)
            res.update({k:1e6*(time.process_time()-cpu)/n, f'{k}_clock':1e6*(time.perf_counter()-clock)/n})
        return res

    def read_all(self): self.read(map(self.rows, range(-(-self.n//batch))))

def serve(connection, n, folder):
    "A process of its own, which does a round when it is told to"
    before = memory()
    scene = Scene(n, folder)
    connection.send(scene.open_s)
    while (n_batches := connection.recv()): connection.send(scene.round(n_batches))
    scene.read_all()
    connection.send([now-then for now,then in zip(memory(), before)] + memory())
    connection.recv()

def measure(rounds, n_batches=15):
    "All sizes in turns, so that what else the machine does meets all of them"
    context,res = multiprocessing.get_context('spawn'),[]
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for n in sizes:
            here,there = context.Pipe()
            context.Process(target=serve, args=(there,n,folder), daemon=True).start()
            ends.append((here,here.recv()))
        times = [[] for _ in sizes]
        for r in range(rounds+1):     # the first one warms up
            for k in np.roll(range(len(sizes)), r):
                ends[k][0].send(n_batches)
                times[k].append(ends[k][0].recv())
        for n,t,(end,open_s) in zip(sizes, times, ends):
            end.send(0)
            _,_,anon,mapped = end.recv()
            end.send(0)
            size = sum((Path(folder)/str(n)/f'{name}.npy').stat().st_size for name in ('inputs','predictions'))
            res.append(dict(items=n, bytes_per_item=size/n, open_ms=1e3*open_s, memory_mb=anon, mapped_mb=mapped, **summary(t[1:])))
    return pd.DataFrame(res)

def summary(rounds):
    "Median and quartiles of each way"
    quartiles = pd.DataFrame(rounds).quantile([0.5,0.25,0.75])
    return {f'{way}{end}':quartiles[way].iloc[i] for way in quartiles for i,end in enumerate(('','_q1','_q3'))}

def show(table):
    "Median [quartiles] of the CPU's time, and how far sizes are apart"
    ways = [c[:-3] for c in table if c.endswith('_q1') and 'clock' not in c]
    spread = {w:[f'{m:.0f} [{a:.0f}, {b:.0f}]' for m,a,b in table[[w,f'{w}_q1',f'{w}_q3']].values] for w in ways}
    numbers = ['items','bytes_per_item','open_ms','memory_mb','mapped_mb']
    print(table[numbers].round(1).assign(**spread).to_string(index=False))
    for c in ['memory_mb','mapped_mb',*ways]:
        print(f'{c}: a million items to a thousand {table[c].iloc[-1]/table[c].iloc[0]:.3f}, '
              f'largest to smallest {table[c].max()/table[c].min():.3f}')

def main(rounds):
    torch.set_num_threads(1)     # as in the processes that are measured
    table,one = measure(rounds),recording_nbytes(header(1))
    print(f'{classes} classes, topk={topk}, batches of {batch}, {machine("cpu")}; medians of {rounds} rounds, in '
          'microseconds of the CPU a batch: with checksums, and making arrays of logits or logits of arrays')
    show(table)
    print(f'A row takes {one} bytes: 4 + 4K = {4+4*topk} for the answer, as in TinyViT, and 8 for two checksums. '
          f'ImageNet-1k, {imagenet:,} images, {epochs} epochs: {imagenet*epochs*one/1e9:.2f} GB')
    table.round(3).assign(machine=machine('cpu'), rounds=rounds).to_csv(
        Path(__file__).with_suffix('.csv'), index=False)
