"The doctor: EDM's releases, and damaged caches."
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ditnano.images import array_hash
from ditnano.lab import doctor
from ditnano.repro import file_hash


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache, a data folder and a TORCH_HOME with nothing in them."
    for name in ('DITNANO_CACHE', 'DITNANO_DATA', 'TORCH_HOME', 'DITNANO_RUNS', 'DITNANO_FIGURES'):
        monkeypatch.setenv(name, str(tmp_path/name))
    for kind in ('images', 'stats', 'native'): (tmp_path/'DITNANO_CACHE'/kind).mkdir(parents=True)
    return tmp_path/'DITNANO_CACHE'


def damaged():
    "What `verify` reports, by file name."
    return {path.name: why for path, why, _ in doctor.verify() if why}


def test_releases_are_listed_with_sizes(cache):
    said = doctor.releases()
    assert 'edm-imagenet-64x64-cond-adm.pkl' in said and '1184' in said and 'baseline-cifar10-32x32-uncond-ve' in said
    line, = [x for x in said.splitlines() if 'edm-cifar10-32x32-cond-ve.pkl' in x]
    assert '226' in line and line.endswith('no')
    file = cache.parent/'DITNANO_DATA'/'edm-cifar10-32x32-cond-ve.pkl'
    file.parent.mkdir()
    for size, state in ((100, '100 MB'), (226, 'yes')):
        with open(file, 'wb') as f: f.truncate(size*10**6)
        line, = [x for x in doctor.releases().splitlines() if file.name in x]
        assert line.endswith(state)
    assert doctor.releases() in doctor.report()


def test_a_damaged_image_cache(cache):
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    file = cache/'images'/'some.safetensors'
    save_file({'images': images, 'labels': labels}, file, metadata={'name': 'some', 'hash': array_hash(images, labels)})
    assert file.name not in damaged()
    about = {'name': 'some', 'hash': array_hash(images, labels)}
    save_file({'images': images+1, 'labels': labels}, file, metadata=about)
    os.utime(file, (1, 1))
    assert 'damaged' in damaged()[file.name]


def test_damaged_statistics(cache):
    file = cache/'stats'/'some.npz'
    np.savez(file, mu=np.zeros(64), sigma=np.eye(64), n=3)
    assert file.name not in damaged()
    with zipfile.ZipFile(file) as z: at = z.getinfo('sigma.npy').header_offset+1000
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert 'sigma' in damaged()[file.name]
    file.write_bytes(content[:100])
    assert 'damaged' in damaged()[file.name]


def test_damaged_compiled_code(cache):
    file = cache/'native'/'some.so'
    file.write_bytes(b'code')
    assert 'sha256' in damaged()[file.name]   # without its hash it cannot be trusted
    file.with_suffix('.sha256').write_text(file_hash(file))
    assert file.name not in damaged()
    file.write_bytes(b'cold')
    os.utime(file, (1, 1))
    assert 'some.so' in damaged()[file.name]
    file.with_suffix('.sha256').write_bytes(b'\xb0'+file_hash(file)[1:].encode())   # a flipped bit: no longer text
    assert 'some.so: damaged' in damaged()[file.name]
