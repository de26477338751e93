import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = re.sub(r'\]\((nbs/images/[^)]+)\)', rf"]({cfg['git_url']}/raw/main/\1)", Path('README.md').read_text(encoding='utf-8'))
readme = re.sub(r'\]\((nbs/[^)]+)\)', rf"]({cfg['git_url']}/blob/main/\1)", readme) # PyPI has no such files
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['dev'] = sum(extras.values(), []) # has the others too

setup(name=cfg['name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
      author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'],
      long_description=readme, long_description_content_type='text/markdown',
      packages=find_packages(include=['mixfast', 'mixfast.*']), package_data={'mixfast.paper': ['*.csv']},
      python_requires=f">={cfg['min_python']}",
      install_requires=cfg['requirements'].split(), extras_require=extras,
      classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Science/Research'],
      entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=['mixfast=mixfast._modidx:d']))
