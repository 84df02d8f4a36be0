"Leases that are killed, slow or continued; a clock that the test drives passes the time, and one small lease is real."
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ditnano.config import Scale
from ditnano.dit import DiT, randomize_weights
from ditnano.edm import READERS, load_teacher, save_teacher
from ditnano.lab.evidence import rows_of
from ditnano.lab.execute import TimeLimitReached
from ditnano.lab.experiments import as_student
from ditnano.lab.lease import (
    MAX_FAILURES,
    LeaseWork,
    SimulatedClock,
    lease,
    missing_runs,
    run_lease,
    summarize_missing,
)
from ditnano.lab.notebooks import run_notebook
from ditnano.lab.packs import Packs, read_pack, take_packs
from ditnano.lab.runs import Run, collect, run_once

ROOT = Path(__file__).resolve().parents[2]
NO_MODELS = {'models': [], 'students': []}
NOTHING = {'losses': {'losses': ['L2'], 'setups': []}, 'depth': {'depths': []}, 'width': {'widths': []},
           'heads': {'heads': []}, 'ta': {'assistant': [1, 32, 4], 'settings': []}, 'mi1': {'mappings': []},
           'get_baseline': NO_MODELS, 'mlp_ratio': {'ratios': []},
           'layer_heads': {'layouts': []}, 'steps': {'steps': []}}
DESIGNS = [[1, 128, 8], [2, 96, 8], [5, 64, 4], [5, 64, 8], [9, 48, 6], [21, 32, 4]]
DIGITS = Scale(name='smoke', pairs=400, images=256, batch=32, samples=40, loss='L2', precision='fp32',
               experiments=NOTHING | {'sizes': {'designs': DESIGNS}})


class Killed(BaseException):
    "What no handler may catch."


class MortalClock(SimulatedClock):
    "Ends the lease at a moment in the middle of whatever is done then."
    def __init__(self, end=float('inf')):
        super().__init__()
        self.end = end

    def sleep(self, seconds):
        if self.now+seconds >= self.end: raise Killed
        super().sleep(seconds)


class SimulatedWork(LeaseWork):
    "Packs, records and weights are real; training only passes time, 17 s a run on a machine of speed 1."
    def __init__(self, *args, clock, speed=1., teacher='shipped', **kwargs):
        super().__init__(*args, **kwargs)
        self.clock, self.speed, self.teacher, self.computed = clock, speed, teacher, []

    def sleep(self, seconds): self.clock.sleep(seconds/self.speed)

    def preflight(self):
        self.sleep(2)
        self.record('preflight', {'machine': 'simulated'}, lambda folder: {'metrics': {'images/s': 1.}}, 'preflight')

    def has_teacher(self): return self.teacher == 'shipped'

    def teacher_rate(self):
        self.sleep(3)
        return 5000*self.speed

    def make_teacher(self, images, seconds):
        self.sleep(images/5000)
        save_teacher(load_teacher('digits32'), self.teacher_folder, {'images': images})
        self.keep_teacher()
        self.teacher = 'shipped'

    def evaluate_teacher(self, seconds): self.sleep(2)
    def pairs_seconds(self): return 10/self.speed
    def make_pairs(self, seconds): self.sleep(10)

    def measure(self):
        self.sleep(1)
        flops = dict.fromkeys((32, 48, 64, 96, 128), 1e12)
        self.rates = self.notes['rates'] = {'flops': flops, 'loss': 0., 'teacher': 0., 'extractors': 0.}

    def expected_seconds(self, config): return 17/self.speed

    def distill(self, config, minutes):
        self.computed.append(Run(self.runs, 'distill', config).key)
        def compute(folder):
            self.sleep(17)
            student = randomize_weights(DiT(as_student(config['student'])))
            student.save_pretrained(folder/'student', {'config': config})
            return {'metrics': {'FD-digitsnet': 20+random.random()}, 'samples': 40, 'device': {'device': 'cpu'}}
        return run_once(self.runs, 'distill', config, compute, 'run', self.scale.name, config['train']['seed'])


