"timm's families: a default fit, features where their layout says, plain weights, compiled parts. `benchmarks/timm_modules.py` tries all modules"
import sys
from collections import Counter
from pathlib import Path
import pytest, timm, torch
from mixfast.all import mix_dls
from conftest import images
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import timm_modules

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
MODELS = dict(test_vit={}, deit_tiny_distilled_patch16_224=SMALL, vit_base_patch16_siglip_224=SMALL, eva02_tiny_patch14_224=SMALL|dict(patch_size=16),
    beit_base_patch16_224=SMALL, xcit_nano_12_p16_224=SMALL, mixer_s32_224={},
    swin_tiny_patch4_window7_224=dict(embed_dim=12, depths=(1,1,1,1), num_heads=(1,1,2,2)), hiera_tiny_224=dict(embed_dim=12, stages=(1,1,1,1)), pvt_v2_b0=dict(depths=(1,1,1,1)),
    test_convnext={}, test_resnet={}, test_efficientnet={}, test_byobnet={}, test_maxvit={}, test_mambaout={}, mobilenetv3_small_050={}, regnetx_002={})

@pytest.mark.parametrize('arch', MODELS)
def test_default_fit(arch, tmp_path):
    "Three phases with gradient cosines, predictions, plain weights saved and loaded; each feature belongs to its place by gradient"
    row = timm_modules.fit(arch, 64, tmp_path, **MODELS[arch])
    assert not row['wrong'] and row['objective']==('MAE' if row['kind']=='tokens' else 'AE')
    assert timm_modules.check_order(arch, 64, **MODELS[arch])>0.9

@pytest.mark.parametrize('arch,size', [('crossvit_9_240',240), ('coat_lite_tiny',32), ('volo_d1_224',224), ('pit_ti_distilled_224',224)])
def test_refused(arch, size):
    "Several lists, or tokens that do not tile a square: in words, before any training, whatever the objective"
    for objective in ('mae','ae'):
        with pytest.raises(TypeError, match=r'gives features .* an objective needs tokens \[B,N,D\] that tile the image'):
            timm_modules.mix_learner(timm_modules.data(size), arch, objective)

def test_order_is_seen(monkeypatch):
    "A model whose features lie elsewhere than its layout says is found out"
    x = torch.randn(2, 3, 32, 32)
    m = timm.create_model('test_resnet', num_classes=3)
    assert timm_modules.in_place(m, x.repeat(1,1,4,4))>0.9
    plain = m.forward_features
    m.forward_features = lambda x: plain(x).mT # rows for columns
    assert timm_modules.in_place(m, x.repeat(1,1,4,4))<0.7

def test_patches_that_are_not_square(tmp_path):
    "(2,8) pixels: 16 rows of 4, through a fit"
    row = timm_modules.fit('vit_tiny_patch16_224', 32, tmp_path, patch_size=(2,8), **SMALL)
    assert (row['grid'],row['objective'],row['wrong'])==('16x4','MAE','')

@pytest.mark.parametrize('arch', ['resnet10t','test_convnext'])
def test_compiled_parts_do_not_share_a_limit(make, arch):
    "A graph a part for training and one for validation, sizes fixed; all passes run compiled, in a second learner too"
    torch._dynamo.reset()
    for _ in range(2): # dynamo counts by code object: what is the same for two parts, or two learners, adds up
        made,ran = [],Counter()
        def backend(gm, inputs):
            made.append((torch.is_grad_enabled(), any(isinstance(o, torch.SymInt) for o in inputs)))
            def run(*args):
                ran[torch.is_grad_enabled()] += 1
                return gm(*args)
            return run
        learn = make(arch=arch, dls=mix_dls(images(16, 32, 3), images(8, 32, 3, seed=1), bs=8, drop_last=True)).compile(backend=backend)
        n = sum(m._compiled_call_impl is not None for m in learn.model.modules())
        d = sum(m._compiled_call_impl is not None for m in learn.mix.objective.modules())
        learn.fit_mixtraining(2, 2, rho=0.5) # a phase an epoch: two steps, and a batch of validation
        assert Counter(made)=={(True,False): n+d, (False,False): n+d}
        assert ran=={True: 2*(3*n-1+2*d), False: 3*n-1+2*d} # no classifier in the SSL phase, no objective in the SL phase

