"Masks and several tasks: through all phases, from arrays and from files; what is kept, shown, refused"
import json
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt, numpy as np, pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import load_learner
from fastai.vision.all import (CategoryBlock, DataBlock, Flip, GrandparentSplitter, ImageBlock, MaskBlock, Normalize, PILImage, RandomSplitter, Resize, TensorMask,
    get_image_files, resnet18, unet_learner)
from fastcore.basics import noop
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from conftest import HOT, same, state, warned
from mixfast.all import (BatchFlip, BatchResizedCrop, Classify, KNNAccuracy, LayerRates, MAE, MeanIoU, MixBlock, Segment, SimMIM, SimSiam, SuperProgressive, ViewTfms, linear_probe,
    mask_folder, mix_dls, mix_learner, transfer)

VOCAB = dict(kind=['low','high'], mask=['ground','thing'])
SIMSIAM = partial(SimSiam, 16, 8, norm=False)

def scenes(n, size=32, seed=0):
    "Images with a bright square, above or below; which of the two, and where"
    rng = np.random.default_rng(seed)
    kind,mask = np.arange(n)%2,np.zeros((n,size,size), np.uint8)
    for m,k in zip(mask, kind):
        i,j = rng.integers(0, size//4, 2) + [size//2*k, 0]
        m[i:i+size//4, j:j+size//2] = 1
    x = rng.integers(0, 90, (n,size,size,3)) + 150*mask[...,None]
    return x.astype(np.uint8), dict(kind=kind, mask=mask)

def dls(target='mask', n=24, size=32, bs=8, **kw):
    "Loaders of masks, of kinds or of both; a third has no kind"
    def part(n, seed):
        x,y = scenes(n, size, seed)
        if target=='both' and seed==0: y['kind'][::3] = -1
        return x, y if target=='both' else y[target]
    vocab = VOCAB if target=='both' else VOCAB[target]
    return mix_dls(part(n, 0), part(10, 1), vocab=vocab, bs=bs, seed=0, **kw)

def learner(d, arch='vit', objective=None, quiet=True, **kw):
    torch.manual_seed(0)
    args = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2) if arch=='vit' else {}
    learn = mix_learner(d, dict(vit='vit_tiny_patch16_224', conv='test_resnet').get(arch, arch), objective, path=mkdtemp(), **args, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def fit(learn, *e, **kw): return learn.fit_mixtraining(*(e or (2,2)), recipe=HOT, **kw)

@pytest.mark.parametrize('arch', ['vit','conv','test_convnext','swin_tiny_patch4_window7_224'])
@pytest.mark.parametrize('target', ['mask','both'])
def test_learns(arch, target):
    "A fit through all phases: one pass for the mix step, metrics in the history, a better mask in the end"
    args = dict(embed_dim=16, depths=(1,1), num_heads=(1,2), window_size=4) if arch.startswith('swin') else {}
    learn = learner(dls(target, n=40), arch, 'simmim' if arch!='test_convnext' else None, **args)
    fit(learn, 2, 20, rho=1)
    col = 'miou' if target=='mask' else 'mask_miou'
    hist = learn.mix.history
    assert hist.phase.drop_duplicates().tolist() == ['mix','sl'] and hist[col].iloc[-1] > 0.47, hist[col].tolist() # all ground: 0.44
    if target=='both':
        assert {'kind_accuracy','kind_loss','mask_loss'} <= set(hist) and hist[['kind_loss','mask_loss']].iloc[-1].notna().all()
        last = hist.iloc[-1]
        assert np.isclose(last.kind_loss+last.mask_loss, last.sl_loss, rtol=1e-5)

def test_simmim_is_a_few_lines_of_torch():
    "A token in place of hidden patches, all tokens through, one linear layer, mean absolute error of hidden pixels; the paper's model by its name"
    learn = learner(dls(size=64), 'vit_5m', 'simmim', patch_size=8)
    m,o = learn.model.body.eval(),learn.mix.objective
    assert 4.8e6 < sum(p.numel() for p in timm.create_model('vit_5m', num_classes=0).parameters()) < 5.2e6
    x = torch.randn(3, 3, 64, 64)
    torch.manual_seed(1)
    f = o.encode(m, x)
    patches = f.mask[:,::8,::8].flatten(1) # hidden or not, [B,N]
    t = torch.where(f.mask[:,::8,::8,None], o.token, m.patch_embed(x)) # [B,8,8,D]
    p = o.head(m.norm(m.blocks(t.flatten(1, 2) + m.pos_embed))) # [B,N,64*3]
    target = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0,2,3,4,5,1).reshape(3, 64, -1)
    loss = (p-target).abs()[patches].mean()
    torch.testing.assert_close(o(f, x), loss)
    assert torch.equal(f.mask, patches.view(3,8,8).repeat_interleave(8,1).repeat_interleave(8,2))

@pytest.mark.parametrize('task', ['mask','both'])
def test_one_pass(task):
    "What a mix step computes is what its parts do, the backbone's share once; a second head adds its own operations"
    def flops(target, phase, **kw): return learner(dls(target), 'conv', 'ae', **kw).mix.step_flops()[phase]
    ssl,sl,mix = [flops(task, o) for o in ('ssl','sl','mix')]
    m = learner(dls(task), 'conv', 'ae').model.body.train()
    with FlopCounterMode(display=False) as count: m.forward_features(torch.randn(8, 3, 32, 32)).sum().backward()
    body = count.get_total_flops()
    assert mix < ssl+sl-0.9*body
    if task=='both': assert sl-flops('mask', 'sl') < 0.01*sl

@pytest.mark.parametrize('method', ['fit_sl','fit_ssl','fit_ssl_sl'])
def test_baselines(method):
    "The other fits, with masks and several tasks"
    for target in ('mask','both'):
        learn = learner(dls(target))
        getattr(learn, method)(*[1]*(1+(method=='fit_ssl_sl')), recipe=HOT)
        assert learn.mix.history.phase.tolist() == method[4:].split('_')

def test_two_views():
    "A mask goes with the first view of its image, from arrays and from files"
    moves = ViewTfms(*[[BatchResizedCrop(scale=(0.3,1.), size=24), BatchFlip()]]*2)
    learn = learner(dls(ssl_tfms=moves), 'conv', SIMSIAM())
    def check(b):
        (x,_),y = b
        assert x.shape[-2:]==y.shape[-2:]==(24,24)
        bright = x.as_subclass(torch.Tensor).mean(1)
        agree = ((bright > (bright.amax()+bright.amin())/2) == (y.as_subclass(torch.Tensor)==1)).float().mean()
        assert agree > 0.93, agree # but for the rims, where an image is blurred
    check(learn.dls.train.phase('mix', 2).one_batch())
    fit(learn)

def write(folder, n=24, size=32, seed=0):
    "Images and masks in folders"
    x,y = scenes(n, size, seed)
    for name in ('images','masks'): (folder/name).mkdir(parents=True, exist_ok=True)
    for i,(im,m) in enumerate(zip(x, y['mask'])):
        Image.fromarray(im).save(folder/'images'/f'{i:02}.png')
        Image.fromarray(m).save(folder/'masks'/f'{i:02}.png')
    return folder

def block(folder, codes=VOCAB['mask'], tfms=(), **kw):
    b = DataBlock((MixBlock(seed=0, **kw), MaskBlock(codes)), get_items=lambda f: get_image_files(f/'images'), get_y=lambda f: folder/'masks'/f.name,
                  splitter=RandomSplitter(0.3, seed=0), batch_tfms=[*tfms, Normalize.from_stats([.5]*3, [.25]*3, cuda=False)])
    return b.dataloaders(folder, bs=8, num_workers=0)

def test_two_views_of_files(tmp_path):
    moves = ViewTfms(*[[BatchResizedCrop(scale=(0.3,1.), size=24), BatchFlip()]]*2)
    d = block(write(tmp_path), ssl_batch_tfms=moves)
    (x,_),y = d.train.phase('mix', 2).one_batch()
    assert isinstance(y, TensorMask) and x.shape[-2:]==y.shape[-2:]==(24,24)
    bright = x.as_subclass(torch.Tensor).mean(1)
    assert ((bright > (bright.amax()+bright.amin())/2) == (y.as_subclass(torch.Tensor)==1)).float().mean() > 0.93
    fit(learner(d, 'conv', SIMSIAM()))

def test_files(tmp_path):
    "fastai's blocks and augmentations: fit, predict, show, export, load"
    learn = learner(block(write(tmp_path), tfms=[Flip()], ssl=tmp_path/'images'), 'conv')
    fit(learn)
    f = tmp_path/'images'/'03.png'
    mask,_,probs = learn.predict(f)
    assert mask.shape==(32,32) and probs.shape==(2,32,32) and torch.allclose(probs.sum(0), torch.ones(32,32), atol=1e-4)
    learn.export('m.pkl')
    with warned('ignore'): again = load_learner(learn.path/'m.pkl')
    assert torch.equal(again.predict(f)[0], mask)
    learn.show_results(max_n=2)
    plt.close('all')

def test_lambda_keeps_the_mask():
    "Images are blended with others, masks are those of the labelled image"
    x,y = scenes(24)
    d = dls(ssl=255-scenes(16, seed=4)[0], lam=0.6, shuffle=False)
    xm,ym = d.train.phase('mix').one_batch()
    assert torch.equal(ym, torch.tensor(y['mask'][:8])) and xm.shape==(8,3,32,32)
    fit(learner(d, 'conv'))

@pytest.mark.parametrize('target', ['mask','both'])
def test_progressive(target):
    "Masks are as large as the images of a step, and whole in validation"
    learn = learner(dls(target, size=48), 'conv')
    sizes = []
    class Log(Callback):
        order = 1002
        def before_batch(self): sizes.append((self.training, self.x.shape[-1], self.yb[-1].shape[-1]))
    fit(learn, 4, 4, rho=1, cbs=[SuperProgressive(min=24, stages=2, unit=24, warmup_epochs=1, mix=True), Log()])
    assert {x for t,x,y in sizes if t}>{48} and all(x==y for _,x,y in sizes) and {x for t,x,_ in sizes if not t}=={48}

def test_blend_of_other_sizes(tmp_path):
    "Images for SSL of another size: masks are those of the mix"
    d = block(write(tmp_path/'a'), ssl=write(tmp_path/'b', size=48)/'images', ssl_item_tfms=[])
    x,y = d.train.phase('mix').one_batch()
    assert x.shape[-2:]==y.shape[-2:]

def test_dict_of_targets():
    "A loader of other images takes targets by name"
    learn = learner(dls('both'), 'conv')
    x,y = scenes(5, seed=9)
    assert len(learn.validate(dl=learn.dls.test_dl((x,y), with_labels=True)))==4

def test_visible_only_in_ssl():
    "Patches may be dropped while no task reads them"
    fit(learner(dls('both'), objective=MAE(visible_only=True)))

def test_unet():
    "fastai's U-Net as it is: its encoder has the features"
    learn = unet_learner(dls(size=64), resnet18, n_out=2, pretrained=False, normalize=False, loss_func=dls().train_ds.loss_func, metrics=MeanIoU(vocab=VOCAB['mask']))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    fit(learn)
    assert learn.mix.history.phase.tolist()==['ssl','mix','sl'] and learn.mix.history.miou.iloc[-1]>0

def test_targets_to_validate_on_in_another_order():
    "They are the same by their names"
    x,y = scenes(8)
    a,b = [mix_dls((x,y), (x,v), vocab=VOCAB, bs=8, seed=0).valid.one_batch() for v in (y, dict(reversed(y.items())))]
    for p,q in zip(a, b, strict=True): assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"valid must have the targets of sl, \['kind', 'mask'\], got \['mask'\]"):
        mix_dls((x,y), (x,dict(mask=y['mask'])), vocab=VOCAB, bs=8)

