"Comparing after a fit: tables against plain computations, and nothing changed."
from contextlib import contextmanager
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL, accuracy, error_rate, set_seed
from fastai.callback.progress import CSVLogger
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDL
from conftest import data, learner, loaders, net
from fastai.basics import Categorize, Datasets
from fastdistill.compare import compare
from fastdistill.deploy import export_onnx
from fastdistill.digits import DigitImage, DigitLabel, digits_learner
from fastdistill.measure import agreement, calibration_error
from test_untouched import everything, same

@pytest.fixture(scope='module')
def learners():
    set_seed(0)
    def fit(width):
        learn = learner(net(width), data(64, 16))
        learn.fit(2, 1e-2)
        return learn
    return dict(teacher=fit(8), scratch=[fit(4), fit(4), fit(4)], distilled=[fit(4), fit(4), fit(4)])

def test_a_run_that_diverged_shows(learners):
    "pandas would leave it out of the mean"
    broken = learner(net(4), data(64, 16))
    with torch.no_grad(): next(broken.model.parameters()).fill_(np.nan)
    table = compare(dict(alone=learners['scratch'], student=[*learners['distilled'][:2],broken], two=learners['distilled'][:2]), baseline='alone')
    columns = ['valid_loss','valid_loss ±','calibration error','gain in accuracy']
    assert table.loc['student',columns].isna().tolist() == [True,True,True,False] and table.loc[['alone','two'],columns[:3]].notna().all(None)
    assert 'The valid_loss of student is not finite.' in repr(table)

def answers(learn):
    x,y = learn.dls.valid.one_batch()
    with torch.no_grad(): return learn.model.eval()(x),y

@contextmanager
def unchanged(learners, tmp_path):
    "Inside, teacher and student are not changed, and nothing is logged"
    learn,teacher = learners['distilled'][0],learners['teacher'].model
    learn.add_cb(CSVLogger(tmp_path/'log.csv'))
    found = everything(learn, teacher)
    yield
    now = everything(learn, teacher)
    found['cbs'],now['cbs'] = ([type(cb) for cb in o['cbs']] for o in (found, now))     # fastai's no_bar puts a new bar back
    learn.remove_cb(CSVLogger)
    assert not list(tmp_path.iterdir())
    for k in found: assert same(found[k], now[k]), k

@given(arrays(np.float32, (40,3), elements=st.floats(-30, 30, width=32)), st.integers(1, 20), st.randoms(use_true_random=False))
def test_calibration_error_is_that_of_a_plain_loop(logits, n_bins, random):
    targ = np.array([random.randrange(3) for _ in range(40)])
    p = torch.tensor(logits).softmax(1)
    conf,pred = (o.numpy() for o in p.max(1))
    bins = [[] for _ in range(n_bins)]
    for c,right in zip(conf, pred == targ): bins[min(n_bins, max(1, int(np.ceil(np.float32(c)*np.float32(n_bins)))))-1].append((c, right))
    want = sum(abs(np.mean([r for _,r in b]) - np.mean([c for c,_ in b]))*len(b)/40 for b in bins if b)
    assert calibration_error(torch.tensor(logits), torch.tensor(targ), n_bins) == pytest.approx(want, abs=1e-4)

def test_agreement():
    a,b = torch.randn(2, 30, 4)
    p,q = (o.softmax(1).double().numpy() for o in (a,b))
    assert agreement(a, b) == pytest.approx(((p.argmax(1) == q.argmax(1)).mean(), (q*np.log(q/p)).sum(1).mean()), abs=1e-5)
    assert agreement(a, a) == pytest.approx((1, 0), abs=1e-6)

