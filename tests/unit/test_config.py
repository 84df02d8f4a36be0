"Every field of a configuration is checked by name, and a scale file is read whole or not at all."
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditnano.config import SMOKE, DiTConfig, GETConfig, Scale, TrainConfig, UNetConfig, load_scale, scale_names
from ditnano.repro import repo_root

BAD = [  # settings, what the error names
    (Scale, dict(lr='1e-3'), r"Scale: lr='1e-3'; expected a finite number \(YAML needs the point in 1.0e-3\)"),
    (Scale, dict(guidance='1,5'), "guidance='1,5'; expected a finite number"),
    (Scale, dict(lr=float('nan')), 'lr=nan; expected a finite number'), (Scale, dict(lr=True), 'lr=True'),
    (Scale, dict(lr=0), 'lr=0; expected more than 0'), (Scale, dict(ema=1), 'ema=1'),
    (Scale, dict(warmup=-1), 'warmup'),
    (Scale, dict(seeds=0), 'seeds=0; expected a list of whole numbers'), (Scale, dict(seeds=['a']), 'seeds'),
    (Scale, dict(seeds=[]), 'seeds'), (Scale, dict(seeds=[2**32]), 'seed=4294967296; expected 0..4294967295'),
    (Scale, dict(experiments=['x']), 'experiments'),
    (Scale, dict(experiments=None), 'experiments=None; expected a mapping'),
    (Scale, dict(experiments={'mi1':[1]}), r"experiments\['mi1'\]=\[1\]; expected a mapping of parameters"),
    (Scale, dict(name=7), 'name=7; expected text'), (Scale, dict(data=16), 'data=16; expected text'),
    (Scale, dict(data='cifar10@big'), "data='cifar10@big'; expected a size"), (Scale, dict(anneal='yes'), 'anneal'),
    (Scale, dict(judges='digitsnet'), "judges='digitsnet'; expected a list of names"),
    (Scale, dict(judges=['digitslens']), 'expected one that no loss used'), (Scale, dict(blocks=0), 'blocks=0'),
    (Scale, dict(references=['validation']), "references=.*expected 'train', 'test' or both"),
    (Scale, dict(references=['train', 'train']), 'references'), (Scale, dict(references=[]), 'references'),
    (Scale, dict(precision='fp8'), "precision='fp8'"), (Scale, dict(imagse=1), "unknown key 'imagse'"),
    (Scale, [1], 'expected a mapping of settings'), (Scale, {1:2}, "unknown key '1'"),
    (TrainConfig, dict(seed=-1), 'seed=-1; expected 0..4294967295'), (TrainConfig, dict(lr='0.1'), 'lr'),
    (TrainConfig, dict(precision='fp8'), "precision='fp8'"), (TrainConfig, dict(warmup=-5), 'warmup=-5'),
    (DiTConfig, dict(depth=0, width=64), 'depth=0'),
    (DiTConfig, dict(depth=3, width=64, heads=[4, 8]), '2 head counts'),
    (DiTConfig, dict(depth=3, width=30), 'multiple of 4'), (DiTConfig, dict(depth=5, wdith=64), "unknown key 'wdith'"),
    (DiTConfig, dict(depth=2, width=64, mlp_ratio='4'), "mlp_ratio='4'"),
    (DiTConfig, dict(depth=2, width=64, patch=3), 'patch=3'),
    (GETConfig, dict(heads=3), 'heads=3 does not divide width=256'), (GETConfig, dict(classes=-1), 'classes=-1'),
    (GETConfig, dict(patch=5), 'patch=5'), (GETConfig, dict(channels=0), 'channels=0'),
    (UNetConfig, dict(channel_mult=[]), 'channel_mult'), (UNetConfig, dict(channel_mult=3), 'channel_mult=3'),
    (UNetConfig, dict(dropout=1), 'dropout'), (UNetConfig, dict(label_dim=-1), 'label_dim=-1'),
]


@pytest.mark.parametrize('cls, values, text', BAD)
def test_a_wrong_field_is_named(cls, values, text):
    with pytest.raises(ValueError, match=text) as e: cls.from_dict(values)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('content, text', [
    ('', 'mine.yaml: empty; expected a mapping'), ('# nothing\n', 'mine.yaml: empty'), ('- a\n', 'mine.yaml: holds'),
    ('name: [', 'mine.yaml: line 1'), ('name: x\n', "mine.yaml: no 'experiments'"), ('\x00', 'mine.yaml'),
    ('experiments: {}\n', "mine.yaml: no 'name'"), ('name: x\nexperiments:\n', 'mine.yaml: Scale: experiments=None'),
    ('name: x\nlr: 1e-3\nexperiments: {}\n', "mine.yaml: Scale: lr='1e-3'"), (b'\xff\xfe\x00', 'mine.yaml')])
def test_a_wrong_scale_file_is_one_line(tmp_path, content, text):
    path = tmp_path/'mine.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=text) as e: load_scale(path)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', scale_names())
def test_no_beginning_of_a_scale_file_is_smoke(tmp_path, name):
    whole = (repo_root()/'nbs'/'scales'/f'{name}.yaml').read_text()
    last = whole.index('\nexperiments:')+len('\nexperiments:')
    for end in range(0, last, 5):
        (tmp_path/'cut.yaml').write_text(whole[:end])
        with pytest.raises(ValueError): load_scale(tmp_path/'cut.yaml')


def test_committed_scales_load_and_smoke_needs_no_file():
    assert load_scale('smoke') is SMOKE
    for name in scale_names():
        scale = load_scale(name)
        assert scale.name and Scale.from_dict(scale.to_dict()) == scale
    with pytest.raises(FileNotFoundError, match="scale 'huge': no file huge.yaml; expected one of"): load_scale('huge')


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()/'any.yaml'
    path.write_bytes(content)
    with pytest.raises(ValueError) as e: load_scale(path)
    assert '\n' not in str(e.value)
