"The ONNX graph computes what the module computes, for every operator set, precision and shape."
import numpy as np
import pytest
import torch

from ditnano.config import DiTConfig
from ditnano.deploy.folding import fold
from ditnano.deploy.graph import (
    OPSETS,
    Graph,
    best_quantization_scale,
    build_onnx_model,
    calibrate,
    modulation_table,
    one_step_graph,
    quantize_int8,
)
from ditnano.dit import DiT, forward_with_cfg, randomize_weights
from ditnano.repro import noise_and_labels

SMALL = DiTConfig(2, 16, 4, image_size=16)
SHAPES = [
    DiTConfig(1, 16, 2, image_size=16, channels=1, classes=1),
    DiTConfig(2, 24, (2,6), image_size=16, learn_sigma=True),
    DiTConfig(1, 24, 3, image_size=48, patch=4, classes=2),
    DiTConfig(1, 20, 5, image_size=64, patch=4, channels=1, classes=100),
    DiTConfig(1, 36, (3,), image_size=24, mlp_ratio=1.5),
    DiTConfig(1, 16, 16, image_size=32),
]


def student(cfg, seed=1): return randomize_weights(DiT(cfg), seed).eval()


def error(model, guidance=1.5, n=3, **options):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    c = model.cfg
    m = build_onnx_model(one_step_graph(model, guidance=guidance, **options), c)
    x, y = noise_and_labels(range(900, 900+n), (c.channels, c.image_size, c.image_size), c.classes)
    session = ort.InferenceSession(m.SerializeToString(), providers=['CPUExecutionProvider'])
    got, = session.run(None, {'noise':x.numpy(), 'labels':y.numpy()})
    with torch.no_grad(): want = forward_with_cfg(model, x, torch.zeros(n), y, guidance)[:,:c.channels].numpy()
    assert want.std()>.1
    return np.linalg.norm(got-want)/np.linalg.norm(want)


@pytest.mark.parametrize('opset', OPSETS)
def test_operator_sets(opset): assert error(student(SMALL), opset=opset)<1e-5


def name(c): return f'{c.image_size}px-{c.channels}ch-p{c.patch}-{c.width}x{c.heads}-k{c.classes}'


@pytest.mark.parametrize('cfg', SHAPES, ids=name)
@pytest.mark.parametrize('precision, limit', [('fp32',1e-5), ('fp16',2e-2), ('int8',.25)])
def test_shapes(cfg, precision, limit):
    model = student(cfg, 3)
    for guidance in (1., 1.5):
        scales = calibrate(model, guidance, range(8)) if precision=='int8' else None
        assert error(model, guidance, precision=precision, scales=scales)<limit


def test_half_precision_keeps_norms_and_softmax_in_float32():
    g = one_step_graph(student(SMALL), 'fp16')
    single = {n.op_type for n in g.nodes if n.output[0] not in g.halves}
    half = {n.op_type for n in g.nodes if n.output[0] in g.halves}
    assert {'LayerNormalization','Softmax'}<=single-half and {'Tanh','MatMul'}<=half


def test_casts_appear_only_where_the_precision_changes():
    g = Graph()
    x = g.node('Relu', [g.half('noise')], 'relu')
    assert x in g.halves
    for f in (g.single, g.half): f(x)
    g.half('noise')
    assert [n.op_type for n in g.nodes]==['Cast','Relu','Cast']


def test_table_has_one_added_to_the_scales():
    net = fold(student(SMALL))
    rows = modulation_table(net)
    block, last = net.blocks[0].adaLN_modulation.weight, net.final_layer.adaLN_modulation.weight
    assert rows.shape==(11, 1, 6*2*16+2*16)
    np.testing.assert_allclose(rows[3,0,:48], np.r_[block[3,:16], block[3,16:32]+1, block[3,32:48]], rtol=1e-6)
    np.testing.assert_allclose(rows[3,0,-32:], np.r_[last[3,:16], last[3,16:]+1], rtol=1e-6)


def test_quantization():
    w = np.random.default_rng(0).normal(size=(64,192)).astype(np.float32)
    q, scale = quantize_int8(w)
    assert np.all(np.abs(q*scale-w)<=scale/2*1.001) and q.min()==-127 and np.all(np.abs(q).max(0)==127)
    outlier = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([25.])])
    def squared_error(s): return float((outlier-(outlier/s).round().clamp(-128,127)*s).square().mean())
    best = best_quantization_scale(outlier)
    assert 127*best<25 and squared_error(best)<squared_error(25/127)


def test_calibration_depends_on_the_seeds_alone():
    model = student(SMALL)
    scales = calibrate(model, seeds=range(4))
    assert scales==calibrate(model, seeds=range(4)) and len(scales)==4*SMALL.depth
    assert scales!=calibrate(model, seeds=range(4, 8))


@pytest.mark.parametrize('options, message', [
    ({'precision':'fp8'}, 'expected one of fp32'), ({'opset':12}, 'expected 13 to 21'),
    ({'precision':'int8'}, 'expected scales=calibrate'), ({'guidance':float('inf')}, 'expected a finite number'),
])
def test_refused(options, message):
    with pytest.raises(ValueError) as e: one_step_graph(student(SMALL), **options)
    assert message in str(e.value)


def test_calibration_without_seeds_is_refused():
    with pytest.raises(ValueError, match='one or more'): calibrate(student(SMALL), seeds=())
