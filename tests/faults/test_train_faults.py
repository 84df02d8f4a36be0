"Training under faults: nothing lost, nothing silent, every refusal with a name."
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ditnano.config import TrainConfig
from ditnano.state import load_state, read_history
from ditnano.train import fit, prepare_training

CFG = TrainConfig(images=64, batch=16, lr=1e-2)
IDENTITY = {'train': CFG.to_dict(), 'task': {'task': 'line'}}


class Line:
    "Fit y = 2x + 1; may call something in each step."
    def __init__(self, event=lambda step: None):
        self.x, self.event = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)), event
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, 1))
        self.n, self.identity = 64, {'task': 'line'}

    def batch(self, idx): return self.x[idx], 2*self.x[idx]+1

    def loss(self, model, batch, step):
        self.event(step.index)
        return (model(batch[0])-batch[1]).square().mean()


def tensors(folder): return load_file(folder/'state.safetensors')


def steps_done(folder):
    with safe_open(folder/'state.safetensors', 'pt') as f: return int(f.metadata()['step'])


def assert_finishes_as_one(folder, whole):
    fit(Line(), CFG, folder, 'cpu')
    fit(Line(), CFG, whole, 'cpu')
    a, b = tensors(folder), tensors(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def half(tmp_path):
    "A folder whose run stopped after two steps of four."
    fit(Line(), CFG, tmp_path/'half', 'cpu', stop_after=2, log_every=1)
    return tmp_path/'half'


@pytest.mark.parametrize('seed', range(40))
def test_a_flipped_bit_in_a_checkpoint_is_named(half, seed):
    draw, file = random.Random(seed), half/'state.safetensors'
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    accelerator, state = prepare_training(Line(), CFG, 'cpu')
    with pytest.raises(ValueError, match='state.safetensors') as e: load_state(state, file, IDENTITY)
    assert 'delete' not in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('size', [0, 7, 300, -1])
def test_a_checkpoint_cut_short_is_named(half, size):
    file = half/'state.safetensors'
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match='state.safetensors: damaged or cut short'): fit(Line(), CFG, half, 'cpu')
    assert file.exists()


def test_a_checkpoint_of_an_earlier_version_is_continued(half, tmp_path):
    from safetensors.torch import save_file
    with safe_open(half/'state.safetensors', 'pt') as f: meta = f.metadata()
    save_file(tensors(half), half/'state.safetensors', {k: meta[k] for k in ('step', 'seconds', 'identity')})
    assert_finishes_as_one(half, tmp_path/'whole')
    assert [h['step'] for h in read_history(half)] == [1, 2, 4]


def test_an_unreadable_checkpoint_is_not_called_damaged(half):
    (half/'state.safetensors').unlink()
    (half/'state.safetensors').mkdir()
    with pytest.raises(OSError, match='state.safetensors') as e: fit(Line(), CFG, half, 'cpu')
    assert 'damaged' not in str(e.value)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='needs a user whom permissions bind')
def test_a_checkpoint_of_someone_else_is_not_called_damaged(half):
    (half/'state.safetensors').chmod(0)
    with pytest.raises(PermissionError): fit(Line(), CFG, half, 'cpu')


@pytest.mark.parametrize('position', [0, 5, 60, -3])
def test_a_flipped_bit_in_the_history_is_named(half, position):
    data = bytearray((half/'history.jsonl').read_bytes())
    data[position] ^= 4
    (half/'history.jsonl').write_bytes(data)
    with pytest.raises(ValueError, match='history.jsonl: damaged or altered'): fit(Line(), CFG, half, 'cpu')


def test_a_broken_line_of_the_history_is_named(half):
    with open(half/'history.jsonl', 'a') as f: f.write('{"step": 3, "lo')
    with pytest.raises(ValueError, match='history.jsonl: line 3 is damaged'): read_history(half)
    fit(Line(), CFG, half, 'cpu', log_every=1)       # what was logged after the checkpoint is cut
    assert [h['step'] for h in read_history(half)] == [1, 2, 3, 4]


def test_a_student_without_its_checkpoint_is_not_trained_over(half):
    (half/'state.safetensors').unlink()
    (half/'student').mkdir()
    with pytest.raises(FileExistsError, match='a student but no checkpoint'): fit(Line(), CFG, half, 'cpu')


def test_a_history_without_its_checkpoint_is_reported(half, tmp_path, capsys):
    (half/'state.safetensors').unlink()
    assert_finishes_as_one(half, tmp_path/'whole')
    assert 'a history but no checkpoint' in capsys.readouterr().err
    assert [h['step'] for h in read_history(half)] == [4]


