"""Metrics: equal to torch-fidelity's, honest names, and refusals of everything that would silently give a number."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ditnano import metrics
from ditnano.images import ImageSet, load_images
from ditnano.repro import file_hash, import_guarded, weights_dir

SHIPPED = 'cifar10-jpeg@16'


@pytest.fixture(scope='module')
def halves():
    digits = load_images('digits32')
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(digits)))
    return digits.images[order[::2]][:200], digits.images[order[1::2]][:300]


@pytest.fixture(scope='module')
def digitsnet(): return metrics.get_extractor('digitsnet', 'cpu')


def refused(message, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=message): function(*args, **options)


def blur(x): return F.avg_pool2d(F.pad(x.float(), (2, 2, 2, 2), mode='replicate'), 5, 1).to(torch.uint8)


# images and statistics --------------------------------------------------------------------------------------------

def test_images_of_the_wrong_kind():
    wide = torch.tensor([-1., 7.3]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    refused(r'images float32 in \[-1.0, 7.3\]; expected uint8, or float in \[-1, 1\]', metrics.as_bytes, wide)
    refused(r'are these in \[0, 1\]', metrics.as_bytes, torch.rand(2, 3, 8, 8))
    refused('images int64', metrics.as_bytes, torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    refused(r'expected \(N, 3, height, width\)', metrics.as_bytes, torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    refused('nan', metrics.as_bytes, torch.full((1, 3, 2, 2), float('nan')))


def test_grey_images_are_repeated():
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(metrics.as_bytes(grey), grey.repeat(1, 3, 1, 1))


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('where', ['mean', 'covariance'])
def test_statistics_that_are_not_finite(bad, where):
    mean, cov = np.zeros(3), np.eye(3)
    if where=='mean': mean[1] = bad
    else: cov[1, 1] = bad
    for first, second in (((mean, cov), (np.zeros(3), np.eye(3))), ((np.zeros(3), np.eye(3)), (mean, cov))):
        refused('not finite', metrics.frechet_distance, *first, *second)


@pytest.mark.parametrize('cov', [-np.eye(3), np.diag([1., 1., -.5]), np.array([[1., 2, 0], [2, 1, 0], [0, 0, 1]])])
def test_matrices_that_are_no_covariance(cov):
    for first, second in ((cov, np.eye(3)), (np.eye(3), cov), (np.zeros((3, 3)), cov)):
        refused('expected none below 0', metrics.frechet_distance, np.zeros(3), first, np.zeros(3), second)
    refused('not symmetric', metrics.frechet_distance, np.zeros(2), [[1, .5], [0, 1]], np.zeros(2), np.eye(2))


def test_statistics_of_other_shapes():
    refused('from the same extractor', metrics.frechet_distance, np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    refused('N of 2 or more', metrics.statistics, np.zeros((1, 4)))
    refused('1 of 3 rows are not finite', metrics.statistics, [[0., 1], [2, 3], [float('inf'), 0]])


def test_a_covariance_without_full_rank_is_accepted(halves, digitsnet):
    few = metrics.statistics(digitsnet(halves[0][:20])['features'])
    assert metrics.frechet_distance(*few[:2], *few[:2]) == pytest.approx(0, abs=1e-5)


# parity with torch-fidelity ---------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i]


def test_torch_fidelity_registry_gives_the_same_numbers(halves, digitsnet):
    fidelity = import_guarded('torch_fidelity')
    base = import_guarded('torch_fidelity.feature_extractor_base').FeatureExtractorBase

    class Registered(base):
        "Our classifier as torch-fidelity wants it."
        def __init__(self, name, features_list, **options): super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list(): return 'features', 'logits'

        @staticmethod
        def get_default_feature_layer_for_metric(metric): return 'logits' if metric=='isc' else 'features'

        @staticmethod
        def can_be_compiled(): return False

        def forward(self, x):
            found = dict(zip(('features', 'logits'), digitsnet.forward(x)))
            return tuple(found[name] for name in self.features_list)

    fidelity.register_feature_extractor('digitsnet', Registered)
    a, b = halves
    out = fidelity.calculate_metrics(input1=Images(a), input2=Images(b), feature_extractor='digitsnet', fid=True,
                                     isc=True, kid=True, kid_subset_size=100, isc_splits=5, cuda=False, verbose=False,
                                     save_cpu_ram=True)
    ours, theirs = digitsnet(a), digitsnet(b)
    assert metrics.frechet(a, b, digitsnet) == pytest.approx(out['frechet_inception_distance'], rel=1e-5)
    score = metrics.classifier_score(ours['logits'], 5)
    assert score == pytest.approx((out['inception_score_mean'], out['inception_score_std']), rel=1e-6)
    kernel = metrics.kernel_distance(ours['features'], theirs['features'], size=100)
    wanted = out['kernel_inception_distance_mean'], out['kernel_inception_distance_std']
    assert kernel == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_scores_that_make_no_sense():
    refused('at least one sample a split', metrics.classifier_score, np.zeros((5, 10)))
    refused(r'logits \(9, 10\) and labels \(3,\)', metrics.accuracy, np.zeros((9, 10)), [1, 2, 3])


# extractors -------------------------------------------------------------------------------------------------------

def test_an_extractor_that_is_not_available(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for name in ('inception', 'squeezenet'):
        refused(f"extractor '{name}': no file .* in {tmp_path}", metrics.get_extractor, name, error=FileNotFoundError)
    refused('expected one of digitsnet', metrics.get_extractor, 'vgg')


def test_a_file_with_code_in_it_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = metrics.extractor_file('inception')
    file.parent.mkdir(parents=True)
    torch.save({'x':tmp_path}, file)
    refused('Weights only load failed', metrics.get_extractor, 'inception', error=Exception)


def write_random_inception(file):
    "Random weights of Inception's shapes, in torch-fidelity's own format."
    module = import_guarded('torch_fidelity.feature_extractor_inceptionv3')

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **options): pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'load_state_dict_from_url', lambda *args, **options: {})
        net = Blank('blank', ['2048'])
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.dim()>1: p.copy_(torch.randn(p.shape, generator=g)*(2/p[0].numel())**.5)
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict(), file)


@pytest.mark.slow
def test_inception_with_other_weights_is_no_fid(tmp_path, monkeypatch, halves):
    "All the wiring without the 91 MB of weights: equal to torch-fidelity, and named after the hash."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    file = metrics.extractor_file('inception')
    write_random_inception(file)
    extractor = metrics.get_extractor('inception', 'cpu')
    assert extractor.name == f'inception-{file_hash(file)[:8]}'
    x, y = halves[0][:8], blur(halves[1][:8])
    ours, distance = extractor(x), metrics.frechet(x, y, extractor)
    out = import_guarded('torch_fidelity').calculate_metrics(
        input1=Images(x), input2=Images(y), fid=True, isc=True, isc_splits=2, cuda=False, verbose=False, batch_size=8,
        feature_extractor_weights_path=str(file), cache=False, save_cpu_ram=True)
    assert distance > 1 and distance == pytest.approx(out['frechet_inception_distance'], rel=1e-3)
    assert metrics.classifier_score(ours['logits'], 2)[0] == pytest.approx(out['inception_score_mean'], rel=1e-5)


def test_extractors_that_may_not_be_used():
    digits = load_images('digits32')
    assert metrics.loss_backbone('LPIPS-squeeze@64') == 'squeezenet' and metrics.loss_backbone('L1') is None
    assert metrics.loss_backbone('perceptual-digitslens@32') == 'digitslens'
    metrics.check_extractors(['digitsnet', 'squeezenet'], digits, 'perceptual-digitslens@32')
    check = metrics.check_extractors
    refused("'squeezenet' is the network behind the loss", check, ['squeezenet'], digits, 'LPIPS-squeeze@64')
    refused("'cifarnet' has the classes of cifar10, the reference is digits32", check, ['cifarnet'], digits)


# references -------------------------------------------------------------------------------------------------------

def test_statistics_are_cached_by_content(halves, digitsnet, tmp_path, monkeypatch):
    from dataclasses import replace
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path))
    calls = []
    def forward(x):
        calls.append(len(x))
        return digitsnet.forward(x)
    counting, images = replace(digitsnet, forward=forward), halves[0][:50]
    first = metrics.reference_statistics(images, counting)
    assert np.array_equal(metrics.reference_statistics(images.clone(), counting).cov, first.cov) and sum(calls) == 50
    metrics.reference_statistics(images, replace(counting, weights='f'*64))
    assert sum(calls) == 100
    for file in tmp_path.glob('stats/*'): file.write_bytes(b'PK')
    refused('expected an .npz with arrays mu and sigma', metrics.load_statistics, next(tmp_path.glob('stats/*')))
    assert np.array_equal(metrics.reference_statistics(images, counting).cov, first.cov) and sum(calls) == 150


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A copy of the shipped statistics that a test may damage."
    folder = tmp_path/f'reference-{SHIPPED}'
    shutil.copytree(weights_dir()/f'reference-{SHIPPED}', folder)
    monkeypatch.setattr(metrics, 'weights_dir', lambda: tmp_path)
    return folder


def test_shipped_statistics(shipped):
    reference = metrics.reference_set(SHIPPED)
    assert reference.size == 16 and reference.n > 1000 and set(reference.weights) == set(reference.statistics)
    for stats in reference.statistics.values():
        assert stats.cov.shape == 2*stats.mean.shape and np.array_equal(stats.cov, stats.cov.T)
        assert metrics.frechet_distance(*stats[:2], *stats[:2]) == pytest.approx(0, abs=1e-3)
    refused("split 'dev'; expected one of", metrics.load_reference, SHIPPED, 'dev')
    refused('no shipped statistics', metrics.load_reference, 'cifar11', error=FileNotFoundError)


@pytest.mark.parametrize('damage', ['flipped', 'cut', 'gone', 'config'])
def test_altered_statistics_are_refused(shipped, damage):
    file = shipped/'train.safetensors'
    content = bytearray(file.read_bytes())
    if damage=='flipped': content[-5] ^= 1
    if damage=='cut': content = content[:-8]
    file.write_bytes(content)
    if damage=='gone': file.unlink()
    if damage=='config': (shipped/'config.json').write_text('{"class": ')
    refused(f"reference '{SHIPPED}': .* altered", metrics.load_reference, SHIPPED)


def test_statistics_of_other_weights_or_size_are_refused(digitsnet):
    from dataclasses import replace
    reference = metrics.load_reference(SHIPPED)
    name = next(iter(reference.weights))
    refused("no statistics of extractor 'digitsnet'", reference.of, digitsnet)
    other = replace(digitsnet, name=name, weights='f'*64)
    refused(f"no statistics of extractor '{name}' \\(ffffffff\\)", reference.of, other)
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    message = f"images of 32 pixels, reference '{SHIPPED}' of 16; expected one size"
    refused(message, metrics.evaluate, images, None, reference, ['cifarnet'])
    refused(message, metrics.frechet, images, reference, 'cifarnet')


# small sets and copies --------------------------------------------------------------------------------------------

def add_noise(x):
    g = torch.Generator().manual_seed(0)
    return (x+32*torch.randn(x.shape, generator=g)).round().clamp(0, 255).to(torch.uint8)


def test_the_kernel_distance_has_no_bias(digitsnet, halves):
    "The Frechet distance of the same real images falls with their number; the kernel distance stays around 0."
    a, b = (digitsnet(x)['features'] for x in halves)
    damaged = digitsnet(add_noise(halves[0]))['features']
    stats = metrics.statistics(b)
    frechet = [metrics.frechet_distance(*metrics.statistics(a[:n])[:2], *stats[:2]) for n in (30, 60, 200)]
    assert frechet[0] > 1.5*frechet[1] > 1.5*frechet[2]
    for n in (30, 100, 200):
        same, worse = (metrics.kernel_distance(f[:n], b)[0] for f in (a, damaged))
        assert abs(same) < 0.1 < worse
    refused(r'expected \(N, D\) and \(M, D\)', metrics.kernel_distance, a, b[:, :5])
    refused('not finite', metrics.kernel_distance, a*np.nan, b)


def test_a_small_set_stands_beside_real_images(digitsnet, halves):
    good, bad = (metrics.compare_small_sets(x[:60], halves[1], digitsnet) for x in (halves[0], add_noise(halves[0])))
    assert (good['samples'], good['real']) == (60, 60)
    assert good['FD-digitsnet'] < 2*good['FD-digitsnet (real)'] and abs(good['KD-digitsnet (real)']) < 0.1
    assert bad['FD-digitsnet'] > 2*good['FD-digitsnet (real)'] and bad['KD-digitsnet'] > 0.1 > good['KD-digitsnet']
    stats = metrics.reference_statistics(halves[1], digitsnet)
    refused('reference: statistics; expected images', metrics.compare_small_sets, halves[0], stats, digitsnet)
    assert metrics.metric_label('FID', 50_000) == 'FID'
    assert metrics.metric_label('FD-digitsnet', 400) == 'FD-digitsnet (n=400, mostly bias)'
    assert metrics.metric_label('FD-digitsnet', 5000) == 'FD-digitsnet (n=5,000)'
    assert metrics.metric_label('classifier score (digitsnet)', 400) == 'classifier score (digitsnet) (n=400)'


def test_copies_are_found(digitsnet, halves):
    distances, indices = metrics.nearest_images(halves[1][:10], halves[1], digitsnet, k=2)
    assert indices[:, 0].tolist() == list(range(10)) and distances[:, 0].max() < 1e-2 < distances[:, 1].min()
    sheet = metrics.nearest_sheet(halves[0], halves[1], digitsnet, count=8, k=2)
    assert sheet.size == (12*34-2, 2*34-2)
    refused('k=0; expected 1 to 300', metrics.nearest_images, halves[0], halves[1], digitsnet, k=0)


def test_a_row_for_each_class():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    sheet = np.asarray(metrics.class_sheet(images, [7, 2, 7, 7], per_class=2))
    assert sheet.shape == (18, 18, 3)
    assert [sheet[i, j, 0] for i in (0, 10) for j in (0, 10)] == [1, 255, 0, 2]
    refused('3 labels for 4 images', metrics.class_sheet, images, [1, 2, 3])


# evaluation -------------------------------------------------------------------------------------------------------

def test_evaluate(halves, digitsnet):
    digits = load_images('digits32')
    labels = digits.labels[torch.from_numpy(np.random.default_rng(0).permutation(len(digits)))[::2]][:200]
    numbers = metrics.evaluate(halves[0], labels, digits, ['digitsnet'], loss='perceptual-digitslens@32')
    assert set(numbers) == {'samples', 'FD-digitsnet', 'classifier score (digitsnet)', 'accuracy (digitsnet)'}
    assert numbers['FD-digitsnet'] == pytest.approx(metrics.frechet(halves[0], digits, digitsnet), rel=1e-9)
    shuffled = metrics.evaluate(halves[0], labels.roll(1), digits, 'digitsnet')
    assert numbers['accuracy (digitsnet)'] > 0.9 > 0.3 > shuffled['accuracy (digitsnet)']
    refused('3 labels for 200 images', metrics.evaluate, halves[0], [1, 2, 3], digits, ['digitsnet'])
    refused('8 images in 10 splits', metrics.evaluate, halves[0][:8], None, digits, ['digitsnet'])


def test_blocks_of_one_size():
    found = metrics.aggregate_blocks([{'samples':5, 'b':1., 'a':3.}, {'samples':5, 'b':2., 'a':1.}])
    assert list(found) == ['samples', 'b', 'a'] and found['b'] == {'mean':1.5, 'min':1., 'max':2., 'blocks':2}
    refused('blocks of equal size', metrics.aggregate_blocks, [{'samples':10}, {'samples':20}])


def test_a_card_is_complete(digitsnet, halves):
    digits = load_images('digits32')
    card = metrics.card(30, digits, ['digitsnet'], loss='L1', seed=[0, 29], guidance=1.5)
    assert json.loads(json.dumps(card)) == card and 'lacks rank' in card['notes'][0]
    assert card['reference']['hash'] == digits.hash
    assert card['judges']['digitsnet']['weights'] == file_hash(metrics.extractor_file('digitsnet'))
    assert metrics.card(50_000, metrics.reference_statistics(halves[1], digitsnet), 'digitsnet')['notes'] == []


def test_the_spread_of_a_kernel_distance_is_not_zero():
    draw = np.random.default_rng(0).normal
    mean, spread = metrics.kernel_distance(draw(size=(300,16)), draw(size=(300,16))+.1)
    assert mean>0 and 1e-3<spread<.1


def test_grey_references_refuse_colour():
    images = torch.zeros(8,1,32,32, dtype=torch.uint8)
    grey = ImageSet(images, torch.zeros(8, dtype=torch.long), 'grey', 'train', ('a',), '0'*64)
    with pytest.raises(ValueError, match="images in colour, reference 'grey' in grey; expected both in one"):
        metrics.frechet(torch.randint(256, (8,3,32,32)).byte(), grey, 'digitsnet')
    metrics.frechet(images, grey, 'digitsnet')
