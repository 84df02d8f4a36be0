"""Runs notebooks for test_notebooks.py, each in a process of its own.

Without arguments it imports what most notebooks import, then reads one job a line from its standard input and forks a
process for each: imports are paid once. With `NOTEBOOK ROOT SKIP FORCE` it runs one notebook and ends, for systems that
cannot fork.
"""
import importlib
import json
import os
import sys
import warnings
from pathlib import Path

# Third-party modules only: this project's own are imported by the notebooks themselves.
SHARED = ('matplotlib.pyplot', 'nbdev.test', 'numpy', 'pandas', 'safetensors.torch', 'scipy.optimize', 'scipy.stats',
          'sklearn.datasets', 'torch', 'torch._dynamo', 'torch.onnx')


def run(path, root, skip, force):
    "Run a notebook in nbdev's shell: flagged cells are skipped; a failing cell prints its traceback."
    from nbdev.test import test_nb
    ok, seconds = test_nb(Path(path), skip_flags=skip.split(), force_flags=force.split(), basepath=root)
    print(f'{seconds:.1f} s')
    return 0 if ok else 1


def run_job(job):
    "In the forked process: its own session, folder, environment and output, then the notebook."
    os.setsid()
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(job['output'], os.O_WRONLY | os.O_CREAT, 0o600)
    for fd, stream in ((nothing, 0), (out, 1), (out, 2)): os.dup2(fd, stream)
    return run(*job['notebook'])


def serve():
    "Two lines of JSON for each job: the process that runs it, and the status with which that process ended."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for module in SHARED: importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0: return run_job(json.loads(line))
        print(json.dumps({'pid': pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({'status': os.waitstatus_to_exitcode(status)}), flush=True)
    return 0


if __name__ == '__main__': sys.exit(run(*sys.argv[1:]) if sys.argv[1:] else serve())
