"Items without labels: none at all, on one side, and some in the training set."
import math, pickle, warnings
from copy import deepcopy
import numpy as np, pytest, torch
import torch.nn.functional as F
from conftest import QuietLearner, data, learner, loaders, mlp, n_hooks, net, same_state, state
from fastai.basics import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, IndexSplitter, MSELossFlat, SGD,
                           TfmdDL, Transform, accuracy, load_learner, nn, set_seed, tensor)
from fastai.callback.all import CSVLogger, CutMix, GradientAccumulation, MixUp, SaveModelCallback, SchedLin
from fastai.vision.all import (CategoryBlock, DataBlock, FocalLossFlat, ImageBlock, LabelSmoothingCrossEntropyFlat,
                               MultiCategoryBlock, get_image_files)
from PIL import Image
from torch.utils.data import DataLoader as TorchDL
from fastdistill.all import *
from fastdistill.unlabelled import add_unlabelled, has_labels

kd_of = KnowledgeDistillationCallback

def without(n=24, bs=8, shuffle=False, valid=False):
    "The images of `data` without labels; the validation set has them unless `valid`"
    dls = data(n, bs)
    items = [(x,) for x,_ in dls.train.dataset]
    return loaders(items, items[:16] if valid else list(dls.valid.dataset), bs, shuffle)

def student(dls, width=5, **kwargs): return QuietLearner(dls, mlp(width), **{'loss_func':CrossEntropyLossFlat(), 'metrics':accuracy, **kwargs})

def soft_target(s, t, T=5.):
    "By NumPy"
    def log_softmax(x): return x - np.log(np.exp(x).sum(1, keepdims=True))
    s,t = (log_softmax(o.detach().double().numpy()/T) for o in (s,t))
    return T*T*(np.exp(t)*(t-s)).sum(1).mean()

# nothing has a label

@pytest.mark.parametrize('weight', [0.5,0.9,1])
def test_a_step_is_that_of_the_distillation_loss_alone(teacher, weight):
    learn = student(without(8), opt_func=SGD)
    before = deepcopy(learn.model)
    x = torch.stack([o for o, in learn.dls.train.dataset])
    learn.fit(1, 0.1, wd=0., cbs=kd_of(teacher, weight=weight))
    loss = weight*SoftTarget()(before(x), teacher.eval()(x))
    loss.backward()
    for p,q in zip(learn.model.parameters(), before.parameters()): torch.testing.assert_close(p, q - 0.1*q.grad)
    assert learn.recorder.losses[0].item() == pytest.approx(weight*soft_target(before(x), teacher(x)), rel=1e-4)     # small differences of logarithms

def test_the_loss_is_recorded_and_the_table_has_its_columns(teacher):
    learn,kd = student(without()),kd_of(teacher)
    learn.fit(2, 0.1, cbs=kd)
    assert len(learn.recorder.losses) == 6 and all(l > 0 for l in learn.recorder.losses)
    assert learn.recorder.metric_names == ['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','agreement','time']
    values = learn.recorder.values[-1]
    assert kd.losses['task_loss'] == [0.]*6 and values[3] == 0 and values[4] == pytest.approx(kd.losses['kd_loss'][-1])
    x = torch.stack([x for x,_ in learn.dls.valid.dataset])
    same = (learn.model.eval()(x).argmax(1) == teacher.eval()(x).argmax(1)).float().mean()
    assert values[-1] == pytest.approx(same.item())
    assert list(values[1:3]) == pytest.approx(list(learn.validate()))     # the task's own, as ever
    assert learn.metrics.attrgot('name') == ['accuracy'] and not n_hooks(teacher)
    assert not any(type(cb).__module__.startswith('fastdistill') for cb in learn.cbs)

def test_a_validation_set_without_labels(teacher):
    for dls in (without(valid=True), loaders(list(data().train.dataset), [(x,) for x,_ in data().valid.dataset], 8)):
        learn = student(dls)
        learn.fit(1, 0.1, cbs=kd_of(teacher))
        values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        assert values['valid_loss'] is None and values['accuracy'] is None and 0 <= values['agreement'] <= 1

def test_a_labelled_fit_has_no_such_column(teacher):
    learn = student(data())
    learn.fit(1, cbs=kd_of(teacher))
    assert 'agreement' not in learn.recorder.metric_names

