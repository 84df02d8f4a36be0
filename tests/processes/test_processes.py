"""Several processes train, sample and judge as one, whatever their clocks say; a sweep in processes stops in time."""
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

PROGRAM = textwrap.dedent('''
    import json, os, sys, time
    import torch
    from ditnano.config import DiTConfig, GETConfig, TrainConfig
    from ditnano.distill.recipes import make_recipe
    from ditnano.dit import DiT, randomize_weights
    from ditnano.pairs import PairDataset, ensure_pairs
    from ditnano.train import fit
    torch.set_num_threads(1)
    name, folder, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    pairs = PairDataset(ensure_pairs('digits32', 480), limit=8)
    beside = {'dmd':'digits32', 'ta':randomize_weights(DiT(DiTConfig(2, 32)), seed=1)}.get(name)
    options = {'ta':{'weights':(1,1,1)}, 'mi1':{'layers':(1,2)}}.get(name, {})
    student = GETConfig(1, 32, 4, 1, 2.) if name=='get-model' else DiTConfig(2, 32)
    task = make_recipe(name, student, pairs, 'L2', 0, beside, **options)
    time.sleep(pause*int(os.environ.get('RANK', 0)))          # clocks that disagree
    minutes = json.loads(sys.argv[4])[int(os.environ.get('RANK', 0))]   # limits that disagree
    fit(task, TrainConfig(images=8*6, batch=8, lr=1e-3), folder, 'cpu', save_every=pause, log_every=2, minutes=minutes)
''')


QUIET = {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1', 'DITNANO_MAX_WAIT': '200'}


@pytest.fixture
def launch(programs, ranks):
    "Runs a program in one process or in several, and waits for it."
    def run(processes, *argv):
        started = ranks(processes, *argv, **QUIET) if processes > 1 else [programs.start(*argv, env=QUIET)]
        for done in [program.wait(240) for program in started]: assert done.returncode == 0, done.stderr[-2000:]
    return run


@pytest.fixture
def train(launch, tmp_path):
    "Trains in so many processes; the tensors of the last checkpoint."
    (tmp_path/'program.py').write_text(PROGRAM)

    def run(name, processes, pause, minutes=(None, None), launch=launch):
        folder = tmp_path/f'{name}-{processes}'
        launch(processes, tmp_path/'program.py', name, folder, pause, json.dumps(minutes))
        return load_file(folder/'state.safetensors')
    return run


def torchrun(processes, *argv):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300,
                          env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr[-2000:]


def assert_close(one, two, prefix):
    "Tensors of two states, by name."
    mine, other = ({k:v for k, v in state.items() if k.startswith(prefix)} for state in (one, two))
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['get', 'dmd', 'ta', 'mi1', 'get-model'])
def test_two_processes_train_as_one(name, train):
    one, two = train(name, 1, 0.), train(name, 2, 0.02)
    assert one.keys() == two.keys() and ('partner.weight' in one or name != 'ta')
    assert_close(one, two, ('model.', 'partner.'))


def steps_done(folder):
    with safe_open(folder/'state.safetensors', 'pt') as f: return int(f.metadata()['step'])


def test_two_processes_stop_together(train, tmp_path):
    """The first has no time, the second has no limit: both stop together, and resume to the same end.

    These are started by torchrun itself.
    """
    train('get', 2, 0.02, (0, None), torchrun)
    assert steps_done(tmp_path/'get-2') == 2
    two, one = train('get', 2, 0.02, (None, 0), torchrun), train('get', 1, 0.)
    assert steps_done(tmp_path/'get-2') == 6
    assert_close(one, two, 'model.')


RUN = textwrap.dedent('''
    import contextlib
    import sys
    import torch
    from ditnano.config import Scale
    from ditnano.lab import execute
    from ditnano.lab.experiments import distill_config
    torch.set_num_threads(1)
    tiny = Scale(name='tiny', pairs=32, images=16*40, batch=16, lr=1e-2, samples=24, blocks=2,
                 references=('train','test'), loss='L2', precision='fp32')
    config, root, only = distill_config(tiny, (2,32,4)), sys.argv[1], sys.argv[2]=='train'
    execute.SHARD_SIZE = 10                                # three parts a block, so that both processes have some
    def stop(*args, **kwargs): raise InterruptedError('trained, and not one image drawn')
    if only:
        execute.sample = stop
        with contextlib.suppress(InterruptedError): execute.distill_run(config, root, 'tiny', 'cpu')
    else:
        record = execute.distill_run(config, root, 'tiny', 'cpu')
        again = execute.distill_run(config, root, 'tiny', 'cpu', minutes=0)
        assert record == again                             # found, at no cost, by every process
''')


