"What only a GPU can show: recorded steps against plain ones, no waiting for the device, samples that stay there."
import copy

import pytest
import torch

from ditnano.config import DiTConfig, TrainConfig, UNetConfig
from ditnano.distill.base import GETRecipe
from ditnano.dit import DiT, randomize_weights
from ditnano.images import load_images
from ditnano.lab.artefacts import DenoiseTask
from ditnano.lab.preflight import RandomPairs
from ditnano.losses import get_loss
from ditnano.sampling import build_sampler, sample_inputs
from ditnano.train import RECORD_AFTER, DeviceBatches, make_graphed_step, prepare_training, train_step
from ditnano.unet import group_norm, self_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
UNET = UNetConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(16,))


def student(): return GETRecipe(DiTConfig(2, 64, 8), RandomPairs(count=256), 'perceptual-digitslens@32')


def denoiser(): return DenoiseTask(UNET, load_images('digits32'), augment_p=0.4)


def trained(task, precision, steps, graphed):
    "Losses and weights; once a step is recorded, nothing may wait for the GPU."
    cfg = TrainConfig(images=10**6, batch=32, lr=1e-4, clip=1.0, precision=precision)
    accelerator, state = prepare_training(task, cfg, 'cuda')
    state.model.train()
    how = make_graphed_step(task, cfg, state, accelerator) if graphed else None
    losses = []
    for n in range(steps):
        torch.cuda.set_sync_debug_mode('error' if n > RECORD_AFTER+1 else 'default')
        try: losses.append(train_step(state, task, cfg, accelerator, graphed_step=how))
        finally: torch.cuda.set_sync_debug_mode('default')
    assert isinstance(state.batch, DeviceBatches) and state.recorded == graphed
    return torch.stack(losses).cpu(), {k: v.cpu() for k, v in state.ema.items()}


@pytest.mark.parametrize('make', [student, denoiser])
@pytest.mark.parametrize('precision, bound', [('fp32', 1e-5), ('bf16', 1e-2)])
def test_recorded_steps_are_the_plain_ones(make, precision, bound):
    (plain, weights), (recorded, others) = (trained(make(), precision, RECORD_AFTER+6, g) for g in (False, True))
    assert (plain-recorded).abs().max() <= bound*plain.abs().max()
    for k, v in weights.items(): assert (v-others[k]).norm() <= max(bound, 1e-4)*v.norm().clamp(min=1e-3), k


@pytest.mark.parametrize('name', ['perceptual-digitslens@32', 'L2'])
def test_a_compiled_loss_has_the_plain_gradient(name):
    a, b = torch.randn(2, 8, 3, 32, 32, device='cuda')
    grads = []
    for compiled in (False, True):
        loss, x = get_loss(name).cuda(), a.clone().requires_grad_()
        if compiled: loss.compile()
        loss(x, b).backward()
        grads.append(x.grad)
    assert (grads[0]-grads[1]).norm() <= 1e-5*grads[0].norm()


def test_compiled_sampling_is_recorded_and_the_same():
    model = randomize_weights(DiT(DiTConfig(2, 64, 8)), 1).cuda().eval()
    x, y, _ = sample_inputs(range(16), model.cfg, 'cuda')
    plain, quick = build_sampler(copy.deepcopy(model)), build_sampler(model, backend='compiled', batch=16)
    want = plain(x, y)
    for _ in range(2): torch.testing.assert_close(quick(x, y), want, rtol=1e-3, atol=1e-3)
    assert quick.recorded() and not plain.recorded()


def test_group_norm_in_bfloat16_is_the_float32_one():
    norm, x = group_norm(64).cuda(), torch.randn(4, 64, 16, 16, device='cuda')
    with torch.autocast('cuda', torch.bfloat16): out = norm(x.bfloat16())
    want = torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    assert out.dtype is torch.bfloat16 and (out.float()-want).norm() <= 1e-2*want.norm()


@pytest.mark.parametrize('heads', [1, 2])
def test_attention_over_pixels_is_that_of_a_cpu(heads):
    qkv = torch.randn(2, 3*64, 16, 16)
    want, out = self_attention(qkv, heads), self_attention(qkv.cuda().bfloat16(), heads)
    assert (out.float().cpu()-want).norm() <= 2e-2*want.norm()


def test_a_denoiser_trains_channels_first():
    task = denoiser()
    prepare_training(task, TrainConfig(images=64, batch=8, precision='bf16'), 'cuda')
    assert all(p.is_contiguous() for p in task.model.parameters())
