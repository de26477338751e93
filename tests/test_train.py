"From a folder of photos to a trained model: what is found, what is chosen, a crash, a config, and what is refused"
import shutil
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from PIL import Image

from conftest import images, same, save_image, state
from mixfast.all import JobSettings, judge_masks, prepare, read_config, train_job
from mixfast.insight import advise

class Stop(Callback):
    "Fail at the end of an epoch, as a machine does"
    only_watches = True
    def __init__(self, epoch): self.n = epoch
    def after_epoch(self):
        if self.epoch==self.n: raise RuntimeError('no power')

@pytest.fixture
def run(photos, tmp_path, monkeypatch):
    "A function that trains into a folder of a name"
    monkeypatch.setattr(advise, '_least', lambda *_: 0.) # pilots may be longer than there is time for
    def _run(out='run', cbs=None, chosen=None, path=photos, **kw):
        s = JobSettings(str(path), **(dict(minutes=0.02, objective='ae', model='test_resnet', device='cpu') | kw))
        return train_job(s, tmp_path/out, chosen, tmp_path/'cache', False, cbs, lambda _: None)
    return _run

PLAN = dict(e_ssl=2, e_sl=2, rho=0.5)

def test_by_minutes(run, tmp_path):
    "Candidates are tried, one is trained; its config trains the same weights"
    job,cfg = run(),read_config(tmp_path/'run'/'config.json')
    assert cfg['chosen']==job.learn.mix.chosen and len(job.learn.mix.history) and (tmp_path/'run'/'history.csv').exists()
    again = train_job(cfg['used'], tmp_path/'again', cfg['chosen'], tmp_path/'cache', False, say=lambda _: None)
    assert same(state(job.learn.model), state(again.learn.model))
    assert read_config(tmp_path/'again'/'config.json')['chosen']==cfg['chosen']

def test_an_ended_run_is_not_run_again(run):
    job,again = run(),run()
    assert same(state(job.learn.model), state(again.learn.model)) and again.learn.mix.history.epoch.tolist()==job.learn.mix.history.epoch.tolist()

@pytest.mark.parametrize('kw', [PLAN, {}])
def test_after_a_crash(run, kw):
    "The same call goes on; pilots that were done are not done again"
    whole = run('whole', **kw)
    with pytest.raises(RuntimeError, match='no power'): run('stopped', Stop(0), **kw)
    if kw:
        again = run('stopped', **kw)
        assert same(state(whole.learn.model), state(again.learn.model))
    else: assert len(run('stopped').learn.mix.history) # what fits into the time may differ

def test_labels_are_not_needed(run, tmp_path):
    for i,o in enumerate(images(20, 16)[0]): save_image(tmp_path/'bare'/f'{i}.png', o[...,0])
    job = run(path=tmp_path/'bare')
    assert set(job.learn.mix.history.phase)=={'ssl'} and job.settings.e_sl==0
    assert len(run(path=tmp_path/'bare').learn.mix.history)==job.settings.e_ssl

@pytest.mark.parametrize('values', [(0,1),(0,255)])
def test_masks(run, tmp_path, values):
    "Two classes, also as an image of black and white; an image without a mask is for SSL"
    for i,o in enumerate(images(16, 32)[0]):
        save_image(tmp_path/'seg'/f'{i}.png', o[...,0])
        if i<12: save_image(tmp_path/'masks'/f'{i}.png', np.where(o[...,0]>110, *values[::-1]).astype(np.uint8))
    job = run(path=tmp_path/'seg', masks=str(tmp_path/'masks'), **PLAN)
    assert job.dls.vocab==['0','1'] and job.dls.ssl.n==13 and job.learn.mix.history.miou.iloc[-1]>0

def test_half_a_mask_is_none(run, tmp_path):
    "Its image is for SSL; names of the others still go with their images"
    for i,o in enumerate(images(16, 32)[0]):
        save_image(tmp_path/'seg'/f'{i:02}.png', o[...,0])
        save_image(tmp_path/'masks'/f'{i:02}.png', (o[...,0]>110).astype(np.uint8))
    found = run('whole', path=tmp_path/'seg', masks=str(tmp_path/'masks'), **PLAN).found
    f = tmp_path/'masks'/found.file[found.valid].iloc[0]
    f.write_bytes(f.read_bytes()[:-30])
    job = run(path=tmp_path/'seg', masks=str(tmp_path/'masks'), **PLAN)
    assert job.found['mask'].notna().sum()==15 and not job.found.valid[job.found.file==f.name].any()
    assert len(judge_masks(job).images)==job.found.valid.sum()==len(job.dls.valid.dataset)

