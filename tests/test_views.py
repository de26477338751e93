"Views: operations and draws as torchvision's, sets, loaders, blends, what they cost"
import json, time
import pytest, timm, torch, torch.nn.functional as F
from PIL import Image
from fastai.vision.all import (Callback, CategoryBlock, DataBlock, Flip, ImageBlock, Normalize, PILImageBW, RandomSplitter, Resize,
    get_image_files, parent_label, set_seed)
from torch import nn
from torchvision.transforms import ColorJitter
from torchvision.transforms.v2 import functional as TF

from mixfast.all import (BatchBlur, BatchCrop, BatchFlip, BatchGray, BatchJitter, BatchRandAugment, BatchResizedCrop, BatchSolarize, MixBlock,
    Objective, ViewTfms, mix_dls, mix_learner, phase_dl, valid_dl, view_pipe, view_tfms)
from mixfast.data.loader import _seeded
from mixfast.data.views import _brightness, _contrast, _hue, _saturation
from mixfast.objective.features import find_layout
from conftest import images, same, state

OPS = [BatchJitter(), BatchGray(), BatchBlur(), BatchSolarize(), BatchResizedCrop(), BatchFlip(), view_tfms('simclr'), view_tfms('dino')]

def draw(n=64, size=24, c=3):
    "Smooth images with flat and grey places, uint8"
    x = F.interpolate(torch.rand(n,c,6,6), size=size, mode='bicubic').clamp(0, 1).mul(255).byte()
    x[:,:,:4] = x[:,:1,:4]
    x[:,:,-3:] = 0
    return x

# Operations

@pytest.mark.parametrize('op,theirs,lo,hi', [(_brightness,TF.adjust_brightness,0,2.5), (_contrast,TF.adjust_contrast,0,2.5),
    (_saturation,TF.adjust_saturation,0,2.5), (_hue,TF.adjust_hue,-0.5,0.5)], ids=lambda o: getattr(o, '__name__', ''))
def test_colours_are_torchvisions(op, theirs, lo, hi):
    torch.manual_seed(0)
    x,f = draw(),torch.linspace(lo, hi, 64)
    res,want = op(x.float(), f[:,None,None,None])/255,torch.stack([theirs(o/255, v) for o,v in zip(x, f.tolist())])
    assert (res-want).abs().max() < 1e-4
    if op in (_brightness,_contrast):
        g = x[:,:1]
        assert (op(g.float(), f[:,None,None,None])/255-torch.stack([theirs(o/255, v) for o,v in zip(g, f.tolist())])).abs().max() < 1e-4

