"""A campaign of faults, reproducible by its seed: python tests/faults/campaign [--whole] [--jobs N] [--only TEXT]

Each trial does something bad to a command or to a file: a kill, damage, a full disk, a race, a failing rank. It is
*survived* if the result is bit for bit that of an undisturbed run, *refused by name* if one line `ditnano: ...` named
the file and the status was not 0, and *failed* otherwise. The last column must be zero; else the status is 1.
"""
import argparse
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

for threads in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[threads] = '1'
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])

from driver import World, warm_up  # noqa: E402
from trials import COMMANDS, KINDS, prepare  # noqa: E402

COLUMNS = ('tried', 'survived', 'refused', 'failed')


def options():
    kinds = ', '.join(KINDS)
    parser = argparse.ArgumentParser('campaign', description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0, help='decides every random choice')
    parser.add_argument('--whole', action='store_true', help='all trials: minutes; default a few of each kind')
    parser.add_argument('--jobs', type=int, default=1, help='rows at once, each in a process of its own')
    parser.add_argument('--each', type=int, help='so many trials of each row at most')
    parser.add_argument('--only', nargs='*', default=[], help=f'kinds ({kinds}), or parts of the names of rows')
    parser.add_argument('--keep', type=Path, help='a folder for the trials, which stay there')
    parser.add_argument('--list', action='store_true', help='print the trials, and run none')
    parser.add_argument('--verbose', action='store_true', help='a line for each trial')
    return parser.parse_args()


def chosen(kind, trial, only): return not only or any(o == kind or o in trial.kind for o in only)


def table(rows):
    "Tried, survived, refused by name, failed; kind by kind and in all."
    total = {c: sum(row[c] for row in rows.values()) for c in COLUMNS}
    lines = [f"{'':44}{'tried':>8}{'survived':>10}{'refused by name':>17}{'failed':>8}"]
    for kind, row in {**rows, 'all': total}.items():
        lines.append(f"{kind:44}{row['tried']:>8}{row['survived']:>10}{row['refused']:>17}{row['failed']:>8}")
    return '\n'.join(lines), total['failed']


@functools.cache
def own_world(root):
    "The folder of this process."
    return World(root/f'process-{os.getpid()}', COMMANDS, prepare)


def run(trials, root, seed, verbose):
    "The trials of one row: how often each outcome, and the failures in words."
    row, failures = dict.fromkeys(COLUMNS, 0), []
    for trial in trials:
        begin = time.monotonic()
        outcome, why = trial(own_world(root), seed)
        row['tried'] += 1
        row[outcome] += 1
        if why: failures.append(f'{trial.kind}, number {trial.number}: {why}')
        if verbose: print(f'{trial.kind} {trial.number}: {outcome} {why} ({time.monotonic()-begin:.1f} s)', flush=True)
    return row, failures


def report_progress(tasks, every=60):
    "A line a minute, until all rows are done."
    begin = time.monotonic()
    while (todo := wait(tasks, every).not_done):
        print(f'{len(tasks)-len(todo)} of {len(tasks)} rows after {time.monotonic()-begin:.0f} s', file=sys.stderr)


def run_all(trials, root, given):
    "Row by row; with several jobs the rows are shared among processes."
    groups = {}
    for trial in trials: groups.setdefault(trial.kind, []).append(trial)
    if given.jobs == 1: found = {kind: run(group, root, given.seed, given.verbose) for kind, group in groups.items()}
    else:
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context('fork')) as pool:
            tasks = {kind: pool.submit(run, group, root, given.seed, given.verbose) for kind, group in groups.items()}
            report_progress(tasks.values())
            found = {kind: task.result() for kind, task in tasks.items()}
    return {kind: row for kind, (row, _) in found.items()}, [line for _, lines in found.values() for line in lines]


def main():
    given, begin = options(), time.monotonic()
    trials = [t for kind, make in KINDS.items() for t in make(given.whole) if chosen(kind, t, given.only)]
    trials = [t for t in trials if given.each is None or t.number < given.each]
    if not trials: sys.exit(f"campaign: no trial matches {' '.join(given.only)}; expected {', '.join(KINDS)}")
    if given.list: return print('\n'.join(f'{t.kind} {t.number}' for t in trials))
    warnings.filterwarnings('ignore', 'This process .* is multi-threaded', DeprecationWarning)
    root = given.keep or Path(tempfile.mkdtemp(prefix='faults'))
    warm_up()
    try: rows, failures = run_all(trials, root.resolve(), given)
    finally:
        if not given.keep: shutil.rmtree(root, ignore_errors=True)
    text, failed = table(rows)
    print(text)
    for line in failures: print(f'failed: {line}')
    times = os.times()
    processor = times.user+times.system+times.children_user+times.children_system
    print(f'{time.monotonic()-begin:.0f} s, {processor:.0f} s of processor time, seed {given.seed}')
    sys.exit(1 if failed else 0)


if __name__ == '__main__': main()