@pytest.fixture
def run(launch, tmp_path):
    "One run in so many processes; its folder."
    (tmp_path/'run.py').write_text(RUN)

    def run(root, processes, what='all'):
        launch(processes, tmp_path/'run.py', tmp_path/root, what)
        return next((tmp_path/root).glob('distill-*'))
    return run


def record_of(folder):
    assert sorted(p.name for p in folder.iterdir() if p.suffix in ('.npy', '.safetensors') or p.name == 'parts') == []
    return json.loads((folder/'result.json').read_text())


def test_two_processes_evaluate_as_one(run, tmp_path):
    "From one and the same checkpoint: the images of two processes are those of one, and so is every number."
    run('one', 1, 'train')
    shutil.copytree(tmp_path/'one', tmp_path/'two')
    one, two = (record_of(run(*how)) for how in (('one', 1), ('two', 2)))
    assert one['metrics'] == two['metrics'] and 'FD-digitsnet (test) min' in one['metrics']
    assert two['device']['processes'] == 2 and 'processes' not in one['device']


def test_two_processes_are_one_run(run):
    "With training, where two processes add in another order: 1e-6 after 40 steps on one processor, 1e-5 on another."
    one, two = (record_of(run(*how))['metrics'] for how in (('alone', 1), ('together', 2)))
    assert one == pytest.approx(two, rel=1e-4)
    assert one['FD-digitsnet'] > 0


def test_local_processes_stop_in_time(tmp_path, monkeypatch):
    "Two long runs at once, and one that has to wait: nothing runs after the limit, and the long ones have checkpoints."
    from ditnano.config import Scale
    from ditnano.lab import sweep
    from ditnano.lab.experiments import distill_config
    from ditnano.lab.processes import RunsInProgress
    from ditnano.lab.runs import Run
    scale = Scale(name='tiny', pairs=32, images=16*1_000_000, batch=16, samples=24, loss='L2')
    configs, lines, begin = [distill_config(scale, (1, 32, h)) for h in (1, 2, 4)], [], time.monotonic()
    monkeypatch.setattr(sweep, 'RunsInProgress', lambda log: RunsInProgress(log, every=1))
    found = sweep.sweep(configs, tmp_path, 'tiny', 'processes', workers=2, minutes=0.6, device='cpu', log=lines.append)
    assert found == []
    progress = [lines.pop(lines.index(line)) for line in list(lines) if line.startswith('in progress: ')]
    assert all(any(f'DiT (1, 32, {h}) L2 ' in line for line in progress) for h in (1, 2))
    assert 30 <= time.monotonic()-begin < 150
    there = [(Run(tmp_path, 'distill', c).folder/'state.safetensors').is_file() for c in configs]
    assert there == [True, True, False]
    stopped = ['stopped at 0%, resumes at the next call']*2
    assert [line.split(' L2 ')[-1] for line in lines] == [*stopped, 'time is up: 3 runs left for the next call']


def test_a_local_process_waits_no_longer_than_the_limit(tmp_path):
    "A run held by a machine that is gone: the sweep says so, and ends."
    from ditnano.config import Scale
    from ditnano.lab import sweep
    from ditnano.lab.experiments import distill_config
    from ditnano.lab.runs import Run
    from ditnano.repro import LOCK_EXPIRY_S
    scale, lines = Scale(name='tiny', pairs=32, images=64, batch=16, samples=24, loss='L2'), []
    config = distill_config(scale, (1, 32, 4))
    folder = Run(tmp_path, 'distill', config).folder
    folder.mkdir(parents=True)
    owner = {'pid':1, 'host':'a-machine-that-is-gone', 'mode':'lease', 'duration':LOCK_EXPIRY_S, 'token':'00'}
    (folder/'.lock').write_text(''.join(['filelock/2\n', *(f'{k}={v}\n' for k,v in owner.items())]))
    begin = time.monotonic()
    assert sweep.sweep([config], tmp_path, 'tiny', 'processes', minutes=0.5, device='cpu', log=lines.append) == []
    assert time.monotonic()-begin < 150
    assert lines[0].startswith('1 of 1: DiT (1, 32, 4) L2 another process has it')
    assert 'process 1 on a-machine-that-is-gone' in lines[0]
    assert lines[1:] == ['time is up: 1 run left for the next call']


@pytest.mark.slow
def test_training_beside_busy_processes():
    from ditnano.lab.bench import bench_busy
    rows = bench_busy(1, (1, 32, 4), batch=4, rounds=1, seconds=0.1)
    assert len(rows) == 3 and all(r['quiet (images/s)'] > 0 and r['beside (images/s)'] > 0 for r in rows)
    with pytest.raises(ValueError, match='busy=0; expected 1 or more'): bench_busy(0)
