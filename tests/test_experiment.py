"Training with and without a teacher: the data of the digits, several processes, files."
import pytest
from fastdistill import experiment
from fastdistill.cli import fastdistill
from fastdistill.digits import digits_dls

def test_digits_data():
    dls,other = digits_dls(200),digits_dls(200, split=1)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (200, 797, 10)
    def rows(ds): return {bytes(r.tobytes()) for r in ds.items}
    assert not rows(dls.train_ds) & rows(dls.valid_ds) - rows(digits_dls(1000).train_ds)
    assert rows(dls.valid_ds) != rows(other.valid_ds)
    x,y = dls.valid.one_batch()
    assert x.shape == (797,1,8,8) and x.min() == 0 and x.max() == 1 and sorted(y.unique().tolist()) == list(range(10))

def test_written_is_said_after_the_write(tmp_path, monkeypatch, capsys):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(experiment, 'write_report', full)
    monkeypatch.setattr(experiment, 'train_teacher', lambda learn, *_: learn)
    with pytest.raises(OSError): fastdistill(epochs=1, seeds=1, out=tmp_path)
    out = capsys.readouterr().out
    assert 'gain in accuracy' in out and 'Written' not in out and (tmp_path/'results.csv').exists()
