"Super Progressive: sizes by the step, whatever loader, objective and model; resumed, restored, refused. `lr_find` in a phase"
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.all import Callback, ProgressCallback, noop, resnet18, vision_learner
from conftest import HOT, images, same, state
from mixfast.all import (AE, BYOL, DINO, GradientAccumulation, HardAugment, Hypers, MAE, MoCo, Recipe, SimCLR, SimSiam, SuperProgressive,
    mix_dls, mix_learner, progressive_at, progressive_sizes, progressive_speedup, view_tfms)
from mixfast.objective.multiview import MultiView
from test_distributed import check_alike, check_close, fit as fit_in_processes, fixed_mask, launch, learner as make_in_process
from test_fit import file_dls
from test_resume import Die, check_resumed

class Agree(MultiView):
    def forward(self, feats, x): return -F.cosine_similarity(*feats.pooled()[:2].unbind(), dim=1).mean()

class Sizes(Callback):
    "What each training step and each validation is given"
    order,only_watches = 2000,True
    def __init__(self): self.train,self.valid = [],[]
    def after_pred(self):
        xs = self.xb[0] if isinstance(self.xb[0], tuple) else [self.xb[0]]
        v = getattr(self.dl, 'view_tfms', None)
        (self.train if self.training else self.valid).append((self.phases.now.name, *[o.shape[-1] for o in xs], v and v.magnitude))

def test_the_papers_ratios():
    "Table 6 says 1.60, 1.40 and 1.82"
    for lo,want in [(96,1.60), (128,1.42), (64,1.78)]:
        sizes = progressive_sizes(lo, 224)
        assert round(progressive_speedup(sizes, 80/480)['pixels'], 2)==want
        steps = [progressive_at(i/8, 480, 80, sizes)[0] for i in range(480*8)]
        assert 1/np.mean([(o/224)**2 for o in steps])==pytest.approx(progressive_speedup(sizes, 80/480)['pixels'], rel=1e-3)
        assert np.mean([(224/o)**2 for o in steps])==pytest.approx(progressive_speedup(sizes, 80/480)['eq9'], rel=1e-3)
        assert steps[:640]==[224]*640 and steps[640:]==sorted(steps[640:]) and steps[640]==lo
    assert progressive_sizes(64, 224)==(64,96,128,160,192,224)

def views_dls(n=24, size=32, bs=8, valid=True, **kwargs):
    return mix_dls(images(n, size, 3), images(9, size, 3, seed=1) if valid else None, bs=bs, drop_last=True, **kwargs)

@pytest.mark.parametrize('mix', [False,True])
@pytest.mark.parametrize('told', [False,True])
def test_sizes_of_steps(make, mix, told):
    "Within an epoch too; loaders that can be told, and others"
    seen,sp = Sizes(),SuperProgressive(16, 32, stages=3, unit=8, warmup_epochs=0.5, mix=mix)
    kwargs = dict(objective=Agree, dls=views_dls(ssl_tfms=[view_tfms('simclr')])) if told else dict(objective=AE, dls=views_dls())
    learn = make(arch='test_resnet', **kwargs)
    learn.fit_mixtraining(4, 3, rho=0.5, recipe=HOT, cbs=[sp, seen])
    n = 4 if mix else 3
    want = [progressive_at(i/3, n, 0.5, (16,24,32), (3,7)) for i in range(3*n)] + [(32,5)]*(3*(6-n))
    assert [o[1] for o in seen.train]==[o for o,_ in want] and [o for o,_ in want[:4]]==[32,32,16,16]
    if told:
        assert [o[-1] for o in seen.train[:12]]==pytest.approx([m for _,m in want[:12]]) and {o[-1] for o in seen.valid}=={5,None}
        assert all(o[1]==o[2] for o in seen.train[:9])
        v = learn.dls.train.phase('ssl', 2).view_tfms
        assert (v.size,v.magnitude)==(None,5)
    assert {o[1] for o in seen.valid}=={32}

