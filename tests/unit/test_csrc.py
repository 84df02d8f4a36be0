"The student as C: sanitizers, warnings, seeds, refused files, other processors."
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ditnano.config import DESIGNS, DiTConfig
from ditnano.deploy.csource import (
    PRECISIONS,
    TARGETS,
    CStudent,
    build,
    compare,
    read_picture,
    weights_file,
    write_source,
)
from ditnano.deploy.folding import OneStep
from ditnano.deploy.native import Native, c_source, compiler, design_header, library
from ditnano.dit import DiT, randomize_weights
from ditnano.edm import to_bytes
from ditnano.repro import noise_and_labels

pytestmark = pytest.mark.slow   # it compiles C
HAS_ZIG = importlib.util.find_spec('ziglang') is not None
needs_compiler = pytest.mark.skipif(not compiler(), reason='no C compiler installed')
needs_zig = pytest.mark.skipif(not HAS_ZIG, reason="ziglang is not installed: pip install 'ditnano[cross]'")
SMALL = DiTConfig(2, 24, (2,3), image_size=16, classes=3)
SHAPES = [DiTConfig(1, 32, 4, image_size=r, patch=p, channels=c)
          for r, p, c in ((16,2,3), (16,4,1), (32,2,1), (32,4,3), (48,4,3), (64,4,1))]
ODD = [DiTConfig(1,36,4,image_size=16), DiTConfig(1,20,4,patch=4), DiTConfig(2,48,(4,6),image_size=16,mlp_ratio=2.),
       SMALL, DiTConfig(1,28,28,image_size=16), DiTConfig(1,44,4,image_size=9,patch=3,channels=1),
       DiTConfig(1,16,1,image_size=20,label_dropout=0.)]


def student(cfg, seed=1): return randomize_weights(DiT(cfg), seed).eval()


def shape(cfg): return cfg.channels, cfg.image_size, cfg.image_size


def guidance_of(cfg): return 1.5 if cfg.label_dropout else 1.


def images(model, seeds):
    x,y = noise_and_labels(seeds, shape(model.cfg), model.cfg.classes)
    with torch.no_grad(): return to_bytes(OneStep(model, guidance_of(model.cfg))(x, y))


def grey_levels(a, b): return int((a.int()-b.int()).abs().max())


def run(command, folder):
    return subprocess.run([str(c) for c in command], cwd=folder, capture_output=True, text=True, timeout=600)


def drawn(command, folder, cfg, seeds='0-1'):
    done = run([*command, '--seeds', seeds, '--out', 'x.ppm', '--guidance', guidance_of(cfg)], folder)
    assert done.returncode==0, done.stdout+done.stderr
    return read_picture(folder/'x.ppm', cfg.image_size)


def name(cfg):
    heads = '.'.join(map(str, sorted(set(cfg.heads_per_layer))))
    return f'{cfg.depth}x{cfg.width}h{heads}-{cfg.image_size}p{cfg.patch}c{cfg.channels}'


def sanitized(cfg, folder, flags=('-march=native',), precision='fp32'):
    "Draw under the address and undefined-behaviour sanitizers; Python's images within one grey level."
    model = student(cfg)
    write_source(model, folder, precision, guidance_of(cfg))
    checks = '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-O1'
    sources = [folder/n for n in ('main.c','student.c','onestep.c')]
    done = run([*compiler(), '-std=c11', *checks, *flags, *sources, '-o', folder/'checked', '-lm'], folder)
    if done.returncode and 'asan' in done.stderr: pytest.skip('this compiler has no sanitizers')
    assert done.returncode==0, done.stderr
    apart = grey_levels(drawn([folder/'checked'], folder, cfg), images(model, range(2)))
    assert apart<=(1 if precision=='fp32' else 40)


@needs_compiler
@pytest.mark.parametrize('design', DESIGNS, ids=str)
def test_sanitizers_designs_of_table_6(design, tmp_path): sanitized(DiTConfig(*design), tmp_path)


@needs_compiler
@pytest.mark.parametrize('cfg', SHAPES, ids=name)
def test_sanitizers_image_sizes_patches_channels(cfg, tmp_path): sanitized(cfg, tmp_path)


@needs_compiler
@pytest.mark.parametrize('cfg', ODD, ids=name)
def test_sanitizers_odd_heads_and_widths(cfg, tmp_path): sanitized(cfg, tmp_path)


