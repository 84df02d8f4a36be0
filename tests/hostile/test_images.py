"""Every mistake that a person makes with pictures: one line that names it, and nothing left in the cache."""
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from ditnano.images import CIFAR_CLASSES, MAX_MEMBER, load_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))


def png(k=0, size=(32,32), **options):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (size[1],size[0],3), np.uint8)).save(f, 'png', **options)
    return f.getvalue()


def fill(folder, classes=('cat','dog'), each=10):
    for i,c in enumerate(classes):
        (folder/c).mkdir(parents=True)
        for k in range(each): (folder/c/f'{k}.png').write_bytes(png(100*i+k))
    return folder


def refused(source, text, tmp_path, **how):
    with pytest.raises((ValueError, FileNotFoundError)) as caught: load_images(source, **how)
    said = str(caught.value)
    assert text in said and '\n' not in said and '; expected' in said, said
    assert not [p for p in (tmp_path/'cache').rglob('*') if p.is_file() and p.parent.name == 'images']


def header(w, h):
    "A PNG that claims a size and holds nothing."
    import struct
    import zlib
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    parts = (b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(b'\0'*100)), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n'+b''.join(chunk(*p) for p in parts)


@pytest.mark.parametrize('data, text', [
    (b'not a picture', 'cat/new.png: not a readable picture'), (b'', 'cat/new.png: not a readable picture'),
    (png()[:200], 'cat/new.png: not a readable picture'),
    (png(size=(1,1)), 'cat/new.png: 1x1 pixels; expected 4 or more a side'),
    (png(size=(400,5)), 'cat/new.png: 400x5 pixels'),
    (header(40_000, 40_000), 'cat/new.png: oversized'),
    (header(9_000, 9_000), 'cat/new.png: 9,000x9,000 pixels; expected 50,000,000 at most'),
])
def test_a_bad_picture_is_named(data, text, tmp_path):
    folder = fill(tmp_path/'photos')
    for split in ('train','test'):
        (folder/split/'cat').mkdir(parents=True)
        for k in range(8): (folder/split/'cat'/f'{k}.png').write_bytes(png(k))
        (folder/split/'cat'/'new.png').write_bytes(data)
    for c in ('cat','dog'):
        for p in (folder/c).iterdir(): p.unlink()
        (folder/c).rmdir()
    refused(folder, text, tmp_path)
    assert len(load_images(folder, skip_damaged=True)) == 8


def test_folders_that_are_none(tmp_path):
    (tmp_path/'empty').mkdir()
    refused(tmp_path/'empty', 'empty: no pictures; expected CLASS/*.png', tmp_path)
    refused(tmp_path/'absent', 'absent', tmp_path)
    refused('imagenet', "image set 'imagenet'", tmp_path)
    (tmp_path/'two').mkdir()
    for k in range(2): (tmp_path/'two'/f'{k}.png').write_bytes(png(k))
    refused(tmp_path/'two', 'two: 2 pictures; expected 12 or more', tmp_path)
    fill(tmp_path/'deep'/'photos')
    refused(tmp_path/'deep', 'photos/cat/0.png lies too deep; expected CLASS/picture', tmp_path)
    folder = fill(tmp_path/'mixed')
    (folder/'stray.png').write_bytes(png(7))
    refused(folder, 'stray.png lies beside class folders', tmp_path)
    (folder/'stray.png').rename(folder/'cat'/'stray.txt')
    refused(folder, 'cat/stray.txt is not a picture', tmp_path)
    assert len(load_images(folder, skip_damaged=True)) > 10


@pytest.mark.parametrize('size', [8, 15, 66, 17, '32'])
def test_sizes_out_of_range(size, tmp_path): refused(fill(tmp_path/'photos'),
                                                     f'size {size!r}; expected an even number from 16 to 64', tmp_path,
                                                     size=size)