@pytest.mark.parametrize('kwargs', [dict(), dict(objective=MAE(visible_only='mix')), dict(objective='ae')])
def test_transformers(make, kwargs):
    "Grids that change; the mix phase too"
    seen = Sizes()
    learn = make(size=16, objective=kwargs.get('objective'))
    learn.fit_mixtraining(4, 2, rho=0.5, recipe=HOT, cbs=[SuperProgressive(8, 16, stages=3, unit=4, mix=True), seen])
    assert {o[1] for o in seen.train}=={8,12,16} and learn.mix.history.train_loss.notna().all()

def test_plain_loaders(tmp_path):
    "fastai's own, of files"
    learn = vision_learner(file_dls(tmp_path), resnet18, pretrained=False)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    seen = Sizes()
    learn.fit_mixtraining(3, 1, rho=0, cbs=[SuperProgressive(magnitude=None, warmup_epochs=0), seen])
    assert [o[1] for o in seen.train if o[0]=='ssl']==sorted(o[1] for o in seen.train if o[0]=='ssl') and {o[1] for o in seen.train}=={16,24,32}

F1CLR = Recipe(Hypers(0.2, sched='f1clr', warmup_epochs=1, opt='sgd', wd=5e-4), HOT.sl)

@pytest.mark.parametrize('told,objective,recipe', [(True,Agree,HOT), (False,MAE,HOT), (True,partial(HardAugment, BYOL(16, 32), n=3, size=8),F1CLR)])
def test_resume(make, tmp_path, told, objective, recipe):
    "Bit for bit: within a stage, at its end, at an epoch's; with the two other strategies"
    def new(seed):
        dls = views_dls(size=16, seed=3, ssl_tfms=[view_tfms('simclr')] if told else None)
        return make(seed=seed, c=3, objective=deepcopy(objective)(), dls=dls)
    fit = dict(e_ssl=3, e_sl=2, recipe=recipe)
    cbs = lambda: [SuperProgressive(8, stages=3, unit=4, warmup_epochs=0.5, mix=True)]
    check_resumed(new, tmp_path/'run', (2,3,3), every_steps=1, cbs=cbs, **fit)
    with pytest.raises(ValueError, match='callbacks was'): new(0).fit_mixtraining(**fit, checkpoint=tmp_path/'run', resume=True)

def test_restored(make):
    "Whatever ends a fit, views are as they were; and the next one begins anew"
    dls = views_dls(ssl_tfms=[view_tfms('simclr', size=24, magnitude=4)])
    learn,sp = make(arch='test_resnet', objective=Agree, dls=dls),SuperProgressive(16, warmup_epochs=0)
    v = learn.dls.train.phase('ssl', 2).view_tfms
    with pytest.raises(RuntimeError, match='died'): learn.fit_ssl(3, cbs=[sp, Die(2)])
    assert (v.size,v.magnitude)==(24,4) and sp.sizes==(16,24)
    learn.add_cb(sp)
    learn.fit_ssl(3)
    learn.fit(1, 1e-3) # a plain fit, of which it knows nothing
    assert (v.size,v.magnitude)==(24,4)

def test_accumulated_gradients(make):
    seen = Sizes()
    make(arch='test_resnet', objective=AE, dls=views_dls()).fit_ssl(3, cbs=[SuperProgressive(16, warmup_epochs=0), GradientAccumulation(16), seen])
    assert {o[1] for o in seen.train}=={16,24,32}

def test_two_processes(launch):
    f = partial(fit_in_processes, make_learn=partial(make_in_process, mask=fixed_mask, metrics=None), seed=0, e=(3,2),
                cbs=[SuperProgressive(4, 8, stages=3, unit=2, warmup_epochs=0.5, mix=True)])
    check_close(check_alike(launch(partial(f, world=2), 2)), check_alike(launch(f, 1)))

def test_small_views_follow(make):
    "In proportion, in multiples of 8; images that are no squares too"
    from mixfast.callback.progressive import _shrunk
    xs = torch.rand(2, 3, 224, 224),torch.rand(2, 3, 96, 96)
    assert [o.shape[-1] for o in _shrunk(xs, 160)]==[160,64] and _shrunk(torch.rand(1, 3, 48, 64), 32).shape[-2:]==(24,32)

