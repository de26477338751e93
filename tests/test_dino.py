"DINO: loss, center and teacher by the letter; prototypes that rest; a fit that goes on; small crops"
from functools import partial

import pytest, timm, torch, torch.nn.functional as F
from fastai.vision.all import Adam, Callback, GradientAccumulation, SGD, accuracy, set_seed
from torch import nn

from conftest import Die, HOT, TINY, images, same, state, warned
from mixfast.all import MixModel, Recipe, Hypers, mix_dls, mix_learner
from mixfast.insight.cost import _count
from mixfast.model import mix_splitter
from mixfast.objective.dino import DINO, dino_loss
from test_distributed import Log, check_alike, check_close, fit, launch

pytestmark = pytest.mark.filterwarnings('ignore:epoch .* seems to collapse') # fits of a few steps
FIT = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT) # two epochs of each phase, three steps in each
small = partial(DINO, out=12, hidden=16, dim=8)

def ready(cnn=False, size=16, **kwargs):
    "An objective in training, and its backbone"
    set_seed(0)
    arch,kw = ('test_resnet',dict(in_chans=1)) if cnn else (TINY['arch'], dict(TINY, dynamic_img_size=True, img_size=size, in_chans=1, num_classes=3))
    net = timm.create_model(kw.pop('arch', arch), **kw)
    o = small(**kwargs)
    o.setup(net, torch.zeros(2, 1, size, size))
    return o.train(),net.train()

# ---- by the letter

def test_loss_and_center_by_hand():
    "Two large views and two small ones, after a first step, in plain PyTorch"
    o,net = ready(local_views=2)
    xs = *torch.randn(2, 5, 1, 16, 16),*torch.randn(2, 5, 1, 8, 8)
    o.at(0.05)
    o(o.encode(net, xs), xs)
    with torch.no_grad():
        for p in net.parameters(): p += 0.05*torch.randn_like(p)
        o.after_step(net, 0.05)
    center = o.center.clone()
    assert center.abs().max()>0
    loss = o(o.encode(net, xs), xs)
    def out(net, head, x):
        z = F.normalize(nn.Sequential(*head[:-1])(net.forward_features(x)[:,1:].mean(1)), dim=1)
        return z @ F.normalize(head[-1].weight, dim=1).T
    with torch.no_grad():
        t = [out(*o.teacher.copies, x) for x in xs[:2]]
        terms = [-(((t[i]-center)/0.055).softmax(1)*(out(net, o.project, x)/0.1).log_softmax(1)).sum(1).mean()
                 for i in range(2) for j,x in enumerate(xs) if i!=j]
    assert len(terms)==6
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    with torch.no_grad(): o.after_step(net, 0.05)
    torch.testing.assert_close(o.center, 0.9*center + 0.1*torch.cat(t).mean(0))

def test_the_loss_keeps_its_digits():
    "Float32 in mixed precision, to the bit, and in double"
    s,p = torch.randn(4, 3, 4096).clamp(-1, 1),torch.randn(2, 3, 4096).softmax(2)
    full = dino_loss(s, p)
    with torch.autocast('cpu', torch.bfloat16): half = dino_loss(s, p)
    assert torch.equal(half, full) and half.dtype==torch.float32
    torch.testing.assert_close(dino_loss(s.double(), p), full)

def test_the_center_waits_for_the_step():
    "Two batches of different sizes are one mean; what a skipped step has seen is dropped"
    o,net = ready()
    outs = []
    o.teacher.copies[1].register_forward_hook(lambda m, a, g: outs.append(g))
    for n in (4,7): x = torch.randn(2, n, 1, 16, 16).unbind(); o(o.encode(net, x), x)
    o.eval(); o(o.encode(net, x), x); o.train() # validation does not count
    with torch.no_grad(): o.after_step(net, 0.)
    torch.testing.assert_close(o.center, 0.1*torch.cat(outs[:2]).mean(0))
    before = o.center.clone()
    o(o.encode(net, x), x); o.skip_step()
    outs.clear()
    o(o.encode(net, x), x)
    with torch.no_grad(): o.after_step(net, 0.)
    torch.testing.assert_close(o.center, 0.9*before + 0.1*outs[0].mean(0))

