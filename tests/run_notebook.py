"Runs one notebook in nbdev's shell: flagged cells are skipped; a failing cell prints its traceback."
import sys
from pathlib import Path

from nbdev.test import test_nb

path, root, skip, force = sys.argv[1:]
ok, seconds = test_nb(Path(path), skip_flags=skip.split(), force_flags=force.split(), basepath=root)
print(f'{seconds:.1f} s')
sys.exit(0 if ok else 1)
