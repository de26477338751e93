"""Where does the joint phase pay? SSL+SL by its SSL epochs beside MixTraining, at equal time, for few labels and for
many. A run is a line of JSON; what has one already is not run again. On a CPU each core has its own run.

    python benchmarks/pays.py ~/data --part search               # which objective, which kind of mix phase: on held-out images
    python benchmarks/pays.py ~/data --part main --seeds 3       # the settings that were found, on the test split
    python benchmarks/pays.py ~/data --part main --dry-run       # the runs, and how long they will take
    python benchmarks/pays.py ~/data --report-only               # report.md of what has been run

CIFAR-10 with 10, 50 or 500 labels a class and Imagenette with a tenth of its images, at 32 pixels; SSL on the same images, or on
20,000. Objectives of two views and AE have the small ResNet of `mixfast-reproduce --paper efficient_ssl --scale small`, MAE a ViT
of 4 blocks. Whatever there is of images, SSL and SL have some 625 steps of 64 images each; SimCLR 1,250 and its SL 500."""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
import numpy as np, pandas as pd, torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision # gives learners to_bf16
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from mixfast.data.labels import few_labels
from mixfast.data.mix import mix_dls
from mixfast.insight.compare import _LastEpoch
from mixfast.insight.cost import _device
from mixfast.insight.equal import equal_cost
from mixfast.insight.parallel import _line
from mixfast.insight.plot import plot_methods
from mixfast.learner import mix_learner
from mixfast.objective.autoencode import MAE
from mixfast.objective.features import logits
from mixfast.paper.efficient_ssl import METHODS, EfficientSSL, _backbone, _load, _objective
from mixfast.paper.records import read_records
from mixfast.paper.report import Section, save_report
from mixfast.paper.running import _image_seconds, _where, run_or_list
from mixfast.phases import MixPlan
from mixfast.schedule import Recipe, get_recipe

@dataclass(frozen=True)
class Run:
    data:str # 'cifar10' or 'imagenette'
    labels:int # Of each class
    pool:int # Images for SSL; 0: the labelled ones
    objective:str # One of `METHODS`, 'ae', 'mae', or 'visible': MAE that drops masked patches in the SSL phase
    method:str # 'sl', 'ssl_sl' or 'mix'
    share:float=1. # Of the SSL epochs
    sl_share:float=1. # Of the SL epochs
    rho:float=0.
    mix:str='blend'
    alpha:float=0.5
    balance:bool=False
    sl_bs:int=16
    ends:bool=False # With the mix phase: no SL phase follows
    pseudo:float=0. # Confidence from which on what the heads say of an image is its label in the mix phase; 0: never
    sched:str='shared' # `sl_sched`: whose schedule and optimizer the mix phase goes by

SETTINGS = [('cifar10',n,pool) for n in (10,50,500) for pool in (0,20_000)] + [('imagenette',95,0)]
SHARES = dict(ae=(0.25,0.5,1.), simclr=(0.5,0.75,1.)) # Of the SSL epochs, for SSL+SL
BS,VIT = 64,dict(embed_dim=64, depth=4, num_heads=2)
WORDS = dict(sl='SL', ssl_sl='SSL+SL', mix='MixTraining')
def kind(r):
    "A mix phase in words"
    alpha = f" {r.alpha:g}" if r.alpha!=0.5 else ''
    more = ', balanced'*r.balance + alpha + f', pseudo {r.pseudo:g}'*(r.pseudo>0)
    return r.mix + more + f', {r.sched} schedule'*(r.sched!='shared') + ', no SL phase'*r.ends + f', {r.sl_share:g} of the SL epochs'*(r.sl_share<1)
def where(r): return f"{r.data}, {r.labels} labels a class, SSL on {f'{r.pool:,} images' if r.pool else 'the same'}"
def describe(r):
    more = dict(sl=f' {r.sl_share:g}' if r.sl_share!=1 else '', ssl_sl=f' {r.share:g}', mix=f' {r.share:g}, {kind(r)}, rho {r.rho:g}, {r.sl_bs} labelled')[r.method]
    return f"{where(r)}, {r.objective}, {WORDS[r.method]}{more}"