def test_groups_stay_together(run, photos, tmp_path):
    files = sorted(f.relative_to(photos).as_posix() for f in photos.glob('class*/*.png'))
    df = pd.DataFrame(dict(file=files, label=[f[:6] for f in files], patient=[f'p{i//2}' for i in range(len(files))]))
    df.to_csv(tmp_path/'labels.csv', index=False)
    found = run(labels=str(tmp_path/'labels.csv'), group='patient', **PLAN).found
    assert found.groupby('group').valid.nunique().eq(1).all() and found.valid.sum()>4

def test_a_folder_for_validation(photos, tmp_path):
    "Its images are those to validate on; those to test on are not seen"
    for part in 'train','val','test':
        for f in photos.glob('class*/*.png'): save_image(tmp_path/'parts'/part/f.parent.name/f.name, np.asarray(Image.open(f)))
    job = prepare(JobSettings(str(tmp_path/'parts'), objective='ae', device='cpu'), cache=tmp_path/'cache', bar=False)
    assert (job.dls.train.n, len(job.dls.valid.dataset), job.dls.ssl.n)==(36, 36, 36)
    assert job.found.twin.notna().sum()==72

def test_half_an_image_is_left_out(run, photos):
    "And named, as is a file that is none"
    f = next(photos.glob('class0/*.png'))
    f.write_bytes(f.read_bytes()[:-40])
    (photos/'class1'/'none.png').write_text('no image')
    found = run(**PLAN).found
    assert found.error.notna().sum()==2 and found['at'].isna().sum()==2

@pytest.mark.parametrize('kw,match', [
    (dict(e_ssl=1), 'make a plan together'), (dict(minutes=-1), 'minutes'), (dict(valid=0.9), 'valid_pct must lie between'),
    (dict(model='resnet'), "arch must be the name of a timm model"), (dict(objective='mea'), 'objective'), (dict(device='tpu'), 'device'),
    (dict(group='patient'), 'group is a column'), (dict(labels='none.csv'), 'none.csv cannot be read'), (dict(masks='none'), 'is no folder')])
def test_what_is_refused(run, kw, match):
    with pytest.raises(ValueError, match=match): run(**kw)

def command(name, *args):
    "The exit status of a command, in this process"
    import sys
    from mixfast import cli
    old,sys.argv = sys.argv,[f'mixfast-{name}', *map(str, args)]
    try: getattr(cli, name)()
    except SystemExit as e: return e.code or 0
    finally: sys.argv = old
    return 0

def test_commands(photos, tmp_path, capsys):
    "Train, stop at nothing, the same from the config, predict"
    args = '--e-ssl 1 --e-sl 1 --rho 1 --objective ae --device cpu --quiet'.split()
    out,cache = tmp_path/'run',['--cache',tmp_path/'cache']
    assert command('train', photos, '--out', out, *cache, *args)==0
    said = capsys.readouterr().out
    assert '48 images in' in said and 'accuracy' in said and f"report: {out/'report.html'}" in said
    assert command('train', '--config', out/'config.json', '--out', tmp_path/'again', *cache, '--quiet')==0
    a,b = [(tmp_path/o/'classifier'/'model.safetensors').read_bytes() for o in ('run','again')]
    assert a==b
    assert command('predict', out, photos, '--out', tmp_path/'p.csv', '--quiet')==0
    df = pd.read_csv(tmp_path/'p.csv')
    assert len(df)==48 and set(df['class'])<={'class0','class1','class2'}

@pytest.mark.parametrize('args,match', [
    ([], 'say which folder of photos'), (['none'], 'none is no folder'), (['--config','none.json'], 'none.json is no config'),
    (['.','--masks','none','--labels','x'], 'pass labels or masks, not both'), (['.'], 'no images in')])
def test_commands_say_what_is_wrong(tmp_path, capsys, monkeypatch, args, match):
    "In a line, and end with 2"
    monkeypatch.chdir(tmp_path)
    assert command('train', *args)==2
    err = capsys.readouterr().err
    assert match in err and err.count('\n')==1 and err.startswith('mixfast-train: ')

def test_prediction_says_what_is_wrong(tmp_path, capsys):
    assert command('predict', tmp_path/'none', tmp_path)==2
    assert 'has no classifier/ and no segmenter/' in capsys.readouterr().err

def test_a_run_needs_room(photos, tmp_path, capsys):
    "A folder that cannot be written to"
    (tmp_path/'file').write_text('')
    assert command('train', photos, '--out', tmp_path/'file'/'run', '--quiet')==2
    assert 'mixfast-train: ' in capsys.readouterr().err

