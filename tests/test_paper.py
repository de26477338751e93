"Experiments: what is run, what is kept when a run is killed, what the report says"
import json, re, signal, subprocess, sys, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest
from fastai.callback.core import Callback

import mixfast.paper.cli as cli
import mixfast.paper.mixtraining as ex
import mixfast.paper.mixtraining_runs as runs
import mixfast.paper.records as records
import mixfast.paper.running as running
from mixfast.data.datasets import ImageData, fraction
from mixfast.insight.machine import source_commit
from mixfast.model import plain_model
from mixfast.paper.cli import main, report_main
from mixfast.paper.mixtraining import Experiment, experiment_args, experiment_dls, experiment_learner, experiments, paper_tables, vary
from mixfast.paper.mixtraining_results import comparisons, paper_layout, plot_parameter, results, write_report
from mixfast.paper.mixtraining_runs import estimate, reproduce, run_experiment
from mixfast.paper.records import add_record, missing_runs, read_records, record_id
from mixfast.schedule import recipes

E10 = {e.method:e for e in experiments(1, 'cifar10', 'vit_t', 10).exp}

def fake(name, path, n=300, size=None):
    "Random images in place of an archive"
    size = size or (64 if name=='tinyimagenet' else 32)
    rng = np.random.default_rng(len(name))
    x = rng.integers(0, 256, (n,size,size,3)).astype(np.uint8)
    return ImageData((x, np.arange(n)%10), (x[:20], np.arange(20)%10), [str(i) for i in range(10)])

def record(e, seed=0, scale='paper', accuracy=0.5, seconds=10., device='d', bf16=True):
    return dict(exp=asdict(e), seed=seed, scale=scale, accuracy=accuracy, train_seconds=seconds, device=device, bf16=bf16)

def test_paper_tables_are_those_of_the_paper():
    t = paper_tables()
    shared = Path(__file__).resolve().parents[2]/'shared'/'paper'/'mixtraining_tables.csv'
    if shared.exists(): assert t.equals(pd.read_csv(shared))
    f = lambda **kw: t[np.logical_and.reduce([t[k]==v for k,v in kw.items()])]
    assert f(table=1, sl_data='tinyimagenet', method='mix', p=100).accuracy.item() - f(table=1, sl_data='tinyimagenet', method='ssl_sl', p=100).accuracy.item() == pytest.approx(8.81, abs=0.01)

def test_every_figure_is_an_experiment():
    "Settings survive: no two rows of one table are the same experiment"
    df = experiments()
    assert len(df)==312
    for t,g in df.groupby('table'): assert g.exp.nunique()==len(g), t
    for e in set(df.exp):
        a = experiment_args(e)
        assert a['e_ssl']==e.e_ssl and (e.method=='mix')==(e.rho>0) and (e.method=='sl')==(e.e_ssl==0) and bool(a['cbs'])==e.mixup
    kinds = [sum(getattr(e, k)!=v for e in set(df.exp)) for k,v in (('alpha_sched',''), ('semi',False), ('noise',0), ('mixup',False))]
    assert kinds==[10,3,15,10], kinds
    assert {e.ssl_data for e in experiments(3, methods='mix').exp}=={'tinyimagenet'}

def test_dls_of_each_kind():
    "Fractions, noise, semi-supervised, cross-dataset; the same images for all methods of a seed"
    y = fake('cifar10', '').train[1]
    dls = {m: experiment_dls(e, 3, '', load=fake, device='cpu') for m,e in E10.items()}
    for d in dls.values(): assert d.train_ds.y.tolist()==y[fraction(y, 10, 3)].tolist() and d.mix is d.sl and len(d.valid_ds)==20
    noise = experiment_dls(replace(E10['mix'], p=100, noise=0.2), 3, '', load=fake, device='cpu').train_ds.y.numpy()
    assert 0.1 < (noise!=y).mean() < 0.3
    semi = experiments(8).exp
    for e in semi:
        d = experiment_dls(e, 3, '', load=fake, device='cpu')
        assert len(d.train_ds)==150 and len(d.ssl.dataset)==(150 if e.method=='sl' else 300) # SSL has the labelled ones too
    cross = experiment_dls(next(e for e in experiments(3, 'cifar10', methods='mix').exp), 3, '', load=fake, device='cpu')
    assert cross.ssl.dataset.shape==(32,32,3) and cross.mix is not cross.sl and len(cross.sl.after_batch.fs[0].tfms)==2
    assert len(experiment_dls(replace(E10['sl'], sl_data='tinyimagenet'), 3, '', load=fake, device='cpu').sl.after_batch.fs[0].tfms)==3