@pytest.mark.parametrize('make', [
    lambda items,**kw: TorchDL(items, 8),
    lambda items,**kw: TorchDL(torch.utils.data.TensorDataset(torch.stack([x for x, in items])), 8),
    lambda items,**kw: TfmdDL(items, bs=8, num_workers=0),
])
def test_loaders(teacher, make):
    items = [(x,) for x,_ in data().train.dataset]
    learn,kd = student(DataLoaders(make(items), make(items[:8]))),kd_of(teacher)
    found = state(learn.model)
    learn.fit(1, 0.1, cbs=kd)
    assert not same_state(learn.model, found) and 0 <= learn.recorder.values[-1][-1] <= 1

def test_bare_tensors_are_an_error_before_the_first_step(teacher):
    items = torch.stack([x for x,_ in data().train.dataset])
    learn = student(DataLoaders(TorchDL(items, 8), TorchDL(items, 8)))
    found = state(learn.model)
    with pytest.raises(ValueError, match='Expected items that are tuples'): learn.fit(1, cbs=kd_of(teacher))
    assert same_state(learn.model, found) and not n_hooks(teacher, learn.model)

def test_labels_are_not_looked_for_in_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(x,) for x,_ in data().train.dataset])
    stream = DataLoaders(TorchDL(Stream(), 8), data().valid)
    assert has_labels(stream, stream.train)

def test_peeking_draws_nothing():
    class Items(list):
        reads = 0
        def __getitem__(self, i):
            Items.reads += 1
            return (super().__getitem__(i)[0] + torch.rand(()),)
    items = Items((x,) for x,_ in data().train.dataset)
    dls = loaders(items, list(data().valid.dataset), 8)
    Items.reads,found = 0,torch.get_rng_state()
    assert not has_labels(dls, dls.train) and has_labels(dls, dls.valid)
    assert Items.reads <= 2 and torch.equal(found, torch.get_rng_state())

@pytest.mark.parametrize('kw,match', [
    (dict(task_weight=0.5), 'task_weight=0.5 was given'), (dict(task_weight=SchedLin(0,1)), 'task_weight=.* was given'),
    (dict(loss=DecoupledKD), 'DecoupledKD.* needs'), (dict(loss=[SoftTarget,NormalizedKD]), 'NormalizedKD.* needs'),
])
def test_what_asks_for_labels_is_an_error_before_the_first_step(teacher, kw, match):
    learn = student(without())
    found = state(learn.model)
    with pytest.raises(ValueError, match=match) as e: learn.fit(1, cbs=kd_of(teacher, **kw))
    assert 'epoch 0, batch 0' in str(e.value) and same_state(learn.model, found) and not n_hooks(teacher)
    assert not any(type(cb).__module__.startswith('fastdistill') for cb in learn.cbs)

def test_a_task_weight_of_0_is_no_error(teacher): student(without()).fit(1, cbs=kd_of(teacher, weight=2, task_weight=0))

def test_metrics_of_the_training_set_need_labels(teacher):
    learn = student(without())
    learn.recorder.train_metrics = True
    with pytest.raises(ValueError, match='metrics of the training set'): learn.fit(1, cbs=kd_of(teacher))
    learn.metrics = []
    learn.fit(1, cbs=kd_of(teacher))

