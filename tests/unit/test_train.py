"The training loop: order, exact resume, recording, samples on the device."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditnano.config import TrainConfig, UNetConfig
from ditnano.edm import augment
from ditnano.images import load_images, to_unit
from ditnano.lab.artefacts import DenoiseTask
from ditnano.state import read_history
from ditnano.train import (
    DeviceBatches,
    GraphedStep,
    Step,
    choose_batches,
    compile_regions,
    epoch_permutation,
    fit,
    learning_rate,
    prepare_training,
    supports_graph_capture,
    train_step,
    update_ema,
)

CFG = TrainConfig(images=64, batch=16, lr=1e-2)


class Line:
    "Fit y = 2x + 1 with dropout, a batch norm and drawn noise."
    def __init__(self):
        self.x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(1, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 1))
        self.n, self.identity = 64, {'task': 'line'}

    def batch(self, idx): return self.x[idx], 2*self.x[idx]+1

    def inputs(self, batch, step): return *batch, step.shard(torch.randn(step.batch, 1, generator=step.generator))

    def loss_from_inputs(self, model, x, y, noise): return (model(x+0.1*noise)-y).square().mean()

    def loss(self, model, batch, step): return self.loss_from_inputs(model, *self.inputs(batch, step))


class OnlyLoss(Line):
    def loss(self, model, batch, step): return 2*super().loss(model, batch, step)


class WithSecondNetwork(Line):
    def __init__(self):
        super().__init__()
        self.auxiliary_model = nn.Linear(1, 1)

    def auxiliary_config(self, cfg): return replace(cfg, lr=3e-2, warmup=32)

    def auxiliary_loss(self, batch, step): return (self.auxiliary_model(batch[1])-batch[0]).square().mean()


def tensors(folder): return load_file(folder/'state.safetensors')


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k


@pytest.mark.parametrize('n, batch', [(10, 4), (3, 8), (64, 16)])
def test_every_epoch_is_a_permutation(n, batch):
    whole = torch.cat([epoch_permutation(n, batch, k, seed=3) for k in range(2*n)])
    for epoch in range(len(whole)//n):
        assert whole[epoch*n:(epoch+1)*n].sort().values.tolist() == list(range(n))
    assert not torch.equal(whole, torch.cat([epoch_permutation(n, batch, k, seed=4) for k in range(2*n)]))


def test_draws_of_a_step():
    same, other = Step(3, 8, seed=0), Step(3, 8, seed=0)
    assert torch.equal(same.randn(8, 2, device='cpu'), torch.randn(8, 2, generator=other.generator))
    assert not torch.equal(same.randn(8, 2, device='cpu'), Step(3, 8, seed=0).randn(8, 2, device='cpu'))


def test_learning_rate_is_constant_by_default():
    assert learning_rate(TrainConfig(lr=1e-4), 10**6) == 1e-4


def test_average_by_a_tensor_equals_average_by_a_number():
    net = nn.Linear(4, 4)
    one, two = ({k: torch.ones_like(v) for k, v in net.state_dict().items()} for _ in range(2))
    update_ema(one, net, 0.75)
    update_ema(two, net, torch.tensor(0.75))
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-6, atol=1e-6)


def test_without_average_the_trained_weights_are_kept(tmp_path):
    state = fit(Line(), replace(CFG, ema=0.0), tmp_path, 'cpu')
    assert_same(dict(state.ema_model().state_dict()), dict(state.model.state_dict()))
    assert not torch.equal(state.ema_model().state_dict()['0.weight'], Line().model.state_dict()['0.weight'])


@pytest.mark.parametrize('task', [Line, WithSecondNetwork])
def test_two_and_two_are_four(task, tmp_path):
    four = fit(task(), CFG, tmp_path/'four', 'cpu')
    fit(task(), CFG, tmp_path/'two', 'cpu', stop_after=2)
    half = tensors(tmp_path/'two')
    fit(task(), CFG, tmp_path/'two', 'cpu')
    assert_same(tensors(tmp_path/'two'), tensors(tmp_path/'four'))
    assert not torch.equal(half['model.0.weight'], tensors(tmp_path/'four')['model.0.weight'])
    assert [h['step'] for h in read_history(tmp_path/'two')] == [2, 4]
    assert four.ema_model().state_dict().keys() == Line().model.state_dict().keys()
    if task is WithSecondNetwork:
        assert {'partner.weight', 'partner_optimizer.0.exp_avg'} < tensors(tmp_path/'four').keys()
        assert not torch.equal(four.auxiliary_model.weight, task().auxiliary_model.weight)


