#!/usr/bin/env python3
"""The documentation as linked HTML pages, without Quarto: nbdev processes the notebooks, pandoc renders them.

    python tools/preview.py [FOLDER]    default: _preview/
"""
import html, os, re, shutil, sys
from pathlib import Path

import pypandoc, yaml
from nbdev.config import get_config
from nbdev.quarto import proc_nbs, refresh_quarto_yml
from readme import ROOT, nb2md

CSS = """
body { margin:0; display:flex; font:16px/1.55 system-ui,sans-serif; color:#222 }
nav { flex:0 0 13rem; height:100vh; position:sticky; top:0; overflow:auto; padding:1.5rem 1rem; background:#f6f7f9; box-sizing:border-box }
nav a { display:block; padding:.2rem .5rem; border-radius:4px; text-decoration:none; color:#345 }
nav a.here { background:#dde6f3; font-weight:600 }
main { max-width:50rem; min-width:0; padding:1.5rem 2.5rem }
h1 + p.lead { font-size:1.15rem; color:#567; margin-top:-.5rem }
pre { background:#f6f7f9; padding:.7rem 1rem; overflow:auto; border-radius:6px; font-size:.84rem; line-height:1.4 }
pre.text { background:#fff; border-left:3px solid #ccd; border-radius:0 }
code { font-size:.88em } img { max-width:100% }
table { border-collapse:collapse; font-size:.9rem; margin:1rem 0; display:block; overflow:auto }
th,td { padding:.3rem .7rem; border-bottom:1px solid #dde; text-align:right } td:first-child,th:first-child { text-align:left }
"""

def page(nb, out, images):
    "Title, description, file name and HTML of a processed notebook"
    def image(png):
        f = images/f'{nb.stem}_{len(list(images.glob(nb.stem + "_*")))}.png'
        f.write_bytes(png)
        return os.path.relpath(f, out.parent)
    front = re.match(r'\s*---\n(.*?)\n---', front_matter(nb), flags=re.S)
    meta = yaml.safe_load(front[1]) if front else {}
    body = pypandoc.convert_text(nb2md(nb, image), 'html5', 'markdown-yaml_metadata_block+lists_without_preceding_blankline',
                                 extra_args=['--mathml', '--syntax-highlighting=none', '--wrap=none'])
    return dict(title=meta.get('title', nb.stem), desc=meta.get('description', ''), body=body)

def front_matter(nb):
    import json
    return next((''.join(c['source']) for c in json.loads(nb.read_text('utf-8'))['cells'] if c['cell_type']=='raw'), '')

def localise(body, here, pages, doc_url):
    "Links to the published documentation, and between notebooks, as links between these pages"
    names = {k.as_posix():v for nb,v in pages.items() for k in (nb, v)}
    def one(m):
        url,_,anchor = html.unescape(m[2]).partition('#')
        for base in (doc_url, '/'):
            if url.startswith(base): url = url[len(base):]; break
        else: url = os.path.normpath(here.parent/url) if url and not re.match(r'\w+:', url) else url
        if url not in names: return m[0]
        return f'{m[1]}="{os.path.relpath(names[url], here.parent)}{"#"+anchor if anchor else ""}"'
    return re.sub(r'(href)="([^"]*)"', one, body)

def preview(dest):
    "Render all notebooks into the folder `dest`; returns its index.html"
    os.chdir(ROOT)
    refresh_quarto_yml()
    proc = proc_nbs(force=True, n_workers=0)
    shutil.rmtree(dest, ignore_errors=True)
    images = dest/'images'
    if (ROOT/'nbs/images').exists(): shutil.copytree(ROOT/'nbs/images', images)
    images.mkdir(parents=True, exist_ok=True)
    nbs = sorted((o.relative_to(proc) for o in proc.rglob('*.ipynb')), key=lambda o: (len(o.parts), o.stem!='index', o))
    pages = {o: o.with_name(re.sub(r'^\d+[a-z]?_', '', o.stem) + '.html') for o in nbs}
    made = {nb: page(proc/nb, dest/p, images) for nb,p in pages.items()}
    for nb,p in pages.items():
        d,up = made[nb],lambda o: os.path.relpath(o, p.parent)
        nav = ''.join(f'<a href="{up(q)}"{" class=here" if q==p else ""}>{html.escape(made[n]["title"])}</a>' for n,q in pages.items())
        lead = f'<p class="lead">{html.escape(d["desc"])}</p>' if d['desc'] else ''
        (dest/p).parent.mkdir(parents=True, exist_ok=True)
        (dest/p).write_text(f'<!doctype html><meta charset="utf-8"><title>{html.escape(d["title"])}</title><style>{CSS}</style>'
            f'<nav>{nav}</nav><main><h1>{html.escape(d["title"])}</h1>{lead}{localise(d["body"], p, pages, get_config().doc_url)}</main>', 'utf-8')
    return dest/'index.html'

if __name__=='__main__': print('open', preview(Path(sys.argv[1] if len(sys.argv)>1 else ROOT/'_preview').resolve()))
