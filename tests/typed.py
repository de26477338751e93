"What a user writes, for a type checker: `basedpyright tests/typed.py` finds nothing to object to. It is not run"
from pathlib import Path
from fastai.vision.all import accuracy, ranger
from mixfast.all import (MAE, SimSiam, Hypers, ImageStore, JobSettings, MixPlan, Recipe, TarImages, cifar10, compare_methods, describe_job,
    digits, equal_cost, few_labels, get_objective, get_recipe, hf_images, image_df, image_folder, image_stats, load_files, load_trained,
    mask_folder, mix_dls, mix_learner, near_pairs, predict_folder, prepare, scan, split_groups, stack_images, tar_images, train_folder)

data = image_folder(Path('photos'), size=(48,64), cache='cache')
x,y = data.train
i = few_labels(y, 10, seed=0)
dls = mix_dls((x[i],y[i]), data.valid, ssl=x, bs=64, mix='joint', sl_bs=16, tfms='cifar', vocab=data.vocab, seed=0, path=Path('here'))
learn = mix_learner(dls, 'resnet18', SimSiam(), metrics=accuracy, opt_func=ranger, drop_rate=0.1)
learn.fit_mixtraining(10, 10, rho=0.5, alpha=0.9, recipe=Recipe(ssl=Hypers(1e-3, warmup=0.1), sl=Hypers(1e-3)), checkpoint='run', resume=True)
learn.fit_best(minutes=5)
figures = learn.mix.history.accuracy.max(), learn.mix.phase_cost(), learn.mix.save_backbone('backbone'), learn.lr_find()
mix_learner(dls, 'vit_tiny_patch16_224', MAE(mask_ratio=0.6, visible_only=True), patch_size=8)
mix_learner(dls, 'resnet18', get_objective('byol')).fit_mixtraining(1, 1, 1)

files,kept = load_files(['a.jpg', Path('b.jpg')], size=64, mode='L')
store = ImageStore(files, y[kept], vocab=['cat','dog'])
mean,std = image_stats(store)
pairs,held = near_pairs(store),split_groups(['a','b'], [0,1], 0.2)
images = tar_images(['a.tar','b.tar'], size=(32,48), label=None, stream=True)
others = stack_images([], size=(32,64)), hf_images('folder', size=32), mask_folder('images', 'masks', size=(64,96)), cifar10(Path('data')), digits(16)

found = scan('photos')
job = prepare(JobSettings('photos', minutes=5, size=64), cache=Path('cache'))
report = train_folder(JobSettings('photos', e_ssl=1, e_sl=1, rho=0.5), Path('run'))
predictions = predict_folder('run', Path('more'), device='cpu')
model,about = load_trained('run/classifier')
lines,plan,recipe = describe_job(job),MixPlan(10, 10, 0.5),get_recipe('vit_t')
