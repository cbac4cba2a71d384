"Full disks, killed processes, folders that move, and recordings of other versions: nothing whole is lost."
import errno, hashlib, json, os, signal
import numpy as np, pytest, torch
from fastai.basics import Callback
from fastdistill.recording import record_teacher, TeacherRecording
from fastdistill.recording.answers import AnswerFormat
from fastdistill.recording.files import Files, part_of, recording_nbytes
from fastdistill.recording.kept import Kept
from hypothesis import given, settings, strategies as st
from conftest import data, net, state
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
    header = dict(n_epoch=1, rows=3, whole=False, answers=[{**Kept().header, **AnswerFormat(shape, dtype, topk).header}])
    files = Files.create(tmp_path_factory.mktemp('zeros')/'r', header)
    assert not files.read(range(3))[1].any()
    answers = files.formats[0].encode(torch.zeros(2, *shape))
    files.write(range(2), torch.ones(2).int(), [answers])
    assert files.read(range(3))[1].tolist() == [True,True,False]
    rows = np.load(files.path/'predictions.npy', mmap_mode='r+')
    assert (rows['checksum'][:2] != 0).all()
    rows['checksum'][1] = 0     # answers without their checksums
    assert files.read(range(3))[1].tolist() == [True,False,False]

def test_two_writers_of_different_rows(tmp_path):
    "As of two processes, batch by batch in turns"
    header = dict(n_epoch=1, rows=40, whole=False, answers=[{**Kept().header, **AnswerFormat((3,), torch.float32).header}])
    one = Files.create(tmp_path/'r', header)
    logits,writers = torch.randn(40, 3),[one,Files(one.path, write=True)]
    for i,rows in enumerate(np.split(np.arange(40), 8)):
        files = writers[i%2]
        files.write(rows, torch.ones(5).int(), [files.formats[0].encode(logits[rows])])
        assert all(o.done(rows) for o in writers)
    one.finish()
    assert np.array_equal(np.load(tmp_path/'r'/'predictions.npy')['logits'], logits.numpy())

def test_bytes_of_an_item():
    "TinyViT needs 4 + 4K"
    for k in 1,10,100:
        header = dict(n_epoch=1, rows=1, answers=[{**Kept().header, **AnswerFormat((1000,), topk=k).header}])
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

# Processes, which are forks of one that has all modules loaded

forks = '''
import os, resource, signal, sys
from fastai.basics import Callback, set_seed
from fastdistill.recording import record_teacher, TeacherRecording
from recording_helpers import cnn, During, fit, images
pwrite = os.pwrite
class Dies(Callback):
    def after_loss(self):
        if self.training and self.iter == 2: os.kill(os.getpid(), signal.SIGKILL)

def half(fd, content, position):
    global n_writes
    n_writes += 1
    if n_writes < 8: return pwrite(fd, content, position)     # two for each batch: inputs and answers
    pwrite(fd, content[:len(content)//2], position)
    os.kill(os.getpid(), signal.SIGKILL)

def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

def record(path, teacher=None):
    set_seed(0)
    record_teacher(During(cnn(), 0, None) if teacher is None else teacher, images(), path, n_epoch=2)

def do(what, path):
    global n_writes
    n_writes = 0
    if what == 'record': record(path)
    if what == 'replay': fit(TeacherRecording(path), images(), cbs=[Dies()])
    if what == 'half':
        os.pwrite = half
        record(path)
    if what == 'limit':
        set_seed(0)
        try: record(path, During(cnn(), 5, lambda: limit(400)))
        except OSError as e: print(e, flush=True)

for what,path in zip(sys.argv[1::2], sys.argv[2::2]):
    if not (pid := os.fork()):
        do(what, path)
        os._exit(0)
    print(what, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

@pytest.mark.slow
def test_processes_that_end_in_the_middle(tmp_path):
    half,r,s,whole = (tmp_path/o for o in ('half','r','s','whole'))
    scenes = ('half',half),('record',whole),('half',r),('record',r),('limit',s),('record',s),('replay',r)
    done = python(forks, *[o for scene in scenes for o in scene])
    out,kill = done.stdout + done.stderr,-signal.SIGKILL
    for text in f'half {kill}','record 0','limit 0',f'replay {kill}': assert text in out, out
    assert 'has failed: File too large. What was recorded before is kept' in out and 'record 1' not in out
    half_written = Files(part_of(half)).read(range(40))[1].tolist()
    assert half_written == [True]*14 + [False]*26     # three batches of four rows, and half of the fourth
    for o in r,s: assert same_arrays(TeacherRecording(o), TeacherRecording(whole))
    fit(TeacherRecording(r), images(), 2)

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
            if self.training and self.iter == 2: os.truncate(tmp_path/'r'/'predictions.npy', 200)
    refuses(lambda: fit(rec, dls, cbs=[Cut()]), 'r is damaged: predictions.npy is shorter than it was')

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
