"The command as a user calls it: on the digits, on a folder of images, and on what it cannot use."
import inspect, math, os, re, subprocess, sys
from pathlib import Path
import numpy as np, onnxruntime as ort, pandas as pd, pytest, torch
from fastai.basics import Learner, load_learner, set_seed
from conftest import free_port
from PIL import Image
from torchvision import models
from fastdistill import cli
from fastdistill.budget import command
from fastdistill.budget.trials import Competition
from fastdistill.digits import digits_dls
from fastdistill.images import image_dls, image_teacher, plain_model
from test_images import images

tiny = ['--epochs','1','--seeds','1','--size','32','--bs','8']

pytestmark = pytest.mark.usefixtures('few_passes')

@pytest.fixture
def run(monkeypatch, capsys):
    "Function that runs the command in this process and returns what it prints"
    def _run(*args):
        monkeypatch.setattr(sys, 'argv', ['fastdistill', *map(str, args)])
        cli.main()
        return capsys.readouterr().out
    return _run

def test_digits(run, tmp_path):
    out = run('--epochs', 2, '--seeds', 2, '--out', tmp_path/'new'/'folder')
    files = {f.name for f in (tmp_path/'new'/'folder').iterdir()}
    assert files == {'results.csv','runs.csv','results.png','report.html','student-scratch.pkl','student-SoftTarget.pkl','student-Attention.pkl'}
    table,runs = (pd.read_csv(tmp_path/'new'/'folder'/f) for f in ('results.csv','runs.csv'))
    assert list(table.model) == ['teacher','student, scratch','student, SoftTarget','student, Attention']
    assert len(runs) == 3*2*2 and (table[['ms per item, batch of 1','ms per item, batch of 64','MB']] > 0).all(axis=None)
    last = runs[runs.epoch==2].groupby('method').accuracy
    for name in table.model[1:]:
        row = table.set_index('model').loc[name]
        assert row.accuracy == pytest.approx(last.get_group(name).mean(), abs=1e-6) and row['accuracy ±'] == pytest.approx(last.get_group(name).std(), abs=1e-6)
    assert 'gain in accuracy' in out and f'{table.accuracy[0]:.3f}' in out
    learn = load_learner(tmp_path/'new'/'folder'/'student-SoftTarget.pkl')
    with learn.no_bar(): assert learn.predict(np.zeros(65, dtype=np.float32))[0] in list('0123456789')

@pytest.fixture
def untrained_teacher(monkeypatch): monkeypatch.setattr('fastdistill.experiment.train_teacher', lambda learn, *args: learn)

@pytest.mark.slow
def test_onnx_and_int8(run, tmp_path, untrained_teacher):
    "Files of the distilled students, measured beside them; on the digits"
    out = run('--epochs', 1, '--seeds', 2, '--onnx', '--int8', '--out', tmp_path)
    names = ['student-SoftTarget','student-Attention']
    assert {f.name for f in tmp_path.glob('*.onnx')} == {f'{n}{s}.onnx' for n in names for s in ('','-int8')}
    table = pd.read_csv(tmp_path/'results.csv', index_col=0)
    assert list(table.index) == ['teacher','student, scratch',*(f'student, {m}{s}' for m in ('SoftTarget','Attention') for s in ('',', ONNX',', int8'))]
    assert table.loc['student, Attention, ONNX','MB'] == (tmp_path/'student-Attention.onnx').stat().st_size/1e6
    learn = load_learner(tmp_path/'student-Attention.pkl')
    x,y = digits_dls(200).valid.one_batch()
    assert table.loc['student, Attention, ONNX','accuracy'] == pytest.approx((learn.model.eval()(x).argmax(1) == y).float().mean().item(), abs=1e-6)     # of the first seed
    assert out.count('same decisions') == 4 and 'int8' in (tmp_path/'report.html').read_text(encoding='utf-8')

@pytest.mark.slow
def test_onnx_of_images(run, images, tmp_path):
    "Plain pixels go in; what cannot be exported is told, and the rest is written"
    out = run(images, '--from_scratch', '--teacher', 'resnet18', '--student', 'timm:test_resnet', '--onnx', '--out', tmp_path, *tiny)
    assert list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, SoftTarget','student, SoftTarget, ONNX']
    session = ort.InferenceSession(str(tmp_path/'student-SoftTarget.onnx'))
    i, = session.get_inputs()
    assert (i.name,i.type,i.shape[1:]) == ('pixels','tensor(uint8)',[32,32,3])
    probs, = session.run(None, {'pixels':np.zeros((5,32,32,3), np.uint8)})
    assert probs.shape == (5,2) and np.allclose(probs.sum(1), 1) and 'Largest difference' in out

