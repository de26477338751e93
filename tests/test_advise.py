"What fits into a budget, trials of it, and the fit: from arrays and files, after a crash, and what is refused"
import json, math
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.vision.all import CategoryBlock, DataBlock, PILImage, RandomSplitter, accuracy, error_rate, noop
from PIL import Image

from conftest import HOT, TINY, images, same, state
from mixfast.all import MixBlock, candidates, equal_cost, hold_out, mix_dls, mix_learner
from mixfast.insight import advise, pilot

BUDGET = dict(minutes=0.1, pilots=0.9, recipe=HOT)

def learner(n=24, metrics=accuracy, ssl=True, objective=None):
    torch.manual_seed(0)
    d = mix_dls(images(n), images(9, seed=1), lam=0.5, ssl=images(40, seed=2)[0] if ssl else None, bs=8, seed=0, **{} if objective is None else dict(ssl_tfms='simclr'))
    learn = mix_learner(d, objective=objective, metrics=metrics, **TINY)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

ALL = 'SL','MixTraining (joint)','MixTraining','SSL+SL'
OTHERS = ALL[1:]

@pytest.fixture
def scored(monkeypatch):
    "Pilots that take no time: a function of their scores by method, and of the ratio of losses of SL alone"
    monkeypatch.setattr(advise, '_TELLING', 5) # of 9 held-out images
    def _scored(scores, ratio=0.2):
        runs = []
        def run(learn, dls, args, plan, weights=None, seed=0, **kwargs):
            name = next(k for k,v in candidates(learn).items() if v==args)
            runs.append(name)
            if callable(scores.get(name)): scores[name]()
            return scores[name], ratio if name=='SL' else math.nan, dict(ssl=0.05, mix=0.05, sl=0.05), 0.1, pilot._weights(learn)
        monkeypatch.setattr(advise, '_pilot', run)
        monkeypatch.setattr(advise, '_step_times', lambda *_: dict(ssl=0.05, mix=0.05, sl=0.05))
        monkeypatch.setattr(advise, '_valid_seconds', lambda _: 0.)
        return runs
    return _scored

@pytest.fixture
def hurry(monkeypatch):
    "Real pilots, however short, of all candidates"
    monkeypatch.setattr(advise, '_narrowed', lambda learn, dls, t, methods, *_, **__: (list(methods), []))
    return dict(minutes=0.02, recipe=HOT)

def test_sl_that_learns_what_holds_for_others(scored):
    "It is trained, and nothing else is tried"
    runs,learn = scored({'SL':0.1}, ratio=0.95),learner()
    learn.fit_best(**BUDGET)
    assert runs==['SL'] and set(learn.mix.history.phase)=={'sl'} and learn.mix.chosen['pilots']==[learn.mix.advice.iloc[0][['e_ssl','e_sl','rho']].tolist()]
    assert learn.mix.why.endswith('the loss of SL on its images is 0.95 of that on 5 others, so what it learns holds for them too.')

def test_sl_that_knows_its_images_by_heart(scored):
    "It gives way, whatever its score"
    runs,learn = scored(dict.fromkeys(ALL, 0.5) | {'SL':0.9, 'MixTraining':0.6}),learner()
    learn.fit_best(**BUDGET)
    assert runs[0]=='SL' and 'SL' not in runs[1:] and learn.mix.why.startswith('MixTraining is trained')
    assert 'so it learns them by heart, and SSL is needed; in pilots its accuracy is 0.600 on 5 held-out images, that of' in learn.mix.why

def test_loss_ratio():
    def h(**kw): return pd.DataFrame(dict(phase=['sl','sl'], sl_loss=[1.,0.1], valid_loss=[1.,0.5]) | kw)
    assert pilot._loss_ratio(h())==pytest.approx(0.2)
    for kw in dict(phase=['ssl','sl']), dict(valid_loss=[1.,math.nan]), dict(valid_loss=[1.,0.]): assert math.isnan(pilot._loss_ratio(h(**kw)))

def test_few_images_do_not_tell(scored, monkeypatch):
    "The first of the others is trained without pilots; of two views that is SSL+SL"
    for kw,first in (({}, 'MixTraining (joint)'), (dict(objective='simsiam'), 'SSL+SL')):
        runs,learn = scored({'SL':0.9}),learner(**kw)
        monkeypatch.setattr(advise, '_TELLING', 1000)
        learn.fit_best(**BUDGET)
        assert runs==['SL'] and learn.mix.why.startswith(f'{first} is trained') and 'apart, and the first is taken' in learn.mix.why

