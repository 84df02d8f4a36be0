"What happens to children when a sweep or a notebook is stopped or killed, and notebooks in odd surroundings."
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import nbformat
import pytest

from ditnano.lab.notebooks import run_notebook

SWEEP = """
import sys
from ditnano.config import Scale
from ditnano.lab.experiments import distill_config
from ditnano.lab.sweep import sweep
tiny = Scale(name='tiny', pairs=32, images=16*20000, batch=16, samples=24, judges=('digitsnet',), loss='L2',
             precision='fp32')
configs = [distill_config(tiny, (1, 32, h)) for h in (1, 2, 4, 8)]
sweep(configs, sys.argv[1], 'tiny', 'processes', workers=1, device='cpu')
"""

linux = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')


def children(pid):
    "Processes below a process, as (number, command line)."
    found = []
    for task in os.listdir('/proc'):
        if not task.isdigit(): continue
        try:
            with open(f'/proc/{task}/stat') as f: stat = f.read().rpartition(')')[2].split()
            with open(f'/proc/{task}/cmdline') as f: line = f.read()
        except OSError: continue
        if int(stat[1]) == pid and stat[0] != 'Z': found += [(int(task), line), *children(int(task))]
    return found


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as f: return f.read().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False


def wait_for(condition, seconds, what):
    deadline = time.monotonic()+seconds
    while not condition():
        if time.monotonic() > deadline: pytest.fail(f'{what} did not happen within {seconds} s')
        time.sleep(0.1)


def start(program, *args, **env):
    command = [sys.executable, '-c', program, *map(str, args)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | env, start_new_session=True, **pipe)


def end(process):
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@linux
@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_sweep_leaves_no_process_and_starts_no_further_run(number, tmp_path):
    process = start(SWEEP, tmp_path/'runs')
    try:
        def trains(): return list(tmp_path.glob('runs/distill-*/history.jsonl'))
        wait_for(lambda: process.poll() is not None or trains(), 300, 'training')
        assert process.poll() is None, process.communicate()
        below = [pid for pid, _ in children(process.pid)]
        assert below
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        wait_for(lambda: not any(map(alive, below)), 120, 'the end of the children')
    finally: end(process)
    assert process.returncode != 0
    assert len(list(tmp_path.glob('runs/distill-*'))) == 1
    if number != signal.SIGKILL: assert 'the same command resumes' in out, (out, err)


def notebook(folder, *sources):
    cells = [nbformat.v4.new_code_cell('x: int = 1', metadata={'tags': ['parameters']})]
    cells += [nbformat.v4.new_code_cell(s) for s in sources]
    path = folder/'some.ipynb'
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


NOTEBOOK = """
import sys
from ditnano.lab.notebooks import run_notebooks
run_notebooks([sys.argv[1]], 'best', runs=sys.argv[2], out=sys.argv[3])
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_notebook_leaves_no_kernel(number, tmp_path):
    (tmp_path/'paper').mkdir()
    started = tmp_path/'started'
    source = f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    short = tempfile.mkdtemp()   # a long path would be passed over
    process = start(NOTEBOOK, notebook(tmp_path/'paper', source), tmp_path/'runs', tmp_path/'out', TMPDIR=short)
    try:
        wait_for(lambda: process.poll() is not None or started.is_file() and started.read_text(), 300, 'the kernel')
        assert process.poll() is None, process.communicate()
        below = [pid for pid, _ in children(process.pid)]
        assert int(started.read_text()) in below
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        wait_for(lambda: not any(map(alive, below)), 120, 'the end of the kernel')
        assert [name for name in os.listdir(short) if name.startswith('ditnano')] == []
    finally:
        end(process)
        shutil.rmtree(short)
    if number != signal.SIGKILL: assert 'the same command resumes' in out, (out, err)


@pytest.mark.slow
def test_a_long_temporary_folder_and_a_foreign_kernel(tmp_path, monkeypatch):
    long = tmp_path/('t'*119)
    kernel = tmp_path/'jupyter'/'kernels'/'python3'
    for folder in (long, kernel): folder.mkdir(parents=True)
    spec = {'argv': ['/bin/false', '{connection_file}'], 'display_name': 'foreign', 'language': 'python'}
    (kernel/'kernel.json').write_text(json.dumps(spec))
    for name, value in dict(TMPDIR=long, JUPYTER_PATH=tmp_path/'jupyter').items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr('tempfile.tempdir', None)
    out = tmp_path/'copy.ipynb'
    run_notebook(notebook(tmp_path, 'import sys\nsys.executable'), out, cwd=tmp_path, bar=False)
    assert sys.executable in nbformat.read(out, 4).cells[-1].outputs[0].data['text/plain']
