"`ranger-compare`, as a user meets it"
import signal, subprocess, sys, time
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import pandas as pd
import pytest
import torch
from fastai_ranger.compare import compare, models, ranger_compare
from PIL import Image
from sklearn.datasets import load_digits

command = Path(sys.executable).parent/'ranger-compare'
command_func = ranger_compare.__wrapped__ # older versions of `call_parse` read pytest's own arguments

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
    (dict(data='digits', opts='ranger,rangr'), 'opts must be one of ranger, stock, radam, adam, sgd, ranger_gc, ranger_gc_update, ranger_va, ranger_qh, ranger_adabelief, ranger_lars, ranger21, got rangr'),
    (dict(data='digits', opts='ranger,ranger'), 'opts has an optimizer more than once'),
    (dict(data='digits', epochs=0), 'epochs must be at least 1, got 0'),
    (dict(data='digits', seeds=0), 'seeds must be at least 1, got 0'),
    (dict(data='digits', bs=0), 'bs must be at least 1, got 0'),
    (dict(data='digits', bs=5000), 'bs must be at most the number of training images, 1437, got 5000'),
    (dict(data='digits', size=-8), 'size must be at least 1, got -8'),
    (dict(data='digits', sched='cos'), 'sched must be one of flat_cos, one_cycle, ranger21, got cos'),
    (dict(data='digits', model='resnet'), 'model must be one of cnn, xresnet18'),
    (dict(data='digits', lr='fast'), 'lr must be a number or `name=number,...`, got fast'),
    (dict(data='digits', lr='0'), 'lr of ranger must be above 0, got 0.0'),
    (dict(data='digits', opts='adam', lr='ranger=.1'), 'lr is given for ranger, which is not compared'),
    (dict(data='no/such'), 'no such folder: no/such'),
]

@pytest.mark.parametrize('kwargs,message', wrong)
def test_wrong_arguments(kwargs, message, tmp_path, capsys):
    "One line, exit status 2; `ValueError` for those who call the function"
    kwargs = dict(out=str(tmp_path/'out'), **kwargs)
    with pytest.raises(SystemExit) as e: command_func(**kwargs)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f'ranger-compare: {message}') and err.count('\n') == 1
    with pytest.raises(ValueError): compare(**kwargs)
    assert not (tmp_path/'out').exists()

def test_folder_without_splits(tmp_path, capsys):
    for splits in ((), ('train',), ('valid', 'test')):
        write_images(tmp_path/'_'.join(('x', *splits)), splits, n=1)
        (tmp_path/'_'.join(('x', *splits))).mkdir(exist_ok=True)
        with pytest.raises(SystemExit): command_func(str(tmp_path/'_'.join(('x', *splits))))
        assert 'must have a folder train/ and one of valid/, val/ and test/' in capsys.readouterr().err

def test_folder_without_images(tmp_path, capsys):
    for o in ('train', 'val'): (tmp_path/o).mkdir()
    with pytest.raises(SystemExit): command_func(str(tmp_path))
    assert 'no images in' in capsys.readouterr().err

def test_folders_that_cannot_be_trained_on(tmp_path, capsys):
    path = write_images(tmp_path/'data', ('train', 'valid'))
    for extra,message in (('valid/unheard/1.png', 'has classes that'), ('train/1.png', 'is not in a folder of'), ('train/0/deep/1.png', 'is not in a folder of')):
        (path/extra).parent.mkdir(exist_ok=True)
        Image.new('L', (8, 8)).save(path/extra)
        with pytest.raises(SystemExit): command_func(str(path), bs=8)
        assert message in capsys.readouterr().err
        (path/extra).unlink()

def test_every_model_can_be_made():
    with torch.device('meta'):
        for model in models.values(): assert list(model(n_out=2, c_in=1).parameters())[-1].shape == (2,)

def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path/'out').touch()
    with pytest.raises(SystemExit): command_func('digits', out=str(tmp_path/'out'))
    assert 'cannot make the folder' in capsys.readouterr().err

@pytest.mark.parametrize('valid', ['valid', 'val', 'test'])
def test_a_folder_of_images(valid, tmp_path):
    path = write_images(tmp_path/'data', ('train', valid))
    df = compare(str(path), opts='ranger,sgd', epochs=1, seeds=2, bs=8, size=16, model='cnn', lr='ranger=.01', sched='one_cycle', out=str(tmp_path/'out'))
    assert df.groupby(['optimizer', 'seed']).size().to_dict() == {(o, s): 1 for o in ('ranger', 'sgd') for s in (0, 1)}
    assert dict(zip(df.optimizer, df.lr)) == dict(ranger=.01, sgd=.1)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'out/results.csv'), df)
    assert Image.open(tmp_path/'out/curves.png').size[0] > 1000

def test_a_seed_is_the_same_start_for_all(tmp_path):
    "With rates too small to move anything, the curves are one"
    df = compare('digits', epochs=1, seeds=2, lr='1e-12', out=str(tmp_path))
    losses = df.groupby('seed').train_loss
    assert (losses.max()-losses.min()).max() < 1e-4 and losses.mean().nunique() == 2


def test_exit_status():
    res = subprocess.run([command, 'digits', '--opts', 'nope'], capture_output=True, text=True)
    assert res.returncode == 2 and 'ranger-compare: opts must be one of' in res.stderr and 'Traceback' not in res.stderr

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
    assert 'seconds_per_epoch' in out and f"Wrote {tmp_path/'results.csv'}" in out
    assert (tmp_path/'curves.png').exists()
