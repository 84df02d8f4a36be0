"""Runs one notebook in nbdev's shell: flagged cells are skipped; a failing cell prints its traceback.

Arguments: the notebook, the folder of the package, flags to skip, flags to run all the same, and values of parameters
as JSON. With values it is a copy in the working directory that runs.
"""
import json
import sys
from pathlib import Path

from nbdev.test import test_nb


def with_parameters(path, values):
    "A copy with a cell of values behind the cell tagged `parameters`, as papermill makes it."
    nb, copy = json.loads(path.read_text(encoding='utf-8')), Path(path.name).absolute()
    tagged = [i for i, c in enumerate(nb['cells']) if 'parameters' in c['metadata'].get('tags', [])]
    source = '\n'.join(f'{k} = {v!r}' for k, v in values.items())
    nb['cells'].insert(tagged[0]+1, {**nb['cells'][tagged[0]], 'id': 'values', 'metadata': {}, 'source': source})
    copy.write_text(json.dumps(nb), encoding='utf-8')
    return copy


path, root, skip, force, *values = sys.argv[1:]
path = with_parameters(Path(path), json.loads(values[0])) if values else Path(path)
ok, seconds = test_nb(path, skip_flags=skip.split(), force_flags=force.split(), basepath=root)
print(f'{seconds:.1f} s')
sys.exit(0 if ok else 1)