def test_the_others_are_torchvisions():
    torch.manual_seed(0)
    for size in (24,90,7):
        x,r = draw(16, size),max(size//20, 1)
        for s in (0.2,1.,2.):
            want = TF.gaussian_blur(x/255, [2*r+1]*2, [s,s])
            assert (BatchBlur(1, (s,s))(x.float())/255-want).abs().max() < 1e-4
        assert (BatchGray(1)(x.float())/255-TF.rgb_to_grayscale(x/255, 3)).abs().max() < 1e-4
        assert torch.equal(BatchSolarize(1, 100)(x), TF.solarize(x, 100))

def test_jitter_in_an_order_of_its_own():
    "What the whole jitter makes is what torchvision's operations make in the order that was drawn, for each image"
    x,jit = draw(24),BatchJitter(p=1)
    torch.manual_seed(3)
    torch.rand(24) # the coins
    values = [v.flatten().tolist() for _,v in jit._draws(24, 3)]
    order = torch.rand(24, 4).argsort(1).tolist()
    fs = TF.adjust_brightness,TF.adjust_contrast,TF.adjust_saturation,TF.adjust_hue
    want = []
    for k,o in enumerate(x/255):
        for j in order[k]: o = fs[j](o, values[j][k])
        want.append(o)
    torch.manual_seed(3)
    assert (jit(x.float())/255-torch.stack(want)).abs().max() < 1e-4
    assert len({tuple(o) for o in order}) > 12

def test_draws_are_torchvisions():
    "Quantiles, means and orders of several thousand draws; shares of images"
    torch.manual_seed(0)
    n,q = 6000,torch.linspace(0.02, 0.98, 9)
    for (b,c,s,h),m in (((.8,.8,.8,.2),5), ((.4,.4,.2,.1),5), ((.8,.8,.8,.2),10)):
        ours = [v.flatten() for _,v in BatchJitter(b, c, s, h, magnitude=m)._draws(n, 3)]
        ranges = [(max(1-v*m/5, 0), 1+v*m/5) for v in (b,c,s)] + [(-h*m/5, h*m/5)]
        draws = [ColorJitter.get_params(*ranges) for _ in range(n)]
        for k,(o,(lo,hi)) in enumerate(zip(ours, ranges)):
            t = torch.tensor([d[k+1] for d in draws])
            assert lo<=o.min() and o.max()<=hi
            assert (o.quantile(q)-t.quantile(q)).abs().max() < 0.04*(hi-lo) and abs(o.mean()-t.mean()) < 0.02*(hi-lo)
    x = torch.full((n,3,4,4), 200, dtype=torch.uint8)
    x[:,0] = 40
    for f,p in ((BatchJitter(p=0.8), 0.8), (BatchGray(0.2), 0.2), (BatchSolarize(0.2), 0.2)):
        assert abs((f(x)!=x).flatten(1).any(1).float().mean()-p) < 0.02

@pytest.mark.parametrize('op', OPS, ids=lambda o: str(o)[:20])
def test_any_kind_of_batch(op):
    "Bytes or floats, one channel or three, either layout, one image: the batch given is not changed, a seed decides, each image has its own"
    for c,shape in ((3,(20,36)), (1,(36,20)), (3,(1,1))):
        x = torch.randint(0, 256, (1,c,*shape), dtype=torch.uint8).expand(24,-1,-1,-1)
        outs = []
        for o in (x.contiguous(), x.contiguous(memory_format=torch.channels_last), x.float()):
            torch.manual_seed(0)
            before,res = o.clone(),op(o)
            assert torch.equal(o, before) and res.ndim==4 and len(res)==24 and res.shape[1]==c
            assert res.dtype==(torch.float32 if isinstance(op, ViewTfms) else o.dtype) and 0<=res.min() and res.max()<=255.01
            outs.append(res)
        assert torch.equal(*outs[:2]) and (outs[0].float()-outs[2]).abs().max() < 0.51
        if isinstance(op, ViewTfms) and c==3 and shape!=(1,1): assert len({o.numpy().tobytes() for o in outs[0]}) > 20
    assert op(x[:1].float()).shape==(1,3,1,1)

# Sets

def test_published_sets():
    "The numbers of the papers, by view"
    def numbers(name, i, small=False):
        s = view_tfms(name)
        d = {type(f).__name__[5:].lower(): f for f in (s.small if small else s.pipes)[i]}
        j = d['jitter']
        return d['resizedcrop'].scale,(j.brightness,j.contrast,j.saturation,j.hue,j.p),d['gray'].p,getattr(d.get('blur'), 'p', 0),getattr(d.get('solarize'), 'p', 0)
    byol,simclr = (.4,.4,.2,.1,.8),(.8,.8,.8,.2,.8)
    assert numbers('simclr', 0)==((.08,1), simclr, .2, .5, 0) and numbers('moco', 0)==((.2,1), (.4,.4,.4,.1,.8), .2, .5, 0)
    assert numbers('byol', 0)==((.08,1), byol, .2, 1, 0) and numbers('byol', 1)==((.08,1), byol, .2, .1, .2)
    assert [numbers('dino', i) for i in range(3)]==[((.4,1), byol, .2, 1, 0), ((.4,1), byol, .2, .1, .2), ((.05,.4), byol, .2, .5, 0)]
    assert numbers('simclr', 0, small=True)==((.08,1), (.4,.4,.4,.1,.8), .2, 0, 0) and numbers('byol', 1, small=True)==((.08,1), byol, .2, 0, .2)

def test_sizes_and_magnitudes_are_set():
    "From the next batch on, in all lists; what the set says of itself stays"
    x = draw(8, 64)
    for n,local in ((None,32), (96,48), (224,96), (40,16)):
        s = view_tfms('dino', size=n)
        assert [s(x, i).shape[-1] for i in range(5)]==[n or 64]*2+[local]*3 and s.size==n
        before = str(s)
        s.size,s.magnitude = 48,0
        assert [s(x, i).shape[-1] for i in range(3)]==[48,48,24] and str(s)==before and (s.size, s.magnitude)==(48,0)
        s.size = None
        assert s(x).shape[-1]==64
    s = view_tfms('simclr', flip=0, gray=0, blur=0, scale=(1,1), magnitude=0) # nothing is left that changes an image
    square = [o for o in (s(x)-x).abs().flatten(1).amax(1)]
    assert sum(o<1e-3 for o in square) > 2 and s.magnitude==0 # where the box has the image's aspect ratio
    small = view_tfms('simclr', size=24)
    assert small(draw(8, 32)).shape[-1]==24 and small(x).shape[-1]==24

def test_views_are_numbered():
    "The last list serves all views beyond it; a function alone is a list"
    x = draw(4)
    s = ViewTfms(BatchFlip(0), [BatchFlip(1), BatchSolarize(1)])
    for i,want in ((0,x), (1,BatchSolarize(1)(x.flip(-1))), (7,BatchSolarize(1)(x.flip(-1)))): assert torch.equal(s(x, i), want.float())
    assert ViewTfms([BatchRandAugment(1, 9), BatchCrop(2)])(x).dtype==torch.float32 and s.size is None and s.magnitude is None

@pytest.mark.parametrize('f,exc,match', [
    (lambda: view_tfms('swav'), ValueError, r"name must be one of \['simclr', 'byol', 'moco', 'dino'\], got 'swav'"),
    (lambda: view_tfms('byol', size=0), ValueError, 'size must be a whole number from 1 up, got 0'),
    (lambda: view_tfms('byol', size=96.), ValueError, 'size must be a whole number from 1 up, got 96.0'),
    (lambda: view_tfms('byol', magnitude=-1), ValueError, 'magnitude must be a number from 0 up, got -1'),
    (lambda: view_tfms('byol', magnitude=float('nan')), ValueError, 'magnitude must be a number from 0 up, got nan'),
    (lambda: view_tfms('byol', blurr=1), TypeError, 'blurr'),
    (lambda: view_tfms('byol', blur=2), ValueError, r'p must lie in \[0,1\], got 2'),
    (lambda: view_pipe(share=0), ValueError, 'share must be above 0, or nothing is left'),
    (lambda: ViewTfms(), ValueError, 'pass a list of augmentations for each view'),
    (lambda: mix_dls(images(9), ssl_tfms='swav'), ValueError, r"ssl_tfms must be functions of a batch or one of \['cifar', 'tinyimagenet', 'simclr', 'byol', 'moco', 'dino'\]"),
    (lambda: mix_dls(images(9), tfms='simclr'), ValueError, r"one of \['cifar', 'tinyimagenet'\], got 'simclr'"),
    (lambda: mix_dls(images(9), ssl_tfms=ViewTfms(lambda o: o[:,:,:0])), ValueError, 'ssl_tfms: ViewTfms'),
    (lambda: MixBlock(ssl_batch_tfms='swav'), ValueError, r"ssl_batch_tfms must be transforms of a batch or one of \['simclr', 'byol', 'moco', 'dino'\], got 'swav'")])
def test_errors_are_raised_at_the_call(f, exc, match):
    with pytest.raises(exc, match=match): f()

# Loaders

def arrays(size=24, ssl=True, **kw):
    x,y = images(24, size, 3)
    kw = {'tfms':BatchFlip(), 'ssl_tfms':'byol', **kw}
    return mix_dls((x,y), (x[:9],y[:9]), lam=0.5, ssl=images(30, size, 3, seed=9)[0] if ssl else None, bs=8, seed=0, **kw)

def write(folder, n, size=40, seed=0):
    for i,(im,c) in enumerate(zip(*images(n, size, 3, seed))):
        (folder/f'c{c}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(folder/f'c{c}'/f'{i:03}.png')
    return folder

def files(tmp_path, ssl=True, n=0, cls=None, **kw):
    if not (tmp_path/'a').exists(): write(tmp_path/'a', 16), write(tmp_path/'b', 12, seed=1)
    kw = {'ssl_batch_tfms':'dino', **({'cls':cls} if cls else {}), **kw}
    c = 1 if cls is PILImageBW else 3
    block = DataBlock(blocks=(MixBlock(ssl=tmp_path/'b' if ssl else None, seed=0, **{'lam':0.5, **kw}), CategoryBlock), get_items=get_image_files, get_y=parent_label,
        splitter=RandomSplitter(0.25, seed=0), item_tfms=Resize(40), batch_tfms=[Flip(), Normalize.from_stats([.5]*c,[.25]*c, cuda=False)])
    return block.dataloaders(tmp_path/'a', bs=4, num_workers=n)

def batches(dl): return [(b[0] if isinstance(b[0], tuple) else b[:1])+tuple(b[1:]) for b in dl]
def alike(a, b): return all(len(p)==len(q) and all(map(torch.equal, p, q)) for p,q in zip(a, b, strict=True))

@pytest.mark.parametrize('phase', ['ssl','mix'])
@pytest.mark.parametrize('ssl', [False,True])
def test_views_of_files(tmp_path, ssl, phase):
    "The same for any number of workers, and again after a state is loaded; normalised; of several sizes; anew in each pass"
    one,two = [phase_dl(files(tmp_path, ssl, n), phase, 4) for n in (0,2)]
    a,b = [[batches(dl) for _ in range(2)] for dl in (one,two)]
    assert alike(a[0], b[0]) and alike(a[1], b[1]) and not alike(a[0], a[1])
    assert [tuple(o.shape[2:]) for o in a[0][0][:4]]==[(40,40)]*2+[(16,16)]*2 and a[0][0][0].min() < -0.5
    again = files(tmp_path, ssl)
    again.train.load_state_dict(json.loads(json.dumps(dict(two.source.state_dict(), epochs={str(two.tag): 1}))))
    assert alike(batches(phase_dl(again, phase, 4)), a[1])

@pytest.mark.parametrize('phase', ['ssl','mix'])
def test_views_of_arrays(phase):
    "After a state is loaded the same; one view is the first of several; whoever has rank 1 draws its own, always the same"
    a = phase_dl(arrays(), phase, 2)
    passes = [batches(a) for _ in range(2)]
    dls = arrays()
    dls.train.load_state_dict(json.loads(json.dumps(dict(a.source.state_dict(), epochs={str(a.tag): 1}))))
    assert alike(batches(phase_dl(dls, phase, 2)), passes[1]) and not alike(*passes)
    first = [o[0] for o in batches(phase_dl(arrays(), 'ssl', 2))]
    assert alike([(o,) for o in first], [o[:1] for o in batches(phase_dl(arrays(), 'ssl'))])
    def rank(r):
        dls = arrays()
        dls.train.bs,dls.train.rank,dls.train.world_size = 4,r,2
        return batches(phase_dl(dls, phase, 2))
    zero,once,again = rank(0),rank(1),rank(1)
    assert alike(once, again) and not alike(once, zero) and len(once[0][0])==4

def test_who_decides():
    "The user's augmentations; else the objective's set, also before what a name says for both sides; else the labelled side's"
    def used(name=None, **kw): return str(phase_dl(arrays(**kw), 'ssl', 2, name).view_tfms)
    assert used('simclr')=="view_tfms('byol')" and used('simclr', ssl_tfms=None)=="view_tfms('simclr')"
    assert used('simclr', ssl_tfms=None, tfms='cifar')=="view_tfms('simclr')" and used('simclr', ssl_tfms=BatchCrop(2))=='None'
    assert used(ssl_tfms=None)=='None' and used('moco', ssl=False, ssl_tfms=None)=="view_tfms('moco')"
    mine = view_tfms('byol', size=16)
    dls = arrays(ssl_tfms=mine)
    assert phase_dl(dls, 'mix', 2, 'simclr').view_tfms is valid_dl(dls, 2, 'simclr').view_tfms is phase_dl(dls, 'ssl').view_tfms is mine
    assert dls.train.view_tfms is None and phase_dl(dls, 'sl', 2).view_tfms is None
    only = mix_dls(ssl=images(12, 24, 3)[0], bs=4, seed=0)
    assert str(phase_dl(only, 'ssl', 1, 'dino').view_tfms)=="view_tfms('dino')" and phase_dl(only, 'ssl') is only.train

def test_a_set_lasts(tmp_path):
    "One object for all phases, passes and validation of a source; a size and a magnitude hold from the next batch on"
    for make_dls in (lambda: arrays(ssl_tfms=None), lambda: files(tmp_path, ssl_batch_tfms=None), lambda: files(tmp_path, ssl_batch_tfms='byol')):
        dls,other = make_dls(),make_dls()
        get = lambda d: [phase_dl(d, 'ssl', 2, 'byol').view_tfms, phase_dl(d, 'mix', 2, 'byol').view_tfms, valid_dl(d, 2, 'byol').view_tfms]
        s, = set(get(dls))
        assert s not in get(other) and {*get(dls)}=={s}
        for phase in ('ssl','mix'):
            sizes = []
            for i,b in enumerate(phase_dl(dls, phase, 2, 'byol')):
                sizes.append([o.shape[-1] for o in b[0]])
                s.size = 16+8*i
            assert sizes[1:3]==[[16,16],[24,24]][:len(sizes)-1], sizes
            s.size = None
        s.size = 16
        assert [o.shape[-1] for o in phase_dl(dls, 'ssl', 2, 'byol').one_batch()[0]]==[16,16]

@pytest.mark.parametrize('name', ['byol','dino'])
def test_each_view_is_blended(name):
    "Eq. 2 in numbers: view i is lam*x_i + (1-lam)*u_i, the labelled side with its own augmentations, in the size of the view"
    x,y = images(24, 64, 3)
    dls = mix_dls((x,y), ssl=images(30, 64, 3, seed=9)[0], lam=0.3, tfms=BatchCrop(4), ssl_tfms=name, bs=8, seed=0)
    dl = phase_dl(dls, 'mix', 4)
    dl.before_iter()
    b = dl.load(dl.get_idxs()[:8], (0,2,1,0))
    with _seeded(1): ms,yb = dl.after_batch(b)
    with _seeded(1): (xs,y1),(us,) = dl.after_batch.fs[0].sides(b)
    assert torch.equal(yb, y1) and len(ms)==len(us)==len(xs)==4 and {o.shape[-1] for o in xs}=={64}
    for m,x,u in zip(ms, xs, us):
        if u.shape[-1]!=64: x = F.interpolate(x, u.shape[2:], mode='bilinear', antialias=True)
        assert torch.allclose(m, 0.3*x+0.7*u, atol=1e-6)
    assert [u.shape[-1] for u in us]==([64]*4 if name=='byol' else [64,64,32,32])
    assert not torch.equal(xs[0], xs[1]) and not torch.equal(us[2], us[3])
    one = phase_dl(dls, 'mix')
    one.view_tfms.size = 48
    assert one.one_batch()[0].shape==(8,3,48,48) # progressive, with one view

def test_shown_in_a_row(tmp_path):
    import matplotlib.pyplot as plt
    for dl in (phase_dl(arrays(48, ssl_tfms='dino'), 'mix', 4), phase_dl(files(tmp_path), 'ssl', 4), phase_dl(files(tmp_path, cls=PILImageBW), 'mix', 4)):
        dl.show_batch(max_n=3)
        axs = plt.gcf().axes
        assert len(axs)==12 and axs[3].get_images()[0].get_size()[0] < axs[0].get_images()[0].get_size()[0]
        plt.close('all')

# Fits

class Pull(Objective):
    "Views of an image have like features"
    views,view_tfms = 2,'simclr'
    def setup(self, backbone, x): self.project = nn.Linear(find_layout(backbone, x).dim, 8)
    def forward(self, feats, x):
        a,b = self.project(feats.tokens().mean(1)).chunk(2)
        return (a-b).pow(2).mean()

class Shrink(Callback):
    "Another size and magnitude for every step"
    order,run_valid,only_watches = 5,False,True
    def __init__(self): self.seen = []
    def set(self, i):
        if self.dl.view_tfms: self.dl.view_tfms.size,self.dl.view_tfms.magnitude = 8-2*(i%2),i
    def before_train(self): self.set(0)
    def before_batch(self):
        if self.dl.view_tfms: self.seen.append([o.shape[-1] for o in self.xb[0]])
        self.set(self.iter+1)

@pytest.mark.parametrize('two', [False,True])
def test_a_fit_with_the_objectives_views(make, tmp_path, two):
    "Its set in training and validation; a size that a callback sets does not make another fit of it; resumed bit for bit"
    def new(seed):
        set_seed(seed)
        dls = mix_dls(images(24, c=3), images(9, c=3, seed=1), lam=0.5, ssl=images(30, c=3, seed=2)[0] if two else None, bs=8, tfms='cifar', seed=3)
        return make(dls=dls, seed=seed, objective=Pull(), c=3)
    kw = dict(e_ssl=3, e_sl=2, rho=0.5)
    ref,cb = new(0),Shrink()
    ref.fit_mixtraining(**kw, cbs=cb)
    n = len(ref.dls.ssl)
    assert cb.seen==[[8-2*(i%2)]*2 for k in (n,n,len(ref.dls.mix)) for i in range(k)] and n > 2
    assert ref.mix.settings['ssl_tfms']=="[[view_tfms('simclr')]][(None, 5)]" # size and magnitude at the start
    class Die(Callback):
        only_watches = True
        def before_epoch(self):
            if self.epoch==2: raise RuntimeError('died')
    with pytest.raises(RuntimeError, match='died'): new(0).fit_mixtraining(**kw, checkpoint=tmp_path/'run', cbs=[Shrink(),Die()])
    learn = new(5)
    learn.fit_mixtraining(**kw, checkpoint=tmp_path/'run', resume=True, cbs=Shrink())
    assert learn.mix.history.phase.tolist()==['ssl','ssl','mix','sl'] and same(state(learn.model), state(ref.model))

def test_other_objectives(make, tmp_path):
    "One view: the first list; views missing in a DataBlock of the user's own"
    dls = mix_dls(images(24, c=3), images(9, c=3, seed=1), bs=8, ssl_tfms='byol')
    learn = make(dls=dls, c=3)
    learn.fit_mixtraining(1, 1, rho=0)
    assert learn.mix.history.ssl_loss.notna().any()
    own = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(8)).dataloaders(write(tmp_path/'a', 16, 8), bs=4, num_workers=0)
    for f in (lambda: phase_dl(own, 'ssl', 2, 'simclr'), lambda: valid_dl(own, 2, 'simclr')):
        with pytest.raises(ValueError, match='objective needs 2 views of each image: use mix_dls, or a MixBlock'): f()
    assert phase_dl(own, 'ssl', 1, 'simclr') is own.train
    learn = mix_learner(own, 'test_resnet', Pull())
    for fit in (learn.fit_ssl, lambda e: learn.fit_mixtraining(e, e, rho=1)):
        with pytest.raises(ValueError, match='objective needs 2 views of each image: use mix_dls, or a MixBlock'): fit(1)

def test_a_size_that_the_model_cannot_take(make):
    "The argument is named, before anything is trained"
    says = r'cannot take images \[B,C,H,W\] = \[2, 3, 20, 20\].* The size of ssl_tfms .* is 20 pixels'
    def dls(size): return mix_dls(images(24, 32, 3), bs=8, ssl_tfms=view_tfms('simclr', size=size))
    with pytest.raises(ValueError, match=says): make(dls=dls(20), objective=Pull(), patch_size=8)
    learn = make(dls=dls(16), objective=Pull(), patch_size=8, metrics=None)
    learn.dls = dls(20)
    for e_sl in (0,1):
        with pytest.raises(ValueError, match=says): learn.fit_mixtraining(1, e_sl, rho=0)
    learn.dls = dls(24)
    learn.fit_ssl(1)

@pytest.mark.parametrize('name,n', [('simclr',2), ('byol',2), ('dino',2), ('dino',8)])
def test_two_views_cost_little(name, n):
    "Less than 15 % of a step of a ResNet-18 on them, at 128 pixels; with small crops too"
    def seconds(f, n):
        f()
        ts = []
        for _ in range(n): t = time.process_time(); f(); ts.append(time.process_time()-t)
        return min(ts)
    x,tfms = torch.randint(0, 256, (16,128,128,3), dtype=torch.uint8).permute(0,3,1,2),view_tfms(name)
    m = timm.create_model('resnet18', num_classes=0).train()
    opt = torch.optim.SGD(m.parameters(), 0.1)
    def views(): return [tfms(x, i) for i in range(n)]
    vs = views()
    def step(): sum(m(torch.cat(o)).sum() for o in (vs[:2], vs[2:]) if o).backward(); opt.step(); opt.zero_grad()
    assert seconds(views, 3) < 0.15*seconds(step, 1)
