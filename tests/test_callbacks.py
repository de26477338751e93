"Every callback that fastai ships, and some of a user's: each works in a fit with phases, and resumes, or is refused in words"
import ast, contextlib, csv, io, os, re
from collections import deque
from functools import partial
from pathlib import Path
import fastai, numpy as np, pandas as pd, pytest, torch
import fastai.vision.all as vision
from fastai.callback.core import FetchPredsCallback, GatherPredsCallback
from fastai.callback.fp16 import ModelToHalf, NonNativeMixedPrecision
from fastai.callback.hook import HookCallback
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.tensorboard import TensorBoardCallback, TensorBoardProjectorCallback
from fastai.distributed import ParallelTrainer
from fastai.learner import CastToTensor, Recorder, SkipToEpoch
from fastai.test_utils import VerboseCallback
from fastai.vision.all import (ActivationStats, CSVLogger, Callback, CategoryBlock, DataBlock, GradientClip, ImageDataLoaders, L, MixUp, OptimWrapper, PILImage,
    ProgressCallback, RandomSplitter, Resize, SaveModelCallback, ShowGraphCallback, accuracy, deepcopy, noop, set_seed, vision_learner)
from timm.utils import ModelEmaV3
from mixfast.all import Hypers, MixBlock, Recipe, mix_learner, no_decay
from conftest import TINY, images, same, state, warned

TABLE = list(csv.DictReader((Path(__file__).parent/'tables'/'callbacks.csv').open()))
FIT = dict(e_ssl=2, e_sl=2, rho=0.5) # an epoch of each phase

class EMA(Callback):
    "Validate by averaged weights"
    order = 70
    def before_fit(self): self.avg = ModelEmaV3(self.model, decay=0.9)
    def after_step(self): self.avg.update(self.model)
    def before_validate(self): self.own,self.learn.model = self.model,self.avg.module
    def after_validate(self): self.learn.model = self.own

class ListEMA(Callback):
    "The same by lists of tensors, which are those of the averaged model and of the model itself"
    def before_fit(self):
        self.avg,self.n = deepcopy(self.model).requires_grad_(False),0
        self.averages,self.params = list(self.avg.parameters()),list(self.model.parameters())
    def after_step(self):
        self.n += 1
        torch._foreach_lerp_(self.averages, self.params, 1/(self.n+1))
    def after_fit(self): self.learn.model.load_state_dict(self.avg.state_dict())

class Queue(Callback):
    "Scale the loss by the last ones"
    def before_fit(self): self.last = deque([1.], maxlen=3)
    def after_loss(self):
        if self.training:
            self.last.append(self.loss.item())
            self.learn.loss_grad = self.learn.loss_grad/max(self.last)

class QueueWithState(Queue):
    def state_dict(self): return dict(last=list(self.last))
    def load_state_dict(self, state): self.last.extend(state['last'])

class Die(Callback):
    "Fail in the mix phase"
    only_watches = True # the fit that goes on does without it
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==(1,1): raise RuntimeError('died')

# ---- learners

def label(f): return Path(f).name[0]

@pytest.fixture(scope='session')
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp('files')
    for i,(x,y) in enumerate(zip(*images(14))): PILImage.create(x[...,0]).save(path/f'{y}_{i:02}.png')
    return sorted(path.glob('*.png'))

def on_vision_learner(make, files, path, seed):
    dls = ImageDataLoaders.from_name_func(path, files, label, valid_pct=0.3, seed=0, bs=4, num_workers=0, item_tfms=Resize(32))
    return vision_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy, path=path)

def on_mixblock(make, files, path, seed):
    block = DataBlock((MixBlock(lam=0.5), CategoryBlock), get_y=label, splitter=RandomSplitter(0.3, seed=0))
    return mix_learner(block.dataloaders(files, bs=4, num_workers=0), metrics=accuracy, in_chans=3, path=path, **TINY)

def on_arrays(make, files, path, seed): return make(seed=seed)

@pytest.fixture(params=[on_arrays, on_vision_learner, on_mixblock], ids=lambda f: f.__name__)
def new(request, make, files, tmp_path, monkeypatch):
    "A function of a seed that makes a learner"
    monkeypatch.setattr(os, 'fsync', noop) # no power fails here
    def _new(seed):
        set_seed(seed, reproducible=True)
        learn = request.param(make, files, tmp_path, seed)
        learn.logger = noop
        return learn.remove_cb(ProgressCallback)
    return _new

def fit(learn, cbs, path, *more, **kwargs):
    "Train with callbacks, or with what a user types for them, and `more`; the weights"
    cbs = L(eval(cbs, {**vars(vision), **globals(), 'path':path}) if isinstance(cbs, str) else cbs)
    if any(isinstance(cb, ShowGraphCallback) for cb in cbs): cbs = ProgressCallback()+cbs
    if 'checkpoint' in kwargs: kwargs = dict(kwargs, every_steps=2 if hasattr(learn.dls.train, 'start_batch') else None)
    with contextlib.redirect_stdout(io.StringIO()): learn.fit_mixtraining(**FIT, cbs=[*cbs, *more], **kwargs)
    return state(learn.model)

