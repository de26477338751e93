"""Property tests of the public arguments: whatever the input, either it works, or a `ValueError`, `TypeError` or
`FileNotFoundError` says what is wrong, before any training.

    python benchmarks/fuzz.py --cases 2000 --out experiments/fuzz.json"""
import json, re, time, traceback, warnings
from collections import Counter
from pathlib import Path

import numpy as np, torch
from fastcore.script import call_parse
from hypothesis import HealthCheck, given, settings, strategies as st
from fastai.vision.all import ProgressCallback, accuracy, noop
from mixfast.all import (AE, MAE, Hypers, MixPlan, Recipe, few_labels, mix_dls, mix_learner, noisy_labels,
                         package_versions)

FINE = ValueError, TypeError, FileNotFoundError
odd = st.sampled_from([None, '', 'x', -1, 0, 1, 2, 0.5, 1.5, float('nan'), float('inf'), True, [], (), {}, object, np.float32(0.3), np.int64(2), 10**9])
def mostly(good): return st.integers(0, 39).flatmap(lambda i: odd if i==0 else good) # one in forty is odd

def array(n, h, c, dtype, bad):
    a = np.random.default_rng(n*h).integers(0, 256, (n,h,h,c)).astype(dtype)
    return {'ok':a, 'flat':a[...,0], 'first':a.transpose(0,3,1,2), 'list':list(a), 'none':None, 'empty':a[:0], 'one':a[0] if n else a}[bad]

images = st.builds(array, st.integers(0, 40), st.sampled_from([1,4,8,9,16]), st.sampled_from([1,2,3,4,5]), st.sampled_from(['uint8','uint8','uint8','float32','int64']),
                   st.sampled_from(['ok']*6+['flat','first','list','none','empty','one']))
good = st.builds(array, st.integers(8, 40), st.just(8), st.just(1), st.just('uint8'), st.just('ok'))

def rarely(a, b): return st.integers(0, 9).flatmap(lambda i: b if i else a)

@st.composite
def labelled(draw, x):
    x = draw(x)
    n = len(x) if hasattr(x, '__len__') else 3
    y = np.arange(n)%3 if draw(st.integers(0, 9)) else draw(st.sampled_from([np.zeros(n, int), np.arange(n+1)%3, np.full(n, -1), np.full(n, 0.5), ['a']*n, None, list(range(n))]))
    return (x,y) if draw(st.integers(0, 9)) else draw(st.sampled_from([x, None, (x,), [x,y]]))

dls_args = st.fixed_dictionaries(dict(sl=labelled(rarely(images, good))), optional=dict(
    valid=labelled(rarely(images, good)), ssl=rarely(images, good), lam=mostly(st.floats(0, 1)), bs=mostly(st.integers(1, 64)), vocab=mostly(st.sampled_from([None,['a','b','c']])),
    tfms=mostly(st.sampled_from([None,'cifar','tinyimagenet'])), ssl_tfms=mostly(st.sampled_from([None,'cifar'])), stats=mostly(st.sampled_from([None,None,None,([0.5],[0.2])])),
    shuffle=st.booleans(), drop_last=st.booleans(), seed=mostly(st.integers(0, 2**40)), device=mostly(st.sampled_from([None,'cpu']))))
objective = mostly(st.one_of(st.sampled_from([None,'mae','ae','MAE',MAE,AE]), st.builds(lambda **k: (lambda: MAE(**k)),
    mask_ratio=mostly(st.floats(0.1, 0.9)), depth=mostly(st.integers(0, 2)), dim=mostly(st.sampled_from([None,8,16])), heads=mostly(st.sampled_from([None,1,2])), visible_only=mostly(st.sampled_from([False,True,'mix'])))))
model_args = st.fixed_dictionaries(dict(arch=mostly(st.sampled_from(['vit_tiny_patch16_224']*4+['resnet10t']))), optional=dict(
    patch_size=mostly(st.sampled_from([2,4])), n_out=mostly(st.sampled_from([None,3,10])), objective=objective))