def test_compare_against_plain_computations(learners):
    table = compare(learners, baseline='scratch', n=2)
    for name,ls in learners.items():
        ls = ls if isinstance(ls, list) else [ls]
        outs = [answers(l) for l in ls]
        accs,eces = [(o.argmax(1) == y).float().mean().item() for o,y in outs],[calibration_error(o, y) for o,y in outs]
        losses = [F.cross_entropy(o, y).item() for o,y in outs]
        for column,values in (('accuracy',accs),('calibration error',eces),('valid_loss',losses)):
            assert table.loc[name,column] == pytest.approx(np.mean(values), abs=1e-5)
            if len(ls) > 1: assert table.loc[name,f'{column} ±'] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
        assert table.loc[name,'parameters'] == sum(p.numel() for p in ls[0].model.parameters())
        assert table.loc[name,'MB'] == pytest.approx(sum(t.numel()*t.element_size() for t in ls[0].model.state_dict().values())/1e6)
    teacher = answers(learners['teacher'])[0]
    both = [agreement(answers(l)[0], teacher) for l in learners['distilled']]
    assert table.loc['distilled',['agreement','KL from the teacher']].tolist() == pytest.approx(np.mean(both, axis=0).tolist(), abs=1e-5)
    gains = [(answers(d)[0].argmax(1) == answers(d)[1]).float().mean() - (answers(s)[0].argmax(1) == answers(s)[1]).float().mean() for d,s in zip(learners['distilled'], learners['scratch'])]
    assert table.loc['distilled','gain in accuracy'] == pytest.approx(np.mean(gains), abs=1e-6) and table.loc['distilled','gain in accuracy ±'] == pytest.approx(np.std(gains, ddof=1), abs=1e-6)
    assert (table[['ms per item, batch of 1','ms per item, batch of 64']] > 0).all(axis=None) and pd.isna(table.loc['teacher','agreement'])

def test_multiply_adds_by_hand(learners):
    "Two strided convolutions of 3×3 on 8×8 images, and a linear layer"
    table = compare(dict(a=learners['teacher']), n=1)
    assert table.loc['a','million multiply-adds'] == pytest.approx((16*9*2*8 + 4*9*8*16 + 64*3)/1e6)

def test_table_as_it_is_shown_and_stored(learners, tmp_path):
    table = compare(learners, n=2)
    assert isinstance(table, pd.DataFrame) and table.index.tolist() == list(learners)
    shown = table.shown()
    assert shown.columns.tolist() == list(learners) and shown.loc['accuracy','scratch'].startswith(f"{table.loc['scratch','accuracy']:.3f} ± ") and float(shown.loc['accuracy','scratch'].split('± ')[1]) == pytest.approx(table.loc['scratch','accuracy ±'], abs=1e-3)
    assert 'nan' not in repr(table).lower() and '3 seeds' in repr(table) and 'median of 2 passes on cpu' in repr(table) and '<table' in table._repr_html_()
    table.to_csv(tmp_path/'a.csv')
    assert np.allclose(pd.read_csv(tmp_path/'a.csv', index_col=0), table, equal_nan=True)
    assert not isinstance(table[['accuracy']], type(table))     # a part is a plain DataFrame

def test_comparing_changes_nothing(learners, tmp_path):
    with unchanged(learners, tmp_path): compare(learners, n=1)

def test_mistakes_of_compare(learners):
    with pytest.raises(ValueError, match='dictionary from names'): compare({})
    with pytest.raises(ValueError, match='dictionary from names'): compare(dict(a=net()))
    with pytest.raises(ValueError, match="one of teacher, scratch, distilled, but got 'best'"): compare(learners, baseline='best')
    other = learner(net(4), loaders(*[list(learners['teacher'].dls.valid_ds)[:8]]*2, 8))
    with pytest.raises(ValueError, match='other was measured on other labels than teacher'): compare(dict(teacher=learners['teacher'], other=other))

def test_baseline_with_other_metrics(learners):
    "A gain in each metric that both have"
    a,b,c = learner(net(4)),learner(net(4)),learner(net(4))
    b.metrics,c.metrics = [accuracy,error_rate],[error_rate]
    table = compare(dict(a=a, b=b, c=c), baseline='b', n=1)
    acc = {k:(answers(l)[0].argmax(1) == answers(l)[1]).float().mean().item() for k,l in dict(a=a, b=b, c=c).items()}
    assert table.loc['a','gain in accuracy'] == pytest.approx(acc['a']-acc['b']) and table.loc['c','gain in error_rate'] == pytest.approx(acc['b']-acc['c'])
    assert pd.isna(table.loc['c','gain in accuracy']) and pd.isna(table.loc['a','gain in error_rate'])

