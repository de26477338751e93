"""A fit among fastai's other callbacks, and every way out of one."""
from dataclasses import replace

import numpy as np, pandas as pd, pytest, timm, torch, torchvision
from PIL import Image

from conftest import HOT, images, same, state
from mixfast.all import (CSVLogger, Callback, CancelBatchException, CancelEpochException, CancelFitException,
    CancelTrainException, CancelValidException, CrossEntropyLossFlat, DataBlock, DataLoaders, EarlyStoppingCallback,
    GradientAccumulation, GradientClip, ImageBlock, ImageDataLoaders, Learner, MixModel, MixUp, ProgressCallback, RandomSplitter,
    Recipe, SaveModelCallback, TerminateOnNaNCallback, accuracy, find_layout, get_image_files, load_learner, mix_dls, mix_learner, noop,
    resnet18, set_seed, vision_learner)
from mixfast.data.mix import phase_dl

FIT = dict(e_ssl=4, e_sl=4, rho=0.5, recipe=HOT)
PHASES = ['ssl']*2+['mix']*2+['sl']*2

def works(learn):
    "A plain classifier that can be used and trained again"
    assert learn.mix.phase is None and type(learn.loss_func).__name__=='CrossEntropyLossFlat'
    preds,y = learn.get_preds()
    assert preds.shape==(9,3) and torch.allclose(preds.sum(1), torch.ones(9), atol=1e-5)
    assert learn.dls.train is learn.dls.sl
    learn.fit_mixtraining(1, 1, rho=0, recipe=HOT)
    assert learn.mix.history.phase.tolist()==['ssl','sl']

class At(Callback):
    "Raise `exc` at the `n`-th `event` of a fit"
    order = 200
    def __init__(self, event, exc, n=1): self.n,self.exc = n,exc; setattr(self, event, self.act)
    def act(self):
        self.n -= 1
        if self.n==0: raise self.exc

EVENTS = """before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step
    after_batch after_train before_validate after_validate after_epoch after_fit""".split()
CANCEL = [CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException]

@pytest.mark.parametrize('n', [1, 8])
@pytest.mark.parametrize('event', EVENTS)
def test_exception_anywhere(make, event, n):
    learn = make()
    try: learn.fit_mixtraining(**FIT, cbs=[At(event, ZeroDivisionError('stop'), n), MixUp()])
    except ZeroDivisionError: pass
    works(learn)

@pytest.mark.parametrize('exc', CANCEL)
@pytest.mark.parametrize('event', EVENTS)
def test_cancel_anywhere(make, event, exc):
    for n in (1, 5):
        learn = make()
        try: learn.fit_mixtraining(**FIT, cbs=At(event, exc('stop'), n))
        except (exc, AttributeError, AssertionError, IndexError) as e: # fastai does not expect each of them everywhere
            assert isinstance(e, exc) or 'MixRecorder' not in str(e) and 'MixTraining' not in str(e), e
        works(learn)

def test_keyboard_interrupt(make):
    learn = make()
    with pytest.raises(KeyboardInterrupt): learn.fit_mixtraining(**FIT, cbs=At('after_backward', KeyboardInterrupt(), 10))
    assert learn.mix.history.phase.tolist()==['ssl','ssl','mix'] # what was done is kept
    works(learn)

def test_skipped_epochs_do_not_lose_their_phase(make):
    class Skip(Callback):
        order = 70 # as fastai's SkipToEpoch
        def before_epoch(self):
            if self.epoch in (0,2): raise CancelEpochException
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=Skip())
    assert learn.mix.history.dropna(subset='train_loss').phase.tolist()==['ssl','mix','sl','sl']

# ---- what is recorded

