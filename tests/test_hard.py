"Hard Augment: which pair is chosen, what the choice leaves behind, and that the method within learns of all; Sum"
from copy import deepcopy
from functools import partial
from itertools import combinations

import pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import GradientAccumulation, set_seed
from torch import nn

from conftest import Die, HOT, TINY, same, state
from mixfast.all import AE, MAE, MixModel, MultiView, set_up
from mixfast.objective.contrastive import MoCo, SimCLR
from mixfast.objective.dino import DINO
from mixfast.objective.hard import HardAugment
from mixfast.objective.siamese import BYOL, SimSiam
from mixfast.objective.sum import Sum

pytestmark = pytest.mark.filterwarnings('ignore:epoch .* seems to collapse') # fits of a few steps
FIT = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT) # two epochs of each phase, three steps in each
METHODS = dict(simsiam=partial(SimSiam, dim=16, hidden=8), byol=partial(BYOL, dim=8, hidden=16), simclr=partial(SimCLR, dim=8, hidden=16),
               moco=partial(MoCo, dim=8, hidden=16, queue=8), dino=partial(DINO, out=12, hidden=16, dim=8))

def ready(method, cnn=False, size=16, px=8, **kwargs):
    "Hard Augment around a method, in training; its backbone; views of five images"
    set_seed(0)
    kw = dict(num_classes=3) if cnn else dict(TINY, dynamic_img_size=True, img_size=size, num_classes=3)
    net = timm.create_model(kw.pop('arch', 'test_resnet'), **kw)
    xs = torch.randn(kwargs.get('n', 6), 5, 3, size, size).unbind()
    return set_up(HardAugment(method, size=px, **kwargs), net, xs[0]).train(),net.train(),xs

# ---- the choice

@pytest.mark.parametrize('name', ['simsiam','byol','dino'])
def test_the_hardest_pair(name):
    "It is that with the highest loss, pair by pair and image by image; before the first step a teacher is the model"
    o,net,xs = ready(METHODS[name](norm=False))
    inner,small = o.inner[0],[F.interpolate(x, (8,8), mode='bilinear', antialias=True) for x in xs]
    f = o.encode(net, xs)
    o.eval()
    def loss(b, i, j):
        pair = small[i][b:b+1],small[j][b:b+1]
        return inner(inner.encode(net, pair), pair).item()
    want = [max(combinations(range(6), 2), key=lambda p: loss(b, *p)) for b in range(5)]
    assert f.ij.T.tolist()==[list(p) for p in want] and len(set(want))>1
    for k in range(2): assert torch.equal(f.x[k], torch.stack([xs[f.ij[k,b]][b] for b in range(5)]))

@pytest.mark.parametrize('name', ['simclr','moco'])
def test_the_least_similar_pair(name):
    "Without a predictor"
    o,net,xs = ready(METHODS[name](norm=False))
    f = o.encode(net, xs)
    small = [F.interpolate(x, (8,8), mode='bilinear', antialias=True) for x in xs]
    z = torch.stack([o.inner[0].project(net.forward_features(x)[:,1:].mean(1)) for x in small])
    s = torch.stack([F.cosine_similarity(z[i], z[j], dim=1) for i,j in combinations(range(6), 2)])
    assert f.ij.T.tolist()==[list([*combinations(range(6), 2)][k]) for k in s.argmin(0)]

def test_a_random_pair():
    "Any of them, seeded by torch's CPU generator, without a pass"
    o,net,xs = ready(METHODS['simsiam'](), selection='random')
    n = []
    net.patch_embed.register_forward_hook(lambda m, a, t: n.append(tuple(a[0].shape[::3])))
    torch.manual_seed(0)
    ijs = [o.encode(net, xs).ij for _ in range(40)]
    assert set(n)=={(10,16)}, 'no small copies'
    pairs = {tuple(p) for ij in ijs for p in ij.T.tolist()}
    assert pairs==set(combinations(range(6), 2))
    torch.manual_seed(0)
    assert torch.equal(ijs[0], o.encode(net, xs).ij)

def test_two_views_in_validation():
    "The first two, without choice"
    o,net,xs = ready(METHODS['simsiam']())
    o.eval(), net.eval()
    f = o.encode(net, xs)
    assert f.ij is None and f.x==xs[:2]
    torch.testing.assert_close(o(f, xs), o.inner[0](o.inner[0].encode(net, xs[:2]), xs[:2]))

