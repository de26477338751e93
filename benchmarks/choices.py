"""Where the paper is silent: what each choice does to MixTraining on CIFAR-10, 10 %, ViT-T, on images held out of the
training split. A row a run is added to the CSV; what is in it already is not run again.

    python benchmarks/choices.py ~/data --scale small --seeds 2 --out experiments/choices/small.csv"""
import warnings
from dataclasses import replace
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from fastai.torch_core import set_seed
from mixfast.augment import BatchFlip, BatchResizedCrop, paper_tfms
from mixfast.experiments import experiment_args, experiment_dls, experiment_learner, experiments
from mixfast.learner import Recipe
from mixfast.objective import MAE, patchify

class PatchNormMAE(MAE):
    "Targets normalised patch by patch, as in the original MAE"
    def forward(self, feats, x):
        mask,pred = self.predict(feats)
        p = patchify(x.float(), self.lay.grid)
        p = (p-p.mean(2, keepdim=True))/(p.var(2, keepdim=True)+1e-6).sqrt()
        return ((pred-p).square().mean(2)*mask).sum()/(len(x)*self.n_mask)

def long_warmup(args):
    "The SSL warm-up as long as it is without mixing"
    r,share = args['recipe'],1-args['rho']
    return dict(recipe=Recipe(replace(r.ssl, warmup=min(r.ssl.warmup/share, 1)), r.sl))

sl_tfms = paper_tfms['cifar'][0]
choices = { # what differs from the default: in the arguments of `mix_dls`, of `mix_learner`, of the fit
    'default': {},
    'a schedule each for mix and SL': dict(fit=lambda args: dict(sl_sched='restart')),
    'optimizer state carried over the boundary': dict(fit=lambda args: dict(carry_opt=True)),
    'SSL warm-up not shortened': dict(fit=long_warmup),
    'no augmentation in the SSL phase': dict(dls=dict(tfms=sl_tfms)),
    'resized crops in the SSL phase': dict(dls=dict(tfms=sl_tfms, ssl_tfms=[BatchResizedCrop((0.2,1)), BatchFlip()])),
    'targets normalised by patch': dict(learn=dict(objective=PatchNormMAE)),
    'mean of the tokens, no class token': dict(learn=dict(global_pool='avg', class_token=False))}
base = {k:choices[k] for k in ('default', 'mean of the tokens, no class token')}
methods = dict(mix=choices, ssl_sl=base, sl=base)

@call_parse
def main(
    path:str, # Folder with the data sets
    scale:str='small', # 'paper' or 'small'
    seeds:int=2, # Seeds 0 to seeds-1
    out:str='experiments/choices/small.csv', # Where the rows go
    hold_out:int=5000, # Images to validate on
    part:int=0, # Of `parts`: the runs that this process does
    parts:int=1, # Processes that share the runs
):
    "Compare the choices"
    warnings.filterwarnings('ignore')
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = [(m,c,seed) for seed in range(seeds) for m in methods for c in methods[m]]
    for m,c,seed in progress_bar(runs[part::parts]):
        done = pd.read_csv(out)[['method','choice','seed']].values.tolist() if out.exists() else []
        if [m,c,seed] in done: continue
        e,kw = experiments(1, 'cifar10', 'vit_t', 10, m).exp.item(),methods[m][c]
        set_seed(seed)
        dls = experiment_dls(e, seed, path, scale, hold_out=hold_out, **kw.get('dls', {}))
        learn,args = experiment_learner(e, dls, scale, **kw.get('learn', {})),experiment_args(e, scale)
        if 'fit' in kw: args |= kw['fit'](args)
        with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(**args)
        row = dict(method=m, choice=c, seed=seed, accuracy=round(learn.mix.history.accuracy.iloc[-1], 5),
                   train_seconds=round(sum(learn.mix.seconds.values()), 1))
        pd.DataFrame([row]).to_csv(out, mode='a', header=not out.exists(), index=False)
