"The student and the baseline: sizes, types, inputs, files."
import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ditnano import GET, DiT, DiTConfig, GETConfig
from ditnano.dit import forward_with_cfg, randomize_weights
from ditnano.get import load_model
from ditnano.layers import set_attention
from ditnano.principles import count_flops, count_params
from ditnano.repro import read_json, write_json

SIZES = [(16, 2, 1, 1), (16, 4, 3, 2), (24, 2, 3, 10), (28, 2, 1, 10), (32, 4, 1, 1000), (64, 4, 3, 100)]


@pytest.mark.parametrize('size, patch, channels, classes', SIZES)
def test_other_images_and_class_counts(size, patch, channels, classes):
    cfg = DiTConfig(2, 32, image_size=size, patch=patch, channels=channels, classes=classes)
    model = set_attention(randomize_weights(DiT(cfg)).eval(), 'explicit')
    x, t, y = torch.randn(2, channels, size, size), torch.zeros(2), torch.tensor([0, classes])
    with torch.no_grad(), FlopCounterMode(display=False) as counter: out = model(x, t, y)
    assert out.shape == x.shape and out.std() > 0.1 and (out[0]-model(x[1:], t[1:], y[:1])[0]).abs().max() > 0
    assert sum(p.numel() for p in model.parameters()) == count_params(cfg)
    assert counter.get_total_flops() == 2*count_flops(cfg)   # two images
    assert forward_with_cfg(model, x, t, y.clamp(max=classes-1), 1.5).shape == x.shape
    with pytest.raises(ValueError, match=f'label {classes+1}: expected 0..{classes}'): model(x, t, y+1)


@pytest.mark.parametrize('size, patch, channels, classes', [(16, 2, 1, 0), (16, 4, 3, 100), (64, 4, 1, 2)])
def test_the_baseline_too(size, patch, channels, classes):
    cfg = GETConfig(1, 32, 4, 1, 2., image_size=size, patch=patch, channels=channels, classes=classes)
    model = set_attention(randomize_weights(GET(cfg)).eval(), 'explicit')
    z, y = torch.randn(1, channels, size, size), torch.tensor([classes-1]) if classes else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter: out = model(z, y)
    assert out.shape == z.shape and sum(p.numel() for p in model.parameters()) == count_params(cfg)
    assert counter.get_total_flops() == count_flops(cfg)


@pytest.mark.parametrize('model, cfg', [(DiT, DiTConfig(1, 32)), (GET, GETConfig(1, 32, 4, 1))])
def test_models_stay_float32_whatever_the_default_type(model, cfg, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        net = randomize_weights(model(cfg)).eval()
        x, y = torch.randn(2, 3, 32, 32, dtype=torch.float32), torch.tensor([1, 2])
        with torch.no_grad(): out = net(x, torch.zeros(2, dtype=torch.float32), y) if model is DiT else net(x, y)
        net.save_pretrained(tmp_path/'w')
        again = load_model(tmp_path/'w')
    finally: torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in (*net.parameters(), *again.parameters())} == {torch.float32} and out.dtype == torch.float32


