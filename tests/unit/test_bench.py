"Benches: whether steps were recorded, and latencies that become records which the tables draw."
import math

import pandas as pd
import pytest
import torch

from ditnano import train
from ditnano.cli import main
from ditnano.lab.bench import bench_loading, bench_records, bench_train
from ditnano.lab.evidence import with_latency
from ditnano.lab.runs import collect
from ditnano.sampling import build_sampler


def replaying(fn, restore):
    "In place of a recording: calls the step again."
    for _ in range(3): fn()
    restore()
    loss = torch.zeros(())
    return lambda: loss.copy_(fn()), loss


@pytest.mark.parametrize('recorded', ['no', 'yes'])
def test_training_says_whether_it_was_recorded(monkeypatch, recorded):
    def graphed(task, cfg, state, accelerator): return train.GraphedStep(task, cfg, state, replaying)
    if recorded == 'yes': monkeypatch.setattr(train, 'make_graphed_step', graphed)
    rows = bench_train([(1, 32, 4)], batch=2, rounds=1, device='cpu', sizes=[16], steps=train.RECORD_AFTER+2)
    assert rows[0]['recorded'] == recorded and rows[0]['fit (images/s)'] > 0


@pytest.mark.slow
def test_latencies_become_records(tmp_path):
    "Table 5's form: a GET model without guidance, students with and without, two batches, two precisions."
    for guidance in (1., 1.5):
        for batch in (2, 3):
            rows = bench_records([(1, 32, 4)], tmp_path, batch, guidance=guidance, batches=2, device='cpu',
                                 models=[(1, 32, 4)])
            assert [(r['model'], r['precision'], r['guidance'], r['batch']) for r in rows] == [
                (m, p, g, batch) for m, g in (('DiT', guidance), ('GET', 1.)) for p in ('fp32', 'bf16')]
    found = collect(tmp_path)
    assert len(found) == 2*2*2+2*2 and set(found.kind) == {'latency'}
    student = pd.DataFrame({'depth': [1], 'width': [32], 'heads': [4], 'model': ['DiT']})
    for batch in (2, 3):
        drawn = with_latency(student, found, 1.5, 'bf16', batch=batch)
        assert drawn.latency_batch.tolist() == [batch] and drawn.seconds_50k.gt(0).all()
    assert math.isnan(with_latency(student, found, 1.5, 'bf16').seconds_50k[0])   # none of 128 images at once


def test_the_command_writes_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('DITNANO_RUNS', str(tmp_path/'runs'))
    main(['bench', 'record', '--students', '1,32,4', '--models', '1,32,4', '--batch', '2', '--guidance', '1',
          '--precisions', 'bf16', '--device', 'cpu', '--out', str(tmp_path/'rows.csv')])
    rows = pd.read_csv(tmp_path/'rows.csv')
    assert rows.model.tolist() == ['DiT', 'GET'] and rows.record[0] in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path/'runs').iterdir()) == sorted(rows.record)


def test_a_plain_sampler_is_not_recorded():
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT
    assert build_sampler(DiT(DiTConfig(1, 32)), 1.5).recorded() is False


@pytest.mark.slow
def test_loading_is_timed_with_and_without_verification():
    rows = bench_loading(rounds=1, batch=16, count=256, size=8)
    assert [r['rounds'] for r in rows] == [1, 10] and 'sample' in rows[0]['what'] and '256 pairs' in rows[1]['what']
    assert all(r['with (CPU s)'] > 0 and r['without (CPU s)'] > 0 for r in rows)
