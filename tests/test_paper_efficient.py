"Cheaper self-supervision: its settings, runs, speed-ups and report"
import importlib.util, json
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest

import mixfast.paper.efficient_runs as runs
from mixfast.data.datasets import ImageData
from mixfast.paper.cli import main, report_main
from mixfast.paper.efficient_results import cost_at, efficient_results, equal_accuracy, table_layout, write_report
from mixfast.paper.efficient_runs import estimate, reproduce, run_efficient
from mixfast.paper.efficient_ssl import METHODS, efficient_args, efficient_dls, efficient_settings, efficient_tables, scaled
from mixfast.paper.records import add_record, missing_runs, new_record, read_records

root = Path(__file__).resolve().parents[1]
BASE,FAST = efficient_settings(2, methods='simsiam').exp
BYOL = replace(BASE, method='byol')

def fake(name, path, px, n=160):
    "Random images in place of an archive"
    x = np.random.default_rng(px).integers(0, 256, (n,px,px,3)).astype(np.uint8)
    return ImageData((x, np.arange(n)%10), (x[:20], np.arange(20)%10), [str(i) for i in range(10)])

def record(e, seed=0, acc=0.5, flop=1., scale='small', device='d', **kwargs):
    "A record whose neighbours are half as good halfway"
    curve = dict(epoch=[1,2], knn=[acc/2,acc], petaflop=[flop/2,flop], seconds=[5*flop,10*flop])
    return new_record(e, seed, scale, accuracy=acc, probe=acc+0.1, curve=curve, spread=[0.9,0.8], device=device,
                      cost=dict(steps=100, petaflop=flop, seconds=10*flop)) | kwargs

def test_the_tables_are_the_papers():
    t,shared = efficient_tables(),root.parent/'shared'/'paper'/'efficient_ssl_tables.csv'
    if shared.exists(): assert t.equals(pd.read_csv(shared))
    assert len(t)==55 and t.table.value_counts()[7]==14

def test_every_figure_is_a_setting():
    "No two rows of one table are the same; the paper's rates, warm-ups and weight decay"
    df = efficient_settings()
    assert len(df)==55 and set(df.method)==set(METHODS)
    for t,g in df.groupby('table'): assert g.exp.nunique()==len(g), t
    for e in set(df.exp):
        a,imagenet = efficient_args(e),e.data=='imagenet'
        h,bs = a['recipe'].ssl,512 if imagenet else 128
        want = {('cosine',False): 0.1, ('f1clr',False): 0.2, ('cosine',True): 0.1, ('f1clr',True): 0.16}[e.sched,imagenet]
        assert h.lr*bs/256==pytest.approx(want) and h.wd==(1e-4 if imagenet else 5e-4) and h.opt=='sgd'
        assert (a['e_ssl'],h.warmup_epochs,h.sched,len(a['cbs']))==(e.epochs,e.warmup,e.sched,e.min_res>0)
        assert (e.n>2)==(e.selection!='')==(e.sel_res>0) and e.epochs>e.warmup
    assert [e.epochs for e in efficient_settings([6,8]).exp]==[320]*3+[400]*4

@pytest.mark.parametrize('data,sizes', [('imagenette',(16,8)), ('cifar10',(16,8))])
def test_a_scale_keeps_the_proportions(data, sizes):
    s = scaled(replace(FAST, data=data), 'small')
    assert (s.min_res,s.sel_res)==sizes and s.warmup/s.epochs==pytest.approx(80/480, rel=0.1)
    assert s.epochs/scaled(BASE, 'small').epochs==pytest.approx(0.6, abs=0.05)
    assert efficient_args(replace(FAST, data=data), 'small')['recipe'].ssl.lr==efficient_args(FAST)['recipe'].ssl.lr # for 256 images

