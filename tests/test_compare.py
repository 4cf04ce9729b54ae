"`ranger-compare`, as a user meets it"
import json, random, re, resource, shutil, signal, struct, subprocess, sys, time, urllib.error, warnings, zlib
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.layers import Mish, SelfAttention, SimpleSelfAttention
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai_ranger.all import Adam, ranger_muon
from fastai_ranger.compare import data
from fastai_ranger.compare.comparison import (
    Arguments, cnn, compare, digits_dls, learner_func, make_plan, models, optimizers, ranger_compare, register, remake_report, scheds,
    summarize, train_run)
from fastai_ranger.compare.report import best_rates,colors_of,plot_curves
from helpers import finish, fork, forked
from PIL import Image
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits

command = Path(sys.executable).parent/'ranger-compare'

def rows(*args, **kwargs): return compare(*args, **kwargs).df

def write_images(path, splits, n=40):
    "Real scans as PNG files, `n` of each split, in folders by class"
    data = load_digits()
    for i,split in enumerate(splits):
        for j in range(i*n, (i+1)*n):
            folder = path/split/f'{data.target[j]}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((data.images[j]*15.9).astype('uint8')).resize((24, 24)).save(folder/f'{j}.png')
    return path

wrong = [
    (dict(data='digits', opts='ranger,rangr'), f"opts must be one of {', '.join(optimizers)}, or package.module:function, got rangr"),
    (dict(data='digits', opts='ranger,ranger'), 'opts has one more than once'),
    (dict(data='digits', opts='ranger:k'), 'opts has ranger:k, which cannot be made'),
    (dict(data='digits', opts='ranger:k=0'), 'opts has ranger:k=0, which cannot be made: `k` must be'),
    (dict(data='digits', opts='sgd:speed=3'), 'opts has sgd:speed=3, which cannot be made'),
    (dict(data='digits', opts='no.such:lion'), "opts has no.such:lion, but no.such cannot be imported: No module named 'no'"),
    (dict(data='digits', opts='torch.optim:Lion'), 'opts has torch.optim:Lion, but torch.optim has no Lion'),
    *([(dict(data='digits', opts='torch.optim:Muon'), 'opts has torch.optim:Muon, which cannot be made: ')] if hasattr(torch.optim, 'Muon') else []),
    (dict(data='digits', opts='builtins:print:sep=x'), 'opts has builtins:print:sep=x, which cannot be made: '),
    (dict(data='digits', opts='collections:ChainMap:k=3'), 'opts has collections:ChainMap:k=3, which cannot be made: '),
    (dict(data='digits', opts='torch.optim:AdamW:lr=fast'), 'opts has torch.optim:AdamW:lr=fast, which cannot be made: '),
    (dict(data='digits', epochs=0), 'epochs must be at least 1, got 0'),
    (dict(data='digits', seeds=0), 'seeds must be at least 1, got 0'),
    (dict(data='digits', bs=0), 'bs must be at least 1, got 0'),
    (dict(data='digits', bs=5000), 'bs must be at most the number of training images, 1437, got 5000'),
    (dict(data='digits', size=-8), 'size must be at least 1, got -8'),
    (dict(data='digits', sched='cos'), 'sched must be one of flat_cos, one_cycle, ranger21, warm_flat_cos, flat, got cos'),
    (dict(data='digits', sched='flat,flat'), 'sched has one more than once'),
    (dict(data='digits', model='resnet'), 'model must be one of cnn, xresnet18'),
    (dict(data='digits', lr='fast'), 'lr must be a number or `name=number,...`, got fast'),
    (dict(data='digits', lr='0'), 'lr of ranger must be above 0, got 0.0'),
    (dict(data='digits', opts='adam', lr='ranger=.1'), 'lr is given for ranger, which is not compared'),
    (dict(data='digits', lr='.1', lr_grid=3), 'lr is what lr_grid looks for, got both'),
    (dict(data='digits', lr_grid=-1), 'lr_grid must be at least 0, got -1'),
    (dict(data='digits', lr_grid=3, bs=1400), 'bs must be at most the number of training images, 1149, got 1400'),
    (dict(data='digits', tune_seeds=0), 'tune_seeds must be at least 1, got 0'),
    (dict(data='digits', lr_grid=3, n_tune=1150), 'n_tune must be from 1 to four fifths of the training images, 1149, got 1150'),
    (dict(data='digits', lr_grid=3, n_tune=32), 'bs must be at most the number of training images, 32, got 64'),
    (dict(data='digits', n_tune=100), 'n_tune goes with lr_grid, got 100 without it'),
    (dict(data='digits', best_sched=True), 'best_sched goes with lr_grid, got True without it'),
    (dict(data='digits', recipe='secret'), 'recipe must be one of plain, leaderboard, got secret'),
    (dict(data='digits', recipe='leaderboard', model='cnn'), "model must be one of fastai's for recipe leaderboard, got cnn"),
    (dict(data='digits', precision='fp8'), 'precision must be one of fp32, fp16, bf16, got fp8'),
    (dict(data='digits', split='v1'), 'split goes with imagenette or imagewoof, got v1 with digits'),
    (dict(data='imagenette', split='v3'), 'split must be v1, got v3'),
    (dict(data='digits', noise=2.), 'noise must be a number in [0, 1], got 2.0'),
    (dict(data='digits', n_train=0), 'n_train must be from 1 to the number of training images, 1437, got 0'),
    (dict(data='digits', path='here'), 'path goes with one of fashion_mnist, cifar10, imagenette, imagewoof, got here with digits'),
    (dict(data='imagenette', path='no/such'), 'no such folder: no/such'),
    (dict(data='fashion_mnist', path='no/such'), 'no fashion_mnist in no/such'),
    (dict(data='no/such'), 'no such folder: no/such'),
]

