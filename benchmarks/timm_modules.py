"""One model of each module of timm through a default fit: SSL, mix and SL epoch on random images, predictions, plain
weights saved and loaded, gradient cosines; and, by gradients, whether its features lie where their layout says.

    OMP_NUM_THREADS=1 python benchmarks/timm_modules.py --out experiments/timm.csv"""
import json, subprocess, sys, tempfile, warnings
from pathlib import Path

import numpy as np, pandas as pd, timm, torch, torch.nn.functional as F
from fastcore.script import call_parse
from fastai.vision.all import Callback, noop, set_seed
from scipy.optimize import linear_sum_assignment
from torch.optim.swa_utils import update_bn
from mixfast.all import GradCosines, evaluating, features, find_layout, mix_dls, mix_learner

def energies(model, x, most=16):
    "Squared gradients of features (all, or `most` drawn at random) by patch of the images `x`, [N,rows,columns], and their places"
    with evaluating(model), torch.enable_grad():
        f = features(model, x := x.clone().requires_grad_())
        t = f.tokens()
        ids,r = torch.randperm(t.shape[1])[:most],torch.randn(len(t), t.shape[2])
        g = [torch.autograd.grad((t[:,i]*r).sum(), x, retain_graph=True)[0].double().square().sum((0,1)) for i in ids]
    return F.adaptive_avg_pool2d(torch.stack(g), f.layout.grid), ids

