"""Images from every kind of source: what comes out is what was put in, whatever its form, mode and size."""
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from ditnano.images import decode_picture, load_images
from ditnano.interop.pictures import held_out

PHOTOS = load_sample_images().images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))


def picture(k, size=32, form='png', **options):
    f = io.BytesIO()
    Image.fromarray(PHOTOS[k%2][k:k+size, 2*k:2*k+size]).save(f, form, **options)
    return f.getvalue()


def fill(folder, classes=('cat','dog'), each=12, size=32):
    for i,c in enumerate(classes):
        (folder/c).mkdir(parents=True)
        for k in range(each): (folder/c/f'{k:03d}.png').write_bytes(picture(100*i+k, size))
    return folder


def both(source, **how):
    "Train and test together, as {bytes: class name}."
    sets = [load_images(source, s, **how) for s in ('train','test')]
    assert sets[0].classes == sets[1].classes
    return {im.numpy().tobytes():d.classes[y] for d in sets for im,y in zip(d.images, d.labels)}


def test_one_set_in_every_form_is_the_same_pictures(tmp_path):
    folder = fill(tmp_path/'photos')
    want = both(folder)
    assert len(want) == 24 and set(want.values()) == {'cat','dog'}
    with zipfile.ZipFile(tmp_path/'photos.zip', 'w') as z:
        for p in folder.rglob('*.png'): z.write(p, f'anything/{p.relative_to(folder).as_posix()}')
    assert both(tmp_path/'photos.zip') == want
    for k,p in enumerate(sorted(folder.rglob('*.png'))):
        to = tmp_path/'parted'/('train' if k%6 else 'test')/p.parent.name/p.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(p.read_bytes())
    assert both(tmp_path/'parted') == want and len(load_images(tmp_path/'parted')) == 20
    names = sorted(folder.rglob('*.png'))
    labels = [['cat','dog'].index(p.parent.name) for p in names]
    with zipfile.ZipFile(tmp_path/'edm.zip', 'w') as z:
        for k,p in enumerate(names): z.write(p, f'00000/img{k:08d}.png')
        z.writestr('dataset.json', json.dumps({'labels':[[f'00000/img{k:08d}.png', y] for k,y in enumerate(labels)]}))
    assert both(tmp_path/'edm.zip') == {k:str(('cat','dog').index(v)) for k,v in want.items()}
    arrays = np.stack([np.asarray(Image.open(p)) for p in names])
    for name,a in (('last',arrays), ('first',arrays.transpose(0,3,1,2))):
        np.savez(tmp_path/f'{name}.npz', images=a, labels=np.array(labels))
        assert both(tmp_path/f'{name}.npz') == {k:str(('cat','dog').index(v)) for k,v in want.items()}


def test_data_sets_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    folder = fill(tmp_path/'photos')
    names = sorted(folder.rglob('*.png'))
    columns = {'picture':[{'bytes':p.read_bytes(), 'path':None} for p in names],
               'kind':[0 if p.parent.name == 'cat' else 1 for p in names]}
    kinds = datasets.Features({'picture':datasets.Image(), 'kind':datasets.ClassLabel(names=['cat','dog'])})
    data = datasets.Dataset.from_dict(columns, features=kinds)
    data.save_to_disk(tmp_path/'saved')
    data.to_parquet(tmp_path/'one.parquet')
    datasets.DatasetDict(train=data.select(range(3, 24)), test=data.select(range(3))).save_to_disk(tmp_path/'parts')
    want = both(folder)
    for source in ('saved','one.parquet','parts'): assert both(tmp_path/source) == want
    assert len(load_images(tmp_path/'parts', 'test')) == 3
    two = datasets.Dataset.from_dict({'a':columns['picture'], 'b':columns['picture']},
                                     features=datasets.Features({'a':datasets.Image(), 'b':datasets.Image()}))
    two.save_to_disk(tmp_path/'two')
    with pytest.raises(ValueError, match='columns a, b; expected one of pictures'): load_images(tmp_path/'two')


