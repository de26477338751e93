"""Several tasks on one backbone: SSL+SL and MixTraining beside SL, of both tasks at once and of each alone. A run is a
line of JSON; what has one already is not run again. On a CPU each core has its own run.

    python benchmarks/tasks.py ~/data --data pets                # breed and mask of Oxford Pets
    python benchmarks/tasks.py ~/data --data two_sets            # classes of CIFAR-10 and of TinyImageNet
    python benchmarks/tasks.py ~/data --data pets --dry-run      # the runs, and how long they will take
    python benchmarks/tasks.py ~/data --report-only              # report.md of what has been run

The model is the small ResNet of `mixfast-reproduce --paper efficient_ssl --scale small`, its objective AE. Of each set of the
two as many images are trained on, and an image has the label of its own set alone. Scores are those on the official
test split at the end of training, or with --hold-out on training images that are left out."""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
import numpy as np, pandas as pd
from fastai.callback.fp16 import MixedPrecision # gives learners to_bf16
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from mixfast.data.augment import BatchFlip, BatchResizedCrop
from mixfast.data.datasets import cifar10, tinyimagenet
from mixfast.data.labels import few_labels
from mixfast.data.masks import oxford_pets
from mixfast.data.mix import mix_dls
from mixfast.insight.compare import _LastEpoch
from mixfast.insight.cost import _device
from mixfast.insight.parallel import _line
from mixfast.learner import mix_learner
from mixfast.paper.efficient_ssl import EfficientSSL, _backbone
from mixfast.paper.records import read_records
from mixfast.paper.report import Section, save_report
from mixfast.paper.running import _image_seconds, _where, run_or_list
from mixfast.phases import MixPlan
from mixfast.task.heads import Classify
from mixfast.task.segment import Segment

@dataclass(frozen=True)
class Run:
    data:str # A key of `TASKS`
    method:str # 'sl', 'ssl_sl' or 'mix'
    tasks:str='both' # Or the name of one
    learned:bool=False # Weights of the losses by learned uncertainty; else 1 each

TASKS = dict(pets=('breed','mask'), two_sets=('cifar10','tinyimagenet'))
EPOCHS = dict(pets=20, two_sets=15) # Of SSL, and of SL
SIZE = dict(pets=64, two_sets=32)
SCORES = dict(breed='accuracy', mask='miou', cifar10='accuracy', tinyimagenet='accuracy')
WORDS = dict(sl='SL', ssl_sl='SSL+SL', mix='MixTraining')

def describe(r): return f"{r.data}, {WORDS[r.method]}, {r.tasks}{', learned weights'*r.learned}"

def runs_of(data):
    "What is to be run"
    both = [Run(data, m) for m in WORDS] + [Run(data, 'mix', learned=True)]
    return both + [Run(data, 'sl', t) for t in TASKS[data]]

@lru_cache
def pets(path, n):
    "The official split: (images, dict of targets) twice, and the vocab"
    d = oxford_pets(path, SIZE['pets'], 'both')
    return d.train, d.valid, d.vocab

