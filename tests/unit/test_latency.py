"""Latency: exact rules on a scripted clock, clocks that are read and never invented, and what is timed."""
import contextlib
import copy
import json
import statistics
import sys
import types

import numpy as np
import pytest
import torch

from ditnano import latency
from ditnano.config import DiTConfig, GETConfig
from ditnano.dit import DiT, randomize_weights
from ditnano.edm import to_bytes
from ditnano.get import GET
from ditnano.latency import (
    Timing,
    batch_step,
    device_card,
    frame_time,
    interleaved,
    measure,
    paired_timing,
    time_sampling,
)
from ditnano.principles import count_flops, count_params
from ditnano.sampling import fold, sample, sample_inputs, sample_z0


class ScriptedClock:
    "A function with given durations, and the clock that goes with it."
    def __init__(self, durations): self.now, self.durations = 0., iter(durations)
    def __call__(self): self.now += next(self.durations)
    def clock(self): return self.now


@pytest.fixture(scope='module')
def tiny(): return randomize_weights(DiT(DiTConfig(1, 32, image_size=16)), 0)


@pytest.fixture(scope='module')
def equilibrium(): return randomize_weights(GET(GETConfig(depth=1, width=32, heads=4, eq_depth=1)), 0)


def refused(message, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=message): function(*args, **options)


# one function -----------------------------------------------------------------------------------------------------

def test_warm_up_is_not_among_the_samples():
    slow_start = ScriptedClock([.09, .07, .05, .03, .02]+[.01]*100)
    t = measure(slow_start, repeats=20, clock=slow_start.clock)
    assert t.samples == pytest.approx([.01]*20) and (t.n, t.warmup, t.settled) == (20, 12, True)


def test_a_warm_up_that_never_settles_is_cut_off():
    restless = ScriptedClock([2.**k for k in range(99)])
    t = measure(restless, 1, max_warmup=6, max_seconds=1e9, clock=restless.clock)
    assert not t.settled and 'not settled' in str(t)
    restless = ScriptedClock([2.**k for k in range(99)])
    assert measure(restless, 1, max_seconds=7, clock=restless.clock).warmup == 3


def test_percentiles():
    samples = np.random.default_rng(0).exponential(size=100).tolist()
    t = Timing.of(samples)
    assert t.p50 == pytest.approx(statistics.median(samples))
    assert sorted(samples)[-2] < t.p99 < max(samples)
    assert json.loads(json.dumps(t.to_dict()))['samples'] == samples
    refused('no samples', Timing.of, [])


def test_the_real_clock():
    import time
    t = measure(lambda: time.sleep(.005), repeats=5)
    assert .005 <= t.min <= t.p50


def test_what_cannot_be_timed():
    refused('expected a function without arguments', measure, 3, error=TypeError)
    refused('repeats=0', measure, print, 0)
    if torch.cuda.is_available(): return
    refused("'cuda' is not available", measure, print, device='cuda', error=RuntimeError)


