"Losses: parity with the package, frozen networks, finite gradients, one target for several predictions, refusals."
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditnano.classifier import Classifier
from ditnano.images import load_images, to_unit
from ditnano.losses import (
    BACKBONES,
    L1,
    L2,
    LPIPS,
    FeatureLoss,
    Perceptual,
    backbone_hash,
    get_loss,
    normalize_features,
    torchvision_key,
)
from ditnano.repro import import_guarded, torch_home

HAVE_SQUEEZE = (torch_home()/'hub'/'checkpoints'/BACKBONES['squeeze']).is_file()
SQUEEZE = pytest.mark.skipif(not HAVE_SQUEEZE, reason='no SqueezeNet weights under TORCH_HOME')
NAMES = ['L1', 'L2', 'perceptual-digitslens@32', 'perceptual-cifarlens@32',
         *(pytest.param(n, marks=SQUEEZE) for n in ('LPIPS-squeeze@64', 'LPIPS-squeeze@native'))]
FEATURES = NAMES[2:]


@pytest.fixture(scope='module')
def pictures():
    "Changed images and images (8, 3, 32, 32)."
    x = to_unit(load_images('digits32').images[:8])
    return x + 0.3*torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), x


def gradient(loss, prediction, target):
    p = prediction.clone().requires_grad_()
    loss(p, target).backward()
    return p.grad


def test_pixels(pictures):
    a, x = pictures
    torch.testing.assert_close(L1()(a, x), F.l1_loss(a, x))
    torch.testing.assert_close(L2()(a, x), F.mse_loss(a, x))
    torch.testing.assert_close(L2().per_sample(a, x).mean(), L2()(a, x))


@pytest.mark.parametrize('name', NAMES)
def test_a_name_makes_its_loss(name): assert get_loss(name).name == name


@SQUEEZE
def test_lpips_is_the_packages(pictures):
    a, x = pictures
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        package = import_guarded('lpips').LPIPS(net='squeeze', verbose=False)
    big = [F.interpolate(v, size=(64, 64), mode='bilinear') for v in (a, x)]
    loss = get_loss('LPIPS-squeeze@64')
    with torch.no_grad(): torch.testing.assert_close(loss.per_sample(a, x), package(*big).flatten(), rtol=0, atol=1e-6)
    assert loss(a, x) > 0.05 and loss(x, x) == 0
    ours, theirs = gradient(loss, a, x), gradient(lambda p, t: package(F.interpolate(p, (64, 64), mode='bilinear'),
                                                                      big[1]).mean(), a, x)
    assert (ours-theirs).norm() <= 1e-2*theirs.norm()           # a rectifier at its kink may differ by rounding
    assert (ours-theirs).abs().median() <= 1e-5*theirs.abs().max()


@pytest.mark.parametrize('net, whole', [('vgg16', 'vgg16'), ('alexnet', 'alexnet'), ('squeezenet', 'squeezenet1_1')])
def test_weights_of_torchvision_have_a_place_in_the_package(net, whole):
    lpips, models = import_guarded('lpips'), import_guarded('torchvision').models
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ours = getattr(lpips.pn, net)(pretrained=False).state_dict()
        theirs = getattr(models, whole)(weights=None).state_dict()
    assert ours and all(theirs[torchvision_key(k)].shape == v.shape for k, v in ours.items())


def test_the_sum_over_depths(pictures):
    "Against the definition, one image at a time, with batch statistics moved off their start."
    a, x = pictures
    torch.manual_seed(0)
    net = Classifier(16)
    for _ in range(3): net.train()(x+0.5*torch.randn_like(x))
    loss = Perceptual('random', net=net.eval())
    def depth(p, q): return (normalize_features(p, 1e-2)-normalize_features(q, 1e-2)).square().sum(1).mean((1, 2))
    with torch.no_grad():
        depths = [depth(p, q) for p, q in zip(net.stages(a), net.stages(x), strict=True)]
        slow = (a-x).square().mean((1, 2, 3))+sum(depths)/len(depths)
    torch.testing.assert_close(loss.per_sample(a, x), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FEATURES)
def test_networks_stay_frozen(name, pictures):
    (a, x), loss = pictures, get_loss(name)
    parent, before = nn.ModuleList([loss, nn.Linear(2, 2)]), loss(a, x)
    parent.train()
    assert loss(a, x) == before and not loss.training
    assert not list(loss.parameters()) and not loss.state_dict()
    net = loss.net(x.device)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.autocast('cpu', torch.bfloat16): assert loss(a, x) == before


@SQUEEZE
def test_building_lpips_draws_no_random_numbers():
    state = torch.get_rng_state()
    get_loss('LPIPS-squeeze@64')
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('name', FEATURES)
def test_gradients_are_finite_on_flat_images(name, pictures):
    loss = get_loss(name)
    for level in (-1., 0., 1.):
        g = gradient(loss, torch.full_like(pictures[1], level), pictures[1])
        assert g.isfinite().all() and g.abs().max() > 0


