"The tables of the campaign: which commands are killed, which files are damaged, what fails in which phase."
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from driver import (
    Command,
    Failure,
    Trial,
    await_descendants,
    compare,
    on_file_event,
    refusal,
    replace_call,
    result,
    start,
    wait,
)

SCALE = """\
name: tiny
data: digits32
teacher: teacher
pairs: 4
teacher_steps: 3
images: 128
batch: 16
loss: L2
samples: 24
precision: fp32
experiments:
  sizes: {designs: [[1, 32, 4]]}
"""
NOTHING = """\
  losses: {losses: [L2], setups: []}
  depth: {depths: []}
  width: {widths: []}
  heads: {heads: []}
  ta: {assistant: [1, 32, 4], settings: []}
  mi1: {mappings: []}
  get_baseline: {models: [], students: []}
  mlp_ratio: {ratios: []}
  layer_heads: {layouts: []}
  steps: {steps: []}
"""


def prepare(folder):
    "Where every trial begins: a teacher and a student with random weights, pictures, a published set, and scales."
    from ditnano.config import DiTConfig, UNetConfig
    from ditnano.dit import DiT, randomize_weights
    from ditnano.edm import EDMPrecond, save_teacher
    from ditnano.unet import SongUNet
    cfg = UNetConfig(model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=(), augment_dim=0)
    net = randomize_weights(EDMPrecond(SongUNet(cfg)), seed=1)
    for p in net.parameters(): p.data.mul_(0.5)
    save_teacher(net, folder/'teacher', {'made': 'by the campaign'})
    for name, width in (('student', 32), ('assistant', 16)):
        randomize_weights(DiT(DiTConfig(1, width, 4))).save_pretrained(folder/name)
    (folder/'pictures').mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
    np.savez(folder/'photos.npz', images=noise, labels=np.arange(48)%2)
    publish_pairs(folder/'get')
    (folder/'tiny.yaml').write_text(SCALE+NOTHING)
    (folder/'lease.yaml').write_text(SCALE.replace('pairs: 4', 'pairs: 24')+NOTHING)   # its teacher is evaluated
    (folder/'two.yaml').write_text(SCALE.replace('4]]', '4], [1, 32, 2]]').replace('tiny', 'two')+NOTHING)


def publish_pairs(folder):
    "Pairs as GET publishes them: two files on each side."
    from torch.nn.functional import one_hot
    g = torch.Generator().manual_seed(0)
    for side in ('latent', 'image'): (folder/side).mkdir(parents=True)
    for last in (3, 7):
        z, labels = torch.randn(4, 3, 8, 8, generator=g), torch.randint(10, (4,), generator=g)
        torch.save([z, one_hot(labels, 10).float()], folder/'latent'/f'{last:09d}.pkl')
        torch.save(0.4*z, folder/'image'/f'{last:09d}.pkl')


_TRAIN = 'train {} --student 1,32,4 --pairs pairs --images 192 --batch 16 --loss L2 --out run --device cpu'
_RUN = ('run/*', 'run/student/*', 'run/.*.tmp')
_RUNS = tuple(f'runs/*{p}' for p in ('/result.json', '/config.json', '/history.jsonl', '/samples.png', '/student/*',
                                     '/.*.tmp', '/parts*'))
_SAMPLE = 'sample --weights student --seeds 0-15 --device {}'
_DISTILL = ('distill --images photos.npz --max-params 20k --loss L2 --minutes 1 --exports onnx-fp32,c --out product '
            '--device cpu')
_PRODUCT = tuple(f'product/{p}' for p in ('*.png', '*.onnx', 'plan.json', 'c/*', 'student/*', 'teacher/*',
                                          'work/pairs/*', '.*.tmp', 'work/.*.tmp', 'work/pairs/.*.tmp'))
_STAGE = 'ditnano.lab.product:run_stage'   # 1: teacher, 2: pairs, 3: student, 4: evaluation, 5: exports
_SWEEP = 'sweep sizes --scale {} --runs runs --executor {} --device cpu --recompute'

