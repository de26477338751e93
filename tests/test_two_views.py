"Two views as users combine them: with fastai's callbacks, loaded weights, a second fit, sizes set by hand"
from tempfile import mkdtemp
import numpy as np, pytest, timm, torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastcore.basics import noop
from mixfast.paper.cli import main
from mixfast.paper.efficient_ssl import efficient_settings
from mixfast.paper.records import missing_runs
from mixfast.all import BYOL, MAE, HardAugment, KNNAccuracy, MoCo, SimSiam, Sum, SuperProgressive, linear_probe, mix_dls, mix_learner, view_tfms, ViewTfms

rng = np.random.default_rng(0)
x,y = rng.integers(0, 256, (24,16,16,3), dtype=np.uint8),np.arange(24)%3

def learner(o, arch='vit_tiny_patch16_224', metrics=None, drop_last=True, n=24, **kw):
    torch.manual_seed(0)
    dls = mix_dls((x[:n],y[:n]), (x[:8],y[:8]), bs=8, seed=0, device='cpu', drop_last=drop_last, **kw)
    args = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2) if arch.startswith('vit') else {}
    learn = mix_learner(dls, arch, o, metrics=metrics, path=mkdtemp(), **args)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_blending_rests_while_there_are_two_views(cb):
    "It blends one batch: with several views it waits for the SL phase"
    learn = learner(SimSiam(16, 8, norm=False))
    learn.fit_mixtraining(2, 2, rho=0.5, cbs=cb())
    assert learn.mix.history.phase.tolist() == ['ssl','mix','sl'] and learn.mix.history.sl_loss.iloc[1:].notna().all()

@pytest.mark.parametrize('o', [BYOL(16, 32, norm=False), MoCo(8, 16, queue=8)], ids=['byol','moco'])
def test_a_teacher_follows_weights_that_were_loaded(o):
    "After a fit the weights may become others: the teacher of the next begins as a copy of them"
    learn = learner(o)
    learn.fit_ssl(1)
    new = {k: torch.randn_like(v)*0.02 for k,v in learn.model.state_dict().items()}
    learn.model.load_state_dict(new)
    learn.fit_ssl(1)
    teacher = learn.mix.objective.teacher[0].state_dict()
    far = sum((teacher[k]-v).norm()**2 for k,v in new.items())
    now = sum((teacher[k]-v).norm()**2 for k,v in learn.model.state_dict().items())
    assert now < 0.01*sum(v.norm()**2 for v in new.values()) and far < 0.05*sum(v.norm()**2 for v in new.values())

def test_nothing_gathered_outlives_a_fit():
    "Keys of micro-batches that no step has used are dropped"
    learn = learner(MoCo(8, 16, queue=8))
    learn.fit_ssl(1, cbs=GradientAccumulation(16)) # a step for two batches of three
    assert not learn.mix.objective.coming

def test_size_and_magnitude_are_settings(tmp_path):
    "Set by hand, they are known at a resume"
    def fit(size, magnitude, **kw):
        v = view_tfms('simclr')
        v.size,v.magnitude = size,magnitude
        learn = learner(SimSiam(16, 8, norm=False), ssl_tfms=v)
        learn.fit_ssl(1, checkpoint=tmp_path, **kw)
    fit(16, 5)
    for o in ((8,5), (16,9)):
        with pytest.raises(ValueError, match='tfms'): fit(*o, resume=True)

def test_sum_shows_what_its_parts_rebuild():
    learn = learner(Sum(MAE(dim=16), SimSiam(16, 8, norm=False)))
    assert learn.mix.show_reconstructions(2) is None
    with pytest.raises(NotImplementedError, match='does not reconstruct'): learner(SimSiam(16, 8)).mix.show_reconstructions(2)

def test_losses_below_zero_are_drawn():
    learn = learner(SimSiam(16, 8, norm=False))
    learn.fit_ssl(2)
    learn.mix.rows[-1]['ssl_loss'] = -0.5 # a cosine
    assert learn.mix.plot_history()[0].get_yscale() == 'linear'

@pytest.mark.parametrize('make,says', [(lambda: KNNAccuracy(k=0), 'k must be a whole number from 1 up'), (lambda: KNNAccuracy(t=0), 't must be a number above 0'),
    (lambda: KNNAccuracy(n=0), 'n must be a whole number from 1 up'), (lambda: linear_probe(learner(SimSiam(16, 8)), n=1), 'n must be a whole number from 2 up')])
