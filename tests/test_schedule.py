"""What the optimizer sees at each step, against closed forms."""
import math
from functools import partial
import pytest, torch
from fastai.vision.all import (GradientAccumulation, GradientClip, OptimWrapper, ProgressCallback, load_learner, noop, params, resnet18,
    vision_learner)
from conftest import HOT, same, state
from mixfast.all import Adam, Callback, Hypers, MixPlan, Recipe, f1clr_at, fused_adamw, fused_sgd, hypers_at, no_decay, one_cycle_at, recipes
from test_distributed import check_alike, check_close, fit as fit_in_processes, launch, learner as make_in_process, fixed_mask
from test_fit import file_dls
from test_resume import check_resumed

def closed(i, n, base, warm):
    w = round(warm*n)
    return base*(i+1)/w if i<w else base*(1+math.cos(math.pi*(i-w)/(n-w)))/2

@pytest.mark.parametrize('e_ssl,e_sl,rho', [(6,4,0.5), (4,4,0), (4,4,1), (0,4,0.5), (4,0,0)])
@pytest.mark.parametrize('sched', ['shared','restart','ssl'])
@pytest.mark.parametrize('opt', ['adamw','fastai'])
def test_hypers_at_every_step(make, e_ssl, e_sl, rho, sched, opt):
    seen = []
    class Log(Callback):
        run_valid = False
        def before_step(self): seen.append([(h['lr'], h['mom'], h['sqr_mom'], h['wd']) for h in self.opt.hypers])
    learn = make(opt_func=fused_adamw if opt=='adamw' else Adam)
    learn.fit_mixtraining(e_ssl, e_sl, rho=rho, recipe=HOT, sl_sched=sched, cbs=Log())

    e_mix = math.floor(rho*min(e_ssl, e_sl))
    parts = dict(shared=[(HOT.ssl, e_ssl-e_mix), (HOT.sl, e_sl)], restart=[(HOT.ssl, e_ssl-e_mix), (HOT.sl, e_mix), (HOT.sl, e_sl-e_mix)],
                 ssl=[(HOT.ssl, e_ssl), (HOT.sl, e_sl-e_mix)])[sched]
    want = [(closed(i, 3*e, h.lr*8/256, h.warmup), *h.betas, h.wd) for h,e in parts for i in range(3*e)]
    assert len(seen)==len(want)
    for groups,(lr,b1,b2,wd) in zip(seen, want):
        assert all(g[:3]==pytest.approx((lr,b1,b2)) for g in groups)
        assert [g[3] for g in groups]==([wd,0] if opt=='adamw' else [wd])
    assert learn.recorder.hps['lr']==pytest.approx([w[0] for w in want])

@pytest.mark.parametrize('sched', [None,'linear','cosine'])
def test_alpha(make, sched):
    seen = []
    class Log(Callback):
        order,run_valid = 100,False
        def after_loss(self):
            m = self.phases
            if m.now.name=='mix': seen.append((self.loss.item(), self.learn.losses['ssl_loss'].item(), self.learn.losses['sl_loss'].item()))
    learn = make()
    learn.fit_mixtraining(4, 4, rho=0.5, alpha=0.3, alpha_sched=sched, cbs=Log())
    t = [i/5 for i in range(6)]
    want = {None:[0.3]*6, 'linear':[1-o for o in t], 'cosine':[(1+math.cos(math.pi*o))/2 for o in t]}[sched]
    for a,(loss,ssl,sl) in zip(want, seen): assert loss==pytest.approx(a*ssl+(1-a)*sl, rel=1e-5)
    mix = [a for e,a in zip(learn.mix.sched['epoch'], learn.mix.sched['alpha']) if 2<=e<4]
    assert mix==pytest.approx(want) and len(seen)==6

