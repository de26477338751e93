"What plugs into the seam by adding only: objectives with a teacher, several heads, any loss, any size; and whose model it is"
import random
from copy import deepcopy

import numpy as np, pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, GradientAccumulation,
    L1LossFlat, LabelSmoothingCrossEntropyFlat, Learner, MSELossFlat, ProgressCallback, SaveModelCallback, accuracy, noop, resnet18, set_seed,
    vision_learner)
from torch import nn

from conftest import Die, HOT, TINY, images, same, state, warned
from mixfast.all import (AE, BatchFlip, BatchResizedCrop, KNNAccuracy, MAE, Objective, SimCLR, find_layout, mix_dls, mix_learner,
                         plain_model)

FIT = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT) # two epochs of each phase
PHASES = ['ssl']*2+['mix']*2+['sl']*2

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

# ---- an objective with a teacher: 6 lines

class Teacher(MAE):
    def setup(self, backbone, x):
        super().setup(backbone, x)
        self.teacher,self.moves = deepcopy(backbone).requires_grad_(False),[]
    def after_step(self, backbone, t):
        self.moves.append(round(t, 3))
        for a,b in zip(self.teacher.parameters(), backbone.parameters()): a.lerp_(b, 0.1)

def test_a_teacher_moves_after_each_step(make):
    "In SSL and mix steps, never by gradients, not even thawed; and it is what the steps make of it"
    learn = make(objective=Teacher())
    start,steps = state(learn.mix.objective.teacher),[]
    class Log(Callback):
        order,run_valid = 5,False
        def after_step(self): steps.append(state(self.model.backbone)) # before the teacher moves
    learn.unfreeze()
    learn.fit_mixtraining(**FIT, cbs=Log())
    o = learn.mix.objective
    assert o.moves==[round(i/12, 3) for i in range(12)], 'three steps in each of four epochs'
    want = {k: start[k].clone() for k,_ in o.teacher.named_parameters()}
    for s in steps[:12]:
        for k in want: want[k].lerp_(s[k], 0.1)
    assert all(torch.equal(want[k], v) for k,v in o.teacher.named_parameters())
    assert not any(p.requires_grad for p in o.teacher.parameters())
    learn.unfreeze()
    assert not any(p.requires_grad for p in o.teacher.parameters())

def test_a_teacher_waits_for_steps_that_are_taken(make):
    "Once for two batches whose gradients are gathered; not after a loss of nan"
    learn = make(objective=Teacher())
    learn.fit_mixtraining(2, 2, rho=0, recipe=HOT, cbs=GradientAccumulation(16)) # 3 batches of 8 an epoch
    assert len(learn.mix.objective.moves)==3
    class Poison(Callback):
        order,run_valid = -10,False
        def before_batch(self):
            if (self.epoch,self.iter)==(0,1): self.learn.xb = (self.xb[0]*float('nan'),)
    learn = make(objective=Teacher())
    with warned('ignore'): learn.fit_mixtraining(2, 1, rho=0, recipe=HOT, on_nan='skip', cbs=Poison())
    assert len(learn.mix.objective.moves)==5 and learn.mix.skipped==1
    assert all(p.isfinite().all() for p in learn.mix.objective.parameters())

def test_a_teacher_is_resumed(make, tmp_path):
    class Die(Callback):
        only_watches = True
        order = 2000
        def after_step(self):
            if self.train_iter==4: raise RuntimeError('died')
    ref,new = make(objective=Teacher()),lambda seed: make(objective=Teacher(), seed=seed)
    ref.fit_mixtraining(**FIT)
    with pytest.raises(RuntimeError, match='died'): new(0).fit_mixtraining(**FIT, checkpoint=tmp_path/'run', every_steps=1, cbs=Die())
    learn = new(5)
    learn.fit_mixtraining(**FIT, checkpoint=tmp_path/'run', every_steps=1, resume=True)
    assert same(state(learn.mix.objective), state(ref.mix.objective)) and same(state(learn.model), state(ref.model))

# ---- several losses in an objective: 3 lines

