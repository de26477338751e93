"""Gradient cosines of the paper's own ViT-T (12 blocks of 192 channels, 256 tokens), trained for a while: one epoch of SSL
and three of the mix phase on 10 % of CIFAR-10, batches of 64, which a CPU core does in less than an hour.

    python benchmarks/cosines.py ~/data --out experiments/cosines/vit_t.jsonl"""
from mixfast.cli import _quiet; _quiet() # before anything is imported that warns
from pathlib import Path
from fastcore.script import call_parse
from mixfast.paper.mixtraining import experiments
from mixfast.paper.mixtraining_runs import run_experiment
from mixfast.paper.records import add_record

@call_parse
def main(
    path:str, # Folder with the data sets
    out:str='experiments/cosines/vit_t.jsonl', # File for the record
):
    "Train, and append the record with its cosines"
    e = experiments(1, 'cifar10', 'vit_t', 10, 'mix').exp.item()
    r = run_experiment(e, 0, path, 'paper', hold_out=500, dls=dict(bs=64), fit=dict(e_ssl=4, e_sl=3, rho=1.))
    add_record(Path(out), r)