# ---- the table

@pytest.mark.parametrize('row', [o for o in TABLE if o['result']!='not tried'], ids=lambda o: o['callback'])
@pytest.mark.filterwarnings('ignore')
def test_table(new, tmp_path, row):
    "A fit; then one that dies in its mix phase and goes on from other weights, to the same ones"
    cb,ckpt = row['callback'],dict(checkpoint=tmp_path/'run', resume=True)
    if row['result']=='refused':
        learn = new(0)
        before = state(learn.model)
        with pytest.raises(ValueError, match=re.escape(row['says'])): fit(learn, cb, tmp_path)
        assert same(state(learn.model), before)
        return
    want = fit(new(0), cb, tmp_path)
    with pytest.raises(RuntimeError, match='died'), contextlib.ExitStack() as stack:
        if row['checkpoint']=='refused': stack.enter_context(pytest.warns(UserWarning, match=f"will not be able to go on .*{row['says']}"))
        fit(new(0), cb, tmp_path, Die(), **ckpt)
    if row['checkpoint']=='resumes': assert same(fit(new(7), cb, tmp_path, **ckpt), want)
    else:
        with pytest.raises(ValueError, match=f"cannot resume from .*{row['says']}.* Give it state_dict"): fit(new(7), cb, tmp_path, **ckpt)

def callbacks_of_fastai():
    "The names of all classes in fastai's source that have `Callback` among their ancestors"
    classes = {}
    for f in Path(fastai.__file__).parent.rglob('*.py'):
        for o in ast.walk(ast.parse(f.read_text())):
            if isinstance(o, ast.ClassDef): classes[o.name] = {b.id for b in o.bases if isinstance(b, ast.Name)}
    found,more = set(),{'Callback'}
    while more: more = {k for k,bases in classes.items() if bases & more} - found; found |= more
    return found

def test_table_is_complete():
    "A new version of fastai with a new callback makes this fail: try it, and say in the table what it does"
    names = {re.match(r'\w+', o['callback'])[0] for o in TABLE}
    missing = callbacks_of_fastai()-names
    assert not missing, f"tests/tables/callbacks.csv does not say what a fit does with {sorted(missing)}"
    assert {'MixUp','LRFinder','WandbCallback'}<=callbacks_of_fastai()
    assert {o['result'] for o in TABLE}=={'works','refused','not tried'} and all(o['says'] for o in TABLE if o['result']!='works')

# ---- what is put back

def resumed(new, path, cbs):
    "`cbs`, a function, gives the callbacks: those of an undisturbed fit, and of one that went on, with the weights of both"
    a,b,ckpt = cbs(),cbs(),dict(checkpoint=path/'run', resume=True)
    want = fit(new(0), a, path)
    with pytest.raises(RuntimeError, match='died'): fit(new(0), cbs(), path, Die(), **ckpt)
    return a,b,want,fit(new(7), b, path, **ckpt)

arrays = pytest.mark.parametrize('new', [on_arrays], indirect=True, ids=['on_arrays'])

@arrays
@pytest.mark.parametrize('cls', [EMA, ListEMA])
def test_an_average_goes_on(new, tmp_path, cls):
    "Bit for bit, also where a list holds the tensors of a module"
    a,b,want,got = resumed(new, tmp_path, cls)
    assert same(state(a.avg), state(b.avg)) and same(want, got)
    if cls is ListEMA: assert b.n==a.n==9 and all(x is y for x,y in zip(b.averages, b.avg.parameters()))

@arrays
def test_csv_logger_goes_on(new, tmp_path):
    "The file is that of an undisturbed fit, but for the seconds; rows of steps that are taken again are there once"
    ckpt,read = dict(checkpoint=tmp_path/'run', resume=True),lambda: pd.read_csv(tmp_path/'history.csv').drop(columns='seconds')
    fit(new(0), 'CSVLogger()', tmp_path)
    want = read()
    with pytest.raises(RuntimeError, match='died'): fit(new(0), 'CSVLogger()', tmp_path, Die(), **ckpt)
    fit(new(7), 'CSVLogger()', tmp_path, **ckpt)
    pd.testing.assert_frame_equal(read(), want)
    assert len(want)==3
    with pytest.raises(ValueError, match='has checkpoints of another fit'): fit(new(7), 'CSVLogger()', tmp_path, checkpoint=tmp_path/'run')
    pd.testing.assert_frame_equal(read(), want)

