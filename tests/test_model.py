"""Objectives and MixModel on the backbones that people use."""
import pytest, timm, torch
from torch import nn

from conftest import same, state
from mixfast.all import (AE, MAE, Adam, Callback, Hypers, L, MixModel, OptimWrapper, Recipe, evaluating, features, find_layout,
                         fused_adamw, logits, no_decay, partial, set_up)

ARCHS = ['vit_tiny_patch16_224', 'deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'resnet18', 'resnet18d', 'convnext_atto',
         'efficientnet_b0', 'swin_tiny_patch4_window7_224', 'pvt_v2_b0']
FIXED = ('vit', 'deit', 'swin')

def backbone(arch, size, c):
    kw = dict(img_size=size) if arch.startswith(FIXED) else {}
    if 'patch16' in arch: kw['patch_size'] = size//4
    return timm.create_model(arch, num_classes=5, in_chans=c, **kw)

def grid(m, x): return find_layout(m, x).grid

@pytest.mark.parametrize('size,c', [(32,3), (32,1), (64,3)])
@pytest.mark.parametrize('arch', ARCHS)
def test_objectives(arch, size, c):
    "MAE and AE train on tokens and maps; where there is one feature only, MAE says so"
    bb,x = backbone(arch, size, c),torch.randn(2, c, size, size)
    for name in ('mae','ae'):
        if name=='mae' and grid(bb, x)==(1,1):
            with pytest.raises(ValueError, match="Use objective='ae'"): set_up(name, bb, x)
            continue
        m = MixModel(bb, set_up(name, bb, x))
        out = m(x, 'mix')
        ssl_loss = out.losses['ssl_loss']
        assert out.pred.shape==(2,5) and ssl_loss.shape==()
        (ssl_loss+out.pred.sum()).backward()
        idle = [n for n,p in m.named_parameters() if p.grad is None]
        assert not idle, idle
        with torch.no_grad(): seen,rebuilt = m.objective.reconstruct(m.objective.encode(bb, x), x)
        assert seen.shape==rebuilt.shape==x.shape

@pytest.mark.parametrize('arch', ARCHS)
def test_one_pass_and_plain_backbone(make, arch):
    "One backbone pass a training step in every phase; afterwards the backbone is timm's"
    size = 64
    learn = make(n=16, bs=8, size=size, c=3, arch=arch, metrics=[], **({'patch_size':16} if 'patch16' in arch else {}))
    bb,n = learn.model,{}
    stem = next(m for m in bb.modules() if isinstance(m, nn.Conv2d)) # every image goes through it once a pass
    def count(*_):
        if learn.model.training: n[learn.mix.phase] = n.get(learn.mix.phase, 0)+1
    h = stem.register_forward_hook(count)
    learn.fit_mixtraining(2, 2, rho=0.5)
    h.remove()
    assert n==dict(ssl=2, mix=2, sl=2) # two steps an epoch, one epoch a phase
    kw = {k:v for k,v in dict(img_size=size, patch_size=16 if 'patch16' in arch else None).items() if v and arch.startswith(FIXED)}
    new = timm.create_model(arch, num_classes=3, in_chans=3, **kw)
    new.load_state_dict(bb.state_dict(), strict=True)
    x = torch.randn(4, 3, size, size)
    with torch.no_grad(): assert torch.equal(new.eval()(x), learn.model.eval()(x))

@pytest.mark.parametrize('opt', ['adamw', 'fastai', 'wrapper'])
def test_idle_heads_do_not_change(make, opt):
    "Not one bit of the classifier in the SSL phase, of the objective in the SL phase"
    opt_func = dict(adamw=fused_adamw, fastai=Adam, wrapper=partial(OptimWrapper, opt=torch.optim.AdamW))[opt]
    learn = make(opt_func=opt_func)
    head,obj,seen = learn.model.head,learn.mix.objective,{}
    class Watch(Callback):
        order = 100
        def before_train(self): self.a = state(head),state(obj)
        def after_train(self): seen.setdefault(self.learn.mix.phase, []).append((same(self.a[0], state(head)), same(self.a[1], state(obj))))
    learn.fit_mixtraining(4, 4, rho=0.5, cbs=Watch())
    assert seen==dict(ssl=[(True,False)]*2, mix=[(False,False)]*2, sl=[(False,True)]*2)