@lru_cache
def two_sets(path, n):
    "`n` images of each set, their test splits, and the vocab"
    sets = dict(cifar10=cifar10(path), tinyimagenet=tinyimagenet(path, size=SIZE['two_sets']))
    def few(d): return [o[few_labels(d.train[1], n//len(d.vocab), 0)] for o in d.train]
    def joined(parts):
        ys = {k: np.concatenate([y if k==o else np.full(len(y), -1) for o,(_,y) in parts.items()]) for k in parts}
        return np.concatenate([x for x,_ in parts.values()]), ys
    train,valid = joined({k: few(d) for k,d in sets.items()}), joined({k: d.valid for k,d in sets.items()})
    return train, valid, {k: d.vocab for k,d in sets.items()}

def loaders(r, seed, path, n, hold_out):
    "Images that have a label of a task that is asked for"
    train,valid,vocab = dict(pets=pets, two_sets=two_sets)[r.data](path, n)
    if hold_out:
        i = np.random.default_rng(seed).permutation(len(train[0]))
        def part(i): return train[0][i], {k: y[i] for k,y in train[1].items()}
        train,valid = part(np.sort(i[hold_out:])),part(i[:hold_out])
    if r.tasks!='both': train,valid,vocab = [one(o, r.tasks) for o in (train,valid)] + [vocab[r.tasks]]
    tfms = [BatchFlip(), BatchResizedCrop(scale=(0.5,1.))]
    return mix_dls(train, valid, tfms=tfms, vocab=vocab, seed=seed, bs=64)

def one(split, task):
    "Those with a label of a task"
    x,y = split[0],split[1][task]
    has = np.flatnonzero(y>=0) if y.ndim==1 else np.arange(len(y))
    return x[has], y[has]

def learner(r, dls, bf16=True):
    heads = {k: Segment() if k=='mask' else Classify() for k in TASKS[r.data]}
    e = EfficientSSL('simsiam', 'imagenette', 'resnet50', 1) # its model is all that is wanted
    learn = mix_learner(dls, _backbone(e, 'small', 0), 'ae', task=heads if r.tasks=='both' else heads[r.tasks],
                        task_weights='learned' if r.learned else None)
    return learn.to_bf16() if bf16 else learn

def fit_args(r):
    n = EPOCHS[r.data]
    return dict(e_ssl=0 if r.method=='sl' else n, e_sl=n, rho=0.5*(r.method=='mix'))

def scores(r, history):
    "In per cent by task"
    h,names = history.iloc[-1],TASKS[r.data] if r.tasks=='both' else [r.tasks]
    return {t: round(100*float(h[f'{t}_{SCORES[t]}' if len(names)>1 else SCORES[t]]), 3) for t in names}

def run(path, n, hold_out, bf16, r, seed):
    "The record of a run"
    set_seed(seed)
    learn = learner(r, loaders(r, seed, path, n, hold_out), bf16)
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(**fit_args(r), cbs=_LastEpoch())
    cost = learn.mix.cost
    weights = [round(float(o), 4) for o in (-learn.loss_func.log_vars.detach()).exp()] if r.learned else None
    return dict(exp=asdict(r), seed=seed, hold_out=hold_out, bf16=bf16, scores=scores(r, learn.mix.history),
                weights=weights, cost=cost.to_dict('index'), petaflop=float(cost.petaFLOP.sum()),
                seconds=float(cost.seconds.sum()), n=len(learn.dls.train_ds),
                settings=dict(fit_args(r), bs=learn.dls.bs), **_where(_device(learn)))

def seconds_of(r, path, n, hold_out, bf16):
    "About how long a run will take, without validation"
    dls = loaders(r, 0, path, n, hold_out)
    secs = _image_seconds(learner(r, dls, bf16), 1.)[0]
    return sum(len(p)*len(dls.train_ds)*secs[p.name] for p in MixPlan(**fit_args(r)).phases)

def said(r): return _line(f"{describe(Run(**r['exp']))}, seed {r['seed']}", r['seconds'], **r['scores'])

def table(recs):
    "A row a method, means ± half the range over the seeds"
    rows = [dict(method=WORDS[e.method] + ', learned weights'*e.learned, tasks=e.tasks, **r['scores'],
                 teraFLOP=1000*r['petaflop'], seconds=r['seconds']) for r in recs for e in [Run(**r['exp'])]]
    g = pd.DataFrame(rows).groupby(['method','tasks'], sort=False)
    def cell(s): return '' if s.isna().all() else f'{s.mean():.1f}' + f' ± {(s.max()-s.min())/2:.1f}'*(len(s)>1)
    return g.agg(cell).assign(runs=g.size()).reset_index()

def report(out):
    secs = []
    for data in TASKS:
        recs = [r for r in read_records(out/f'{data}.jsonl') if not r['hold_out']]
        if not recs: continue
        s,r = ('Breed: accuracy, mask: mIoU' if data=='pets' else 'Accuracy'),recs[0]
        secs.append(Section(data, f"{s}, in per cent, on the official test split; {SIZE[data]} pixels, {EPOCHS[data]} epochs of SSL "
                            f"and of SL. Means ± half the range. {r['device']}.", table(recs)))
    print(save_report(out, 'Several tasks on one backbone', secs))

@call_parse
def main(
    path:str, # Folder with the data sets
    data:str='pets', # 'pets' or 'two_sets'
    seeds:int=2, # Seeds 0 to seeds-1
    n:int=5000, # Images of each of two sets
    out:str='experiments/tasks', # Folder for the records
    hold_out:int=0, # Validate on so many training images, not on the test split
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
    if data not in TASKS: raise SystemExit(f"tasks.py: data must be of {list(TASKS)}, got {data!r}")
    f = out/f'{data}.jsonl'
    done = {(Run(**r['exp']), r['seed'], r['hold_out']) for r in read_records(f)}
    todo = [(r,s) for s in range(seeds) for r in runs_of(data) if only in describe(r) and (r,s,hold_out) not in done]
    def secs(r): return seconds_of(r, path, n, hold_out, not fp32)
    run_or_list(todo, partial(run, path, n, hold_out, not fp32), secs, describe, f, said, jobs, dry_run)
