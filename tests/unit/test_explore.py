"The explorer: its table answers as `propose` does, its pictures hold every point, and its server refuses in a line."
import json
import re
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditnano import cli
from ditnano.config import DESIGNS
from ditnano.lab import explore as ex
from ditnano.paper import table
from ditnano.principles import propose


@pytest.fixture(scope='module')
def page(): return ex.build_explorer()


@pytest.fixture(scope='module')
def answers(page): return json.loads(re.search(r'<script type="application/json" id="table">(.*)</script>', page)[1])


ROOT = Path(__file__).resolve().parents[2]


def proposed(**budget):
    return [(d.depth, d.width, d.heads, d.why) for d in propose(**budget)[:ex.NUM_SHOWN]]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(14_460, 20_000_000))
@example(14_460)
@example(421_067)
@example(421_068)
@example(20_000_000)
def test_any_number_of_parameters(answers, budget):
    assert ex.look_up(answers, 'max_params', budget) == proposed(max_params=budget)


@settings(max_examples=25, deadline=None)
@given(st.integers(738, 15_000))
def test_any_tenth_of_a_second(answers, tenths):
    assert ex.look_up(answers, 'max_latency', tenths/10) == proposed(max_latency=tenths/10)


@pytest.mark.parametrize('option', ex.BUDGETS)
def test_the_least_budget_is_the_first_that_has_an_answer(answers, option):
    b = answers['budgets'][option]
    least = b['steps'][0]['at']
    assert proposed(**{option: least/b['per_unit']})
    with pytest.raises(ValueError, match='no design meets it'): propose(**{option: (least-1)/b['per_unit']})
    assert b['start']*b['per_unit'] >= least and b['largest']*b['per_unit'] >= b['steps'][-1]['at']


def test_designs_are_those_of_the_rules(answers):
    for d in answers['designs']:
        assert d['deployed'] < d['params'] and d['timed'] == (413_148 <= d['params'] <= 5_000_000)
        assert d['params'] == ex.count_params(d['depth'], d['width'])


@pytest.mark.parametrize('along', ['x', 'y'])
def test_an_axis_keeps_order_and_ends(along):
    values = [97.5, 198.7, 657.9]
    made = ex.axis(values, along, 'seconds')
    places = [ex.place(made, v) for v in values]
    low, high = sorted((made['start'], made['end']))
    assert len(made['ticks']) > 2 and all(low < p < high for p in places)
    assert places == sorted(places, reverse=along == 'y')
    assert [t for t, _ in made['ticks']] == sorted((t for t, _ in made['ticks']), reverse=along == 'y')


def test_pictures_hold_every_point():
    paper = ex.paper_points()
    assert {tuple(map(int, p['design'].split(','))) for p in paper} == set(DESIGNS)
    assert len(paper) == sum(r['epochs'] == 100 for r in table(6))
    measured, names, stamp = ex.measured_points()
    size, quality, *ours = ex.charts([], paper, measured, names)
    assert len(size['points']) == len(quality['points']) == len(paper)
    assert [len(c['points']) for c in ours] == [len(measured)]*bool(measured)


@pytest.mark.slow
def test_without_a_table_there_are_the_papers_points_alone(tmp_path):
    assert ex.measured_points(tmp_path) == ({}, ('', ''), '')
    page = ex.build_explorer(tmp_path)
    assert 'id="paper"' in page and 'id="ours"' not in page and 'has not been drawn' in page


def test_the_page_asks_for_nothing_else(page):
    assert not re.search(r'<(?:link|script|img)[^>]+(?:src|href)="(?!data:)', page)
    assert str(ROOT) not in page


def test_one_page_is_served_and_nothing_else():
    with ex.make_server('<p>π</p>') as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        with urlopen(f'{address}/') as got: assert got.read().decode() == '<p>π</p>'
        with pytest.raises(HTTPError, match='404'): urlopen(f'{address}/settings.ini')
        server.shutdown()


def test_a_port_that_cannot_be_had_is_an_error_of_one_line(capsys, monkeypatch):
    monkeypatch.setattr(ex, 'build_explorer', lambda: '')
    with ex.make_server('') as server:
        for port, text in ((server.server_port, 'expected a free port, or 0 for any'), (70_000, 'expected 0 to 65535')):
            with pytest.raises(SystemExit) as stopped: cli.main(['explore', '--port', str(port), '--no-browser'])
            assert stopped.value.code == 2
            error = capsys.readouterr().err
            assert error.count('\n') == 1 and f'port {port}' in error and text in error


def test_the_page_is_written_to_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ex, 'build_explorer', lambda folder: 'a page')
    cli.main(['explore', '--out', str(tmp_path/'new'/'page.html')])
    assert (tmp_path/'new'/'page.html').read_text() == 'a page'
    assert capsys.readouterr().out.strip().endswith('page.html')
