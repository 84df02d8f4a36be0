"""Write the pages of the website from the notebooks: hidden cells left out, links kept, an API page for each module.

`make docs` runs it from the repository's folder, then `mkdocs build` with the `_proc/mkdocs.yml` that is written here.
"""
import importlib
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.showdoc import DocmentTbl

ROOT = Path(__file__).resolve().parent.parent
NBS, SITE = ROOT/'nbs', ROOT/'_proc'/'site'
FOLDERS = {'':'Chapters', 'distill':'Distill', 'interop':'Interop', 'deploy':'Deploy', 'lab':'Lab',
           'tutorials':'Tutorials', 'experiments':'Experiments', 'paper':'Tables and figures'}
FILES = ['LICENSE', 'CONTRIBUTING.md', 'CHANGELOG.md', 'README.md', 'paper_figures', 'ditnano/weights']
HIDDEN = re.compile(r'#\|\s*(hide|default_exp)\b|.*nbdev_export\(', re.S)
LINK = re.compile(r'\]\(([^)\s]+)\)')
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)


def notebooks():
    "Notebook -> page, in the order of the plan."
    found = [p for folder in FOLDERS for p in sorted((NBS/folder).glob('*.ipynb'))]
    return {p: p.relative_to(NBS).with_suffix('.md').as_posix() for p in found}


def moved(target, page):
    "A link of a page of nbs/, as a link of the site; the build reports links to files that the site lacks."
    path, hash_, anchor = target.partition('#')
    if not path or re.match(r'\w+:', path): return target
    file = (NBS/page).parent.joinpath(path).resolve()
    if file.is_relative_to(NBS): there = file.relative_to(NBS)
    else: there = file.relative_to(ROOT)
    there = there.with_suffix('.md') if there.suffix == '.ipynb' else there
    return Path(os.path.relpath(SITE/there, (SITE/page).parent)).as_posix()+hash_+anchor


def visible(nb):
    "The notebook without cells that nbdev hides; directives are not shown, code of `echo: false` neither."
    nb.cells = [c for c in nb.cells if c.cell_type != 'code' or not HIDDEN.match(c.source)]
    for c in nb.cells:
        if c.cell_type != 'code': continue
        c.metadata['echo'] = not re.search(r'^#\|\s*echo:\s*false', c.source, re.M)
        c.source = DIRECTIVE.sub('', c.source).strip('\n')
    return nb


def joined(found):
    "Lines that were printed one by one become one output; the error stream is not shown."
    out = []
    for o in found:
        if o.output_type == 'stream' and o.name == 'stderr': continue
        if o.output_type == 'stream' and out and out[-1].output_type == 'stream': out[-1].text += o.text
        else: out.append(o)
    return out


def outputs(cell, exporter, name):
    "A cell's outputs as Markdown, and the files that they need."
    if not cell.get('outputs'): return '', {}
    alone = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('', outputs=joined(cell.outputs))])
    body, resources = exporter.from_notebook_node(alone, resources={'unique_key':name, 'output_files_dir':'files'})
    body = re.sub(r'^```(?:python)?\n*```\n*', '', body.strip()).strip('\n')
    body = re.sub(r'<style scoped>.*?</style>', '', body, flags=re.S)
    return f'\n<div class="output" markdown>\n\n{body}\n\n</div>\n' if body else '', resources.get('outputs', {})


def page_of(path, page):
    "One notebook as a page."
    exporter, parts = MarkdownExporter(), []
    nb = visible(nbformat.read(path, 4))
    for k, c in enumerate(nb.cells):
        if c.cell_type == 'markdown': parts.append(LINK.sub(lambda m: f']({moved(m[1], page)})', c.source))
        if c.cell_type != 'code': continue
        text, files = outputs(c, exporter, f'{path.stem}_{k}')
        if c.metadata['echo'] and c.source: parts.append(f'```python\n{c.source}\n```')
        if text: parts.append(text)
        for name, data in files.items(): write((SITE/page).parent/name, data)
    write(SITE/page, '\n\n'.join(parts)+'\n')


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def api(name):
    "The public names of a module: signature, one line, and a table of parameters from the comments behind them."
    module = importlib.import_module(f'ditnano.{name}')
    parts = [f'# {name}', f'> {inspect.getdoc(module) or ""}']
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if not callable(thing) or not getattr(thing, '__module__', '').startswith('ditnano'): continue
        members = [(symbol, thing)]
        if inspect.isclass(thing):
            own = [(k, f) for k, f in vars(thing).items() if inspect.isfunction(f) and not k.startswith('_')]
            members += [(f'{symbol}.{k}', f) for k, f in own]
        parts += [section(title, member) for title, member in members]
    return '\n\n'.join(parts)+'\n'


def section(title, thing):
    level = '###' if '.' in title else '##'
    line = (thing.__doc__ or '').strip().split('\n')[0]
    try: signature = re.sub(r'<[^>]*>', '...', str(inspect.signature(thing)))
    except (TypeError, ValueError): signature = ''
    try: table = DocmentTbl(thing)._repr_markdown_()
    except Exception: table = ''      # a class without a signature of its own has no table
    return f'{level} `{title}`\n\n```python\n{title.split(".")[-1]}{signature}\n```\n\n{line}\n\n{table}'


def modules():
    files = sorted((ROOT/'ditnano').rglob('*.py'))
    return ['.'.join(p.relative_to(ROOT/'ditnano').with_suffix('').parts) for p in files if not p.stem.startswith('_')]


def nav(pages):
    "Pages by folder, the API last."
    groups = []
    for folder, title in FOLDERS.items():
        mine = [p for n, p in pages.items() if n.parent == NBS/folder and p != 'index.md']
        groups.append({title: mine})
    order = sorted(modules(), key=lambda m: ('.' in m, m))
    return [{'Start': 'index.md'}, *groups, {'API': [{m: f'api/{m}.md'} for m in order]}]


def main():
    shutil.rmtree(SITE, ignore_errors=True)
    pages = notebooks()
    for path, page in pages.items(): page_of(path, page)
    for name in modules(): write(SITE/'api'/f'{name}.md', api(name))
    keep = shutil.ignore_patterns('*.safetensors', 'smoke', '*.jsonl')   # all that paper_figures/index.html links to
    for name in FILES:
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, SITE/name, ignore=keep)
        elif name != 'README.md': write(SITE/name, source.read_bytes())
    write(SITE/'site.css', (ROOT/'docs'/'site.css').read_bytes())
    base = {'INHERIT':'../mkdocs.yml', 'docs_dir':'site', 'site_dir':'../_docs', 'nav':nav(pages)}
    write(ROOT/'_proc'/'mkdocs.yml', json.dumps(base, indent=1))


if __name__ == '__main__': main()
