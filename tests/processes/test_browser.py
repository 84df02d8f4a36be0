"Engines in one headless Chromium: what they draw and cost, what is missing; native code without a compiler."
import http.client
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from urllib.parse import urlparse

import numpy as np
import pytest

from ditnano.cli import bench
from ditnano.config import DiTConfig
from ditnano.deploy import browser
from ditnano.deploy.browser import (
    C_ENGINES,
    ORT_FILES,
    ORT_WEB,
    browser_times,
    in_browser,
    missing_tools,
    ort_web,
    serve,
)
from ditnano.deploy.native import ZIG, compiler
from ditnano.dit import DiT, randomize_weights, shipped_students
from ditnano.lab import bench as benches
from ditnano.lab.bench import bench_frames, bench_web, web_run
from ditnano.repro import cache_dir

needs_browser = pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {', '.join(missing_tools())}")
HAS_ORT = (cache_dir()/'npm'/ORT_WEB/'package.json').is_file()
SMALL = DiTConfig(1, 24, (3,), image_size=16, classes=3)


def student(): return randomize_weights(DiT(SMALL), 1).eval()


@needs_browser
def test_engines_draw_pythons_images(monkeypatch):
    "With onnxruntime-web if it is in the cache: ditnano bench web --fetch."
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    ours,theirs = list(C_ENGINES),[f'onnxruntime-web, {n}' for n in ('1 thread', '2 threads')]
    found = browser_times(student(), 2, 2, ort_web() if HAS_ORT else None)
    assert [r['engine'] for r in found['rows']]==ours+theirs*HAS_ORT
    assert found['isolated'] and found['browser'].startswith('Chromium ')
    total = {r['engine']:r['engine bytes']+r['weights bytes'] for r in found['rows']}
    for row in found['rows']:
        assert row['grey levels apart']<=1
        assert 0<row['one pass p50_ms']<=row['one pass p99_ms'] and 0<row['guided p50_ms']<=row['guided p99_ms']
        assert row['engine gzip']<row['engine bytes'] and row['weights bytes']>0
    assert found['rows'][0]['guided ratio']==found['rows'][0]['one pass ratio']==1
    assert all(total['ditnano']<total[name]/5 for name in theirs*HAS_ORT)


@needs_browser
def test_frame_time_has_a_row_of_the_browser(tmp_path):
    how = dict(backends=['browser'], frames=3, device='cpu')
    row, = bench_frames([(1,16,4)], tmp_path, **how)
    assert (row['backend'], row['guidance'], row['width'])==('browser', 1.5, 16) and 0<row['p50_ms']<=row['p99_ms']
    assert bench_frames([(1,16,4)], tmp_path, **how)==[row]
    record = json.loads((tmp_path/row['record']/'result.json').read_text())
    assert record['samples']==3 and record['device']['browser'].startswith('Chromium ')


@needs_browser
def test_an_error_in_the_page_is_reported(tmp_path):
    (tmp_path/'index.html').write_text('<!doctype html>')
    with serve(tmp_path) as url, pytest.raises(Exception, match='no such engine'):
        in_browser(url, 'why => { throw new Error(why); }', 'no such engine')


def test_served_pages_are_isolated(tmp_path):
    (tmp_path/'a.wasm').write_bytes(b'\0asm')
    (tmp_path/'b.mjs').write_text('export {}')
    with serve(tmp_path) as url:
        for name,kind in (('a.wasm','application/wasm'), ('b.mjs','text/javascript')):
            connection = http.client.HTTPConnection(urlparse(url).netloc, timeout=300)
            connection.request('GET', f'/{name}')
            answer = connection.getresponse()
            assert answer.status==200 and answer.read()==(tmp_path/name).read_bytes()
            assert answer.headers['Content-Type']==kind
            assert answer.headers['Cross-Origin-Opener-Policy']=='same-origin'
            assert answer.headers['Cross-Origin-Embedder-Policy']=='require-corp'
            connection.close()


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, 'which', lambda name, **k: None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    missing = missing_tools()
    assert [m.partition(' (')[0] for m in missing]==['Chromium', 'playwright', 'ziglang']
    assert all('install ' in m for m in missing)
    monkeypatch.undo()
    for module in (browser, benches): monkeypatch.setattr(module, 'missing_tools', lambda: missing)
    for call in (lambda: web_run((1,16,4), tmp_path), lambda: browser_times(student())):
        with pytest.raises(RuntimeError) as e: call()
        assert '\n' not in str(e.value) and all(m in str(e.value) for m in missing)
    assert not list(tmp_path.iterdir())
    assert bench_frames([(1,16,4)], tmp_path, backends=['browser'], frames=1, device='cpu')==[]
    assert capsys.readouterr().out.startswith('skipped: browser (not installed: Chromium (apt install chromium); ')


