"Runs as jobs of a cluster, by submitit's local executor: a worker that is killed, nothing run twice, nothing lost"
import os
from functools import partial
import pytest
from mixfast.all import DeadJobs, on_cluster
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