@pytest.fixture(autouse=True)
def readers():
    "Names of teachers mean afterwards what they meant before."
    before = dict(READERS)
    yield
    READERS.clear()
    READERS.update(before)


def quiet(line): pass


def simulate(folder, clock, minutes=3, take=None, scale=DIGITS, **kwargs):
    "A lease into folder/out; its work and its rows, None where it was killed."
    work = SimulatedWork(scale, Packs(folder/'out'), folder/'work', 'cpu', log=quiet, clock=clock, **kwargs)
    if take: work.taken = [name for names in take_packs(take, work.runs, work.weights)[:2] for name in names]
    work.pack_rest()
    try: return work, run_lease(work, minutes, clock, quiet)
    except Killed: return work, None


def packed_runs(folder):
    "Keys of the distilled students in the packs."
    names = [name for p in sorted(folder.glob('pack-*.tar')) for name in read_pack(p)[0]]
    records = [n for n in names if n.startswith('runs/distill-') and n.endswith('/result.json')]
    return {n.split('/')[1].partition('-')[2] for n in records}


def test_three_minutes_end_in_time(tmp_path):
    clock = SimulatedClock()
    work, rows = simulate(tmp_path, clock, scale=replace(DIGITS, seeds=(0, 1)))
    assert 0.9*180 <= clock.now <= 1.05*180
    assert set(work.computed) == packed_runs(tmp_path/'out') and len(work.computed) == 9
    assert {p.name for p in (tmp_path/'out').iterdir()} <= {f'pack-{i}.tar' for i in range(8)}


def test_leftover_time_is_named(tmp_path):
    clock = SimulatedClock()
    work, rows = simulate(tmp_path, clock, minutes=1.5)
    assert clock.now <= 90 and rows[-1]['what'] == 'not started' and 'do not fit into' in rows[-1]['note']


def test_machine_that_becomes_slow(tmp_path):
    "A run that was begun and does not end in time is the last one, and the only one unfinished."
    class Slowing(SimulatedWork):
        def distill(self, config, minutes):
            if len(self.computed) == 2:
                self.clock.sleep(60*minutes)
                raise TimeLimitReached('stopped at 80%')
            return super().distill(config, minutes)
    clock = SimulatedClock()
    work = Slowing(DIGITS, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet, clock=clock)
    rows = run_lease(work, 3, clock, quiet)
    assert rows[-1]['what'] == 'time is up' and '80%' in rows[-1]['note'] and clock.now <= 1.05*180
    assert len(packed_runs(tmp_path/'out')) == 2


def test_killed_at_any_moment(tmp_path):
    moments = [random.Random(7).uniform(1, 140) for _ in range(10)]
    for i, moment in enumerate(moments):
        first, second, home = (tmp_path/f'{i}-{k}' for k in ('first', 'second', 'home'))
        killed, rows = simulate(first, MortalClock(moment))
        assert rows is None
        kept = packed_runs(first/'out')
        assert len(set(killed.computed)-kept) <= 1   # at most the one in progress
        later, rows = simulate(second, SimulatedClock(), take=first/'out' if kept else None)
        assert not kept & set(later.computed) and rows[-1]['end'] <= 1.05*180
        for folder in (first, second):
            if not list(folder.glob('out/pack-*.tar')): continue
            take_packs(folder/'out', home/'runs', home/'weights', home/'evidence')
        assert missing_runs(DIGITS, home/'evidence') == []
        assert len(rows_of(collect(home/'evidence'), 'sizes', 'smoke')) == 6


def test_second_lease_has_nothing_to_do(tmp_path):
    simulate(tmp_path/'a', SimulatedClock())
    work, rows = simulate(tmp_path/'b', clock := SimulatedClock(), take=tmp_path/'a'/'out')
    assert work.computed == [] and clock.now < 30


