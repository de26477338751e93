"Several processes train as one: on CPUs, over gloo"
import faulthandler, os, pickle, re, signal, socket, subprocess, sys, time, traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, timm, torch
from fastai.vision.all import (Callback, CategoryBlock, DataBlock, EarlyStoppingCallback, GradientAccumulation, ImageDataLoaders, MixedPrecision, PILImage,
    ProgressCallback, RandomSplitter, RocAucBinary, SaveModelCallback, TerminateOnNaNCallback, accuracy, noop, resnet18, set_seed, vision_learner)
from mixfast.all import (AE, BYOL, BatchFlip, Classify, DINO, HardAugment, KNNAccuracy, MAE, MixBlock, MixModel, MoCo, Segment, SimCLR, SimSiam, Sum, ViewTfms, mix_dls,
    mix_learner, set_up)
from mixfast.callback.files import _read_index as read_index
from mixfast.callback import files as checkpoint
from mixfast.callback.distributed import _allow, _synced_norms
from conftest import HOT, TINY, images, same, state
from test_dense import VOCAB, scenes
pytest.importorskip('accelerate')
import fastai.distributed # gives learners `distrib_ctx`
pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked')

HANGS = 120 # seconds

def child(f, folder, rank, n, port):
    "What a launcher's process does; its result is a file"
    os.setpgid(0, 0)
    faulthandler.dump_traceback_later(HANGS-20, file=open(folder/f'{rank}.trace', 'w'))
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    try: res = f(rank)
    except BaseException as e: res = e.with_traceback(None) if isinstance(e, (ValueError,FloatingPointError,RuntimeError,OSError)) else RuntimeError(traceback.format_exc())
    (folder/f'{rank}.tmp').write_bytes(pickle.dumps(res))
    (folder/f'{rank}.tmp').rename(folder/f'{rank}.pkl')
    os._exit(0)

@pytest.fixture
def launch(tmp_path):
    "A function that calls `f(rank)` in `n` processes and gives what they return or raise; None of one that died"
    def _launch(f, n):
        folder = tmp_path/f'launch{len(list(tmp_path.glob("launch*")))}'
        folder.mkdir()
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        pids = []
        for r in range(n):
            pid = os.fork()
            if not pid: child(f, folder, r, n, port)
            pids.append(pid)
        end = time.time()+HANGS
        while pids and time.time()<end:
            pids = [p for p in pids if not os.waitpid(p, os.WNOHANG)[0]]
            time.sleep(0.05)
        for p in pids:
            os.kill(p, signal.SIGKILL)
            os.waitpid(p, 0)
        assert not pids, 'some processes hang:\n' + '\n'.join(o.read_text() for o in folder.glob('*.trace'))
        return [pickle.loads((folder/f'{r}.pkl').read_bytes()) if (folder/f'{r}.pkl').exists() else None for r in range(n)]
    return _launch

def fixed_mask(b, n, n_mask, device=None): return torch.arange(n).expand(b, n) < n_mask

class Log(Callback):
    "What a step does, and to which images"
    order,run_valid = 70,False
    def __init__(self): self.rows = []
    def before_batch(self):
        m = self.phases
        x = self.xb[0] if self.xb else self.learn.x
        x = x[0] if isinstance(x, tuple) else x
        self.rows.append((self.epoch, self.iter, m.now.name, m.alpha, self.opt.hypers[0]['lr'], (x.flatten(1) @ torch.linspace(-1, 1, x[0].numel()).sin()).tolist()))

def fit(rank, world=1, bs=12, make_learn=None, seed=None, e=(4,4), cbs=(), after=None, distrib=dict(cpu=True), **kwargs):
    "A fit of one process among `world`; all that it leaves behind. `bs` is the batch of all together"
    set_seed(rank if seed is None else seed, reproducible=True)
    learn = (make_learn or learner)(bs//world)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    log = Log()
    with learn.distrib_ctx(**distrib): learn.fit_mixtraining(*e, **{'rho':0.5, 'recipe':HOT, 'cbs':[log, *cbs], **kwargs})
    rows = [{k:v for k,v in r.items() if 'seconds' not in k} for r in learn.mix.rows]
    res = dict(weights=state(learn.model), rows=rows, losses=[o.item() for o in learn.recorder.losses], log=log.rows,
               model=type(learn.model).__name__, loaders=[type(o).__name__ for o in learn.dls.loaders], skipped=learn.mix.skipped)
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k,v in res.items()} | (after(learn) if after else {})

