"SimSiam, BYOL, SimCLR, MoCo and DINO: losses, teachers and queues"
import math
from copy import deepcopy
from functools import partial
import numpy as np, pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import Callback, CategoryBlock, DataBlock, GradientAccumulation, PILImage, RandomSplitter, load_learner, set_seed
from torch.utils.flop_counter import FlopCounterMode
from mixfast.all import BYOL, BatchFlip, BatchResizedCrop, DINO, MixBlock, MoCo, SimCLR, SimSiam, info_nce, mix_dls, neg_cosine, nt_xent, set_up
from mixfast.objective.multiview import cosine_momentum, encode_views
from conftest import Die, HOT, images, same, state

METHODS = dict(simsiam=partial(SimSiam, 16, 8), byol=partial(BYOL, 8, 16), simclr=partial(SimCLR, 8, 16), moco=partial(MoCo, 8, 16, queue=20), dino=partial(DINO, 12, 16, 8))
pytestmark = pytest.mark.filterwarnings('ignore:epoch .* seems to collapse') # fits of a few steps
each = pytest.mark.parametrize('name', METHODS)
taught = pytest.mark.parametrize('name', ['byol','moco','dino'])
FIT = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT)

def arrays(ssl=True, n=40, seed=0, **kw):
    set_seed(seed)
    return mix_dls(images(n), images(9, seed=1), lam=0.5, ssl=images(50, seed=2)[0] if ssl else None, bs=8, tfms=BatchFlip(), ssl_tfms=[BatchResizedCrop(), BatchFlip()], **kw)

def cnn(objective, n=6, size=16, **kw):
    "An objective in training on a small CNN, which is trained a bit so that the teacher differs; and views"
    torch.manual_seed(0)
    m,xs = timm.create_model('test_resnet', in_chans=1, num_classes=3),tuple(torch.randn(2, n, 1, size, size))
    return m.train(),set_up(objective, m, xs[0]).train(),xs

def step(m, o, xs, t=0.3, lr=0.1):
    "A training step by hand"
    ps = [p for p in (*m.parameters(), *o.parameters()) if p.requires_grad]
    gs = torch.autograd.grad(o(o.encode(m, xs), xs), ps, allow_unused=True)
    with torch.no_grad():
        for p,g in zip(ps, gs):
            if g is not None: p -= lr*g
        o.after_step(m, t)

# ---- losses by hand

def cos(a, b): return (a@b/a.norm()/b.norm()).item()

def test_neg_cosine():
    p,z = torch.randn(5, 7, requires_grad=True),torch.randn(5, 7, requires_grad=True)
    loss = neg_cosine(p, z)
    assert np.isclose(loss.item(), -np.mean([cos(a, b) for a,b in zip(p, z)]))
    loss.backward()
    assert p.grad is not None and z.grad is None

def test_nt_xent():
    "One sum an anchor; and of a part of the images among all"
    z,T = torch.randn(2, 5, 7),0.3
    def anchor(v, i):
        e = {(w,j): math.exp(cos(z[v,i], z[w,j])/T) for w in (0,1) for j in range(5) if (w,j)!=(v,i)}
        return -math.log(e[1-v,i]/sum(e.values()))
    assert np.isclose(nt_xent(z, T).item(), np.mean([anchor(v, i) for v in (0,1) for i in range(5)]))
    assert np.isclose(nt_xent(z[:,2:4], T, among=z, first=2).item(), np.mean([anchor(v, i) for v in (0,1) for i in (2,3)]))

def test_info_nce():
    q,k,queue,T = torch.randn(4, 7, requires_grad=True),torch.randn(4, 7, requires_grad=True),F.normalize(torch.randn(9, 7)),0.3
    e = [[math.exp(cos(a, b)/T) for b in (k[i],*queue)] for i,a in enumerate(q)]
    loss = info_nce(q, k, queue, T)
    assert np.isclose(loss.item(), -np.mean([math.log(o[0]/sum(o)) for o in e]))
    loss.backward()
    assert q.grad is not None and k.grad is None

