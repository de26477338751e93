"""Where the paper is silent: what each choice does on CIFAR-10, 10 %, ViT-T, on images held out of the training split.
A run is a line of JSON; what has one already is not run again. On a CPU each core has its own run.

    python benchmarks/choices.py ~/data --scale small --seeds 2 --out experiments/choices"""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from fastcore.script import call_parse
from mixfast.data.augment import BatchFlip, BatchResizedCrop, paper_tfms
from mixfast.insight.parallel import _in_processes, _line, _watched
from mixfast.objective.autoencode import MAE, patchify, random_mask
from mixfast.paper.mixtraining import check_scale, experiment_args, experiments
from mixfast.paper.mixtraining_runs import run_experiment
from mixfast.paper.records import add_record
from mixfast.schedule import Recipe

class PlacesMAE(MAE):
    "The decoder reads the patches alone, not the class token"
    def predict(self, feats, size):
        t,grid = feats.tokens(),feats.layout.grid
        mask = random_mask(*t.shape[:2], self.n_masked(grid, size), t.device)
        return mask, self.decoder(t, mask, grid).float()

class PatchNormMAE(MAE):
    "Targets normalised patch by patch, as in the original MAE"
    def forward(self, feats, x):
        (mask,pred),grid = self.predict(feats, x.shape[-2:]),feats.layout.grid
        p = patchify(x.float(), grid)
        p = (p-p.mean(2, keepdim=True))/(p.var(2, keepdim=True)+1e-6).sqrt()
        return ((pred-p).square().mean(2)*mask).sum()/(len(x)*self.n_masked(grid, x.shape[-2:]))

def long_warmup(args):
    "The SSL warm-up as long as it is without mixing"
    r,share = args['recipe'],1-args['rho']
    return dict(recipe=Recipe(replace(r.ssl, warmup=min(r.ssl.warmup/share, 1)), r.sl))

sl_tfms = paper_tfms['cifar'][0]
choices = { # what differs from the default: in the arguments of `mix_dls`, of `mix_learner`, of the fit
    'default': {},
    'decoder without the class token': dict(learn=dict(objective=PlacesMAE)),
    'a schedule each for mix and SL': dict(fit=dict(sl_sched='restart')),
    'optimizer state carried over the boundary': dict(fit=dict(carry_opt=True)),
    'SSL warm-up not shortened': dict(fit=long_warmup),
    'no augmentation in the SSL phase': dict(dls=dict(tfms=sl_tfms)),
    'resized crops in the SSL phase': dict(dls=dict(tfms=sl_tfms, ssl_tfms=[BatchResizedCrop((0.2,1)), BatchFlip()])),
    'mean of the tokens, no class token': dict(learn=dict(global_pool='avg', class_token=False)),
    'targets normalised by patch': dict(learn=dict(objective=PatchNormMAE)),
    'masked patches dropped in the SSL phase': dict(learn=dict(objective=partial(MAE, visible_only=True))),
    'masked patches dropped in the SSL and mix phases': dict(learn=dict(objective=partial(MAE, visible_only='mix')))}
def some(*names): return {k:choices[k] for k in ('default',)+names}
pooled,dropped = 'mean of the tokens, no class token','masked patches dropped in the SSL phase'
methods = dict(mix=choices, ssl_sl=some('decoder without the class token', pooled, dropped), sl=some(pooled))

def records(f):
    "The runs of a file, whole lines only"
    res = []
    for line in f.read_text().splitlines() if f.exists() else ():
        try: res.append(json.loads(line))
        except ValueError: pass
    return res

def run(path, scale, hold_out, m, c, seed):
    "The record of a method's choice"
    e,change = experiments(1, 'cifar10', 'vit_t', 10, m).exp.item(),dict(methods[m][c])
    if change.get('fit')==long_warmup: change['fit'] = long_warmup(experiment_args(e, scale))
    r = run_experiment(e, seed, path, scale, hold_out=hold_out, **change)
    keep = ('accuracy','train_seconds','scale','bf16','settings','device','commit','versions','date')
    return dict(method=m, choice=c, seed=seed, hold_out=hold_out) | {k:r[k] for k in keep}

def said(r): return _line(f"{r['method']}, {r['choice']}, seed {r['seed']}", r['train_seconds'], accuracy=r['accuracy'])

@call_parse
def main(
    path:str, # Folder with the data sets
    scale:str='small', # 'paper' or 'small'
    seeds:int=2, # Seeds 0 to seeds-1
    out:str='experiments/choices', # Folder for the records
    hold_out:int=5000, # Images to validate on
    only:str='', # Choices with this text in their name
    jobs:int=None, # Processes; default: one a core, on a GPU one
):
    "Compare the choices"
    check_scale(scale)
    out = Path(out)/f'{scale}.jsonl'
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r['method'],r['choice'],r['seed'],r['hold_out']) for r in records(out)}
    runs = [(m,c,seed) for seed in range(seeds) for m in methods for c in methods[m] if only in c]
    runs = [o for o in runs if (*o,hold_out) not in done]
    results = _in_processes(partial(run, path, scale, hold_out), runs, jobs)
    for r in _watched(results, len(runs), said): add_record(out, r)