def test_a_student_that_cannot_be_exported(run, tmp_path, monkeypatch, untrained_teacher):
    "Its results are written all the same"
    def export(*args, **kwargs): raise ValueError('no operator')
    monkeypatch.setattr('fastdistill.experiment.export_onnx', export)
    out = run('--epochs', 1, '--seeds', 1, '--onnx', '--out', tmp_path)
    assert out.count('no operator') == 2 and list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, SoftTarget','student, Attention']

def test_onnx_needs_its_packages(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(SystemExit, match=r"fastdistill: .*onnxruntime.*pip install 'fastdistill\[deploy\]'"): run('--onnx', '--out', tmp_path/'a')
    assert not (tmp_path/'a').exists()

@pytest.mark.slow
def test_several_processes(tmp_path):
    "Under `accelerate launch`: they train together, and the first alone prints and writes"
    pytest.importorskip('accelerate')
    launch = f'-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port {free_port()}'
    done = subprocess.run([sys.executable, *launch.split(), '-m', 'fastdistill', '--epochs', '2', '--seeds', '1', '--out', str(tmp_path)], capture_output=True, text=True,
                          timeout=300, env=dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))
    assert done.returncode == 0, done.stderr
    assert len(re.findall('SoftTarget, seed 0', done.stdout)) == 1 and done.stdout.count('Written to') == 1
    assert re.search(r'\[\d/2 ', done.stdout) and not re.search(r'\[\d/4 ', done.stdout)     # 200 images in batches of 50: two batches for each of two processes
    table = pd.read_csv(tmp_path/'results.csv')
    assert len(table) == 4 and table.accuracy[0] > 0.9

@pytest.mark.slow
def test_images_teacher_trained_here(run, images, tmp_path):
    out = run(images, '--from_scratch', '--teacher', 'resnet18', '--student', 'resnet18', '--out', tmp_path, *tiny)
    assert list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, SoftTarget']
    weights = torch.load(tmp_path/'teacher.pth', weights_only=True)
    assert image_teacher(image_dls(images, 32, 8), 'resnet18', tmp_path/'teacher.pth').model.state_dict().keys() == weights.keys()
    assert 'teacher: 1' in out and 'One seed says nothing' in out and 'accuracy ±' not in pd.read_csv(tmp_path/'results.csv')

@pytest.fixture
def more(tmp_path_factory):
    "Twelve images without labels, in folders that mean nothing"
    path = tmp_path_factory.mktemp('more')
    for i in range(12):
        (path/f'{i%2}'/'a').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (50,40), (20*i,0,0)).save(path/f'{i%2}'/'a'/f'{i}.png')
    return path

@pytest.mark.slow
def test_unlabelled_images(run, images, more, tmp_path, monkeypatch):
    "The distilled student alone trains on them, for as many steps as the others"
    seen = []
    fit = Learner.fit_one_cycle
    def spy(self, n_epoch, *args, **kw):
        if n_epoch > 0: seen.append((len(self.dls.train_ds), n_epoch*len(self.dls.train)))
        return fit(self, n_epoch, *args, **kw)
    monkeypatch.setattr(Learner, 'fit_one_cycle', spy)
    args = ['--from_scratch','--teacher','resnet18','--student','resnet18','--epochs','2','--seeds','1','--size','32','--bs','4','--loss','DecoupledKD']
    out = run(images, '--unlabelled', more, '--out', tmp_path, *args)
    assert seen == [(20,10), (20,15), (32,16)]     # teacher, student alone, student with teacher
    assert '12 images without labels' in out and 'trains for 3 epochs' in out
    assert list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, DecoupledKD']
    assert pd.read_csv(tmp_path/'runs.csv').groupby('method').epoch.max().to_dict() == {'student, DecoupledKD':2, 'student, scratch':3}
    load_learner(tmp_path/'student-DecoupledKD.pkl')

