"""Pairs: what a dataset holds open, what it verifies, and what it says of damage and of teachers of every shape."""
import errno
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ditnano import pairs
from ditnano.config import UNetConfig
from ditnano.edm import build_denoiser
from ditnano.pairs import PairDataset, ensure_pairs, file_checksum, make_pairs, read_manifest, write_pairs
from ditnano.repro import file_hash, write_json


class Gaussian:
    "The smallest teacher: not a network, one channel, no classes."
    sigma_min, sigma_max, hash, name = 0., math.inf, 'gaussian-1', 'gaussian'
    cfg = SimpleNamespace(channels=1, image_size=8, label_dim=0)
    def __call__(self, x, sigma, labels=None): return x/(1+4*sigma**2)


def constant_shards(folder, count, size=4):
    "A set of many small shards of made-up pairs."
    recipe = {'teacher':{'name':'none', 'sha256':'0'*64}, 'image_dtype':'fp32', 'shape':[1,4,4], 'classes':0}
    def make(lo, hi): return {'x':torch.full((hi-lo,1,4,4), float(lo)), 'y':torch.zeros(hi-lo, dtype=torch.int64),
                              'z':torch.ones(hi-lo,1,4,4)}
    return write_pairs(folder, recipe, {'shard':size, 'noise':True}, 0, count*size, lambda: make)


def test_any_denoiser_of_any_shape_without_classes(tmp_path):
    data = PairDataset(make_pairs(Gaussian(), 20, tmp_path/'p', steps=3, shard=8, device='cpu'))
    z, x, y = data.batch(range(20))
    assert x.shape == (20, 1, 8, 8) and x.std() > 0.1 and not y.any() and data.recipe['classes'] == 0
    with pytest.raises(ValueError, match='no attribute hash'): make_pairs(lambda *a: a, 2, tmp_path/'q')
    net = build_denoiser('EDMPrecond', UNetConfig(model_channels=8, channel_mult=(1,), num_blocks=1,
                                                  attn_resolutions=(), image_size=12, channels=1,
                                                  label_dim=3)).eval()
    z, x, y = PairDataset(make_pairs(net, 8, tmp_path/'net', steps=1, device='cpu')).batch(range(8))
    assert x.shape == (8, 1, 12, 12) and 0 < int(y.max()) < 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('c++'), reason='torch.compile needs a C++ compiler')
def test_a_compiled_teacher_draws_the_same_images(tmp_path):
    torch.manual_seed(0)
    cfg = UNetConfig(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), image_size=8, label_dim=3)
    net = build_denoiser('EDMPrecond', cfg).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.2)
    def draw(compile):
        folder = make_pairs(net, 4, tmp_path/str(compile), steps=2, device='cpu', compile=compile)
        return PairDataset(folder).batch(range(4))
    plain, compiled = draw(False), draw(True)
    assert plain[1].std() > 0.1
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-5)


