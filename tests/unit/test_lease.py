"Packs, the plan of a lease, and how its time is shared; no training."
import io
import tarfile
from dataclasses import replace

import pytest

from ditnano.config import load_scale
from ditnano.lab.artefacts import TRAINING_RECIPES
from ditnano.lab.lease import (
    Schedule,
    SimulatedClock,
    plan_lease,
    run_lease,
    teacher_images,
)
from ditnano.lab.packs import PACK_FORMAT, Packs, pack_bytes, parse_size, read_pack, take_packs

RUN = 'runs/distill-0123456789ab'
RECIPE = TRAINING_RECIPES['teacher-cifar10-7m'].train


def plain_tar(path, *members):
    "A tar file with these members: (name, bytes) or a TarInfo."
    with tarfile.open(path, 'w') as tar:
        for m in members:
            info, data = (m, b'') if isinstance(m, tarfile.TarInfo) else (tarfile.TarInfo(m[0]), m[1])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize('minutes', [4, 9, 14])
def test_plan_ends_in_time(minutes):
    rows = plan_lease(load_scale('lease'), minutes, teacher=False)
    assert rows[0]['what'] == 'preflight' and rows[-1]['end'] <= 60*minutes
    assert all(a['end'] <= b['start']+1e-9 for a, b in zip(rows, rows[1:], strict=False))


def test_more_minutes_finish_more_runs():
    plans = [plan_lease(load_scale('lease'), m, teacher=False) for m in (6, 9, 14)]
    done = [sum(r['what'].startswith(('DiT', 'GET')) for r in rows) for rows in plans]
    assert done == sorted(done) and done[0] < done[2] and done[1] >= 3


def test_plan_of_a_slow_machine_stops_in_the_first_minute():
    with pytest.raises(ValueError, match='720 images/s here .* expected 256,000 or more, as in'):
        plan_lease(load_scale('lease'), 9, speed=0.1, teacher=False)


def test_slow_machine_with_time_finishes_its_teacher():
    rows = plan_lease(load_scale('lease'), 16, speed=0.1, teacher=False)
    teacher = next(r for r in rows if r['what'].startswith('teacher'))
    assert teacher['end'] < 60*16 and rows[-1]['end'] <= 60*16*1.05


@pytest.mark.parametrize('rate', [1000, 5000, 1e6])
def test_teacher_images_fit(rate):
    images = teacher_images(RECIPE, rate, 540, 500)
    assert images % RECIPE.batch == 0 and images/rate <= 0.65*540 and images <= RECIPE.images


def test_packs_are_filled_first_to_last(tmp_path):
    packs = Packs(tmp_path, 60_000, 2)
    places = [packs.add({f'{RUN[:-1]}{i}/result.json': bytes([i])*20_000}, {}) for i in range(6)]
    assert places == ['pack-0.tar']*2+['pack-1.tar']*2+['', '']
    assert all(p.stat().st_size <= 60_000 for p in packs.paths())
    held = [name for p in packs.paths() for name in read_pack(p)[0]]
    assert held == [f'{RUN[:-1]}{i}/result.json' for i in range(4)]


def test_packs_that_would_not_come_back_are_named(tmp_path):
    big = Packs(tmp_path, 110_000, 3)
    for i in range(6): big.add({f'{RUN[:-1]}{i}/result.json': bytes([i])*40_000}, {})
    assert big.names() == {f'{RUN[5:-1]}{i}' for i in range(6)}
    with pytest.raises(ValueError, match='pack-2.tar: one too many; expected 2 packs'):
        Packs(tmp_path, 110_000, 2).names()
    with pytest.raises(ValueError, match='pack-0.tar: .* bytes; expected 60,000 at most, or another folder'):
        Packs(tmp_path, 60_000, 3).names()


@pytest.mark.parametrize('name', ['../escape.json', '/etc/passwd', 'runs/../../x.json', f'{RUN}/../../x.json',
                                  'runs\\x\\y.json', f'{RUN}/.hidden', 'teachers/../a/b', f'{RUN}/a/b/c.json',
                                  'C:/x.json', 'weights/config.json'])
