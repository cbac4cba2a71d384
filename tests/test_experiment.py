"Training with and without a teacher: the data of the digits, several processes, files."
from functools import partial
import numpy as np, pytest
from fastai.basics import Callback
from fastai.callback.tracker import TerminateOnNaNCallback
from fastdistill import experiment
from fastdistill.cli import fastdistill
from fastdistill.digits import digits_dls, digits_learner

def test_digits_data():
    dls,other = digits_dls(200),digits_dls(200, split=1)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (200, 797, 10)
    def rows(ds): return {bytes(r.tobytes()) for r in ds.items}
    assert not rows(dls.train_ds) & rows(dls.valid_ds) - rows(digits_dls(1000).train_ds)
    assert rows(dls.valid_ds) != rows(other.valid_ds)
    x,y = dls.valid.one_batch()
    assert x.shape == (797,1,8,8) and x.min() == 0 and x.max() == 1 and sorted(y.unique().tolist()) == list(range(10))

def test_a_student_that_diverges_does_not_end_the_others():
    "Its last value is NaN, not that of an epoch before"
    def break_at(self):
        if self.training and self.epoch == at: self.learn.loss_grad = self.learn.loss = self.loss*np.nan
    for at in (0,1):
        runs,_ = experiment.train_students(partial(digits_learner, 4, 200), dict(alone=list, broken=lambda: [Callback(before_backward=break_at), TerminateOnNaNCallback()]), 3, 1e-2, 1)
        found = runs.groupby('method').accuracy.agg(list)
        assert len(found.alone) == 3 and len(found.broken) == at+1 and np.isnan(found.broken[-1]) and np.isfinite(found.broken[:-1]+found.alone).all()

def test_written_is_said_after_the_write(tmp_path, monkeypatch, capsys):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(experiment, 'write_report', full)
    monkeypatch.setattr(experiment, 'train_teacher', lambda learn, *_: learn)
    with pytest.raises(OSError): fastdistill(epochs=1, seeds=1, out=tmp_path)
    out = capsys.readouterr().out
    assert 'gain in accuracy' in out and 'Written' not in out and (tmp_path/'results.csv').exists()
