"kNN, gradient cosines, timing and the comparison: against slow, independent versions, and what they must leave alone"
import math
import numpy as np, pandas as pd, pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, accuracy, get_image_files, parent_label, resnet18, vision_learner
from sklearn.neighbors import KNeighborsClassifier

from mixfast.all import GradCosines, KNNAccuracy, compare_methods, knn_predict, linear_probe, method_table, mix_dls
from mixfast.insight import bank_dl, cosines, embed, last_layer
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

@pytest.mark.parametrize('arch', [None, 'resnet10t'])
def test_embed(make, arch):
    "Mean over places; in order; the model as it was"
    learn = make(n=20, arch=arch, size=32 if arch else 8)
    learn.model.train()
    before = state(learn.model)
    f,y = embed(learn, learn.dls.valid)
    x = torch.cat([b[0] for b in learn.dls.valid])
    bb = learn.model.backbone.eval()
    t = bb.forward_features(x)
    assert torch.allclose(f, t.mean((2,3)) if arch else t[:,1:].mean(1), atol=1e-5) and y.tolist()==[0,1,2]*3
    assert same(before, state(learn.model)) and learn.model.training

def test_knn_metric_in_a_fit(make):
    "Values in the SSL phase, where other metrics have none; no other epoch changes by it"
    h = []
    for ms in ([accuracy], [accuracy, KNNAccuracy(k=3)], [KNNAccuracy(k=3, every_phase=True), accuracy]):
        learn = make(metrics=ms)
        learn.fit_mixtraining(3, 3, rho=0.34, recipe=HOT)
        h.append(learn.mix.history)
    for o in h[1:]: assert np.allclose(o.train_loss, h[0].train_loss) and np.allclose(o.accuracy[2:], h[0].accuracy[2:]) and o.accuracy[:2].isna().all()
    assert h[1].knn_accuracy.notna().tolist()==[True]*2+[False]*3 and h[2].knn_accuracy.notna().all()
    ref = embed(learn, bank_dl(learn)),embed(learn, learn.dls.valid)
    assert learn.mix.history.knn_accuracy.iloc[-1]==(knn_predict(*ref[0], ref[1][0], 3, k=3)==ref[1][1]).float().mean().item()
    assert learn.validate()[1]==h[2].knn_accuracy.iloc[-1]
    dl = learn.dls.valid.new(learn.dls.train_ds)
    assert learn.validate(dl=dl)[1]==(knn_predict(*embed(learn, bank_dl(learn)), embed(learn, dl)[0], 3, k=3)==embed(learn, dl)[1]).float().mean()

def test_bank(make):
    "Not augmented, drawn from all classes, or an error"
    x,y = images(30)
    dls = mix_dls((x,y), (x,y), tfms=lambda b: b*0, bs=8)
    learn = make(dls=dls)
    f,yb = embed(learn, bank_dl(learn))
    assert sorted(yb.tolist())==sorted(y.tolist()) and f.std(0).sum() > 0
    assert len(embed(learn, bank_dl(learn, 12))[1])==12 and len(set(embed(learn, bank_dl(learn, 12))[1].tolist()))==3
    with pytest.raises(ValueError, match='no validation images'): linear_probe(make(dls=mix_dls((x,y), bs=8)))
    with pytest.raises(ValueError, match='the training images have no labels'): bank_dl(make(dls=mix_dls(ssl=x, bs=8), metrics=[]))

def test_insight_on_a_vision_learner():
    "A learner of files, fastai's own model"
    dls = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=GrandparentSplitter('train','test')).dataloaders(SAMPLES/'cifar10', bs=10, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=[accuracy, KNNAccuracy(k=5)])
    with pytest.raises(TypeError, match='call learn.to_mix'): embed(learn, learn.dls.valid)
    assert 0 <= linear_probe(learn) <= 1 # before any training
    cos = GradCosines(every=1)
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(2, 2, rho=0.5, cbs=cos)
    assert 0 <= learn.mix.history.knn_accuracy[0] <= 1 and len(cos.history)==3 and 0 <= linear_probe(learn) <= 1
    assert set(learn.mix.step_seconds(n=1))=={'ssl','mix','sl'} and -1 <= learn.mix.grad_cosines()['ssl_sl'] <= 1
    assert last_layer(learn.model.backbone) is learn.model.backbone[0][-1][-1]