@needs_compiler
@pytest.mark.parametrize('precision', PRECISIONS[1:])
def test_sanitizers_short_weights(precision, tmp_path): sanitized(SMALL, tmp_path, precision=precision)


@needs_compiler
@pytest.mark.parametrize('cfg', [SMALL, *ODD[:3], ODD[5]], ids=name)
@pytest.mark.parametrize('flag', ('-march=x86-64','-march=haswell'))
def test_sanitizers_narrow_registers(flag, cfg, tmp_path):
    known = run([*compiler(), flag, '-E', '-x', 'c', '/dev/null'], tmp_path)
    if known.returncode: pytest.skip('another processor')
    if 'haswell' in flag and 'avx2' not in Path('/proc/cpuinfo').read_text(): pytest.skip('this processor has no AVX2')
    sanitized(cfg, tmp_path, (flag,))


TEAM = r'''
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include "onestep.h"
enum { THREADS = 3, IMAGES = 40 };
static Net net;
static float noise[IMAGE_NUMBERS], alone[IMAGE_NUMBERS], together[IMAGES][IMAGE_NUMBERS];
static void *scratch;
static float *some(size_t n) {
  static unsigned state = 1;
  static float numbers[1 << 18];
  static size_t used;
  float *a = numbers + used;
  used += n;
  for (size_t i = 0; i < n; i++) a[i] = ((float)((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - .5f) * .5f;
  return a;
}
static Linear linear(size_t rows, size_t columns) { return (Linear){some(rows * columns), NULL, some(columns)}; }
static void *member(void *rank) {
  for (int i = 0; i < IMAGES; i++) onestep_draw(&net, noise, 1, together[i], scratch, (int)(size_t)rank, THREADS);
  return NULL;
}
int main(void) {
  net = (Net){.tokens = some(TOKENS_PAD * WIDTH_PAD), .patch = linear(PATCH_PAD, WIDTH_PAD),
              .modulation = some(4 * 2 * WIDTH_PAD), .last = linear(WIDTH, OUT_PAD)};
  for (int l = 0; l < STUDENT_DEPTH; l++)
    net.layers[l] = (Layer){some(4 * 6 * WIDTH_PAD), linear(WIDTH, QKV_PAD), linear(WIDTH, WIDTH_PAD),
                            linear(WIDTH, HIDDEN_PAD), linear(HIDDEN, WIDTH_PAD)};
  memcpy(noise, some(IMAGE_NUMBERS), sizeof noise);
  scratch = some(0); /* what is left of the numbers, aligned below */
  scratch = (char *)scratch + (64 - (size_t)scratch % 64) % 64;
  onestep_draw(&net, noise, 1, alone, scratch, 0, 1);
  memset(scratch, 0, onestep_scratch(THREADS));
  pthread_t threads[THREADS];
  for (size_t i = 0; i < THREADS; i++) pthread_create(threads + i, NULL, member, (void *)i);
  for (size_t i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  int differ = 0;
  for (int i = 0; i < IMAGES; i++) differ += memcmp(alone, together[i], sizeof alone) != 0;
  printf("%d of %d differ\n", differ, IMAGES);
}
'''


@needs_compiler
@pytest.mark.parametrize('depth', (1,2))
@pytest.mark.parametrize('check', ('address,undefined','thread'))
def test_sanitizers_threads_of_many_images(check, depth, tmp_path):
    (tmp_path/'design.h').write_text(design_header(DiTConfig(depth, 24, 2, image_size=16, classes=3)))
    (tmp_path/'team.c').write_text(TEAM)
    flags = f'-fsanitize={check}', '-fno-sanitize-recover=all', '-O1', '-march=native', '-std=gnu11', '-pthread', '-I.'
    include = f"-I{c_source('onestep.h').parent}"
    done = run([*compiler(), *flags, include, 'team.c', c_source('onestep.c'), '-o', 'team', '-lm'], tmp_path)
    if done.returncode and 'san' in done.stderr: pytest.skip('this compiler has no such sanitizer')
    assert done.returncode==0, done.stderr
    done = run([tmp_path/'team'], tmp_path)
    if 'unexpected memory mapping' in done.stderr: pytest.skip('the thread sanitizer does not run on this kernel')
    assert done.returncode==0 and done.stdout.startswith('0 of'), done.stdout+done.stderr