def test_as_official_simsiam():
    "D(p1,z2)/2 + D(p2,z1)/2, the first of its two losses without gradient for z; views in passes of their own where no batch norm joins them"
    m,o,(a,b) = cnn(SimSiam(16, 8, norm=False))
    for l in (x for x in m.modules() if isinstance(x, torch.nn.BatchNorm2d)): l.eval()
    def D(p, z): return -F.cosine_similarity(p, z.detach()).mean()
    (z1,p1),(z2,p2) = [(z, o.predict(z)) for z in (o.project(m.forward_features(x).mean((2,3))) for x in (a,b))]
    ps = [*m.parameters(), *o.parameters()]
    ref,loss = D(p1, z2)/2 + D(p2, z1)/2, o(o.encode(m, (a,b)), (a,b))
    torch.testing.assert_close(loss, ref)
    for g,r in zip(*[torch.autograd.grad(l, ps, allow_unused=True) for l in (loss, ref)]): assert g is r is None or torch.allclose(g, r, atol=1e-6)

def test_as_official_simclr():
    "Each projection finds that of the other view among all but itself; one pass, with batch norms"
    m,o,xs = cnn(SimCLR(8, 16))
    z = F.normalize(o.project(m.forward_features(torch.cat(xs)).mean((2,3))), dim=1)
    s = (z @ z.T / 0.2).masked_fill(torch.eye(12).bool(), -torch.inf)
    ps = [*m.parameters(), *o.parameters()]
    ref,loss = F.cross_entropy(s, torch.arange(12).roll(6)),o(o.encode(m, xs), xs)
    torch.testing.assert_close(loss, ref)
    for g,r in zip(*[torch.autograd.grad(l, ps, allow_unused=True) for l in (loss, ref)]): assert g is r is None or torch.allclose(g, r, atol=1e-5)

@pytest.mark.parametrize('name', ['byol','moco'])
def test_as_official_teachers(name):
    "The teacher, after a few steps, in a pass of its own; each view against what it says of the other"
    m,o,xs = cnn(METHODS[name](norm=False))
    for x in (m, o.teacher):
        for l in (l for l in x.modules() if isinstance(l, torch.nn.BatchNorm2d)): l.eval()
    for _ in range(3): step(m, o, xs)
    (t1,t2),(z1,z2) = [[proj(b.forward_features(x).mean((2,3))) for x in xs] for b,proj in (o.teacher.copies, (m, o.project))]
    assert not torch.allclose(t1, z1, atol=1e-3)
    if name=='byol': ref = sum(2-2*F.cosine_similarity(o.predict(z), t) for z,t in ((z1,t2), (z2,t1))).mean()/4 - 1
    else:
        def ce(q, k):
            q,k = F.normalize(q),F.normalize(k)
            return F.cross_entropy(torch.cat([(q*k).sum(1)[:,None], q@o.queue.T], 1)/0.2, torch.zeros(6).long())
        ref = (ce(z1, t2)+ce(z2, t1))/2
    torch.testing.assert_close(o(o.encode(m, xs), xs), ref, atol=1e-5, rtol=1e-5)

@each
def test_mixed_precision(name):
    "The loss is float32 and near that of full precision"
    m,o,xs = cnn(METHODS[name]())
    o.eval(); m.eval()
    full = o(o.encode(m, xs), xs)
    with torch.autocast('cpu', torch.bfloat16): half = o(o.encode(m, xs), xs)
    assert half.dtype==torch.float32 and abs(half-full)<0.1

@pytest.mark.parametrize('name', ['simsiam','byol','moco'])
def test_multi_crop(name):
    "Each view against the other large ones; the teacher sees these alone"
    m,o,xs = cnn(METHODS[name](local_views=3), size=32)
    xs = *xs, *torch.randn(3, 6, 1, 16, 16)
    assert (o.views, o.view_tfms)==(5, 'dino') and SimSiam().view_tfms=='simclr'
    seen = []
    if name!='simsiam': o.teacher[0].conv1[0].register_forward_hook(lambda m, x, y: seen.append(tuple(x[0].shape)))
    o.eval(); m.eval()
    with torch.no_grad():
        loss = o(o.encode(m, xs), xs)
        z = o.projected(o.encode(m, xs))
        t,p = (z[:2], o.predicted(z)) if name=='simsiam' else (o.taught(xs), z if name=='moco' else o.predicted(z))
        one = (lambda p, t: info_nce(p, t, o.queue)) if name=='moco' else neg_cosine
        torch.testing.assert_close(loss, sum(one(p[j], t[i]) for i in (0,1) for j in range(5) if i!=j)/8)
    assert set(seen)<={(12,1,32,32)}

# ---- arguments and data