def test_columns_of_a_data_set_are_named(tmp_path):
    datasets = pytest.importorskip('datasets')
    files = [{'bytes':picture(k), 'path':None} for k in range(24)]
    columns = {'left':files, 'right':files[::-1], 'kind':[k%2 for k in range(24)], 'weight':[.5]*24}
    types = datasets.Features({'left':datasets.Image(), 'right':datasets.Image(), 'kind':datasets.Value('int64'),
                               'weight':datasets.Value('float32')})
    file = tmp_path/'two.parquet'
    datasets.Dataset.from_dict(columns, features=types).to_parquet(file)
    left, right = (load_images(file, columns=c) for c in ('left','right'))
    assert left.classes == ('two',) and left.hash != right.hash
    assert load_images(file, columns='left,kind').classes == ('0','1')
    for named, text in (('middle', "column 'middle'; expected one of pictures: left, right"),
                        ('kind', "column 'kind'; expected one of pictures"),
                        ('left,weight', "column 'weight'; expected one of classes: kind")):
        with pytest.raises(ValueError, match=text): load_images(file, columns=named)
    with pytest.raises(ValueError, match="columns 'left' of .*photos: no data set"):
        load_images(fill(tmp_path/'photos'), columns='left')
    with pytest.raises(ValueError, match="columns 'left' of digits32: no data set"):
        load_images('digits32', columns='left')


def test_rows_without_picture_or_class_are_named(tmp_path):
    datasets = pytest.importorskip('datasets')
    files = [{'bytes':picture(k), 'path':None} for k in range(24)]
    types = datasets.Features({'image':datasets.Image(), 'kind':datasets.ClassLabel(names=['cat','dog'])})
    def saved(name, files, kinds):
        datasets.Dataset.from_dict({'image':files, 'kind':kinds}, features=types).to_parquet(tmp_path/name)
        return tmp_path/name
    with pytest.raises(ValueError, match='unlabelled: picture 3 has no class'):
        load_images(saved('unlabelled.parquet', files, [0]*3+[-1]+[1]*20))
    some = [None if k in (5,6,7,8) else f for k,f in enumerate(files)]
    empty = saved('empty.parquet', some, [k%2 for k in range(24)])
    with pytest.raises(ValueError, match=r'no picture in column image; expected one in each row'): load_images(empty)
    assert sum(len(load_images(empty, s, skip_damaged=True)) for s in ('train','test')) == 20


@pytest.mark.parametrize('size', [16, 24, 32, 48, 64])
@pytest.mark.parametrize('shape', [(100,100), (90,140), (333,128), (20,31)])
def test_resizing_equals_torchvision_within_one_level(size, shape):
    from ditnano.repro import import_guarded
    T = import_guarded('torchvision.transforms')
    source = PHOTOS[0][:shape[0],:shape[1]]
    f = io.BytesIO()
    Image.fromarray(source).save(f, 'png')
    ours = torch.from_numpy(decode_picture('x', f.getvalue(), size).copy()).int()
    tensor = torch.from_numpy(source.copy()).permute(2,0,1)
    theirs = T.Compose([T.Resize(size, antialias=True), T.CenterCrop(size)])(tensor).int()
    assert (ours-theirs).abs().max() <= 1 and ours.float().std() > 5


def as_file(im, form='png', **options):
    f = io.BytesIO()
    im.save(f, form, **options)
    return f.getvalue()


def test_every_mode_of_pillow_becomes_eight_bits():
    rgb = Image.fromarray(PHOTOS[1][:64,:64])
    want = np.asarray(rgb).transpose(2,0,1).astype(int)
    def close(data, to=want, within=3): return np.abs(decode_picture('x', data).astype(int)-to).mean() <= within
    assert np.array_equal(decode_picture('x', as_file(rgb)), want)
    grey = np.asarray(rgb.convert('L')).astype(int)
    assert np.array_equal(decode_picture('x', as_file(rgb.convert('L')), channels=1)[0], grey)
    deep = Image.fromarray((grey*257).astype(np.uint16))
    assert np.array_equal(decode_picture('x', as_file(deep))[1], grey)                # 16 bits, not white
    assert np.array_equal(decode_picture('x', as_file(deep, 'tiff'))[1], grey)
    assert close(as_file(rgb.quantize(256)), within=6) and close(as_file(rgb.convert('CMYK'), 'tiff'), within=6)
    assert close(as_file(rgb, 'jpeg', quality=95)) and close(as_file(rgb, 'bmp'), within=0)
    assert close(as_file(rgb, 'webp', lossless=True), within=0)
    clear = rgb.convert('RGBA')
    clear.putalpha(0)
    assert (decode_picture('x', as_file(clear)) == 255).all()                         # nothing but white
    exif = Image.Exif()
    exif[0x0112] = 6   # to be turned by a quarter
    turned = decode_picture('x', as_file(rgb, 'jpeg', quality=98, exif=exif)).astype(int)
    assert np.abs(turned-np.rot90(want, -1, (1,2))).mean() < 3
    frames = [rgb, Image.new('RGB', rgb.size, 'red')]
    assert close(as_file(frames[0], 'gif', save_all=True, append_images=frames[1:]), within=8)   # the first frame


