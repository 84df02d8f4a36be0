"Every notebook of nbs/ runs from top to bottom at its default parameters, each in a process of its own."
import json
import os
import shutil
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT/'nbs'
LIMIT = 1500  # seconds for one notebook, on a busy machine; library chapters are meant to take 20, experiments 60

RUN = ROOT/'tests'/'run_notebook.py'


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
    return {'DITNANO_RUNS': str(folder/'runs'), 'DITNANO_FIGURES': str(folder/'paper_figures')}


def run(programs, path, skip, force='', env=None):
    "Exit status and output of a notebook's process."
    done = programs.run(RUN, path, ROOT, skip, force, env=env, cwd=path.parent, timeout=LIMIT)
    return done.returncode, done.stdout+done.stderr


@pytest.mark.parametrize('path', list(notebooks()))
def test_notebook(path, sandbox, programs):
    "Set DITNANO_TEST_FLAGS='slow' (or 'slow cuda') to run the flagged cells too."
    status, said = run(programs, path, skip_flags(), os.environ.get('DITNANO_TEST_FLAGS', ''), sandbox)
    if status: pytest.fail(f'{path.relative_to(ROOT)}\n{said[-8000:]}', pytrace=False)


@pytest.mark.parametrize('how', ['programs', 'new_programs'])
def test_a_failing_notebook_fails(tmp_path, how, request):
    "The runner itself: a wrong cell must be reported, with its source, and the next notebook still runs."
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    for name, source, expected in (('bad', 'wrong = 1\nassert wrong == 2', 1), ('good', 'right = 2', 0)):
        cell = {'cell_type': 'code', 'id': 'a', 'metadata': {}, 'outputs': [], 'execution_count': None}
        nb = {'cells': [cell | {'source': source}], 'metadata': {'kernelspec': kernel}, 'nbformat': 4,
              'nbformat_minor': 5}
        path = tmp_path/f'{name}.ipynb'
        path.write_text(json.dumps(nb))
        status, said = run(request.getfixturevalue(how), path, 'slow')
        assert status == expected
        assert not status or ('AssertionError' in said and 'wrong == 2' in said)