@pytest.mark.parametrize('mix', [MixUp,CutMix])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(),nn.CrossEntropyLoss()])
def test_blended_inputs(teacher, mix, loss_func):
    learn = student(without(), loss_func=loss_func)
    seen,asked = [],[]
    class Keep(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.append(self.x.clone())
    teacher.register_forward_hook(lambda m,x,o: asked.append(x[0].clone()) if torch.is_grad_enabled() is False else None)
    learn.fit(1, 0.1, cbs=[kd_of(teacher), mix(), Keep()])
    plain = torch.stack([x for x, in learn.dls.train.dataset])
    assert len(seen) == 3 and all(torch.equal(a, b) for a,b in zip(seen, asked)) and not torch.equal(torch.cat(seen), plain)
    assert learn.loss_func is loss_func

def test_gradient_accumulation_is_one_larger_batch(teacher):
    runs = []
    for bs,cbs in (8,[GradientAccumulation(24)]),(24,[]):
        set_seed(0)
        learn = student(without(bs=bs), opt_func=SGD)
        learn.fit(1, 0.1, wd=0., cbs=[kd_of(teacher), *cbs])
        runs.append(learn.model)
    for p,q in zip(*(m.parameters() for m in runs)): torch.testing.assert_close(p, q)

def test_lr_find_weight_finder_and_check(teacher):
    for valid in (False,True):
        learn,kd = student(without(valid=valid)),kd_of(teacher)
        found = state(learn.model)
        learn.add_cb(kd)
        with learn.no_bar(): assert learn.lr_find(num_it=5, show_plot=False).valley > 0
        assert same_state(learn.model, found)
        best = learn.weight_finder(kd, weights=[0.5], temperatures=[2.,4.], lr=0.1)
        assert best.monitor == ('agreement' if valid else 'accuracy') and 'T' in best.means
        check = learn.distill_check(kd)
        assert same_state(learn.model, found) and 'nan' not in repr(check).lower()
        assert math.isnan(check.models.loc['student','valid_loss']) == valid
        assert check.terms['gradient norm'].tolist()[0] == 0 and check.terms['gradient norm'].tolist()[1] > 0

def test_weight_finder_needs_something_to_judge_by(teacher, tmp_path):
    dls = without(valid=True)
    rec = record_teacher(teacher, dls, tmp_path/'rec')
    with pytest.raises(ValueError, match='labels'): student(dls).weight_finder(kd_of(rec), lr=0.1)

@pytest.mark.parametrize('mix', [None,MixUp,CutMix])
@pytest.mark.parametrize('shuffle', [False,True])
def test_recordings(teacher, tmp_path, mix, shuffle):
    cbs = mix() if mix else None
    rec = record_teacher(teacher, without(shuffle=shuffle), tmp_path/'rec', n_epoch=2, cbs=cbs)
    learn,kd = student(without(shuffle=shuffle)),kd_of(rec)
    learn.fit(2, 0.1, cbs=[kd, *([mix()] if mix else [])])
    assert 'agreement' not in learn.recorder.metric_names and len(kd.losses['kd_loss']) == 6
    assert rec.header['any_order'] == (mix is None)

def test_a_recording_teaches_what_the_teacher_does(teacher, tmp_path):
    dls,runs = without(),[]
    rec = record_teacher(teacher, dls, tmp_path/'rec', dtype=torch.float32)
    for t in (teacher,rec):
        set_seed(1)
        learn = student(dls)
        learn.fit(2, 0.1, cbs=kd_of(t))
        runs.append(learn.model)
    for p,q in zip(*(m.parameters() for m in runs)): torch.testing.assert_close(p, q)

def test_features_alone(teacher):
    learn = QuietLearner(without(), net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit(2, 0.1, cbs=kd_of(teacher, Attention, ['0','1'], ['0','1']))
    assert 'agreement' not in learn.recorder.metric_names and len(learn.recorder.losses) == 6

def test_several_labels_and_values(teacher):
    learn = student(without(), loss_func=BCEWithLogitsLossFlat(), metrics=[])
    x = torch.stack([x for x,_ in data().valid.dataset])
    learn.dls = without(valid=True)
    learn.fit(1, 0.1, cbs=kd_of(teacher, MultiLabelSoftTarget))
    same = ((learn.model.eval()(x) > 0) == (teacher.eval()(x) > 0)).float().mean()
    assert learn.recorder.values[-1][-1] == pytest.approx(same.item())
    learn = student(without(valid=True), loss_func=MSELossFlat(), metrics=[])
    learn.fit(1, 0.1, cbs=kd_of(teacher, nn.MSELoss()))
    assert learn.recorder.metric_names[-2] == 'kd_loss'

def test_predictions_for_pixels(teacher):
    def seg(c): return nn.Conv2d(2, 3, c, padding=c//2)
    learn,t = QuietLearner(without(valid=True), seg(1), loss_func=CrossEntropyLossFlat(axis=1)),seg(3)
    learn.fit(1, 0.1, cbs=kd_of(t))
    x = torch.stack([x for x, in learn.dls.valid.dataset])
    assert learn.recorder.values[-1][-1] == pytest.approx((learn.model(x).argmax(1) == t(x).argmax(1)).float().mean().item())

def test_the_teacher_is_as_it_was_and_several_fits_follow_each_other(teacher):
    found,learn = state(teacher),student(without())
    teacher.train()
    for _ in range(2): learn.fit(1, 0.1, cbs=kd_of(teacher))
    assert same_state(teacher, found) and teacher.training and not n_hooks(teacher)
    learn.dls = data()
    learn.fit(1, 0.1, cbs=kd_of(teacher))
    assert 'agreement' not in learn.recorder.metric_names

def test_validation_in_the_middle_of_a_fit(teacher):
    class Look(Callback):
        def after_train(self):
            if self.learn.lock.locked(): return
            self.learn.get_preds(dl=self.dls.valid)
    learn = student(without())
    learn.fit(1, 0.1, cbs=[kd_of(teacher), Look()])
    assert 0 <= learn.recorder.values[-1][-1] <= 1

def test_ctrl_c_leaves_no_callback(teacher):
    class Stop(Callback):
        def before_validate(self): raise KeyboardInterrupt
    learn = student(without(), cbs=kd_of(teacher))
    n = len(learn.cbs)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 0.1, cbs=[MixUp(), Stop()])
    assert len(learn.cbs) == n and learn.metrics.attrgot('name') == ['accuracy'] and not n_hooks(teacher, learn.model)

def zipped(file):
    import zipfile
    with zipfile.ZipFile(file) as z: return [z.read(n) for n in z.namelist() if n.endswith('.pkl')]

def test_the_best_epoch_by_agreement_and_the_graph(teacher, tmp_path):
    learn = student(without(valid=True), path=tmp_path, metrics=[])
    learn.fit(2, 0.1, cbs=[kd_of(teacher), SaveModelCallback(monitor='agreement'), CSVLogger()])
    assert (tmp_path/'models/model.pth').exists() and 'agreement' in (tmp_path/'history.csv').read_text()

# some items have a label

def mixed(n=24, every=3, bs=8, shuffle=False):
    "Two of `every` items have no label"
    dls = data(n, bs)
    items = [(x,y if i%every == 0 else tensor(-100)) for i,(x,y) in enumerate(dls.train.dataset)]
    return loaders(items, list(dls.valid.dataset), bs, shuffle)

def test_the_task_sees_the_labelled_and_the_teacher_all(teacher):
    learn,kd = student(mixed(8), opt_func=SGD),kd_of(teacher, weight=0.7)
    before = deepcopy(learn.model)
    x,y = map(torch.stack, zip(*learn.dls.train.dataset))
    learn.fit(1, 0.1, wd=0., cbs=kd)
    pred = before(x)
    loss = 0.3*F.cross_entropy(pred[::3], y[::3]) + 0.7*SoftTarget()(pred, teacher.eval()(x))
    loss.backward()
    for p,q in zip(learn.model.parameters(), before.parameters()): torch.testing.assert_close(p, q - 0.1*q.grad)
    assert 'agreement' not in learn.recorder.metric_names

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(),nn.CrossEntropyLoss(label_smoothing=0.1),
                                       CrossEntropyLossFlat(weight=tensor(1.,2.,3.)),FocalLossFlat()])
