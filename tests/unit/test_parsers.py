"""Whatever stands in a file or behind an option: it is read, or refused in one line that names the file or the value.

Hypothesis draws the inputs: any text for what people type; for files, a good one that was flipped, cut, or edited.
"""
import io
import json
import math
import pickle
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from ditnano import cli, config, pairs
from ditnano.deploy import jetson, runner
from ditnano.images import CIFAR_CLASSES, decode_picture, load_images
from ditnano.interop.checkpoint import read_checkpoint
from ditnano.interop.get_pairs import GETPairs
from ditnano.interop.nvidia import from_init_kwargs
from ditnano.interop.pictures import held_out
from ditnano.lab.packs import parse_size
from ditnano.lab.runs import read_result, run_once
from ditnano.lab.sweep import slurm_settings
from ditnano.metrics import load_statistics
from ditnano.principles import parse_count
from ditnano.repro import file_hash, load_weights, read_json, save_weights
from ditnano.state import read_history

few = settings(max_examples=25)
WORDS = (st.text(st.characters(codec='utf-8'), max_size=20)
         | st.from_regex(r'[0-9²٣]{1,4}[-,=.kMB ]?[0-9a-z]{0,4}', fullmatch=True))
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
LEAVES = NUMBERS | st.text(max_size=8)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                                        max_size=3), max_leaves=6)


@contextmanager
def named(*names, errors=(ValueError, OSError)):
    "An error in the block is one line with all these names; assumed to be the only way to fail."
    try: yield
    except errors as e:
        said = str(e)
        assert '\n' not in said and all(n in said for n in names), said


@st.composite
def damaged(draw, data):
    "A few bytes flipped, put in or left out, or the end cut off."
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, kind = draw(st.integers(0, max(0, len(data)-1))), draw(st.sampled_from('flip put drop cut'.split()))
        if kind == 'flip' and data: data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'put': data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == 'drop': del data[at:at+draw(st.integers(1, 9))]
        else: del data[at:]
    return bytes(data)


def places(value, at=()):
    "Paths of all values inside a JSON value."
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(p for k, v in inside for p in places(v, (*at, k)))]


@st.composite
def edited(draw, value):
    "A JSON value in which one value was replaced, or one entry left out."
    value = json.loads(json.dumps(value))
    path = draw(st.sampled_from(places(value)))
    if not path: return draw(JSON)
    at = value
    for k in path[:-1]: at = at[k]
    if draw(st.booleans()): at[path[-1]] = draw(JSON)
    else: del at[path[-1]]
    return value


def folder(): return tempfile.TemporaryDirectory()


# what people type --------------------------------------------------------------------------------------------------

OPTIONS = {'seeds': cli.parse_seeds, 'labels': lambda t: cli.parse_ints(t, 'labels'), 'design': cli.parse_design,
           'count': parse_count, 'size': parse_size, 'slurm': lambda t: slurm_settings([t])}


@pytest.mark.parametrize('parse', OPTIONS.values(), ids=OPTIONS)
@given(text=WORDS)
@example('²').via('a digit that is no number')
@example('1-²').via('a digit that is no number')
def test_an_option_is_read_or_its_value_named(parse, text):
    with named(repr(text), 'expected'): parse(text)


@given(st.integers(0, 10**9), st.sampled_from(['B', 'kB', 'MB', 'MiB', '']))
def test_sizes(n, unit):
    assert parse_size(f'{n}{unit}') == n*{'B': 1, 'kB': 1000, 'MB': 10**6, 'MiB': 2**20, '': 1}[unit]


@given(st.dictionaries(st.from_regex('[a-z][a-z0-9_]{0,9}', fullmatch=True),
                       st.integers(0, 10**6) | st.from_regex('[a-z][a-z0-9:]{0,9}', fullmatch=True), max_size=4))
def test_settings_of_slurm_come_through(wanted):
    assume(not any(v == 'true' or k.startswith('slurm_') for k, v in wanted.items()))
    found = slurm_settings([f'{k}={v}' for k, v in wanted.items()])
    assert {k.removeprefix('slurm_'): v for k, v in found.items()} == wanted
    for k, v in list(wanted.items())[:1]:
        with pytest.raises(ValueError, match='given twice'): slurm_settings([f'{k}={v}', f'{k}={v}'])