@pytest.mark.parametrize('kwargs,message', wrong)
def test_wrong_arguments(kwargs, message, tmp_path, capsys):
    "One line, exit status 2; `ValueError` for those who call the function"
    kwargs = dict(out=str(tmp_path/'out'), **kwargs)
    with pytest.raises(SystemExit) as e: ranger_compare(**kwargs)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f'ranger-compare: {message}') and err.count('\n') == 1
    with pytest.raises(ValueError): compare(**kwargs)
    assert not (tmp_path/'out').exists()

def test_folder_without_splits(tmp_path, capsys):
    for splits in ((), ('train',), ('valid', 'test')):
        write_images(tmp_path/'_'.join(('x', *splits)), splits, n=1)
        (tmp_path/'_'.join(('x', *splits))).mkdir(exist_ok=True)
        with pytest.raises(SystemExit): ranger_compare(str(tmp_path/'_'.join(('x', *splits))))
        assert 'must have a folder train/ and one of valid/, val/, validation/ and test/' in capsys.readouterr().err

def test_folder_without_images(tmp_path, capsys):
    for o in ('train', 'val'): (tmp_path/o).mkdir()
    with pytest.raises(SystemExit): ranger_compare(str(tmp_path))
    assert 'no images in' in capsys.readouterr().err

def test_folders_that_cannot_be_trained_on(tmp_path, capsys):
    path = write_images(tmp_path/'data', ('train', 'valid'))
    for extra,message in (('valid/unheard/1.png', 'has classes that'), ('train/1.png', 'is not in a folder of'), ('train/0/deep/1.png', 'is not in a folder of')):
        (path/extra).parent.mkdir(exist_ok=True)
        Image.new('L', (8, 8)).save(path/extra)
        with pytest.raises(SystemExit): ranger_compare(str(path), bs=8)
        assert message in capsys.readouterr().err
        (path/extra).unlink()

def test_every_model_can_be_made():
    with torch.device('meta'):
        for model in models.values(): assert list(model(n_out=2, c_in=1).parameters())[-1].shape == (2,)

def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path/'out').touch()
    with pytest.raises(SystemExit): ranger_compare('digits', out=str(tmp_path/'out'))
    assert 'cannot make the folder' in capsys.readouterr().err

@pytest.mark.parametrize('there,valid', [(['valid', 'val', 'test'], 'valid'), (['test', 'val'], 'val'), (['test', 'validation'], 'validation'), (['test'], 'test')])
def test_a_folder_of_images(there, valid, tmp_path, capsys):
    "Screen and report say what is validated on; the test images only where there is nothing else, with a warning"
    path = write_images(tmp_path/'data', ('train', *there))
    for o in set(there)-{valid}: next((path/o).rglob('*.png')).unlink() # so that the others have fewer images
    with pytest.warns(UserWarning, match='has only test/ to validate on') if valid == 'test' else warnings.catch_warnings():
        if valid != 'test': warnings.simplefilter('error')
        df = rows(str(path), opts='ranger,sgd', epochs=1, seeds=2, bs=8, size=16, model='cnn', lr='ranger=.01', sched='one_cycle', out=str(tmp_path/'out'))
    says = f'40 images to train on, 40 to validate on (folder {valid}/), 10 classes'
    assert f'data: {says}' in capsys.readouterr().out and says in (tmp_path/'out/report.md').read_text()
    assert df.groupby(['optimizer', 'seed']).size().to_dict() == {(o, s): 1 for o in ('ranger', 'sgd') for s in (0, 1)}
    assert dict(zip(df.optimizer, df.lr)) == dict(ranger=.01, sgd=.1)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'out/results.csv'), df)
    assert Image.open(tmp_path/'out/curves.png').size[0] > 1000
    assert not plt.get_fignums()

def test_a_seed_is_the_same_start_for_all(tmp_path):
    "With rates too small to move anything, the curves are one"
    df = rows('digits', epochs=1, seeds=2, lr='1e-12', out=str(tmp_path))
    losses = df.groupby('seed').train_loss
    assert (losses.max()-losses.min()).max() < 1e-4 and losses.mean().nunique() == 2

def test_an_image_that_cannot_be_read(tmp_path, capsys):
    path = write_images(tmp_path/'data', ('train', 'valid'))
    (path/'train/0/broken.png').write_bytes(b'no image')
    with pytest.raises(SystemExit): ranger_compare(str(path), bs=8)
    assert f"cannot read {path/'train/0/broken.png'}" in capsys.readouterr().err

def test_no_network(monkeypatch, capsys):
    "The message names the folder option"
    def fail(*args, **kwargs): raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(data, 'untar_data', fail)
    for name in ('cifar10', 'imagenette', 'imagewoof'):
        with pytest.raises(SystemExit): ranger_compare(name)
        assert f'cannot download {name} (<urlopen error no route to host>): give the folder it is in with path' in capsys.readouterr().err

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_float16_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit): ranger_compare('digits', precision='fp16', out=tmp_path)
    assert 'precision must be fp32 or bf16 where there is no GPU, got fp16' in capsys.readouterr().err

def test_bfloat16(tmp_path, monkeypatch):
    "Other losses than in float32, by what bfloat16 rounds away; weights and state in float32"
    seen = set()
    def fit(learn, *args, **kwargs):
        learn.fit(*args, **kwargs)
        seen.update(o.dtype for o in [*learn.model.parameters(), *(v for s in learn.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))])
    monkeypatch.setitem(scheds, 'flat', fit)
    half,full = [rows('digits', opts='ranger', sched='flat', epochs=2, seeds=1, precision=o, out=tmp_path/o) for o in ('bf16', 'fp32')]
    assert seen == {torch.float32} and (half.train_loss != full.train_loss).all() and half.train_loss.values == pytest.approx(full.train_loss.values, rel=.05)