def test_gradients_are_finite_where_features_vanish(pictures):
    "A network whose first layer is silent."
    silent = copy.deepcopy(get_loss('perceptual-digitslens@32'))
    first = next(m for m in silent.net(torch.device('cpu')).modules() if isinstance(m, nn.Conv2d))
    first.bias.data -= 1e4
    assert gradient(silent, *pictures).isfinite().all()
    bare = torch.zeros(1, 8, 2, 2, requires_grad=True)
    (bare/(bare.square().sum(1, keepdim=True).sqrt()+1e-10)).sum().backward()
    assert bare.grad.isnan().all()                              # what the guard is for
    flat = torch.zeros(1, 8, 2, 2, requires_grad=True)
    normalize_features(flat).sum().backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_one_target_for_several_predictions_changes_nothing(name, pictures):
    (a, x), loss = pictures, get_loss(name)
    one = loss.against(x)
    for prediction in (a, a.flip(0), 0.5*a):
        assert torch.equal(one(prediction, x), loss(prediction, x))
        assert torch.equal(gradient(one, prediction, x), gradient(loss, prediction, x))


def test_a_targets_features_are_computed_once(pictures, monkeypatch):
    (a, x), loss, calls = pictures, get_loss('perceptual-digitslens@32'), []
    features = FeatureLoss.target_features
    monkeypatch.setattr(FeatureLoss, 'target_features', lambda self, t: calls.append(1) or features(self, t))
    one = loss.against(x)
    for _ in range(3): one(a, x)
    assert len(calls) == 1
    with pytest.raises(ValueError, match='expected equal shapes'): one(a, x[:1])


@pytest.mark.parametrize('name', FEATURES)
def test_bf16_has_its_own_name_and_is_near(name, pictures):
    loss, half = get_loss(name), get_loss(name+'-bf16')
    assert half.name == name+'-bf16' and backbone_hash(half.name) == backbone_hash(name)
    per = half.per_sample(*pictures)
    assert per.dtype == torch.float32 and not torch.equal(per, loss.per_sample(*pictures))
    torch.testing.assert_close(per, loss.per_sample(*pictures), rtol=3e-2, atol=1e-2)
    assert gradient(half, *pictures).isfinite().all()


@pytest.mark.parametrize('name', FEATURES)
def test_grey_images_count_as_three_equal_channels(name, pictures):
    loss, (a, x) = get_loss(name), (v[:, :1] for v in pictures)
    assert torch.equal(loss(a, x), loss(a.repeat(1, 3, 1, 1), x.repeat(1, 3, 1, 1)))
    assert gradient(loss, a, x).shape == a.shape
    with pytest.raises(ValueError, match='2 channels; expected 3, or 1 for grey'):
        loss(a.repeat(1, 2, 1, 1), x.repeat(1, 2, 1, 1))


@pytest.mark.parametrize('name', NAMES)
def test_a_loss_rises_with_a_change(name, pictures):
    loss, x = get_loss(name), pictures[1]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    changes = {'noise': [x+s*noise for s in (0.1, 0.2, 0.4)],
               'blur': [F.avg_pool2d(x, k, 1, k//2, count_include_pad=False) for k in (3, 5, 9)],
               'shift': [F.pad(x, (k, 0, k, 0), mode='replicate')[:, :, :32, :32] for k in (1, 2, 4)]}
    for kind, changed in changes.items():
        d = [loss(c, x).item() for c in changed]
        assert 0 < d[0] < d[1] < d[2], (kind, d)


def test_the_range_of_a_target_is_checked(pictures):
    a, x = pictures
    with pytest.raises(ValueError, match='the target is uint8; expected float images'): L1()(a, x.to(torch.uint8))
    with pytest.raises(ValueError, match='the target reaches 255'): L1()(a, 255*x.abs())
    with pytest.raises(ValueError, match='expected equal shapes'): L2()(a, x[:1])
    loss = L1()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for target in (x, 4*a, x/2+0.5, x/2+0.5): loss(a, target)
    assert ['are these images in [0, 1]' in str(w.message) for w in seen] == [True]


@pytest.mark.parametrize('name, error, message', [
    ('lpips', ValueError, "loss 'lpips': expected L1, L2, LPIPS-<vgg.squeeze.alex>@<pixels>"),
    ('LPIPS-resnet@64', ValueError, 'expected one of vgg, squeeze, alex'),
    ('perceptual-digitslens@4', ValueError, 'resize=4'),
    ('perceptual-nolens@32', FileNotFoundError, "classifier 'nolens' is not available"),
])
def test_names_that_are_refused(name, error, message):
    with pytest.raises(error, match=message): get_loss(name)


def test_a_backbone_that_is_absent_or_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f'no vgg16-397923af.pth in {tmp_path}'): LPIPS('vgg', 224)
    checkpoints = tmp_path/'hub'/'checkpoints'
    checkpoints.mkdir(parents=True)
    (checkpoints/BACKBONES['squeeze']).write_bytes(b'half a file')
    with pytest.raises(ValueError, match="expected torchvision's squeezenet1_1"): LPIPS('squeeze')
