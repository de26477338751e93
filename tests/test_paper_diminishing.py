"The grid of diminishing returns: steps that runs share, an interruption, processes, commands"
import json
import numpy as np, pytest, torch
from conftest import Die
from mixfast.paper import diminishing_runs as runs
from mixfast.paper.cli import main
from mixfast.paper.diminishing import Diminishing, diminishing_settings, mask_args, mask_dls
from mixfast.paper.records import read_records

def noise(name, path, px, n=None):
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (n or 60, px, px, 3), np.uint8)
    if name=='pets': return x, g.integers(0, 3, x.shape[:3], np.uint8), ['pet','background','border']
    return (x, g.integers(0, 6, len(x)), list('abcdef')) if name=='scenes' else x

E = Diminishing('scenes', 16, 16)
def backbone(out): return runs.prepared_backbone(E, 0, '.', out, 'tiny', False, noise)

def test_a_shared_step_goes_on(tmp_path, monkeypatch):
    "Killed in the middle, it ends with the weights of one that was not; what it cost is told by all who use it"
    whole,cost = backbone(tmp_path/'whole')
    quietly = runs._quietly
    def dies(learn, fit, **kwargs): quietly(learn, fit, **kwargs, cbs=[Die(3)])
    monkeypatch.setattr(runs, '_quietly', dies)
    with pytest.raises(RuntimeError, match='died'): backbone(tmp_path/'cut')
    monkeypatch.setattr(runs, '_quietly', quietly)
    again,_ = backbone(tmp_path/'cut')
    assert all(torch.equal(a, b) for a,b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    def never(*args, **kwargs): raise AssertionError('trained again')
    monkeypatch.setattr(runs, '_quietly', never)
    assert backbone(tmp_path/'whole')[1]==cost and set(cost)=={'ssl','scenes'}

def test_runs_in_processes(tmp_path):
    "Two at a time share a step, and come to what one after the other does"
    exps = diminishing_settings('tiny', n=[16], n_sl=[16])
    def scores(jobs, out):
        runs.reproduce(exps, '.', out, 2, 'tiny', False, jobs, noise, 'cpu', bar=False)
        return sorted((r['exp']['way'], r['seed'], r['miou']) for r in read_records(out, 'diminishing'))
    assert scores(2, tmp_path/'two')==scores(1, tmp_path/'one')
    assert len(list((tmp_path/'two'/'backbones').glob('*.safetensors')))==4 # two seeds, with scenes and without

def test_splits():
    "Nothing that is trained on is validated on; more masks hold the fewer; images held out are in neither split"
    def ids(x): return {o.tobytes() for o in x}
    def parts(n_sl, hold_out=0):
        dls = mask_dls(Diminishing('direct', 0, n_sl), 0, '.', 'tiny', noise, 'cpu', hold_out)
        return [ids(o.x.numpy()) for o in (dls.train_ds,dls.valid_ds)]
    (few,test),(many,same),(_,held) = parts(16),parts(32),parts(16, 10)
    assert few<many and test==same and not many&test and not held&test and not held&few and len(held)==10

def test_ways():
    "MixTraining takes as many supervised epochs as the others, half of them mixed"
    for way in ('direct','mix'):
        a = mask_args(Diminishing(way, 0, 100), 'small')
        assert a['e_sl']==40 and a['e_ssl']==20*(way=='mix') and a['rho']==(way=='mix')

def test_commands(tmp_path, capsys):
    "What is missing is said in words, before anything is trained"
    def says(*args):
        with pytest.raises(SystemExit) as e: main(['--paper','diminishing','--scale','tiny','--path',str(tmp_path),'--out',str(tmp_path/'out'),*args])
        return str(e.value.code) + capsys.readouterr().err
    assert 'annotations/trainval.txt is missing' in says()
    assert 'n_sl must be whole numbers of images from 1 up' in says('--n-sl','0')
    assert 'invalid choice' in says('--ways','never')
