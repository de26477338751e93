#!/usr/bin/env python3
"""README.md from nbs/index.ipynb, without Quarto.

    python tools/readme.py            write it
    python tools/readme.py --check    fail if it is stale
"""
import base64, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTE = '<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n'

def output(out, image):
    "Markdown for one output of a cell; `image` says where a PNG is to be found"
    data = {k: ''.join(v) for k,v in out.get('data', {}).items() if isinstance(v, (str,list))}
    if 'image/png' in data: return f"![]({image(base64.b64decode(data['image/png']))})"
    for k in ('text/markdown','text/html'):
        if k in data: return re.sub(r'<style.*?</style>', '', data[k], flags=re.S)
    text = ''.join(out.get('text', '')) or data.get('text/plain', '')
    return f'```text\n{text.rstrip()}\n```' if text.strip() else ''

def cell_md(cell, image):
    "Markdown for one cell: its text, or its code and outputs as its directives say"
    src = ''.join(cell['source'])
    if cell['cell_type']=='markdown': return src
    opts = set(re.findall(r'^#\|\s*(.+?)\s*$', src, flags=re.M))
    if cell['cell_type']!='code' or opts & {'hide','include: false'}: return ''
    code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
    res = [] if 'echo: false' in opts or not code else [f'```python\n{code}\n```']
    return '\n\n'.join(res + [o for o in (output(o, image) for o in cell['outputs']) if o])

def nb2md(path, image):
    "The notebook at `path` as Markdown"
    return '\n\n'.join(filter(None, (cell_md(c, image) for c in json.loads(Path(path).read_text('utf-8'))['cells']))) + '\n'

def readme():
    def image(png): raise ValueError('nbs/index.ipynb stores a picture: save it to nbs/images/ and link to it, README.md cannot embed it')
    md = nb2md(ROOT/'nbs/index.ipynb', image)
    return NOTE + re.sub(r'\]\(((?!\w+:|#|/)[^)]+)\)', r'](nbs/\1)', md) # relative links start in nbs/

if __name__=='__main__':
    dest,new = ROOT/'README.md',readme()
    if '--check' not in sys.argv: dest.write_text(new, 'utf-8')
    elif not dest.exists() or dest.read_text('utf-8')!=new: sys.exit('README.md is stale: run python tools/readme.py')