@pytest.mark.parametrize('weights', [None,'learned',dict(mask=2.)])
def test_several_kept(weights, tmp_path):
    "predict gives an answer a task; exported and loaded the same; shown side by side; timm reads the backbone"
    learn = learner(dls('both'), 'conv', task_weights=weights)
    fit(learn)
    x = scenes(1)[0][0]
    names,nums,probs = learn.predict(x)
    assert len(probs)==2 and probs[0].shape==(2,) and probs[1].shape==(2,32,32)
    learn.export('m.pkl')
    with warned('ignore'): again = load_learner(learn.path/'m.pkl')
    assert all(torch.equal(a, b) for a,b in zip(again.predict(x)[2], probs))
    learn.show_results(max_n=3)
    assert len(plt.gcf().axes)>=6
    plt.close('all')
    learn.mix.save_backbone(tmp_path)
    m = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert same(state(m), state(learn.model.body))

def test_learned_weights_train():
    "They move, and are not decayed"
    learn = learner(dls('both'), 'conv', task_weights='learned')
    fit(learn, 0, 3, rho=0)
    w = learn.model.log_vars
    assert (w!=0).all() and learn.loss_func.log_vars is w
    nd = [p for i,g in enumerate(learn.opt.param_lists) if i%2 for p in g]
    assert any(p is w for p in nd)