def test_what_there_is_no_time_to_try_is_left_out(scored, tmp_path):
    "The slowest candidates; a resumed fit leaves out the same"
    scores = dict.fromkeys(ALL, 0.5)
    runs,learn = scored(scores),learner()
    learn.fit_best(minutes=0.06, pilots=0.36, recipe=HOT, checkpoint=tmp_path)
    assert 'there is no time to try MixTraining (joint); in pilots' in learn.mix.why and 'MixTraining (joint)' not in runs and len(set(runs))==3
    assert set(json.loads((tmp_path/'trials.json').read_text())['names'])==set(runs)-{'SL'}

@pytest.mark.parametrize('best', OTHERS)
def test_the_best_is_trained(scored, best):
    "Whatever it is; the better half of the candidates have a second pilot; the plan is as long as the time that is left"
    scores = dict.fromkeys(ALL, 0.5) | {best: 0.9}
    runs,learn = scored(scores),learner()
    learn.fit_best(**BUDGET)
    assert runs[:4]==list(ALL) and len(runs)==6 and best in runs[4:]
    phases = learn.mix.history.phase.tolist()
    assert set(phases)==({'ssl','sl'} if best=='SSL+SL' else {'ssl','mix','sl'}) and learn.mix.settings['mix']==('joint' if 'joint' in best else 'blend')
    steps = learn.mix.cost.steps.sum()
    assert 0.8 < steps*0.05/(6-0.6) <= 1 # of six seconds, of which pilots took 0.1 each
    assert learn.mix.why.startswith(best) and learn.mix.advice.method.tolist()==runs

def test_an_error_rate_is_to_be_low(scored):
    scored({'SL':0.5,'SSL+SL':0.2,'MixTraining':0.3,'MixTraining (joint)':0.4})
    learn = learner(metrics=error_rate)
    learn.fit_best(**BUDGET)
    assert learn.mix.why.startswith('SSL+SL is trained')

def boom(): raise FloatingPointError('nan')

def test_what_diverges_is_the_worst(scored):
    "One that does loses; if all do, that is said, and nothing is changed"
    scores = {'SL':boom,'SSL+SL':0.2,'MixTraining':boom,'MixTraining (joint)':0.1}
    scored(scores)
    learn = learner()
    learn.fit_best(**BUDGET)
    assert learn.mix.why.startswith('SSL+SL is trained')
    scored(dict.fromkeys(scores, boom))
    learn = learner()
    before = state(learn.model)
    with pytest.raises(FloatingPointError, match='have all diverged'): learn.fit_best(**BUDGET)
    assert same(state(learn.model), before)

def test_one_candidate_needs_no_pilot(scored):
    runs,learn = scored({}),learner()
    learn.fit_best(**BUDGET, methods={'SL': dict(e_ssl=0, rho=0)})
    assert not runs and learn.mix.why.endswith('there is no other candidate.') and set(learn.mix.history.phase)=={'sl'}

def test_trackers_rest_in_pilots(hurry):
    "They would stop, and save, by what pilots do not measure"
    learn = learner()
    learn.add_cb(EarlyStoppingCallback(monitor='accuracy', patience=1))
    learn.fit_best(**hurry)
    assert learn.mix.advice.score.notna().all() and any(isinstance(cb, EarlyStoppingCallback) for cb in learn.cbs)

def test_without_other_images_there_is_one_kind_of_mixing():
    assert list(candidates(learner(ssl=False)))==['SL','MixTraining','SSL+SL'] and 'mix' not in candidates(learner(ssl=False))['MixTraining']

def test_pilots_leave_nothing_behind(hurry):
    "The learner that begins the fit has the weights of the best pilot, and its own data"
    learn,begun = learner(),[]
    class Begin(Callback):
        def before_fit(self): begun.append((self.learn.dls.train.n, state(self.model.backbone)))
    learn.fit_best(**hurry, cbs=Begin())
    (n,weights), = begun # pilots have not the callbacks of the fit
    assert n==24 and not same(weights, state(learner().model)) and learn.mix.history.accuracy.notna().any()

class Stop(Exception): pass
def stop(): raise Stop('stop')

