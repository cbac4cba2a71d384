"Checksums and digests, computed another way."
import hashlib
import numpy as np, pytest, torch
from fastdistill.recording.fingerprints import checksums, digest_model
from hypothesis import given, strategies as st
from torch import nn

def plain_checksum(*arrays):
    "By whole numbers of Python, an item's arrays"
    total = 1
    for a in arrays:
        b = a.tobytes()
        b += bytes(-len(b)%8)
        words = [int.from_bytes(b[i:i+8], 'little', signed=True) for i in range(0, len(b), 8)]
        r = np.random.RandomState(len(words)).bytes(8*len(words))
        factors = [int.from_bytes(r[i:i+8], 'little', signed=True) | 1 for i in range(0, len(r), 8)]
        total = total*1_000_003 + sum((w ^ w%2**64>>32)*f for w,f in zip(words, factors))
    high,low = divmod(total%2**64, 2**32)
    return ((high ^ low or 1) + 2**31)%2**32 - 2**31

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.uint8,torch.int64,torch.bool,torch.float64])
@pytest.mark.parametrize('shape', [(3,5,5),(1,),(),(2,4),(7,200,200)])
def test_checksums_by_hand(dtype, shape):
    x = (100*torch.randn(3, *shape)).to(dtype)
    assert checksums(x).tolist() == [plain_checksum(o.numpy()) for o in x]
    y = torch.arange(3)
    want = [plain_checksum(a.numpy(), b.numpy(), a.numpy()) for a,b in zip(x,y)]
    assert checksums(x, dict(y=y, z=[x,'text'])).tolist() == want

@pytest.mark.parametrize('dtype', [torch.float32,torch.int64,torch.uint8])
def test_inputs_without_numbers(dtype):
    "As those of a table without continuous columns"
    x,none = torch.randn(3, 4),torch.empty(3, 0, dtype=dtype)
    assert checksums(none, x).tolist() == [plain_checksum(none[0].numpy(), o.numpy()) for o in x]

@given(st.data())
def test_checksums_see_each_bit_and_each_exchange(data):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3,4,11), dtype=np.uint8))
    before,bits = checksums(x),data.draw(st.sets(st.integers(0, 351), min_size=1, max_size=4))
    changed = x.clone().flatten(1)
    for bit in bits: changed[1,bit//8] ^= 1 << bit%8
    assert (before == checksums(changed.view_as(x))).tolist() == [True,False,True]
    i,j = data.draw(st.lists(st.integers(0, 43), min_size=2, max_size=2, unique=True))
    changed = x.clone().flatten(1)
    changed[2,[i,j]] = changed[2,[j,i]]
    assert (checksums(changed.view_as(x))[2] == before[2]).item() == (changed[2] == x.flatten(1)[2]).all().item()

def test_checksums_of_strange_inputs():
    x = torch.randn(4, 3, 3)
    assert torch.equal(checksums(x.transpose(1, 2).contiguous().transpose(1, 2)), checksums(x))     # values, not layout
    assert torch.equal(checksums(x[:1].expand(4,3,3)), checksums(x[:1]).expand(4))
    assert (checksums(x, torch.tensor(1.)) != checksums(x, torch.tensor(2.))).all()     # one for the whole batch
    bytes_ = torch.arange(40, dtype=torch.uint8)
    assert torch.equal(checksums(bytes_[3:35].view(4,8)), checksums(bytes_[3:35].clone().view(4,8)))     # not aligned
    with pytest.raises(TypeError, match='tensors in them, but got str'): checksums('text')

def test_digest_of_plain_weights_by_hand():
    model = nn.Linear(2, 3)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(0.5)
    want = hashlib.sha256()
    for k,shape in ('weight',(3,2)),('bias',(3,)):
        want.update(f'{k} {shape} torch.float32'.encode() + np.full(shape, 0.5, 'float32').tobytes())
    assert digest_model(model) == want.hexdigest()
