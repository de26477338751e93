"What a fit has cost: counted on the way, without a trace; the indicators of an objective, and when it has collapsed"
import random, warnings
from functools import partial
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.vision.all import accuracy, load_learner
from torch import nn

from mixfast.all import AE, KNNAccuracy, RankMe, compare_methods, embed, linear_probe, mix_dls, plot_methods, rank_me
from mixfast.callback.collapse import _at_chance
from mixfast.callback.progressive import SuperProgressive
from mixfast.insight.cost import _count
from mixfast.insight.evaluate import _sgd_probe, _sklearn_probe
from mixfast.objective.core import Objective
from mixfast.objective.features import evaluating, features, find_layout
from conftest import HOT, images, same, state
from test_distributed import check_alike, fit, launch, learner
from test_resume import Die

def without_seconds(c): return c.drop(columns='seconds')

def test_cost_is_steps_times_operations(make):
    "By phase; a last batch that is smaller; two data sets"
    for kw in (dict(n=24), dict(n=24, ssl=images(40, seed=3)[0])):
        learn = make(**kw)
        assert learn.mix.cost.to_numpy().sum()==0 # no fit yet
        learn.fit_mixtraining(4, 3, rho=0.5, recipe=HOT)
        f,c = learn.mix.step_flops(),learn.mix.cost
        assert c.index.tolist()==['ssl','mix','sl'] and c.steps.tolist()==[3*5 if len(kw)==2 else 3*3,3,6]
        assert np.allclose(c.petaFLOP, [n*f[p]/1e15 for p,n in c.steps.items()], rtol=1e-12) and c.seconds.to_dict()==learn.mix.seconds
    learn = make(n=20, drop_last=False) # 8, 8 and 4 images
    learn.fit_sl(2, recipe=HOT)
    assert np.isclose(learn.mix.cost.petaFLOP['sl'], 2*2.5*learn.mix.step_flops()['sl']/1e15) and learn.mix.cost.steps['sl']==6

def test_asking_leaves_no_trace(make):
    "Not in weights, generators, objective or loaders; the second answer is the first"
    learn = make(objective=Taught)
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    learn.model.zero_grad()
    see = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), learn.dls.train.state_dict(), learn.opt)
    before,w,o = see(),state(learn.model),state(learn.mix.objective)
    c = learn.mix.cost
    learn.mix.step_flops(16)
    assert see()==before and same(w, state(learn.model)) and same(o, state(learn.mix.objective)) and learn.mix.phase is None
    assert all(p.grad is None for p in learn.model.parameters()) and learn.mix.cost.equals(c)

class Taught(Objective):
    "Features of a teacher are to be met, whose pass has no gradient; `extra` passes more go before"
    def __init__(self, extra=0):
        super().__init__()
        self.extra = extra
    def setup(self, backbone, x):
        d = find_layout(backbone, x).dim
        self.head,self.teacher = nn.Linear(d, d),nn.Linear(d, d).requires_grad_(False)
    def forward(self, feats, x):
        z = feats.tokens().mean(1)
        with torch.no_grad(): target = self.teacher(z)
        return F.mse_loss(self.head(z), target)
    def encode(self, backbone, x):
        with torch.no_grad():
            for _ in range(self.extra): features(backbone, x)
        return features(backbone, x)

def test_passes_without_gradient_count(make):
    "Each is an evaluation of the backbone"
    a,b = [make(objective=Taught(n)) for n in (0,2)]
    x = a.dls.one_batch()[0]
    with evaluating(a.model), torch.no_grad(): one = _count(lambda: features(a.model, x))
    f,g = a.mix.step_flops(),b.mix.step_flops()
    assert one>0 and g['ssl']-f['ssl']==2*one and g['sl']==f['sl']

def test_attention_counts_on_a_cpu(make):
    "An SL step by hand: three passes of all matrices, of the first two, and attention"
    learn = make(n=24, bs=8)
    b,n,d,depth,p = 8,17,32,2,4 # 16 patches of 4 numbers and a class token
    one = 2*b*n*12*d*d*depth # qkv, projection, MLP
    attention = 2*2*b*n*n*d*depth # forward; backward five products for two
    embed,head = 2*b*16*p*d,2*b*d*3
    assert learn.mix.step_flops()['sl']==3*one + (1+2.5)*attention + 2*embed + 3*head