def test_images_held_out_are_not_trained_on():
    d = ImageData((np.arange(160, dtype=np.uint8).reshape(-1,1,1,1).repeat(8, 1).repeat(8, 2).repeat(3, 3), np.arange(160)%10),
                  (np.full((20,8,8,3), 255, np.uint8), np.arange(20)%10), [str(i) for i in range(10)])
    ids = lambda ds: set(ds.x.flatten(1)[:,0].tolist())
    o = efficient_dls(BASE, 3, '', 'tiny', lambda *_: d, 'cpu', hold_out=40)
    assert len(ids(o.valid_ds))==40 and not ids(o.valid_ds)&ids(o.train_ds) and len(ids(o.train_ds))==120
    assert ids(efficient_dls(BASE, 3, '', 'tiny', lambda *_: d, 'cpu').valid_ds)=={255}

@pytest.mark.parametrize('method', METHODS)
def test_each_method_is_run(method, tmp_path):
    "With all strategies; a record says all that the report asks for, and a second one is the same"
    e = replace(FAST, method=method)
    args = dict(path='', scale='tiny', load=fake, device='cpu')
    new, = reproduce([e], out=tmp_path, seeds=1, bar=False, **args)
    assert read_records(tmp_path, 'efficient_ssl')==[json.loads(json.dumps(new))] and missing_runs([e], 1, tmp_path, 'tiny')==[]
    c = new['curve']
    assert c['knn'][-1]==new['accuracy'] and c['petaflop']==sorted(c['petaflop']) and c['petaflop'][-1]==pytest.approx(new['cost']['petaflop'])
    assert c['seconds'][-1]==pytest.approx(new['cost']['seconds'], abs=1e-3) and c['epoch'][-1]==new['settings']['e_ssl']==2
    assert len(new['spread'])==2 and 0<=new['probe']<=1 and new['n_train']==160
    assert len(efficient_results([new]))>0
    if method=='simsiam':
        again = run_efficient(e, 0, **args)
        assert again['curve']['knn']==c['knn'] and again['probe']==new['probe']
        less = run_efficient(replace(e, min_res=0), 0, **args) # the same without Super Progressive
        assert less['cost']['steps']==new['cost']['steps'] and less['cost']['petaflop'] > 1.2*new['cost']['petaflop']