def test_what_systems_leave_behind_is_ignored_and_names_stay(tmp_path):
    folder = fill(tmp_path/'photos', ('猫 と 犬','B'), each=10)
    (folder/'B'/'000.png').rename(folder/'B'/'000.PNG')
    (folder/'B'/'upper.JPG').write_bytes(picture(3, form='jpeg'))
    for junk in ('.DS_Store','B/._000.png','B/Thumbs.db','__MACOSX/B/._1.png','B/.hidden.png'):
        (folder/junk).parent.mkdir(exist_ok=True, parents=True)
        (folder/junk).write_bytes(b'\0\0\0\1Bud1')
    train, test = load_images(folder), load_images(folder, 'test')
    assert len(train)+len(test) == 21 and train.classes == ('B','猫 と 犬') and not train.notes['skipped']
    assert held_out('猫 と 犬/000.png') == held_out('猫 と 犬/000.png')


def test_flat_folder_grey_and_sizes(tmp_path):
    folder = tmp_path/'flat'
    folder.mkdir()
    for k in range(14): (folder/f'{k}.png').write_bytes(picture(k, 20+2*k))
    data = load_images(folder, size=16, channels=1)
    assert data.images.shape[1:] == (1,16,16) and data.classes == ('flat',) and data.name == 'flat@16-grey'
    assert load_images(folder).images.shape[1:] == (3,20,20) and data.hash != load_images(folder, size=16).hash
    digits = load_images('digits32', channels=1)
    assert digits.images.shape[1] == 1 and torch.equal(digits.images[:,0], load_images('digits32').images[:,0])


def test_one_class_and_a_thousand(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2000,16,16,3), np.uint8)
    np.savez(tmp_path/'many.npz', images=images, labels=np.arange(2000)%1000)
    assert len(load_images(tmp_path/'many.npz').classes) == 1000
    np.savez(tmp_path/'more.npz', images=images, labels=np.arange(2000)%1001)
    with pytest.raises(ValueError, match='1,001 classes; expected at most 1,000'): load_images(tmp_path/'more.npz')


def test_damaged_pictures_are_skipped_counted_and_listed_on_request(tmp_path):
    folder = fill(tmp_path/'photos', each=20)
    for k in (3, 4): (folder/'cat'/f'{k:03d}.png').write_bytes(picture(k)[:300])
    (folder/'dog'/'copy.png').write_bytes((folder/'dog'/'001.png').read_bytes())
    (folder/'dog'/'copy 2.png').write_bytes((folder/'dog'/'001.png').read_bytes())
    lines = []
    sets = [load_images(folder, s, skip_damaged=True, log=lines.append) for s in ('train','test')]
    assert sum(len(d.notes['skipped']) for d in sets) == 2 and sum(map(len, sets)) == 40
    assert sum(d.notes['duplicates'] for d in sets) >= 1
    assert any('cat/003.png: not a readable picture' in x for x in lines) and any('2 classes of' in x for x in lines)


def test_a_flipped_bit_in_the_cache_is_noticed(tmp_path):
    folder = fill(tmp_path/'photos')
    load_images(folder)
    [file] = (tmp_path/'cache'/'images').glob('pictures-*')
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match='damaged cache .its content is not that of its hash.; delete it'):
        load_images(folder)


def test_two_folders_alike_in_names_sizes_and_times(tmp_path):
    for name in ('cats','dogs'):
        for k in range(12):
            file = tmp_path/name/'a'/f'{k:03d}.bmp'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(k+50*(name=='dogs'), form='bmp'))
            os.utime(file, (1e9, 1e9))
    cats, dogs = (load_images(tmp_path/name) for name in ('cats','dogs'))
    assert (cats.name, dogs.name)==('cats@32', 'dogs@32') and cats.hash!=dogs.hash
    for file in (tmp_path/'cats'/'a').iterdir():   # other content under the same names, sizes and times
        file.write_bytes((tmp_path/'dogs'/'a'/file.name).read_bytes())
        os.utime(file, (1e9, 1e9))
    assert torch.equal(load_images(tmp_path/'cats').images, dogs.images)


def test_transparent_arrays_lie_on_white(tmp_path):
    np.savez(tmp_path/'x.npz', images=np.zeros((12,32,32,4), np.uint8), labels=np.zeros(12, int))
    assert load_images(tmp_path/'x.npz').images.float().mean()==255
