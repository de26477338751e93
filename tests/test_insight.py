"kNN, gradient cosines, timing and the comparison: against slow, independent versions, and what they must leave alone"
import math
from copy import deepcopy
import numpy as np, pandas as pd, pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import Callback, CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, accuracy, get_image_files, parent_label, resnet18, vision_learner
from torch import nn
from sklearn.neighbors import KNeighborsClassifier

from mixfast.all import GradCosines, KNNAccuracy, compare_methods, knn_predict, linear_probe, method_table, mix_dls
from mixfast.insight.cost import _steps
from mixfast.insight.evaluate import _bank_dl, embed
from mixfast.insight.gradients import last_layer, loss_cosines
from mixfast.model import MixModel
from mixfast.objective.core import Objective
from mixfast.objective.features import find_layout
from conftest import HOT, images, same, state
from test_data import SAMPLES

def test_knn_against_sklearn():
    "k nearest by cosine, votes exp(cos/t)"
    rng = np.random.default_rng(0)
    a,q,y = rng.normal(size=(300,16)),rng.normal(size=(2100,16)),rng.integers(0, 5, 300)
    ref = KNeighborsClassifier(20, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1-d)/0.07)).fit(a, y).predict(q)
    f = lambda o: torch.tensor(o).double()
    assert (knn_predict(f(a), torch.tensor(y), f(q), 5, k=20).numpy()==ref).mean() > 0.999
    assert torch.equal(knn_predict(f(a), torch.tensor(y), f(q), 5, k=300), knn_predict(f(a), torch.tensor(y), f(q), 5, k=10**6)) # capped

@pytest.mark.parametrize('arch', [None, 'test_resnet'])
def test_embed(make, arch):
    "Mean over places; in order; the model as it was"
    learn = make(n=20, arch=arch, size=32 if arch else 8)
    learn.model.train()
    before = state(learn.model)
    f,y = embed(learn, learn.dls.valid)
    x = torch.cat([b[0] for b in learn.dls.valid])
    bb = deepcopy(learn.model).eval()
    t = bb.forward_features(x)
    assert torch.allclose(f, t.mean((2,3)) if arch else t[:,1:].mean(1), atol=1e-5) and y.tolist()==[0,1,2]*3
    assert same(before, state(learn.model)) and learn.model.training

def test_another_image_size(make):
    "kNN, embed, probe and cosines at 48 pixels after a setup at 32: the layout comes with the features"
    for kw in (dict(arch='test_resnet'), dict(patch_size=8)):
        learn = make(n=24, size=32, **kw)
        f = embed(learn, learn.dls.valid)[0]
        learn.dls = mix_dls(images(24, 48), images(9, 48, seed=1), bs=8)
        g,y = embed(learn, learn.dls.valid)
        x = learn.dls.valid.one_batch()[0]
        assert x.shape[-1]==48 and f.shape==g.shape
        t = learn.model.eval().forward_features(x)
        assert t.ndim==4 and t.shape[-1]==2 or t.shape[1]==1+6*6
        assert torch.allclose(g[:len(x)], t.mean((2,3)) if t.ndim==4 else t[:,1:].mean(1), atol=1e-5)
        learn.metrics = KNNAccuracy(k=3)
        want = (knn_predict(*embed(learn, _bank_dl(learn)), g, 3, k=3)==y).float().mean()
        assert learn.validate()[1]==want and 0 <= linear_probe(learn) <= 1 and -1 <= learn.mix.grad_cosines()['ssl_sl'] <= 1
        learn.mix.show_reconstructions(n=2)

def test_embed_views_and_no_labels(make):
    "Of several views the first counts; a loader without labels gives features"
    learn = make()
    class TwoViews:
        def __iter__(self): return (((x, x.flip(-1)), y) for x,y in learn.dls.valid)
    f,y = embed(learn, learn.dls.valid)
    assert all(torch.equal(a, b) for a,b in zip(embed(learn, TwoViews()), (f,y)))
    g,none = embed(learn, learn.dls.test_dl(list(images(9, seed=1)[0])))
    assert none is None and torch.equal(f, g)

