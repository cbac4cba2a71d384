"Looking closer after a fit: tables and pictures against plain computations, and nothing changed."
from copy import deepcopy
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL
from matplotlib.text import Text
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDL
from conftest import data, learner, loaders, net
from fastdistill.interpret import DistillationInterpretation
from fastdistill.report import write_report
from test_compare import answers, learners, unchanged

@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close('all')

def test_looking_changes_nothing(learners, tmp_path):
    teacher,student,scratch = learners['teacher'],learners['distilled'][0],learners['scratch'][0]
    with unchanged(learners, tmp_path):
        interp = DistillationInterpretation.from_learners(teacher, student, scratch)
        interp.plot_disagreements(2), interp.plot_attention([0], '0', '0'), interp.per_class()

def test_nothing_to_look_at():
    with pytest.raises(ValueError, match='empty loader'):
        DistillationInterpretation.from_learners(net(), learner(), dl=TfmdDL([], bs=8, num_workers=0, do_setup=False))

@pytest.mark.parametrize('default', [torch.float32,torch.float64])
def test_double_precision(default):
    "Models and inputs in float64, whatever the default is"
    items = [(x.double(), y) for x,y in data().train_ds]
    torch.set_default_dtype(default)
    try:
        a,b = (learner(net(w).double(), loaders(items, items, 8)) for w in (8,4))
        interp = DistillationInterpretation.from_learners(a, b)
        interp.plot_attention([0], '0', '0')
    finally: torch.set_default_dtype(torch.float32)
    with torch.no_grad(): logits = b.model.eval()(torch.stack([x for x,_ in items]))
    assert torch.allclose(interp.logits['student'], logits.float(), atol=1e-6)

def test_interpretation_against_plain_computations(learners):
    teacher,student,scratch = learners['teacher'],learners['distilled'][0],learners['scratch'][0]
    interp = DistillationInterpretation.from_learners(teacher, student, scratch)
    (t,y),(s,_),(a,_) = map(answers, (teacher,student,scratch))
    p,q = (o.softmax(1).numpy() for o in (t,s))
    kl = (p*np.log(p/q)).sum(1)
    found = interp.disagreements()
    assert found.item.tolist() == np.argsort(-kl).tolist() and found.KL.tolist() == pytest.approx(sorted(kl, reverse=True), abs=1e-4)
    assert found.label.tolist() == [str(y[i].item()) for i in found.item] and found.student.tolist() == [str(q[i].argmax()) for i in found.item]
    matrix = interp.agreement_matrix()
    for i in range(3):
        for j in range(3): assert matrix.iat[i,j] == ((p.argmax(1) == i) & (q.argmax(1) == j)).sum()
    table = interp.per_class()
    for c,row in table.iterrows():
        here = y == int(c)
        assert row['items'] == here.sum() and row.student == pytest.approx((s[here].argmax(1) == y[here]).float().mean().item())
        assert row.gain == pytest.approx(row.student - (a[here].argmax(1) == y[here]).float().mean().item())
    assert torch.allclose(interp.probabilities(4)['teacher'], (t/4).softmax(1), atol=1e-6)
    assert interp.top_losses(1)[0].item() == pytest.approx(F.cross_entropy(s, y, reduction='none').max().item(), abs=1e-5)

def test_pictures_show_what_they_say(learners):
    interp = DistillationInterpretation.from_learners(learners['teacher'].model, learners['distilled'][0])     # a module does as well
    fig = interp.plot_dark_knowledge([3,1], T=2)
    bars = {c.get_label():[b.get_height() for b in c] for c in fig.axes[1].containers}
    assert list(bars) == ['teacher','student'] and bars['student'] == pytest.approx(interp.probabilities(2)['student'][3].tolist())
    fig = interp.plot_attention([0,2], ['0','1'], ['0','1'])
    x = learners['teacher'].dls.valid.one_batch()[0]
    with torch.no_grad(): features = learners['teacher'].model[0](x[[0,2]])
    assert np.allclose(fig.axes[1].images[0].get_array(), (features[0]**2).mean(0), atol=1e-5) and fig.axes[2].get_title() == 'student 0'
    bars = {c.get_label():[b.get_height() for b in c] for c in interp.plot_per_class().containers}
    assert bars == {k:interp.per_class()[k].tolist() for k in ('teacher','student')}
    assert interp.plot_agreement().get_xlabel() == 'student says'
    with pytest.raises(ValueError, match='from 0 to 15'): interp.plot_dark_knowledge([16])
    with pytest.raises(ValueError, match='as many student layers'): interp.plot_attention([0], ['0','1'], ['0'])
    with pytest.raises(ValueError, match='Expected images'): interp.plot_attention([0], ['4'], ['4'])