def test_cosines_against_separate_backwards(make):
    "One loss at a time, by backward, at the last block"
    learn = make()
    m,(x,y) = learn.model,learn.dls.mix.one_batch()
    m.phase = 'mix'
    m.train()
    params,gs = list(m.backbone.blocks[-1].parameters()),[]
    def losses():
        torch.manual_seed(3)
        out = m(x)
        return out.ssl_loss,F.cross_entropy(out.logits, y)
    for f in (lambda a,b: a, lambda a,b: b, lambda a,b: 0.3*a+0.7*b):
        m.zero_grad()
        f(*losses()).backward()
        gs.append(torch.cat([p.grad.flatten() for p in params]))
    got = cosines(*losses(), params, alpha=0.3)
    want = [F.cosine_similarity(gs[i], gs[j], dim=0).item() for i,j in ((0,1), (0,2), (1,2))]
    assert np.allclose(list(got.values()), want, atol=1e-5)

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
    assert same(before, state(learn.model)) and learn.opt is opt and learn.model.phase is None and all(p.grad is None for p in learn.model.parameters())

def test_cosines_every(make):
    "Counted in steps of the mix phase, from its first, over its epochs"
    learn,cos = make(),GradCosines(every=4) # three steps an epoch
    learn.fit_mixtraining(4, 3, rho=1, cbs=cos)
    assert cos.history.epoch.tolist()==[1, 2+1/3, 3+2/3]
    learn.fit_sl(1, cbs=cos)
    with pytest.raises(ValueError, match='no mix phase'): cos.plot()

@pytest.mark.parametrize('arch,size', [('mobilenetv3_small_050',64), ('deit_tiny_distilled_patch16_224',224), ('convnext_atto',64), ('swin_tiny_patch4_window7_224',224), ('vgg11',64)])
def test_last_layer_is_read_by_both_heads(arch, size):
    "Gradients of what `features` gives reach it; it is a block, not a stage"
    m = timm.create_model(arch, num_classes=3, **(dict(depth=2) if 'deit' in arch else {}))
    layer = last_layer(m)
    f = m.forward_features(torch.randn(2, 3, size, size))
    cos = cosines(f.square().mean(), F.cross_entropy(m.train(False).forward_head(f), torch.tensor([0,1])), list(layer.parameters()))
    assert 0 < abs(cos['ssl_sl']) < 1 and sum(p.numel() for p in layer.parameters()) < 0.6*sum(p.numel() for p in m.parameters())

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
        starts.append(state(learn.model.backbone))
        if len(starts)==8: raise KeyboardInterrupt
        return learn
    with pytest.raises(KeyboardInterrupt): compare_methods(new, 2, 2, seeds=3, bar=False, save=tmp_path/'runs.csv', recipe=HOT)
    runs = pd.read_csv(tmp_path/'runs.csv')
    assert runs.columns.tolist()==['method','seed','accuracy','seconds'] and len(runs)==7 and runs.seed.tolist()==[0]*3+[1]*3+[2]
    assert same(starts[0], starts[1]) and same(starts[0], starts[2]) and not same(starts[0], starts[3])
    assert method_table(runs).index.tolist()==['SL','SSL+SL','MixTraining']
    knn_first = compare_methods(lambda s: make(metrics=[KNNAccuracy(k=3), accuracy]), 1, 1, seeds=1, bar=False)
    assert knn_first.columns[2]=='accuracy' and knn_first.accuracy.notna().all()
    high = knn_first.assign(accuracy=[1.5,2,3]).rename(columns=dict(accuracy='perplexity'))
    assert method_table(high).perplexity.tolist()==[1.5,2,3] and method_table(knn_first)['accuracy %'].max() <= 100
    with pytest.raises(ValueError, match='validation images'):
        compare_methods(lambda s: make(dls=mix_dls(images(24), bs=8)), 1, 1, bar=False)
    with pytest.raises(ValueError, match='a learner with a metric'): compare_methods(lambda s: make(metrics=[]), 1, 1, bar=False)
