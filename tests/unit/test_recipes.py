"What every recipe must do: its loss by the definition, every weight reached, networks beside it untouched, refusals."
import pytest
import torch

from ditnano.config import DiTConfig, GETConfig, TrainConfig
from ditnano.distill.base import GETModelRecipe, GETRecipe, sample_start
from ditnano.distill.dmd import (
    NUM_LEVELS,
    STUDENT_LEVELS,
    DMDRecipe,
    add_noise,
    denoise,
    fake_denoiser_loss,
    matching_gradient,
    noise_levels,
    sample_latents,
    surrogate_loss,
)
from ditnano.distill.mi1 import MI1Recipe, layer_targets, layer_times
from ditnano.distill.recipes import RECIPES, get_recipe, make_recipe, recipe_cost
from ditnano.distill.ta import TABLE_3_WEIGHTS, TARecipe
from ditnano.dit import DiT, randomize_weights
from ditnano.flow import step_times
from ditnano.get import GET
from ditnano.pairs import PairDataset, ensure_pairs
from ditnano.train import Step, fit

SMALL, SHORT = DiTConfig(2, 32), TrainConfig(images=8*6, batch=8, lr=3e-3)


@pytest.fixture(scope='module')
def pairs(): return PairDataset(ensure_pairs('digits32', 480), limit=8)


@pytest.fixture(scope='module')
def assistant(): return randomize_weights(DiT(DiTConfig(3, 64)), seed=3).eval()


def recipe_of(name, pairs, assistant):
    return {'get': lambda: GETRecipe(SMALL, pairs), 'two steps': lambda: GETRecipe(DiTConfig(2, 32, steps=2), pairs),
            'get-model': lambda: GETModelRecipe(GETConfig(1, 32, 4, 1, 2.), pairs),
            'dmd': lambda: DMDRecipe(SMALL, pairs, regression=2., fake_lr=5e-4, fake_warmup=5),
            'ta': lambda: TARecipe(SMALL, pairs, assistant=assistant, weights=(1, 1, 1)),
            'ta cosine': lambda: TARecipe(SMALL, pairs, assistant=assistant, weights=(0, 1, 1), features='cosine'),
            'mi1': lambda: MI1Recipe(SMALL, pairs, layers=(1, 2))}[name]()