def test_a_full_disk_keeps_the_old_checkpoint(half, tmp_path):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match='the one before it is kept; the same command resumes') as e:
            fit(Line(), CFG, half, 'cpu')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'state.safetensors' in str(e.value) and steps_done(half) == 2
    assert sorted(p.name for p in half.iterdir()) == ['history.jsonl', 'state.safetensors']
    assert_finishes_as_one(half, tmp_path/'whole')


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_saves_before_it_acts(name, tmp_path, capsys):
    number = getattr(signal, name)
    def send(step): signal.raise_signal(number) if step == 1 else None
    def end(*_): raise SystemExit(3)
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(KeyboardInterrupt if name == 'SIGINT' else SystemExit):
            fit(Line(send), CFG, tmp_path/'a', 'cpu')
        assert signal.getsignal(signal.SIGTERM) is end
    finally: signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and f'{name}: stopped at step 2 of 4' in said and 'the same command resumes' in said
    assert steps_done(tmp_path/'a') == 2
    assert_finishes_as_one(tmp_path/'a', tmp_path/'whole')


def test_data_that_are_not_finite_are_named(tmp_path):
    task = Line()
    task.x[17] = float('nan')
    with pytest.raises(FloatingPointError, match='data: sample 17 holds a value that is not finite'):
        fit(task, CFG, tmp_path, 'cpu')
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(half):
    class Bad(Line):
        def loss(self, model, batch, step): return super().loss(model, batch, step)*float('nan')
    with pytest.raises(FloatingPointError, match='loss is nan at step 3.*is kept in .*lower learning rate'):
        fit(Bad(), CFG, half, 'cpu')
    assert steps_done(half) == 2


def test_variables_of_accelerate_change_nothing(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState
    fit(Line(), CFG, tmp_path/'plain', 'cpu')
    values = {'ACCELERATE_MIXED_PRECISION': 'bf16', 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': '4', 'WORLD_SIZE': '',
              'ACCELERATE_DYNAMO_BACKEND': 'INDUCTOR', 'ACCELERATE_USE_FSDP': 'true', 'RANK': '', 'LOCAL_RANK': ''}
    for k, v in values.items(): monkeypatch.setenv(k, v)
    AcceleratorState._reset_state(True)
    fit(Line(), CFG, tmp_path/'set', 'cpu')
    a, b = tensors(tmp_path/'plain'), tensors(tmp_path/'set')
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {k: os.environ[k] for k in values} == values


PROGRAM = textwrap.dedent('''
    import os, sys, time, torch
    from torch import nn
    from ditnano.config import TrainConfig
    from ditnano.train import fit
    class Slow:
        n, identity = 64, {'task':'slow'}
        def __init__(self):
            torch.manual_seed(5)
            self.model, self.x = nn.Linear(1, 1), torch.linspace(-1, 1, 64)[:,None]
        def batch(self, idx): return (self.x[idx],)
        def loss(self, model, batch, step):
            time.sleep(0.01)
            while step.index == 2 and not os.path.exists(sys.argv[2]): time.sleep(0.05)
            return (model(batch[0])-1).square().mean()
    fit(Slow(), TrainConfig(images=16*40, batch=16, lr=1e-2), sys.argv[1], 'cpu', save_every=0.2, log_every=1)
''')


def start(folder):
    "A run of 40 steps that stands still in its third until there is a file named go."
    command = [sys.executable, '-u', '-c', PROGRAM, str(folder/'run'), str(folder/'go')]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_two_trainings_in_one_folder_follow_each_other(tmp_path):
    first = start(tmp_path)
    while not (tmp_path/'run'/'history.jsonl').exists(): time.sleep(0.05)
    second = start(tmp_path)
    said = second.stdout.readline()
    assert f'process {first.pid}' in said and 'waiting' in said
    (tmp_path/'go').touch()
    assert (first.wait(300), second.wait(300)) == (0, 0)
    lines = (tmp_path/'run'/'history.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [*range(1, 41)]


@pytest.mark.slow
def test_sigterm_from_outside_saves(tmp_path):
    process, run = start(tmp_path), tmp_path/'run'
    while not (run/'history.jsonl').exists(): time.sleep(0.05)
    process.terminate()
    (tmp_path/'go').touch()
    said = process.communicate(timeout=300)[0]
    assert process.returncode == -signal.SIGTERM and 'SIGTERM: stopped at step' in said
    assert f'step {steps_done(run)} of 40' in said and not (run/'.train.lock').exists()