def test_evaluation_is_asked_for_sensibly(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_copies_of_wide_images_are_whole_patches():
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, dynamic_img_size=True)
    o = HardAugment(SimSiam(16, 8))
    assert o._shrunk(torch.zeros(1, 3, 128, 192)).shape[-2:] == (48,64)
    o.setup(vit, torch.zeros(2, 3, 128, 192))

@pytest.mark.parametrize('arg', ['--seeds', '--jobs'])
def test_commands_take_whole_numbers(arg, capsys):
    for v in ('0', '-1', 'two'):
        with pytest.raises(SystemExit) as e: main(['--paper', 'efficient_ssl', arg, v])
        assert e.value.code == 2 and f'argument {arg}: must be a whole number from 1 up, got {v}' in capsys.readouterr().err

def test_a_foreign_record_is_named(tmp_path):
    (tmp_path/'small.jsonl').write_text('{"paper": "efficient_ssl", "exp": {"method": "simsiam", "colour": 1}, "seed": 0}\n')
    with pytest.raises(ValueError, match='a record has not what this version writes .*colour'):
        missing_runs(efficient_settings(2).exp, 1, tmp_path, 'small')

def test_trackers_wait_for_what_comes():
    "What is measured in SSL epochs alone, or watched, cannot be monitored in supervised ones"
    learn = learner(SimSiam(16, 8, norm=False), metrics=KNNAccuracy(k=4))
    for name,says in (('knn_accuracy', r'in SSL epochs alone: pass KNNAccuracy\(every_phase=True\)'), ('spread', 'watched, and no metric')):
        with pytest.raises(ValueError, match=says): learn.fit_mixtraining(2, 2, cbs=SaveModelCallback(monitor=name))
    learn.fit_ssl(1, cbs=SaveModelCallback(monitor='knn_accuracy'))

def test_views_by_name_and_of_the_wrong_kind():
    assert str(learner(SimSiam(16, 8), ssl_tfms=['byol']).dls.ssl.view_tfms) == str(view_tfms('byol'))
    with pytest.raises(ValueError, match='must give float32 images of the same size'):
        learner(SimSiam(16, 8), ssl_tfms=ViewTfms([lambda x: x.byte()]))

def test_a_last_batch_of_one_is_refused_at_the_call():
    "Two views of it are two rows: without this the SL phase would fail after all of SSL"
    learn = learner(SimSiam(16, 8), 'test_resnet', drop_last=False, n=17)
    with pytest.raises(ValueError, match='the last of the batches of 8 has one image of 17'): learn.fit_mixtraining(2, 2)
    assert not learn.mix.rows
    learner(SimSiam(16, 8, norm=False), drop_last=False, n=17).fit_mixtraining(1, 1) # a transformer does not mind

def test_the_same_view_twice():
    with pytest.warns(UserWarning, match='the views of an image are the same'): learner(SimSiam(16, 8, norm=False), ssl_tfms=lambda x: x).fit_ssl(1)

def test_supervised_baselines_let_strategies_rest():
    "So that methods can be compared with the same callbacks"
    learn = learner(SimSiam(16, 8, norm=False))
    learn.fit_sl(1, cbs=SuperProgressive(8, 16))
    with pytest.raises(ValueError, match='pass mix=True'): learn.fit_mixtraining(1, 1, rho=1, cbs=SuperProgressive(8, 16))
    with pytest.raises(ValueError, match='magnitude must be two numbers'): SuperProgressive(magnitude=(1, float('inf')))

def test_swin_takes_smaller_images():
    dls = mix_dls((x.repeat(2, 1).repeat(2, 2),y), bs=8, seed=0, device='cpu')
    learn = mix_learner(dls, 'swin_tiny_patch4_window7_224', HardAugment(SimSiam(16, 8, norm=False), n=3, size=16), embed_dim=16, depths=(1,1), num_heads=(1,2), window_size=4)
    with learn.no_bar(), learn.no_logging(): learn.fit_ssl(2, cbs=SuperProgressive(16, 32, warmup_epochs=0))
    assert {k[1][0][-1] for k in learn.mix.n_steps} >= {16}

def test_share_is_for_small_crops():
    v = view_tfms('dino', share=0.5)
    assert [v(torch.zeros(1, 3, 96, 96), i).shape[-1] for i in range(3)] == [96,96,48]
