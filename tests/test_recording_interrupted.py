"Interrupted recordings, killed processes, and two processes at one path."
import fcntl, signal
import numpy as np, pytest, torch
from fastdistill.recording import record_teacher, TeacherRecording
from conftest import data, net
from recording_helpers import arrays, cnn, Counting, During, images, is_another, python, refuses
import recording_helpers

@pytest.mark.parametrize('make,n_asked', [(images,10),(data,3)])     # and two looks at the first batch each time
@pytest.mark.parametrize('stop', [0,1,2,3,4,8,11])
def test_goes_on_where_it_stopped(tmp_path, make, n_asked, stop):
    dls,teacher = make(),cnn() if make is images else net(8)
    whole = record_teacher(teacher, dls, tmp_path/'whole', n_epoch=2)
    counting = Counting(teacher, stop)
    if interrupted := stop < n_asked+2:
        with pytest.raises(KeyboardInterrupt): record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
        refuses(lambda: TeacherRecording(tmp_path/'r'), 'is not whole' if stop > 1 else 'is no recording')
        if stop > 1: refuses(lambda: TeacherRecording(tmp_path/'r.part'), 'is not whole')
    counting.stop = None
    rec = record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
    assert counting.n == n_asked + 2 + min(stop, 2)*interrupted and not (tmp_path/'r.part').exists()
    for k,a in arrays(whole).items(): assert np.array_equal(a, arrays(rec)[k])
    asked = counting.n
    opened = record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
    assert arrays(opened).keys() == arrays(rec).keys() and counting.n == asked+2

def test_goes_on_with_the_same_alone(tmp_path, monkeypatch):
    dls,teacher = images(),cnn()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 4), dls, tmp_path/'r', n_epoch=2)
    def again(teacher, dls=dls, **kwargs):
        return record_teacher(Counting(teacher), dls, tmp_path/'r', **{'n_epoch':2, **kwargs})
    is_another(lambda: again(teacher, seed=1), 'seed: 0 when')
    is_another(lambda: again(teacher, n_epoch=3), 'n_epoch: 2 when')
    is_another(lambda: again(teacher, dtype=torch.float32), 'predictions in float16', 'predictions in float32')
    is_another(lambda: again(cnn()), 'weights: ')
    monkeypatch.setattr(recording_helpers, 'pictures', recording_helpers.pictures[::-1])
    refuses(lambda: again(teacher, images()), 'not the batch that was recorded')
    monkeypatch.undo()
    again(teacher, images())
    is_another(lambda: again(teacher, n_epoch=1))

killed = '''
import os, signal, sys
from fastai.basics import nn, set_seed
from fastdistill.recording import record_teacher
from recording_helpers import cnn, images
class Dies(nn.Module):
    def __init__(self): super().__init__(); self.model,self.n = cnn(),0
    def forward(self, x):
        self.n += 1
        if self.n == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
        return self.model(x)
set_seed(0)
record_teacher(Dies(), images(), sys.argv[1], n_epoch=2)
'''

@pytest.mark.slow
def test_killed(tmp_path):
    def run(name, after): return python(killed, tmp_path/name, after)
    assert run('r', 8).returncode == -signal.SIGKILL and (tmp_path/'r.part').exists()
    refuses(lambda: TeacherRecording(tmp_path/'r'), 'not whole')
    for name,after in ('r',8),('whole',13):
        done = run(name, after)
        assert done.returncode == 0, done.stderr
    a,b = (arrays(TeacherRecording(tmp_path/o)) for o in ('r','whole'))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)

def test_killed_before_it_began(tmp_path):
    (tmp_path/'r.part').mkdir()
    (tmp_path/'r.part'/'logits.npy').write_bytes(b'some')
    record_teacher(net(), data(), tmp_path/'r')
    assert [o.name for o in tmp_path.iterdir()] == ['r']

# Two processes

second_process = '''
import sys
from conftest import data, net
from fastdistill.recording import record_teacher
record_teacher(net(), data(), sys.argv[1])
'''
@pytest.mark.slow
def test_two_recorders_at_one_path(tmp_path):
    dls,teacher = data(),net()
    def second():
        texts = 'Another process is recording','Wait until'
        refuses(lambda: record_teacher(teacher, dls, tmp_path/'r'), *texts, error=FileExistsError)
        done = python(second_process, tmp_path/'r')
        assert 'FileExistsError: Another process is recording' in done.stderr
        asked.append(1)
    asked = []
    rec = record_teacher(During(teacher, 4, second), dls, tmp_path/'r', dtype=torch.float32)
    assert asked and [f.name for f in tmp_path.iterdir()] == ['r']
    assert sorted(f.name for f in (tmp_path/'r').iterdir()) == ['header.json','inputs.npy','predictions.npy']
    x = torch.stack([o[0] for o in dls.train.dataset])
    assert torch.allclose(torch.from_numpy(arrays(rec)['logits']), teacher.eval()(x).detach(), atol=1e-6)

def test_one_finishes_while_another_looks(tmp_path):
    dls,teacher = data(),net()
    def other(): record_teacher(teacher, dls, tmp_path/'r')
    looks = During(teacher, 1, other)
    is_another(lambda: record_teacher(looks, dls, tmp_path/'r'))     # of a `Sequential`
    assert [o.name for o in tmp_path.iterdir()] == ['r']

def test_a_lock_that_was_left_behind(tmp_path):
    dls,teacher = data(),net()
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 3), dls, tmp_path/'r')
    assert not (tmp_path/'r.part'/'lock').exists()
    (tmp_path/'r.part'/'lock').touch()     # as a process that was killed leaves it
    with (tmp_path/'r.part'/'lock').open('a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refuses(lambda: record_teacher(Counting(teacher), dls, tmp_path/'r'), 'Another process', error=FileExistsError)
    record_teacher(Counting(teacher), dls, tmp_path/'r')
    assert [o.name for o in tmp_path.iterdir()] == ['r']