def learner(bs, n=48, objective=None, valid=21, ssl=True, seed=3, metrics=accuracy, drop_last=True, mask=None, **kwargs):
    "`seed` None: each process draws its own"
    if mask: objective_module().random_mask = mask
    dls = mix_dls(images(n), images(valid, seed=1) if valid else None, lam=0.5, ssl=images(60, seed=2)[0] if ssl else None, bs=bs, seed=seed, drop_last=drop_last)
    return mix_learner(dls, objective=objective, metrics=metrics, **TINY, **kwargs)

def objective_module(): return sys.modules['mixfast.objective.autoencode']

def check_alike(res):
    "All processes end with the same, and did the same to images of their own"
    for o in res:
        if isinstance(o, Exception): raise o
        assert same(o['weights'], res[0]['weights']) and repr(o['rows'])==repr(res[0]['rows']) and o['losses']==res[0]['losses']
        assert [r[:5] for r in o['log']]==[r[:5] for r in res[0]['log']]
        assert o['model'] in ('VisionTransformer','ResNet','Sequential','TaskModel') # the user's own, not wrapped by anything
    return res[0]

def check_close(a, b, eps=1e-4):
    for k,v in a['weights'].items(): torch.testing.assert_close(v, b['weights'][k], atol=eps, rtol=0)
    for r,q in zip(a['rows'], b['rows'], strict=True):
        assert r.keys()==q.keys() and r['phase']==q['phase']
        np.testing.assert_allclose(*[np.hstack([np.atleast_1d(v) for k,v in o.items() if k!='phase']) for o in (r,q)], atol=eps, rtol=1e-3)
    np.testing.assert_allclose(a['losses'], b['losses'], atol=eps, rtol=1e-3)

def alone(launch, f): return check_alike(launch(f, 1))

@pytest.mark.parametrize('world', [2,3])
def test_all_phases(launch, world):
    "Processes whose own seeds differ; nothing is given a seed"
    kw = dict(make_learn=partial(learner, seed=None), e=(2,2))
    one = alone(launch, partial(fit, **kw))
    res = launch(partial(fit, world=world, **kw), world)
    a = check_alike(res)
    assert [r[:5] for r in a['log']]==[r[:5] for r in one['log']], 'phases, alpha and rates are those of one process'
    assert [r['phase'] for r in a['rows']]==['ssl','mix','sl']
    for rows in zip(*(o['log'] for o in res)): # all images are others
        xs = [x for r in rows for x in r[-1]]
        assert len(xs)==12 and len({round(x, 4) for x in xs})==12
    assert a['loaders']==['MixDL','MixDL']

@pytest.mark.parametrize('world,kwargs', [(2, dict(objective=AE)), (3, dict(mask=fixed_mask)), (2, dict(objective=MAE(visible_only='mix'), mask=fixed_mask)), (2, dict(ssl=False, objective=AE, valid=0, n=41, drop_last=False)), (2, dict(n=10, ssl=False, objective=AE, valid=7))])
def test_as_one_process(launch, world, kwargs):
    "Half the batch in two processes is the batch of one; nothing is random but the order and the partners"
    new = partial(learner, metrics=[accuracy, KNNAccuracy(every_phase=True)] if kwargs.get('valid', 1) else None, **kwargs)
    one = alone(launch, partial(fit, make_learn=new, seed=0))
    res = launch(partial(fit, world=world, make_learn=new, seed=0), world)
    check_close(check_alike(res), one)
    for r,*rs in zip(one['log'], *(o['log'] for o in res)):
        np.testing.assert_allclose(r[-1], sum((q[-1] for q in rs), []), rtol=1e-5, err_msg='the same images, in the same order')

