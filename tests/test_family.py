"Each member of the family against an implementation that is not ours, and each of its switches"
import warnings
from functools import partial
from importlib import import_module

import fastai.optimizer as stock
import pytest
import pytorch_optimizer
import pytorch_ranger
import torch
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai_ranger.all import *
from fastai_ranger.all import ranger
from fastai_ranger.bench import members, stock_members
from fastai_ranger.compare import cnn, digits_dls
from pytorch_optimizer.optimizer import ranger21 as their_ranger21
from pytorch_optimizer.optimizer.utils.gradient import normalize_gradient
from ranger_adabelief import RangerAdaBelief
from torch import nn

shapes = (4, 3, 3, 3), (6, 5), (7,), (), (3, 1), (1, 4)

def params(seed=0, shapes=shapes, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]

def apart(a, b): return max((x.detach()-y.detach()).abs().max().item() for x,y in zip(a, b))

def train(ps, opt, n=50, late=(), seed=1, before=lambda i: None):
    "`n` updates with random gradients; the parameters `late` get none in the first seven"
    torch.manual_seed(seed)
    for i in range(n):
        before(i)
        for j,p in enumerate(ps):
            g = torch.randn_like(p)*10**torch.randn((), dtype=p.dtype)+.1
            p.grad = None if j in late and i < 7 else g
        opt.step()
    return ps

def trained(opt_func, n=50, shapes=shapes, late=(), dtype=torch.float64, **kwargs):
    ps = params(shapes=shapes, dtype=dtype)
    return train(ps, opt_func(ps, **kwargs), n, late)

@pytest.fixture
def in_float64(monkeypatch):
    "Code that casts everything to float32 works in float64"
    monkeypatch.setattr(torch.Tensor, 'float', lambda self: self)
    theirs = import_module('ranger_adabelief.ranger_adabelief')
    in_place = theirs.centralized_gradient
    monkeypatch.setattr(theirs, 'centralized_gradient', lambda g, **kwargs: in_place(g.clone(), **kwargs)) # or it changes the momentum, where that is the update

# A filter of one number is centralized to zero by the peers, and left alone here
filters = shapes[:4]

@pytest.mark.parametrize('gc', ['grad', 'update', False])
@pytest.mark.parametrize('conv_only', [False, True])
def test_gc_is_theirs(gc, conv_only, in_float64):
    "`ranger_adabelief` without AdaBelief is Less Wright's Ranger of 2020; its `eps` stands elsewhere, and decay leaks into its momentum"
    theirs = trained(partial(RangerAdaBelief, lr=.01, eps=1e-300, adabelief=False, use_gc=bool(gc), gc_conv_only=conv_only, gc_loc=gc!='update'), shapes=filters)
    assert apart(trained(partial(ranger_gc, lr=.01, eps=0, gc=gc, conv_only=conv_only), shapes=filters), theirs) < 1e-10

@pytest.mark.parametrize('gc', ['grad', 'update'])
def test_gc_matters(gc):
    assert apart(trained(partial(ranger_gc, lr=.01, gc=gc)), trained(partial(ranger_gc, lr=.01, gc=False))) > 1e-3

@pytest.mark.parametrize('kwargs', [{}, dict(nus=(1., 1.)), dict(nus=(.5, .6)), dict(nus=(1., .3)), dict(nus=(0., 1.)), dict(weight_decay=.1), dict(weight_decay=.1, decouple_weight_decay=True, k=1, alpha=1.), dict(k=3, alpha=.8, betas=(.95, .99), eps=1e-3)])
@pytest.mark.filterwarnings('ignore')
def test_qh_is_theirs(kwargs):
    "Theirs takes its slow weights after the first decay, so that case is without Lookahead"
    names = dict(weight_decay='wd', decouple_weight_decay='decouple_wd')
    ours = {names.get(k, k): v for k,v in kwargs.items() if k not in ('nus', 'betas')}
    if 'nus' in kwargs: ours.update(zip(('nu_1', 'nu_2'), kwargs['nus']))
    if 'betas' in kwargs: ours.update(zip(('mom', 'sqr_mom'), kwargs['betas']))
    theirs = trained(partial(pytorch_ranger.RangerQH, lr=.01, **kwargs))
    assert apart(trained(partial(ranger_qh, lr=.01, **ours)), theirs) < 1e-10