def test_history_and_table(make, tmp_path):
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=CSVLogger())
    h = learn.mix.history
    assert list(h)==['epoch','phase','train_loss','ssl_loss','sl_loss','valid_loss','accuracy','ssl_share',
        'train_seconds','seconds']
    assert h.phase.tolist()==PHASES and h.epoch.tolist()==list(range(6))
    assert h.ssl_loss.notna().tolist()==[True]*4+[False]*2 and h.sl_loss.notna().tolist()==[False]*2+[True]*4
    assert h.accuracy.notna().tolist()==[False]*2+[True]*4
    assert h.ssl_share.notna().tolist()==[p=='mix' for p in PHASES] and h.ssl_share.dropna().between(0, 1).all()
    assert np.allclose(h.train_loss[2:4], (h.ssl_loss+h.sl_loss)[2:4]/2, rtol=1e-5)
    assert (h.seconds>=h.train_seconds).all() and (h.train_seconds>0).all()
    assert learn.mix.seconds==pytest.approx(h.groupby('phase').train_seconds.sum().to_dict())
    csv = pd.read_csv(tmp_path/'history.csv')
    assert list(csv)==['epoch','train_loss','valid_loss','accuracy','ssl_loss','sl_loss','seconds','phase'] and csv.phase.tolist()==PHASES
    assert learn.recorder.metric_names[1:3]==['train_loss','valid_loss'] # where other callbacks look for them
    assert len(learn.recorder.losses)==18 and learn.recorder.iters==[3,6,9,12,15,18]
    learn.recorder.plot_loss(); learn.recorder.plot_sched()
    assert np.isclose(learn.validate()[1], h.accuracy.iloc[-1])

def test_smoothed_loss_restarts(make):
    "The first smoothed loss of a phase is the loss of its first batch"
    first = {}
    class Log(Callback):
        order,run_valid = 100,False
        def after_batch(self):
            if self.iter==0: first.setdefault(self.phases.now.name, (self.smooth_loss.item(), self.loss.item()))
    make().fit_mixtraining(**FIT, cbs=Log())
    assert list(first)==['ssl','mix','sl'] and all(a==pytest.approx(b, rel=1e-5) for a,b in first.values())

def test_progress_names_the_phase(make):
    comments = []
    class Log(Callback):
        order,run_valid = 61,False # just after the bar is drawn
        def after_batch(self): comments.append(str(self.progress.pbar.comment).split()[0])
    learn = make()
    learn.add_cb(ProgressCallback())
    learn.fit_mixtraining(**FIT, cbs=Log())
    assert comments==[p for p in PHASES for _ in range(3)]

def test_train_metrics(make):
    learn = make()
    learn.recorder.train_metrics = True
    learn.fit_mixtraining(**FIT)
    h = learn.mix.history
    assert h.train_accuracy.notna().tolist()==h.valid_accuracy.notna().tolist()==[False]*2+[True]*4
    assert learn.recorder.train_metrics

def test_pictures(make):
    learn = make()
    with pytest.raises(ValueError, match='no history yet'): learn.mix.plot_history()
    learn.mix.show_reconstructions(n=3)
    learn.fit_mixtraining(**FIT)
    axs = learn.mix.plot_history()
    assert [ax.get_ylabel() for ax in axs]==['loss','accuracy','ssl_share','lr','alpha']
    before = torch.get_rng_state()
    learn.mix.show_reconstructions(n=3)
    assert torch.equal(before, torch.get_rng_state()) # looking does not change what comes next

# ---- other callbacks

@pytest.mark.parametrize('monitor', ['valid_loss','accuracy','train_loss'])
def test_trackers_see_supervised_epochs_only(make, monitor):
    saver = SaveModelCallback(monitor=monitor)
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=saver)
    h = learn.mix.history
    sup = h[h.phase=='sl'] if monitor=='train_loss' else h[h.phase!='ssl'] # the training loss changes its meaning at SL
    assert saver.best==pytest.approx(sup[monitor].max() if monitor=='accuracy' else sup[monitor].min())

def test_tracker_without_supervised_epochs(make):
    saver = SaveModelCallback()
    learn = make()
    learn.fit_mixtraining(3, 0, recipe=HOT, cbs=saver)
    assert saver.best==learn.mix.history.valid_loss.min()

def test_save_every_epoch(make):
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=SaveModelCallback(every_epoch=True))
    assert len(list((learn.path/'models').glob('model_*.pth')))==6