NPM = '''#!{python}
import json, pathlib, shutil, sys
assert sys.argv[1:]==['pack', '--silent', {package!r}]
if {broken}: sys.exit('npm error code ENOTFOUND')
shutil.copyfile({archive!r}, 'onnxruntime-web.tgz')
'''


def stand_in_npm(folder, names, broken=False):
    "A program `npm` that packs the named files."
    with tarfile.open(folder/'packed', 'w:gz') as tar:
        for name in names:
            info = tarfile.TarInfo(f'package/{name}')
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    text = NPM.format(python=sys.executable, package=ORT_WEB, archive=str(folder/'packed'), broken=broken)
    (folder/'npm').write_text(text)
    (folder/'npm').chmod(0o755)


def test_npms_package_is_fetched_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='not in the cache; ditnano bench web --fetch'): ort_web()
    with pytest.raises(RuntimeError, match='npm is not installed; apt install npm'): ort_web(fetch=True)
    files = ['package.json', *(f'dist/{f}' for f in ORT_FILES)]
    stand_in_npm(tmp_path, files, broken=True)
    with pytest.raises(RuntimeError, match='npm pack: npm error code ENOTFOUND'): ort_web(fetch=True)
    stand_in_npm(tmp_path, files[:-1])
    with pytest.raises(RuntimeError, match='no ort-wasm-simd-threaded.wasm in the package'): ort_web(fetch=True)
    assert not (tmp_path/'cache'/'npm'/ORT_WEB).exists()
    stand_in_npm(tmp_path, [*files, 'dist/ort.js'])
    folder = ort_web(fetch=True)
    assert sorted(p.name for p in folder.iterdir())==sorted(['package.json', *ORT_FILES])
    (tmp_path/'npm').unlink()
    assert ort_web()==folder


def test_the_comparison_is_kept_as_a_record(monkeypatch, tmp_path, capsys):
    calls = []
    def timed(model, rounds, frames, ort):
        calls.append(ort)
        columns = {f'{w} {k}':2.5 for w in ('guided','one pass') for k in ('p50_ms','p99_ms','ratio')}
        columns |= {'engine bytes':3000, 'weights bytes':5000, 'grey levels apart':1, 'threads':1}
        return {'rows':[{'engine':e} | columns for e in ('ditnano', 'onnxruntime-web, 2 threads')]}
    monkeypatch.setattr(benches, 'browser_times', timed)
    monkeypatch.setattr(benches, 'browser_version', lambda: 'Chromium 1.2')
    monkeypatch.setattr(benches, 'missing_tools', lambda: [])
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    rows = bench_web([(1,16,4)], tmp_path/'runs', frames=2)
    assert 'skipped: onnxruntime-web' in capsys.readouterr().out and calls==[None]
    assert [r['engine'] for r in rows]==['ditnano', 'onnxruntime-web, 2 threads']
    assert (rows[1]['guided (ms)'], rows[1]['engine (kB)'], rows[1]['browser'])==(2.5, 3, 'Chromium 1.2')
    assert bench_web([(1,16,4)], tmp_path/'runs', frames=2)==rows and len(calls)==1
    record = json.loads((tmp_path/'runs'/rows[0]['record']/'result.json').read_text())
    assert record['kind']=='web' and record['device']['browser']=='Chromium 1.2' and record['samples']==10
    monkeypatch.setenv('DITNANO_RUNS', str(tmp_path/'runs'))
    bench('web', ((1,16,4),), out=tmp_path/'web.csv')
    assert (tmp_path/'web.csv').read_text().startswith('design,engine,guided (ms)')


@pytest.mark.skipif(compiler(lambda name: None)!=ZIG, reason="ziglang is not installed: pip install 'ditnano[cross]'")
@pytest.mark.skipif('nano-digits' not in shipped_students(), reason='nano-digits is not in this package')
def test_native_on_a_machine_without_a_compiler(tmp_path):
    (tmp_path/'bin').mkdir()
    zig = os.environ.get('ZIG_GLOBAL_CACHE_DIR', str(cache_dir()/'zig'))
    env = {k:v for k,v in os.environ.items() if k!='CC'}
    env |= {'PATH':str(tmp_path/'bin'), 'DITNANO_CACHE':str(tmp_path/'cache'), 'ZIG_GLOBAL_CACHE_DIR':zig}
    def images(backend):
        options = '--backend', backend, '--seeds', '0-3', '--labels', '3,5', '--out', f'{backend}.npy'
        command = [sys.executable, '-m', 'ditnano', 'sample', *options]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode==0, done.stdout+done.stderr
        return np.load(tmp_path/f'{backend}.npy').astype(int)
    native,eager = images('native'),images('eager')
    assert np.abs(native-eager).max()<=1 and eager.std()>10
    assert list((tmp_path/'cache'/'native').glob('*.so'))