def test_knn_metric_in_a_fit(make):
    "Values in the SSL phase, where other metrics have none; no other epoch changes by it"
    h = []
    for ms in ([accuracy], [accuracy, KNNAccuracy(k=3)], [KNNAccuracy(k=3, every_phase=True), accuracy]):
        learn = make(metrics=ms)
        learn.fit_mixtraining(3, 3, rho=0.34, recipe=HOT)
        h.append(learn.mix.history)
    for o in h[1:]: assert np.allclose(o.train_loss, h[0].train_loss) and np.allclose(o.accuracy[2:], h[0].accuracy[2:]) and o.accuracy[:2].isna().all()
    assert h[1].knn_accuracy.notna().tolist()==[True]*2+[False]*3 and h[2].knn_accuracy.notna().all()
    ref = embed(learn, _bank_dl(learn)),embed(learn, learn.dls.valid)
    assert learn.mix.history.knn_accuracy.iloc[-1]==(knn_predict(*ref[0], ref[1][0], 3, k=3)==ref[1][1]).float().mean().item()
    assert learn.validate()[1]==h[2].knn_accuracy.iloc[-1]
    dl = learn.dls.valid.new(learn.dls.train_ds)
    assert learn.validate(dl=dl)[1]==(knn_predict(*embed(learn, _bank_dl(learn)), embed(learn, dl)[0], 3, k=3)==embed(learn, dl)[1]).float().mean()

def test_bank(make):
    "Not augmented, drawn from all classes, or an error"
    x,y = images(30)
    dls = mix_dls((x,y), (x,y), tfms=lambda b: b*0, bs=8)
    learn = make(dls=dls)
    f,yb = embed(learn, _bank_dl(learn))
    assert sorted(yb.tolist())==sorted(y.tolist()) and f.std(0).sum() > 0
    assert len(embed(learn, _bank_dl(learn, 12))[1])==12 and len(set(embed(learn, _bank_dl(learn, 12))[1].tolist()))==3
    with pytest.raises(ValueError, match='no validation images'): linear_probe(make(dls=mix_dls((x,y), bs=8)))
    with pytest.raises(ValueError, match='the training images have no labels'): _bank_dl(make(dls=mix_dls(ssl=x, bs=8), metrics=[]))

def test_insight_on_a_vision_learner():
    "A learner of files, fastai's own model"
    dls = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter('train','test')).dataloaders(SAMPLES/'cifar10', bs=10, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=[accuracy, KNNAccuracy(k=5)])
    assert embed(learn, learn.dls.valid)[0].shape==(len(learn.dls.valid_ds),512) and not hasattr(learn, 'mix')
    assert 0 <= linear_probe(learn) <= 1 # before any training
    cos = GradCosines(every=1)
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(2, 2, rho=0.5, cbs=cos)
    assert 0 <= learn.mix.history.knn_accuracy[0] <= 1 and len(cos.history)==3 and 0 <= linear_probe(learn) <= 1
    assert set(learn.mix.step_seconds(n=1))=={'ssl','mix','sl'} and -1 <= learn.mix.grad_cosines()['ssl_sl'] <= 1
    assert last_layer(learn.model) is learn.model[0][-1][-1]

def test_cosines_against_separate_backwards(make):
    "One loss at a time, by backward, at the last block"
    learn = make()
    m,(x,y) = MixModel(learn.model, learn.mix.objective).train(),learn.dls.mix.one_batch()
    params,gs = list(m.backbone.blocks[-1].parameters()),[]
    def losses():
        torch.manual_seed(3)
        out = m(x, 'mix')
        return out.losses['ssl_loss'],F.cross_entropy(out.pred, y)
    for f in (lambda a,b: a, lambda a,b: b, lambda a,b: 0.3*a+0.7*b):
        m.zero_grad()
        f(*losses()).backward()
        gs.append(torch.cat([p.grad.flatten() for p in params]))
    got = loss_cosines(*losses(), params, alpha=0.3)
    want = [F.cosine_similarity(gs[i], gs[j], dim=0).item() for i,j in ((0,1), (0,2), (1,2))]
    assert np.allclose(list(got.values()), want, atol=1e-5)