@pytest.mark.parametrize('monitor', ['valid_loss','accuracy'])
def test_early_stopping_waits_for_supervision(make, monitor):
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=EarlyStoppingCallback(monitor=monitor, min_delta=100, patience=2))
    assert learn.mix.history.phase.tolist()==['ssl','ssl','mix','mix','sl'] # best at the first mix epoch, then two epochs of patience
    works(learn)

def test_gradient_accumulation_equals_the_large_batch(make):
    "Two batches of 4 give the step of one of 8, at the same rate"
    learns = []
    for bs in (8,4):
        learn = make(bs=bs, objective='ae')
        for name in ('ssl','sl'): phase_dl(learn.dls, name).shuffle = False
        learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT, cbs=[ConstantRate()] + ([GradientAccumulation(8)] if bs==4 else []))
        learns.append(learn)
    a,b = (state(o.model) for o in learns)
    assert learns[0].mix.history.phase.tolist()==learns[1].mix.history.phase.tolist()==['ssl','mix','sl']
    assert max((a[k]-b[k]).abs().max().item() for k in a)<1e-4

def test_the_rate_follows_the_images_of_a_step(make):
    "As many as are gathered: 8 batches of 8 have the largest rate of one of 64"
    top = {}
    for bs,cbs in ((64,[]), (8,[GradientAccumulation(64)]), (8,[])):
        learn = make(n=64, bs=bs)
        learn.fit_sl(8, recipe=Recipe(HOT.ssl, replace(HOT.sl, warmup=0.)), cbs=cbs)
        top[bs,len(cbs)] = max(learn.recorder.lrs)
    assert top[64,0]==top[8,1]==8*top[8,0]

class ConstantRate(Callback):
    "Takes the schedule out, which counts batches"
    order,run_valid = 61,False
    def before_batch(self): self.opt.set_hyper('lr', 1e-3)

def test_what_gradient_accumulation_gathered_stays_in_its_phase(make):
    steps = []
    class Log(Callback):
        run_valid = False
        def after_step(self): steps.append((self.phases.now.name, self.epoch, self.iter))
    make().fit_mixtraining(2, 2, rho=0.5, recipe=HOT, cbs=[GradientAccumulation(16), Log()]) # 3 batches of 8 an epoch: one is left over
    assert steps==[('ssl',0,1), ('mix',1,1), ('sl',2,1)]

def test_gradient_clip_mixup_and_others(make):
    learn = make()
    seen = []
    class Log(Callback):
        order,run_valid = 100,False
        def before_batch(self): seen.append((self.phases.now.name, hasattr(self.mix_up, 'yb1') and self.mix_up.run))
    learn.fit_mixtraining(**FIT, cbs=[GradientClip(0.1), MixUp(), TerminateOnNaNCallback(), Log()])
    assert set(seen)=={('ssl',False), ('mix',True), ('sl',True)}
    works(learn)

def test_bf16_on_cpu(make):
    learn = make().to_bf16()
    seen = {}
    h = learn.model.blocks[0].mlp.fc1.register_forward_hook(lambda m,i,o: learn.mix.phase and seen.update({learn.mix.phase: o.dtype}))
    learn.fit_mixtraining(**FIT)
    assert seen==dict(ssl=torch.bfloat16, mix=torch.bfloat16, sl=torch.bfloat16)
    assert not learn.mix.history.train_loss.isna().any()
    h.remove()
    works(learn)
    with pytest.raises(ZeroDivisionError): learn.fit_mixtraining(**FIT, cbs=At('after_pred', ZeroDivisionError('stop'), 7))
    assert not torch.is_autocast_enabled('cpu') # fastai leaves it on when a batch is interrupted
    works(learn)

def test_same_seed_same_weights(make):
    runs = []
    for _ in range(2):
        learn = make(ssl=images(30, seed=3)[0], seed=7)
        learn.fit_mixtraining(**FIT)
        runs.append((state(learn.model), learn.mix.history.drop(columns=['seconds','train_seconds'])))
    assert same(runs[0][0], runs[1][0]) and runs[0][1].equals(runs[1][1])
    other = make(ssl=images(30, seed=3)[0], seed=8)
    other.fit_mixtraining(**FIT)
    assert not same(runs[0][0], state(other.model))

