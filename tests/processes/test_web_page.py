"A student's page in a headless Chromium: it draws Python's images, follows its controls, and reports no error."
import importlib.util
import re
import shutil

import numpy as np
import pytest
import torch

from ditnano.cli import export
from ditnano.config import DiTConfig
from ditnano.deploy.folding import OneStep
from ditnano.deploy.native import ZIG, compiler
from ditnano.deploy.web import to_web
from ditnano.dit import DiT, randomize_weights
from ditnano.edm import to_bytes
from ditnano.repro import noise_and_labels

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_zig = pytest.mark.skipif(compiler(lambda name: None)!=ZIG,
                               reason="ziglang is not installed: pip install 'ditnano[cross]'")
needs_browser = pytest.mark.skipif(not (CHROMIUM and importlib.util.find_spec('playwright')),
                                   reason='Chromium or playwright is not installed')
pytestmark = [pytest.mark.slow, needs_zig]
SMALL = DiTConfig(2, 24, (2,3), image_size=16, classes=3)
GREY = DiTConfig(1, 16, 4, image_size=16, channels=1, classes=4, label_dropout=0.)
PIXELS = '''canvas => { const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
return [canvas.width, ...d.data]; }'''


def student(cfg): return randomize_weights(DiT(cfg), 1).eval()


def shape(cfg): return cfg.channels, cfg.image_size, cfg.image_size


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    to_web(student(SMALL), folder, 'small <b>&</b>')
    return folder/'index.html'