def test_channels_and_split(tmp_path):
    refused('digits32', 'channels=2; expected 3 or 1', tmp_path, channels=2)
    refused('digits32', "split 'validation'; expected 'train' or 'test'", tmp_path, split='validation')


@pytest.mark.skipif(os.name != 'posix', reason='symbolic links')
def test_links_that_leave_the_folder(tmp_path):
    folder = fill(tmp_path/'photos')
    (tmp_path/'secret.png').write_bytes(png(5))
    (folder/'cat'/'link.png').symlink_to(tmp_path/'secret.png')
    refused(folder, 'cat/link.png: a link out of photos', tmp_path)
    (folder/'cat'/'link.png').unlink()
    (folder/'more').symlink_to(tmp_path)
    refused(folder, 'more: a link out of photos or to a folder', tmp_path)
    (folder/'more').unlink()
    (folder/'cat'/'inside.png').symlink_to(folder/'dog'/'1.png')
    assert len(load_images(folder))+len(load_images(folder, 'test')) == 21


def label_file(labels):
    def make(path):
        with zipfile.ZipFile(path, 'w') as z:
            for k in range(14): z.writestr(f'00000/{k}.png', png(k))
            z.writestr('dataset.json', labels if isinstance(labels, str) else json.dumps({'labels':labels}))
    return make


GOOD = [[f'00000/{k}.png', k%3] for k in range(14)]


@pytest.mark.parametrize('labels, text', [
    ([*GOOD, ['00000/99.png', 1]], '00000/99.png is in dataset.json alone'),
    (GOOD[:-1], '00000/13.png is in the pictures alone'),
    ([*GOOD[:-1], ['00000/13.png', -1]], 'label -1 of 00000/13.png'),
    ([*GOOD[:-1], ['00000/13.png', 1.5]], 'label 1.5'), ('{', 'dataset.json without labels'),
])
def test_label_files_of_edm(labels, text, tmp_path):
    label_file(labels)(tmp_path/'edm.zip')
    refused(tmp_path/'edm.zip', text, tmp_path)
    label_file(None)(tmp_path/'plain.zip')
    assert load_images(tmp_path/'plain.zip').classes == ('plain',)