# ---- the classifier

def test_serves_as_a_classifier(make, tmp_path):
    learn = make()
    learn.fit_mixtraining(**FIT)
    x,y = images(9, seed=1)
    name,i,probs = learn.predict(x[0])
    assert name==str(int(i)) and probs.shape==(3,)
    big = Image.fromarray(x[0,...,0]).resize((16,16), Image.NEAREST).convert('RGB') # another size and mode
    big.save(tmp_path/'im.png')
    assert learn.predict(tmp_path/'im.png')[0] in '012' and learn.predict(big)[2].shape==(3,)
    preds = learn.get_preds(dl=learn.dls.test_dl(list(x)))[0]
    assert torch.equal(preds, learn.get_preds()[0])
    assert learn.get_preds(dl=learn.dls.test_dl((x,y), with_labels=True))[1].tolist()==y.tolist()
    assert len(learn.get_preds(ds_idx=0)[0])==24
    learn.show_results(); learn.dls.show_batch(); learn.dls.valid.show_batch()
    learn.export('e.pkl')
    new = load_learner(tmp_path/'e.pkl')
    assert new.predict(x[0])[2].tolist()==pytest.approx(probs.tolist(), abs=1e-6)
    learn.save('w'); learn.load('w')
    works(learn)

def test_lr_find_and_plain_fits(make):
    learn = make()
    before = state(learn.model)
    learn.lr_find(num_it=5, show_plot=False)
    assert same(before, state(learn.model))
    obj = state(learn.mix.objective)
    learn.fit_one_cycle(2, 1e-3)
    assert same(obj, state(learn.mix.objective)) and learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','time']
    learn.fit_mixtraining(**FIT)
    learn.fine_tune(1)

# ---- any learner

def file_dls(tmp_path, n=24):
    "fastai's ordinary loaders from files"
    x,y = images(n, 32, 3)
    for i,(im,k) in enumerate(zip(x, y)): Image.fromarray(im).save(tmp_path/f'{k}_{i}.png')
    set_seed(0)
    return ImageDataLoaders.from_name_func(tmp_path, sorted(tmp_path.glob('*.png')), lambda o: o.split('_')[0], valid_pct=0.25, bs=8,
                                           num_workers=0, seed=0)

@pytest.mark.parametrize('arch', ['resnet18','vit_tiny_patch16_224','timm'])
def test_plain_learners(tmp_path, arch):
    dls = file_dls(tmp_path)
    if arch=='resnet18': learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
    elif arch=='timm': learn = Learner(dls, timm.create_model('convnext_atto', num_classes=3), metrics=accuracy)
    else: learn = vision_learner(dls, arch, pretrained=False, metrics=accuracy, img_size=32, patch_size=8)
    model,lf = learn.model,learn.loss_func
    learn.remove_cb(ProgressCallback); learn.logger = noop
    x = torch.randn(2,3,32,32)
    with torch.no_grad(): a = model.eval()(x)
    learn.to_mix()
    with torch.no_grad(): assert torch.equal(a, learn.model.eval()(x)) and learn.model is model
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl'] and learn.dls is dls and learn.loss_func is lf
    assert type(learn.mix.objective).__name__==('MAE' if arch.startswith('vit') else 'AE')
    learn.predict(tmp_path/'0_0.png'); learn.show_results(); learn.mix.show_reconstructions(n=2)
    learn.fit_ssl_sl(1, 1); learn.fit_sl(1)
    assert learn.mix.history.phase.tolist()==['sl']
    learn.export('e.pkl')
    assert load_learner(learn.path/'e.pkl').predict(tmp_path/'0_0.png')[0] in '012'

def test_frozen_learner_is_unfrozen(tmp_path):
    learn = vision_learner(file_dls(tmp_path), 'resnet18', pretrained=False)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.freeze()
    w = learn.model[0].model.conv1.weight.clone()
    learn.fit_mixtraining(1, 1)
    assert not torch.equal(w, learn.model[0].model.conv1.weight)

