"Every runtime computes what the student computes; TensorRT and CUDA graphs are checked with stand-ins."
import ctypes
import math
import sys
import types

import pytest
import torch

from ditnano.config import DiTConfig, GETConfig
from ditnano.deploy.engines import ENGINES, CudaGraphModule, available, engine
from ditnano.deploy.folding import OneStep, fold
from ditnano.dit import DiT, forward_with_cfg, randomize_weights
from ditnano.get import GET
from ditnano.repro import noise_and_labels

MISSING = available()
SHAPES = [
    DiTConfig(2, 48, (4,6), learn_sigma=True, mlp_ratio=2., image_size=16),
    DiTConfig(1, 32, patch=4, classes=7),
    DiTConfig(1, 24, 3, image_size=48, patch=4, channels=1, classes=1),
    DiTConfig(1, 20, 5, image_size=64, patch=4, classes=100),
    DiTConfig(1, 16, 2, image_size=16, label_dropout=0.),
]


def student(cfg, seed=1): return randomize_weights(DiT(cfg), seed).eval()


def relative(got, want):
    d = got-want
    return max((d.norm()/want.norm()).item(), (d.abs().max()/want.abs().max()).item())


def inputs(cfg, n):
    x, y = noise_and_labels(range(n), (cfg.channels, cfg.image_size, cfg.image_size), cfg.classes)
    if cfg.label_dropout: y[-1] = cfg.classes # the null label is a label too
    return x, y


def need(backend):
    if MISSING[backend]: pytest.skip(MISSING[backend])


def name(c): return f'{c.image_size}px-{c.channels}ch-p{c.patch}-{c.width}x{c.heads}-k{c.classes}'


@pytest.mark.parametrize('cfg', SHAPES, ids=name)
@pytest.mark.parametrize('backend', ['native','openvino','onnxruntime'])
def test_images_are_the_students(backend, cfg):
    need(backend)
    model, (x, y) = student(cfg, 3), inputs(cfg, 11)
    for guidance in (1., 1.5) if cfg.label_dropout else (1.,):
        with torch.no_grad():
            if guidance==1: want = model(x, torch.zeros(11), y)[:,:cfg.channels]
            else: want = forward_with_cfg(model, x, torch.zeros(11), y, guidance)[:,:cfg.channels]
        step = engine(model, guidance, backend, threads=2)
        assert want.std()>.1
        for n in (1, 3, 11): assert relative(step(x[:n], y[:n]), want[:n])<1e-5
        assert step(x[:0], y[:0]).shape==(0, *x.shape[1:])


def test_openvino_shares_one_image_among_threads():
    need('openvino')
    cfg = DiTConfig(1, 16, 4, image_size=16)
    x, y = inputs(cfg, 4)
    model = fold(student(cfg))
    assert relative(engine(model, batch=1, threads=2)(x[:1], y[:1]), engine(model)(x, y)[:1])<1e-5


def test_available_reports_how_to_install():
    nothing = available(lambda name: None)
    assert nothing['openvino']=='openvino is not available; pip install onnx openvino'
    assert 'JetPack' in nothing['tensorrt']
    assert available(lambda name: name!='tensorrt')['onnxruntime']==''
    wanted = 'native is not available; needs a C compiler (apt install gcc, or pip install ziglang)'
    assert available(cc=lambda: '')['native']==wanted


@pytest.mark.parametrize('make, message', [
    (lambda m: engine(m, backend='coreml'), "engine 'coreml'; expected one of native, openvino, onnxruntime, tensorrt"),
    (lambda m: engine(m, backend='onnxruntime', precision='bf16'), "precision 'bf16' with onnxruntime: expected fp32"),
    (lambda m: engine(DiT(DiTConfig(1,32,steps=2)), 1.), 'fold: a student of 2 steps'),
    (lambda m: engine(GET(GETConfig(depth=1, width=32, heads=4)), 1.), 'fold: GET'),
    (lambda m: engine(m, batch=0), 'batch=0'),
])
def test_requests_are_checked_first(make, message):
    with pytest.raises(ValueError) as e: make(DiT(DiTConfig(1,32)))
    assert message in str(e.value)


def test_a_runtime_that_is_not_installed():
    if not MISSING['tensorrt']: pytest.skip('tensorrt is installed')
    with pytest.raises(RuntimeError, match='tensorrt is not available'):
        engine(DiT(DiTConfig(1,32)), backend='tensorrt')


@pytest.mark.parametrize('backend', ['native','openvino','onnxruntime'])
def test_wrong_inputs_are_refused(backend):
    need(backend)
    cfg = DiTConfig(1, 16, 4, image_size=16)
    step, (x, y) = engine(student(cfg), backend=backend), inputs(cfg, 3)
    wrong = (x, y+1, 'label 11'), (x[:,:1], y, 'expected (N, 3, 16, 16)'), (x, y[:2], 'y has shape (2,)')
    for noise, labels, message in wrong:
        with pytest.raises(ValueError) as e: step(noise, labels)
        assert message in str(e.value)