def test_neighbours_are_asked_ten_times():
    seen = runs._Course()
    at = lambda n: [i+1 for i in range(n) if (i+1)*10//n != i*10//n]
    assert at(3)==[1,2,3] and at(10)==list(range(1, 11)) and len(at(800))==10 and at(800)[-1]==800 and seen.n==10

def test_estimate(monkeypatch):
    "Epochs by their pixels; a kind of step is timed once; neighbours count"
    timed = []
    monkeypatch.setattr(runs, '_image_seconds', lambda learn, budget, phases: (timed.append(phases), (dict(ssl=6.), 8))[1])
    args = dict(path='', scale='tiny', load=fake, device='cpu')
    secs,how = estimate([(BASE,0), (BASE,1), (replace(BASE, epochs=400),0)], **args)
    knn = 10*(20+160)
    assert secs==[6*3*160+knn]*2+[6*2*160+knn] and timed==[['ssl']] and how=='steps of 8 images'
    (full,part),_ = estimate([(replace(FAST, min_res=0),0), (FAST,0)], **args)
    assert part<0.9*full and len(timed)==2

def test_cost_at_equal_accuracy():
    "On straight lines between points in any order; nothing is known beyond them; a worse point of a higher cost does not count"
    c,a = [4,1,2,3],[70,50,60,58]
    assert [cost_at(c, a, o) for o in (50,55,60,65,70)]==[1,1.5,2,3.5,4]
    assert np.isnan([cost_at(c, a, 71), cost_at(c, a, 49), cost_at([], [], 50)]).all()
    assert cost_at([1,2,3], [50,50,60], 50)==1 and cost_at([3], [60], 60)==3
    assert equal_accuracy(c, a, 2, 71)==(2,True) and equal_accuracy(c, a, 1, 65)==(3.5,False)
    x,least = equal_accuracy([], [], 1, 50)
    assert np.isnan(x) and not least
    rng = np.random.default_rng(0)
    for _ in range(50): # the better, the dearer
        c,a = rng.random(6),rng.random(6)
        got = [cost_at(c, a, o) for o in np.linspace(a[c.argmin()], a.max(), 9)]
        assert (np.diff(got)>=-1e-9).all() and got[-1]==pytest.approx(c[a.argmax()])

def test_the_papers_table_7():
    "Its speed-ups follow from its accuracies, as far as the baseline's curve goes"
    t = efficient_tables().query('table==7')
    base,fast = [t[t.lr_sched==o] for o in ('cosine','f1clr')]
    got = [equal_accuracy(base.epochs, base.accuracy, r.epochs, r.accuracy) for r in fast.itertuples()]
    assert [o for o,least in got if not least]==pytest.approx(list(fast.speedup[:4]), abs=0.011) and [least for _,least in got]==[False]*4+[True]*3

def test_results():
    "Means over seeds; another machine, method or data set is another baseline; the overhead of a step"
    hard = replace(FAST, min_res=0)
    recs = [record(BASE, s, 0.6+0.02*s, 2.) for s in (0,1)] + [record(FAST, 0, 0.55, 1.), record(hard, 0, 0.7, 1.2)]
    recs += [record(BYOL, 0, 0.5, 4.), record(replace(BYOL, sched='f1clr', epochs=480, warmup=80), 0, 0.5, 1.)]
    recs += [record(FAST, 0, 0.5, 1., device='other'), record(FAST, 0, 0.4, 0.5, scale='tiny'), recs[0]]
    res = efficient_results(recs)
    at = lambda e, **kw: res[(res.exp==e)&(res.table==2 if e!=hard else res.table==3)&(res.scale=='small')&res.machine.str.startswith('d')].iloc[0]
    assert at(BASE).ours==pytest.approx(61) and at(BASE).runs==2 and at(BASE).ours_std==pytest.approx(2**0.5) and at(BASE).times==1
    assert at(FAST).times==pytest.approx(1+(55-30.5)/30.5) and at(FAST).times_s==at(FAST).times and np.isnan(at(FAST).overhead)
    assert at(hard).least and at(hard).times==pytest.approx(2/1.2) and at(hard).overhead==pytest.approx(-40)
    assert np.isnan(res[(res.machine.str.startswith('other'))].times).all() # no baseline there
    assert set(res[res.exp==FAST].table)=={2,3} and at(FAST).accuracy==91.4 and at(FAST).speedup==2.3
    assert sorted(res[res.method=='byol'].table)==[0,2] # the other one is in no table of BYOL's
    assert efficient_results([recs[5]]).table.tolist()==[0]
    with pytest.raises(ValueError, match='no records: run mixfast-reproduce --paper efficient_ssl'): efficient_results([])
    with pytest.raises(ValueError, match='no records of table 9'): efficient_results(recs, 9)

def test_other_images():
    "CIFAR-10 stands beside Imagenette's figure, Imagenette not beside ImageNet's"
    t1 = efficient_settings(1).exp.iloc[3]
    res = efficient_results([record(replace(FAST, data='cifar10')), record(t1), record(replace(t1, data='imagenette'))])
    assert [(r.table,r.data) for r in res.itertuples()]==[(1,'imagenet'),(2,'cifar10'),(3,'cifar10'),(0,'imagenette')]

@pytest.mark.parametrize('table', range(1, 10))
def test_each_table_has_its_layout(table, tmp_path):
    "All rows, told apart; a report with a picture"
    exps = efficient_settings(table).exp
    for i,e in enumerate(exps): add_record(tmp_path/'small.jsonl', record(e, 0, 0.5+0.01*i, 1+i))
    g = efficient_results(read_records(tmp_path), table)
    df = table_layout(g)
    what = df.drop(columns=[c for c in df if c.startswith(('kNN','linear','peta','speed','overhead','seconds','spread'))])
    assert len(df)==len(exps) and not what.astype(str).duplicated().any() and '(' in df.filter(regex='kNN|linear').iloc[0,0]
    text = write_report(tmp_path, table).read_text()
    assert ("The names of settings are the paper's" in text)==any(e.min_res or e.sel_res for e in exps)
    assert f'## Table {table}, ' in text and 'scale small' in text and ('![](' in text) == (table not in (5,6,9))

def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, '_load', fake)
    monkeypatch.setattr('mixfast.paper.efficient_ssl._load', fake)
    args = f'--paper efficient_ssl --table 2 --methods simsiam --scale tiny --seeds 1 --jobs 1 --fp32 --out {tmp_path}'.split()
    main([*args, '--dry-run'])
    said = capsys.readouterr().out
    assert '2 runs at scale tiny' in said and 'SimSiam, F1-CLR, Super Progressive from 16 px, 6 augmentations, hard at 8 px' in said
    main(args)
    said = capsys.readouterr().out
    assert said.count('knn 0.')==2 and len(read_records(tmp_path, 'efficient_ssl'))==2
    report_main([str(tmp_path), '--paper', 'efficient_ssl'])
    assert '## Table 2, imagenette, scale tiny' in Path(capsys.readouterr().out.strip()).read_text()
    for bad,why in (('--table 12', 'table must be one of'), ('--table 1 --scale small', "imagenet has no scale 'small'"),
                    ('--table 2 --dataset imagenet --arch resnet18 --methods dino', 'dataset must be one of')):
        with pytest.raises(SystemExit, match=why): main(['--paper','efficient_ssl', *bad.split()])

