"Runs as jobs of a cluster, by submitit's local executor: a worker that is killed, nothing run twice, nothing lost"
import os, signal
from functools import partial
import pytest
from fastai.callback.core import Callback
from mixfast.all import DeadJobs, on_cluster
from mixfast.insight import advise
from mixfast.paper.records import missing_runs, read_records, run_missing
from squares import Square, run
pytest.importorskip('submitit')

def test_a_killed_worker(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.path.dirname(__file__)) # jobs import squares.py
    (traces := tmp_path/'traces').mkdir()
    call = partial(run_missing, [Square(2), Square(3)], out=tmp_path/'out', seeds=2, scale='tiny')
    with on_cluster('local', tmp_path/'jobs', timeout_min=5):
        with pytest.raises(DeadJobs, match='2 of 4 jobs have ended without a result, their logs are in'): call(run=partial(run, traces, True))
        assert len(read_records(tmp_path/'out'))==2 # those that ended are there
        new = call(run=partial(run, traces, False))
    assert sorted((r['exp']['n'], r['seed']) for r in new)==[(2,1),(3,1)]
    assert missing_runs([Square(2), Square(3)], 2, tmp_path/'out', 'tiny')==[] and len(read_records(tmp_path/'out'))==4
    assert {f.name: len(f.read_text()) for f in traces.iterdir()}=={'2_0':1, '3_0':1, '2_1':2, '3_1':2} # none of those that ended ran again
    assert not list((tmp_path/'out').glob('locks/*'))

class KilledOnce(Callback):
    "The first SSL step of a job without a mix phase is its end, as by the machine, but once only; each fit leaves a trace"
    only_watches = True
    def __init__(self, folder): self.folder = folder
    def before_fit(self):
        with open(self.folder/str(self.phases.plan.rho), 'a') as f: f.write('.')
    def after_batch(self):
        if self.phases.plan.rho or (self.folder/'killed').exists(): return
        (self.folder/'killed').touch()
        os.kill(os.getpid(), signal.SIGKILL)

def test_pilots(make, tmp_path, monkeypatch):
    "Those of a round are jobs; one that is killed is run again, the other is not, and the fit goes on from the winner's weights"
    monkeypatch.setenv('PYTHONPATH', os.path.dirname(__file__))
    monkeypatch.setattr(advise, '_narrowed', lambda learn, dls, t, methods, *_, **__: (list(methods), []))
    learn = make(cbs=KilledOnce(tmp_path))
    args = dict(minutes=0.05, methods={'SSL+SL': dict(rho=0.), 'MixTraining': dict(rho=0.5)}, checkpoint=tmp_path/'run')
    with on_cluster('local', tmp_path/'jobs', timeout_min=5):
        with pytest.raises(DeadJobs, match='1 of 2 jobs have ended without a result'): learn.fit_best(**args)
        learn.fit_best(**args, resume=True)
    assert sorted(learn.mix.advice.method)==['MixTraining','SSL+SL'] and learn.mix.history.accuracy.notna().any()
    traces = {o: len((tmp_path/o).read_text()) for o in ('0.0','0.5')}
    want = {'0.0':2, '0.5':1}
    want['0.5' if learn.mix.chosen['method']=='MixTraining' else '0.0'] += 1 # the winner was trained in the end
    assert traces==want
