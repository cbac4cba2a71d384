"Damaged files, full disks, and recordings that are larger than the memory."
import os, random, shutil
import pytest, torch
from fastai.basics import set_seed
from fastdistill.callback import KnowledgeDistillationCallback
from fastdistill.recording import record_teacher, TeacherRecording
from fastdistill.recording.files import Files
from conftest import data, learner, net, state
from recording_helpers import cnn, Counting, images, python, refuses

@pytest.mark.parametrize('topk', [None,2])
def test_damage_is_an_error_or_without_effect(tmp_path, topk):
    dls = data()
    def train(path):
        set_seed(6)
        dls.train.rng = random.Random(6)
        learn = learner(net(), dls)
        learn.fit(1, cbs=KnowledgeDistillationCallback(TeacherRecording(path)))
        return state(learn.model)
    record_teacher(net(8), dls, tmp_path/'r', topk=topk)
    good,rand,n_errors = train(tmp_path/'r'),random.Random(0),0
    files = sorted(f.name for f in (tmp_path/'r').iterdir())
    assert files == ['header.json','inputs.npy','predictions.npy']
    for name in files:
        size = (tmp_path/'r'/name).stat().st_size
        for what in ['cut','cut','gone','longer','zeros'] + ['byte']*30:
            path = tmp_path/'damaged'
            shutil.copytree(tmp_path/'r', path)
            content = bytearray((path/name).read_bytes())
            i = rand.randrange(128 if what == 'zeros' else 0, size)
            if what == 'cut': content = content[:i]
            if what == 'zeros': content[i:] = bytes(size-i)
            if what == 'byte': content[i] ^= 1 << rand.randrange(8)
            (path/name).write_bytes(content)
            if what == 'gone': (path/name).unlink()
            try: got = train(path)
            except ValueError: n_errors += 1
            else: assert all(torch.equal(v, got[k]) for k,v in good.items()), (name, what, i)
            shutil.rmtree(path)
    assert n_errors > 0.8*35*len(files)

def test_no_recording(tmp_path):
    refuses(lambda: TeacherRecording(tmp_path/'none'), 'is no recording')
    (tmp_path/'empty').mkdir()
    refuses(lambda: TeacherRecording(tmp_path/'empty'), 'is no recording')

@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(tmp_path):
    "100,000 answers of a thousand classes, 200 MB: opened, and read in order and in any order"
    h = record_teacher(net(), data(), tmp_path/'r').header
    h = {**h, 'rows':100_000, 'answers':[{**h['answers'][0], 'shape':[1000]}]}
    Files.create(tmp_path/'large', h).finish()
    code = f'''
import resource
import numpy as np
from fastdistill.recording import TeacherRecording
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
files,rng = TeacherRecording({str(tmp_path/'large')!r}).folders[0],np.random.default_rng(0)
print(peak() - before)
for rows in np.split(np.arange(100_000), 500) + [rng.integers(0, 100_000, 200) for _ in range(500)]: files.read(rows)
print(peak() - before)
'''
    assert (tmp_path/'large'/'predictions.npy').stat().st_size > 200_000_000
    opened,read = python(code).stdout.split()
    assert int(opened) < 5_000 and int(read) < 20_000     # kilobytes

def test_a_new_recording_is_not_searched_for_answers(tmp_path, monkeypatch):
    "At most one look per batch, one per epoch, and one when it is opened"
    reads,pread = [],os.pread
    monkeypatch.setattr(os, 'pread', lambda *args: reads.append(args) or pread(*args))
    record_teacher(cnn(), images(), tmp_path/'r', n_epoch=4)
    assert len(reads) <= 4*5 + 4 + 1

# Space

def test_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 5, 5))
    text = 'would take 336.0 bytes, but 5.0 bytes are free'
    refuses(lambda: record_teacher(net(), data(), tmp_path/'r'), text, error=OSError)
    assert not list(tmp_path.iterdir())

def test_space_is_taken_at_the_start(tmp_path):
    with pytest.raises(KeyboardInterrupt): record_teacher(Counting(net(), 2), data(4000), tmp_path/'r')
    for file in (tmp_path/'r.part').glob('*.npy'): assert 512*file.stat().st_blocks >= file.stat().st_size > 10_000

limited = '''
import resource, sys
from conftest import data, net
from fastdistill.recording import record_teacher
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: record_teacher(net(), data(4000), sys.argv[1])
except OSError as e: print(e)
'''

@pytest.mark.slow
def test_space_that_is_not_there(tmp_path):
    "No file may be larger than 20 kB"
    done = python(limited, tmp_path/'r')
    assert 'would take 56.0 kB, which cannot be had: File too large' in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