def test_change_of_objective(make):
    learn = make()
    learn.to_mix('ae')
    assert type(learn.mix.objective).__name__=='AE' and not isinstance(learn.model, MixModel)
    learn.fit_mixtraining(**FIT)
    assert len([o for o in learn.cbs if o.name=='mix'])==1

# ---- edges of the data

def test_fewer_images_than_a_batch(make, tmp_path):
    learn = make(n=6, bs=64)
    before = state(learn.model)
    learn.fit_mixtraining(2, 2, rho=0.5)
    assert not same(before, state(learn.model)) and len(learn.recorder.losses)==3
    learn = vision_learner(file_dls(tmp_path, n=9), 'resnet18', pretrained=False)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    assert len(learn.dls.train)==0
    learn.fit_mixtraining(1, 1)
    assert len(learn.recorder.losses)==2

def test_unlabelled_only(make):
    dls = mix_dls(ssl=images(24)[0], bs=8)
    learn = make(dls=dls, metrics=[])
    learn.fit_mixtraining(2, 0)
    assert learn.mix.history.phase.tolist()==['ssl','ssl'] and learn.mix.history.ssl_loss.notna().all()
    learn.mix.plot_history(); learn.mix.show_reconstructions()
    with pytest.raises(ValueError, match='have no labels'): learn.fit_mixtraining(2, 1)

def test_no_validation_set(make):
    learn = make(valid=False)
    learn.fit_mixtraining(**FIT)
    assert learn.mix.history.valid_loss.isna().all()

def test_one_epoch_each(make):
    for rho,want in ((0,['ssl','sl']), (0.5,['ssl','sl']), (1,['mix'])):
        learn = make()
        learn.fit_mixtraining(1, 1, rho=rho)
        assert learn.mix.history.phase.tolist()==want

def test_last_batch_may_be_smaller(make):
    learn = make(n=20, bs=8, drop_last=False)
    learn.fit_mixtraining(**FIT)
    assert len(learn.recorder.losses)==18

# ---- bad input is an error before anything has changed

@pytest.mark.parametrize('kw,err,match', [
    (dict(rho=1.1), ValueError, r'rho must lie in \[0,1\], got 1.1'),
    (dict(rho=-0.1), ValueError, r'rho must lie in \[0,1\]'),
    (dict(rho=float('nan')), ValueError, r'rho must lie in \[0,1\], got nan'),
    (dict(rho='half'), TypeError, 'rho must be a number'),
    (dict(e_ssl=-1), ValueError, 'e_ssl must be 0 or more epochs, got -1'),
    (dict(e_sl=2.5), TypeError, 'e_sl must be a whole number of epochs, got 2.5'),
    (dict(e_ssl=0, e_sl=0), ValueError, 'nothing to train'),
    (dict(alpha=1.5), ValueError, r'alpha must lie in \[0,1\], got 1.5'),
    (dict(alpha=float('nan')), ValueError, r'alpha must lie in \[0,1\]'),
    (dict(alpha_sched='step'), ValueError, 'alpha_sched must be None or one of'),
    (dict(sl_sched='none'), ValueError, 'sl_sched must be one of'),
    (dict(recipe='vit_xl'), ValueError, 'recipe must be one of'),
    (dict(recipe=3), TypeError, 'recipe must be a name or a Recipe'),
])
def test_bad_arguments(make, kw, err, match):
    learn = make()
    before = state(learn.model)
    with pytest.raises(err, match=match): learn.fit_mixtraining(**{**FIT, **kw})
    assert same(before, state(learn.model)) and not learn.mix.rows