def test_the_split_of_2019(tmp_path, capsys):
    "Images named as in ImageNet's validation set, from both folders"
    path = write_images(tmp_path/'data', ('train', 'val'))
    moved = 0
    for part in ('train', 'val'):
        for i,f in enumerate(sorted((path/part).rglob('*.png'))):
            if i%4 == 0:
                f.rename(f.with_name(f'ILSVRC2012_val_{i:08}.png'))
                moved += 1
    kwargs = dict(path=path, opts='sgd', epochs=1, seeds=1, bs=8, size=16, model='xresnet18')
    for split,says in ((None, '40 images to train on, 40 to validate on (folder val/)'), ('v1', '60 images to train on, 20 to validate on (those named ILSVRC2012_val_*)')):
        compare('imagewoof', split=split, out=tmp_path/str(split), **kwargs)
        assert moved == 20 and says in capsys.readouterr().out and says in (tmp_path/str(split)/'report.md').read_text()
    with pytest.raises(ValueError, match='has one with other .*split'): compare('imagewoof', split=None, out=tmp_path/'v1', **kwargs)
    held_out = data.get_images('imagewoof', path, 16, 'v1').valid
    assert sorted(y for _,y in held_out) == sorted(int(f.parent.name) for f in path.rglob('ILSVRC*'))

def test_channels_last(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(scheds, 'flat', lambda learn, n, lr, start_epoch: (learn.fit(n, lr), seen.append(learn.model[1][0].weight.is_contiguous(memory_format=torch.channels_last))))
    for o in (True, False): compare('digits', opts='ranger', sched='flat', epochs=1, seeds=1, channels_last=o, out=tmp_path/str(o))
    assert seen == [True, False]

def test_the_leaderboard_recipe():
    _,task,opt_funcs = make_plan(Arguments('digits', 'sgd', size=16, bs=32, recipe='leaderboard', model='xresnet18'))
    learn = task.learner(opt_funcs['sgd'])
    model = learn.model
    assert any(isinstance(m, Mish) for m in model.modules()) and not any(isinstance(m, torch.nn.ReLU) for m in model.modules())
    assert any(isinstance(m, SimpleSelfAttention|SelfAttention) for m in model.modules())
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropyFlat)
    plan,*_ = make_plan(Arguments('digits', size=16, recipe='leaderboard'))
    assert plan.settings['model'] == 'xse_resnext50'

def test_noise_and_a_part_of_the_images(tmp_path):
    df = rows('digits', opts='adam', epochs=3, seeds=1, n_train=512, noise=1., out=tmp_path)
    assert df.accuracy.iloc[-1] < .05 # never the right one
    assert json.loads((tmp_path/'settings.json').read_text())['n_train'] == 512

def test_schedules(tmp_path):
    df = rows('digits', opts='adam', sched=','.join(scheds), epochs=1, seeds=1, out=tmp_path)
    assert df.groupby('sched', sort=False).train_loss.first().nunique() == len(scheds)

def test_warm_up():
    learn = Learner(digits_dls(), cnn(c_in=1), CrossEntropyLossFlat())
    scheds['warm_flat_cos'](learn, 2, .1)
    lrs = learn.recorder.hps['lr']
    assert lrs[0] == pytest.approx(1e-4) and lrs[5:33] == pytest.approx([.1]*28) and lrs[-1] < .01
    assert lrs[:5] == sorted(lrs[:5]) and lrs[33:] == sorted(lrs[33:], reverse=True)

## Optimizers of one's own

own = """
from fastai_ranger.all import ranger
def slow(params, lr=2e-3, k=6): return ranger(params, lr=lr, k=k)
def rateless(params, lr): return ranger(params, lr=lr)
def none(params, lr): pass
"""

