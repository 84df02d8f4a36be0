"""Reports of people about software of this kind, tried here; numbers are those of the list in issue 16.

What another file tests better is not repeated: a report without a test here has one in the file of its room.
"""
import errno
import io
import json
import os
import signal
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from ditnano import cli, repro
from ditnano.config import DiTConfig, TrainConfig
from ditnano.dit import DiT, randomize_weights
from ditnano.images import load_images
from ditnano.lab.experiments import distill_config
from ditnano.lab.runs import Run, read_result, run_once
from ditnano.repro import atomic, write_json
from ditnano.sampling import sample, sample_to


def student(**options):
    config = DiTConfig(1, 16, 2, **{'image_size': 16} | options)
    return randomize_weights(DiT(config), 1).eval()


def one_line(capsys, *words):
    "What a wrong command prints to stderr."
    with pytest.raises(SystemExit) as left: cli.main(list(map(str, words)))
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count('\n') == 1 and said.startswith('ditnano: '), said
    return said


# silent damage -----------------------------------------------------------------------------------------------------

def test_a_changed_metric_is_found_by_reading_and_by_the_doctor(tmp_path, monkeypatch):
    from ditnano.lab import doctor
    monkeypatch.setenv('DITNANO_RUNS', str(tmp_path/'runs'))
    run_once(tmp_path/'runs', 'toy', {'x': 1}, lambda folder: {'metrics': {'FID': 3.5}})
    file = next(tmp_path.glob('runs/toy-*/result.json'))
    file.write_text(file.read_text().replace('3.5', '2.5'))
    with pytest.raises(ValueError, match='result.json: damaged or altered since'): read_result(file.parent)
    assert any(str(path).startswith(str(file.parent)) and why for path, why, _ in doctor.verify())


def test_weights_cut_to_a_few_bytes_are_found_by_the_doctor(tmp_path, monkeypatch):
    from ditnano.lab import doctor
    monkeypatch.setenv('DITNANO_RUNS', str(tmp_path/'runs'))
    student().save_pretrained(tmp_path/'runs'/'student')
    file = tmp_path/'runs'/'student'/'model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])
    assert any('student' in str(path) and why for path, why, _ in doctor.verify())
    with pytest.raises(ValueError, match='damaged or altered'): DiT.from_pretrained(file.parent)


def test_another_configuration_in_the_folder_of_a_run_is_named(tmp_path):
    "A flipped byte in a run's config.json."
    run_once(tmp_path, 'toy', {'x': 1}, lambda folder: {'metrics': {}})
    file = next(tmp_path.glob('toy-*/config.json'))
    for content, text in (('{"x": 3}', 'another configuration; expected the one that hashes to'), ('{"x', 'not JSON')):
        file.write_text(content)
        with pytest.raises(ValueError, match=f'config.json: {text}') as e: run_once(tmp_path, 'toy', {'x': 1}, None)
        assert '\n' not in str(e.value)


def test_records_and_checkpoints_reach_the_disk(tmp_path, monkeypatch):
    "Each file is flushed before it is renamed, and its folder after."
    from ditnano.train import fit
    flushed, moves = [], []
    real, move = os.fsync, os.replace
    def note(fd):
        flushed.append(os.readlink(f'/proc/self/fd/{fd}') if sys.platform == 'linux' else fd)
        real(fd)
    def rename(a, b):
        moves.append((str(b), len(flushed)))
        move(a, b)
    monkeypatch.setattr(os, 'fsync', note)
    monkeypatch.setattr(os, 'replace', rename)
    write_json(tmp_path/'a.json', {})
    assert moves == [(str(tmp_path/'a.json'), 1)] and len(flushed) == 2
    class Task:
        n, identity, model = 4, {'task': 'toy'}, torch.nn.Linear(1, 1)
        def batch(self, idx): return (torch.ones(len(idx), 1),)
        def loss(self, model, batch, step): return model(batch[0]).square().mean()
    fit(Task(), TrainConfig(images=4, batch=4, lr=1e-2), tmp_path/'run', 'cpu')
    assert (str(tmp_path/'run'/'state.safetensors') in [b for b, _ in moves]) and len(flushed) >= 4


# waiting -----------------------------------------------------------------------------------------------------------

def test_an_extractor_that_is_missing_is_found_before_training(tmp_path, monkeypatch):
    from ditnano.config import Scale
    from ditnano.lab.execute import distill_run
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'none'))
    tiny = Scale(name='tiny', pairs=32, images=64, batch=16, samples=24, judges=('inception',), loss='L2')
    config = distill_config(tiny, (1, 32, 4))
    with pytest.raises((FileNotFoundError, ValueError), match='inception') as e:
        distill_run(config, tmp_path, 'tiny', 'cpu')
    assert '\n' not in str(e.value) and not (Run(tmp_path, 'distill', config).folder/'history.jsonl').exists()