COMMANDS = {
    'pairs': Command('pairs --teacher teacher --seeds 0-7 --steps 3 --out pairs --device cpu',
                     result=('pairs/*', 'pairs/.*.tmp')),
    'check': Command('pairs --check --out pairs', after='pairs', result=('pairs/*',)),
    'pairs continued': Command('pairs --teacher teacher --seeds 0-11 --steps 3 --out pairs --device cpu',
                               after='pairs', result=('pairs/*', 'pairs/.*.tmp')),
    'train': Command(_TRAIN.format(''), after='pairs', result=_RUN),
    'train mi1': Command(_TRAIN.format('mi1 --layers 1 2').replace('1,32,4', '2,16,4'), after='pairs', result=_RUN),
    'train ta': Command(_TRAIN.format('ta --assistant assistant --weights 1 1 0'), after='pairs', result=_RUN),
    'train another': Command(_TRAIN.format('').replace('1,32,4', '1,16,4'), after='pairs', result=_RUN),
    'half a training': Command(_TRAIN.format(''), after='pairs', half=6),
    'training resumed': Command(_TRAIN.format(''), after='half a training', result=_RUN),
    'sample': Command(_SAMPLE.format('cpu --out pictures'), result=('pictures/*', 'pictures/.*.tmp')),
    'sample again': Command(_SAMPLE.format('cpu --out pictures'), after='sample', result=('pictures/*',)),
    'sample npy': Command(_SAMPLE.format('cpu --out samples.npy'), result=('*.npy', '.*.tmp')),
    'sample safetensors': Command(_SAMPLE.format('cpu --out s.safetensors'), result=('s.safetensors', '.*.tmp')),
    'sheet': Command(_SAMPLE.format('cpu --out sheet.png'), result=('sheet.png', '.*.tmp')),
    'native': Command(_SAMPLE.format('cpu --backend native --out native.npy'), result=('native.npy', '.*.tmp')),
    'native again': Command(_SAMPLE.format('cpu --backend native --out native.npy'), after='native',
                            result=('native.npy',)),
    'eval': Command('eval --weights student --samples 24 --out eval.json --device cpu', result=('eval.json', '.*.tmp')),
    'eval again': Command('eval --weights student --samples 24 --out again.json --device cpu', after='eval',
                          result=('again.json',)),
    'onnx': Command('export --weights student --out student.onnx', result=('student.onnx', '.*.tmp')),
    'c': Command('export --weights student --format c --out code', result=('code/*',)),
    'bundle': Command('export --weights student --bundle bundle', result=('bundle/*', '.*.tmp')),
    'measure': Command('--runtime onnxruntime --batch 1 --seconds 0.05 --warm 0 --out measured.json', after='bundle',
                       program='bundle/run.py', result=('measured.json', '*.part')),
    'import get': Command('pairs --import-get get --out got', result=('got/*.safetensors', 'got/.*.tmp')),
    'distill': Command(_DISTILL, result=_PRODUCT),
    'distill again': Command(_DISTILL, after='distill', result=_PRODUCT),
    'half a teacher': Command(_DISTILL, until=('ditnano.lab.product:save_loss_curve', 3)),
    'teacher resumed': Command(_DISTILL, after='half a teacher', result=_PRODUCT),
    'product without pairs': Command(_DISTILL, until=(_STAGE, 2)),
    'product with pairs': Command(_DISTILL, until=(_STAGE, 3), after='product without pairs'),
    'product with student': Command(_DISTILL, until=(_STAGE, 5), after='product with pairs'),
    'pairs of product': Command(_DISTILL, after='product without pairs', result=_PRODUCT),
    'student of product': Command(_DISTILL, after='product with pairs', result=_PRODUCT),
    'exports of product': Command(_DISTILL, after='product with student', result=_PRODUCT),
    'design': Command('design --max-params 425k'),
    'sweep': Command(_SWEEP.format('two.yaml', 'inline'), after='eval', result=_RUNS),
    'sweep again': Command(_SWEEP.format('two.yaml', 'inline'), after='sweep', result=_RUNS),
    'short sweep': Command(_SWEEP.format('tiny.yaml', 'inline'), after='eval', result=_RUNS),
    'sweep in processes': Command(_SWEEP.format('two.yaml', 'processes --workers 2'), after='eval', result=_RUNS),
    'scale': Command(_SWEEP.format('tiny.yaml', 'inline')+' --minutes 0', after='eval'),
    'lease': Command('lease --scale lease.yaml --minutes 60 --out packs --evidence none --device cpu', after='eval',
                     result=('packs/*.tar', 'packs/.*.tmp')),
    'take': Command('lease --scale lease.yaml --take packs --runs home --weights w --evidence e', after='lease',
                    result=('home/*/*', 'home/*/student/*', 'e/*/*', 'w/*/*')),
    'paper': Command('paper --only table_1,table_2 --runs none --out figures',
                     result=('figures/*.csv', 'figures/*.md')),
}

