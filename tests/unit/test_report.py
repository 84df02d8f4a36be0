"The paper as a page: its links, its numbers and their records, and text that a page must not believe."
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ditnano.config import load_scale
from ditnano.lab.experiments import experiment_configs
from ditnano.lab.report import build_report, load_records, number_sources, read_chapter, read_table, write_report
from ditnano.lab.runs import run_once

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT/'paper_figures'
soup = pytest.importorskip('bs4', reason='beautifulsoup4 is not installed').BeautifulSoup


@pytest.fixture(scope='module')
def text(): return build_report(FIGURES)


@pytest.fixture(scope='module')
def page(text): return soup(text, 'html.parser')


def test_every_link_leads_somewhere(page):
    ids = [t['id'] for t in page.select('[id]')]
    targets = [t.get('href') or t.get('src') for t in page.select('a, img')]
    assert len(ids) == len(set(ids)) and len(targets) > 200
    assert [t for t in targets if t.startswith('#') and t[1:] not in ids] == []
    assert [t for t in targets if not t.startswith('#') and not (FIGURES/t).is_file()] == []


def test_everything_that_was_drawn_is_there(page):
    drawn = {p.stem for kind in ('csv', 'png') for p in FIGURES.glob(f'*.{kind}')}-{'claims'}
    shown = {a['id'] for a in page.select('article')}
    claims = pd.read_csv(FIGURES/'claims.csv')
    assert drawn | set(claims.claim) == shown
    for c in claims.itertuples(): assert c.verdict in page.select_one(f'#{c.claim} h3').text


def numbers_of_ours():
    for path in sorted(FIGURES.glob('table_?.csv')):
        table = pd.read_csv(path)
        for c in (c for c in table if c.endswith(', ours') or c.startswith('here')):
            for i, value in enumerate(pd.to_numeric(table[c], errors='coerce')):
                if value == value: yield path.stem, i, c, value


@pytest.mark.parametrize('name, row, column, value', list(numbers_of_ours()))
def test_a_number_of_ours_leads_to_records_that_give_it(page, name, row, column, value):
    table = page.select_one(f'#{name} table')
    place = [th.text for th in table.select('thead th')].index(column)
    cell = table.select('tbody tr')[row].select('td')[place]
    entry = page.select_one(cell.select_one('a')['href'])
    records = [json.loads((FIGURES/a['href']).read_text()) for a in entry.select('a[href$="result.json"]')]
    metric = column.removesuffix(', ours')
    found = [r['metrics'].get(metric, (r['latency'] or {}).get('seconds_50k')) for r in records]
    assert sum(found)/len(found) == pytest.approx(value, rel=1e-5)


def test_a_page_holds_no_path_and_no_date(text):
    assert str(ROOT) not in text and not re.search(r'\b20\d\d-\d\d-\d\d', text)


def small_folder(folder, cell='1.5', note='scale <b>x</b>'):
    (folder/'evidence').mkdir()
    pd.DataFrame({'name': [cell], 'FD, ours': [1.25], 'stamp': [note]}).to_csv(folder/'table_9.csv', index=False)
    shown = cell.replace('|', '\\|')
    rows = f'| name | FD, ours |\n|:--|--:|\n| {shown} | 1.25 |'
    (folder/'table_9.md').write_text(f'**A <i>title</i>**\n\n{rows}\n\n{note}\n')
    return folder


@pytest.mark.parametrize('cell', ['<script>alert(1)</script>', 'a | b', '"\'&amp;'])
def test_text_is_shown_as_it_is(cell, tmp_path):
    page = soup(build_report(small_folder(tmp_path, cell)), 'html.parser')
    assert not page.select('script') and not page.select('article b') and not page.select('article i')
    assert page.select('#table_9 td')[0].text == cell
    assert not page.select('#table_9 td a')   # no record gives this number


def test_a_number_that_several_runs_give_has_no_single_source():
    rows = pd.DataFrame({'group': ['a', 'a', 'b', 'c'],
                         'measured': [{'FD': 1.0}, {'FD': 2.0}, {'FD': 1.5}, {'FD': 2.5}]})
    assert number_sources(rows) == {1.5: {'a', 'b'}, 2.5: {'c'}}


def test_records_that_differ_in_the_seed_share_a_group(tmp_path):
    content = {'name': 'cifar10-jpeg@16', 'sha256': '0'*64}, {'name': 'cifar16', 'sha256': '1'*64}
    for config in experiment_configs('sizes', load_scale('night'), content, designs=[(1, 128, 8), (5, 64, 8)]):
        found = dict(metrics={'FD-cifarnet': 3.}, samples=10)
        run_once(tmp_path, 'distill', config, lambda folder, found=found: found, 'a student', 'night',
                 config['train']['seed'])
    records = load_records(tmp_path)
    assert len(records) == 4 and not records.duplicated(['group', 'seed']).any()
    assert sorted(records.groupby('group').seed.apply(list)) == [[0, 1], [0, 1]]
    assert (records.groupby('group')[['depth', 'width', 'loss', 'scale']].nunique() == 1).all(axis=None)


def test_chapters_of_pictures_that_several_scales_have():
    assert read_chapter('samples_smoke')[0].endswith('(smoke)')
    assert read_chapter('unknown') == ('unknown', '')


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='no tables or figures; expected'): write_report(tmp_path/'none')
    shutil.copy(FIGURES/'table_1.csv', tmp_path/'table_2.csv')
    shutil.copy(FIGURES/'table_2.md', tmp_path)
    with pytest.raises(ValueError, match='4 rows; expected 6'): read_table(tmp_path/'table_2.csv')
    assert not (tmp_path/'index.html').exists()
