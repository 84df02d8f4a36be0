"`import ditnano`: the contract's names, lazily, typed."
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ditnano

CONTRACT = ('DiT DiTConfig GET GETConfig TrainConfig UNetConfig SongUNet EDMPrecond VPPrecond LPIPS L1 L2 PairDataset '
            'bundle count_flops count_params depth evaluate factors fit fold frechet from_init_kwargs heads '
            'heun_sampler jetson_latency list_models '
            'load_model load_teacher make_pairs measure propose read_checkpoint read_state sample to_onnx').split()


def test_the_names_of_the_contract():
    assert set(CONTRACT) <= set(ditnano.__all__) and set(ditnano.__all__) <= set(dir(ditnano))
    assert (Path(ditnano.__file__).parent/'py.typed').is_file()
    with pytest.raises(AttributeError, match='nonsense'): getattr(ditnano, 'nonsense')  # noqa: B009


def test_import_is_light():
    code = ("import sys, time; t = time.process_time(); import ditnano; s = time.process_time()-t\n"
            "ditnano.propose(max_params=425_000); ditnano.list_models()\n"
            "print(s, *[m for m in ('torch', 'pandas', 'scipy') if m in sys.modules])")
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(3)]
    assert [r[1:] for r in runs] == [[]]*3
    assert min(float(r[0]) for r in runs) < 0.1


@pytest.mark.parametrize('name', ditnano.__all__)
def test_every_parameter_and_return_is_typed(name):
    found = getattr(ditnano, name)
    call = found.__init__ if inspect.isclass(found) else found
    signature = inspect.signature(call)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != 'self']
    typed = not bare and (inspect.isclass(found) or signature.return_annotation is not signature.empty)
    assert typed, f"{name}: {', '.join(bare) or 'return'} without a type"


CLIENT = """
import ditnano
from ditnano import DiT, DiTConfig, Design, GET, GETConfig, list_models, propose

best: Design = propose(max_params=425_000)[0]
model: DiT = DiT(DiTConfig(best.depth, best.width, best.heads))
model.save_pretrained('here', card={'data': 'none'}, half=True)
again: DiT = DiT.from_pretrained('here')
get: GET = GET.from_pretrained('there')
names: list[str] = list_models('teacher')
size: int = ditnano.count_params(again.cfg) + ditnano.parse_count('0.42M')
noise, labels = ditnano.noise_and_labels(range(4))
print(noise.shape, labels.tolist(), ditnano.__version__, size, names)
"""


@pytest.mark.slow
def test_a_strict_type_checker_accepts_a_client(tmp_path):
    pytest.importorskip('mypy')
    (tmp_path/'client.py').write_text(CLIENT)
    command = [sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent', 'client.py',
               '--cache-dir', str(tmp_path/'cache')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
    (tmp_path/'client.py').write_text(CLIENT.replace("'0.42M'", '[]'))
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert 'client.py' in wrong.stdout and wrong.returncode == 1   # it does look
