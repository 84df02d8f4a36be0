"Files of a student: compared before they are written, refused when they are wrong, damaged or another student's."
import json

import numpy as np
import pytest
import torch

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from ditnano.config import DiTConfig
from ditnano.deploy.export import (
    MAX_RELATIVE_ERROR,
    bundle,
    describe,
    file_images,
    open_file,
    parity,
    to_onnx,
    to_openvino,
    weights_hash,
)
from ditnano.deploy.runner import UserError
from ditnano.dit import DiT, randomize_weights
from ditnano.repro import file_hash
from ditnano.sampling import sample

SHAPES = [
    DiTConfig(2, 24, 4, image_size=16, classes=3),
    DiTConfig(1, 20, 5, image_size=16, channels=1, classes=1),
    DiTConfig(1, 36, 3, image_size=64, patch=4, classes=100),
    DiTConfig(1, 24, (2,), image_size=48, patch=4, channels=1, classes=2),
    DiTConfig(1, 16, 2, image_size=24, learn_sigma=True, mlp_ratio=1.5),
]
SMALL = SHAPES[0]


def student(cfg, seed=4): return randomize_weights(DiT(cfg), seed).eval()


def name(c): return f'{c.image_size}px-{c.channels}ch-p{c.patch}-{c.width}x{c.heads}-k{c.classes}'


@pytest.mark.parametrize('cfg', SHAPES, ids=name)
def test_shapes_go_through_onnx_openvino_and_bundle(tmp_path, cfg):
    model = student(cfg)
    for precision in ('fp32','fp16','int8'):
        made = to_onnx(model, tmp_path/f'{precision}.onnx', precision, calibration=4)
        assert made['error']<MAX_RELATIVE_ERROR[precision]
        assert made['shape']==[cfg.channels, cfg.image_size, cfg.image_size]
    seeds = range(3)
    with torch.no_grad(): want = sample(model, seeds, backend='eager')
    apart = (file_images(tmp_path/'fp32.onnx', seeds, cfg).int()-want.int()).abs()
    assert apart.max()<=1 and want.float().std()>10
    if not _missing('openvino'):
        to_openvino(model, tmp_path/'fp32.xml')
        assert parity(tmp_path/'fp32.xml', model, seeds=range(3))['error']<1e-4
    card = bundle(model, tmp_path/'device', precisions=('fp32',), images=2)
    assert card['files']['fp32']['sha256']==file_hash(tmp_path/'device'/'fp32.onnx')
    assert np.load(tmp_path/'device'/'noise.npy').shape==(2, cfg.channels, cfg.image_size, cfg.image_size)


def _missing(module):
    try: __import__(module)
    except ImportError: return True
    return False


@pytest.mark.parametrize('options', [{'batch':3}, {'opset':16}, {'opset':16,'precision':'int8'},
                                     {'guidance':1.,'precision':'fp16'}], ids=str)
def test_options(tmp_path, options):
    model, path = student(SMALL), tmp_path/'small.onnx'
    made = to_onnx(model, path, **{'calibration':4, **options})
    assert describe(path)=={k:v for k,v in made.items() if k not in ('file','bytes','sha256')}
    found = parity(path, model, seeds=range(6))
    assert found['images']==6 and found['error']<MAX_RELATIVE_ERROR[made['precision']]


def test_a_fixed_batch_takes_no_other(tmp_path):
    to_onnx(student(SMALL), tmp_path/'small.onnx', batch=3)
    with pytest.raises(UserError, match='2 images; expected 3'):
        open_file(tmp_path/'small.onnx')(np.zeros((2,3,16,16), np.float32), np.zeros(2, int))


def huge():
    model = student(DiTConfig(1, 16, 4, image_size=16), 5)
    model.blocks[0].mlp.fc1.weight.data *= 1e6
    return model