@few
@given(st.sampled_from(['--max-params', '--max-latency', '--top']), WORDS)
def test_a_wrong_option_of_the_command_ends_in_one_line(option, text):
    said = io.StringIO()
    with mock.patch('sys.stderr', said), mock.patch('sys.stdout', io.StringIO()):
        try: cli.main(['design', f'{option}={text}'])
        except SystemExit as e: assert e.code in (0, 2) and said.getvalue()
    assert 'Traceback' not in said.getvalue()


# configurations ----------------------------------------------------------------------------------------------------

KINDS = {c.__name__: c for c in (config.DiTConfig, config.GETConfig, config.UNetConfig, config.TrainConfig,
                                 config.Scale)}
GOOD = {'DiTConfig': {'depth': 2, 'width': 32}, 'Scale': {'name': 'x'}}


@pytest.mark.parametrize('name', KINDS)
@given(data=st.data())
def test_a_configuration_is_whole_or_refused(name, data):
    kind = KINDS[name]
    values = data.draw(st.dictionaries(st.sampled_from(sorted(kind.__dataclass_fields__)), JSON, max_size=3))
    with named(name, 'expected', errors=ValueError):
        made = kind.from_dict(GOOD.get(name, {}) | values)
        assert kind.from_dict(json.loads(json.dumps(made.to_dict()))) == made and len(made.hash) == 12


@given(st.sampled_from(['EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond', 'Net']),
       st.dictionaries(st.sampled_from(['model_type', 'model_channels', 'channel_mult', 'num_blocks', 'label_dim',
                                        'attn_resolutions', 'img_resolution', 'sigma_data', 'dropout', 'C_1',
                                        'resample_filter']), JSON, max_size=3))
@few
def test_constructor_values_of_a_released_network(kind, values):
    small = {'img_resolution': 8, 'img_channels': 3, 'model_channels': 4, 'model_type': 'SongUNet', 'num_blocks': 1,
             'channel_mult': [1]}
    with named('expected', errors=ValueError): from_init_kwargs(kind, small | values, empty=True)


SCALE = config.SMOKE.to_dict() | {'experiments': {'depth': {'depths': [1, 2]}}}