def test_cosines_in_double():
    "A known angle, whatever the vectors hold, of as many weights as a large layer has; float32 errs in the third decimal"
    torch.manual_seed(0)
    w = torch.zeros(20_000_000, requires_grad=True)
    u = torch.randn(10_000_000)
    a,b = torch.cat([u, u]),torch.cat([u, torch.zeros_like(u)]) # at 45 degrees
    got = loss_cosines(w@a, w@b, [w], alpha=0)
    assert abs(got['ssl_sl']-0.5**0.5) < 1e-9 < 1e-4 < abs(F.cosine_similarity(a, b, dim=0).item()-0.5**0.5)
    assert got['ssl_mix']==got['ssl_sl'] and got['sl_mix']==1

def test_cosines_of_special_gradients():
    "Opposed, nearly opposed, tiny, none, not finite"
    w = torch.zeros(3, requires_grad=True)
    a,b = torch.tensor([1.,2,3]),torch.tensor([-1.,-2,-3.0001])
    assert loss_cosines(w@a, -w@a, [w])==dict(ssl_sl=-1, ssl_mix=0, sl_mix=0) # the mix is 0
    want = F.cosine_similarity(a.double(), (a+b).double(), dim=0).item()
    assert math.isclose(loss_cosines(w@a, w@b, [w])['ssl_mix'], want, abs_tol=1e-6)
    tiny = loss_cosines(1e-12*(w@a), 1e-12*(w@b), [w])
    assert math.isclose(tiny['ssl_sl'], F.cosine_similarity(a, b, dim=0).item(), abs_tol=1e-6)
    assert loss_cosines(0*(w@a), w@b, [w])==dict(ssl_sl=0, ssl_mix=0, sl_mix=1)
    assert math.isnan(loss_cosines(w@a, math.nan*(w@b), [w])['ssl_sl'])

def test_looking_changes_nothing(make):
    "A fit with cosines recorded gives the weights of one without; timing, counting and cosines leave the learner alone"
    ws = []
    for cbs in ([], [GradCosines(every=2)], [GradCosines(every=1)]):
        learn = make()
        learn.fit_mixtraining(2, 3, rho=0.5, recipe=HOT, cbs=cbs)
        ws.append(state(learn.model))
    assert same(*ws[:2]) and same(*ws[1:]) and cbs[0].history.epoch.tolist()==[1, 1+1/3, 1+2/3]
    before,opt,rng = state(learn.model),learn.opt,torch.get_rng_state()
    learn.model.zero_grad()
    learn.mix.step_seconds(n=1); learn.mix.step_flops(); learn.mix.grad_cosines(); learn.mix.predict_speedup(0.5, 4, 4)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(before, state(learn.model)) and learn.opt is opt and learn.mix.phase is None and all(p.grad is None for p in learn.model.parameters())

class Twin(Objective):
    "Two views, one is to predict the other's features by a teacher that moves after each step"
    views = 2
    def setup(self, backbone, x):
        self.head,self.teacher = nn.Linear(d := find_layout(backbone, x).dim, d),nn.Linear(d, d).requires_grad_(False)
        self.register_buffer('steps', torch.zeros(()))
    def forward(self, feats, x):
        a,b = feats.tokens().mean(1).chunk(2)
        return dict(near=F.mse_loss(self.head(a), self.teacher(b).detach()), small=1e-3*self.head(b).square().mean())
    def after_step(self, backbone, t):
        self.teacher.load_state_dict({k: v.lerp(self.head.state_dict()[k], 0.1) for k,v in self.teacher.state_dict().items()})
        self.steps += 1

