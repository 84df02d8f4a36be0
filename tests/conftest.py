"Shared by all tests: one thread each, this checkout before any installed one, this environment's commands on the path."
import contextlib
import os
import sys
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    settings.register_profile('ci', max_examples=50, derandomize=True, deadline=None, suppress_health_check=quiet)
    settings.register_profile('long', max_examples=5000, deadline=None, suppress_health_check=quiet)
    settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))

ROOT = Path(__file__).resolve().parent.parent
SLOW_FOLDERS = ('notebooks', 'processes', 'evidence')
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')   # two tests run side by side; neither may take both cores
for name, first in {'PATH': Path(sys.executable).parent, 'PYTHONPATH': ROOT}.items():
    os.environ[name] = os.pathsep.join([str(first), *filter(None, [os.environ.get(name)])])


def pytest_collection_modifyitems(items):
    "`quick` is everything that is neither marked slow nor in a folder of slow tests."
    for item in items:
        folder = item.path.relative_to(ROOT/'tests').parts[0]
        if folder not in SLOW_FOLDERS and item.get_closest_marker('slow') is None: item.add_marker(pytest.mark.quick)


@pytest.fixture(scope='session')
def root(): return ROOT