@given(edited(SCALE) | st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_a_scale_file_is_whole_or_refused(values):
    with folder() as d, named('any.yaml'):
        (Path(d)/'any.yaml').write_text(json.dumps(values))   # every JSON text is YAML, but for some numbers
        config.load_scale(Path(d)/'any.yaml')


@given(damaged(json.dumps(SCALE, indent=1).encode()))
def test_a_damaged_scale_file_is_whole_or_refused(content):
    with folder() as d, named('any.yaml'):
        (Path(d)/'any.yaml').write_bytes(content)
        config.load_scale(Path(d)/'any.yaml')


# files of runs -----------------------------------------------------------------------------------------------------

@given(st.binary(max_size=60) | damaged(b'{"a": [1, {"b": null}], "c": "x"}'))
@example(b'['*100_000)
def test_any_bytes_as_json(content):
    with folder() as d, named('a.json', 'expected'):
        (Path(d)/'a.json').write_bytes(content)
        assert isinstance(read_json(Path(d)/'a.json'), dict)


@pytest.fixture(scope='module')
def record(tmp_path_factory):
    "The text of a finished run's result."
    root = tmp_path_factory.mktemp('runs')
    made = run_once(root, 'toy', {'x': 1}, lambda folder: {'metrics': {'FID': 3.5}}, 'a toy', 'smoke')
    return next(root.glob('toy-*/result.json')).read_bytes(), made


@given(data=st.data())
def test_a_record_is_unaltered_or_refused(record, data):
    content, made = record
    with folder() as d, named('result.json', 'expected'):
        (Path(d)/'result.json').write_bytes(data.draw(damaged(content)))
        assert read_result(d) == made


@given(data=st.data())
def test_an_edited_record_is_refused(record, data):
    _, made = record
    other = data.draw(edited(made))
    assume(other != made)
    with folder() as d, named('result.json', 'expected'):
        (Path(d)/'result.json').write_text(json.dumps(other))
        assert 'sha256' not in read_result(d)      # a record from before records had a hash


HISTORY = ''.join(json.dumps({'step': n, 'loss': 0.5, 'seconds': 1.0})+'\n' for n in (1, 2, 3)).encode()


@given(damaged(HISTORY) | st.binary(max_size=40))
def test_a_history_is_read_or_its_line_named(content):
    with folder() as d, named('history.jsonl'):
        (Path(d)/'history.jsonl').write_bytes(content)
        assert all(isinstance(line, dict) for line in read_history(d))


@pytest.fixture(scope='module')
def made_pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp('pairs')/'p'
    class Gaussian:
        sigma_min, sigma_max, hash, name = 0., math.inf, 'gaussian-1', 'gaussian'
        cfg = SimpleNamespace(channels=1, image_size=8, label_dim=0)
        def __call__(self, x, sigma, labels=None): return x/(1+4*sigma**2)
    return pairs.make_pairs(Gaussian(), 4, out, steps=1, shard=2, device='cpu')


@given(data=st.data())
def test_a_manifest_is_read_or_named(made_pairs, data):
    good = json.loads((made_pairs/'manifest.json').read_text())
    if data.draw(st.booleans()): del good['sha256']   # a manifest from before manifests had a hash
    content = data.draw(edited(good).map(lambda v: json.dumps(v).encode()) | damaged(json.dumps(good).encode()))
    with folder() as d:
        for p in made_pairs.glob('*.safetensors'): (Path(d)/p.name).symlink_to(p)
        (Path(d)/'manifest.json').write_bytes(content)
        with named(Path(d).name): pairs.PairDataset(d).batch([0])


# weights and strangers' files --------------------------------------------------------------------------------------

def saved(folder):
    save_weights(folder, {'class': 'Linear'}, torch.nn.Linear(3, 2).state_dict())
    return (folder/'model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def weights(tmp_path_factory): return saved(tmp_path_factory.mktemp('weights')/'w')


@given(data=st.data())
def test_weights_without_a_hash_are_read_or_named(weights, data):
    "The header of a safetensors file, which no hash protects here."
    size = 8+int.from_bytes(weights[:8], 'little')
    content = data.draw(damaged(weights[:size]))+weights[size:]
    with folder() as d, named('model.safetensors'):
        (Path(d)/'config.json').write_text('{"class": "Linear"}')
        (Path(d)/'model.safetensors').write_bytes(content)
        assert all(torch.is_tensor(t) for t in load_weights(d)[1].values())


@given(data=st.data())
def test_weights_with_a_hash_are_the_same_or_refused(weights, data):
    with folder() as d, named('model.safetensors'):
        saved(Path(d)/'w')
        content = (Path(d)/'w'/'model.safetensors').read_bytes()
        other = data.draw(damaged(content))
        (Path(d)/'w'/'model.safetensors').write_bytes(other)
        load_weights(Path(d)/'w')
        assert other == content


def torch_file(what, zipped=True):
    f = io.BytesIO()
    torch.save(what, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


NET = {'w': torch.arange(4.).view(2, 2), 'b': torch.ones(2)}
PICKLES = [torch_file(NET), torch_file(NET, False), pickle.dumps({'ema': {'a': [1, 2.5, 'x', b'y', None]}}, 4)]


@given(st.sampled_from(PICKLES).flatmap(damaged) | st.binary(max_size=50).map(lambda b: b'\x80\x04'+b+b'.'))
def test_a_checkpoint_of_a_stranger_is_read_or_refused(content):
    with folder() as d, named('x.pkl', errors=ValueError):
        (Path(d)/'x.pkl').write_bytes(content)
        found, _ = read_checkpoint(Path(d)/'x.pkl')
        assert all(torch.is_tensor(t) for t in found.values())


LATENT = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(10)[:6]]
SIDES = {'latent': torch_file(LATENT), 'image': torch_file(LATENT[0]*0.3)}


@few
@given(st.sampled_from(sorted(SIDES)), st.data())
def test_pairs_of_get_are_read_or_named(side, data):
    with folder() as d, named('5.pkl'):
        for name, content in SIDES.items():
            (Path(d)/name).mkdir()
            (Path(d)/name/'5.pkl').write_bytes(data.draw(damaged(content)) if name == side else content)
        assert len(GETPairs(d)) == 6


def statistics(d):
    np.savez(Path(d)/'s.npz', mu=np.zeros(2), sigma=np.eye(2), n=5)
    return (Path(d)/'s.npz').read_bytes()


@given(data=st.data())
def test_statistics_are_read_or_named(data):
    with folder() as d, named('s.npz'):
        (Path(d)/'s.npz').write_bytes(data.draw(damaged(statistics(d))))
        load_statistics(Path(d)/'s.npz')


# pictures ----------------------------------------------------------------------------------------------------------

def picture(form='png', size=16, **options):
    f = io.BytesIO()
    Image.fromarray(np.arange(size*size*3, dtype=np.uint8).reshape(size, size, 3)).save(f, form, **options)
    return f.getvalue()


PICTURES = [picture(), picture('jpeg', quality=80), picture('bmp'), picture('gif'), picture('webp'), picture('tiff')]


@given(st.sampled_from(PICTURES).flatmap(damaged) | st.binary(max_size=40))
def test_a_picture_is_read_or_named(content):
    with named('x.png', 'expected', errors=ValueError):
        found = decode_picture('x.png', content)
        assert found.dtype == np.uint8 and found.shape[0] == 3


def batch(labels, count=2):
    return pickle.dumps({b'data': np.arange(count*3072, dtype=np.uint8).reshape(count, -1), b'labels': labels}, 2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ('DITNANO_CACHE', 'DITNANO_DATA'): monkeypatch.setenv(name, str(tmp_path/name))
    return tmp_path/'DITNANO_DATA'


def read_cifar(content):
    with folder() as d, mock.patch.dict('os.environ', DITNANO_CACHE=d, DITNANO_DATA=d):
        home = Path(d)/'cifar-10-batches-py'
        home.mkdir()
        (home/'test_batch').write_bytes(content)
        return load_images('cifar10', 'test')


@given(damaged(batch([3, 9])[:400]).map(lambda start: start+batch([3, 9])[400:]) | damaged(batch([3, 9])))
def test_a_batch_of_cifar_is_read_or_named(content):
    with named('test_batch', 'expected'):
        found = read_cifar(content)
        assert len(found) == len(found.labels) and 0 <= found.labels.min() and found.labels.max() < len(CIFAR_CLASSES)


@pytest.mark.parametrize('labels', [[3], [3, 10], [3, -1], 'ab', None, [[1], [2]], [1.5, 2]])
def test_labels_of_cifar_that_are_none(labels):
    with pytest.raises(ValueError, match='test_batch.* expected') as e: read_cifar(batch(labels))
    assert '\n' not in str(e.value)


LABELS = {'labels': [[f'00000/img{k:08d}.png', k % 2] for k in range(8)]}


def read_labelled(text):
    with folder() as d, mock.patch.dict('os.environ', DITNANO_CACHE=d):
        with zipfile.ZipFile(Path(d)/'edm.zip', 'w') as z:
            for k in range(8): z.writestr(f'00000/img{k:08d}.png', picture())
            z.writestr('dataset.json', text)
        return load_images(Path(d)/'edm.zip')


@few
@given(edited(LABELS).map(json.dumps) | damaged(json.dumps(LABELS).encode()))
@example(json.dumps({'labels': [[n, 10**12] for n, _ in LABELS['labels']]}))
def test_labels_of_a_data_set_are_read_or_named(text):
    with named('edm', 'expected', errors=ValueError): assert len(read_labelled(text).classes) <= 1000


def test_a_damaged_first_picture_is_named(cache):
    (cache/'own').mkdir(parents=True)
    for k in range(12): (cache/'own'/f'{k:02d}.png').write_bytes(picture())
    (cache/'own'/'00.png').write_bytes(b'no picture')
    split = 'test' if held_out('00.png') else 'train'
    with pytest.raises(ValueError, match='00.png: not a readable picture'): load_images(cache/'own', split)
    assert sum(len(load_images(cache/'own', split, skip_damaged=True)) for split in ('train', 'test')) == 11


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, randomize_weights
    from ditnano.sampling import sample_to
    model = randomize_weights(DiT(DiTConfig(1, 16, 2, image_size=8)), 1).eval()
    out = tmp_path_factory.mktemp('samples')/'s'
    sample_to(out, model, range(2))
    return model, out, {p.name: p.read_bytes() for p in out.iterdir()}


@few
@given(data=st.data())
def test_a_sample_is_whole_or_made_again(samples, data):
    from ditnano.sampling import sample_to
    model, out, good = samples
    name = data.draw(st.sampled_from(sorted(good)))
    other = data.draw(damaged(good[name]))
    (out/name).write_bytes(other)
    try:
        with named('expected', errors=ValueError):
            made = sample_to(out, model, range(2))
            if name.endswith('.png') and made: assert (out/name).read_bytes() == good[name]
            elif name.endswith('.png'):
                assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(c))) for c in (other, good[name])))
    finally:
        for n, content in good.items(): (out/n).write_bytes(content)


