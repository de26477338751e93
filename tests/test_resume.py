"Checkpoints: a killed fit ends as an undisturbed one does; what cannot be used is named; what was there is not lost"
import errno, json, os, pickle, random, resource, signal, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.all import (Adam, AvgMetric, Callback, CancelEpochException, CategoryBlock, DataBlock, GradientAccumulation, ImageBlock, ImageDataLoaders, Metric, PILImage, ProgressCallback,
    RandomSplitter, SGD, SaveModelCallback, accuracy, noop, ranger, resnet18, set_seed, vision_learner)
from mixfast.objective import autoencode
from mixfast.all import AE, BatchFlip, MAE, MixBlock, MixDL, mix_dls, mix_learner
from mixfast.callback.files import (_INDEX as INDEX, _check_room as check_room, _load_state as load_state, _read_index as read_index,
    _save_state as save_state, _write_atomic as write_atomic)
from conftest import Die, HOT, TINY, images, same, state
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import kills, test_dense as dense

def whole(learn):
    "All that a fit leaves behind, its seconds apart"
    rec = learn.recorder
    rows = [{k:v for k,v in r.items() if 'seconds' not in k} for r in learn.mix.rows]
    return json.dumps([rows, rec.lrs, rec.iters, [o.item() for o in rec.losses], learn.mix.sched], default=lambda o: np.asarray(o).tolist())

def check_resumed(new, folder, deaths, every_steps=None, **kwargs):
    "`new`, a function of a seed that makes a learner, fits once in peace, and once with `deaths`, from other seeds"
    fit = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT) | kwargs
    cbs = fit.pop('cbs', list)
    ref = new(0)
    ref.fit_mixtraining(**fit, cbs=cbs())
    for n in deaths:
        learn = new(7 if read_index(folder) else 0)
        with pytest.raises(RuntimeError, match='died'):
            learn.fit_mixtraining(**fit, checkpoint=folder, every_steps=every_steps, resume=True, cbs=[*cbs(), Die(n)])
    learn = new(7)
    learn.fit_mixtraining(**fit, checkpoint=folder, every_steps=every_steps, resume=True, cbs=cbs())
    assert same(state(learn.model), state(ref.model)) and whole(learn)==whole(ref)
    return learn

def test_kill_9(tmp_path):
    "Killed in each phase, in validation, at boundaries, while a checkpoint is written; twice within an epoch"
    want,_ = kills.undisturbed()
    for traps in ([('step',2),('step',3),('step',3)], [('validate',1),('phase',2),('os.fsync',6)], [('phase',3),('os.replace',3),('os.fsync',1)]):
        folder = tmp_path/str(traps)
        for i,(event,n) in enumerate(traps):
            assert not kills.child(lambda: kills.fit(folder, kills.Trap(event, n), i)), (event,n)
        assert kills.child(lambda: kills.fit(folder, seed=9)) and (folder/'digest').read_text()==want, traps
        assert sorted(f.suffix for f in folder.glob('[!.]*'))==['','.json','.pt','.pt']

@pytest.mark.parametrize('kwargs', [dict(objective=MAE(visible_only='mix')), dict(arch='test_resnet', size=32, c=3, objective=AE), dict(drop_path_rate=0.3)])
def test_models(make, tmp_path, kwargs):
    new = lambda seed: make(seed=seed, n=40, ssl=images(30, kwargs.get('size', 8), kwargs.get('c', 1), seed=3)[0], **kwargs)
    check_resumed(new, tmp_path/'run', (4,7,7), every_steps=2)

@pytest.mark.parametrize('target,weights', [('mask',None), ('both','learned')])
def test_tasks(tmp_path, target, weights):
    "Masks, and several tasks with weights that are learned"
    def new(seed):
        set_seed(seed, reproducible=True)
        learn = dense.learner(dense.dls(target), 'conv', 'simmim', task_weights=weights)
        if seed: torch.manual_seed(seed)
        return learn
    check_resumed(new, tmp_path/'run', (4,7,7), every_steps=2)