@pytest.mark.slow
@pytest.mark.parametrize('style', ['plain','learner'])
def test_images_teacher_from_a_file(run, images, tmp_path, style):
    file = tmp_path/'teacher.pth'
    set_seed(1)
    if style == 'plain':
        model = models.resnet18(num_classes=2)
        torch.save(model.state_dict(), file)
    else:
        from fastai.vision.all import vision_learner
        learn = vision_learner(image_dls(images, 32, 8), models.resnet18, pretrained=False)
        model,_ = learn.model,learn.save(file.with_suffix('').absolute())
    loaded = image_teacher(image_dls(images, 32, 8), 'resnet18', file).model
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in loaded.state_dict().items())
    layers = 'layer1,layer2' if style == 'plain' else '0.4,0.5'
    out = run(images, '--teacher=resnet18', '--teacher_weights', file, '--loss', 'Attention', '--student_layers', 'layer1,layer2',
              '--teacher-layers', layers, '--weight', 10, '--task_weight=1', '--out', tmp_path, *tiny)
    assert list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, Attention']
    assert 'teacher:' not in out     # not trained again

@pytest.mark.slow
def test_budget(run, images, tmp_path):
    "Students are measured first; the best of those that fit is trained in full and written"
    pytest.importorskip('optuna_integration')
    args = images,'--teacher','resnet18','--from_scratch','--max-mb','7','--students','shufflenet_v2_x0_5,resnet18','--out',tmp_path,*tiny
    out = run(*args)
    table = pd.read_csv(tmp_path/'students.csv', index_col='student')
    assert table['left out']['resnet18'] == '44.7 MB > 7 MB' and math.isnan(table.accuracy['resnet18']) and table.accuracy['shufflenet_v2_x0_5'] >= 0
    assert list(pd.read_csv(tmp_path/'results.csv').model) == ['teacher','student, scratch','student, SoftTarget']
    assert {'trials.csv','budget.png','budget.html','report.html','student-SoftTarget.pkl','teacher.pth'} <= {f.name for f in tmp_path.iterdir()}
    assert out.index('1 of 2 students fit 7 MB') < out.index('teacher:') < out.index('2 of 2: shufflenet_v2_x0_5, SoftTarget, weight 0.') < out.index('Written to')
    assert '2 of 2 short fits were made before' in run(*args, '--teacher_weights', tmp_path/'teacher.pth')

def test_budget_stopped(run, images, tmp_path, monkeypatch, capsys):
    pytest.importorskip('optuna_integration')
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(Competition, '__len__', stop)
    with pytest.raises(SystemExit): run(images, '--teacher', 'resnet18', '--from_scratch', '--max_mb', 7, '--students', 'shufflenet_v2_x0_5', '--out', tmp_path, *tiny)
    assert re.search(r'Written to .*search, teacher.pth. The teacher is trained: go on with --teacher_weights', capsys.readouterr().err)

@pytest.mark.slow
def test_budget_for_digits(run, tmp_path, monkeypatch):
    pytest.importorskip('optuna_integration')
    monkeypatch.setattr(command, 'train_teacher', lambda learn, *args: learn)
    run('--max_mb', '0.01', '--epochs', 1, '--seeds', 1, '--out', tmp_path)
    table = pd.read_csv(tmp_path/'students.csv', index_col='student')
    assert table['left out'].isna().tolist() == [True,True,True,False,False] and table.accuracy.notna().tolist() == [True,True,True,False,False]

def test_help():
    "The installed command, as a process of its own, explains each option"
    res = subprocess.run([Path(sys.executable).parent/'fastdistill', '--help'], capture_output=True, text=True, check=True)
    for name in inspect.signature(cli.fastdistill).parameters: assert re.search(rf'{name}.*  [A-Z]', res.stdout.replace('-', '_'))

@pytest.fixture
def no_images(tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'one'/'cat').mkdir(parents=True)
    Image.new('RGB', (8,8)).save(tmp_path/'one'/'cat'/'1.png')
    torch.save(models.resnet18(num_classes=5).state_dict(), tmp_path/'five.pth')
    torch.save(models.resnet18(num_classes=2), tmp_path/'pickle.pth')
    (tmp_path/'text.pth').write_text('no weights')
    def draw(folder, n):
        (tmp_path/folder).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (8,8)).save(tmp_path/folder/f'{i}.png')
    for c in ('red','blue'):
        for folder in ('no_valid','only_valid'): draw(f'{folder}/train/{c}', 4)
        draw(f'only_valid/valid/{c}', 4)
        draw(f'single/{c}', 4)
    (tmp_path/'no_valid'/'valid').mkdir()
    for c in ('green','white'): draw(f'only_valid/valid/{c}', 2)
    for i in range(8): draw(f'single/{i}', 1)
    draw('unreadable', 1)
    (tmp_path/'unreadable'/'bad.png').write_text('no image')
    return tmp_path

