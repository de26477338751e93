"What makes a step cheap, by counts rather than seconds: passes, tokens, reads of the device, optimizer calls, compilations"
import json, pickle
from collections import Counter
from functools import partial
import pytest, torch, timm
from fastai.vision.all import Callback, ProgressCallback, accuracy
from torch._dynamo.utils import counters
from mixfast.all import AE, DINO, HardAugment, MAE, MixModel, MoCo, Objective, SimCLR, SimSiam, set_up
from mixfast.objective.autoencode import kept_features
from conftest import HOT, TINY, images, same, state

def vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(TINY['arch'], img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=3, **kwargs)

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))

def mixed(backbone, objective): return MixModel(backbone, set_up(objective, backbone, X))

def tokens(m, phase):
    "Tokens that the first block sees in a training step"
    seen = []
    h = m.backbone.blocks[0].register_forward_hook(lambda mod, args, out: seen.append(out.shape[1]))
    m.train()(X, phase)
    h.remove()
    return seen

@pytest.mark.parametrize('drop,want', [(False, (17,17,17)), (True, (5,17,17)), ('mix', (5,5,17))])
def test_tokens_by_phase(drop, want):
    "One pass in each phase, of a quarter of the patches and the class token where the rest is dropped"
    m = mixed(vit(), MAE(visible_only=drop))
    assert [tokens(m, p) for p in ('ssl','mix','sl')]==[[n] for n in want]
    out = m(X, 'mix')
    (out.losses['ssl_loss']+out.pred.sum()).backward()
    assert all(p.grad is not None for p in m.parameters()) and out.pred.shape==(3,3)

def test_dropped_patches_are_not_seen():
    "What is masked has no part in the features; what is kept is in order; and all of it is the plain model's pass"
    m = mixed(vit(), MAE(visible_only=True)).eval()
    torch.manual_seed(5)
    f = m.objective.encode(m.backbone, X)
    mask = f.mask.view(3,1,4,4).repeat_interleave(2,2).repeat_interleave(2,3)
    assert (f.mask.sum(1)==12).all() and all(not f.mask[i,f.ids[i]].any() and f.ids[i].tolist()==sorted(f.ids[i].tolist()) for i in range(3))
    torch.manual_seed(5)
    g = m.objective.encode(m.backbone, X+9.*mask)
    assert torch.equal(f.tokens, g.tokens)
    ref = m.backbone
    t = ref._pos_embed(ref.patch_embed(X))
    for i in range(3): # image by image, by hand
        kept = torch.cat([t[i:i+1,:1], t[i:i+1,1:][:,f.ids[i]]], 1)
        assert torch.allclose(f.tokens[i:i+1], ref.norm(ref.blocks(kept)), atol=1e-5)
    assert torch.equal(kept_features(ref, X, torch.arange(16).expand(3,-1)), ref.forward_features(X))
    assert m.objective(f, X)!=m.objective(f, X+9.*mask) # the loss is of the masked ones
    assert torch.equal(m.objective(f, X), m.objective(f, X+9.*~mask))

@pytest.mark.parametrize('drop', [True,'mix'])
@pytest.mark.parametrize('kwargs', [{}, dict(global_pool='avg', class_token=False)])
def test_a_fit_with_dropping(make, drop, kwargs):
    "Through all phases; the classifier is the plain model's; reconstructions can be shown; the backbone loads strictly"
    learn = make(objective=MAE(visible_only=drop), **kwargs)
    learn.fit_mixtraining(3, 3, rho=0.34, recipe=HOT)
    h = learn.mix.history
    assert h.phase.tolist()==['ssl','ssl','mix','sl','sl'] and h.train_loss.notna().all() and h.accuracy[2:].notna().all()
    learn.mix.show_reconstructions(3)
    learn.mix.grad_cosines()
    assert learn.get_preds()[0].shape==(9,3)
    timm.create_model(TINY['arch'], img_size=8, in_chans=1, num_classes=3, **{k:v for k,v in TINY.items() if k!='arch'}, **kwargs).load_state_dict(learn.model.state_dict(), strict=True)

def test_what_cannot_be_dropped():
    with pytest.raises(ValueError, match="visible_only must be False, True or 'mix', got 'ssl'"): MAE(visible_only='ssl')
    with pytest.raises(ValueError, match='visible_only needs a timm VisionTransformer, got ResNet'): set_up(MAE(visible_only=True), timm.create_model('test_resnet'), torch.randn(2,3,96,96))
    with pytest.raises(ValueError, match='patch_drop_rate=0'): mixed(vit(patch_drop_rate=0.5), MAE(visible_only=True))

READS = ('item','cpu','tolist','numpy','__bool__','__float__','__int__')