@arrays
def test_two_of_a_kind(new, tmp_path):
    "Each tracks its own best"
    a,b,_,_ = resumed(new, tmp_path, lambda: [SaveModelCallback('accuracy', fname='acc'), SaveModelCallback(fname='loss')])
    assert [o.best for o in a]==[o.best for o in b] and a[0].best!=a[1].best

# ---- who is there

@arrays
def test_other_callbacks(new, tmp_path):
    "Which were there, and which are, before any training; who only watches may come and go"
    ckpt,best = dict(checkpoint=tmp_path/'run', resume=True),"SaveModelCallback(monitor='accuracy')"
    with pytest.raises(RuntimeError, match='died'): fit(new(0), [SaveModelCallback('accuracy'), CSVLogger()], tmp_path, Die(), **ckpt)
    for cbs,now in (([MixUp(0.3)], ['MixUp(alpha=0.3)']), ([], None), ([SaveModelCallback('accuracy'), GradientClip], ['GradientClip()',best]),
                    ([SaveModelCallback()], ['SaveModelCallback()']), ([SaveModelCallback('accuracy'), EMA()], ['EMA()',best])):
        learn = new(0)
        before = state(learn.model)
        with pytest.raises(ValueError, match=re.escape(f"callbacks was {[best]!r}, and is {now!r}")): fit(learn, cbs, tmp_path, **ckpt)
        assert same(state(learn.model), before)
    fit(new(0), [SaveModelCallback('accuracy'), ActivationStats], tmp_path, ProgressCallback(), **ckpt)

@arrays
def test_it_is_said_before_training(new, tmp_path):
    "That a fit cannot go on is a warning at its beginning, without a checkpoint nobody needs to know"
    class Stop(Callback):
        only_watches = True
        def before_epoch(self): raise KeyboardInterrupt
    for cb in (Queue(), Callback(after_step=lambda self: None)): # a callback made of functions is known by what it holds
        with pytest.raises(KeyboardInterrupt), warned('always') as w:
            fit(new(0), cb, tmp_path, Stop(), checkpoint=tmp_path/type(cb).__name__)
        assert [re.findall('with this fit: (.*), which', str(o.message)) for o in w if 'resume=True' in str(o.message)]==[['Queue holds a deque (last)']]*isinstance(cb, Queue)
    with warned('error', UserWarning): fit(new(0), Queue(), tmp_path)

# ---- optimizers and what logs them

def adamw(params, **kwargs): return OptimWrapper(params, torch.optim.AdamW, **kwargs) # as fastai's documentation has it

def test_an_optimizer_by_a_function(make):
    "It trains what a `partial` of the same does: norms, biases and embeddings are left undecayed; groups freeze and have rates of their own"
    def split(m): return [[p for n,p in m.named_parameters() if ('head' in n)==b] for b in (False,True)]
    decay = Recipe(Hypers(1e-3, wd=0.2), Hypers(1e-3, wd=0.2))
    for everything in (False, True):
        def trained(opt_func):
            learn = make(opt_func=opt_func, splitter=split, wd_bn_bias=everything)
            learn.fit_mixtraining(**FIT, recipe=decay)
            return learn
        a,b = trained(adamw),trained(partial(OptimWrapper, opt=torch.optim.AdamW))
        assert same(state(a.model), state(b.model))
        wd = {p: h['wd'] for p,_,_,h in a.opt.all_params()}
        assert {p for p in wd if wd[p]==0}==(set() if everything else no_decay(a.model)) and max(wd.values())==0.2
    a.freeze()
    assert {n for n,p in a.model.named_parameters() if p.requires_grad and 'norm' not in n}=={'head.weight','head.bias'}
    a.unfreeze()
    a.opt.set_hyper('lr', slice(1e-4, 1e-2))
    assert np.allclose([h['lr'] for h in a.opt.hypers], [1e-4,1e-4,1e-2,1e-2])
    a.fit(1, slice(1e-4, 1e-3))

def test_an_optimizer_without_decay(make):
    learn = make(opt_func=partial(OptimWrapper, opt=torch.optim.Rprop))
    learn.fit_mixtraining(**FIT)
    assert 'wd' not in learn.opt.hypers[0]

@pytest.mark.filterwarnings('ignore')
def test_tensorboard_logs_numbers(make, tmp_path):
    "The graph, rates and losses of all steps, predictions; whatever torch's optimizer leaves open is none of them"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make()
    assert learn.opt is None or None not in learn.opt.hypers[0].values()
    learn.fit_mixtraining(**FIT, cbs=TensorBoardCallback(log_dir=tmp_path/'tb'))
    log = EventAccumulator(str(tmp_path/'tb')).Reload()
    assert log.Tags()['graph'] and {'train_loss','valid_loss','lr_0','lr_1','wd_0'}<=set(log.Tags()['scalars'])
    assert np.allclose([o.value for o in log.Scalars('lr_0')][:3], learn.recorder.lrs[:3]) and {o.value for o in log.Scalars('wd_1')}=={0.}