def test_members_that_leave_their_folder_are_named(tmp_path, name):
    (tmp_path/'pack-0.tar').write_bytes(pack_bytes({name: b'{}'}, {}))
    with pytest.raises(ValueError, match='pack-0.tar: member .*expected plain files'):
        take_packs(tmp_path, tmp_path/'runs', tmp_path/'weights')
    assert not (tmp_path/'runs').exists() and not (tmp_path/'weights').exists()


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_plain_files(tmp_path, kind):
    info = tarfile.TarInfo(f'{RUN}/result.json')
    info.type, info.linkname = kind, '/etc/passwd'
    with pytest.raises(ValueError, match='expected plain files'):
        read_pack(plain_tar(tmp_path/'pack-0.tar', info))


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match='no readable manifest.json'):
        read_pack(plain_tar(tmp_path/'a.tar', (f'{RUN}/result.json', b'{}')))
    with pytest.raises(ValueError, match=f"b.tar: of format None; expected '{PACK_FORMAT}'"):
        read_pack(plain_tar(tmp_path/'b.tar', ('manifest.json', b'{}')))
    with pytest.raises(ValueError, match="d.tar: of format 'ditnano-pack-2'; expected 'ditnano-pack-1'"):
        read_pack(plain_tar(tmp_path/'d.tar', ('manifest.json', b'{"format": "ditnano-pack-2"}')))
    for text in (b'[1]', b'"text"', b'{"format": "ditnano-pack-1"}', b'{"format": ["a"]}', b'\xff'):
        with pytest.raises(ValueError, match='e.tar: .*expected'):
            read_pack(plain_tar(tmp_path/'e.tar', ('manifest.json', text)))
    (tmp_path/'c.tar').write_bytes(b'not a tar file'*100)
    with pytest.raises(ValueError, match='not a whole tar file'):
        read_pack(tmp_path/'c.tar')
    with pytest.raises(FileNotFoundError, match='no packs'):
        take_packs(tmp_path/'nowhere', tmp_path/'runs', tmp_path/'weights')


def test_every_damaged_byte_is_noticed(tmp_path):
    members = {f'{RUN}/result.json': b'{"a": 1}', f'{RUN}/student/model.safetensors': bytes(range(256))*4}
    whole = pack_bytes(members, {'scale': 'lease', 'rates': {'flops': {64: 1e12, 128: 2e12}}})
    for at in [*range(600, len(whole), 97)]:
        changed = bytearray(whole)
        changed[at] ^= 1
        (tmp_path/'p.tar').write_bytes(changed)
        try: found = read_pack(tmp_path/'p.tar')[0]
        except ValueError: continue
        assert found == members   # a byte of the padding, or of a date


@pytest.mark.parametrize('part', [0.1, 0.4, 0.7, 0.85])
def test_cut_pack_is_refused(tmp_path, part):
    whole = pack_bytes({f'{RUN}/a.json': bytes(30_000), f'{RUN}/b.json': bytes(30_000)}, {})
    (tmp_path/'p.tar').write_bytes(whole[:int(part*len(whole))])
    with pytest.raises(ValueError, match='p.tar'):
        read_pack(tmp_path/'p.tar')


@pytest.mark.parametrize('text,size', [('16MB', 16_000_000), ('500kB', 500_000), ('1MiB', 1 << 20), ('20000', 20_000)])
def test_sizes(text, size): assert parse_size(text) == size


@pytest.mark.parametrize('text', ['', '16 mb', 'MB', '-1', '1.5MB', '16GB'])
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match='expected such as 16MB'): parse_size(text)


def test_schedule_by_a_clock():
    clock = SimulatedClock()
    s = Schedule(10, clock, lambda line: None)
    s.step('first', lambda: clock.sleep(4))
    assert (s.spent(), s.left()) == (4, 6) and s.rows == [{'what': 'first', 'start': 0, 'end': 4, 'note': ''}]
    with pytest.raises(ValueError, match='expected more than 0'): run_lease(None, 0, clock)


def test_scale_lease_says_what_the_plan_assumes():
    s = load_scale('lease')
    assert (s.data, s.teacher, s.images//s.batch, s.pairs) == ('cifar10', 'cifar10-7m', 5000, 50_000)
    assert s.precision == 'bf16'
    assert s.anneal and s.warmup and s.judges == ('cifarnet', 'efficientnet-lite0') and s.pairs_precision == 'bf16'
    with pytest.raises(ValueError, match='pairs_precision'): replace(s, pairs_precision='fp8')


def test_a_run_that_trains_its_assistant_does_not_slow_the_plan():
    clock, done = SimulatedClock(), []

    class Work:
        notes = {}
        def __getattr__(self, name): return lambda *_: None
        def has_teacher(self): return True
        def pairs_seconds(self): return 0
        def todo(self):
            student = {'depth':1, 'width':64, 'heads':8}
            return [{'student':student, 'recipe':'ta', 'options':{}, 'loss':{'name':'L1'}}]*3
        def expected_seconds(self, config): return 60. if done else 300.   # with the assistant's, while there is none
        def run(self, config, left):
            clock.sleep(self.expected_seconds(config))
            done.append(config)

    work = Work()
    run_lease(work, 9, clock, log=lambda line: None)
    assert len(done)==3 and work.notes['ratio']==pytest.approx(1)
