"A folded student is the same function with fewer parameters; what cannot be folded is refused."
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditnano.config import DiTConfig, GETConfig
from ditnano.deploy.folding import OneStep, fold
from ditnano.dit import DiT, forward_with_cfg, randomize_weights
from ditnano.get import GET
from ditnano.layers import set_attention
from ditnano.principles import count_flops, count_params
from ditnano.repro import noise_and_labels

LABELS = torch.tensor([0,3,5,9,9,10])
DESIGNS = [DiTConfig(5,64), DiTConfig(1,128), DiTConfig(21,32), DiTConfig(2,48,(4,6),learn_sigma=True)]


def relative(got, want): return ((got-want).abs().max()/want.abs().max()).item()


def student(cfg, seed=1): return randomize_weights(DiT(cfg), seed).eval()


@pytest.fixture(scope='module')
def noise(): return noise_and_labels(range(6))[0]


@pytest.mark.parametrize('cfg', DESIGNS, ids=lambda c: f'{c.depth}x{c.width}')
def test_folded_is_the_same_function(cfg, noise):
    full = student(cfg).train()
    short = fold(full)
    assert full.training and not short.training
    with torch.no_grad():
        want = full.eval()(noise, torch.zeros(6), LABELS)
        got = short(noise, torch.zeros(6), LABELS)
    assert want.std()>.1 and relative(got, want)<1e-5


@pytest.mark.parametrize('cfg', [DiTConfig(5,64), DiTConfig(3,32,(2,4,8),learn_sigma=True),
                                 DiTConfig(2,48,mlp_ratio=2.,label_dropout=0.)])
def test_parameters_and_flops_are_those_of_the_closed_form(cfg, noise):
    short = set_attention(fold(DiT(cfg)), 'explicit')
    assert sum(p.numel() for p in short.parameters())==count_params(cfg, folded=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter: short(noise[:1], torch.zeros(1), LABELS[:1])
    assert counter.get_total_flops()==count_flops(cfg, folded=True)


@pytest.mark.parametrize('guidance', [1., 1.5, 3.])
def test_one_step_is_the_guided_student(guidance, noise):
    full = student(DiTConfig(5,64))
    with torch.no_grad():
        want = forward_with_cfg(full, noise, torch.zeros(6), LABELS, guidance)
        for m in (full, fold(full)): assert relative(OneStep(m, guidance)(noise, LABELS), want)<2e-5
    assert want.std()>.1


def test_one_step_drops_the_variance_and_can_be_traced(noise):
    both = student(DiTConfig(2,48,(4,6),learn_sigma=True), 3)
    with torch.no_grad():
        assert relative(OneStep(both, 1.)(noise, LABELS), both(noise, torch.zeros(6), LABELS)[:,:3])<1e-5
        step = OneStep(both, 2.)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)
            traced = torch.jit.trace(step, (noise[:2], LABELS[:2]))
        assert relative(traced(noise, LABELS), step(noise, LABELS))<1e-5


@pytest.mark.parametrize('make, message', [
    (lambda m: fold(fold(m)), 'fold: FoldedDiT; expected a DiT'),
    (lambda m: fold(DiT(DiTConfig(1,32,steps=2))), 'fold: a student of 2 steps'),
    (lambda m: OneStep(GET(GETConfig(depth=1, width=32, heads=4)), 1.), 'fold: GET; expected a DiT'),
    (lambda m: OneStep(DiT(DiTConfig(1,32,label_dropout=0.))), 'has no null label; expected 1'),
    (lambda m: OneStep(m, float('nan')), 'guidance nan'),
])
def test_refused(make, message):
    with pytest.raises(ValueError) as e: make(DiT(DiTConfig(1,32)))
    assert message in str(e.value)


def test_wrong_inputs_are_refused(noise):
    model = DiT(DiTConfig(1,32))
    for x, y, message in ((noise[...,0], LABELS, 'x has shape (6, 3, 32)'), (noise, LABELS[:2], 'y has shape (2,)'),
                          (noise, LABELS+1, 'label 11')):
        with pytest.raises(ValueError) as e: OneStep(model)(x, y)
        assert message in str(e.value)
    with pytest.raises(ValueError, match='expected the timestep of folding'): fold(model)(noise, torch.ones(6), LABELS)