@pytest.mark.parametrize('world', [2,3])
def test_shares_that_are_not_equal(launch, world):
    "Metrics of all kinds: a last batch of fewer images than processes, of one more or less for each, of more than `bs`"
    def each(pred, y): return torch.stack([(pred.argmax(1)==i).float().mean() for i in range(3)]) # a vector, [3]
    def recall(pred, y): return float((pred.argmax(1)==y).float().mean())
    for n,bs,kwargs in [(13, 12, {}), (5, 12, {}), (5, 3, dict(n=14, drop_last=False))][:world]:
        new = partial(learner, objective=AE, valid=n, **kwargs, metrics=[accuracy, recall, each, by_class(), KNNAccuracy(every_phase=True)])
        f = partial(fit, make_learn=new, seed=0, e=(1,2), rho=1, bs=bs)
        check_close(check_alike(launch(partial(f, world=world), world)), alone(launch, f))

def by_class():
    "A metric of all predictions at once"
    from fastai.metrics import F1Score
    return F1Score(average='macro')

def test_resume_on_other_numbers(launch, tmp_path):
    "2 processes begin, are killed within an epoch, 3 go on, are killed in validation, and one ends it"
    new = partial(learner, mask=fixed_mask, valid=7) # fewer than a batch
    one = alone(launch, partial(fit, make_learn=new, seed=0))
    folder = tmp_path/'run'
    kw = dict(make_learn=new, checkpoint=folder, every_steps=2, resume=True)
    for world,trap in ((2, Die(8)), (3, Die(1, training=False)), (2, Die(5))):
        res = launch(partial(fit, world=world, cbs=[trap], **kw), world)
        assert all('died' in str(o) for o in res), res
        assert len(read_index(folder))==2 and len(list(folder.glob('*.pt')))==2 and not list(folder.glob('*.tmp'))
    check_close(check_alike(launch(partial(fit, **kw), 1)), one)
    again = check_alike(launch(partial(fit, world=2, **kw), 2)) # it had ended
    check_close(again, one)

class Die(Callback):
    only_watches = True
    order = 2000
    def __init__(self, n, training=True, only=None): self.n,self.on,self.only = n,training,only
    def after_batch(self):
        self.n -= self.training==self.on
        if self.n: return
        if self.only is None: raise RuntimeError('died')
        if int(os.environ['RANK'])==self.only: os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize('name', ['MAE','norms','MoCo','DINO'])
def test_resume_is_exact(launch, tmp_path, name):
    "On as many processes, with all that is random, to the last bit; with statistics of batch normalisation, queue, teacher and center too"
    taught = dict(MoCo=MoCo(8, 16, queue=20), DINO=DINO(12, 16, 8))
    new = partial(view_learner, objective=taught[name], ssl_tfms=None) if name in taught else bn_learner if name=='norms' else learner
    kw = dict(world=2, make_learn=new, after=objective_state, e=(2,2) if name in taught else (4,4))
    ref = check_alike(launch(partial(fit, **kw), 2))
    kw |= dict(checkpoint=tmp_path/'run', every_steps=3, resume=True)
    for k in (4, 5): launch(partial(fit, cbs=[Die(k)], **kw), 2)
    res = check_alike(launch(partial(fit, seed=0, **kw), 2))
    assert same(res['weights'], ref['weights']) and same(res['objective'], ref['objective'])
    assert repr(res['rows'])==repr(ref['rows'])
    assert res['losses']==ref['losses']

def bn_learner(bs):
    dls = mix_dls(images(36, 16, 3), images(9, 16, 3, seed=1), bs=bs, seed=3, tfms=[BatchFlip()])
    return mix_learner(dls, 'test_resnet', AE, metrics=accuracy)

def test_batch_norm(launch):
    "Statistics are those of the first process, everywhere; without validation too"
    def new(bs): return mix_learner(mix_dls(images(24, 16, 3), bs=bs, seed=3), 'test_resnet', AE)
    check_alike(launch(partial(fit, world=2, make_learn=new), 2))

@pytest.mark.parametrize('on_nan', ['stop','skip'])
def test_nan_in_one_process(launch, on_nan):
    "All stop, or all skip the step"
    res = launch(partial(fit, world=2, make_learn=partial(learner, n=96), cbs=[Poison()], on_nan=on_nan), 2)
    if on_nan=='skip': assert check_alike(res)['skipped']==1
    else: assert all(isinstance(o, FloatingPointError) and 'at step 6 of the fit, in epoch 1, in the ssl phase' in str(o) for o in res), res

