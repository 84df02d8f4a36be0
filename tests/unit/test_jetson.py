"Boards in folders, lines that boards have printed, and programs in place of the board's: what the Jetson module reads."
import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest

from ditnano.deploy import jetson
from ditnano.deploy.jetson import (
    Report,
    Sample,
    Sampler,
    Trace,
    card_line,
    clock_histogram,
    integrate,
    longest_below,
    parse_nvpmodel_conf,
    parse_trtexec,
    percentile,
    read_state,
    table_row,
    text_table,
    throttling,
    timed,
)

MODES = [('15W',612000000), ('25W',918000000), ('MAXN_SUPER',-1), ('7W',408000000)]
CONF = '\n'.join(f'< POWER_MODEL ID={i} NAME={n} >\nCPU_ONLINE C 1\nGPU MAX_FREQ {g}' for i,(n,g) in enumerate(MODES))
CONF = f'< PARAM TYPE=FILE NAME=GPU >\nMAX_FREQ 17000000.gpu\n{CONF}\n< PM_CONFIG DEFAULT=1 >'
ZONES = 'cpu gpu cv0 cv1 cv2 soc0 soc1 soc2 tj'.split()


def chips(seed):
    "Path -> text of four hwmon chips in random order: power, over-current, a fan, and a second INA3221 without VDD_IN."
    numbers = np.random.default_rng(seed).permutation(9)[:4]
    ina, oc, fan, second = (f'sys/class/hwmon/hwmon{k}/' for k in numbers)
    f = {}
    rails = ('VDD_IN',5016,1752), ('VDD_CPU_GPU_CV',5016,600), ('VDD_SOC',5008,400)
    for n,(rail,mv,ma) in enumerate(rails, 1): # before the second chip: path_of finds these
        f.update({f'{ina}in{n}_label':rail, f'{ina}in{n}_input':f'{mv}\n', f'{ina}curr{n}_input':f'{ma}\n'})
    f |= {ina+'name':'ina3221', ina+'in7_label':'sum of shunt voltages', ina+'in7_input':'9', ina+'curr4_input':'2752',
         ina+'samples':'512', fan+'name':'pwmfan', fan+'pwm1':'255', oc+'name':'soctherm_oc', second+'name':'ina3221',
         second+'in1_label':'VDD_5V', second+'in1_input':'5000', second+'curr1_input':'9999'}
    f.update({f'{oc}oc{k}_event_cnt':f'{k-1}' for k in (1,2,3)})
    return f


def super_board(seed=0):
    "Path -> text of a JetPack 6 Super board at 15W, locked."
    f = {'proc/device-tree/model':'NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0',
         'proc/device-tree/compatible':'nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0',
         'etc/nv_tegra_release':'# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic\n# KERNEL_VARIANT: oot',
         'etc/nvpmodel.conf':CONF, 'var/lib/nvpmodel/status':'pmode:0000 fmode:quiet',
         'proc/meminfo':'MemTotal: 7802880 kB\nMemFree: 1 kB\nMemAvailable: 6144000 kB\n',
         'sys/kernel/nvpmodel_clk_cap/emc':'2133000000'}
    for k in ('cur','min','max'):
        f[f'sys/class/devfreq/17000000.gpu/{k}_freq'] = '612000000\n'
        f.update({f'sys/devices/system/cpu/cpu{c}/cpufreq/scaling_{k}_freq':'1497600\n' for c in range(6)})
    emc = {'rate':'2133000000', 'max_rate':'2133000000', 'mrq_rate_locked':'1'}
    f.update({'sys/kernel/debug/bpmp/debug/clk/emc/'+k:v for k,v in emc.items()})
    for z,name in enumerate(ZONES):
        zone = f'sys/class/thermal/thermal_zone{z}'
        f.update({f'{zone}/type':f'{name}-thermal', f'{zone}/temp':f'{46000+z*125}'})
    for k,(kind,milli) in enumerate((('critical','104500'), ('passive','99000'))):
        f.update({f'{zone}/trip_point_{k}_type':kind, f'{zone}/trip_point_{k}_temp':milli})
    for k,name in enumerate(('pwm-fan','gpu-throttle-alert','devfreq-17000000.gpu')):
        device = f'sys/class/thermal/cooling_device{k}'
        f.update({f'{device}/type':name, f'{device}/cur_state':'3' if k==0 else '0'})
    return {**f, **chips(seed)}


