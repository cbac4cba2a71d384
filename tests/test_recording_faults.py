"Full disks, killed processes, folders that move, and recordings of other versions: nothing whole is lost."
import errno, hashlib, json, os, signal
import numpy as np, pytest, torch
from fastai.basics import Callback
from fastdistill.recording import record_teacher, TeacherRecording
from fastdistill.recording.answers import AnswerFormat
from fastdistill.recording.files import Files, part_of, recording_nbytes
from hypothesis import given, settings, strategies as st
from conftest import data, net, same_state, state
from recording_helpers import arrays, cnn, Counting, fit, images, python, refuses

def same_arrays(a, b): return all(np.array_equal(v, arrays(b)[k]) for k,v in arrays(a).items())

def on_disk(folder):
    "Names, times and contents of all that lies in a folder"
    return {p.relative_to(folder):(p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in [folder,*folder.rglob('*')]}

# Rows

layouts = st.tuples(st.lists(st.integers(2, 5), min_size=1, max_size=3), st.sampled_from([torch.float16,torch.float32]),
                    st.sampled_from([None,1]))

@settings(max_examples=30, deadline=None)
@given(layouts)
def test_zeros_do_not_count_as_written(tmp_path_factory, layout):
    "Whatever the answers look like, zeros among them"
    shape,dtype,topk = layout
    header = dict(n_epoch=1, rows=3, whole=False, **AnswerFormat(shape, dtype, topk).header)
    files = Files.create(tmp_path_factory.mktemp('zeros')/'r', header)
    assert not files.read(range(3))[1].any()
    answers = files.format.encode(torch.zeros(2, *shape))
    files.write(range(2), torch.ones(2).int(), answers)
    assert files.read(range(3))[1].tolist() == [True,True,False]
    rows = np.load(files.path/'rows.npy', mmap_mode='r+')
    assert (rows['checksums'][:2] != 0).all()
    rows['checksums'][1] = 0     # answers without their checksums
    assert files.read(range(3))[1].tolist() == [True,False,False]

def test_bytes_of_an_item():
    "TinyViT needs 4 + 4K"
    for k in 1,10,100:
        header = dict(n_epoch=1, rows=1, **AnswerFormat((1000,), topk=k).header)
        assert recording_nbytes(header) == 4 + 4*k + 8

# Space

class Disk:
    "Has space for so many bytes more"
    def __init__(self, free): self.free,self.pwrite = free,os.pwrite
    def __call__(self, fd, content, position):
        if not self.free: raise OSError(errno.ENOSPC, 'No space left on device')
        n = self.pwrite(fd, content[:self.free], position)
        self.free -= n
        return n

def test_disk_that_is_full_in_the_middle(tmp_path, monkeypatch):
    "Rows of 14 bytes, in batches of four: space for two batches and a part of the third"
    dls,teacher = images(),cnn()
    whole = record_teacher(teacher, dls, tmp_path/'whole', n_epoch=2)
    monkeypatch.setattr(os, 'pwrite', Disk(2*4*14 + 20))
    counting = Counting(teacher)
    with pytest.raises(OSError) as e: record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
    assert e.value.errno == errno.ENOSPC
    for text in f'Writing to {tmp_path}/r.part', 'No space left', 'kept', 'call `record_teacher`': assert text in str(e.value)
    monkeypatch.undo()
    assert counting.n == 2 + 3
    rec = record_teacher(counting, dls, tmp_path/'r', n_epoch=2)
    assert counting.n == 5 + 2 + 8 and same_arrays(rec, whole)

def test_disk_that_is_full_at_the_end(tmp_path, monkeypatch):
    "All answers are there, and the header cannot be written"
    dls,teacher = data(),Counting(net())
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    def lookups(): return [o.name for o in tmp_path.iterdir()]
    with monkeypatch.context() as m:
        def fill(model, x, out):
            if model.n == 5: m.setattr(os, 'fsync', full)
        teacher.register_forward_hook(fill)
        refuses(lambda: record_teacher(teacher, dls, tmp_path/'r'), 'No space left', 'to go on', error=OSError)
    assert lookups() == ['r.part'] and teacher.n == 5
    record_teacher(teacher, dls, tmp_path/'r')
    assert lookups() == ['r'] and teacher.n == 7

limited = '''
import resource, sys
from fastai.basics import set_seed
from fastdistill.recording import record_teacher
from conftest import data, net
from recording_helpers import During
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
set_seed(0)
model,dls = net(),data(240)
try: record_teacher(During(model, 6, lambda: limit(1000)), dls, sys.argv[1])
except OSError as e: print(e)
limit(resource.RLIM_INFINITY)
for path in sys.argv[1:]: record_teacher(During(model, 0, None), dls, path)
'''

def test_system_that_refuses_to_write(tmp_path):
    done = python(limited, tmp_path/'r', tmp_path/'whole')
    assert 'has failed: File too large. What was recorded before is kept' in done.stdout, done.stderr
    assert same_arrays(*[TeacherRecording(tmp_path/o) for o in ('r','whole')])

# Killed

killed = '''
import os, signal, sys
from fastai.basics import Callback, set_seed
from fastdistill.recording import record_teacher, TeacherRecording
from recording_helpers import cnn, fit, images
class Dies(Callback):
    def after_loss(self):
        if self.training and self.iter == 2: os.kill(os.getpid(), signal.SIGKILL)
def half(fd, content, position, pwrite=os.pwrite):
    global left
    left -= 1
    if left: return pwrite(fd, content, position)
    pwrite(fd, content[:len(content)//2], position)
    os.kill(os.getpid(), signal.SIGKILL)
what,path,left = sys.argv[1],sys.argv[2],4
set_seed(0)
teacher,dls = cnn(),images()
if what == 'replay': fit(TeacherRecording(path), dls, cbs=[Dies()])
if what == 'half': os.pwrite = half
record_teacher(teacher, dls, path, n_epoch=2)
'''

def test_killed_in_the_middle_of_writing_and_of_replaying(tmp_path):
    def run(what, name): return python(killed, what, tmp_path/name).returncode
    assert run('half', 'r') == -signal.SIGKILL
    half_written = Files(tmp_path/'r.part').read(range(40))[1].tolist()
    assert half_written == [True]*14 + [False]*26     # three batches of four rows, and half of the fourth
    assert run('whole', 'r') == run('whole', 'whole') == 0
    a,b = (TeacherRecording(tmp_path/o) for o in ('r','whole'))
    assert same_arrays(a, b)
    before = on_disk(tmp_path)
    assert run('replay', 'r') == -signal.SIGKILL and on_disk(tmp_path) == before
    fit(a, images(), 2)

# Folders

def test_replaying_writes_nothing(tmp_path):
    "As root may write anywhere, we look for ourselves; the folder is also made read-only"
    dls,teacher = images(),cnn()
    rec = record_teacher(teacher, dls, tmp_path/'r')
    for p in (tmp_path/'r').iterdir(): p.chmod(0o444)
    (tmp_path/'r').chmod(0o555)
    before = on_disk(tmp_path)
    fit(TeacherRecording(rec.path), dls, 2)
    record_teacher(teacher, dls, tmp_path/'r')     # finds that it is there
    assert on_disk(tmp_path) == before
    (tmp_path/'r').chmod(0o755)

def test_folder_that_moves(tmp_path):
    "Before a fit, and in the middle of one"
    dls,ends = images(),[]
    rec = record_teacher(cnn(), dls, tmp_path/'r')
    class Move(Callback):
        def before_batch(self):
            if self.training and self.iter == 2: (tmp_path/'s').rename(tmp_path/'t')
    for path,cbs in ('r',[]),('s',[Move()]),('t',[]):
        torch.manual_seed(1)
        if path == 's': (tmp_path/'r').rename(tmp_path/'s')
        ends.append(state(fit(TeacherRecording(tmp_path/path), dls, 1, cnn(), cbs=cbs).model))
    assert all(torch.equal(v, e[k]) for e in ends[1:] for k,v in ends[0].items())
    refuses(lambda: TeacherRecording(rec.path), 'is no recording')

@pytest.mark.parametrize('name', ['with  spaces ','.hidden','a%20b#?*[0]{x}','Größe 中','-n','dots.npy.part',"quote'\"\\"])
def test_odd_names(tmp_path, name):
    dls,teacher = data(),net()
    (tmp_path/name).mkdir()
    path = tmp_path/name/name
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(teacher, 3), dls, path)
    assert part_of(path).exists()
    rec = record_teacher(Counting(teacher), dls, str(path))
    assert [o.name for o in (tmp_path/name).iterdir()] == [name] and name in repr(rec)
    fit(TeacherRecording(str(path)), dls, 1, net())

