"What is saved for others: timm reads it without mixfast, and nothing is lost when it cannot be written"
import json, re
import numpy as np, pytest, timm, torch
from fastai.vision.all import ImageDataLoaders, Learner, PILImage, accuracy, resnet18, vision_learner
from mixfast.all import mix_dls
from conftest import TINY, images, same, state

@pytest.mark.parametrize('kwargs', [dict(global_pool='avg', class_token=False), dict(arch='test_resnet', size=32, c=3)])
def test_save_backbone(make, tmp_path, kwargs):
    "By checkpoint_path and by local-dir:, strictly, the same predictions; how to normalise, the classes, and a card"
    learn = make(**kwargs)
    learn.fit_mixtraining(2, 2)
    folder = learn.mix.save_backbone(tmp_path/'out')
    assert {f.name for f in folder.iterdir()}=={'README.md','config.json','model.safetensors'}
    m = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert same(m.state_dict(), learn.model.state_dict())
    args = json.loads((folder/'config.json').read_text())['model_args']
    m2 = timm.create_model(kwargs.get('arch', TINY['arch']), checkpoint_path=folder/'model.safetensors', **args)
    assert same(m2.state_dict(), m.state_dict())
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(): assert torch.allclose(m(x), learn.model.eval()(x), atol=1e-6)
    c = kwargs.get('c', 1)
    raw = images(9, kwargs.get('size', 8), c, seed=1)[0].transpose(0,3,1,2)/255
    mean,std = [np.array(m.pretrained_cfg[k]).reshape(-1,1,1) for k in ('mean','std')]
    assert np.allclose(((raw-mean)/std)[:len(x)], x.numpy(), atol=1e-4) and m.pretrained_cfg['input_size']==(c, *x.shape[2:])
    cfg = json.loads((folder/'config.json').read_text())
    assert cfg['label_names']==['0','1','2'] and cfg['num_classes']==3
    card = (folder/'README.md').read_text()
    card = re.sub(' +', ' ', card)
    assert card.startswith('---\nlibrary_name: timm\n') and '| rho | 0.5 |' in card and '| 2 | sl |' in card and 'nan' not in card.lower()

def test_a_vision_learner(tmp_path):
    "With timm in it, its features; without, an error"
    for i,(x,y) in enumerate(zip(*images(16, 32))): PILImage.create(x[...,0]).save(tmp_path/f'{y}_{i}.png')
    dls = ImageDataLoaders.from_name_func(tmp_path, sorted(tmp_path.glob('*.png')), lambda f: f[0] if isinstance(f, str) else f.name[0], bs=4, num_workers=0)
    learn = vision_learner(dls, 'test_resnet', pretrained=False).to_mix()
    folder = learn.mix.save_backbone(tmp_path/'out')
    m = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert same(m.state_dict(), learn.model[0].model.state_dict())
    with pytest.raises(TypeError, match='not a timm model'): vision_learner(dls, resnet18, pretrained=False).to_mix().mix.save_backbone(tmp_path/'no')

def test_what_cannot_be_built(make, tmp_path):
    "The error says what to pass, and an earlier file stays"
    learn = make()
    folder = learn.mix.save_backbone(tmp_path/'out')
    before = (folder/'model.safetensors').read_bytes()
    learn.model._model_args = {}
    with pytest.raises(ValueError, match='model_args'): learn.mix.save_backbone(folder)
    assert (folder/'model.safetensors').read_bytes()==before and len(list(folder.iterdir()))==3
    learn.mix.save_backbone(folder, model_args=dict(img_size=8, in_chans=1, num_classes=3, **{k:v for k,v in TINY.items() if k!='arch'}))
