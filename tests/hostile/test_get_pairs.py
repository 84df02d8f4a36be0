"""Folders of GET's pairs that are damaged, exchanged, of another kind or harmful: one line each, nothing runs."""
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from ditnano.interop.get_pairs import GETPairs, import_get_pairs
from ditnano.pairs import PairDataset, ensure_pairs, find_imported_pairs, read_manifest, teacher_record
from ditnano.repro import noise_and_labels

MIDDLE = '000000099.pkl'


def write_get(folder, sizes=(50,50,50), conditional=True, seed=0, **change):
    "Chunks as GET writes them; `change` replaces what a name ('latent' or 'image') holds in the middle chunk."
    g, last, made = torch.Generator().manual_seed(1000+seed), -1, []
    for side in ('latent','image'): (folder/side).mkdir(parents=True)
    for k,n in enumerate(sizes):
        z, y = torch.randn(n,3,32,32, generator=g), torch.randint(10, (n,), generator=g)
        x = F.interpolate(z[:,:,::8,::8], size=32, mode='bilinear').mul(0.45)
        last += n
        held = {'latent':[z, F.one_hot(y,10).float()] if conditional else z, 'image':x if conditional else x.double()}
        for side,what in held.items():
            torch.save(change[side](what) if k == 1 and side in change else what, folder/side/f'{last:09d}.pkl')
        made.append((z, x, y))
    return tuple(torch.cat(t) for t in zip(*made))


def with_(t, at, value):
    t = t.clone()
    t[at] = value
    return t


def exchange(folder):
    for a,b in (('latent','other'), ('image','latent'), ('other','image')): (folder/a).rename(folder/b)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def name_no_text(path):
    "The last byte of the last name in the zip's directory is no UTF-8."
    data = bytearray(path.read_bytes())
    data[data.rindex(b'version')] ^= 128
    path.write_bytes(data)


class Hostile:
    def __reduce__(self): return os.mkdir, ('canary',)


def nothing(folder): pass


REFUSED = [
    ('latent/000000099.pkl: noise is a dict', dict(latent=lambda v: [{}, v[1]]), nothing),
    ('000000099.pkl is in latent alone', {}, lambda f: (f/'image'/MIDDLE).unlink()),
    ('7a.pkl; expected files named by a number', {},
     lambda f: [(f/s/MIDDLE).rename(f/s/'7a.pkl') for s in ('latent','image')]),
    ("no folder 'image'", {}, lambda f: (f/'image').rename(f/'images')),
    ('noise (50, 3, 32, 32), images (49, 3, 32, 32)', dict(image=lambda x: x[:49].clone()), nothing),
    ('expected 4 dimensions of torch.float32', dict(latent=lambda v: [v[0].double(), v[1]]), nothing),
    ('differs from 000000049.pkl', dict(latent=lambda v: v[0]), nothing),
    ('does not hold as much', dict(image=lambda x: x[:1,:1,:1,:1].clone().expand(50,3,32,32)), nothing),
    ('does not hold as much', dict(image=lambda x: x.to('meta')), nothing),
    ('latent/000000099.pkl: label row 7 is', dict(latent=lambda v: [v[0], with_(v[1], (7,3), 0.5)]), nothing),
    ('label row 0 is', dict(latent=lambda v: [v[0], v[1]*0]), nothing),
    ('an image is not finite in row 3', dict(image=lambda x: with_(x, (3,0,0,0), torch.nan)), nothing),
    ('values lie beyond 1.5', dict(image=lambda x: x*127.5+128), nothing),
    ('the two folders seem to be exchanged', {}, exchange),
    ('noise is (50, 3, 32, 32) torch.float64', dict(conditional=False), exchange),
    ('are latent and image exchanged?', dict(latent=lambda v: [v[0]*0.5, v[1]]), nothing),
    ('fails its checksum', {}, lambda f: flip(f/'latent'/MIDDLE)),
    ('image/000000099.pkl: ', {}, lambda f: name_no_text(f/'image'/MIDDLE)),
    *[('image/000000099.pkl: damaged, cut short', {}, lambda f, n=n: os.truncate(f/'image'/MIDDLE, n))
      for n in (0, 10, 1000, 300_000)],
    ('latent/000000099.pkl: names ', dict(latent=lambda v: [v[0], Hostile()]), nothing),
    ('image/000000099.pkl: names ', dict(image=lambda x: Hostile()), nothing),
    ('image/000000099.pkl: ', {}, lambda f: (f/'image'/MIDDLE).write_bytes(pickle.dumps(Hostile()))),
]


@pytest.mark.parametrize('k', range(len(REFUSED)))
def test_refused_in_one_line(k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, how, after = REFUSED[k]
    write_get(tmp_path/'published', **how)
    after(tmp_path/'published')
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        import_get_pairs(tmp_path/'published', tmp_path/'out')
    assert text in str(caught.value) and '\n' not in str(caught.value)
    assert not (tmp_path/'canary').exists() and not (tmp_path/'out').exists()


def test_imported_bit_for_bit_and_found_by_name(tmp_path, monkeypatch):
    z, x, y = write_get(tmp_path/'published')
    get = PairDataset(import_get_pairs(tmp_path/'published', tmp_path/'get', shard=40), check='hash')
    assert all(torch.equal(a, b) for a,b in zip(get.batch(range(150)), (z, x, y)))
    assert x.std() > 0.1 and (noise_and_labels([0])[0][0]-get[0][0]).abs().max() > 1
    again = import_get_pairs(tmp_path/'published', tmp_path/'recut', shard=150, teacher='by another name')
    assert PairDataset(again).hash == get.hash
    write_get(tmp_path/'published1', seed=1)
    with pytest.raises(ValueError, match='made with teacher='):
        import_get_pairs(tmp_path/'published1', tmp_path/'get', shard=40)
    monkeypatch.setenv('DITNANO_DATA', str(tmp_path))
    assert ensure_pairs('get', 150) == tmp_path/'get'
    assert teacher_record('get') == {'name':'get',
                                     'sha256':read_manifest(tmp_path/'get')['recipe']['teacher']['sha256']}
    with pytest.raises(ValueError, match='get: 150 imported pairs, 151 asked for'): ensure_pairs('get', 151)
    assert find_imported_pairs('digits32') is None


def test_unlabelled_pairs_have_no_classes(tmp_path):
    z, x, _ = write_get(tmp_path/'published', conditional=False)
    pairs = PairDataset(import_get_pairs(tmp_path/'published', tmp_path/'get'))
    assert pairs.recipe['classes'] == 0
    assert all(torch.equal(a, b) for a,b in zip(pairs.batch(range(150)), (z, x, torch.zeros(150, dtype=torch.int64))))


def test_a_late_error_leaves_the_shards_before_it(tmp_path):
    write_get(tmp_path/'published', sizes=(50,100), image=lambda x: with_(x, (90,0,0,0), torch.inf))
    late = GETPairs(tmp_path/'published')
    assert len(torch.cat([x for _,x,_ in late.parts(0, 140)])) == 140
    with pytest.raises(ValueError, match='000000149.pkl, rows 70-99: an image is not finite in row 20'):
        late.parts(120, 150)
    with pytest.raises(ValueError, match='not finite in row'): import_get_pairs(tmp_path/'published', tmp_path/'out',
                                                                                shard=60)
    assert [s['seeds'] for s in read_manifest(tmp_path/'out')['shards']] == [[0,60],[60,120]]
