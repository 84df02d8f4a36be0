"""Runs Python programs for the tests, each in a process forked from this one, which has imported the large libraries.

One line of JSON from the standard input starts a program, or waits for one; the answer is one line. Imports are paid
once, not by each of a hundred programs. Modules of this project are not among them: a program imports those itself.
"""
import contextlib
import importlib
import json
import os
import runpy
import sys
import warnings

SHARED = ('accelerate', 'matplotlib.pyplot', 'nbdev.test', 'numpy', 'onnxscript', 'pandas', 'safetensors.torch',
          'scipy.optimize', 'scipy.stats', 'sklearn.datasets', 'torch', 'torch._dynamo', 'torch.onnx')


def run(argv):
    "What `python *argv` does: a file, -c and a text, or -m and a module, and their arguments."
    kind, sys.argv = argv[0], argv if argv[0][0] != '-' else [argv[0], *argv[2:]]
    sys.path[0] = '' if kind in ('-c', '-m') else os.path.dirname(kind)
    if kind == '-m': runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
    elif kind == '-c': exec(compile(argv[1], '<string>', 'exec'), vars(sys.modules['__main__']))
    else: runpy.run_path(kind, run_name='__main__')


def enter(job):
    "In the forked process: its own session, folder, environment, and files for what it prints."
    os.setsid()
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(f, os.O_WRONLY | os.O_CREAT, 0o600) for f in job['files'])]
    for stream, fd in enumerate(files): os.dup2(fd, stream)


def serve():
    for module in SHARED:
        with contextlib.suppress(ImportError): importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        if 'wait' in job: answer = os.waitstatus_to_exitcode(os.waitpid(job['wait'], 0)[1])
        else: answer = os.fork()
        if answer == 0 and 'wait' not in job:
            enter(job)
            return job['argv']
        print(answer, flush=True)


if __name__ == '__main__':
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = serve()
    if program: run(program)