def test_full_size_and_bad_views():
    "Views that are smaller than the copies are looked at as they are; views of several sizes are refused"
    o,net,xs = ready(METHODS['simsiam'](), px=64)
    n = []
    net.patch_embed.register_forward_hook(lambda m, a, t: n.append(tuple(a[0].shape[::3])))
    o.encode(net, xs)
    assert n==[(30,16),(10,16)]
    with pytest.raises(ValueError, match="views of one size: use ssl_tfms='simclr'"): o.encode(net, (*xs[:2], *[x[...,:8,:8] for x in xs[2:]]))
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=32, dynamic_img_size=True)
    with pytest.raises(ValueError, match='size=24: the model cannot take images of 24x24 pixels; a transformer needs multiples'):
        set_up(HardAugment(SimSiam(), size=24), vit, torch.zeros(2, 3, 32, 32))

class Bare(MultiView):
    def forward(self, feats, x): return feats.pooled().mean()

def test_a_method_must_tell_what_is_hard():
    with pytest.raises(TypeError, match='Bare needs a `project`, or `pair_scores'): ready(Bare())
    class Own(Bare):
        def pair_scores(self, feats): return torch.tensor([[0,1,0],[1,0,2],[0,2,0]]).float()[...,None].expand(3, 3, feats.n)
    o,net,xs = ready(Own(), n=3)
    assert o.encode(net, xs).ij.tolist()==[[1]*5,[2]*5]

# ---- what it leaves behind

def test_gradients_come_from_the_pair():
    o,net,xs = ready(METHODS['simsiam'](), cnn=True, size=32)
    xs = [x.requires_grad_() for x in xs]
    f = o.encode(net, xs)
    o(f, xs).backward()
    hit = torch.stack([x.grad.flatten(1).abs().sum(1)>0 for x in xs])
    assert torch.equal(hit, torch.zeros(6, 5, dtype=torch.bool).scatter(0, f.ij, True))

@pytest.mark.parametrize('kw', [dict(), dict(extra_target=True)])
@pytest.mark.parametrize('name', ['simsiam','byol'])
def test_statistics_are_those_of_the_pair(name, kw):
    "Of batch norms of backbone, head and teacher, and those that indicators read; the choice leaves none, nor an error in it"
    o,net,xs = ready(METHODS[name](), cnn=True, size=32, **kw)
    inner,ref = deepcopy(o.inner[0]),deepcopy(net)
    f = o.encode(net, xs)
    o(f, xs)
    inner(inner.encode(ref, f.x), f.x)
    assert same(state(net), state(ref)) and same(state(o.inner[0]), state(inner))
    assert net.bn1.num_batches_tracked==1 and all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    net.layer4.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): o.encode(net, xs)
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d)) and torch.is_grad_enabled()

def test_half_precision_keeps_gradients():
    "What autocast has cast for the choice is not what the step is taken with"
    o,net,xs = ready(METHODS['simsiam'](), cnn=True, size=32)
    with torch.autocast('cpu', torch.bfloat16): loss = o(o.encode(net, xs), xs)
    loss.backward()
    assert all(p.grad.abs().sum()>0 for p in [net.conv1[0].weight, o.inner[0].project[0].weight])

def test_extra_targets_by_hand():
    "Each prediction against the other's projection and those of the small copies that are left"
    o,net,xs = ready(METHODS['simsiam'](norm=False), n=4, extra_target=True)
    m,small = o.inner[0],[F.interpolate(x, (8,8), mode='bilinear', antialias=True) for x in xs]
    def z(x): return m.project(net.forward_features(x)[:,1:].mean(1))
    f = o.encode(net, xs)
    terms = []
    for b,(i,j) in enumerate(f.ij.T.tolist()):
        for k,other in ((i,j),(j,i)):
            p = m.predict(z(xs[k][b:b+1]))
            terms.append([-F.cosine_similarity(p, t).item() for t in (z(xs[other][b:b+1]), *[z(small[v][b:b+1]) for v in range(4) if v not in (i,j)])])
    torch.testing.assert_close(o(f, xs).item(), torch.tensor(terms).mean().item())
    assert torch.tensor(terms).shape==(10,3) and not f.targets.requires_grad

def test_extra_targets_of_a_teacher():
    o,net,xs = ready(METHODS['byol'](norm=False), n=4, extra_target=True)
    with torch.no_grad():
        o.after_step(net, 0.)
        for p in net.parameters(): p += 0.1*torch.randn_like(p)
    f = o.encode(net, xs)
    t,project = o.inner[0].teacher.copies
    small = F.interpolate(xs[3], (8,8), mode='bilinear', antialias=True)
    torch.testing.assert_close(f.targets[3], project(t.forward_features(small)[:,1:].mean(1)))

# ---- in a fit

