"The repository tells one story: notebooks run, and module, README, pages and settings agree with them"
import importlib, inspect, json, os, pkgutil, re, shutil, subprocess, sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote, urlparse
import pytest
from nbdev.config import get_config
from fastcore.docments import docments
from fastai.learner import Learner
import mixfast.all, notebook

root = Path(__file__).resolve().parents[1]
nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not re.search(r'/[_.]', p.relative_to(root).as_posix()))
each_nb = pytest.mark.parametrize('nb', nbs, ids=lambda p: f'{p.parent.name}/{p.stem}')

ENV = {'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1', # draws no windows; as steady on a busy machine as on an idle one
       'PATH': f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

def run(*cmd, cwd=root):
    "Output of a command; its failure is the test's, with all it printed"
    res = subprocess.run([str(c) for c in cmd], cwd=cwd, env={**os.environ, **ENV}, capture_output=True, text=True)
    if res.returncode: pytest.fail(res.stdout + res.stderr, pytrace=False)
    return res.stdout

def tree():
    "What git sees: a notebook must not leave a file behind"
    return run('git', 'status', '--porcelain') + run('git', 'diff') if (root/'.git').exists() else ''

@pytest.fixture(scope='module')
def processes(): return notebook.start(ENV)

@each_nb
def test_notebook_runs(nb, processes, tmp_path):
    "In a process of its own: patches, seeds and figures of one notebook do not help another"
    before = tree()
    if not notebook.run(processes, nb, tmp_path/'log'): pytest.fail((tmp_path/'log').read_text(), pytrace=False)
    assert tree() == before

@each_nb
def test_notebook_is_fit_to_store(nb):
    assert nb.stat().st_size < 300_000
    outputs = [o for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr'], 'PYTHONWARNINGS=ignore'

def test_settings_agree():
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    s,cfg = ini['DEFAULT'],get_config(root)
    for a,b in dict(name='lib_name', description='description', min_python='min_python', git_url='git_url',
                    doc_url='doc_url').items(): assert s[a] == cfg[b], f'settings.ini {a}, pyproject.toml'
    v = s['version']
    assert v == mixfast.__version__ == version(s['name']), 'settings.ini, __init__.py, what is installed'
    assert f'\n## {v} (' in (root/'CHANGELOG.md').read_text(encoding='utf-8'), 'CHANGELOG.md'
    assert f'\nversion: {v}\n' in (root/'CITATION.cff').read_text(encoding='utf-8'), 'CITATION.cff'

def test_module_is_what_the_notebooks_export(tmp_path):
    for p in ('nbs', 'mixfast'): shutil.copytree(root/p, tmp_path/p, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(root/'pyproject.toml', tmp_path)
    for p in (tmp_path/'mixfast').rglob('*.py'):
        if p.name != '__init__.py': p.unlink() # a module without a notebook does not come back
    run('nbdev-export', cwd=tmp_path)
    src,exp = ({p.relative_to(d): p.read_text(encoding='utf-8') for p in (d/'mixfast').rglob('*.py')} for d in (root, tmp_path))
    assert src == exp, 'run nbdev-export'

def test_modules_are_short_and_narrow():
    "At most 300 lines of 120 characters; what nbdev writes itself may be longer"
    for p in (p for p in (root/'mixfast').rglob('*.py') if p.name != '_modidx.py'):
        lines = p.read_text(encoding='utf-8').splitlines()
        assert len(lines) <= 300, f'{p.name} is two modules'
        assert not [o for o in lines if len(o) > 120 and not o.startswith('__all__')], p.name

def test_types_of_public_names():
    pytest.importorskip('basedpyright')
    run(Path(sys.executable).parent/'basedpyright', '--pythonpath', sys.executable)

def public():
    "Functions, classes and methods that users may call, and what is patched into fastai's learner"
    found = [('Learner', Learner)]
    for info in pkgutil.walk_packages(mixfast.__path__, 'mixfast.'):
        names = getattr(importlib.import_module(info.name), '__all__', ())
        found += [(n,o) for n,o in ((n, getattr(sys.modules[info.name], n)) for n in names) if getattr(o, '__module__', '')==info.name]
    for name,o in found:
        if o is not Learner: yield name, o
        for k,f in vars(o).items() if inspect.isclass(o) else ():
            f = f.fget if isinstance(f, property) else getattr(f, '__func__', f)
            inherits = any(hasattr(b, k) for b in o.__mro__[1:])
            if inspect.isfunction(f) and f.__module__.startswith('mixfast') and not k.startswith('_') and not inherits: yield f'{name}.{k}', f

def uncommented(o):
    "Parameters of a function or constructor without a comment"
    f = o.__init__ if inspect.isclass(o) else o
    if inspect.isclass(o) and ('__init__' not in vars(o) or hasattr(o, '__dataclass_fields__')): return []
    ps = [p for p in inspect.signature(f).parameters.values() if p.name not in ('self','state') and p.kind not in (p.VAR_POSITIONAL,p.VAR_KEYWORD)]
    d = docments(f)
    return [p.name for p in ps if not d.get(p.name)]

def test_everything_public_is_documented():
    "A docstring each, and a comment for each parameter; names are those of `from mixfast.all import *`"
    bare = [name for name,o in public() if not (o.__doc__ or '').strip()]
    assert not bare, bare
    bare = {name: ps for name,o in public() if (ps := uncommented(o))}
    assert not bare, bare
    for n in mixfast.all.__all__: assert not n.startswith('_')

def test_readme_is_what_index_says(): run(sys.executable, 'tools/readme.py', '--check')

class Page(HTMLParser):
    "The anchors of a page, and what it links to and shows"
    def __init__(self, path):
        super().__init__()
        self.ids,self.urls = set(),[]
        self.feed(path.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.add(a.get('id'))
        self.urls += [a[k] for k in ('href', 'src') if a.get(k)]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the rendered pages"
    out = tmp_path_factory.mktemp('site')
    run(sys.executable, 'tools/preview.py', out)
    return out

def test_pages_build_and_links_resolve(site):
    pages = {p: Page(p) for p in site.rglob('*.html')}
    assert len(pages) == len(nbs)
    dead = []
    for p,page in pages.items():
        for url in page.urls:
            if re.match('[a-z]+:', url): continue # another site, or a picture within the page
            path,_,anchor = url.partition('#')
            target = (p.parent/path).resolve() if path else p
            if not target.exists() or anchor and anchor not in pages[target].ids: dead.append(f'{p.name}: {url}')
    assert not dead, dead

@pytest.fixture(scope='module')
def browser():
    "A function that gives Chromium, headless, with a window of so many pixels"
    webdriver = pytest.importorskip('selenium.webdriver')
    chrome,driver = [shutil.which(o) or shutil.which(p) for o,p in (('chromium','google-chrome'), ('chromedriver','chromium.chromedriver'))]
    if not (chrome and driver): pytest.skip('no Chromium with its driver')
    opened = []
    def _open(width, height, *more):
        opts = webdriver.ChromeOptions()
        opts.binary_location = chrome
        for o in ('--headless=new', '--no-sandbox', '--disable-gpu', '--force-device-scale-factor=1', *more): opts.add_argument(o)
        opts.set_capability('goog:loggingPrefs', dict(browser='ALL'))
        d = webdriver.Chrome(opts, webdriver.ChromeService(driver))
        opened.append(d)
        d.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width<600))
        return d
    yield _open
    for d in opened: d.quit()

PAGE = 'guides/which_objective.html'
BOX = 'const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]'

def test_a_wide_window_and_a_phone(site, browser):
    "The sidebar is beside the text, or folded above it; nothing is wider than the window"
    d = browser(1300, 800)
    d.get((site/PAGE).as_uri())
    nav,main = [d.execute_script(BOX, o) for o in ('nav','main')]
    assert nav[2]<=main[0] and nav[1]<50 and main[1]<50 and d.find_element('id', 'pages').is_displayed()
    d = browser(390, 800)
    d.get((site/PAGE).as_uri())
    nav,main = [d.execute_script(BOX, o) for o in ('nav','main')]
    assert nav[3]<=main[1]<120 and not d.find_element('id', 'pages').is_displayed()
    d.find_element('css selector', 'summary').click()
    assert d.find_element('id', 'pages').is_displayed()
    assert d.execute_script('return document.documentElement.scrollWidth')<=390

def test_search_copy_dark(site, browser):
    "Without a network; a code block's button copies it; dark where the system is"
    d = browser(1300, 800)
    d.get((site/PAGE).as_uri())
    assert not [o for o in d.get_log('browser') if o['level']=='SEVERE']
    d.find_element('id', 'search').send_keys('gradient accumulation')
    found = d.find_elements('css selector', '#found a')
    assert found and not d.find_element('id', 'pages').is_displayed()
    for a in found: assert Path(unquote(urlparse(a.get_attribute('href')).path)).exists()
    found[0].click()
    assert 'accumulation' in d.find_element('tag name', 'main').text.lower()
    d.get((site/PAGE).as_uri())
    d.execute_script("navigator.clipboard.writeText = t => { window.copied = t; return Promise.resolve() }")
    pre = d.find_element('css selector', '.code')
    pre.find_element('tag name', 'button').click()
    assert d.execute_script('return window.copied').strip()==pre.find_element('tag name', 'pre').text.strip()
    def background(): return int(re.findall(r'\d+', d.execute_script('return getComputedStyle(document.body).backgroundColor'))[0])
    light = background()
    d.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark')]))
    assert background()<60<200<light

def test_pictures_are_there(site, browser):
    "All of a page of pictures, as they are drawn"
    d = browser(1300, 800)
    d.get((site/'guides/gallery.html').as_uri())
    sizes = d.execute_script('return [...document.images].map(i => [i.naturalWidth, i.src.slice(0, 40)])')
    assert len(sizes)>6 and all(w for w,_ in sizes), sizes