def test_bad_arguments():
    for cls,kw,says in ((SimSiam, dict(dim=0), 'dim must be a whole number from 1 up, got 0'), (BYOL, dict(hidden=1.5), 'hidden must be a whole number'),
                        (BYOL, dict(momentum=1.1), r'momentum must lie in \[0,1\], got 1.1'), (MoCo, dict(last_momentum=-1), r'last_momentum must lie in'),
                        (SimCLR, dict(temperature=0), 'temperature must be a number above 0, got 0'), (MoCo, dict(temperature='x'), "temperature must be a number above 0, got 'x'"),
                        (MoCo, dict(queue=0), 'queue must be a whole number from 1 up'), (SimSiam, dict(local_views=-1), 'local_views must be a whole number from 0 up')):
        with pytest.raises(ValueError, match=says): cls(**kw)

def test_too_little_data(make):
    with pytest.raises(ValueError, match='bs must be 2 or more, got 1'): make(dls=mix_dls(images(24), bs=1), objective=SimCLR(8, 8)).fit_mixtraining(**FIT)
    with pytest.raises(ValueError, match='queue=4096 keys, but there are 24 images'): make(objective='moco').fit_mixtraining(**FIT)
    make(dls=arrays(n=16), objective=MoCo(8, 8, queue=50)).fit_mixtraining(2, 2, rho=1, recipe=HOT) # 16 have labels, 50 are for SSL

@each
@pytest.mark.parametrize('n', [2,3])
def test_validation_moves_nothing(name, n):
    m,o,xs = cnn(METHODS[name](), n=n)
    step(m, o, xs)
    m.eval(); o.eval(); o.at(0.5, world_size=2)
    before = state(o)
    with torch.no_grad(): assert o(o.encode(m, xs), xs).isfinite()
    assert same(before, state(o))

# ---- teachers and queues

@taught
def test_teacher_follows(name):
    m,o,xs = cnn(METHODS[name](momentum=0.8, last_momentum=1.))
    step(m, o, xs)
    before,mom = [p.clone() for p in o.teacher.parameters()],cosine_momentum(0.3, 0.8, 1.)
    step(m, o, xs)
    for t,old,s in zip(o.teacher.parameters(), before, [*m.parameters(), *o.project.parameters()], strict=True):
        torch.testing.assert_close(t, mom*old + (1-mom)*s)
        assert t.grad is None and not t.requires_grad
    o.after_step(m, 1.)
    assert math.isclose(cosine_momentum(0, 0.99, 0.999), 0.99) and cosine_momentum(1, 0.99, 0.999)==0.999

def test_queue():
    "The newest in place of the oldest; image after image; more keys than places"
    m,o,xs = cnn(MoCo(8, 16, queue=20))
    rows,n = list(o.queue.clone()),0
    def put(keys):
        nonlocal n
        for k in keys: rows[n%20],n = k,n+1
    class Keys(type(o)):
        def taught(self, x):
            k = MoCo.taught(self, x)
            put(F.normalize(k, dim=2).transpose(0, 1).flatten(0, 1))
            return k
    o.__class__ = Keys
    assert torch.allclose(o.queue.norm(dim=1), torch.ones(20))
    for i in range(3):
        step(m, o, tuple(x+i for x in xs))
        assert torch.equal(o.queue, torch.stack(rows)) and o.oldest==n%20
    step(m, o, tuple(x.repeat(3,1,1,1)+torch.randn(18,1,1,1) for x in xs)) # 36 keys
    assert {tuple(r.tolist()) for r in o.queue}=={tuple(r.tolist()) for r in rows}
    before = o.queue.clone()
    o(o.encode(m, xs), xs)
    assert o.get_extra_state().shape==(12,8) and torch.equal(o.queue, before)
    o.skip_step()
    assert not o.coming and torch.equal(o.queue, before)

class Watch(Callback):
    "Teacher and queue after each batch, and which weights the optimizer has"
    order,run_valid,only_watches = 100,False,True
    def __init__(self): self.seen,self.left = [],[]
    def before_epoch(self):
        self.learn.unfreeze()
        o = self.learn.mix.objective
        mine = {id(p) for g in self.opt.param_lists for p in g} | {id(p) for g in getattr(self.opt, 'opt', self.opt).param_groups for p in g['params']}
        assert not mine & {id(p) for p in o.teacher.parameters()} and not any(p.requires_grad for p in o.teacher.parameters())
    def after_batch(self): self.seen.append((self.learn.mix.phase, self.epoch, self.iter, [p.clone() for p in (*self.learn.mix.objective.teacher.parameters(), *getattr(self.learn.mix.objective, 'queue', torch.empty(0))[None])]))
    def moved(self): return [(b[0], not all(map(torch.equal, a[3], b[3]))) for a,b in zip(self.seen, self.seen[1:])]