class Recorder:
    "Answers every call with itself or a given answer, and keeps the calls."
    def __init__(self, log, **answers): self.log, self.answers = log, answers

    def __getattr__(self, name):
        def call(*args):
            self.log.append((name, *args))
            answer = self.answers.get(name, self)
            return answer(*args) if callable(answer) and not isinstance(answer, Recorder) else answer
        return call


def memory(address, shape, dtype):
    "A tensor over memory that somebody else holds."
    size = torch.empty(0, dtype=dtype).element_size()*math.prod(shape)
    return torch.frombuffer((ctypes.c_char*size).from_address(address), dtype=dtype).view(shape)


def tensorrt_stand_in(one, log, has_fp16, labels):
    "A module that looks like tensorrt and computes with the student, from the addresses that it was given."
    shapes, at = {}, {}
    def execute(stream):
        noise, y = memory(at['noise'], shapes['noise'], torch.float32), memory(at['labels'], shapes['labels'], labels)
        with torch.no_grad(): memory(at['images'], shapes['noise'], torch.float32).copy_(one(noise, y.long()))
        return True
    thing = Recorder(log, parse=lambda data: len(data)>1e4, set_input_shape=shapes.__setitem__,
                     set_tensor_address=at.__setitem__, execute_async_v3=execute,
                     get_tensor_dtype=lambda name: f"DataType.{str(labels)[6:].upper()}")
    def maker(kind): return lambda *args: (log.append((kind,)), thing)[1]
    logger = type('Logger', (), {'WARNING':1, '__init__':lambda self, level: None})
    flags = types.SimpleNamespace(**({'FP16':'the fp16 flag'} if has_fp16 else {}))
    explicit = types.SimpleNamespace(EXPLICIT_BATCH=0)
    makers = {k:maker(k) for k in ('Builder','OnnxParser','Runtime')}
    return types.SimpleNamespace(Logger=logger, BuilderFlag=flags, NetworkDefinitionCreationFlag=explicit, **makers)


@pytest.mark.parametrize('labels', [torch.int32, torch.int64])
def test_tensorrt_calls(monkeypatch, labels):
    pytest.importorskip('onnx')
    cfg, log = DiTConfig(1, 16, 4, image_size=16), []
    one, (x, y) = OneStep(student(cfg)), inputs(cfg, 35)
    def build(has_fp16, log):
        monkeypatch.setitem(sys.modules, 'tensorrt', tensorrt_stand_in(one, log, has_fp16, labels))
        stream = types.SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
        return ENGINES['tensorrt'](one, 'fp16', 16, 1, 'cpu', lambda: stream)
    with torch.no_grad(): want = one(x, y)
    assert relative(build(True, log)(x, y), want)<1e-5 and want.std()>.1
    image = (3,16,16)
    profile = [('noise',(1,*image),(16,*image),(16,*image)), ('labels',(1,),(16,),(16,))]
    assert [c[1:] for c in log if c[0]=='set_shape']==profile
    assert [c[2][0] for c in log if c[0]=='set_input_shape']==[16,16,16,16,3,3]
    assert [c[1:] for c in log if c[0] in ('set_flag','execute_async_v3')]==[('the fp16 flag',), (7,), (7,), (7,)]
    with pytest.raises(ValueError, match='needs a typed file'): build(False, [])


def test_cuda_graph_module_captures_once_per_shape():
    cfg, captured = DiTConfig(1, 16, 4, image_size=16), []
    step, (x, y) = OneStep(student(cfg)), inputs(cfg, 19)
    def capture(fn, static_inputs):
        captured.append(len(static_inputs[0]))
        out = fn(*static_inputs)
        return lambda: out.copy_(fn(*static_inputs)), out
    with torch.no_grad():
        quick = CudaGraphModule(step, capture)
        first = quick(x[:8], y[:8])
        for part in (slice(0,8), slice(8,16), slice(16,19)):
            torch.testing.assert_close(quick(x[part], y[part]), step(x[part], y[part]))
        torch.testing.assert_close(first, step(x[:8], y[:8])) # a later replay leaves it unchanged
    assert captured==[8,3]


def test_cuda_graph_module_falls_back_with_one_line():
    cfg = DiTConfig(1, 16, 4, image_size=16)
    step, (x, y) = OneStep(student(cfg)), inputs(cfg, 4)
    def capture(fn, static_inputs): raise RuntimeError('operation not permitted when stream is capturing\nmore')
    quick = CudaGraphModule(step, capture)
    with torch.no_grad(), pytest.warns(UserWarning, match=r'^not recorded \(operation .*capturing\)') as w:
        for _ in range(2): torch.testing.assert_close(quick(x, y), step(x, y))
    assert len(w)==1 and not any(quick.captures.values())