def test_sequences_of_different_length():
    "A last batch of shorter sequences, as a language model has it: its labels are compared, token by token"
    def sequences(*lengths): return [[(torch.arange(n).add(i) % 5, torch.arange(n).add(i+1) % 5) for i in range(4)] for n in lengths]
    def model(items):
        dl = TfmdDL([o for b in items for o in b], bs=4, num_workers=0, device='cpu')
        return Learner(DataLoaders(dl, dl), nn.Sequential(nn.Embedding(5,6), nn.Linear(6,5)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    items = sequences(7,7,3)
    a,b = model(items),model(items)
    table = compare(dict(teacher=a, student=b), n=1)
    with torch.no_grad(): want = np.mean([(a.model(x).argmax(1) == y).float().mean() for batch in items for x,y in batch])     # fastai's: each item counts once
    assert table.loc['teacher','accuracy'] == pytest.approx(want, abs=1e-6) and 'agreement' not in table
    with pytest.raises(ValueError, match='measured on other labels'): compare(dict(teacher=a, student=model(sequences(7,7,4))), n=1)

@pytest.mark.parametrize('n_inp', [1,2])
def test_loaders_of_pytorch(n_inp):
    "With one input and with two, beside a learner with fastai's loaders"
    class Sum(nn.Module):
        def __init__(self): super().__init__(); self.net = net(4)
        def forward(self, *xs): return self.net(sum(xs))
    items = [(*[x]*n_inp, y) for x,y in data().train_ds]
    ours = learner(Sum(), loaders(items, items, 8))
    theirs = learner(Sum(), DataLoaders(TorchDL(items, 8, shuffle=True), TorchDL(items, 10)))
    theirs.model.load_state_dict(ours.model.state_dict())
    columns = ['valid_loss','accuracy','calibration error','million multiply-adds']
    for table in (compare(dict(a=ours, b=theirs), n=1), compare(dict(a=ours, b=theirs), n=1, dl=theirs.dls.train)):
        assert table.loc['a',columns].tolist() == pytest.approx(table.loc['b',columns].tolist(), abs=1e-6) and (table['ms per item, batch of 64'] > 0).all()
    logits = ours.model.eval()(*[torch.stack(o) for o in list(zip(*items))[:n_inp]])
    assert table.loc['b','calibration error'] == pytest.approx(calibration_error(logits, torch.stack([i[-1] for i in items])), abs=1e-6)

def test_nothing_to_measure_on():
    "An empty validation set, and none at all"
    items = list(data().train_ds)
    empty,none = learner(net(), loaders(items, items[:1], 8)),learner(net(), loaders(items, items, 8))
    empty.dls = DataLoaders(empty.dls.train, TfmdDL([], bs=8, num_workers=0, do_setup=False))
    none.dls = DataLoaders(none.dls.train)
    for learn in (empty,none):
        with pytest.raises(ValueError, match='b has no items to be measured on.*with `dl`'): compare(dict(a=learner(), b=learn), n=1)
        assert compare(dict(b=learn), n=1, dl=learn.dls.train).loc['b','accuracy'] >= 0

@pytest.mark.parametrize('default', [torch.float32,torch.float64])
def test_double_precision(default):
    "Models and inputs in float64, whatever the default is"
    items = [(x.double(), y) for x,y in data().train_ds]
    torch.set_default_dtype(default)
    try:
        a,b = (learner(net(w).double(), loaders(items, items, 8)) for w in (8,4))
        table = compare(dict(teacher=a, student=b), baseline='student', n=1)
    finally: torch.set_default_dtype(torch.float32)
    logits = [answers(l)[0] for l in (a,b)]
    assert logits[0].dtype == torch.float64
    assert table['calibration error'].tolist() == pytest.approx([calibration_error(o, answers(a)[1]) for o in logits], abs=1e-6)
    p,q = (o.softmax(1).numpy() for o in logits)
    assert table.loc['student','KL from the teacher'] == pytest.approx((p*np.log(p/q)).sum(1).mean(), abs=1e-5)

def test_learners_of_several_processes(learners):
    "One whose validation set is split between processes is measured on all of it, as the others are"
    class DistributedTrainer(Callback):     # stands in for fastai's
        def before_validate(self): self.learn.dl = [tuple(o[:8] for o in self.dl.one_batch())]
    learn = learners['distilled'][0]
    want = compare(dict(teacher=learners['teacher'], student=learn), n=1)
    learn.add_cb(DistributedTrainer())
    table = compare(dict(teacher=learners['teacher'], student=learn), n=1)
    assert learn.distributed_trainer in learn.cbs
    learn.remove_cb(DistributedTrainer)
    for c in ('accuracy','agreement','calibration error'): assert table.loc['student',c] == pytest.approx(want.loc['student',c])

def test_values_have_neither_calibration_nor_agreement():
    items = [(torch.randn(6), torch.rand(3)) for _ in range(32)]
    learn = Learner(loaders(items, items, 16), nn.Linear(6, 3), loss_func=F.mse_loss)
    table = compare(dict(teacher=learn), n=1)
    assert 'calibration error' not in table and table.loc['teacher','valid_loss'] > 0

@pytest.mark.parametrize('ignore', [-100,1])
def test_labels_that_do_not_count(ignore):
    "In a column, as tables have them; the loss function says which label it ignores"
    items = [(x, torch.tensor([-100 if i == 5 and ignore < 0 else y])) for i,(x,y) in enumerate(data().train_ds)]
    learn = learner(net(4), loaders(items, items, 8))
    learn.loss_func = CrossEntropyLossFlat(ignore_index=ignore)
    with torch.no_grad(): logits = learn.model.eval()(torch.stack([x for x,_ in items]))
    y = torch.cat([y for _,y in items])
    want = calibration_error(logits[y != ignore], y[y != ignore])
    assert compare(dict(a=learn), n=1).loc['a','calibration error'] == pytest.approx(want, abs=1e-6)

@pytest.fixture(scope='module')
def files(learners, tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    return [export_onnx(l, folder/f'{i}.onnx', probs=i>0) for i,l in enumerate(learners['distilled'][:2])]

def test_onnx_files_beside_learners(learners, files):
    "The rows of a learner and of its file are the same, though the second file returns probabilities"
    first = {k:v[:2] if isinstance(v, list) else v for k,v in learners.items()}
    table = compare(dict(first, ONNX=files, again=str(files[0])), baseline='scratch', n=2)
    columns = [c for c in table if 'ms' not in c and 'MB' not in c]
    assert table.loc['ONNX',columns].tolist() == pytest.approx(table.loc['distilled',columns].tolist(), abs=1e-5, nan_ok=True)
    assert {'valid_loss','accuracy','accuracy ±','calibration error','agreement','gain in accuracy','parameters','million multiply-adds'} <= set(columns)
    assert table.loc['ONNX','MB'] == pytest.approx(files[0].stat().st_size/1e6) and (table[['ms per item, batch of 1','ms per item, batch of 64']] > 0).all(axis=None)
    assert f'ONNX files: onnxruntime on the CPU, {torch.get_num_threads()} threads' in repr(table) and 'ONNX files' not in repr(compare(learners, n=1))
    assert not any('onnx' in c for c in table)

def test_comparing_files_changes_nothing(learners, files, tmp_path):
    with unchanged(learners, tmp_path): compare(dict(learners, file=files[0]), n=1)

def test_a_file_is_measured_by_the_learner_above_it(learners, files):
    a,b = learner(net(4)),learner(net(4))
    a.metrics,b.metrics = [accuracy,error_rate],[error_rate]
    table = compare(dict(a=a, x=files[0], b=b, y=files[0]), n=1)
    assert table.loc['x','accuracy'] == pytest.approx(1-table.loc['y','error_rate']) and pd.isna(table.loc['y','accuracy'])
    assert compare(dict(y=files[0], b=b), n=1).loc['y','error_rate'] == table.loc['y','error_rate']     # the first, where none is above

def test_files_with_classes_in_another_order(tmp_path):
    a = digits_learner(4)
    with a.no_bar(), a.no_logging(): a.fit(1, 1e-2)
    file = export_onnx(a, tmp_path/'a.onnx')
    def other(vocab):
        learn = digits_learner(4)
        tfms = [[DigitImage()],[DigitLabel(),Categorize(vocab=vocab)]]
        learn.dls = Datasets(learn.dls.valid_ds.items, tfms, splits=[range(50),range(50,150)]).dataloaders(bs=50, num_workers=0)
        return learn
    table = compare(dict(b=other(list('9876543210')), file=file), n=1)
    dl = other(list('0123456789')).dls.valid
    with a.no_bar(): assert table.loc['file','accuracy'] == pytest.approx(a.validate(dl=dl)[1])
    with pytest.raises(ValueError, match="file cannot be measured on these items.*'ten'"): compare(dict(b=other([*'0123456789','ten']), file=file), n=1)

def test_files_that_cannot_be_compared(learners, files, tmp_path):
    with pytest.raises(ValueError, match='a learner beside the ONNX files'): compare(dict(a=files[0]))
    with pytest.raises(ValueError, match='files that end in .onnx'): compare(dict(learners, a='a.pkl'))
    with pytest.raises(ValueError, match='no.onnx: no such file'): compare(dict(learners, a='no.onnx'))
    other = learner(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), loaders([(torch.randn(2, 6, 6), 0) for _ in range(8)], [(torch.randn(2, 6, 6), 0) for _ in range(8)], 4))
    other.model(torch.zeros(2, 2, 6, 6))
    with pytest.raises(ValueError, match=r'0.onnx takes .* but got \(8, 2, 6, 6\)'): compare(dict(a=other, b=files[0]), n=1)