def test_a_gpu_is_synchronised_around_each_call(monkeypatch):
    "A stand-in for torch's CUDA calls records their order: nothing is read before the device is done."
    log = []

    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): log.append('event')
        def elapsed_time(self, last): return 4.

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda d: log.append('synchronize'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device', lambda d: contextlib.nullcontext())
    t = measure(lambda: log.append('work'), 2, 'cuda', max_warmup=1, clock=lambda: log.append('clock') or 0.)
    assert log == ['synchronize', 'clock', 'event', 'work', 'event', 'synchronize', 'clock']*3
    assert t.gpu == (.004, .004)


# the card ---------------------------------------------------------------------------------------------------------

def test_clocks_are_read_and_never_invented(tmp_path):
    for k, khz in enumerate((800_000, 2_400_000)):
        folder = tmp_path/f'sys/devices/system/cpu/cpu{k}/cpufreq'
        folder.mkdir(parents=True)
        values = {'scaling_cur_freq':khz, 'scaling_max_freq':3_100_000, 'scaling_governor':'powersave'}
        for name, v in values.items(): (folder/name).write_text(f'{v}\n')
    (tmp_path/'proc').mkdir()
    (tmp_path/'proc/loadavg').write_text('1.50 0.7 0.3 2/100 42\n')
    assert latency.cpu_clocks(tmp_path) == {'mhz':1600, 'max_mhz':3100, 'governor':'powersave', 'load':1.5}
    assert latency.cpu_clocks(tmp_path/'nothing') == {}


def test_clocks_of_a_gpu(monkeypatch):
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda u: u, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0, nvmlDeviceGetClockInfo=lambda h, k: {1:1500, 2:2600}[k],
        nvmlDeviceGetMaxClockInfo=lambda h, k: 1980, nvmlDeviceGetPowerUsage=lambda h: 250_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 700_000, nvmlDeviceGetTemperature=lambda h, k: 41)
    monkeypatch.setitem(sys.modules, 'pynvml', fake)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda d: types.SimpleNamespace(uuid='1-2'))
    wanted = {'sm_mhz':1500, 'max_sm_mhz':1980, 'memory_mhz':2600, 'watts':250., 'limit_watts':700., 'celsius':41}
    assert latency.gpu_clocks('cuda') == wanted
    monkeypatch.setitem(sys.modules, 'pynvml', None)
    assert latency.gpu_clocks('cuda') == {}


def test_a_card_counts_the_forwards():
    c = device_card(guidance=1.5, batch=128)
    assert json.loads(json.dumps(c)) == c and (c['forwards_per_image'], c['batch']) == (2, 128)
    options = {'guidance':1.}, {'steps':2}, {'guidance':1.5, 'steps':4}
    assert [device_card(**o)['forwards_per_image'] for o in options] == [1, 2, 8]


# 50,000 images ----------------------------------------------------------------------------------------------------

def test_extrapolation_by_the_median_batch():
    e = latency.extrapolate(Timing.of([.2, .1, .3]), 128)
    assert e['seconds_50k'] == pytest.approx(.2*390.625) and (e['batches_in_all'], e['batches']) == (391, 3)
    assert e['images_per_s']*e['seconds_50k'] == pytest.approx(50_000)


def test_a_step_makes_the_images_of_sample(tiny):
    images = batch_step(tiny, 4)()
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8 and images.float().std() > 10
    assert (images.int()-sample(tiny, range(4)).int()).abs().max() <= 1
    assert (batch_step(fold(tiny), 4)().int()-images.int()).abs().max() <= 1
    assert (batch_step(tiny, 4, attention='explicit')().int()-images.int()).abs().max() <= 1
    assert (batch_step(tiny, 4, precision='bf16')().float()-images.float()).abs().mean() < 4
    assert {p.dtype for p in tiny.parameters()} == {torch.float32}


def test_a_record_of_a_timing(tiny):
    timed = time_sampling(tiny, batch=4, batches=3, max_warmup=3)
    assert json.loads(json.dumps(timed)) == timed and len(timed['samples_ms']) == 3
    assert timed['seconds_50k'] == pytest.approx(statistics.median(timed['samples_ms'])/1e3*12_500)
    assert timed['card']['forwards_per_image'] == 2


def test_calls_are_counted():
    calls, net = [], randomize_weights(DiT(DiTConfig(1, 32, image_size=16, steps=3)), 0)
    net.register_forward_pre_hook(lambda m, inputs: calls.append(len(inputs[0])))
    for guidance in (1.5, None): batch_step(net, 4, guidance)()
    assert calls == [8, 8, 8, 4, 4, 4]
    calls.clear()
    timed = time_sampling(net, batch=2, batches=2, max_warmup=3)
    assert len(calls) == 3*(1+timed['warmup']+2) and timed['card']['forwards_per_image'] == 6


