"On a GPU: mixed precision, channels last, a teacher that comes from the CPU and goes back. Skipped where there is none."
import pytest, torch
import fastai.callback.all, fastai.callback.channelslast     # they give Learner its to_fp16 and the like; a star would bring a test_overflow
from fastai.basics import accuracy, Callback, CrossEntropyLossFlat, DataLoaders, TfmdDL, set_seed
from conftest import QuietLearner, data, n_hooks, net, same_state, state
from fastdistill.all import *
from recording_helpers import refuses, refuses_the_second_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')

def learner(**kwargs):
    dl,valid = ([b for b in dl.dataset] for dl in data())
    device = torch.device('cuda')
    dls = DataLoaders(TfmdDL(dl, bs=8, shuffle=True, num_workers=0, device=device), TfmdDL(valid, bs=16, num_workers=0, device=device), device=device)
    return QuietLearner(dls, net(), loss_func=CrossEntropyLossFlat(), **kwargs)

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16','to_channelslast','to_non_native_fp16'])
def test_precision(to):
    teacher = net(8)
    before,answers,inside = state(teacher),[],[]
    teacher.register_forward_hook(lambda m,i,o: answers.append((o.dtype,o.device.type)))
    def loss(s, t): inside.append((s.dtype,t.dtype,torch.is_autocast_enabled('cuda'))); return (s-t).square().mean()
    kd = KnowledgeDistillationCallback(teacher, [loss, SoftTarget, Match(Attention, ['0','1'], ['0','1']), Match(loss, '4', '4')])
    learn = learner(cbs=kd)
    if to: getattr(learn, to)(**dict(to_non_native_fp16=dict(max_loss_scale=256.)).get(to, {}))
    learn.fit(3)
    want = dict(to_fp16=torch.float16, to_channelslast=torch.float16,
                to_non_native_fp16=torch.float16, to_bf16=torch.bfloat16).get(to, torch.float32)
    assert set(answers) == {(want,'cuda')} and set(inside) == {(torch.float32,torch.float32,False)}
    assert same_state(teacher, before) and next(teacher.parameters()).device.type == 'cpu' and teacher.training
    assert n_hooks(learn.model) == 0 and n_hooks(teacher) == 1     # this test's own
    assert all(torch.isfinite(torch.tensor(v)) for v in learn.recorder.values[-1])

@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
def test_mixed_precision_gradients_are_close_to_float32(to):
    teacher,grads = net(8),{}
    for prec in (None,to):
        set_seed(0, reproducible=True)
        learn = learner(cbs=KnowledgeDistillationCallback(teacher, [SoftTarget, Match(Attention, ['0','1'], ['0','1'])]))
        if prec: getattr(learn, prec)()
        seen = []
        class Grads(Callback):
            order = 100
            def before_step(self): seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
        learn.fit(1, cbs=Grads())
        grads[prec] = seen[0]
    assert torch.cosine_similarity(grads[None], grads[to], dim=0) > 0.98

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16','to_non_native_fp16'])
def test_projectors_train_in_float32_beside_the_student(to):
    kd = KnowledgeDistillationCallback(net(8), [Match(FitNet, '0', '0'), Match(VID, '1', '1'), Match(Similarity, '1', '1')])
    learn,start = learner(cbs=kd),[]
    if to: getattr(learn, to)(**dict(to_non_native_fp16=dict(max_loss_scale=256.)).get(to, {}))
    class First(Callback):
        order = 50
        def before_backward(self): start.append([p.clone() for p in self.knowledge_distillation.trained.params])
    learn.fit(3, 1e-2, cbs=First())
    for before,p in zip(start[0], kd.trained.params, strict=True):
        assert p.dtype == torch.float32 and p.is_cuda and p.isfinite().all() and not torch.equal(before, p)

