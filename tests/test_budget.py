"The best student within a budget: what is measured, who competes, how a search goes on, what is refused."
import io, math, sys, time
from contextlib import redirect_stdout
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, TfmdDL, accuracy, error_rate, set_seed
from torch import nn
from conftest import data, learner, mlp, net, same_state, state
from fastdistill.budget import find_student
from fastdistill.budget.candidates import image_students, measure_students
from fastdistill.budget.found import FoundStudent, front
from fastdistill.budget.trials import Competition
from fastdistill.ema import EMATeacher
from fastdistill.images import plain_model
from fastdistill.measure import multiply_adds
from fastdistill.losses import Attention, Logits, SoftTarget
from fastdistill.objective import Match

optuna = pytest.importorskip('optuna')
pytest.importorskip('optuna_integration')

@pytest.fixture(autouse=True)
def _no_bars(monkeypatch):
    "Bars of the final fits only clutter what a failing test shows"
    from fastai.basics import defaults
    monkeypatch.setattr(defaults, 'callbacks', [c for c in defaults.callbacks if c.__name__ != 'ProgressCallback'])

def students(*widths): return {f'width {w}':partial(net, w) for w in widths}
def n_parameters(w): return (2*9+1)*w + 2*w + (9*w+1)*2*w + 4*w + (8*w+1)*3     # of `net`
kw = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy)

class Stop(Callback):
    "Ctrl-C after `n` epochs, counted over all learners"
    def __init__(self, count, n): self.count,self.n = count,n
    def after_epoch(self):
        self.count.append(self.epoch)
        if len(self.count) == self.n: raise KeyboardInterrupt

# What is measured

def test_measured_as_by_hand():
    found = measure_students(students(2, 4), data(), max_mb=1, **kw)
    assert found.table.parameters.tolist() == [n_parameters(2), n_parameters(4)]
    buffers = {w:2*(3*w) for w in (2,4)}     # running means and variances; two counters of 8 bytes besides
    assert found.table.MB.tolist() == pytest.approx([(4*(n_parameters(w)+buffers[w]) + 16)/1e6 for w in (2,4)])
    multiply_adds = [(16*2*9*w + 4*9*w*2*w + 8*w*3)/1e6 for w in (2,4)]     # on 4×4 and 2×2 pixels
    assert found.table['million multiply-adds'].tolist() == pytest.approx(multiply_adds)
    assert (found.table.ms > 0).all() and found.names == ['width 2','width 4'] and '2 of 2 students fit 1 MB' in repr(found)

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net(2)
    def forward(self, x):
        time.sleep(0.2)
        return self.model(x)

class Raises(nn.Module):
    "In its first step, but not in evaluation mode"
    def __init__(self):
        super().__init__()
        self.model = net(2)
    def forward(self, x):
        if self.training: raise RuntimeError('no step')
        return self.model(x)

def test_left_out_with_the_reason():
    def cannot(): raise TypeError('no such network')
    found = measure_students(dict(students(2, 16), slow=Slow, built=cannot, raises=Raises, wide=lambda: nn.Linear(3, 3)),
                             data(), max_ms=150, max_mb=0.01, n=3, **kw)
    why = found.table['left out']
    assert found.names == ['width 2'] and why['width 2'] == ''
    assert 'MB > 0.01 MB' in why['width 16'] and why.slow.endswith(' ms > 150 ms')
    assert why.built == 'cannot be trained: no such network' and 'no step' in why.raises and why.wide.startswith('cannot be trained')
    assert math.isnan(found.table.parameters.built) and found.table.parameters.wide == 12

def test_none_fits():
    with pytest.raises(ValueError, match=r'None of 2 students.* Nearest is width 2 .* \d+ % over the budget'): measure_students(students(2, 4), data(), max_mb=0.0005, **kw)
    with pytest.raises(ValueError, match='wide cannot be trained'): measure_students(dict(wide=lambda: nn.Linear(3, 3)), data(), max_mb=1)