def search():
    "What is tried on held-out images: kinds of mix phase with SimCLR and with AE; other objectives"
    many,few,pool = ('cifar10',500,0),('cifar10',50,0),('cifar10',50,20_000)
    blend,joint = dict(rho=0.5),dict(rho=0.5, mix='joint')
    late = [dict(sched='ssl'), dict(sched='ssl', alpha=0.9), dict(sched='ssl', alpha=0.8, balance=True)]
    ae = [blend, dict(rho=1.), blend | late[0], blend | dict(alpha=0.9), blend | dict(alpha=0.2), blend | dict(balance=True)]
    tried = [('ae',many,ae), ('ae',few,ae), ('ae',pool,[joint, joint | late[1]]),
             ('simclr',many,[blend, blend | dict(rho=1.), *[blend | o for o in late]]),
             ('simclr',pool,[joint, joint | dict(ends=True), *[joint | o for o in late], joint | late[1] | dict(pseudo=0.9),
                               *[joint | o | dict(share=0.5) for o in late[:2]], joint | late[1] | dict(sl_share=0.5)])]
    for o,s,kinds in tried:
        yield Run(*s, o, 'sl')
        for share in SHARES[o]: yield Run(*s, o, 'ssl_sl', share)
        for k in kinds: yield Run(*s, o, 'mix', **k)
    for o in ('mae','visible','byol','dino'):
        yield Run(*many, o, 'ssl_sl')
        yield Run(*many, o, 'mix', **blend)

def main_runs():
    "What is compared on the test split: AE where all images are labelled, SimCLR with joint batches where others are at hand"
    for s in SETTINGS:
        o,shares,kinds = 'ae',SHARES['ae'],[dict(rho=0.5), dict(rho=1.)]
        if s[2]: o,shares,kinds = 'simclr',(0.5,1.,1.25),[dict(rho=0.5, mix='joint', sched='ssl', alpha=0.9)]
        if not s[2]: yield Run(*s, o, 'sl') # whatever there is for SSL
        yield Run(*s, o, 'sl', sl_share=6. if s[2] else 1.5) # at the cost of the others
        for share in shares: yield Run(*s, o, 'ssl_sl', share)
        for k in kinds: yield Run(*s, o, 'mix', **k)

def runs_of(part): return list(search() if part=='search' else main_runs())

@lru_cache(1)
def images(path, data): return _load(data, path, 32)

def loaders(r, seed, path, hold_out, device=None):
    "Labelled images of each class, others for SSL, and the test split or images held out of the training split"
    (x,y),valid,vocab = images(path, r.data)
    if hold_out:
        i = np.random.default_rng(seed).permutation(len(y))
        valid,(x,y) = (x[i[:hold_out]],y[i[:hold_out]]),(x[i[hold_out:]],y[i[hold_out:]])
    i = few_labels(y, r.labels, seed)
    ssl = x[np.random.default_rng(seed).permutation(len(y))[:r.pool]] if r.pool else None
    views = dict(ssl_tfms='simclr') if r.objective in METHODS else {}
    return mix_dls((x[i],y[i]), valid, ssl, tfms='cifar', vocab=vocab, seed=seed, bs=BS, device=device, sl_bs=r.sl_bs, **views)

def pseudo(o, threshold):
    "The objective `o` of one or two views, whose mix phase labels images by what the heads are sure of"
    class Pseudo(type(o)):
        def encode_mix(self, backbone, x):
            self._in_mix = backbone, # in a tuple: it is no part of the objective
            return super().encode_mix(backbone, x)
        def forward(self, feats, x):
            losses,(m,) = super().forward(feats, x),vars(self).pop('_in_mix', (None,))
            if m is None or not self.training: return losses
            views = logits(m, feats.parts[0] if self.views>1 else feats).float().unflatten(0, (self.views,-1))
            p,y = views.detach().softmax(-1).mean(0).max(-1)
            loss = F.cross_entropy(views.flatten(0, 1), y.repeat(self.views), reduction='none').unflatten(0, (self.views,-1))
            return dict(ssl=losses, pseudo=(loss*(p>threshold)).mean())
    o.__class__ = Pseudo
    return o

def learner(r, dls, bf16=True):
    e = EfficientSSL(r.objective, r.data, 'resnet50', 1)
    arch,args,o = _backbone(e, 'small', dls.c),{},_objective(e, 'small') if r.objective in METHODS else r.objective
    if r.objective in ('mae','visible'):
        arch,args,o = 'vit_tiny_patch16_224',dict(patch_size=4, **VIT),MAE(visible_only=r.objective=='visible')
    if r.pseudo: o = pseudo(o, r.pseudo)
    learn = mix_learner(dls, arch, o, metrics=accuracy, **args)
    return learn.to_bf16() if bf16 else learn

def recipe(r):
    "SGD at the rates of Imagenette for two views; MAE, AE and SL as MixTraining has them, at the rates of batches of 256"
    own = get_recipe('vit_t' if r.objective in ('mae','visible') else 'resnet18')
    ssl,sl = [replace(h, lr=4*h.lr) for h in (own.ssl,own.sl)]
    return Recipe(get_recipe('siamese_imagenette').ssl if r.objective in METHODS else ssl, sl)