def test_an_optimizer_of_your_own(tmp_path, monkeypatch):
    "From a file in the current folder to the table, picture and report; its rate is its own default, or else fastai's"
    (tmp_path/'own.py').write_text(own)
    (tmp_path/'broken.py').write_text('def f(:')
    monkeypatch.chdir(tmp_path)
    opts = 'own:slow,own:slow:k=3,own:rateless,torch.optim:AdamW,ranger'
    res = subprocess.run([command, 'digits', '--opts', opts, '--epochs', '1', '--seeds', '1', '--out', 'out'], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    df = pd.read_csv('out/results.csv')
    assert dict(zip(df.optimizer, df.lr)) == {'own:slow': 2e-3, 'own:slow:k=3': 2e-3, 'own:rateless': 1e-3, 'torch.optim:AdamW': 1e-3, 'ranger': 8e-3}
    assert 'own:slow:k=3' in res.stdout.split('\noptimizer')[1] and '| own:slow:k=3 | 0.002 |' in Path('out/report.md').read_text()
    assert Path('out/curves.png').exists()
    def start(opts, **kwargs): return fork(ranger_compare, 'digits', opts=opts, epochs=1, seeds=1, out='out', log=opts, **kwargs)
    finish(start('own:slow,ranger', lr='own:slow=.1'))
    assert .1 in pd.read_csv('out/results.csv').query("optimizer == 'own:slow'").lr.values
    for opts,message in (('own:fast', 'own has no fast'), ('broken:f', 'broken cannot be imported'), ('own:none', 'makes no optimizer, but NoneType')):
        p = start(opts)
        p.join()
        said = Path(opts).read_text()
        assert p.exitcode == 2 and message in said.splitlines()[-1] and 'Traceback' not in said

def test_a_rate_in_the_name(tmp_path):
    df = rows('digits', opts='adam,adam:lr=.1', epochs=1, seeds=1, n_train=128, out=tmp_path)
    assert dict(zip(df.optimizer, df.lr)) == {'adam': 3e-3, 'adam:lr=.1': .1} and df.train_loss.nunique() == 2
    ax = plot_curves(df).axes[0]
    assert [o for o in ax.get_xticks() if ax.get_xlim()[0] < o < ax.get_xlim()[1]] == [1] # the only epoch

@patch.dict(optimizers)
def test_more_optimizers_than_colors(tmp_path):
    "Registered after the import, without a color: twenty of them have twenty colors"
    names = [f'lion{i}' for i in range(20)]
    for o in names: register(o, torch.optim.SGD)
    df = rows('digits', opts=','.join(names), epochs=1, seeds=1, n_train=64, out=tmp_path)
    assert df.optimizer.tolist() == names and (df.lr == 1e-3).all()
    colors = colors_of(['lion0:momentum=.9', *names, 'ranger', 'stock'])
    assert len(set(colors.values())) == 23 and (colors['ranger'], colors['stock']) == ('#d62728', '#000000')
    assert Image.open(tmp_path/'curves.png').size[0] > 1000

@pytest.mark.parametrize('name', optimizers)
def test_every_optimizer_trains(name):
    "in a `Learner`, with its usual rate"
    if name == 'optimi_triton' and not torch.cuda.is_available(): pytest.skip('Triton needs a GPU')
    o = optimizers[name]
    rows = train_run(learner_func(lambda: data.digits().take(128).dls(64), cnn), o.for_learner(), o.lr, epochs=1)
    assert 1.5 < rows[0]['train_loss'] < 3

## The rate is looked for on training images

def test_validation_images_choose_no_rate(tmp_path):
    "With labels that are all wrong in validation, rates are found all the same"
    path = write_images(tmp_path/'data', ('train', 'valid'), n=200)
    for i in range(5): # 0 to 4 trade places with 5 to 9
        (path/f'valid/{i}').rename(path/'valid/x')
        (path/f'valid/{i+5}').rename(path/f'valid/{i}')
        (path/'valid/x').rename(path/f'valid/{i+5}')
    df = rows(str(path), opts='adam', epochs=8, seeds=1, bs=16, size=24, model='cnn', lr_grid=3, out=str(tmp_path/'out'))
    tune = pd.read_csv(tmp_path/'out/tune.csv')
    best = tune[tune.epoch==8].set_index('lr').accuracy
    assert len(best) == 3 and best.max() > .4 > .2 > df[df.epoch==8].accuracy.item()
    assert df.lr.unique().tolist() == [best.idxmax()]

def test_a_short_search_for_rate_and_schedule(tmp_path):
    kwargs = dict(data='digits', opts='sgd,adam', sched='one_cycle,flat_cos', epochs=2, seeds=2, lr_grid=2, n_tune=256, best_sched=True, out=tmp_path)
    def held_out(n):
        _,task,opt_funcs = make_plan(Arguments(**kwargs | dict(n_tune=n)))
        return task.tune_learner(opt_funcs['sgd']).dls
    parts,whole = held_out(256),held_out(None)
    assert len(parts.train_ds) == 256 and len(whole.train_ds) == 1149 and [y for _,y in parts.valid_ds] == [y for _,y in whole.valid_ds]
    df = rows(**kwargs)
    tune = pd.read_csv(tmp_path/'tune.csv')
    assert len(runs_of(tmp_path/'tune.csv')) == 2*8 and len(runs_of(tmp_path/'results.csv')) == 2*4
    assert summarize(df)['diff'].isna().sum() == 1 and df.optimizer.iloc[0] == 'sgd' # the first named
    for name,mine in tune[tune.epoch==2].groupby('optimizer'):
        best = mine.sort_values(['accuracy', 'valid_loss'], ascending=[False, True]).iloc[0]
        assert df[df.optimizer==name][['sched', 'lr']].drop_duplicates().values.tolist() == [[best.sched, best.lr]]
    with pytest.raises(ValueError, match='which has one with other n_tune'): compare(**kwargs | dict(n_tune=300))

## What is finished is not run again

def runs_of(path): return pd.read_csv(path)[['optimizer', 'sched', 'lr', 'seed', 'epoch']].drop_duplicates()

def test_kill_and_go_on(tmp_path):
    def start(): return fork(ranger_compare, 'digits', epochs=2, seeds=2, opts='ranger,adam', sched='flat_cos,one_cycle', lr_grid=2, out=tmp_path, log=tmp_path/'log')
    for kept in ('tune.csv', 'results.csv'):
        p = start()
        while not (tmp_path/kept).exists():
            assert p.is_alive()
            time.sleep(.02)
        p.kill()
        p.join()
        assert (pd.read_csv(tmp_path/kept).groupby(['optimizer', 'sched', 'lr', 'seed']).size() == 2).all()
    before = {k: (tmp_path/k).read_text() for k in ('tune.csv', 'results.csv')}
    (tmp_path/'log').unlink()
    finish(start())
    out = (tmp_path/'log').read_text()
    for k,old in before.items():
        now = (tmp_path/k).read_text()
        assert now.startswith(old) and len(runs_of(tmp_path/k)) == len(pd.read_csv(tmp_path/k)) == 16
    assert len(re.findall(r', seed \d', out)) == 4*2+4*2-sum(len(o.splitlines())-1 for o in before.values())//2
    done = {k: (tmp_path/k).stat().st_mtime_ns for k in before}
    report = (tmp_path/'report.md').read_text()
    again = next(o for o in report.splitlines() if o.startswith('    ranger-compare'))
    out = subprocess.run([command, *again.split()[1:]], capture_output=True, text=True, check=True).stdout
    assert not re.search(r', seed \d', out) and {k: (tmp_path/k).stat().st_mtime_ns for k in before} == done
    assert (tmp_path/'report.md').read_text() == report

class Killed(Exception): pass

@pytest.mark.parametrize('opt,sched', [*(('ranger', o) for o in scheds), *((o, 'flat_cos') for o in ('ranger21', 'sgd', 'lookahead_adam', 'stock'))])
def test_a_run_goes_on_after_any_epoch(opt, sched, tmp_path, monkeypatch):
    "Stopped in the second and in the last epoch: the rows of the uninterrupted run, to the bit"
    kwargs = dict(get_learner=learner_func(lambda: data.folder(path, 16).dls(16), cnn), opt_func=optimizers[opt].opt_func, lr=1e-2, epochs=4, sched=sched)
    path = write_images(tmp_path/'data', ('train', 'valid'), n=60) # with random crops
    numbers = lambda rows: [{k: v for k,v in o.items() if 'seconds' not in k} for o in rows]
    whole = train_run(**kwargs)
    file,updates = tmp_path/'run.pth',0
    def count(self):
        nonlocal updates
        updates += 1
        if updates in (6, 12): raise Killed
        return step(self)
    step = Learner._step
    monkeypatch.setattr(Learner, '_step', count)
    for _ in range(2):
        with pytest.raises(Killed): train_run(**kwargs, file=file)
    rows = train_run(**kwargs, file=file)
    assert numbers(rows) == numbers(whole) and updates == 18
    assert numbers(train_run(**kwargs, file=file)) == numbers(whole) and updates == 18 # nothing is left to do

def test_seconds_of_a_stopped_run(tmp_path, monkeypatch):
    "are those of its whole epochs, with nothing of the time between"
    monkeypatch.setattr('fastai_ranger.compare.train._now', lambda: now)
    now,fail = 0.,3
    def step(self):
        nonlocal now
        now += 1
        if now == fail: raise Killed
        return real(self)
    real = Learner._step
    monkeypatch.setattr(Learner, '_step', step)
    kwargs = dict(get_learner=learner_func(lambda: data.digits().take(128).dls(64), cnn), opt_func=optimizers['ranger'].opt_func, lr=1e-2, epochs=3, file=tmp_path/'run.pth')
    with pytest.raises(Killed): train_run(**kwargs)
    now,fail = 1e6,None
    assert [o['seconds'] for o in train_run(**kwargs)] == [2, 2, 2]

def test_killed_at_random_moments(tmp_path):
    "With kill -9; the file of the run is gone in the end"
    def start(name): return fork(ranger_compare, 'digits', epochs=8, seeds=1, opts='ranger', precision='bf16', out=tmp_path/name, log=tmp_path/f'{name}.log')
    columns = ['optimizer', 'epoch', 'train_loss', 'valid_loss', 'accuracy']
    finish(start('whole'))
    file,rng = tmp_path/'stopped/results-ranger-flat_cos-0.008-0.pth',random.Random()
    for i in range(5):
        before = file.stat().st_mtime_ns if file.exists() else 0
        p = start('stopped')
        while p.is_alive() and (not file.exists() or file.stat().st_mtime_ns == before): time.sleep(.002) # one more epoch
        time.sleep(rng.random()*.3)
        p.kill()
        p.join()
        assert p.exitcode == -signal.SIGKILL and not (tmp_path/'stopped/results.csv').exists()
    finish(start('stopped'))
    whole,stopped = [pd.read_csv(tmp_path/o/'results.csv') for o in ('whole', 'stopped')]
    pd.testing.assert_frame_equal(stopped[columns], whole[columns], check_exact=True)
    assert (tmp_path/'stopped.log').read_text().count('goes on where it stopped') == 5 and not [o for o in (tmp_path/'stopped').iterdir() if o.suffix in ('.pth', '.part')]

def test_a_checkpoint_that_cannot_be_read(tmp_path, capsys):
    file = tmp_path/'results-ranger-flat_cos-0.008-0.pth'
    file.write_bytes(b'no checkpoint')
    with pytest.raises(SystemExit): ranger_compare('digits', opts='ranger', epochs=1, seeds=1, out=tmp_path)
    assert f'cannot read {file}' in capsys.readouterr().err and file.read_bytes() == b'no checkpoint'

def test_time_left(tmp_path, monkeypatch, capsys):
    "With a clock that goes by the images seen, the time left is right to the second, over the search and the runs"
    now = 0.
    def run(get_learner, **kwargs):
        nonlocal now
        dls = get_learner(kwargs['opt_func']).dls
        now += 3*len(dls.train_ds) + len(dls.valid_ds)
        return [dict(epoch=1, train_loss=1., valid_loss=1., accuracy=.5, seconds=1., opt_seconds=.1)]
    monkeypatch.setattr('fastai_ranger.compare.comparison.train_run', run)
    monkeypatch.setattr('fastai_ranger.compare.comparison.perf_counter', lambda: now)
    compare('digits', opts='ranger,adam', epochs=1, seeds=2, lr_grid=2, n_tune=100, out=tmp_path)
    left = [o.split('about ')[1].removesuffix(' left') for o in capsys.readouterr().out.splitlines() if 'about' in o]
    walls = [3*100+288]*4 + [3*1437+360]*4
    assert left == [str(timedelta(seconds=sum(walls[i:]))) for i in range(1, 8)]

def test_more_seeds_and_optimizers(tmp_path):
    compare('digits', opts='ranger', epochs=1, seeds=1, out=tmp_path)
    first = (tmp_path/'results.csv').read_text()
    df = rows('digits', opts='ranger,adam', epochs=1, seeds=2, out=tmp_path)
    assert (tmp_path/'results.csv').read_text().startswith(first) and len(df) == 4
    assert summarize(rows('digits', opts='adam,ranger', epochs=1, seeds=2, out=tmp_path))['diff'].isna().to_dict() == {'adam': True, 'ranger': False} # the first named
    assert len(rows('digits', opts='adam', epochs=1, seeds=2, out=tmp_path)) == 2 and len(pd.read_csv(tmp_path/'results.csv')) == 4

def test_results_of_another_comparison(tmp_path, capsys):
    compare('digits', opts='ranger', epochs=1, seeds=1, out=tmp_path)
    kept = {o: o.read_bytes() for o in tmp_path.iterdir()}
    with pytest.raises(SystemExit): ranger_compare('digits', opts='ranger', epochs=2, noise=.1, out=tmp_path)
    assert f'out must be a folder without the results of another comparison, got {tmp_path}, which has one with other epochs, noise' in capsys.readouterr().err
    assert {o: o.read_bytes() for o in tmp_path.iterdir()} == kept
    settings = json.loads(kept[tmp_path/'settings.json'])
    (tmp_path/'settings.json').write_text(json.dumps({k: v for k,v in settings.items() if k not in ('n_tune', 'plan')})) # from before there were such settings
    assert len(rows('digits', opts='ranger', epochs=1, seeds=1, out=tmp_path)) == 1
    (tmp_path/'settings.json').unlink()
    with pytest.raises(SystemExit): ranger_compare('digits', opts='ranger', epochs=1, out=tmp_path)

def test_first_is_what_others_are_measured_against(tmp_path):
    table = summarize(rows('digits', opts='adam,sgd,adam:wd=.01,adam:mom=0.', epochs=1, seeds=3, out=tmp_path))
    assert table['diff'].isna().to_dict() == {'adam': True, 'sgd': False, 'adam:wd=.01': False, 'adam:mom=0.': False}
    assert table.loc['adam:wd=.01', 'diff'] == 0 and np.isnan(table.loc['adam:wd=.01', 'p']) # fastai's Adam has that weight decay
    assert table.loc['adam:mom=0.', 'diff'] != 0
    accs = pd.read_csv(tmp_path/'results.csv').pivot(index='seed', columns='optimizer', values='accuracy')
    assert table.loc['sgd', 'p'] == pytest.approx(ttest_rel(accs.sgd, accs.adam).pvalue)

def test_exit_status(tmp_path):
    p = fork(ranger_compare, 'digits', opts='nope', log=tmp_path/'log')
    p.join()
    said = (tmp_path/'log').read_text()
    assert p.exitcode == 2 and 'ranger-compare: opts must be one of' in said and 'Traceback' not in said

def test_ctrl_c_keeps_what_was_finished(tmp_path):
    p = subprocess.Popen([command, 'digits', '--epochs', '5', '--seeds', '20', '--out', tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a test run in the background ignores it
    while not (tmp_path/'results.csv').exists():
        assert p.poll() is None, p.stderr.read()
        time.sleep(.1)
    time.sleep(1)
    for _ in range(3): # Python drops one that comes while it runs a destructor
        p.send_signal(signal.SIGINT)
        try: out,err = p.communicate(timeout=30)
        except subprocess.TimeoutExpired: continue
        break
    assert p.returncode == 130 and 'Traceback' not in err, err
    df = pd.read_csv(tmp_path/'results.csv')
    assert len(df) % 5 == 0 and 5 <= len(df) < 500
    assert 's/epoch' in out and f"Wrote {tmp_path/'results.csv'}" in out
    assert (tmp_path/'curves.png').exists()

## The report again

def test_the_report_again(tmp_path, monkeypatch, capsys):
    "From the files of a folder, here a copy: the same, to the byte, without data, training or a look at the machine"
    first,out = tmp_path/'first',tmp_path/'out'
    compare('digits', opts='sgd,adam', sched='one_cycle,flat_cos', epochs=1, seeds=2, n_train=256, lr_grid=2, best_sched=True, out=first)
    said = capsys.readouterr().out
    shutil.copytree(first, out)
    for o in ('curves.png', 'report.md'): (out/o).unlink()
    for o in ('train_run', 'get_images', 'machine'): monkeypatch.setattr(f'fastai_ranger.compare.comparison.{o}', None)
    ranger_compare(str(out), report=True)
    assert contents(out) == contents(first) and capsys.readouterr().out.split('Wrote')[0] in said

def test_no_report_can_be_made(finished, tmp_path, capsys):
    "One line, and the folder is left as it is"
    out = shutil.copytree(finished, tmp_path/'out')
    settings = json.loads((out/'settings.json').read_text())
    def refuses(why, folder=out, **kwargs):
        before = contents(out)
        assert why in refused(capsys, data=str(folder), report=True, **kwargs) and contents(out) == before
    refuses('no comparison in', folder=tmp_path/'typo')
    assert not (tmp_path/'typo').exists()
    refuses('report takes the folder of a comparison alone, got epochs, out too', epochs=2, out='here')
    (out/'settings.json').write_text(json.dumps(settings | dict(plan=dict(lrs=1))))
    refuses(f"{out/'settings.json'} is not settings of a comparison")
    del settings['plan']
    (out/'settings.json').write_text(json.dumps(settings))
    refuses('settings.json has no plan, as it is of an older version')
    compare(**small, out=out) # which adds it
    (out/'results.csv').unlink()
    refuses('no finished run in')

def test_the_name_of_the_package():
    "gives the function, not a module"
    from fastai_ranger.compare import compare as from_package
    assert from_package is compare

## Files that break

small = dict(data='digits', opts='adam', epochs=2, seeds=1, n_train=128)

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp('finished')/'out'
    compare(**small, out=path)
    return path

def refused(capsys, **kwargs):
    "What the command says, in its one line"
    with pytest.raises(SystemExit) as e: ranger_compare(**kwargs)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    return err

def contents(path): return {o.name: o.read_bytes() for o in path.iterdir()}

spoils = dict(in_mid_row=lambda b: b[:-30], in_the_last_number=lambda b: b[:-3], after_a_row=lambda b: b[:b.rfind(b'\n', 0, -1)+1], empty=lambda b: b'', zeros=lambda b: bytes(300),
              binary=lambda b: bytes(range(256)), another_header=lambda b: b'a,b\n1,2\n', a_list=lambda b: b'[1]', a_number=lambda b: b'5')

@pytest.mark.parametrize('name', ['results.csv', 'tune.csv', 'settings.json'])
@pytest.mark.parametrize('spoil', spoils)
def test_a_file_that_is_spoilt(name, spoil, finished, tmp_path, capsys):
    "is named and left as it is; with the file mended, the comparison goes on"
    out = shutil.copytree(finished, tmp_path/'out')
    if name == 'tune.csv': shutil.copy(out/'results.csv', out/name)
    good = (out/name).read_bytes()
    (out/name).write_bytes(spoils[spoil](good))
    before = contents(out)
    assert f'ranger-compare: {out/name} is not ' in refused(capsys, **small, out=out) and contents(out) == before
    (out/name).write_bytes(good)
    assert len(rows(**small, out=out)) == 2

def test_results_that_have_diverged(finished, tmp_path):
    "An empty field is a loss that was NaN, no cut"
    out = shutil.copytree(finished, tmp_path/'out')
    pd.read_csv(out/'results.csv').assign(train_loss=np.nan).to_csv(out/'results.csv', index=False)
    assert rows(**small, out=out).train_loss.isna().all()

def test_two_at_once(tmp_path):
    "on one folder: the second is refused, and the first loses nothing; killed, it leaves the folder to others"
    first,log = fork(ranger_compare, 'digits', opts='ranger', epochs=2, seeds=9, out=tmp_path),tmp_path/'log'
    while not (tmp_path/'settings.json').exists(): time.sleep(.02)
    second = fork(ranger_compare, 'digits', opts='adam', epochs=2, seeds=9, out=tmp_path, log=log)
    second.join()
    first.kill()
    first.join()
    assert second.exitcode == 2 and log.read_text() == f'ranger-compare: out must be a folder that no other comparison uses at the moment, got {tmp_path}\n'
    compare('digits', opts='adam', epochs=2, seeds=1, out=tmp_path)
    for _ in range(2): # in one process, too, one after another
        with pytest.raises(ValueError, match='other epochs'): compare('digits', opts='adam', epochs=1, out=tmp_path)

def on_a_full_disk(most, out, said):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    warnings.simplefilter('ignore')
    with redirect_stderr(StringIO()) as err:
        try: ranger_compare('digits', opts='adam', epochs=1, seeds=2, n_train=128, out=out)
        finally: said.send(err.getvalue())

@pytest.mark.parametrize('most,name', [(10, 'settings.json'), (1000, 'results-adam-flat_cos-0.003-0.pth'), (30000, 'curves.png')])
def test_no_room_for_a_file(most, name, finished, tmp_path):
    "as on a full disk: one line with its name, and nothing half-written"
    out = tmp_path/'out'
    if name == 'curves.png': # all that is left to do
        compare('digits', opts='adam', epochs=1, seeds=2, n_train=128, out=out)
        for o in ('curves.png', 'report.md'): (out/o).unlink()
    here,there = forked.Pipe() # a file would have no room either
    p = fork(on_a_full_disk, most, out, there)
    said = here.recv()
    p.join()
    assert p.exitcode == 2 and said.startswith(f'ranger-compare: cannot write {out/name}: ') and said.count('\n') == 1, said
    assert {o.name for o in out.iterdir()} <= {'.lock', 'settings.json', 'results.csv'} and all(o.stat().st_size for o in out.iterdir() if o.name != '.lock')

def test_a_folder_that_cannot_be_written(capsys): assert 'cannot make the folder /proc/out: ' in refused(capsys, **small, out='/proc/out')

def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))

def png(side, data=b''): return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0)) + chunk(b'IDAT', data) + chunk(b'IEND', b'')

