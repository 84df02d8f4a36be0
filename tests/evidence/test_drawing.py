"Drawings into a new folder, and from a scale of which only a part has been run."
import random
import shutil
from pathlib import Path

import pytest

from ditnano.config import load_scale
from ditnano.lab.experiments import EXPERIMENTS, experiment_configs
from ditnano.lab.runs import run_once

ROOT = Path(__file__).resolve().parents[2]
CONTENT = {'name': 'cifar10-jpeg@16', 'sha256': '0'*64}, {'name': 'cifar16', 'sha256': '1'*64}


@pytest.mark.slow
def test_a_table_is_drawn_into_a_new_folder(programs, tmp_path):
    command = '-c', 'from ditnano.cli import main; main()', 'paper'
    for words, env in ((['--only', 'table_1', '--out', 'new', '--runs', 'runs'], {}),
                       (['--only', 'table_4', '--runs', 'runs'], {'DITNANO_FIGURES': 'other'})):
        done = programs.run(*command, *words, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout+done.stderr
    for made in ('new/table_1.csv', 'other/table_4.csv'):
        assert (tmp_path/made).read_text() == (ROOT/'paper_figures'/Path(made).name).read_text()
        page = (tmp_path/made).with_name('index.html').read_text()
        assert f'id="{Path(made).stem}"' in page and 'href="explore.html"' in page
        assert (tmp_path/made).with_name('explore.html').is_file()


def made_up(root, share):
    "Records of scale night with invented metrics: a share of all its runs."
    scale, chance = load_scale('night'), random.Random(0)
    for experiment in EXPERIMENTS:
        for config in experiment_configs(experiment, scale, CONTENT, **scale.experiments.get(experiment, {})):
            if chance.random() > share: continue
            fd = 3+chance.random()
            metrics = {'FD-cifarnet': fd, 'FD-efficientnet-lite0': 200*fd, 'classifier score (cifarnet)': 3.}
            found = dict(metrics=metrics, samples=config['eval']['samples'],
                         device={'device': 'cpu', 'device_name': 'some processor', 'threads': 1})
            run_once(root, 'distill', config, lambda folder, found=found: found, experiment, scale.name,
                     config['train']['seed'])


@pytest.mark.slow
@pytest.mark.parametrize('share', [0.3, 1.0])
def test_tables_of_a_partly_finished_night(share, draw, tmp_path):
    made_up(tmp_path/'runs', share)
    for folder in (ROOT/'paper_figures'/'evidence').glob('latency-*'):   # without the night's own records
        shutil.copytree(folder, tmp_path/'latencies'/folder.name)
    for name in ('table_2', 'table_5', 'figure_4'):
        draw(name, {'DITNANO_EVIDENCE': str(tmp_path/'latencies')}, scale='best', runs=tmp_path/'runs',
             out=tmp_path/'out')
    table = (tmp_path/'out'/'table_2.md').read_text()
    assert 'scale night' in table and 'here, 32x32 (s)' in table and 'parameters counted at 32x32' in table
    assert ('not run yet' in table) == (share < 1)