def test_a_batch_with_no_label_has_a_task_loss_of_0(teacher, loss_func):
    items = [(x,tensor(-100)) for x,_ in data(8).train.dataset]
    learn,kd = student(loaders(items, list(data().valid.dataset), 8, False), opt_func=SGD, loss_func=loss_func),kd_of(teacher, weight=0.7)
    before = deepcopy(learn.model)
    x = torch.stack([x for x,_ in items])
    learn.fit(1, 0.1, wd=0., cbs=kd)
    (0.7*SoftTarget()(before(x), teacher.eval()(x))).backward()
    for p,q in zip(learn.model.parameters(), before.parameters()): torch.testing.assert_close(p, q - 0.1*q.grad, rtol=0, atol=1e-7)
    assert kd.losses['task_loss'] == [0.] and math.isfinite(learn.recorder.losses[0])

def test_other_ignored_labels(teacher):
    items = [(x,tensor(255)) for x,_ in data(8).train.dataset]
    learn,kd = student(loaders(items, list(data().valid.dataset), 8), loss_func=CrossEntropyLossFlat(ignore_index=255)),kd_of(teacher)
    learn.fit(1, 0.1, cbs=kd)
    assert kd.losses['task_loss'] == [0.]

def test_a_task_loss_that_knows_no_ignored_label(teacher):
    learn = student(mixed(), loss_func=LabelSmoothingCrossEntropyFlat())
    found = state(learn.model)
    with pytest.raises(ValueError, match='leaves out items without a label.*LabelSmoothing'): learn.fit(1, 0.1, cbs=kd_of(teacher))
    assert same_state(learn.model, found)
    student(data(), loss_func=LabelSmoothingCrossEntropyFlat()).fit(1, 0.1, cbs=kd_of(teacher))     # all have labels