def whole(scale, dtype):
    def write(f): Image.fromarray((np.random.default_rng(0).random((24, 24))*scale).astype(dtype)).save(f)
    return write

images = dict(of_16_bits=(whole(60000, 'uint16'), 'x.png', 'mode I;16'), of_32_bits=(whole(60000, 'int32'), 'x.tif', 'mode I,'), of_fractions=(whole(1, 'float32'), 'x.tif', 'mode F'),
              a_bomb=(lambda f: f.write_bytes(png(60000)), 'x.png', 'exceeds limit'), no_data=(lambda f: f.write_bytes(png(24)), 'x.png', ''),
              bad_length=(lambda f: f.write_bytes(png(24)[:33] + b'\0\0\0\xffIDAT'), 'x.png', ''), broken=(lambda f: f.write_bytes(png(24, zlib.compress(b'\1'*999))[:45] + b'\0'*40), 'x.png', ''), empty=(Path.touch, 'x.jpg', ''))

@pytest.mark.parametrize('kind', images)
def test_an_image_that_is_not_as_it_should_be(kind, tmp_path, capsys):
    write,name,why = images[kind]
    f = write_images(tmp_path/'data', ('train', 'valid'))/'train/0'/name
    write(f)
    said = refused(capsys, data=str(tmp_path/'data'), bs=8, size=16, out=tmp_path/'out')
    assert f'ranger-compare: cannot read {f}: ' in said and why in said and not (tmp_path/'out').exists()

