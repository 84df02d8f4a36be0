"The small campaign of faults, and that what it calls a failure is one."
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name('campaign')


@pytest.fixture(scope='module')
def driver():
    spec = importlib.util.spec_from_file_location('campaign_driver', CAMPAIGN/'driver.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module   # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the campaign forks its commands')
def test_small_campaign_has_no_failure():
    done = subprocess.run([sys.executable, CAMPAIGN], capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout+done.stderr[-2000:]
    tried, survived, refused, failed = map(int, done.stdout.partition('\nall ')[2].split()[:4])
    assert failed == 0 and tried == survived+refused and survived > 20 and refused > 20


LINE = 'ditnano: run/state.safetensors: damaged; expected a whole one\n'


@pytest.mark.parametrize('code, err', [
    (1, 'Traceback (most recent call last):\nValueError: no\n'), (2, 'Traceback (most recent call last)\n'+LINE),
    (1, 'killed\n'), (1, ''), (2, LINE.replace('state', 'other')), (-11, '')])
def test_an_end_without_a_name_is_a_failure(driver, code, err):
    with pytest.raises(driver.Failure): driver.refusal(driver.Ended(code, '', err), ('state.safetensors',))


def test_a_line_with_the_name_is_a_refusal(driver):
    assert driver.refusal(driver.Ended(2, '', LINE), ('state.safetensors',))
    assert not driver.refusal(driver.Ended(0, '', ''), ('state.safetensors',))


def test_another_result_and_a_leftover_are_failures(driver, tmp_path):
    command = driver.Command('train', result=('run/*', 'run/.*.tmp'))
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'history.jsonl').write_text('{"step": 1, "loss": 0.5, "lr": 0.1, "seconds": 3}\n')
    good = driver.result(tmp_path, command)
    (tmp_path/'run'/'history.jsonl').write_text('{"step": 1, "loss": 0.5, "lr": 0.1, "seconds": 4}\n')
    driver.compare(tmp_path, command, good)
    (tmp_path/'run'/'.state.tmp').touch()
    with pytest.raises(driver.Failure, match='state.tmp'): driver.compare(tmp_path, command, good)
    (tmp_path/'run'/'.state.tmp').unlink()
    (tmp_path/'run'/'history.jsonl').write_text('{"step": 1, "loss": 0.25, "lr": 0.1, "seconds": 4}\n')
    with pytest.raises(driver.Failure, match='history.jsonl'): driver.compare(tmp_path, command, good)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='the campaign forks its commands')
def test_the_whole_campaign_has_a_hundred_kills():
    done = subprocess.run([sys.executable, CAMPAIGN, '--whole', '--list'], capture_output=True, text=True, timeout=300)
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds.count('kill') >= 100 and {'flip', 'cut', 'zeros', 'no', 'race', 'rank:'} <= set(kinds), done.stderr
