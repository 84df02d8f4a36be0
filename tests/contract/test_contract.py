"""What other people's code relies on, as a stranger would write it, from the documented names.

Nothing below looks inside the rooms. Where a table of values stands, it was worked out by hand or taken from the paper.
"""
import json
import math
import os
import pickle
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

# depth, width, heads, parameters, seconds for 50,000 images on the paper's Jetson (Table 6)
ROWS = [(1,128,8,416652,97.5), (2,96,8,415308,123.6), (5,64,4,421068,162.6), (5,64,8,421068,198.7),
        (9,48,6,413148,259.0),
        (21,32,4,417900,411.7), (3,192,12,2215884,233.2), (7,128,8,2197644,322.6), (13,96,8,2255916,493.7),
        (4,256,16,5071884,367.6), (16,128,8,4869132,657.9), (7,192,12,4881612,460.9), (7,192,12,4881612,458.6)]


def run(*command, **kw):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, **kw)


def ditnano(*args, **kw):
    env = {**os.environ, 'COLUMNS':'160', 'NO_COLOR':'1', 'TERM':'dumb'}
    return run('-c', 'from ditnano.cli import main; main()', *map(str, args), env=env, **kw)


@pytest.fixture
def small():
    "A student with random weights: a fresh one draws nothing but zeros, on which every check would pass."
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, randomize_weights
    return randomize_weights(DiT(DiTConfig(depth=2, width=32)), seed=3).eval()


@pytest.fixture
def teacher():
    from ditnano.config import UNetConfig
    from ditnano.dit import randomize_weights
    from ditnano.edm import EDMPrecond
    from ditnano.unet import SongUNet
    return randomize_weights(EDMPrecond(SongUNet(UNetConfig(model_channels=16, channel_mult=(1,1), num_blocks=1,
                                                            dropout=0.))), seed=1).eval()


# repro and config -------------------------------------------------------------------------------------------------

def test_one_stream_per_sample():
    from ditnano.repro import noise_and_labels, sample_generator
    noise, labels = noise_and_labels(range(40,48))
    g = torch.Generator().manual_seed(43)
    assert torch.equal(noise[3], torch.randn(3, 32, 32, generator=g))
    assert labels[3] == torch.randint(10, (), generator=g)
    assert sample_generator(5).initial_seed() == 5
    with pytest.raises(ValueError, match='0 or more'): sample_generator(-1)


def test_config_round_trip():
    from ditnano.config import DiTConfig
    cfg = DiTConfig(5, 64)
    assert DiTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert cfg.hash != DiTConfig(5, 64, heads=4).hash
    assert (cfg.image_size, cfg.patch, cfg.channels, cfg.classes, cfg.mlp_ratio, cfg.label_dropout,
            cfg.learn_sigma) == (32, 2, 3, 10, 4.0, 0.1, False)
    with pytest.raises(AttributeError): cfg.depth = 6
    with pytest.raises(ValueError, match='heads'): DiTConfig(5, 64, heads=5)
    with pytest.raises(ValueError, match='dpeth'): DiTConfig.from_dict({'dpeth':5, 'width':64})


# paper ------------------------------------------------------------------------------------------------------------

def test_paper_tables():
    from ditnano.paper import table
    assert [len(table(n)) for n in range(1,7)] == [4, 6, 4, 3, 3, 13]
    got = [(r['depth'], r['width'], r['heads'], r['latency_s']) for r in table(6)]
    assert got == [(d,w,h,s) for d,w,h,_,s in ROWS]


# principles -------------------------------------------------------------------------------------------------------