@taught
def test_gathered_gradients(make, name):
    "Teacher and queue move once a step; the keys of all micro-batches come in"
    o,w = METHODS[name](),Watch()
    make(dls=arrays(ssl=False, n=48), objective=o).fit_mixtraining(**FIT, cbs=[GradientAccumulation(16), w])
    assert w.moved()==[(p, i%2==1 and p!='sl') for p,_,i,_ in w.seen[1:]]
    if name=='moco': # two batches of 8 images, with two keys each, fill the queue of 20
        q = [o[3][-1] for o in w.seen]
        assert not any((q[1][:,None]==q[0][None]).all(2).any(1))

@taught
def test_a_skipped_step(make, name):
    "moves nothing, and leaves nothing behind"
    class Poison(Callback):
        order,run_valid = -10,False
        def before_batch(self):
            if (self.epoch,self.iter) in ((0,2),(2,0)): self.learn.xb = (tuple(x*float('nan') for x in self.xb[0]),)
    w = Watch()
    learn = make(dls=arrays(ssl=False), objective=METHODS[name]())
    with pytest.warns(UserWarning, match='1 of 5 steps'): learn.fit_mixtraining(**FIT, on_nan='skip', cbs=[Poison(), w])
    still = [(e,i) for (_,m),(_,e,i,_) in zip(w.moved(), w.seen[1:]) if not m]
    assert still[:2]==[(0,2),(2,0)] and {e for e,_ in still[2:]}<={4,5} and learn.mix.skipped==2
    assert all(v.isfinite().all() for v in learn.mix.objective.state_dict().values())

@each
def test_resumed(make, tmp_path, name):
    "Killed in each phase, and between: bit for bit as in peace, in steps of two batches"
    def new(seed): return make(seed=seed, dls=arrays(seed=seed), objective=METHODS[name]())
    kw = dict(FIT, cbs=[GradientAccumulation(16)])
    ref = new(0)
    ref.fit_mixtraining(**kw)
    run = dict(checkpoint=tmp_path/'run', every_steps=3, resume=True)
    for n,seed in ((5,0), (9,5), (4,6), (11,8)):
        with pytest.raises(RuntimeError, match='died'): new(seed).fit_mixtraining(**{**kw, 'cbs':[*kw['cbs'], Die(n)]}, **run)
    learn = new(7)
    learn.fit_mixtraining(**kw, **run)
    assert same(state(learn.model), state(ref.model)) and same(state(learn.mix.objective), state(ref.mix.objective))
    assert learn.mix.history.iloc[:,:7].equals(ref.mix.history.iloc[:,:7]) and (learn.mix.history.spread==ref.mix.history.spread)[:4].all()

@each
def test_moved_with_the_model(name):
    "Waiting keys, too; and in double"
    m,o,xs = cnn(METHODS[name]())
    o(o.encode(m, xs), xs)
    assert name!='moco' or o.coming
    assert {t.device.type for t in deepcopy(o).to('meta').state_dict().values() if t.ndim}=={'meta'}
    m,o = m.double(),o.double()
    xs = tuple(x.double() for x in xs)
    step(m, o, xs)
    assert o(o.encode(m, xs), xs).isfinite()

# ---- cost

def flops(f):
    with FlopCounterMode(display=False) as c: f()
    return c.get_total_flops()

def test_the_teacher_costs_one_forward_pass():
    "A step of the student is three of its passes, less the gradient of the images; the teacher adds one"
    m,o,xs = cnn(BYOL(8, 16))
    def run(o): o(o.encode(m, xs), xs).backward()
    def student(): o.predicted(o.projected(encode_views(m, xs)))
    with torch.no_grad(): teacher,fwd = flops(lambda: o.taught(xs)),flops(student)
    images = flops(lambda: m.conv1[0](torch.cat(xs)))
    assert flops(lambda: run(o))==3*fwd - images + teacher
    assert teacher<fwd<1.01*teacher