def test_missing_labels_count_nothing():
    "A gradient of labels that are there: images without a kind do not touch its head"
    d = dls('both')
    learn = learner(d, 'conv')
    x,k,m = d.valid.one_batch()
    def grad(k):
        learn.model.zero_grad()
        learn.loss_func(learn.model(x), k, m).backward()
        return learn.model.tasks.kind.head.weight.grad.clone()
    learn.model.eval()
    half = k.clone()
    half[::2] = -1
    keep = half>=0
    a = grad(half)
    learn.model.zero_grad()
    torch.nn.functional.cross_entropy(learn.model(x[keep])[0], k[keep]).backward()
    torch.testing.assert_close(a, learn.model.tasks.kind.head.weight.grad)
    assert (grad(torch.full_like(k, -1))==0).all()

def test_features_are_judged_by_the_class():
    "Of several targets neighbours and probe take the class, of the images that have one"
    learn = learner(dls('both'), 'conv', metrics=dict(kind=[], mask=[]), cbs=None)
    learn.metrics += [KNNAccuracy(k=3)]
    learn.fit_ssl(1, recipe=HOT)
    assert 0<=learn.mix.history.knn_accuracy.iloc[-1]<=1 and 0<=linear_probe(learn)<=1
    with pytest.raises(ValueError, match='one class number for each image'): linear_probe(learner(dls(), 'conv'))

