"""What no paper has: methods with two views beside MAE and AE at equal cost, and inside MixTraining. A run is a line of
JSON; what has one already is not run again. On a CPU each core has its own run.

    python benchmarks/two_views.py ~/data --part c               # seven objectives on CIFAR-10, the same petaFLOP each
    python benchmarks/two_views.py ~/data --part d               # MixTraining on 10 % of CIFAR-10 and of Imagenette
    python benchmarks/two_views.py ~/data --part d --dry-run     # the runs, and how long they will take
    python benchmarks/two_views.py ~/data --report-only          # report.md of what has been run

Part c asks neighbours on images held out of the training split, and part d takes the best of its methods with two views
(or --objective); the accuracies of part d are those on the test split at the end of training. Methods with two views
and AE have the small ResNet of `mixfast-reproduce --paper efficient_ssl --scale small`, MAE a ViT of 4 blocks."""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from mixfast.callback.progressive import SuperProgressive
from mixfast.data.labels import fraction
from mixfast.data.mix import mix_dls
from mixfast.insight.cost import _device
from mixfast.insight.evaluate import KNNAccuracy, linear_probe
from mixfast.insight.parallel import _line
from mixfast.insight.plot import _finish
from mixfast.learner import mix_learner
from mixfast.paper.efficient_runs import _Course, _petaflops
from mixfast.paper.efficient_ssl import METHODS, EfficientSSL, _backbone, _load, _objective
from mixfast.paper.records import read_records
from mixfast.paper.report import Section, save_report
from mixfast.paper.running import _image_seconds, _where, run_or_list
from mixfast.phases import MixPlan
from mixfast.schedule import Recipe, get_recipe

@dataclass(frozen=True)
class Run:
    part:str # 'c' or 'd'
    data:str # 'cifar10' or 'imagenette'
    objective:str # One of `METHODS`, 'mae' or 'ae'
    method:str='ssl' # Or 'sl', 'ssl_sl', 'mix'
    f1clr:bool=False # The schedule, with three fifths of the epochs of SSL as in the paper
    progressive:bool=False # Super Progressive from 3/7 of the size, in SSL and mix phase

EPOCHS = dict(c=8, cifar10=30, imagenette=60) # Of SimSiam in part c, which sets the cost; of SSL and of SL in part d
BS = dict(c=64, cifar10=64, imagenette=32)
VIT = dict(embed_dim=64, depth=4, num_heads=2)
ssl_epochs = lambda r: round(EPOCHS[r.data]*(0.6 if r.f1clr else 1))
name = lambda o: METHODS.get(o, o.upper())

def strategies(r): return ', '.join(['F1-CLR']*r.f1clr + ['Super Progressive']*r.progressive) or 'as usual'
def describe(r):
    more = f", {dict(sl='SL', ssl_sl='SSL+SL', mix='MixTraining')[r.method]}, {strategies(r)}" if r.part=='d' else ''
    return f'{r.data}, {name(r.objective)}{more}'

def runs_of(part, best):
    "What is to be run"
    if part=='c': return [Run('c', 'cifar10', o) for o in (*METHODS, 'mae', 'ae')]
    def each(data, o):
        yield Run('d', data, o, 'sl')
        for both in (False,True): yield Run('d', data, o, 'ssl_sl', both, both)
        for f1 in (False,True):
            for prog in (False,True): yield Run('d', data, o, 'mix', f1, prog)
    return [r for data in ('cifar10','imagenette') for o in (best,'mae') for r in each(data, o)]

def loaders(r, seed, path, hold_out, device=None):
    "All of CIFAR-10 but images held out, or 10 % of either; views where the objective asks for them"
    (x,y),valid,vocab = _load(r.data, path, 32)
    if r.part=='c':
        i = np.random.default_rng(seed).permutation(len(y))
        (x,y),valid = (x[np.sort(i[hold_out:])],y[np.sort(i[hold_out:])]),(x[i[:hold_out]],y[i[:hold_out]])
    else: x,y = [o[fraction(y, 10, seed)] for o in (x,y)]
    views = dict(ssl_tfms='simclr') if r.objective in METHODS else {}
    bs = BS['c' if r.part=='c' else r.data]
    return mix_dls((x,y), valid, tfms='cifar', vocab=vocab, seed=seed, bs=bs, device=device, **views)