def test_a_get_is_timed_from_its_start(equilibrium):
    net, starts = copy.deepcopy(equilibrium), []
    net.register_forward_pre_hook(lambda m, inputs: starts.append(inputs[2]))
    assert time_sampling(net, batch=2, batches=1, guidance=None, max_warmup=2)['card']['forwards_per_image'] == 1
    assert all(torch.equal(start, sample_z0(range(2), net.cfg)) for start in starts)
    refused('a GET, which has no null label', time_sampling, equilibrium)


def test_without_a_compiler_the_record_says_eager(tiny, monkeypatch):
    def no_compiler(net):
        def fail(*args): raise RuntimeError('no C++ compiler')
        return fail
    monkeypatch.setattr(torch, 'compile', no_compiler)
    timed = time_sampling(tiny, batch=2, batches=1, backend='compiled', max_warmup=1)
    assert timed['backend'] == timed['card']['backend'] == 'eager'


def test_options_that_are_refused(tiny):
    refused("precision 'int4'", time_sampling, tiny, precision='int4')
    refused('batches=0', time_sampling, tiny, batches=0)
    refused('expected one of', time_sampling, tiny, batch=1, attention='flash')


# one image at a time ----------------------------------------------------------------------------------------------

def test_frames_are_single_guided_images(tiny, capsys):
    rows, net = [], copy.deepcopy(tiny)
    net.register_forward_pre_hook(lambda m, inputs: rows.append(len(inputs[0])))
    found = frame_time(net, ('eager',), frames=5, max_seconds=.1)
    assert set(rows) == {2} and len(found) == 1
    assert 0 < found[0]['p50_ms'] <= found[0]['p99_ms'] and found[0]['frames'] == 5
    assert found[0]['frames_per_s'] == pytest.approx(1e3/found[0]['p50_ms'])
    assert json.loads(json.dumps(found)) == found
    several = randomize_weights(DiT(DiTConfig(1, 32, image_size=16, steps=2)), 0)
    assert frame_time(several, ('onnxruntime',), frames=1) == []
    assert 'skipped: onnxruntime fp32' in capsys.readouterr().out


def test_frames_of_models_that_do_not_fit(tiny, equilibrium):
    refused('a GET, which has no null label', frame_time, equilibrium)
    refused("backend 'openvinoo'; expected some of eager", frame_time, tiny, ('openvinoo',))
    refused('frames=0', frame_time, tiny, frames=0)
    assert frame_time(equilibrium, ('eager',), guidance=1, frames=1, max_seconds=.1)[0]['backend'] == 'eager'


# in turns ---------------------------------------------------------------------------------------------------------

class DriftingClock:
    "A clock on which work takes three times as long after call number `break_at`."
    def __init__(self, break_at): self.now, self.calls, self.break_at = 0., 0, break_at

    def work(self, seconds):
        self.calls += 1
        self.now += seconds*(3 if self.calls>self.break_at else 1)

    def clock(self): return self.now


def test_turns_cancel_a_drift():
    m = DriftingClock(18)
    together = paired_timing(lambda: m.work(.2), lambda: m.work(.1), rounds=10, clock=m.clock)
    assert together.ratio == pytest.approx(2) and together.low>1
    m = DriftingClock(0)
    p = paired_timing(lambda: m.work(.2), lambda: m.work(.1), rounds=4, items=(64, 32), clock=m.clock)
    assert p.ratio == pytest.approx(1) and p.low<=1<=p.high and p.rates == pytest.approx((64/.6, 32/.3))
    assert json.loads(json.dumps(p.to_dict()))['items'] == [64, 32]
    refused('rounds=0', paired_timing, print, print, 0)


def test_turns_go_forwards_and_backwards():
    now, order = [0.], []

    def takes(name, seconds):
        def f():
            order.append(name)
            now[0] += seconds
        return f

    turns = interleaved({'a':takes('a', 3.), 'b':takes('b', 1.), 'c':takes('c', 2.)}, 2, clock=lambda: now[0])
    assert {k:[wall for wall, _ in v] for k, v in turns.items()} == {'a':[3., 3.], 'b':[1., 1.], 'c':[2., 2.]}
    assert order == list('abccba')
    refused('interleaved: rounds=0', interleaved, {}, 0)