def test_killed_while_a_pack_is_written(tmp_path, monkeypatch):
    "The packs before stay as they were, whatever was half-written beside them."
    simulate(tmp_path, MortalClock(60))
    before = {p.name: p.read_bytes() for p in (tmp_path/'out').glob('pack-*.tar')}
    packs, write = Packs(tmp_path/'out'), Path.write_bytes

    def half(path, data):
        write(path, data[:len(data)//2])
        raise Killed
    monkeypatch.setattr(Path, 'write_bytes', half)
    with pytest.raises(Killed): packs.add({'runs/distill-0123456789ab/result.json': bytes(9000)}, {})
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in (tmp_path/'out').glob('pack-*.tar')} == before
    assert packed_runs(tmp_path/'out')


def test_killed_between_a_record_and_its_pack(tmp_path):
    "The same command in the same folder packs what was finished, and computes the others; what was taken stays out."
    class Unpacked(SimulatedWork):
        def pack(self, folder, prefix):
            if len(self.computed) == 2: raise Killed
            super().pack(folder, prefix)
    clock, first = SimulatedClock(), tmp_path/'first'
    work = Unpacked(DIGITS, Packs(first/'out'), first/'work', 'cpu', log=quiet, clock=clock)
    with pytest.raises(Killed): run_lease(work, 3, clock, quiet)
    assert len(packed_runs(first/'out')) == 1
    again, rows = simulate(first, SimulatedClock())
    assert len(again.computed) == 6 and packed_runs(first/'out') == {*work.computed, *again.computed}
    later, rows = simulate(tmp_path/'second', SimulatedClock(), take=first/'out', scale=replace(DIGITS, seeds=(0, 1)))
    assert packed_runs(tmp_path/'second'/'out') == set(later.computed)


class Failing(SimulatedWork):
    "Runs of these numbers fail, each in another way."
    def __init__(self, *args, which, **kwargs):
        super().__init__(*args, **kwargs)
        self.which, self.tried = which, 0

    def distill(self, config, minutes):
        self.tried += 1
        if self.tried in self.which: raise FloatingPointError(f'loss is nan at step {self.tried}')
        return super().distill(config, minutes)


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    clock = SimulatedClock()
    work = Failing(DIGITS, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet, clock=clock, which=(1, 3))
    rows = run_lease(work, 3, clock, quiet)
    assert [r['note'] for r in rows if r['note']] == [f'FloatingPointError: loss is nan at step {k}' for k in (1, 3)]
    assert len(packed_runs(tmp_path/'out')) == 6
    notes = take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights')[2]
    assert list(notes['failed'].values()) == [r['note'] for r in rows if r['note']]


def test_runs_that_all_fail_end_the_lease(tmp_path):
    clock, what = SimulatedClock(), range(1, 99)
    work = Failing(DIGITS, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet, clock=clock, which=what)
    with pytest.raises(FloatingPointError, match=f'at step {MAX_FAILURES}'): run_lease(work, 3, clock, quiet)


def test_a_preflight_that_fails_is_noted(tmp_path):
    class NoPreflight(SimulatedWork):
        def preflight(self): raise RuntimeError('no kernel image is available')
    clock = SimulatedClock()
    work = NoPreflight(DIGITS, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet, clock=clock)
    rows = run_lease(work, 3, clock, quiet)
    assert rows[0]['note'] == 'RuntimeError: no kernel image is available' and len(packed_runs(tmp_path/'out')) == 8


def test_a_full_disk_costs_one_run(tmp_path, monkeypatch):
    "A pack that cannot be written leaves the pack before it; the run is named, and the next one is packed."
    write, full = Path.write_bytes, []

    def limited(path, data):
        if len(data) > 150_000 and not full and 'pack-' in str(path):
            full.append(path)
            write(path, data[:1000])
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write(path, data)
    monkeypatch.setattr(Path, 'write_bytes', limited)
    work, rows = simulate(tmp_path, SimulatedClock())
    notes = [r['note'] for r in rows if r['note']]
    assert full and len(notes)==1 and notes[0].startswith('OSError: [Errno 28] No space left on device')
    assert len(packed_runs(tmp_path/'out')) == len(work.computed)-1
    assert all(p.name.startswith('pack-') for p in (tmp_path/'out').iterdir())
    simulate(tmp_path, SimulatedClock())   # the same command, when there is space again
    assert packed_runs(tmp_path/'out') == set(work.computed)


def test_missing_minutes_are_reported(tmp_path):
    simulate(tmp_path/'a', SimulatedClock(), minutes=1.5)
    _, _, notes = take_packs(tmp_path/'a'/'out', tmp_path/'runs', tmp_path/'weights', tmp_path/'evidence')
    text = summarize_missing(DIGITS, notes, tmp_path/'evidence')
    assert 'of 8 runs are missing, about' in text and 'minutes at the rates of' in text
    assert 'no lease has measured rates' in summarize_missing(DIGITS, {}, tmp_path/'evidence')


def test_slow_machine_finishes_a_teacher_or_says_why(tmp_path, monkeypatch):
    clock = SimulatedClock()
    work, rows = simulate(tmp_path/'slow', clock, minutes=3, speed=0.1, teacher='none')
    assert any(r['what'].startswith('teacher:') for r in rows) and (tmp_path/'slow'/'work'/'weights').is_dir()
    assert clock.now <= 1.05*180
    with pytest.raises(ValueError, match='teacher: .* images/s here .* expected .* or more, as in') as e:
        simulate(tmp_path/'slower', clock := SimulatedClock(), minutes=3, speed=0.005, teacher='none')
    assert 'minutes' in str(e.value)


def test_another_teacher_is_refused(tmp_path):
    work = SimulatedWork(DIGITS, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet, clock=SimulatedClock())
    net = load_teacher('digits32')
    save_teacher(net, work.teacher_folder, {'images': 1})
    work.keep_teacher()
    assert take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights')[0] == ['digits32']
    assert take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights')[0] == []
    next(net.parameters()).data.add_(1)
    other = SimulatedWork(DIGITS, Packs(tmp_path/'out2'), tmp_path/'work2', 'cpu', log=quiet, clock=SimulatedClock())
    save_teacher(net, other.teacher_folder, {'images': 1})
    other.keep_teacher()
    with pytest.raises(ValueError, match="teacher 'digits32': another one"):
        take_packs(tmp_path/'out2', tmp_path/'runs', tmp_path/'weights')


TINY = Scale(name='smoke', pairs=40, images=32, batch=16, samples=24, loss='L2', precision='fp32',
             experiments=NOTHING | {'sizes': {'designs': [[1, 32, 4]]},
                                    'ta': {'assistant': [1, 32, 4], 'settings': [[0, 1, 0]]}})


@pytest.mark.slow
def test_real_lease_on_digits(tmp_path):
    rows = lease(TINY, 60, tmp_path/'out', device='cpu', work=tmp_path/'work', log=quiet)
    assert [r['what'] for r in rows][:4] == ['preflight', 'evaluation of the teacher', 'pairs', 'rates']
    new, _, notes = take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights', tmp_path/'evidence')
    kinds = sorted(n.partition('-')[0] for n in new)
    assert kinds == ['distill']*3+['preflight', 'teacher'] and notes['rates']['loss'] >= 0
    frame = collect(tmp_path/'evidence')
    assert frame[frame.kind == 'distill']['FD-digitsnet'].gt(0).all() and missing_runs(TINY, tmp_path/'evidence') == []
    again = lease(TINY, 60, tmp_path/'out2', tmp_path/'out', 'cpu', work=tmp_path/'work2', log=quiet)
    assert [r['what'] for r in again][-1] == 'rates'
    ratios = [read_pack(tmp_path/out/'pack-0.tar')[1]['ratio'] for out in ('out', 'out2')]
    assert ratios[0] == ratios[1]   # the second lease computed no run, and knows how far the first one's estimates were


@pytest.mark.slow
def test_real_teacher_is_trained_packed_and_used(tmp_path):
    work = LeaseWork(TINY, Packs(tmp_path/'out'), tmp_path/'work', 'cpu', log=quiet)
    work.make_teacher(64, 600)
    assert take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights')[0] == ['digits32']
    trained = load_teacher('digits32')
    assert trained.hash == load_teacher(tmp_path/'weights'/'teacher-digits32').hash
    assert trained.card['train']['images'] == 64 and trained.card['train']['anneal']
    assert work.has_teacher() and load_teacher('digits32').hash == trained.hash


def test_missing_packages_are_named_first(tmp_path):
    strange = Scale(name='smoke', data='nosuch', experiments=NOTHING | {'sizes': {'designs': []}})
    with pytest.raises(ValueError, match='images nosuch.*before a lease begins'):
        lease(strange, 1, tmp_path/'out', device='cpu', work=tmp_path/'work', log=quiet)
    assert not (tmp_path/'out').exists()


def bare(cwd, tree, *words, **env):
    "The command where there is Python with torch, and nothing of ours but a tree on PYTHONPATH: no HOME, no cache."
    ours = ('HOME', 'PYTHONPATH', *(k for k in os.environ if k.startswith(('DITNANO_', 'XDG_', 'GIT_'))))
    env = {k: v for k, v in os.environ.items() if k not in ours} | {'PYTHONPATH': str(tree)} | env
    done = subprocess.run([sys.executable, '-m', 'ditnano', *words], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr
    return done.stdout


def test_plan_from_an_empty_folder_without_home(tmp_path):
    said = bare(tmp_path, ROOT, 'lease', '--dry-run', '--minutes', '9', DITNANO_COMMIT='0'*40)
    assert 'preflight' in said and 'DiT (1, 128, 8)' in said and 'images/s of a teacher' in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_lease_of_a_bare_tree(tmp_path):
    "No git, no HOME, not installed, an empty folder: the lease computes, and its packs are taken home."
    tree, here = tmp_path/'tree', tmp_path/'here'
    shutil.copytree(ROOT/'ditnano', tree/'ditnano', ignore=shutil.ignore_patterns('__pycache__'))
    few = replace(TINY, experiments=NOTHING | {'sizes': {'designs': [[1, 32, 4]]}})
    (tree/'few.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(few.to_dict()))))
    for folder in (here, tmp_path/'tmp'): folder.mkdir()
    env, scale = {'TMPDIR': str(tmp_path/'tmp'), 'DITNANO_COMMIT': '0'*40}, str(tree/'few.yaml')
    said = bare(here, tree, 'lease', '--scale', scale, '--minutes', '60', '--out', 'packs', '--device', 'cpu', **env)
    assert 'DiT (1, 32, 4) L2' in said and 'bring it home: ditnano lease --take packs' in said
    assert [p.name for p in here.iterdir()] == ['packs']
    home = ('--runs', 'runs', '--weights', 'weights', '--evidence', 'evidence')
    said = bare(here, tree, 'lease', '--scale', scale, '--take', 'packs', *home, **env)
    assert 'scale smoke: 0 of ' in said and 'runs are missing' in said
    code = [json.loads(p.read_text())['code'] for p in here.glob('evidence/*/result.json')]
    assert code and all((c['commit'], c['dirty']) == ('0'*40, None) for c in code)


@pytest.mark.slow
def test_a_table_is_drawn_from_a_killed_lease(tmp_path):
    "Shapes that were finished have their numbers in Table 2, and the others are named as missing."
    simulate(tmp_path, MortalClock(75))
    take_packs(tmp_path/'out', tmp_path/'runs', tmp_path/'weights', tmp_path/'evidence')
    (tmp_path/'digits.yaml').write_text(yaml.safe_dump(json.loads(json.dumps(DIGITS.to_dict()))))
    parameters = {'scale': str(tmp_path/'digits.yaml'), 'runs': str(tmp_path/'evidence'), 'out': str(tmp_path/'drawn')}
    run_notebook(ROOT/'nbs'/'paper'/'table_2.ipynb', tmp_path/'table_2.ipynb', parameters, bar=False)
    table = (tmp_path/'drawn'/'table_2.md').read_text()
    finished = collect(tmp_path/'evidence').query("kind == 'distill'")['FD-digitsnet']
    assert 0 < len(finished) < 6 and 'FD-digitsnet' in table and 'scale smoke' in table
    assert sum(f'{fd:.2f}' in table for fd in finished) == len(finished)