def write(folder, files):
    for path,text in files.items():
        (Path(folder)/path).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder)/path).write_text(text)
    return folder


def path_of(files, end): return next(k for k in files if k.endswith(end))


def rates(files, sub, **hz):
    "The same files with other cur, min and max rates of the GPU or the cores."
    out = dict(files)
    for k in files:
        m = re.search(sub+r'.*?(cur|min|max)_freq$', k)
        if m and m[1] in hz: out[k] = str(hz[m[1]])
    return out


def gpu_at(files, hz): return rates(files, 'devfreq', cur=hz, min=hz, max=hz)


def without(files, *patterns): return {k:v for k,v in files.items() if not any(re.search(p, k) for p in patterns)}


JP6 = super_board()
MAXN = {**gpu_at(JP6, 1020000000), 'var/lib/nvpmodel/status':'pmode:0002'}
FEW = without(JP6, 'cpu/cpu[1-5]', 'thermal_zone[1-7]')


def jetpack5():
    names, files = 'CPU GPU CV0 CV1 CV2 SOC0'.split(), gpu_at(JP6, 624750000)
    f = {k.replace('17000000.gpu','17000000.ga10b'):v.replace('-thermal','-therm') for k,v in files.items()}
    f.update({f'sys/class/thermal/thermal_zone{z}/type':f'{n}-therm' for z,n in enumerate(names)})
    return {**f, 'proc/device-tree/model':'NVIDIA Orin Nano Developer Kit\0',
            'proc/device-tree/compatible':'nvidia,p3768-0000+p3767-0005\0nvidia,tegra23x\0',
            'sys/class/thermal/thermal_zone2/temp':'-256000', 'sys/class/thermal/thermal_zone3/temp':'-256',
            'etc/nv_tegra_release':'# R35 (release), REVISION: 4.1, GCID: 33958178, DATE: Tue Aug  1 19:57:35 UTC 2023',
            'etc/nvpmodel.conf':'< POWER_MODEL ID=0 NAME=15W >\nGPU MAX_FREQ 624750000\n< POWER_MODEL ID=1 NAME=7W >'}


JP5 = jetpack5()


@contextlib.contextmanager
def forbidden(*patterns):
    "Opening a path that matches is refused, as it is to a plain user."
    true = os.open
    def guarded(path, *a, **k):
        refused = any(re.search(p, str(path)) for p in patterns)
        if refused: raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return true(path, *a, **k)
    with unittest.mock.patch.object(os, 'open', guarded): yield


@contextlib.contextmanager
def silent_pipe(path):
    "A FIFO at `path` whose reader is told to try again, like a sensor whose rail is off."
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    try: yield
    finally: os.close(fd)


@pytest.fixture
def state_of(tmp_path_factory):
    def read(files, silent=(), denied=(), **k):
        folder = write(tmp_path_factory.mktemp('board'), files)
        with contextlib.ExitStack() as stack:
            for s in silent: stack.enter_context(silent_pipe(folder/s))
            if denied: stack.enter_context(forbidden(*denied))
            return read_state(folder, **k)
    return read


# The state of a board

def test_super_board_at_15w(state_of):
    s = state_of(JP6)
    assert (s.module, s.is_super) == ('p3767-0005, Orin Nano 8 GB (developer kit)', True)
    assert (s.l4t, s.jetpack) == ('36.4.7', '6.2.1')
    assert (s.mode, s.mode_id, s.gpu_mhz, s.gpu_max_mhz, s.gpu_cap_mhz, s.gpu_locked) == ('15W', 0, 612, 612, 612, True)
    assert (s.cpu_mhz, s.cpu_locked, s.emc_mhz, s.emc_locked) == ((1497.6,)*6, True, 2133, True)
    assert (s.temps['tj'], s.temps['gpu'], s.trips) == (47., 46.125, {'critical':104.5, 'passive':99.})
    assert s.rails == pytest.approx({'VDD_IN':5016*1.752, 'VDD_CPU_GPU_CV':5016*.6, 'VDD_SOC':5008*.4})
    assert (s.power_why, s.power_filter, s.throttle) == ('', {'samples':512}, {'oc1':0, 'oc2':1, 'oc3':2})
    assert s.cooling == {'gpu-throttle-alert':0, 'devfreq-17000000.gpu':0}
    assert (s.memory_mb, s.available_mb, s.warnings) == (7620, 6000, ())
    for seed in (1, 2): assert state_of(super_board(seed)) == s
    assert json.loads(json.dumps(s.to_dict())) == s.to_dict()