@pytest.mark.parametrize('carry_opt,sched,want', [(False, 'shared', [1,2,3, 1,2,3,4,5,6]), (True, 'shared', [*range(1,10)]), (False, 'ssl', [1,2,3,4,5,6, 1,2,3])])
def test_optimizer_state_is_fresh_once(make, carry_opt, sched, want):
    "Step counts of AdamW: they start over at the first epoch of the SL set unless told not to, and are carried on within it"
    steps = []
    class Log(Callback):
        run_valid = False
        def after_step(self): steps.append(int(self.opt.opt.state[self.learn.model.backbone.patch_embed.proj.weight]['step']))
    learn = make()
    learn.fit_mixtraining(2, 2, rho=0.5, carry_opt=carry_opt, sl_sched=sched, cbs=Log())
    assert steps==want

# ---- one cycle

def eq(t, L, w, lr_max, lo, hi):
    "Eq. 6 and 8 as they are printed"
    c = math.cos(math.pi*t/w) if t<w else math.cos(math.pi*(t-w)/(L-w))
    return (lr_max - lr_max/2*(c+1), lo + (hi-lo)/2*(c+1)) if t<w else (lr_max/2*(c+1), hi - (hi-lo)/2*(c+1))

@pytest.mark.parametrize('L,w', [(480,80), (100,10), (7,6), (9,1)])
def test_f1clr(L, w):
    for t in range(L+1): assert f1clr_at(t, L, w, 0.2, (0.8,0.9))==pytest.approx(eq(t, L, w, 0.2, 0.8, 0.9), abs=1e-12)
    assert f1clr_at(3, 12, 0)==pytest.approx(eq(3+4, 16, 4, 1, 0.85, 0.95)) # without warm-up
    assert f1clr_at(3, 5, 5)==pytest.approx(eq(3, 9, 5, 1, 0.85, 0.95)) # nothing but warm-up
    for t in range(L): assert one_cycle_at(t, L, 0.3)==pytest.approx(eq(t, L, round(0.3*L), 1, 0.85, 0.95), abs=1e-12)

CLR = Recipe(Hypers(0.4, sched='f1clr', warmup_epochs=1.5, wd=5e-4, opt='sgd'), HOT.sl)
FIT = dict(e_ssl=4, e_sl=4, rho=0.5)

@pytest.mark.parametrize('opt', ['adamw','fastai','sgd'])
def test_sgd_then_the_learners_own(make, opt):
    "Optimizers, rates, momenta and decay at every step of one fit"
    seen = []
    class Log(Callback):
        order,run_valid = 100,False
        def before_step(self):
            seen.append((self.phases.now.name, type(getattr(self.opt, 'opt', self.opt)).__name__, [dict(h) for h in self.opt.hypers]))
            assert {id(p) for g in self.opt.param_lists for p in g}=={id(p) for p in self.model.parameters()}
    own = dict(adamw=fused_adamw, fastai=Adam, sgd=fused_sgd)[opt]
    learn = make(opt_func=own)
    learn.fit_mixtraining(**FIT, recipe=CLR, cbs=Log())
    names = dict(adamw='AdamW', fastai='Optimizer', sgd='SGD')
    assert [(p,n) for p,n,_ in seen]==[('ssl','SGD')]*6 + [(p, names[opt]) for p in ['mix']*6+['sl']*6]
    for i,(_,_,hs) in enumerate(seen[:6]):
        lr,mom = eq(i, 6, 4, 0.4*8/256, 0.85, 0.95) # 1.5 epochs of 3 steps are 4 (round half to even)
        for h,wd in zip(hs, [5e-4,0]): assert (h['lr'],h['momentum'] if 'momentum' in h else h['mom'],h['wd'])==pytest.approx((lr,mom,wd))
    hps = learn.recorder.hps
    assert {len(v) for v in hps.values()}=={18} and list(hps)==['lr','mom','wd']+['sqr_mom']*(opt!='sgd')
    if opt!='sgd': assert all(map(math.isnan, hps['sqr_mom'][:6])) and hps['sqr_mom'][6]==0.98
    learn.recorder.plot_sched()
    assert type(learn.opt) is type(own(params(learn.model), lr=0.1)) # the last phase had the learner's own

