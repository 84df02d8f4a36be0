"Every notebook of nbs/ runs from top to bottom at its default parameters, each in a process of its own."
import json
import os
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
LIMIT = 480  # seconds for one notebook; library chapters are meant to take 20, experiments 60

# Runs one notebook in nbdev's shell: cells flagged slow or cuda are skipped; a failing cell prints its traceback.
CHILD = """
import sys
from pathlib import Path
from nbdev.test import test_nb
path, base, skip, force = sys.argv[1:]
ok, seconds = test_nb(Path(path), skip_flags=skip.split(), force_flags=force.split(), basepath=base)
print(f'{seconds:.1f} s')
sys.exit(0 if ok else 1)
"""


def order(path):
    "Experiments first, since they take longest; drawing notebooks last, after the runs that they draw."
    folders = ['experiments', 'tutorials', '.', 'distill', 'interop', 'deploy', 'lab', 'paper']
    folder = path.relative_to(NBS).parent.as_posix()
    return folders.index(folder) if folder in folders else len(folders), path.name


def notebooks():
    found = [p for p in NBS.rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(NBS).parts)]
    for p in sorted(found, key=order):
        folder = p.relative_to(NBS).parent.as_posix()
        # experiments share pairs and runs, so they go one after another in one worker
        marks = [pytest.mark.xdist_group('runs')] if folder in ('experiments', 'paper') else []
        yield pytest.param(p, id=p.relative_to(NBS).with_suffix('').as_posix(), marks=marks)


def skip_flags():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']['tst_flags']


@pytest.fixture(scope='session')
def sandbox(tmp_path_factory):
    "Runs and figures of the tests go to a folder of their own, which starts with the committed evidence."
    folder = tmp_path_factory.mktemp('sandbox')
    evidence = ROOT/'paper_figures'/'evidence'
    if evidence.is_dir(): shutil.copytree(evidence, folder/'paper_figures'/'evidence')
    return {**os.environ, 'DITNANO_RUNS':str(folder/'runs'), 'DITNANO_FIGURES':str(folder/'paper_figures')}


@pytest.mark.parametrize('path', list(notebooks()))
def test_notebook(path, sandbox):
    "Set DITNANO_TEST_FLAGS='slow' (or 'slow cuda') to run the flagged cells too."
    forced = os.environ.get('DITNANO_TEST_FLAGS', '')
    command = [sys.executable, '-c', CHILD, str(path), str(ROOT), skip_flags(), forced]
    process = subprocess.Popen(command, cwd=path.parent, env=sandbox, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors='replace', start_new_session=True)
    try: said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f'{path.name}: not done after {LIMIT} s\n{said[-4000:]}', pytrace=False)
    if process.returncode: pytest.fail(f'{path.relative_to(ROOT)}\n{said[-8000:]}', pytrace=False)


def test_a_failing_notebook_fails(tmp_path):
    "The runner itself: a wrong cell must be reported, with its source."
    cell = {'cell_type': 'code', 'id': 'a', 'metadata': {}, 'outputs': [], 'execution_count': None,
            'source': 'wrong = 1\nassert wrong == 2'}
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nb = {'cells': [cell], 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}
    path = tmp_path/'bad.ipynb'
    path.write_text(json.dumps(nb))
    command = [sys.executable, '-c', CHILD, str(path), str(ROOT), 'slow', '']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert 'AssertionError' in done.stderr and 'wrong == 2' in done.stderr
