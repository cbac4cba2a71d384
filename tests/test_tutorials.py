"The code of the pages with long experiments, on a handful of made images in the layout of their data."
import re, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
import matplotlib.pyplot as plt
import nbformat, numpy as np, pandas as pd, pytest, torch
from fastai.data.external import fastai_cfg
from PIL import Image

pages = Path(__file__).parents[1]/'nbs/tutorials'

pytestmark = pytest.mark.usefixtures('few_passes')

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder for fastai's data, in place of the user's"
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    monkeypatch.chdir(pages)
    fastai_cfg.cache_clear()
    yield tmp_path/'data'
    fastai_cfg.cache_clear()
    plt.close('all')

def save(file, size, mode='RGB', rng=np.random.RandomState(0)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.randint(0, 256, (size,size,3) if mode == 'RGB' else (size,size), dtype=np.uint8)).save(file)

def run(name, changes, without_network=()):
    "Run the page's cells; each of `changes` has to be found. Cells that need a network run where `without_network` says how"
    names,missing = {},set(changes)
    for c in nbformat.read(pages/f'{name}.ipynb', 4).cells:
        if c.cell_type != 'code' or '#| eval: false' in c.source and not any(o in c.source for o in without_network): continue
        source = c.source
        for old,new in changes.items():
            if old in source:
                source = source.replace(old, new)
                missing.discard(old)
        if source.startswith('%%writefile'):
            line,_,text = source.partition('\n')
            Path(line.split()[1].format(**names)).write_text(text, encoding='utf-8')
        else: exec(compile(source, f'{name}.ipynb', 'exec'), names)
    assert not missing
    return names

def check(names, n_methods, *metrics):
    assert len(names['results']) == n_methods
    for o in names['results'].values(): assert set(o) == set(metrics) and all(0 <= v <= 1 for v in o.values())
    for name,learn in names['learners'].items(): assert torch.tensor(learn.recorder.values).isfinite().all(), name
    assert set(names['runs'].method) == set(names['results']) and {0,1,2} <= set(names['runs'].seed)     # the stored results are this page's, of three seeds

@pytest.mark.slow
def test_pets(home, monkeypatch):
    for i in range(42):
        save(home/'oxford-iiit-pet/images'/f'Cat_{i}.jpg', 70)
        save(home/'oxford-iiit-pet/images'/f'dog_{i}.jpg', 70)
    from torchvision.models import resnet34
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: resnet34().state_dict())
    names = run('pets', {'n_epoch,teacher_epochs = 10,40':'n_epoch,teacher_epochs = 1,1', 'fit_one_cycle(10,':'fit_one_cycle(1,'}, ['vision_learner(dls, resnet34, metrics'])
    check(names, 5, 'accuracy')

def test_mnist(home):
    for split,n in ('training',14),('testing',3):
        for i in range(10*n): save(home/'mnist_png'/split/f'{i%10}'/f'{i}.png', 28, 'L')
    check(run('mnist', {'net = cnn(a, b)':'net = cnn(a//8, b//8)'}), 7, 'accuracy')

@pytest.mark.slow
def test_beans(home, monkeypatch):
    class Split(list): features = dict(labels=SimpleNamespace(names=['angular_leaf_spot','bean_rust','healthy']))
    def load_dataset(name): return {s:Split(dict(labels=i%3, image=Image.new('RGB', (60,60), (i,2*i,3*i))) for i in range(n)) for s,n in (('train',33),('validation',6),('test',6))}
    hub = ModuleType('datasets')
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, 'datasets', hub)
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3))
    monkeypatch.setattr(AutoModelForImageClassification, 'from_pretrained', lambda name: vit)
    names = run('beans', {'n_epoch,size = 30,96':'n_epoch,size = 2,32', 'hidden_sizes=[64,128,256,512]':'hidden_sizes=[8,8,8,8]'}, ['load_dataset','AutoModel'])
    check(names, 3, 'accuracy', 'f1')
    assert list((names['distilled'].path/'logs').iterdir())
    names['distilled'].fit(1, cbs=names['KnowledgeDistillationCallback'](names['Teacher'](vit, input_tfm=lambda x: torch.nn.functional.interpolate(x, size=224))))