def test_backends_beside_the_plain_module():
    designs = [DiTConfig(1, 32, image_size=16), DiTConfig(1, 32, image_size=16, steps=2)]
    rows = latency.bench_sampling(designs, 4, ('eager', 'native', 'openvino', 'onnxruntime'), rounds=2)
    by = {(r['design']['steps'], r['backend'], r['precision']):r for r in rows}
    plain = by[1, 'eager', 'fp32']
    assert (plain['times'], plain['error'], plain['max_error']) == (1., 0., 0.)
    assert 1e-4 < by[1, 'eager', 'bf16']['error'] < .1 and (2, 'openvino', 'fp32') not in by
    for b in ('native', 'openvino', 'onnxruntime'):
        if (1, b, 'fp32') in by: assert 0 < by[1, b, 'fp32']['error'] < 1e-5
    for r in rows: assert r['seconds_50k'] == pytest.approx(50_000/4*r['p50_ms']/1e3)
    refused("precision 'fp8'; expected some of fp32", latency.bench_sampling, designs, precisions=['fp8'])


# the limit --------------------------------------------------------------------------------------------------------

def test_the_limit_by_hand():
    cfg = DiTConfig(1, 64)
    flops, traffic = 2*count_flops(cfg), 4*(count_params(cfg)+2*3072)+2*3072
    share = latency.share_of_limit
    assert share(1., cfg, 2, 1e9, 1e15, None)['limit_s'] == pytest.approx(flops/1e9)
    assert share(1., cfg, 2, 1e15, 1e6, 1)['limit_s'] == pytest.approx(traffic/1e6)
    assert [share(1., cfg, 2, *rates, 1)['bound'] for rates in ((1e9, 1e15), (1e15, 1e6))] == ['arithmetic', 'memory']
    assert share(1., cfg, 2, 1e9, 1e15)['limit_s'] == pytest.approx(2*flops/1e9)
    assert share(1., DiTConfig(1, 64, steps=4), 2, 1e9, 1e15, 1)['limit_s'] == pytest.approx(4*flops/1e9)
    assert share(2., cfg, 2, 1e9, 1e15, 1)['flops_per_s'] == pytest.approx(flops/2)


def test_heads_and_exponentials_lower_the_ceiling():
    cfg = DiTConfig(1, 64)
    products, count = 2*4*256**2*64, 2*(8*256**2+256*4*64)
    by_hand = (2*count_flops(cfg)-products)/1e9 + products/1e8 + count/1e7
    found = latency.share_of_limit(1., cfg, 2, 1e9, 1e15, None, heads=1e8, exponentials=1e7)
    assert found['limit_s'] == pytest.approx(by_hand) and found['bound'] == 'attention'
    rates = latency.gemm_rate(size=256, seconds=.05), latency.head_rate(cfg, seconds=.05)
    assert 0 < rates[1] < 10*rates[0] and latency.exponential_rate(seconds=.05) > 1e6
    assert latency.copy_bandwidth(mib=8, seconds=.05) > 1e6
    refused("precision 'fp8'; expected one of fp32", latency.gemm_rate, 'fp8')


def test_a_batch_is_the_work_of_its_inputs(tiny):
    noise, labels, _ = sample_inputs(range(3), tiny.cfg)
    with torch.no_grad():
        both = [tiny.eval()(noise, torch.zeros(3), y) for y in (labels, torch.full_like(labels, 10))]
    wanted = to_bytes(both[1]+1.5*(both[0]-both[1]))
    assert (batch_step(tiny, 3)().int()-wanted.int()).abs().max() <= 1


def test_a_slow_drift_is_not_settled():
    now, calls = [0.], []
    def call():
        now[0] += .1+.9*.96**len(calls)
        calls.append(1)
    timing = latency.measure(call, repeats=5, clock=lambda: now[0])
    assert len(calls)>20
    assert not timing.settled or max(timing.samples)<.2