def not_reached(task, step):
    "Weights of the model that the loss of one batch does not reach."
    task.model.train()
    task.loss(task.model, task.batch(torch.arange(8)), step).backward()
    names = [n for n, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    task.model.zero_grad(set_to_none=True)
    return names


@pytest.mark.slow
@pytest.mark.parametrize('name', ['get', 'two steps', 'get-model', 'dmd', 'ta', 'ta cosine', 'mi1'])
def test_every_weight_learns_and_a_plain_network_is_kept(name, pairs, assistant, tmp_path):
    task = recipe_of(name, pairs, assistant)
    others = [getattr(task, n) for n in ('teacher', 'assistant') if hasattr(task, n)]
    before = [{k: v.clone() for k, v in o.state_dict().items()} for o in others]
    auxiliary = getattr(task, 'auxiliary_model', None)
    first = auxiliary and {k: v.clone() for k, v in auxiliary.state_dict().items()}
    state = fit(task, SHORT, tmp_path/'run', 'cpu')
    assert not_reached(task, Step(6, 8, seed=0)) == ['pos_embed']
    for other, was in zip(others, before, strict=True):
        assert all(torch.equal(v, was[k]) for k, v in other.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in other.parameters())
    if auxiliary is not None: assert any(not torch.equal(v, first[k]) for k, v in auxiliary.state_dict().items())
    plain = GET(task.model.cfg) if name == 'get-model' else DiT(SMALL)
    assert state.ema_model().state_dict().keys() == plain.state_dict().keys()


def test_a_fresh_student_learns_in_its_last_layer_first(pairs):
    assert len(not_reached(GETRecipe(SMALL, pairs), Step(0, 8, seed=0))) > 10


def test_labels_are_dropped_alike_in_all_processes(pairs):
    task = GETRecipe(SMALL, pairs)
    masks = torch.cat([task.label_drop_mask(Step(k, 16, seed=0), 'cpu') for k in range(500)])
    assert 0.08 < masks.float().mean() < 0.12
    both = torch.stack([task.label_drop_mask(Step(7, 16, 0, rank=r, world=2), 'cpu') for r in (0, 1)], 1).flatten()
    assert torch.equal(both, task.label_drop_mask(Step(7, 16, 0), 'cpu'))


def test_where_students_of_several_steps_start(pairs):
    z, x, _ = pairs.batch(range(8))
    assert sample_start(z, x, 1, Step(0, 8, 0))[0] is z
    point, timestep = sample_start(z.repeat(8, 1, 1, 1), x.repeat(8, 1, 1, 1), 4, Step(0, 64, 0))
    assert sorted(set(timestep.tolist())) == sorted(1000*(1-t) for t in step_times(4))
    assert torch.equal(point[timestep == 0], z.repeat(8, 1, 1, 1)[timestep == 0])


@pytest.mark.parametrize('loss', ['L2', 'perceptual-digitslens@32'])
def test_the_get_model_compares_six_images_with_one_target(loss, pairs):
    from ditnano.get import fixed_point_correction_loss
    task = GETModelRecipe(GETConfig(1, 32, 4, 1, 2.), pairs, loss)
    z, x, y, z0 = task.inputs(task.batch(range(8)), Step(0, 8, 0))
    task.model.train()
    grads = []
    for slow in (False, True):
        if slow: value = fixed_point_correction_loss(task.model(z, y, z0=z0), x, task.loss_fn)
        else: value = task.loss_from_inputs(task.model, z, x, y, z0)
        value.backward()
        grads.append((value.detach(), {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}))
        task.model.zero_grad(set_to_none=True)
    assert torch.equal(grads[0][0], grads[1][0]) and all(torch.equal(g, grads[1][1][n]) for n, g in grads[0][1].items())


# DMD

def test_noise_levels():
    sigma = noise_levels()
    for j, value in {0: 0.002, 20: 0.0032316, 500: 2.5265, 979: 71.655, 980: 72.054, 999: 80}.items():
        assert abs(sigma[j].item()-value) <= value*2e-5
    assert STUDENT_LEVELS == (20, 980)
    images, levels = torch.zeros(100, 1, 2, 2), torch.arange(1000.)
    drawn = torch.cat([add_noise(images, levels, *STUDENT_LEVELS, Step(k, 100, seed=0))[1] for k in range(500)])
    assert (drawn.min(), drawn.max()) == STUDENT_LEVELS


def test_the_gradient_of_distribution_matching():
    g = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(4, 3, 8, 8, generator=g) for _ in range(3))
    pull = matching_gradient(x, real, fake)
    torch.testing.assert_close(pull[2], (fake-real)[2]/(x-real)[2].abs().sum()*3*8*8)
    torch.testing.assert_close(matching_gradient(x, real, 2*real-fake), -pull)
    assert matching_gradient(x, real, real).abs().max() == 0 and matching_gradient(real, real, real).isfinite().all()
    moved = x-0.1*pull
    assert (moved-real).abs().mean() < (x-real).abs().mean() and (moved-fake).abs().mean() > (x-fake).abs().mean()
    x.requires_grad_()
    surrogate_loss(x, pull).backward()
    torch.testing.assert_close(x.grad, pull/x.numel())


def test_two_processes_draw_what_one_draws():
    whole = sample_latents(Step(0, 8, 0), (3, 4, 4), 10)[0]
    parts = [sample_latents(Step(0, 8, 0, rank=r, world=2), (3, 4, 4), 10)[0] for r in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)