@pytest.mark.parametrize('cbs', [[],[GradientAccumulation(16)],[MixUp()],[CutMix()]])
def test_mixed_batches_stay_finite(teacher, cbs):
    for loss in (SoftTarget,DecoupledKD,NormalizedKD):
        learn,kd = student(mixed(every=12, bs=4, shuffle=True)),kd_of(teacher, loss)
        learn.fit(2, 0.01, cbs=[kd, *cbs])
        assert np.isfinite(kd.losses['task_loss'] + kd.losses['kd_loss']).all()
        assert all(p.isfinite().all() for p in learn.model.parameters())

def test_losses_with_labels_leave_out_the_unlabelled(teacher):
    learn,kd = student(mixed(8), opt_func=SGD),kd_of(teacher, DecoupledKD, weight=1)
    before = deepcopy(learn.model)
    x,y = map(torch.stack, zip(*learn.dls.train.dataset))
    learn.fit(1, 0.1, wd=0., cbs=kd)
    loss = DecoupledKD()(before(x), teacher.eval()(x), y)
    loss.backward()
    for p,q in zip(learn.model.parameters(), before.parameters()): torch.testing.assert_close(p, q - 0.1*q.grad)

def test_concerns_leave_out_the_unlabelled(trained):
    "The teacher is right on the few that have a label"
    learn = student(mixed(96, 3, 96))
    warnings.filterwarnings('error', message='.*(teacher names|at the labels)')
    learn.fit(1, 0.1, cbs=kd_of(trained.model))
    items = [(x,tensor(-100)) for x,_ in data(64).train.dataset]
    learn = student(loaders(items, list(data().valid.dataset), 64))
    learn.fit(1, 0.1, cbs=kd_of(trained.model, DecoupledKD))

def test_check_of_a_first_batch_without_a_label(teacher):
    items = [(x,tensor(-100)) for x,_ in data(8).train.dataset]
    learn = student(loaders(items, list(data().valid.dataset), 8))
    assert 'nan' not in repr(learn.distill_check(kd_of(teacher))).lower()

# add_unlabelled

@pytest.fixture
def files(tmp_path):
    for i in range(24):
        c = ('cat','dog','')[i%3]
        Image.fromarray(np.full((12,12,3), 10*i, np.uint8)).save(tmp_path/f'{c or "some"}_{i}.png')
    return get_image_files(tmp_path).sorted()

def block(bs=6, **kw):
    return DataBlock((ImageBlock,CategoryBlock), get_y=lambda f: f.name[:3], splitter=IndexSplitter(range(4)), **kw)

def split(files): return files.filter(lambda f: 'some' not in f.name),files.filter(lambda f: 'some' in f.name)

def some(files, **kw):
    labelled,rest = split(files)
    return add_unlabelled(block().dataloaders(labelled, bs=4, num_workers=0, device='cpu', **kw), rest)

def test_added_items_join_the_training_set_alone(files):
    dls = some(files)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c, list(dls.vocab), dls.train.n) == (20,4,2,['cat','dog'],20)
    labels = torch.cat([y for _,y in dls.train.new(shuffle=False, drop_last=False)])
    assert (labels[:12] >= 0).all() and (labels[12:] == -100).all()
    assert torch.cat([y for _,y in dls.valid]).min() >= 0

