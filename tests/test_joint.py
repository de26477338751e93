"The mix phase as joint batches, and with balanced losses: any data and objective, one pass, several processes, resume"
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, Learner, PILImage, RandomSplitter, accuracy, noop
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from PIL import Image

from conftest import Die, HOT, TINY, images, same, state
from mixfast.all import (AE, BYOL, DINO, GradCosines, GradShare, HardAugment, JointDL, MAE, MixBlock, MoCo, Segment, SimCLR, SimMIM, SimSiam, Sum, mix_dls, mix_learner,
    phase_dl)
from test_dense import VOCAB, learner as dense_learner, scenes
from test_distributed import check_close, fit as fit_of, fixed_mask, launch, alone, check_alike
from test_resume import check_resumed

def joint(n=12, n_ssl=40, bs=8, sl_bs=3, size=8, c=1, **kw):
    return mix_dls(images(n, size, c), images(9, size, c, seed=1), ssl=images(n_ssl, size, c, seed=2)[0], bs=bs, sl_bs=sl_bs, mix='joint', seed=0, **kw)

class Steps(Callback):
    "What a step is made of"
    run_valid = False
    def before_fit(self): self.rows = []
    def after_loss(self):
        x = self.xb[0] if torch.is_tensor(self.xb[0]) else self.xb[0][0]
        self.rows.append((self.learn.mix.phase, len(x), len(self.yb[0]), len(self.pred)))

def test_a_mix_epoch_is_a_pass_over_the_images_for_ssl(make):
    "Images for SSL as many as in the SSL phase, labelled ones in front; heads see these alone; validation is as ever"
    learn,steps = make(dls=joint()),Steps()
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT, cbs=steps)
    mix = [r for r in steps.rows if r[0]=='mix']
    assert mix==[('mix', 8+3, 3, 3)]*5 and learn.mix.cost.steps.to_dict()==dict(ssl=5, mix=5, sl=1)
    assert learn.mix.history.accuracy.notna().tolist()==[False,True,True]

def test_it_is_a_few_lines_of_torch(make):
    "The loss is the objective's of all images, and the heads' of the labelled ones"
    learn = make(dls=joint(), objective=AE)
    x,y = phase_dl(learn.dls, 'mix').one_batch()
    m,o = learn.model.eval(),learn.mix.objective.eval()
    feats = o.encode(m, x)
    want = 0.3*o(feats, x) + 0.7*torch.nn.functional.cross_entropy(m(x[:3]), y)
    losses = []
    class First(Callback):
        def before_batch(self): self.model.eval()
        def after_loss(self):
            losses.append(self.loss.item())
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit_mixtraining(1, 1, rho=1, alpha=0.3, cbs=First())
    assert losses[0]==pytest.approx(want.item(), rel=1e-4)

def test_one_pass(make):
    "A joint step takes the backbone's operations for all of its images once"
    learn,n = make(dls=joint(), objective=AE),[]
    learn.model.blocks[0].register_forward_hook(lambda m, i, o: n.append(len(o)) if m.training else None)
    learn.fit_mixtraining(2, 2, rho=1, recipe=HOT)
    assert n==[8+3]*10
    f = learn.mix.step_flops()
    assert 11/8*f['ssl'] < f['mix'] < 11/8*f['ssl']*1.05

ONE = [MAE, AE, MAE(visible_only=True), MAE(visible_only='mix'), SimMIM(block=2)]
TWO = [SimSiam(16, 8, norm=False), BYOL(16, 16, norm=False), SimCLR(16, 8), MoCo(16, 8, queue=11), DINO(16, 8, 16), HardAugment(SimSiam(16, 8, norm=False), n=3, size=4),
       Sum(MAE(), SimSiam(16, 8, norm=False))]
@pytest.mark.parametrize('balance', [False,True])
@pytest.mark.parametrize('o', ONE+TWO, ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_objectives(make, o, balance):
    learn = make(dls=joint(), objective=o)
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT, balance=balance)
    h = learn.mix.history
    share = h.ssl_share[h.phase=='mix']
    assert h[h.phase=='mix'][['ssl_loss','sl_loss']].notna().all(None) and share.between(0, 1, 'neither').all() and h.ssl_share.notna().sum()==len(share)

@pytest.mark.parametrize('target', ['mask','both'])
def test_masks_and_tasks(target):
    "Decoders, too, see the labelled images alone; masks are of the size of the batch"
    x,y = scenes(24)
    vocab = VOCAB if target=='both' else VOCAB[target]
    d = mix_dls((x[:8], {k: v[:8] for k,v in y.items()} if target=='both' else y['mask'][:8]), ssl=scenes(40, seed=3)[0], vocab=vocab, bs=8, sl_bs=2, mix='joint', seed=0)
    learn,seen = dense_learner(d),[]
    task = learn.model.tasks['mask'] if target=='both' else learn.model
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT, balance=True, cbs=Steps())
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl'] and learn.mix.history.ssl_share.notna().tolist()==[False,True,False]

