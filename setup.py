"The package, as settings.ini describes it. Building it needs setuptools alone."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
minors = range(int(cfg['min_python'].split('.')[1]), 15)

setup(
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
