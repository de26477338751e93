"Images from archives to batches: what a reader of the notebooks need not see"
import hashlib, io, json, os, pickle, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from PIL import Image
from fastai.vision.all import (Brightness, CategoryBlock, ClassificationInterpretation, ColReader, DataBlock, DataLoaders, Flip, FlipItem, ImageBlock,
    Normalize, PILImageBW, RandTransform, RandomResizedCrop, RandomResizedCropGPU, RandomSplitter, Resize, Transform, accuracy, aug_transforms, get_image_files, load_learner,
    parent_label, resnet18, vision_learner)
from torchvision.datasets import CIFAR100

import mixfast.data.cache, mixfast.data.datasets
from mixfast.all import (BatchCrop, BatchFlip, BatchRandAugment, BatchResizedCrop, ImageStore, MixBatch, MixBlock,
    cifar10, cifar100, fraction, image_df, image_folder, load_files, mix_dls, noisy_labels, phase_dl, semi_supervised, tinyimagenet, valid_dl)
from mixfast.data.cache import _open_cache
from mixfast.data.loader import _seeded
from mixfast.data.mix import blend
from mixfast.data.store import as_images, image_stats
from conftest import images

SAMPLES = Path(__file__).parents[1]/'nbs'/'samples'

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))

def write(folder, n=12, size=16, ext='png', seed=0):
    "Images of three classes in class folders"
    x,y = images(n, size, 3, seed)
    for i,(im,c) in enumerate(zip(x, y)):
        (folder/f'c{c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(folder/f'c{c}'/f'{i:03}.{ext}')
    return folder

# Augmentations

AUGS = [BatchCrop(2), BatchFlip(), BatchResizedCrop(), BatchRandAugment()]

@pytest.mark.parametrize('shape', [(3,16,16), (1,8,20)], ids=str)
@pytest.mark.parametrize('aug', AUGS, ids=str)
def test_augmentation(aug, shape):
    "Any shape, either memory layout, a seed; the batch given is not changed; images of a batch get something each of their own"
    x = torch.randint(0, 256, (1,*shape), dtype=torch.uint8).expand(32,-1,-1,-1)
    outs = []
    for o in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        torch.manual_seed(0)
        before = o.clone()
        outs.append(aug(o))
        assert torch.equal(o, before) and outs[-1].shape==o.shape and outs[-1].dtype==torch.uint8
    assert torch.equal(*outs)
    assert len({o.numpy().tobytes() for o in outs[0]}) > (1 if isinstance(aug, BatchFlip) else 10)

def test_crop_keeps_pixels_and_flip_is_fair():
    x = torch.arange(1, 65, dtype=torch.uint8).view(1,1,8,8).expand(4000,-1,-1,-1)
    y = BatchCrop(2)(x)
    assert {(y[k]>0).sum().item() for k in range(4000)} <= {a*b for a in (6,7,8) for b in (6,7,8)}
    share = (BatchFlip(0.3)(x)[:,0,0,0]==8).float().mean()
    assert abs(share-0.3) < 0.03

def test_resized_crop_falls_back_to_the_middle():
    "A ratio that no box of the image has: the largest box in the middle, as torchvision"
    from torchvision.transforms import RandomResizedCrop as R
    from mixfast.data.augment import _random_boxes
    for h,w in ((4,400), (400,4), (64,64)):
        ours = [int(o[0]) for o in _random_boxes(1, h, w, (0.9,1), (3/4,4/3))] if h!=w else [0,0,64,64]
        theirs = R.get_params(torch.zeros(3,h,w), (0.9,1), (3/4,4/3)) if h!=w else (0,0,64,64)
        assert tuple(ours)==tuple(theirs)

# The store and its loaders

def test_store_shares_memory():
    x,y = images(20, c=3)
    ro = x.copy(); ro.flags.writeable = False
    for o in (x,ro): assert ImageStore(o).x.data_ptr()==o.ctypes.data
    dls = mix_dls((x,y), (x,y), bs=4)
    assert {dl.dataset.x.data_ptr() for dl in (dls.sl, dls.ssl, dls.mix, dls.valid)}=={x.ctypes.data}

def test_stats_of_a_large_store():
    x = np.random.default_rng(0).integers(0, 256, (3000,16,16,3)).astype(np.uint8)
    m,s = image_stats(x)
    assert np.allclose(m, (x/255).mean((0,1,2))) and np.allclose(s, (x/255).std((0,1,2)))

@pytest.mark.parametrize('ssl', [False, True])
def test_seed_decides_everything(ssl):
    "Order, partners and augmentations, whatever else draws random numbers; other seeds and passes differ; nobody else notices"
    x,y = images(40, 16, 3)
    y = np.arange(40)
    noise = lambda b: (b+torch.randint(0, 3, b.shape, dtype=torch.uint8)+np.random.randint(3)+random.randrange(3)).to(torch.uint8) # a user's own
    def epochs(seed, junk=0):
        dls = mix_dls((x,y), lam=0.5, ssl=images(30, 16, 3, seed=9)[0] if ssl else None, tfms=[*AUGS,noise], ssl_tfms=AUGS, bs=8, seed=seed, vocab=range(40))
        for _ in range(junk): torch.rand(3); random.random(); np.random.rand(); dls.one_batch(); dls.mix.one_batch()
        return [[torch.cat(o) for o in zip(*dls.mix)] for _ in range(2)]
    a,b,c = epochs(0),epochs(0, junk=5),epochs(1)
    for (xa,ya),(xb,yb) in zip(a, b): assert torch.equal(xa, xb) and torch.equal(ya, yb)
    assert not torch.equal(a[0][1], a[1][1]) and not torch.equal(a[0][1], c[0][1])
    assert sorted(a[0][1].tolist())==list(range(40))
    torch.manual_seed(5); r = torch.rand(1)
    torch.manual_seed(5); epochs(0); assert torch.equal(torch.rand(1), r)

def test_seeds_are_independent():
    "No loader of one seed draws what a loader of another seed, or another phase, draws"
    x,y = images(50, c=3)
    orders = [tuple(dl.get_idxs().reshape(50,-1).T.flatten()[:50]) for s in range(5) for dls in [mix_dls((x,y), lam=0.5, ssl=x, seed=s)] for dl in (dls.sl, dls.ssl, dls.mix)]
    assert len(set(orders))==15
    dl = mix_dls((x,y), lam=0.5, ssl=x, seed=0, bs=10).mix
    assert len({tuple(dl.order(np.random.default_rng(s))[:,1]) for s in range(9)})==9

def test_what_fastai_expects_of_loaders(tmp_path):
    "Transforms added to them, one image shown many times, the worst predictions, nothing to train on in an export"
    x,y = images(400, 8, 3)
    for ssl in (None, x):
        dls = mix_dls((x,y), (x[:20],y[:20]), lam=0.5, ssl=ssl, bs=8, tfms=BatchCrop(2), seed=0)
        dls.add_tfms([Flip()], 'after_batch')
        assert len(dls)==2 and len(dls.sl.after_batch.fs)==len(dls.valid.after_batch.fs)==2
        dls.train.show_batch(unique=True); dls.show_batch(max_n=3, figsize=(3,3))
        assert dls.one_batch()[0].shape==(8,3,8,8)
    dls = mix_dls((x,y), (x[:20],y[:20]), lam=0.5, ssl=x, bs=8)
    learn = vision_learner(dls, resnet18, pretrained=False)
    ClassificationInterpretation.from_learner(learn).plot_top_losses(4)
    with learn.no_bar(): assert torch.equal(learn.get_preds(dl=dls.test_dl([(x[3],y[3]),(x[5],y[5])], with_labels=True))[1], torch.tensor(y[[3,5]]))
    torch.save(dls.new_empty(), tmp_path/'d.pth')
    assert (tmp_path/'d.pth').stat().st_size < x.nbytes/4

def test_decode_after_a_move():
    "fastai decodes on the CPU what the device has prepared"
    prep = MixBatch([.5]*3, [.2]*3)
    b = prep((torch.zeros(2,3,4,4, dtype=torch.uint8), torch.tensor([0,1])))
    prep.mean,prep.std = [o.to('meta') for o in (prep.mean,prep.std)]
    assert prep.decodes([o.to('meta') for o in b])[0].device.type=='meta'

def test_seeded_restores_after_an_error():
    torch.manual_seed(1); want = torch.rand(1)
    torch.manual_seed(1)
    with pytest.raises(KeyError), _seeded(3): raise KeyError(torch.rand(5))
    assert torch.equal(torch.rand(1), want)

def test_like():
    "Grey, RGB, RGBA and sizes: what Pillow gives, to a level"
    x = np.random.default_rng(0).integers(0, 256, (1500,8,10,3)).astype(np.uint8)
    def like(x, shape): return ImageStore(x).like(shape).batch(range(len(x)))[0].permute(0,2,3,1)
    def close(a, pil): return (a[:5].int()-torch.tensor(np.stack([np.asarray(o) for o in pil])).int().view(a[:5].shape)).abs().max() <= 2
    pil = [Image.fromarray(o) for o in x[:5]]
    assert np.array_equal(like(x, (8,10,3)), x) and close(like(x, (8,10,1)), [o.convert('L') for o in pil])
    assert close(like(x, (4,4,3)), [o.crop((1,0,9,8)).resize((4,4), Image.BICUBIC) for o in pil]) and close(like(x, (16,20,1)), [o.convert('L').resize((20,16), Image.BICUBIC) for o in pil])
    assert like(x, (6,4,3)).shape==(1500,6,4,3)
    assert np.array_equal(like(x[...,:1], (8,10,3)), np.repeat(x[...,:1], 3, 3)) and ImageStore(x[...,:1]).like((8,10,3)).x.shape[3]==1
    assert np.array_equal(like(np.concatenate([x, x[...,:1]], 3), (8,10,3)), x)
    for n,c in ((3,4), (1,4), (2,3)):
        with pytest.raises(ValueError, match=f'images of {n} channels cannot be made images of {c}'): ImageStore(np.zeros((2,8,8,n), np.uint8)).like((8,8,c))

@pytest.mark.parametrize('a,b', [(1,3), (3,1)])
def test_grey_and_rgb_meet(a, b, make):
    "SSL images of another size and mode take those of the labelled ones, and train"
    learn = make(dls=mix_dls(images(12, 8, a), images(6, 8, a), lam=0.5, ssl=images(20, 14, b)[0], bs=4))
    assert learn.dls.mix.one_batch()[0].shape==learn.dls.ssl.one_batch()[0].shape==(4,a,8,8)
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl']

def test_blend_ends():
    a,b = torch.rand(2,3,8,8),torch.rand(2,3,4,4)
    assert torch.equal(blend(a, b, 1), a) and torch.equal(blend(b, b+1, 0), b+1) and blend(a, b, 0.5).shape==a.shape

def test_plain_learner():
    "A Learner that knows nothing of mixfast"
    x,y = images(24, 32, 3)
    dls = mix_dls((x,y), (x,y), bs=8, tfms='cifar', seed=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    assert learn.recorder.values[0][0] > 0 and learn.get_preds()[0].shape==(24,3)
    assert dls.new(dls.valid.dataset).one_batch()[0].shape==(8,3,32,32) and dls.vocab==['0','1','2']
    item,*_ = learn.predict(x[0]); assert item in dls.vocab
    (x0,y0),*_ = dls.valid.decode_batch(dls.valid.one_batch(), max_n=1)
    assert abs(x0*255-torch.tensor(x[0]).permute(2,0,1)).max() < 0.01 and y0=='0'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_store_on_the_device():
    x,y = images(40, 16, 3)
    on,off = [mix_dls((x,y), (x,y), lam=0.5, ssl=x, bs=8, tfms='cifar', seed=0, device='cuda', on_device=o) for o in (None,False)]
    assert on.sl.dataset.x.is_cuda and on.ssl.dataset.x.is_cuda and not off.sl.dataset.x.is_cuda
    for a,b in zip(on.mix, off.mix): assert a[0].is_cuda and torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[1], b[1])
    cpu = mix_dls((x,y), lam=0.5, ssl=x, bs=8, tfms='cifar', seed=0, device='cpu')
    assert torch.allclose(next(iter(cpu.mix))[0], off.new_empty() and next(iter(mix_dls((x,y), lam=0.5, ssl=x, bs=8, tfms='cifar', seed=0, device='cuda').mix))[0].cpu(), atol=1e-5)

# Loaders of phases are made from the training loader as it is now

def same_batches(a, b): return all(torch.equal(torch.as_tensor(p), torch.as_tensor(q)) for o,u in zip(list(a), list(b), strict=True) for p,q in zip(o, u, strict=True))

def test_phases_follow_the_training_loader(tmp_path):
    "Whatever is changed, and when: the same as if it had been so from the beginning; seeds and counts go on"
    x,y = images(40, 16, 3)
    u = images(30, 16, 3, seed=9)[0]
    files = write(tmp_path/'a', 16),write(tmp_path/'b', 20, seed=1)
    for kind in ('arrays','files'):
        def dls(bs, **kw): return mix_dls((x,y), ssl=u, tfms='cifar', bs=bs, seed=3, **kw) if kind=='arrays' else item_dls(*files, seed=3, bs=bs, **kw)
        changed = {'bs': dls(8), 'new': dls(8), 'before': dls(4)}
        for d in changed.values(): d.show_batch(max_n=2); d.ssl.one_batch(); d.mix.one_batch()
        changed['bs'].train.bs = 4
        changed['new'].train = changed['new'].train.new(bs=4)
        for d in (changed['bs'],changed['new']):
            for p in ('ssl','mix','sl'): assert same_batches(phase_dl(d, p), phase_dl(dls(4), p))
            assert d.train.phase('ssl').bs==4 and d.train.new(d.valid.dataset).full_bs==4
        d = changed['before']
        d.train.shuffle = d.train.drop_last = False
        for p in ('ssl','mix','sl'): assert len(phase_dl(d, p))==-(-phase_dl(d, p).n//4) and not phase_dl(d, p).shuffle
        d.to('meta')
        assert {phase_dl(d, p).device.type for p in ('ssl','mix','sl')}=={'meta'}

def test_phases_follow_added_transforms(tmp_path):
    "`vision_learner(pretrained=True)` normalises after the first look; what is random and added stays on the labelled side"
    sl,ssl = write(tmp_path/'a', 16),write(tmp_path/'b', 20, seed=1)
    norm = Normalize.from_stats([.5]*3,[.25]*3, cuda=False)
    late,early = item_dls(sl, ssl, batch_tfms=[]),item_dls(sl, ssl, batch_tfms=[norm])
    late.show_batch(); late.ssl.one_batch(); late.mix.one_batch()
    late.add_tfms([norm], 'after_batch')
    for p in ('ssl','mix','sl'): assert same_batches(phase_dl(late, p), phase_dl(early, p)) and next(iter(phase_dl(late, p)))[0].min() < 0
    x,y = images(40, 16, 3)
    dls = mix_dls((x,y), (x,y), lam=0.5, ssl=x, bs=8, seed=0)
    plain = [list(phase_dl(mix_dls((x,y), lam=0.5, ssl=x, bs=8, seed=0), p)) for p in ('ssl','mix')]
    dls.show_batch()
    dls.add_tfms([Double(),Negate()], 'after_batch')
    assert all(torch.equal(a, b*2) for (a,),(b,) in zip(dls.ssl, plain[0]))
    dl = dls.mix
    dl.before_iter()
    b = dl.load(dl.get_idxs()[:8], (0,2,1,0))
    assert torch.equal(dl.after_batch(b)[0], 0.5*dl.sides[0].after_batch(b[0])[0]+0.5*dl.sides[1].after_batch(b[1])[0])
    sl,plain_sl = next(iter(dls.sl))[0],next(iter(mix_dls((x,y), bs=8, seed=0).sl))[0]
    assert torch.equal(sl, -2*plain_sl)
    v,plain = dls.valid.one_batch()[0],mix_dls((x,y), (x,y), lam=0.5, ssl=x, bs=8, seed=0).valid.one_batch()[0]
    assert torch.equal(v, plain*2) # what is random is for training

class Double(Transform):
    order = 5
    def encodes(self, x:torch.Tensor): return x*2 if x.is_floating_point() else x

class Negate(RandTransform):
    "Of training alone"
    order = 6
    def encodes(self, x:torch.Tensor): return -x if x.is_floating_point() else x

def test_counts_and_seeds_are_shared():
    "A pass of any loader of a phase counts; a state is JSON and goes on in another process"
    x,y = images(40, 16, 3)
    def new(seed): return mix_dls((x,y), (x,y), ssl=x, tfms='cifar', bs=8, seed=seed)
    dls,other = new(3),new(4)
    for p in ('ssl','ssl','mix','sl'): list(phase_dl(dls, p))
    assert (dls.ssl.epoch, dls.mix.epoch, dls.sl.epoch, dls.valid.epoch)==(2,1,1,0)
    state = json.loads(json.dumps(dls.train.state_dict()))
    torch.save(state, b := io.BytesIO()); b.seek(0)
    assert torch.load(b, weights_only=True)==state==dict(seed=3, epochs={'0':1, '1':2, '2':1})
    early = other.ssl
    other.train.load_state_dict(state)
    assert early.epoch==2 and dls.ssl.sl is dls.train and dls.mix.ssl.source is dls.train
    for p in ('ssl','mix','sl'): assert same_batches(phase_dl(dls, p), phase_dl(other, p))
    dls.train.start_batch,dls.train.rank,dls.train.world_size = 1,1,2
    for p in ('ssl','mix'): assert (dl := phase_dl(dls, p)).start_batch==1 and dl.shard(0)==slice(8,16)
    torch.manual_seed(0); random.seed(0); a = torch.rand(1),random.random()
    torch.manual_seed(0); random.seed(0); dls.ssl; dls.mix; assert (torch.rand(1),random.random())==a # nobody notices

@pytest.mark.parametrize('phase', ['ssl','mix'])
@pytest.mark.parametrize('ssl', [False, True])
@pytest.mark.parametrize('kind', ['arrays','files'])
def test_views(tmp_path, kind, ssl, phase):
    "So many versions of each image, the first as ever; with any number of workers"
    if kind=='arrays':
        x,y = images(40, 16, 3)
        make_dls = lambda n: mix_dls((x,y), (x[:20],y[:20]), lam=0.5, ssl=images(30, 16, 3, seed=9)[0] if ssl else None, tfms=BatchFlip(), ssl_tfms=AUGS, bs=8, seed=0)
    else:
        paths = write(tmp_path/'a', 24),write(tmp_path/'b', 20, seed=1)
        make_dls = lambda n: item_dls(paths[0], paths[1] if ssl else None, n=n, block=dict(ssl_item_tfms=RandomResizedCrop(16), ssl_batch_tfms=Flip()))
    one,dls,many = make_dls(0),make_dls(0),make_dls(2)
    for e in range(2):
        batches = list(phase_dl(dls, phase, views=3))
        assert len(batches)==len(phase_dl(one, phase))
        for (xs,*ys),(x1,*y1) in zip(batches, phase_dl(one, phase)):
            assert type(xs) is tuple and len(xs)==3 and {tuple(o.shape) for o in xs}=={tuple(x1.shape)} and all(map(torch.equal, ys, y1))
            assert not torch.equal(xs[0], xs[1]) and not torch.equal(xs[1], xs[2])
            if phase=='ssl': assert torch.equal(xs[0], x1)
    for (a,*_),(b,*_) in zip(batches, [list(phase_dl(many, phase, views=3)) for _ in range(2)][1], strict=True): assert all(map(torch.equal, a, b))
    phase_dl(dls, phase, views=2).show_batch(max_n=3); plt.close('all')
    assert phase_dl(dls, phase, views=1).views==1 and phase_dl(dls, 'sl', views=3) is dls.train

def test_views_blend(tmp_path):
    "Each view of the mix is Eq. 2 of a view of both sides; without images or transforms for SSL, they are the labelled ones'"
    x,y = images(40, 16, 3)
    dls = mix_dls((x,y), ssl=images(30, 16, 3, seed=9)[0], lam=0.3, tfms=BatchFlip(), ssl_tfms=BatchCrop(2), bs=8, seed=0)
    dl = phase_dl(dls, 'mix', 2)
    dl.before_iter()
    b = dl.load(dl.get_idxs()[:8], (0,2,1,0))
    with _seeded(1): (m,y1) = dl.after_batch(b)
    with _seeded(1): (xs,y2),(us,) = dl.after_batch.fs[0].sides(b)
    assert torch.equal(y1, y2) and all(torch.allclose(o, 0.3*p+0.7*q, atol=1e-6) for o,p,q in zip(m, xs, us)) and not torch.equal(*xs) and not torch.equal(*us)
    for kw,differ in ((dict(tfms=AUGS), True), (dict(), False)):
        dls = mix_dls((x,y), bs=8, seed=0, **kw)
        for p in ('ssl','mix'): assert torch.equal(*phase_dl(dls, p, 2).one_batch()[0])!=differ

def test_validation_views(tmp_path):
    "The validation images with their labels, as those for SSL are augmented; `source` is the plain loader"
    x,y = images(40, 16, 3)
    paths = write(tmp_path/'a', 24),write(tmp_path/'b', 20, seed=1)
    for dls in (mix_dls((x,y), (x[:20],y[:20]), ssl_tfms=AUGS, bs=8, seed=0), item_dls(*paths, block=dict(ssl_item_tfms=RandomResizedCrop(16, min_scale=0.2)))):
        dl,n = valid_dl(dls, 2),dls.valid.n
        assert dl.source is dls.valid is valid_dl(dls) and len(dl)==len(dls.valid) and dl.n==n
        (a,ya),(b,yb) = [next(iter(o)) for o in (dl,dls.valid)]
        assert len(a)==2 and a[0].shape==b.shape and torch.equal(ya, yb) and not torch.equal(*a) and dls.valid.epoch==2
        assert torch.equal(next(iter(dls.valid))[0], b) # which is as ever

def test_views_need_our_loaders(tmp_path):
    dls = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(16)).dataloaders(write(tmp_path/'a', 24), bs=4, num_workers=0)
    assert phase_dl(dls, 'ssl') is phase_dl(dls, 'sl', 2) is dls.train and valid_dl(dls) is dls.valid
    for f in (lambda: phase_dl(dls, 'ssl', 2), lambda: valid_dl(dls, 2)):
        with pytest.raises(ValueError, match='objective needs 2 views of each image: use mix_dls, or a MixBlock'): f()
    with pytest.raises(ValueError, match="phase must be 'ssl', 'mix' or 'sl', got 'valid'"): mix_dls(images(9)).train.phase('valid')

def test_presizing(tmp_path):
    "Large items, batches cut to size: one size in all phases, at random on the labelled side alone"
    sl,ssl = write(tmp_path/'a', 16, size=40),write(tmp_path/'b', 20, size=48, seed=1)
    for tfms in ([*aug_transforms(size=16, max_rotate=30, p_affine=1.)], [RandomResizedCropGPU(16), Brightness()]):
        dls = item_dls(sl, ssl, item_tfms=Resize(32), batch_tfms=tfms)
        for p in ('ssl','mix','sl'): assert phase_dl(dls, p).one_batch()[0].shape==(4,3,16,16)
        x = phase_dl(item_dls(sl, ssl, item_tfms=Resize(32), batch_tfms=[]), 'ssl').one_batch()[0]
        assert abs(dls.ssl.one_batch()[0]-F.interpolate(x, (16,16), mode='bilinear', antialias=False)).mean() < 0.1 # as in validation
        own = item_dls(sl, ssl, item_tfms=Resize(32), batch_tfms=tfms, block=dict(ssl_batch_tfms=RandomResizedCropGPU(24)))
        assert own.ssl.one_batch()[0].shape[-1]==24 and own.mix.one_batch()[0].shape[-1]==16 # its own size is asked for

# What fastai does with a learner

def test_class_names(capsys):
    x,y = images(24, 32, 3)
    dls = mix_dls((x,y), (x,y), bs=8, vocab=['ant','bee','cow'], seed=0)
    assert dls.vocab==['ant','bee','cow'] and dls.c==3 and list(dls.vocab)==['ant','bee','cow'] and dls.vocab.o2i['cow']==2
    learn = vision_learner(dls, resnet18, pretrained=False)
    with learn.no_bar():
        interp = ClassificationInterpretation.from_learner(learn)
        interp.print_classification_report()
        out = capsys.readouterr().out
        assert all(o in out for o in ('ant','bee','cow'))
        interp.plot_confusion_matrix()
    assert [o.get_text() for o in plt.gca().get_xticklabels()]==['ant','bee','cow'] and interp.confusion_matrix().sum()==24
    with pytest.raises(ValueError, match="vocab must be class names that differ, got 'ant' twice"): mix_dls((x,y), vocab=['ant','bee','ant'])

def test_tta(tmp_path):
    "Predictions of images augmented as in training; validation is as ever before and after"
    x,y = images(24, 32, 3)
    learn = vision_learner(mix_dls((x,y), (x,y), bs=8, tfms='cifar', seed=0), resnet18, pretrained=False)
    with learn.no_bar():
        plain = learn.get_preds()[0]
        aug,preds = learn.tta(beta=None)[0]
        assert torch.allclose(preds, plain, atol=1e-6) and (aug-plain).abs().max() > 1e-3 and torch.equal(learn.get_preds()[0], plain)
        assert torch.equal(learn.tta()[1], torch.tensor(y)) and learn.dls.valid.dataset.split_idx is None
        assert torch.equal(learn.get_preds(dl=learn.dls.valid.new(learn.dls.train_ds))[0], plain) # images to train on, to be looked at
    learn = vision_learner(item_dls(write(tmp_path/'a', 16, size=32), item_tfms=Resize(32)), resnet18, pretrained=False)
    with learn.no_bar(): assert learn.tta()[0].shape==(4,3)

def test_weights(tmp_path):
    "Samples drawn by weights, in the phases that have labels; fastai's own loader for that would lose the SSL images"
    x,y = images(30, 8, 3)
    path,u = write(tmp_path/'a', 24),write(tmp_path/'b', 20, seed=1)
    block = DataBlock(blocks=(MixBlock(ssl=u, lam=0.5, seed=0), CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(0.25, seed=0), item_tfms=Resize(8))
    w = np.array([o=='c1' for o in map(parent_label, block.datasets(path).train.items)])
    dls = block.dataloaders(path, bs=4, num_workers=0, dl_kwargs=(dict(wgts=w), {}))
    for p in ('mix','sl'): assert {o.item() for _,y in phase_dl(dls, p) for o in y}=={1}
    assert len({o.item() for _,y in dls.valid for o in y}) > 1 and dls.ssl.wgts is None and len(dls.ssl)==5
    dls = block.weighted_dataloaders(path, np.ones(24), bs=4, num_workers=0)
    with pytest.raises(ValueError, match="WeightedDL knows nothing of the MixBlock's images"): phase_dl(dls, 'ssl')

# Files: MixBlock

def item_dls(path, ssl=None, n=0, seed=0, bs=4, block={}, **kw):
    block = DataBlock(blocks=(MixBlock(ssl=ssl, seed=seed, **{'lam':0.5, **block}), CategoryBlock), get_items=get_image_files, get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=0), **{'item_tfms':RandomResizedCrop(16, min_scale=0.5), 'batch_tfms':[Flip(), Normalize.from_stats([.5]*3,[.25]*3, cuda=False)], **kw})
    return block.dataloaders(path, bs=bs, num_workers=n)

def test_mixblock_phases(tmp_path):
    sl,ssl = write(tmp_path/'a', 16),write(tmp_path/'b', 20, size=24, seed=1)
    dls = item_dls(sl, ssl, block=dict(lam=0.25))
    assert isinstance(dls, DataLoaders) and [phase_dl(dls, p).n for p in ('ssl','mix','sl')]==[20,12,12] and dls.sl is dls.train
    assert [[*o.shape] for o in dls.mix.one_batch()]==[[4,3,16,16],[4]] and len(dls.ssl.one_batch())==1 and dls.vocab==['c0','c1','c2']
    idxs = dls.mix.get_idxs()[:4]
    for dl in (dls.sl, dls.ssl): dl.before_iter()
    with _seeded(1): b = dls.mix.load(idxs, (7,2,0,0)); m,y = dls.mix.after_batch(b)
    with _seeded(1): b = dls.mix.load(idxs, (7,2,0,0)); xs,y1 = dls.sl.after_batch(b[0]); xu, = dls.ssl.after_batch(b[1])
    assert torch.allclose(m, 0.25*xs+0.75*xu, atol=1e-5) and torch.equal(y, y1)
    assert b[1][0].float().mean() > 1 and -2.1 < xu.mean() < 2.1 and xu.min() < 0 # normalised as the labelled ones
    same = item_dls(sl)
    assert same.mix is same.sl and same.ssl.n==12 and len(same.ssl.one_batch())==1
    assert same.show_batch() is None and dls.show_batch() is None

def test_mixblock_own_transforms(tmp_path):
    "Random transforms belong to a side; the SSL side has none of the labelled one's"
    calls = []
    class Spy(Flip):
        def __init__(self, who): super().__init__(p=1.); self.who = who
        def before_call(self, b, split_idx): calls.append((self.who, split_idx)); super().before_call(b, split_idx)
    sl,ssl = write(tmp_path/'a', 16),write(tmp_path/'b', 16, seed=1)
    dls = item_dls(sl, ssl, item_tfms=Resize(16), batch_tfms=[Spy('sl'), Normalize.from_stats([.5]*3,[.25]*3, cuda=False)],
                   block=dict(ssl_batch_tfms=Spy('ssl'), ssl_item_tfms=FlipItem(1.)))
    for dl,want in ((dls.sl, {'sl'}), (dls.ssl, {'ssl'}), (dls.mix, {'sl','ssl'}), (dls.valid, set())):
        calls.clear(); list(dl)
        assert {n for n,split in calls if split==0}==want
    plain = item_dls(sl, ssl, item_tfms=Resize(16), batch_tfms=[], block=dict(ssl_item_tfms=FlipItem(1.)))
    x = np.asarray(Image.open(get_image_files(ssl).sorted()[0])).transpose(2,0,1)[:,:,::-1]/255
    assert any(np.allclose(x, o, atol=1e-6) for b, in plain.ssl for o in b)

@pytest.mark.parametrize('phase', ['ssl','mix','sl'])
def test_same_batches_with_any_number_of_workers(tmp_path, phase):
    sl,ssl = write(tmp_path/'a', 30),write(tmp_path/'b', 20, seed=1)
    runs = [[tuple(o.clone() for o in b) for dls in [item_dls(sl, ssl, n=n, block=dict(ssl_item_tfms=RandomResizedCrop(16)))] for _ in range(2) for b in phase_dl(dls, phase)] for n in (0,1,3)]
    for other in runs[1:]:
        assert len(other)==len(runs[0])
        for a,b in zip(runs[0], other): assert all(torch.equal(p, q) for p,q in zip(a, b))
    k = len(runs[0])//2
    assert not torch.equal(runs[0][0][0], runs[0][k][0]) # the next pass is another

def test_mixblock_frame_grey_and_fit(tmp_path, make):
    "SSL items from a frame; grey images; all phases; export and load"
    sl,ssl = write(tmp_path/'a', 24, size=8),write(tmp_path/'b', 20, size=12, seed=1)
    df = pd.DataFrame(dict(file=[str(f.relative_to(ssl)) for f in get_image_files(ssl)], other=0))
    dls = item_dls(sl, df, item_tfms=Resize(8), batch_tfms=[], block=dict(cls=PILImageBW, get_ssl=ColReader('file', pref=ssl)))
    learn = make(dls=dls)
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl'] and learn.mix.history.accuracy.iloc[-1] >= 0
    learn.export('e.pkl')
    again = load_learner(learn.path/'e.pkl')
    assert again.predict(get_image_files(sl)[0])[0] in dls.vocab and again.dls.train.opts['ssl'] is None

def test_mixblock_few_images(tmp_path, make):
    "Fewer than a batch: all of them are one, in another order each epoch"
    learn = make(dls=item_dls(write(tmp_path/'a', 9, size=8), write(tmp_path/'b', 5, size=8), bs=64, item_tfms=Resize(8), batch_tfms=[]))
    for p in ('ssl','mix','sl'): assert not torch.equal(*[next(iter(phase_dl(learn.dls, p)))[0] for _ in range(2)])
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert np.isfinite(learn.mix.history.train_loss).all()

@pytest.mark.parametrize('n', [0, 1])
def test_mixblock_names_a_file_that_it_cannot_read(tmp_path, n):
    f = sorted(get_image_files(write(tmp_path/'a', 12)))[0]
    dls = item_dls(tmp_path/'a', n=n)
    f.write_bytes(f.read_bytes()[:60])
    with pytest.raises(RuntimeError, match=f'cannot load .*{f.name}: '): list(dls.train); list(dls.valid.new(shuffle=False))

def test_mixblock_refuses_16_bits(tmp_path):
    "Pillow would make all of them white; a class that keeps them is the user's own affair"
    f = sorted(get_image_files(write(tmp_path/'a', 12)))[0]
    Image.fromarray(np.full((16,16), 40_000, np.uint16)).save(f)
    for a,b in ((tmp_path/'a', None), (write(tmp_path/'b', 12), tmp_path/'a')):
        with pytest.raises(RuntimeError, match=rf'cannot load .*{f.name}: it has pixels of more than 8 bits \(mode I;16\): convert it first'):
            for o in (phase_dl(item_dls(a, b), 'ssl'), item_dls(a, b).valid): list(o)
    class Deep(PILImageBW): _open_args = dict(mode='I')
    assert MixBlock(Deep).type_tfms[-1](f).mode=='I'

def test_ssl_images_of_another_size_are_asked_for(tmp_path, make):
    "Without a Resize the folder for SSL would be learned from at its own scale"
    sl,ssl = write(tmp_path/'a', 16),write(tmp_path/'b', 20, size=24, seed=1)
    learn = make(dls=item_dls(sl, ssl, item_tfms=None))
    with pytest.raises(ValueError, match=r'images for SSL are \[24, 24\] pixels, labelled ones \[16, 16\]: add item_tfms=Resize\(16\)'): learn.fit_mixtraining(1, 1)
    learn.fit_ssl(1); learn.fit_sl(1)
    for kw in (dict(item_tfms=Resize(16)), dict(item_tfms=None, block=dict(ssl_item_tfms=[]))):
        learn.dls = item_dls(sl, ssl, **kw)
        learn.fit_mixtraining(1, 1)

def test_mixblock_bad_input(tmp_path):
    (tmp_path/'empty').mkdir()
    for kw,match in ((dict(ssl=tmp_path/'empty'), 'there are none in'), (dict(ssl=[]), 'ssl has no images'), (dict(lam=2), r'lam must lie in \[0,1\]'), (dict(seed=-1), 'seed must be')):
        with pytest.raises(ValueError, match=match): MixBlock(**kw)

# Decoded files

def test_cache_follows_the_files(tmp_path):
    "Another size, mode, list, or a changed file is decoded anew; the same is not"
    files = sorted(get_image_files(write(tmp_path/'a')))
    c = tmp_path/'c'
    n = lambda: len(list(c.glob('*/meta.json')))
    x,i = load_files(files, 16, cache=c)
    assert np.array_equal(x, np.stack([np.asarray(Image.open(f)) for f in files])) and i.tolist()==list(range(12))
    load_files(files, 16, cache=c); assert n()==1
    load_files(files, 8, cache=c); load_files(files, 16, 'L', cache=c); load_files(files[1:], 16, cache=c); assert n()==4
    Image.fromarray(x[0]//2).save(files[0])
    os.utime(files[0], ns=(1, 1))
    assert np.array_equal(load_files(files, 16, cache=c)[0][0], x[0]//2) and n()==5
    x[:] = 0 # a user may write to what he is given; the cache does not change
    assert load_files(files[1:], 16, cache=c)[0].any()

@pytest.mark.parametrize('harm', ['truncate', 'flip', 'longer', 'meta', 'list', 'no meta', 'no images'])
def test_damaged_cache_is_rebuilt(tmp_path, harm):
    files = sorted(get_image_files(write(tmp_path/'a')))
    want = load_files(files, 16, cache=tmp_path/'c')[0].copy()
    d = next(p for p in (tmp_path/'c').iterdir() if p.is_dir())
    b,m = d/'images.bin',d/'meta.json'
    {'truncate': lambda: b.write_bytes(b.read_bytes()[:-5]), 'flip': lambda: b.write_bytes(b'\1'*5+b.read_bytes()[5:]), 'longer': lambda: b.write_bytes(b.read_bytes()+b'x'),
     'meta': lambda: m.write_text(m.read_text()[:9]), 'list': lambda: m.write_text('[1]'), 'no meta': m.unlink, 'no images': b.unlink}[harm]()
    assert np.array_equal(load_files(files, 16, cache=tmp_path/'c')[0], want)
    assert np.array_equal(_open_cache(d)[0], want)

LOAD = '''
import sys, time, mixfast.data.cache as c
slow = c._decode_image
def decode(*args): time.sleep(float(sys.argv[3])); return slow(*args)
c._decode_image = decode
from pathlib import Path
x,i = c.load_files(sorted(Path(sys.argv[1]).rglob('*.png')), 16, cache=sys.argv[2], bar=False)
print(x.shape, int(x.sum()))
'''
def start(folder, cache, delay):
    "A process that loads a folder; Ctrl-C reaches it even where a shell started the tests in the background"
    cmd = [sys.executable, '-c', LOAD, str(folder), str(cache), str(delay)]
    return subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def test_two_processes_build_one_cache(tmp_path):
    write(tmp_path/'a', 300)
    ps = [start(tmp_path/'a', tmp_path/'c', 0.002) for _ in range(3)]
    outs = [p.communicate(timeout=120) for p in ps]
    assert all(p.returncode==0 for p in ps), outs
    assert len({o for o,_ in outs})==1 and len(list((tmp_path/'c').glob('*/meta.json')))==1

@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_interrupted_build(tmp_path, sig):
    "A build that is killed leaves nothing that a later start would trust, and does not block it"
    write(tmp_path/'a', 600)
    p = start(tmp_path/'a', tmp_path/'c', 0.01)
    for _ in range(600):
        if list((tmp_path/'c').glob('*.tmp')): break
        time.sleep(0.05)
    time.sleep(0.3)
    p.send_signal(sig); p.communicate(timeout=60)
    assert p.returncode!=0 and not list((tmp_path/'c').glob('*/meta.json'))
    x,_ = load_files(sorted((tmp_path/'a').rglob('*.png')), 16, cache=tmp_path/'c', bar=False)
    assert x.shape==(600,16,16,3) and not list((tmp_path/'c').glob('*.tmp'))

def test_unreadable_files(tmp_path):
    "All of them in one error, at the end, from all processes; or left out with a warning; trying again decodes nothing"
    files = sorted(get_image_files(write(tmp_path/'a', 600)))
    files[3].write_bytes(files[3].read_bytes()[:60]); files[599].write_text('no image'); files.append(tmp_path/'gone.png')
    Image.fromarray(np.full((16,16), 40000, np.uint16)).save(files[300])
    for _ in range(2):
        with pytest.raises(ValueError) as e: load_files(files, 16, bar=False)
        msg = str(e.value)
        assert msg.startswith('4 of 601 images cannot be read') and all(str(files[i]) in msg for i in (3,300,599,600)) and 'skip_bad=True' in msg and 'more than 8 bits' in msg
    with pytest.warns(UserWarning, match='4 of 601'), pytest.MonkeyPatch.context() as m:
        m.setattr(mixfast.data.cache, '_build_cache', None)
        x,i = load_files(files, 16, skip_bad=True, bar=False)
    assert len(x)==597 and set(range(601))-set(i)=={3,300,599,600}
    with pytest.raises(ValueError, match='1 of 1 images cannot be read'): load_files(files[3:4], skip_bad=True)
    shutil.copy(files[0], tmp_path/'gone.png') # what could not be read for a while is tried again
    with pytest.warns(UserWarning, match='3 of 601'): assert len(load_files(files, 16, skip_bad=True, bar=False)[0])==598
    many = [tmp_path/f'{k}.png' for k in range(60)]
    with pytest.raises(ValueError, match='and 10 more'): load_files(many+files[:1])

def test_modes_and_sizes(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40,60,3)).astype(np.uint8)
    for n,im in dict(a=Image.fromarray(x), b=Image.fromarray(x).convert('L'), c=Image.fromarray(x).convert('P'), d=Image.fromarray(x).convert('RGBA'), e=Image.fromarray(x).convert('1')).items(): im.save(tmp_path/f'{n}.png')
    Image.fromarray(x).convert('CMYK').save(tmp_path/'f.jpg'); Image.fromarray(x).resize((900,600)).save(tmp_path/'g.jpg')
    fs = sorted(get_image_files(tmp_path))
    assert np.array_equal(as_images(fs, (20,30,3)), load_files(fs, np.array([20,30]))[0]) # to predict as to train
    a,b = load_files(fs, (20,30))[0],load_files(fs, 20, 'L')[0]
    assert a.shape==(7,20,30,3) and b.shape==(7,20,20,1) and np.array_equal(a[0], np.asarray(Image.fromarray(x).resize((30,20), Image.BICUBIC)))
    for kw,match in ((dict(size=0), 'size must be'), (dict(size=(1,2,3)), 'size must be'), (dict(mode='HSV'), 'mode must be')):
        with pytest.raises(ValueError, match=match): load_files(fs, **kw)

# Data sets

class Bomb:
    def __reduce__(self): return os.mkdir, (str(Path(os.environ['XDG_CACHE_HOME']).parent/'ran'),)

@pytest.fixture
def cifar100_batches(tmp_path, monkeypatch):
    "A small CIFAR-100 of pickled batches, whose checksums torchvision is told"
    base = tmp_path/'cifar-100-python'; base.mkdir()
    rng = np.random.default_rng(0)
    def dump(fn, o): (base/fn).write_bytes(pickle.dumps(o)); return [fn, hashlib.md5((base/fn).read_bytes()).hexdigest()]
    batch = lambda n: dict(data=rng.integers(0, 256, (n,3072)).astype(np.uint8), fine_labels=[i%100 for i in range(n)], coarse_labels=[i%100//5 for i in range(n)], filenames=[])
    monkeypatch.setattr(CIFAR100, 'train_list', [dump('train', batch(200))]); monkeypatch.setattr(CIFAR100, 'test_list', [dump('test', batch(100))])
    meta = dump('meta', dict(fine_label_names=[f'f{i}' for i in range(100)], coarse_label_names=[f'c{i}' for i in range(20)]))
    monkeypatch.setattr(CIFAR100, 'meta', {**CIFAR100.meta, 'filename':meta[0], 'md5':meta[1]})
    return base

def test_cifar100(cifar100_batches):
    base = cifar100_batches
    raw = pickle.loads((base/'train').read_bytes())
    for path in (base, base.parent):
        d = cifar100(path)
        assert d.train[0].shape==(200,32,32,3) and d.valid[0].shape==(100,32,32,3) and d.vocab[7]=='f7' and d.train[1].tolist()==raw['fine_labels']
    assert np.array_equal(d.train[0][3], raw['data'][3].reshape(3,32,32).transpose(1,2,0))
    c = cifar100(base, 'coarse')
    assert c.train[1].tolist()==raw['coarse_labels'] and len(c.vocab)==20 and c.valid[1].max()==19
    with pytest.raises(ValueError, match="labels must be 'fine' or 'coarse', got 'both'"): cifar100(base, 'both')

def test_a_pickle_that_is_not_the_archive_is_not_read(cifar100_batches):
    f = cifar100_batches/'test'
    f.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r'test is damaged, its MD5 is not \w+: download'): cifar100(cifar100_batches)
    assert not (cifar100_batches.parent/'ran').exists()
    pickle.loads(f.read_bytes()); assert (cifar100_batches.parent/'ran').exists() # it would have run
    f.unlink()
    with pytest.raises(FileNotFoundError, match='test is missing: unpack'): cifar100(cifar100_batches)

def test_cifar100_folders(tmp_path):
    x = np.zeros((32,32,3), np.uint8)
    for s in ('train','test'):
        for i in range(100):
            d = tmp_path/'cifar100'/s/f'c{i//5:02}'/f'f{i:02}'; d.mkdir(parents=True)
            Image.fromarray(x+i).save(d/'0.png')
    fine,coarse = cifar100(tmp_path),cifar100(tmp_path/'cifar100', 'coarse')
    assert len(fine.vocab)==100 and len(coarse.vocab)==20 and fine.train[0][:,0,0,0].tolist()==fine.train[1].tolist() and coarse.train[1].tolist()==[i//5 for i in range(100)]
    shutil.rmtree(tmp_path/'cifar100'/'test'/'c03')
    with pytest.raises(ValueError, match=r"test has no images of \['f15'"): cifar100(tmp_path)
    with pytest.raises(ValueError, match='has 10 classes, not 100'): cifar100(SAMPLES/'cifar10')

def test_downloads(monkeypatch):
    "Without a path it is fastai that knows where the archive is"
    seen = []
    monkeypatch.setattr(mixfast.data.datasets, 'untar_data', lambda url: seen.append(url) or SAMPLES/('cifar10' if 'cifar' in url else 'tiny-imagenet-200'))
    assert len(cifar10().train[0])==30 and len(tinyimagenet().train[0])==24
    assert seen[0].endswith('cifar10.tgz') and seen[1].endswith('tiny-imagenet-200.zip')

def test_tinyimagenet(tmp_path):
    root = tmp_path/'tiny-imagenet-200'
    shutil.copytree(SAMPLES/'tiny-imagenet-200', root)
    d = tinyimagenet(tmp_path)
    assert d.vocab[:2]==['goldfish','goose'] and d.train[1].tolist()==[i//4 for i in range(24)] and np.bincount(d.valid[1]).tolist()==[2]*6
    grey = [i for i,o in enumerate(d.train[0]) if (o[...,0]==o[...,1]).all() and (o[...,1]==o[...,2]).all()]
    assert grey==[4] or len(grey)==1 # one JPEG is grey
    assert tinyimagenet(root, size=32).valid[0].shape==(12,32,32,3)
    ann = root/'val'/'val_annotations.txt'
    rows = [l.split('\t') for l in ann.read_text().splitlines()]
    for fn,w,*_ in rows: # as people sort it
        (root/'val'/w/'images').mkdir(parents=True, exist_ok=True); shutil.copy(root/'val'/'images'/fn, root/'val'/w/'images'/fn)
    old = ann.read_text(); shutil.move(root/'val'/'images', tmp_path/'images'); ann.unlink()
    assert np.bincount(tinyimagenet(root).valid[1]).tolist()==[2]*6
    shutil.move(tmp_path/'images', root/'val'/'images')
    ann.write_text(old.replace(rows[2][1], 'n00000000', 1))
    with pytest.raises(ValueError, match=r'val_annotations.txt, line \d+: expected an image and a class'): tinyimagenet(root)
    ann.write_text(old); (root/'val'/'images'/rows[1][0]).unlink()
    with pytest.raises(ValueError, match=rf'{rows[1][0]}: FileNotFoundError'): tinyimagenet(root)
    shutil.rmtree(root/'train'/'n01882714')
    with pytest.raises(ValueError, match=r"train has no images of \['n01882714'\]"): tinyimagenet(root)
    with pytest.raises(FileNotFoundError, match='expected wnids.txt'): tinyimagenet(tmp_path/'train')
    (root/'words.txt').unlink(); shutil.copytree(SAMPLES/'tiny-imagenet-200'/'train'/'n01882714', root/'train'/'n01882714'); shutil.copytree(SAMPLES/'tiny-imagenet-200'/'val'/'images', root/'val'/'images', dirs_exist_ok=True)
    assert tinyimagenet(root).vocab[0]=='n01443537' # without words.txt

def test_image_folder_and_frame(tmp_path):
    root = write(tmp_path/'d'/'train', 12)
    write(tmp_path/'d'/'val', 6, seed=1)
    d = image_folder(tmp_path/'d', 16)
    assert len(d.train[0])==12 and len(d.valid[0])==6 and d.vocab==['c0','c1','c2'] and d.train[1].dtype==np.int64
    (tmp_path/'d'/'val'/'c9').mkdir(); Image.new('RGB', (16,16)).save(tmp_path/'d'/'val'/'c9'/'a.png')
    with pytest.raises(ValueError, match="has the label 'c9', which is none of 3 training classes"): image_folder(tmp_path/'d', 16)
    bad = root/'c0'/'000.png'; bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match='000.png'): image_folder(root, 16)
    with pytest.warns(UserWarning, match='000.png'): d = image_folder(root, 16, skip_bad=True)
    assert len(d.train[0])+len(d.valid[0])==11 and len(d.train[1])==len(d.train[0])
    fs = [f for f in sorted(get_image_files(root)) if f!=bad]
    df = pd.DataFrame(dict(f=fs, kind=[int(f.parent.name[1])*10 for f in fs], v=[i%4==0 for i in range(len(fs))]))
    d = image_df(df, fn_col='f', label_col='kind', valid_col='v', size=16)
    assert d.vocab==['0','10','20'] and len(d.valid[0])==df.v.sum() and d.valid[1].tolist()==(df.kind[df.v]//10).tolist()
    with pytest.raises(ValueError, match='has no label'): image_df(df.assign(kind=df.kind.where(df.index!=2)), label_col='kind', size=16)
    for bad in (np.nan, 'False', 2):
        with pytest.raises(ValueError, match="column 'v' must be True or False, got"): image_df(df.assign(v=[bad]+[True]*10), valid_col='v', size=16)
    with pytest.raises(ValueError, match='0 of 11 images are for validation'): image_df(df.assign(v=False), valid_col='v', size=16)

def test_fractions():
    y = np.repeat(np.arange(10), 500)
    for p in (10,25,50,75,100):
        i,s = fraction(y, p, seed=3),fraction(y, p, seed=3, stratify=True)
        assert len(set(i))==len(i)==len(s)==50*p and np.array_equal(i, fraction(y, p, seed=3)) and np.bincount(y[s]).tolist()==[5*p]*10
    assert not np.array_equal(fraction(y, 10, 3), fraction(y, 10, 4)) and len(set(np.bincount(y[fraction(y, 10, 3)])))>1
    hits = np.mean([np.isin(np.arange(100), fraction(np.zeros(100), 10, s)) for s in range(2000)], 0)
    assert abs(hits-0.1).max() < 0.03 # each image as often as any other
    (xl,yl),every = semi_supervised((np.arange(5000), y), 25, seed=3)
    assert np.array_equal(every, np.arange(5000)) and np.array_equal(xl, fraction(y, 25, 3)) and np.array_equal(yl, y[xl]) # SSL has the labelled ones too
    series = pd.Series(y, index=np.arange(5000)[::-1])
    assert np.array_equal(semi_supervised((y, series), 25, seed=3)[0][1], yl) and np.array_equal(fraction(series, 25, 3, True), fraction(y, 25, 3, True))
    with pytest.raises(ValueError, match='cannot draw 1 % of each class, choose another p'): fraction(y[::50], 1, stratify=True)
    with pytest.raises(ValueError, match='2 % of 9 images are none'): fraction(y[:9], 2)

def test_label_noise_is_uniform_over_the_others():
    y = np.repeat(np.arange(4), 20000)
    z = noisy_labels(y, 0.2, seed=1)
    for c in range(4):
        share = np.bincount(z[y==c], minlength=4)/20000
        assert abs(share[c]-0.8) < 0.01 and abs(np.delete(share, c)-0.2/3).max() < 0.01
    assert np.array_equal(z, noisy_labels(y, 0.2, seed=1)) and noisy_labels(y[:5], 1, c=9).max() <= 8
    for c in (None, 1): pytest.raises(ValueError, noisy_labels, [0,0], 0.2, c)
    with pytest.raises(ValueError, match='c must be more than the highest label, and 2 or more, got 3'): noisy_labels(y, 0.2, 3)

# The real archives, where they are

@pytest.fixture(scope='session')
def real(tmp_path_factory):
    "A folder with cifar-10-batches-py and tiny-imagenet-200: $MIXFAST_DATA, or unpacked from beside the repository"
    if d := os.environ.get('MIXFAST_DATA'): return Path(d)
    unpack = Path(__file__).resolve().parents[2]/'shared'/'data'/'unpack.py'
    if not unpack.exists(): pytest.skip('no real archives: set MIXFAST_DATA to a folder with cifar-10-batches-py and tiny-imagenet-200')
    d = tmp_path_factory.mktemp('real')
    for layout in ('batches','folders'): subprocess.run([sys.executable, unpack, d, '--layout', layout], check=True)
    return d

def test_real_cifar10(real, tmp_path):
    "Both layouts hold the same images; the published mean and deviation; a batch that is damaged is named"
    a = cifar10(real)
    assert a.train[0].shape==(50000,32,32,3) and a.valid[0].shape==(10000,32,32,3) and np.bincount(a.train[1]).tolist()==[5000]*10
    m,s = image_stats(a.train[0])
    assert np.allclose(m, [0.4914,0.4822,0.4465], atol=1e-4) and np.allclose(s, [0.2470,0.2435,0.2616], atol=1e-4)
    if (real/'cifar10').is_dir():
        b = cifar10(real/'cifar10', cache=tmp_path/'c')
        key = lambda x,y: sorted(hashlib.md5(o.tobytes()+bytes([c])).digest() for o,c in zip(x, y))
        assert a.vocab==b.vocab and key(*a.train)==key(*b.train) and key(*a.valid)==key(*b.valid)
    shutil.copytree(real/'cifar-10-batches-py', tmp_path/'cifar-10-batches-py')
    f = tmp_path/'cifar-10-batches-py'/'data_batch_3'
    f.write_bytes(f.read_bytes()[:10**6])
    with pytest.raises(ValueError, match='data_batch_3 is damaged'): cifar10(tmp_path)

def test_real_cross_dataset(real, tmp_path, make):
    "SSL on TinyImageNet, SL on 10 % of CIFAR-10"
    tiny,c = tinyimagenet(real, cache=tmp_path/'c'),cifar10(real)
    assert len(tiny.vocab)==200 and len(tiny.valid[0])==10000 and len(set(tiny.vocab))==200
    i = fraction(c.train[1], 10)
    dls = mix_dls((c.train[0][i],c.train[1][i]), c.valid, lam=0.5, ssl=tiny.train[0], vocab=c.vocab, tfms='cifar', seed=0)
    assert dls.ssl.dataset.shape==(32,32,3) and len(dls.mix)==5000//256 and dls.mix.one_batch()[0].shape==(256,3,32,32)
