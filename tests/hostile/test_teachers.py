"""Teachers' folders and NVIDIA's files that are damaged, of other kinds, or harmful: each is one line."""
import json
import math
import pickle
import shutil
import sys
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ditnano.config import UNetConfig
from ditnano.dit import randomize_weights
from ditnano.edm import EDMPrecond, build_denoiser, load_teacher, save_teacher
from ditnano.unet import ADMConfig, NCSNConfig, SongUNet

TINY = UNetConfig(model_channels=8, channel_mult=(2,1), num_blocks=1, attn_resolutions=(16,))
_FORM = {'UNetConfig':dict(embedding_type='positional', resample_filter=[1,1]), 'ADMConfig':{},
         'NCSNConfig':dict(embedding_type='fourier', encoder_type='residual', resample_filter=[1,3,3,1],
                           channel_mult_noise=2)}


class Persistent:
    "An object as the released code pickles it: by a function that does not exist where it is read."
    def __init__(self, class_name, state, **kwargs):
        self.meta = dict(type='class', version=6, module_src='raise SystemExit', class_name=class_name,
                         state=state | dict(_init_args=(), _init_kwargs=kwargs))
    def __reduce__(self): return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (self.meta,)


def original(m, **kwargs):
    children = {k:None if isinstance(v, nn.Identity) else original(v) for k,v in m._modules.items()}
    state = {k:v for k,v in vars(m).items() if k != 'cfg'} | {'_modules':children}
    if not isinstance(m, nn.ModuleDict): return Persistent(type(m).__name__, state, **kwargs)
    out = nn.ModuleDict()
    out.__dict__.update(state)
    return out


def release(net, path, inner=None, kind=None, outside=None, **kwargs):
    "Write `net` as the released code would, perhaps with other names and constructor values."
    c, inner = net.cfg, inner or type(net.model).__name__
    values = dict(model_channels=c.model_channels, channel_mult=list(c.channel_mult), num_blocks=c.num_blocks,
                  label_dim=c.label_dim,
                  attn_resolutions=list(c.attn_resolutions), dropout=c.dropout, augment_dim=c.augment_dim,
                  in_channels=c.channels)
    unet = original(net.model, **values | _FORM[type(c).__name__] | kwargs)
    unet.meta['class_name'] = inner
    buffers = {k:v for k,v in net._buffers.items()}
    state = dict(training=False, _parameters={}, _buffers=buffers, _modules={'model':unet})
    given = dict(img_resolution=c.image_size, img_channels=c.channels, label_dim=c.label_dim,
                 model_type=inner) | (outside or {})
    ema = Persistent(kind or type(net).__name__, state, **given)
    def _reconstruct_persistent_obj(meta): raise AssertionError('called')
    home = types.ModuleType('torch_utils.persistence')
    _reconstruct_persistent_obj.__module__ = home.__name__
    _reconstruct_persistent_obj.__qualname__ = '_reconstruct_persistent_obj'
    home._reconstruct_persistent_obj = _reconstruct_persistent_obj
    with mock.patch.dict(sys.modules, {'torch_utils':types.ModuleType('torch_utils'), home.__name__:home}):
        path.write_bytes(pickle.dumps({'ema':ema, 'augment_pipe':None}, protocol=4))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('DITNANO_DATA', str(tmp_path/'data'))


def teacher(kind='EDMPrecond', cfg=TINY, seed=7, **kw):
    return randomize_weights(build_denoiser(kind, cfg, **kw), seed=seed).eval()


NCSN = NCSNConfig(model_channels=8, channel_mult=(1,2), num_blocks=1, attn_resolutions=(8,), image_size=16)
ADM = ADMConfig(model_channels=64, channel_mult=(1,1), num_blocks=1, attn_resolutions=(8,), image_size=16, label_dim=10)
RELEASES = {'vp':('EDMPrecond', TINY), 'baseline vp':('VPPrecond', TINY),
            'unconditional':('EDMPrecond', replace(TINY, label_dim=0, augment_dim=0)),
            've':('EDMPrecond', NCSN), 'baseline ve':('VEPrecond', NCSN), 'adm':('EDMPrecond', ADM),
            'iddpm':('iDDPMPrecond', replace(ADM, out_channels=6))}