def in_place(model, x):
    """How well gradients agree with the layout, in [0,1]: the share of features that get their own patch, where patches are
    given to features one to one by the greatest product of gradients; or the share of pairs whose gradients are centred in
    the order of their rows, and of their columns. The first suits attention, the second the wide view of convolutions.
    Neither depends on how far a feature, or a patch, is seen everywhere."""
    e,ids = energies(model, x)
    e,cols = e.clamp(min=1e-300).log(),e.shape[2]
    own = (linear_sum_assignment(e.flatten(1)[:,ids], maximize=True)[1]==range(len(ids))).mean()
    e,ordered = e-e.mean((1,2), keepdim=True)-e.mean(0),[]
    for place,o in ((ids//cols, e.sum(2)), (ids%cols, e.sum(1))):
        centre = o@torch.arange(o.shape[1]).double()
        ordered.append(float((centre[:,None]<centre)[place[:,None]<place].double().mean()))
    return round(max(own, min(ordered)), 3)

def data(size):
    "A few random images"
    rng = np.random.default_rng(0)
    xy = lambda n: (rng.integers(0, 256, (n,size,size,3), dtype=np.uint8), np.arange(n)%3)
    return mix_dls(xy(8), xy(6), bs=4)

class Began(Callback):
    "Whether any step was taken"
    steps = 0
    def after_step(self): self.steps += 1

def check_order(name, size, **kwargs):
    """`in_place` of a new model, at the first size from `size` up that gives 3x3 features or more. Where that is low,
    again with the statistics of a batch in batch norm: LeViT cannot tell places apart without."""
    for s in sorted({size, 128, 224}):
        try: learn,x = mix_learner(data(s), name, 'ae', **kwargs),torch.randn(4, 3, s, s)
        except (TypeError,ValueError): continue
        m = learn.model
        if min(find_layout(m, x[:1]).grid)>=3: break
    if (first := in_place(m, x))>0.9: return first
    update_bn([x], m)
    return max(first, in_place(m, x))

def fit(name, size, folder, **kwargs):
    "A default fit, and what was wrong with it; refusals are raised"
    set_seed(0)
    learn,began,cos = mix_learner(data(size), name, path=folder, **kwargs),Began(),GradCosines(every=1)
    lay = find_layout(learn.model, torch.randn(1, 3, size, size))
    row = dict(size=size, params=sum(p.numel() for p in learn.model.parameters()), kind=lay.kind, grid='x'.join(map(str, lay.grid)),
               objective=type(learn.mix.objective).__name__)
    learn.logger = noop
    try:
        with learn.no_bar(): learn.fit_mixtraining(2, 2, rho=0.5, cbs=[began, cos])
        row['wrong'] = '; '.join(wrong(learn, cos, name, **kwargs))
    except Exception as e:
        if began.steps==0 and isinstance(e, (TypeError,ValueError)): raise
        row['wrong'] = f'{type(e).__name__} after {began.steps} steps: {e}'
    return row

def wrong(learn, cos, name, **kwargs):
    "What is not as it should be after the fit"
    h,m = learn.mix.history,learn.model
    if h.phase.tolist()!=['ssl','mix','sl'] or not np.isfinite(h.train_loss).all(): yield f'history {h.train_loss.tolist()}'
    if len(cos.history)!=2 or not np.isfinite(cos.history).values.all(): yield f'cosines {cos.rows}'
    if (cos.history.iloc[-1,1:].abs()<1e-12).any(): # in the first step a classifier may be all zeros
        yield f'no gradient at the last layer {cos.rows[-1]}'
    with learn.no_bar(): p = learn.get_preds(act=noop)[0]
    with evaluating(m): ref = torch.cat([m(b[0].as_subclass(torch.Tensor)) for b in learn.dls.valid])
    if p.shape!=(6,3) or not torch.allclose(p, ref, atol=1e-5): yield 'predictions are not those of the model'
    learn.save('weights', with_opt=False)
    weights = torch.load(learn.path/learn.model_dir/'weights.pth', weights_only=True)
    if weights.keys()!=timm.create_model(name, num_classes=3, **kwargs).state_dict().keys(): yield "keys are not timm's"
    new = mix_learner(learn.dls, name, **kwargs).model
    new.load_state_dict(weights)
    with evaluating(new): again = torch.cat([new(b[0].as_subclass(torch.Tensor)) for b in learn.dls.valid])
    if not torch.equal(again, ref): yield 'loaded weights predict something else'

def smallest(module):
    """The model of a module with the fewest weights, and arguments: of a transformer with more than 50 million, two blocks.
    timm's own `test_` models are another matter."""
    def weights(name, **kwargs):
        with torch.device('meta'): return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())
    n,name = min((weights(n), n) for n in timm.list_models(module=module) if not n.startswith('test_'))
    if n<50e6: return name, {}
    try: return (name, dict(depth=2)) if weights(name, depth=2)<n else (name, {})
    except TypeError: return name, {}

def try_module(module):
    "A row of the table: at 64 pixels, or where that is refused at a larger size, at last that which the model was made for"
    name,kwargs = smallest(module)
    row = dict(module=module, model=' '.join([name, *(f'{k}={v}' for k,v in kwargs.items())]))
    for size in dict.fromkeys((64, 128, 224, min(max(timm.get_pretrained_cfg(name).input_size[1:]), 331))):
        try:
            with tempfile.TemporaryDirectory() as d: done = fit(name, size, d, **kwargs)
            says,order = done.pop('wrong'),check_order(name, size, **kwargs)
            return row | done | dict(order=order, result='wrong' if says or order<0.9 else 'ok', says=says)
        except (TypeError,ValueError) as e: refusal = dict(size=size, result='refused', says=str(e))
    return row | refusal

COLUMNS = ['module','model','size','params','kind','grid','objective','order','result','says']

@call_parse
def main(
    out:str='experiments/timm.csv', # The table; modules that are in it are not tried again
    module:str=None, # Try this one alone, here, and print its row
    timeout:int=900, # Seconds for a module
):
    "Try one model of each module of timm, each in a process of its own"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    if module: return print(json.dumps(try_module(module)))
    out = Path(out)
    df = pd.read_csv(out) if out.exists() else pd.DataFrame(columns=COLUMNS)
    for m in timm.list_modules():
        if m in df.module.values: continue
        cmd,row = [sys.executable, __file__, '--module', m],dict(module=m, result='wrong')
        try: p = subprocess.run(cmd, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired: row['says'] = f'nothing after {timeout} seconds'
        else: row = json.loads(p.stdout.splitlines()[-1]) if p.returncode==0 else row | dict(says=p.stderr[-300:])
        row['says'] = ' '.join(str(row['says'] or '').split())
        df = pd.concat([df, pd.DataFrame([row])])[COLUMNS].sort_values('module').convert_dtypes()
        df.to_csv(out, index=False)
        print(*[row.get(k) for k in COLUMNS], flush=True)
    print(df.result.value_counts().to_dict())