def test_compile():
    "The heads of tasks compile, too"
    learn = learner(dls('both'), 'conv').compile(backend='eager')
    fit(learn)
    heads = [o for t in learn.model.tasks.values() for o in t.children()]
    assert heads and all(o._compiled_call_impl is not None for o in heads)

def test_transfer():
    "To another size and task; frozen, or with rates by layer"
    first = learner(dls('kind'))
    fit(first)
    new = transfer(first, dls(size=48), decay=0.5, path=mkdtemp())
    new.remove_cb(ProgressCallback)
    new.logger = noop
    assert torch.equal(new.model.body.blocks[0].attn.qkv.weight, first.model.blocks[0].attn.qkv.weight)
    fit(new, 0, 1, rho=0)
    frozen = transfer(first, dls(), freeze=True, path=mkdtemp())
    frozen.remove_cb(ProgressCallback)
    frozen.logger = noop
    before = state(frozen.model.body)
    fit(frozen, 0, 1, rho=0)
    assert same(before, state(frozen.model.body))

def test_bench(tmp_path, monkeypatch, capsys):
    "The command with dense=True asks all questions"
    from mixfast.bench import core as bench
    monkeypatch.setattr(bench, '_mask_work', lambda quick, bf16: bench.MaskWork(n=16, bs=8, px=32, photo=40, model='test_resnet', valid=80))
    bench.main(True, bf16=False, compile=False, views=False, dense=True, rounds=1, out=str(tmp_path/'dense.json'))
    by = {r['name']: r for r in json.loads((tmp_path/'dense.json').read_text())['ratios']}
    assert len(by)==5-(not Path('/proc').exists()) and all(0<r['low']<=r['ratio']<=r['high'] for r in by.values())
    assert 0.5<by['masks, simmim, vit_5m: mix step / (SSL step + SL step)']['limit']<1 and all(k in capsys.readouterr().out for k in list(by)[:1])