class Visit:
    "A page that was opened from the disk; `messages` are its errors, warnings and requests."
    def __init__(self, browser, path, **kwargs):
        self.context = browser.new_context(**kwargs)
        self.messages, self.page = [], self.context.new_page()
        self.page.on('console', lambda m: self.messages.append(m.text))
        self.page.on('pageerror', lambda e: self.messages.append(str(e)))
        self.page.on('request', lambda r: r.url.startswith(('file:', 'blob:', 'data:')) or self.messages.append(r.url))
        self.page.goto(path.as_uri())
        self.drawn()

    def __enter__(self): return self

    def __exit__(self, *error): self.context.close()

    def drawn(self): self.page.locator('#status', has_text='drawn').wait_for()

    def set(self, control, value):
        self.page.evaluate("document.getElementById('status').textContent = ''")
        self.page.eval_on_selector(control, "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value)

    def pixels(self, canvas):
        size,*values = canvas.evaluate(PIXELS)
        return np.array(values).reshape(size, size, 4)[..., :3]

    def grid(self): return np.stack([self.pixels(c) for c in self.page.query_selector_all('#grid canvas')])


def grey_levels(shown, want):
    want = np.broadcast_to(want.permute(0,2,3,1).numpy().astype(int), shown.shape)
    return np.abs(shown-want).max()


def images(cfg, seeds, labels=None, guidance=1.5):
    x,drawn = noise_and_labels(seeds, shape(cfg), cfg.classes)
    y = drawn if labels is None else torch.tensor(labels)
    with torch.no_grad(): return to_bytes(OneStep(student(cfg), guidance)(x, y))


@needs_browser
def test_images_are_pythons_and_follow_the_controls(browser, small):
    each = [k%3 for k in range(20)]
    with Visit(browser, small) as v:
        assert v.page.title().startswith('small <b>&</b>') and v.page.inner_text('h1')=='small <b>&</b>'
        assert v.page.is_hidden('#loading')
        assert grey_levels(v.grid(), images(SMALL, range(20), each))<=1
        for control,value,want in (('#seed', 7, images(SMALL, range(7,27), each)),
                                   ('#guidance', 3, images(SMALL, range(7,27), each, 3.)),
                                   ('#label', 2, images(SMALL, range(7,27), [2]*20, 3.)),
                                   ('#label', -1, images(SMALL, range(7,27), None, 3.))):
            before = v.grid()
            v.set(control, value)
            v.drawn()
            assert grey_levels(v.grid(), want)<=1 and (v.grid()!=before).any(), control
        assert not v.messages


@needs_browser
def test_the_last_of_many_moves_is_shown(browser, small):
    with Visit(browser, small) as v:
        for seed in range(1, 40): v.set('#seed', seed)
        v.drawn()
        assert grey_levels(v.grid(), images(SMALL, range(39,59), [k%3 for k in range(20)]))<=1
        assert not v.messages


@needs_browser
def test_a_walk_by_hand_and_as_animation(browser, small):
    (first,other),(label,_) = noise_and_labels([3,4], shape(SMALL), SMALL.classes)
    with Visit(browser, small) as v:
        for control,value in (('#from', 3), ('#to', 4), ('#place', 30)): v.set(control, value)
        canvas = v.page.query_selector('#walk-image')
        v.page.locator('#walk-image[aria-label*="seed 4, at 30"]').wait_for()
        angle = .3*np.pi/2
        noise = np.cos(angle)*first+np.sin(angle)*other
        with torch.no_grad(): want = to_bytes(OneStep(student(SMALL), 1.5)(noise[None], label[None]))
        assert grey_levels(v.pixels(canvas)[None], want)<=1
        v.page.click('#play')
        assert v.page.inner_text('#play')=='Pause'
        v.page.locator('#rate', has_text='images/s').wait_for()
        v.page.click('#play')
        assert v.page.inner_text('#play')=='Play' and not v.messages


@needs_browser
def test_times_have_percentiles(browser, small):
    with Visit(browser, small) as v:
        v.page.focus('#measure')
        v.page.keyboard.press('Enter')
        v.page.locator('#measured', has_text='after warm-up').wait_for()
        texts = 'rows => rows.map(r => [...r.cells].map(c => c.textContent))'
        rows = v.page.eval_on_selector_all('#times tbody tr', texts)
        assert v.page.inner_text('#measured').endswith(', with fused multiply-add.')
        assert [r[:2] for r in rows]==[['1.0','1'],['1.5','2']] and not v.messages
        for row in rows:
            median,p90,p99 = map(float, row[2:5])
            assert median<=p90<=p99 and float(row[5])>0 and int(row[6])>=20


@needs_browser
def test_keyboard_names_and_a_narrow_screen(browser, small):
    with Visit(browser, small, viewport={'width':360, 'height':740}, color_scheme='dark') as v:
        names = v.page.eval_on_selector_all('input,select,button,canvas,progress',
            "all => all.map(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)")
        assert all(n.strip() for n in names)
        order = []
        for _ in range(9):
            v.page.keyboard.press('Tab')
            order.append(v.page.evaluate('document.activeElement.id'))
        assert [i for i in order if i]==['label','guidance','seed','from','to','place','play','measure'], order
        v.page.focus('#seed')
        v.page.keyboard.press('ArrowRight')
        assert v.page.inner_text('#seed-value')=='1'
        assert v.page.evaluate('document.documentElement.scrollWidth')<=360
        dark = v.page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert max(map(int, re.findall(r'\d+', dark)))<64 and not v.messages


@needs_browser
def test_a_grey_student_without_guidance(browser, tmp_path):
    to_web(student(GREY), tmp_path, guidance=1.)
    with Visit(browser, tmp_path/'index.html') as v:
        assert v.page.is_disabled('#guidance')
        assert grey_levels(v.grid(), images(GREY, range(20), [k%4 for k in range(20)], 1.))<=1
        assert not v.messages


@needs_browser
def test_without_fused_multiply_add(browser, small, tmp_path):
    (tmp_path/'index.html').write_text(small.read_text().replace('WebAssembly.validate(relaxed)', 'false'))
    with Visit(browser, tmp_path/'index.html') as v:
        assert grey_levels(v.grid(), images(SMALL, range(20), [k%3 for k in range(20)]))<=1 and not v.messages


@needs_browser
def test_altered_weights_are_reported(browser, small, tmp_path):
    text = small.read_text()
    last = text.rindex("part('weights', '")+len("part('weights', '")
    swapped = 'B' if text[last+100]=='A' else 'A'
    (tmp_path/'index.html').write_text(text[:last+100]+swapped+text[last+101:])
    page = browser.new_page()
    page.goto((tmp_path/'index.html').as_uri())
    page.locator('#status', has_text='SHA-256').wait_for()
    page.close()


def test_classes_have_their_names(tmp_path):
    model = student(SMALL)
    for card, names in (({'classes':['cat','dog & <fox>','花']}, ['cat','dog &amp; &lt;fox&gt;','花']),
                        ({'classes':['cat']}, ['0','1','2']), (None, ['0','1','2'])):
        model.card = card
        to_web(model, tmp_path)
        text = (tmp_path/'index.html').read_text(encoding='utf-8')
        assert re.findall(r'<option value="\d">(.*?)</option>', text)==names


def test_the_command_writes_a_page(tmp_path, capsys):
    student(SMALL).save_pretrained(tmp_path/'mine')
    export(str(tmp_path/'mine'), format='web', out=tmp_path/'site')
    made = tmp_path/'site'/'index.html'
    assert capsys.readouterr().out.splitlines()[-1].startswith(f'{made}: ') and '<h1>mine</h1>' in made.read_text()


def test_size_network_and_folders(tmp_path):
    made = to_web(randomize_weights(DiT(DiTConfig(5,64,8))).eval(), tmp_path/'new'/'site', 'nano')
    page = tmp_path/'new'/'site'/'index.html'
    text = page.read_text()
    assert made['bytes']==page.stat().st_size<1_000_000
    code = re.sub(r"part\('.*?'\)", '', text)
    assert not re.findall(r'(?:src|href)="(?!data:)|https?://|@import|url\(|fetch\(', code)
    assert text.count('<script')==text.count('</script>')
    to_web(student(SMALL), page.parent)
    assert page.stat().st_size<made['bytes'] and [p.name for p in page.parent.iterdir()]==['index.html']
    page.write_text('mine')
    with pytest.raises(ValueError, match='is no page of ditnano'): to_web(student(SMALL), page.parent)
    assert page.read_text()=='mine'