def test_rules():
    from ditnano.principles import depth, factors, heads
    assert factors(12) == [1, 2, 3, 4, 6, 12]
    widths = [32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert [heads(w) for w in widths] == [4, 6, 8, 8, 8, 12, 16, 16, 16]
    assert [depth(w) for w in widths] == [5, 5, 6, 6, 7, 7, 8, 8, 9]


@pytest.mark.parametrize('d, w, h, params, seconds', ROWS)
def test_counts_and_latency(d, w, h, params, seconds):
    from ditnano.principles import count_flops, count_params, jetson_latency
    assert count_params(d, w) == params
    n, hidden = 256, 4*w
    macs = d*(n*(4*w*w + 2*w*hidden) + 2*n*n*w + 6*w*w) + 24*n*w + 3*w*w + 256*w
    assert count_flops(d, w) == 2*macs
    assert jetson_latency(d, w, h) == pytest.approx(seconds, rel=0.05)


def test_deployed_parameters():
    from ditnano.principles import count_params
    assert 0 < count_params(5, 64, folded=True) < count_params(5, 64)


def test_propose():
    from ditnano.principles import propose
    best = propose(425_000)[0]
    assert (best.depth, best.width, best.heads, best.params) == (5, 64, 8, 421068)
    assert best.latency == pytest.approx(198.7, rel=0.05) and best.why
    below = propose(max_params=420_000)
    assert all(p.params <= 420_000 for p in below) and below[0].width == 48
    assert '(5, 64, 8) needs 421,068' in below[0].why
    assert all(p.latency <= 200 for p in propose(max_latency=200))
    assert (propose(2_200_000)[0].depth, propose(2_200_000)[0].width) == (7, 128)
    with pytest.raises(ValueError, match='no budget'): propose()
    with pytest.raises(ValueError, match='max_params'): propose(10)


LIGHT = """
import importlib, sys
for room in ('repro', 'config', 'paper', 'principles', 'lab.runs', 'lab.evidence', 'lab.figures', 'lab.notebooks'):
    importlib.import_module(f'ditnano.{room}')
    if 'torch' in sys.modules: sys.exit(f'{room} imports torch')
"""


def test_light_rooms_import_without_torch():
    done = run('-c', LIGHT)
    assert done.returncode == 0, done.stderr


# dit --------------------------------------------------------------------------------------------------------------

def state_dict_names(d, w):
    block = {'attn.qkv':(3*w,w), 'attn.proj':(w,w), 'mlp.fc1':(4*w,w), 'mlp.fc2':(w,4*w), 'adaLN_modulation.1':(6*w,w)}
    linear = {'t_embedder.mlp.0':(w,256), 't_embedder.mlp.2':(w,w)}
    linear |= {f'blocks.{i}.{k}':s for i in range(d) for k,s in block.items()}
    linear |= {'final_layer.linear':(12,w), 'final_layer.adaLN_modulation.1':(2*w,w)}
    out = {'pos_embed':(1,256,w), 'x_embedder.proj.weight':(w,3,2,2), 'x_embedder.proj.bias':(w,),
           'y_embedder.embedding_table.weight':(11,w)}
    for k,(o,i) in linear.items(): out |= {f'{k}.weight':(o,i), f'{k}.bias':(o,)}
    return out


def test_state_dict_is_the_reference_one():
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT
    model = DiT(DiTConfig(3, 48))
    assert {k:tuple(v.shape) for k,v in model.state_dict().items()} == state_dict_names(3, 48)
    assert not model.pos_embed.requires_grad
    assert DiT(DiTConfig(5, 64)).pos_embed.numel() == 256*64


def reference_forward(s, x, t, y, depth, heads):
    "The network from its description, with a state dict and nothing else."
    F = torch.nn.functional
    lin = lambda v, k: F.linear(v, s[k+'.weight'], s[k+'.bias'])
    norm = lambda v: F.layer_norm(v, v.shape[-1:], eps=1e-6)
    n, w = len(x), s['pos_embed'].shape[-1]
    h = F.conv2d(x, s['x_embedder.proj.weight'], s['x_embedder.proj.bias'],
                 stride=2).flatten(2).transpose(1,2) + s['pos_embed']
    f = torch.exp(-math.log(10000)*torch.arange(128)/128)
    code = torch.cat([(t[:,None]*f).cos(), (t[:,None]*f).sin()], 1)
    c = F.silu(lin(F.silu(lin(code, 't_embedder.mlp.0')), 't_embedder.mlp.2')
               + s['y_embedder.embedding_table.weight'][y])
    for i in range(depth):
        b = f'blocks.{i}.'
        s1,c1,g1,s2,c2,g2 = (m[:,None] for m in lin(c, b+'adaLN_modulation.1').chunk(6, 1))
        q,k,v = lin(norm(h)*(1+c1)+s1, b+'attn.qkv').reshape(n, 256, 3, heads, w//heads).permute(2,0,3,1,4)
        a = ((q@k.transpose(-1,-2))/math.sqrt(w//heads)).softmax(-1)@v
        h = h + g1*lin(a.transpose(1,2).reshape(n,256,w), b+'attn.proj')
        h = h + g2*lin(F.gelu(lin(norm(h)*(1+c2)+s2, b+'mlp.fc1'), approximate='tanh'), b+'mlp.fc2')
    shift, scale = (m[:,None] for m in lin(c, 'final_layer.adaLN_modulation.1').chunk(2, 1))
    out = lin(norm(h)*(1+scale)+shift, 'final_layer.linear')
    image = torch.empty(n, 3, 32, 32)
    for token in range(256):
        i, j = divmod(token, 16)
        image[:, :, 2*i:2*i+2, 2*j:2*j+2] = out[:,token].reshape(n, 2, 2, 3).permute(0,3,1,2)
    return image


@torch.no_grad()
def test_forward_and_guidance(small):
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, forward_with_cfg
    g = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(3, 3, 32, 32, generator=g), torch.tensor([0., 1.5, 40.]), torch.tensor([0, 9, 10])
    out = small(x, t, y)
    assert out.shape == x.shape and out.std() > 0.1
    s = small.state_dict()
    torch.testing.assert_close(out, reference_forward(s, x, t, y, 2, 4), rtol=1e-4, atol=1e-4)
    null = reference_forward(s, x, t, torch.full((3,), 10), 2, 4)
    torch.testing.assert_close(forward_with_cfg(small, x, t, y, 1.5), null + 1.5*(out-null), rtol=1e-3, atol=1e-3)
    assert DiT(DiTConfig(2, 32)).eval()(x, t, y).abs().max() == 0


@torch.no_grad()
def test_positions(small):
    p, w = small.pos_embed[0], 32
    assert torch.equal(p[0,w//2:], p[1,w//2:]) and not torch.equal(p[0,:w//2], p[1,:w//2])
    assert torch.equal(p[0,:w//2], p[16,:w//2]) and not torch.equal(p[0,w//2:], p[16,w//2:])
    torch.testing.assert_close(p[1,0], torch.tensor(1.).sin())


@torch.no_grad()
def test_null_class_follows_the_number_of_classes():
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, forward_with_cfg, randomize_weights
    two = randomize_weights(DiT(DiTConfig(1, 32, classes=2)), 0).eval()
    x, t, y = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([0, 1])
    torch.testing.assert_close(forward_with_cfg(two, x, t, y, 0.), two(x, t, torch.tensor([2, 2])))


@torch.no_grad()
def test_pretrained_round_trip(small, tmp_path):
    from ditnano.dit import DiT
    small.save_pretrained(tmp_path/'mine')
    assert sorted(p.name for p in (tmp_path/'mine').iterdir()) == ['config.json', 'model.safetensors']
    again = DiT.from_pretrained(tmp_path/'mine')
    x, t, y = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([1, 2])
    assert not again.training and again.cfg == small.cfg and torch.equal(again(x, t, y), small(x, t, y))
    with pytest.raises(FileNotFoundError, match='no-such-student'): DiT.from_pretrained('no-such-student')


# unet and edm -----------------------------------------------------------------------------------------------------

def test_the_papers_teacher():
    from ditnano.config import UNetConfig
    from ditnano.edm import EDMPrecond
    from ditnano.unet import SongUNet
    net = EDMPrecond(SongUNet(UNetConfig(model_channels=128, channel_mult=(2,2,2), num_blocks=4, attn_resolutions=(16,),
                                         dropout=0.13, augment_dim=9, label_dim=10)))
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 55_735_299 and len(state) == 427
    assert all(k.startswith('model.') for k in state)
    assert state['model.enc.16x16_block0.qkv.weight'].shape == (768, 256, 1, 1)
    assert state['model.dec.32x32_block4.conv0.weight'].shape == (256, 384, 3, 3)


@torch.no_grad()
def test_preconditioning(teacher):
    x, y = torch.randn(2, 3, 32, 32), torch.eye(10)[:2]
    assert teacher(x, torch.tensor([1., 2.]), y).std() > 0.1
    # no noise, nothing to remove
    torch.testing.assert_close(teacher(x, torch.tensor(1e-4), y), x, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(teacher(x, torch.tensor(1.), y)[:1], teacher(x[:1], torch.tensor(1.), y[:1]), rtol=1e-3,
                               atol=1e-3)


def test_heun_sampler_on_a_gaussian():
    "For data N(0, s^2) the best denoiser and the end of the flow are known in closed form."
    from ditnano.edm import heun_sampler
    s, told = 0.5, []
    class Gaussian:
        sigma_min, sigma_max = 0., float('inf')
        def __call__(self, x, sigma, labels=None): return x*s**2/(s**2+torch.as_tensor(sigma)**2)
    z = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = heun_sampler(Gaussian(), z, None, steps=18, sigma_min=0.002, sigma_max=80, rho=7, callback=told.append)
    assert x.dtype == torch.float64 and len(told) == 18 and all(isinstance(t, dict) for t in told)
    t = [(80**(1/7)+i/17*(0.002**(1/7)-80**(1/7)))**7 for i in range(18)] + [0.]
    factor, slope = t[0], lambda v, a: v*a/(s**2+a**2)     # the same steps on a number, since the flow is linear
    for a, b in zip(t, t[1:]):
        first = factor + (b-a)*slope(factor, a)
        factor = first if b == 0 else factor + (b-a)*(slope(factor, a)+slope(first, b))/2
    torch.testing.assert_close(x, z.double()*factor, rtol=1e-6, atol=1e-6)
    exact = z.double()*80*s/math.sqrt(s**2+80**2)
    off = [float((heun_sampler(Gaussian(), z, None, steps=n)-exact).abs().max()) for n in (18, 72)]
    assert off[1] < off[0]/10 and off[1] < 0.01*float(exact.abs().max())   # second order: a sixteenth, in the limit


def test_teacher_on_disk(teacher, tmp_path):
    from ditnano.edm import load_teacher, save_teacher
    save_teacher(teacher, tmp_path/'t', {'data':'nothing'}, half=False)
    again = load_teacher(tmp_path/'t')
    x, y = torch.randn(2, 3, 32, 32), torch.eye(10)[:2]
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with torch.no_grad(): assert torch.equal(again(x, torch.tensor(2.), y), teacher(x, torch.tensor(2.), y))


class Posix:
    "What an attacker's pickle would do."
    def __reduce__(self): return (os.system, ('touch canary',))


def released(path, net, kwargs):
    "A file in the released form: plain pickle, objects by a function of a module that no reader needs to have."
    def persistent(obj, state, given):
        parts = dict(_parameters={k:v for k,v in obj._parameters.items()}, _buffers=dict(obj._buffers), _modules=state,
                     training=False, _init_args=(), _init_kwargs=given)
        return Persistent(type='class', version=6, module_src='raise SystemExit("executed")',
                          class_name=type(obj).__name__, state=parts)
    def tree(m): return {k:persistent(c, tree(c), dict(kwargs) if k == 'model' else {}) for k,c in m._modules.items()}
    module = types.ModuleType('torch_utils.persistence')
    def _reconstruct_persistent_obj(meta): raise AssertionError('never called')
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = '_reconstruct_persistent_obj'
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    class Persistent:
        def __init__(self, **meta): self.meta = meta
        def __reduce__(self): return _reconstruct_persistent_obj, (self.meta,)
    stand_in = {'torch_utils':types.ModuleType('torch_utils'), module.__name__:module}
    with mock.patch.dict(sys.modules, stand_in):
        path.write_bytes(pickle.dumps({'ema':persistent(net, tree(net), dict(img_resolution=32))}, protocol=4))


def test_a_released_teacher_is_read_and_nothing_in_it_runs(tmp_path, monkeypatch):
    from ditnano.config import UNetConfig
    from ditnano.dit import randomize_weights
    from ditnano.edm import EDMPrecond
    from ditnano.interop.checkpoint import read_checkpoint
    from ditnano.unet import SongUNet
    monkeypatch.chdir(tmp_path)
    net = randomize_weights(EDMPrecond(SongUNet(UNetConfig(model_channels=16, channel_mult=(1,1), num_blocks=1))),
                            seed=2)
    released(tmp_path/'net.pkl', net, dict(model_channels=16))
    state, info = read_checkpoint(tmp_path/'net.pkl')
    assert list(state) == list(net.state_dict()) and all(torch.equal(v, net.state_dict()[k]) for k,v in state.items())
    assert info['class_name'] == 'EDMPrecond' and info['init_kwargs']['img_resolution'] == 32
    whole = (tmp_path/'net.pkl').read_bytes()
    for n in (0, 1, 10, len(whole)//2, len(whole)-1):
        (tmp_path/'cut.pkl').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cut.pkl'): read_checkpoint(tmp_path/'cut.pkl')
    for bad in ({'ema':Posix()}, {'ema':eval}, {'ema':{'weight':Posix()}}, [Posix()]):
        (tmp_path/'bad.pkl').write_bytes(pickle.dumps(bad))
        with pytest.raises(ValueError, match='bad.pkl') as said: read_checkpoint(tmp_path/'bad.pkl')
        assert '\n' not in str(said.value) and not (tmp_path/'canary').exists()


def test_the_papers_teacher_by_name():
    from ditnano.edm import load_teacher
    try: net = load_teacher('edm-cifar10-vp')
    except FileNotFoundError as e:
        assert '\n' not in str(e) and 'edm-cifar10-32x32-cond-vp.pkl' in str(e)
        pytest.skip(f'the released teacher is not available: {e}')
    assert sum(p.numel() for p in net.parameters()) == 55_735_299


# get --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_get_model(tmp_path):
    from ditnano.config import GETConfig
    from ditnano.dit import DiT, randomize_weights
    from ditnano.get import GET
    assert sum(p.numel() for p in GET(GETConfig()).parameters()) == 8_565_772
    assert sum(p.numel() for p in GET(GETConfig(depth=7, width=192, heads=12)).parameters()) == 5_284_044
    net = randomize_weights(GET(GETConfig(depth=1, width=32, heads=4, eq_depth=2, eq_mlp_ratio=2.0)), seed=4)
    names = list(net.state_dict())
    assert names[:4] == ['pos_embed', 'x_embedder.proj.weight', 'x_embedder.proj.bias',
                         'y_embedder.embedding_table.weight'] and 'qkv_inj.weight' in names
    z, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 9])
    torch.manual_seed(7)
    six, start = net.train()(z, y), None
    torch.manual_seed(7)
    assert len(six) == 6 and all(x.shape == z.shape for x in six)
    assert all(torch.equal(a, b) for a,b in zip(six, net(z, y)))
    torch.manual_seed(7)
    image = net.eval()(z, y)
    assert image.shape == z.shape and image.std() > 0.1
    # one of the six states, sample by sample
    assert all(any(torch.allclose(image[n], x[n], rtol=1e-4, atol=1e-4) for x in six) for n in range(3))
    net.save_pretrained(tmp_path/'get')
    start = torch.randn(3, 256, 32)
    torch.testing.assert_close(GET.from_pretrained(tmp_path/'get')(z, y, z0=start), net(z, y, z0=start))
    with pytest.raises(ValueError, match="'GET'"): DiT.from_pretrained(tmp_path/'get')


# images and pairs -------------------------------------------------------------------------------------------------

def test_digits():
    from ditnano.images import load_images
    train, held = load_images('digits32'), load_images('digits32', split='test')
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (3, 32, 32)
    assert train.labels.dtype == torch.int64
    assert len(train) + len(held) == 1797 and train.hash != held.hash and len(train.hash) == 64
    assert sorted(set(train.labels.tolist())) == list(range(10))
    with pytest.raises(ValueError, match='digits32'): load_images('imagenet')


@pytest.mark.slow
def test_cifar10_where_it_is():
    from ditnano.images import load_images
    try: data = load_images('cifar10')
    except FileNotFoundError as e: pytest.skip(f'CIFAR-10 is not available: {e}')
    assert data.images.shape == (50_000, 3, 32, 32) and torch.bincount(data.labels).tolist() == [5000]*10


def test_pairs(teacher, tmp_path):
    from ditnano.edm import heun_sampler
    from ditnano.pairs import PairDataset, make_pairs
    from ditnano.repro import noise_and_labels
    make_pairs(teacher, range(6), tmp_path/'pairs', steps=3, shard=4, batch=3, name='stranger', device='cpu')
    data = PairDataset(tmp_path/'pairs')
    z, x, y = data[4]
    assert len(data) == 6 and z.dtype == x.dtype == torch.float32 and z.shape == x.shape == (3, 32, 32)
    assert isinstance(y, int)
    noise, labels = noise_and_labels([4])
    assert torch.equal(z, noise[0]) and y == int(labels[0])
    alone = heun_sampler(teacher, noise, torch.eye(10)[labels], steps=3)[0]
    assert x.std() > 0.1
    torch.testing.assert_close(x, alone.float(), rtol=1e-4, atol=1e-4)
    zs, xs, ys = data.batch([5, 0, 4])
    assert torch.equal(xs[2], x) and torch.equal(zs[2], z) and ys.dtype == torch.int64 and ys[2] == y


def test_pairs_as_get_publishes_them(tmp_path):
    from ditnano.interop.get_pairs import import_get_pairs
    from ditnano.pairs import PairDataset
    g = torch.Generator().manual_seed(0)
    z, x = torch.randn(40, 3, 32, 32, generator=g), torch.rand(40, 3, 32, 32, generator=g)*2.2-1.1
    y = torch.randint(10, (40,), generator=g)
    for folder in ('latent', 'image'): (tmp_path/'get'/folder).mkdir(parents=True)
    for name,part in (('000000019', slice(0, 20)), ('000000039', slice(20, 40))):
        torch.save([z[part].clone(), torch.eye(10)[y[part]]], tmp_path/'get'/'latent'/f'{name}.pkl')
        torch.save(x[part].clone(), tmp_path/'get'/'image'/f'{name}.pkl')
    data = PairDataset(import_get_pairs(tmp_path/'get', tmp_path/'pairs', shard=16))
    noise, images, labels = data.batch(range(40))
    assert torch.equal(noise, z) and torch.equal(images, x) and torch.equal(labels, y)
    torch.save(x[:20].clone(), tmp_path/'get'/'image'/'000000099.pkl')
    with pytest.raises(ValueError, match='000000099'): import_get_pairs(tmp_path/'get', tmp_path/'other')


# losses -----------------------------------------------------------------------------------------------------------

def test_plain_losses():
    from ditnano.losses import L1, L2, get_loss
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, 32, 32, generator=g), torch.randn(4, 3, 32, 32, generator=g)
    torch.testing.assert_close(L1()(a, b), torch.nn.functional.l1_loss(a, b))
    torch.testing.assert_close(L2()(a, b), torch.nn.functional.mse_loss(a, b))
    torch.testing.assert_close(get_loss('L1')(a, b), L1()(a, b))
    with pytest.raises(ValueError, match='L3'): get_loss('L3')


@pytest.mark.parametrize('name', ['LPIPS-squeeze@64', 'LPIPS-vgg@224', 'perceptual-digitslens@32',
                                  'perceptual-cifarlens@32'])
def test_perceptual_losses(name):
    from ditnano.losses import get_loss
    try: loss = get_loss(name)
    except FileNotFoundError as e: pytest.skip(f'{name}: weights are not available: {e}')
    a = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))*2-1
    b = a.flip(-1).requires_grad_()
    assert float(loss(a, a)) == pytest.approx(0, abs=1e-6)
    far = loss(b, a)
    far.backward()
    assert far.ndim == 0 and far > 1e-3 and b.grad.isfinite().all() and b.grad.abs().max() > 0


# training and runs ------------------------------------------------------------------------------------------------

class Copying:
    "A task of our own: draw the input image again. Label dropout and noise are random on purpose."
    identity, n = {'task':'copying'}, 40

    def __init__(self):
        from ditnano.config import DiTConfig
        from ditnano.dit import DiT, randomize_weights
        self.model = randomize_weights(DiT(DiTConfig(1, 32)), seed=0)
        self.data = torch.randn(self.n, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def batch(self, indices): return self.data[torch.as_tensor(indices)], torch.as_tensor(indices)%10

    def loss(self, model, batch, step):
        x, y = batch
        noisy = x + 0.1*torch.randn(x.shape, generator=step.generator)
        return (model(noisy, torch.zeros(len(x)), y)-x).square().mean()


def test_two_and_two_steps_are_four(tmp_path):
    from ditnano.config import TrainConfig
    from ditnano.train import fit
    cfg = TrainConfig(images=4*8, batch=8, lr=1e-3, seed=5)
    whole = fit(Copying(), cfg, tmp_path/'whole', device='cpu')
    half = fit(Copying(), cfg, tmp_path/'parts', device='cpu', stop_after=2)
    assert (whole.step, half.step) == (4, 2)
    resumed = fit(Copying(), cfg, tmp_path/'parts', device='cpu')
    assert resumed.step == 4 and any(not torch.equal(a, b) for a,b in zip(half.ema.values(), resumed.ema.values()))
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, resumed.model.state_dict()[k]), k
    for k,v in whole.ema.items(): assert torch.equal(v, resumed.ema[k]), k
    with pytest.raises(ValueError):
        fit(Copying(), TrainConfig(images=4*8, batch=8, lr=2e-3, seed=5), tmp_path/'parts', device='cpu')


@pytest.mark.parametrize('recipe', ['get', 'dmd', 'ta', 'mi1'])
def test_every_recipe_teaches_a_plain_student(recipe, teacher, tmp_path):
    "Every weight learns, whoever stands beside stays as it was, and what is saved is a DiT."
    from ditnano.config import DiTConfig, TrainConfig
    from ditnano.distill.recipes import make_recipe
    from ditnano.dit import DiT, randomize_weights
    from ditnano.pairs import PairDataset, make_pairs
    from ditnano.train import fit
    cfg = DiTConfig(2, 32)
    pairs = PairDataset(make_pairs(teacher, range(8), tmp_path/'pairs', steps=3, name='stranger', device='cpu'))
    beside = {'dmd':teacher.requires_grad_(False), 'ta':randomize_weights(DiT(DiTConfig(3, 64)), seed=1)}.get(recipe)
    before = {k:v.clone() for k,v in beside.state_dict().items()} if beside else {}
    options = {'ta':{'weights':(1,1,1)}, 'mi1':{'layers':(1,2)}}.get(recipe, {})
    task = make_recipe(recipe, cfg, pairs, 'L2', 0, beside, **options)
    first = {k:v.clone() for k,v in task.model.state_dict().items()}
    state = fit(task, TrainConfig(images=6*8, batch=8, lr=1e-3), tmp_path/'run', device='cpu')
    same = [k for k,v in state.model.state_dict().items() if torch.equal(v, first[k])]
    assert same == ['pos_embed']
    assert all(torch.equal(v, before[k]) for k,v in beside.state_dict().items()) if beside else True
    state.ema_model().save_pretrained(tmp_path/'student')
    again = DiT.from_pretrained(tmp_path/'student')
    assert list(again.state_dict()) == list(DiT(cfg).state_dict()) and again.cfg == cfg


def test_run_folder(tmp_path):
    from ditnano.lab.runs import collect, run_once
    calls = []
    def compute(folder):
        assert json.loads((folder/'config.json').read_text())['rows'] == 3   # the config is there before the work
        calls.append(folder)
        return {'metrics':{'FD-digitsnet':1.5}, 'samples':8, 'latency':None, 'artefacts':[], 'device':{'device':'cpu'}}
    first = run_once(tmp_path, 'toy', {'rows':3, 'seed':0}, compute, name='a', scale='smoke', seed=0)
    again = run_once(tmp_path, 'toy', {'seed':0, 'rows':3}, compute, name='a', scale='smoke', seed=0)
    assert len(calls) == 1 and first == again and first['metrics'] == {'FD-digitsnet':1.5}
    assert calls[0].name == f"toy-{first['key']}"
    assert {'key','kind','name','scale','seed','config','code','versions','device','seconds','samples','metrics',
            'latency','artefacts'} <= set(first)
    assert len(collect(tmp_path)) == 1


# sampling ---------------------------------------------------------------------------------------------------------

def test_sample(small):
    from ditnano.dit import forward_with_cfg
    from ditnano.repro import noise_and_labels
    from ditnano.sampling import sample
    images = sample(small, range(6), guidance=1.5)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 32, 32) and images.float().std() > 10
    two = sample(small, [4, 5], guidance=1.5, batch=1)
    assert (images[4:].int()-two.int()).abs().max() <= 1
    noise, labels = noise_and_labels(range(6))
    with torch.no_grad(): raw = forward_with_cfg(small, noise, torch.zeros(6), labels, 1.5)
    assert (images.int()-(raw*127.5+128).clip(0, 255).to(torch.uint8).int()).abs().max() <= 1
    chosen = sample(small, range(6), labels=[3]*6)
    assert not torch.equal(chosen, images)


@torch.no_grad()
def test_students_of_several_steps():
    "Against a loop written down from the formulas; and one picture does not depend on its neighbours."
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, randomize_weights
    from ditnano.repro import noise_and_labels
    from ditnano.sampling import fold, generate, sample
    net = randomize_weights(DiT(DiTConfig(2, 32, steps=2)), seed=3).eval()
    z, y = noise_and_labels(range(4))
    alpha = lambda t: 1/(1+((0.02**(1/7)+t*(80**(1/7)-0.02**(1/7)))**7)**2)
    first = net(z, torch.zeros(4), y)
    noise = (z-alpha(1)**0.5*first)/(1-alpha(1))**0.5
    between = alpha(.5)**0.5*first+(1-alpha(.5))**0.5*noise
    torch.testing.assert_close(generate(net, range(4), guidance=1), net(between, torch.full((4,), 500.), y), rtol=1e-3,
                               atol=1e-3)
    assert (sample(net, range(4))[3:].int()-sample(net, [3]).int()).abs().max() <= 1
    with pytest.raises(ValueError, match='step'): fold(net)


@torch.no_grad()
def test_fold(small):
    from ditnano.sampling import fold, sample
    folded = fold(small)
    numbers = sum(p.numel() for p in folded.parameters()) + sum(b.numel() for b in folded.buffers())
    assert numbers < sum(p.numel() for p in small.parameters())
    a, b = sample(small, range(4)), sample(folded, range(4))
    assert a.float().std() > 10 and (a.int()-b.int()).abs().max() <= 1


# metrics ----------------------------------------------------------------------------------------------------------

def test_frechet_distance():
    "Against the formula with a matrix square root, on an extractor of our own."
    from scipy.linalg import sqrtm

    from ditnano.metrics import frechet
    def extractor(images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1).numpy()/255
        return {'features':pooled, 'logits':None}
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (300, 3, 32, 32), generator=g, dtype=torch.uint8)
    b = (a.float()*0.7).to(torch.uint8).roll(1, 0)
    fa, fb = extractor(a)['features'], extractor(b)['features']
    ca, cb = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    want = ((fa.mean(0)-fb.mean(0))**2).sum() + np.trace(ca+cb-2*np.real(sqrtm(ca@cb)))
    assert frechet(a, b, extractor) == pytest.approx(want, rel=1e-5)
    assert frechet(a, a, extractor) == pytest.approx(0, abs=1e-8)


# latency ----------------------------------------------------------------------------------------------------------

def test_time_sampling(small):
    from ditnano.latency import time_sampling
    timed = time_sampling(small, batch=4, batches=3, max_warmup=2)
    assert {'seconds_50k','p50_ms','p90_ms','p99_ms','batches','batch','guidance','card'} <= set(timed)
    assert 0 < timed['p50_ms'] <= timed['p90_ms'] <= timed['p99_ms'] and timed['batch'] == 4
    assert timed['seconds_50k'] > timed['p50_ms']/1000*50_000/4*0.3


# the command ------------------------------------------------------------------------------------------------------

def test_design_command():
    said = ditnano('design', '--max-params', 425000)
    assert said.returncode == 0, said.stderr
    assert '421,068' in said.stdout and 'torch' not in said.stderr


def test_wrong_commands_are_refused(capsys):
    from ditnano.cli import main
    for args in (['desing'], ['design', '--max-parms', '1'], ['design', '--max-params', '10'],
                 ['sample', '--weights', 'nobody', '--out', 'x.png']):
        with pytest.raises(SystemExit) as left: main(args)
        said = capsys.readouterr().err
        assert left.value.code not in (0, None) and said and 'Traceback' not in said, (args, said)


@pytest.mark.parametrize('command', ['design', 'pairs', 'train', 'sample', 'eval', 'bench', 'export', 'sweep', 'paper',
                                     'build', 'doctor'])
def test_every_command_has_help(command, capsys):
    from ditnano.cli import main
    with pytest.raises(SystemExit) as left: main([command, '--help'])
    assert not left.value.code and 'usage' in capsys.readouterr().out.lower()


def test_doctor_runs_without_anything(tmp_path):
    empty = {k:str(tmp_path) for k in ('HOME', 'XDG_CACHE_HOME', 'DITNANO_DATA', 'DITNANO_CACHE', 'TORCH_HOME')}
    env = {**os.environ, **empty, 'COLUMNS':'160'}
    said = run('-c', 'from ditnano.cli import main; main()', 'doctor', env=env)
    assert said.returncode in (0, 1) and 'Traceback' not in said.stderr and 'cifar10' in said.stdout.lower()