# full disk ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_files():
    "Files may not grow beyond 2,000 bytes."
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_while_images_are_cached(tmp_path, monkeypatch, small_files):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    with pytest.raises(OSError, match='not written') as e: load_images('digits32')
    assert '\n' not in str(e.value) and 'digits32' in str(e.value)
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_a_full_disk_while_a_student_and_its_samples_are_saved(tmp_path, small_files):
    for write in (lambda: student().save_pretrained(tmp_path/'s'),
                  lambda: sample_to(tmp_path/'s.npy', student(), range(9)),
                  lambda: sample_to(tmp_path/'s.safetensors', student(), range(9))):
        with pytest.raises(OSError, match='not written') as e: write()
        assert '\n' not in str(e.value) and str(tmp_path/'s') in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_writing_has_the_name_of_its_file(tmp_path):
    with pytest.raises(OSError, match='No space left') as e:
        with atomic(tmp_path/'a.bin') as tmp:
            tmp.write_bytes(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device')
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(tmp_path/'a.bin') and not list(tmp_path.iterdir())


# a wrong result that looks right -----------------------------------------------------------------------------------

def test_5_labels_of_ten_classes_are_refused_by_a_student_of_three():
    from ditnano.sampling import balanced_labels
    net = student(classes=3, channels=1)
    with pytest.raises(ValueError, match='labels from 0 to 9; expected 0..3'):
        sample(net, range(10), balanced_labels(range(10)))
    assert sample(net, range(10)).shape == (10, 1, 16, 16)


def test_22_a_default_type_of_float64_changes_no_image():
    net = student()
    plain = sample(net, range(3))
    torch.set_default_dtype(torch.float64)
    try: wide = sample(net, range(3))
    finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(plain, wide)


# data lost or altered ----------------------------------------------------------------------------------------------

def test_8_a_device_is_not_replaced(tmp_path, capsys):
    os.mkfifo(tmp_path/'pipe.png')
    said = one_line(capsys, 'sample', '--seeds', '0-1', '--out', tmp_path/'pipe.png')
    assert 'is a device or a pipe' in said and (tmp_path/'pipe.png').is_fifo()


def test_12_the_home_folder_in_paths_of_the_command_and_of_functions(tmp_path, monkeypatch, capsys):
    from ditnano.pairs import PairDataset, make_pairs
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'home').mkdir()
    cli.main(['sample', '--seeds', '0-1', '--out=~/a.png'])
    cli.main(['sample', '--seeds', '0-1', '--out', '~/new/b.npy'])
    sample_to('~/c', student(), range(2))
    make_pairs('digits32', 2, '~/p', steps=1, device='cpu')
    assert len(PairDataset('~/p')) == 2
    assert sorted(p.name for p in (tmp_path/'home').iterdir()) == ['a.png', 'c', 'new', 'p']
    assert [p.name for p in tmp_path.iterdir()] == ['home']


def test_11_seeds_that_fall_leave_no_folder(tmp_path, capsys):
    said = one_line(capsys, 'pairs', '--seeds', '5-3', '--out', tmp_path/'p')
    assert "seeds '5-3'; expected a range" in said and not (tmp_path/'p').exists()


# surroundings ------------------------------------------------------------------------------------------------------

def test_17_an_odd_width_of_the_mlp_is_named():
    from ditnano.deploy import native
    from ditnano.deploy.engines import engine
    if not native.compiler(): pytest.skip('no C compiler')
    with pytest.raises(ValueError, match='precision bf16: ') as e:
        engine(randomize_weights(DiT(DiTConfig(1, 20, 2, image_size=16, mlp_ratio=1.25)), 1).eval(),
               backend='native', precision='bf16')
    if 'not what this processor computes in' in str(e.value): pytest.skip(str(e.value))
    assert 'native needs an even MLP width; got 25' in str(e.value)


def test_19_a_cache_without_permission_to_run_names_the_variable(monkeypatch, tmp_path):
    import ctypes

    from ditnano.deploy import native
    from ditnano.deploy.engines import engine
    if not native.compiler(): pytest.skip('no C compiler')
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    refuse = mock.Mock(side_effect=OSError('failed to map segment from shared object'))
    monkeypatch.setattr(ctypes, 'CDLL', refuse)
    with pytest.raises(OSError, match='from which programs may run .set DITNANO_CACHE'):
        engine(student(), backend='native')


def test_19_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'file'/'cache'))
    assert 'DITNANO_CACHE' in one_line(capsys, 'eval', '--samples', '20')


def test_24_eight_threads_begin_with_an_empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    found, errors = [], []
    def work():
        try: found.append(load_images('digits32', 'test').hash)
        except Exception as e: errors.append(repr(e))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors and len(found) == 8 and len(set(found)) == 1


# wishes ------------------------------------------------------------------------------------------------------------

def test_the_automatic_device_takes_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert repro.pick_device('auto').type == 'mps'
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert repro.pick_device('auto').type == 'cpu'


def test_a_grey_student_is_drawn_by_the_command(tmp_path):
    student(channels=1).save_pretrained(tmp_path/'grey')
    cli.main(['sample', '--weights', str(tmp_path/'grey'), '--seeds', '0-3', '--out', str(tmp_path/'a.png')])
    assert Image.open(tmp_path/'a.png').mode == 'L' and np.asarray(Image.open(tmp_path/'a.png')).std() > 10


def test_a_grey_student_is_evaluated_by_the_command(tmp_path):
    student(channels=1, image_size=32).save_pretrained(tmp_path/'grey')
    cli.main(['eval', '--weights', str(tmp_path/'grey'), '--channels', '1', '--samples', '20', '--device', 'cpu',
              '--out', str(tmp_path/'numbers.json')])
    assert 'FD-digitsnet' in json.dumps(json.loads((tmp_path/'numbers.json').read_text()))


def test_a_transparent_picture_lies_on_white():
    from ditnano.images import decode_picture
    clear, f = Image.new('RGBA', (16, 16), (200, 0, 0, 0)), io.BytesIO()
    clear.save(f, 'png')
    assert (decode_picture('x.png', f.getvalue()) == 255).all()