def test_one_class(tmp_path, capsys):
    path = write_images(tmp_path/'data', ('train', 'valid'), n=20)
    for part in ('train', 'valid'):
        for i in range(1, 10): shutil.rmtree(path/part/f'{i}')
    assert f"{path/'train'} must have at least two classes, it has 0 alone" in refused(capsys, data=str(path), bs=2, size=16)

def test_a_table(tmp_path):
    "A `Learner` of tables, with its embeddings and batch norm"
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    from sklearn.datasets import load_breast_cancer
    df = load_breast_cancer(as_frame=True).frame.assign(size=lambda d: pd.cut(d['mean radius'], 4).astype(str))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['size'], cont_names=list(df.columns[:-2]), y_names='target', y_block=CategoryBlock(), bs=64, seed=1)
    def learner(opt_func): return tabular_learner(dls, layers=[50, 20], opt_func=opt_func, metrics=accuracy)
    res = compare(learner, [ranger_muon, Adam], epochs=4, seeds=2, out=tmp_path)
    end = res.df[res.df.epoch==4]
    assert len(end)==4 and (end.accuracy > .85).all()
    learn = learner(ranger_muon)
    learn.create_opt()
    got = {n for n,p in learn.model.named_parameters() if learn.opt.state[p].get('do_muon', p.ndim > 1)}
    assert got=={'layers.0.0.weight', 'layers.1.0.weight'} # neither the embedding nor the last layer

