"The program of a bundle: inputs, runtimes and trtexec, with programs and modules in place of the board's."
import ctypes
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ditnano.deploy import jetson, runner
from ditnano.deploy.runner import (
    Cuda,
    TensorRT,
    UserError,
    available_runtimes,
    bench_command,
    build_engine,
    bundle_row,
    check,
    check_file,
    choose_runtime,
    graph_file,
    make_images,
    model_file,
    parse_version,
    read_card,
    tensorrt_command,
    time_batch,
    trtexec_version,
)

CARD = {'design':{'depth':5,'width':64,'heads':8}, 'weights':'0'*16, 'guidance':1.5, 'shape':[3,8,8], 'labels':10,
        'files':{'fp32':{'file':'fp32.onnx'}, 'fp16':{'file':'fp16.onnx'}}}
NOISE, LABELS = np.zeros((2,3,8,8)), np.array([3,10], np.int32)


def refused(message):
    return pytest.raises(UserError, match=message)


def test_inputs_are_checked():
    assert [a.dtype for a in check(NOISE, LABELS, CARD)]==[np.float32, np.int64]
    for noise, labels, message in (
            (NOISE, [0,11], 'label 11; expected 0 to 10'), (NOISE, [0,-1], 'label -1'),
            (NOISE[:,:1], LABELS, r'\(N, 3, 8, 8\)'), (NOISE, LABELS[:1], r'expected \(2,\)'),
            (NOISE, LABELS/2, 'whole numbers'), (NOISE+np.nan, LABELS, 'not finite'),
            (NOISE.astype(int), LABELS, 'noise is int64')):
        with refused(message): check(noise, labels, CARD)


@pytest.mark.parametrize('text, message', [
    (None, 'no card.json'), ('{"design"', 'damaged'), ('[]', "no 'design'"), ('{"design":{}}', "no 'weights'")])
def test_cards(tmp_path, text, message):
    if text is not None: (tmp_path/'card.json').write_text(text)
    with refused(message): read_card(tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path/'card.json').write_text(json.dumps(CARD), encoding='utf-8-sig')
    assert read_card(tmp_path)==CARD


def test_files_are_compared_with_their_hash(tmp_path):
    (tmp_path/'a.bin').write_bytes(b'abc')
    digest = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert check_file(tmp_path, 'a.bin', digest)==check_file(tmp_path, 'a.bin', None)==str(tmp_path/'a.bin')
    (tmp_path/'a.bin').write_bytes(b'abd')
    with refused('a.bin is damaged or altered'): check_file(tmp_path, 'a.bin', digest)
    with refused('b.bin is missing'): check_file(tmp_path, 'b.bin', digest)


def test_runtimes_are_named(tmp_path):
    with refused('expected one of tensorrt, onnxruntime, openvino'): choose_runtime('.', CARD, 'fp32', 'tflite')
    with refused("precision 'fp8'; this bundle has fp32, fp16"): model_file('.', CARD, 'fp8', 'openvino')
    assert model_file('d', CARD, 'fp16', 'tensorrt').endswith('fp16.engine')
    for name in set(runner.RUNTIMES)-set(available_runtimes()):
        with refused(f'{name} is not installed'): choose_runtime('.', CARD, 'fp32', name)
    for name in {'onnxruntime','openvino'}&set(available_runtimes()):
        with refused('fp32.onnx is missing'): choose_runtime(tmp_path, CARD, 'fp32', name)


# TensorRT with stand-ins

class HostCuda:
    "A CUDA runtime library on the host."
    def __init__(self): self.blocks, self.freed = {}, 0

    def cudaMalloc(self, address, size):
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.blocks[address._obj.value] = block
        return 0

    def cudaFree(self, address):
        del self.blocks[address.value]
        self.freed += 1
        return 0

    def cudaMemcpy(self, to, source, size, kind):
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaDeviceSynchronize(self): return 0


class Context:
    "An execution context that computes `3 noise + label` from raw addresses."
    def __init__(self, kind): self.kind, self.shapes, self.at = kind, {}, {}

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return shape[0]<=4

    def set_tensor_address(self, name, address): self.at[name] = address

    def array(self, name, shape, dtype):
        size = int(np.prod(shape))*np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char*size).from_address(self.at[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream):
        x = self.array('noise', self.shapes['noise'], np.float32)
        y = self.array('labels', self.shapes['labels'], self.kind)
        self.array('images', x.shape, np.float32)[:] = 3*x+y[:,None,None,None]
        return True


def tensorrt_module(kind, fits=True):
    "A module that looks like tensorrt, with labels of type `kind`."
    engine = types.SimpleNamespace(create_execution_context=lambda: Context(kind),
                                   get_tensor_dtype=lambda name: f'DataType.{np.dtype(kind).name.upper()}')
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine if fits else None)
    logger = type('Logger', (), {'WARNING':2, '__init__':lambda self, level: None})
    return types.SimpleNamespace(__version__='10.3.0', Logger=logger, Runtime=lambda log: runtime)


@pytest.fixture
def engine_file(tmp_path):
    (tmp_path/'fp16.engine').write_bytes(b'engine')
    return tmp_path/'fp16.engine'