def test_out_of_the_door(home):
    "The program itself runs in tests/test_deploy_export.py where PyTorch cannot be imported"
    for i in range(42):
        for name in ('Cat','dog'): save(home/f'oxford-iiit-pet/images/{name}_{i}.jpg', 70)
    changes = {'= 10,5,3':'= 1,1,1', "Path('out_of_the_door')":f"Path({str(home.parent/'door')!r})"}
    names = run('out_of_the_door', changes)
    assert list(names['table'].index) == ['teacher','alone','distilled','ONNX','int8'] and (names['table'].MB > 0).all()
    assert names['table'].accuracy['ONNX'] == pytest.approx(names['table'].accuracy['distilled'])
    assert len(names['said']['student0-int8.onnx']) == 16 and not names['folder'].exists()

@pytest.mark.parametrize('name', ['pets','mnist','beans'])
def test_the_command_that_runs_a_page_finds_its_students(name, monkeypatch):
    monkeypatch.syspath_prepend(pages.parents[1]/'benchmarks')
    from tutorial import cells_of
    before,students,after = ([c.source for _,c in part] for part in cells_of(nbformat.read(pages/f'{name}.ipynb', 4)))
    assert students[0] == 'seed = 0' and sum('set_seed(seed)' in s for s in students) >= 2 and students[-1].startswith('results = ')
    assert any('teacher.fit' in s for s in before) and after[0].startswith('runs = ')
    assert not any('set_seed(seed)' in s for s in before+after)

@pytest.mark.parametrize('name,row,teacher,students', [
    ('pets', 'tutorials/pets.html', 'teacher', ['from scratch','SoftTarget','Attention, weight 1000']),
    ('mnist', 'tutorials/mnist.html', 'teacher', ['scratch','distilled']),
    ('mnist', '| the same networks', 'better teacher', ['scratch, one cycle','distilled, better teacher, one cycle']),
    ('beans', 'tutorials/beans.html', 'teacher', ['from scratch','SoftTarget, T=5']),
    ('cifar100_cpu', 'tutorials/cifar100.html', 'teacher', ['student alone','SoftTarget','DIST']),
])
def test_the_front_page_shows_the_stored_results(name, row, teacher, students):
    root = pages.parents[1]
    runs = pd.read_csv(root/f'benchmarks/{name}.csv')
    if 'weight_of' in runs: runs = runs[runs.weight_of != 'weight_finder']
    accuracies = runs.groupby('method').accuracy
    mean,std = accuracies.mean(),accuracies.std()
    line = next(l for l in (root/'README.md').read_text().splitlines() if row in l)
    assert re.findall(r'\d\.\d{3}(?: ± \d\.\d{3})?', line) == [f'{mean[teacher]:.3f}', *(f'{mean[s]:.3f} ± {std[s]:.3f}' for s in students)]

def test_the_front_page_shows_the_leaves_with_few_labels():
    root = pages.parents[1]
    runs = pd.read_csv(root/'benchmarks/beans_settings.csv')
    runs['accuracy'] = (133*runs.valid + 128*runs.test)/261
    few = runs[runs.group == '10 % of the labels'].groupby('method').accuracy
    teacher = runs[(runs.group == 'teachers') & (runs.seed == 0)].accuracy.item()     # the one that answers alone
    line = next(l for l in (root/'README.md').read_text().splitlines() if "a tenth of its teacher's 1,034 labels" in l)
    shown = [f'{few.mean()[m]:.3f} ± {few.std()[m]:.3f}' for m in ('alone','SoftTarget, T=4')]
    assert re.findall(r'\d\.\d{3}(?: ± \d\.\d{3})?', line) == [f'{teacher:.3f}', *shown] and (few.count() == 5).all()

@pytest.mark.parametrize('run,other,least,most', [
    ('cats_and_dogs_first', 'alone, fixed images', 1/5, .335),
    ('cats_and_dogs', 'alone, fixed images', 1/5, .335),
    ('cats_and_dogs', 'alone, fixed images, 4 epochs', .63, .7)])
def test_the_front_page_says_how_soon_a_student_is_as_good(run, other, least, most):
    "Of the time of the student alone, the recording included, until the student with a teacher is as good for the rest of its fit"
    root = pages.parents[1]
    means = pd.read_csv(root/f'benchmarks/{run}.csv').groupby(['method','epoch'])[['seconds','accuracy']].mean()
    alone,both = (means.loc[m] for m in (other,'Attention and SoftTarget, fixed images, 4 epochs'))
    good = both.accuracy >= alone.accuracy.iloc[-1]
    until = both.seconds[good & good[::-1].cummin()[::-1]].iloc[0]
    assert least < (until + means.seconds['recording, middle'].item())/alone.seconds.iloc[-1] < most
    text = (root/'README.md').read_text()
    assert 'a third of the time or less' in text and 'two thirds of the time' in text