def test_two_views(make):
    "Neighbours in an SSL phase of augmented views are those of the images themselves; a copy's teacher moves"
    learn = make(dls=mix_dls(images(24), images(9, seed=1), tfms=lambda x: x.roll(torch.randint(8, (1,)).item(), -1), bs=8), objective=Twin,
                 metrics=[accuracy, KNNAccuracy(k=3)])
    cos,seen = GradCosines(every=1),[]
    class Look(Callback):
        run_valid = False
        def after_epoch(self):
            ref = embed(learn, _bank_dl(learn)),embed(learn, learn.dls.valid)
            seen.append((knn_predict(*ref[0], ref[1][0], 3, k=3)==ref[1][1]).float().mean().item())
    learn.fit_mixtraining(3, 2, rho=0.5, recipe=HOT, cbs=[cos, Look()])
    h = learn.mix.history
    assert h.phase.tolist()==['ssl','ssl','mix','sl'] and h.knn_accuracy[:2].tolist()==seen[:2]
    assert len(cos.history)==3 and learn.mix.objective.steps==9
    before = state(learn.mix.objective)
    f = learn.mix.step_flops()
    assert f['mix'] > 1.9*f['sl'] and set(learn.mix.step_seconds(n=1))=={'ssl','mix','sl'} # twice the images
    assert learn.mix.find_batch_size(most=8, memory=2**30)==8 and -1 <= learn.mix.grad_cosines()['ssl_sl'] <= 1
    assert same(before, state(learn.mix.objective))
    steps,m,_ = _steps(learn)
    for g in steps.values(): g()
    assert m.objective.steps==11 and not torch.equal(m.objective.teacher.weight, before['teacher.weight'])
    learn.mix.plot_history()
    with pytest.raises(NotImplementedError, match='Twin does not reconstruct images'): learn.mix.show_reconstructions()

def test_cosines_every(make):
    "Counted in steps of the mix phase, from its first, over its epochs"
    learn,cos = make(),GradCosines(every=4) # three steps an epoch
    learn.fit_mixtraining(4, 3, rho=1, cbs=cos)
    assert cos.history.epoch.tolist()==[1, 2+1/3, 3+2/3]
    learn.fit_sl(1, cbs=cos)
    with pytest.raises(ValueError, match='no mix phase'): cos.plot()

VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=32)
@pytest.mark.parametrize('arch,name,kw', [('mobilenetv3_small_050','blocks.5.0',{}), ('deit_tiny_distilled_patch16_224','blocks.1',VIT), ('convnext_atto','stages.3.blocks.1',{}),
    ('vgg11','features.18',{}), ('swin_tiny_patch4_window7_224','layers.3.blocks.1',dict(img_size=32, depths=(1,1,1,2))), ('vit_base_patch16_siglip_224','blocks.1',VIT),
    ('legacy_seresnet18','layer4.1',{}), ('fasternet_t0','stages.3.blocks.1',{}), ('cait_xxs24_224','blocks.1',VIT), ('lowformer_b0','stages.3.4',{})])
def test_last_layer_is_read_by_both_heads(arch, name, kw):
    "Gradients of what `features` gives reach it; it is the last block, neither a stage nor a part of the classifier"
    m = timm.create_model(arch, num_classes=3, **kw).eval()
    layer = last_layer(m)
    assert next(n for n,o in m.named_modules() if o is layer)==name
    f = m.forward_features(torch.randn(2, 3, 32, 32))
    patches = f[:,m.num_prefix_tokens:] if f.ndim==3 else f # an objective need not read the class token
    cos = loss_cosines(patches.square().mean(), F.cross_entropy(m.forward_head(f), torch.tensor([0,1])), list(layer.parameters()))
    assert 0 < abs(cos['ssl_sl']) < 1 and sum(p.numel() for p in layer.parameters()) < 0.6*sum(p.numel() for p in m.parameters())

def test_cosines_of_an_attention_pooled_model(make):
    "SigLIP's classifier reads a pooling by attention, which the objective does not: it is not the last layer"
    learn,cos = make(arch='vit_base_patch16_siglip_224', size=32, c=3, embed_dim=32, depth=2, num_heads=2),GradCosines(every=1)
    learn.fit_mixtraining(2, 2, rho=0.5, cbs=cos)
    assert len(cos.history)==3 and last_layer(learn.model) is learn.model.blocks[-1] and -1 <= learn.mix.grad_cosines()['ssl_sl'] <= 1