@pytest.mark.parametrize('channels, width, patch', [(3, 32, 2), (1, 48, 4)])
def test_the_first_state_is_drawn_in_the_reference_order(channels, width, patch):
    "As `randn_like` of tokens that come out of a convolution: the contract's expression, bit for bit."
    model = randomize_weights(GET(GETConfig(1, width, 4, 1, patch=patch, channels=channels))).eval()
    z, y, tokens = torch.randn(3, channels, 32, 32), torch.tensor([0, 4, 9]), (32//patch)**2
    proj = model.x_embedder.proj
    convolved = F.conv2d(z, proj.weight, proj.bias, stride=patch).flatten(2).transpose(1, 2)+model.pos_embed
    torch.manual_seed(7)
    contract = torch.randn_like(torch.empty(3, width, tokens).transpose(1, 2))
    torch.manual_seed(7)
    assert torch.equal(torch.randn_like(convolved), contract)
    with torch.no_grad():
        torch.manual_seed(7)
        drawn = model(z, y)
        assert torch.equal(drawn, model(z, y, contract)) and drawn.std() > 0.1


def inputs(n=4): return torch.randn(n, 3, 32, 32), torch.zeros(n), torch.arange(n)


@pytest.mark.parametrize('change, text', [
    (lambda x, t, y: (x[..., :28, :28], t, y), r'x has shape \(4, 3, 28, 28\); expected \(N, 3, 32, 32\)'),
    (lambda x, t, y: (x[0], t, y), 'x has shape'), (lambda x, t, y: (x, t[0], y), r't has shape \(\); expected \(4,\)'),
    (lambda x, t, y: (x, t, y[:3]), r'y has shape \(3,\); expected \(4,\)'),
    (lambda x, t, y: (x, t, y, torch.ones(1)), r'label_drop_mask has shape \(1,\)'),
    (lambda x, t, y: (x, t, y+8), r'label 11: expected 0\.\.10'), (lambda x, t, y: (x, t, y-1), 'label -1'),
    (lambda x, t, y: (x, t, t), 'y is torch.float32; expected int64'),
    (lambda x, t, y: (x, t, y, None, (3,)), 'feature layer 3: expected a layer from 1 to 2'),
    (lambda x, t, y: (x, t, y, None, (0,)), 'feature layer 0')])
def test_wrong_inputs_are_named(change, text):
    with pytest.raises(ValueError, match=text): DiT(DiTConfig(2, 32))(*change(*inputs()))


def test_guidance_needs_a_null_label_and_eval_mode():
    x, t, y = inputs()
    with pytest.raises(ValueError, match='train mode'): forward_with_cfg(DiT(DiTConfig(1, 32)), x, t, y, 1.5)
    without = DiT(DiTConfig(1, 32, label_dropout=0.)).eval()
    with pytest.raises(ValueError, match='no null label'): forward_with_cfg(without, x, t, y, 1.5)
    with pytest.raises(ValueError, match=r'label 10: expected 0\.\.9'): without(x, t, y+7)


@pytest.fixture
def saved(tmp_path):
    randomize_weights(DiT(DiTConfig(2, 32))).save_pretrained(tmp_path/'w')
    return tmp_path/'w'


@pytest.mark.parametrize('change, text', [
    ({'config':DiTConfig(2, 64).to_dict()}, r'its config.json expects \(1, 256, 64\)'),
    ({'config':DiTConfig(1, 32).to_dict()}, 'does not belong to its config.json'),
    ({'config':DiTConfig(3, 32).to_dict()}, 'is missing; expected 42 tensors'),
    ({'class':'Classifier'}, "holds 'Classifier'; expected a 'DiT'"), ({'class':'GET'}, "holds 'GET'"),
    ({'format':2}, 'format 2; expected 1'), ({'config':{'wdith':3}}, "unknown key 'wdith'"),
    ({'config':{}}, 'config.json'),
    ({'config':[1]}, 'expected a mapping'), ({'config':None}, 'expected a mapping')])
def test_wrong_folders_are_named(saved, change, text):
    "Of folders without hashes: with them, any change of config.json is found first."
    d = {k:v for k,v in read_json(saved/'config.json').items() if k not in ('sha256', 'config_sha256')}
    write_json(saved/'config.json', d|change)
    with pytest.raises(ValueError, match=text) as e: DiT.from_pretrained(saved)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('call, text', [
    (lambda m, z, y, z0: m(z[..., :28, :28], y), r'z has shape \(3, 3, 28, 28\); expected \(N, 3, 32, 32\)'),
    (lambda m, z, y, z0: m(z, y, z0[..., :16]), r'z0 has shape \(3, 256, 16\); expected \(3, 256, 32\)'),
    (lambda m, z, y, z0: m(z), 'y is missing; expected 3 labels'),
    (lambda m, z, y, z0: m(z, y[:2]), r'y has shape \(2,\)'),
    (lambda m, z, y, z0: m(z, y.float()), 'y is torch.float32'), (lambda m, z, y, z0: m(z, y-1), 'label -1'),
    (lambda m, z, y, z0: m(z, y+1), r'label 10: expected 0\.\.9'),
    (lambda m, z, y, z0: GET(GETConfig(1, 32, 4, 1, classes=0))(z, y), 'this model was built without labels'),
    (lambda m, z, y, z0: GET(GETConfig(2, 32, (4, 8))), r'heads=\(4, 8\); expected a whole number')])
def test_wrong_inputs_of_the_baseline(call, text):
    z, y, z0 = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 9]), torch.randn(3, 256, 32)
    with pytest.raises(ValueError, match=text): call(GET(GETConfig(1, 32, 4, 1)), z, y, z0)


def test_each_class_refuses_the_folder_of_the_other(saved, tmp_path):
    randomize_weights(GET(GETConfig(1, 32, 4, 2))).save_pretrained(tmp_path/'get')
    with pytest.raises(ValueError, match="holds 'DiT'; expected a 'GET'"): GET.from_pretrained(saved)
    with pytest.raises(ValueError, match="holds 'GET'; expected a 'DiT'"): DiT.from_pretrained(tmp_path/'get')
    with pytest.raises(FileNotFoundError, match='nowhere: no folder'): load_model(tmp_path/'nowhere')
    d = {k:v for k,v in read_json(tmp_path/'get'/'config.json').items() if 'sha256' not in k}
    write_json(tmp_path/'get'/'config.json', d|{'config':d['config']|{'eq_depth':3}})
    with pytest.raises(ValueError, match=r'qkv_inj.weight has shape \(192, 32\); its config.json expects \(288, 32\)'):
        load_model(tmp_path/'get')


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = randomize_weights(DiT(DiTConfig(1, 32)))
    broken = copy.deepcopy(model)
    broken.blocks[0].mlp.fc1.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match='blocks.0.mlp.fc1.weight: not finite in float16'):
        broken.save_pretrained(tmp_path/'w', half=True)
    assert list(tmp_path.iterdir()) == []