# What cannot work is said at the call

def bad(value): # an array of masks in which one pixel has a value
    x,y = scenes(24)
    y['mask'][3,2,2] = value
    return x, y['mask']

x,y = scenes(24)
RGB = np.repeat(y['mask'][...,None], 3, -1)
@pytest.mark.parametrize('make,says', [
    (lambda: mix_dls(bad(7), vocab=VOCAB['mask'], bs=8), r'labels of sl must have values 0\.\.1 for 2 classes.*got \[7\]'),
    (lambda: mix_dls((x,RGB), vocab=VOCAB['mask'], bs=8), 'if they are colours, give each colour its number'),
    (lambda: mix_dls((x,y['mask'][:,:16]), vocab=VOCAB['mask'], bs=8), 'as large as the images, 32x32 pixels, got 16x32'),
    (lambda: mix_dls((x,np.full_like(y['mask'], 255)), vocab=VOCAB['mask'], bs=8), 'no pixel of the masks counts'),
    (lambda: mix_dls((x,dict(kind=y['kind'], mask=y['mask'][:5])), vocab=VOCAB, bs=8), 'mask'),
    (lambda: learner(dls('kind'), task=dict(kind=Classify(), mask=Segment())), r'there are 2 tasks \(kind, mask\) and targets of 1'),
    (lambda: learner(dls('both'), task=Segment()), r'there are 1 tasks \(task\) and targets of 2'),
    (lambda: learner(dls('both'), task=dict(mask=Segment(), other=Classify())), r"targets \['kind', 'mask'\]: give them the same names"),
    (lambda: learner(dls('kind'), task=Segment()), "needs targets of kind 'mask', got 'class'"),
    (lambda: learner(dls('mask'), task=Classify()), "needs targets of kind 'class', got 'mask'"),
    (lambda: learner(dls('both'), task=Segment), 'task must be a Task, such as Segment'),
    (lambda: learner(dls(size=16), 'resnet18', task=Segment('linear')), r'too coarse for masks'),
    (lambda: learner(dls('both'), task_weights=dict(masks=1)), "there is no task 'masks'"),
    (lambda: learner(dls('both'), metrics=dict(race=[])), "there is no task 'race'"),
    (lambda: fit(learner(dls(), objective=MAE(visible_only='mix'))), "visible_only='mix'"),
    (lambda: mix_dls((x,y['mask']), vocab=VOCAB['mask'], bs=8, tfms='tinyimagenet'), 'moves pixels of images, but not those of masks'),
], ids=range(16))
def test_refused(make, says):
    with pytest.raises((ValueError,TypeError), match=says): make()

def test_bad_files(tmp_path):
    "Unequal sizes, colours, a missing mask: the file is named"
    for name,change,says in (
        ('size', lambda f: Image.fromarray(np.zeros((8,9), np.uint8)).save(f), r'05.png has 9x8 pixels, its image .*05.png 32x32'),
        ('rgb', lambda f: Image.fromarray(np.zeros((32,32,3), np.uint8)).save(f), '05.png.*image of colours'),
        ('none', lambda f: f.unlink(), '05.png is missing')):
        folder = write(tmp_path/name)
        change(folder/'masks'/'05.png')
        with pytest.raises((ValueError,FileNotFoundError), match=says): mask_folder(folder, size=32)

def test_masks_beyond_the_classes_of_a_block(tmp_path):
    "A MaskBlock with too few codes, or none, is named before or in the fit"
    folder = write(tmp_path)
    with pytest.raises(ValueError, match='MaskBlock'): learner(block(folder, codes=None), 'conv')
    for f in (folder/'masks').iterdir(): Image.fromarray(np.full((32,32), 3, np.uint8)).save(f)
    with pytest.raises(ValueError, match='class numbers up to 3, predictions 2 classes'): fit(learner(block(folder), 'conv'))
