"Records of runs: which count for a row, what a stopped run took, and when a drawing is out of date."
import json
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ditnano.config import load_scale
from ditnano.lab import notebooks
from ditnano.lab.claims import evaluate_claims
from ditnano.lab.evidence import aggregate_seeds
from ditnano.lab.experiments import experiment_configs
from ditnano.lab.packs import Packs, folder_members, read_pack
from ditnano.lab.plan import runs_of, summarize_plan
from ditnano.lab.runs import Run, collect, run_once

CONTENT = {'name':'cifar10-jpeg@16', 'sha256':'0'}, {'name':'cifar16', 'sha256':'1'}
NIGHT = load_scale('night')


def record(root, config, value, samples=NIGHT.samples):
    metrics = {f'FD-{j}':value for j in NIGHT.judges}
    return run_once(root, 'distill', config, lambda f: {'metrics':metrics, 'samples':samples}, scale='night',
                    seed=config['train']['seed'])


def test_a_row_with_a_learning_rate_of_its_own_counts_in_its_claim(tmp_path):
    value = {'L1':30., 'L2':30., 'LPIPS-squeeze@32':10.}
    for c in experiment_configs('losses', NIGHT, CONTENT, **NIGHT.experiments['losses']):
        v = 20. if c['recipe']=='dmd' else value[c['loss']['name']]
        record(tmp_path, c, v+c['train']['seed']/10)
    found = collect(tmp_path)
    assert runs_of(found, 'losses', NIGHT).groupby('label').size().to_dict()=={'DMD':2, 'L1':2, 'L2':2, 'LPIPS':2}
    verdict = next(v for v in evaluate_claims(found, 'night') if v.claim.id=='C2')
    assert 'Not run' not in verdict.why


@pytest.mark.parametrize('change', [{'ema':.99}, {'warmup':0}, {'anneal':False}, {'weight_decay':.3},
                                    {'precision':'fp32'}, {'teacher_steps':4}], ids=lambda c: next(iter(c)))
def test_runs_of_other_conditions_are_no_seeds(change, tmp_path):
    for seed, scale in enumerate((replace(NIGHT, **change), NIGHT)):
        for c in experiment_configs('mi1', replace(scale, seeds=(seed,)), CONTENT, **NIGHT.experiments['mi1']):
            record(tmp_path, c, 10.+seed)
    found = collect(tmp_path)
    assert set(runs_of(found, 'mi1', NIGHT).seed)=={1}
    with pytest.raises(ValueError, match=f'runs differ in .*{next(iter(change))}'):
        aggregate_seeds(found[found.recipe=='get'], ['depth'], ['FD-cifarnet'])


def test_a_value_that_one_seed_lacks_is_of_one_seed():
    frame = pd.DataFrame({'depth':[5,5,6], 'seed':[0,1,0], 'FD-a':[1.,3.,2.], 'FD-b':[1.,None,2.]})
    assert aggregate_seeds(frame, ['depth'], ['FD-a']).seeds.tolist()==[2, 1]
    assert aggregate_seeds(frame, ['depth'], ['FD-a','FD-b']).seeds.tolist()==[1, 1]


def test_a_resumed_run_has_the_seconds_of_all_attempts(tmp_path):
    def compute(folder):
        time.sleep(.2)
        if not (folder/'half').is_file():
            (folder/'half').touch()
            raise KeyboardInterrupt
        return {'metrics':{'x':1.}}
    with pytest.raises(KeyboardInterrupt): run_once(tmp_path, 'distill', {'a':1}, compute)
    done = run_once(tmp_path, 'distill', {'a':1}, compute)
    assert done['seconds']>=.4 and done['resumed']
    assert not (Run(tmp_path, 'distill', {'a':1}).folder/'attempts.json').exists()


def test_what_a_killed_process_left_is_no_run_and_is_not_packed(tmp_path):
    run_once(tmp_path/'runs', 'distill', {'a':1}, lambda f: {'metrics':{'FD-x':1.}})
    folder = Run(tmp_path/'runs', 'distill', {'a':1}).folder
    left = folder.parent/f'.{folder.name}.0123abcd-999999-0123abcd.tmp'
    left.mkdir()
    (left/'result.json').write_bytes((folder/'result.json').read_bytes())
    (folder/'.student.0123abcd-999999-0123abcd.tmp').mkdir()
    (folder/'.student.0123abcd-999999-0123abcd.tmp'/'config.json').write_text('{}')
    assert len(collect(tmp_path/'runs'))==1
    packs = Packs(tmp_path/'packs')
    packs.add(folder_members(folder, f'runs/{folder.name}'), {})
    assert not [name for name in read_pack(tmp_path/'packs'/'pack-0.tar')[0] if '/.' in name]


@pytest.mark.parametrize('name', ['claims.yaml', 'paper.yaml', 'night.yaml'])
def test_a_drawing_is_out_of_date_when_a_table_of_data_changes(name, root, monkeypatch):
    book = root/'nbs/paper/claims.ipynb'
    before = notebooks.inputs_hash(book, {}, 'night', [])
    real = notebooks.file_hash
    monkeypatch.setattr(notebooks, 'file_hash', lambda p: 'changed' if Path(p).name==name else real(p))
    assert notebooks.inputs_hash(book, {}, 'night', [])!=before


def test_hours_of_another_device_scale_no_plan():
    rows = [{'done':i<3, 'here':False, 'recorded':.001, 'hours':1.} for i in range(10)]
    text = summarize_plan(rows, NIGHT, {'teacher':.01}, cores=1)
    assert '7 of 10 runs to do: 7.0 hours' in text and 'scaled' not in text and 'on another device' in text
    here = [r | {'here':True, 'recorded':2.} for r in rows]
    assert 'scaled by 2.00 as 3 finished runs took' in summarize_plan(here, NIGHT, {'teacher':.01}, cores=1)


def test_conditions_stand_in_the_rows(tmp_path):
    c = experiment_configs('mi1', NIGHT, CONTENT, **NIGHT.experiments['mi1'])[0]
    record(tmp_path, json.loads(json.dumps(c)), 1.)
    row = collect(tmp_path).iloc[0]
    assert (row.warmup, row.anneal, row.train_precision, row.teacher_steps)==(6400, True, 'bf16', NIGHT.teacher_steps)