def fit_args(r, n_sl, n_ssl):
    "Epochs by the steps that they have"
    steps = (1250,500) if r.objective=='simclr' else (625,625)
    e_ssl,e_sl = [max(round(k/max(n//BS, 1)), 2) for k,n in zip(steps, (n_ssl,n_sl))]
    e_ssl,rho = 0 if r.method=='sl' else max(round(e_ssl*r.share), 1),r.rho
    e_sl = max(round(e_sl*r.sl_share), 1)
    if r.ends: e_sl,rho = MixPlan(e_ssl, e_sl, rho).e_mix,1.
    return dict(e_ssl=e_ssl, e_sl=e_sl, rho=rho, mix=r.mix, alpha=r.alpha, balance=r.balance, sl_sched=r.sched, recipe=recipe(r))

def run(path, hold_out, bf16, r, seed):
    "The record of a run"
    set_seed(seed)
    learn = learner(r, loaders(r, seed, path, hold_out), bf16)
    args = fit_args(r, learn.dls.train.n, learn.dls.ssl.n)
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(**args, cbs=_LastEpoch())
    h,cost = learn.mix.history,learn.mix.cost
    share = round(float(h.ssl_share.mean()), 4) if 'ssl_share' in h else None
    settings = {k:v for k,v in args.items() if k!='recipe'} | dict(recipe=asdict(args['recipe']), bs=learn.dls.bs)
    return dict(exp=asdict(r), seed=seed, hold_out=hold_out, bf16=bf16, accuracy=float(h.accuracy.iloc[-1]), ssl_share=share,
                cost=cost.to_dict('index'), petaflop=float(cost.petaFLOP.sum()), seconds=float(cost.seconds.sum()),
                settings=settings, **_where(_device(learn)))

def seconds_of(r, path, hold_out, bf16):
    "About how long a run will take, without validation"
    dls = loaders(r, 0, path, hold_out)
    a = fit_args(r, dls.train.n, dls.ssl.n)
    secs,phases = _image_seconds(learner(r, dls, bf16), 5.)[0],MixPlan(a['e_ssl'], a['e_sl'], a['rho']).phases
    n = dict(sl=dls.train.n, ssl=dls.ssl.n, mix=dls.ssl.n*(1+r.sl_bs/BS) if r.mix=='joint' else dls.train.n)
    return sum(len(p)*n[p.name]*secs[p.name] for p in phases)

def said(r): return _line(f"{describe(Run(**r['exp']))}, seed {r['seed']}", r['seconds'], accuracy=r['accuracy'])

def as_runs(recs):
    "As `equal_cost` and `plot_methods` read them"
    def row(r):
        e = Run(**r['exp'])
        name = WORDS[e.method] if e.method!='mix' else f'MixTraining, {kind(e)}'
        if e.method=='sl' and e.sl_share!=1: name = f'SL, {e.sl_share:g} times as long'
        return dict(method=name, seed=r['seed'], accuracy=r['accuracy'], seconds=r['seconds'], petaflop=r['petaflop'],
                    e_ssl=r['settings']['e_ssl'], rho=e.rho, where=where(e), objective=e.objective)
    return pd.DataFrame(map(row, recs))

def report(out):
    "A table of the search; of the comparison a table and a picture for each setting"
    secs = []
    for part in 'search','main':
        recs = read_records(out/f'{part}.jsonl')
        if not recs: continue
        df = as_runs(recs)
        for (w,o),g in df.groupby(['where','objective'], sort=False):
            g = g.drop(columns=['where','objective'])
            if part=='search':
                secs.append(Section(f'Search: {w}, {o}', 'Accuracy on held-out images, one seed.', g.drop(columns='seed')))
                continue
            for x in 'petaflop','seconds':
                secs.append(Section(f'{w}, {o}, at equal {x}', 'Accuracy in per cent on the test split.', equal_cost(g, x)))
            secs.append(Section(draw=lambda ax, g=g: plot_methods(g, ax)))
    print(save_report(out, 'Where does the joint phase pay?', secs))

@call_parse
def main(
    path:str, # Folder with the data sets
    part:str='main', # 'search' or 'main'
    seeds:int=1, # Seeds 0 to seeds-1
    out:str='experiments/pays', # Folder for the records
    fp32:store_true=False, # Train in float32 rather than in bfloat16 autocast
    only:str='', # Runs with this text in their description
    jobs:int=None, # Processes; default: one a core, on a GPU one
    dry_run:store_true=False, # List the runs and the estimated time
    report_only:store_true=False, # Write report.md of what has been run
):
    "Run what is missing"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if report_only: return report(out)
    if part not in ('search','main'): raise SystemExit(f"pays.py: part must be 'search' or 'main', got {part!r}")
    f,hold_out = out/f'{part}.jsonl',5000 if part=='search' else 0
    done = {(Run(**r['exp']), r['seed']) for r in read_records(f)}
    todo = [(r,s) for s in range(seeds) for r in runs_of(part) if only in describe(r) and (r,s) not in done]
    def secs(r): return seconds_of(r, path, hold_out, not fp32)
    run_or_list(todo, partial(run, path, hold_out, not fp32), secs, describe, f, said, jobs, dry_run)