@pytest.fixture
def reads(monkeypatch):
    "Counts of what would make the CPU wait for a GPU"
    n = Counter()
    for k in READS:
        f = getattr(torch.Tensor, k)
        def g(self, *args, _f=f, _k=k, **kwargs):
            n[_k] += 1
            return _f(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, k, g)
    return n

@pytest.mark.parametrize('objective', [MAE, MAE(visible_only='mix'), SimSiam(16, 8), SimCLR(8, 16), MoCo(8, 16, queue=20), DINO(12, 16, 8), HardAugment(SimSiam(16, 8), n=3, size=4)], ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_a_step_reads_nothing(make, reads, objective):
    "From one training batch's end to the next one's, in every phase, with a progress bar that is not drawn meanwhile; whether a step was taken is read by objectives that move after it"
    seen = []
    class Log(Callback):
        order,run_valid = 1000,False
        def before_train(self): self.progress.pbar.update_every = 1e6 # on a slow machine too the bar is not drawn
        def after_batch(self):
            if 6<self.iter<9: seen.append((self.phases.now.name, dict(reads))) # the first five and the last are always drawn
            reads.clear()
    learn = make(n=80, bs=8, objective=objective)
    learn.add_cb(ProgressCallback())
    learn.fit_mixtraining(2, 2, rho=0.5, cbs=Log())
    asks = set() if type(learn.mix.objective).after_step is Objective.after_step else {'ssl','mix'}
    assert {p for p,_ in seen}=={'ssl','mix','sl'} and len(seen)==6 and all(r==({'__bool__':1} if p in asks else {}) for p,r in seen), seen

def test_losses_are_plain_numbers_afterwards(make):
    "fastai's recorder can draw them"
    learn = make()
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert len(learn.recorder.losses)==9 and all(o.device.type=='cpu' and o.ndim==0 for o in learn.recorder.losses)
    learn.recorder.plot_loss()
    assert type(learn.recorder.smooth_loss).__name__=='AvgSmoothLoss'
    learn.fit(1)

@pytest.mark.parametrize('kwargs', [{}, dict(objective=MAE(visible_only=True)), dict(objective=MAE(visible_only='mix')), dict(arch='test_resnet', size=32, c=3)])
def test_compiled(make, kwargs):
    "The same weights; compiled in each phase's first steps and never again; names, copies and exports are plain"
    torch._dynamo.reset()
    counters.clear()
    seen = []
    class Log(Callback):
        run_valid = False
        def after_batch(self): seen.append((self.epoch, counters['stats']['unique_graphs']))
    def fit(learn):
        torch.manual_seed(0)
        learn.fit_mixtraining(4, 4, rho=0.5, recipe=HOT, cbs=Log())
        return learn
    plain = state(fit(make(**kwargs)).model)
    assert not counters['stats']
    learn = make(**kwargs).compile(backend='eager')
    same_names = learn.model.state_dict().keys()==plain.keys()
    fit(learn)
    assert same_names and all(torch.allclose(v, plain[k], atol=1e-5) for k,v in learn.model.state_dict().items())
    by_epoch = {e: [n for e2,n in seen[-18:] if e2==e] for e in range(6)}
    assert by_epoch[0][0]>0 and all(n[0]==n[-1] for n in by_epoch.values()), by_epoch # not in the middle of an epoch
    n = counters['stats']['unique_graphs']
    fit(learn)
    assert counters['stats']['unique_graphs']==n
    copy = pickle.loads(pickle.dumps(learn.model))
    assert same(copy.state_dict(), learn.model.state_dict()) and not any(m._compiled_call_impl for m in copy.modules())

def ops(f):
    "How often `f` calls each of torch's operators"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p: f()
    return Counter({o.key: o.count for o in p.key_averages()})

def test_one_kernel_updates_all_weights(make):
    "Fused AdamW: one call for what is decayed, one for what is not, whatever the number of parameters"
    learn = make(n=80, bs=8)
    n = ops(lambda: learn.fit_mixtraining(2, 2, rho=0.5))
    assert n['aten::_fused_adamw_']==n['aten::_foreach_add_']==2*30 # the latter counts the steps

def test_channels_last(make):
    "The same training, in the memory format that convolutions like"
    kwargs = dict(arch='test_resnet', size=32, c=3)
    plain = make(**kwargs)
    plain.fit_mixtraining(2, 2, rho=0.5)
    learn = make(**kwargs)
    learn.to_channelslast(use_amp=False)
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert learn.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.mix.history.train_loss.tolist()==pytest.approx(learn.mix.history.train_loss.tolist(), rel=1e-3)

def test_bench(tmp_path, monkeypatch, capsys):
    "The command measures, prints ratios first and writes JSON; bad arguments end it before that"
    from mixfast.bench import core as bench
    from mixfast.bench.peers import Work
    monkeypatch.setattr(bench, 'CPU', Work(n=32, bs=16, dim=32, depth=2, heads=2, patch=8))
    monkeypatch.setattr(bench, 'QUICK', dict(epochs=2))
    monkeypatch.setattr(bench, 'import_rows', lambda n: []) # its notebook runs it
    monkeypatch.setattr(bench, 'overhead_rows', partial(bench.overhead_rows, steps=4))
    out = tmp_path/'bench.json'
    args = dict(bf16=False, compile=False, views=False)
    bench.main(True, **args, rounds=1, out=str(out))
    res,text = json.loads(out.read_text()),capsys.readouterr().out
    names = [r['name'] for r in res['ratios']]
    assert 'fit_mixtraining / a loop by hand, training' in names and 'SSL+SL / MixTraining, rho 1' in names and 'SSL+SL / MixTraining, rho 0.25' not in names
    limit = {r['name']: r['limit'] for r in res['ratios']}
    assert 1 < limit['SSL+SL / MixTraining, rho 0.5'] < limit['SSL+SL / MixTraining, rho 1'] < 2
    assert all(0 < r['low'] <= r['ratio'] <= r['high'] for r in res['ratios'])
    assert text.index('fit_mixtraining / a loop') < text.index('A fit in seconds') and str(out) in text
    for kw,says in ((dict(rounds=0), 'rounds must be 1 or more, got 0'), (dict(out=str(tmp_path/'no'/'b.json')), 'no folder')):
        with pytest.raises(SystemExit, match=says): bench.main(True, **args, **kw)

def test_peers_train(monkeypatch):
    "The loop by hand learns what `fit_mixtraining` does: a benchmark of the same work"
    from mixfast.bench.peers import Work, bare_fit, lightly_fit, mixfast_fit
    seen = Counter()
    step = torch.optim.AdamW.step
    def count(self, *args, **kwargs):
        seen['steps'] += 1
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.AdamW, 'step', count)
    w = Work(n=40, bs=16, epochs=2, dim=32, depth=2, heads=2, patch=8)
    for f in (mixfast_fit, bare_fit):
        seen.clear()
        f(w, 0.5)()
        assert seen['steps']==3*2
    if pytest.importorskip('lightly') and pytest.importorskip('lightning'):
        seen.clear()
        lightly_fit(w)()
        assert seen['steps']==4*2