# a board's files ---------------------------------------------------------------------------------------------------

NVPMODEL = '< POWER_MODEL ID=0 NAME=15W >\nGPU MAX_FREQ 612000000\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n'
TRTEXEC = ('[I] [TensorRT v100300] \n[I] Throughput: 123.4 qps\n[I] Total Host Walltime: 3.0 s\n'
           '[I] Latency: min = 1.0 ms, max = 2.0 ms, mean = 1.5 ms, median = 1.5 ms, percentile(90%) = 1.9 ms\n'
           '&&&& PASSED TensorRT.trtexec')


def as_text(content): return content.decode('utf-8', 'replace')


@given(damaged(NVPMODEL.encode()).map(as_text) | st.text(max_size=60))
def test_power_modes(text):
    for mode in jetson.parse_nvpmodel_conf(text).values(): assert set(mode) == {'name', 'gpu_mhz'} and mode['name']


@given(damaged(TRTEXEC.encode()).map(as_text) | st.text(max_size=60))
@example('[I] Throughput: many qps')
@example('[I] Latency: min = 1.2.3 ms, max = - ms')
def test_a_report_of_trtexec(text):
    found = jetson.parse_trtexec(text)
    assert all(v is None or isinstance(v, float) for v in (found['qps'], found['walltime_s']))
    for k in ('latency', 'compute'): assert all(math.isfinite(v) for v in (found[k] or {}).values())