def test_the_center_is_that_of_all_processes(monkeypatch):
    "Sum and number of another process come in"
    o,net = ready()
    other = torch.cat([torch.rand(12), torch.arange(12.), torch.tensor([6.])])
    monkeypatch.setattr('torch.distributed.all_reduce', lambda s: s.add_(other))
    outs = []
    o.teacher.copies[1].register_forward_hook(lambda m, a, g: outs.append(g))
    o.at(0., world_size=2)
    x = torch.randn(2, 5, 1, 16, 16).unbind()
    o(o.encode(net, x), x)
    with torch.no_grad(): o.after_step(net, 0.)
    torch.testing.assert_close(o.center, 0.1*(outs[0].sum(0)+torch.arange(12.))/16)

def same_views(bs):
    "Views that are not drawn, so that processes see what one would"
    dls = mix_dls(images(29), images(9, seed=1), bs=bs, seed=3, ssl_tfms=lambda x: x.flip(3), drop_last=False)
    return mix_learner(dls, objective=small(freeze_last=0.4, momentum=0.8), metrics=accuracy, **TINY)

def test_two_processes_are_as_one(launch, monkeypatch):
    "Where parts of the last batch are not equal, too"
    monkeypatch.setattr(Log, 'before_batch', lambda self: None) # it reads a single view
    kw = dict(bs=12, make_learn=same_views, e=(2,2), seed=0, after=lambda learn: dict(center=learn.mix.objective.center.clone()))
    one,(a,b) = launch(partial(fit, **kw), 1)[0],launch(partial(fit, world=2, **kw), 2)
    check_alike([a, b])
    for o in (one, a):
        for r in o['rows']: r.pop('spread', 0) # over the images of a process
    check_close(a, one)
    torch.testing.assert_close(a['center'], one['center'], atol=1e-5, rtol=1e-4)
    assert torch.equal(a['center'], b['center']) and a['center'].abs().max()>1e-3

# ---- prototypes that rest

class Watch(Callback):
    "Weights of the prototypes, share of steps and temperature at each step"
    order,run_valid = 100,False
    def __init__(self): self.rows = []
    def before_batch(self):
        o = self.model.objective
        if self.phases.now.ssl: self.rows.append((o.t, o.teacher_temp_at(o.t), o.project[-1].weight.detach().clone()))

@pytest.mark.parametrize('opt', [None, Adam, SGD, 'sgd'])
def test_prototypes_rest_at_first(make, opt):
    "To the bit, under any decay; then they learn"
    kw = dict(opt_func=opt) if callable(opt) else {}
    learn,w = make(objective=small(freeze_last=0.5, warmup=0.5, norm=True), **kw),Watch()
    hot = Recipe(Hypers(0.01, wd=0.3, opt=opt if opt=='sgd' else None), HOT.sl)
    learn.fit_mixtraining(4, 4, rho=0.5, recipe=hot, cbs=w)
    ts,temps,ws = zip(*w.rows)
    assert ts==pytest.approx([i/12 for i in range(12)])
    assert temps==pytest.approx([min(0.04+0.03*i/6, 0.07) for i in range(12)])
    assert [torch.equal(ws[0], o) for o in ws]==[i<7 for i in range(12)], 'the seventh step is the first to move them'

# ---- teacher and center in a fit

def test_the_teacher_is_not_trained(make):
    learn = make(objective=small())
    o = learn.mix.objective
    teacher = set(o.teacher.parameters())
    assert len(teacher)>20 and not any(p.requires_grad for p in teacher)
    ps = {p for g in mix_splitter(MixModel(learn.model, o)) for p in g}
    assert not ps & teacher and ps=={*learn.model.parameters(), *o.project.parameters()}

