"Teachers in other precisions, and those that were compiled, exported, scripted, traced, quantised or saved whole: each works or says why not, before the first step."
from copy import deepcopy
import pytest, torch
from torch import fx, nn
from torch.export import Dim
from conftest import data, learner, n_hooks, net, same_state, state
from fastdistill.all import *
from fastdistill.in_use import check_evaluation_graph

KD = KnowledgeDistillationCallback
x = torch.randn(8,2,8,8)

def export(model, **kw): return torch.export.export(model.eval(), (x,), **kw).module()

def saved(model, tmp_path):
    torch.save(model, tmp_path/'teacher.pth')
    return torch.load(tmp_path/'teacher.pth', weights_only=False)

def fit(teacher, terms, student=None, bs=8):
    "The distillation loss of each step, and the student in the end"
    torch.manual_seed(0)
    student = student or net()
    learn,kd = learner(student, data(24, bs, shuffle=False)),KD(teacher, terms)
    learn.fit(2, cbs=kd)
    return list(kd.losses['kd_loss']),learn.model

predictions,features = [SoftTarget],[SoftTarget, Match(Attention, ['0','1'], ['0','1']), Match(FitNet, '1', '1')]
precisions = [torch.float16, torch.bfloat16, torch.float64]

@pytest.mark.parametrize('terms', [predictions,features], ids=['predictions','features'])
@pytest.mark.parametrize('dtype', precisions, ids=str)
def test_weights_in_another_precision(teacher, dtype, terms):
    "The student stays in float32, and its loss is close to that of the plain teacher"
    want,_ = fit(teacher, terms)
    other = deepcopy(teacher).to(dtype)
    before = state(other)
    got,student = fit(other, terms)
    assert got == pytest.approx(want, rel=1e-5 if dtype == torch.float64 else 3e-2)
    assert {p.dtype for p in student.parameters()} == {torch.float32} and same_state(other, before)

@pytest.mark.parametrize('dtype', precisions, ids=str)
def test_what_a_teacher_in_another_precision_is_asked_and_answers(teacher, dtype):
    "Exactly what the model itself says to inputs of its own type; whole numbers stay whole numbers"
    model,seen = deepcopy(teacher).eval().to(dtype),[]
    model.register_forward_pre_hook(lambda m, xb: seen.append(xb[0].dtype))
    with torch.no_grad(): want = model(x.to(dtype))
    answer = Teacher(model)(x)
    assert torch.equal(answer, want) and seen == [dtype]*2
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).to(dtype)
    assert Teacher(words)(torch.tensor([[1,2]])).dtype == dtype

def test_inputs_of_float64(teacher):
    "A teacher in float32 answers a student in float64 as it answers others, also inside an autocast region"
    t = Teacher(teacher.eval())
    assert torch.equal(t(x.double()), t(x))
    with torch.autocast('cpu', torch.bfloat16): assert Teacher(deepcopy(teacher).double())(x).dtype == torch.float64

def test_precision_of_an_ensemble(teacher):
    whole,half = Ensemble([teacher.eval(), deepcopy(teacher)]),Ensemble([teacher, deepcopy(teacher).bfloat16()])
    for t in whole.teachers + half.teachers: t.model.eval()
    torch.testing.assert_close(half(x).float(), whole(x), rtol=3e-2, atol=3e-2)

def test_a_recorded_teacher_in_another_precision(teacher, tmp_path):
    recording = record_teacher(deepcopy(teacher).bfloat16(), data(shuffle=False), tmp_path/'r', loss=features, teacher_layers=None)
    want,_ = fit(teacher, features)
    got,_ = fit(recording, features)
    assert got == pytest.approx(want, rel=3e-2)

# --- made ready to run elsewhere ---

same = dict(saved=saved, exported=lambda m, _: export(m), any_size=lambda m, _: export(m, dynamic_shapes=({0:Dim('batch')},)), scripted=lambda m, _: torch.jit.script(m),
            traced=lambda m, _: torch.jit.trace(m.eval(), x), compiled=lambda m, _: torch.compile(m, backend='eager'), fx=lambda m, _: fx.symbolic_trace(m.eval()))
near = dict(frozen=lambda m, _: torch.jit.freeze(torch.jit.script(m.eval())), for_inference=lambda m, _: torch.jit.optimize_for_inference(torch.jit.script(m.eval())),
            aot=lambda m, _: torch.compile(m, backend='aot_eager'), quantised=lambda m, _: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}))

