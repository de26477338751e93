"""fit_mixtraining against an independent Algorithm 1: the same weights from the same start on the same batches."""
import copy
import pytest, timm

import mixfast.objective.autoencode
from conftest import HOT, TINY, images
from mixfast.all import BlendDL, MixDL, MixPlan
from reference import RefAE, RefMAE, train

def spy(learn, monkeypatch):
    "Log the raw batches, by phase, and the masks that a fit trains on"
    steps,masks,phase = [],[],lambda: learn.mix.phase
    def log(cls):
        load = cls.load
        def f(self, idxs, key):
            b = load(self, idxs, key)
            if phase() and learn.training and self is learn.dl: # not a side of a mix
                (x,*y),ssl = b if isinstance(b[0], tuple) else (b,None)
                steps.append((phase(), x if ssl is None else (x,*ssl), y[0] if y else None))
            return b
        monkeypatch.setattr(cls, 'load', f)
    for cls in (MixDL, BlendDL): log(cls)
    random_mask = mixfast.objective.autoencode.random_mask
    def f(*args):
        m = random_mask(*args)
        if learn.training: masks.append(m)
        return m
    monkeypatch.setattr(mixfast.objective.autoencode, 'random_mask', f)
    return steps,masks

def reference(learn, kind):
    "The reference's backbone and head with the weights that the learner has now"
    kw = {k:v for k,v in TINY.items() if k!='arch'}
    arch = dict(mae=lambda: timm.create_model(TINY['arch'], img_size=8, in_chans=1, num_classes=3, **kw),
                ae=lambda: timm.create_model('resnet18', in_chans=1, num_classes=3))[kind]
    bb = arch()
    bb.load_state_dict(learn.model.state_dict(), strict=True)
    dec = copy.deepcopy(learn.mix.objective.decoder.state_dict())
    if kind=='mae': head = RefMAE(32, 1, grid=4, patch=2, chans=1, pos=dec['pos'])
    else:
        head = RefAE(512, 8, 4, 1)
        dec = {k.replace('0.','c1.').replace('2.','c2.'):v for k,v in dec.items()}
    head.load_state_dict(dec, strict=True)
    return bb,head

cases = [(k, e_ssl, e_sl, rho, two) for k in ('mae','ae')
         for e_ssl,e_sl,rho,two in ((4,4,0.5,False), (2,2,0,False), (2,2,1,False), (0,3,0.5,False), (4,4,0.5,True))]

@pytest.mark.parametrize('kind,e_ssl,e_sl,rho,two', cases)
def test_same_weights(make, monkeypatch, kind, e_ssl, e_sl, rho, two):
    size = 8 if kind=='mae' else 32
    learn = make(size=size, lam=0.3, ssl=images(40, size, seed=5)[0] if two else None, arch=None if kind=='mae' else 'resnet18', objective=kind)
    bb,head = reference(learn, kind)
    steps,masks = spy(learn, monkeypatch)
    learn.fit_mixtraining(e_ssl, e_sl, rho=rho, alpha=0.4, recipe=HOT)

    plan,masks = MixPlan(e_ssl, e_sl, rho),iter(masks)
    n_ssl,n_mix,n_sl = ((plan.sl_start)*(5 if two else 3), plan.e_mix*3, (e_sl-plan.e_mix)*3)
    assert [p for p,*_ in steps]==['ssl']*n_ssl + ['mix']*n_mix + ['sl']*n_sl
    assert isinstance(dict((p,x) for p,x,_ in steps).get('mix'), tuple)==(two and n_mix>0)
    steps = [(*s, next(masks) if kind=='mae' and s[0]!='sl' else None) for s in steps]
    x = images(24, size)[0]/255
    as_dict = lambda h: dict(lr=h.lr*8/256, warm=h.warmup, betas=h.betas, wd=h.wd)
    train(bb, head, steps, n_ssl, x.mean(), x.std(), as_dict(HOT.ssl), as_dict(HOT.sl), 0.4, 0.3, keep=('pos_embed','cls_token'))

    ours = {**learn.model.state_dict(), **{f'd.{i}':v for i,v in enumerate(learn.mix.objective.decoder.state_dict().values())}}
    ref  = {**bb.state_dict(), **{f'd.{i}':v for i,v in enumerate(RefOrder(head))}}
    diff = max((ours[k].double()-ref[k].double()).abs().max().item() for k in ours)
    assert ours.keys()==ref.keys() and diff<1e-5, diff

def RefOrder(head):
    "The reference's weights in the library's order"
    sd = head.state_dict()
    order = ['mask_token','pos','embed'] if 'pos' in sd else ['c1','c2']
    first = [k for o in order for k in sd if k.startswith(o)]
    return [sd[k] for k in first+[k for k in sd if k not in first]]
