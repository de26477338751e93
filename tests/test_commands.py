"Commands as a user sees them: what reaches the terminal, what Ctrl-C leaves behind; fits in processes of their own"
import os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, psutil, pytest, torch

import mixfast.insight.parallel as parallel
from mixfast.all import accuracy, compare_methods, mix_dls, mix_learner
from mixfast.paper.mixtraining_runs import reproduce
from mixfast.paper.records import missing_runs, new_record, read_records, run_missing
from conftest import HOT, TINY, images
from test_paper import E10, fake

root = Path(__file__).resolve().parents[1]
env = {k:v for k,v in os.environ.items() if k!='PYTHONWARNINGS'} | {'OMP_NUM_THREADS':'1'}

def command(name, *args, cwd):
    "A command whose output is a pipe"
    return subprocess.run([Path(sys.executable).parent/f'mixfast-{name}', *args], cwd=cwd, env=env, capture_output=True, text=True)

def test_demo_in_a_pipe(tmp_path):
    "No warning of a dependency, neither from here nor from its processes; a line a run, no bar"
    r = command('demo', '--epochs', '1', '--seeds', '1', '--jobs', '2', cwd=tmp_path)
    assert (r.returncode, r.stderr)==(0, '')
    lines = [o for o in r.stdout.splitlines() if ' seed 0  accuracy ' in o]
    assert sorted(o.split()[0] for o in lines)==['MixTraining','SL','SSL+SL'] and all(o.endswith(' s') for o in lines)
    assert '\r' not in r.stdout and len(r.stdout.splitlines()) < 20
    runs = pd.read_csv(tmp_path/'mixfast-demo'/'runs.csv')
    assert runs.method.tolist()==['SL','SSL+SL','MixTraining'] and (tmp_path/'mixfast-demo'/'demo.png').exists()

def test_bar_in_a_terminal(monkeypatch, capsys):
    "A bar where it can move, a line a run where it cannot; results pass in any case"
    for terminal in (True, False):
        monkeypatch.setattr(parallel, '_looked_at', lambda: terminal)
        assert list(parallel._watched(iter('abc'), 3, lambda o: f'{o} is done'))==[*'abc']
        out = capsys.readouterr().out
        assert ('[3/3' in out and 'done' not in out) if terminal else out=='a is done\nb is done\nc is done\n'

@pytest.mark.parametrize('name,args,out,err', [
    ('reproduce', ['--table','1','--dataset','cifar10','--scale','tiny','--path','none'], 'runs are missing at scale tiny', 'mixfast-reproduce: no CIFAR10 in'),
    ('report', ['.'], 'report.md', ''),
    ('bench', ['--rounds','0'], '', 'mixfast-bench: rounds must be 1 or more, got 0')])
def test_no_warnings(tmp_path, name, args, out, err):
    "What is wrong is a line, and nothing else is on stderr"
    shutil.copy(root/'experiments'/'small'/'small.jsonl', tmp_path)
    r = command(name, *args, cwd=tmp_path)
    assert out in r.stdout and r.stderr.startswith(err) and r.stderr.count('\n')==bool(err)

SLOW = '''
import os, time
from mixfast.insight.parallel import _in_processes
def wait(f):
    open(f, 'w').close()
    time.sleep(300)
def main(): list(_in_processes(wait, [(f'{i}.began',) for i in range(2)], jobs=2, device='cpu'))
'''
@pytest.mark.parametrize('tell,sig,code', [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)])
def test_stopped(tmp_path, tell, sig, code):
    "All processes end, whether a terminal tells each of them or a scheduler the first"
    (tmp_path/'slow.py').write_text(SLOW)
    ours = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell that runs the tests in the background ignores it
from mixfast.cli import _command
_command('slow', lambda m: m.main())"""
    cmd = [sys.executable, '-c', ours]
    p = subprocess.Popen(cmd, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True)
    try:
        for _ in range(1200):
            if len(list(tmp_path.glob('*.began')))==2 or p.poll() is not None: break
            time.sleep(0.05)
        children = psutil.Process(p.pid).children(recursive=True)
        assert len(children)>=2
        tell(p.pid, sig)
        out,err = p.communicate(timeout=30)
        assert (p.returncode, err)==(code, '')
        _,alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)

def test_in_processes(tmp_path):
    "The same table whatever process made a row; a learner of closures and large arrays"
    x,y = images(24)
    large = np.zeros((2**21,), np.uint8)
    def new(seed):
        large[0] = seed # its own to write to
        dls = mix_dls((x,y), images(9, seed=1), bs=8)
        return mix_learner(dls, metrics=accuracy, path=tmp_path, **TINY)
    def after(learn, row): (tmp_path/f"{row['method']}{row['seed']}").write_text(f'{os.getpid()} {torch.get_num_threads()}')
    args = dict(e_ssl=1, e_sl=1, rho=1., seeds=2, recipe=HOT, bar=False)
    one,two = compare_methods(new, **args),compare_methods(new, jobs=2, after=after, save=tmp_path/'runs.csv', **args)
    assert one.drop(columns='seconds').equals(two.drop(columns='seconds')) and len(pd.read_csv(tmp_path/'runs.csv'))==6
    told = [(tmp_path/f'{m}{s}').read_text().split() for m,s in zip(two.method, two.seed)]
    assert {t for _,t in told}=={'1'} and str(os.getpid()) not in {p for p,_ in told}

def test_reproduce_in_processes(tmp_path, capsys):
    "Each run once, as one process does it; a line for each"
    args = dict(path='', seeds=1, scale='tiny', load=fake, device='cpu')
    exps = [E10['sl'], E10['mix']]
    two,one = reproduce(exps, out=tmp_path/'two', jobs=2, **args),reproduce(exps, out=tmp_path/'one', bar=False, **args)
    order = lambda recs: sorted((r['exp']['method'], r['accuracies']) for r in recs)
    assert order(two)==order(one)==order(read_records(tmp_path/'two')) and capsys.readouterr().out.count(', seed 0  accuracy ')==2
    assert reproduce(exps, out=tmp_path/'two', jobs=2, **args)==[]

def test_errors_of_processes(tmp_path):
    "As they were raised; what was done has its record, what failed has no lock"
    def load(name, path):
        if name=='cifar100': raise ValueError('no cifar100 there')
        return fake(name, path)
    lost = replace(E10['sl'], sl_data='cifar100')
    def run(e, seed):
        load(e.sl_data, '')
        return new_record(e, seed, 'tiny', accuracy=0.5)
    with pytest.raises(ValueError, match='no cifar100 there'): run_missing([E10['sl'], lost], run, tmp_path, 1, 'tiny', jobs=2, device='cpu')
    assert missing_runs([lost], 1, tmp_path, 'tiny')==[(lost,0)]
    with pytest.raises(ValueError, match='no cifar100 there'): run_missing([lost], run, tmp_path, 1, 'tiny')
    with pytest.raises(ValueError, match='a learner with a metric'):
        compare_methods(lambda s: mix_learner(mix_dls(images(24), bs=8), **TINY), 1, 1, seeds=1, jobs=2, bar=False)
    with pytest.raises(ValueError, match='jobs must be a whole number from 1 up, got -1'): compare_methods(None, 1, 1, jobs=-1)