x,y = images(12)
@pytest.mark.parametrize('kw,err,match', [
    (dict(sl=(x,y), lam=1.5), ValueError, r'lam must lie in \[0,1\], got 1.5'),
    (dict(sl=(x,y), lam=float('nan')), ValueError, 'lam must lie in'),
    (dict(sl=(x[:0],y[:0])), ValueError, 'sl has no images'),
    (dict(sl=(x,y), ssl=x[:0]), ValueError, 'ssl has no images'),
    (dict(sl=(x,y), valid=(x[:0],y[:0])), ValueError, 'valid has no images'),
    (dict(sl=(x,y-1)), ValueError, r'labels of sl must lie in 0..1 for 2 classes, got -1..1'),
    (dict(sl=(x,y), vocab='ab'), ValueError, r'labels of sl must lie in 0..1 for 2 classes, got 0..2'),
    (dict(sl=(x,y), valid=(x,y+1)), ValueError, 'labels of valid must lie in 0..2'),
    (dict(sl=(x,y[:5])), ValueError, 'one label for each of 12 images'),
    (dict(sl=(x,y/2)), TypeError, 'whole class numbers'),
    (dict(sl=x), ValueError, r'sl must be a pair \(images, labels\)'),
    (dict(sl=([x[0],x[1][:4]],[0,1])), ValueError, 'images of one size'),
    (dict(sl=(x,y), ssl=np.zeros((3,8,8,2), np.uint8)), ValueError, 'images of 2 channels cannot be made images of 1'),
    (dict(sl=(x,y), valid=images(3, 16)), ValueError, 'valid must have images like those to train on'),
    (dict(sl=(x,y), seed=-1), ValueError, 'seed must be a whole number from 0 up, got -1'),
    (dict(sl=(x,y), seed=0.5), ValueError, 'seed must be a whole number from 0 up, got 0.5'),
    (dict(sl=(x,y), tfms=3), TypeError, 'tfms must be functions of a batch'),
    (dict(sl=(x/255,y)), TypeError, 'must be uint8 images'),
    (dict(sl=(x.transpose(0,3,1,2),y)), ValueError, 'channels last'),
    (dict(sl=(x,y), bs=0), ValueError, 'bs must be a whole number of images'),
    (dict(), ValueError, 'pass labelled data'),
])
def test_bad_data(kw, err, match):
    with pytest.raises(err, match=match): mix_dls(**kw)

def test_models_that_do_not_fit(make, tmp_path):
    with pytest.raises(TypeError, match='cannot be split into features and head'): make(arch=torchvision.models.resnet18(num_classes=3))
    with pytest.raises(ValueError, match="Use objective='ae'"): make(size=32, c=3, arch='resnet18', objective='mae')
    with pytest.raises(TypeError, match='gives features list'): make(size=240, c=3, n=3, bs=2, arch='crossvit_tiny_240')
    with pytest.raises(ValueError, match='objective must be one of'): make(objective='mea')
    learn = Learner(file_dls(tmp_path), torchvision.models.resnet18(num_classes=3))
    with pytest.raises(TypeError, match='cannot be split'): learn.fit_mixtraining(1, 1)
    assert not isinstance(learn.model, MixModel)

def test_unlabelled_fastai_data(tmp_path):
    file_dls(tmp_path)
    dls = DataBlock(blocks=ImageBlock, get_items=get_image_files, splitter=RandomSplitter(seed=0)).dataloaders(tmp_path, bs=8, num_workers=0)
    learn = Learner(dls, timm.create_model('convnext_atto', num_classes=0), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(ProgressCallback); learn.logger = noop
    with pytest.raises(ValueError, match='have no labels'): learn.fit_mixtraining(1, 1)
    learn.fit_mixtraining(1, 0)
    assert learn.mix.history.ssl_loss.notna().all()

def test_new_images_keep_the_batch_size(make):
    learn = make(bs=64)
    assert learn.dls.valid.bs==9 and learn.dls.test_dl(list(images(70)[0])).bs==64
    learn.export('e.pkl')
    assert load_learner(learn.path/'e.pkl').dls.test_dl(list(images(70)[0])).bs==64

def test_looking_does_not_change_the_order(make):
    runs = []
    for look in (False,True):
        learn = make()
        if look: learn.dls.show_batch(); learn.dls.one_batch(); learn.dls.ssl.one_batch()
        set_seed(3)
        learn.fit_mixtraining(**FIT)
        runs.append(state(learn.model))
    assert same(*runs)

def test_too_few_outputs(make):
    for n in (0,2):
        with pytest.raises(ValueError, match=f'the model has {n} outputs for 3 classes'): make(n_out=n).fit_mixtraining(1, 1)

def test_discriminative_rates(make):
    body_head = lambda m: [[p for n,p in m.named_parameters() if ('head' in n)==b] for b in (False,True)]
    learn = make(splitter=body_head)
    learn.create_opt()
    learn.opt.set_hypers(lr=slice(1e-4,1e-3), wd=0.3)
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-4,1e-4,1e-3,1e-3]) and [h['wd'] for h in learn.opt.hypers]==[0.3,0,0.3,0]
    learn.fit_one_cycle(1, slice(1e-4,1e-3))
    learn.fit_mixtraining(**FIT)
    works(learn)