@pytest.mark.parametrize('args,msg', [
    (dict(), 'Expected a budget, max_ms or max_mb, but got none'),
    (dict(max_ms=0), 'Expected max_ms to be above 0'),
    (dict(max_mb=-1), 'Expected max_mb to be above 0'),
    (dict(max_mb=1, students=['resnet18','resnet18']), 'each student once, but got resnet18 twice'),
    (dict(max_mb=1, students=['resnte18']), "Unknown torchvision model 'resnte18'"),
    (dict(max_mb=1, students={}), 'Expected students as a dictionary'),
    (dict(max_mb=1, students=dict(a=3)), 'Expected students as a dictionary'),
    (dict(max_mb=1, students=None), 'Only for color images')])
def test_refused_when_measured(args, msg):
    with pytest.raises(ValueError, match=msg): measure_students(args.pop('students', students(2)), data(), **args)

def test_times_are_kept(tmp_path):
    "Another measurement of a student at the border would change who takes part"
    first = measure_students(students(2, 4), data(), max_mb=1, file=tmp_path/'m.csv', **kw)
    again = measure_students({**students(2), 'width 4':partial(net, 5)}, data(), max_mb=1, file=tmp_path/'m.csv', **kw)
    assert again.table.ms['width 2'] == pytest.approx(first.table.ms['width 2']) and again.table.ms['width 4'] != first.table.ms['width 4']

def test_default_students_span_a_factor_of_100():
    x = torch.randn(1, 3, 64, 64)
    counts = {name:multiply_adds(plain_model(name, 2).eval(), (x,)) for name in image_students}
    assert max(counts.values())/min(counts.values()) > 100

# Who competes

def compete(file, n_epoch=9, makers=None, **args):
    candidates = measure_students(students(2, 3, 4) if makers is None else makers, data(), max_mb=1, n=1, **kw)
    losses = dict(soft=SoftTarget(), logits=Logits())
    set_seed(7)
    teacher = net(8)
    with redirect_stdout(io.StringIO()) as out:
        table = Competition(candidates, teacher, losses, (0.3,0.7), n_epoch, 1e-2, 'accuracy', False).run(file, **args)
    return table,out.getvalue()

def trials_in(file):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    return [optuna.load_study(study_name=n, storage=storage).trials for n in optuna.get_all_study_names(storage)]