@pytest.mark.parametrize('make, error, message', [
    (lambda p: to_onnx(huge(), p, 'fp16'), FloatingPointError, 'not finite'),
    (lambda p: to_onnx(student(DiTConfig(1,16,4,label_dropout=0.)), p), ValueError, 'has no null label'),
    (lambda p: to_onnx(student(DiTConfig(1,16,4,steps=2)), p), ValueError, 'expected one of 1 step'),
    (lambda p: to_onnx(student(SMALL), p.with_suffix('.pt')), ValueError, 'ends in .onnx'),
    (lambda p: to_onnx(student(SMALL), p, 'bf16'), ValueError, 'expected one of fp32'),
    (lambda p: to_onnx(student(SMALL), p, batch=0), ValueError, 'batch=0'),
    (lambda p: to_onnx(student(SMALL), p, 'int8', calibration=0), ValueError, 'calibration=0'),
    (lambda p: open_file(p), FileNotFoundError, 'no file x.onnx'),
    (lambda p: open_file(p.with_suffix('.tflite')), ValueError, 'expected a file with the suffix'),
])
def test_refused_and_nothing_written(tmp_path, make, error, message):
    with np.errstate(all='ignore'), pytest.raises(error, match=message): make(tmp_path/'x.onnx')
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused(tmp_path):
    model, other = student(SMALL), student(SMALL, 5)
    to_onnx(model, tmp_path/'x.onnx')
    assert weights_hash(model)!=weights_hash(other)
    with pytest.raises(ValueError, match='is of other weights'): parity(tmp_path/'x.onnx', other)


@pytest.mark.parametrize('where', [.2, .5, .8])
def test_a_flipped_bit_is_refused(tmp_path, where):
    model = student(SMALL)
    to_onnx(model, tmp_path/'x.onnx')
    data = bytearray((tmp_path/'x.onnx').read_bytes())
    data[int(where*len(data))] ^= 4
    (tmp_path/'x.onnx').write_bytes(data)
    with pytest.raises(ValueError, match='x.onnx: (damaged or altered|not readable)'): open_file(tmp_path/'x.onnx')


def test_a_damaged_openvino_file_is_refused(tmp_path):
    pytest.importorskip('openvino')
    to_openvino(student(SMALL), tmp_path/'x.xml', 'fp16')
    data = bytearray((tmp_path/'x.bin').read_bytes())
    data[100] ^= 4
    (tmp_path/'x.bin').write_bytes(data)
    with pytest.raises(ValueError, match='damaged or altered'): open_file(tmp_path/'x.xml')
    (tmp_path/'x.bin').unlink()
    with pytest.raises(FileNotFoundError, match='no file x.bin'): open_file(tmp_path/'x.xml')
    with pytest.raises(ValueError, match='expected fp32 or fp16'): to_openvino(student(SMALL), tmp_path/'y.xml', 'int8')


def test_a_file_accepts_what_its_card_allows(tmp_path):
    to_onnx(student(SMALL), tmp_path/'x.onnx')
    run, z, y = open_file(tmp_path/'x.onnx'), np.zeros((2,3,16,16), np.float32), np.array([0,3])
    assert run(z, y).shape==z.shape
    wrong = ((z[:,:,::2,::2], y, r'noise has shape \(2, 3, 8, 8\)'), (z, y+1, 'label 4; expected 0 to 3'),
             (z, y[:1], r'labels have shape \(1,\)'))
    for noise, labels, message in wrong:
        with pytest.raises(UserError, match=message): run(noise, labels)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bundle(student(SMALL), '~/device', precisions=('fp32',), images=1)
    to_onnx(student(SMALL), '~/x.onnx')
    assert open_file('~/x.onnx') and sorted(p.name for p in tmp_path.iterdir())==['device','x.onnx']


def test_a_bundle_replaces_bundles_and_empty_folders_only(tmp_path):
    model, folder = student(SMALL), tmp_path/'device'
    folder.mkdir()
    (folder/'.DS_Store').write_bytes(b'\0')
    card = bundle(model, folder, precisions=('fp32','fp16'), jetpack5=True, images=2)
    assert json.loads((folder/'card.json').read_text())==card and not (folder/'.DS_Store').exists()
    assert card['files']['fp32']['jetpack5_sha256']==file_hash(folder/'fp32-jetpack5.onnx')
    for n,sha in card['arrays'].items(): assert sha==file_hash(folder/f'{n}.npy')
    (folder/'Thumbs.db').write_bytes(b'\0')
    assert bundle(model, folder, precisions=('fp32',), batch=3, images=4)['seeds'][1]==1_000_005
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'letter.txt').write_text('dear')
    with pytest.raises(ValueError, match='is not a bundle'): bundle(model, tmp_path/'mine')
    assert (tmp_path/'mine'/'letter.txt').read_text()=='dear'