def test_the_first_dmd_loss_is_the_regression(pairs):
    task = DMDRecipe(SMALL, pairs)
    randomize_weights(task.model, seed=1).eval()
    z, x, y = batch = task.batch(range(8))
    first, step = task.loss(task.model, batch, Step(0, 8, 0)), Step(0, 8, 0)
    sample_latents(step, z.shape[1:], 10)
    out = task.model(z, torch.zeros(8), y, label_drop_mask=task.label_drop_mask(step, 'cpu'))
    torch.testing.assert_close(first, 0.25*task.loss_fn(out, x))
    sigma = torch.tensor([0.1, 1., 10.])
    for s, w in zip(sigma, (sigma**2+0.25)/(sigma*0.5)**2, strict=True):
        torch.testing.assert_close(fake_denoiser_loss(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), s[None]), w)


@pytest.mark.slow
def test_the_fake_denoiser_learns_the_students_images(pairs, tmp_path):
    task = DMDRecipe(SMALL, pairs, regression=2., fake_lr=5e-4, fake_warmup=5)
    fit(task, TrainConfig(images=8*24, batch=8, lr=2e-3, clip=10.), tmp_path/'run', 'cpu')
    x, labels = task.student_samples
    noisy, sigma = add_noise(x, task.sigma, 0, NUM_LEVELS-1, Step(99, 8, seed=9))
    with torch.no_grad():
        errors = [fake_denoiser_loss(denoise(net, noisy, sigma, labels), x, sigma)
                  for net in (task.auxiliary_model, task.teacher)]
    assert errors[0] < errors[1]


# the teaching assistant and multi-in-one

@pytest.mark.parametrize('name', ['ta', 'mi1'])
def test_without_its_own_terms_it_is_the_get_recipe(name, pairs, assistant, tmp_path):
    with_ta = TARecipe(SMALL, pairs, assistant=assistant, weights=TABLE_3_WEIGHTS['baseline'])
    other = with_ta if name == 'ta' else MI1Recipe(SMALL, pairs, layers=(2,))
    a = fit(GETRecipe(SMALL, pairs), SHORT, tmp_path/'a', 'cpu').model.state_dict()
    b = fit(other, SHORT, tmp_path/'b', 'cpu').model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and with_ta.auxiliary_model is None


def test_the_three_terms_of_the_assistant(pairs, assistant):
    task = TARecipe(SMALL, pairs, assistant=assistant, weights=(1, 10, 100))
    randomize_weights(task.model, seed=1).eval()
    z, x, y = batch = task.batch(range(8))
    got, zero = task.loss(task.model, batch, Step(0, 8, 0)), torch.zeros(8)
    drop = task.label_drop_mask(Step(0, 8, 0), 'cpu')
    made, tokens = task.model(z, zero, y, label_drop_mask=drop, feature_layers=(1,))
    theirs, hidden = assistant(z, zero, y, feature_layers=(2,))
    def picture(h): return assistant.decode(h, assistant.condition(zero, y))
    features = (picture(task.auxiliary_model(tokens[1]))-picture(hidden[2])).square().mean()
    torch.testing.assert_close(got, (made-x).square().mean()+10*(made-theirs).square().mean()+100*features)
    assert made.std() > 0.1


def test_the_loss_of_multi_in_one(pairs):
    task = MI1Recipe(DiTConfig(6, 32), pairs, layers=(2, 4, 6))
    model, (z, x, y) = randomize_weights(task.model, seed=2).eval(), task.batch(range(8))
    got = task.loss(model, (z, x, y), Step(0, 8, 0))
    c = model.condition(torch.zeros(8), y, task.label_drop_mask(Step(0, 8, 0), 'cpu'))
    h, wanted = model.x_embedder(z)+model.pos_embed, 0
    for layer, block in enumerate(model.blocks, 1):
        h = block(h, c)
        if layer not in (2, 4, 6): continue
        a = {2: 0.00672725, 4: 0.498996, 6: 1}[layer]       # alpha by hand; at the last layer the image itself
        target = a**0.5*x+(1-a)**0.5*(z-x/6401**0.5)/(6400/6401)**0.5
        wanted = wanted+(model.decode(h, c)-target).square().mean()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert model.decode(h, c).std() > 0.1