def test_a_step_that_overflows_skips_the_projectors():
    class Overflow(Callback):
        order = 9     # gradients of the first batch become infinite before the scaler looks at them
        def before_step(self):
            if self.train_iter == 0: next(self.model.parameters()).grad.fill_(float('inf'))
    kd,seen = KnowledgeDistillationCallback(net(8), FitNet, '0', '0'),[]
    class Seen(Callback):
        order = 50
        def before_backward(self): seen.append([p.clone() for p in self.knowledge_distillation.trained.params])
    learner(cbs=kd).to_fp16(init_scale=1024.).fit(1, 1e-2, cbs=[Overflow(),Seen()])
    assert all(torch.equal(a, b) for a,b in zip(seen[0], seen[1])) and not all(torch.equal(a, b) for a,b in zip(seen[1], seen[2]))

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16'])
def test_an_average_follows_the_steps_that_were_taken(to):
    "The loop by hand knows a step by the weights that it moves: the first one overflows"
    class Overflow(Callback):
        order = 9
        def before_step(self):
            if to == 'to_fp16' and self.train_iter == 0: next(self.model.parameters()).grad.fill_(float('inf'))
    students,ema = [],EMATeacher(0.9)
    class Students(Callback):
        order = 90
        def before_batch(self): self.start = state(self.model) if not students else None
        def after_batch(self):
            if not self.training: return
            if self.start: students.append(self.start)
            if any(not torch.equal(v, students[-1][k]) for k,v in self.model.named_parameters()): students.append(state(self.model))
    learn = learner(cbs=KnowledgeDistillationCallback(ema))
    if to: getattr(learn, to)(**dict(to_fp16=dict(init_scale=1024.)).get(to, {}))
    learn.fit(2, 1e-2, cbs=[Students(),Overflow()])
    assert ema.steps == len(students)-1 == (5 if to == 'to_fp16' else 6)
    average = students[0]
    for s in students[1:]: average = {k:0.9*average[k] + 0.1*v if v.is_floating_point() else v for k,v in s.items()}
    for k,v in ema.model.state_dict().items(): torch.testing.assert_close(v, average[k], rtol=1e-4, atol=1e-5)
    assert next(ema.model.parameters()).is_cuda

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16'])
def test_recorded_teacher_sees_the_noise_drawn_on_the_gpu_again(tmp_path, to):
    device,teacher,asked = torch.device('cuda'),net(8),[]
    def noise(x): return x + torch.randn_like(x) if x.is_floating_point() else x
    items,valid = ([b for b in dl.dataset] for dl in data())
    dls = DataLoaders(TfmdDL(items, bs=8, shuffle=True, num_workers=0, after_batch=noise, device=device), TfmdDL(valid, bs=16, num_workers=0, device=device), device=device)
    rec = record_teacher(teacher, dls, tmp_path/'r', n_epoch=2, dtype=torch.float32)
    assert not rec.header['any_order'] and rec.header['environment']['device'] == torch.cuda.get_device_name(device)
    class Ask(Callback):
        order = 60
        def after_pred(self):
            if not self.training: return
            with torch.no_grad(): asked.append((self.knowledge_distillation.batch.answer, teacher.to(device).eval()(self.x.float())))
    learn = QuietLearner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=[KnowledgeDistillationCallback(rec), Ask()])
    if to: getattr(learn, to)()
    learn.fit(3)
    eps = 1e-5 if to is None else 0.1
    assert asked and all(a.is_cuda and (a-b.float()).abs().max() <= eps for a,b in asked)

def test_a_recording_refuses_inputs_in_half_precision(tmp_path):
    rec = record_teacher(net(8), learner().dls, tmp_path/'r')
    refuses(lambda: learner().to_non_native_fp16(max_loss_scale=256.).fit(1, cbs=KnowledgeDistillationCallback(rec)), 'Use `to_fp16`')

def test_another_batch_than_the_recorded_one_stops_the_fit_before_the_step(tmp_path):
    learn = learner()
    rec = record_teacher(net(8), learn.dls, tmp_path/'r')
    refuses_the_second_batch(learn, rec)
    learner().fit(2, cbs=KnowledgeDistillationCallback(rec))

def test_a_student_that_has_not_trained_is_measured_on_the_gpu():
    "fastai puts it there at the start of a fit or a validation; until then it is on the CPU"
    layers = ['0','1']
    learn,kd = learner(metrics=accuracy),KnowledgeDistillationCallback(net(8), Attention, layers, layers)
    check = learn.distill_check(kd, n=1)
    assert check.models.notna().loc[['teacher','student']].all(axis=None) and len(check.terms) == 3
    assert next(learn.model.parameters()).device.type == 'cpu' and next(kd.teacher.model.parameters()).device.type == 'cpu'
    table = compare(dict(teacher=learner(metrics=accuracy), student=learn), batch_sizes=(1,), n=1)
    assert table.accuracy.notna().all() and next(learn.model.parameters()).device.type == 'cpu'
