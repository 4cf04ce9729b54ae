"kill -9 in a training with checkpoints, and the recipe of the page on checkpoints to go on: `KILLS=20 pytest tests/test_killed.py`"
import os, random, signal, time
from zipfile import is_zipfile

import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
import fastai_ranger.fixes # callbacks wait for the first epoch that is not skipped
from fastai_ranger import ranger
from fastai_ranger.compare.data import cnn, digits_dls
from helpers import finish, fork, same

epochs = 8

def checkpoints(path): return {int(f.stem.split('_')[1]): f for f in (path/'models').glob('run_*.pth')}

def train(path):
    "All epochs, after those whose checkpoints are whole"
    set_seed(42, reproducible=True)
    dls = digits_dls()
    dls.train.shuffle = False
    learn = Learner(dls, cnn(c_in=1), loss_func=CrossEntropyLossFlat(), opt_func=ranger, path=path)
    done = max((i for i,f in checkpoints(path).items() if is_zipfile(f)), default=-1)
    if done >= 0: learn.load(f'run_{done}')
    with learn.no_bar(), learn.no_logging():
        learn.fit_flat_cos(epochs, 8e-3, start_epoch=done+1, cbs=SaveModelCallback(every_epoch=1, with_opt=True, fname='run'))

def written(path): return {f: f.stat().st_mtime_ns for f in checkpoints(path).values()}

def same_end(a, b):
    "Weights, buffers, state and hypers, to the bit"
    a,b = [torch.load(o/f'models/run_{epochs-1}.pth', weights_only=False) for o in (a, b)]
    tensors = [[{k: torch.as_tensor(v) for k,v in o.items()} for o in (sd['model'], *sd['opt']['state'])] for sd in (a, b)]
    return same(*tensors) and a['opt']['hypers']==b['opt']['hypers']

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a run that is left alone, and how long it takes"
    path = tmp_path_factory.mktemp('whole')
    finish(fork(len, ())) # the first one waits for the imports
    begun = time.monotonic()
    finish(fork(train, path))
    return path,time.monotonic()-begun

def test_killed_at_random_moments(whole, tmp_path):
    "The end is that of the run that was left alone, to the bit; every other kill is while a checkpoint is written"
    (alone,seconds),rng,n = whole,random.Random(),int(os.environ.get('KILLS', 6))
    kills,cut,runs = 0,0,0
    while True:
        path = tmp_path/f'{runs}'
        while kills < n:
            before = written(path)
            p,moment = fork(train, path),time.monotonic()+rng.random()*seconds*(1-len(before)/epochs)
            if kills%2: # while it writes
                while p.is_alive() and written(path)==before: time.sleep(.0002)
                moment = time.monotonic()+rng.random()*.004
            p.join(max(0, moment-time.monotonic()))
            p.kill()
            p.join()
            if p.exitcode==0: break # it was faster
            assert p.exitcode==-signal.SIGKILL
            kills += 1
            cut += any(not is_zipfile(f) and before.get(f) != t for f,t in written(path).items())
        if kills==n: finish(fork(train, path))
        assert same_end(path, alone)
        runs += 1
        if kills==n: break
    print(f'{n} kills, {cut} of them in mid-write, {runs} runs')

def test_a_cut_file_is_not_taken(whole, tmp_path):
    "Wherever it ends"
    data = (whole[0]/'models/run_0.pth').read_bytes()
    for n in [0, 1, len(data)-1, *random.sample(range(len(data)), 40)]:
        (tmp_path/'cut.pth').write_bytes(data[:n])
        assert not is_zipfile(tmp_path/'cut.pth')
        with pytest.raises(Exception): torch.load(tmp_path/'cut.pth', weights_only=False)
