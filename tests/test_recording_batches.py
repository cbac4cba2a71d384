"Loading leaves random states and the order of texts as an ordinary epoch does."
import random
import numpy as np, pytest, torch
from fastai.basics import set_seed, TfmdDL
from fastdistill.recording import record_teacher
from fastdistill.recording.batches import Seeded
from recording_helpers import language_model, text_learner, texts

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
