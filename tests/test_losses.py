"Losses and targets of any kind, from arrays and from files, on a ViT and a ConvNet: a row of tables/losses.csv each"
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, timm.loss, torch
import fastai.vision.all, mixfast.all
from PIL import Image
from fastai.vision.all import (CategoryBlock, DataBlock, Flip, MultiCategoryBlock, Normalize, PointBlock, ProgressCallback, RandomSplitter, RegressionBlock,
    Resize, accuracy, get_image_files, noop, parent_label, set_seed, tensor)

from conftest import HOT, TINY, images, state
from mixfast.all import MixBlock, mix_dls, mix_learner

table = pd.read_csv(Path(__file__).parent/'tables'/'losses.csv', keep_default_na=False)
NAMES = ['ant','bee','cow']
firsts = set(table.drop_duplicates('target').index)
ARCHS = dict(vit={**TINY, 'patch_size':8}, conv=dict(arch='test_resnet'))

# A target of class k, as a block has it and as an array; names
TARGETS = {
    'classes':        (CategoryBlock, lambda k: NAMES[k], lambda k: k, NAMES),
    'yes or no':      (CategoryBlock, lambda k: ['no','yes'][k>0], lambda k: int(k>0), ['no','yes']),
    '0 or 1':         (RegressionBlock, lambda k: float(k>0), lambda k: [float(k>0)], None),
    'several labels': (MultiCategoryBlock, lambda k: NAMES[k:], lambda k: [i>=k for i in range(3)], NAMES),
    'a number':       (RegressionBlock, lambda k: k/2, lambda k: [k/2], None),
    'numbers':        (RegressionBlock(3), lambda k: [k/2, 1-k/2, 0.5], lambda k: [k/2, 1-k/2, 0.5], None),
    'points':         (PointBlock, lambda k: tensor([[3.,k*2.],[8.,9.]]), lambda k: [[0.,k/2],[0.5,0.3]], None),
    'soft labels':    (RegressionBlock(3), lambda k: [0.8 if i==k else 0.1 for i in range(3)], lambda k: [0.8 if i==k else 0.1 for i in range(3)], NAMES)}

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A folder of 24 images in class folders, and one of 20 others for SSL"
    d = tmp_path_factory.mktemp('files')
    for name,n,size in (('sl',24,16), ('ssl',20,20)):
        for i,(im,k) in enumerate(zip(*images(n, size, 3))):
            (d/name/str(k)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(im).save(d/name/str(k)/f'{i:02}.png')
    return d

def make_dls(data, target, files):
    block,of_class,as_array,names = TARGETS[target]
    if data=='arrays':
        (x,y),(xv,yv) = images(24, 16, 3),images(9, 16, 3, seed=1)
        return mix_dls((x, np.array([as_array(k) for k in y])), (xv, np.array([as_array(k) for k in yv])), lam=0.5, ssl=images(20, 16, 3)[0], vocab=names, bs=8, seed=0)
    block = DataBlock((MixBlock(ssl=files/'ssl', lam=0.5, seed=0), block), get_items=get_image_files, get_y=lambda f: of_class(int(parent_label(f))), splitter=RandomSplitter(0.34, seed=0),
        item_tfms=Resize(16), batch_tfms=[Flip(), Normalize.from_stats([.5]*3, [.25]*3, cuda=False)])
    return block.dataloaders(files/'sl', bs=8, num_workers=0)

def by_hand(learn):
    "The loss of the validation images, without fastai's learner; the shape of what the model gives"
    learn.model.eval()
    with torch.no_grad(): os = [(learn.model(x), y) for b in learn.dls.valid for x,y in [[o.as_subclass(torch.Tensor) for o in b]]]
    return sum(learn.loss_func(o, y).item()*len(y) for o,y in os)/sum(len(y) for _,y in os), os[0][0].shape

def cases():
    "Each row from arrays on a ViT and from files on a ConvNet; the first of a target on all four"
    for r in table.itertuples():
        for data in r.on.split():
            for arch in ARCHS if r.Index in firsts else ['vit' if data=='arrays' else 'conv']:
                yield pytest.param(data, arch, r, id=f'{data}, {arch}: {r.target}, {r.loss} {r.n_out} {r.metrics} {r.cbs}')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('data,arch,row', cases())
def test_loss(data, arch, row, files, tmp_path):
    "Through all phases; the loss that is recorded is the loss; the head learns; predictions are decoded; metrics are there, but for SSL"
    set_seed(0, reproducible=True)
    user = dict(vars(fastai.vision.all) | vars(mixfast.all), timm=timm)
    loss,metrics,cbs = [eval(o or 'None', user) for o in (row.loss, row.metrics, row.cbs)]
    dls = make_dls(data, row.target, files)
    def fit():
        learn = mix_learner(dls, **ARCHS[arch], loss_func=loss, metrics=metrics, n_out=int(row.n_out) if row.n_out else None, path=tmp_path)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        head = state(learn.model.get_classifier())
        learn.fit_mixtraining(2, 2, recipe=HOT, cbs=cbs)
        return learn,head
    if row.result=='refused':
        with pytest.raises(ValueError, match=row.says): fit()
        return
    learn,head = fit()
    h = learn.mix.history
    assert h.phase.tolist()==['ssl','mix','sl'] and h.sl_loss[1:].notna().all()
    assert all(not torch.equal(head[k], v) for k,v in state(learn.model.get_classifier()).items())
    mets = h[[o for o in learn.mix.metric_cols() if o!="ssl_share"]]
    assert len(mets.columns)==len(learn.metrics) and mets.iloc[0].isna().all() and mets.iloc[1:].notna().all(axis=None)
    valid,shape = by_hand(learn)
    assert np.isclose(h.valid_loss.iloc[-1], valid, rtol=1e-3)
    item = dls.valid.dataset.items[0]
    out = learn.predict(item[0] if data=='arrays' else item)
    assert out[2].shape==shape[1:] and eval(row.predicts, dict(user, out=out, names=list(getattr(dls, 'vocab', ())), data=data)), out
    learn.show_results()
    assert row.target=='points' and data=='files' or all('\n' in o.get_title() for o in plt.gcf().axes if o.has_data()) # target and prediction
    plt.close('all')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_class_weights_move():
    "Weights given on the CPU follow the model"
    dls = mix_dls(images(24, 16, 3), images(9, 16, 3, seed=1), bs=8, device='cuda')
    learn = mix_learner(dls, **ARCHS['vit'], loss_func=fastai.vision.all.CrossEntropyLossFlat(weight=tensor([0.2, 1., 2.])), metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_mixtraining(2, 2, recipe=HOT)
    assert learn.loss_func.func.weight.is_cuda and learn.mix.history.sl_loss[1:].notna().all()

def test_table():
    "Every row says what comes of it, and is there once"
    assert table.result.isin(['works','refused']).all() and not table.duplicated(['target','loss','n_out','metrics','cbs']).any()
    assert (table.predicts!='').eq(table.result=='works').all() and (table.says!='').eq(table.result=='refused').all()
    assert set(table.target)==set(TARGETS)