def the_best_of_those_tried(out):
    "`results.csv`, with the rates that did best in `tune.csv`"
    tune,runs = (pd.read_csv(out/o) for o in ('tune.csv', 'results.csv'))
    assert runs.groupby(['optimizer', 'sched']).lr.first().to_dict() == best_rates(tune).lr.to_dict()
    assert tune.groupby(['optimizer', 'sched']).lr.nunique().eq(2).all() and 'Chosen on held-out training data' in (out/'report.md').read_text()
    return runs

def test_a_search_for_a_task_of_your_own(tmp_path):
    "The rates are tried with `held_out`, and the best is used with the task itself"
    images,made = data.digits().take(256),[]
    def task(kind, images):
        def digits(opt_func):
            made.append(kind)
            return Learner(images.dls(), cnn(c_in=1), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func)
        return digits
    kwargs = dict(data=task('task', images), opts='ranger,sgd', epochs=1, seeds=2, lr_grid=2, held_out=task('held out', images.split()), out=tmp_path)
    compare(**kwargs, sched='flat_cos,one_cycle')
    assert len(the_best_of_those_tried(tmp_path)) == 8 and made == 8*['held out'] + 8*['task']
    again = compare(**kwargs, sched='flat_cos,one_cycle')
    assert str(remake_report(tmp_path)) == str(again) and len(made) == 16

