"""Every number in paper_figures/ comes from a committed record: check all, and draw the tables again."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ditnano.edm import load_teacher
from ditnano.lab.runs import read_result, record_hash, run_key

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT/'paper_figures'
EVIDENCE = FIGURES/'evidence'
DRAWN = {p.stem:json.loads(p.read_text()) for p in sorted((EVIDENCE/'drawn').glob('*.json'))}
MADE = sorted(p for p in FIGURES.iterdir() if p.suffix in ('.csv','.md','.tex','.pdf','.png'))


def as_committed():
    "Whether paper_figures/ is as it was committed; elsewhere than in a repository, it is."
    command = ['git', 'status', '--porcelain', '--', 'paper_figures']
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return said.returncode!=0 or not said.stdout.strip()


REASON = 'paper_figures/ was drawn again here, with latencies of this machine; it is tested as it was committed'
committed = pytest.mark.skipif(not as_committed(), reason=REASON)


@pytest.mark.parametrize('path', MADE, ids=lambda p: p.name)
def test_every_table_and_figure_names_its_records(path):
    assert path.stem in DRAWN, f'{path.name} does not say which records it was drawn from'


@pytest.mark.parametrize('name', DRAWN)
def test_records_are_here_and_unaltered(name):
    for folder, told in DRAWN[name]['records'].items():
        record = read_result(EVIDENCE/folder)
        assert record is not None, f'{name}: no record {folder}'
        assert record_hash(record)==told, f'{name}: {folder} is not the record that was drawn'


@committed
def test_no_record_is_there_in_vain():
    "Each record is drawn somewhere, or tells how good a shipped teacher is."
    names = {p.parent.name for p in EVIDENCE.glob('*/result.json')}
    teachers = {n for n in names if n.startswith('teacher-')}
    assert names-teachers=={r for d in DRAWN.values() for r in d['records']}
    for n in teachers:
        teacher = read_result(EVIDENCE/n)['config']['teacher']
        assert load_teacher(teacher['name']).hash==teacher['sha256']


@pytest.mark.parametrize('folder', sorted(p.parent.name for p in EVIDENCE.glob('*/result.json')))
def test_a_record_is_named_by_its_configuration(folder):
    record, config = read_result(EVIDENCE/folder), json.loads((EVIDENCE/folder/'config.json').read_text())
    assert config==record['config']
    assert folder==f"{record['kind']}-{record['key']}" and record['key']==run_key(config)


def tables(): return sorted(p.stem for p in MADE if p.suffix=='.csv')


@committed
@pytest.mark.parametrize('name', tables())
def test_tables_drawn_again_from_the_records_alone(name, draw, tmp_path):
    out, runs = tmp_path/'figures', tmp_path/'runs'
    shutil.copytree(EVIDENCE, out/'evidence', ignore=shutil.ignore_patterns('*.png', 'history.jsonl', 'drawn'))
    runs.mkdir()
    chapter = name if (ROOT/'nbs'/'paper'/f'{name}.ipynb').is_file() else name.rpartition('_')[0]
    draw(chapter, scale='best', runs=runs, out=out)   # frame_time draws frame_time_browser, too
    for file in (f'{name}.{suffix}' for suffix in ('csv','md','tex')):
        assert (out/file).read_text()==(FIGURES/file).read_text()


def without_headings(text):
    "A page without what the drawing notebooks say in words."
    page = pytest.importorskip('bs4', reason='beautifulsoup4 is not installed').BeautifulSoup(text, 'html.parser')
    for tag in page.select('article h3, article h3 + p, nav a, figure'): tag.decompose()
    return str(page)


@committed
@pytest.mark.parametrize('name', ['index.html', 'explore.html'])
def test_a_page_is_built_again_from_the_files_alone(name):
    from ditnano.lab.explore import build_explorer
    from ditnano.lab.report import build_report
    again = {'index.html':build_report, 'explore.html':build_explorer}[name](FIGURES)
    committed = (FIGURES/name).read_text(encoding='utf-8')
    older = f'paper_figures/{name} is older than what it shows; `ditnano paper` writes it again'
    assert without_headings(again)==without_headings(committed), older


def test_a_committed_run_comes_out_the_same_again(tmp_path):
    "The shortest of the smoke runs, computed again; skipped on another kind of device, where it may differ more."
    from ditnano.lab.execute import verify
    from ditnano.repro import fingerprint
    records = {p.parent:read_result(p.parent) for p in EVIDENCE.glob('distill-*/result.json')}
    runs = {f:r for f, r in records.items() if r['scale']=='smoke'}
    if not runs: pytest.skip('no smoke run is committed')
    configs = {f:r['config'] for f, r in runs.items()}
    plain = [f for f, c in configs.items() if c['recipe']=='get' and c['student'].get('depth')==5]
    chosen = min(plain or runs, key=lambda f: runs[f]['seconds'])
    here, there = fingerprint('cpu')['device_name'], runs[chosen]['device']['device_name']
    if here!=there: pytest.skip(f'recorded on {there}, this is {here}')
    found = verify(chosen, tmp_path, 'cpu')
    assert found and all(v['within'] for v in found.values()), found