def script():
    spec = importlib.util.spec_from_file_location('two_views', root/'benchmarks'/'two_views.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m

@pytest.mark.parametrize('part,objective,method', [('c','simclr','ssl'), ('c','mae','ssl'), ('d','simsiam','mix'), ('d','mae','mix')])
def test_two_views_beside_mae(part, objective, method, monkeypatch, tmp_path):
    "A run of each kind, made small; the same operations for all of part c"
    m = script()
    d = fake('', '', 32, 256)
    monkeypatch.setattr(m, '_load', lambda *a: d)
    monkeypatch.setattr(m, 'EPOCHS', dict(c=1, cifar10=4, imagenette=4))
    r = m.run('', 64, False, m.Run(part, 'cifar10', objective, method, f1clr=part=='d', progressive=part=='d'), 0)
    json.dumps(r)
    assert r['knn' if part=='c' else 'accuracy'] is not None and r['petaflop']>0 and m.said(r)
    assert r['curve']['petaflop'][-1]==pytest.approx(r['petaflop'])
    if part=='c': assert (r['hold_out'], r['settings']['e_sl'])==(64, 0) and (objective!='mae' or r['settings']['e_ssl']>1)
    else: assert 'mix' in r['curve']['phase'] and r['settings']['recipe']['ssl']['sched']=='f1clr'
    add_record(tmp_path/f'{part}.jsonl', r)
    m.report(tmp_path)
    assert m.name(objective) in (tmp_path/'report.md').read_text() and len(list(tmp_path.glob('report_*.png')))==1

def test_what_two_views_runs(tmp_path):
    m = script()
    assert {r.objective for r in m.runs_of('c', '')}=={*METHODS,'mae','ae'}
    d = m.runs_of('d', 'byol')
    assert len(d)==len(set(d)) and {(r.objective,r.data) for r in d}=={(o,x) for o in ('byol','mae') for x in ('cifar10','imagenette')}
    with pytest.raises(SystemExit, match='run --part c first'): m.best_of(tmp_path)
    for o,k in (('simsiam',0.3), ('byol',0.4), ('mae',0.9)): add_record(tmp_path/'c.jsonl', dict(exp=dict(objective=o), knn=k))
    assert m.best_of(tmp_path)=='byol'