def test_other_callbacks(make, tmp_path):
    "bfloat16, gathered gradients, the best so far"
    new = lambda seed: make(seed=seed, n=40).to_bf16()
    cbs = lambda: [GradientAccumulation(12), SaveModelCallback(monitor='accuracy', fname='best')]
    learn = check_resumed(new, tmp_path/'run', (3,14,9), every_steps=3, cbs=cbs)
    assert (tmp_path/'models'/'best.pth').exists()

def test_samples_and_draws(make, tmp_path, monkeypatch):
    "What a fit that dies three times reads and draws, one log after the other, is what an undisturbed one does"
    log,on = [],[False]
    def note(kind, o):
        if on[0]: log.append((kind, np.asarray(o).tolist()))
        return o
    load,mask,flip = MixDL.load,autoencode.random_mask,BatchFlip.__call__
    monkeypatch.setattr(MixDL, 'load', lambda self, idxs, key: load(self, note('samples', idxs), note('key', key)))
    monkeypatch.setattr(autoencode, 'random_mask', lambda *args: note('mask', mask(*args)))
    def flipped(self, x): # which of the images are another way round now
        y = flip(self, x)
        note('flips', (x!=y).flatten(1).any(1))
        return y
    monkeypatch.setattr(BatchFlip, '__call__', flipped)
    class Switch(Callback):
        "What counts is read and drawn in training"
        only_watches = True
        def before_train(self): on[0] = True
        def after_train(self): on[0] = False
    def new(seed):
        set_seed(seed)
        dls = mix_dls(images(40), images(9, seed=1), lam=0.5, ssl=images(50, seed=2)[0], bs=8, tfms=[BatchFlip()], ssl_tfms=[BatchFlip()])
        return make(seed=seed, dls=dls)
    def fit(learn, **kwargs): learn.fit_mixtraining(4, 4, checkpoint=tmp_path/str(kwargs.pop('folder')), every_steps=1, resume=True, **kwargs)
    fit(new(0), folder='peace', cbs=Switch())
    peace,log[:] = log[:],[]
    for n in (2, 13, 10): # steps from the last death on: in the SSL, the mix and the SL phase
        with pytest.raises(RuntimeError, match='died'): fit(new(n-2), folder='run', cbs=[Switch(), Die(n)])
        on[0] = False
    fit(new(9), folder='run', cbs=Switch())
    assert log==peace
    assert {k for k,_ in log}=={'samples','key','mask','flips'}
    ids = [o for k,o in log if k=='samples']
    assert sorted(sum(ids[:6], []))!=sum(ids[:6], []) and len(set(sum(ids[:6], [])))==48, 'shuffled, each image once'

@pytest.fixture
def files(tmp_path):
    for i,(x,y) in enumerate(zip(*images(24))): PILImage.create(x[...,0]).save(tmp_path/f'{y}_{i}.png')
    return sorted(tmp_path.glob('*.png'))

def label(f): return Path(f).name[0]

@pytest.mark.parametrize('workers', [0,2])
def test_files(files, tmp_path, workers):
    "Images decoded one by one, by other processes too"
    def new(seed):
        set_seed(seed, reproducible=True)
        block = DataBlock((MixBlock(lam=0.5), CategoryBlock), get_y=label, splitter=RandomSplitter(0.3, seed=0))
        learn = mix_learner(block.dataloaders(files, bs=4, num_workers=workers), metrics=accuracy, in_chans=3, path=tmp_path, **TINY)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    check_resumed(new, tmp_path/'run', (2,6), every_steps=1)

def test_fastai_loaders(files, tmp_path):
    "fastai's own loaders, shuffled: between epochs"
    def new(seed):
        set_seed(seed, reproducible=True)
        dls = ImageDataLoaders.from_name_func(tmp_path, files, label, valid_pct=0.3, seed=0, bs=4, num_workers=0)
        learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    check_resumed(new, tmp_path/'run', (2,6), e_ssl=2, e_sl=2)
    with pytest.raises(ValueError, match="every_steps needs mixfast's own loaders"):
        new(0).fit_mixtraining(1, 1, checkpoint=tmp_path/'other', every_steps=2)

