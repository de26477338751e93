"""What data costs: ratios within one run, interleaved, medians (min to max) over rounds.

    python benchmarks/data.py PATH      # CIFAR-10 as class folders of PNGs: PATH/train/<class>/*.png, PATH/test/<class>/*.png

1. images/s of `mix_dls` / of fastai's per-item DataBlock: crop with padding 4, flip, normalise; one core, no workers
2. share of a training step spent waiting for data: the smallest ViT of the tests, on its own images and on CIFAR-10's
3. most memory that store and loaders take / bytes of the uint8 images, two epochs of each phase
4. seconds to decode all PNGs to the cache / to decode them and throw them away, all cores; then the second start
5. with a CUDA device: ViT-T, bf16, batch 256: a step with its loader / a step on one batch again and again;
   light and heavy augmentation, images on the device and not
"""
import os, resource, subprocess, sys, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np, torch
from PIL import Image
from fastai.vision.all import (CategoryBlock, CropPad, DataBlock, Flip, GrandparentSplitter, ImageBlock, Normalize, RandomCrop,
                               get_image_files, parent_label)
from mixfast.all import cifar10, load_files, mix_dls, mix_learner, set_seed
from mixfast.model import MixModel, phase_loss

VIT = dict(arch='vit_tiny_patch16_224', patch_size=2, embed_dim=32, depth=2, num_heads=2) # TINY of tests/conftest.py

def show(name, xs, target): print(f'{name:74} {median(xs):.3f}  ({min(xs):.3f} to {max(xs):.3f})  target {target}', flush=True)

def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter()-t

def mixed(learn, device='cpu'):
    "The model as in a fit, and its optimizer"
    m = MixModel(learn.model, learn.mix.objective).to(device).train()
    return m, learn.opt_func(learn.splitter(m), lr=learn.lr)

def rate(dl, n):
    "Images a second over `n` batches, the first of which does not count"
    it = iter(dl)
    next(it)
    seen,t = 0,time.perf_counter()
    for _ in range(n): seen += len(next(it)[0])
    return seen/(time.perf_counter()-t)

def loaders(path, data, rounds=5):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter('train','test'),
                      item_tfms=[CropPad(40), RandomCrop(32)], batch_tfms=[Flip(), Normalize.from_stats([.49,.48,.45], [.25,.24,.26], cuda=False)])
    stock = block.dataloaders(path, bs=256, num_workers=0, device='cpu').train
    ours = mix_dls(data.train, data.valid, bs=256, tfms='cifar', device='cpu').sl
    rs = [(rate(ours, 190), rate(stock, 12)) for _ in range(rounds)]
    show('images/s of mix_dls / of a per-item DataBlock', [a/b for a,b in rs], 'at least 30')
    print(f'    {median(a for a,_ in rs):,.0f} and {median(b for _,b in rs):,.0f} images/s')

def waiting(data, rounds=3):
    rng = np.random.default_rng(0)
    own = (rng.integers(0, 256, (1200,8,8,1)).astype(np.uint8), np.arange(1200)%3)
    cifar = [o[:2560] for o in data.train]
    for name,d,bs,tfms in (('8x8 images, batch 256', own, 256, None), ('8x8 images, batch 8', own, 8, None),
                           ('CIFAR-10, batch 256', cifar, 256, 'cifar'), ('the same with RandAugment', cifar, 256, 'tinyimagenet')):
        set_seed(0)
        learn = mix_learner(mix_dls(d, bs=bs, tfms=tfms, device='cpu'), **VIT)
        m,opt,rs = *mixed(learn),[]
        for r in range(rounds+1):
            wait,t0,t = 0.,time.perf_counter(),time.perf_counter()
            for x,y in learn.dls.mix:
                wait += time.perf_counter()-t
                phase_loss(m(x, 'mix'), (y,), learn.loss_func, 'mix')[0].backward()
                opt.step(); opt.zero_grad()
                t = time.perf_counter()
            if r: rs.append(wait/(time.perf_counter()-t0))
        show(f'share of a training step waiting for data, smallest ViT, {name}', rs, 'less than 0.02')