BOARD = {'proc/device-tree/model': b'NVIDIA Jetson Orin Nano\0', 'proc/device-tree/compatible': b'nvidia,tegra234\0',
         'etc/nv_tegra_release': b'# R36 (release), REVISION: 4.3', 'etc/nvpmodel.conf': NVPMODEL.encode(),
         'var/lib/nvpmodel/status': b'pmode:0002', 'proc/meminfo': b'MemTotal: 7800000 kB\nMemAvailable: 5 kB\n',
         'sys/class/devfreq/gpu/cur_freq': b'612000000\n', 'sys/class/devfreq/gpu/max_freq': b'918000000\n',
         'sys/class/devfreq/gpu/min_freq': b'306000000\n', 'sys/class/thermal/thermal_zone0/type': b'tj-thermal',
         'sys/class/thermal/thermal_zone0/temp': b'45000', 'sys/class/hwmon/hwmon0/name': b'ina3221',
         'sys/class/hwmon/hwmon0/in1_label': b'VDD_IN', 'sys/class/hwmon/hwmon0/in1_input': b'5000',
         'sys/class/hwmon/hwmon0/curr1_input': b'1000'}


@given(st.sampled_from(sorted(BOARD)), st.data())
def test_the_state_of_a_board_never_fails(name, data):
    with folder() as d:
        for path, content in BOARD.items():
            (Path(d)/path).parent.mkdir(parents=True, exist_ok=True)
            changed = data.draw(damaged(content) | st.binary(max_size=20)) if path == name else content
            (Path(d)/path).write_bytes(changed)
        json.dumps(jetson.read_state(d).to_dict(), allow_nan=False)


CARD = {'design': [1, 16, 4], 'weights': 'ab', 'guidance': 1.5, 'shape': [3, 16, 16], 'labels': 10, 'files': {}}


@given(edited(CARD).map(lambda v: json.dumps(v).encode()) | damaged(json.dumps(CARD).encode()) | st.binary(max_size=20))
def test_a_card_of_a_bundle(content):
    with folder() as d, named('card.json', errors=runner.UserError):
        (Path(d)/'card.json').write_bytes(content)
        assert set(CARD) <= set(runner.read_card(d))


def test_files_with_tensors_that_are_not_ours_are_no_shard(made_pairs, tmp_path):
    good = json.loads((made_pairs/'manifest.json').read_text())
    shard = made_pairs/good['shards'][0]['file']
    save_file({'q': torch.ones(2)}, tmp_path/shard.name)
    for p in made_pairs.glob('*.safetensors'):
        if p != shard: (tmp_path/p.name).symlink_to(p)
    good['shards'][0] |= {'bytes': (tmp_path/shard.name).stat().st_size, 'sha256': file_hash(tmp_path/shard.name)}
    del good['sha256']
    (tmp_path/'manifest.json').write_text(json.dumps(good))
    with pytest.raises(ValueError, match=shard.name): pairs.PairDataset(tmp_path).batch([0, 1])
