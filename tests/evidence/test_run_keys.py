"The configurations of the committed scales hash to the keys of their records: no default has changed."
import hashlib
from pathlib import Path

import pytest

from ditnano.config import load_scale, scale_names
from ditnano.lab.experiments import EXPERIMENTS, experiment_configs
from ditnano.lab.notebooks import check_parameters
from ditnano.lab.runs import run_key

EXPERIMENT_NOTEBOOKS = Path(__file__).resolve().parents[2]/'nbs/experiments'
CONTENT = {'name': 'images', 'sha256': '0'*64}, {'name': 'teacher', 'sha256': '1'*64}
PINNED = {  # scale -> number of runs, digest of their keys
    'smoke': (49, 'cecad62f1d7c099f'),
    'cpu': (80, 'b37f555cf661e9f7'),
    'night': (118, '9f374961696fdc40'),
    'lease': (118, 'be484f921940548f'),
    'gpu': (177, 'e5ce0c78cde2546c'),
    'paper': (177, '66fa6a0d92ca6b9d'),
}


def keys(name, experiment):
    "Keys of an experiment's runs, whatever data, teacher and loss network are available here."
    scale = load_scale(name)
    configs = experiment_configs(experiment, scale, CONTENT, **scale.experiments.get(experiment, {}))
    return [run_key(c | {'loss': {'name': c['loss']['name'], 'sha256': None}}) for c in configs]


def digest(name):
    lines = [f'{e} {k}' for e in EXPERIMENTS for k in keys(name, e)]
    return len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize('name', PINNED)
def test_keys_are_pinned(name):
    assert digest(name) == PINNED[name]


@pytest.mark.parametrize('name', ['smoke', *scale_names()])
def test_a_scale_sets_parameters_that_the_notebooks_have(name):
    for experiment, given in load_scale(name).experiments.items():
        assert check_parameters(EXPERIMENT_NOTEBOOKS/f'{experiment}.ipynb', given)==given