def test_the_papers_models():
    "ViT-T of 192 x 12 with 256 tokens on either size, ResNet-18"
    for name,p in (('cifar10',2), ('tinyimagenet',4)):
        e = replace(E10['mix'], sl_data=name)
        bb = experiment_learner(e, experiment_dls(e, 0, '', load=fake, device='cpu')).model
        assert (bb.embed_dim, len(bb.blocks), bb.patch_embed.patch_size, bb.patch_embed.num_patches)==(192, 12, (p,p), 256)
        assert experiment_args(e)['recipe']==recipes['vit_t' if p==2 else 'vit_t_tinyimagenet']
    e = replace(E10['mix'], model='resnet18')
    assert len(experiment_learner(e, experiment_dls(e, 0, '', load=fake, device='cpu')).model.layer4)==2

def test_held_out_images_are_not_trained_on():
    "Images to choose by come from what the fraction leaves aside, the same for all methods; the test split is not touched"
    d = ImageData((np.arange(200, dtype=np.uint8).reshape(-1,1,1,1).repeat(8, 1).repeat(8, 2).repeat(3, 3), np.arange(200)%10),
                  (np.full((20,8,8,3), 255, np.uint8), np.arange(20)%10), [str(i) for i in range(10)])
    ids = lambda ds: set(ds.x[:,0,0,0].tolist()) if ds.x.ndim==4 else set(ds.x.flatten(1)[:,0].tolist())
    got = [experiment_dls(e, 5, '', load=lambda *_: d, device='cpu', hold_out=50) for e in E10.values()]
    assert len({frozenset(ids(o.valid_ds)) for o in got})==1 and len(ids(got[0].valid_ds))==50
    for o in got: assert not ids(o.valid_ds) & (ids(o.train_ds) | ids(o.ssl.dataset)) and 255 not in ids(o.valid_ds)
    semi = experiment_dls(next(e for e in experiments(8, methods='mix').exp), 5, '', load=lambda *_: d, device='cpu', hold_out=50)
    assert not ids(semi.valid_ds) & ids(semi.ssl.dataset) and ids(semi.train_ds) < ids(semi.ssl.dataset) and len(semi.ssl.dataset)==150
    with pytest.raises(ValueError, match='hold_out=50, but p=100 leaves 0'):
        experiment_dls(replace(E10['sl'], p=100), 5, '', load=lambda *_: d, device='cpu', hold_out=50)

def test_scale_keeps_the_rates():
    "Batches of 64 at the rates of 256; epochs as the scale says; the paper's experiment otherwise"
    paper,small = experiment_args(E10['mix']),experiment_args(E10['mix'], 'small')
    assert paper['recipe']==recipes['vit_t'] and (small['e_ssl'],small['e_sl'],small['rho'])==(20,20,0.5)
    dls = experiment_dls(replace(E10['mix'], p=100), 0, '', 'small', load=fake, device='cpu')
    learn = experiment_learner(E10['mix'], dls, 'small', bf16=False)
    assert small['recipe'].sl.lr*dls.bs/256==paper['recipe'].sl.lr and learn.dls.bs==64
    assert learn.model.embed_dim==64 and learn.model.patch_embed.patch_size==(4,4)

