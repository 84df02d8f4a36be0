"Randomness, files, locks and the fingerprint: what other rooms rely on."
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from ditnano import repro
from ditnano.repro import (
    atomic,
    code_version,
    load_weights,
    lock,
    noise_and_labels,
    read_json,
    remove_leftovers,
    sample_generator,
    save_weights,
    state_hash,
    verified_hash,
    write_json,
)

root_only = pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may read everything')


def python(code, *args, **env):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **env})


# randomness --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', [-1, 2**32, 2**32+5])
def test_seeds_that_would_repeat_others_are_refused(seed):
    with pytest.raises(ValueError, match=f'seed {seed}: expected 0..4294967295'): sample_generator(seed)
    with pytest.raises(ValueError, match=f'seed {seed}'): noise_and_labels([1, seed])
    assert sample_generator(2**32-1).initial_seed() == 2**32-1


def test_noise_stays_float32_whatever_the_default_type():
    plain, labels = noise_and_labels([3, 4])
    torch.set_default_dtype(torch.float64)
    try: wide, again = noise_and_labels([3, 4])
    finally: torch.set_default_dtype(torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide, plain) and torch.equal(labels, again)


# files -------------------------------------------------------------------------------------------------------------

def test_umask_decides_the_mode(tmp_path):
    for mask,want in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            with atomic(tmp_path/f'{mask}') as tmp:
                os.close(os.open(tmp, os.O_CREAT|os.O_WRONLY, 0o600))   # as safetensors opens its files
            save_weights(tmp_path/f'w{mask}', {}, {'a':torch.ones(2)})
        finally: os.umask(old)
        assert stat.S_IMODE((tmp_path/f'{mask}').stat().st_mode) == want
        assert stat.S_IMODE((tmp_path/f'w{mask}'/'model.safetensors').stat().st_mode) == want
        assert stat.S_IMODE((tmp_path/f'w{mask}').stat().st_mode) == want | (want>>2 & 0o111) | 0o100


def test_programs_stay_executable(tmp_path):
    with atomic(tmp_path/'run') as tmp:
        tmp.write_text('#!/bin/sh\n')
        tmp.chmod(0o700)
    assert os.access(tmp_path/'run', os.X_OK)


def test_a_link_is_followed_and_a_device_refused(tmp_path):
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'link.json').symlink_to(tmp_path/'elsewhere'/'real.json')   # dangling at first
    for n in (1, 2):
        write_json(tmp_path/'link.json', {'n':n})
        assert (tmp_path/'link.json').is_symlink() and read_json(tmp_path/'elsewhere'/'real.json') == {'n':n}
    with pytest.raises(ValueError, match='is a device or a pipe'): write_json(os.devnull, {})
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(ValueError, match='is a device or a pipe'): write_json(tmp_path/'pipe', {})


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_json('~/a.json', {'x':1})
    save_weights('~/w', {}, {'a':torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ['a.json', 'w'] and load_weights('~/w')[1]['a'].tolist() == [1, 1]


def test_threads_write_the_same_file_and_folder(tmp_path):
    errors = []
    def work(n):
        try:
            for _ in range(5):
                write_json(tmp_path/'cold'/'a.json', {'n':n})
                with atomic(tmp_path/'cold'/'folder') as tmp:
                    tmp.mkdir()
                    (tmp/'b').write_text('b'*1000)
        except Exception as e: errors.append(repr(e))
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors
    assert sorted(os.listdir(tmp_path/'cold')) == ['a.json', 'folder'] and os.listdir(tmp_path/'cold'/'folder') == ['b']


KILLED = """
import os, signal, sys
from ditnano.repro import atomic
os.rename = (lambda rename: lambda a, b: (rename(a, b), os.kill(os.getpid(), signal.SIGKILL)))(os.rename)
with atomic(sys.argv[1]) as tmp:
    if sys.argv[2]=='early': os.kill(os.getpid(), signal.SIGKILL)
    tmp.mkdir()
    (tmp/'new').write_text('')
"""


@pytest.mark.parametrize('when', ['early', 'between'])
def test_a_killed_writer_leaves_the_old_folder_and_no_rubbish(tmp_path, when):
    "Also when it dies after the old folder was set aside, before the new one has its place."
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'old').write_text('')
    assert python(KILLED, tmp_path/'out', when).returncode == -9
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ['out'] and os.listdir(tmp_path/'out') == ['old']


def test_leftovers_of_living_processes_stay(tmp_path):
    with atomic(tmp_path/'a') as tmp:
        tmp.write_text('half')
        remove_leftovers(tmp_path)
        assert tmp.read_text() == 'half'
        tmp.write_text('whole')
    (tmp_path/'.hidden.tmp').write_text('of another program')
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['.hidden.tmp', 'a']


def test_a_folder_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'file'/'cache'))
    with pytest.raises(OSError, match=r'expected a folder that can be written \(set DITNANO_CACHE') as e:
        write_json(tmp_path/'file'/'cache'/'a.json', {})
    assert '\n' not in str(e.value)


