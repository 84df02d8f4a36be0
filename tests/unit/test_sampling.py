"""Sampling: image k depends on seed k alone, wrong options are refused before work, and files are whole or absent."""
import copy

import numpy as np
import pytest
import torch
from PIL import Image

from ditnano.config import DiTConfig, GETConfig
from ditnano.dit import DiT, randomize_weights
from ditnano.get import GET
from ditnano.images import grid
from ditnano.sampling import (
    BACKENDS,
    Backend,
    auto_batch_size,
    balanced_labels,
    build_sampler,
    fold,
    generate,
    memory_per_image,
    sample,
    sample_inputs,
    sample_labels,
    sample_to,
    save_grid,
)


def student(steps=1, size=16, channels=3, classes=10, **options):
    config = DiTConfig(1, 32, image_size=size, channels=channels, classes=classes, steps=steps, **options)
    return randomize_weights(DiT(config), 1).eval()


def equilibrium(classes=10):
    return randomize_weights(GET(GETConfig(depth=1, width=32, heads=4, eq_depth=1, classes=classes)), 3)


def refused(message, function, *args, **options):
    with pytest.raises(ValueError, match=message): function(*args, **options)


@pytest.fixture(scope='module')
def model(): return student()


def broken(model):
    model = copy.deepcopy(model)
    model.final_layer.linear.bias.data[0] = float('nan')
    return model


# seed k alone -----------------------------------------------------------------------------------------------------

def test_a_range_of_seeds_gives_the_same_labels_as_a_part_of_it():
    assert torch.equal(balanced_labels(range(12, 18))[3:], balanced_labels(range(15, 18)))
    assert balanced_labels([7, 20, 3], 3).tolist() == [1, 2, 0]
    assert balanced_labels(range(4), [3, 5]).tolist() == [3, 5, 3, 5]
    assert balanced_labels(range(30)).bincount().tolist() == [3]*10
    refused('labels: none given', balanced_labels, range(3), 0)


@pytest.mark.parametrize('size,channels,classes', [(16, 1, 2), (32, 3, 10), (48, 3, 1), (16, 3, 100)])
def test_images_depend_on_their_seed_alone(size, channels, classes):
    net = student(size=size, channels=channels, classes=classes)
    whole = generate(net, range(12, 18), batch=6)
    assert whole.shape == (6, channels, size, size) and whole.std() > 0.1
    for part, batch in ((slice(3, 6), 3), (slice(0, 6), 1), (slice(0, 6), 4)):
        assert (generate(net, range(12, 18)[part], batch=batch)-whole[part]).abs().max() < 1e-4
    assert torch.equal(sample_labels(range(12, 18), net.cfg), sample_inputs(range(12, 18), net.cfg)[1])
    assert (generate(net, range(12, 18), sample_labels(range(12, 18), net.cfg))-whole).abs().max() < 1e-4


def test_ordered_and_reversed_seeds_give_the_same_images(model):
    assert (generate(model, range(5, -1, -1)).flip(0)-generate(model, range(6))).abs().max() < 1e-5
    several = student(steps=4)
    assert (generate(several, range(5), batch=2)-generate(several, range(5))).abs().max() < 1e-4


def test_a_get_starts_from_the_seed():
    net = equilibrium()
    images = generate(net, range(4), guidance=1.)
    assert images.std() > 0.1
    assert (generate(net, [3, 1], guidance=1., batch=1)-images[[3, 1]]).abs().max() < 1e-4
    assert sample(equilibrium(classes=0), range(2), guidance=1.).shape == (2, 3, 32, 32)


def test_labels_for_all_or_for_each(model):
    assert torch.equal(sample(model, range(3), 4), sample(model, range(3), torch.tensor([4, 4, 4])))
    assert (generate(model, range(3), 10)-generate(model, range(3), 10, guidance=1)).abs().max() < 1e-5
    assert (generate(model, range(3), 4)-generate(model, range(3), 5)).abs().max() > 0.01


def test_bytes_follow_the_rule(model):
    floats = generate(model, range(6), batch=6).numpy()
    rule = np.clip(floats*np.float32(127.5)+np.float32(128), 0, 255).astype(np.uint8)
    assert np.array_equal(sample(model, range(6), batch=6).numpy(), rule)


# batches and back-ends --------------------------------------------------------------------------------------------

