"Preview the docs without Quarto: nbdev's pages, made linked HTML by pandoc in _preview/"
import json, os, re, shutil
from html import escape, unescape
from pathlib import Path
from subprocess import run
import pypandoc
from fastcore.nbio import nb_frontmatter, read_nb
from fastcore.script import call_parse
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs
from readme import nb_md, root

def image(data, mime): return f'![](data:{mime};base64,{"".join(data.split())})\n'

rooms = '. guides tutorials objective task data callback insight train paper bench'.split() # as one reads them

def sidebar(pages, here):
    "Links from page `here` to all pages, a heading a folder"
    res, folder = [], Path()
    for p,title in pages.items():
        if p.parent != folder: res.append(f'<h4>{p.parent}</h4>')
        folder, cls = p.parent, ' class="here"' if p == here else ''
        title = title.removeprefix(f'{folder}.') # a page of a folder is called by the folder's name, too
        res.append(f'<a href="{os.path.relpath(p, here.parent)}"{cls}>{escape(title)}</a>')
    return '\n'.join(res)

def relink(html, here, doc_url):
    "Links to the published pages and to notebooks become links to the pages beside this one"
    def _f(m):
        url,sep,anchor = m[1].partition('#')
        if url.startswith(doc_url): url = os.path.relpath(url[len(doc_url):] or 'index.html', here.parent)
        if url.endswith('.ipynb') and '://' not in url: url = nbpath2html(url).as_posix()
        return f'href="{url}{sep}{anchor}"'
    return re.sub(r'href="([^"]+)"', _f, html)

def words(html):
    "What is read on a page, without its frame"
    main = re.search(r'<main>(.*)</main>', html, flags=re.S)[1]
    return re.sub(r'\s+', ' ', unescape(re.sub(r'<(style|math).*?</\1>|<[^>]*>', ' ', main, flags=re.S))).strip()

@call_parse(pos=['out'])
def main(
    out:str='_preview', # Folder for the pages
):
    "Render all pages, and say where they start"
    out = Path(out).absolute()
    os.chdir(root) # where nbdev looks for its config
    proc,doc_url = proc_nbs(force=True, n_workers=0),get_config().doc_url # one process: fastai is imported once
    shutil.copytree(proc, out, ignore=shutil.ignore_patterns('*.ipynb', '*.yml'), dirs_exist_ok=True) # the pictures
    def place(p): return rooms.index(str(p.parent.relative_to(proc))), p.stem != 'index', p.name
    nbs = sorted(proc.rglob('*.ipynb'), key=place)
    fms = {nb: nb_frontmatter(read_nb(nb)) for nb in nbs}
    pages = {nbpath2html(nb.relative_to(proc)): fms[nb].get('title', nb.stem) for nb in nbs}
    found = []
    for nb,here in zip(nbs, pages):
        # MathML has no \tag: an equation's number stands behind it instead
        md = re.sub(r'\\tag\{(.*?)\}', r'\\qquad \\text{(\1)}', nb_md(nb, image))
        desc = re.sub('`(.+?)`', r'<code>\1</code>', escape(fms[nb].get('description', '')))
        cmd = [pypandoc.get_pandoc_path(), '--from=markdown', '--to=html', '--mathml', '--toc']
        html = run(cmd + [f'--template={root}/tools/preview.html', f'--variable=title:{escape(pages[here])}',
            f'--variable=description:{desc}', f'--variable=nav:{sidebar(pages, here)}',
            f'--variable=root:{"../"*(len(here.parents)-1)}'], input=md, text=True, capture_output=True, check=True).stdout
        found.append(dict(url=here.as_posix(), title=pages[here], text=words(html)))
        (out/here).write_text(relink(html, here, doc_url), encoding='utf-8')
    (out/'search.js').write_text(f'const searchPages = {json.dumps(found, ensure_ascii=False)}', encoding='utf-8')
    print(f'{len(pages)} pages: {out}/index.html')