@needs_compiler
@pytest.mark.parametrize('format,how', [('fp32',{}), ('fp16',{}), ('int8',{}), ('bf16',{'bf16':True}),
                                        ('int8',{'bf16':True}), ('bf16',{'bf16':True,'amx':True})])
def test_no_warnings(format, how, tmp_path):
    (tmp_path/'design.h').write_text(design_header(DiTConfig(2,48,(4,6)), format, **how))
    arch = '-march=native' if not how else '-march=sapphirerapids' if how.get('amx') else '-march=cooperlake'
    if run([*compiler(), arch, '-E', '-x', 'c', '/dev/null'], tmp_path).returncode: pytest.skip('another processor')
    sources = ['onestep.c'] if format=='bf16' else ['onestep.c','student.c','main.c']
    for source in sources:
        warn = '-Wall', '-Wextra', '-Werror', '-Wconversion'
        include = '-I.', f"-I{c_source('onestep.h').parent}"
        flags = '-std=c11', '-O2', arch, *warn, *include
        done = run([*compiler(), *flags, '-c', c_source(source), '-o', 'x.o'], tmp_path)
        assert done.returncode==0 and not done.stderr, done.stderr


@needs_compiler
@pytest.mark.parametrize('cfg', [SMALL, DiTConfig(1,16,4,image_size=9,patch=3,channels=1,classes=7),
                                 DiTConfig(1,16,4,image_size=10)], ids=name)
def test_seeds_draw_torchs_noise_and_label(cfg, tmp_path):
    write_source(student(cfg), tmp_path)
    c,seeds = CStudent(tmp_path),[*range(50), 2**31, 2**32-1]
    x,y = noise_and_labels(seeds, shape(cfg), cfg.classes)
    got = [c.noise(s, shape(cfg)) for s in seeds]
    assert [label for _,label in got]==y.tolist()
    noise = np.stack([z for z,_ in got])
    if torch.backends.cpu.get_cpu_capability() in ('AVX2','AVX512'): assert (noise==x.numpy()).all()
    else: assert np.abs(noise-x.numpy()).max()<1e-5


@needs_compiler
def test_an_image_of_given_noise(tmp_path):
    model = student(SMALL)
    write_source(model, tmp_path)
    c = CStudent(tmp_path)
    noise,label = c.noise(3, shape(SMALL))
    for guidance in (1., 1.5):
        assert (c.pixels_of(noise, label, guidance)==c.pixels(3, shape(SMALL), guidance=guidance)).all()
    other = np.random.default_rng(0).standard_normal(shape(SMALL), np.float32)
    with torch.no_grad(): want = to_bytes(OneStep(model, 1.5)(torch.from_numpy(other)[None], torch.tensor([2])))
    assert grey_levels(torch.from_numpy(c.pixels_of(other, 2).copy())[None], want)<=1
    for label in (-1, 4):
        with pytest.raises(ValueError, match='no such label'): c.pixels_of(other, label)
    with pytest.raises(ValueError, match='not finite'): c.pixels_of(other, 0, float('nan'))


@needs_compiler
@pytest.mark.parametrize('cfg', [SMALL, ODD[5]], ids=name)
def test_plain_loops_are_the_same_network(cfg, tmp_path):
    model,seeds = student(cfg),range(3)
    write_source(model, tmp_path)
    shutil.copyfile(c_source('naive.c'), tmp_path/'onestep.c')
    c,(x,y) = CStudent(tmp_path),noise_and_labels(seeds, shape(cfg), cfg.classes)
    with torch.no_grad(): want = OneStep(model, 1.5)(x, y).numpy()
    got = np.stack([c.floats(s, shape(cfg)) for s in seeds])
    assert np.linalg.norm(got-want)<1e-5*np.linalg.norm(want) and want.std()>.1


@needs_compiler
def test_bytes_of_many_seeds(tmp_path):
    model,n = student(DiTConfig(2,32,4,image_size=16)),1000
    write_source(model, tmp_path)
    theirs = drawn([build(tmp_path)], tmp_path, model.cfg, f'0-{n-1}')
    assert len(theirs)==n and grey_levels(theirs, images(model, range(n)))<=1


@needs_compiler
@pytest.mark.parametrize('precision,bound', [('fp32',1e-5), ('fp16',5e-3), ('int8',.05)])
def test_stored_precisions(precision, bound, tmp_path):
    model = student(DiTConfig(5,64,8))
    write_source(model, tmp_path, precision)
    found = compare(tmp_path, model, seeds=range(4))
    assert found['error']<bound and found['weights_bytes']==len(weights_file(model, precision))
    assert precision=='fp32' or found['error']>1e-5