def test_speedup(make):
    "The seconds are steps times their number; one and two data sets; the end points"
    one,two = make(n=24, bs=8).mix,make(n=24, bs=8, ssl=images(80)[0]).mix
    t = dict(ssl=3., mix=4., sl=2.)
    assert one.predict_seconds(0.5, 4, 4, t)==3*(2*3+2*4+2*2) and two.predict_seconds(0.5, 4, 4, t)==2*10*3+3*(2*4+2*2)
    assert one.predict_speedup(0, 4, 4, t)==1 and one.predict_speedup(1, 4, 4, t)==5/4
    with pytest.raises(ValueError, match=r'rho must lie in \[0,1\]'): one.predict_speedup(2, steps=t)
    learn = one.learn
    with pytest.raises(ValueError, match='all three phases'): one.measured_speedup() # no fit yet
    learn.fit_mixtraining(3, 4, rho=0.7)
    h = learn.mix.history.groupby('phase').train_seconds.mean() # 1 epoch of SSL, 2 of mix, 2 of SL
    assert math.isclose(one.measured_speedup(), (3*h.ssl+4*h.sl)/(h.ssl+2*h.mix+2*h.sl))
    last = lambda ax: [o for o in ax.lines if o.get_label()=='last fit']
    dot = last(one.plot_speedup(steps=t))[0]
    assert (dot.get_xdata()[0],dot.get_ydata()[0])==(2/3, one.measured_speedup()) and not last(one.plot_speedup(4, 4, t)) # of other epochs
    with pytest.raises(ValueError, match='no labels'): make(dls=mix_dls(ssl=images(24)[0], bs=8), metrics=[]).mix.predict_speedup()
    learn.fit_sl(1)
    with pytest.raises(ValueError, match='all three phases'): learn.mix.measured_speedup()

def test_flops_of_the_shared_pass(make):
    "A mix step has one pass of the backbone: less than SSL and SL together by an SL step without its classifier"
    f = make(depth=6).mix.step_flops()
    assert f['ssl'] < f['mix'] < f['ssl']+0.1*f['sl']

def test_compare_methods(make, tmp_path):
    "The same start and images for all; results on disk as they come; a crash loses none"
    starts = []
    def new(seed):
        learn = make(seed=seed)
        starts.append(state(learn.model))
        if len(starts)==8: raise KeyboardInterrupt
        return learn
    with pytest.raises(KeyboardInterrupt): compare_methods(new, 2, 2, seeds=3, bar=False, save=tmp_path/'runs.csv', recipe=HOT)
    runs = pd.read_csv(tmp_path/'runs.csv')
    assert runs.columns.tolist()==['method','seed','accuracy','seconds','petaflop','e_ssl','rho'] and len(runs)==7 and runs.seed.tolist()==[0]*3+[1]*3+[2]
    assert same(starts[0], starts[1]) and same(starts[0], starts[2]) and not same(starts[0], starts[3])
    assert method_table(runs).index.tolist()==['SL','SSL+SL','MixTraining']
    knn_first = compare_methods(lambda s: make(metrics=[KNNAccuracy(k=3), accuracy]), 1, 1, seeds=1, bar=False)
    assert knn_first.columns[2]=='accuracy' and knn_first.accuracy.notna().all()
    high = knn_first.assign(accuracy=[1.5,2,3]).rename(columns=dict(accuracy='perplexity'))
    assert method_table(high).perplexity.tolist()==[1.5,2,3] and method_table(knn_first)['accuracy %'].max() <= 100
    with pytest.raises(ValueError, match='validation images'):
        compare_methods(lambda s: make(dls=mix_dls(images(24), bs=8)), 1, 1, bar=False)
    with pytest.raises(ValueError, match='a learner with a metric'): compare_methods(lambda s: make(metrics=[]), 1, 1, bar=False)
