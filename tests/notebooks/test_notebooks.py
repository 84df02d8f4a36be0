"Every notebook of nbs/ runs from top to bottom at its default parameters, each in a process of its own."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
LIMIT = 480  # seconds for one notebook; library chapters are meant to take 20, experiments 60

SERVER = [sys.executable, str(Path(__file__).with_name('notebook_server.py'))]


def order(path):
    "Experiments first, since they take longest; drawing notebooks last, after the runs that they draw."
    folders = ['experiments', 'tutorials', '.', 'distill', 'interop', 'deploy', 'lab', 'paper']
    folder = path.relative_to(NBS).parent.as_posix()
    return folders.index(folder) if folder in folders else len(folders), path.name


def notebooks():
    found = [p for p in NBS.rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(NBS).parts)]
    for p in sorted(found, key=order):
        folder = p.relative_to(NBS).parent.as_posix()
        # experiments share pairs and runs, so they go one after another in one worker
        marks = [pytest.mark.xdist_group('runs')] if folder in ('experiments', 'paper') else []
        yield pytest.param(p, id=p.relative_to(NBS).with_suffix('').as_posix(), marks=marks)


def skip_flags():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['tst_flags']


@pytest.fixture(scope='session')
def sandbox(tmp_path_factory):
    "Runs and figures of the tests go to a folder of their own, which starts with the committed evidence."
    folder = tmp_path_factory.mktemp('sandbox')
    evidence = ROOT/'paper_figures'/'evidence'
    if evidence.is_dir(): shutil.copytree(evidence, folder/'paper_figures'/'evidence')
    return {**os.environ, 'DITNANO_RUNS': str(folder/'runs'), 'DITNANO_FIGURES': str(folder/'paper_figures')}


class Processes:
    "One new process for each notebook, where there is no fork that can be relied on."
    def start(self, notebook, cwd, env, output):
        with output.open('w') as out:
            self.process = subprocess.Popen([*SERVER, *notebook], cwd=cwd, env=env, stdout=out, stderr=out)

    def wait(self): return self.process.wait()
    def kill(self): self.process.kill()
    def close(self): pass


class Server:
    "A process that has imported the libraries, and forks for each notebook."
    def __init__(self):
        self.process = subprocess.Popen(SERVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, key): return json.loads(self.process.stdout.readline())[key]

    def start(self, notebook, cwd, env, output):
        job = {'notebook': notebook, 'cwd': str(cwd), 'env': env, 'output': str(output)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self.pid = self.read('pid')

    def wait(self): return self.read('status')
    def kill(self): os.killpg(self.pid, signal.SIGKILL)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope='session')
def server():
    server = Server() if sys.platform == 'linux' else Processes()
    yield server
    server.close()


def run_notebook(server, path, skip, force, cwd, env, output):
    "Exit status and output of a notebook's process; None in place of a status when it took too long."
    server.start([str(path), str(ROOT), skip, force], cwd, dict(env), output)
    late = []
    timer = threading.Timer(LIMIT, lambda: (late.append(path), server.kill()))
    timer.start()
    status = server.wait()
    timer.cancel()
    return None if late else status, output.read_text(errors='replace')


@pytest.mark.parametrize('path', list(notebooks()))
def test_notebook(path, sandbox, server, tmp_path):
    "Set DITNANO_TEST_FLAGS='slow' (or 'slow cuda') to run the flagged cells too."
    forced = os.environ.get('DITNANO_TEST_FLAGS', '')
    status, said = run_notebook(server, path, skip_flags(), forced, path.parent, sandbox, tmp_path/'output.txt')
    if status is None: pytest.fail(f'{path.name}: not done after {LIMIT} s\n{said[-4000:]}', pytrace=False)
    if status: pytest.fail(f'{path.relative_to(ROOT)}\n{said[-8000:]}', pytrace=False)


@pytest.mark.parametrize('runner', ['server', 'process'])
def test_a_failing_notebook_fails(tmp_path, server, runner):
    "The runner itself: a wrong cell must be reported, with its source, and the next notebook still runs."
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    for name, source, expected in (('bad', 'wrong = 1\nassert wrong == 2', 1), ('good', 'right = 2', 0)):
        cell = {'cell_type': 'code', 'id': 'a', 'metadata': {}, 'outputs': [], 'execution_count': None}
        nb = {'cells': [cell | {'source': source}], 'metadata': {'kernelspec': kernel}, 'nbformat': 4,
              'nbformat_minor': 5}
        path = tmp_path/f'{name}.ipynb'
        path.write_text(json.dumps(nb))
        used = server if runner == 'server' else Processes()
        status, said = run_notebook(used, path, 'slow', '', tmp_path, os.environ, tmp_path/f'{name}.txt')
        assert status == expected
        assert not status or ('AssertionError' in said and 'wrong == 2' in said)