def test_longer_training_resumes_and_reports(tmp_path, capsys):
    fit(Line(), CFG, tmp_path/'a', 'cpu')
    longer = replace(CFG, images=128)
    assert fit(Line(), longer, tmp_path/'a', 'cpu').step == 8
    assert '64 images become 128' in capsys.readouterr().err
    fit(Line(), longer, tmp_path/'b', 'cpu')
    assert_same(tensors(tmp_path/'a'), tensors(tmp_path/'b'))       # a constant rate: as if asked for at once
    with pytest.raises(ValueError, match='train.images is 128 there, expected 64'):
        fit(Line(), CFG, tmp_path/'a', 'cpu')
    fit(Line(), replace(CFG, anneal=True), tmp_path/'c', 'cpu')
    fit(Line(), replace(longer, anneal=True), tmp_path/'c', 'cpu')
    assert 'the longer schedule' in capsys.readouterr().err


def test_time_that_is_up_leaves_a_checkpoint(tmp_path):
    assert fit(Line(), CFG, tmp_path/'a', 'cpu', minutes=0).step == 1
    fit(Line(), CFG, tmp_path/'a', 'cpu', minutes=5)
    fit(Line(), CFG, tmp_path/'b', 'cpu')
    assert_same(tensors(tmp_path/'a'), tensors(tmp_path/'b'))


@pytest.mark.parametrize('chunk', [7, 4096])
def test_batches_on_the_device_equal_the_tasks_own(chunk):
    task = Line()
    on_device = DeviceBatches(task, torch.device('cpu'), chunk)
    for idx in (torch.tensor([63, 3, 3, 0]), torch.randperm(64)):
        for a, b in zip(on_device(idx), task.batch(idx), strict=True): assert torch.equal(a, b) and a.dtype == b.dtype


def test_samples_go_to_the_device_where_they_fit_and_are_seen():
    task, cpu, size = Line(), torch.device('cpu'), 64*2*4
    def chosen(images, free): return choose_batches(task, TrainConfig(images=images, batch=16), cpu, free)
    assert isinstance(chosen(64, 3*size), DeviceBatches)
    for images, free in ((64, 3*size-1), (63, 3*size), (64, None)): assert chosen(images, free) == task.batch


# the step as one recording; the stand-in replays by calling the step again

def replaying(fn, restore):
    for _ in range(3): fn()
    restore()
    loss = torch.zeros(())
    return lambda: loss.copy_(fn()), loss


def refusing(fn, restore):
    fn()
    raise RuntimeError('operation not permitted when stream is capturing')


def lying(fn, restore):
    def replay(): fn()
    return replay, torch.full((), 7.0)


@pytest.mark.parametrize('capture', [replaying, refusing, lying])
@pytest.mark.parametrize('clip', [0.0, 0.1])
def test_a_recorded_step_trains_as_an_eager_one(capture, clip, capsys):
    cfg, finals = TrainConfig(images=16*12, batch=16, lr=1e-2, warmup=64, clip=clip), []
    for how in (None, capture):
        task = Line()
        accelerator, state = prepare_training(task, cfg, 'cpu')
        state.model.train()
        graphed = how and GraphedStep(task, cfg, state, how, warmup_steps=3)
        losses = [train_step(state, task, cfg, accelerator, graphed_step=graphed).item() for _ in range(12)]
        finals.append(({k: v.clone() for k, v in state.model.state_dict().items()}, losses))
    assert ('step not recorded' in capsys.readouterr().err) == (capture is not replaying)
    assert state.recorded == (capture is replaying)
    (eager, eager_losses), (recorded, recorded_losses) = finals
    if capture is replaying: assert graphed.replay is not None
    assert_same(eager, recorded)
    assert eager_losses == recorded_losses


UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,), dropout=0.13)
DENOISE = TrainConfig(images=32, batch=8, lr=1e-3, clip=1.0, warmup=16)