def gather(tmp_path, photos, case):
    "Arguments for a folder as people have them"
    import shutil
    own = tmp_path/'own'
    if case=='one class': shutil.copytree(photos/'class0', own/'class0')
    if case=='two images':
        for o in photos.glob('class*/*0.png'): (own/o.parent.name).mkdir(parents=True, exist_ok=True); shutil.copy(o, own/o.parent.name)
    if case=='videos':
        own.mkdir(); (own/'a.mp4').write_bytes(bytes(100))
    if own.exists(): return [own]
    names = [str(o.relative_to(photos)) for o in sorted(photos.glob('class*/*.png'))]
    text = 'file,class\n' + ''.join(f'{o},Küche\n' for o in names + ['nowhere.png']*(case=='no such file'))
    (f := tmp_path/'labels.csv').write_bytes(text.encode('latin-1' if case=='latin-1' else 'utf-8'))
    return [photos, '--labels', f]

@pytest.mark.parametrize('case,match', [
    ('one class', 'are of one class, class0'), ('two images', '5 labelled images of each class are needed'), ('videos', 'write frames of your videos as images first'),
    ('no such file', 'names 1 files that are not there'), ('latin-1', 'save it as UTF-8')])
def test_folders_as_people_have_them(tmp_path, photos, capsys, case, match):
    "A line that says what and what to do, status 2, and nothing is left that was not there"
    args = gather(tmp_path, photos, case)
    assert command('train', *args, '--out', tmp_path/'run', '--cache', tmp_path/'cache', '--quiet')==2
    err = capsys.readouterr().err
    assert match in err and err.count('\n')==1 and not (tmp_path/'run'/'config.json').exists()

def test_no_space_left(photos, tmp_path):
    "What stands there is kept, and the same command goes on when there is room"
    import resource, subprocess, sys
    cmd = [sys.executable, '-c', 'from mixfast.cli import train; train()', photos, '--out', tmp_path/'run', '--cache', tmp_path/'cache', '--quiet', '--device', 'cpu',
           *'--e-ssl 1 --e-sl 1 --rho 1 --objective ae'.split()]
    def small(): resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,)*2)
    done = subprocess.run(cmd, preexec_fn=small, capture_output=True, text=True, timeout=300)
    assert done.returncode==2 and 'no room for checkpoints' in done.stderr and done.stderr.count('\n')==1, done.stderr
    assert subprocess.run(cmd, capture_output=True, timeout=300).returncode==0
    assert (tmp_path/'run'/'report.html').exists()

def test_two_processes(photos, tmp_path):
    "By torchrun: they train as one, and the first writes what a run leaves"
    import os, subprocess
    pytest.importorskip('accelerate')
    args = [photos, '--out', tmp_path/'run', '--cache', tmp_path/'cache', *'--minutes 0.05 --objective ae --device cpu --quiet'.split()]
    cmd = ['torchrun', '--nproc-per-node', '2', '--no-python', 'mixfast-train', *args]
    done = subprocess.run([str(o) for o in cmd], capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert done.returncode==0, done.stderr
    assert done.stdout.count('48 images in')==done.stdout.count('report: ')==1 and (tmp_path/'run'/'report.html').exists()
    assert {p for p in pd.read_csv(tmp_path/'run'/'history.csv').phase}=={'ssl','sl'}

@pytest.fixture
def no_time(monkeypatch):
    "Pilots take too long, however fast the machine is"
    def too_short(*args, **kwargs): raise advise.TooShort('minutes is too short')
    monkeypatch.setattr(advise, '_narrowed', too_short)

@pytest.mark.parametrize('labelled', [True,False])
def test_no_time_for_trials(no_time, photos, tmp_path, capsys, labelled):
    "SL alone where all images have a label, else SSL before it, which the run's config says"
    if labelled: shutil.rmtree(photos/'unlabelled')
    job = train_job(JobSettings(str(photos), minutes=0.03, objective='ae', device='cpu'), tmp_path/'run', cache=tmp_path/'cache', bar=False)
    assert 'there is no time for trials' in capsys.readouterr().out
    assert (read_config(tmp_path/'run'/'config.json')['used'].e_ssl==0)==labelled
    assert set(job.learn.mix.history.phase)==({'sl'} if labelled else {'ssl','sl'})

def test_without_trials_after_a_crash(no_time, photos, tmp_path):
    "It goes on by the plan that it began with, whatever the clock says now"
    call = partial(train_job, JobSettings(str(photos), minutes=0.03, objective='ae', device='cpu'), tmp_path/'run', cache=tmp_path/'cache', bar=False, say=lambda _: None)
    with pytest.raises(RuntimeError, match='no power'): call(cbs=Stop(1))
    used = read_config(tmp_path/'run'/'config.json')['used']
    job = call()
    assert used.e_ssl and job.settings==used and len(job.learn.mix.history)==used.e_ssl+used.e_sl