@pytest.fixture
def sgd_steps(monkeypatch):
    "A count of SGD's steps"
    seen,step = Counter(),torch.optim.SGD.step
    def count(self, *args, **kwargs):
        seen['steps'] += 1
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.SGD, 'step', count)
    return seen

@pytest.mark.parametrize('method', ['simsiam','moco'])
@pytest.mark.parametrize('name', ['view_fit','view_hand_fit','view_lightly_fit'])
def test_view_peers_train(name, method, sgd_steps):
    "All contenders take as many steps, two epochs of three: a benchmark of the same work"
    from mixfast.bench import view_peers
    if name=='view_lightly_fit': pytest.importorskip('lightly'); pytest.importorskip('lightning')
    fit = getattr(view_peers, name)(view_peers.ViewWork(method=method, n=28, bs=8, epochs=2, px=32))
    sgd_steps.clear()
    fit()
    assert sgd_steps['steps']==3*2

def test_bench_of_views(tmp_path, monkeypatch, capsys):
    "The command with views=True asks all questions, and says which targets are met"
    from mixfast.bench import core as bench, views
    monkeypatch.setattr(bench, '_view_work', lambda quick, bf16: bench.ViewWork(n=8, bs=8, epochs=1, px=32))
    monkeypatch.setattr(views, 'view_heads', dict(simsiam=0))
    monkeypatch.setattr(views, 'strategy_rows', lambda w, rounds: [views._row('all three', [1.2], '>= 1.1')]) # its notebook runs it
    out = tmp_path/'views.json'
    bench.main(True, bf16=False, compile=False, views=True, rounds=1, out=str(out))
    res,text = json.loads(out.read_text()),capsys.readouterr().out
    by = {r['name']: r for r in res['ratios']}
    assert {'simsiam: fit_ssl / a loop by hand, training','byol: views / SSL step','moco: memory of a longer queue / its keys'} <= by.keys()
    assert all(0<r['low']<=r['ratio']<=r['high'] for r in by.values()) and 0.5<by['simsiam: mix step / (SSL step + SL step)']['limit']<1
    assert by['moco: memory of a longer queue / its keys']['ratio']==pytest.approx(1, abs=0.05)
    assert res['work']['px']==32 and all(n in text for n in by) and str(out) in text and bench.bench_table(res).met.iloc[-1]=='yes'
