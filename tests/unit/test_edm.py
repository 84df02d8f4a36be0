"""EDM's networks and sampler against a second implementation, for every kind of released teacher."""
import math
import sys
from pathlib import Path

import pytest
import torch

from ditnano.config import UNetConfig
from ditnano.edm import EDMPrecond, build_denoiser, heun_sampler, load_teacher, rho_schedule, save_teacher
from ditnano.unet import ADMConfig, NCSNConfig, SongUNet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plain_unet  # noqa: E402

SMALL = dict(model_channels=8, channel_mult=(1,2), num_blocks=1, attn_resolutions=(8,), image_size=16)
ADM = dict(model_channels=64, channel_mult=(1,2), num_blocks=1, attn_resolutions=(16,8), image_size=16, label_dim=10)
KINDS = {
    'ddpm++':('EDMPrecond', UNetConfig(**SMALL)), 'ddpm++ vp':('VPPrecond', UNetConfig(**SMALL)),
    'unconditional':('EDMPrecond', UNetConfig(**SMALL | dict(label_dim=0, augment_dim=0))),
    'grey':('EDMPrecond', UNetConfig(**SMALL, channels=1)),
    'ncsn++':('EDMPrecond', NCSNConfig(**SMALL)),
    'ncsn++ ve':('VEPrecond', NCSNConfig(**SMALL | dict(channel_mult=(1,2,1)))),
    'ncsn++ unconditional':('VEPrecond', NCSNConfig(**SMALL | dict(label_dim=0, augment_dim=0))),
    'adm':('EDMPrecond', ADMConfig(**ADM)),
    'adm augmented':('EDMPrecond', ADMConfig(**ADM | dict(augment_dim=9, label_dim=0))),
    'iddpm':('iDDPMPrecond', ADMConfig(**ADM, out_channels=6)),
}


@torch.no_grad()
def random_teacher(name, seed=0):
    "Every parameter is drawn, since a fresh network answers almost nothing."
    kind, cfg = KINDS[name]
    torch.manual_seed(seed)
    net = build_denoiser(kind, cfg).eval()
    for k,p in net.named_parameters():
        p.copy_(torch.randn(p.shape)*(p[0].numel()**-.5 if p.dim() > 1 else 0.3)
                + ('norm' in k and k.endswith('weight')))
    return net


def relative(a, b): return float((a-b).norm()/b.norm())


@torch.no_grad()
@pytest.mark.parametrize('name', KINDS)
def test_outputs_and_trajectory_equal_the_second_implementation(name):
    net, plain = random_teacher(name), plain_unet.PLAIN[KINDS[name][0]]
    c = net.cfg
    x, sigma = torch.randn(2, c.channels, 16, 16)*2, torch.tensor([0.4, 3.])
    labels = torch.eye(c.label_dim)[[1,3]] if c.label_dim else None
    aug = torch.randn(2, 9) if c.augment_dim else None
    assert net(x, sigma, labels, aug).std() > 0.1
    assert relative(net(x, sigma, labels, aug), plain(net.state_dict(), x, sigma, labels, aug)) < 1e-5
    z, seen = torch.randn(2, c.channels, 16, 16), []
    heun_sampler(net, z, labels, steps=6, callback=lambda d: seen.append((d['sigma'], d['x'])))
    assert len(seen) == 6 and net.sigma_min <= seen[-1][0] and seen[0][0] <= net.sigma_max
    other = plain_unet.path(lambda v,s: plain(net.state_dict(), v, s, labels, None), z, [s for s,_ in seen])
    assert max(relative(a, b) for (_,a),b in zip(seen, other)) < 1e-5
    if KINDS[name][0] == 'iDDPMPrecond': assert math.isclose(seen[0][0], 80.2037, rel_tol=1e-5)


@pytest.mark.parametrize('name', ['ncsn++ ve', 'adm', 'iddpm', 'grey'])
def test_saved_in_half_precision_with_whole_frequencies(name, tmp_path):
    net = random_teacher(name)
    save_teacher(net, tmp_path/'t', {})
    again = load_teacher(tmp_path/'t')
    assert type(again) is type(net) and again.cfg == net.cfg and type(again.cfg) is type(net.cfg)
    for k,v in again.state_dict().items():
        assert torch.allclose(v, net.state_dict()[k], rtol=2e-3, atol=1e-3)
        if k in ('u', 'model.map_noise.freqs'): assert torch.equal(v, net.state_dict()[k])


@pytest.mark.slow
@torch.no_grad()
def test_the_cifar10_teacher_in_full_size():
    torch.manual_seed(0)
    net = EDMPrecond(SongUNet(UNetConfig())).eval()
    for k,p in net.named_parameters():
        p.copy_(torch.randn(p.shape)*(p[0].numel()**-.5 if p.dim() > 1 else 0.3)
                + ('norm' in k and k.endswith('weight')))
    x, s, y, aug = torch.randn(1,3,32,32)*2, torch.tensor([1.3]), torch.eye(10)[3:4], torch.randn(1, 9)
    assert relative(net(x, s, y, aug), plain_unet.edm(net.state_dict(), x, s, y, aug)) < 1e-5


def test_schedule_and_sampler_refuse_impossible_ranges():
    assert rho_schedule(torch.tensor([0., 1.], dtype=torch.float64), 80, 0.002).tolist() == pytest.approx([80, 0.002])
    net = random_teacher('grey')
    with pytest.raises(ValueError, match='steps=0; expected 1 or more'):
        heun_sampler(net, torch.randn(1,1,16,16), steps=0)
    with pytest.raises(ValueError, match='expected 0 < sigma_min < sigma_max'):
        heun_sampler(net, torch.randn(1,1,16,16), sigma_min=90.)
    with pytest.raises(ValueError, match='3 noise levels for 4 images'): net(torch.randn(4,1,16,16), torch.ones(3))
    with pytest.raises(ValueError, match=r'expected \(N, 1, 16, 16\)'): net(torch.randn(4,3,16,16), 1.)
    with pytest.raises(ValueError, match='augment labels for a network that has none'):
        random_teacher('unconditional')(torch.randn(1,3,16,16), 1., augment_labels=torch.zeros(1,9))