def test_maxn_super_real_and_false(state_of):
    real = state_of(MAXN)
    false = {**gpu_at(MAXN, 624750000), 'proc/device-tree/model':'NVIDIA Jetson Orin Nano Developer Kit\0',
             'proc/device-tree/compatible':'nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0'}
    fake = state_of(false)
    assert (real.mode, real.gpu_max_mhz, real.gpu_cap_mhz, real.warnings) == ('MAXN_SUPER', 1020, None, ())
    assert (fake.mode, fake.is_super, len(fake.warnings)) == ('MAXN_SUPER', False, 1)
    assert '624.75 MHz' in fake.warnings[0] and 'not Super' in fake.warnings[0]
    assert 'reboot' in state_of(rates(JP6, 'devfreq', min=1020000000, max=1020000000)).warnings[0]


def test_jetpack_5_as_root_and_as_a_plain_user(state_of):
    s = state_of(JP5)
    assert (s.l4t, s.jetpack, s.mode, s.is_super) == ('35.4.1', '5.1.2', '15W', False)
    assert (s.gpu_max_mhz, s.gpu_locked, s.warnings) == (624.75, True, ())
    assert [s.temps[k] for k in ('cv0','cv1','cpu','tj')] == [None, None, 46., 47.]
    for hidden in ('(in|curr)[0-9]_input', '(in|curr)[0-9]_(input|label)'):
        s = state_of(JP5, denied=(hidden, 'kernel/debug'))
        assert (s.rails.get('VDD_IN'), s.power_why, s.gpu_max_mhz) == (None, 'needs root on this release', 624.75)


def test_jetpack_7_as_a_plain_user_with_sleeping_sensors(state_of):
    jp7 = {**JP6, 'etc/nv_tegra_release':'# R39 (release), REVISION: 2.1, DATE: Fri Aug  7 05:54:22 AM UTC 2026'}
    zones = [f'sys/class/thermal/thermal_zone{z}/temp' for z in (2,3,4)]
    s = state_of(jp7, silent=zones, denied=('kernel/debug',))
    assert (s.jetpack, s.emc_mhz, s.emc_max_mhz, s.emc_locked, s.power_why) == ('7.2.1', None, 2133, None, '')
    assert [s.temps[k] for k in ('cv0','cv1','cv2','tj')] == [None, None, None, 47.]


def test_what_is_missing_is_named(state_of):
    s = state_of(without(FEW, 'in[0-9]_label', 'kernel/debug'))
    assert (s.rails, s.power_why) == ({}, 'no INA3221 with a rail VDD_IN')
    s = state_of(rates(rates(FEW, 'devfreq', min=306000000), 'cpufreq', min=729600))
    assert (s.gpu_locked, s.cpu_locked, len(s.warnings)) == (False, False, 2)
    s = state_of({**FEW, 'etc/nv_tegra_release':'# R36 (release), REVISION: 9.9, GCID: 1'})
    assert (s.l4t, s.jetpack, s.mode) == ('36.9.9', '6.x', '15W') and 'not in the table' in s.warnings[0]
    s = state_of({**FEW, path_of(FEW,'cooling_device1/cur_state'):'1', path_of(FEW,'curr1_input'):'9000'})
    assert s.warnings == ('VDD_IN of 45144 mW; expected 2500 to 30000', 'throttled now by gpu-throttle-alert')


def test_release_from_the_package_list(state_of):
    dpkg = 'Package: other\nVersion: 1\n\nPackage: nvidia-l4t-core\nStatus: install ok\nVersion: 36.5.0-20260101\n'
    s = state_of({**without(FEW, 'device-tree', 'nv_tegra'), 'var/lib/dpkg/status':dpkg})
    assert (s.model, s.l4t, s.jetpack, s.gpu_max_mhz) == (None, '36.5.0', '6.2.2', 612)


