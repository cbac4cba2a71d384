"Stored answers, compared with NumPy."
import numpy as np, pytest, torch
from fastdistill.recording import record_teacher
from fastdistill.recording.answers import AnswerFormat
from torch import nn
from conftest import data, loaders, mlp
from recording_helpers import arrays, refuses

def plain_topk(logits, k):
    "Probabilities by NumPy, of one item"
    p = np.exp(logits.astype('float64') - logits.max())
    p /= p.sum()
    top = np.argsort(-p)[:k]
    rest = np.full_like(p, (1 - p[top].sum())/(len(p) - k))
    rest[top] = p[top]
    return rest

@pytest.mark.parametrize('shape,axis', [((6,50),1),((6,50),-1),((4,20,3,5),1),((4,7,20),-1),((4,7,20),2)])
def test_topk_by_numpy(shape, axis):
    logits = 4*torch.randn(*shape)
    stored = AnswerFormat(shape[1:], torch.float32, 5, axis)
    got = stored.decode(stored.encode(logits))
    want = np.apply_along_axis(plain_topk, axis, logits.numpy(), 5)
    assert got.shape == logits.shape and np.allclose(got.softmax(axis), want, atol=1e-6)
    assert torch.equal(got.topk(5, dim=axis).values, logits.topk(5, dim=axis).values)

# Precision

class Affine(nn.Module):
    def __init__(self, scale, shift): super().__init__(); self.net,self.scale,self.shift = mlp(),scale,shift
    def forward(self, x): return self.net(x)*self.scale + self.shift

@pytest.mark.parametrize('scale,shift,dtype', [
    (1,0,'float16'), (30,0,'float16'), (1,2000,'float32'), (1e-8,0,'float32'), (1e7,0,'float32')])
@pytest.mark.parametrize('topk', [None,2])
def test_precision_that_answers_need(tmp_path, scale, shift, dtype, topk):
    "Compared with what the teacher says to a plain loop, in shares of what NumPy finds as standard deviation"
    dls,teacher = data(),Affine(scale, shift)
    rec = record_teacher(teacher, dls, tmp_path/'r', topk=topk)
    want = teacher(torch.stack([o[0] for o in dls.train.dataset])).detach().numpy()
    assert rec.header['answers'][0]['dtype'] == dtype
    if topk is None: assert np.abs(arrays(rec)['logits'] - want).max() <= 0.01*want.std()
    else: assert np.abs(arrays(rec)['values'] - -np.sort(-want, 1)[:,:2]).max() <= 0.01*want.std()
    if dtype == 'float32':
        half = dict(topk=topk, dtype=torch.float16)
        refuses(lambda: record_teacher(teacher, dls, tmp_path/'half', **half), 'would change', 'dtype=torch.float32')

def test_precision_within_an_item_counts(tmp_path):
    "Items lie far apart, the classes of each do not"
    items = [(torch.full((2,), 500.*i), i%3) for i in range(16)]
    layer = nn.Linear(2, 3)
    nn.init.ones_(layer.weight), nn.init.normal_(layer.bias)
    assert record_teacher(layer, loaders(items, items, 4), tmp_path/'r').header['answers'][0]['dtype'] == 'float32'

def test_a_later_batch_that_float16_does_not_hold(tmp_path):
    items = [(torch.randn(2) + (3000 if i >= 16 else 0), i%3) for i in range(24)]
    dls = loaders(items, items, 8)
    refuses(lambda: record_teacher(nn.Linear(2,3), dls, tmp_path/'r'), 'would change', 'dtype=torch.float32')

def test_almost_equal_answers_do_not_stop_it(tmp_path):
    "A last batch of one item, whose two classes are equally likely"
    items = [(torch.randn(2), i%2) for i in range(16)] + [(torch.zeros(2), 0)]
    layer = nn.Linear(2, 2)
    with torch.no_grad(): layer.bias.copy_(torch.tensor([5., 5.0001]))
    assert record_teacher(layer, loaders(items, items, 8), tmp_path/'r').header['rows'] == 17