@pytest.mark.parametrize('kwargs,dynamic,sizes,anew', [(dict(), False, (8,12,16), (8,12,16)), (dict(arch='test_resnet', objective=SimSiam(16, 8)), None, (16,24,32), (16,24))])
def test_compiled(make, kwargs, dynamic, sizes, anew):
    "Nothing is compiled again within a stage; by default the second size is the last to be compiled for, with a validation in between"
    n = [0]
    def backend(gm, inputs):
        n[0] += 1
        return gm.forward
    learn = make(dls=views_dls(n=32, size=sizes[-1], valid=dynamic is None), c=3, **kwargs).compile(backend=backend, dynamic=dynamic)
    class Count(Callback):
        order,run_valid = 2000,False
        def __init__(self): self.by_step = []
        def before_batch(self): self.n = n[0]
        def after_batch(self): self.by_step.append((self.xb[0][0].shape[-1], n[0]-self.n)) # of a view, or of an image
    count = Count()
    learn.fit_ssl(3, recipe=HOT, cbs=[SuperProgressive(sizes[0], stages=3, unit=4, warmup_epochs=0), count])
    seen = [o for o,_ in count.by_step]
    assert seen==[o for o in sizes for _ in range(4)] and [i for i,(_,c) in enumerate(count.by_step) if c]==[seen.index(o) for o in anew]

def test_refused(make):
    learn = make(size=16)
    before = state(learn.model)
    for sp,fit,match in [
        (dict(min=6, max=16, unit=3), dict(e_ssl=4), r'9 is one of the sizes \(6, 9, 12, 15, 16\), and this model takes multiples of 2'),
        (dict(max=32), dict(e_ssl=4), 'max=32 is more than the 16 pixels that the loader gives'), (dict(min=32), dict(e_ssl=4), "min=32 is more than the images' 16"),
        (dict(warmup_epochs=4), dict(e_ssl=4), 'warmup_epochs=4 leaves nothing of 4 epochs'), (dict(), dict(e_ssl=2, rho=1), 'pass mix=True')]:
        with pytest.raises(ValueError, match=match): learn.fit_mixtraining(**dict(dict(e_sl=2, rho=0), **fit), cbs=SuperProgressive(**sp))
    for kwargs,match in [(dict(min=9, max=8), 'min=9 is more than max=8'), (dict(stages=1), 'stages must be'), (dict(min=0), 'min must be'), (dict(unit=0.5), 'unit must be'),
                         (dict(warmup_epochs=-1), 'warmup_epochs must be'), (dict(magnitude=(1,)), 'magnitude must be')]:
        with pytest.raises(ValueError, match=match): SuperProgressive(**kwargs)
    assert same(before, state(learn.model))

def test_a_model_of_one_size(tmp_path):
    learn = mix_learner(views_dls(), 'vit_tiny_patch16_224', patch_size=4, img_size=32, embed_dim=32, depth=1, num_heads=2, dynamic_img_size=False)
    with pytest.raises(ValueError, match='16 is one of the sizes .* dynamic_img_size=True'): learn.fit_ssl(4, cbs=SuperProgressive(16))

def test_as_a_class(make):
    seen = Sizes()
    make(arch='test_resnet', objective=AE, dls=views_dls()).fit_ssl(4, recipe=HOT, cbs=[SuperProgressive, seen])
    assert min(o[1] for o in seen.train)==16

# ---- lr_find