def test_not_a_jetson(state_of):
    desktop = {'proc/meminfo':'MemTotal: 1024 kB', 'sys/class/hwmon/hwmon0/name':'k10temp',
               'sys/class/devfreq/fb000000.gpu/device/of_node/name':'gpu\0',
               'sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq':'4000000'}
    for s in (state_of({}), state_of(desktop), read_state('no/such/folder')):
        assert s.warnings == ('not a Jetson: no tegra in the device tree',)
        assert not any(v for k,v in s.to_dict().items() if k!='warnings')
    s = state_of({k:v if 'device-tree' in k else '\x00?\n' for k,v in FEW.items()})
    assert (s.gpu_mhz, s.rails, s.mode, s.l4t) == (None, {}, None, None)


# What programs print

def test_power_modes():
    found = {k:(v['name'], v['gpu_mhz']) for k,v in parse_nvpmodel_conf(CONF).items()}
    assert found == {0:('15W',612), 1:('25W',918), 2:('MAXN_SUPER',None), 3:('7W',408)}
    assert parse_nvpmodel_conf('no modes') == {}


def trt_report(banner, extra=''):
    percentiles = 'percentile(90%) = 12.5 ms, percentile(95%) = 12.6 ms, percentile(99%) = 13 ms'
    return f'''&&&& RUNNING TensorRT.trtexec [TensorRT v{banner}] [b10] # trtexec --onnx=student.onnx
[10/08/2026-04:35:02] [I] === Performance summary ===
[10/08/2026-04:35:02] [I] Throughput: 81.25 qps
[10/08/2026-04:35:02] [I] Latency: min = 12.1 ms, max = 13.5 ms, mean = 12.3 ms, median = 12.25 ms, {percentiles}
[10/08/2026-04:35:02] [I] H2D Latency: min = 0.05 ms, max = 0.1 ms, mean = 0.06 ms, median = 0.06 ms
[10/08/2026-04:35:02] [I] GPU Compute Time: min = 12 ms, max = 13.3 ms, mean = 12.2 ms, median = 12.125 ms
[10/08/2026-04:35:02] [I] Total Host Walltime: 3.02 s
{extra}
&&&& PASSED TensorRT.trtexec [TensorRT v{banner}]'''


def test_trtexec_reports():
    warning = '* GPU compute time is unstable, with coefficient of variance = 2.1%.'
    r = parse_trtexec(trt_report('101602', f'[10/08/2026-04:35:02] [W] {warning}'))
    assert (r['version'], r['passed'], r['qps'], r['walltime_s'], r['d2h']) == ('10.16.2', True, 81.25, 3.02, None)
    assert (r['latency']['median'], r['latency']['p99']) == (12.25, 13.)
    assert (r['h2d']['max'], r['compute']['median']) == (.1, 12.125)
    assert r['warnings'] == (warning,)
    versions = [parse_trtexec(trt_report(b))['version'] for b in ('8502','8602','100300','110100')]
    assert versions == ['8.5.2','8.6.2','10.3.0','11.1.0']
    assert parse_trtexec('&&&& FAILED TensorRT.trtexec')['passed'] is False and parse_trtexec('')['latency'] is None


# Energy from samples

def test_integrals():
    at = np.sort(np.random.default_rng(0).uniform(0, 10, 80)).tolist()
    assert integrate(at, [3000+700*t for t in at], 2., 9.) == pytest.approx(3000*7+350*(9**2-2**2))
    grid, wave = np.array([2., *(t for t in at if 2<t<9), 9.]), np.sin(at)
    heights = np.interp(grid, at, wave)
    area = float(((heights[1:]+heights[:-1])/2*np.diff(grid)).sum())
    assert integrate(at, wave.tolist(), 2., 9.) == pytest.approx(area)
    assert integrate([1.,2.], [5.,5.], 0., 3.) == 15.
    assert longest_below([0,1,2,3,4,5,6], [9,3,3,None,3,9,3], 5) == 3
    values = [.3,.1,.9,.4]
    assert percentile(values, 90) == pytest.approx(np.percentile(values, 90))


def steady(seconds=40, every=.2, mw=8000., **k):
    "8 W for a while, 100 images after each second; the first 5 s at a power that would distort the energy."
    samples = [Sample(t, 90000. if t<5 else mw, 1020., 50., 2000.) for t in np.arange(0, seconds+1e-9, every).tolist()]
    trace = Trace(samples, 0., float(seconds), **{'idle_mw':3500., **k})
    trace.ticks = [(float(s),100) for s in range(seconds+1)]
    return trace


