"Two machines, as network namespaces of this one: they train as one, and one that is cut off is named"
import os, shutil, subprocess, sys, textwrap, time
import numpy as np, pandas as pd, pytest
pytest.importorskip('accelerate')

SCRIPT = textwrap.dedent('''
    import sys, time, torch
    from fastai.vision.all import *
    from fastai.distributed import *
    from mixfast.all import *
    from mixfast.callback import heartbeat
    heartbeat._SILENCE = 12 # seconds, for a minute is long in a test
    class Slow(Callback):
        only_watches = True
        def after_epoch(self): print('epoch', self.epoch, flush=True); time.sleep(float(sys.argv[1]))
    set_seed(0, reproducible=True)
    data = digits()
    dls = mix_dls([o[:120] for o in data.train], data.valid, vocab=data.vocab, bs=24//max(num_distrib(), 1), seed=0)
    learn = mix_learner(dls, 'vit_tiny_patch16_224', patch_size=2, embed_dim=32, depth=2, num_heads=2, objective='ae', metrics=accuracy, cbs=Slow())
    with learn.distrib_ctx(cpu=True), learn.no_bar(), learn.no_logging():
        learn.fit_mixtraining(3, 3, rho=0.5, recipe=Recipe(Hypers(1e-3), Hypers(1e-3)), checkpoint='run', resume=True)
    if rank_distrib()==0: learn.mix.history.to_csv('history.csv', index=False)
''')

def sh(cmd): subprocess.run(cmd, shell=True, check=True, capture_output=True)

@pytest.fixture
def hosts():
    "Names of two namespaces with a cable between them, at 10.77.0.1 and 10.77.0.2"
    if not shutil.which('ip') or os.geteuid()!=0: pytest.skip('network namespaces want root, and ip')
    names = [f'mix{os.getpid()}a', f'mix{os.getpid()}b']
    try:
        for n in names: sh(f'ip netns add {n}')
    except subprocess.CalledProcessError: pytest.skip('no network namespaces here')
    try:
        sh(f'ip link add va{os.getpid()} netns {names[0]} type veth peer name vb{os.getpid()} netns {names[1]}')
        for n,v,i in zip(names, 'ab', (1,2)):
            sh(f'ip -n {n} addr add 10.77.0.{i}/24 dev v{v}{os.getpid()} && ip -n {n} link set v{v}{os.getpid()} up && ip -n {n} link set lo up')
        yield names
    finally:
        for n in names: subprocess.run(f'ip netns pids {n} | xargs -r kill -9; ip netns del {n}', shell=True, capture_output=True)

def torchrun(rank, *cmd):
    return ['torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--node-rank', rank, '--master-addr', '10.77.0.1', '--master-port', '29511', *cmd]

def accelerate(rank, *cmd):
    return ['accelerate.commands.launch', '--multi_gpu', '--num_machines', '2', '--num_processes', '2', '--machine_rank', rank, '--main_process_ip', '10.77.0.1',
            '--main_process_port', '29511', '--mixed_precision', 'no', '--dynamo_backend', 'no', *cmd]

def start(host, rank, folder, *cmd, by=torchrun):
    "A command on a host"
    cmd = ['ip', 'netns', 'exec', host, sys.executable, '-m', *by(str(rank), *map(str, cmd))]
    env = os.environ | dict(OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME=f"v{'ab'[rank]}{os.getpid()}")
    return subprocess.Popen(cmd, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def history(folder):
    "Losses and accuracy of all epochs"
    return pd.read_csv(folder/'history.csv')[['train_loss','ssl_loss','sl_loss','valid_loss','accuracy']]

def same(a, b): np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)

def alone(folder):
    "The script by one process"
    done = subprocess.run([sys.executable, 'script.py', '0'], cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode==0, done.stderr
    return history(folder)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    def _make(name):
        d = tmp_path_factory.mktemp(name)
        (d/'script.py').write_text(SCRIPT)
        return d
    return _make

@pytest.fixture(scope='module')
def peace(folder): return alone(folder('peace'))

def ended(ps):
    outs = [p.communicate(timeout=300)[0] for p in ps]
    assert [p.returncode for p in ps]==[0,0], outs

def test_two_hosts_train_as_one(hosts, folder, peace):
    both = folder('both')
    ps = [start(h, r, both, 'script.py', 0) for r,h in enumerate(hosts)]
    ended(ps)
    same(history(both), peace)

def test_a_folder_of_photos_by_accelerate(hosts, photos, tmp_path):
    "`accelerate launch` on each of two hosts, and one command for all"
    args = ['mixfast-train', photos, *'--e-ssl 2 --e-sl 2 --rho 0.5 --size 16 --bs 16 --objective ae --device cpu --quiet --out run --cache cache'.split()]
    ended([start(h, r, tmp_path, '--no_python', *args, by=accelerate) for r,h in enumerate(hosts)])
    df = pd.read_csv(tmp_path/'run'/'history.csv')
    assert df.phase.tolist()==['ssl','mix','sl'] and df.valid_loss.notna().all()
    assert (tmp_path/'run'/'report.html').exists()

def test_one_is_cut_off(hosts, folder, peace):
    "The other says which within a minute, and the fit goes on on one host"
    d = folder('cut')
    ps = [start(h, r, d, 'script.py', 3) for r,h in enumerate(hosts)]
    for line in ps[0].stdout:
        if line.startswith('epoch 1'): break
    sh(f'ip -n {hosts[1]} link set vb{os.getpid()} down') # nothing is closed: there is no answer any more
    t = time.time()
    out = ps[0].communicate(timeout=120)[0]
    assert ps[0].returncode and time.time()-t<60-18 # 18 seconds less of silence than users have
    assert 'nothing has been heard of process 1 on' in out and '(10.77.0.2)' in out, out
    ps[1].kill()
    same(alone(d), peace)
