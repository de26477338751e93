"""What a step costs: ratios within one run, interleaved, medians (min to max) over rounds. python benchmarks/steps.py

1. mix step / (SSL step + SL step), a ViT of 12 blocks and the depth-2 decoder: forward, backward and fused AdamW
2. fit_mixtraining's step / a bare PyTorch loop's, on the batches of the same loader, in the mix phase
3. MixTraining / (SSL, then SL), training seconds of whole fits, rho 0.5, as many SSL as SL epochs, one data set
4. seconds that `import mixfast.all` adds to `import fastai.vision.all`
"""
import subprocess, sys, time, warnings
from statistics import median

import numpy as np, torch
from mixfast.all import accuracy, mix_dls, mix_learner, set_seed

def learner(n, bs, **kw):
    set_seed(0)
    rng = np.random.default_rng(0)
    data = lambda n: (rng.integers(0, 256, (n,32,32,3)).astype(np.uint8), np.arange(n)%10)
    learn = mix_learner(mix_dls(data(n), data(bs), bs=bs), 'vit_tiny_patch16_224', patch_size=4, metrics=accuracy, **kw)
    return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn

def show(name, xs, target): print(f'{name:66} {median(xs):.3f}  ({min(xs):.3f} to {max(xs):.3f})  target {target}', flush=True)

def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter()-t

def step(learn, opt, x, y):
    m = learn.model
    def f():
        out = m(x)
        loss = {'ssl': lambda: out.ssl_loss, 'sl': lambda: learn.loss_func(out, y),
                'mix': lambda: 0.5*out.ssl_loss + 0.5*learn.loss_func(out.logits, y)}[m.phase]()
        loss.backward()
        opt.step()
        opt.zero_grad()
    return f

def mix_step(rounds=15, bs=32):
    learn = learner(bs, bs)
    learn.create_opt()
    (x,y),m = learn.dls.train.one_batch(),learn.model.train()
    f,rs = step(learn, learn.opt, x, y),[]
    for i in range(rounds+1):
        t = {}
        for m.phase in ('ssl','sl','mix'): t[m.phase] = timed(f)
        if i: rs.append(t['mix']/(t['ssl']+t['sl']))
    show(f'mix step / (SSL + SL step), ViT-T, 64 tokens, batch {bs}', rs, 'at most 0.62, limit 14/26 = 0.538')

def fit_step(rounds=7, n=1280, bs=64):
    learn,rs = learner(n, bs, embed_dim=96, depth=6),[]
    def bare(): # schedules apart, all that Algorithm 1 asks of a step
        learn.create_opt()
        learn.model.phase = 'mix'
        learn.model.train()
        opt = learn.opt.opt
        for x,y in learn.dls.mix: step(learn, opt, x, y)()
        learn.model.phase = None
    for i in range(rounds+1):
        b = timed(bare)
        with learn.no_logging(): learn.fit_mixtraining(1, 1, rho=1)
        if i: rs.append(learn.mix.seconds['mix']/b)
    show(f'fit_mixtraining step / bare loop step, dim 96, 6 blocks, batch {bs}', rs, 'at most 1.05')

def whole_fit(rounds=5, n=192, bs=64):
    learn,rs = learner(n, bs),[]
    for i in range(rounds):
        t = []
        for rho in (0.5, 0):
            with learn.no_logging(): learn.fit_mixtraining(2, 2, rho=rho)
            t.append(sum(learn.mix.seconds.values()))
        rs.append(t[0]/t[1])
    show(f'MixTraining / (SSL then SL), training seconds, ViT-T, rho 0.5', rs, 'at most 0.80, limit 20/26 = 0.769')

def imports(rounds=5):
    code = 'import time; import fastai.vision.all; t = time.perf_counter(); import mixfast.all; print(time.perf_counter()-t)'
    run = lambda: float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout)
    run()
    show('seconds that import mixfast.all adds to fastai.vision.all', [run() for _ in range(rounds)], 'at most 0.5')

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, float32')
    imports(); mix_step(); fit_step(); whole_fit()