def test_energy_of_a_steady_run():
    t = steady()
    assert (t.energy_mj(), t.energy_mj(above_idle=True), t.mean_mw) == pytest.approx((80., 45., 8000.))
    t.ticks = [(s,128) for s in (1.,6.,7.,20.,39.)]
    assert t.energy_mj() == pytest.approx(8000*(39-6)/(3*128))
    rising = [Sample(s, 4000+100*s, None, None, None) for s in np.linspace(0, 60, 601).tolist()]
    ramp = Trace(rising, 0., 60.)
    ramp.ticks = [(5.,1), (60.,550)]
    assert ramp.energy_mj() == pytest.approx((4000*55+50*(60**2-5**2))/550)


def test_no_energy_without_a_reason():
    gap, few_ticks, no_ticks = steady(), steady(), steady()
    gap.samples = [s for s in gap.samples if not 20<s.t<31]
    few_ticks.ticks, no_ticks.ticks = [(6.,128), (30.,128)], []
    cases = ((steady(34), 'energy needs 30 s'), (gap, 'had no samples for 1'), (no_ticks, 'no images counted'),
             (Trace(ended=60., why='needs root on this release'), 'no telemetry: needs root'),
             (few_ticks, '24.0 s between the first and the last batch'))
    for t,reason in cases: assert t.energy_mj() is None and reason in t.refusal()
    assert steady(35).energy_mj() and not steady(35).refusal()


# Sampling a run

@contextlib.contextmanager
def alive(folder, mw, mhz):
    "A board whose VDD_IN and GPU clock follow functions of the time."
    write(folder, MAXN)
    current, gpu = folder/path_of(MAXN,'curr1_input'), folder/path_of(MAXN,'devfreq/17000000.gpu/cur_freq')
    Path(str(current).replace('curr1','in1')).write_text('5000')
    done = threading.Event()
    def play():
        with open(current, 'r+b', 0) as a, open(gpu, 'r+b', 0) as g:
            while not done.wait(.004):
                now = time.monotonic()
                for f,text in ((a, b'%-6d\n' % round(mw(now)/5)), (g, b'%-12d\n' % round(1e6*mhz(now)))):
                    f.seek(0)
                    f.write(text)
    thread = threading.Thread(target=play)
    thread.start()
    time.sleep(.05)
    try: yield
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_sampler_against_a_known_power_curve(tmp_path):
    w = 2*math.pi/.9
    with alive(tmp_path, lambda t: 8000+3000*math.sin(w*t), lambda t: 1020. if t%1<.5 else 918.):
        with Sampler(tmp_path, every=.01, drop=.3, least=1.) as seen:
            while time.monotonic()-seen.started<1.6:
                time.sleep(.05)
                seen.tick(16)
    a, b, n = seen.counted
    exact = 8000*(b-a)-3000/w*(math.cos(w*b)-math.cos(w*a))
    assert seen.energy_mj() == pytest.approx(exact/n, rel=.2)
    assert (seen.why, set(clock_histogram(seen)), throttling(seen)) == ('', {'918','1020'}, ())


def test_idle_power_and_throttling(tmp_path):
    write(tmp_path, MAXN)
    cooling, gpu_min = path_of(MAXN,'cooling_device1/cur_state'), path_of(MAXN,'devfreq/17000000.gpu/min_freq')
    with Sampler(tmp_path, every=.02, idle=.2, drop=0., least=.1) as seen:
        write(tmp_path, {path_of(MAXN,'oc3_event_cnt'):'14', cooling:'1', path_of(MAXN,'curr1_input'):'3000'})
        seen.begin()
        seen.tick(1)
        time.sleep(.3)
        seen.tick(10)
        write(tmp_path, {gpu_min:'306000000', cooling:'0'})
    assert (seen.idle_mw, seen.mean_mw) == pytest.approx((5016*1.752, 5016*3.), abs=1.)
    assert throttling(seen) == ('oc3: 12 events (peak current too high)', 'gpu-throttle-alert was active',
                                'the lock on the GPU clock was lost during the run')
    assert seen.energy_mj(above_idle=True)<seen.energy_mj()
    seen.samples = [Sample(t, 9000., 714. if 10<=t<14 else 1020., 60., None) for t in range(40)]
    seen.started, seen.ended = 0., 40.
    assert throttling(seen)[-2] == 'GPU clock below its lock of 1020 MHz for 3.0 s'


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match='every=0'): Sampler(every=0)


