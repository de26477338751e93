import os; os.environ.setdefault('OMP_NUM_THREADS', '1') # else accelerate gives each process all cores, and two that share them wait for one another
import matplotlib; matplotlib.use('Agg')
import warnings
from contextlib import contextmanager
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import Callback, ProgressCallback, accuracy, noop, set_seed

from mixfast.all import Hypers, Recipe, mix_dls, mix_learner

torch.set_num_threads(1)
TINY = dict(arch='vit_tiny_patch16_224', patch_size=2, embed_dim=32, depth=2, num_heads=2)
HOT = Recipe(ssl=Hypers(0.004, warmup=0.2), sl=Hypers(0.006, warmup=0.1, betas=(0.9,0.98), wd=0.1))

def pytest_collection_modifyitems(items):
    "The file that takes longest comes first: two run at a time"
    items.sort(key=lambda o: o.path.name!='test_repo.py')

def images(n, size=8, c=1, seed=0):
    "uint8 images [n,size,size,c] whose class can be seen, and their labels 0..2"
    rng = np.random.default_rng(seed)
    y = np.arange(n)%3
    x = rng.integers(0, 120, (n,size,size,c))
    for i,k in enumerate(y): x[i, k*2:k*2+2] += 120
    return x.astype(np.uint8), y

@pytest.fixture
def make(tmp_path):
    "A function that makes a small, seeded learner"
    def _make(n=24, bs=8, ssl=None, lam=0.5, seed=0, size=8, c=1, dls=None, valid=True, drop_last=True, arch=None, objective=None, **kwargs):
        set_seed(seed, reproducible=True)
        if dls is None: dls = mix_dls(images(n, size, c), images(9, size, c, seed=1) if valid else None, ssl=ssl, lam=lam, bs=bs, drop_last=drop_last)
        model = TINY if arch is None else dict(arch=arch)
        learn = mix_learner(dls, objective=objective, path=tmp_path, **{'metrics':accuracy, **model, **kwargs})
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return _make

def save_image(f, x):
    "Write an array [H,W] or [H,W,3] as an image file, in a folder that need not be there"
    f.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(f)

@pytest.fixture
def photos(tmp_path):
    "Three classes of 12 images each, 12 without a class"
    x,y = images(48, 16)
    for i,(o,k) in enumerate(zip(x, y)): save_image(tmp_path/'photos'/('unlabelled' if i>=36 else f'class{k}')/f'{i}.png', o[...,0])
    return tmp_path/'photos'

@contextmanager
def warned(how, category=Warning):
    "Warnings `how` Python's filters say: 'ignore', 'error', 'always'; gives a list of them"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter(how, category)
        yield w

def state(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Die(Callback):
    "Fail at the end of the `n`-th training step"
    only_watches = True
    order = 2000
    def __init__(self, n): self.n = n
    def after_batch(self):
        self.n -= self.training
        if self.n==0: raise RuntimeError('died')