def denoiser(unet=UNET, kind=DenoiseTask): return kind(unet, load_images('digits32'), augment_p=0.4)


class OneFormula(DenoiseTask):
    "The loss of the denoiser as one formula, draws and all, as it was before it had two halves."
    def loss(self, model, batch, step):
        x, given = to_unit(batch[0]).to(memory_format=torch.channels_last), ()
        if model.cfg.augment_dim: x, *given = augment(x, self.augment_p, step.generator)
        sigma = (torch.randn(len(x), generator=step.generator)*1.2-1.2).exp()
        noise = torch.randn(x.shape, generator=step.generator)
        out = model(x+sigma[:, None, None, None]*noise, sigma, F.one_hot(batch[1], 10), *given)
        return ((1/sigma**2+1/model.sigma_data**2)*(out-x).square().mean((1, 2, 3))).mean()


@pytest.mark.slow
@pytest.mark.parametrize('augment_dim, precision', [(9, 'fp32'), (0, 'bf16')])
def test_a_denoiser_trains_as_ever_and_recorded_too(augment_dim, precision):
    cfg, finals = replace(DENOISE, precision=precision), []
    for kind, capture in ((OneFormula, None), (DenoiseTask, None), (DenoiseTask, replaying)):
        task = denoiser(replace(UNET, augment_dim=augment_dim), kind)
        accelerator, state = prepare_training(task, cfg, 'cpu')
        state.model.train()
        graphed = capture and GraphedStep(task, cfg, state, capture, warmup_steps=1)
        losses = [train_step(state, task, cfg, accelerator, graphed_step=graphed).item() for _ in range(4)]
        finals.append((dict(state.ema_model().state_dict()), losses, state.recorded))
    (old, old_losses, _), *others = finals
    for new, losses, _ in others:
        assert_same(old, new)
        assert losses == old_losses
    assert [f[2] for f in finals] == [False, False, True]


class OnDevice(TorchDispatchMode):
    "Refuses what a recording cannot hold: results that the program reads, and tensors of another device."
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'nonzero'), name
        assert name != '_to_copy' or 'device' not in (kwargs or {}), name
        for t in torch.utils._pytree.tree_leaves((args, kwargs)):
            assert not torch.is_tensor(t) or t.device.type == 'meta' or t.dim() == 0, f'{name}: {t.device}'
        return op(*args, **(kwargs or {}))


def test_the_recorded_half_of_a_denoiser_stays_on_its_device():
    "By a device without numbers: whatever reads a value, or brings one from the CPU, is an error there."
    task = denoiser()
    task.loss_from_inputs(task.model, *task.inputs(task.batch(torch.arange(4)), Step(0, 4, 0)))   # tables are made once
    inputs = [t.to('meta') for t in task.inputs(task.batch(torch.arange(4)), Step(0, 4, 0))]
    task.model.to('meta')
    with OnDevice(): task.loss_from_inputs(task.model, *inputs).backward()
    assert all(p.grad is not None for p in task.model.parameters() if p.requires_grad)
    with OnDevice(), pytest.raises(AssertionError): inputs[0]+torch.zeros(4, 1, 1, 1)


def test_which_tasks_can_be_recorded():
    assert [supports_graph_capture(t) for t in (Line(), OnlyLoss(), denoiser(), denoiser(kind=OneFormula))] == [
        True, False, True, False]


@pytest.mark.slow
def test_compiled_regions_give_the_plain_gradient():
    from ditnano.config import DiTConfig
    from ditnano.dit import DiT, randomize_weights
    from ditnano.losses import get_loss
    z, grads = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        model = randomize_weights(DiT(DiTConfig(2, 32)), seed=1).train()
        task = SimpleNamespace(model=model, loss_fn=get_loss('perceptual-digitslens@32'))
        if compiled and not compile_regions(task, torch.device('cpu')): pytest.skip('no compiler for torch.compile')
        out = task.model(z, torch.zeros(2), torch.tensor([1, 2]), label_drop_mask=torch.zeros(2, dtype=torch.bool))
        task.loss_fn(out, z).backward()
        grads.append({n: p.grad for n, p in task.model.named_parameters() if p.grad is not None})
    for k, plain in grads[0].items():
        assert (plain-grads[1][k]).abs().max() <= 1e-5*max(1, plain.abs().max()), k
