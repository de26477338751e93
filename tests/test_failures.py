"What a machine cannot do ends a fit with an error that says what to change; nothing is lost"
import os, resource, signal, sys
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.all import Callback, CategoryBlock, DataBlock, PILImage, ProgressCallback, RandomSplitter, accuracy, noop, set_seed
from mixfast.all import AE, MixBlock, mix_dls, mix_learner
from mixfast.callback.files import _read_index as read_index
from conftest import HOT, TINY, images, same, state
sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import kills

def test_out_of_memory_in_the_mix_phase(make, tmp_path):
    "torch's own error, as a GPU raises it"
    learn = make(n=40)
    def full(*_):
        if learn.mix.phase=='mix' and learn.model.training: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    learn.model.patch_embed.register_forward_pre_hook(full) # mixfast calls forward_features
    fit = dict(e_ssl=3, e_sl=3, recipe=HOT, checkpoint=tmp_path/'run')
    with pytest.raises(torch.OutOfMemoryError, match=r'out of memory in epoch 2, in the mix phase, with batches of 8 images. learn.mix.find_batch_size\(\) says'):
        learn.fit_mixtraining(**fit)
    assert learn.mix.phase is None and [o['epoch'] for o in read_index(tmp_path/'run')]==[2,1]
    learn = make(n=40, seed=5)
    learn.fit_mixtraining(**fit, resume=True)
    ref = make(n=40)
    ref.fit_mixtraining(**{**fit, 'checkpoint':None})
    assert same(state(learn.model), state(ref.model))

def test_out_of_memory_on_a_cpu():
    "A process that may use 300 MB more than it does; `find_batch_size` finds what fits"
    def f():
        torch.set_num_threads(1)
        data = images(2048, 32, 3)
        learn = lambda bs: mix_learner(mix_dls(data, bs=bs, seed=0), 'vit_tiny_patch16_224', patch_size=4, depth=4, embed_dim=96, num_heads=3)
        big,bs = learn(2048),learn(64).mix.find_batch_size(memory=150*2**20)
        assert 16<=bs<=256, bs
        used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used+300*2**20,)*2)
        try: big.fit_mixtraining(1, 1, rho=1)
        except torch.OutOfMemoryError as e: assert 'out of memory in epoch 0, in the mix phase, with batches of 2048 images' in str(e), e
        else: raise AssertionError('it fits')
        del big
        small = learn(bs)
        small.remove_cb(ProgressCallback)
        small.logger = noop
        small.fit_mixtraining(1, 1, rho=1)
    assert kills.child(f)

def label(f): return Path(f).name[0]

@pytest.fixture
def new(tmp_path):
    (tmp_path/'images').mkdir()
    for i,(x,y) in enumerate(zip(*images(24))): PILImage.create(x[...,0]).save(tmp_path/'images'/f'{y}_{i:02}.png')
    files = sorted((tmp_path/'images').glob('*.png'))
    def _new(seed=0, workers=0):
        set_seed(seed, reproducible=True)
        def die(f): # the process that opens a certain image, when a file says so
            if f.name=='1_07.png' and (tmp_path/'die').exists(): os.kill(os.getpid(), signal.SIGKILL)
            return f
        block = DataBlock((MixBlock(seed=0), CategoryBlock), get_x=die, get_y=label, splitter=RandomSplitter(0.2, seed=0))
        learn = mix_learner(block.dataloaders(files, bs=4, num_workers=workers), objective=AE, metrics=accuracy, in_chans=3, **TINY)
        learn.remove_cb(ProgressCallback)
        learn.logger = noop
        return learn
    return _new

FIT = dict(e_ssl=2, e_sl=2, recipe=HOT)

class At(Callback):
    "Call `f` at the beginning of an epoch"
    only_watches = True
    def __init__(self, epoch, f): self.at,self.f = epoch,f
    def before_epoch(self):
        if self.epoch==self.at: self.f()

def test_a_process_that_loads_images_dies(new, tmp_path):
    "The error says so; without what killed it the fit goes on as if nothing had been"
    learn,sign = new(workers=2),tmp_path/'die'
    with pytest.raises(RuntimeError, match='a process that loads images died in epoch 1, in the mix phase, most often of memory: use fewer num_workers'):
        learn.fit_mixtraining(**FIT, checkpoint=tmp_path/'run', cbs=At(1, sign.touch))
    sign.unlink()
    check_goes_on(new, tmp_path, workers=2)

@pytest.mark.parametrize('workers', [0,2])
def test_a_file_turns_unreadable(new, tmp_path, workers):
    "Half an image, in the middle of a fit: named; once it is whole again, the fit goes on"
    learn,f = new(workers=workers),tmp_path/'images'/'1_07.png'
    whole = f.read_bytes()
    with pytest.raises(RuntimeError, match=r"cannot load .*1_07.png: .*truncated.*"):
        learn.fit_mixtraining(**FIT, checkpoint=tmp_path/'run', cbs=At(1, lambda: f.write_bytes(whole[:len(whole)//2])))
    f.write_bytes(whole)
    check_goes_on(new, tmp_path, workers=workers)

def check_goes_on(new, tmp_path, **kwargs):
    assert [o['epoch'] for o in read_index(tmp_path/'run')]==[1]
    learn = new(seed=5, **kwargs)
    learn.fit_mixtraining(**FIT, checkpoint=tmp_path/'run', resume=True)
    ref = new()
    ref.fit_mixtraining(**FIT)
    assert same(state(learn.model), state(ref.model)) and learn.recorder.losses==ref.recorder.losses

def test_batch_normalisation_of_one_image(make):
    "What torch cannot do is said with the argument to change"
    learn = make(dls=mix_dls(images(17), bs=8, drop_last=False), arch='test_resnet')
    with pytest.raises(ValueError, match='bs: a batch of one image is too small for the batch normalisation .* drop_last=True'): learn.fit_ssl(1)
    assert learn.mix.phase is None
    with pytest.raises(ValueError, match='bs: the last of the batches of 8 has one image of 17, too small for the batch normalisation'): learn.fit_mixtraining(1, 1)
    with pytest.raises(TypeError, match='patch_size must be a whole number of pixels, got True'):
        mix_learner(learn.dls, 'vit_tiny_patch16_224', patch_size=True)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_find_batch_size_on_a_gpu():
    "By making steps; before a fit has moved the model there, too"
    learn = mix_learner(mix_dls(images(64, 32, 3), bs=8, seed=0), 'vit_tiny_patch16_224', patch_size=4, depth=4, embed_dim=96, num_heads=3)
    for memory in (2**28, 2**30):
        bs = learn.mix.find_batch_size(memory=memory)
        assert max(learn.mix.step_bytes(bs).values()) <= memory < max(learn.mix.step_bytes(2*bs).values()) or bs==4096
    assert learn.mix.find_batch_size(most=64)==64