def test_other_callbacks_see_one_loss(launch):
    "fastai's `TerminateOnNaNCallback` ends the fit of all, where one has nan"
    a = check_alike(launch(partial(fit, world=2, make_learn=partial(learner, n=96), cbs=[Poison(), TerminateOnNaNCallback()]), 2))
    assert [r['epoch'] for r in a['rows']]==[0]

class Poison(Callback):
    order,run_valid = -10,False
    def before_batch(self):
        if os.environ['RANK']=='1' and (self.epoch,self.iter)==(1,1): self.learn.xb = (self.xb[0]*float('nan'),)

def test_callbacks(launch, tmp_path):
    "Gathered gradients, the best weights written once, an early stop: everywhere alike"
    def new(bs):
        learn = learner(bs)
        learn.path = tmp_path
        return learn.to_bf16()
    cbs = [GradientAccumulation(12), SaveModelCallback(monitor='accuracy', fname='best'), EarlyStoppingCallback(monitor='accuracy', patience=2)]
    a = check_alike(launch(partial(fit, world=2, make_learn=new, e=(3,9), cbs=cbs), 2))
    assert len(a['rows'])<11 and (tmp_path/'models'/'best.pth').exists()

@pytest.fixture
def files(tmp_path):
    (tmp_path/'images').mkdir()
    for i,(x,y) in enumerate(zip(*images(24))): PILImage.create(x[...,0]).save(tmp_path/'images'/f'{y}_{i:02}.png')
    return sorted((tmp_path/'images').glob('*.png'))

def label(f): return Path(f).name[0]

@pytest.mark.parametrize('workers', [0,2])
def test_files(launch, files, workers):
    "Images decoded one by one, by other processes too"
    def new(bs):
        block = DataBlock((MixBlock(lam=0.5, seed=0), CategoryBlock), get_y=label, splitter=RandomSplitter(0.3, seed=0))
        return mix_learner(block.dataloaders(files, bs=bs, num_workers=workers), objective=AE, metrics=accuracy, in_chans=3, **TINY)
    one = alone(launch, partial(fit, make_learn=new, seed=0, bs=4))
    check_close(check_alike(launch(partial(fit, make_learn=new, seed=0, bs=4, world=2), 2)), one)

def test_fastai_loaders(launch, files):
    "fastai's own loaders; its splitters need a seed"
    def new(bs, seed=0):
        dls = ImageDataLoaders.from_name_func(files[0].parent, files, label, valid_pct=0.25, seed=seed, bs=bs, num_workers=0)
        return vision_learner(dls, resnet18, pretrained=False, metrics=[accuracy, KNNAccuracy(every_phase=True)])
    res = launch(partial(fit, world=2, make_learn=new, bs=8, e=(1,2), rho=1), 2)
    assert check_alike(res)['loaders']==['TfmdDL','TfmdDL']
    res = launch(partial(fit, world=2, make_learn=partial(new, seed=None), bs=8, e=(2,2)), 2)
    assert all(re.match('process 1 would train with valid_images .* give a seed to whatever is drawn at random', str(o)) for o in res), res

def test_errors(launch, tmp_path):
    "Said in all processes, before any training"
    def says(text, world=2, **kwargs):
        res = launch(partial(fit, world=world, **kwargs), world)
        assert all(isinstance(o, ValueError) and text in str(o) for o in res), res
    kw = dict(checkpoint=tmp_path/'run')
    check_alike(launch(partial(fit, world=2, **kw), 2))
    says('has checkpoints of another fit', **kw)
    says("cannot resume from", world=3, bs=24, resume=True, **kw)
    says('distrib_ctx(cpu=True)', distrib={})
    def amp(bs):
        os.environ['ACCELERATE_MIXED_PRECISION'] = 'bf16'
        return learner(bs)
    says("mixed_precision of accelerate is 'bf16'", make_learn=amp)
    says('GradientAccumulation counts the images of each process', make_learn=partial(learner, n=41, drop_last=False), cbs=[GradientAccumulation(12)])
    fsdp = SimpleNamespace(accelerator=SimpleNamespace(distributed_type='FSDP', mixed_precision='no'))
    with pytest.raises(ValueError, match='not by FSDP: use torchrun'): _allow(fsdp)

