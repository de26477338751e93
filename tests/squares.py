"Experiments for jobs of a cluster, in a file that they import without torch"
import os, signal
from dataclasses import dataclass

@dataclass(frozen=True)
class Square:
    paper = 'squares'
    n:int

def run(folder, die, e, seed):
    "Leave a trace, and give a record; or be killed, as by the machine"
    with open(folder/f'{e.n}_{seed}', 'a') as f: f.write('.')
    if die and seed==1: os.kill(os.getpid(), signal.SIGKILL)
    return dict(paper='squares', exp=dict(n=e.n), seed=seed, scale='tiny', bf16=True, accuracy=e.n**2)