def test_points_of_the_path(pairs):
    z, x, _ = pairs.batch(range(8))
    assert layer_times((3, 6), 6) == (0.5, 0) and layer_times((2, 4, 6), 6) == (0.66, 0.33, 0)
    torch.testing.assert_close(layer_targets(z, x, (1.,))[0], z, rtol=1e-5, atol=1e-5)
    assert layer_targets(z, x, (0,))[0] is x
    assert abs((layer_targets(z, x, (0,), literal=True)[0]-x).square().mean().sqrt()-0.02) < 2e-3


# refusals

@pytest.mark.parametrize('message, call', [
    ("pairs of 10 classes; expected the student", lambda p, a: GETRecipe(DiTConfig(2, 32, classes=2), p)),
    ("recipe 'get-model': the student is a DiTConfig; expected a GETConfig", lambda p, a: GETModelRecipe(SMALL, p)),
    (r"expected \(3, 64, 64\)", lambda p, a: GETRecipe(DiTConfig(2, 32, image_size=64), p)),
    ("DMD: a student of 2 steps; expected 1", lambda p, a: DMDRecipe(DiTConfig(2, 32, steps=2), p)),
    ("DMD: regression=-1; expected a number of 0 or more", lambda p, a: DMDRecipe(SMALL, p, regression=-1)),
    ("DMD: clip=True; expected a number", lambda p, a: DMDRecipe(SMALL, p, clip=True)),
    ("TA: the student's depth 1 has no penultimate layer",
     lambda p, a: TARecipe(DiTConfig(1, 32), p, assistant=a, weights=(0, 1, 1))),
    ("TA: the assistant is NoneType; expected a trained DiT", lambda p, a: TARecipe(SMALL, p)),
    ("TA: the assistant has patch=4; expected the student",
     lambda p, a: TARecipe(SMALL, p, assistant=DiT(DiTConfig(2, 32, patch=4)))),
    (r"TA: weights \(0, 0, 1\); expected three of 0 or more",
     lambda p, a: TARecipe(SMALL, p, assistant=a, weights=(0, 0, 1))),
    ("TA: features 'reshaped'; expected one of decoded, cosine",
     lambda p, a: TARecipe(SMALL, p, assistant=a, features='reshaped')),
    (r"MI1: layers \(1, 3\); expected rising ones from 1 on", lambda p, a: MI1Recipe(SMALL, p, layers=(1, 3))),
    ("MI1: 1 times for 2 layers; expected one each", lambda p, a: MI1Recipe(SMALL, p, layers=(1, 2), times=(0.5,))),
    (r"MI1: times \(1.5, 0.0\); expected 1 \(noise\) to 0 \(image\)",
     lambda p, a: MI1Recipe(SMALL, p, layers=(1, 2), times=(1.5, 0))),
    ("recipe 'gan'; expected one of get, dmd, ta, mi1, get-model", lambda p, a: get_recipe('gan')),
    ("recipe 'mi1': option 'lambda0'; expected layers, times, sigma_min, literal",
     lambda p, a: make_recipe('mi1', SMALL, p, lambda0=1)),
    ("recipe 'get': takes no extra model", lambda p, a: make_recipe('get', SMALL, p, extra_model=a)),
])
def test_what_is_refused(message, call, pairs, assistant):
    with pytest.raises(ValueError, match=message): call(pairs, assistant)


def test_a_teacher_that_is_absent_is_named(pairs):
    with pytest.raises(FileNotFoundError, match="teacher 'nobody'"): DMDRecipe(SMALL, pairs, teacher='nobody')


@pytest.mark.slow
def test_an_error_in_the_process_of_a_measurement_is_one_line():
    with pytest.raises(RuntimeError, match=r"recipe 'mi1': ValueError: MI1: layers \(3, 6\)"): recipe_cost('mi1', SMALL)
    assert set(RECIPES) == {'get', 'dmd', 'ta', 'mi1', 'get-model'}