def test_a_search_that_cannot_be_made(tmp_path):
    def task(opt_func): raise AssertionError('nothing is made')
    for kwargs,said in [(dict(lr_grid=2), 'held_out must be a function that validates on held-out training data where lr_grid chooses by it, got None'),
                        (dict(lr_grid=2, held_out='digits'), 'held_out must be a function that validates on held-out training data where lr_grid chooses by it, got digits'),
                        (dict(held_out=task), 'held_out goes with lr_grid, got it without'),
                        (dict(lr_grid=2, held_out=task, n_tune=100), 'n_tune is for images, got 100 and a function'),
                        (dict(data='digits', lr_grid=2, held_out=task), 'held_out is for a function that makes its own `Learner`')]:
        with pytest.raises(ValueError, match=re.escape(said)): compare(**{'data': task, 'out': tmp_path/'out', **kwargs})
    assert not (tmp_path/'out').exists()

def experiment(page):
    "What the folded cells of an experiment's page define"
    names = {'__name__': page}
    file = Path(__file__).parents[1]/'nbs/experiments'/f'{page}.ipynb'
    for cell in json.loads(file.read_text())['cells']:
        code = ''.join(cell['source'])
        if code.startswith('#| code-fold: true'): exec(code, names)
    return SimpleNamespace(**names)

def test_the_census_table(tmp_path):
    "No row of the test set takes part in the search"
    table = experiment('table')
    rng,file = np.random.default_rng(0),tmp_path/'adult.csv'
    words = {o: rng.choice(['a', 'b'], 320) for o in ('workclass', 'education', 'marital_status', 'occupation', 'relationship', 'race')}
    df = pd.DataFrame({**words, 'age': rng.normal(size=320), 'fnlwgt': rng.normal(size=320), 'education_num': rng.normal(size=320)})
    df.assign(salary=np.where(df.age > 0, '>50K', '<=50K')).to_csv(file, index=False)
    table.compare_on_adult(file, 'ranger_muon,sgd', lr_grid=2, seeds=1, epochs=1, out=tmp_path/'out')
    assert set(the_best_of_those_tried(tmp_path/'out').sched) == {'flat_cos', 'one_cycle'}
    dls = {o: table.adult_learner(file, o)(ranger_muon).dls for o in (False, True)}
    (train,test),(part,picks) = [[set(o.items.index) for o in dls[k].loaders] for k in (False, True)]
    assert len(test)==64 and train|test==set(df.index) and not train&test and part|picks==train and not part&picks

def test_a_text(tmp_path):
    "Both nets, on a text whose last tenth takes no part in the search"
    text = experiment('text')
    file = tmp_path/'input.txt'
    file.write_text(' '.join(map(str, range(400))) + '\n\n' + '#'*150)
    for model in ('transformer', 'awd_lstm'):
        text.compare_on_text(file, model, 'ranger_muon,adam', lr_grid=2, seeds=1, out=tmp_path/model)
        assert len(the_best_of_those_tried(tmp_path/model)) == 2
    whole,part = (text.text_dls(file, o, bs=1, seq_len=8) for o in (False, True))
    def shown(dl): return ''.join(whole.vocab[i] for x,_ in dl for i in x[0])
    assert part.vocab==whole.vocab and shown(whole.valid).count('#') > 100 and '#' not in shown(part.train)+shown(part.valid)
    x,y = whole.train.one_batch()
    assert torch.equal(x[:,1:], y[:,:-1])

def test_the_transformer_does_not_look_ahead():
    "A character changes no logit before its own, and the layers begin different"
    net,x = experiment('text').CharTransformer(5, 8).eval(),torch.arange(8)[None]%5
    changed = x.clone()
    changed[0,5] = 4
    same = torch.isclose(net(x), net(changed), atol=1e-6).all(-1)[0]
    assert same.tolist() == [True]*5+[False]*3
    first,second = (o.linear1.weight for o in net.body.layers[:2])
    assert not torch.equal(first, second)
