"A bundle on its device: a fresh Python in the folder, without this package, with one line for each error."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from ditnano.config import DiTConfig
from ditnano.deploy.export import bundle, weights_hash
from ditnano.dit import DiT, randomize_weights
from ditnano.edm import to_bytes
from ditnano.sampling import build_sampler

MODEL = randomize_weights(DiT(DiTConfig(2, 24, 4, image_size=16)), 2).eval()
QUICK = ['--runtime','onnxruntime','--batch','1','--seconds','.1','--warm','0']


@pytest.fixture(scope='module')
def device(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundle')/'device'
    bundle(MODEL, folder, 'small', precisions=('fp32','int8'), calibration=4, images=3)
    return folder


def run(folder, *args, code=0, path=None, site=True, program=('run.py',)):
    "Run the command as on a board: a clean environment, nothing of this package on the path."
    command = [sys.executable, *([] if site else ['-S']), '-s', *program, *map(str, args)]
    env = {'PATH':os.environ['PATH'], 'OMP_NUM_THREADS':'1', **({'PYTHONPATH':str(path)} if path else {})}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode==code, (done.returncode, done.stdout, done.stderr)
    return (done.stderr if code else done.stdout).strip()


def test_measures_and_writes_a_record(device):
    text = run(device, '--runtime', 'onnxruntime', '--batch', 4, 1, '--seconds', .3, '--warm', .1)
    result = json.loads((device/'result.json').read_text())
    assert [r['batch'] for r in result['rows']]==[4,1] and result['parity']['passed']
    assert result['bundle']['weights']==weights_hash(MODEL)
    assert 0<result['frame']['p50_ms']<=result['frame']['p99_ms'] and 'frame time: p50' in text
    for row, report in zip(result['rows'], result['reports'], strict=True):
        assert row['ms']>0 and row['latency_s']>0 and report['card']['runtime'].startswith('onnxruntime')


def test_neither_torch_nor_this_package_is_loaded(device):
    ask = ("import sys, runner; code = runner.main(sys.argv[1:]); loaded = {m.split('.')[0] for m in sys.modules}; "
           "print(sorted(loaded & {'torch','ditnano','jetson','runner'})); sys.exit(code)")
    text = run(device, *QUICK, '--precision', 'int8', program=('-c', ask))
    assert text.splitlines()[-1]=="['jetson', 'runner']"


def test_images_are_the_students(device):
    run(device, '--runtime', 'onnxruntime', '--labels', '3,5,7', '--seed', 4)
    theirs = np.load(device/'images.npy')
    noise = torch.from_numpy(np.random.default_rng(4).standard_normal((3,3,16,16)).astype(np.float32))
    ours = to_bytes(build_sampler(MODEL, 1.5)(noise, torch.tensor([3,5,7]))).numpy()
    assert ours.std()>10 and np.abs(theirs.astype(int)-ours).max()<=1


def test_openvino(device):
    pytest.importorskip('openvino')
    text = run(device, '--runtime', 'openvino', '--precision', 'int8', '--batch', 2, '--seconds', .1, '--warm', 0)
    assert 'passed' in text


def test_without_runtime_or_numpy(device, tmp_path):
    for f in Path(np.__file__).parent.parent.glob('numpy*'): (tmp_path/f.name).symlink_to(f)
    assert 'no runtime is installed: pip install onnxruntime' in run(device, path=tmp_path, site=False, code=2)
    assert 'numpy is not installed' in run(device, site=False, code=1)


@pytest.mark.parametrize('args, message', [
    (['--labels','3,11'], 'label 11; expected 0 to 10'), (['--labels','three'], 'expected whole numbers'),
    (['--precision','fp8'], "precision 'fp8'; this bundle has fp32, int8"), (['--runtime','tflite'], 'expected one of'),
    (['--labels','1,2','--noise','no.npy'], 'expected a .npy file'), (['--batch','0'], 'batch 0; expected 1 or more'),
])
def test_one_line_for_each_error(device, args, message):
    text = run(device, *(['--runtime','onnxruntime'] if '--runtime' not in args else []), *args, code=2)
    assert message in text and text.startswith('run.py: ') and len(text.splitlines())==1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def flip_text(path, old, new, where='partition'):
    "The first or the last place, by `where`."
    before, found, after = getattr(path.read_text(), where)(old)
    assert found
    path.write_text(before+new+after)


@pytest.mark.parametrize('change, message', [
    (lambda d: flip(d/'fp32.onnx'), 'fp32.onnx is damaged or altered'),
    (lambda d: flip(d/'expected.npy'), 'expected.npy is damaged or altered'),
    (lambda d: (d/'fp32.onnx').unlink(), 'fp32.onnx is missing'),
    (lambda d: (d/'card.json').unlink(), 'no card.json here'),
    (lambda d: (d/'card.json').write_text('{'), 'card.json is damaged'),
    (lambda d: flip_text(d/'card.json', '"guidance": 1.5', '"guidance": 1.7'), 'card.json is damaged or altered'),
    (lambda d: flip_text(d/'card.json', '"sha256": "', '"sha257": "', 'rpartition'), 'card.json is damaged'),
])
def test_no_latency_of_a_damaged_bundle(device, tmp_path, change, message):
    copy = tmp_path/'copy'
    shutil.copytree(device, copy, ignore=shutil.ignore_patterns('result.json','__pycache__'))
    change(copy)
    assert message in run(copy, *QUICK, code=2) and not (copy/'result.json').exists()


@pytest.mark.parametrize('name', ['runner.py', 'jetson.py'])
def test_no_program_of_a_damaged_bundle_runs(device, tmp_path, name):
    copy = tmp_path/'copy'
    shutil.copytree(device, copy, ignore=shutil.ignore_patterns('result.json','__pycache__'))
    flip(copy/name)
    assert run(copy, *QUICK, code=1)==f'run.py: {name} is damaged or altered (SHA-256); copy the folder again'
    (copy/name).unlink()
    assert run(copy, *QUICK, code=1)==f'run.py: {name} is missing; copy the folder again'


def test_no_latency_of_other_images(device, tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(device, copy, ignore=shutil.ignore_patterns('result.json','__pycache__'))
    np.save(copy/'labels.npy', (np.load(copy/'labels.npy')+1)%10)
    card = json.loads((copy/'card.json').read_text())
    for k in ('arrays','programs','sha256'): del card[k] # as in a card without hashes
    (copy/'card.json').write_text(json.dumps(card))
    assert "not the student's images" in run(copy, *QUICK, code=2) and not (copy/'result.json').exists()


def test_files_of_the_operating_system_do_not_matter(device, tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(device, copy, ignore=shutil.ignore_patterns('result.json','__pycache__'))
    for n in ('.DS_Store','._fp32.onnx','Thumbs.db'): (copy/n).write_bytes(b'\0')
    assert 'passed' in run(copy, *QUICK)
