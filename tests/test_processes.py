"""Several processes train as one, whatever their clocks say."""
import os, subprocess, sys, textwrap

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = textwrap.dedent('''
    import os, sys, time
    import torch
    from ditnano.config import DiTConfig, GETConfig, TrainConfig
    from ditnano.distill import make_recipe
    from ditnano.dit import DiT, randomise
    from ditnano.pairs import PairDataset, ensure_pairs
    from ditnano.train import fit
    torch.set_num_threads(1)
    name, folder, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    pairs = PairDataset(ensure_pairs('digits32', 480), limit=8)
    beside = {'dmd':'digits32', 'ta':randomise(DiT(DiTConfig(2, 32)), seed=1)}.get(name)
    options = {'ta':{'weights':(1,1,1)}, 'mi1':{'layers':(1,2)}}.get(name, {})
    student = GETConfig(1, 32, 4, 1, 2.) if name=='get-model' else DiTConfig(2, 32)
    task = make_recipe(name, student, pairs, 'L2', 0, beside, **options)
    time.sleep(pause*int(os.environ.get('RANK', 0)))          # clocks that disagree
    fit(task, TrainConfig(images=8*6, batch=8, lr=1e-3), folder, 'cpu', save_every=pause, log_every=2)
''')


def train(tmp_path, name, processes, pause):
    (tmp_path/'program.py').write_text(PROGRAM)
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    folder = tmp_path/f'{name}-{processes}'
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'ACCELERATE_USE_CPU':'1'}
    done = subprocess.run([sys.executable, *launch, str(tmp_path/'program.py'), name, str(folder), str(pause)], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder/'state.safetensors')


@pytest.mark.parametrize('name', ['get', 'dmd', 'ta', 'mi1', 'get-model'])
def test_two_processes_train_as_one(name, tmp_path):
    one, two = train(tmp_path, name, 1, 0.), train(tmp_path, name, 2, 0.02)
    assert one.keys() == two.keys() and ('partner.weight' in one or name != 'ta')
    for k in one:
        if k.startswith(('model.', 'partner.')): torch.testing.assert_close(one[k], two[k], rtol=1e-3, atol=1e-5, msg=lambda m: f'{k}: {m}')