def test_the_last_batch_is_filled_for_a_compiled_step(model, monkeypatch):
    shapes = []
    def compiled(net):
        def run(x, t, y):
            shapes.append(len(x))
            return net(x, t, y)
        return run
    monkeypatch.setattr(torch, 'compile', compiled)
    images = generate(model, range(7), backend='compiled', batch=3)
    assert set(shapes) == {6} and (images-generate(model, range(7))).abs().max() < 1e-5
    equal = generate(equilibrium(), range(3), guidance=1., batch=2)
    shapes.clear()
    monkeypatch.setattr(torch, 'compile', lambda net: lambda *a: shapes.append(len(a[0])) or net(*a))
    assert (generate(equilibrium(), range(3), guidance=1., batch=2, backend='compiled')-equal).abs().max() < 1e-4
    assert set(shapes) == {2}


def inverted(model, guidance, name, precision, batch):
    "A back-end of the tests."
    step = build_sampler(model, guidance)
    return lambda x, y: -step(x, y)


def test_a_new_backend_is_one_line(model, monkeypatch):
    monkeypatch.setitem(BACKENDS, 'inverted', Backend(f'{__name__}:inverted'))
    assert torch.equal(generate(model, range(2), backend='inverted'), -generate(model, range(2)))
    assert auto_batch_size(model, backend='inverted', free=1<<40) == 512


def test_batch_size_follows_memory(model):
    def room(images, net): return auto_batch_size(net, free=4*images*memory_per_image(net))
    assert [room(n, model) for n in (0, 1, 20, 10**6)] == [1, 1, 16, 32]
    assert memory_per_image(model, precision='bf16') < memory_per_image(model)


def test_a_model_is_left_as_it_was(model):
    net = copy.deepcopy(model).train()
    net.blocks[0].eval()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    for precision in ('fp32', 'bf16'): sample(net, range(2), precision=precision)
    assert net.training and not net.blocks[0].training
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k,v in net.state_dict().items())


REFUSED = [
    ({'backend':'onnx'}, "backend 'onnx' is unknown; expected one of eager, compiled, native, openvino"),
    ({'precision':'fp8'}, "precision 'fp8' with eager on cpu: expected fp32 or bf16"),
    ({'precision':'fp16'}, "precision 'fp16' with eager on cpu: expected fp32 or bf16"),
    ({'backend':'onnxruntime', 'precision':'bf16'}, "precision 'bf16' with onnxruntime: expected fp32"),
    ({'backend':'openvino', 'device':'cuda'}, "device 'cuda' with openvino: expected cpu"),
    ({'guidance':float('nan')}, 'guidance nan'),
    ({'labels':[3, 11]}, r'labels from 3 to 11; expected 0..10'),
    ({'labels':[3, -1]}, 'labels from -1 to 3'),
    ({'labels':[1, 2, 3]}, 'expected one label, or 2 of them'),
    ({'labels':0.5}, 'expected whole numbers'),
    ({'batch':0}, 'batch=0'),
]


@pytest.mark.parametrize('options,message', REFUSED, ids=lambda o: str(o)[:40])
def test_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message): sample(model, range(2), **options)


WRONG_SEEDS = [(9, r'expected several, such as range\(9\)'), ([], 'none given'), ([1, -4], 'seed -4: expected')]


@pytest.mark.parametrize('seeds,message', WRONG_SEEDS)
def test_seeds_are_refused(model, seeds, message):
    with pytest.raises(ValueError, match=message): sample(model, seeds)


def test_models_that_an_option_does_not_fit():
    refused('takes students of one step, not one of 2', build_sampler, student(steps=2), backend='openvino')
    refused('takes students of one step, not a GET', build_sampler, equilibrium(), 1., backend='openvino')
    refused('has no null label', build_sampler, student(label_dropout=0.))
    refused('guidance 1.5: a GET, which has no null label; expected 1', sample, equilibrium(), range(2))
    refused(r'labels from 10 to 10; expected 0..9', sample, equilibrium(), range(2), 10, guidance=1.)
    refused('labels for a model without classes', sample, equilibrium(classes=0), range(2), 1, guidance=1.)


def test_not_a_number_names_the_seeds(model):
    with pytest.raises(FloatingPointError, match=r"seeds 5..6: the model's images are not finite"):
        sample(broken(model), range(5, 7))