@pytest.mark.parametrize('name', METHODS)
def test_fits(make, name):
    "All phases; what supervised heads read is the first view of the pair"
    learn = make(objective=HardAugment(METHODS[name](), n=4, size=4))
    learn.fit_mixtraining(**FIT)
    h = learn.mix.history
    assert h.ssl_loss[:4].notna().all() and h.sl_loss[2:].notna().all() and h.spread[:4].notna().all()
    m = MixModel(learn.model, learn.mix.objective).train()
    xs = torch.randn(4, 8, 1, 8, 8).unbind()
    out = m(xs, 'mix').pred
    ij = learn.mix.objective.encode(learn.model, xs).ij
    torch.testing.assert_close(out, learn.model(torch.stack(xs)[ij[0],torch.arange(8)]), atol=1e-5, rtol=1e-4)

def test_a_cnn_with_extra_targets(make):
    learn = make(objective=HardAugment(METHODS['byol'](), n=3, size=16, extra_target=True), arch='test_resnet', size=32, c=3)
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    assert learn.mix.history.ssl_loss[:2].notna().all()

@pytest.mark.parametrize('name', ['byol','moco','dino'])
def test_resume(make, tmp_path, name):
    "In the midst of the mix phase, between two batches of a step: all that moves by steps, to the bit"
    new = lambda seed: make(objective=HardAugment(METHODS[name](), n=3, size=4), seed=seed)
    fit = lambda learn, *cbs, **kw: learn.fit_mixtraining(**FIT, cbs=[GradientAccumulation(16), *cbs], **kw)
    ref,ck = new(0),dict(checkpoint=tmp_path/'run', every_steps=1)
    fit(ref)
    with pytest.raises(RuntimeError, match='died'): fit(new(0), Die(8), **ck)
    with pytest.raises(ValueError, match='n 3 -> 4|n.*3.*4'):
        fit(make(objective=HardAugment(METHODS[name](), n=4, size=4)), **ck, resume=True)
    learn = new(5)
    fit(learn, **ck, resume=True)
    assert same(state(learn.mix.objective), state(ref.mix.objective)) and same(state(learn.model), state(ref.model))

def test_all_is_passed_on():
    o,net,xs = ready(METHODS['moco'](), n=3)
    inner,told = o.inner[0],[]
    for k in ('after_step','skip_step'): setattr(inner, k, lambda *a, k=k: told.append(k))
    o.at(0.25, 3)
    assert (inner.t,inner.world_size)==(0.25,3)
    o.at(0.25)
    o.after_step(net, 0.25), o.skip_step()
    assert told==['after_step','skip_step']
    with pytest.raises(ValueError, match='queue=8'): o.check_data(7, 2)
    o.encode(net, xs), o(o.encode(net, xs), xs)
    assert 0<o.indicators()['spread']<1.5 and not any(p.requires_grad for p in inner.teacher.parameters())

# ---- Sum

@pytest.mark.parametrize('cnn', [False, True])
def test_a_sum_shares_a_pass(make, cnn):
    "A column for each loss; supervised heads read the first view; a teacher within follows"
    kw = dict(arch='test_resnet', size=32, c=3) if cnn else {}
    learn = make(objective=Sum(AE(dim=8) if cnn else MAE(), METHODS['byol'](momentum=0.5), weights=(0.5,2)), **kw)
    o,one = learn.mix.objective,'ae' if cnn else 'mae'
    first,n,before = learn.model.conv1[0] if cnn else learn.model.patch_embed,[],state(o.inner[1].teacher)
    first.register_forward_hook(lambda m, a, t: n.append((learn.mix.phase, len(a[0]))) if m.training else None)
    learn.fit_mixtraining(**FIT)
    h = learn.mix.history
    assert torch.allclose(torch.tensor((h[one]+h.byol)[:4]), torch.tensor(h.ssl_loss[:4]), atol=1e-5) and h.byol[4:].isna().all()
    assert n==[(p,b) for p,b in (('ssl',16),('mix',16),('sl',8)) for _ in range(6)], 'one pass a step'
    assert not any(torch.equal(before[k], v) for k,v in o.inner[1].teacher.named_parameters() if v.ndim>1 and 'head' not in k and 'fc' not in k)
    m,xs = MixModel(learn.model, o).eval(),torch.randn(2, 4, kw.get('c', 1), kw.get('size', 8), kw.get('size', 8)).unbind()
    with torch.no_grad(): torch.testing.assert_close(m(xs, 'mix').pred, m(xs[0]))

def test_a_sum_of_single_views(make):
    learn = make(objective=Sum(MAE, AE(dim=8)))
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    h = learn.mix.history
    assert torch.allclose(torch.tensor((h.mae+h.ae)[:2]), torch.tensor(h.ssl_loss[:2])) and learn.mix.objective.views==1
    with pytest.raises(ValueError, match='MAE encodes images in its own way.*visible_only=False'): Sum(MAE(visible_only='mix'), SimSiam)
    with pytest.raises(TypeError, match='Sum takes objectives such as MAE'): Sum(MAE(), HardAugment(SimSiam()))
