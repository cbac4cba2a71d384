"Machines that record some epochs each, and their folders side by side as one recording."
import pickle, random, shutil
import numpy as np, pytest, torch
from fastai.basics import Callback, set_seed
from fastdistill.recording import record_teacher, TeacherRecording
from fastdistill.teacher import Teacher
from conftest import data, net, state
from recording_helpers import arrays, arrays_in, brighter, cnn, Counting, fit, images, is_another, refuses
import recording_helpers

ranges = dict(a=(0,2), b=(2,1), c=(3,2))     # first epoch and number of epochs

@pytest.fixture
def parts(tmp_path):
    "A function that records one of the ranges, with anything else that is to be different"
    teacher = cnn()
    def record(name, teacher=teacher, dls=None, **kwargs):
        first,n = ranges[name]
        how = dict(n_epoch=n, first_epoch=first, dtype=torch.float32, **kwargs)
        record_teacher(teacher, dls or images(), tmp_path/name, **how)
        return tmp_path/name
    record.teacher = teacher
    return record

def test_parts_are_a_long_recording(tmp_path, parts):
    "Row by row, and bit for bit in a fit that goes through all epochs and begins again"
    dls,ends = images(),[]
    long = record_teacher(parts.teacher, dls, tmp_path/'long', n_epoch=5, dtype=torch.float32)
    paths = [parts(name) for name in 'cab']
    for k,v in arrays(long).items():
        joined = np.concatenate([arrays_in(tmp_path/name)[k] for name in 'abc'])
        assert v.shape[0] == 100 and np.array_equal(v, joined)
    together = TeacherRecording(paths)
    for rec in long,together,pickle.loads(pickle.dumps(together)):
        set_seed(5)
        ends.append(state(fit(rec, dls, 6, cnn(dropout=0.5)).model))
    assert all(torch.equal(v, e[k]) for e in ends[1:] for k,v in ends[0].items())
    assert together.header['n_epoch'] == 5 and together.header['setup'] == long.header['setup']
    assert repr(together) == f'TeacherRecording({", ".join(f"{tmp_path}/{o}" for o in "abc")}: Sequential, 5 epochs of 20 items)'
    assert repr(TeacherRecording([paths[1]])) == repr(TeacherRecording(str(paths[1])))

def test_a_range_that_was_interrupted(tmp_path, parts):
    parts('b')
    shutil.move(tmp_path/'b', tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): parts('b', Counting(parts.teacher, 4))
    refuses(lambda: TeacherRecording([parts('a'), tmp_path/'b']), f'{tmp_path}/b.part is not whole')
    other = Teacher(Counting(parts.teacher), brighter)
    is_another(lambda: parts('b', other), 'predictions in the first batch')
    again = Counting(parts.teacher)
    parts('b', again)
    assert again.n == 2 + 1 + 3     # looks at the first batch of all and of the range, and what was missing
    for f in 'inputs.npy','predictions.npy': assert (tmp_path/'whole'/f).read_bytes() == (tmp_path/'b'/f).read_bytes()
    parts('b', again)
    assert again.n == 6 + 3
    is_another(lambda: record_teacher(again, images(), tmp_path/'b', n_epoch=1, dtype=torch.float32), 'first_epoch: 2 when')

def test_gaps_and_overlaps(tmp_path, parts):
    a,b,c = map(parts, 'abc')
    refuses(lambda: TeacherRecording([a,c]), 'epoch 2 are missing', f'{c} holds epochs 3 to 4')
    refuses(lambda: TeacherRecording([b,c]), 'epochs 0 to 1 are missing', f'{b} holds epoch 2')
    refuses(lambda: TeacherRecording(b), 'epochs 0 to 1 are missing')
    refuses(lambda: TeacherRecording([a,b,a]), f'{a} and {a} both hold epoch 0')
    refuses(lambda: TeacherRecording([]), 'the list is empty')
    refuses(lambda: TeacherRecording([a,tmp_path/'none']), f'{tmp_path}/none is no recording')

@pytest.mark.parametrize('changed,texts', [
    (dict(teacher=cnn()), ['weights: ']),
    (dict(dls=images(bs=5)), ['batch size: 4 there, 5 here']),
    (dict(seed=1), ['seed: 0 there, 1 here']),
    (dict(topk=2), ['predictions in float32, shape [3], topk 2'])])
def test_folders_that_do_not_belong_together(tmp_path, parts, changed, texts):
    a,b = parts('a'),parts('b', **changed)
    refuses(lambda: TeacherRecording([b,a]), f'{b} does not belong to the recording in {a}', *texts)

def test_other_images_are_found_when_the_folders_are_opened(tmp_path, parts, monkeypatch):
    a = parts('a')
    monkeypatch.setattr(recording_helpers, 'pictures', recording_helpers.pictures[::-1])
    b = parts('b', dls=images())
    refuses(lambda: TeacherRecording([a,b]), f'{b} does not belong', 'inputs: ')

def test_a_changed_byte_is_found_by_the_name_of_its_folder(tmp_path, parts):
    paths,rand = [parts(name) for name in 'abc'],random.Random(0)
    for path in paths:
        for name in 'header.json','inputs.npy','predictions.npy':
            file,content = path/name,(path/name).read_bytes()
            for i in rand.sample(range(128, len(content)), 3):
                file.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i+1:])
                refuses(lambda: fit(TeacherRecording(paths), images(), 5), str(path))
            file.write_bytes(content)
    fit(TeacherRecording(paths), images(), 5)

def test_an_edited_image_is_found_by_the_name_of_its_folder(tmp_path, parts, monkeypatch):
    rec = TeacherRecording([parts('a'),parts('b')])
    dls = images()
    edited = [p ^ 1 for p in recording_helpers.pictures]
    class Edit(Callback):
        def before_epoch(self):
            if self.epoch == 2: monkeypatch.setattr(recording_helpers, 'pictures', edited)
    refuses(lambda: fit(rec, dls, 3, cbs=[Edit()]), f'recorded in {tmp_path}/b')

def test_ranges_need_batches(tmp_path):
    "What is recorded once has no epochs"
    refuses(lambda: record_teacher(net(), data(), tmp_path/'r', first_epoch=1), 'expected first_epoch=0, but got 1')
    refuses(lambda: record_teacher(cnn(), images(), tmp_path/'r', first_epoch=-1), 'counted from 0, but got first_epoch=-1')
    assert not list(tmp_path.iterdir())
    for name in 'rs': record_teacher(net(), data(), tmp_path/name)
    refuses(lambda: TeacherRecording([tmp_path/'r',tmp_path/'s']), 'does not belong')