def test_progressive_sizes(make):
    "Every size is in it: between all steps at the least and all at the most"
    learn = make(n=24)
    learn.fit_mixtraining(6, 2, rho=0, recipe=HOT, cbs=SuperProgressive(4, 8, stages=2, warmup_epochs=2, unit=4))
    c,(lo,hi) = learn.mix.cost,[learn.mix.step_flops(n)['ssl']/1e15 for n in (4,8)]
    assert np.isclose(c.petaFLOP['ssl'], 3*(2*hi+2*lo+2*hi)) and len({k for k in learn.mix.n_steps if k[0]=='ssl'})==2

def test_ssl_alone_and_another_objective(make):
    "Without labels; a cost is that of the objective that was trained"
    learn = make(dls=mix_dls(ssl=images(24)[0], bs=8), metrics=[], objective=Taught)
    learn.fit_ssl(2, recipe=HOT)
    f = learn.mix.step_flops()
    assert list(f)==['ssl']
    learn.to_mix(Taught(3))
    c = learn.mix.cost
    assert np.isclose(c.petaFLOP['ssl'], 6*f['ssl']/1e15) and learn.mix.step_flops()['ssl']>f['ssl'] and c.petaFLOP[1:].sum()==0
    learn.fit_ssl(1, recipe=HOT)
    assert learn.mix.cost.petaFLOP['ssl']==3*learn.mix.step_flops()['ssl']/1e15

def test_cost_after_a_resume(make, tmp_path):
    "Killed within an epoch and between two; after an export, where there are no images"
    ref = make()
    ref.fit_mixtraining(3, 3, rho=0.5, recipe=HOT)
    for n in (2,5):
        with pytest.raises(RuntimeError, match='died'): make().fit_mixtraining(3, 3, rho=0.5, recipe=HOT, checkpoint=tmp_path, every_steps=1, resume=True, cbs=Die(n))
    learn = make()
    learn.fit_mixtraining(3, 3, rho=0.5, recipe=HOT, checkpoint=tmp_path, every_steps=1, resume=True)
    assert learn.mix.n_steps==ref.mix.n_steps and without_seconds(learn.mix.cost).equals(without_seconds(ref.mix.cost))
    learn.export(tmp_path/'learn.pkl')
    assert load_learner(tmp_path/'learn.pkl').mix.cost.equals(learn.mix.cost)

def test_cost_of_several_processes(launch):
    "Operations of all, steps of one"
    ask = lambda learn: dict(cost=without_seconds(learn.mix.cost).to_dict())
    kw = dict(make_learn=partial(learner, objective=AE), e=(2,2), after=ask)
    one,two = launch(partial(fit, **kw), 1)[0],check_alike(launch(partial(fit, world=2, **kw), 2))
    assert one['cost']['steps']==two['cost']['steps'] and one['cost']['petaFLOP']==pytest.approx(two['cost']['petaFLOP'], rel=1e-12)

class Shrinking(Objective):
    "An objective whose spread is what it is told, epoch by epoch"
    def __init__(self, *spreads):
        super().__init__()
        self.spreads = list(spreads)
    def forward(self, feats, x): return feats.t.square().mean()
    def indicators(self): return dict(spread=self.spreads.pop(0))

def said(learn, *args, **kwargs):
    "What a fit says of a collapse"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit_mixtraining(*args, recipe=HOT, **kwargs)
    return [str(o.message) for o in ws if 'collapse' in str(o.message)]

def test_indicators_are_columns(make):
    "Behind the metrics; asked once an epoch of SSL and mix phase; a cancelled one has none"
    learn = make(objective=Shrinking(0.9, 0.8, 0.7))
    learn.fit_mixtraining(3, 2, rho=0.5, recipe=HOT)
    h = learn.mix.history
    assert h.columns.tolist()==['epoch','phase','train_loss','ssl_loss','sl_loss','valid_loss','accuracy','spread','ssl_share','train_seconds','seconds']
    assert h.spread[:3].tolist()==[0.9,0.8,0.7] and h.spread[3:].isna().all() and learn.mix.objective.spreads==[]
    learn.mix.plot_history()

def test_collapse_is_said_once(make):
    ws = said(make(objective=Shrinking(0.05, 0.9, 0.04, 0.03, 0.02)), 5, 1, rho=0)
    assert len(ws)==1 and 'epoch 2' in ws[0] and 'spread 0.040' in ws[0] and 'lower learning rate' in ws[0]
    assert said(make(objective=Shrinking(0.05, 0.9, 0.8)), 3, 1, rho=0)==[] # the first epoch may be as it likes
    assert len(said(make(objective=Shrinking(0.9, 0.02)), 2, 2, rho=1))==1 # in the mix phase
    assert said(make(), 2, 2, rho=0.5)==[]