@pytest.mark.parametrize('name', RELEASES)
def test_released_files_of_every_kind_load_bit_for_bit(name, tmp_path):
    given = teacher(*RELEASES[name])
    got, c = load_teacher(release(given, tmp_path/'x.pkl')), given.cfg
    x, labels = torch.randn(2, 3, c.image_size, c.image_size), torch.eye(10)[:2] if c.label_dim else None
    with torch.no_grad(): a, b = got(x, 1.5, labels), given(x, 1.5, labels)
    assert torch.equal(a, b) and a.std() > 0.1
    assert (type(got), got.cfg, got.name, got.card['source'], got.training) == (type(given), c, 'x', 'x.pkl', False)
    first = got.hash
    assert load_teacher(tmp_path/'x.pkl').hash == first   # from the cache
    if name in ('vp', 've', 'adm', 'iddpm'):
        torch.save(given.state_dict() if name == 'iddpm' else {'net.'+k:v for k,v in given.model.state_dict().items()},
                   tmp_path/'z.pt')
        bare = load_teacher(tmp_path/'z.pt')
        assert type(bare) is type(given) and replace(bare.cfg, dropout=c.dropout) == c


def altered(change):
    other = teacher()
    change(other)
    return lambda p: release(other, p)


def made(**kw): return lambda p: release(teacher(), p, **kw)


def dictionary(change):
    w = {'net.'+k:v for k,v in SongUNet(TINY).state_dict().items()}
    change(w)
    return lambda p: torch.save(w, p)


REFUSED = [
    (made(inner='OtherUNet'), "a network of class 'OtherUNet'; expected SongUNet or DhariwalUNet"),
    (made(inner='DhariwalUNet', outside={'model_type':'SongUNet'}),
     "a network of class 'DhariwalUNet'; expected 'SongUNet'"),
    (made(kind='OtherPrecond'), "class 'OtherPrecond'; expected EDMPrecond, VPPrecond"),
    (made(embedding_type='fourier'), "encoder_type='standard'; expected 'residual', as in NCSNConfig"),
    (made(encoder_type='residual'), "encoder_type='residual'; expected 'standard', as in UNetConfig"),
    (made(decoder_type='skip'), "decoder_type='skip'; expected 'standard'"),
    (made(resample_filter=[1,3,3,1]), 'resample_filter=[1, 3, 3, 1]; expected [1, 1]'),
    (made(adaptive_scale=True), "constructed with 'adaptive_scale'"),
    (made(label_dim=7), 'label_dim=10 outside and 7 inside'),
    (made(outside={'sigma_max':80.}), 'sigma_max=80.0; expected inf'),
    (made(kind='VPPrecond', outside={'M':10}), 'M=10; expected 1000'),
    (made(outside={'sigma_data':-1.}), 'sigma_data=-1.0; expected a number'),
    (made(model_channels=10**9), 'model_channels=1000000000; expected a whole number from 4 to 1024'),
    (made(num_blocks=10**6), 'num_blocks=1000000'), (made(channel_mult=[1]*100), 'expected a list of 8 at most'),
    (made(channel_mult='22'), "channel_mult='22'"), (made(num_blocks=True), 'num_blocks=True'),
    (made(outside={'img_resolution':None}), 'img_resolution=None'),
    (made(model_channels=24), 'is (8, 10); expected (24, 10)'),
    (made(num_blocks=2), 'is missing; expected ('),
    (altered(lambda n: n.model.register_buffer('more', torch.zeros(2))), 'model.more is (2,); expected no such entry'),
    (altered(lambda n: n.model.enc['16x16_down'].conv0.resample_filter.fill_(.3)), 'is another filter'),
    (altered(lambda n: n.model.map_layer1.bias.data.fill_(math.nan)), 'model.map_layer1.bias is not finite'),
    (dictionary(lambda w: w.pop('net.map_layer0.weight')), 'map_layer0.weight is missing'),
    (dictionary(lambda w: w.pop('net.map_layer1.bias')), 'model.map_layer1.bias is missing; expected (32,)'),
    (dictionary(lambda w: w.update(step=torch.ones(1))), 'model.step is (1,); expected no such entry'),
    (dictionary(lambda w: w.pop('net.enc.32x32_conv.weight')), 'enc.32x32_conv.weight is missing'),
    (dictionary(lambda w: w.update({'map_layer1.bias':torch.ones(32)})), 'differ in their prefix only'),
]


