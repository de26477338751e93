"""Kill a fit with SIGKILL again and again, resume it each time, and compare all of it with a fit that was left in peace:
weights, history and what the recorders hold, bit for bit.

    python benchmarks/kills.py --kills 60 --out experiments/kills.json

A child process trains; its parent, or a trap inside it, kills it: at a random moment, in a training step, in validation,
at the beginning of a phase, or while a checkpoint is being written (before its bytes are safe, before it has its name,
before the index has it)."""
import hashlib, json, os, random, shutil, signal, tempfile, time, warnings
from collections import Counter
from pathlib import Path

import numpy as np, torch
from fastcore.script import call_parse
from fastai.vision.all import Callback, ProgressCallback, accuracy, noop, set_seed
from mixfast.all import BatchFlip, Hypers, Recipe, device_name, mix_dls, mix_learner, package_versions

EPOCHS,RHO = (4,4),0.5 # two epochs of each phase
RECIPE = Recipe(ssl=Hypers(0.004, warmup=0.2), sl=Hypers(0.006, warmup=0.1))

def learner(seed=0):
    "A small learner with all that is random: shuffled unique images, flips, partners, masks, dropped paths"
    set_seed(seed, reproducible=True)
    rng = np.random.default_rng(0)
    data = lambda n: (rng.integers(0, 256, (n,8,8,1)).astype(np.uint8), np.arange(n)%3)
    dls = mix_dls(data(40), data(20), ssl=data(50)[0], bs=8, tfms=[BatchFlip()], ssl_tfms=[BatchFlip()])
    learn = mix_learner(dls, 'vit_tiny_patch16_224', patch_size=2, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.2, metrics=accuracy)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def digest(learn)->str:
    "A checksum of the weights, the history without its seconds, and the recorders"
    h,rec = hashlib.sha256(),learn.recorder
    for k,v in learn.model.state_dict().items(): h.update(k.encode()+v.numpy().tobytes())
    rows = learn.mix.history.drop(columns=['seconds','train_seconds']).to_json(double_precision=15)
    h.update(json.dumps([rows, rec.lrs, rec.iters, [o.item() for o in rec.losses], learn.mix.sched]).encode())
    return h.hexdigest()

class Trap(Callback):
    "Kill this process at the `n`-th `event`; 'validate' is a batch of validation, 'phase' the beginning of a phase"
    only_watches = True
    order = 2000
    def __init__(self, event, n): self.event,self.n = event,n
    def hit(self, event):
        self.n -= event==self.event
        if self.n==0: os.kill(os.getpid(), signal.SIGKILL)
    def after_batch(self): self.hit('step' if self.training else 'validate')
    def before_epoch(self):
        if self.epoch==self.phases.now.start: self.hit('phase')
    def before_fit(self):
        if not self.event.startswith('os.'): return
        name = self.event[3:]
        f = getattr(os, name)
        def trapped(*args, **kwargs):
            self.hit(self.event)
            return f(*args, **kwargs)
        setattr(os, name, trapped)

def fit(folder, trap=None, seed=0):
    "Fit, or resume from another seed: nothing comes from outside; and leave the digest in `folder`"
    learn = learner(seed if (Path(folder)/'checkpoints.json').exists() else 0)
    learn.fit_mixtraining(*EPOCHS, rho=RHO, recipe=RECIPE, checkpoint=folder, every_steps=3, resume=True, cbs=trap)
    (Path(folder)/'digest').write_text(digest(learn))

def child(f, kill_after=None)->bool:
    "Call `f` in a child process, and kill it after so many seconds. Did it end by itself?"
    pid = os.fork()
    if not pid:
        try: f()
        except BaseException as e: print(repr(e), flush=True); os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): raise RuntimeError('the fit failed')
    return not os.WIFSIGNALED(status)

def undisturbed()->tuple:
    "The digest of a fit that is not killed and writes no checkpoints, and the seconds of one that does"
    learn = learner()
    learn.fit_mixtraining(*EPOCHS, rho=RHO, recipe=RECIPE)
    with tempfile.TemporaryDirectory() as d:
        t = time.perf_counter()
        child(lambda: fit(d))
        return digest(learn),time.perf_counter()-t

EVENTS = 'random','step','validate','phase','os.fsync','os.replace'
N = dict(step=32, validate=6, phase=4) # traps lie before the n-th

def until_done(rng, secs, events=EVENTS)->list:
    "Kill and resume until a fit ends: its kills, and its digest"
    folder,kills = tempfile.mkdtemp(),[]
    try:
        while True:
            event = rng.choice(events) if len(kills)<8 else None
            seed = rng.randrange(1000)
            if event=='random': done = child(lambda: fit(folder, seed=seed), rng.uniform(0, secs))
            else: done = child(lambda: fit(folder, event and Trap(event, rng.randrange(1, N.get(event, 40))), seed))
            if done: return kills,(Path(folder)/'digest').read_text()
            kills.append(event)
    finally: shutil.rmtree(folder)

@call_parse
def main(
    kills:int=60, # At least so many
    seed:int=0, # Of the moments
    out:str='experiments/kills.json', # File for the result
):
    "Kill fits and compare what they end with"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    rng,count,fits,same = random.Random(seed),Counter(),0,0
    want,secs = undisturbed()
    while sum(count.values())<kills:
        k,got = until_done(rng, secs)
        count.update(k)
        fits += 1
        same += got==want
        print(f'{fits} fits, {sum(count.values())} kills, {same} fits identical', flush=True)
    res = dict(fits=fits, identical=same, kills=sum(count.values()), by_place=dict(count), seed=seed,
               device=device_name(torch.device('cpu')), versions=package_versions(), date=time.strftime('%Y-%m-%d'))
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