floats = lambda lo, hi: mostly(st.floats(lo, hi))
hypers = st.builds(lambda **k: (lambda: Hypers(**k)), lr=floats(1e-4, 1e-2), warmup=floats(0, 0.5), wd=floats(0, 0.2), betas=mostly(st.just((0.9,0.95))))
fit_args = st.fixed_dictionaries(dict(e_ssl=mostly(st.integers(0, 2)), e_sl=mostly(st.integers(0, 2))), optional=dict(
    rho=floats(0, 1), alpha=floats(0, 1), alpha_sched=mostly(st.sampled_from([None,'linear','cosine'])), recipe=mostly(st.one_of(st.sampled_from([None,'vit_t','resnet18']), st.tuples(hypers, hypers))),
    sl_sched=mostly(st.sampled_from(['shared','restart'])), carry_opt=st.booleans(), on_nan=mostly(st.sampled_from(['stop','skip'])), every=mostly(st.just(1)), resume=st.booleans()))
labels_args = st.tuples(st.sampled_from([few_labels, noisy_labels]), mostly(st.just(np.arange(20)%4)), mostly(st.one_of(st.integers(1, 5), st.floats(0, 1))), mostly(st.integers(0, 99)))

VIT = dict(embed_dim=16, depth=1, num_heads=2)
counts,found,messages = Counter(),{},set()

def whole(dls, model, fit):
    "Data, model and fit"
    dls = mix_dls(**dls)
    if dls.train.n and dls.train.n>200: return
    o = model.get('objective')
    if callable(o) and not isinstance(o, type): model = model | dict(objective=o())
    learn = mix_learner(dls, **model, **(VIT if str(model['arch']).startswith('vit') else {}), metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    if isinstance(fit.get('recipe'), tuple) and fit['recipe']: fit = fit | dict(recipe=Recipe(*[o() for o in fit['recipe']]))
    if isinstance(fit.get('e_ssl'), int) and fit['e_ssl']>5 or isinstance(fit.get('e_sl'), int) and fit['e_sl']>5: return
    learn.fit_mixtraining(**fit)
    h = learn.mix.history
    p = MixPlan(fit['e_ssl'], fit['e_sl'], fit.get('rho', 0.5))
    assert len(h)==p.n_epoch and all(v.isfinite().all() for v in learn.model.state_dict().values() if v.is_floating_point())

PYTHON = re.compile('not supported|object is not|cannot be interpreted|invalid literal|unsupported operand|ambiguous|positional|has no attribute')

def attempt(f, *args):
    "Count how it ended; keep what is neither right nor a clear error"
    try: f(*args)
    except FINE as e:
        tb = traceback.extract_tb(e.__traceback__)
        counts['a clear error'] += 1
        messages.add(re.sub(r'[\d.]+', '0', f'{type(e).__name__}: {e}'.replace('\n', ' '))[:160])
        ours = 'mixfast' in Path(tb[-1].filename).parts and ('raise' in tb[-1].line or 'f"' in tb[-1].line) and not PYTHON.search(str(e).split(': ')[0])
        if not ours: found.setdefault(f"not mixfast's own words: {type(e).__name__}: {str(e)[:150]} ({tb[-1].name}, {tb[-1].line})", repr(args)[:500])
    except FloatingPointError: counts['a loss that is not finite'] += 1
    except Exception as e:
        counts['another exception'] += 1
        where = next((t for t in reversed(traceback.extract_tb(e.__traceback__)) if 'mixfast/' in t.filename), None)
        found.setdefault(f'{type(e).__name__}: {str(e)[-150:]} ({where and where.name})', repr(args)[:600])
    else: counts['a correct run'] += 1

def fuzz(cases):
    "Try so many of each kind"
    how = settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    how(given(dls_args, model_args, fit_args)(lambda d, m, f: attempt(whole, d, m, f)))()
    how(given(labels_args)(lambda a: attempt(*a)))()

@call_parse
def main(
    cases:int=2000, # How many
    out:str='experiments/fuzz.json', # File for the result
    show:bool=False, # Print the distinct error messages, too
):
    "Fuzz the public arguments"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    np.set_printoptions(threshold=0, edgeitems=1)
    fuzz(cases)
    for k,v in found.items(): print(k, re.sub(r'\s+', ' ', v), sep='\n    ', end='\n\n')
    if show: print(*sorted(messages), sep='\n')
    print(dict(counts))
    res = dict(cases=sum(counts.values()), **counts, versions=package_versions(), date=time.strftime('%Y-%m-%d'))
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