def test_json_with_a_byte_order_mark_and_damaged(tmp_path):
    (tmp_path/'a.json').write_bytes(b'\xef\xbb\xbf{"a":1}')
    assert read_json(tmp_path/'a.json') == {'a':1}
    for content in (b'', b'{"a":', b'\xff\xfe\x00', b'{"a":1}x'):
        (tmp_path/'a.json').write_bytes(content)
        with pytest.raises(ValueError, match=r'a\.json: not JSON'): read_json(tmp_path/'a.json')
    (tmp_path/'a.json').write_text('[1]')
    with pytest.raises(ValueError, match=r'a\.json: holds a list; expected a JSON object'): read_json(tmp_path/'a.json')


# weights -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path/'w', {'class':'Linear', 'heads':8}, torch.nn.Linear(8, 8).state_dict(), half=True)
    return tmp_path/'w'


def test_every_flipped_bit_of_weights_is_found(folder):
    file = folder/'model.safetensors'
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        file.write_bytes(good[:at]+bytes([good[at]^(1<<at%8)])+good[at+1:])
        with pytest.raises(ValueError, match=r'model\.safetensors: (damaged|cut short)'): load_weights(folder)
    file.write_bytes(good[:100])
    with pytest.raises(ValueError, match='damaged or altered'): load_weights(folder)
    file.write_bytes(good)
    assert load_weights(folder)[0]['heads'] == 8


def test_every_flipped_bit_of_a_config_is_found(folder):
    file = folder/'config.json'
    good = file.read_bytes()
    for at,c in enumerate(good):
        if chr(c).isspace(): continue
        file.write_bytes(good[:at]+bytes([c^1])+good[at+1:])
        with pytest.raises(ValueError, match='config.json|model.safetensors'): load_weights(folder)
        assert b'config_sha256' not in good or file.read_bytes() != good


