"""What `mixfast-train` and `mixfast-predict` add to the training and to the model: seconds to the first step, a fit by the command
beside the same in Python, images a second beside those of the bare model. Decode the folder once before: run it twice.

    python benchmarks/command.py ~/photos        # class folders; prints a line for each"""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
import os, statistics, time
from contextlib import redirect_stdout
from pathlib import Path
from subprocess import run
from sys import executable
from tempfile import TemporaryDirectory
import psutil, torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
import mixfast.train.run as train_run
from mixfast.train.core import _leave
from mixfast.train.job import JobSettings, prepare
from mixfast.train.predict import predict_folder
from mixfast.train.saved import load_trained

class Leave(Callback):
    "End the process at the first step, with the seconds since it began"
    order = -100
    def after_batch(self):
        print(time.time()-psutil.Process().create_time(), flush=True)
        os._exit(0)

def first_step(photos, out):
    "Seconds from the start of a process to the end of its first training step"
    code = f"from command import *; train_run.train_job(settings({photos!r}), {out!r}, cbs=Leave(), bar=False, say=len)"
    return float(run([executable, '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout)

def settings(photos): return JobSettings(photos, e_ssl=1, e_sl=1, rho=0.5, device='cpu')

def in_python(s):
    "Seconds of a fit"
    job = prepare(s, bar=False)
    t = time.perf_counter()
    with job.learn.no_bar(), job.learn.no_logging():
        job.learn.fit_mixtraining(s.e_ssl, s.e_sl, s.rho, recipe=train_run._rates(job))
    return time.perf_counter()-t

def by_command(s, out):
    "Seconds of the same fit as `mixfast-train` runs it, with a bar and checkpoints; its job"
    trained,t = train_run._trained,[]
    def timed(*args):
        t.append(time.perf_counter())
        res = trained(*args)
        t.append(time.perf_counter())
        return res
    train_run._trained = timed
    try:
        with open(os.devnull, 'w') as f, redirect_stdout(f): job = train_run.train_job(s, out, say=len)
    finally: train_run._trained = trained
    return t[1]-t[0], job

def images_a_second(f, n):
    t = time.perf_counter()
    f()
    return n/(time.perf_counter()-t)

@torch.inference_mode()
def bare(m, x):
    for _ in range(16): m(x)

@call_parse
def main(
    photos:str, # Class folders
    rounds:int=3, # Of each measurement; by turns where two are compared
):
    "Measure, and print medians"
    photos = str(Path(photos).expanduser())
    with TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        secs = [first_step(photos, str(tmp/str(i))) for i in range(rounds)]
        print(f'first step after {statistics.median(secs):.1f} s ({min(secs):.1f} to {max(secs):.1f})', flush=True)
        s,ratios = settings(photos),[]
        for i in range(rounds):
            secs = in_python(s)
            other,job = by_command(s, tmp/f'fit{i}')
            ratios.append(other/secs)
        print(f'fit by the command beside Python: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})', flush=True)
        _leave(job, run_ := tmp/'fit0')
        m,about = load_trained(run_/'classifier', 'cpu')
        x,n,ratios = torch.randn(64, 3, *about['size']),len(job.found),[]
        for _ in range(rounds):
            one = images_a_second(lambda: bare(m, x), 16*64)
            ratios.append(images_a_second(lambda: predict_folder(run_, photos, device='cpu', bar=False), n)/one)
        print(f'mixfast-predict beside the bare model ({one:.0f} images a second, {torch.get_num_threads()} threads): '
              f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})')
