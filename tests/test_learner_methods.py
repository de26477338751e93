"Every method of a learner after a fit with three phases: a row of tables/methods.csv each, on arrays, files and a vision_learner"
import ast, pickle
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, timm, torch, torch.nn.functional as F
from PIL import Image
import fastai.vision.all, mixfast.all
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageDataLoaders, Learner, ProgressCallback, RandomSplitter, Resize, accuracy,
    get_image_files, noop, parent_label, set_seed, vision_learner)

from conftest import HOT, TINY, images, same, state
from mixfast.all import MixBlock, body, mix_dls, mix_learner

table = pd.read_csv(Path(__file__).parent/'tables'/'methods.csv', keep_default_na=False)
kinds = ['arrays','block','vision']
names = ['ant','bee','cow']
VIT = {**TINY, 'patch_size':4}

def quiet(learn):
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def write(folder, n, size=16, seed=0):
    "Images of three classes in class folders"
    for i,(im,c) in enumerate(zip(*images(n, size, 3, seed))):
        (folder/names[c]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(folder/names[c]/f'{i:03}.png')
    return folder

def resized(size, c=3, vocab=names): return mix_dls(images(24, size, c), images(9, size, c, seed=1), bs=8, vocab=vocab)

def labelled_learner(path='.'): return quiet(mix_learner(resized(16), **VIT, path=path))

def make_learner(kind, path):
    "A learner of 9 images to validate on, and 16 or 24 to train on"
    if kind=='arrays': return mix_learner(mix_dls(images(24, 16, 3), images(9, 16, 3, seed=1), vocab=names, tfms='cifar', bs=8, seed=0), **VIT, metrics=accuracy, path=path)
    files,kw = write(path/'a', 25),dict(bs=8, num_workers=0)
    if kind=='vision':
        dls = ImageDataLoaders.from_folder(files, valid_pct=0.36, seed=0, item_tfms=Resize(32), **kw)
        return vision_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy, path=path)
    blocks = (MixBlock(ssl=write(path/'b', 20, 20, 1), lam=0.5, seed=0), CategoryBlock) if kind=='block' else (MixBlock(seed=0),)
    block = DataBlock(blocks, get_items=get_image_files, get_y=None if kind=='unlabelled' else parent_label, splitter=RandomSplitter(0.36, seed=0), item_tfms=Resize(16))
    return mix_learner(block.dataloaders(files, **kw), **VIT, metrics=accuracy, path=path)

@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
    "A function: a learner of a kind after a fit, made once and copied"
    made = {}
    def _fitted(kind):
        if kind not in made:
            set_seed(0, reproducible=True)
            learn = quiet(make_learner(kind, tmp_path_factory.mktemp(kind)))
            if kind=='unlabelled': learn.fit_ssl(2, recipe=HOT)
            else: learn.fit_mixtraining(2, 2, recipe=HOT)
            made[kind] = learn
        learn = deepcopy(made[kind])
        for k in learn.recorder._stateattrs: setattr(learn.recorder, k, list(getattr(made[kind].recorder, k))) # fastai leaves them out
        return learn
    return _fitted

def by_hand(learn):
    "Outputs and targets of the validation images, without fastai's learner"
    learn.model.eval()
    with torch.no_grad(): bs = [(learn.model(b[0].as_subclass(torch.Tensor)), *b[1:]) for b in learn.dls.valid]
    out,*y = [torch.cat([o.as_subclass(torch.Tensor) for o in os]) for os in zip(*bs)]
    return (out.softmax(1), *y) if y else (out, torch.zeros(len(out)))

def tools(learn, kind, capsys):
    "What the expressions of the table may use"
    plain,y = by_hand(learn)
    before,ds = state(learn.model),learn.dls.valid.dataset
    new = [o[0] for o in ds.items[:3]] if kind=='arrays' else list(ds.items[:3])
    now = {k:v for k,v in learn.model.named_parameters()}
    axs = lambda: plt.gcf().axes
    def moved(part=''): return any(not torch.equal(before[k], v) for k,v in state(learn.model).items() if k.startswith(part) and k in now and v.ndim>1)
    def close(a, b): return torch.allclose(a.as_subclass(torch.Tensor), b, atol=1e-4)
    def fresh(): return Learner(learn.dls, deepcopy(learn.model).apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None), loss_func=CrossEntropyLossFlat(), path=learn.path)
    return dict(vars(fastai.vision.all) | vars(mixfast.all) | globals(), learn=learn, plain=plain, y=y, before=before, new=new, fresh=fresh, moved=moved, close=close, equal=lambda a, b: torch.equal(a.as_subclass(torch.Tensor), b),
        labelled=list(ds.items[:3]), names=list(getattr(learn.dls, 'vocab', ())), n_train=learn.dls.train.n, n_steps=len(learn.recorder.losses), n_params=sum(o.numel() for o in learn.model.parameters()),
        losses=lambda p, y: F.nll_loss(p.log(), y, reduction='none'), unmoved=lambda: same(state(learn.model), before), body_moved=lambda: moved('0.' if kind=='vision' else 'blocks.'),
        titles=lambda: [o.get_title() for o in axs() if o.get_title()], axes=lambda: len(axs()), labelled_learner=lambda: labelled_learner(learn.path))

def run(call, ns):
    "Do what `call` says; the value of its last part"
    *first,last = ast.parse(call).body
    exec(compile(ast.Module(first, []), call, 'exec'), ns)
    if isinstance(last, ast.Expr): return eval(compile(ast.Expression(last.value), call, 'eval'), ns)
    exec(compile(ast.Module([last], []), call, 'exec'), ns)

rows = [pytest.param(kind, r, id=f'{kind}: {r.call}') for r in table.itertuples() for kind in (kinds if r.on=='all' else r.on.split())]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind,row', rows)
def test_method(fitted, kind, row, capsys):
    learn = fitted(kind)
    ns,model = tools(learn, kind, capsys),learn.model
    plt.close('all')
    if row.result=='refused':
        with pytest.raises(Exception, match=row.says): run(row.call, ns)
    else:
        ns['out'] = run(row.call, ns)
        ns['text'] = capsys.readouterr().out
        assert eval(row.check, ns), row.check
    plt.close('all')
    assert learn.model is model and ('mix' not in vars(learn) or learn.mix.phase is None), 'the plain model, whatever was called'

def test_table():
    "Every row says what comes of it, and is there once"
    assert table.result.isin(['works','refused']).all() and not table.duplicated(['call','on']).any()
    assert (table.check!='').eq(table.result=='works').all() and (table.says!='').eq(table.result=='refused').all()