def test_run_and_records(tmp_path):
    args = dict(path='', out=tmp_path, scale='tiny', load=fake, device='cpu', bar=False)
    new = reproduce([E10['mix'], replace(E10['sl'], mixup=True)], seeds=2, **args)
    assert len(new)==4 and read_records(tmp_path)==json.loads(json.dumps(new))
    r = new[0]
    assert r['accuracy']==r['accuracies'][-1] and r['accuracies'][0] is None and r['train_seconds']==sum(r['seconds'].values()) <= r['total_seconds']
    assert {'seed','scale','peak_bytes','commit','versions','device','phases','exp','n_train'} <= r.keys() and r['peak_bytes'] > 1e8
    assert list(r['cosines'])==['epoch','ssl_sl','ssl_mix','sl_mix'] and len(r['cosines']['epoch'])==1 and new[1]['cosines']['epoch']==[]
    assert r['settings']['e_ssl']==2 and r['settings']['bs']==64 and r['settings']['vit']['embed_dim']==32 and r['settings']['recipe']['sl']['wd']==0.05
    assert all(r['seconds'][k] <= v for k,v in r['total_by_phase'].items()) and sum(r['total_by_phase'].values()) <= r['total_seconds']
    again = run_experiment(E10['mix'], 0, '', 'tiny', load=fake, device='cpu')
    assert again['accuracies']==r['accuracies'] # a run is what its settings and its seed say
    assert reproduce([E10['mix']], seeds=2, **args)==[] and len(reproduce([E10['mix']], seeds=3, **args))==1
    assert len(missing_runs([E10['mix']], 3, tmp_path, 'tiny', bf16=False))==3 # another precision is another run

def test_something_else_than_the_experiment_says():
    "To compare choices: other loaders, model and fit, on images held out; the record says what was run"
    seen = []
    class Look(Callback):
        def before_fit(self): seen.append((len(self.dls.valid_ds), self.dls.bs, plain_model(self.learn).global_pool))
    change = dict(hold_out=30, dls=dict(bs=8), learn=dict(global_pool='avg', class_token=False), fit=dict(rho=1.))
    r = run_experiment(E10['mix'], 0, '', 'tiny', load=fake, device='cpu', cbs=[Look()], **change)
    assert seen==[(30,8,'avg')] and set(r['phases'])=={'mix'} and r['settings']['rho']==1 and r['exp']==asdict(E10['mix'])

def test_commit_is_mixfasts_or_none(tmp_path, monkeypatch):
    "Without git, in somebody else's repository, or in one without a commit there is none"
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path/'__init__.py').touch()
    assert source_commit(tmp_path)==''
    git('init', '-q'); (tmp_path/'other').touch(); git('add', 'other')
    assert source_commit(tmp_path)==''
    git('add', '.')
    assert source_commit(tmp_path)==''
    git('commit', '-qm', 'one')
    assert len(source_commit(tmp_path))>=7
    monkeypatch.setenv('PATH', '')
    assert source_commit(tmp_path)==''

def test_estimate(monkeypatch):
    "Images of each phase, and validation of the supervised epochs at a third of an SL step; a kind of model is timed once"
    timed = []
    monkeypatch.setattr(runs, '_image_seconds', lambda learn, budget: (timed.append(budget), (dict(ssl=3., mix=4., sl=6.), 8))[1])
    args = dict(path='', scale='tiny', load=lambda n,p: fake(n, p, n=600), device='cpu') # 60 of 600 images; 20 to validate on
    got = estimate([(E10['mix'],0), (E10['mix'],1), (E10['sl'],0)], **args)
    assert got==([60*(3+4+6)+2*20*2]*2+[60*2*6+2*20*2], 'steps of 8 images') and timed==[runs._BUDGET]
    semi = experiments(8, methods='mix').exp.iloc[0] # half of 600 labelled, SSL on at most 256 of tiny's labelled and all others
    assert runs._n_images(semi, '', 'tiny', args['load'])==dict(ssl=600, mix=256, sl=256, valid=20)
    assert len(estimate([(E10['mix'],0), (replace(E10['mix'], sl_data='tinyimagenet', ssl_data='tinyimagenet'),0)], **args)[0])==2
    assert timed[1:]==[runs._BUDGET/2]*2 # two sizes of image
    class Log(Callback):
        def after_batch(self):
            if not self.training: assert self.learn.phases.now.sl
    fit = run_experiment(E10['mix'], 0, cbs=[Log()], **args)
    assert fit['phases']==['ssl','mix','sl'] and fit['n_train']==60 and [a is None for a in fit['accuracies']]==[True,False,False]