@needs_compiler
def test_products_in_bfloat16(tmp_path):
    if 'avx512_bf16' not in Path('/proc/cpuinfo').read_text(): pytest.skip('this processor has no AVX-512 BF16')
    model = student(DiTConfig(2,36,4,image_size=16))
    x,y = noise_and_labels(range(2), shape(model.cfg))
    with torch.no_grad(): want = OneStep(model, 1.)(x, y).numpy()
    for precision in PRECISIONS:
        write_source(model, tmp_path, precision)
        c = CStudent(tmp_path, ('-march=native','-DSTUDENT_BF16=1'))
        got = np.stack([c.floats(s, shape(model.cfg), guidance=1.) for s in range(2)])
        assert 1e-4<np.linalg.norm(got-want)/np.linalg.norm(want)<.05


def damaged(data):
    "{what: (bytes, part of the message)}"
    def flip(i): return data[:i]+bytes([data[i]^1])+data[i+1:]
    length,none,design = 'another length','no weights of a student','another design'
    other = weights_file(student(DiTConfig(2,24,(3,2),image_size=16,classes=3)))
    return {'cut':(data[:-1], length), 'half':(data[:len(data)//2], length), 'head alone':(data[:50], length),
            'one byte more':(data+b'\0', length), 'empty':(b'', none), 'a picture':(b'\x89PNG'*40, none),
            'bit of the last weight':(flip(len(data)-1), 'SHA-256'), 'bit of the first weight':(flip(96), 'SHA-256'),
            'bit of the hash':(flip(70), 'SHA-256'), 'reserved bit':(flip(60), 'SHA-256'),
            'bit of the version':(flip(8), 'another version'), 'bit of the design':(flip(20), design),
            'other heads':(other, design), 'other format':(weights_file(student(SMALL), 'fp16'), design)}


@needs_compiler
def test_damaged_weights_are_refused_in_one_line(tmp_path):
    write_source(student(SMALL), tmp_path)
    program = build(tmp_path)
    good = (tmp_path/'student.bin').read_bytes()
    for what,(data,message) in damaged(good).items():
        (tmp_path/'bad.bin').write_bytes(data)
        done = run([program, '--weights', 'bad.bin'], tmp_path)
        assert done.returncode==2 and message in done.stderr and done.stderr.count('\n')==1, (what, done)
        assert not (tmp_path/'image.png').exists()
    done = run([program, '--weights', 'nowhere.bin'], tmp_path)
    assert done.returncode==2 and 'cannot be read' in done.stderr


@needs_compiler
def test_the_program_refuses_wrong_options(tmp_path):
    write_source(student(DiTConfig(1,16,4,image_size=16,label_dropout=0.)), tmp_path, guidance=1.)
    program = build(tmp_path)
    refused = {('--seeds','5-3'):'expected A or A-B', ('--seeds','-1'):'expected A or A-B',
               ('--seeds',str(2**32)):'expected A or A-B',
               ('--label',str(2**32+3)):'expected a label', ('--label','10'):'no such label',
               ('--label','three'):'expected a value', ('--out',):'expected a value',
               ('--guidance','1.5'):'null label', ('--guidance','nan'):'not finite',
               ('--out','nowhere/x.png'):'cannot be written', ('--scale','2'):'usage'}
    for options,message in refused.items():
        done = run([program, *options], tmp_path)
        assert done.returncode==2 and message in done.stderr, (options, done)
        assert not list(tmp_path.glob('*.png'))


@needs_compiler
@pytest.mark.parametrize('channels', (1,3))
def test_png_ppm_and_compiled_in_weights(channels, tmp_path):
    from PIL import Image
    model = student(DiTConfig(1,16,4,image_size=16,channels=channels))
    write_source(model, tmp_path, array=True)
    program = build(tmp_path, flags=('-DSTUDENT_ARRAY', tmp_path/'student_array.c'))
    (tmp_path/'student.bin').unlink()
    pixels = drawn([program], tmp_path, model.cfg, '3-5')
    done = run([program, '--seeds', '3-5', '--out', 'x.png'], tmp_path)
    assert done.returncode==0, done.stderr
    assert np.array_equal(np.array(Image.open(tmp_path/'x.png')), np.array(Image.open(tmp_path/'x.ppm')))
    assert grey_levels(pixels, images(model, range(3,6)))<=1


@needs_compiler
@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_the_folder_builds_alone(tmp_path):
    model = student(SMALL)
    write_source(model, tmp_path)
    done = run(['make', f"CC={' '.join(compiler())}"], tmp_path)
    assert done.returncode==0 and 'warning' not in done.stderr, done.stderr
    assert grey_levels(drawn([tmp_path/'student'], tmp_path, SMALL), images(model, range(2)))<=1
    if not shutil.which('cmake'): return
    for command in (['cmake','-B','b','.'], ['cmake','--build','b']):
        done = run(command, tmp_path)
        assert done.returncode==0, done.stdout+done.stderr
    assert grey_levels(drawn([tmp_path/'b'/'student'], tmp_path, SMALL), images(model, range(2)))<=1


WASI = '''import { WASI } from 'node:wasi';
import { readFile } from 'node:fs/promises';
const [,, file, ...args] = process.argv;
const wasi = new WASI({version: 'preview1', args: ['student', ...args], preopens: {'.': process.cwd()}});
wasi.start(await WebAssembly.instantiate(await WebAssembly.compile(await readFile(file)), wasi.getImportObject()));
'''


@needs_zig
@pytest.mark.parametrize('target', TARGETS)
def test_other_processors(target, tmp_path):
    write_source(student(SMALL), tmp_path)
    program = build(tmp_path, target)
    kind = program.read_bytes()[:20]
    magic = {'aarch64-linux':b'\x7fELF', 'armv7-linux':b'\x7fELF', 'x86_64-windows':b'MZ',
             'aarch64-macos':b'\xcf\xfa\xed\xfe'}
    assert kind.startswith(magic.get(target, b'\0asm'))
    (tmp_path/'wasi.mjs').write_text(WASI)
    runners = {'aarch64-linux':['qemu-aarch64'], 'armv7-linux':['qemu-arm'],
               'wasm32-wasi':['node','--no-warnings','wasi.mjs']}
    runner = runners.get(target)
    if not runner: return
    if not shutil.which(runner[0]): pytest.skip(f'{runner[0]} is not installed: built, not run')
    assert grey_levels(drawn([*runner, program], tmp_path, SMALL, '0-99'), images(student(SMALL), range(100)))<=1


WEB = '''import { readFile, writeFile } from 'node:fs/promises';
const module = await WebAssembly.compile(await readFile(process.argv[2]));
if (WebAssembly.Module.imports(module).length) throw new Error('imports');
const student = (await WebAssembly.instantiate(module, {})).exports;
const bytes = (at, n) => new Uint8Array(student.memory.buffer, at, n);
if (student.draw(0, -1, 1) !== 2) throw new Error('drew before it was open');
const file = await readFile('student.bin');
const weights = bytes(student.weights(), student.weights_bytes());
weights.set(file);
weights[500] ^= 1;
if (student.open() !== 6) throw new Error('opened altered weights');
weights.set(file);
if (student.open() || student.draw(0, 99, 1) !== 8) throw new Error('open, or a label that does not exist');
const images = [];
for (let seed = 0; seed < 20; seed++) {
  if (student.draw(seed, -1, student.default_guidance())) throw new Error('draw');
  images.push(Buffer.from(bytes(student.pixels(), student.pixels_bytes())));
}
const walked = t => {
  if (student.walk(3, 4, t, 1, 1)) throw new Error('walk');
  return Buffer.from(bytes(student.pixels(), student.pixels_bytes()));
};
images.push(walked(0), walked(.3));
await writeFile('x.bin', Buffer.concat(images));
'''


@needs_zig
@pytest.mark.skipif(not shutil.which('node'), reason='node is not installed')
def test_module_for_a_web_page(tmp_path):
    write_source(student(SMALL), tmp_path)
    program = build(tmp_path, 'wasm32-web')
    (tmp_path/'web.mjs').write_text(WEB)
    done = run(['node', 'web.mjs', program], tmp_path)
    assert done.returncode==0, done.stderr
    pixels = np.fromfile(tmp_path/'x.bin', np.uint8).reshape(22, 16, 16, 3).transpose(0,3,1,2)
    pixels = torch.from_numpy(pixels.copy())
    assert grey_levels(pixels[:20], images(student(SMALL), range(20)))<=1
    (first,other),_ = noise_and_labels([3,4], shape(SMALL), SMALL.classes)
    angle = torch.pi/2*.3
    noise = torch.stack([first, np.cos(angle)*first+np.sin(angle)*other])
    with torch.no_grad(): want = to_bytes(OneStep(student(SMALL), 1.)(noise, torch.tensor([1,1])))
    assert grey_levels(pixels[20:], want)<=1


@needs_zig
def test_native_without_a_system_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name, *a, **k: None)
    monkeypatch.setattr('ditnano.deploy.native.compiler', lambda: compiler(lambda name: None))
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    model = student(SMALL)
    x,y = noise_and_labels(range(3), shape(SMALL), SMALL.classes)
    with torch.no_grad(): want = OneStep(model, 1.5)(x, y)
    assert (Native(OneStep(model, 1.5), threads=4)(x, y)-want).abs().max()<1e-4 and want.std()>.1


@needs_compiler
def test_altered_compiled_code_is_compiled_again(tmp_path):
    design = design_header(DiTConfig(1,16,4,image_size=16))
    for damage in (lambda b: b[:3000]+bytes([b[3000]^4])+b[3001:], lambda b: b[:1000], lambda b: b''):
        library(design, tmp_path)
        code, = tmp_path.glob('*.so')
        good = code.read_bytes()
        code.unlink()                                # a new file: the old one may be loaded
        code.write_bytes(damage(good))
        assert library(design, tmp_path).onestep_scratch and code.read_bytes()!=damage(good)
    code.with_suffix('.sha256').write_text('0')
    library(design, tmp_path)
    assert len(code.with_suffix('.sha256').read_text())==64


@needs_compiler
@pytest.mark.parametrize('threads', (2,3,8))
def test_threads_of_one_image_change_nothing(threads):
    one = OneStep(student(DiTConfig(3,36,(3,4,6),image_size=16)), 1.5)
    x,y = noise_and_labels(range(2), (3,16,16))
    alone = Native(one)
    for n in (1,2): assert torch.equal(Native(one, threads=threads)(x[:n], y[:n]), alone(x[:n], y[:n]))


@needs_compiler
def test_concurrent_calls_share_the_threads():
    from concurrent.futures import ThreadPoolExecutor
    one = OneStep(student(SMALL), 1.5)
    x,y = noise_and_labels(range(12), shape(SMALL), SMALL.classes)
    draw,want = Native(one, threads=4),Native(one)(x, y)
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(lambda i: draw(x[i:i+1], y[i:i+1]), list(range(12))*5))
    assert torch.equal(torch.cat(got[-12:]), want)


