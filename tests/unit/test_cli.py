"The command: values that people type, help texts, signals, and what `design` may need."
import inspect
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditnano import cli
from ditnano.dit import shipped_students


def python(program, *words, **options):
    command = [sys.executable, '-c', textwrap.dedent(program), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize('parse', [cli.parse_design, cli.parse_seeds])
@given(text=st.text(max_size=20))
def test_a_parser_returns_or_names_the_value(parse, text):
    try: parse(text)
    except ValueError as e: assert repr(text) in str(e) and '; expected ' in str(e)


@given(st.integers(0, 2**40), st.integers(0, 1000))
def test_seeds(first, more):
    assert cli.parse_seeds(f'{first}-{first+more}') == range(first, first+more+1)


def test_designs():
    assert cli.parse_design('5,64,8') == (5, 64, 8)
    assert cli.parse_design('3,32,2-4-4') == (3, 32, (2, 4, 4))


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_every_option_has_a_help_text(name):
    command = cli.with_help(cli.COMMANDS[name])
    assert f'Example: ditnano {name}' in command.__doc__
    for p in inspect.signature(command).parameters:
        if p in ('recipe', 'config'): continue
        texts = [getattr(m, 'help', None) for m in typing.get_args(command.__annotations__[p])[1:]]
        assert any(texts), f'{name}: --{p} has no help text'


@pytest.mark.parametrize('recipe', cli.RECIPE_OPTIONS)
def test_options_of_recipes_are_those_of_the_recipes(recipe, capsys):
    from ditnano.distill.recipes import EXTRA_MODEL, recipe_defaults
    extra = {EXTRA_MODEL[recipe]} if recipe in EXTRA_MODEL else set()
    fields = cli.RECIPE_OPTIONS[recipe].__dataclass_fields__
    mine = {('clip' if k == 'fake_clip' else k): f.default for k, f in fields.items() if k not in extra}
    assert mine == recipe_defaults(recipe)
    with pytest.raises(SystemExit): cli.main(['train', recipe, '--help'])
    said = capsys.readouterr().out
    assert all(f"--{k.replace('_', '-')}" in said for k in fields) and '--student' in said and '--images' in said


@pytest.mark.parametrize('module', ['ditnano', 'ditnano.cli'])
def test_version_by_module(module):
    import ditnano
    done = subprocess.run([sys.executable, '-m', module, '--version'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f'ditnano {ditnano.__version__}\n')


def test_design_needs_neither_torch_nor_fcntl():
    done = python('''
        import sys
        class Missing:
            def find_spec(self, name, *_):
                if name in ('torch', 'fcntl', 'pandas', 'matplotlib'): raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Missing())
        from ditnano.cli import main
        main(['design', '--max-params', '425k'])
        main(['--help'])
    ''')
    assert done.returncode == 0 and '421,068' in done.stdout and 'doctor' in done.stdout, done.stderr


MISTAKES = [('design', '--max-params', '1000'), ('design', '--max-params', 'many'), ('sample', '--seeds', 'nine'),
            ('train', '--student', '5,64,7', '--out', 'nowhere'), ('train', '--student', '5,64', '--out', 'nowhere'),
            ('train', 'mi1', '--layers', '3', '4', '--loss', 'L2', '--out', 'nowhere'),
            ('train', 'ta', '--assistant', 'nobody', '--loss', 'L2', '--out', 'nowhere'),
            ('train', 'get-model', '--steps', '2', '--out', 'nowhere'), ('sample', '--weights', 'nano-6m'),
            ('paper', '--scale', 'huge', '--dry-run'), ('paper', '--only', 'figure_99'), ('sweep', 'nothing'),
            ('pairs', '--teacher', 'nobody'), ('pairs', '--import-get', 'nowhere'), ('build', 'nano-9m'),
            ('export', '--weights', 'nano-6m'), ('export', '--format', 'web', '--quality', '9'),
            ('export', '--format', 'web', '--precision', 'int8'), ('export', '--array'), ('export', '--jetpack5'),
            ('export', '--target', 'host'), ('export', '--quality', '9', '--extractor', 'digitslens'),
            ('sweep', '--slurm', 'partition=gpu'), ('bench', 'record', '--backends', 'native')]


@pytest.mark.parametrize('words', MISTAKES, ids=' '.join)
def test_a_mistake_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left: cli.main(list(words))
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(said) == 1 and said[0].startswith('ditnano: ')
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_checked(tmp_path, capsys):
    from ditnano.repro import weights_dir
    folder = tmp_path/'pairs'
    shutil.copytree(weights_dir()/'pairs-digits32', folder)
    cli.main(['pairs', '--check', '--out', str(folder)])
    assert capsys.readouterr().out.endswith(': undamaged\n')
    shard = next(folder.glob('*.safetensors'))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit): cli.main(['pairs', '--check', '--out', str(folder)])
    assert f'{shard.name}: damaged or altered' in capsys.readouterr().err


def test_eval_reads_a_folder_of_pictures(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from ditnano.images import load_images
    monkeypatch.setenv('DITNANO_CACHE', str(tmp_path/'cache'))
    (tmp_path/'own').mkdir()
    for k, image in enumerate(load_images('digits32').images[:40]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path/'own'/f'{k}.png')
    (tmp_path/'own'/'broken.png').write_bytes(b'no picture')
    words = ['eval', '--data', str(tmp_path/'own'), '--size', '32', '--channels', '1', '--samples', '20',
             '--device', 'cpu']
    with pytest.raises(SystemExit): cli.main(words)
    assert 'broken.png' in capsys.readouterr().err
    with pytest.raises(SystemExit): cli.main([*words, '--skip-damaged'])   # read, grey; but not digitsnet's classes
    said = capsys.readouterr()
    assert 'skipped broken.png' in said.out and 'the reference is own@32-grey' in said.err


WAITING = '''
    import time
    from ditnano import cli
    def doctor():
        """Wait."""
        print('ready', flush=True)
        time.sleep(600)
    cli.COMMANDS['doctor'] = doctor
    cli.main(['doctor'])
'''


@pytest.mark.skipif(os.name == 'nt', reason='Windows ends a process without a signal')
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_end_with_one_line(number):
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(WAITING)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128+number
    assert said == 'ditnano: stopped; what was finished is kept, and the same command resumes\n'


def test_an_error_stands_below_a_progress_bar():
    done = python('''
        from tqdm import tqdm
        from ditnano import cli
        def doctor():
            """Fail."""
            bar = tqdm(total=2)
            bar.update(1)
            raise ValueError('a value; expected another')
        cli.COMMANDS['doctor'] = doctor
        cli.main(['doctor'])
    ''')
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == 'ditnano: a value; expected another'


def test_executors_are_those_of_sweep():
    from ditnano.lab.sweep import EXECUTORS
    words = typing.get_args(typing.get_type_hints(cli.sweep)['executor'])
    assert set(words) == {'auto', *EXECUTORS}


def test_a_student_has_the_size_of_its_pairs(tmp_path, capsys):
    from ditnano.dit import DiT
    pairs, out = tmp_path/'pairs', tmp_path/'run'
    cli.main(['pairs', '--teacher', 'cifar16', '--seeds', '0-7', '--steps', '8', '--out', str(pairs)])
    command = ['train', '--student', '1,16,2', '--pairs', str(pairs), '--loss', 'L2', '--images', '16', '--batch', '8']
    cli.main([*command, '--patch', '4', '--out', str(out)])
    cfg = DiT.from_pretrained(out/'student').cfg
    assert (cfg.image_size, cfg.channels, cfg.classes, cfg.patch) == (16, 3, 10, 4)
    with pytest.raises(SystemExit): cli.main([*command, '--patch', '5', '--out', str(tmp_path/'bad')])
    assert 'patch' in capsys.readouterr().err and not (tmp_path/'bad').exists()


def test_a_student_is_compared_with_the_images_of_its_teacher(capsys):
    if 'nano-cifar16' not in shipped_students(): pytest.skip('nano-cifar16 is not in this package')
    cli.main(['eval', '--weights', 'nano-cifar16', '--samples', '20'])
    said = capsys.readouterr().out
    assert 'FD-cifarnet' in said and 'reference: cifar10-jpeg@16' in said


def test_a_file_is_compared_with_the_images_of_its_student(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(['export', '--weights', 'nano-cifar16', '--quality', '20'])
    said = capsys.readouterr().out
    assert 'FD-cifarnet' in said and 'digitsnet' not in said


def test_rows_of_get_models_fit_no_law_of_students(tmp_path, capsys):
    rows = [f'DiT,{d},{w},{h},{20*d+w}' for d, w, h in ((1,128,8), (2,96,8), (5,64,4), (5,64,8), (9,48,6), (7,128,8))]
    said = []
    for more in ([], ['GET,5,64,8,9000']):
        (tmp_path/'bench.csv').write_text('\n'.join(['model,depth,width,heads,seconds_50k', *rows, *more]))
        cli.main(['design', '--max-latency', '170', '--bench', str(tmp_path/'bench.csv')])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and 'depth' in said[0]