def test_momentum_of_a_cosine(make):
    "Any schedule may have the momentum run against it, AdamW's too"
    seen = []
    class Log(Callback):
        run_valid,order = False,100
        def before_step(self): seen.append(self.opt.hypers[0]['mom'])
    make().fit_ssl(4, recipe=Recipe(Hypers(1e-3, warmup=0, mom=(0.8,0.9)), HOT.sl), cbs=Log())
    assert seen==pytest.approx([0.9-0.1*closed(i, 12, 1, 0) for i in range(12)])

def test_sgd_is_torchs(make):
    "Norms, biases and embeddings undecayed"
    h = Hypers(0.3, warmup=0, wd=0.1, opt='sgd', mom=(0.9,0.9))
    def trained(**kwargs):
        learn = make(**kwargs)
        learn.fit_sl(2, recipe=Recipe(h, h if not kwargs else Hypers(0.3, warmup=0, wd=0.1, betas=(0.9,0.9))))
        return state(learn.model)
    ours,plain = trained(),trained(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, foreach=False)))
    for k,v in ours.items(): torch.testing.assert_close(v, plain[k], atol=1e-5, rtol=0)

def test_the_optimizer_afterwards(make, tmp_path):
    "Is the learner's own: it saves, loads, exports and trains on"
    for own in fused_adamw,Adam:
        learn = make(opt_func=own)
        learn.fit_ssl(4, recipe=CLR)
        assert type(learn.opt) is type(own(params(learn.model), lr=0.1)) and not any(p in set(learn.mix.objective.parameters()) for g in learn.opt.param_lists for p in g)
        learn.save('w'); learn.load('w'); learn.export('e.pkl'); load_learner(tmp_path/'e.pkl')
        learn.fit(1)
        class Fail(Callback):
            def after_step(self): raise KeyError('stop')
        with pytest.raises(KeyError): learn.fit_ssl(4, recipe=CLR, cbs=Fail())
        assert getattr(learn.opt, 'by_name', None) is None
        learn.export('e.pkl')

@pytest.mark.parametrize('opt_func', [fused_adamw, Adam])
def test_export_within_a_fit(make, tmp_path, opt_func):
    "Whatever optimizer the phase has, and then training goes on with it"
    class Exports(Callback):
        def after_epoch(self): self.learn.export('e.pkl')
    a = make(opt_func=opt_func)
    a.fit_mixtraining(**FIT, recipe=CLR, cbs=Exports())
    b = make(opt_func=opt_func)
    b.fit_mixtraining(**FIT, recipe=CLR)
    assert same(state(a.model), state(b.model)) and same(state(load_learner(tmp_path/'e.pkl').model), state(a.model))

@pytest.mark.parametrize('kwargs', [dict(), dict(opt_func=Adam), dict(bf16=True, cbs=lambda: [GradientAccumulation(12), GradientClip(0.1)])])
def test_resume_around_the_change(make, tmp_path, kwargs):
    "The fit dies in the SSL phase by SGD, in its last step, in the first supervised one and later"
    cbs,bf16 = kwargs.pop('cbs', list),kwargs.pop('bf16', False)
    def new(seed):
        learn = make(seed=seed, n=40, **kwargs)
        return learn.to_bf16() if bf16 else learn
    learn = check_resumed(new, tmp_path/'run', (4,6,1,2,9), every_steps=1, cbs=cbs, recipe=CLR)
    assert math.isnan(learn.recorder.hps['sqr_mom'][0])
    with pytest.raises(ValueError, match='recipe was'): new(0).fit_mixtraining(**FIT, recipe=HOT, checkpoint=tmp_path/'run', resume=True)