def test_resume(scored, tmp_path):
    "After a crash in a pilot, and in the fit: no pilot is run twice, the same fit goes on"
    scores = {'SL':0.5,'SSL+SL':0.9,'MixTraining':stop,'MixTraining (joint)':0.4}
    runs = scored(scores)
    learn = learner()
    before = state(learn.model)
    with pytest.raises(Stop): learn.fit_best(**BUDGET, checkpoint=tmp_path)
    assert runs==['SL','MixTraining (joint)','MixTraining'] and same(state(learn.model), before) and learn.dls.train.n==24
    with pytest.raises(ValueError, match='pilots of an earlier fit: pass resume=True'): learner().fit_best(**BUDGET, checkpoint=tmp_path)
    with pytest.raises(ValueError, match='seed was 0, and is 1'): learner().fit_best(**BUDGET, checkpoint=tmp_path, resume=True, seed=1)
    scores['MixTraining'] = 0.8
    class Die(Callback):
        order,only_watches = 2000,True
        def after_epoch(self):
            if self.epoch==3: stop()
    with pytest.raises(Stop): learner().fit_best(**BUDGET, checkpoint=tmp_path, resume=True, cbs=Die())
    assert runs==['SL','MixTraining (joint)','MixTraining','MixTraining','SSL+SL','SSL+SL','MixTraining']
    chosen = json.loads((tmp_path/'trials.json').read_text())['chosen']
    learn = learner()
    epochs = []
    class Log(Callback):
        only_watches = True
        def after_epoch(self): epochs.append(self.epoch)
    learn.fit_best(**BUDGET, checkpoint=tmp_path, resume=True, cbs=Log())
    assert len(runs)==7 and epochs[0]==4 and len(learn.mix.history)==sum(chosen['plan'][:2])

def test_a_half_written_pilot_is_run_again(scored, tmp_path, monkeypatch):
    "The disk is full while weights are written: the pilots before it count"
    runs = scored({'SL':0.5,'SSL+SL':0.9,'MixTraining':0.2,'MixTraining (joint)':0.4})
    real,n = advise.save_file,[]
    def full(*args):
        n.append(1)
        if len(n)==2: raise OSError(28, 'No space left on device')
        return real(*args)
    monkeypatch.setattr(advise, 'save_file', full)
    with pytest.raises(OSError): learner().fit_best(**BUDGET, checkpoint=tmp_path)
    learner().fit_best(**BUDGET, checkpoint=tmp_path, resume=True)
    assert runs==['SL','MixTraining (joint)','MixTraining (joint)','MixTraining','SSL+SL','SSL+SL','MixTraining (joint)']

def test_files(hurry, tmp_path):
    "From files"
    for i,(x,k) in enumerate(zip(*images(24, 16, 3))):
        (tmp_path/str(k)).mkdir(exist_ok=True)
        Image.fromarray(x).save(tmp_path/str(k)/f'{i}.png')
    block = DataBlock((MixBlock(PILImage, seed=0), CategoryBlock), get_y=lambda f: f.parent.name, splitter=RandomSplitter(0.25, seed=0))
    learn = mix_learner(block.dataloaders(sorted(tmp_path.rglob('*.png')), bs=6), 'test_resnet', metrics=accuracy)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    table = learn.mix.advise(1)
    assert list(table.columns)==['e_ssl','e_sl','rho','mix','minutes'] and (table.minutes<=1).all()
    learn.fit_best(minutes=0.02)
    assert learn.mix.history.accuracy.notna().any()

BAD = dict(
    minutes=(dict(minutes=-1), 'minutes must be a number above 0, got -1'),
    short=(dict(minutes=1e-5), 'the shortest pilot of SL takes about'),
    pilots=(dict(minutes=1, pilots=2), 'pilots must lie between 0 and 1, got 2'),
    held_out=(dict(minutes=1, held_out=1), 'held_out must lie between 0 and 1, got 1'),
    e_sl=(dict(minutes=1, e_sl=3), 'e_sl is what is to be found out'),
    mix=(dict(minutes=1, mix='joint'), 'mix is what is to be found out'),
    name=(dict(minutes=1, methods={'x': dict(rhoo=1)}), r"methods: 'x' must have arguments of .* got \['rhoo'\]"),
    e_ssl=(dict(minutes=1, methods={'x': dict(e_ssl=5)}), 'must be 0, or left out'),
    resume=(dict(minutes=1, resume=True), 'resume=True needs checkpoint'),
    methods=(dict(minutes=1, methods={'x': dict(rho=2)}), r'rho must lie in \[0,1\], got 2'))
