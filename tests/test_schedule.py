"""What the optimizer sees at each step, against closed forms."""
import math
import pytest
from conftest import HOT
from mixfast.all import Adam, Callback, fused_adamw

def closed(i, n, base, warm):
    w = round(warm*n)
    return base*(i+1)/w if i<w else base*(1+math.cos(math.pi*(i-w)/(n-w)))/2

@pytest.mark.parametrize('e_ssl,e_sl,rho', [(6,4,0.5), (4,4,0), (4,4,1), (0,4,0.5), (4,0,0)])
@pytest.mark.parametrize('sched', ['shared','restart'])
@pytest.mark.parametrize('opt', ['adamw','fastai'])
def test_hypers_at_every_step(make, e_ssl, e_sl, rho, sched, opt):
    seen = []
    class Log(Callback):
        run_valid = False
        def before_step(self): seen.append([(h['lr'], h['mom'], h['sqr_mom'], h['wd']) for h in self.opt.hypers])
    learn = make(opt_func=fused_adamw if opt=='adamw' else Adam)
    learn.fit_mixtraining(e_ssl, e_sl, rho=rho, recipe=HOT, sl_sched=sched, cbs=Log())

    e_mix = math.floor(rho*min(e_ssl, e_sl))
    parts = [(HOT.ssl, e_ssl-e_mix)] + ([(HOT.sl, e_mix), (HOT.sl, e_sl-e_mix)] if sched=='restart' else [(HOT.sl, e_sl)])
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

@pytest.mark.parametrize('carry_opt,want', [(False, [1,2,3, 1,2,3,4,5,6]), (True, [*range(1,10)])])
def test_optimizer_state_is_fresh_once(make, carry_opt, want):
    "Step counts of AdamW: they start over at the first supervised epoch unless told not to, and are carried from mix into SL"
    steps = []
    class Log(Callback):
        run_valid = False
        def after_step(self): steps.append(int(self.opt.opt.state[self.learn.model.backbone.patch_embed.proj.weight]['step']))
    learn = make()
    learn.fit_mixtraining(2, 2, rho=0.5, carry_opt=carry_opt, cbs=Log())
    assert steps==want
