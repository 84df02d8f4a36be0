"A sweep on a real Slurm of one node, started here: time limits, settings, a job queued again, a job that is cancelled."
import contextlib
import getpass
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ditnano.config import Scale
from ditnano.lab import sweep as sweeping
from ditnano.lab.experiments import distill_config
from ditnano.lab.runs import Run, read_result

PROGRAMS = ('slurmctld', 'slurmd', 'munged', 'sbatch', 'srun', 'squeue', 'scancel', 'scontrol')
missing = [p for p in PROGRAMS if not shutil.which(p, path=os.environ['PATH']+':/usr/sbin')]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group('slurm'),
              pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurm-wlm munge")]
pytest.importorskip('submitit', reason="no submitit: pip install 'ditnano[cluster]'")

CONF = """
    ClusterName=one
    SlurmctldHost={host}(127.0.0.1)
    SlurmUser={user}
    SlurmdUser={user}
    AuthType=auth/munge
    AuthInfo=socket={here}/munge/socket,cred_expire=5
    SlurmctldPort={ports[0]}
    SlurmdPort={ports[1]}
    StateSaveLocation={here}/state
    SlurmdSpoolDir={here}/spool
    SlurmctldPidFile={here}/slurmctld.pid
    SlurmdPidFile={here}/slurmd.pid
    ProctrackType=proctrack/linuxproc
    TaskPlugin=task/none
    SelectType=select/cons_tres
    SelectTypeParameters=CR_CPU
    SlurmdParameters=config_overrides
    ReturnToService=2
    SchedulerParameters=batch_sched_delay=0,sched_interval=2
    KillWait=5
    NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
    PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
    PartitionName=other Nodes={host} MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def wait_for(condition, seconds, what):
    deadline = time.monotonic()+seconds
    while not (found := condition()):
        if time.monotonic() > deadline: pytest.fail(f'{what} did not happen within {seconds} s')
        time.sleep(0.5)
    return found


@pytest.fixture(scope='module')
def slurm():
    "Munge, controller and node as this user, in a folder of their own; gives that folder."
    here = Path(tempfile.mkdtemp(prefix='slurm'))
    here.chmod(0o755)   # munge refuses a socket that not everybody can reach
    for folder, mode in {'munge': 0o711, 'state': 0o700, 'spool': 0o755}.items():
        (here/folder).mkdir()
        (here/folder).chmod(mode)
    (here/'key').write_bytes(secrets.token_bytes(1024))
    (here/'key').chmod(0o600)
    conf, host = here/'slurm.conf', socket.gethostname().partition('.')[0]
    conf.write_text(textwrap.dedent(CONF.format(host=host, user=getpass.getuser(), here=here, ports=free_ports(2))))
    munge = {'key-file': here/'key', 'socket': here/'munge'/'socket', 'pid-file': here/'munge'/'pid',
             'log-file': here/'munge.log', 'seed-file': here/'munge'/'seed'}
    commands = [['munged', '--foreground', '--force', *(f'--{k}={v}' for k, v in munge.items())],
                ['slurmctld', '-D', '-f', conf], ['slurmd', '-D', '-f', conf]]
    before, daemons = {k: os.environ.get(k) for k in ('PATH', 'SLURM_CONF')}, []
    os.environ |= {'PATH': os.environ['PATH']+':/usr/sbin', 'SLURM_CONF': str(conf)}
    try:
        for command in commands:
            log = open(here/f'{command[0]}.out', 'w')
            daemons.append(subprocess.Popen(list(map(str, command)), stdout=log, stderr=log))
            if command[0] == 'munged': wait_for((here/'munge'/'socket').exists, 30, 'munge')
        deadline = time.monotonic()+60
        while 'idle' not in ask('sinfo', '-h', '-o', '%T'):
            if time.monotonic() > deadline: pytest.skip(f"no Slurm: {(here/'slurmd.out').read_text()[-500:]}")
            time.sleep(0.5)
        yield here
        ask('scancel', '--user', getpass.getuser())
        wait_for(lambda: not ask('squeue', '-h'), 300, 'the end of all jobs')
    finally:
        for d in reversed(daemons): d.terminate()
        for d in reversed(daemons): d.wait(30)
        for k, v in before.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})
        shutil.rmtree(here, ignore_errors=True)


def tiny(images=64):
    return Scale(name='tiny', pairs=32, images=images, batch=16, samples=24, judges=('digitsnet',), loss='L2',
                 precision='fp32', experiments={'heads': {'heads': [1, 2]}})


def pids_of_task(root, number):
    "Processes that compute one task of the array of jobs that was submitted from a folder of runs."
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            command, env = (process/'cmdline').read_bytes(), (process/'environ').read_bytes().split(b'\0')
            mine = b'submitit.core._submit' in command and str(root).encode() in command and b'srun' not in command
            if mine and f'SLURM_ARRAY_TASK_ID={number}'.encode() in env: found.append(int(process.name))
    assert found
    return found


def job_fields(job):
    "What Slurm knows about a job, finished ones included."
    return dict(re.findall(r'(\w+)=(\S*)', ask('scontrol', 'show', 'job', str(job))))


def test_the_command_submits_once_with_its_minutes_and_settings(slurm, tmp_path, capsys):
    from ditnano.cli import main
    scale, root = tmp_path/'tiny.yaml', tmp_path/'runs'
    scale.write_text(json.dumps(tiny().to_dict()))
    words = ['sweep', 'heads', '--scale', scale, '--runs', root, '--executor', 'slurm', '--minutes', '7', '--recompute',
             '--slurm', 'partition=other', 'cpus_per_task=2', 'comment=a_test']
    command = [sys.executable, '-m', 'ditnano', *map(str, words)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert first.returncode == 0, first.stderr
    assert '2 of 2 runs are done' in first.stdout
    job = re.search(r'submitted to Slurm: (\d+)_0, \1_1\n', first.stdout)[1]
    fields, limit = job_fields(job), time.monotonic()+120
    while fields['JobState'] in ('RUNNING', 'COMPLETING') and time.monotonic() < limit:   # its result was there before
        time.sleep(0.5)
        fields = job_fields(job)
    wanted = {'Partition': 'other', 'TimeLimit': '00:07:00', 'CPUs/Task': '2', 'Comment': 'a_test', 'Restarts': '0',
              'JobName': 'ditnano-tiny', 'JobState': 'COMPLETED'}
    assert {k: fields.get(k.replace('CPUs/', '')) for k in wanted} == wanted
    main(list(map(str, words)))
    again = capsys.readouterr().out
    assert '2 of 2 runs are done' in again and 'submitted' not in again


def test_without_minutes_the_plan_gives_the_limit_and_a_signalled_job_is_queued_again(slurm, tmp_path):
    "SIGUSR2 is what Slurm sends shortly before the limit, or when another job takes the node."
    scale, lines, found = tiny(16*400), [], []
    config = distill_config(scale, (1, 32, 4))
    folder = Run(tmp_path, 'distill', config).folder
    def work(): found.extend(sweeping.sweep([config], tmp_path, 'tiny', 'slurm', device='cpu', log=lines.append,
                                            job_minutes=lambda configs: 15+len(configs)))
    thread = threading.Thread(target=work)
    thread.start()
    wait_for((folder/'history.jsonl').is_file, 600, 'training')
    job = ask('squeue', '-h', '-o', '%i').strip()
    assert job_fields(job)['TimeLimit'] == '00:16:00'
    ask('scancel', '--signal=USR2', job)
    wait_for((folder/'state.safetensors').is_file, 300, 'the checkpoint')
    assert not read_result(folder)
    thread.join(1200)
    assert [r['resumed'] for r in found] == [True] and f'submitted to Slurm: {job}' in lines
    assert job_fields(job)['Restarts'] == '1'
    stopped = re.search(r'SIGUSR2: stopped at step (\d+) of 400', next(tmp_path.glob('slurm/*.err')).read_text())
    steps = [json.loads(line)['step'] for line in (folder/'history.jsonl').read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 400 and int(stopped[1]) > 0


def test_jobs_that_are_cancelled_killed_or_wrong_are_named(slurm, tmp_path, monkeypatch):
    "scancel lets a job save its checkpoint; a killed one, as by a node that dies, leaves no result."
    monkeypatch.setattr(sweeping, 'SLURM_PATIENCE_S', 2.)
    first, second = (distill_config(tiny(16*10**6), (1, 32, heads)) for heads in (4, 8))
    bad, error, lines = distill_config(tiny(), (1, 32, 4)) | {'recipe': 'gan'}, [], []
    def work():
        try: sweeping.sweep([first, second, bad], tmp_path, 'tiny', 'slurm', minutes=60, device='cpu', log=lines.append)
        except RuntimeError as e: error.append(str(e))
    thread = threading.Thread(target=work)
    thread.start()
    folders = [Run(tmp_path, 'distill', c).folder for c in (first, second)]
    wait_for(lambda: all((f/'history.jsonl').is_file() for f in folders), 600, 'training')
    job = next(line.partition('_')[0] for line in ask('squeue', '-h', '-o', '%i').split())
    ask('scancel', f'{job}_0')
    for pid in pids_of_task(tmp_path, 1): os.kill(pid, signal.SIGKILL)
    thread.join(600)
    assert len(error) == 1 and '\n' not in error[0]
    assert f'{folders[1].name}: RuntimeError: Slurm job {job}_1 ended without a result' in error[0]
    assert f"Slurm job {job}_2: ValueError: recipe 'gan'; expected one of get" in error[0]
    assert folders[0].name not in error[0] and (folders[0]/'state.safetensors').is_file()
    assert any(line.startswith('1 of 3') and 'resumes at the next call' in line for line in lines)


def test_a_stopped_sweep_cancels_its_jobs_which_save(slurm, tmp_path):
    scale = tiny(16*10**6)
    (tmp_path/'tiny.yaml').write_text(json.dumps(scale.to_dict()))
    words = ['sweep', 'heads', '--scale', tmp_path/'tiny.yaml', '--runs', tmp_path/'runs', '--executor', 'slurm',
             '--minutes', '60', '--recompute']
    process = subprocess.Popen([sys.executable, '-m', 'ditnano', *map(str, words)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(tmp_path.glob('runs/distill-*/history.jsonl')), 600, 'training')
        process.terminate()
        out, err = process.communicate(timeout=300)
    finally: process.kill()
    wait_for(lambda: not ask('squeue', '-h'), 300, 'the end of the jobs')
    assert process.returncode == 143 and 'the same command resumes' in out+err
    assert list(tmp_path.glob('runs/distill-*/state.safetensors'))


def test_settings_that_slurm_does_not_have(slurm, tmp_path):
    config = distill_config(tiny(), (1, 32, 4))
    for settings, text in (({'slurm_moon': 1}, "Unknown argument 'moon'"), ({'nodes': 'x'}, 'nodes'),
                           ({'slurm_partition': 'nowhere'}, 'nowhere')):
        with pytest.raises((ValueError, RuntimeError), match=text) as e:
            sweeping.sweep([config], tmp_path, 'tiny', 'slurm', device='cpu', log=lambda line: None, **settings)
        assert '\n' not in str(e.value)