def test_decay_leaves_vectors_alone(make):
    "With a rate of 1 and no gradients that matter, only matrices shrink; wd_bn_bias decays all"
    for opt_func in (fused_adamw, Adam):
        for everything in (False, True):
            learn = make(opt_func=opt_func, wd_bn_bias=everything)
            nd = no_decay(learn.model) | no_decay(learn.mix.objective)
            seen = {}
            class Hypers_(Callback):
                def before_step(self):
                    for p,pg,st,h in self.opt.all_params(): seen[p] = h['wd']*st.get('do_wd', True)
            learn.fit_sl(1, recipe=Recipe(Hypers(1e-3), Hypers(1e-3, wd=0.2)), cbs=Hypers_())
            assert {p for p,wd in seen.items() if wd==0}==(set() if everything else nd)
            assert all(wd==0.2 for p,wd in seen.items() if everything or p not in nd)

def test_freeze_keeps_the_head(make):
    body_head = lambda m: L([p for n,p in m.named_parameters() if 'head' not in n], [p for n,p in m.named_parameters() if 'head' in n])
    learn = make(splitter=body_head)
    learn.freeze()
    on = {n for n,p in learn.model.named_parameters() if p.requires_grad and 'norm' not in n} # fastai keeps norms trainable
    assert on=={'head.weight','head.bias'}
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())

def test_two_objectives_do_not_share(make):
    o = MAE(0.5)
    a,b = make(objective=o),make(objective=o)
    assert a.mix.objective is not b.mix.objective and not hasattr(o, 'decoder')

@pytest.mark.parametrize('patch,size,grid', [((2,8),(16,16),(8,2)), ((8,2),(16,16),(2,8)), ((4,8),(16,32),(4,4)), ((2,4),(24,16),(12,4))])
def test_patches_that_are_not_square(patch, size, grid):
    "The layout is the patch embedding's: a token's gradient lies in its own patch, of which the decoder rebuilds all pixels"
    torch.manual_seed(0)
    vit = dict(embed_dim=16, depth=1, num_heads=1, num_classes=3, dynamic_img_size=True)
    m = timm.create_model('vit_tiny_patch16_224', patch_size=patch, img_size=16, **vit)
    x = torch.randn(2, 3, *size, requires_grad=True)
    f = features(m, x)
    assert f.layout.grid==grid
    for i,j in ((0,1), (grid[0]-1,0), (1,grid[1]-1)):
        g = torch.autograd.grad(f.map()[:,:,i,j].square().sum(), x, retain_graph=True)[0].square().sum((0,1))
        own = g.unflatten(0, (grid[0],-1)).unflatten(2, (grid[1],-1)).sum((1,3))
        assert own.argmax()==i*grid[1]+j
    mae = set_up(MAE(0.5), m, x.detach())
    assert mae.decoder.pred.out_features==3*patch[0]*patch[1]
    seen = mae.reconstruct(mae.encode(m, x), x)[0]
    hidden = (seen==0).all(1).unflatten(1, (grid[0],-1)).unflatten(3, (grid[1],-1)) # patches are hidden as a whole
    assert torch.equal(hidden.all(4).all(2), hidden.any(4).any(2)) and hidden.float().mean()==0.5
    keep = set_up(MAE(0.5, visible_only=True), m, x.detach())
    assert keep.encode(m, x).layout==f.layout

def test_evaluating_leaves_nothing_cached():
    "What a model keeps for its evaluation mode (LeViT: attention biases) is not used after the next steps of training"
    m = timm.create_model('levit_128s', num_classes=3).train()
    x = torch.randn(1, 3, 224, 224)
    with evaluating(m): m(x)
    assert m.training and not any(getattr(o, 'attention_bias_cache', None) for o in m.modules())