def test_file_that_is_cut_during_a_fit(tmp_path):
    "An error, and not the end of the process"
    dls = images()
    rec = record_teacher(cnn(), dls, tmp_path/'r')
    class Cut(Callback):
        def before_batch(self):
            if self.training and self.iter == 2: os.truncate(tmp_path/'r'/'rows.npy', 200)
    refuses(lambda: fit(rec, dls, cbs=[Cut()]), 'r is damaged: rows.npy is shorter than it was')

# Versions

def old_recording(path, **extra):
    "As earlier versions wrote it, with a file for each array and checksums of 64 bits"
    header = dict(teacher='Sequential', weights='0'*64, n_epoch=1, rows=24, any_order=True, seed=0, shape=[3], dtype='float16',
                  topk=None, axis=1, setup={}, environment={}, whole=True, **extra)
    path.mkdir()
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (path/'header.json').write_text(json.dumps({**header, 'digest':digest}, indent=1))
    np.save(path/'logits.npy', np.zeros((24,3), 'float16'))
    np.save(path/'checksums.npy', np.zeros((24,2), 'int64'))

@pytest.mark.parametrize('extra,texts', [
    ({}, ('an older version of fastdistill','its format is 1','Delete it and record the teacher again')),
    (dict(format=99), ('a newer version of fastdistill','its format is 99','Update fastdistill'))])
def test_recordings_of_other_versions(tmp_path, extra, texts):
    for name in 'r','s.part': old_recording(tmp_path/name, **extra)
    before = on_disk(tmp_path)
    refuses(lambda: TeacherRecording(tmp_path/'r'), f'{tmp_path}/r was recorded by', *texts)
    for name in 'r','s': refuses(lambda: record_teacher(net(), data(), tmp_path/name), *texts)
    assert {k:v[1] for k,v in on_disk(tmp_path).items()} == {k:v[1] for k,v in before.items()}
