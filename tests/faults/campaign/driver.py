"A warm process that forks one child per command, and the folders in which commands begin and what they leave."
import functools
import hashlib
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

LIMIT_S = 600     # A command that takes longer waits for ever; longer by the load of the machine
PATIENCE_S = 180  # For what a killed command started, likewise: it has a grace of 20 s for its checkpoint
WARM = ('accelerate', 'torch', 'ditnano.cli', 'ditnano.distill.recipes', 'ditnano.lab.lease', 'ditnano.lab.sweep',
        'ditnano.lab.notebooks', 'ditnano.lab.plan', 'ditnano.metrics', 'ditnano.interop.get_pairs',
        'ditnano.deploy.export', 'ditnano.deploy.engines', 'ditnano.deploy.web', 'sklearn.datasets',
        'torch._dynamo', 'torch.distributed.tensor', 'torch.onnx', 'filelock', 'typeguard', 'PIL.PngImagePlugin',
        'ditnano.lab.product', 'matplotlib.backends.backend_agg', 'onnxruntime')


class Failure(Exception):
    "What must not happen, in words."


class Ended(NamedTuple):
    "How a command ended."
    code: int   # Its exit status; -n if signal n ended it
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    "A command of the campaign; its paths are relative to the folder of the trial."
    words: str             # After `ditnano`, or after `program`
    after: str = ''        # The command in whose finished folder it begins
    result: tuple = ()     # Patterns of the files that are its result
    half: int = 0          # Stop training at this step: the state of a run in progress
    until: tuple = ()      # End before this call of this function, ('module:name', call): a product in progress
    program: str = ''      # Run this Python program instead


@functools.cache
def warm_up():
    "Import once what every command needs, and make checkpoints frequent and shards small."
    for name in WARM: importlib.import_module(name)
    from ditnano import cli, pairs, repro, train
    for name in ('torchvision', 'torch_fidelity'): repro.import_guarded(name)
    for command in cli.COMMANDS.values(): cli.with_help(command)
    cli.with_help = lambda command: command   # once is enough
    fix_plan(train.fit, pairs.make_pairs)
    train.fit = functools.partial(train.fit, save_every=0.02, log_every=2)
    pairs.make_pairs = functools.partial(pairs.make_pairs, shard=2, batch=2)


def fix_plan(fit, make_pairs):
    "What a product plans by the clock is fixed, and small; all else is as it is."
    from ditnano.lab import product

    def draw(teacher, count, out, **given): return make_pairs(teacher, count, out, **given | {'shard': 2, 'batch': 4})
    frame_time = product.frame_time
    product.PILOT = product.MAX_PAIRS = 8
    product.MAX_SAMPLES = 40
    product.fastest = lambda make, cfg, seconds, device='auto': (160., 'fp32')
    product.Product.share = lambda self, stage: 1.5
    product.choose_extractors = lambda data, loss: ['cifarnet']
    product.frame_time = lambda *given, **how: frame_time(*given, **how | {'frames': 2, 'max_seconds': 0.1})
    product.fit, product.make_pairs = functools.partial(fit, save_every=0.02), draw


class Child(NamedTuple):
    "A command in progress; what it prints goes into pipes, which a full disk does not reach."
    pid: int
    out: int
    err: int


def _redirect(out, err):
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = os.fdopen(1, 'w', closefd=False)
    sys.stderr = os.fdopen(2, 'w', closefd=False)


def _child(folder, command, env, inside):
    "The command line's own entry point in the trial's folder; gives the exit status."
    os.setsid()
    own = {'DITNANO_CACHE': folder/'cache', 'DITNANO_RUNS': folder/'runs', 'DITNANO_FIGURES': folder/'figures',
           'TMPDIR': folder/'tmp', 'DITNANO_TRIAL': folder, **env}
    os.environ.update({k: str(v) for k, v in own.items()})
    os.chdir(folder)
    tempfile.tempdir = None
    try:
        from ditnano import cli, train
        if command.half: train.fit = functools.partial(train.fit, stop_after=command.half)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if inside: inside(folder)
        if command.until: replace_call(*command.until, lambda: sys.exit(0))
        if command.program: return run_program(command)
        cli.main(shlex.split(command.words))
        return 0
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt: return 130   # before the command had its own handler
    except BaseException:
        traceback.print_exc()
        return 1


def run_program(command):
    "A program as Python would run it."
    sys.argv, sys.path[0] = [command.program, *shlex.split(command.words)], str(Path(command.program).parent.resolve())
    runpy.run_path(command.program, run_name='__main__')
    return 0


def replace_call(target, call, act):
    "Do this in place of the n-th call of a function 'module:name'."
    module, _, name = target.partition(':')
    owner, left = importlib.import_module(module), [call]
    *path, last = name.split('.')
    for part in path: owner = getattr(owner, part)
    work = getattr(owner, last)

    def wrapped(*args, **kwargs):
        left[0] -= 1
        return act() if left[0] == 0 else work(*args, **kwargs)
    setattr(owner, last, wrapped)
    home = sys.modules[work.__module__]   # where it was made, if it was only imported here
    if getattr(home, last, None) is work: setattr(home, last, wrapped)


