"""What a teacher gives while fasterai prunes a ResNet18, or trains it for int8: accuracy on cats and dogs, and sizes.

    python benchmarks/pruning.py FOLDER [seeds]     # half an hour on one core
    python benchmarks/pruning.py sizes              # a minute: parameters, megabytes, milliseconds of one core for an image

The first writes benchmarks/pruning.csv, a row for each run, and goes on where it was stopped. One ResNet18 is trained on 3,200 photographs of 32 pixels,
with random flips and shifts, and kept in `--teacher FILE`. All fits start from it, with the same flips and shifts. Seeds differ in the order of the images
and in the flips. The teacher is a copy of the network before the fit. The second writes benchmarks/pruning_sizes.csv. Sizes do not depend on the weights.
"""
import argparse, io, tempfile, time
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastdistill.all import *
from fastdistill.measure import model_size
from fasterai.core.criteria import large_final
from fasterai.core.schedule import agp, one_shot
from fasterai.prune.prune_callback import PruneCallback
from fasterai.prune.pruner import Pruner
from fasterai.quantize.quantize_callback import QuantizeCallback
from fasterai.quantize.quantizer import Quantizer
from teachers import Augment, cats_and_dogs, normalised, train
from torch.utils.data import TensorDataset
from torchvision.models import resnet18

ratio = 0.29     # of the channels of each layer, which is half of the parameters
example = torch.randn(2, 3, 32, 32)

def prune(): return PruneCallback(ratio, agp, 'local', large_final, example_inputs=example)
def soft(teacher): return KnowledgeDistillationCallback(teacher, SoftTarget(T=4), weight=.9)

# name -> fasterai's callback, ours, epochs, maximum learning rate
methods = {'pruned, alone': (prune, None, 2, 1e-3),
           'pruned, SoftTarget': (prune, soft, 2, 1e-3),
           'int8, alone': (QuantizeCallback, None, 1, 3e-4),
           'int8, SoftTarget': (QuantizeCallback, soft, 1, 3e-4)}

def new_learner(data, model):
    (xt,yt),(xv,yv) = data
    dls = DataLoaders(DataLoader(TensorDataset(xt, yt), bs=100, shuffle=True), DataLoader(TensorDataset(xv, yv), bs=400))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())

def accuracy_of(model, data):
    x,y = data[1]
    with torch.no_grad(): return (model.eval()(x).argmax(1) == y).float().mean().item()

def trained_teacher(data, file):
    if Path(file).exists(): return torch.load(file, weights_only=False)
    set_seed(0, reproducible=True)
    model = train(new_learner(data, resnet18(num_classes=2)), 12, 3e-3, [Augment()]).model
    torch.save(model, file)
    return model

def without_training(teacher, data):
    "Name -> a network that is made small, and not trained afterwards"
    pruned = deepcopy(teacher)
    Pruner(pruned, ratio, 'local', large_final, one_shot, example_inputs=example).prune_model()
    loader = DataLoader(TensorDataset(*(o[:100] for o in data[0])), bs=50)
    return {'teacher': teacher, 'pruned, not trained': pruned,
            'int8, not trained': Quantizer('x86', 'static').quantize(deepcopy(teacher), loader)}

def fit(teacher, data, seed, smaller, kd, epochs, lr):
    learn = new_learner(data, deepcopy(teacher))
    set_seed(seed, reproducible=True)
    cbs = [smaller(), Augment()] + ([] if kd is None else [kd(deepcopy(teacher))])
    return train(learn, epochs, lr, cbs).model

def measure(args):
    file = Path(__file__).with_name('pruning.csv')
    rows = pd.read_csv(file).to_dict('records') if file.exists() else []
    x,y = cats_and_dogs(args.images)
    n = len(x)*4//5
    data = (normalised(x[:n]),y[:n]),(normalised(x[n:]),y[n:])
    teacher = trained_teacher(data, args.teacher)
    def add(seed, name, model):
        rows.append(dict(seed=seed, method=name, accuracy=accuracy_of(model, data)))
        pd.DataFrame(rows).to_csv(file, index=False, float_format='%.4f')
        print(seed, name, f'{rows[-1]["accuracy"]:.4f}', flush=True)
    if not rows:
        with redirect_stdout(io.StringIO()): found = without_training(teacher, data)
        for name,model in found.items(): add(0, name, model)
    for name,how in methods.items():
        for seed in range(args.seeds):
            if any((r['seed'],r['method']) == (seed,name) for r in rows): continue
            with redirect_stdout(io.StringIO()): model = fit(teacher, data, seed, *how)
            add(seed, name, model)
    print(pd.DataFrame(rows).groupby('method', sort=False).accuracy.agg(['mean','std','count']).to_string(float_format='{:.4f}'.format))

def core_ms(model, x, n=200):
    "Milliseconds of one core for each of `n` forward passes; what other processes take of it does not count"
    times = []
    with torch.no_grad():
        for _ in range(n+5):
            start = time.process_time()
            model(x)
            times.append(1e3*(time.process_time()-start))
    return times[5:]

def sizes():
    torch.set_num_threads(1)
    noise = (torch.randn(100, 3, 32, 32),torch.zeros(100).long())
    with redirect_stdout(io.StringIO()): models = without_training(resnet18(num_classes=2).eval(), (noise,noise))
    rows = []
    for name,model in zip(('ResNet18','pruned','int8'), models.values()):
        times = core_ms(model.eval(), example[:1])
        rows.append({'model':name, **model_size(model), 'ms':np.median(times), 'ms ±':np.subtract(*np.percentile(times, [75,25]))/2})
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_name('pruning_sizes.csv'), index=False, float_format='%.3f')
    print(table.to_string(index=False, float_format='{:.3f}'.format))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('images', help='folder of cats and dogs; or `sizes`')
    p.add_argument('seeds', type=int, nargs='?', default=3)
    p.add_argument('--teacher', default=Path(tempfile.gettempdir())/'resnet18_cats_and_dogs.pth', help='where the trained network is kept')
    args = p.parse_args()
    if args.images == 'sizes': sizes()
    else: measure(args)

if __name__ == '__main__': main()