def test_steps_that_are_timed(monkeypatch):
    "At the paper's scale few images a step on a slow machine; never more than the batch; seconds by image"
    clock,stepped = [0.],[]
    def steps(learn, bs):
        def f():
            stepped.append(bs)
            clock[0] += 0.25*bs
        return dict.fromkeys(('ssl','mix','sl'), f),None,None
    monkeypatch.setattr(running, '_steps', steps)
    monkeypatch.setattr(running, 'device_clock', lambda dev: clock[0])
    monkeypatch.setattr(runs.time, 'perf_counter', lambda: clock[0])
    dls = experiment_dls(replace(E10['mix'], p=100), 0, '', load=fake, device='cpu')
    learn = experiment_learner(E10['mix'], dls, 'tiny')
    assert runs._image_seconds(learn, 6.)==(dict.fromkeys(('ssl','mix','sl'), 0.25), 4) and stepped==[2]*3+[4]*3 and clock[0] < 6
    assert runs._image_seconds(learn, 1e9)[1]==learn.dls.bs==256

def test_the_fraction_is_of_the_whole_data_set(monkeypatch):
    "A quarter of TinyImageNet on the disk: 10 % are 10 % of all of it, and what it has not got is an error"
    monkeypatch.setitem(ex.DATASETS, 'tinyimagenet', lambda path: fake('tinyimagenet', path, n=100, size=8))
    monkeypatch.setitem(ex.DATASETS, 'cifar10', lambda path: fake('cifar10', path, n=100, size=8))
    monkeypatch.setattr(ex, 'N_TRAIN', dict(tinyimagenet=400, cifar10=100))
    ex._load.cache_clear()
    e = replace(E10['mix'], sl_data='tinyimagenet', ssl_data='tinyimagenet')
    assert len(experiment_dls(e, 0, 'a', device='cpu').train_ds)==40 and len(experiment_dls(replace(e, p=25), 0, 'a', device='cpu').train_ds)==100
    with pytest.raises(ValueError, match='p=50 of tinyimagenet is 200 training images, but there are 100'): experiment_dls(replace(e, p=50), 0, 'a', device='cpu')
    with pytest.raises(ValueError, match='p=100 of tinyimagenet'): experiment_dls(replace(E10['mix'], ssl_data='tinyimagenet'), 0, 'a', device='cpu')
    ex._load.cache_clear()

def test_missing_data_is_noticed_before_the_first_run(tmp_path):
    def load(name, path):
        if name=='cifar100': raise FileNotFoundError('no cifar100')
        return fake(name, path)
    exps = [E10['sl'], replace(E10['sl'], sl_data='cifar100')]
    with pytest.raises(FileNotFoundError): reproduce(exps, '', tmp_path, 1, 'tiny', load=load, device='cpu', bar=False)
    assert read_records(tmp_path)==[]

def test_vary():
    "A mix-ratio of 0 is SSL+SL, once; a schedule has no constant alpha"
    assert vary(E10.values(), rho=[0,0.5])==list(E10.values())
    sched = replace(E10['mix'], alpha_sched='linear')
    assert vary([sched], alpha=[0.1,0.9])==[sched] and [e.alpha for e in vary([E10['mix']], alpha=[0.1,0.9])]==[0.1,0.9]