def test_successive_halving(tmp_path):
    "After 3 and 5 epochs, those go on that are among the best half of those that have come there"
    table,out = compete(tmp_path/'t')
    assert len(table) == 12 and len(table.drop_duplicates(['student','loss','weight'])) == 12
    assert len(out.splitlines()) == 12 and '12 of 12: ' in out and out.count('stopped after') == (~table.finished).sum() > 0
    (trials,) = trials_in(tmp_path/'t')
    reached = {3:[], 5:[], 9:[]}
    for t,row in zip(trials, table.itertuples()):
        stopped = None
        for epoch,others in reached.items():
            others.append(value := t.intermediate_values[epoch-1])
            if value < sorted(others, reverse=True)[max(1, len(others)//2)-1] and epoch < 9:
                stopped = epoch
                break
        assert row.epochs == (stopped or 9) and row.finished == (stopped is None)
        assert row.accuracy == t.intermediate_values[row.epochs-1]

def test_a_part_of_the_combinations(tmp_path):
    table,_ = compete(tmp_path/'t', 1, n_trials=5)
    assert len(table.drop_duplicates(['student','loss','weight'])) == 5
    more,out = compete(tmp_path/'t', 1, n_trials=7)
    assert '5 of 7 short fits were made before' in out and more[:5].equals(table)

@pytest.mark.parametrize('n', [2,10])
def test_resumed_as_if_never_interrupted(tmp_path, n):
    whole,_ = compete(tmp_path/'whole', 4)
    count = []
    dls = data()
    def interrupted(w): return Learner(dls, net(w), cbs=Stop(count, n+3), **kw)     # each is tried once before
    makers = {f'width {w}':partial(interrupted, w) for w in (2,3,4)}
    with pytest.raises(KeyboardInterrupt, match='of 12 short fits are made and kept'): compete(tmp_path/'parts', 4, makers)
    assert any(t.state.name == 'FAIL' and t.intermediate_values for t in trials_in(tmp_path/'parts')[0])
    rest,_ = compete(tmp_path/'parts', 4)
    assert rest.equals(whole)

def test_another_search_in_the_same_file(tmp_path):
    first,_ = compete(tmp_path/'t', 1, n_trials=2)
    other,out = compete(tmp_path/'t', 2, n_trials=2)
    assert 'trials of another search, with other n_epoch. A new search starts' in out and (other.epochs == 2).all()
    again,_ = compete(tmp_path/'t', 1, n_trials=2)
    assert again.equals(first)

class Diverges(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net(2)
    def forward(self, x): return self.model(x)*(math.nan if self.training else 1)

class Fails(Callback):
    def before_epoch(self):
        if self.epoch == 1: raise RuntimeError('no memory')

def test_trials_that_diverge_or_fail(tmp_path):
    makers = dict(students(2), diverges=Diverges, fails=lambda: Learner(data(), net(2), cbs=Fails(), **kw))
    candidates = measure_students(makers, data(), max_mb=1, loss_func=CrossEntropyLossFlat())
    args = (0.5,), 3, 1e-2, 'valid_loss', True
    with redirect_stdout(io.StringIO()) as out: table = Competition(candidates, net(8), dict(soft=SoftTarget()), *args).run(tmp_path/'t').set_index('student')
    assert table.finished.to_dict() == {'width 2':True, 'diverges':False, 'fails':False}
    assert table.error.fails == 'no memory' and 'failed: no memory' in out.getvalue() and math.isnan(table.valid_loss.diverges)

# What comes out

def find(folder, dls=None, teacher=None, **args):
    dls = dls or data()
    args = dict(dict(max_mb=0.004, students=students(2, 4, 16), weights=(0.5,), n_epoch=2, seeds=2, lr=1e-2, folder=folder), **args)
    with redirect_stdout(io.StringIO()) as out: found = find_student(teacher or learner(net(8), dls), dls, **args)
    return found,out.getvalue()

def finals(*losses):
    "A full training of two seeds and two epochs each"
    return pd.DataFrame(dict(seed=[0,0,1,1], epoch=[1,2,1,2], valid_loss=losses))

def test_a_full_training_that_diverged_is_not_the_best():
    "pandas would take the epoch before it, and leave the seed out of the mean"
    found = FoundStudent(None, None, 'valid_loss', True, 1)
    broken,good = (dict(student=s, loss='SoftTarget', weight=.5) for s in ('broken','good'))
    found.add_finals([(broken, finals(.1, np.nan, .1, .1), {}), (good, finals(.9, .8, .9, .6), {})])
    assert found.best == good and found.finals.valid_loss.tolist() == pytest.approx([.7,np.nan], nan_ok=True)
    with pytest.raises(ValueError, match='with every seed. Give a smaller lr'): found.add_finals([(broken, finals(.1, np.nan, .1, .1), {})])
    assert found.best == good

def test_found(tmp_path):
    teacher = learner(net(8))
    before = state(teacher.model)
    found,out = find(tmp_path/'search', teacher=teacher, losses=dict(soft=SoftTarget(), maps=Match(Attention, ['0'], ['0'])), finalists=3)
    assert same_state(teacher.model, before)
    table = found.table
    assert list(table.index) == ['width 2','width 4','width 16'] and table.accuracy.isna().tolist() == [False,False,True]
    short = found.trials[found.trials.finished].sort_values('accuracy', ascending=False, kind='stable')
    keys = ['student','loss','weight']
    assert len(found.finals) == 3 and {*found.finals[keys].itertuples(index=False)} == {*short[keys][:3].itertuples(index=False)}
    full = found.runs[found.runs.epoch == 2].groupby('method').accuracy.mean()
    assert full[f'student, {found.best["loss"]}'] == found.finals.accuracy.max() == found.finals.accuracy.iloc[0]
    assert found.best == found.finals.iloc[0][keys].to_dict()
    assert list(found.learners) == ['student, scratch',f'student, {found.best["loss"]}'] and len(found.runs) == 2*2*2
    assert all(len(ls) == 2 for ls in found.learners.values())
    model = found.learners['student, scratch'][0].model
    assert sum(p.numel() for p in model.parameters()) == table.parameters[found.best['student']]
    assert 'Best within 0.004 MB: width' in repr(found) and '<p>Best within' in found._repr_html_()
    found.write(tmp_path)
    assert {'students.csv','trials.csv','budget.png','budget.html'} <= {f.name for f in tmp_path.iterdir()}
    page = (tmp_path/'budget.html').read_text()
    assert 'width 16' in page and 'gain in accuracy' in page and len(pd.read_csv(tmp_path/'trials.csv')) == 4
    again,out = find(tmp_path/'search', teacher=teacher, losses=dict(soft=SoftTarget(), maps=Match(Attention, ['0'], ['0'])), finalists=3)
    assert '4 of 4 short fits were made before' in out and again.best == found.best and again.runs.equals(found.runs)

def test_a_full_training_that_fails_does_not_end_the_others(tmp_path):
    "Its loss overflows, but only in the full training, which has two epochs"
    full = [False]
    def note(self): full[0] = self.n_epoch == 2
    def overflows(s, t): return (s-t).square().mean() * (np.inf if full[0] else 1)
    dls = data()
    def student(): return learner(net(2), dls, cbs=Callback(before_fit=note))
    found,out = find(tmp_path, dls, students=dict(one=student), losses=dict(soft=SoftTarget(), late=overflows))
    assert found.best['loss'] == 'soft' and len(found.finals) == 1 and 'Left out: overflows is inf' in out
    with pytest.raises(ValueError, match='overflows is inf'): find(tmp_path, dls, students=dict(one=student), losses=dict(late=overflows))

def result(less, max_ms=3.):
    "Five students: one that is too slow, and one that was stopped"
    names = ['a','b','c','d','$e']
    table = pd.DataFrame(dict(parameters=10, MB=1., ms=[1.,2.,2.5,2.9,9.], **{'left out':['']*4 + ['9 ms > 3 ms']}), index=pd.Index(names, name='student'))
    candidates = measure_students(students(2), data(), max_mb=1, n=1, **kw)
    candidates.table,candidates.max_ms,candidates.max_mb = table,max_ms,None
    trials = pd.DataFrame(dict(student=list('aabcd'), loss='soft', weight=[.5,.9,.5,.5,.5], score=[.5,.6,.55,.8,.95], epochs=[4,4,4,4,2],
                               finished=[True]*4 + [False], error=''))
    return FoundStudent(candidates, trials, 'score', less, 4)

def test_best_front_and_figure():
    found = result(False)
    assert found.best == dict(student='c', loss='soft', weight=.5) and found.table.score.tolist()[:4] == [.6,.55,.8,.95]
    assert front(found.table.dropna(), 'score', False) == ['a','c','d'] and front(result(True).table.dropna(), 'score', True) == ['a']
    assert result(True).best == dict(student='a', loss='soft', weight=.5)
    ax = found.plot()
    assert [t.get_text() for t in ax.texts] == ['a','b','c','d','$e'] and ax.get_xscale() == 'log'
    lines = {l.get_label():l for l in ax.lines}
    assert list(lines['front'].get_xdata()) == [1,2.5,2.9] and list(lines['3 ms'].get_xdata()) == [3,3]
    assert list(lines['stopped early'].get_xdata()) == [2.9] and list(lines['left out, not trained'].get_xdata()) == [9]
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])
    assert result(True, None).plot().lines

def test_less_is_better(tmp_path):
    found,_ = find(tmp_path, metrics=error_rate, finalists=1)
    assert found.monitor == 'error_rate' and found.less
    done = found.trials[found.trials.finished]
    assert done.error_rate[done.student == found.best['student']].iloc[0] == done.error_rate.min() and 'error_rate' in found.runs

def test_teachers_of_other_kinds(tmp_path):
    "Without a `Learner` there are no metrics but the loss; a recording and an ensemble are teachers too"
    found,_ = find(tmp_path/'a', teacher=[net(4), net(4)], n_epoch=1, seeds=1, loss_func=CrossEntropyLossFlat())
    assert found.monitor == 'valid_loss' and list(found.comparison.index) == list(found.learners)
    rec = next((tmp_path/'a').glob('teacher-*'))
    from fastdistill.recording import TeacherRecording
    found,_ = find(tmp_path/'b', teacher=TeacherRecording(rec), n_epoch=1, seeds=1, **kw)
    assert found.monitor == 'accuracy'
    with pytest.raises(ValueError, match='a teacher that stays as it is'): find(tmp_path/'c', teacher=EMATeacher())

def test_random_inputs_and_a_teacher_that_cannot_be_recorded(tmp_path):
    dls = data()
    dls.train.after_batch = lambda b: (b[0] + torch.randn_like(b[0]), b[1])
    found,_ = find(tmp_path/'a', dls)
    assert len(found.runs) == 8
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net(4)
        def forward(self, x): return self.model(x) + torch.randn(len(x), 3)
    _,out = find(tmp_path/'b', teacher=Draws(), n_epoch=1, seeds=1, **kw)
    assert 'asked in each fit, as it cannot be recorded' in out

def test_tables(tmp_path):
    from fastai.tabular.all import Categorify, CategoryBlock, TabularDataLoaders, tabular_learner, tabular_config, TabularModel, get_emb_sz
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=60), b=rng.choice(list('xyz'), 60)))
    df['y'] = np.where(df.a > 0, 'high', 'low')
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['b'], cont_names=['a'], y_names='y', y_block=CategoryBlock(), valid_idx=range(40, 60), bs=10)
    teacher = tabular_learner(dls, layers=[20], metrics=accuracy)
    makers = {f'{n}':(lambda n=n: TabularModel(get_emb_sz(dls.train_ds), 1, 2, [n])) for n in (4,8)}
    found,_ = find(tmp_path, dls, teacher, students=makers, max_mb=1, n_epoch=1, seeds=1)
    assert len(found.table) == 2 and found.monitor == 'accuracy'