def files(folder, n=12):
    folder.mkdir()
    for i,(x,k) in enumerate(zip(*images(n, 16, 3))): Image.fromarray(x).save(folder/f'{k}_{i}.png')
    return sorted(folder.glob('*.png'))

@pytest.mark.parametrize("workers", [0,2])
def test_files(make, tmp_path, workers):
    "The same from files: for any number of workers the same batches"
    fs,more = files(tmp_path/'sl'),files(tmp_path/'ssl', 32)
    block = DataBlock((MixBlock(PILImage, ssl=more, seed=0, mix='joint', sl_bs=2), CategoryBlock), get_y=lambda f: Path(f).name[0], splitter=RandomSplitter(0.25, seed=0))
    d = block.dataloaders(fs, bs=8, num_workers=workers)
    x,y = phase_dl(d, 'mix').one_batch()
    assert x.shape==(10,3,16,16) and len(y)==2 and len(phase_dl(d, 'mix'))==4
    learn = make(dls=d, arch='test_resnet')
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl']
    test_files.first = getattr(test_files, 'first', x) # of the run without workers
    assert torch.equal(test_files.first, x)

def test_a_fit_may_ask_for_the_other_kind(make):
    "`mix` of a fit counts in that fit alone"
    learn = make(n=12, ssl=images(40, seed=2)[0])
    learn.fit_mixtraining(1, 1, rho=1, recipe=HOT, mix='joint')
    assert learn.mix.cost.steps['mix']==5 and learn.mix.settings['mix']=='joint' and not isinstance(phase_dl(learn.dls, 'mix'), JointDL)
    learn.fit_mixtraining(1, 1, rho=1, recipe=HOT)
    assert learn.mix.cost.steps['mix']==1 and learn.mix.settings['mix']=='blend'

def test_images_that_are_all_labelled_are_joint_already(make):
    "Without other images for SSL both kinds are one"
    res = []
    for mix in 'blend','joint':
        learn = make(dls=mix_dls(images(24), bs=8, seed=0, mix=mix), metrics=None)
        learn.fit_mixtraining(1, 1, rho=1, recipe=HOT)
        res.append(state(learn.model))
    assert same(*res)

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_what_blends_labels_rests(make, cb):
    "A joint batch has images without labels: such callbacks wait for the SL phase"
    learn = make(dls=joint())
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT, cbs=cb())
    assert learn.mix.history.sl_loss.iloc[1:].notna().all()

def test_resume(tmp_path):
    "Killed in each phase, with the average of the shares"
    from test_resume import whole
    def new(seed):
        torch.manual_seed(seed)
        learn = mix_learner(joint(), **TINY, metrics=accuracy)
        learn.remove_cb(ProgressCallback); learn.logger = noop
        return learn
    check_resumed(new, tmp_path/'run', (7,9,12), every_steps=2, balance=True)

def of_two(bs, mask=True, **kw):
    "A learner whose batches are joint, and random in nothing but their order"
    if mask: __import__('sys').modules['mixfast.objective.autoencode'].random_mask = fixed_mask
    d = mix_dls(images(12), images(9, seed=1), ssl=images(36, seed=2)[0], bs=bs, sl_bs=bs//3, mix='joint', seed=3)
    return mix_learner(d, metrics=accuracy, **TINY)

@pytest.mark.parametrize('balance', [False,True])
def test_processes(launch, balance):
    "Two processes train as one does, with the share of all images"
    f = partial(fit_of, make_learn=of_two, balance=balance, seed=0)
    one,two = alone(launch, partial(f, world=1)),check_alike(launch(partial(f, world=2), 2))
    check_close(one, two)

@pytest.mark.parametrize('objective', [MAE, SimSiam(16, 8, norm=False)], ids=['mae','simsiam'])
@pytest.mark.parametrize('alpha', [0.2,0.8])
def test_balance_makes_alpha_the_share(make, alpha, objective):
    "Of the gradients that come back to the features the objective's are alpha, after a few steps"
    class Sent(Callback):
        order,run_valid = 16,False
        def before_fit(self): self.rows = []
        def after_backward(self):
            a,b = [o.sqrt().item() for o in self.grad_share.norms2]
            self.rows.append(a/(a+b))
    sent,learn = Sent(),make(dls=joint(n_ssl=80), objective=objective)
    learn.fit_mixtraining(2, 2, rho=1, alpha=alpha, recipe=HOT, balance=True, cbs=sent)
    assert np.median(np.abs(np.array(sent.rows[3:])-alpha)) < 0.1

def test_who_else_asks_for_gradients_changes_nothing(make):
    "`GradCosines` has gradients of its own at each step"
    res = []
    for cbs in [], [GradCosines(every=1)]:
        learn = make(dls=joint())
        learn.fit_mixtraining(2, 2, rho=1, alpha=0.9, recipe=HOT, balance=True, cbs=cbs)
        res.append((state(learn.model), learn.mix.history.ssl_share.tolist()))
    assert same(res[0][0], res[1][0]) and res[0][1]==res[1][1]

def test_a_head_that_works_in_place(make):
    "It cuts the branch off: that is said, not passed over"
    body = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 1))
    head = torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    learn = Learner(joint(), torch.nn.Sequential(body, head), CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError, match='nothing came back to the features'):
        learn.fit_mixtraining(1, 1, rho=1, balance=True)