class Both(MAE):
    def forward(self, feats, x): return dict(patches=super().forward(feats, x), size=1e-3*feats.t.square().mean())

def test_named_losses_are_summed_and_recorded(make):
    learn = make(objective=Both())
    learn.fit_mixtraining(**FIT)
    h = learn.mix.history
    assert np.allclose((h.patches+h['size'])[:4], h.ssl_loss[:4], rtol=1e-5) and h.patches.notna().tolist()==[True]*4+[False]*2
    assert np.allclose(h.train_loss[2:4], (h.ssl_loss+h.sl_loss)[2:4]/2, rtol=1e-5)

# ---- two heads: 7 lines

class Heads(nn.Module):
    "A class, and a mask of 8x8"
    def __init__(self, d): super().__init__(); self.cls,self.mask = nn.Linear(d, 3),nn.ConvTranspose2d(d, 2, 8, 8)
    def forward(self, t): return self.cls(t.mean((2,3))),self.mask(t)

def two_losses(preds, y, m): return F.cross_entropy(preds[0], y) + F.cross_entropy(preds[1], m)

def tensor_dls(*targets, size=32, n=24):
    "fastai's own loaders, of tensors"
    x = torch.tensor(images(n, size, 3)[0]).permute(0,3,1,2)/255
    ds = list(zip(x, *targets))
    return DataLoaders(DataLoader(ds, bs=8, shuffle=True, drop_last=True), DataLoader(ds[:9], bs=8))

def class_accuracy(preds, *targets): return accuracy(preds[0], targets[0])

def test_two_heads():
    "A class and a mask from one pass, through all phases"
    set_seed(0)
    y = torch.arange(24)%3
    m = torch.zeros(24, 8, 8, dtype=torch.long)
    for i,k in enumerate(y): m[i, k*2:k*2+2] = 1
    dls = tensor_dls(y, m)
    dls.n_inp = 1
    body = timm.create_model('test_resnet', num_classes=0, global_pool='')
    learn = quiet(Learner(dls, nn.Sequential(body, Heads(body.num_features)), loss_func=two_losses, metrics=class_accuracy))
    n = []
    body.conv1[0].register_forward_hook(lambda *_: n.append(learn.mix.phase) if body.training else None)
    learn.fit_mixtraining(**FIT)
    assert learn.mix.history.phase.tolist()==PHASES and learn.mix.history.iloc[:, 1:5].notna().any().all()
    assert n==[p for p in PHASES for _ in range(3)], 'one pass a step'
    assert [tuple(o.shape) for o in learn.model(dls.one_batch()[0].cpu())]==[(8,3),(8,2,8,8)]

# ---- any loss, through all phases

weights = torch.tensor([0.2, 1., 2.])
@pytest.mark.parametrize('y,loss,n_out', [
    (F.one_hot(torch.arange(24)%3).float(), BCEWithLogitsLossFlat(), 3), ((torch.arange(24)%2).float(), BCEWithLogitsLossFlat(), 1),
    (torch.arange(24)%3, LabelSmoothingCrossEntropyFlat(), 3), (torch.arange(24)%3, CrossEntropyLossFlat(label_smoothing=0.1), 3),
    (torch.arange(24)%3, CrossEntropyLossFlat(weight=weights), 3), (torch.rand(24), MSELossFlat(), 1), (torch.rand(24, 4), MSELossFlat(), 4), (torch.rand(24, 2), L1LossFlat(), 2)])
@pytest.mark.parametrize('arch', ['vit','test_resnet'])
def test_losses(y, loss, n_out, arch):
    "The loss function is the user's own, before, within and after; what it gives is what is recorded"
    set_seed(0)
    kw = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2) if arch=='vit' else {}
    learn = quiet(mix_learner(tensor_dls(y), 'vit_tiny_patch16_224' if arch=='vit' else arch, n_out=n_out, loss_func=loss, **kw))
    seen = []
    class Log(Callback):
        order,run_valid = 100,False
        def after_loss(self):
            assert self.learn.loss_func is loss
            if self.phases.now.sl: seen.append((self.learn.losses['sl_loss'].item(), loss(self.pred, *self.yb).item()))
    learn.fit_mixtraining(**FIT, cbs=Log())
    assert learn.mix.history.phase.tolist()==PHASES and learn.mix.history.sl_loss[2:].notna().all() and learn.loss_func is loss
    assert len(seen)==12 and all(a==b for a,b in seen)