def learner(r, dls, bf16=True):
    px,views = dls.train_ds.shape[0],r.objective in METHODS
    e = EfficientSSL(r.objective, r.data, 'resnet50', 1)
    arch,args = _backbone(e, 'small', dls.c),{}
    if r.objective=='mae': arch,args = 'vit_tiny_patch16_224',dict(patch_size=px//8, **VIT)
    metrics = [accuracy, KNNAccuracy(n=5000)] if r.part=='d' else KNNAccuracy(n=5000)
    learn = mix_learner(dls, arch, _objective(e, 'small') if views else r.objective, metrics=metrics, **args)
    return learn.to_bf16() if bf16 else learn

def recipe(r):
    "SGD at the rates of Imagenette for two views; MAE, AE and SL as MixTraining has them, at the rates of batches of 256"
    own = get_recipe('vit_t' if r.objective=='mae' else 'resnet18')
    ssl,sl = [replace(h, lr=4*h.lr) for h in (own.ssl,own.sl)]
    if r.objective in METHODS: ssl = get_recipe('siamese_imagenette').ssl
    if r.f1clr: # the same warm-up whatever the length; twice the rate for SGD, as in the paper
        warm = 0.1*EPOCHS[r.data]
        ssl = replace(ssl, sched='f1clr', warmup_epochs=warm, lr=ssl.lr*(2 if ssl.opt=='sgd' else 1))
        sl = replace(sl, sched='f1clr', warmup_epochs=warm)
    return Recipe(ssl, sl)

def fit_args(r, e_ssl=None):
    warm = 0.1*EPOCHS[r.data]
    cbs = [SuperProgressive(warmup_epochs=warm, mix=True)] if r.progressive else []
    if r.part=='c': return dict(e_ssl=e_ssl, e_sl=0, rho=0, recipe=recipe(r), cbs=cbs)
    e_ssl = 0 if r.method=='sl' else ssl_epochs(r)
    return dict(e_ssl=e_ssl, e_sl=EPOCHS[r.data], rho=0.5*(r.method=='mix'), recipe=recipe(r), cbs=cbs)

def epochs_of_equal_cost(r, seed, path, hold_out, bf16):
    "So many that the operations are those of SimSiam's epochs"
    def of(r):
        learn = learner(r, loaders(r, seed, path, hold_out), bf16)
        return learn.mix.step_flops()['ssl']
    return max(round(EPOCHS['c']*of(replace(r, objective='simsiam'))/of(r)), 1)

def run(path, hold_out, bf16, r, seed):
    "The record of a run"
    set_seed(seed)
    args = fit_args(r, epochs_of_equal_cost(r, seed, path, hold_out, bf16) if r.part=='c' else None)
    learn,course = learner(r, loaders(r, seed, path, hold_out), bf16),_Course()
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(**args | dict(cbs=[*args['cbs'], course]))
    h,cost = learn.mix.history,learn.mix.cost
    last = (lambda c: next((float(v) for v in h[c][::-1] if v==v), None) if c in h else None)
    columns = [c for c in ('accuracy','knn_accuracy','spread') if c in h]
    curve = {c: [round(float(v), 5) if v==v else None for v in h[c]] for c in columns}
    curve |= dict(phase=h.phase.tolist(), seconds=h.train_seconds.cumsum().round(3).tolist(),
                  petaflop=_petaflops(learn.mix, course.steps))
    res = dict(accuracy=last('accuracy') if r.part=='d' else None, knn=last('knn_accuracy'), curve=curve,
               cost=cost.to_dict('index'), petaflop=float(cost.petaFLOP.sum()), seconds=float(cost.seconds.sum()))
    if r.part=='c': res['probe'] = linear_probe(learn)
    settings = {k:v for k,v in args.items() if k not in ('cbs','recipe')}
    settings |= dict(recipe=asdict(args['recipe']), bs=learn.dls.bs)
    return dict(exp=asdict(r), seed=seed, hold_out=hold_out if r.part=='c' else 0, bf16=bf16, settings=settings, **res,
                **_where(_device(learn)))

def seconds_of(r, path, hold_out, bf16):
    "About how long a run will take, without validation"
    dls = loaders(r, 0, path, hold_out)
    a,secs = fit_args(r, EPOCHS['c']),_image_seconds(learner(r, dls, bf16), 1.)[0]
    if r.part=='c': a['e_ssl'] = epochs_of_equal_cost(r, 0, path, hold_out, bf16)
    share = 0.55 if r.progressive else 1
    phases = MixPlan(a['e_ssl'], a['e_sl'], a['rho']).phases
    return sum(len(p)*len(dls.train_ds)*secs[p.name]*(share if p.ssl else 1) for p in phases)

def said(r):
    figures = {k: r[k] for k in ('accuracy','knn','probe','petaflop') if r.get(k) is not None}
    return _line(f"{describe(Run(**r['exp']))}, seed {r['seed']}", r['seconds'], **figures)

def table(recs):
    "A row a run, means over the seeds"
    def row(r):
        e = Run(**r['exp'])
        return dict(data=e.data, objective=name(e.objective), method=e.method, strategies=strategies(e),
                    accuracy=100*(r['accuracy'] or np.nan), kNN=100*(r['knn'] or np.nan),
                    probe=100*r.get('probe', np.nan), teraFLOP=1000*r['petaflop'], seconds=r['seconds'])
    def place(r): return r['exp']['data'], r['exp']['objective'], ('ssl','sl','ssl_sl','mix').index(r['exp']['method'])
    df = pd.DataFrame(map(row, sorted(recs, key=place)))
    g = df.groupby(['data','objective','method','strategies'], sort=False)
    return g.mean().assign(runs=g.size()).reset_index().dropna(axis=1, how='all')

def by_cost(recs, ax):
    for r in recs:
        c = [(f,100*a) for f,a in zip(r['curve']['petaflop'], r['curve']['knn_accuracy']) if a is not None]
        ax.plot(*zip(*c), label=name(r['exp']['objective']))
    _finish(ax, xlabel='petaFLOP', ylabel='kNN accuracy, %')

def by_seconds(t, ax):
    for i,((o,m),g) in enumerate(t.groupby(['objective','method'], sort=False)):
        ax.plot(g.seconds, g.accuracy, 'o', color=f'C{i}', label=f'{o}, {m}')
        for r in g.itertuples():
            short = ''.join(w[0] for w in r.strategies.split(', ')) if r.strategies!='as usual' else ''
            ax.annotate(short, (r.seconds,r.accuracy), xytext=(4,4), textcoords='offset points', fontsize=7)
    _finish(ax, xlabel='training seconds', ylabel='accuracy, %', title=t.data.iloc[0]).legend(fontsize=7)

def report(out):
    c,d = [read_records(out/f'{p}.jsonl') for p in 'cd']
    secs = []
    if c: secs += [Section('Seven objectives at equal cost', 'CIFAR-10; neighbours and linear probe on images held out '
        'of the training split.', table(c).drop(columns=['method','strategies'])), Section(draw=lambda ax: by_cost(c, ax))]
    for data,g in table(d).groupby('data', sort=False) if d else ():
        what = 'F: F1-CLR, with three fifths of the epochs of SSL; S: Super Progressive.'
        secs += [Section(f'MixTraining on 10 % of {data}', what, g.drop(columns='data')),
                 Section(draw=lambda ax, g=g: by_seconds(g, ax))]
    print(save_report(out, 'Two views beside MAE and AE, and inside MixTraining', secs))

def best_of(out):
    "The method with two views that part c found best"
    two = [r for r in read_records(out/'c.jsonl') if r['exp']['objective'] in METHODS]
    if not two: raise SystemExit('two_views.py: run --part c first, or name an --objective')
    return max(two, key=lambda r: r['knn'])['exp']['objective']

@call_parse
def main(
    path:str, # Folder with the data sets
    part:str='c', # 'c' or 'd'
    objective:str='', # Of part d, with two views; default: the best of part c
    seeds:int=1, # Seeds 0 to seeds-1
    out:str='experiments/two_views', # Folder for the records
    hold_out:int=5000, # Images to validate on in part c
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
    if part not in ('c','d'): raise SystemExit(f"two_views.py: part must be 'c' or 'd', got {part!r}")
    f,todo = out/f'{part}.jsonl',runs_of(part, objective or (best_of(out) if part=='d' else ''))
    done = {(Run(**r['exp']), r['seed']) for r in read_records(f)}
    todo = [(r,s) for s in range(seeds) for r in todo if only in describe(r) and (r,s) not in done]
    def secs(r): return seconds_of(r, path, hold_out, not fp32)
    run_or_list(todo, partial(run, path, hold_out, not fp32), secs, describe, f, said, jobs, dry_run)
