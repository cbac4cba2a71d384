"The same batches in any process and worker; random states and the order of texts as an ordinary epoch leaves them."
import pickle, random
from copy import copy
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import set_seed, TfmdDL
from fastai.callback.data import WeightedDL
from fastai.tabular.all import RegressionBlock, TabularPandas, TabWeightedDL
from fastai.text.data import pad_input, SortedDL
from fastdistill.recording import record_teacher
from fastdistill.recording.batches import Numbered, Seeded
from fastdistill.recording.same import environment_of
from recording_helpers import images, language_model, refuses, text_learner, texts

@pytest.mark.parametrize('workers', [0,2])
def test_random_states_are_those_of_an_ordinary_epoch(tmp_path, workers):
    items = list(zip(torch.randn(20,2), torch.arange(20)))
    dl,ends = TfmdDL(items, bs=4, shuffle=True, num_workers=workers),[]
    for batches in dl,Seeded(dl, 0, 0):
        set_seed(3)
        dl.rng = random.Random(3)
        for b in batches: pass
        ends.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert ends[0] == ends[1]

def test_texts_keep_their_order(tmp_path):
    "Recording changes nothing; replaying shuffles as an ordinary epoch does"
    dls,orders = texts(),[]
    teacher = text_learner(dls, language_model(10))
    random.seed(3)
    dls.train.get_idxs()
    def order(): return list(dls.train.items.idxs),dls.train.create_item(0)[0].tolist()
    before = order()
    assert before[0] != sorted(before[0])
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2)
    assert order() == before
    for batches in dls.train,Seeded(dls.train, 0, 0):
        dls.train.items.idxs[:] = before[0]
        dls.train.make_chunks()
        random.seed(4)
        for b in batches: pass
        orders.append(order())
    assert orders[0] == orders[1] != before

# Workers and processes

def with_noise(o): return o + torch.rand(1) + random.random() + np.random.rand() if o.ndim else o

def same_batches(found, want):
    "Bit for bit, inputs and labels"
    assert len(found) == len(want)
    for a,b in zip(found, want): assert all(map(torch.equal, a, b))

def tables(workers):
    "Its rows are drawn by NumPy, and read in batches"
    df = pd.DataFrame(dict(a=np.arange(22.), y=[0.,1.]*11))
    to = TabularPandas(df, cont_names='a', y_names='y', y_block=RegressionBlock(), splits=(list(range(20)),[20,21]))
    return TabWeightedDL(to.train, bs=4, wgts=np.arange(20.), shuffle=True, num_workers=workers)

def plain(cls=TfmdDL, **kwargs):
    return lambda workers: cls(list(zip(torch.randn(22,2), torch.arange(22))), bs=4, shuffle=True, num_workers=workers,
                               after_item=with_noise, **kwargs)

def padded(workers):
    items = [(torch.arange(1 + i%7), i%3) for i in range(22)]
    return SortedDL(items, bs=4, shuffle=True, before_batch=pad_input, num_workers=workers)

class OwnSample(TfmdDL):
    "Each item twice"
    def sample(self): return (o for i in super().sample() for o in (i,i))

kinds = {'pictures':lambda workers: images(workers).train, 'noise':plain(), 'no last batch':plain(drop_last=True),
         'weights':plain(WeightedDL, wgts=np.arange(22.)), 'padded':padded, 'texts':lambda workers: texts(workers=workers).train,
         'table':tables}

@pytest.mark.parametrize('name', kinds)
def test_workers_and_processes_change_nothing(name):
    def epoch(workers=0, **kwargs):
        set_seed(3)
        return list(Seeded(kinds[name](workers), 1, 2, **kwargs))
    want = epoch()
    same_batches(epoch(2), want)
    if name == 'texts': return
    n = len(want)
    for world in 2,4:
        for rank in {0,world-1}:
            own = [i%n for i in range(rank, -(-n//world)*world, world)]
            same_batches(epoch(2*rank, rank=rank, world=world), [want[i] for i in own])

def test_seeds_of_a_loader_that_samples_in_its_own_way():
    dl = OwnSample(list(zip(torch.randn(8,2), torch.arange(8))), bs=4, shuffle=True, num_workers=0, after_item=with_noise)
    epochs = [[b for b in Seeded(dl, 0, 0) if torch.rand(1) < 2] for _ in range(2)]
    same_batches(*epochs)
    assert len(epochs[0]) == 4 and environment_of(dl)['workers'] == 0
    refuses(lambda: Seeded(dl, 0, 0, rank=0, world=2), 'OwnSample has a way of its own')

def test_a_loader_is_left_alone():
    "While an epoch is drawn, and after one that ends in the middle; a copy that is made then draws as usual"
    dl = images().train
    before = {k:v for k,v in vars(dl).items() if k != 'rng'}
    batches = iter(Seeded(dl, 0, 0))
    first = next(batches)
    for _ in range(2):
        assert {k:v for k,v in vars(dl).items() if k != 'rng'} == before
        assert not torch.equal(dl.new().one_batch()[0], first[0])
        batches.close()

class Pickled(TfmdDL):
    def __iter__(self): yield from super(Pickled, pickle.loads(pickle.dumps(self))).__iter__()

def test_a_worker_that_is_spawned():
    "On Windows the loader of an epoch is pickled"
    dl = plain()(0)
    for other in Seeded(dl, 0, 0, rank=1, world=2),Seeded(dl, 0, 0):
        pickled = copy(other)
        pickled.dl = dl.new(cls=Pickled)
        same_batches(list(pickled), list(other))

def test_items_in_any_order_shared_by_processes():
    "The order is that of one process; a loader of texts by their length gives its order as an iterator"
    for make in plain(),padded:
        dl = make(0)
        def start():
            set_seed(1)
            dl.rng = random.Random(1)
        start()
        orders = [np.concatenate([b.rows(b.i) for _ in b]) for b in [Numbered(dl)]]
        for rank in range(2):
            start()
            share = Numbered(dl, rank, 2)
            seen = [(share.rows(share.i), b) for b in share]
            assert len(seen) == len(share) == 3
            for (rows,b),i in zip(seen, [rank,2+rank,4+rank]):
                assert np.array_equal(rows, orders[0][4*i:4*i+4])
                assert b[1].tolist() == [int(dl.dataset[j][1]) for j in rows]