# onto disk --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('channels', [1, 3])
def test_three_forms_hold_the_same_images(channels, tmp_path):
    from safetensors.torch import load_file
    net = student(channels=channels)
    images = sample(net, range(6), batch=6)
    assert [sample_to(tmp_path/name, net, range(6), batch=6) for name in ('a.npy', 'a.safetensors', 'a')] == [6]*3
    assert np.array_equal(np.load(tmp_path/'a.npy'), images.numpy())
    kept = load_file(tmp_path/'a.safetensors')
    assert torch.equal(kept['images'], images) and kept['seeds'].tolist() == list(range(6))
    assert torch.equal(kept['labels'], sample_labels(range(6), net.cfg))
    for k, file in enumerate(sorted((tmp_path/'a').glob('*.png'))):
        assert file.name == f"{k:08d}-{kept['labels'][k]}.png"
        pixels = np.asarray(Image.open(file)).reshape(16, 16, channels)
        assert np.array_equal(pixels, images[k].permute(1, 2, 0).numpy())


@pytest.mark.parametrize('damage', [b'', b'\x89PNG', 'short', 'flipped'])
def test_a_damaged_picture_is_made_again(model, tmp_path, damage):
    folder = tmp_path/'samples'
    sample_to(folder, model, range(4), batch=4)
    good = {p.name:p.read_bytes() for p in folder.glob('*.png')}
    victim = sorted(folder.glob('*.png'))[2]
    content = bytearray(victim.read_bytes())
    if damage=='flipped': content[len(content)//2] ^= 1
    victim.write_bytes(damage if isinstance(damage, bytes) else content[:-15] if damage=='short' else content)
    assert sample_to(folder, model, range(4), batch=4) == 1
    assert victim.read_bytes() == good[victim.name]


def test_a_folder_grows_by_label_and_seed(model, tmp_path):
    folder = tmp_path/'samples'
    assert sample_to(folder, model, range(4), balanced_labels(range(4))) == 4
    assert sample_to(folder, model, range(6), balanced_labels(range(6))) == 2
    refused('samples: seed . has label .; expected 5', sample_to, folder, model, range(6), [5]*6)
    (folder/'.DS_Store').write_bytes(b'x')
    (folder/'._0001.png').write_bytes(b'x')
    (folder/'notes-1.png').write_bytes(b'x')
    assert sample_to(folder, model, range(6), balanced_labels(range(6))) == 0


def test_folders_that_are_refused(model, tmp_path):
    folder = tmp_path/'samples'
    sample_to(folder, model, range(2))
    for options, what in (({'guidance':2.}, 'guidance'), ({'labels':3}, 'labels')):
        refused(f'samples: made with another {what}; expected the same', sample_to, folder, model, range(2), **options)
    refused('made with another weights', sample_to, folder, fold(model), range(2))
    refused('expected .npy, .safetensors, or a folder', sample_to, tmp_path/'a.jpg', model, range(2))
    refused('holds no samples.json', sample_to, tmp_path, model, range(2))
    refused('one of them comes twice', sample_to, tmp_path/'b', model, [1, 1])
    refused('expected several', sample_to, tmp_path/'b', model, 9)
    (folder/'samples.json').write_text('{"weights')
    refused('samples.json: not JSON', sample_to, folder, model, range(2))


def test_nothing_half_written_stays(model, tmp_path):
    for name in ('c.npy', 'c.safetensors'):
        with pytest.raises(FloatingPointError): sample_to(tmp_path/name, broken(model), range(4))
    assert list(tmp_path.iterdir()) == []


def test_a_sheet(model, tmp_path):
    images = sample(model, range(5))
    save_grid(images, tmp_path/'grid.png', columns=3, scale=2)
    sheet = np.asarray(Image.open(tmp_path/'grid.png'))
    assert sheet.shape == (2*34, 2*52, 3) and (sheet[36:, 72:] == 255).all()
    assert np.array_equal(sheet[::2, ::2][18:34, 18:34], images[4].permute(1, 2, 0).numpy())
    assert grid(images[:, :1]).mode == 'L'
    refused('expected a suffix such as .png', save_grid, images, tmp_path/'grid.xyz')
    refused(r'expected uint8 \(N, 3, R, R\)', grid, images.float())
    assert [p.name for p in tmp_path.iterdir()] == ['grid.png']