@pytest.mark.parametrize('y,loss,n_out,says', [
    (torch.rand(24, 4), MSELossFlat(), 3, r'the head, Linear, predicts \[2, 3\] for 2 images, and .* cannot compare that with targets \(\[2, 4\]\)'),
    (torch.arange(24)%3, CrossEntropyLossFlat(reduction='none'), 3, r"loss_func must give a scalar, got \[2\]: use reduction='mean'")])
def test_losses_that_do_not_fit(y, loss, n_out, says):
    learn = quiet(mix_learner(tensor_dls(y), 'test_resnet', n_out=n_out, loss_func=loss))
    with pytest.raises(ValueError, match=says): learn.fit_mixtraining(1, 1)

# ---- sizes that change

class Grow(Callback):
    "48 px instead of 32 in every other epoch"
    order,run_valid = 0,True
    def before_batch(self):
        if self.epoch%2: self.learn.xb = (F.interpolate(self.xb[0], size=(48,48)),)

@pytest.mark.parametrize('arch,objective,kw', [('vit_tiny_patch16_224', MAE, dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)),
    ('vit_tiny_patch16_224', MAE(visible_only='mix'), dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)), ('test_resnet', AE, {}), ('test_resnet', MAE, dict(output_stride=8))])
def test_sizes_change_between_epochs(make, arch, objective, kw):
    dls = mix_dls(images(24, 32, 3), images(9, 32, 3, seed=1), bs=8, seed=0)
    set_seed(0)
    learn = quiet(mix_learner(dls, arch, objective, metrics=accuracy, **kw))
    learn.fit_mixtraining(**FIT, cbs=Grow())
    h = learn.mix.history
    assert h.phase.tolist()==PHASES and h.train_loss.notna().all() and h.valid_loss.notna().all()

@pytest.mark.parametrize('arch,objective,kw', [('vit_tiny_patch16_224', MAE, dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)), ('test_resnet', AE, {})])
def test_32_then_48_px(arch, objective, kw):
    "In one process: objective, classifier and neighbours, after new data of another size"
    set_seed(0)
    learn = quiet(mix_learner(mix_dls(images(24, 32, 3), images(9, 32, 3, seed=1), bs=8), arch, objective, metrics=[accuracy, KNNAccuracy(every_phase=True)], **kw))
    for size in (32, 48):
        learn.dls = mix_dls(images(24, size, 3), images(9, size, 3, seed=1), bs=8)
        learn.fit_mixtraining(**FIT)
        h = learn.mix.history
        assert h.knn_accuracy.notna().all() and learn.get_preds()[0].shape==(9,3)
        learn.mix.show_reconstructions(n=2)

def test_a_backbone_of_one_size_says_so(make):
    "The user's own ViT, without position embeddings that follow"
    vit = timm.create_model(TINY['arch'], img_size=8, in_chans=1, num_classes=3, **{k:v for k,v in TINY.items() if k!='arch'})
    learn = make(arch=vit)
    learn.dls = mix_dls(images(24, 16), images(9, 16, seed=1), bs=8)
    with pytest.raises(ValueError, match=r'cannot take images \[B,C,H,W\] = \[2, 1, 16, 16\].*dynamic_img_size=True'): learn.fit_mixtraining(1, 1)

# ---- whose model it is