@pytest.mark.parametrize('name', BAD)
def test_refused(name):
    "At the call; nothing is changed"
    kw,says = BAD[name]
    learn = learner()
    before = state(learn.model)
    with pytest.raises(ValueError, match=says): learn.fit_best(**kw)
    assert same(state(learn.model), before) and not learn.mix.rows

def test_refused_data():
    with pytest.raises(ValueError, match='needs a learner with a metric'): learner(metrics=[]).fit_best(1)
    d = mix_dls(ssl=images(24)[0], bs=8)
    with pytest.raises(ValueError, match='training images with labels'): mix_learner(d, n_out=3, metrics=accuracy, **TINY).fit_best(1)
    with pytest.raises(ValueError, match='there are no pilots yet'): learner().mix.plot_advice()

def test_hold_out_keeps_the_images_for_ssl():
    "Those without labels stay as they are, the held-out ones are not trained on"
    d = mix_dls(images(24), images(9, seed=1), ssl=images(40, seed=2)[0], bs=8, seed=0, mix='joint', sl_bs=2)
    h = hold_out(d, 0.25, seed=1)
    assert (h.train.n, h.valid.n, h.ssl.n, h.mix.n, h.mix.sl_bs)==(18,6,40,40,2)
    both = torch.cat([h.train.dataset.x, h.valid.dataset.x]).flatten(1)
    assert torch.equal(both.sum(1).sort().values, d.train.dataset.x.flatten(1).sum(1).sort().values)

def test_equal_cost_at_its_edges():
    "Seeds that one side lacks do not count; a run that came to nothing is no time at which SSL+SL is as good"
    rows = [dict(method=m, seed=s, accuracy=a+s/10, seconds=c, e_ssl=e, rho=r) for s in range(3)
            for m,e,r,a,c in (('SL',0,0,0.2,1), ('SSL+SL',10,0,0.4,3), ('MixTraining',10,0.5,0.35,2))]
    df = pd.DataFrame(rows)
    t = equal_cost(df[(df.method!='SSL+SL')|(df.seed<2)]).iloc[0]
    assert t['accuracy %']-t['SSL+SL']==pytest.approx(t.difference)==pytest.approx(5) and np.isnan(t['in se']) # all seeds alike: no error to count in
    lost = df.assign(accuracy=df.accuracy.where(df.method!='MixTraining'))
    assert np.isnan(equal_cost(lost).iloc[0]['times faster'])
    for bad,says in ((df[df.rho==0], 'another method'), (df.rename(columns=dict(accuracy='error_rate')), 'more is better')):
        with pytest.raises(ValueError, match=says): equal_cost(bad)
    with pytest.raises(ValueError, match='x must be a column'): equal_cost(df, 'petaflop')

def test_equal_cost_is_paired():
    "A difference that is the same for each seed is certain, however far seeds lie apart"
    rows = [dict(method=m, seed=s, accuracy=a+s/10, seconds=c, petaflop=c, e_ssl=e, rho=r) for s in range(3)
            for m,e,r,a,c in (('SL',0,0,0.2,1), ('SSL+SL',10,0,0.4,3), ('MixTraining',10,0.5,0.35+s*1e-4,2))]
    t = equal_cost(pd.DataFrame(rows), 'petaflop').iloc[0]
    assert t.difference==pytest.approx(5.01) and t['in se']>100 and t['times faster']==pytest.approx(2.5/2, rel=1e-2) and t['at equal epochs']==1.5

@pytest.mark.parametrize('best', ['SL','SSL+SL','MixTraining','MixTraining (joint)'])
def test_what_was_chosen_is_trained_again(hurry, monkeypatch, tmp_path, best):
    "To the same weights, without the pilots of others; also from a file, after a crash, and after one before any checkpoint"
    monkeypatch.setattr(advise, '_best', lambda metric, scores: sorted(scores, key=lambda k: k!=best))
    learn = learner()
    learn.fit_best(**hurry)
    chosen = json.loads(json.dumps(learn.mix.chosen)) # as a file keeps it
    assert chosen['method']==best
    for e in 0,1:
        class Crash(Callback):
            order,only_watches = 2000*e,True # before the first checkpoint is written, and after it
            def after_epoch(self): stop()
        with pytest.raises(Stop): learner().fit_chosen(chosen, recipe=HOT, checkpoint=tmp_path/str(e), cbs=Crash())
        again = learner()
        again.fit_chosen(chosen, recipe=HOT, checkpoint=tmp_path/str(e), resume=True)
        assert same(state(learn.model), state(again.model)) and again.mix.history.phase.tolist()==learn.mix.history.phase.tolist()