def test_no_process_leaves_before_all_are_there(launch):
    "One that finds a mistake at once would take its connections along while another is still connecting"
    def run(rank):
        learn = learner(6)
        with learn.distrib_ctx(cpu=True):
            time.sleep(rank)
            came = time.monotonic()
            with pytest.raises(ValueError, match="rho"): learn.fit_mixtraining(1, 1, rho=2)
            return came,time.monotonic()
    res = launch(run, 2)
    (_,left),(came,_) = res
    assert left>=came

def test_a_full_disk(launch, tmp_path):
    "The first process cannot write: all say so"
    class Full(Callback):
        def before_epoch(self):
            if self.epoch==2: checkpoint._write_atomic = full
    def full(path, data): raise OSError(28, 'No space left on device', str(path))
    res = launch(partial(fit, world=2, checkpoint=tmp_path/'run', cbs=[Full()]), 2)
    assert all(isinstance(o, OSError) and 'No space left' in str(o) for o in res) and [o['epoch'] for o in read_index(tmp_path/'run')]==[2,1], res

def test_synced_norms():
    "timm's layers keep their activations, and afterwards the model has its own layers again"
    m = timm.create_model('mobilenetv3_small_050').eval()
    x,before = torch.randn(2, 3, 64, 64),list(m.modules())
    with torch.no_grad():
        y = m(x)
        with _synced_norms(m, True):
            assert sum(isinstance(o, torch.nn.SyncBatchNorm) for o in m.modules())>30
            torch.testing.assert_close(m(x), y)
    assert all(a is b for a,b in zip(m.modules(), before, strict=True))
    net = timm.create_model('resnet10t')
    m = MixModel(net, set_up(BYOL(8, 16), net, torch.zeros(2, 3, 32, 32)))
    with _synced_norms(m, True): assert sum(isinstance(o, torch.nn.SyncBatchNorm) for o in m.modules())==14+14+3, 'of model, teacher and three heads'

def test_gradient_checkpointing(launch):
    "Blocks that are computed again in the backward pass, for backbones that do not fit: the same weights"
    def new(bs):
        learn = learner(bs, mask=fixed_mask)
        learn.model.set_grad_checkpointing()
        return learn
    one = alone(launch, partial(fit, make_learn=partial(learner, mask=fixed_mask), seed=0))
    check_close(check_alike(launch(partial(fit, make_learn=new, seed=0, world=2), 2)), one)

def test_one_process_dies(launch):
    "The others end with an error"
    t = time.time()
    for trap in (Die(7, only=1), Die(1, training=False, only=1)):
        res = launch(partial(fit, world=3, cbs=[trap]), 3)
        assert res[1] is None and all('another process of this fit ended in epoch' in str(res[r]) for r in (0,2)), res
    assert time.time()-t<60

SCRIPT = """
import os, signal, sys, torch
from fastai.vision.all import *
from fastai.distributed import *
from mixfast.all import *
torch.set_num_threads(1)
x,y = np.random.default_rng(0).integers(0, 256, (48,8,8,1)).astype(np.uint8),np.arange(48)%3
class Die(Callback):
    only_watches = True
    def after_batch(self):
        if len(sys.argv)>2 and self.epoch==2 and rank_distrib()==1: os.kill(os.getpid(), signal.SIGKILL)
learn = mix_learner(mix_dls((x,y), (x[:9],y[:9]), bs=8, seed=0), 'vit_tiny_patch16_224', patch_size=2, embed_dim=32, depth=2, num_heads=2, cbs=Die())
with learn.distrib_ctx(cpu=True): learn.fit_mixtraining(2, 2, checkpoint=sys.argv[1], resume=True)
if not rank_distrib(): torch.save(learn.model.state_dict(), sys.argv[1]+'/end.pt')
"""