def test_the_model_is_the_users_own(make, tmp_path):
    "The same object with its own keys before and after; weights saved in a fit are its, and load into any learner of it, and back"
    learn = make()
    model,keys = learn.model,learn.model.state_dict().keys()
    within = []
    class Look(Callback):
        def before_batch(self): within.append((type(self.model).__name__, plain_model(self.learn) is model, self.mix.phase))
    learn.fit_mixtraining(**FIT, cbs=[Look(), SaveModelCallback(monitor='accuracy', fname='best', with_opt=True)])
    assert learn.model is model and model.state_dict().keys()==keys and learn.mix.phase is None
    assert {o[:2] for o in within}=={('MixModel',True)} and {o[2] for o in within}=={'ssl','mix','sl'}
    assert set(torch.load(tmp_path/'models'/'best.pth', weights_only=True)['model'])==set(keys)
    learn.save('after')
    plain = Learner(learn.dls, timm.create_model(TINY['arch'], img_size=8, in_chans=1, num_classes=3, **{k:v for k,v in TINY.items() if k!='arch'}), path=tmp_path)
    plain.load('after', with_opt=False)
    assert same(state(plain.model), state(model))
    plain.fit(1)
    plain.save('plain')
    learn.load('plain', with_opt=False)
    assert same(state(learn.model), state(plain.model))
    learn.fit_mixtraining(**FIT)

def test_a_vision_learner_stays_one(tmp_path):
    set_seed(0)
    learn = quiet(vision_learner(mix_dls(images(24, 32, 3), images(9, 32, 3, seed=1), bs=8), resnet18, pretrained=False, metrics=accuracy, path=tmp_path))
    body = learn.model[0]
    learn.fit_mixtraining(2, 2)
    assert learn.model[0] is body and type(learn.model).__name__=='Sequential'
    learn.freeze()
    assert not next(body.parameters()).requires_grad
    learn.unfreeze(); learn.fine_tune(1)
    learn.fit_mixtraining(2, 2)
    assert learn.export() is None and learn.get_preds()[0].shape==(9,3)

def test_an_average_in_place_of_the_model(make):
    "A callback that validates by averaged weights validates the objective, too, in the SSL phase"
    learn,losses = make(),[]
    class EMA(Callback):
        order = 70
        def before_fit(self): self.avg = deepcopy(self.model).requires_grad_(False)
        def after_step(self):
            for a,b in zip(self.avg.parameters(), self.model.parameters()): a.lerp_(b.detach(), 0.1)
        def before_validate(self): self.own,self.learn.model = self.model,self.avg.eval()
        def after_batch(self):
            if not self.training: losses.append(self.loss.item())
        def after_validate(self): self.learn.model = self.own
    learn.fit_mixtraining(**FIT, cbs=EMA())
    assert np.isclose(np.average(losses[:2], weights=[8,1]), learn.mix.history.valid_loss[0])
    assert type(learn.model).__name__=='VisionTransformer'

def test_an_interrupted_validation_gives_the_model_back(make):
    "Not the average that stood in for it"
    class EMA(Callback):
        def before_validate(self): self.learn.model = deepcopy(self.model)
        def after_batch(self):
            if not self.training: raise KeyboardInterrupt
    learn = make()
    model,objective = learn.model,learn.mix.objective
    with pytest.raises(KeyboardInterrupt): learn.fit_mixtraining(**FIT, cbs=EMA())
    assert learn.model is model and learn.mix.objective is objective

def test_old_names_are_accepted(make):
    with pytest.warns(FutureWarning, match='visible_only'): assert MAE(drop=True).visible_only is True
    learn = make()
    with pytest.warns(FutureWarning, match='learn.model.backbone is called learn.model now'): assert learn.model.backbone is learn.model

def test_compile_is_for_mix_learners():
    learn = Learner(mix_dls(images(24, 32, 3), bs=8), timm.create_model('test_resnet', num_classes=3), loss_func=CrossEntropyLossFlat())
    with pytest.raises(TypeError, match=r'call learn.to_mix\(\) first'): learn.compile()
    assert not any(m._compiled_call_impl for m in learn.model.modules())

def test_generators_go_on(make):
    "A fit takes one number from torch's generator, and none of Python's or NumPy's"
    learn = make()
    random.seed(3); np.random.seed(3); torch.manual_seed(3)
    want = random.random(),np.random.rand()
    torch.randint(2**31, ())
    want = *want,torch.rand(()).item()
    random.seed(3); np.random.seed(3); torch.manual_seed(3)
    learn.fit_mixtraining(**FIT)
    assert (random.random(), np.random.rand(), torch.rand(()).item())==want