def test_c_files_come_with_the_package(root):
    files = {p.name for p in c_source('onestep.c').parent.iterdir()}
    assert {'onestep.c','onestep.h','student.c','student.h','main.c','Makefile','CMakeLists.txt'}<=files
    assert 'csrc' in (root/'setup.py').read_text() and 'csrc' in (root/'MANIFEST.in').read_text()
    assert all(len(line)<=120 for f in c_source('onestep.c').parent.iterdir() for line in f.read_text().splitlines())


@needs_compiler
def test_export_on_the_command_line(tmp_path):
    program = [sys.executable, '-c', 'from ditnano.cli import main; main()']
    command = [*program, 'export', '--format', 'c', '--precision', 'int8', '--target', 'host']
    model = student(SMALL)
    model.save_pretrained(tmp_path/'model')
    done = run([*command, '--weights', tmp_path/'model', '--out', tmp_path/'c'], tmp_path)
    assert done.returncode==0, done.stderr
    assert 'relative error' in done.stdout and 'kB' in done.stdout and (tmp_path/'c'/'build'/'host'/'student').is_file()
    done = run([*command, '--weights', tmp_path/'model', '--out', tmp_path/'model'], tmp_path)
    assert done.returncode!=0 and 'is no export to C' in done.stderr and done.stderr.count('Traceback')==0


@needs_compiler
def test_export_refuses_before_it_writes(tmp_path):
    from ditnano.deploy.export import to_c
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'thesis.tex').write_text('')
    with pytest.raises(ValueError, match='is no export to C'): to_c(student(SMALL), tmp_path/'other')
    with pytest.raises(ValueError, match='expected host or one of'):
        to_c(student(SMALL), tmp_path/'new', targets=['z80'])
    assert sorted(p.name for p in tmp_path.iterdir())==['other']