@pytest.mark.parametrize('gc', [True, False])
def test_adabelief_is_theirs(gc, in_float64):
    "With an `eps` of next to nothing: theirs is added only in rectified updates, and before the bias correction"
    theirs = trained(partial(RangerAdaBelief, lr=.01, betas=(.9, .999), eps=1e-300, use_gc=gc), shapes=filters)
    assert apart(trained(partial(ranger_adabelief, lr=.01, eps=0, gc=gc), shapes=filters), theirs) < 1e-10

@pytest.mark.parametrize('eps', [1e-12, 1e-3])
@pytest.mark.parametrize('wd', [0., .1])
def test_adabelief_is_the_papers(eps, wd):
    "Without rectification and Lookahead: another peer has `eps` where the paper has it"
    theirs = trained(partial(pytorch_optimizer.AdaBelief, lr=.01, eps=eps, weight_decay=wd))
    assert apart(trained(partial(ranger_adabelief, lr=.01, eps=eps, wd=wd, gc=False, rectified=False, k=1, alpha=1)), theirs) < 1e-10

def test_va_is_fastais_sadam():
    "fastai takes what is above 20/beta for its own softplus: 4e-11"
    theirs = trained(partial(stock.ranger, lr=.01, beta=50))
    assert apart(trained(partial(ranger_va, lr=.01, amsgrad=False, rectified=True, **fastai_hypers)), theirs) < 1e-10

@pytest.mark.parametrize('foreach', [False, True])
@pytest.mark.parametrize('softplus', [True, False])
@pytest.mark.parametrize('gc', [True, False])
@pytest.mark.parametrize('norm_grad', [True, False])
def test_ranger21_is_theirs(foreach, softplus, gc, norm_grad, monkeypatch):
    "Without decay: theirs counts one too many in the sum of squares. And normalized once: theirs does so twice, which is not quite the same"
    once = lambda g: g if g.numel() > 2 and abs(g.std()-1) < .1 else normalize_gradient(g)
    monkeypatch.setattr(their_ranger21, 'normalize_gradient', once)
    theirs = trained(partial(pytorch_optimizer.Ranger21, num_iterations=50, lr=.01, disable_lr_scheduler=True, weight_decay=0., use_softplus=softplus,
                             centralize_gradients=gc, normalize_gradients=norm_grad, foreach=foreach), shapes=filters)
    ours = trained(partial(ranger21, lr=.01, pnm=.9, wd=0., beta=50. if softplus else 0., gc=gc, norm_grad=norm_grad), shapes=filters)
    assert apart(ours, theirs) < 1e-10

twins = {o: o.replace('ranger', 'stock') for o in members}

def groups(ps): return [ps[:3], ps[3:]]

@pytest.mark.parametrize('name', members)
@pytest.mark.parametrize('wd', [0., .1])
def test_stock_steppers_give_the_same(name, wd):
    "Each formula once more, for one tensor at a time, among fastai's own steppers: two groups, one weight that is not decayed, one that gets no gradient at first"
    def run(opt_func):
        ps = params()
        opt = opt_func(groups(ps), lr=.01, wd=wd)
        opt.set_hyper('lr', [.01, .002])
        opt.state[ps[1]]['do_wd'] = False
        def before(i): opt.set_hyper('mom', .95 - .002*i)
        return train(ps, opt, before=before)
    ours,theirs = run(members[name]),run(stock_members[twins[name]])
    assert apart(ours, theirs) < 1e-10 and apart(ours, params()) > .01