def test_unlabelled_validation_has_no_metrics_of_labels(make):
    "A loss, and nothing that takes images for labels"
    dls = mix_dls(ssl=images(24)[0], bs=8)
    learn = make(dls=dls, metrics=[])
    learn.fit_ssl(2, recipe=HOT)
    assert learn.mix.history.phase.tolist()==['ssl']*2

# ---- two views: 9 lines

class SimSiam(Objective):
    views = 2
    def setup(self, backbone, x): self.project,self.predict = nn.Linear(find_layout(backbone, x).dim, 16),nn.Linear(16, 16)
    def forward(self, feats, x):
        a,b = self.project(feats.tokens().mean(1)).chunk(2)
        def cos(p, z): return F.cosine_similarity(self.predict(p), z.detach()).mean()
        return -(cos(a, b)+cos(b, a))/2

@pytest.mark.parametrize('two', [False,True])
def test_two_views_are_resumed(make, tmp_path, two):
    "Other images for SSL or the same: each view blended, one pass a step; killed in each phase, and bit for bit as in peace"
    def new(seed):
        set_seed(seed)
        dls = mix_dls(images(40), images(9, seed=1), lam=0.5, ssl=images(50, seed=2)[0] if two else None, bs=8, tfms=BatchFlip(), ssl_tfms=[BatchResizedCrop(), BatchFlip()])
        return make(seed=seed, dls=dls, objective=SimSiam())
    ref,seen = new(0),[]
    class Look(Callback):
        order,run_valid = 100,False
        def after_pred(self): seen.append((self.phases.now.name, len(self.xb[0]) if isinstance(self.xb[0], tuple) else 1, tuple(self.pred.shape)))
    ref.fit_mixtraining(**FIT, cbs=Look())
    assert set(seen)=={('ssl',2,(8,0)), ('mix',2,(8,3)), ('sl',1,(8,3))}
    for n,seed in ((4,0), (9,5), (8,6)):
        with pytest.raises(RuntimeError, match='died'): new(seed).fit_mixtraining(**FIT, checkpoint=tmp_path/'run', every_steps=2, resume=True, cbs=Die(n))
    learn = new(7)
    learn.fit_mixtraining(**FIT, checkpoint=tmp_path/'run', every_steps=2, resume=True)
    assert same(state(learn.model), state(ref.model)) and same(state(learn.mix.objective), state(ref.mix.objective))
    assert learn.mix.history.ssl_loss[:4].between(-1, 1).all()

@pytest.mark.parametrize('kwargs,says', [
    (dict(), 'the last batch of 25 images: SimCLR .* bs must be 2 or more, got 1. Use drop_last=True'), (dict(bs=1), '^SimCLR .* got 1$'), (dict(bs=23), None),
    (dict(drop_last=True), None), (dict(n=16), None)])
def test_a_last_batch_of_one_image(make, kwargs, says):
    "Is refused before anything is trained, where the objective compares images; by `lr_find` too"
    n,bs,drop_last = (dict(n=25, bs=8, drop_last=False) | kwargs).values()
    learn = make(dls=mix_dls(images(n, 8, 3), bs=bs, drop_last=drop_last), c=3, objective=SimCLR(8, 8), metrics=None)
    for f in (lambda: learn.fit_ssl(1), lambda: learn.fit_mixtraining(1, 1, rho=1), lambda: learn.lr_find(phase='ssl', num_it=20, show_plot=False)):
        if says is None: f(); continue
        with pytest.raises(ValueError, match=says): f()
    assert says is None or learn.mix.rows==[]

def test_views_need_loaders_that_make_them():
    learn = quiet(mix_learner(tensor_dls(torch.arange(24)%3), 'test_resnet', SimSiam(), n_out=3, loss_func=CrossEntropyLossFlat()))
    with pytest.raises(ValueError, match='objective needs 2 views of each image: use mix_dls, or a MixBlock'): learn.fit_mixtraining(1, 1)
