"From pictures to a product: sizes and times, one toy product, what is refused, and what a kill leaves behind."
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ditnano import cli
from ditnano.dit import DiT
from ditnano.edm import EDMPrecond, load_teacher, save_teacher
from ditnano.lab import product
from ditnano.lab.product import Plan, choose_preset, distill, student_designs, teach
from ditnano.repro import file_hash
from ditnano.unet import SongUNet

PHOTOS = load_sample_images().images
pytestmark = pytest.mark.xdist_group('product')   # one toy product serves most tests


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Crops of two photographs, in files of several kinds, sizes and modes."
    root = tmp_path_factory.mktemp('pictures')/'photos'
    kinds = [('png','RGB'), ('jpg','RGB'), ('webp','RGB'), ('bmp','RGB'), ('gif','P'), ('png','RGBA'), ('png','L')]
    for c,photo in zip(('花 と 草','temple'), PHOTOS):
        (root/c).mkdir(parents=True)
        for k in range(20):
            kind, mode = kinds[k%len(kinds)]
            Image.fromarray(photo[7*k:7*k+48+k, 9*k:9*k+60]).convert(mode).save(root/c/f'{k:02d}.{kind}')
    return root


@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('DITNANO_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


def toy(out, photos, log=lambda line: None, **changes):
    how = dict(minutes=0.02, max_params=30_000, size=16, loss='L2', exports=('onnx-fp32',), device='cpu', log=log)
    return distill(photos, out, **(how|changes))


@pytest.fixture(scope='module')
def made(photos, tmp_path_factory):
    lines = []
    return toy(tmp_path_factory.mktemp('toy')/'product', photos, lines.append), lines


@pytest.mark.slow
def test_toy_product(made, photos):
    out, lines = made
    assert [l.split(':')[0] for l in lines if l[1:3]=='/5'] == [f'{k+1}/5 {s}' for k,s in enumerate(product.STAGES)]
    page, plan = (out/'README.md').read_text(encoding='utf-8'), json.loads((out/'plan.json').read_text())
    assert page.startswith('---\nlibrary_name: ditnano') and '花 と 草' in page
    student, teacher = DiT.from_pretrained(out/'student'), load_teacher(out/'teacher')
    assert student.cfg.image_size == teacher.cfg.image_size == 16 and student.cfg.classes == 2
    assert teacher.card['classes'] == student.card['classes'] == ['temple','花 と 草'] and teacher.cfg.augment_dim == 9
    assert sum(p.numel() for p in student.parameters()) <= 30_000
    assert set(plan['stages']) == set(product.STAGES) and all('seconds' in s for s in plan['stages'].values())
    for name in ('samples.png','nearest.png','loss.png','teacher/samples.png','teacher/loss.png','student-fp32.onnx'):
        assert (out/name).stat().st_size > 300
    assert '(samples.png)' in page and '(nearest.png)' in page and '`student-fp32.onnx`' in page
    numbers = plan['stages']['evaluation']['numbers']
    assert any(k.startswith('KD-') for k in numbers) and all(np.isfinite(v) for v in numbers.values())
    assert not (out/'work'/'student'/'state.safetensors').exists()


@pytest.mark.slow
def test_a_finished_product_is_not_made_again(made, photos):
    out, _ = made
    before, lines = {p:file_hash(p) for p in out.rglob('*.safetensors')}, []
    toy(out, photos, lines.append)
    assert [l for l in lines if l[1:3]=='/5'] == [f'{k+1}/5 {s}: done before' for k,s in enumerate(product.STAGES)]
    assert {p:file_hash(p) for p in out.rglob('*.safetensors')} == before


def altered(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['plan.json', 'teacher/model.safetensors', 'student/model.safetensors',
                                  'work/pairs/manifest.json'])
def test_damage_of_a_finished_product_is_named(name, made, photos, tmp_path):
    shutil.copytree(made[0], tmp_path/'product')
    altered(tmp_path/'product'/name)
    with pytest.raises(ValueError, match=name): toy(tmp_path/'product', photos)


@pytest.mark.slow
def test_a_damaged_export_is_written_again(made, photos, tmp_path):
    out, lines = tmp_path/'product', []
    shutil.copytree(made[0], out)
    file, before = out/'student-fp32.onnx', file_hash(made[0]/'student-fp32.onnx')
    for damage in (altered, lambda path: path.unlink()):
        damage(file)
        toy(out, photos, lines.append)
        assert file_hash(file) == before and lines.count('4/5 evaluation: done before')
    assert '5/5 exports: done before' not in lines


def test_a_plan_is_read_or_named(tmp_path):
    plan = Plan(tmp_path, {'seed':0})
    plan.note('pairs', count=100)
    text = (tmp_path/'plan.json').read_text()
    for changed in (text.replace('100', '101'), text.replace('sha256', 'sha257'), text[:40], '{}', '{"settings":1}'):
        (tmp_path/'plan.json').write_text(changed)
        with pytest.raises(ValueError, match='plan.json: '): Plan(tmp_path, {'seed':0})


@pytest.mark.slow
def test_a_product_whose_teacher_is_half_trained_is_resumed(photos, tmp_path, monkeypatch):
    "The plan is on the disk before the first stage."
    class Stopped(BaseException): pass
    def stop(*given): raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(product, 'save_loss_curve', stop)
        with pytest.raises(Stopped): toy(tmp_path/'product', photos)
    assert (tmp_path/'product'/'teacher'/'state.safetensors').is_file()
    toy(tmp_path/'product', photos, exports=())
    assert (tmp_path/'product'/'README.md').is_file()


class Killed(BaseException):
    "Ends a run as a kill would: nothing in the project catches it."


@pytest.mark.slow
@pytest.mark.parametrize('stage', product.STAGES)
def test_a_kill_in_any_stage_loses_no_stage_before_it(stage, made, photos, tmp_path, monkeypatch):
    "The plan of the whole product is given, so that amounts are equal; then the results must be equal too."
    whole, out = made[0], tmp_path/'product'
    plan = json.loads((whole/'plan.json').read_text())
    given = {k:{n:v for n,v in s.items() if n in ('count','rate','design','loss','train','preset')}
             for k,s in plan['stages'].items() if k in ('pairs','student')}
    teacher = json.loads((whole/'teacher'/'plan.json').read_text())
    for folder, content in ((out, {'settings':plan['settings'], 'stages':given}), (out/'teacher', teacher)):
        folder.mkdir()
        (folder/'plan.json').write_text(json.dumps(content))
    work, calls = product.WORK[stage], []
    def kill(p, seconds):
        calls.append(work(p, seconds))
        raise Killed   # after the work, before it is noted
    with monkeypatch.context() as patch:
        patch.setitem(product.WORK, stage, kill)
        with pytest.raises(Killed): toy(out, photos)
    assert not (out/'README.md').exists() and 'seconds' not in Plan(out, plan['settings']).stage(stage)
    lines = []
    toy(out, photos, lines.append)
    done = [l.split()[1].rstrip(':') for l in lines if 'done before' in l]
    assert done == list(product.STAGES)[:list(product.STAGES).index(stage)] and len(calls) == 1
    for file in ('teacher/model.safetensors','student/model.safetensors'):
        assert file_hash(out/file) == file_hash(whole/file)
    assert (out/'README.md').is_file()


SCRIPT = """
import os, signal, sys
from ditnano.lab import product
from ditnano.state import save_state
import ditnano.train as train
saved = []
def save(*given):
    out = save_state(*given)
    saved.append(out)
    if len(saved) == 1: os.kill(os.getpid(), signal.SIGKILL)
    return out
train.save_state = save
product.teach(sys.argv[1], sys.argv[2], size=16, minutes=0.02, device='cpu')
"""


@pytest.mark.slow
def test_teach_resumes_after_a_real_kill(made, photos, tmp_path):
    "Killed right after its first checkpoint; then resumed, and equal to the teacher that was not killed."
    out, whole = tmp_path/'teacher', made[0]/'teacher'
    out.mkdir()
    shutil.copyfile(whole/'plan.json', out/'plan.json')
    done = subprocess.run([sys.executable, '-c', SCRIPT, str(photos), str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out/'state.safetensors').is_file() and not (out/'model.safetensors').exists()
    teach(photos, out, size=16, minutes=0.02, device='cpu', log=lambda line: None)
    assert file_hash(out/'model.safetensors') == file_hash(whole/'model.safetensors')
    assert not (out/'state.safetensors').exists()


def nothing(folder): return not folder.exists() or not any(folder.iterdir())


def small_teacher(folder, **sizes):
    from ditnano.lab.product import teacher_config
    save_teacher(EDMPrecond(SongUNet(replace(teacher_config('small', 16), model_channels=8, **sizes))), folder, {})
    return folder


@pytest.mark.parametrize('changes, text', [
    (dict(max_params=500), 'max_params=500: no design meets it'),
    (dict(minutes=0), 'minutes=0; expected more than 0'), (dict(minutes=-5), 'minutes=-5; expected more than 0'),
    (dict(size=18), 'size 18; expected a multiple of 4 from 16 to 64'), (dict(size=128), 'size 128; expected'),
    (dict(loss='LPIPS-resnet@64'), "LPIPS backbone 'resnet': expected one of"),
    (dict(loss='L7'), "loss 'L7': expected L1"),
    (dict(exports=('onnx','c')), "export 'onnx'; expected some of onnx-fp32"), (dict(seed=-1), 'seed=-1; expected'),
    (dict(device='tpu'), "device 'tpu': expected auto, cpu, cuda or mps"),
    (dict(teacher='nobody'), "teacher 'nobody': no config.json"),
    (dict(teacher='digits32', size=None), "teacher 'digits32': 10 classes, the pictures have 2; expected as many"),
    (dict(teacher='digits32'), "teacher 'digits32': draws 3x32x32, the pictures are 3x16x16; expected one size"),
    (dict(teacher='digits32', size=None, channels=1), 'the pictures are 1x32x32'),
    (dict(columns='image'), "columns 'image' of "),
])
def test_what_does_not_fit_is_refused_before_anything_is_made(changes, text, photos, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as caught: toy(tmp_path/'new', photos, **changes)
    assert text in str(caught.value) and '\n' not in str(caught.value) and nothing(tmp_path/'new')


def test_one_class_is_not_guided(photos, tmp_path):
    with pytest.raises(ValueError, match='guidance 2: one class has nothing to exaggerate; expected 1'):
        toy(tmp_path/'new', photos/'temple', guidance=2)
    assert student_designs(30_000, 16, 3, 1)[0].label_dropout == 0 and nothing(tmp_path/'new')


def test_folders_that_hold_something_else(photos, tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('x')
    (tmp_path/'file').write_text('x')
    for make in (toy, lambda out, photos: teach(photos, out, size=16)):
        with pytest.raises(ValueError, match='mine: holds thesis.tex and no plan.json; expected a new folder'):
            make(tmp_path/'mine', photos)
        with pytest.raises(ValueError, match='file: is a file; expected a folder'): make(tmp_path/'file', photos)
    assert [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis.tex']


@pytest.mark.slow
def test_a_product_of_other_settings_is_not_continued(made, photos):
    for changes, text in ((dict(max_params=40_000), 'made with max_params=30000, asked for max_params=40000'),
                          (dict(size=20), 'made with pictures=photos@16, asked for pictures=photos@20'),
                          (dict(guidance=3.), 'made with guidance=1.5, asked for guidance=3.0')):
        with pytest.raises(ValueError, match=text): toy(made[0], photos, **changes)


@pytest.mark.slow
def test_a_missing_tool_skips_its_export_and_the_next_call_makes_it(made, photos, tmp_path, monkeypatch, capsys):
    out, lines = tmp_path/'product', []
    shutil.copytree(made[0], out)
    def missing(*given): raise ModuleNotFoundError("onnx is not installed: pip install 'ditnano[export]'")
    with monkeypatch.context() as patch:
        patch.setitem(product.EXPORTS, 'onnx-fp16', ('student-fp16.onnx', missing))
        toy(out, photos, lines.append, exports=('onnx-fp32','onnx-fp16'))
        assert "skipped onnx-fp16: onnx is not installed: pip install 'ditnano[export]'" in lines
        assert '| onnx-fp16 | skipped |' in (out/'README.md').read_text(encoding='utf-8')
    toy(out, photos, lines.append, exports=('onnx-fp32','onnx-fp16'))
    assert (out/'student-fp16.onnx').is_file()
    assert '`student-fp16.onnx`' in (out/'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
def test_a_teacher_without_classes(photos, tmp_path):
    teacher = small_teacher(tmp_path/'teacher', label_dim=0)
    out = toy(tmp_path/'product', photos, teacher=teacher, size=None, exports=())
    student = DiT.from_pretrained(out/'student')
    assert student.cfg.classes == 1 and student.cfg.label_dropout == 0 and student.card['classes'] == ['photos@16']
    assert not (out/'teacher').exists() and '1/4' not in (out/'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
def test_presets_by_time_and_pictures():
    assert [choose_preset(20e12, 3600, n) for n in (100, 2_000, 10_000, 50_000)][:3] == ['small','medium','7m']
    assert choose_preset(20e9, 600, 50_000) == 'small' and choose_preset(200e12, 36_000, 50_000) == 'cifar10'
    assert choose_preset(20e12, 3600, 50_000, 64) != 'cifar10'   # four times the work


SHAPES = [(16,1,1), (24,3,100), (48,3,2), (64,1,10)]


@pytest.mark.parametrize('preset, size, channels, classes', [(p, *s) for p, s in zip(product.PRESET_NEEDS, SHAPES)])
def test_teachers_of_every_size(preset, size, channels, classes):
    cfg = product.teacher_config(preset, size, channels, classes)
    assert (cfg.image_size, cfg.channels, cfg.label_dim) == (size, channels, classes)
    assert product.denoiser_flops(cfg) > 0
    assert all(size%a == 0 for a in cfg.attn_resolutions)


@pytest.mark.parametrize('words', [
    ('distill','--images','nowhere'), ('distill','--size','17','--images','digits32'), ('distill','--max-params','few'),
    ('distill','--exports','pdf'), ('distill','--minutes','0'), ('distill','--teacher','nobody'),
    ('teach','--images','nowhere'), ('teach','--images','digits32','--augment','2'),
    ('teach','--images','digits32','--minutes','-1'),
], ids=' '.join)
def test_a_mistake_on_the_command_line_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left: cli.main(list(words))
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith('ditnano: ')
    assert list(tmp_path.iterdir()) == []