@pytest.mark.parametrize('args,msg', [
    (['nowhere'], 'nowhere: no such folder'),
    (['{bad}/empty'], 'no images in it'),
    (['{bad}/one'], "images of one class only, 'cat'"),
    (['{ok}','--bs','64'], '20 images to train on do not fill a batch of 64'),
    (['{ok}','--bs','8','--from_scratch','--teacher','vit_b_16'], 'no pooling layer'),
    (['{ok}','--bs','8','--unlabelled','nowhere'], 'nowhere: no such folder'),
    (['{ok}','--bs','8','--unlabelled','{bad}/no_valid/valid'], 'valid: no images in it. Expected images without labels'),
    (['{ok}','--bs','8','--unlabelled','{ok}'], 'of its images are also among the labelled ones'),
    (['{ok}','--bs','8','--unlabelled','{ok}/valid/red'], '10 of its images are also among the labelled ones'),
    (['{ok}','--bs','8','--unlabelled','{bad}/unreadable'], '1 of 2 images cannot be read, such as .*bad.png'),
    (['{ok}','--bs','8','--max_mb','0.1'], 'None of 8 students can be used. Nearest is shufflenet_v2_x0_5 with .* over the budget'),
    (['{ok}','--bs','8','--max_mb','9','--students','resnte18'], "Unknown torchvision model 'resnte18'"),
    (['{ok}','--bs','8','--max_mb','9','--student','resnet18'], 'student: not with a budget'),
    (['{ok}','--bs','8','--students','resnet18'], 'students: only with a budget, --max_ms or --max_mb'),
    (['{ok}','--bs','8','--max_ms','0'], 'Expected max_ms to be above 0'),
    (['{ok}','--bs','8','--max_mb','9','--loss','SoftTarget,SoftTargets'], "Unknown loss 'SoftTargets'"),
    (['--max_mb','1','--students','a'], 'students: only for a folder of images'),
    (['{ok}','--teacher','resnet43'], "Unknown torchvision model 'resnet43'. Nearest: resnet34"),
    (['{ok}','--student','resnte18'], "Unknown torchvision model 'resnte18'. Nearest: resnet18"),
    (['{ok}','--loss','SoftTargets'], "Unknown loss 'SoftTargets'. Nearest: SoftTarget"),
    (['{ok}','--teacher','resnet18','--teacher_weights','{bad}/five.pth'], 'weights do not fit resnet18 .*size mismatch for fc.weight'),
    (['{ok}','--teacher','resnet34','--teacher_weights','{bad}/five.pth'], 'weights do not fit resnet34'),
    (['{ok}','--teacher','resnet18','--teacher_weights','{bad}/pickle.pth'], 'no file of weights'),
    (['{ok}','--teacher','resnet18','--teacher_weights','{bad}/text.pth'], 'no file of weights'),
    (['{ok}','--teacher','resnet18','--teacher_weights','{bad}/none.pth'], 'no such file of weights'),
    (['{ok}','--from_scratch','--loss','Attention'], 'compares features'),
    (['{ok}','--from_scratch','--loss','Attention','--student_layers','layer9','--teacher_layers','0.4'], "student ResNet has no layer 'layer9'.*layer1"),
    (['{ok}','--from_scratch','--loss','Attention','--student_layers','layer1','--teacher_layers','0.44'], "teacher Sequential has no layer '0.44'.*0.4"),
    (['{ok}','--from_scratch','--temperature','0'], 'T=0'),
    (['{ok}','--from_scratch','--loss','HardTarget','--temperature','2'], 'HardTarget has no temperature'),
    (['{ok}','--from_scratch','--weight','2'], 'at most 1'),
    (['--teacher','resnet18','--loss','Logits'], 'loss, teacher: only for a folder of images'),
    (['--epochs','0'], 'epochs to be at least 1'),
    (['{ok}','--lr','0'], 'lr to be above 0'),
    (['{ok}','--from_scratch','--student','googlenet'], 'The student googlenet cannot be trained on batches of shape .8, 3, 32, 32.: .*GoogLeNetOutputs'),
    (['{ok}','--from_scratch','--student','vit_b_16'], 'The student vit_b_16 cannot be trained on .*: Wrong image height! Expected 224 but got 32!'),
    (['{ok}','--from_scratch','--teacher','resnet18','--loss','Attention','--student_layers','fc','--teacher_layers','0.4'], 'The student resnet18 with Attention .*: Expected .*'),
    (['{ok}','--valid_pct','-0.5'], 'valid_pct to be above 0 and below 1.* got -0.5'),
    (['{ok}/train','--bs','4','--valid_pct','0'], 'valid_pct to be above 0'),
    (['{ok}/train','--bs','4','--valid_pct','20'], 'valid_pct to be above 0'),
    (['{ok}/train','--bs','4','--valid_pct','0.01'], 'no images to validate on. Give a larger --valid_pct'),
    (['{bad}/no_valid','--bs','4'], 'no images to validate on. Expected some in its folder valid'),
    (['{bad}/only_valid','--bs','4'], 'images of green, white to validate on, but none to train on. Expected the same classes in train and valid'),
    (['{bad}/single','--bs','4','--valid_pct','0.5'], 'to validate on, but none to train on. Add images'),
])
def test_bad_input(args, msg, images, no_images, monkeypatch):
    def trained(*_, **__): raise AssertionError('something was trained')
    monkeypatch.setattr(Learner, 'fit_one_cycle', trained)
    monkeypatch.setattr(torch.nn.init, 'trunc_normal_', lambda *_, **__: None)     # with which googlenet takes long
    args = [a.format(ok=images, bad=no_images) for a in args] + (['--bs','8','--size','32'] if '{ok}' in args and '--bs' not in args else [])
    monkeypatch.setattr(sys, 'argv', ['fastdistill', *args, '--out', str(no_images/'out')])
    with pytest.raises(SystemExit, match=f'(?s)fastdistill: .*{msg}') as e: cli.main()
    assert all(l.startswith('More: http') for l in str(e.value).splitlines()[1:]) and not (no_images/'out').exists()

