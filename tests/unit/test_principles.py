"Budgets, counts and the law: what the chapter shows, and what it refuses."
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditnano.config import DiTConfig, GETConfig
from ditnano.principles import (
    count_params,
    depth,
    factors,
    fit_latency,
    jetson_latency,
    ledger,
    pareto,
    parse_count,
    propose,
)


@pytest.mark.parametrize('text, n', [
    ('425000', 425000), ('425k', 425000), ('425K', 425000), ('0.42M', 420000), ('1e6', 10**6), ('2.2m', 2_200_000),
    ('1G', 10**9), (425000, 425000), (4.25e5, 425000), ('421_068', 421068), ('0.421068M', 421068), (' 5M', 5*10**6)])
def test_counts_are_read_exactly(text, n): assert parse_count(text) == n


@pytest.mark.parametrize('text', ['', 'k', 'many', '0', '-5', '0,42M', '425,000', '1.5', 'nan', 'inf', '1e400', '12kk',
                                  None, '0.5'])
def test_other_counts_are_refused(text):
    with pytest.raises(ValueError, match='images .*expected a positive whole number such'): parse_count(text, 'images')


@given(st.text(max_size=12))
def test_any_text_is_a_count_or_refused(text):
    try: assert parse_count(text) > 0
    except ValueError as e: assert str(e).startswith('max_params ')


@pytest.mark.parametrize('call, text', [
    (lambda: count_params(0, 64), 'depth=0'),
    (lambda: count_params(5, 64, heads=5), 'heads=5 does not divide width=64'),
    (lambda: count_params(5, 64, trainable=True, folded=True), 'a folded network is not trained'),
    (lambda: count_params(GETConfig(), 256), 'a GETConfig is complete.*width'),
    (lambda: ledger(GETConfig(), folded=True), 'expected no further folded'),
    (lambda: ledger(DiTConfig(5, 64), classes=3), 'expected no further classes'),
    (lambda: fit_latency([(5, 64, 8, float('nan'))]*6), 'latency row 1: nan seconds'),
    (lambda: fit_latency([(5, 64, 8)]), 'latency row 1: 3 values'),
    (lambda: jetson_latency(5, 64, 5), 'heads=5 does not divide width=64'),
    (lambda: jetson_latency(DiTConfig(5, 64, image_size=64)), '1024 tokens'),
    (lambda: pareto([{'latency_s':1, 'FID':None}]), 'point 1: FID=None'), (lambda: depth(0), 'depth of width 0'),
    (lambda: factors(0), 'factors of 0'), (lambda: propose(425_000, 30), 'max_latency=30: no design meets it'),
    (lambda: propose(), 'no budget; expected max_params or max_latency'), (lambda: propose('425k'), 'positive number'),
    (lambda: propose(425_000, float('nan')), 'max_latency=nan'), (lambda: propose(0), 'expected a positive number'),
    (lambda: propose(max_latency=200, image_size=64), 'expected latency_from'),
    (lambda: propose(425_000, heads=4), 'the rule decides them'),
    (lambda: propose(425_000, widths=()), 'widths: none given'),
    (lambda: propose(425_000, widths=(50, 64)), 'width=50; expected a multiple of 4')])
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text) as e: call()
    assert '\n' not in str(e.value)


def test_a_law_of_noisy_rows_has_no_negative_term():
    rows = [(1,128,8,30.), (2,96,8,20.), (5,64,4,25.), (5,64,8,19.), (9,48,6,18.), (7,192,12,60.), (4,256,16,50.),
            (21,32,4,17.)]
    law = fit_latency(rows)
    assert min(law.coefficients) == 0 and max(law.coefficients) > 0
