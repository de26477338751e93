"A loss that is not finite: the weights survive, the error says where, nothing bad is saved"
from functools import partial
import pytest, torch
from fastai.vision.all import Adam, Callback, GradientAccumulation, OptimWrapper
from mixfast.all import MixModel
from mixfast.callback.files import _read_index as read_index
from conftest import HOT, same, state

class Poison(Callback):
    "Make the loss of one training step nan, and of the next one inf; remember the weights before it"
    order = -10
    def __init__(self, epoch, i): self.at,self.n,self.seen = (epoch, i),0,[]
    def before_batch(self):
        if not self.training: return
        now = (self.epoch,self.iter)
        if now==self.at: self.before = state(self.model)
        if now in (self.at, (self.at[0],self.at[1]+1)): self.learn.xb = tuple(x*float('nan' if now==self.at else 'inf') for x in self.xb)

SGD = partial(OptimWrapper, opt=torch.optim.SGD)

@pytest.mark.parametrize('epoch,phase', [(0,'ssl'), (2,'mix'), (4,'sl')])
@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=SGD)])
def test_stop(make, tmp_path, epoch, phase, kwargs):
    learn,cb = make(**kwargs),Poison(epoch, 1)
    with pytest.raises(FloatingPointError, match=f'not finite at step {3*epoch+1} of the fit, in epoch {epoch}, in the {phase} phase, at a learning rate of') as e:
        learn.fit_mixtraining(4, 4, rho=0.5, recipe=HOT, cbs=cb, checkpoint=tmp_path/'run')
    assert same(state(MixModel(learn.model, learn.mix.objective)), cb.before)
    assert [o['epoch'] for o in read_index(tmp_path/'run')]==[e for e in (epoch, epoch-1) if e>0]
    before = state(learn.model)
    learn.fit(1, 1e-2) # the optimizer acts again
    assert not same(state(learn.model), before) and all(v.isfinite().all() for v in state(learn.model).values())

@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=SGD), dict(opt_func=Adam)])
def test_the_very_first_step(make, kwargs):
    "Before any rate was recorded"
    with pytest.raises(FloatingPointError, match='not finite at step 0 of the fit, in epoch 0, in the ssl phase, at a learning rate of 1.25e-04'):
        make(**kwargs).fit_mixtraining(2, 2, recipe=HOT, cbs=Poison(0, 0))

@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=SGD)])
def test_skip(make, kwargs):
    "Two steps are skipped and counted; the rest is trained, and what is recorded is finite"
    learn,cb = make(n=40, **kwargs),Poison(2, 1)
    learn.fit_mixtraining(4, 4, rho=0.5, recipe=HOT, cbs=cb, on_nan='skip')
    h = learn.mix.history
    assert learn.mix.skipped==2 and h.train_loss.notna().all() and h.sl_loss[2:].notna().all()
    assert all(v.isfinite().all() for v in state(learn.model).values()) and not same(state(MixModel(learn.model, learn.mix.objective)), cb.before)
    assert all(o.isfinite() for o in learn.recorder.losses)
    opt = learn.opt.opt
    if not kwargs: assert {int(opt.state[p]['step']) for p in learn.model.parameters()}=={20-2} # those skipped do not count

def test_gradients_that_are_not_finite(make):
    "A finite loss with them does no harm either"
    class Break(Callback):
        order,run_valid = -10,False
        def after_backward(self):
            if (self.epoch,self.iter)==(2,1): next(self.model.backbone.parameters()).grad[...] = float('nan')
    for on_nan in ('stop','skip'):
        learn = make()
        if on_nan=='stop':
            with pytest.raises(FloatingPointError, match='the loss or its gradient is not finite at step 7'): learn.fit_mixtraining(4, 4, rho=0.5, on_nan=on_nan, cbs=Break())
        else:
            with pytest.warns(UserWarning, match='1 of 3 steps of epoch 2 were skipped'): learn.fit_mixtraining(4, 4, rho=0.5, on_nan=on_nan, cbs=Break())
        assert all(v.isfinite().all() for v in state(learn.model).values())

def test_skipping_ends(make):
    "Where most steps of an epoch are bad"
    class Always(Callback):
        order,run_valid = -10,False
        def before_batch(self): self.learn.xb = (self.xb[0]*float('inf'),)
    with pytest.raises(FloatingPointError, match='3 of 3 steps of epoch 0 had to be skipped'): make().fit_mixtraining(2, 2, on_nan='skip', cbs=Always())

def test_statistics_of_batchnorm(make):
    "They are left out with the step"
    learn = make(n=40, arch='test_resnet', size=32, c=3)
    with pytest.warns(UserWarning, match='were skipped'): learn.fit_mixtraining(2, 2, on_nan='skip', cbs=Poison(1, 1))
    assert all(v.isfinite().all() for v in state(learn.model).values()) and learn.mix.history.valid_loss.notna().all()

def test_bad_arguments(make):
    with pytest.raises(ValueError, match="on_nan must be 'stop' or 'skip', got 'ignore'"): make().fit_mixtraining(2, 2, on_nan='ignore')
    with pytest.raises(ValueError, match='gradients that are gathered'): make().fit_mixtraining(2, 2, on_nan='skip', cbs=GradientAccumulation(16))

def test_weights_that_are_not_finite_are_not_saved(make, tmp_path):
    "However they came about"
    class Break(Callback):
        order = 500
        def after_epoch(self):
            if self.epoch==1: next(self.model.parameters()).data[...] = float('nan')
    learn = make()
    with pytest.raises(FloatingPointError, match='weights are not finite: backbone.cls_token'): learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', cbs=Break())
    assert [o['epoch'] for o in read_index(tmp_path/'run')]==[1]