@pytest.mark.parametrize('phase', ['ssl','mix','sl'])
def test_lr_find(make, phase, capsys):
    "The rates are those of the phase's optimizer; a fit afterwards is as if it had not been"
    seen = []
    class Log(Callback):
        only_watches,run_valid = True,False
        def after_step(self): seen.append((self.phases.now.name, type(self.opt.opt).__name__, self.opt.hypers[0]['wd'], self.opt.hypers[0]['mom']))
    r = Recipe(Hypers(0.1, opt='sgd', wd=1e-3), Hypers(1e-3, wd=0.2))
    def fitted(find):
        learn = make(n=40, c=1)
        learn.fit_mixtraining(2, 2, recipe=HOT)
        rows,opt,obj = learn.mix.rows,learn.opt,learn.mix.objective
        before = state(learn.model),state(obj)
        if find:
            with learn.added_cbs(Log()): lrs = learn.lr_find(phase=phase, num_it=20, show_plot=False, recipe=r)
            text = capsys.readouterr().out
            assert f'valley: {lrs.valley:.2e} in steps of 8 images' in text and f'lr={lrs.valley*32:.2g}' in text
            assert set(seen)=={(phase, 'SGD', 1e-3, 0.9) if phase=='ssl' else (phase, 'AdamW', 0.2, 0.9)} and 5<len(seen)<=20
        assert learn.mix.rows is rows and learn.opt is opt and learn.mix.objective is obj and learn.mix.phase is None
        assert same(before[0], state(learn.model)) and same(before[1], state(obj)) and 'fit' not in vars(learn)
        torch.manual_seed(0)
        learn.fit_mixtraining(2, 2, recipe=HOT)
        return state(learn.model)
    assert same(fitted(True), fitted(False))

@pytest.mark.parametrize('objective', [Agree, BYOL(16, 32), SimCLR(16, 16)])
def test_lr_find_of_two_views(make, objective):
    "The rate is one to train with: the loss falls, and further than with a thousandth of it. To fastai losses below 0 have diverged at once"
    def last_loss(share):
        learn = make(objective=deepcopy(objective), c=3, dls=views_dls(n=48, size=16, seed=0))
        lr = learn.lr_find(phase='ssl', num_it=40, show_plot=False).valley*256/8
        assert len(learn.recorder.lrs)>20
        learn.fit_ssl(4, recipe=Recipe(Hypers(lr*share, warmup=0), HOT.sl))
        return learn.mix.history.ssl_loss.iloc[[0,-1]]
    (first,last),(_,idle) = last_loss(1),last_loss(1e-3)
    assert last<first and last<idle-0.05*abs(idle)

@pytest.mark.parametrize('objective', [BYOL(16, 32), MoCo(16, 16, queue=16), DINO(16, 32, 16)])
def test_lr_find_restores_teachers(make, objective):
    "And queues and centers, bit for bit; a queue that is random in the beginning does not end it"
    def fitted(find):
        learn = make(objective=deepcopy(objective), c=3, dls=views_dls(n=48, size=16, seed=0))
        learn.fit_ssl(1, recipe=HOT)
        before = state(learn.mix.objective)
        if find: learn.lr_find(phase='ssl', num_it=20, show_plot=False)
        assert same(before, state(learn.mix.objective))
        torch.manual_seed(0)
        learn.fit_mixtraining(2, 2, recipe=HOT)
        return state(learn.model)|{f'o.{k}': v for k,v in state(learn.mix.objective).items()}
    assert same(fitted(True), fitted(False))

def test_lr_find_without_labels(make, capsys):
    "Needs not be told; few images are gone through several times"
    learn = make(dls=mix_dls(ssl=images(16)[0], bs=8), n_out=3)
    learn.lr_find(num_it=30, show_plot=False)
    assert len(learn.recorder.lrs)>5 and 'in the Hypers of a recipe' in capsys.readouterr().out
    with pytest.raises(ValueError, match="phase must be 'ssl', 'mix' or 'sl', got 'all'"): learn.lr_find(phase='all')
    with pytest.raises(ValueError, match='have no labels'): learn.lr_find(phase='mix')

def test_lr_find_that_fails(make):
    learn = make()
    before = state(learn.model),state(learn.mix.objective)
    with learn.added_cbs(Die(3)), pytest.raises(RuntimeError, match='died'): learn.lr_find(phase='ssl', show_plot=False)
    assert same(before[0], state(learn.model)) and same(before[1], state(learn.mix.objective)) and learn.mix.phase is None
    learn.fit_mixtraining(1, 1)