def test_many_shards_hold_few_files_open(tmp_path):
    data = PairDataset(constant_shards(tmp_path/'p', 3*pairs.MAX_OPEN))
    x = data.batch(range(len(data)))[1]
    assert torch.equal(x[:,0,0,0], torch.arange(len(data), dtype=torch.float32)//4*4)
    opened = sum(str(tmp_path) in line for line in open('/proc/self/maps')) if os.path.exists('/proc/self/maps') else 0
    assert opened <= pairs.MAX_OPEN
    assert torch.equal(data.batch([5])[1], x[5:6])


def change(folder, shard, edit, listed=False):
    m = read_manifest(folder)
    path = folder/m['shards'][shard]['file']
    tensors = {k:v.clone() for k,v in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    if listed:
        m['shards'][shard] |= {'bytes':path.stat().st_size, 'sha256':file_hash(path)}
        m['shards'][shard].pop('checksum', None)   # as in sets of earlier versions
        write_json(folder/'manifest.json', m)


def test_an_altered_shard_is_found_at_first_touch_and_a_wrong_number_names_its_pair(tmp_path):
    folder = constant_shards(tmp_path/'p', 3)
    change(folder, 1, lambda t: t['x'][2].fill_(9.))
    data = PairDataset(folder)
    data.batch(range(4))
    with pytest.raises(ValueError, match='pairs-000000004-000000007.safetensors: damaged or altered; its checksum'):
        data.batch([0, 5])
    with pytest.raises(ValueError, match='damaged or altered'): PairDataset(folder, check='hash')
    assert PairDataset(folder, check=None).batch([6])[1][0,0,0,0] == 9
    change(folder, 1, lambda t: t['x'][2].fill_(math.nan), listed=True)
    with pytest.raises(ValueError, match=r'the image of pair 6 \(seed 6\) is not finite'):
        PairDataset(folder).batch(range(8))
    change(folder, 1, lambda t: (t['x'].zero_(), t['z'][0].fill_(math.inf)), listed=True)
    with pytest.raises(ValueError, match=r'the noise of pair 4 \(seed 4\) is not finite'): PairDataset(folder)[4]


def test_every_flipped_bit_and_every_moved_page_changes_the_checksum(tmp_path):
    file, data = tmp_path/'f', np.random.default_rng(0).bytes(3*4096+21)
    def checksum(content):
        file.write_bytes(content)
        return file_checksum(file)
    good = checksum(data)
    assert len({good, checksum(b''), checksum(b'\1'), checksum(b'\2')}) == 4 and len(good) == 32
    for bit in (*range(0, 8*len(data), 97), *range(8*len(data)-200, 8*len(data))):
        changed = bytearray(data)
        changed[bit//8] ^= 1<<bit%8
        assert checksum(bytes(changed)) != good
    for moved in (data[4096:8192]+data[:4096]+data[8192:], data[:4096]+bytes(4096)+data[8192:], data[:-1]):
        assert checksum(moved) != good


def test_shards_of_earlier_versions_are_compared_by_their_sha256(tmp_path):
    folder = constant_shards(tmp_path/'p', 2)
    m = read_manifest(folder)
    for s in m['shards']: del s['checksum']
    write_json(folder/'manifest.json', m)
    assert PairDataset(folder).batch([5])[1].mean() == 4
    change(folder, 1, lambda t: t['x'][2].fill_(9.))
    with pytest.raises(ValueError, match='damaged or altered; its SHA-256 is'): PairDataset(folder).batch([5])


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    real, count = pairs.save_file, []
    def full(tensors, path):
        count.append(path)
        if len(count) == 3: raise OSError(errno.ENOSPC, 'No space left on device')
        real(tensors, path)
    monkeypatch.setattr(pairs, 'save_file', full)
    text = 'no space left on the disk; the shards before it are kept, run again to resume'
    with pytest.raises(OSError, match=text) as caught:
        make_pairs(Gaussian(), 40, tmp_path/'p', steps=1, shard=10, device='cpu')
    assert '\n' not in str(caught.value) and len(read_manifest(tmp_path/'p')['shards']) == 2
    assert sorted(p.name[:5] for p in (tmp_path/'p').iterdir() if p.name != '.lock') == ['manif', 'pairs', 'pairs']
    assert len(PairDataset(make_pairs(Gaussian(), 40, tmp_path/'p', steps=1, shard=10, device='cpu'),
                           check='hash')) == 40


@pytest.mark.parametrize('seeds', ['5-3', 'all', [1,3], range(0), [-1,0]])
def test_impossible_seeds_are_refused_before_a_folder_is_made(seeds, tmp_path):
    with pytest.raises(ValueError, match='seeds'): make_pairs(Gaussian(), seeds, tmp_path/'p')
    assert not (tmp_path/'p').exists()


def test_settings_that_do_not_fit_the_folder_are_named(tmp_path):
    make_pairs(Gaussian(), 20, tmp_path/'p', steps=1, shard=10, device='cpu')
    for text,how in (('made with sampler.steps=1, asked for sampler.steps=6', dict(steps=6)),
                     ('made with noise=True, asked for noise=False', dict(steps=1, store_noise=False)),
                     ('asked for sampler.precision=bf16', dict(steps=1, precision='bf16')),
                     ("expected 'fp32' or 'fp16'", dict(image_dtype='int8')),
                     ('batch=0', dict(batch=0))):
        with pytest.raises(ValueError, match=text): make_pairs(Gaussian(), 20, tmp_path/'p', shard=10, device='cpu',
                                                               **how)
    with pytest.raises(ValueError, match='would leave a hole'): make_pairs(Gaussian(), range(50,60), tmp_path/'p',
                                                                           steps=1, shard=10)


def test_pairs_on_demand_keep_precisions_apart(tmp_path, monkeypatch):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    a = ensure_pairs(Gaussian(), 4, steps=1, device='cpu')
    b = ensure_pairs(Gaussian(), 4, steps=1, device='cpu', precision='bf16')
    assert a != b and np.array_equal(PairDataset(a).batch(range(4))[0], PairDataset(b).batch(range(4))[0])