@pytest.mark.parametrize('cut', [1, 30, 200])
def test_a_half_written_line(tmp_path, cut):
    f = tmp_path/'a.jsonl'
    recs = [record(E10['mix'], s) for s in range(3)]
    for i,r in enumerate(recs):
        add_record(f, r)
        if i==1: f.write_bytes(f.read_bytes()[:-cut])
    assert read_records(tmp_path)==([recs[0],recs[2]] if cut>1 else recs) and read_records(f)==read_records(tmp_path)
    f.write_bytes(f.read_bytes()+b'\xff\xfe{"exp"\n[1]\n5\n')
    assert len(read_records(f))==(2 if cut>1 else 3) and read_records(tmp_path/'none.jsonl')==[]
    assert [r['seed'] for r in read_records(tmp_path)] and record_id(recs[0], Experiment)!=record_id(recs[1], Experiment)

RUN = '''
import sys; sys.path.insert(0, sys.argv[2])
from test_paper import *
reproduce(list(E10.values()), '', sys.argv[1], 3, 'tiny', load=fake, device='cpu', bar=False)
'''
def test_killed_and_started_again(tmp_path):
    "Runs that were done stay, the one that was cut is run again, none twice"
    cmd = [sys.executable, '-W', 'ignore', '-c', RUN, tmp_path, Path(__file__).parent]
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if len(read_records(tmp_path))>=2 or p.poll() is not None: break
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL); p.wait()
    n = len(read_records(tmp_path))
    assert 2 <= n < 9
    subprocess.run(cmd, check=True, capture_output=True)
    ids = [record_id(r, Experiment) for r in read_records(tmp_path)]
    assert len(ids)==len(set(ids))==9

SHARE = RUN.replace("reproduce(list", "records.POLL = 0.2; reproduce(list")

def test_processes_share_a_table(tmp_path):
    "No run twice, none lost; those of a process that dies are taken over by the others"
    cmd = [sys.executable, '-W', 'ignore', '-c', SHARE, tmp_path, Path(__file__).parent]
    ps = [subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)]
    try:
        for _ in range(2400):
            if len(read_records(tmp_path))>=2: break
            time.sleep(0.05)
        ps[0].send_signal(signal.SIGKILL)
        assert [p.wait(timeout=240) for p in ps[1:]]==[0,0]
    finally:
        for p in ps: p.kill(); p.wait()
    recs = read_records(tmp_path)
    ids = [record_id(r, Experiment) for r in recs]
    assert len(ids)==len(set(ids))==9 and len((tmp_path/'tiny.jsonl').read_text().splitlines())==9