# Reports

def test_a_report_has_latency_energy_and_card(tmp_path):
    write(tmp_path, MAXN)
    def batch():
        (tmp_path/path_of(MAXN,'curr1_input')).write_text('3000')
        time.sleep(.01)
    options = dict(every=.05, drop=.2, least=.5, idle=.1)
    r = timed(batch, images=16, seconds=.75, warm=.05, watch=Sampler(tmp_path, **options))
    assert 10<=r.ms() and r.ms()<=r.ms(90)<=r.ms(99)
    assert r.energy_mj == pytest.approx(5016*3*np.mean(r.seconds)/16, rel=.3)
    assert r.net_mj/r.energy_mj == pytest.approx(1-1.752/3, abs=.02)
    assert json.loads(json.dumps(r.to_dict())) == r.to_dict()
    assert 'per batch of 16' in str(r) and card_line(r.card) in str(r) and 'MAXN_SUPER' in str(r)


def test_a_report_without_board_or_time_has_the_reason(tmp_path):
    write(tmp_path, JP5)
    assert 'run too short' in str(timed(lambda: time.sleep(.01), 16, seconds=.1, warm=0, root=tmp_path))
    with forbidden('hwmon'):
        r = timed(lambda: time.sleep(.01), 16, seconds=.1, warm=0, watch=Sampler(tmp_path, .02, drop=0))
    assert 'no energy: no telemetry: needs root' in str(r) and r.card['telemetry']['gpu_mhz']=={'625':1.}
    r = timed(lambda: time.sleep(.01), 1, seconds=.1, warm=0, root=tmp_path/'none')
    assert r.energy_mj is None
    for part in ('no telemetry', 'not a Jetson', 'per frame (one image)'): assert part in str(r)


def test_no_latency_without_a_card():
    good = {'mode':'15W', 'gpu_max_mhz':612, 'telemetry':{}}
    for wrong in (None, {}, {'mode':'15W'}):
        with pytest.raises(ValueError, match='a latency without its card'): Report((.01,), 16, wrong)
    with pytest.raises(ValueError, match='no samples'): Report((), 16, good)
    with pytest.raises(ValueError, match='images=0'): timed(print, images=0)


def test_an_error_in_the_loop_leaves_nothing_running(tmp_path):
    sampler = Sampler(write(tmp_path, FEW), every=.02)
    with pytest.raises(ZeroDivisionError): timed(lambda: 1/0, watch=sampler)
    assert not sampler.thread.is_alive()


def test_rows_and_table():
    state = {'mode':'MAXN_SUPER', 'gpu_max_mhz':1020., 'gpu_locked':True, 'telemetry':{'peak_mb':None}}
    row = table_row(Report((.25,.26,.27), 128, state, 12.3, 7.5), 'proposed', 5, 64, 8)
    assert (row['ms'], row['latency_s']) == pytest.approx((260., .26*391)) and row['p99_ms']>row['ms']
    assert (row['mode'], row['gpu_mhz'], row['locked'], row['mj_per_image']) == ('MAXN_SUPER', 1020., True, 12.3)
    text = text_table([row, {'name':'elsewhere', 'FID':57.1}])
    assert [line.split()[0] for line in text.splitlines()] == ['name','proposed','elsewhere']


# One file, Python 3.8

ALONE = '''import sys; sys.path.insert(0, sys.argv[1]); import jetson as j
w = j.Sampler(sys.argv[2], every=.02, drop=0, least=.1)
r = j.timed(lambda: j.time.sleep(.01), 16, seconds=.3, warm=0, watch=w)
print(w.before.mode, round(w.mean_mw), bool(r.energy_mj), bool(j.text_table([j.table_row(r)]) and str(r)))'''


@pytest.mark.parametrize('python', [sys.executable, 'python3.8'])
def test_the_file_works_alone(tmp_path, python):
    program = shutil.which(python)
    missing = not program or subprocess.run([program, '--version'], capture_output=True).returncode
    if missing: pytest.skip(f'{python} is not installed')
    shutil.copy(jetson.__file__, tmp_path/'jetson.py')
    write(tmp_path/'board', MAXN)
    command = [program, '-I', '-S', '-c', ALONE, tmp_path, tmp_path/'board']
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8')
    assert (done.stdout.split(), done.stderr) == (['MAXN_SUPER','8788','True','True'], '')