# What is refused

@pytest.mark.parametrize('args,msg', [
    (dict(n_epoch=0), 'Expected n_epoch to be at least 1'),
    (dict(trial_epochs=0), 'Expected trial_epochs to be at least 1'),
    (dict(seeds=0), 'Expected seeds to be at least 1'),
    (dict(finalists=0), 'Expected finalists to be at least 1'),
    (dict(n_trials=0), 'Expected n_trials to be at least 1'),
    (dict(lr=0), 'Expected lr to be above 0'),
    (dict(weights=(0.5,0.5)), 'Expected weights that differ'),
    (dict(losses={}), 'Expected at least one loss'),
    (dict(losses=[SoftTarget(T=1), SoftTarget(T=2)]), 'losses of different kinds'),
    (dict(losses=Match(Attention, ['9'], ['0'])), "width 2 cannot be trained with Attention: .*no layer '9'"),
    (dict(monitor='f1'), "Expected monitor to be one of .* but got 'f1'"),
    (dict(max_mb=None), 'Expected a budget')])
def test_refused(tmp_path, args, msg):
    with pytest.raises(ValueError, match=msg): find(tmp_path, **args)

def test_no_labels_to_compare_by(tmp_path):
    dls = data()
    items = [(x,) for x,_ in dls.valid.dataset]
    dls = DataLoaders(dls.train, TfmdDL(items, bs=8, num_workers=0))
    with pytest.raises(ValueError, match='validation set with labels|cannot be trained'): find(tmp_path, dls)

