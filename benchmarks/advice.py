"""Is `fit_best` right? Each candidate is trained for the whole of a budget, and `fit_best` is let choose in the same time.
A run is a line of JSON; what has one already is not run again. Give it a core of its own: it goes by the clock.

    python benchmarks/advice.py --data digits --minutes 1                   # 20 labels a class
    python benchmarks/advice.py --data cifar10 --minutes 5 --path ~/data    # a tenth of the images, labelled
    python benchmarks/advice.py --report-only"""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
import time
from dataclasses import replace
from pathlib import Path
import pandas as pd
from fastai.callback.fp16 import MixedPrecision # gives learners to_bf16
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.script import call_parse, store_true
from mixfast.data.datasets import cifar10
from mixfast.data.labels import fraction
from mixfast.data.mix import mix_dls
from mixfast.demo import RECIPE, demo_learner
from mixfast.insight.advise import candidates
from mixfast.insight.compare import _LastEpoch
from mixfast.insight.cost import _device
from mixfast.insight.parallel import _line
from mixfast.learner import mix_learner
from mixfast.paper.records import add_record, read_records
from mixfast.paper.report import Section, save_report
from mixfast.paper.running import _where
from mixfast.schedule import Recipe, get_recipe

def learner(data, seed, path):
    "A learner, and the recipe that goes with it"
    set_seed(seed)
    if data=='digits': return demo_learner(seed),RECIPE
    d = cifar10(path)
    i = fraction(d.train[1], 10, seed)
    dls = mix_dls(tuple(o[i] for o in d.train), d.valid, tfms='cifar', vocab=d.vocab, seed=seed, bs=64)
    learn = mix_learner(dls, 'vit_tiny_patch16_224', metrics=accuracy, patch_size=4, embed_dim=64, depth=4, num_heads=2)
    return learn.to_bf16(), Recipe(*[replace(h, lr=4*h.lr) for h in (get_recipe('vit_t').ssl, get_recipe('vit_t').sl)])

def run(data, method, seed, path, minutes):
    "The record of a run: of a candidate by its name, or of `fit_best`"
    (learn,recipe),t = learner(data, seed, path),time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        if method=='fit_best': learn.fit_best(minutes, recipe=recipe, cbs=_LastEpoch())
        else: learn.fit_best(minutes, methods={method: candidates(learn)[method]}, recipe=recipe, cbs=_LastEpoch()) # no pilots
    mix = learn.mix
    pilots = mix.advice.to_dict('records') if len(mix.advice) else []
    return dict(exp=dict(data=data, method=method, minutes=minutes), seed=seed, accuracy=float(mix.history.accuracy.iloc[-1]),
                why=mix.why, pilots=pilots, pilot_seconds=sum(o['seconds'] for o in pilots), wall_seconds=time.perf_counter()-t,
                epochs=len(mix.history), **_where(_device(learn)))

def table(recs):
    "A row a seed: the accuracy of each candidate in per cent; what was advised, and what it reached"
    rows = {}
    for r in recs:
        row = rows.setdefault(r['seed'], dict(seed=r['seed']))
        row[r['exp']['method']] = 100*r['accuracy']
        if r['exp']['method']=='fit_best': row |= {'chosen': r['why'].split(' is trained')[0], 'pilots, share of the time': r['pilot_seconds']/60/r['exp']['minutes']}
    df = pd.DataFrame(rows.values()).set_index('seed')
    own = df.drop(columns=['fit_best','chosen','pilots, share of the time'], errors='ignore')
    return df.assign(**{'behind the best': own.max(axis=1)-df['fit_best']}).reset_index() if 'fit_best' in df else df.reset_index()

def report(out):
    secs = []
    recs = read_records(out)
    for (data,minutes),g in pd.DataFrame([dict(r['exp'], i=i) for i,r in enumerate(recs)]).groupby(['data','minutes'], sort=False):
        secs.append(Section(data, f'{minutes:g} minutes for each fit, pilots included; accuracy in per cent on the test split.', table([recs[i] for i in g.i])))
    print(save_report(out, 'Is the advice right?', secs))

@call_parse
def main(
    data:str='digits', # 'digits' or 'cifar10'
    minutes:float=1., # Of each fit
    seeds:int=2, # Seeds 0 to seeds-1
    path:str='.', # Folder with the data sets
    out:str='experiments/advice', # Folder for the records
    report_only:store_true=False, # Write report.md of what has been run
):
    "Run what is missing"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if report_only: return report(out)
    if data not in ('digits','cifar10'): raise SystemExit(f"advice.py: data must be 'digits' or 'cifar10', got {data!r}")
    f = out/'advice.jsonl'
    for seed in range(seeds):
        for method in (*candidates(learner(data, seed, path)[0]), 'fit_best'):
            done = {(*r['exp'].values(), r['seed']) for r in read_records(f)}
            if (data,method,minutes,seed) in done: continue
            add_record(f, r := run(data, method, seed, path, minutes))
            print(_line(f'{data}, {method}, seed {seed}', r['wall_seconds'], accuracy=r['accuracy']), flush=True)