def interpretation(teacher, student, targ, vocab=None):
    "One of these answers, given as logits"
    interp = DistillationInterpretation.__new__(DistillationInterpretation)
    interp.logits,interp.targ,interp.ignore,interp.vocab = dict(teacher=teacher, student=student),targ,-100,vocab
    return interp

def test_many_classes():
    "Of 1,000 those that are confused most: a small picture"
    n,gen = 1000,np.random.RandomState(0)
    pairs = gen.permutation(n)[:24].reshape(12,2)     # (what the teacher says, what the student says)
    t = np.concatenate([np.arange(n), np.repeat(pairs[:,0], 3)])
    s = np.concatenate([np.arange(n), np.repeat(pairs[:,1], 3)])
    interp = interpretation(*(F.one_hot(torch.tensor(o), n).float() for o in (t,s)), torch.tensor(t), [f'class {i}' for i in range(n)])
    ax = interp.plot_agreement(most=24)
    shown = sorted(pairs.flatten())
    for names in (ax.get_xticklabels(), ax.get_yticklabels()): assert [o.get_text() for o in names] == [f'class {i}' for i in shown]
    want = [[((t == a) & (s == b)).sum() for b in shown] for a in shown]
    assert np.allclose(np.expm1(ax.images[0].get_array()), want) and ax.get_title() == 'The 24 of 1000 classes that they confuse most'
    assert {(int(o.get_position()[1]), int(o.get_position()[0]), int(o.get_text())) for o in ax.texts} == {(i, j, want[i][j]) for i in range(24) for j in range(24) if want[i][j]}
    ax = interp.plot_per_class(most=12)
    assert [o.get_text() for o in ax.get_xticklabels()] == [f'class {i}' for i in sorted(pairs[:,0])]
    for fig in plt.get_fignums(): assert max(plt.figure(fig).get_size_inches()) < 15

def test_names_are_no_formulas(tmp_path):
    "Classes, items and layers whose names Matplotlib takes for formulas are drawn as they are, also in axes of the user's"
    names = [r'$\frac$','$5 or $6','a_b']
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.add_module('$\\frac$', net(4)[0]); self.head = nn.Sequential(nn.Flatten(), nn.Linear(64,3))
        def forward(self, x): return self.head(self._modules['$\\frac$'](x))
    learn = learner(Odd())
    interp = DistillationInterpretation.from_learners(Odd(), learn)
    interp.vocab = names
    axes = [plt.subplots()[1] for _ in range(2)]
    figs = [interp.plot_agreement().figure, interp.plot_per_class().figure, interp.plot_agreement(axes[0]).figure, interp.plot_per_class(axes[1]).figure,
            interp.plot_disagreements(2), interp.plot_attention([0], '$\\frac$', '$\\frac$')]
    write_report(tmp_path/'report.html', names[0], [(names[0], fig, names[0]) for fig in figs])
    assert (tmp_path/'report.html').read_text(encoding='utf-8').count('<img') == 6
    for fig in figs: assert not any(t.get_parse_math() for t in fig.findobj(Text) if '$' in t.get_text())     # as they were drawn
    assert [o.get_text() for o in axes[0].get_xticklabels()] == [o.get_text() for o in axes[1].get_xticklabels()] == names