def test_cancelled_batches_do_not_blur_the_history(make):
    class Skip(Callback):
        run_valid = False
        def after_pred(self):
            if self.iter==1: raise CancelBatchException
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=Skip())
    h = learn.mix.history
    assert np.allclose(h.train_loss[2:4], (h.ssl_loss+h.sl_loss)[2:4]/2, rtol=1e-5)

def test_a_sleeping_callback_stays_asleep(make):
    mixup,saver = MixUp(),SaveModelCallback()
    mixup.run = False
    learn = make()
    learn.fit_mixtraining(**FIT, cbs=[mixup, saver])
    assert not mixup.run and not hasattr(mixup, 'yb1')

def test_more_bad_input(make, tmp_path):
    x,y = images(12)
    for kw,err,match in ((dict(tfms='imagenet'), ValueError, r"one of \['cifar', 'tinyimagenet'\], got 'imagenet'"),
                         (dict(tfms=lambda o: o.float()), ValueError, 'must give uint8 images of the same size'),
                         (dict(ssl_tfms=lambda o: o.nope()), ValueError, 'ssl_tfms: .* fails on a batch'),
                         (dict(stats=([0.5]*3,[0.2]*3)), ValueError, 'of 1 channels'), (dict(stats=([0.5],[0.])), ValueError, 'stats must be')):
        with pytest.raises(err, match=match): mix_dls((x,y), **kw)
    assert torch.isfinite(mix_dls((np.zeros_like(x),y), bs=4).one_batch()[0]).all()
    assert mix_dls(ssl=x, valid=(x,y)).vocab==['0','1','2']
    with pytest.raises(TypeError, match='are for timm.create_model'):
        mix_learner(mix_dls((x,y)), timm.create_model('test_resnet', in_chans=1, num_classes=3), patch_size=4)
    learn = mix_learner(mix_dls(images(6, 32, 3)), 'test_resnet', img_size=32)
    assert find_layout(learn.model, learn.dls.one_batch()[0]).grid==(1,1)
    loader = torch.utils.data.DataLoader([(torch.zeros(3,32,32),0)]*4, batch_size=2)
    with pytest.raises(TypeError, match="fastai's DataLoader"):
        Learner(DataLoaders(loader, loader), timm.create_model('test_resnet', num_classes=3), loss_func=CrossEntropyLossFlat()).fit_mixtraining(1,1)

def test_choosing_an_objective_for_a_frozen_learner(tmp_path):
    learn = vision_learner(file_dls(tmp_path), 'resnet18', pretrained=False)
    learn.remove_cb(ProgressCallback); learn.logger = noop
    learn.freeze()
    learn.to_mix('ae')
    assert all(p.requires_grad for p in learn.model.parameters())

def test_not_square_and_other_channels(make):
    rng = np.random.default_rng(0)
    x,y = rng.integers(0, 256, (12,16,8,4)).astype(np.uint8),np.arange(12)%3
    learn = make(dls=mix_dls((x,y), (x,y), bs=4))
    learn.fit_mixtraining(2, 2)
    learn.mix.show_reconstructions(n=2)
    assert find_layout(learn.model, learn.dls.one_batch()[0]).grid==(8,4) and learn.predict(x[0])[0] in '012'
