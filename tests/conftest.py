"Shared by all tests: one thread each, this checkout before any installed one, this environment's commands on the path."
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    settings.register_profile('ci', max_examples=50, derandomize=True, deadline=None, suppress_health_check=quiet)
    settings.register_profile('long', max_examples=5000, deadline=None, suppress_health_check=quiet)
    settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))

ROOT = Path(__file__).resolve().parent.parent
SLOW_FOLDERS = ('notebooks', 'processes', 'evidence')
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')   # two tests run side by side; neither may take both cores
for name, first in {'PATH': Path(sys.executable).parent, 'PYTHONPATH': ROOT}.items():
    os.environ[name] = os.pathsep.join([str(first), *filter(None, [os.environ.get(name)])])


def pytest_collection_modifyitems(items):
    "`quick` is everything that is neither marked slow nor in a folder of slow tests."
    for item in items:
        folder = item.path.relative_to(ROOT/'tests').parts[0]
        if folder not in SLOW_FOLDERS and item.get_closest_marker('slow') is None: item.add_marker(pytest.mark.quick)


@pytest.fixture(scope='session')
def root(): return ROOT


NUMBER = itertools.count()


class Program:
    "A Python program that was started: its process, and what it printed once it has ended."
    def __init__(self, programs, argv, env, cwd):
        self.programs, self.argv, self.late = programs, [str(a) for a in argv], False
        self.files = [Path(programs.folder.name)/f'{next(NUMBER)}' for _ in ('output', 'errors')]
        self.pid = programs.begin(self.argv, {k: str(v) for k, v in (os.environ | env).items()}, str(cwd), self.files)

    def end_late(self):
        self.late = True
        with contextlib.suppress(ProcessLookupError): self.programs.kill(self.pid)

    def wait(self, timeout=600):
        "Status, output and errors; after so many seconds it is ended, and that is an error."
        timer = threading.Timer(timeout, self.end_late)
        timer.start()
        status = self.programs.end(self.pid)
        timer.cancel()
        done = subprocess.CompletedProcess(self.argv, status, *(f.read_text(errors='replace') for f in self.files))
        if self.late: pytest.fail(f'{self.argv[0]}: not done after {timeout} s\n{done.stdout}{done.stderr}'[-4000:])
        return done


class Programs:
    "Starts programs as `python *argv` would, in processes that need not import torch: see fork_server.py."
    def __init__(self):
        self.folder, command = tempfile.TemporaryDirectory(), [sys.executable, str(ROOT/'tests'/'fork_server.py')]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, job):
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def begin(self, argv, env, cwd, files):
        return self.ask({'argv': argv, 'env': env, 'cwd': cwd, 'files': [str(f) for f in files]})

    def end(self, pid): return self.ask({'wait': pid})
    def kill(self, pid): os.killpg(pid, signal.SIGKILL)
    def start(self, *argv, env=None, cwd='.'): return Program(self, argv, env or {}, cwd)
    def run(self, *argv, env=None, cwd='.', timeout=600): return self.start(*argv, env=env, cwd=cwd).wait(timeout)

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.folder.cleanup()


class NewPrograms(Programs):
    "The same where processes cannot be forked: each starts Python anew."
    def __init__(self): self.folder, self.started = tempfile.TemporaryDirectory(), {}

    def begin(self, argv, env, cwd, files):
        with files[0].open('w') as out, files[1].open('w') as err:
            process = subprocess.Popen([sys.executable, *argv], env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=err, start_new_session=True)
        self.started[process.pid] = process
        return process.pid

    def end(self, pid): return self.started[pid].wait()
    def kill(self, pid): self.started[pid].kill()
    def close(self): self.folder.cleanup()


@pytest.fixture(scope='session')
def programs():
    programs = Programs() if sys.platform == 'linux' else NewPrograms()
    yield programs
    programs.close()


@pytest.fixture(scope='session')
def new_programs():
    programs = NewPrograms()
    yield programs
    programs.close()


@pytest.fixture
def draw(programs, tmp_path):
    "Runs a notebook of nbs/paper with values for its parameters, in a process of its own."
    def run(name, env=None, **values):
        path = ROOT/'nbs'/'paper'/f'{name}.ipynb'
        values = json.dumps({k: str(v) for k, v in values.items()})
        done = programs.run(ROOT/'tests'/'run_notebook.py', path, ROOT, '', '', values, cwd=tmp_path, env=env)
        assert done.returncode == 0, (done.stdout+done.stderr)[-4000:]
    return run


@pytest.fixture
def ranks(programs):
    "Starts one program as the processes of a distributed run, as torchrun does; they are waited for by the caller."
    def start(count, *argv, **env):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        same = {'WORLD_SIZE': count, 'LOCAL_WORLD_SIZE': count, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port} | env
        return [programs.start(*argv, env=same | {'RANK': r, 'LOCAL_RANK': r}) for r in range(count)]
    return start