def test_ended(make, tmp_path):
    "A fit that had ended trains no more, and is as it was"
    learn,again = make(),make(seed=5)
    learn.fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
    again.fit_mixtraining(2, 2, checkpoint=tmp_path/'run', resume=True)
    assert same(state(learn.model), state(again.model)) and whole(learn)==whole(again)
    assert again.mix.phase is None and learn.validate()==again.validate()
    again.fit_sl(1)

def test_with_a_progress_bar(make, tmp_path):
    "fastai's, which has to begin at 0"
    def new(seed):
        learn = make(seed=seed)
        return learn.add_cb(ProgressCallback())
    check_resumed(new, tmp_path/'run', (4,9,7), every_steps=2)

@pytest.mark.parametrize('opt_func', [Adam, SGD, ranger])
def test_optimizers_of_fastai(make, tmp_path, opt_func):
    check_resumed(lambda seed: make(seed=seed, opt_func=opt_func), tmp_path/'run', (4,8))

def test_skipped_steps_are_remembered(make, tmp_path):
    class Poison(Callback):
        order,run_valid = -10,False
        def before_batch(self):
            if (self.epoch,self.iter) in ((0,1),(2,0)): self.learn.xb = (self.xb[0]*float('nan'),)
    learn = check_resumed(lambda seed: make(seed=seed, n=40), tmp_path/'run', (3,9), every_steps=2, on_nan='skip', cbs=lambda: [Poison()])
    assert learn.mix.skipped==2

def test_metrics_of_any_kind(make, tmp_path):
    "An array by class is saved as numbers; what cannot be saved is an error at the first checkpoint"
    def by_class(pred, y): return np.ones(3)
    class Odd(Metric):
        def reset(self): pass
        def accumulate(self, learn): pass
        value = property(lambda self: object())
    new = lambda metric: lambda seed: make(seed=seed, metrics=[accuracy, metric])
    check_resumed(new(AvgMetric(by_class)), tmp_path/'run', (4,8))
    with pytest.raises(TypeError, match='a checkpoint holds tensors, numbers and strings, not a object'): new(Odd())(0).fit_mixtraining(2, 2, checkpoint=tmp_path/'odd')
    learn = make()
    learn.recorder.train_metrics = True
    with pytest.raises(ValueError, match='every_steps cannot save what train_metrics'): learn.fit_mixtraining(2, 2, checkpoint=tmp_path/'train', every_steps=2)

def test_other_files_in_the_folder_stay(make, tmp_path):
    names = 'vit-best.pt','notes.tmp','0-1.pt'
    for n in names: (tmp_path/n).write_text('mine')
    (tmp_path/'00001-000000.pt.123.tmp').write_text('left behind')
    make().fit_mixtraining(3, 3, checkpoint=tmp_path)
    assert all((tmp_path/n).read_text()=='mine' for n in names) and not (tmp_path/'00001-000000.pt.123.tmp').exists()

def test_one_fit_a_folder(make, tmp_path):
    from filelock import FileLock
    (tmp_path/'run').mkdir()
    with FileLock(tmp_path/'run'/'.lock'), pytest.raises(ValueError, match='another process is writing checkpoints'): make().fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
    make().fit_mixtraining(2, 2, checkpoint=tmp_path/'run')

def test_an_epoch_that_is_cancelled(make, tmp_path):
    "After a resume within it, the next one is whole"
    class Cancel(Callback):
        only_watches = True
        def before_batch(self):
            if self.training and (self.epoch,self.iter)==(0,2): raise CancelEpochException()
    learn = make(n=40)
    with pytest.raises(RuntimeError): learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', every_steps=2, cbs=Die(2))
    learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', every_steps=2, resume=True, cbs=Cancel())
    assert len(learn.recorder.lrs)==2+3*5

def test_every(make, tmp_path):
    make().fit_mixtraining(3, 4, rho=0, checkpoint=tmp_path/'run', every=3)
    assert [(o['epoch'],o['iter']) for o in read_index(tmp_path/'run')]==[(7,0),(6,0)]

@pytest.fixture
def sigint():
    "Ctrl-C means what it usually does, also where the tests run in the background"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

