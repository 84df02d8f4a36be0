"A wheel in an empty folder, without a checkout: a scale of one's own is swept, a table is drawn, designs are proposed."
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
SOURCES = ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in', 'ditnano', 'nbs',
           'paper_figures')
SCALE = """
name: mine
pairs: 32
images: 64
batch: 16
samples: 24
loss: L2
precision: fp32
experiments: {heads: {heads: [1]}}
"""


@pytest.fixture(scope='module')
def installed(root, tmp_path_factory):
    "A folder with the package as a wheel brings it."
    pytest.importorskip('setuptools')
    copy, wheels, site = (tmp_path_factory.mktemp('wheel')/n for n in ('copy', 'wheels', 'site'))
    copy.mkdir()
    for name in SOURCES:
        if (root/name).is_file(): shutil.copy(root/name, copy)
        else: shutil.copytree(root/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    wheel = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels, copy]
    built = subprocess.run(wheel, capture_output=True, text=True)
    if 'bdist_wheel' in built.stderr: pytest.skip('no bdist_wheel; expected setuptools 70.1 or later, or wheel')
    assert built.returncode == 0, built.stderr
    subprocess.run([*pip, 'install', '--no-deps', '--target', site, *wheels.glob('*.whl')], check=True)
    shutil.rmtree(copy)
    return site


def ditnano(installed, folder, *words):
    drop = ('DITNANO_REPO', 'DITNANO_RUNS', 'DITNANO_FIGURES', 'DITNANO_EVIDENCE', 'PYTHONPATH')
    env = {k: v for k, v in os.environ.items() if k not in drop} | {'PYTHONPATH': str(installed)}
    command = [sys.executable, '-m', 'ditnano', *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_designs_are_proposed(installed, tmp_path):
    assert '421,068' in ditnano(installed, tmp_path, 'design', '--max-params', '425k')
    where = "import ditnano; print(ditnano.__file__)"
    env = os.environ | {'PYTHONPATH': str(installed)}
    found = subprocess.run([sys.executable, '-c', where], cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    assert found.startswith(str(installed))


def test_a_scale_of_ones_own_is_swept(installed, tmp_path):
    (tmp_path/'my.yaml').write_text(SCALE)
    said = ditnano(installed, tmp_path, 'sweep', 'heads', '--scale', 'my.yaml', '--runs', 'rr')
    assert '1 of 1 runs are done' in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ['my.yaml', 'rr'] and list(tmp_path.glob('rr/*/result.json'))


def test_a_table_is_drawn_from_the_evidence_that_came_along(installed, root, tmp_path):
    pytest.importorskip('papermill')
    ditnano(installed, tmp_path, 'paper', '--only', 'table_5', '--out', 'new/')
    assert (tmp_path/'new'/'table_5.csv').read_text() == (root/'paper_figures'/'table_5.csv').read_text()
    listed = ditnano(installed, tmp_path, 'sweep', 'heads', '--scale', 'smoke', '--runs', 'rr', '--minutes', '0')
    assert 'runs are done' in listed and not (tmp_path/'rr').exists()
