"The explorer in a headless Chromium: the slider gives what `propose` gives. And the command that serves it."
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from ditnano.lab.explore import NUM_SHOWN, write_explorer
from ditnano.principles import propose

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_browser = pytest.mark.skipif(not (CHROMIUM and importlib.util.find_spec('playwright')),
                                   reason='Chromium or playwright is not installed')
SET = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }"


@pytest.fixture(scope='module')
def path(tmp_path_factory): return write_explorer(out=tmp_path_factory.mktemp('site')/'explore.html')


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield chromium
        chromium.close()


class Visit:
    "The page, opened from the disk; `messages` are its errors, warnings and requests."
    def __init__(self, browser, path, **kwargs):
        self.context = browser.new_context(**kwargs)
        self.messages, self.page = [], self.context.new_page()
        self.page.on('console', lambda m: self.messages.append(m.text))
        self.page.on('pageerror', lambda e: self.messages.append(str(e)))
        self.page.on('request', lambda r: r.url.startswith(('file:', 'data:')) or self.messages.append(r.url))
        self.page.goto(path.as_uri())

    def __enter__(self): return self

    def __exit__(self, *error): self.context.close()

    def shown(self):
        "The designs shown, and their reasons."
        design = re.search(r'\(\d+, \d+, \d+\)$', self.page.inner_text('#proposed'))[0]
        texts = 'rows => rows.map(r => [...r.cells].map(c => c.textContent))'
        others = self.page.eval_on_selector_all('#others tr', texts)
        return [(design, self.page.inner_text('#reason').removesuffix('.'))] + [(r[0], r[3]) for r in others]

    def budget(self): return float(self.page.input_value('#number'))

    def set(self, control, value): self.page.eval_on_selector(control, SET, str(value))


def wanted(**budget): return [(str(d), d.why) for d in propose(**budget)[:NUM_SHOWN]]


@needs_browser
def test_the_slider_gives_what_propose_gives(browser, path):
    with Visit(browser, path) as v:
        assert v.shown() == wanted(max_params=425_000) and v.shown()[0][0] == '(5, 64, 8)'
        seen = set()
        for position in (0, 180, 420, 470, 700, 1000):
            v.set('#slider', position)
            assert v.shown() == wanted(max_params=v.budget()), position
            assert f'--max-params {v.budget():.0f}' in v.page.inner_text('#commands')
            seen.add(v.shown()[0])
        assert len(seen) > 4
        v.page.check('input[value=max_latency]')
        assert v.shown() == wanted(max_latency=200)
        for position in (0, 333, 640, 1000):
            v.set('#slider', position)
            assert v.shown() == wanted(max_latency=v.budget()), position
        assert not v.messages


@needs_browser
def test_an_exact_budget_and_one_that_nothing_meets(browser, path):
    with Visit(browser, path) as v:
        for budget in (421_067, 421_068, 5_000_000):
            v.page.fill('#number', str(budget))
            assert v.shown() == wanted(max_params=budget)
        v.page.fill('#number', '12')
        assert v.page.get_attribute('#number', 'aria-invalid') == 'true' and v.shown() == wanted(max_params=5_000_000)
        v.page.fill('#number', '14460')
        assert v.page.get_attribute('#number', 'aria-invalid') == 'false' and v.shown() == wanted(max_params=14_460)
        assert not v.messages


@needs_browser
def test_the_pictures_show_the_proposed_design(browser, path):
    with Visit(browser, path) as v:
        first = "all => all.map(e => [e.closest('svg').id, e.dataset.design])"
        drawn = v.page.eval_on_selector_all('svg .first', first)
        assert {d for _, d in drawn} == {'5,64,8'} and {'size', 'paper'} <= {c for c, _ in drawn}
        assert '198.7 s, FID 29.14' in v.page.inner_text('#paper-now')
        v.set('#number', 5_300_000)
        assert v.page.inner_text('#paper-now').startswith('(7, 192, 12): 460.9 s, FID 10.32')
        lines = "all => all.filter(e => e.style.display != 'none').map(e => [e.closest('svg').id, e.dataset.budget])"
        assert v.page.eval_on_selector_all('.budget', lines) == [['size', 'x']]
        v.page.check('input[value=max_latency]')
        assert v.page.eval_on_selector_all('.budget', lines) == [['size', 'y'], ['paper', 'x']]


@needs_browser
def test_keyboard_names_and_a_narrow_screen(browser, path):
    with Visit(browser, path, viewport={'width': 360, 'height': 740}, color_scheme='dark') as v:
        names = v.page.eval_on_selector_all('input', 'all => all.map(e => e.labels[0].textContent.trim())')
        assert len(names) == 4 and all(names)
        assert v.page.eval_on_selector_all('svg[role=img]', "all => all.every(e => e.getAttribute('aria-labelledby'))")
        v.page.focus('#slider')
        before = v.budget()
        v.page.keyboard.press('ArrowRight')
        assert v.budget() > before and v.page.get_attribute('#slider', 'aria-valuetext').endswith(' parameters')
        v.page.focus('input[value=max_params]')
        v.page.keyboard.press('ArrowRight')
        assert v.shown() == wanted(max_latency=200)
        assert v.page.evaluate('document.documentElement.scrollWidth') <= 360
        dark = v.page.evaluate('getComputedStyle(document.body).backgroundColor')
        assert max(map(int, re.findall(r'\d+', dark))) < 64 and not v.messages


@pytest.mark.slow
def test_the_command_serves_opens_the_browser_and_ends(tmp_path):
    "The browser is a command here, that notes the address."
    note = f'{shlex.quote(sys.executable)} -c "import sys; open(\'opened\', \'w\').write(sys.argv[1])" %s'
    command = [sys.executable, '-c', 'from ditnano.cli import main; main()', 'explore']
    how = dict(cwd=tmp_path, env=os.environ | {'BROWSER': note}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, text=True, **how) as p:
        try:
            address = p.stdout.readline().split()[0]
            with urlopen(address) as got: assert 'A design for a budget' in got.read().decode()
            for _ in range(600):
                if (tmp_path/'opened').is_file() and (tmp_path/'opened').read_text(): break
                try: p.wait(0.1)
                except subprocess.TimeoutExpired: pass
            p.send_signal(signal.SIGTERM)
            assert p.wait(60) == 0 and p.stderr.read() == ''
            assert (tmp_path/'opened').read_text() == address
        finally: p.kill()