def test_ctrl_c(make, tmp_path, sigint):
    "The step is finished and saved, what was recorded is there, and the fit can go on"
    class Press(Callback):
        only_watches = True
        def before_batch(self):
            if self.training and (self.epoch,self.iter)==(1,1): os.kill(os.getpid(), signal.SIGINT)
    ref = make()
    ref.fit_mixtraining(2, 2, rho=0.5)
    learn = make()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): learn.fit_mixtraining(2, 2, rho=0.5, checkpoint=tmp_path/'run', cbs=Press())
    assert signal.getsignal(signal.SIGINT) is before and '_do_fit' not in vars(learn)
    assert [(o['epoch'],o['iter']) for o in read_index(tmp_path/'run')]==[(1,2),(1,0)] and len(learn.mix.history)==1 and len(learn.recorder.lrs)==5
    learn.fit_mixtraining(2, 2, rho=0.5, checkpoint=tmp_path/'run', resume=True)
    assert same(state(learn.model), state(ref.model)) and whole(learn)==whole(ref)

def test_other_settings(make, tmp_path):
    "What differs is named, and nothing is changed"
    def new(**kwargs): return make(**{'n':24, **kwargs})
    new().fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
    before = state(new().model)
    for learn,kwargs,says in (
        (new(), dict(rho=0.6), 'rho was 0.5, and is 0.6'), (new(), dict(alpha=0.4), 'alpha was 0.5'), (new(), dict(recipe=HOT), 'recipe was'),
        (new(), dict(carry_opt=True), 'carry_opt was False'), (new().to_bf16(), {}, "precision was 'fp32', and is 'bf16'"),
        (new(n=32), {}, 'valid_images was|ssl_images was'), (new(bs=12), {}, 'bs'), (new(embed_dim=64), {}, 'the shape of backbone'), (new(objective=AE), {}, "objective was 'MAE'"),
        (new(objective=MAE(depth=1)), {}, "objective_settings was .*'depth': 2.* and is .*'depth': 1"), (new(wd_bn_bias=True), {}, 'wd_bn_bias'),
        (new(dls=mix_dls(images(24), images(9, seed=1), bs=8, seed=3)), {}, 'seed was None, and is 3')):
        with pytest.raises(ValueError, match=says): learn.fit_mixtraining(2, 2, **{**kwargs, 'checkpoint':tmp_path/'run', 'resume':True})
    learn = new()
    with pytest.raises(ValueError, match='has checkpoints of another fit: pass resume=True'): learn.fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
    with pytest.raises(ValueError, match='resume=True needs checkpoint'): learn.fit_mixtraining(2, 2, resume=True)
    for k in ('every','every_steps'):
        with pytest.raises(ValueError, match=f'{k} must be a whole number from 1 up, got 0'): learn.fit_mixtraining(2, 2, checkpoint=tmp_path/'new', **{k:0})
    with pytest.raises(ValueError, match='sl_tfms was'): new(dls=mix_dls(images(24), images(9, seed=1), bs=8, tfms=[BatchFlip()])).fit_mixtraining(2, 2, checkpoint=tmp_path/'run', resume=True)
    assert same(state(learn.model), before) and not (tmp_path/'new').exists()

def test_a_function_is_known_by_its_name(make, tmp_path):
    "Its address is another in each process"
    def new(f): return make(dls=mix_dls(images(24), images(9, seed=1), bs=8, seed=0, tfms=[f]))
    def same_one(): return lambda x: x.flip(-1)
    f,g = same_one(),same_one()
    new(f).fit_mixtraining(1, 2, rho=1, checkpoint=tmp_path/'run')
    new(g).fit_mixtraining(1, 2, rho=1, checkpoint=tmp_path/'run', resume=True)
    with pytest.raises(ValueError, match='sl_tfms was .*same_one.*, and is .*noop'): new(noop).fit_mixtraining(1, 2, rho=1, checkpoint=tmp_path/'run', resume=True)

def test_missing_parts(make, tmp_path):
    "A checkpoint without its optimizer, or with other weights, is an error that says so"
    make().fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
    good = load_state(tmp_path/'run')
    for k in ('opt','model','settings','callbacks','loaders','grads'):
        save_state(tmp_path/'run', {a:b for a,b in good.items() if a!=k})
        with pytest.raises(ValueError, match=f'has no {k!r}'): make().fit_mixtraining(2, 2, checkpoint=tmp_path/'run', resume=True)