def test_memory(make):
    "A teacher costs its weights; a queue its bytes, and its similarities"
    def need(o): return make(objective=o, dls=arrays(n=100, ssl=False)).mix.step_bytes(phases=('ssl',))['ssl']
    byol = make(objective=BYOL(8, 16), dls=arrays(ssl=False))
    class Alone(BYOL):
        def setup(self, backbone, x):
            super().setup(backbone, x)
            del self.teacher
        def encode(self, backbone, x): return encode_views(backbone, x)
        def taught(self, x): return torch.zeros(2, len(x[0]), 8)
        def after_step(self, backbone, t): pass
    teacher = sum(t.nbytes for t in byol.mix.objective.teacher.state_dict().values())
    more = need(BYOL(8, 16))-need(Alone(8, 16))
    assert 0.95*teacher<more<1.05*teacher
    few,many = need(MoCo(8, 16, queue=20)),need(MoCo(8, 16, queue=100))
    assert many-few<=80*8*4 + 2*8*80*4

# ---- fits

@each
@pytest.mark.parametrize('arch,size,kw', [(None,8,{}), ('test_resnet',16,{}), ('test_convnext',32,dict(drop_path_rate=0.1))])
def test_fits(make, name, arch, size, kw):
    "All phases, on two sets of images, with the method's own views; the model stays as it was"
    dls = mix_dls(images(24, size), images(9, size, seed=1), lam=0.5, ssl=images(30, size, seed=2)[0], bs=8)
    learn = make(dls=dls, arch=arch, objective=METHODS[name](), **({} if arch is None else dict(in_chans=1, **kw)))
    keys = learn.model.state_dict().keys()
    learn.fit_mixtraining(**FIT)
    h = learn.mix.history
    assert h.phase.tolist()==['ssl']*2+['mix']*2+['sl']*2 and h.spread[:4].between(0, 1.2).all() and h.spread[4:].isna().all()
    assert learn.model.state_dict().keys()==keys and h.valid_loss.notna().all() and h.ssl_loss[:4].notna().all()
    assert learn.mix.grad_cosines().keys() and learn.get_preds()[0].shape==(9,3)
    learn.export()
    assert same(state(load_learner(learn.path/'export.pkl').model), state(learn.model))

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@each
def test_on_a_gpu(make, name):
    learn = make(dls=mix_dls(images(24), images(9, seed=1), bs=12, device='cuda'), objective=METHODS[name]())
    learn.fit_ssl(1, recipe=HOT)
    assert learn.mix.history.ssl_loss.notna().all() and all(t.is_cuda for t in learn.mix.objective.state_dict().values() if t.ndim)

@each
def test_unlabelled(make, name):
    learn = make(dls=mix_dls(ssl=images(24)[0], bs=8), objective=METHODS[name](), metrics=[])
    learn.fit_ssl(2, recipe=HOT)
    assert learn.mix.history.ssl_loss.notna().all()

@pytest.mark.parametrize('name', ['simsiam','moco'])
def test_files(make, tmp_path, name):
    for i,(x,y) in enumerate(zip(*images(24, 16))): PILImage.create(x[...,0]).save(tmp_path/f'{y}_{i:02}.png')
    block = DataBlock((MixBlock(lam=0.5, seed=0, ssl_batch_tfms='moco'), CategoryBlock), get_y=lambda f: f.name[0], splitter=RandomSplitter(0.3, seed=0))
    learn = make(dls=block.dataloaders(sorted(tmp_path.glob('*.png')), bs=4, num_workers=0), objective=METHODS[name](local_views=0) if name=='simsiam' else MoCo(8, 16, queue=16), arch='test_resnet', in_chans=3)
    learn.fit_mixtraining(**FIT)
    assert learn.mix.history.ssl_loss[:4].notna().all()

@pytest.mark.parametrize('name', ['byol','simclr','moco','dino'])
def test_bf16_and_small_crops(make, name):
    kw = {} if name=='simclr' else dict(local_views=2)
    learn = make(dls=mix_dls(images(24, 64), images(9, 64, seed=1), bs=8), arch='test_resnet', in_chans=1, objective=METHODS[name](**kw)).to_bf16()
    learn.fit_mixtraining(**FIT)
    assert learn.mix.history.ssl_loss[:4].notna().all()

def test_compiled(make):
    "The same fit; the teacher is compiled, too"
    def fit(compile):
        learn = make(dls=arrays(n=16, ssl=False), objective=METHODS['byol'](), depth=1)
        if compile: learn.compile(backend='eager')
        learn.fit_ssl(1, recipe=HOT)
        return learn.mix.objective.teacher, learn.mix.history.train_loss
    (_,a),(teacher,b) = fit(False),fit(True)
    np.testing.assert_allclose(a, b, rtol=1e-3)
    assert all(m._compiled_call_impl for m in (teacher[1], teacher[0].patch_embed, teacher[0].blocks))