def test_weights_without_hashes_still_load(folder):
    config = read_json(folder/'config.json')
    (folder/'config.json').write_text(json.dumps({'class':'Linear', 'heads':8}))
    assert load_weights(folder)[0] == {'class':'Linear', 'heads':8, 'sha256':config['sha256']}
    (folder/'model.safetensors').write_bytes(b'12345678')
    with pytest.raises(ValueError, match='model.safetensors: cut short or damaged'): load_weights(folder)
    (folder/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors'): load_weights(folder)
    (folder/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='no config.json'): load_weights(folder)


def test_weights_are_hashed_once_per_process(folder):
    with mock.patch.object(repro, 'file_hash', wraps=repro.file_hash) as counted:
        for _ in range(3): load_weights(folder)
        assert counted.call_count == 1
        with pytest.raises(ValueError, match='expected 000000000000'):
            verified_hash(folder/'model.safetensors', '0'*64)


@root_only
def test_a_missing_permission_is_not_damage(folder):
    for name in ('model.safetensors', 'config.json'):
        (folder/name).chmod(0)
        with pytest.raises(PermissionError, match=name): load_weights(folder)
        (folder/name).chmod(0o644)


def test_an_unreadable_file_is_not_damage(folder):
    denied = mock.patch('builtins.open', side_effect=PermissionError(13, 'Permission denied', 'model.safetensors'))
    with denied, pytest.raises(PermissionError, match='Permission denied'): verified_hash(folder/'model.safetensors')


def test_what_saving_refuses(tmp_path, folder):
    with pytest.raises(ValueError, match='a: not finite in float16'):
        save_weights(tmp_path/'new', {}, {'a':torch.tensor([1e5])}, half=True)
    (folder/'.DS_Store').write_text('')
    save_weights(folder, {}, {'a':torch.ones(1)})
    (folder/'notes.txt').write_text('')
    with pytest.raises(ValueError, match='w: holds notes.txt; expected a new folder'):
        save_weights(folder, {}, {'a':torch.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ['w'] and (folder/'notes.txt').exists()


def test_shipped_weights_carry_their_hashes():
    folders = [p.parent for p in repro.weights_dir().glob('*/model.safetensors')]
    assert len(folders) >= 7
    for p in folders:
        assert read_json(p/'config.json')['sha256'] == repro.file_hash(p/'model.safetensors')
        assert load_weights(p)[1]


def test_shipped_models_are_listed_by_kind():
    assert 'nano-digits' in repro.list_models() and 'digits32' in repro.list_models('teacher')
    assert {'digitsnet', 'cifarnet'} <= set(repro.list_models('classifier'))
    with pytest.raises(ValueError, match="kind 'all': expected one of student, teacher, classifier"):
        repro.list_models('all')


def test_files_of_the_system():
    names = ['.DS_Store', '._0001.png', 'Thumbs.db', '__MACOSX', 'desktop.ini', '0001.png', 'a.json']
    assert [repro.is_system_file(n) for n in names] == [True]*5+[False]*2


def test_state_hash():
    a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    b.load_state_dict(a.state_dict())
    assert state_hash(a.state_dict()) == state_hash(dict(reversed(b.state_dict().items())))
    assert state_hash(a.state_dict()) != state_hash(a.half().state_dict())
    assert state_hash(a.state_dict(), as_float32=True) == state_hash(a.float().state_dict(), as_float32=True)
    assert state_hash(a.state_dict()) != state_hash(a.state_dict(), prefix='Linear')


# locks -------------------------------------------------------------------------------------------------------------

FOREIGN = 'filelock/2\npid=1\nhost=a-machine-that-is-gone\nmode=lease\nduration={}\ntoken=00\n'


def test_a_lock_of_another_host_is_waited_for_by_name_and_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(repro, 'LOCK_EXPIRY_S', 0.6)
    (tmp_path/'lock').write_text(FOREIGN.format(0.6))
    with pytest.raises(TimeoutError, match='run 7: process 1 on a-machine-that-is-gone holds it; expected'):
        with lock(tmp_path/'lock', wait=0.1, message='run 7'): pass
    lines = []
    with lock(tmp_path/'lock', wait=20, log=lines.append): pass
    assert lines == [f'{tmp_path.name}: process 1 on a-machine-that-is-gone holds it; waiting']


@pytest.mark.slow
def test_a_living_owner_keeps_its_lock_past_the_expiry(tmp_path, monkeypatch):
    monkeypatch.setattr(repro, 'LOCK_EXPIRY_S', 2.)
    got = []
    def second():
        try:
            with lock(tmp_path/'lock', wait=3., log=lambda line: None): got.append(True)
        except TimeoutError: got.append(False)
    with lock(tmp_path/'lock'):
        other = threading.Thread(target=second)
        other.start()
        other.join()
    assert got == [False]


def test_threads_take_turns(tmp_path):
    inside, most = [], []
    def work():
        with lock(tmp_path/'lock', log=lambda line: None):
            inside.append(1)
            most.append(len(inside))
            inside.pop()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert most == [1]*4


# surroundings ------------------------------------------------------------------------------------------------------

def test_an_account_without_a_home(tmp_path):
    code = ("import pathlib, sys\n"
            "def none(*a): raise RuntimeError('Could not determine home directory.')\n"
            "pathlib.Path.home = none\n"
            "from ditnano.repro import cache_dir, data_dir, torch_home\n"
            "for f in (cache_dir, data_dir, torch_home):\n"
            "    try: print(f())\n"
            "    except RuntimeError as e: print(e)\n")
    empty = dict(DITNANO_CACHE='', DITNANO_DATA='', TORCH_HOME='', XDG_CACHE_HOME='', HOME='')
    wanted = 'home folder: none; expected {} or HOME to be set'
    expected = [wanted.format(name) for name in ('DITNANO_CACHE', 'DITNANO_CACHE', 'TORCH_HOME')]
    assert python(code, **empty).stdout.splitlines() == expected
    given = empty | dict(DITNANO_CACHE='/c', TORCH_HOME='/t')
    assert python(code, **given).stdout.splitlines() == ['/c', str(Path('/c/data')), '/t']


def test_the_commit_of_a_checkout_that_belongs_to_somebody_else(tmp_path, monkeypatch):
    "GIT_TEST_ASSUME_DIFFERENT_OWNER is how git's own tests make it refuse a folder."
    monkeypatch.delenv('DITNANO_COMMIT', raising=False)
    known = code_version()
    if not known['commit']: pytest.skip('no git checkout')
    monkeypatch.setenv('GIT_TEST_ASSUME_DIFFERENT_OWNER', '1')
    assert code_version() == known


def test_without_git_the_commit_is_given_or_the_reason(monkeypatch):
    monkeypatch.delenv('DITNANO_COMMIT', raising=False)
    monkeypatch.setenv('PATH', '')
    assert code_version()['commit'] is None and 'git' in code_version()['reason']
    monkeypatch.setenv('DITNANO_COMMIT', 'abc')
    assert code_version() | {'version':''} == {'version':'', 'commit':'abc', 'dirty':None}


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), KeyboardInterrupt()], ids=str)
def test_a_folder_that_cannot_be_replaced_stays(error, tmp_path):
    folder, real, failed = tmp_path/'weights', os.rename, []
    folder.mkdir()
    (folder/'model').write_text('old')
    def rename(a, b):
        if Path(b)==folder and not failed:
            failed.append(a)
            raise error
        real(a, b)
    with mock.patch('os.rename', rename), pytest.raises(type(error)), repro.atomic(folder) as tmp:
        tmp.mkdir()
        (tmp/'model').write_text('new')
    assert (folder/'model').read_text()=='old' and [p.name for p in tmp_path.iterdir()]==['weights']