@pytest.mark.parametrize('k', range(len(REFUSED)))
def test_files_of_other_networks_are_refused_in_one_line(k, tmp_path):
    write, text = REFUSED[k]
    write(tmp_path/'bad.pkl')
    with pytest.raises(ValueError) as caught: load_teacher(tmp_path/'bad.pkl')
    said = str(caught.value)
    assert text in said and said.startswith('bad.pkl: ') and '\n' not in said and '; expected' in said
    assert not list((tmp_path/'cache').rglob('*.safetensors'))


def reweigh(folder, change):
    w = load_file(folder/'model.safetensors')
    change(w)
    save_file(w, folder/'model.safetensors')
    edit(folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def edit(folder, **kw):
    "Change the configuration as a person would who knows that its hashes must go."
    d = json.loads((folder/'config.json').read_text())
    for k in ('sha256','config_sha256'): d.pop(k, None)
    (folder/'config.json').write_text(json.dumps(d | kw))


DAMAGE = [
    (FileNotFoundError, 'no model.safetensors in', lambda f: (f/'model.safetensors').unlink()),
    (ValueError, 'damaged or altered',
     lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:-1000])),
    (ValueError, 'damaged or altered', lambda f: flip(f/'model.safetensors')),
    (ValueError, 'damaged or altered|not JSON', lambda f: flip(f/'config.json')),
    (ValueError, r'map_label.weight is \(8, 10\); expected \(24, 10\)',
     lambda f: edit(f, unet=replace(TINY, model_channels=24).to_dict())),
    (ValueError, r'map_layer1.bias is missing; expected \(32,\)',
     lambda f: reweigh(f, lambda w: w.pop('model.map_layer1.bias'))),
    (ValueError, r'more is \(2,\); expected no such entry',
     lambda f: reweigh(f, lambda w: w.update(more=torch.zeros(2)))),
    (ValueError, 'is not finite', lambda f: reweigh(f, lambda w: w['model.map_layer1.bias'].fill_(math.nan))),
    (ValueError, "unknown key 'depth'", lambda f: edit(f, unet={'depth':3})),
    (ValueError, "KeyError 'Nonesuch'", lambda f: edit(f, class_name='Nonesuch')),
    (ValueError, 'config.json: not JSON', lambda f: (f/'config.json').write_text('{')),
]


@pytest.mark.parametrize('k', range(len(DAMAGE)))
def test_damaged_folders_are_named(k, tmp_path):
    error, text, change = DAMAGE[k]
    save_teacher(teacher(), tmp_path/'t', {})
    change(tmp_path/'t')
    with pytest.raises(error, match=text) as caught: load_teacher(tmp_path/'t')
    assert '\n' not in str(caught.value)


def test_nothing_else_is_overwritten_and_nothing_infinite_is_saved(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="teacher 'nobody': no config.json and no model.safetensors"): load_teacher('nobody')
    (tmp_path/'precious').mkdir()
    (tmp_path/'precious'/'thesis.txt').write_text('draft')
    with pytest.raises(ValueError, match='precious: holds thesis.txt; expected a new folder'):
        save_teacher(teacher(), tmp_path/'precious', {})
    huge = teacher()
    huge.model.map_layer0.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match='not finite in float16; nothing saved'):
        save_teacher(huge, tmp_path/'huge', {})
    assert not (tmp_path/'huge').exists() and (tmp_path/'precious'/'thesis.txt').exists()


def test_the_cifar10_teacher_is_found_under_nvidias_name(tmp_path):
    (tmp_path/'data').mkdir()
    with pytest.raises(FileNotFoundError, match='no edm-cifar10-32x32-cond-vp.pkl in'): load_teacher('edm-cifar10-vp')
    given = release(teacher(), tmp_path/'data'/'edm-cifar10-32x32-cond-vp.pkl')
    assert load_teacher('edm-cifar10-vp').hash == load_teacher(given).hash
    save_teacher(teacher(), tmp_path/'data'/'edm-cifar10-vp', {}, half=False)
    assert load_teacher('edm-cifar10-vp').name == 'edm-cifar10-vp'


def test_a_pickle_that_names_a_function_is_refused(tmp_path):
    (tmp_path/'bad.pkl').write_bytes(pickle.dumps({'ema':shutil.rmtree}))
    with pytest.raises(ValueError, match='bad.pkl: names shutil.rmtree; expected nothing but tensors'):
        load_teacher(tmp_path/'bad.pkl')
    assert isinstance(teacher(), EDMPrecond)