def test_collapse_after_a_resume(make, tmp_path):
    "What was said is not said again"
    kw = dict(rho=0, checkpoint=tmp_path, resume=True)
    with pytest.warns(UserWarning, match='collapse'), pytest.raises(RuntimeError, match='died'):
        make(objective=Shrinking(0.9, 0.02)).fit_mixtraining(4, 1, recipe=HOT, cbs=Die(7), **kw)
    assert said(make(objective=Shrinking(0.01, 0.02)), 4, 1, **kw)==[]

def test_neighbours_at_chance(make):
    "Of a classifier of many images; no metric, few images, or too few epochs: nothing is said"
    class Blind(KNNAccuracy):
        name,value = 'knn_accuracy',0.34
    dls = lambda n: mix_dls(images(24), images(n, seed=1), bs=8)
    assert len(said(make(dls=dls(120), metrics=[Blind()]), 5, 1, rho=0))==1
    assert said(make(dls=dls(99), metrics=[Blind()]), 4, 1, rho=0)==[]
    assert _at_chance([dict(knn_accuracy=0.1)]*2, 10, 1000) is None

def test_rank_me(make):
    "Against NumPy; a metric of the SSL phase that reads no labels"
    x = np.random.default_rng(0).normal(size=(50,8)).astype(np.float32) @ np.diag([5,3,1,1,1,1,0,0]).astype(np.float32)
    p = np.linalg.svd(x, compute_uv=False)
    p = p/p.sum()+1e-7
    assert np.isclose(rank_me(torch.tensor(x)), np.exp(-(p*np.log(p)).sum()), rtol=1e-4)
    learn = make(dls=mix_dls(ssl=images(24)[0], valid=images(30, seed=1), bs=8), metrics=RankMe(n=12))
    learn.fit_ssl(2, recipe=HOT)
    f = embed(learn, learn.dls.valid)[0]
    want = rank_me(f[np.random.default_rng(0).permutation(30)[:12]])
    assert np.isclose(learn.mix.history.rank_me.iloc[-1], want) and want>1
    learn = make(metrics=[RankMe(), accuracy])
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    assert learn.mix.history.rank_me.notna().tolist()==[True,False,False]

def test_probe_by_sgd():
    "scikit-learn's accuracy within three points, on classes that overlap and channels of very different size, one of them dead"
    g = torch.Generator().manual_seed(0)
    centre,y = torch.randn(6, 40, generator=g),torch.randint(6, (3600,), generator=g)
    f = (0.45*centre[y]+torch.randn(3600, 40, generator=g))*torch.logspace(-3, 3, 40)
    f[:,3] = 7.
    sets = lambda: (f[:1200].clone(), y[:1200], f[1200:].clone(), y[1200:])
    a,b,rng = _sgd_probe(*sets(), C=1.),_sklearn_probe(*sets(), C=1.),torch.get_rng_state()
    assert 0.5 < b < 0.95 and abs(a-b) < 0.03 and a==_sgd_probe(*sets(), C=1.) and torch.equal(rng, torch.get_rng_state())

def test_probe_of_a_learner(make):
    learn = make(n=60)
    assert {linear_probe(learn, by=o)>=0 for o in ('sgd','sklearn',None)}=={True}
    assert linear_probe(learn, n=30)==linear_probe(learn, n=30, by='sklearn')
    with pytest.raises(ValueError, match="by must be 'sklearn', 'sgd' or None"): linear_probe(learn, by='svm')

def test_methods_by_cost(make):
    "A point a budget, joined; by petaFLOP or seconds"
    new = lambda s: make(seed=s)
    runs = [compare_methods(new, e, e, seeds=1, bar=False, recipe=HOT).assign(budget=e) for e in (1,2)]
    ax = plot_methods(pd.concat(runs), x='petaflop')
    xs = [o.get_xdata() for o in ax.lines if len(o.get_xdata())==2]
    assert len(xs)>=3 and all(np.isclose(b, 2*a) for a,b in xs[:1]) and ax.get_xlabel()=='petaFLOP'
    with pytest.raises(ValueError, match='x must be a column'): plot_methods(runs[0], x='hours')
