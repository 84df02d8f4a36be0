"The frame around the rooms: links, pins, packaging, and what an import may need."
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INI = ConfigParser(delimiters=['='])
INI.read(ROOT/'settings.ini', encoding='utf-8')


def normal(name): return re.sub(r'[-_.]+', '-', name).lower()


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r'\]\((?!https?://)([^)#]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert len(targets) > 10 and [t for t in targets if not (ROOT/t).exists()] == []


def test_the_readme_shows_no_directives():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert '#|' not in text and '<!--' not in text and 'make paper' in text


def test_every_requirement_is_pinned():
    pins = {normal(line.split('==')[0]) for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line}
    listed = ' '.join(v for k, v in INI['DEFAULT'].items() if k.endswith('requirements')).split()
    wanted = {normal(re.match(r'[\w.-]+', r)[0]) for r in listed}
    assert wanted - pins == set()


def test_versions_agree():
    import ditnano
    assert ditnano.__version__ == INI['DEFAULT']['version']
    assert f"version: {INI['DEFAULT']['version']}" in (ROOT/'CITATION.cff').read_text()


def test_papermill_tags_survive_cleaning():
    assert 'tags' in INI['DEFAULT']['allowed_cell_metadata_keys'].split()


@pytest.mark.slow
def test_import_needs_no_development_tools():
    files = [p.relative_to(ROOT).with_suffix('') for p in (ROOT/'ditnano').rglob('*.py') if not p.stem.startswith('_')]
    imports = '\n'.join(sorted('import '+'.'.join(p.parts) for p in files))
    block = "import sys\nfor m in ('nbdev','fastcore','execnb','IPython','papermill','pytest'): sys.modules[m] = None\n"
    done = subprocess.run([sys.executable, '-c', block+imports], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_folder_of_modules_is_packaged():
    setuptools = pytest.importorskip('setuptools')
    folders = {'.'.join(p.parent.relative_to(ROOT).parts) for p in (ROOT/'ditnano').rglob('*.py')}
    assert len(folders) > 4 and folders == set(setuptools.find_packages(ROOT, include=['ditnano', 'ditnano.*']))


def test_setup_needs_setuptools_alone():
    pytest.importorskip('setuptools')
    block = ("import sys, runpy\nfor m in ('nbdev','fastcore'): sys.modules[m] = None\n"
             "sys.argv = ['setup.py', '--name', '--version']\nrunpy.run_path('setup.py')")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', block], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ['ditnano', INI['DEFAULT']['version']]


def test_no_file_is_large():
    listed = subprocess.run(['git', 'ls-files', '-z'], capture_output=True, cwd=ROOT)
    if listed.returncode: pytest.skip('not a git checkout')
    files = [ROOT/f for f in listed.stdout.decode().split('\0') if f]
    teacher = ROOT/'ditnano'/'weights'/'teacher-cifar10-7m'/'model.safetensors'   # made by a lease, kept for the next
    assert [f for f in files if f.is_file() and f.stat().st_size > (16 if f == teacher else 3)*2**20] == []