@pytest.mark.parametrize('bs,sl_bs', [(6,None),(8,1)])
def test_one_labelled_image(make, bs, sl_bs):
    "One of each batch, before an SL phase; what the steps need is told"
    learn = make(dls=joint(bs=bs, sl_bs=sl_bs))
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl'] and learn.mix.step_bytes(2)['mix']>0 and learn.mix.find_batch_size(16)==16

def test_targets_that_are_nested(make):
    "fastai's plain loaders may give a tuple of targets: all images have them"
    x,y = images(16)
    ds = [(torch.tensor(o).permute(2,0,1).float()/255, (torch.tensor(k), torch.tensor(k))) for o,k in zip(x, y)]
    learn = make(dls=DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8)), metrics=[], n_out=3, loss_func=lambda p, t: sum(torch.nn.functional.cross_entropy(p, o) for o in t))
    learn.fit_mixtraining(2, 2, rho=0.5, recipe=HOT)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl']

def test_views_are_shown(make):
    "Rows of images without labels, too"
    dl = phase_dl(joint(), 'mix', 2, 'simclr')
    dl.show_batch(max_n=6)
    import matplotlib.pyplot as plt
    assert all(ax.images for ax in plt.gcf().axes) and len(plt.gcf().axes)==12

@pytest.mark.parametrize('kw', [dict(alpha=0.), dict(alpha=1.), dict(alpha_sched='linear')], ids=str)
def test_edges_of_alpha(make, kw):
    "A loss without weight sends nothing back: there is no share, and no nan"
    learn = make(dls=joint())
    learn.fit_mixtraining(2, 2, rho=1, recipe=HOT, balance=True, **kw)
    h = learn.mix.history
    assert np.isfinite(h.train_loss).all() and h.ssl_share[h.phase=='mix'].between(0, 1).all()
    if 'alpha' in kw: assert (h.ssl_share==kw['alpha']).all()

def test_half_precision(make):
    learn = make(dls=joint()).to_bf16()
    learn.fit_mixtraining(2, 2, rho=1, recipe=HOT, balance=True)
    assert np.isfinite(learn.mix.history.train_loss).all() and learn.mix.history.ssl_share.between(0,1).all()

class Own(MAE):
    "An objective whose features are of a kind that torch cannot look into"
    def encode_mix(self, backbone, x): return type('Box', (), dict(f=MAE.encode_mix(self, backbone, x)))()
    def forward(self, feats, x): return MAE.forward(self, getattr(feats, 'f', feats), x)
    def sl_feats(self, feats): return getattr(feats, 'f', feats)

BAD = dict(
    mix=(dict(mix='both'), "mix must be one of ('blend', 'joint'), got 'both'"),
    accumulate=(dict(cbs=GradientAccumulation(16)), "GradientAccumulation counts the labelled images"),
    balance=(dict(balance='yes'), "balance must be True or False, got 'yes'"))
@pytest.mark.parametrize('name', BAD)
def test_refused(make, name):
    kw,says = BAD[name]
    learn = make(dls=joint())
    with pytest.raises((ValueError,TypeError)) as e: learn.fit_mixtraining(1, 1, rho=1, **kw)
    assert says in str(e.value) and not learn.mix.rows

def test_nothing_to_balance_by(make):
    learn = make(dls=joint(), objective=Own())
    learn.fit_mixtraining(1, 1, rho=1, recipe=HOT) # without a share
    assert 'ssl_share' not in learn.mix.history
    with pytest.raises(ValueError, match='balance=True needs features that are tensors'): learn.fit_mixtraining(1, 1, rho=1, balance=True)

def test_too_many_labelled(make):
    with pytest.raises(ValueError, match='sl_bs must be at most the 8 images'): joint(sl_bs=9)
    with pytest.raises(ValueError, match='sl_bs must be a whole number from 1 up'): joint(sl_bs=0)