# Kills ---------------------------------------------------------------------------------------------------------------
KILLS = {  # command: (trials in the small campaign, in the whole one)
    'pairs': (3, 18), 'pairs continued': (0, 6), 'train': (4, 30), 'train mi1': (0, 6), 'train ta': (0, 6),
    'sample': (3, 12), 'sample npy': (1, 6), 'sample safetensors': (1, 6), 'sheet': (0, 4), 'eval': (1, 6),
    'onnx': (1, 6), 'bundle': (0, 3), 'native': (0, 4), 'c': (0, 3), 'sweep': (1, 14),
    'sweep in processes': (0, 6),
    'take': (0, 8), 'lease': (0, 6), 'paper': (0, 4), 'distill': (1, 16), 'import get': (0, 4), 'measure': (0, 3),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kill_at_event(number, moment, folder):
    "Send this process a signal just before its n-th act on a file of the folder."
    on_file_event(folder, lambda n: os.kill(os.getpid(), number) if n == moment else None)


def check_stopped(ended, number):
    "A stopped command ends without a traceback, and by the signal unless it was finished."
    if 'Traceback (most recent call last)' in ended.err: raise Failure(f'a traceback: {ended.err.strip()[-400:]}')
    if ended.code not in (0, -number, 128+number):
        raise Failure(f'{signal.Signals(number).name}: status {ended.code}: {ended.err.strip()[-300:]}')


def kill(name, number, world, rng):
    "Stop a command before one of its acts on files, or at any moment; then the same command finishes the work."
    good, folder = world.finished(name), world.fresh(name)
    event, moment = rng.randint(1, max(1, good.events)), rng.uniform(0, good.seconds)
    at_event = rng.random() < 0.5
    child = start(folder, world.commands[name], inside=partial(kill_at_event, number, event) if at_event else None)
    if not at_event:
        time.sleep(moment)
        os.kill(child.pid, number)
    check_stopped(wait(child), number)
    await_descendants(folder)
    world.again(folder, name)
    return 'survived'


# Damage --------------------------------------------------------------------------------------------------------------
FILES = {  # what: (command that left it, its file, the command that reads it, names one of which a refusal gives)
    'student weights': ('', 'student/model.safetensors', 'sample npy', ()),
    'student config': ('', 'student/config.json', 'sample npy', ()),
    'teacher weights': ('', 'teacher/model.safetensors', 'pairs', ()),
    'teacher config': ('', 'teacher/config.json', 'pairs', ()),
    'assistant': ('pairs', 'assistant/*', 'train ta', ()),
    'shipped extractor': ('eval', 'package/ditnano/weights/digitsnet/*', 'eval again', ()),
    'manifest': ('pairs', 'pairs/manifest.json', 'train', ()),
    'manifest, continued': ('pairs', 'pairs/manifest.json', 'pairs continued', ()),
    'shard': ('pairs', 'pairs/*.safetensors', 'train', ()),
    'shard, checked': ('pairs', 'pairs/*.safetensors', 'check', ()),
    'checkpoint': ('half a training', 'run/state.safetensors', 'training resumed', ()),
    'history': ('half a training', 'run/history.jsonl', 'training resumed', ()),
    'image cache': ('eval', 'cache/images/*', 'eval again', ()),
    'statistics': ('eval', 'cache/stats/*', 'eval again', ()),
    'record': ('sweep', 'runs/*/result.json', 'sweep again', ()),
    'config of a run': ('sweep', 'runs/*/config.json', 'sweep again', ()),
    'samples.json': ('sample', 'pictures/samples.json', 'sample again', ('samples.json', 'pictures')),
    'picture': ('sample', 'pictures/*.png', 'sample again', ()),
    'compiled code': ('native', 'cache/native/*.so', 'native again', ()),
    'hash of compiled code': ('native', 'cache/native/*.sha256', 'native again', ()),
    'scale': ('eval', 'tiny.yaml', 'scale', ()),
    'pack': ('lease', 'packs/*.tar', 'take', ()),
    'card of a bundle': ('bundle', 'bundle/card.json', 'measure', ('card.json', 'runner.py', 'jetson.py')),
    'graph of a bundle': ('bundle', 'bundle/fp32.onnx', 'measure', ()),
    'arrays of a bundle': ('bundle', 'bundle/*.npy', 'measure', ()),
    'programs of a bundle': ('bundle', 'bundle/*e*.py', 'measure', ()),
    "GET's pairs": ('', 'get/*/*.pkl', 'import get', ()),
    'pictures of a product': ('', 'photos.npz', 'distill', ()),
    'plan of a product': ('product with student', 'product/plan.json', 'exports of product', ()),
    'half a teacher': ('half a teacher', 'product/teacher/state.safetensors', 'teacher resumed', ()),
    'plan of a teacher': ('half a teacher', 'product/teacher/plan.json', 'teacher resumed', ()),
    'teacher of a product': ('product without pairs', 'product/teacher/[cm]*', 'pairs of product', ()),
    'pairs of a product': ('product with pairs', 'product/work/pairs/*', 'student of product', ()),
    'student of a product': ('product with student', 'product/student/*', 'exports of product', ()),
    'exports of a product': ('distill', 'product/[cs]*[!gt]', 'distill again', ()),
}
ONCE = ('statistics', 'shipped extractor', 'manifest', 'shard', "GET's pairs", 'plan of a product')   # flips alone
SLOW_FILES = ('pack', 'compiled code', 'hash of compiled code', 'assistant', 'manifest, continued',
              *(f'{part} of a bundle' for part in ('card', 'graph', 'arrays', 'programs')), 'half a teacher',
              *(f'{part} of a product' for part in ('pictures', 'teacher', 'pairs', 'student', 'exports')),
              'plan of a teacher')   # none in the small campaign
MANY, FEWER = 10, 5   # Trials of each kind of damage in the whole campaign; of what a product or a bundle consists of


def somewhere(data, rng):
    "A place in a file; half of all lie in its first bytes, where its description is."
    return rng.randrange(min(len(data), 512) if rng.random() < 0.5 else len(data))


def flip(data, rng):
    "One bit."
    data, at = bytearray(data), somewhere(data, rng)
    data[at] ^= 1 << rng.randrange(8)
    return bytes(data), f'bit in byte {at} of {len(data)}'


def cut(data, rng):
    "The end is missing; one in five times everything."
    size = rng.randrange(len(data)) if rng.random() < 0.8 else 0
    return data[:size], f'{size} of {len(data)} bytes are left'


def zeros(data, rng):
    "A block that never reached the disk."
    at = somewhere(data, rng)
    end = min(len(data), at+rng.choice((16, 512, 4096)))
    return data[:at]+bytes(end-at)+data[end:], f'zeros from {at} to {end}'


DAMAGE = {'flip': flip, 'cut': cut, 'zeros': zeros}


def use_own_package(folder):
    "Shipped weights are read from the trial's copy."
    import ditnano
    if (folder/'package').is_dir(): ditnano.__spec__.origin = str(folder/'package'/'ditnano'/'__init__.py')


def copy_package(folder):
    "A package beside the trial whose weights may be damaged; everything else is linked."
    import ditnano
    real, own = Path(ditnano.__file__).parent, folder/'package'/'ditnano'
    own.mkdir(parents=True)
    for path in real.iterdir():
        if path.name == 'weights': shutil.copytree(path/'digitsnet', own/'weights'/'digitsnet')
        else: (own/path.name).symlink_to(path)


def is_what_the_file_says(folder):
    "A scale that was read although it is damaged holds the file's own values: a person may have typed them."
    from ditnano.config import load_scale
    said, scale = yaml.safe_load((folder/'tiny.yaml').read_bytes()), load_scale(folder/'tiny.yaml')
    for k, v in said.items():
        got = getattr(scale, k)
        if (list(got) if isinstance(got, tuple) else got) != v: raise Failure(f'{k} is {v!r} in the file, {got!r} here')
    if not {'name', 'experiments'} <= set(said): raise Failure('a scale without its first or last entry was accepted')


def damage(what, how, world, rng):
    "Damage one file, then read it: the result is that of the undamaged file, or the file is named."
    state, pattern, reader, names = FILES[what]
    good, folder = world.finished(reader) if COMMANDS[reader].result else None, world.copy_of(state)
    if pattern.startswith('package'): copy_package(folder)
    path = rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
    data, told = DAMAGE[how](path.read_bytes(), rng)
    if data == path.read_bytes(): return 'survived'   # zeros were zeros before
    path.write_bytes(data)
    try:
        ended = world.run(folder, reader, inside=use_own_package)
        if refusal(ended, names or (path.name,)): return 'refused'
        if good: compare(folder, COMMANDS[reader], good.result)
        else: is_what_the_file_says(folder)
    except Failure as e: raise Failure(f'{path.relative_to(folder)}, {told}: {e}') from None
    return 'survived'


LOCKED = {'train': 'run/.train.lock', 'pairs': 'pairs/.lock', 'short sweep': 'runs/{}/.lock'}
FOREIGN = 'filelock/2\npid=1\nhost=a-machine-that-is-gone\nmode=lease\nduration=3\ntoken=00\n'


def expire_soon(folder):
    "A lock of another machine is waited for 3 seconds."
    from ditnano import repro
    repro.LOCK_EXPIRY_S = 3


def leave_lock(name, content, world, rng):
    "A lock that a crash left empty, cut or to another machine: it is taken over, or its holder is named."
    folder, good = world.fresh(name), world.finished(name)
    run = next((p.name for p in good.folder.glob('runs/distill-*')), '')
    path = folder/LOCKED[name].format(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text({'empty': '', 'foreign': FOREIGN, 'cut': FOREIGN[:rng.randrange(len(FOREIGN))]}[content])
    old = time.time()-3600
    os.utime(path, (old, old))
    if refusal(world.run(folder, name, inside=expire_soon), ('lock',)): return 'refused'
    compare(folder, COMMANDS[name], good.result)
    return 'survived'


# Full disks ----------------------------------------------------------------------------------------------------------
FULL = {  # command: (trials in the small campaign, in the whole one)
    'pairs': (1, 6), 'train': (1, 8), 'sample': (1, 4), 'sample npy': (1, 4), 'sample safetensors': (0, 4),
    'sheet': (0, 2), 'eval': (1, 6), 'onnx': (1, 4), 'bundle': (0, 2), 'short sweep': (1, 8), 'native': (0, 3),
    'c': (0, 3), 'take': (0, 4), 'lease': (0, 3),
}
NAMED = ('/', '.json', '.safetensors', '.npy', '.npz', '.png', '.onnx', '.so', '.lock', '.tmp', '.tar')


def limit_files(size, folder):
    "No file of this process can grow beyond this size."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_room(name, world, rng):
    "A file cannot be written to its end: one line names it, and with room the same command finishes the work."
    good, folder = world.finished(name), world.fresh(name)
    size = int(good.largest*rng.random()**2)
    try: refused = refusal(world.run(folder, name, inside=partial(limit_files, size)), NAMED)
    except Failure as e: raise Failure(f'files of {size} bytes at most: {e}') from None
    world.again(folder, name)
    return 'refused' if refused else 'survived'


def can_mount():
    "Whether this process may mount a file system of its own."
    if sys.platform != 'linux' or os.geteuid() or not shutil.which('unshare'): return False
    command = ['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt']
    return subprocess.run(command, capture_output=True).returncode == 0


def full_disk(name, world, rng):
    "A disk that is full after so many bytes; then there is room."
    good, begin = world.finished(name), world.fresh(name)
    used, grown = (sum(-(-p.stat().st_size//4096) for p in f.rglob('*') if p.is_file()) for f in (begin, good.folder))
    disk = begin.with_name(f'{begin.name}-disk')
    disk.mkdir()
    size = 4096*(used+8+int((grown-used)*rng.random()))
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk], check=True)
    try:
        folder = disk/'trial'
        shutil.copytree(begin, folder)
        try: refused = refusal(world.run(folder, name), NAMED)
        except Failure as e: raise Failure(f'{size-4096*used} bytes on the disk: {e}') from None
        subprocess.run(['mount', '-o', f'remount,size={size+(1<<28)}', disk], check=True)
        world.again(folder, name)
        return 'refused' if refused else 'survived'
    finally: subprocess.run(['umount', '-l', disk], check=True)


# Races ---------------------------------------------------------------------------------------------------------------
RACES = {  # commands that start at once: (trials in the small campaign, in the whole one)
    ('train', 'train'): (1, 4), ('train', 'train another'): (1, 4), ('pairs', 'pairs', 'pairs'): (1, 6),
    ('sample', 'sample'): (1, 6), ('sample npy', 'sample npy', 'sample npy'): (1, 6), ('eval', 'eval'): (1, 6),
    ('sweep', 'sweep'): (1, 6), ('onnx', 'onnx'): (0, 3), ('c', 'c'): (0, 2), ('native', 'native'): (0, 4),
    ('bundle', 'bundle'): (0, 2), ('take', 'take', 'take'): (0, 4),
}


def race(names, world, rng):
    "Several commands in one folder at once: each does its work or says who is there, and one of them has the result."
    folder, good = world.fresh(names[0]), [world.finished(n) for n in dict.fromkeys(names)]
    children = []
    for name in names:
        children.append(start(folder, COMMANDS[name]))
        time.sleep(rng.choice((0, 0.02, 0.2*good[0].seconds)))
    ended = [wait(child) for child in children]
    refused = [refusal(e, NAMED) for e in ended]
    if all(refused): raise Failure(f'none did the work: {ended[0].err.strip()[-300:]}')
    found = result(folder, COMMANDS[names[0]])
    if found not in [g.result for g in good]: compare(folder, COMMANDS[names[0]], good[0].result)
    return 'refused' if any(refused) else 'survived'


# Two ranks -----------------------------------------------------------------------------------------------------------
PHASES = {  # phase of a distributed run: the function that fails in one rank
    'rendezvous': 'ditnano.lab.sweep:distill_run', 'pairs': 'ditnano.lab.execute:PairDataset',
    'resuming': 'ditnano.train:RunFiles.resume', 'training': 'ditnano.train:train_step',
    'saving': 'ditnano.train:save_state', 'sampling': 'ditnano.lab.execute:sample',
    'evaluation': 'ditnano.lab.execute:evaluate', 'recording': 'ditnano.lab.runs:write_json',
}
OF_THE_FIRST = ('saving', 'evaluation', 'recording')   # phases of rank 0 alone
RANK_FAULTS = ('error', 'kill', 'stop')
MAX_WAIT_S = 6   # How long a rank waits for the other that fails


def on_purpose(fault):
    "What happens in place of the function's work."
    if fault == 'error': raise OSError(28, 'No space left on device, on purpose', 'some-file.json')
    os.kill(os.getpid(), signal.SIGKILL if fault == 'kill' else signal.SIGSTOP)


def wait_briefly(folder):
    "The other rank is waited for a few seconds."
    from ditnano.lab import execute
    os.environ['DITNANO_MAX_WAIT'], execute.POLL_LIMIT_S = str(MAX_WAIT_S), MAX_WAIT_S


def break_function(phase, fault, call, folder):
    "Replace the function of a phase by one that fails at its n-th call."
    wait_briefly(folder)
    replace_call(PHASES[phase], call, partial(on_purpose, fault))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start_ranks(folder, inside=(None, None)):
    "The command 'short sweep' in two processes that train together."
    port = free_port()
    env = {'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    command = COMMANDS['short sweep']
    return [start(folder, command, env | {'RANK': r, 'LOCAL_RANK': r}, inside[r]) for r in (0, 1)]


def run_ranks(folder): return [wait(child) for child in start_ranks(folder)]


def undisturbed_ranks(world):
    "The result of two ranks without a fault."
    if 'two ranks' not in world.known:
        folder = world.fresh('short sweep')
        ended = run_ranks(folder)
        if any(e.code for e in ended): raise RuntimeError(f'two ranks: {ended}')
        world.known['two ranks'] = result(folder, COMMANDS['short sweep'])
    return world.known['two ranks']


def fail_in_rank(phase, fault, world, rng):
    "One rank fails in a phase: the other ends in time and says why; then both together finish the work."
    good, folder = undisturbed_ranks(world), world.fresh('short sweep')
    rank = 0 if phase in OF_THE_FIRST else rng.randrange(2)
    call = rng.randint(1, 3) if phase in ('training', 'saving') else 1
    inside = [wait_briefly, wait_briefly]
    inside[rank] = partial(break_function, phase, fault, call)
    children, refused = start_ranks(folder, inside), []
    where = f'rank {rank}, call {call}'
    try:
        other = wait(children[1-rank])
        if fault == 'stop': os.kill(children[rank].pid, signal.SIGKILL)
        own = wait(children[rank])
        refused = [refusal(other)] + ([refusal(own)] if fault == 'error' or own.code >= 0 else [])
        again = run_ranks(folder)
        if any(e.code for e in again): raise Failure(f'both again: {again}')
        compare(folder, COMMANDS['short sweep'], good)
    except Failure as e: raise Failure(f'{where}: {e}') from None
    return 'refused' if any(refused) else 'survived'


# All of it -----------------------------------------------------------------------------------------------------------

def _repeat(kind, count, run): return [Trial(kind, n, run) for n in range(count)]


def kill_trials(whole):
    for name, counts in KILLS.items():
        for n in range(counts[whole]): yield Trial(f'kill {name}', n, partial(kill, name, SIGNALS[n % 3]))


def damage_trials(whole):
    for what in FILES:
        for how in DAMAGE:
            few = int(what not in SLOW_FILES and (what not in ONCE or how == 'flip'))
            many = FEWER if COMMANDS[FILES[what][2]].words == _DISTILL or FILES[what][2] == 'measure' else MANY
            yield from _repeat(f'{how} {what}', many if whole else few, partial(damage, what, how))
    for name in LOCKED:
        for content in ('empty', 'cut', 'foreign'):
            few = name == 'pairs' or (name, content) == ('short sweep', 'foreign')
            yield from _repeat(f'{content} lock of {name}', (few, 2)[whole], partial(leave_lock, name, content))


def disk_trials(whole):
    mounts = can_mount()
    for name, counts in FULL.items():
        yield from _repeat(f'no room for {name}', counts[whole], partial(no_room, name))
        count = counts[1] if whole else int(name in ('train', 'eval'))
        if mounts: yield from _repeat(f'full disk in {name}', count, partial(full_disk, name))


def race_trials(whole):
    for names, counts in RACES.items():
        yield from _repeat(f"race of {' and '.join(names)}", counts[whole], partial(race, names))


def rank_trials(whole):
    small = ('training', 'kill'), ('evaluation', 'error')
    for phase in PHASES:
        for fault in RANK_FAULTS:
            count = 2 if whole else int((phase, fault) in small)
            yield from _repeat(f'rank: {fault} in {phase}', count, partial(fail_in_rank, phase, fault))


KINDS = {'kill': kill_trials, 'damage': damage_trials, 'disk': disk_trials, 'race': race_trials, 'rank': rank_trials}
