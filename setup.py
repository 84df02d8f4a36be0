"The package, as settings.ini describes it. Building it needs setuptools alone."
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
minors = range(int(cfg['min_python'].split('.')[1]), 15)


class BuildWithProject(build_py):
    "What `sweep` and `paper` read comes with a wheel: scales, notebooks of experiments and paper, evidence."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        for name in ('nbs/scales', 'nbs/experiments', 'nbs/paper', 'paper_figures/evidence'):
            copytree(here/name, Path(self.build_lib)/'ditnano'/'project'/name, dirs_exist_ok=True,
                     ignore=ignore_patterns('.*'))


setup(
    cmdclass={'build_py': BuildWithProject},
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Natural Language :: ' + cfg['language'],
                 *(f'Programming Language :: Python :: 3.{m}' for m in minors)],
    packages=find_packages(include=['ditnano', 'ditnano.*']),
    package_data={'ditnano': ['py.typed', '*.pyi', '*.yaml', 'deploy/csrc/*', 'deploy/page/*', 'lab/page/*',
                              'lab/*.yaml', 'weights/**/*.safetensors', 'weights/**/*.json', 'weights/**/*.md']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['ditnano=ditnano._modidx:d']},
    zip_safe=False,
)