@pytest.mark.parametrize('kind', [np.int32, np.int64])
def test_tensorrt_addresses_sizes_and_types(monkeypatch, engine_file, kind):
    monkeypatch.setitem(sys.modules, 'tensorrt', tensorrt_module(kind))
    x, y, host = np.random.default_rng(0).normal(size=(4,3,8,8)).astype(np.float32), np.array([0,3,7,9]), HostCuda()
    run = TensorRT(engine_file, Cuda(host))
    for n in (4, 2): np.testing.assert_allclose(run(x[:n], y[:n]), 3*x[:n]+y[:n,None,None,None], rtol=1e-6)
    assert (len(host.blocks), host.freed)==(3, 3)
    with refused('--build --batch 8'): run(np.zeros((8,3,8,8), np.float32), np.zeros(8, np.int64))


def test_an_engine_of_another_tensorrt(monkeypatch, engine_file):
    monkeypatch.setitem(sys.modules, 'tensorrt', tensorrt_module(np.int64, fits=False))
    with refused('for another TensorRT or GPU'): TensorRT(engine_file, Cuda(HostCuda()))


# trtexec

PROGRAM = '''#!{python}
import json, pathlib, sys
args = sys.argv[1:]
major, minor, patch = map(int, {version!r}.split('.'))
number = major*1000+minor*100+patch if major<10 else major*10000+minor*100+patch
print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{{number}}] # trtexec "+' '.join(args))
if '--help' in args: sys.exit(0)
known = {{'--onnx','--saveEngine','--memPoolSize','--minShapes','--optShapes','--maxShapes','--noTF32'}}
known |= {{'--buildOnly'}} if major<10 else set()
known |= {{'--skipInference'}} if (major,minor)!=(8,5) else set()
known |= {{'--fp16','--int8','--best'}} if major<11 else set()
known |= {{'--stronglyTyped'}} if major>=10 else set()
given = dict(a.partition('=')[::2] for a in args)
wrong = sorted(set(given)-known)
if wrong:
    print(f"[E] Unknown option: {{wrong[0]}}")
    print("&&&& FAILED TensorRT.trtexec")
    sys.exit(1)
pathlib.Path(__file__).with_name('args.json').write_text(json.dumps(args))
pathlib.Path(given['--saveEngine']).write_bytes(b'engine')
print("&&&& PASSED TensorRT.trtexec")
'''


def trtexec_of(folder, version):
    "A program with the options of a release, which writes its arguments down and leaves a file."
    path = Path(folder)/'trtexec'
    path.write_text(PROGRAM.format(python=sys.executable, version=version))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('version', ['8.5.2','8.6.2','10.3.0','10.16.2','11.1.0'])
def test_trtexec_takes_our_options(tmp_path, version):
    program = trtexec_of(tmp_path, version)
    assert trtexec_version(program)==version
    for precision in ('fp32','fp16','int8'):
        engine = tmp_path/f'{precision}.engine'
        command = build_engine('x.onnx', engine, precision, 16, version, program)
        assert json.loads((tmp_path/'args.json').read_text())==command[1:]
        assert engine.is_file() and '--optShapes=noise:16x3x32x32,labels:16' in command


def test_a_failed_build_leaves_nothing(tmp_path):
    program = trtexec_of(tmp_path, '11.1.0')
    with refused('Unknown option: --fp16'):
        build_engine('x.onnx', tmp_path/'no.engine', 'fp16', version='8.6', trtexec=program)
    assert not list(tmp_path.glob('no.engine*'))


def test_graphs_and_versions():
    assert [graph_file(CARD, 'fp16', v) for v in ('8.6','10.3','11.1')]==['fp32.onnx','fp16.onnx','fp16.onnx']
    with refused('--jetpack5'): graph_file(CARD, 'fp16', '8.5.2')
    for version in ('7.1', '9.0', '12.0', 'ten'):
        with refused('expected 8.5, 8.6, 10.x or 11.x'): parse_version(version)
    with refused("precision 'bf16'"): tensorrt_command('x', 'y', 'bf16')
    assert bench_command('a.engine', 2)[1:3]==['--loadEngine=a.engine','--shapes=noise:2x3x32x32,labels:2']


# Images and times

class Identity:
    name, version, where = 'onnxruntime', '1', 'CPU'

    def __call__(self, noise, labels): return noise


def test_images():
    images = make_images(Identity(), CARD, [3,5], seed=4)
    noise = np.random.default_rng(4).standard_normal((2,3,8,8)).astype(np.float32)
    assert images.dtype==np.uint8 and np.array_equal(images, (noise*127.5+128).clip(0, 255).astype(np.uint8))
    with refused('3 images; this bundle makes them 2 at a time'): make_images(Identity(), {**CARD, 'batch':2}, [1,2,3])


def test_batches_are_timed(tmp_path):
    watch = {n:jetson.Sampler(tmp_path, every=.02) for n in (1, 2)}
    one, two = (time_batch(Identity(), CARD, 'fp32', n, .05, 0, watch[n]) for n in (1, 2))
    row = bundle_row(one, CARD)
    assert 0<row['ms']<=row['p99_ms']==one.ms(99) and row['batch']==1 and one.card['weights']==CARD['weights']
    assert bundle_row(two, CARD)['batch']==2
    with refused('batch 0; expected 1 or more'): time_batch(Identity(), CARD, 'fp32', 0)
    with refused('batch 3; expected 2'): time_batch(Identity(), {**CARD, 'batch':2}, 'fp32', 3)
