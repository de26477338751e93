"Write README.md from nbs/index.ipynb, without Quarto; `--check` only says whether it is up to date"
import json, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
head = '<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook, not this file. -->\n\n'
unseen = {'hide', 'export', 'exporti', 'default_exp'} # as in nbdev: an exported cell is shown by its docs, not its code

def text(o): return o if isinstance(o, str) else ''.join(o or [])
def fence(s, lang=''): return f'```{lang}\n{s.rstrip()}\n```' if s.strip() else ''

def html(s):
    "An HTML output as one Markdown block: no `<style>`, which GitHub prints, no blank line or indent, which end it"
    return re.sub(r'\s*\n\s*', '\n', re.sub(r'<style.*?</style>', '', s, flags=re.S)).strip()

def output_md(o, image):
    "One output of a cell: the richest form it was stored in"
    d = {k: text(v) for k,v in o.get('data', {}).items()}
    if 'text/markdown' in d: return d['text/markdown']
    if 'text/html' in d: return html(d['text/html'])
    for mime in ('image/png', 'image/jpeg'):
        if mime in d: return image(d[mime], mime)
    return fence(d.get('text/plain', '') or text(o.get('text')))

def cell_md(cell, image):
    "A cell as Markdown, by the directives that nbdev and Quarto know"
    src = text(cell['source'])
    if cell['cell_type'] != 'code': return src if cell['cell_type'] == 'markdown' else ''
    lines = re.findall(r'^#\|\s*([\w-]+):?\s*(.*?)\s*$', src, flags=re.M)
    opts, code = dict(lines), re.sub(r'^#\|.*\n?', '', src, flags=re.M)
    if unseen & opts.keys() or opts.get('include') == 'false': return ''
    res = [] if opts.get('echo') == 'false' else [fence(code, 'python')]
    if opts.get('output') != 'false': res += [output_md(o, image) for o in cell['outputs']]
    return '\n\n'.join(filter(None, res))

def no_image(*_): sys.exit('nbs/index.ipynb stores a picture: save it in nbs/images and link to it, for README.md')

def nb_md(path, image=no_image):
    "Notebook `path` as Markdown; `image` says how a stored picture is shown"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(filter(None, (cell_md(c, image).strip() for c in cells))) + '\n'

def relink(md, base='nbs'):
    "Links and pictures relative to `base` made relative to its parent, outside of code"
    def _f(m): return m[1] + posixpath.normpath(f'{base}/{m[2]}')
    parts = re.split(r'(```.*?```|`[^`\n]*`)', md, flags=re.S)
    parts[::2] = [re.sub(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)', _f, p) for p in parts[::2]]
    return ''.join(parts)

if __name__ == '__main__':
    readme, md = root/'README.md', head + relink(nb_md(root/'nbs/index.ipynb'))
    if '--check' not in sys.argv: readme.write_text(md, encoding='utf-8')
    elif not readme.exists() or readme.read_text(encoding='utf-8') != md:
        sys.exit('README.md is not what nbs/index.ipynb says: run `python tools/readme.py`')