def test_interpretation_of_images(tmp_path):
    "Items that are decoded, with names of classes"
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, imagenet_stats, vision_learner
    from PIL import Image
    from torchvision.models import resnet18
    for i in range(24):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (40,40,3), dtype=np.uint8)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.5, seed=0, bs=4, item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    teacher,student = vision_learner(dls, resnet18, pretrained=False),Learner(dls, resnet18(num_classes=2))
    interp = DistillationInterpretation.from_learners(teacher, student)
    fig = interp.plot_disagreements(5)
    image,items = np.asarray(fig.axes[0].images[0].get_array()),interp.disagreements(5)
    file = dls.valid.items[items.item[0]]
    assert abs(image/255 - np.asarray(Image.open(file).resize((32,32), Image.BILINEAR))/255).mean() < 0.02     # decoded
    assert fig.axes[0].get_title() == f'item {items.item[0]}: {file.parent.name}' and set(items.teacher) <= {'a','b'}

class Noisy:
    "Items that are drawn anew each time, as augmentations draw them"
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i][0] + torch.randn(2,8,8), self.items[i][1]

class WritesOver(nn.Sequential):
    def forward(self, x): return super().forward(x.mul_(2))

@pytest.mark.parametrize('kind', ['fastai','pytorch'])
def test_all_models_answer_the_same_items(kind):
    "Three copies of one network agree on a loader that shuffles and augments, and pictures belong to the answers"
    items,model = list(data().train_ds),WritesOver(net(4))
    dls = loaders(Noisy(items), Noisy(items), 10, drop_last=True) if kind == 'fastai' else DataLoaders(*[TorchDL(Noisy(items), 10, shuffle=True)]*2)
    teacher,student,scratch = (learner(deepcopy(model), data()) for _ in range(3))
    student.dls = dls
    interp = DistillationInterpretation.from_learners(teacher, student, scratch, dl=dls.train)
    assert interp.targ.tolist() == [y.item() for _,y in items]
    for k in ('teacher','scratch'): assert torch.equal(interp.logits[k], interp.logits['student'])
    fig = interp.plot_dark_knowledge([17,3])
    (x,),_ = interp.items([17,3])
    with torch.no_grad(): assert torch.allclose(model.eval()(x.clone()), interp.logits['student'][[17,3]], atol=1e-5)
    assert np.allclose(fig.axes[2].images[0].get_array(), x[1].mean(0)) and fig.axes[2].get_title() == f'item 3: {items[3][1]}'

def test_labels_in_a_column_and_labels_that_do_not_count():
    "As tables have them; the loss function says which label it ignores, and items with it are in no accuracy"
    for ignore in (-100, 1):
        items = [(x, torch.tensor([-100 if i == 5 and ignore < 0 else y])) for i,(x,y) in enumerate(data().train_ds)]
        y = torch.cat([y for _,y in items]).numpy()
        learn = learner(net(4), loaders(items, items, 8))
        learn.loss_func = CrossEntropyLossFlat(ignore_index=ignore)
        interp = DistillationInterpretation.from_learners(net(8), learn)
        logits = interp.logits['student']
        p,table = logits.softmax(1).double().numpy(),interp.per_class()
        assert table.index.tolist() == [str(c) for c in range(3) if c != ignore]
        for c,row in table.iterrows(): assert row['items'] == (y == int(c)).sum() and row.student == pytest.approx((p.argmax(1) == y)[y == int(c)].mean())
        want = [0 if c == ignore else -np.log(p[i,c]) for i,c in enumerate(y)]
        assert interp.losses.tolist() == pytest.approx(want, abs=1e-5)
        found = interp.disagreements()
        assert len(found) == 24 and found.label.tolist() == ['' if y[i] == ignore else str(y[i]) for i in found.item]
        assert interp.plot_dark_knowledge([int(np.argmax(y == ignore))]).axes[0].get_title().endswith(': ')

def test_interpretation_needs_classes():
    items = [(torch.randn(6), torch.rand(3)) for _ in range(32)]
    learn = Learner(loaders(items, items, 16), nn.Linear(6, 3), loss_func=nn.MSELoss())
    learn.loss_func.reduction = 'mean'
    with pytest.raises(ValueError, match='one class for each item'): DistillationInterpretation.from_learners(deepcopy(learn), learn)
