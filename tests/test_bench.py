"`ranger-bench`, as a user meets it"
import json, subprocess, sys
from pathlib import Path
from unittest.mock import patch

import matplotlib
matplotlib.use('agg')
import pandas as pd
import pytest
import torch
from fastai_ranger.compare.bench import *
from fastai_ranger.compare.registry import OptInfo, optimizers, register
from PIL import Image

command = Path(sys.executable).parent/'ranger-bench'

def test_command(tmp_path):
    "Prints a table, writes it as JSON and draws it; an optimizer that fails is in it with its reason"
    opts = 'ranger,stock,adamw_fused,optimi_triton'
    res = subprocess.run([command, '--lists', 'small,1M', '--opts', opts, '--rounds', '1', '--schedule', '--out', tmp_path/'a'/'b'], capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    assert res.stdout.count('optimi_triton failed: ') == 2 and res.stdout.count(' x_stock ') == 2
    info = json.loads((tmp_path/'a'/'b'/'bench.json').read_text())
    df = pd.DataFrame(info['rows'])
    assert len(df)==8 and info['schedule'] and info['torch']==torch.__version__.split('+')[0] and info['threads']==torch.get_num_threads()
    assert df.failed.notna().tolist() == [False]*3+[True]+[False]*3+[True]
    rows = df.set_index(['list', 'opt'])
    assert (rows.state.drop('optimi_triton', level=1).round() == [12, 12, 8]*2).all()
    assert rows.extra['1M', 'ranger'] < .01 and rows.extra['1M', 'stock'] >= 4
    assert (rows.cycle.dropna() > 0).all() and (rows.of_limit.dropna() > 0).all() and rows.x_stock['1M', 'stock'] == 1
    assert min(Image.open(tmp_path/'a'/'b'/'bench.png').size) > 300

def test_nothing_to_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench_opts, 'timm', OptInfo('timm', lambda params, lr: 1/0))
    with pytest.raises(SystemExit) as e: ranger_bench(lists='small', opts='timm', out=str(tmp_path))
    assert e.value.code==2 and 'ranger-bench: nothing to time, timm failed: ZeroDivisionError' in capsys.readouterr().err

@pytest.mark.parametrize('opt', list(bench_opts))
def test_every_optimizer_is_known_and_steps(opt):
    if opt=='optimi_triton' and not torch.cuda.is_available(): pytest.skip('Triton needs a GPU')
    ps = tensors('small')[:3]
    o = bench_opts[opt].opt_func(ps, lr=1e-3)
    before = [p.detach().clone() for p in ps]
    for _ in range(7): o.step()
    assert all((p != b).any() for p,b in zip(ps, before))

@pytest.mark.parametrize('name', [*bench_models, 'small', 'big', '1M'])
def test_lists(name):
    ps = tensors(name)
    assert all(p.grad.shape==p.shape for p in ps)
    if name=='resnet50': assert len(ps)==161 and sum(p.numel() for p in ps)==25_557_032

@patch.dict(optimizers)
def test_an_optimizer_of_your_own(tmp_path):
    "By its module, with hypers, or registered after the import; times are compared with fastai's `ranger`"
    register('lion', torch.optim.SGD, moves=5)
    opts = 'lion,stock,ranger:k=3,torch.optim:SGD:momentum=.9'
    rows = bench('1M', opts, rounds=1, out=str(tmp_path)).set_index('opt')
    assert rows.failed.isna().all() and (rows.x_stock == rows.cycle['stock']/rows.cycle).all()
    assert rows.gb_s.isna().to_dict() == {k: 'torch' in k for k in opts.split(',')}
    assert moved('torch.optim:SGD') is None and moved('ranger:k=3') == moved('ranger') == 7+4/6
    assert (tmp_path/'bench.png').exists()
    assert time_epochs('lion,torch.optim:Adam', rounds=1, size=16).failed.isna().all()
    with pytest.raises(ValueError, match='opts has no.such:lion, but no.such cannot be imported'): bench('small', 'no.such:lion', out=str(tmp_path/'out'))

def test_epochs():
    df = time_epochs('ranger,torch_sgd', rounds=1, size=16)
    assert (df.images_s > 0).all() and ((df.step > 0) & (df.step+df.zero_grad+df.set_hyper < 1)).all() and df.x_torch_sgd['torch_sgd']==1
    assert df.failed.isna().all()