def test_fits_with_added_items(files, tmp_path):
    dls = some(files)
    def m(): return nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 2))
    learn,kd = QuietLearner(dls, m(), metrics=accuracy),kd_of(m())
    learn.fit(2, 1e-3, cbs=kd)
    assert np.isfinite(kd.losses['task_loss']).all() and len(kd.losses['task_loss']) == 10
    learn.fit(1, 1e-3, cbs=kd_of(record_teacher(m(), dls, tmp_path/'rec')))

def test_an_export_has_no_trace_of_the_added_items(files, tmp_path):
    labelled,rest = split(files)
    dls = add_unlabelled(DataBlock((ImageBlock,CategoryBlock), get_y=first_letters, splitter=IndexSplitter(range(4)))
                         .dataloaders(labelled, bs=4, num_workers=0, device='cpu'), rest)
    dls = pickle.loads(pickle.dumps(dls))     # as a process that loads the data gets it
    assert len(dls.train_ds) == 20
    learn = QuietLearner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*12*12, 2)), metrics=accuracy, path=tmp_path)
    learn.export('student.pkl')
    assert b'fastdistill' not in b''.join(zipped(tmp_path/'student.pkl'))
    again = load_learner(tmp_path/'student.pkl')
    with again.no_bar(): assert again.predict(files[0])[0] in ('cat','dog')

def first_letters(f): return f.name[:3]

def test_an_export_in_the_middle_of_a_fit_has_no_trace(files, tmp_path):
    class MidFit(Callback):
        def after_validate(self): self.learn.export('student.pkl')
    dls = DataBlock(ImageBlock, splitter=IndexSplitter(range(4))).dataloaders(files, bs=4, num_workers=0, device='cpu')
    def m(): return nn.Sequential(nn.Flatten(), nn.Linear(3*12*12, 2))
    learn = QuietLearner(dls, m(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.fit(1, 1e-3, cbs=[kd_of(m()), MixUp(), MidFit()])
    assert 0 <= learn.recorder.values[-1][-1] <= 1
    assert b'fastdistill' not in b''.join(zipped(tmp_path/'student.pkl'))
    load_learner(tmp_path/'student.pkl')

def test_added_items_are_transformed_as_in_training(files):
    class OnlyTrain(Transform):
        split_idx = 0
        def encodes(self, x:Image.Image): return x.resize((6,6))
    labelled,rest = split(files)
    dls = block(item_tfms=OnlyTrain()).dataloaders(labelled, bs=4, num_workers=0, device='cpu')
    both = add_unlabelled(dls, rest)
    assert {tuple(x.shape[2:]) for x,_ in both.train.new(drop_last=False)} == {(6,6)}
    assert both.valid.one_batch()[0].shape[2:] == (12,12)

def test_workers(files):
    labelled,rest = split(files)
    dls = add_unlabelled(block().dataloaders(labelled, bs=4, num_workers=2, device='cpu'), rest)
    assert (torch.cat([y for _,y in dls.train]) == -100).any()

@pytest.mark.parametrize('labels', ['several','none','list'])
def test_what_nothing_can_be_added_to(files, labels):
    labelled,rest = split(files)
    blocks = dict(several=(ImageBlock,MultiCategoryBlock), none=ImageBlock).get(labels)
    dls = data() if blocks is None else DataBlock(blocks, get_y=(lambda f: [f.name[:3]]) if labels == 'several' else None,
                                                  splitter=IndexSplitter([0])).dataloaders(labelled, bs=4, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='Expected items of one class each'): add_unlabelled(dls, rest)

def test_nothing_to_add(files):
    dls = block().dataloaders(split(files)[0], bs=4, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match='got none'): add_unlabelled(dls, [])

def test_an_error_at_the_start_leaves_the_learner_as_it_was(teacher):
    "Bare tensors cannot be split into inputs and labels"
    dls = loaders([torch.randn(2, 8, 8) for _ in range(8)], [torch.randn(2, 8, 8) for _ in range(8)], 4)
    learn = learner(dls=dls)
    found = dict(vars(learn))
    with pytest.raises(ValueError, match='tuples'): learn.fit(1, cbs=KnowledgeDistillationCallback(teacher))
    assert '_with_events' not in vars(learn) and '_with_events' not in found
    assert [type(cb).__name__ for cb in learn.cbs] == [type(cb).__name__ for cb in found['cbs']]