MEMORY = '''
import gc, resource, sys
from mixfast.all import cifar10, mix_dls
rss = lambda: int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()
peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])*1024
def run(data):
    sl,valid = data.train,data.valid
    dls = mix_dls(sl, valid, lam=0.5, ssl=sl[0] if sys.argv[1]=='two' else None, tfms='cifar', device='cpu')
    for dl in (dls.ssl, dls.mix, dls.sl, dls.valid)*2:
        for b in dl: pass
    return sl[0].nbytes+valid[0].nbytes
from mixfast.all import digits
run(digits())
data = cifar10(sys.argv[2]) # mapped, and not yet read
gc.collect()
base = rss(); open('/proc/self/clear_refs', 'w').write('5')
n = run(data)
print((peak()-base)/n)
'''
def memory(path, rounds=3):
    for kind in ('one','two'):
        rs = [float(subprocess.run([sys.executable, '-W', 'ignore', '-c', MEMORY, kind, path], capture_output=True, text=True, check=True).stdout) for _ in range(rounds)]
        show(f'peak memory of store and loaders / bytes of the images of CIFAR-10, {kind} data set{"s"*(kind=="two")}', rs, 'at most 1.2')

def bare(files):
    for f in files:
        with Image.open(f) as im: np.asarray(im.convert('RGB'))

def decoding(path, rounds=5):
    files = [str(f) for f in sorted(get_image_files(path))]
    chunks,rs = [files[i:i+256] for i in range(0, len(files), 256)],[]
    def pool():
        with ProcessPoolExecutor(os.cpu_count(), get_context('fork')) as ex: list(ex.map(bare, chunks))
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as d:
            load = lambda: load_files(files, 32, cache=d, bar=False)
            rs.append((timed(load), timed(pool), timed(load)))
    show(f'seconds to decode {len(files):,} PNGs to the cache / to nothing, {os.cpu_count()} cores', [a/b for a,b,_ in rs], 'at most 1.3')
    print(f'    {median(a for a,*_ in rs):.1f} s and {median(b for _,b,_ in rs):.1f} s; the second start {median(c for *_,c in rs):.2f} s')

def gpu(data, rounds=5, n=60):
    for tfms in ('cifar','tinyimagenet'):
        for on in (True,False):
            learn = mix_learner(mix_dls(data.train, data.valid, tfms=tfms, device='cuda', on_device=on), 'vit_tiny_patch16_224', patch_size=2)
            m,opt,dl,rs = *mixed(learn, 'cuda'),learn.dls.mix,[]
            fixed = dl.one_batch()
            def step(x, y):
                with torch.autocast('cuda', torch.bfloat16): loss = phase_loss(m(x, 'mix'), (y,), learn.loss_func, 'mix')[0]
                loss.backward()
                opt.step(); opt.zero_grad()
            def run(batches):
                torch.cuda.synchronize()
                for b in batches: step(*b)
                torch.cuda.synchronize()
            for r in range(rounds+1):
                it = iter(dl)
                a,b = timed(lambda: run(next(it) for _ in range(n))),timed(lambda: run([fixed]*n))
                if r: rs.append((a,b))
            where = 'on the device' if on else 'in main memory'
            show(f'step with its loader / on one batch, ViT-T, bf16, batch 256, {tfms!r}, images {where}', [a/b for a,b in rs], 'about 1')
            print(f'    {median(a for a,_ in rs)/n*1e3:.1f} ms and {median(b for _,b in rs)/n*1e3:.1f} ms a step; loader alone {rate(dl, n):,.0f} images/s')

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    if len(sys.argv)!=2: sys.exit(__doc__)
    path = Path(sys.argv[1]).expanduser()
    print(f'torch {torch.__version__}, {os.cpu_count()} cores, float32')
    decoding(path)
    data = cifar10(path)
    torch.set_num_threads(1)
    loaders(path, data); waiting(data); memory(path)
    if torch.cuda.is_available(): gpu(data)