def test_folder(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='file: cannot be written to'): find(tmp_path/'file')
    from fastdistill.recording.files import alone
    (tmp_path/'search').mkdir()
    with alone(tmp_path/'search'/'search'), pytest.raises(ValueError, match='Another search runs in'): find(tmp_path/'search')

def test_without_optuna(tmp_path, monkeypatch):
    for name in ('optuna','optuna_integration'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'fastdistill\[deploy\]'"): find(tmp_path)

def test_all_diverge(tmp_path):
    with pytest.raises(ValueError, match='No short fit ended with a finite valid_loss'): find(tmp_path, students=dict(diverges=Diverges), monitor='valid_loss')

def test_interrupted_in_the_final_fits(tmp_path):
    count = []
    makers = {'width 2':lambda: Learner(data(), net(2), cbs=Stop(count, 4), **kw)}     # two tries, one short fit of an epoch
    with pytest.raises(KeyboardInterrupt, match='The short fits are made and kept'): find(tmp_path, students=makers)

def test_times_are_shown_with_their_spread():
    from fastdistill.budget.candidates import shown
    table = shown(pd.DataFrame({'ms':[.44123,float('nan')], 'ms ±':[.03,float('nan')], 'device':'cpu'}))
    assert list(table) == ['ms'] and list(table.ms) == ['0.441 ± 0.03','']
