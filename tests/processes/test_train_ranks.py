"Faults of one rank: the others end in time, with a line that names rank and reason."
import textwrap

import pytest

PROGRAM = textwrap.dedent('''
    import os, pathlib, sys, time, torch
    from torch import nn
    from ditnano.config import TrainConfig
    from ditnano.ranks import on_rank0
    from ditnano.train import fit
    torch.set_num_threads(1)
    fault, folder, rank = sys.argv[1], sys.argv[2], int(os.environ['RANK'])
    ended = [pathlib.Path(f'{folder}-ended-{r}') for r in (0, 1)]
    class Line:
        n, identity = 64, {'task':'line'}
        def __init__(self):
            torch.manual_seed(5)
            self.model, self.x = nn.Linear(1, 1), torch.linspace(-1, 1, 64)[:,None]
        def batch(self, idx): return (self.x[idx],)
        def loss(self, model, batch, step):
            while fault=='stuck' and rank==1 and step.index==1 and not ended[0].exists(): time.sleep(.05)
            if fault=='step' and rank==1 and step.index==1: raise RuntimeError('broken on purpose')
            return (model(batch[0])-1).square().mean()
    cfg = TrainConfig(images=16*4, batch=16, lr=1e-2)
    def judge(): raise FileNotFoundError('no extractor')
    try:
        if fault=='judge': on_rank0(judge, 'cpu')
        if fault=='folder':                     # rank 1 does not see rank 0's checkpoint
            if rank==1: folder += '-other'
            fit(Line(), cfg, folder, 'cpu', stop_after=2)
            if rank==1: os.path.exists(folder+'/state.safetensors') and os.remove(folder+'/state.safetensors')
        fit(Line(), cfg, folder, 'cpu', log_every=1)
    except BaseException as e: print(f'<{rank}: {type(e).__name__}: {e}>', flush=True)
    finally:
        ended[rank].touch()
        while rank==0 and not ended[1].exists(): time.sleep(.05)   # the first rank keeps the store of both
        os._exit(0)                                                # no destructor may wait for the other rank
''')


def outputs(ranks, fault, tmp_path):
    "What the two processes of a run print."
    (tmp_path/'program.py').write_text(PROGRAM)
    wait = 15 if fault == 'stuck' else 100
    started = ranks(2, tmp_path/'program.py', fault, tmp_path/'run', OMP_NUM_THREADS=1, DITNANO_MAX_WAIT=wait)
    return ''.join(program.wait(240).stdout for program in started)


def test_an_error_of_the_first_rank_reaches_all(ranks, tmp_path):
    said = outputs(ranks, 'judge', tmp_path)
    assert '<0: FileNotFoundError: no extractor>' in said
    assert '<1: RuntimeError: rank 0: FileNotFoundError: no extractor>' in said


def test_ranks_that_loaded_different_checkpoints_are_refused(ranks, tmp_path):
    said = outputs(ranks, 'folder', tmp_path)
    for rank in (0, 1): assert f'<{rank}: ValueError: rank 1 loaded step 0 of' in said, said


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['step', 'stuck'])
def test_a_rank_that_fails_or_stands_still_does_not_hold_the_other(fault, ranks, tmp_path):
    said = outputs(ranks, fault, tmp_path)
    assert '<0: RuntimeError: rank 0 of 2, step 2: ' in said, said
    assert '<1: RuntimeError: rank 1 of 2, step 2: broken on purpose' in said or fault == 'stuck', said