def test_sgd_with_a_blocked_first_step(make):
    "Fused: its momenta begin with 0, not with what was in memory"
    class Bad(Callback):
        order,run_valid = -3,False
        def after_loss(self):
            if self.train_iter==0: self.learn.loss_grad = self.learn.loss_grad*math.nan; self.learn.loss = self.learn.loss*math.nan
    learn = make()
    with pytest.warns(UserWarning, match='1 of 3 steps'): learn.fit_ssl(4, recipe=CLR, on_nan='skip', cbs=Bad())
    assert learn.mix.skipped==1 and all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_vision_learner(tmp_path):
    "Groups of fastai's splitter, body and head, for both optimizers"
    learn = vision_learner(file_dls(tmp_path), resnet18, pretrained=False)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    n,seen = len(learn.splitter(learn.model)),{}
    class Log(Callback):
        def after_step(self): seen[self.phases.now.name] = type(getattr(self.opt, 'opt', self.opt)).__name__, len(self.opt.param_lists)
    learn.fit_mixtraining(2, 1, rho=0, recipe=Recipe(CLR.ssl, Hypers(1e-3, opt='adamw')), cbs=Log())
    assert seen==dict(ssl=('SGD',2*n), sl=('AdamW',2*n)) and len(learn.opt.param_lists)==n
    learn.freeze(); learn.fit_one_cycle(1, slice(1e-4, 1e-3))

def test_two_processes(launch):
    f = partial(fit_in_processes, make_learn=partial(make_in_process, mask=fixed_mask, metrics=None), seed=0, e=(3,2), recipe=CLR)
    check_close(check_alike(launch(partial(f, world=2), 2)), check_alike(launch(f, 1)))

def test_hypers_that_are_refused(make):
    for kwargs,match in [(dict(sched='linear'), "sched must be one of"), (dict(sched='f1clr'), "pass warmup_epochs"), (dict(opt='adam'), "opt must be one of"),
                         (dict(warmup_epochs=-1), "warmup_epochs must be a finite number"), (dict(warmup_epochs='a'), "warmup_epochs must be"),
                         (dict(mom=0.9), "mom must be two numbers"), (dict(mom=(0.9,0.8)), "least and the most"), (dict(mom=(0,2)), r"mom\[1\] must lie in")]:
        with pytest.raises(ValueError, match=match): Hypers(0.1, **kwargs)
    learn = make()
    before = state(learn.model)
    for fit,match in [(dict(e_ssl=1, e_sl=1, rho=0), 'warmup_epochs=1.5, but the ssl phase lasts 1 epochs'),
                      (dict(FIT, carry_opt=True), "carry_opt=True, but the optimizers differ: opt='sgd' for ssl, None for sl")]:
        with pytest.raises(ValueError, match=match): learn.fit_mixtraining(**fit, recipe=CLR)
    for sl_sched,match in [('shared', 'warmup_epochs=5, but the mix and sl phase lasts 4'), ('restart', 'warmup_epochs=5, but the mix phase lasts 2')]:
        with pytest.raises(ValueError, match=match): learn.fit_mixtraining(**FIT, sl_sched=sl_sched, recipe=Recipe(HOT.ssl, Hypers(1e-3, warmup_epochs=5)))
    assert same(before, state(learn.model))

def test_recipes_of_the_paper():
    "Rates as the paper gives them, for its batches"
    for name,bs,lr in [('imagenette',128,0.1), ('imagenette_f1clr',128,0.2), ('imagenet',512,0.1), ('imagenet_f1clr',512,0.16)]:
        r = recipes['siamese_'+name]
        plan = MixPlan(480, 0)
        assert max(hypers_at(plan, e, 0, 1, r.ssl, r.sl, bs)['lr'] for e in range(480))==pytest.approx(lr)
        assert r.ssl.opt=='sgd' and r.ssl.wd==(5e-4 if 'nette' in name else 1e-4)