def start(folder, command, env=None, inside=None):
    "Fork a child for a command."
    sys.stdout.flush()
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        for end in (to_out, to_err): os.close(end)
        return Child(pid, out, err)
    code = 1
    try:
        _redirect(to_out, to_err)
        code = _child(folder, command, env or {}, inside)
        sys.stdout.flush()
        sys.stderr.flush()
    finally: os._exit(code)


def _drain(end):
    "What is in a pipe now."
    os.set_blocking(end, False)
    found = b''
    try:
        while chunk := os.read(end, 1 << 16): found += chunk
    except BlockingIOError: pass
    return found


def is_late(begin, limit):
    "Whether so many seconds of a quiet machine are over; on a loaded one each counts for less."
    load = os.getloadavg()[0]/(os.cpu_count() or 1)
    return time.monotonic()-begin > limit*max(1, load)


def wait(child, limit=LIMIT_S):
    "Its end; one that does not end in time is killed, and that is a failure."
    begin, pause, texts = time.monotonic(), 0.002, [b'', b'']
    while not (done := os.waitpid(child.pid, os.WNOHANG))[0]:
        texts = [text+_drain(end) for text, end in zip(texts, child[1:])]
        if is_late(begin, limit):
            os.killpg(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            raise Failure(f'still there after {limit} s: {texts[1][-300:]}')
        time.sleep(pause)
        pause = min(2*pause, 0.05)
    texts = [(text+_drain(end)).decode(errors='replace') for text, end in zip(texts, child[1:])]
    for end in child[1:]: os.close(end)
    return Ended(os.waitstatus_to_exitcode(done[1]), *texts)


def descendants(folder):
    "Processes that a command of this trial started and that still live (Linux)."
    found, mark = [], f'DITNANO_TRIAL={folder}\0'.encode()
    for task in filter(str.isdigit, os.listdir('/proc') if sys.platform == 'linux' else ()):
        try:
            environ = Path(f'/proc/{task}/environ').read_bytes()
            if mark in environ+b'\0' and Path(f'/proc/{task}/stat').read_text().rpartition(')')[2].split()[0] != 'Z':
                found.append(int(task))
        except OSError: continue
    return found


def await_descendants(folder):
    "What a command started ends with it."
    begin = time.monotonic()
    while left := descendants(folder):
        if is_late(begin, PATIENCE_S):
            for pid in left: os.kill(pid, signal.SIGKILL)
            raise Failure(f'{len(left)} processes go on after the end of the command that started them')
        time.sleep(0.1)


def refusal(ended, names=()):
    "Whether a command refused in one line that names one of these; anything else but success is a failure."
    if ended.code == 0: return False
    if 'Traceback (most recent call last)' in ended.err: raise Failure(f'a traceback: {ended.err.strip()[-300:]}')
    lines = ended.err.strip().splitlines()
    if not lines or not lines[-1].startswith(('ditnano: ', 'run.py: ')):
        raise Failure(f'status {ended.code} without a line of its own: {ended.err[-300:]!r}')
    if names and not any(n in ended.err+ended.out for n in names):
        raise Failure(f"names none of {', '.join(names)}: {lines[-1]}")
    return True


# What a result is ----------------------------------------------------------------------------------------------------

def _record(data):
    keep = ('key', 'kind', 'name', 'scale', 'seed', 'config', 'metrics', 'samples', 'artefacts')
    found = json.loads(data)
    return json.dumps({k: v for k, v in found.items() if k in keep}).encode()


def _plan(data):
    "Without what a clock decides, and without the hash of it."
    found = json.loads(data)
    for stage in found['stages'].values():
        for k in ('seconds', 'rate', 'frames'): stage.pop(k, None)
    return json.dumps([found['settings'], found['stages']]).encode()


def _config(data):
    "Without the seconds that a teacher's training took, and without the hash of them."
    found = json.loads(data)
    if 'seconds' not in (found.get('card') or {}): return data
    found['card'].pop('seconds')
    found.pop('config_sha256')
    return json.dumps(found).encode()


def _measured(data):
    found = json.loads(data)
    return json.dumps([found['bundle'], found['parity']]).encode()


def _history(data):
    lines = [json.loads(line) for line in data.splitlines()]
    return json.dumps([{k: v for k, v in line.items() if k in ('step', 'loss', 'lr')} for line in lines]).encode()


def _tensors(data):
    size = int.from_bytes(data[:8], 'little')
    head = json.loads(data[8:8+size])
    head.pop('__metadata__', None)
    return json.dumps(head, sort_keys=True).encode()+data[8+size:]


def _packed(path):
    "The records of students in a pack."
    with tarfile.open(path) as tar:
        names = [n for n in tar.getnames() if re.fullmatch(r'runs/distill-\w+/(result\.json|student/model.*)', n)]
        return {n: _record(tar.extractfile(n).read()) if n.endswith('.json') else tar.extractfile(n).read()
                for n in names}


NORMAL = {'result.json': _record, 'history.jsonl': _history, 'state.safetensors': _tensors,   # without times
          'plan.json': _plan, 'measured.json': _measured, 'config.json': _config}


def digest(data): return hashlib.sha256(data).hexdigest()[:12]


def result(folder, command):
    "The files of a result by name, hashed without what a clock decides; leftovers count as files."
    found = {}
    for path in sorted({p for pattern in command.result for p in folder.glob(pattern) if p.is_file()}):
        name = path.relative_to(folder).as_posix()
        if path.suffix == '.tar': found |= {k: digest(v) for k, v in _packed(path).items()}
        elif path.suffix == '.tmp' or not path.name.startswith('.'):
            found[name] = digest(NORMAL.get(path.name, bytes)(path.read_bytes()))
    if not found: raise Failure('no result at all')
    return found


def compare(folder, command, expected):
    "The result must be that of the undisturbed run."
    found = result(folder, command)
    if found == expected: return
    apart = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    raise Failure(f"differs from the undisturbed run: {', '.join(apart[:4])}")


# Folders -------------------------------------------------------------------------------------------------------------

EVENTS = ('open', 'os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.chmod')


def on_file_event(folder, act):
    "Call `act(n)` before the n-th time that this process opens, renames, removes or makes something in a folder."
    prefix, count = str(folder), [0]

    def hook(event, args):
        if event not in EVENTS or not isinstance(args[0], (str, bytes, os.PathLike)): return
        name = os.fsdecode(args[0])
        if os.path.isabs(name) and not name.startswith(prefix): return
        count[0] += 1
        act(count[0])
    sys.addaudithook(hook)
    return count


class Finished(NamedTuple):
    "An undisturbed run."
    folder: Path
    result: dict
    events: int      # Files opened, renamed, ... in its folder
    seconds: float
    largest: int     # Bytes of its largest new file


class World:
    "The folder of the campaign: undisturbed runs, made when they are needed, and a copy of one for each trial."
    def __init__(self, root, commands, prepare):
        self.root, self.commands, self.count = Path(root), commands, 0
        self.prepare, self.known = prepare, {}

    def copy_of(self, name):
        "A new folder, as the command `name` left its own; '' is where all begin."
        self.count += 1
        folder = self.root/f'trial-{self.count}'
        if name: shutil.copytree(self.finished(name).folder, folder)
        else:
            folder.mkdir(parents=True)
            self.prepare(folder)
        (folder/'tmp').mkdir(exist_ok=True)
        return folder

    def finished(self, name):
        "The undisturbed run of a command."
        if name in self.known: return self.known[name]
        command = self.commands[name]
        folder = self.copy_of(command.after)
        before, begin = {p for p in folder.rglob('*')}, time.monotonic()

        def count_events(folder):
            count = on_file_event(folder, lambda n: None)
            leave = os._exit

            def note_and_leave(code):
                (self.root/f'{folder.name}.events').write_text(str(count[0]))
                leave(code)
            os._exit = note_and_leave
        ended = wait(start(folder, command, inside=count_events))
        if ended.code: raise RuntimeError(f'undisturbed {name}: status {ended.code}: {ended.err[-2000:]}')
        seconds, new = time.monotonic()-begin, [p for p in folder.rglob('*') if p.is_file() and p not in before]
        known = result(folder, command) if command.result else {}
        events = int((self.root/f'{folder.name}.events').read_text())
        self.known[name] = Finished(folder, known, events, seconds, max([p.stat().st_size for p in new], default=0))
        return self.known[name]

    def fresh(self, name):
        "A folder in which the command can begin."
        return self.copy_of(self.commands[name].after)

    def run(self, folder, name, **how):
        "Run a command of the table to its end."
        return wait(start(folder, self.commands[name], **how))

    def again(self, folder, name):
        "The same command once more, undisturbed: it must end with the result of the undisturbed run."
        ended = self.run(folder, name)
        if ended.code: raise Failure(f'the same command again: status {ended.code}: {ended.err.strip()[-400:]}')
        compare(folder, self.commands[name], self.finished(name).result)


@dataclass(frozen=True)
class Trial:
    "One fault."
    kind: str        # The row of the table
    number: int      # Of the trials of this kind
    run: object      # run(world, random) -> 'survived' or 'refused'; raises Failure

    def __call__(self, world, seed):
        "What came of it, and why if it failed."
        try: return self.run(world, Random(f'{seed} {self.kind} {self.number}')), ''
        except (Failure, RuntimeError) as e: return 'failed', str(e)