@pytest.mark.parametrize('cbs', [(), (16,)])
@pytest.mark.parametrize('at', [4, 8])
def test_resume(make, tmp_path, at, cbs):
    "In the midst of SSL and of the mix phase, also between two batches of a step: teacher, center and sums to the bit"
    kw = dict(FIT, cbs=[GradientAccumulation(n) for n in cbs])
    ref,new = make(objective=small(momentum=0.8)),lambda seed: make(objective=small(momentum=0.8), seed=seed)
    ref.fit_mixtraining(**kw)
    with pytest.raises(RuntimeError, match='died'):
        new(0).fit_mixtraining(**dict(kw, cbs=[*kw['cbs'], Die(at)]), checkpoint=tmp_path/'run', every_steps=1)
    learn = new(5)
    learn.fit_mixtraining(**dict(kw, cbs=[GradientAccumulation(n) for n in cbs]), checkpoint=tmp_path/'run', every_steps=1, resume=True)
    a,b = [state(o.mix.objective) for o in (learn,ref)]
    assert same(a, b) and same(state(learn.model), state(ref.model)) and a['center'].abs().max()>0
    assert learn.mix.history.drop(columns=['seconds','train_seconds']).equals(ref.mix.history.drop(columns=['seconds','train_seconds']))

def test_a_bad_step_leaves_no_trace(make):
    "A batch of nan is skipped: center and sums stay finite"
    class Poison(Callback):
        order,run_valid = -10,False
        def before_batch(self):
            if (self.epoch,self.iter)==(0,1): self.learn.xb = (tuple(o*float('nan') for o in self.xb[0]),)
    learn = make(objective=small())
    with warned('ignore'): learn.fit_ssl(2, recipe=HOT, on_nan='skip', cbs=Poison())
    o = learn.mix.objective
    assert learn.mix.skipped==1 and all(v.isfinite().all() for v in state(o).values()) and o.gathered.sum()==0

def test_the_teacher_costs_a_pass(make):
    "Of the large views, without gradient, and no more"
    learn = make(objective=small(local_views=2), size=16)
    o,xs = learn.mix.objective.train(),torch.randn(2, 8, 1, 16, 16).unbind()
    alone,full,t = _count(lambda: o.taught(xs)),learn.mix.step_flops()['ssl'],o.taught(xs)
    o.taught = lambda x: t
    assert full-learn.mix.step_flops()['ssl']==alone>0 and not t.requires_grad

# ---- small crops

@pytest.mark.parametrize('cnn', [False, True])
def test_small_crops(cnn, make):
    "A pass for each size; the teacher sees large views; the supervised head reads the first of them"
    kw = dict(arch='test_resnet', c=3) if cnn else dict(patch_size=8)
    learn = make(objective=small(local_views=3), size=32, **kw)
    seen = {'student':[], 'teacher':[]}
    for k,m in dict(student=learn.model, teacher=learn.mix.objective.teacher.copies[0]).items():
        first = m.conv1[0] if cnn else m.patch_embed.proj
        first.register_forward_hook(lambda _, a, out, k=k: seen[k].append(tuple(a[0].shape[::2])) if learn.training else None)
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    h = learn.mix.history
    assert h.ssl_loss[:2].notna().all() and h.spread[:2].between(0, 1.2).all() and h.entropy[:2].between(0, 1).all()
    sizes = [o for o in seen['student'] if o[1]!=32]
    assert len(sizes)==6 and {o[0] for o in sizes}=={24} and {o[1] for o in sizes}<{8,16} and set(seen['teacher'])=={(16,32)}
    m = MixModel(learn.model, learn.mix.objective).eval()
    xs = *torch.randn(2, 4, kw.get('c', 1), 32, 32),*torch.randn(3, 4, kw.get('c', 1), 16, 16)
    with torch.no_grad(): torch.testing.assert_close(m(xs, 'mix').pred, m(xs[0]))