@pytest.mark.parametrize('name', [*same,*near])
def test_predictions(teacher, name, tmp_path, dynamo):
    "Bit for bit where the same operations run, step by step; the teacher is left as it was"
    want,_ = fit(deepcopy(teacher), predictions)
    made = {**same,**near}[name](deepcopy(teacher), tmp_path)
    tensors = [t.clone() for t in [*made.parameters(),*made.buffers()]]
    got,_ = fit(made, predictions)
    assert got == (want if name in same else pytest.approx(want, rel=2e-2))
    assert all(map(torch.equal, [*made.parameters(),*made.buffers()], tensors)) and n_hooks(made) == n_hooks({**same,**near}[name](deepcopy(teacher), tmp_path))

@pytest.mark.parametrize('name', ['saved','compiled','aot','quantised'])
def test_features(teacher, name, tmp_path, dynamo):
    want,_ = fit(deepcopy(teacher), features)
    got,_ = fit({**same,**near}[name](deepcopy(teacher), tmp_path), features)
    assert got == pytest.approx(want, rel=2e-2) and (name != 'saved' or got == want)

refused = dict(scripted='TorchScript runs .0. of teacher RecursiveScriptModule. Take the model as it was before', traced='TorchScript runs .0. of teacher TopLevelTracedModule',
               frozen='TorchScript runs .0.', for_inference='TorchScript runs .0.', exported="its graph was rewritten without '0'. It calls none: compare predictions, or take the model as it was",
               fx="rewritten without '0'. Name one that it calls: 0.0, 0.1, 0.2")

@pytest.mark.parametrize('name', refused)
def test_features_that_cannot_be_had(teacher, name, tmp_path):
    made,student = {**same,**near}[name](deepcopy(teacher), tmp_path),net()
    before = state(student)
    with pytest.raises(ValueError, match=refused[name]): fit(made, features, student)
    assert same_state(student, before) and n_hooks(student) == 0
    fit(made, predictions, student)     # nothing is left behind

def test_a_student_that_is_scripted(teacher):
    student = torch.jit.script(net())
    with pytest.raises(ValueError, match='TorchScript runs .0. of student RecursiveScriptModule'): fit(teacher, features, student)
    fit(teacher, predictions, student)

def test_a_scripted_part_of_a_teacher(teacher):
    "The layers around it can be compared, it and those inside cannot"
    teacher[1] = torch.jit.script(teacher[1])
    fit(teacher, Match(Attention, '0', '0'))
    for name in ('1','1.0'):
        with pytest.raises(ValueError, match=f'TorchScript runs .{name}. of teacher Sequential'): fit(teacher, Match(Attention, '0', name))

def test_exported_for_batches_of_one_size(teacher):
    "The error says how to export it; the other export takes any"
    student = net()
    before = state(student)
    with pytest.raises(Exception, match='fixes the batch size unless it gets `dynamic_shapes`'): fit(export(deepcopy(teacher)), predictions, student, bs=6)
    assert same_state(student, before)
    got,_ = fit(export(deepcopy(teacher), dynamic_shapes=({0:Dim('batch')},)), predictions, bs=6)
    want,_ = fit(teacher, predictions, bs=6)
    assert got == pytest.approx(want, rel=1e-6)

made_in_training = dict(exported=lambda m: torch.export.export(m.train(), (x,)).module(), traced=lambda m: torch.jit.trace(m.train(), x, check_trace=False))

@pytest.mark.parametrize('make', made_in_training.values(), ids=made_in_training)
@pytest.mark.parametrize('part', ['batch_norm','dropout'])
def test_made_in_training_mode(make, part):
    "It would change its statistics, or draw; `eval` comes too late"
    model = net(8, dropout=0.5) if part == 'batch_norm' else nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 3))
    made,student = make(model),net()
    before,found = state(student),state(made)
    with pytest.raises(ValueError, match=f'exported in evaluation mode, but its .*{part}.*always works as in training'): fit(made, predictions, student)
    assert same_state(student, before) and same_state(made, found)

def test_made_in_evaluation_mode(teacher):
    for made in (export(deepcopy(teacher)), torch.jit.trace(teacher.eval(), x), torch.jit.script(teacher.train()), teacher): check_evaluation_graph(made)

@pytest.mark.parametrize('name', ['exported','any_size','scripted','traced','frozen','quantised'])
def test_checked_and_recorded(teacher, name, tmp_path):
    made = {**same,**near}[name](deepcopy(teacher), tmp_path)
    dls = data(24, 8, shuffle=False)
    dls.loaders[1] = dls.train if name == 'exported' else dls.valid
    check = learner(dls=dls).distill_check(KD(made), n=1)
    assert len(check.models) == 3 and not check.models.loc['teacher','valid_loss'] != check.models.loc['teacher','valid_loss']
    recording = record_teacher(made, data(24, 8, shuffle=False), tmp_path/'r')
    want,_ = fit(made, predictions)
    got,_ = fit(recording, predictions)
    assert got == pytest.approx(want, rel=2e-2)
