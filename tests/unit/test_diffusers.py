"""Teachers from diffusers: our sampler's path on them equals diffusers' own at the same noise levels."""
import json
import shutil

import pytest
import torch

from ditnano.edm import heun_sampler, load_teacher, ode_derivative
from ditnano.pairs import PairDataset, make_pairs
from ditnano.repro import import_guarded

try: diffusers = import_guarded('diffusers')
except ImportError: pytest.skip('diffusers is not installed', allow_module_level=True)
SMALL = dict(sample_size=16, block_out_channels=(32,32), norm_num_groups=8, layers_per_block=1,
             down_block_types=('DownBlock2D','AttnDownBlock2D'), up_block_types=('AttnUpBlock2D','UpBlock2D'))


def saved(folder, scheduler, seed=0, **how):
    "A network with random weights, large enough that it does not answer almost nothing."
    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(**SMALL | how).eval()
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape)*(p[0].numel()**-.5 if p.dim() > 1
                                                                 else 0.3) + (p.dim() == 1)*0.1)
    net.save_pretrained(folder/'unet')
    scheduler.save_pretrained(folder/'scheduler')
    return net


def relative(a, b): return float((a.double()-b.double()).norm()/b.double().norm())


def reference(net, scheduler, z, labels, steps):
    "The path of diffusers' own sampler."
    scheduler.set_timesteps(steps)
    x = z*scheduler.init_noise_sigma
    for t in scheduler.timesteps: x = scheduler.step(net(scheduler.scale_model_input(x, t), t,
                                                         class_labels=labels).sample, t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize('classes', [None, 10])
@pytest.mark.parametrize('betas', ['linear','scaled_linear','squaredcos_cap_v2'])
@pytest.mark.parametrize('prediction', ['epsilon','v_prediction'])
def test_heun_equals_diffusers(prediction, betas, classes, tmp_path):
    how = dict(beta_schedule=betas, beta_start=1e-4, beta_end=0.02, prediction_type=prediction)
    net = saved(tmp_path, diffusers.DDPMScheduler(**how), num_class_embeds=classes)
    teacher = load_teacher(tmp_path/'unet')
    assert teacher.name == 'unet' and teacher.cfg.label_dim == (classes or 0)
    z, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 7]) if classes else None
    theirs = reference(net, diffusers.HeunDiscreteScheduler(**how, use_karras_sigmas=True), z, y, 6)
    ours = heun_sampler(teacher, z, torch.eye(10)[y] if classes else None, steps=6, sigma_min=0, sigma_max=1e9)
    assert ours.std() > 0.1 and relative(ours, theirs) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('kind, how', [('EulerDiscreteScheduler',
                                        dict(prediction_type='sample', use_karras_sigmas=True)),
                                       ('EulerDiscreteScheduler',
                                        dict(prediction_type='epsilon', timestep_spacing='linspace')),
                                       ('EDMEulerScheduler', dict(prediction_type='epsilon')),
                                       ('EDMEulerScheduler', dict(prediction_type='v_prediction'))])
def test_euler_equals_diffusers(kind, how, tmp_path):
    scheduler = getattr(diffusers, kind)(**how)
    net = saved(tmp_path, scheduler)
    teacher, z = load_teacher(tmp_path/'unet'), torch.randn(2, 3, 16, 16)
    theirs = reference(net, scheduler, z, None, 6)
    x = z.double()*scheduler.init_noise_sigma
    for a,b in zip(scheduler.sigmas.double(), scheduler.sigmas.double()[1:]):
        x = x + (b-a)*ode_derivative(teacher, x, a)
    assert x.std() > 0.1 and relative(x, theirs) < 1e-4


def test_pairs_of_a_diffusers_teacher(tmp_path):
    saved(tmp_path/'t', diffusers.DDIMScheduler(), num_class_embeds=4, in_channels=1, out_channels=1)
    (tmp_path/'t'/'model_index.json').write_text('{}')
    pairs = PairDataset(make_pairs(tmp_path/'t', 4, tmp_path/'p', steps=2, device='cpu'))
    assert pairs.batch(range(4))[1].shape == (4,1,16,16)
    assert pairs.recipe['classes'] == 4 and pairs.recipe['teacher']['name'] == 't'
    assert load_teacher(tmp_path/'t').hash == pairs.recipe['teacher']['sha256']


def rewrite(path, **change): path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize('change, text', [
    (lambda f: rewrite(f/'scheduler'/'scheduler_config.json', _class_name='LCMScheduler'),
     "scheduler 'LCMScheduler'; expected one of DDPMScheduler"),
    (lambda f: rewrite(f/'scheduler'/'scheduler_config.json', prediction_type='flow'),
     "prediction_type 'flow'; expected one of epsilon"),
    (lambda f: rewrite(f/'scheduler'/'scheduler_config.json', beta_schedule='exp'),
     "beta_schedule 'exp'; expected linear"),
    (lambda f: rewrite(f/'scheduler'/'scheduler_config.json', rescale_betas_zero_snr=True),
     'rescale_betas_zero_snr=True; expected'),
    (lambda f: rewrite(f/'unet'/'config.json', _class_name='UNet2DConditionModel'),
     'a UNet2DConditionModel; expected a UNet2DModel'),
    (lambda f: rewrite(f/'unet'/'config.json', sample_size=None), 'sample_size None; expected'),
    (lambda f: shutil.rmtree(f/'scheduler'), 'no scheduler_config.json; expected the scheduler beside the network'),
    (lambda f: (f/'unet'/'diffusion_pytorch_model.safetensors').write_bytes(b'x'*100), 't: '),
])
def test_folders_that_are_not_supported_are_named(change, text, tmp_path):
    saved(tmp_path/'t', diffusers.DDPMScheduler())
    (tmp_path/'t'/'model_index.json').write_text('{}')
    change(tmp_path/'t')
    with pytest.raises((ValueError, FileNotFoundError)) as caught: load_teacher(tmp_path/'t')
    assert text in str(caught.value) and '\n' not in str(caught.value)