def test_launchers(tmp_path):
    "torchrun, one process killed; then accelerate goes on"
    (tmp_path/'train.py').write_text(SCRIPT)
    def start(*cmd): return subprocess.run([sys.executable, '-m', *cmd], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    t = time.time()
    out = start('torch.distributed.run', '--nproc-per-node', '2', 'train.py', 'run', 'die')
    assert out.returncode!=0 and 'SIGKILL' in out.stderr and time.time()-t<100, out.stderr
    assert [o['epoch'] for o in read_index(tmp_path/'run')]==[2,1]
    out = start('accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', 'train.py', 'run')
    assert out.returncode==0 and (tmp_path/'run'/'end.pt').exists(), out.stderr
    assert [o['epoch'] for o in read_index(tmp_path/'run')]==[3,2]

VIEWS = ViewTfms([], [lambda x: x.flip(3)], [lambda x: x.flip(2)])

def view_learner(bs, objective, ssl_tfms=VIEWS, **kwargs):
    "Two or three views that are not random, and no batch norm"
    dls = mix_dls(images(48), images(21, seed=1), lam=0.5, ssl=images(61, seed=2)[0], bs=bs, seed=3, ssl_tfms=ssl_tfms, **kwargs)
    return mix_learner(dls, objective=objective, metrics=accuracy, **TINY)

def objective_state(learn): return dict(objective=state(learn.mix.objective))

@pytest.mark.parametrize('objective,n', [(SimSiam(16, 8, norm=False), 1), (BYOL(8, 16, norm=False), 1), (SimCLR(8, 16, norm=False), 1), (MoCo(8, 16, queue=40), 1),
    (HardAugment(SimSiam(16, 8, norm=False), n=3, size=4), 1), (Sum(AE(dim=8), SimSiam(16, 8, norm=False)), 1), (MoCo(8, 16, queue=40), 2), (DINO(12, 16, 8), 2)], ids=lambda o: None if isinstance(o, int) else type(o).__name__)
def test_two_views_as_one_process(launch, objective, n):
    "Negatives, queue and teacher are those of one process, gathered in `n` batches; the spread, and SimCLR's loss in validation, are of each process's part of a batch"
    kw = dict(make_learn=partial(view_learner, objective=objective), seed=0, after=objective_state)
    def cbs(bs): return [GradientAccumulation(n*bs)] if n>1 else [] # of the images of a process
    one,two = alone(launch, partial(fit, cbs=cbs(12), **kw)),check_alike(launch(partial(fit, world=2, cbs=cbs(6), **kw), 2))
    for r in one['rows']+two['rows']:
        if 'spread' in r: assert 0<r.pop('spread')<1.3
        if r['phase']=='ssl' and isinstance(objective, SimCLR): del r['valid_loss']
    check_close(two, one)
    for k,v in one['objective'].items():
        if 'spread' not in k: torch.testing.assert_close(two['objective'][k], v, atol=1e-4, rtol=0)

def test_two_views_of_unequal_parts(launch):
    "Refused by those that compare with the images of other processes"
    for o,says in ((SimCLR(8, 16), 'SimCLR counts the images of each process'), (BYOL(8, 16), None)):
        res = launch(partial(fit, make_learn=partial(view_learner, objective=o, drop_last=False), bs=14, world=2, e=(1,1)), 2)
        assert all(says in str(r) for r in res) if says else check_alike(res)

def task_learner(bs, weights='learned', missing=False):
    "A class and a mask for each image; a third may have no class"
    objective_module().random_mask = fixed_mask
    x,y = scenes(48)
    if missing: y['kind'][::3] = -1
    dls = mix_dls((x,y), scenes(21, seed=1), vocab=VOCAB, bs=bs, seed=3)
    args = dict(arch='vit_tiny_patch16_224', patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return mix_learner(dls, **args, task=dict(kind=Classify(), mask=Segment('linear')), task_weights=weights)

@pytest.mark.parametrize('weights', [None,'learned'])
def test_several_tasks_as_one_process(launch, weights):
    "Losses by task, learned weights, IoU of the whole validation set"
    kw = dict(make_learn=partial(task_learner, weights=weights), seed=0)
    one,two = alone(launch, partial(fit, **kw)),check_alike(launch(partial(fit, world=2, **kw), 2))
    check_close(two, one)
    assert {'mask_miou','kind_accuracy','kind_loss'} <= set(two['rows'][-1])

def test_missing_labels_in_several_processes(launch):
    "Processes stay alike, however few labels one of them sees"
    check_alike(launch(partial(fit, world=2, make_learn=partial(task_learner, missing=True)), 2))