def test_zips_that_mean_harm_or_are_cut_short(tmp_path):
    for name,text in (('../../out/0.png','leaves the zip'), ('/abs/0.png','leaves the zip')):
        with zipfile.ZipFile(tmp_path/'bad.zip', 'w') as z: z.writestr(name, png())
        refused(tmp_path/'bad.zip', text, tmp_path)
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('cat/0.png', b'\0'*(65<<20))
    refused(tmp_path/'bomb.zip', "member 'cat/0.png' has 68,157,440 bytes; expected at most 67,108,864", tmp_path)
    label_file(GOOD)(tmp_path/'whole.zip')
    data = (tmp_path/'whole.zip').read_bytes()
    (tmp_path/'cut.zip').write_bytes(data[:len(data)//2])
    refused(tmp_path/'cut.zip', 'cut.zip: damaged or truncated', tmp_path)
    with zipfile.ZipFile(tmp_path/'none.zip', 'w') as z: z.writestr('readme.txt', 'x')
    refused(tmp_path/'none.zip', 'none.zip: no pictures', tmp_path)


@pytest.mark.parametrize('arrays, text', [
    (dict(pixels=np.zeros((20,16,16,3), np.uint8)), "no array 'images'"),
    (dict(images=np.zeros((20,16,16,3))), 'float64; expected uint8'),
    (dict(images=np.zeros((20,16), np.uint8)), '(20, 16) uint8'),
    (dict(images=np.zeros((20,16,16,5), np.uint8)), 'expected 1, 3 or 4 channels'),
    (dict(images=np.zeros((20,16,16,3), np.uint8), labels=np.zeros(19, int)), 'labels (19,)'),
    (dict(images=np.zeros((20,16,16,3), np.uint8), labels=np.full(20, -1)),
     'labels (20,) int64; expected 20 whole numbers'),
    (dict(images=np.array([{}]*20, dtype=object)), 'objects instead of numbers'),
])
def test_arrays(arrays, text, tmp_path):
    np.savez(tmp_path/'a.npz', **arrays)
    refused(tmp_path/'a.npz', text, tmp_path)


def test_data_sets_of_another_form(tmp_path):
    pytest.importorskip('datasets')
    (tmp_path/'x.parquet').write_bytes(b'PAR1 nothing')
    refused(tmp_path/'x.parquet', 'not a data set', tmp_path)


# CIFAR-10 ---------------------------------------------------------------------------------------------------------

def write_tree(root, size=32, ext='png'):
    for split in ('train','test'):
        for i,c in enumerate(CIFAR_CLASSES):
            (root/split/c).mkdir(parents=True, exist_ok=True)
            (root/split/c/f'0000.{ext}').write_bytes(png(i, (size,size)))


def write_batches(folder):
    folder.mkdir(parents=True)
    for n in [*(f'data_batch_{k}' for k in range(1,6)), 'test_batch']:
        (folder/n).write_bytes(pickle.dumps({b'data':np.full((10,3072), 7, np.uint8), b'labels':list(range(10))},
                                            protocol=2))


def archive(*members):
    def make(d):
        with tarfile.open(d/'cifar10.tar', 'w') as tar:
            for name,kind,size in members:
                m = tarfile.TarInfo(name)
                m.type, m.size, m.linkname = kind, size, '/etc/passwd'
                tar.addfile(m, io.BytesIO(b'0'*size))
    return make


def truncated(d):
    write_tree(d/'t'/'cifar10')
    with tarfile.open(d/'whole.tar.xz', 'w:xz') as tar: tar.add(d/'t'/'cifar10', 'cifar10')
    (d/'cifar10.tar.xz').write_bytes((d/'whole.tar.xz').read_bytes()[:3000])


class Hostile:
    def __reduce__(self): return os.system, ('echo harm',)


def hostile(d):
    write_batches(d/'cifar-10-batches-py')
    (d/'cifar-10-batches-py'/'data_batch_3').write_bytes(pickle.dumps(Hostile()))


def twins(d):
    write_tree(d)
    (d/'train'/'cat'/'0000.jpg').write_bytes(png())


@pytest.mark.parametrize('make, text', [
    (lambda d: None, 'nothing in'), (archive(('../train/cat/a.png',tarfile.REGTYPE,10)), 'leaves the archive'),
    (twins, 'two pictures train/cat/0000'),
    (archive(('/train/cat/a.png',tarfile.REGTYPE,10)), 'leaves the archive'),
    (archive(('train/cat/a.png',tarfile.SYMTYPE,0)), 'is a link'),
    (archive(('train/cat/a.png',tarfile.REGTYPE,MAX_MEMBER+1)), 'expected at most 1,048,576'),
    (hostile, 'expected only numpy arrays'),
    (archive(('train/cat/a.png',tarfile.REGTYPE,10)), 'train/cat/a.png: not a readable picture'),
    (truncated, 'damaged or truncated'),
    (archive(('train/unicorn/a.png',tarfile.REGTYPE,10)), "class folder 'unicorn'"),
    (lambda d: write_tree(d, size=16), 'expected 32x32'),
])
def test_cifar_that_is_none(make, text, tmp_path):
    (tmp_path/'data').mkdir()
    make(tmp_path/'data')
    refused('cifar10', text, tmp_path, folder=tmp_path/'data')


def test_cifar_with_upper_case_endings_and_left_behind_files(tmp_path):
    write_tree(tmp_path/'data', ext='PNG')
    (tmp_path/'data'/'train'/'cat'/'._0000.png').write_bytes(b'\0')
    assert len(load_images('cifar10', folder=tmp_path/'data')) == 10