def test_report(tmp_path):
    "Means and spreads over seeds, wins as the paper counts, the paper's own figures; studies of our own; scales apart"
    recs = [record(E10['ssl_sl'], s, accuracy=a, seconds=20.) for s,a in enumerate((0.50,0.54))]
    cos = [dict(epoch=[50,51], ssl_sl=[s,0.1], ssl_mix=[0.7,0.7], sl_mix=[0.5,0.5]) for s in (0.1,0.3)]
    recs += [record(E10['mix'], s, accuracy=a, seconds=15.) | dict(cosines=c) for (s,a),c in zip(enumerate((0.56,0.60)), cos)]
    recs += [record(replace(E10['mix'], rho=r), accuracy=0.4+r/5, seconds=25.) for r in (0.25,1.)] + [record(E10['mix'], scale='small', accuracy=0.1)]
    recs += [recs[0]] # written twice: counts once
    for r in recs: add_record(tmp_path/'a.jsonl', r)
    res = results(read_records(tmp_path))
    m = res[(res.table==1)&(res.method=='mix')&(res.scale=='paper')].iloc[0]
    assert m.ours==pytest.approx(58) and m['std']==pytest.approx(8**0.5) and m.seconds==15 and m.runs==2 and m.accuracy==60.45
    assert m.ssl_sl==pytest.approx(0.15) and m.ssl_mix==pytest.approx(0.7) # mean over steps, then over seeds
    c = comparisons(res).query("table==1").iloc[0]
    assert c.win and c.gain==pytest.approx(6) and c.speedup==pytest.approx(4/3) and c.paper_gain==pytest.approx(60.45-56.79)
    study = comparisons(res).query("table==0")
    assert dict(zip(study.method.str.split('rho ').str[1], study.win))=={'0.25':False, '0.5':True, '1':False}
    text = re.sub(' +', ' ', write_report(tmp_path).read_text()) # columns are padded
    assert '58.00 ± 2.83 (60.45)' in text and '| 10.00 (60.45) |' in text # one run has no spread
    assert "scale small" in text and 'in 1 of 1; the paper\'s in 1 of 1' in text and 'runs: 1 to 2.' in text and '| 0.150 | 0.700 | 0.500 |' in text
    assert '| cifar10 | 20 | MixTraining' in text and '| cifar10 | 100 | MixTraining' in text # the epochs that were run
    t = text[text.index('## Table 1'):]
    assert t.index('| SSL+SL |') < t.index('| MixTraining') and '15.0 (' in text and 'nan' not in text
    assert text.count('58.00 ± 2.83')==2 and 'All runs of tables 10, 11, 14 are shown above.' in text # in Table 1 and with the study
    html = (tmp_path/'report.html').read_text()
    assert '58.00 ± 2.83 (60.45)' in html and all((tmp_path/o.split('"')[0]).exists() for o in html.split('src="')[1:])
    with pytest.raises(ValueError, match='no records'): write_report(tmp_path/'none')
    with pytest.raises(ValueError, match='no records of table 8'): write_report(tmp_path, table=8)

def test_what_is_not_alike_is_not_compared():
    "Devices, precisions, label noise, other SSL data: neither averaged nor set against one another"
    noisy = {e.method:e for e in experiments(9, p=10).exp}
    cross = [e for e in experiments(3, 'cifar10').exp if e.method!='sl']
    recs = [record(e, accuracy=a) for e,a in ((E10['ssl_sl'],0.5), (E10['mix'],0.6), (noisy['ssl_sl'],0.2), (noisy['mix'],0.1))]
    recs += [record(replace(e, rho=0.25), accuracy=a) for e,a in ((E10['mix'],0.4), (noisy['mix'],0.3), (cross[1],0.7))] + [record(cross[0], accuracy=0.8)]
    recs += [record(E10['mix'], 1, accuracy=0.9, device='other', seconds=1.), record(E10['mix'], accuracy=0.9, bf16=False)]
    res = results(recs)
    assert len(res[(res.table==1)&(res.method=='mix')])==3 and (res.runs==1).all() # three machines
    c = comparisons(res[res.table==0])
    gains = {(d,m.split(', ',1)[1]): g for d,m,g in zip(c.data, c.method, c.gain)}
    want = {('cifar10','alpha 0.5, rho 0.25'):-10, ('cifar10','alpha 0.5, rho 0.5'):10, ('cifar10','alpha 0.5, rho 0.25, label noise 0.2'):10,
            ('cifar10','alpha 0.5, rho 0.5, label noise 0.2'):-10, ('tinyimagenet → cifar10','alpha 0.5, rho 0.25'):-10}
    assert gains==pytest.approx(want) and set(c.machine)=={'d, bfloat16'}
    g = res[(res.table==0)&(res.machine=='d, bfloat16')]
    lines = [o for o in plot_parameter(g, 'rho').get_legend().get_texts()]
    assert sorted(o.get_text() for o in lines)==['cifar10 10 %', 'cifar10 10 %, label noise 0.2', 'tinyimagenet → cifar10 100 %']
    assert len(paper_layout(g))==len(set(g.exp.map(lambda e: (e.ssl_data, e.noise, e.method, e.rho)))) # no row swallows another