# the output folder

def test_a_folder_that_cannot_be_written_to(run, tmp_path, monkeypatch):
    "Is found out before anything is trained, and what was there stays"
    def trained(*_, **__): raise AssertionError('something was trained')
    monkeypatch.setattr(cli, 'distill_digits', trained)
    (tmp_path/'file').write_text('mine')
    for out in (tmp_path/'file',tmp_path/'file'/'new'):
        with pytest.raises(SystemExit, match=f'fastdistill: {out}: cannot be written to .*--out'): run('--out', out)
    def denied(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(cli.tempfile, 'TemporaryFile', denied)
    with pytest.raises(SystemExit, match='cannot be written to .Permission denied.. Give another folder with --out'): run('--out', tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['file']

def interrupt(*_, **__): raise KeyboardInterrupt()

def test_ctrl_c_says_what_is_there(run, images, tmp_path, monkeypatch, capsys):
    "In one line, with the way to go on; files of an earlier run are not meant"
    monkeypatch.setattr('fastdistill.images.train_students', interrupt)
    (tmp_path/'results.csv').write_text('old')
    with pytest.raises(SystemExit) as e: run(images, '--from_scratch', '--teacher', 'resnet18', '--out', tmp_path, *tiny)
    said = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 130 and said == f'fastdistill: Stopped. Written to {tmp_path}/: teacher.pth. The teacher is trained: go on with --teacher_weights {tmp_path/"teacher.pth"}.'

def test_ctrl_c_with_nothing_written(run, tmp_path, monkeypatch, capsys):
    "Folders that were made for nothing go, those that were there stay"
    (tmp_path/'mine').mkdir()
    monkeypatch.setattr(cli, 'distill_digits', interrupt)
    for out in ('mine','mine/new/er'):
        with pytest.raises(SystemExit): run('--out', tmp_path/out)
        assert capsys.readouterr().err == f'fastdistill: Stopped. Written to {tmp_path/out}/: nothing. Start again to get results.\n'
    assert list(tmp_path.rglob('*')) == [tmp_path/'mine']

@pytest.mark.slow
def test_a_reader_that_goes(tmp_path):
    "`| head -1`: one message, no empty folder"
    script = ("from fastdistill import cli, experiment; "
              "cli.distill_digits = lambda: [experiment.print_once('x'*1000) for _ in range(1000)]; cli.main()")
    process = subprocess.Popen([sys.executable, '-c', script, '--out', str(tmp_path/'new')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONWARNINGS='ignore'))
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().splitlines()
    assert process.wait(timeout=60) == 130 and said[-1].startswith('fastdistill: Stopped.') and not any('Traceback' in l or 'BrokenPipe' in l for l in said)
    assert not list(tmp_path.iterdir())

@pytest.mark.slow
def test_timm(run, images, tmp_path):
    pytest.importorskip('timm', reason='timm is not installed')
    run(images, '--from_scratch', '--teacher', 'timm:resnet18', '--student', 'timm:resnet10t', '--out', tmp_path, *tiny)
    with pytest.raises(ValueError, match="Unknown timm model 'resnet18x'"): plain_model('timm:resnet18x', 2)
