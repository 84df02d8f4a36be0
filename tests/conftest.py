"What the tests share: one thread each, this checkout before any installed one, this environment's commands on the path."
import os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')   # two tests run side by side; neither may take both cores
for name, first in {'PATH': Path(sys.executable).parent, 'PYTHONPATH': ROOT}.items():
    os.environ[name] = os.pathsep.join([str(first), *filter(None, [os.environ.get(name)])])


@pytest.fixture(scope='session')
def root(): return ROOT


def pytest_configure(config): config.addinivalue_line('markers', 'slow: minutes on two cores; not in the everyday loop')
