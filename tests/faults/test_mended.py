"Faults that the campaign found, each as the smallest example of its kind."
import errno
import json
import os
import resource
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ditnano import cli, repro
from ditnano.config import DiTConfig
from ditnano.deploy import native
from ditnano.images import load_images
from ditnano.lab.doctor import verify
from ditnano.lab.processes import sigterm_interrupts
from ditnano.pairs import PairDataset, read_manifest, write_pairs
from ditnano.repro import atomic, lock


@pytest.fixture
def small_files():
    "No file can grow beyond 1,000 bytes."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_python(path): path.write_bytes(bytes(5000))


def with_rust(path): save_file({'x': torch.zeros(5000)}, path)


def with_numpy(path):
    with open(path, 'wb') as f: np.save(f, np.zeros(5000))


@pytest.mark.parametrize('write', [with_python, with_rust, with_numpy])
def test_a_file_without_room_is_named_whoever_writes_it(write, tmp_path, small_files):
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN   # as Python has it
    (tmp_path/'kept.bin').write_text('before')
    with pytest.raises(OSError, match='kept.bin') as e:
        with atomic(tmp_path/'kept.bin') as tmp: write(tmp)
    assert e.value.errno in (errno.EFBIG, None) and 'not written' in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ['kept.bin'] and (tmp_path/'kept.bin').read_text() == 'before'


def test_the_image_cache_without_room_is_named(tmp_path, monkeypatch, small_files):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    with pytest.raises(OSError, match='digits32-v1-test.safetensors: not written'): load_images('digits32', 'test')
    assert not list((tmp_path/'images').iterdir())


def test_an_image_cache_with_another_name_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    assert load_images('digits32', 'test').name == 'digits32'
    file = tmp_path/'images'/'digits32-v1-test.safetensors'
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"name":"digits32"', b'"name":"digits33"'))
    with pytest.raises(ValueError, match=f'{file.name}: damaged cache'): load_images('digits32', 'test')
    with safe_open(file, 'pt') as f: assert {'name', 'hash', 'sha256'} == set(f.metadata())


def test_a_manifest_that_was_altered_is_refused_and_found_by_the_doctor(tmp_path, monkeypatch):
    for name in ('CACHE', 'RUNS', 'FIGURES'): monkeypatch.setenv(f'DITNANO_{name}', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    recipe = {'teacher': {'name': 'none', 'sha256': 'a'*64}, 'image_dtype': 'fp32', 'shape': [1, 4, 4], 'classes': 0}
    shard = {'x': torch.ones(4, 1, 4, 4), 'y': torch.zeros(4, dtype=torch.int64), 'z': torch.ones(4, 1, 4, 4)}
    write_pairs(tmp_path/'p', recipe, {'shard': 4, 'noise': True}, 0, 4, lambda: lambda lo, hi: shard)
    file = tmp_path/'p'/'manifest.json'
    text, before = file.read_text(), PairDataset(tmp_path/'p').hash
    for old, new in (('a'*64, 'a'*63+'b'), ('"classes": 0', '"classes": 1'), ('"sha256": "a', '"sha257": "a'),
                     ('\n "sha256"', '\n "sha257"')):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match='manifest.json: damaged or altered'): PairDataset(tmp_path/'p')
        if '257' not in new: assert {path for path, why, _ in verify() if why} == {tmp_path/'p'}
    earlier = {k: v for k, v in json.loads(text).items() if k != 'sha256'}   # as earlier versions wrote it
    file.write_text(json.dumps(earlier))
    assert PairDataset(tmp_path/'p').hash == before and read_manifest(tmp_path/'p') == earlier


def test_a_lock_without_room_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match=r'not written.*\.lock'), lock(tmp_path/'.lock'): pass
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with lock(tmp_path/'.lock', wait=0): pass


@pytest.mark.parametrize('content', ['', 'filelock/2\npid=', 'no record'])
def test_a_lock_that_a_crash_left_behind_is_taken_over(content, tmp_path, monkeypatch):
    "Also an empty one: the crash came after the file was made and before a word was in it."
    monkeypatch.setattr(repro, 'LOCK_EXPIRY_S', 1)
    (tmp_path/'.lock').write_text(content)
    old = time.time()-1000
    os.utime(tmp_path/'.lock', (old, old))
    with lock(tmp_path/'.lock', wait=60): assert (tmp_path/'.lock').read_text().startswith('filelock')


def test_an_empty_lock_that_is_new_may_still_be_written(tmp_path):
    (tmp_path/'.lock').touch()
    with pytest.raises(TimeoutError, match='another process holds it'):
        with lock(tmp_path/'.lock', wait=0.3): pass
    assert (tmp_path/'.lock').read_text() == ''


def test_whoever_called_learns_which_signal_came():
    "So that the exit status of a sweep is 143 after SIGTERM, and 130 after Ctrl-C."
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            with sigterm_interrupts(): signal.raise_signal(signal.SIGTERM)
    finally: signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills a forked process')
def test_a_killed_decoding_of_pictures_leaves_no_file(tmp_path, monkeypatch):
    "Pixels are first written to a file beside the cache file; it is removed when its process is dead."
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    for k in range(20):
        file = tmp_path/'photos'/'ab'[k%2]/f'{k}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 10*k, np.uint8)).save(file)
    pid = os.fork()
    if not pid:
        def kill_before_removal(event, args):
            if event == 'os.remove' and '.raw' in str(args[0]): os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill_before_removal)
        try: load_images(tmp_path/'photos')
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [p for p in (tmp_path/'cache'/'images').iterdir() if '.raw' in p.name]
    assert len(load_images(tmp_path/'photos')) >= 2
    assert [p.name[:9] for p in (tmp_path/'cache'/'images').iterdir()] == ['pictures-']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_a_compiled_module_turns_into_an_error_is_a_stop(number, monkeypatch, capsys):
    "As onnxruntime does when the signal comes while it is imported."
    def design(**options):
        try: signal.raise_signal(number)
        except KeyboardInterrupt: raise ImportError('initialization failed') from None
    monkeypatch.setitem(cli.COMMANDS, 'design', design)
    monkeypatch.setattr(cli, 'with_help', lambda command: command)
    with pytest.raises(SystemExit) as e: cli.main(['design'])
    assert e.value.code == 128+number and 'ditnano: stopped' in capsys.readouterr().err


@pytest.mark.skipif(native.compiler() is None, reason='no C compiler installed')
def test_compiled_code_whose_hash_is_no_text_is_compiled_again(tmp_path):
    design = native.design_header(DiTConfig(1, 32, 4))
    native.library(design, tmp_path)
    note = next(tmp_path.glob('*.sha256'))
    good = note.read_bytes()
    note.write_bytes(b'\xb0'+good[1:])
    native.library(design, tmp_path)
    assert note.read_bytes() == repro.file_hash(next(tmp_path.glob('*.so'))).encode()