def test_damaged(make, tmp_path):
    "The checkpoint before is used, with a warning; where there is none, that is an error"
    ref = make()
    ref.fit_mixtraining(2, 2, rho=0)
    with pytest.raises(RuntimeError): make().fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', cbs=Die(10))
    new,old = [tmp_path/'run'/o['file'] for o in read_index(tmp_path/'run')]
    new.write_bytes(new.read_bytes()[:-1000])
    learn = make(seed=3)
    with pytest.warns(UserWarning, match='its checksum is another.*trying the one before'): learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', resume=True)
    assert same(state(learn.model), state(ref.model))
    for f in (tmp_path/'run').glob('*.pt'): f.unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='none of the checkpoints'): learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', resume=True)
    (tmp_path/'run'/INDEX).write_text('[{"file"')
    with pytest.raises(ValueError, match='is not an index of checkpoints'): learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', resume=True)

class Evil:
    def __init__(self, f): self.f = f
    def __reduce__(self): return open, (self.f,'w')

@pytest.mark.parametrize('where', [pickle.dumps, torch.save])
def test_nothing_is_executed(tmp_path, where):
    "A pickle that would open a file, with a checksum that fits"
    import hashlib, io
    buf = io.BytesIO()
    if where is torch.save: torch.save(dict(epoch=1, iter=0, model=Evil(str(tmp_path/'owned'))), buf)
    else: buf.write(pickle.dumps(Evil(str(tmp_path/'owned'))))
    (tmp_path/'1-0.pt').write_bytes(buf.getvalue())
    (tmp_path/INDEX).write_text(json.dumps([dict(file='1-0.pt', sha256=hashlib.sha256(buf.getvalue()).hexdigest())]))
    with pytest.warns(UserWarning, match='cannot be used'), pytest.raises(ValueError, match='none of the checkpoints'): load_state(tmp_path)
    assert not (tmp_path/'owned').exists()

def test_names_stay_in_the_folder(tmp_path):
    save_state(tmp_path/'..'/tmp_path.name, dict(epoch=0, iter=0))
    index = json.loads((tmp_path/INDEX).read_text())
    (tmp_path/INDEX).write_text(json.dumps([dict(index[0], file='../../etc/passwd')]))
    assert read_index(tmp_path)[0]['file']=='passwd'

def test_full_disk(make, tmp_path):
    "It is noticed before training; and if it fills up later, the earlier checkpoint is still there"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    class Fill(Callback):
        only_watches = True
        def before_epoch(self):
            if self.epoch==2: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        learn = make()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
        with pytest.raises(OSError, match='no room for checkpoints of'): learn.fit_mixtraining(2, 2, checkpoint=tmp_path/'run')
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not list((tmp_path/'run').glob('[!.]*')) and not learn.mix.rows
        with pytest.raises(OSError, match='no checkpoint could be written: .*File too large.* The one before is still there'):
            learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', cbs=Fill())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert [(o['epoch'],o['iter']) for o in read_index(tmp_path/'run')]==[(2,0),(1,0)] and load_state(tmp_path/'run')['epoch']==2
    learn = make()
    learn.fit_mixtraining(2, 2, rho=0, checkpoint=tmp_path/'run', resume=True)

def test_small_tmpfs(make, tmp_path):
    "A real disk that is full"
    d = tmp_path/'small'
    d.mkdir()
    if subprocess.run(['mount','-t','tmpfs','-o','size=300k','tmpfs',str(d)], capture_output=True).returncode: pytest.skip('no tmpfs here')
    try:
        with pytest.raises(OSError, match='No space left') as e: check_room(d/'run', 10**6)
        assert e.value.errno==errno.ENOSPC
        check_room(d/'run', 10**5)
        for i in range(2): save_state(d/'run', dict(epoch=i, iter=0, w=torch.zeros(20_000)))
        (d/'rest').write_bytes(bytes(100_000))
        with pytest.raises(OSError): save_state(d/'run', dict(epoch=2, iter=0, w=torch.zeros(20_000)))
        assert load_state(d/'run')['epoch']==1 and not list((d/'run').glob('*.tmp'))
    finally: subprocess.run(['umount',str(d)], check=True)