def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ex.DATASETS, 'cifar10', lambda path: fake('cifar10', path))
    monkeypatch.setitem(ex.N_TRAIN, 'cifar10', 300)
    ex._load.cache_clear()
    args = '--table 1 --dataset cifar10 --model vit_t --p 10 --scale tiny --seeds 1 --out'.split()+[str(tmp_path)]
    main(args+['--dry-run'])
    out = capsys.readouterr().out
    assert out.count('cifar10 10 %, vit_t')==3 and '2 + 2 epochs' in out and not list(tmp_path.iterdir())
    assert re.search(r"3 runs at scale tiny\none after the other 0.0 hours, 0.0 to 0.0 minutes each: an estimate, from steps of \d+ images on this machine", out)
    main(args+['--methods','mix','--rho','0.5','1','--jobs','1'])
    assert capsys.readouterr().out.count('accuracy')==2 # a line a run
    assert sorted(r['exp']['rho'] for r in read_records(tmp_path))==[0.5,1.]
    report_main([str(tmp_path)])
    assert (tmp_path/'report.md').exists()
    for bad,msg in ((['--table','12'], 'table must be one of'), (['--rho','2'], r'rho must lie in'), (['--table','8','--p','10'], 'p must be one of')):
        with pytest.raises(SystemExit, match=f'mixfast-reproduce: .*{msg}'): main(bad)
    with pytest.raises(SystemExit, match='mixfast-report: .*no records'): report_main([str(tmp_path/'none')])
    def slow(*args): print(capsys.readouterr().out.count('seed'), 'runs were listed'); return [60.]*3,'a guess'
    monkeypatch.setitem(cli.PAPERS, 'mixtraining', replace(cli.PAPERS['mixtraining'], estimate=slow))
    main(args[:-1]+[str(tmp_path/'new'),'--dry-run'])
    assert capsys.readouterr().out.startswith('3 runs were listed') # before the estimate
    monkeypatch.undo()
    ex._load.cache_clear()
    with pytest.raises(SystemExit, match='no CIFAR10 in'): main(['--table','1','--dataset','cifar10','--path',str(tmp_path),'--dry-run'])

def test_two_papers_share_a_folder(tmp_path, capsys, monkeypatch):
    "Records of another paper are neither read as runs of this one nor reported; `--paper` chooses, in full"
    @dataclass(frozen=True)
    class Square:
        paper = 'squares'
        n:int
    run = lambda exps, path, out, *args: records.run_missing(exps, lambda e, seed: records.new_record(e, seed, 'tiny', area=e.n**2), out, *args)
    monkeypatch.setattr(records, 'PAPERS', records.PAPERS.copy())
    monkeypatch.setattr(cli, 'PAPERS', records.PAPERS)
    records.add_paper(records.Paper('squares', ['tiny'], lambda p: p.add_argument('--n', type=int), lambda a: [Square(a.n)], lambda e, scale: f'{e.n} squared',
                                    lambda runs, *_: ([60.]*len(runs), 'a guess'), run, lambda out, table: f'{len(read_records(out, "squares"))} squares'))
    args = ['--paper','squares','--n','3','--seeds','2','--out',str(tmp_path)]
    main([*args,'--dry-run'])
    assert capsys.readouterr().out.count('3 squared')==2
    main(args); main(args)
    assert [r['area'] for r in read_records(tmp_path)]==[9,9] and read_records(tmp_path, 'mixtraining')==[]
    add_record(tmp_path/'a.jsonl', record(E10['mix'])) # of before papers had names
    assert len(missing_runs([E10['mix'],E10['sl']], 1, tmp_path, 'paper'))==1 and len(missing_runs([Square(3)], 3, tmp_path, 'tiny'))==1
    assert '60.45' in write_report(tmp_path).read_text()
    capsys.readouterr()
    report_main([str(tmp_path),'--paper','squares'])
    assert capsys.readouterr().out=='2 squares\n'
    with pytest.raises(SystemExit): main(['--pap','squares'])
    assert '--paper must not be shortened' in capsys.readouterr().err
