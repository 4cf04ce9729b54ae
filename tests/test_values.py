"One value, every path: a hyper that comes as Python's number, NumPy's or a tensor ends as the same number, or is refused in the same way"
import copy, inspect, math, types
from fractions import Fraction
from functools import partial

import fastai.optimizer as stock
import fastai_ranger.all as everything
import numpy as np
import pytest
import torch
from fastai.callback.schedule import ParamScheduler
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.core.stepper import Stepper
from helpers import inner, records
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

def ps(): return [nn.Parameter(torch.ones(3))]

def step(opt):
    for g in opt.param_groups:
        for p in g['params']: p.grad = torch.ones_like(p)
    opt.step()
    return opt

# Each path: the optimizer after hyper `k` was given as `v`

def in_the_call(k, v): return ranger(ps(), **{'lr': .01, k: v})
def set_hyper(k, v):
    opt = ranger(ps(), lr=.01)
    opt.set_hyper(k, v)
    return opt
def set_hypers(k, v):
    opt = ranger(ps(), lr=.01)
    opt.set_hypers(**{k: v})
    return opt
def a_list(k, v):
    opt = ranger([ps(), ps()], lr=.01)
    opt.set_hyper(k, [v, v])
    return opt
def load(k, v):
    opt = ranger(ps(), lr=.01)
    sd = opt.state_dict()
    sd['hypers'][0][k] = v
    opt.load_state_dict(sd)
    return opt
def schedule(k, v):
    dl = DataLoader([(torch.ones(2), torch.ones(1))]*2, bs=2)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(2, 1), loss_func=nn.MSELoss(), opt_func=ranger)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ParamScheduler({k: lambda pos: v}))
    return learn.opt

def torchs_call(k, v): return step(as_torch(ranger)(ps(), **{'lr': .01, k: v})).inner
def torchs_group(k, v): return step(as_torch(ranger)([{'params': ps(), k: v}], lr=.01)).inner
def torchs_second_group(k, v): return step(as_torch(ranger)([{'params': ps(), k: v}, {'params': ps(), k: v}], lr=.01)).inner
def torchs_edit(k, v):
    opt = as_torch(ranger)(ps(), lr=.01)
    opt.param_groups[0][k] = v
    return step(opt).inner
def torchs_added(k, v):
    opt = as_torch(ranger)(ps(), **{'lr': .01, k: v})
    opt.add_param_group({'params': ps(), k: v})
    return step(opt).inner
def torchs_load(k, v):
    opt = as_torch(ranger)(ps(), lr=.01)
    sd = opt.state_dict()
    sd['param_groups'][0][k] = v
    opt.load_state_dict(sd)
    return step(opt).inner
def torchs_scheduler(k, v):
    opt = as_torch(ranger)(ps(), **{'lr': .01, k: v})
    sched = LambdaLR(opt, lambda epoch: 1. if k != 'lr' else torch.tensor(1., dtype=torch.float64) if epoch%2 else np.float64(1.))
    for _ in range(3):
        step(opt)
        sched.step()
    return step(opt).inner

def by_group(k, v):
    opt = ranger(ps(), lr=.01)
    opt.hypers[0][k] = v
    return step(opt)
def settled(k, v):
    "What a `partial` settles, as a dict beside those of an optimizer"
    f = dict(lr=sgd_step, wd=weight_decay, k=lookahead_step, alpha=lookahead_step)[k]
    opt = MultiTensorOptimizer(ps(), [slow_weights, partial(f, **{k: v}), lookahead_step], lr=.01)
    return types.SimpleNamespace(hypers=[opt.declared.calls[1][1]])

def ahead_of_torchs(k, v):
    opt = lookahead(torch.optim.SGD, **({k: v} if k in ('k', 'alpha') else {}))(ps(), lr=v if k=='lr' and not isinstance(v, torch.Tensor) else .01)
    if k=='wd' or isinstance(v, torch.Tensor): opt.set_hyper(k, v)
    return opt
def ahead_of_fastais(k, v):
    if k in ('k', 'alpha'): return lookahead(stock.Adam, **{k: v})(ps(), lr=.01)
    return lookahead(stock.Adam)(ps(), **{'lr': .01, k: v})
def ahead_later(k, v):
    opt = lookahead(torch.optim.SGD)(ps(), lr=.01)
    opt.set_hypers(**{k: v})
    return opt
def ahead_by_group(k, v):
    opt = lookahead(torch.optim.SGD)(ps(), lr=.01)
    opt.hypers[0][k] = v
    return step(opt)

paths = [in_the_call, by_group, settled, set_hyper, set_hypers, a_list, load, schedule, torchs_call, torchs_group, torchs_second_group, torchs_edit, torchs_added, torchs_load,
         torchs_scheduler, ahead_of_torchs, ahead_of_fastais, ahead_later, ahead_by_group]
each_path = pytest.mark.parametrize('path', paths, ids=lambda f: f.__name__)

forms = dict(float=float, int=round, float64=np.float64, float32=np.float32, int64=lambda x: np.int64(round(x)), array=lambda x: np.array(x), tensor=torch.tensor,
             tensor64=partial(torch.tensor, dtype=torch.float64), whole_tensor=lambda x: torch.tensor(round(x)), bfloat16=partial(torch.tensor, dtype=torch.bfloat16))

@each_path
@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('k,x', [('lr', .05), ('wd', .3), ('k', 3.), ('alpha', .7)])
def test_the_same_number(path, form, k, x):
    v = forms[form](x)
    res = path(k, v)
    for h in res.hypers: assert type(h[k]) in (int, float) and h[k] == float(v)

refused = dict(true=True, numpy_true=np.True_, tensor_true=torch.tensor(True), string='0.1', nan=math.nan, nan_tensor=torch.tensor(math.nan), infinite=math.inf,
               below=-1., below_tensor=torch.tensor(-1.), imaginary=1j, fraction=Fraction(1, 2), bytes=b'1')

@pytest.mark.filterwarnings('ignore')
@each_path
@pytest.mark.parametrize('form', refused)
@pytest.mark.parametrize('k', ('lr', 'wd', 'k', 'alpha'))
def test_the_same_refusal(path, form, k):
    with pytest.raises(ValueError, match=f'`{k}` must be'): path(k, refused[form])

# True or False, and numbers

factories = {k: f for k,f in vars(everything).items() if not k.startswith('_') and callable(f) and not isinstance(f, (Stepper, type)) and 'lr' in inspect.signature(f).parameters
             and 'params' in inspect.signature(f).parameters}
switches = [(k, name) for k,f in factories.items() for name,o in inspect.signature(f).parameters.items() if isinstance(o.default, bool)]

def test_there_are_switches(): assert {('ranger', 'decouple_wd'), ('muon', 'nesterov'), ('ranger_gc', 'conv_only'), ('ranger21', 'amsgrad')} <= set(switches)

@pytest.mark.parametrize('name,option', switches)
def test_a_switch_is_no_number(name, option):
    for v in (0, 1, 0., 'yes', None, np.int64(1), torch.tensor(1)):
        with pytest.raises(ValueError, match=f'`{option}` must be one of True, False, got'): factories[name](ps(), lr=.1, **{option: v})
    for v in (True, False, np.True_, np.False_): factories[name](ps(), lr=.1, **{option: v})

def test_switches_elsewhere():
    with pytest.raises(ValueError, match="`gc` must be one of 'grad', 'update', False, got 0"): ranger_gc(ps(), lr=.1, gc=0)
    with pytest.raises(ValueError, match='`gc` must be one of'): ranger_gc(ps(), lr=.1, gc=True)
    with pytest.raises(ValueError, match='`decouple_wd` must be one of True, False, got 1'): MultiTensorOptimizer(ps(), partial(fused_radam_step, decouple_wd=1), lr=.1, mom=.9, sqr_mom=.99)
    with pytest.raises(ValueError, match='`dampening` must be'): MultiTensorOptimizer(ps(), [partial(average_grad, dampening=.9), momentum_step], lr=.1)

@pytest.mark.parametrize('info', records, ids=lambda o: o.name)
def test_numbers_of_every_optimizer(info):
    "Each hyper of each: a flag is refused, and a tensor becomes a number"
    opt = info.opt_func(ps(), lr=info.lr)
    for k,old in list(opt.hypers[0].items()):
        if type(old) not in (int, float) or k not in opt.names | {'lr', 'wd', 'mom'}: continue
        for v in (True, np.False_, torch.tensor(True)):
            with pytest.raises(ValueError, match=f'`{k}` must be'): opt.set_hyper(k, v)
        opt.set_hyper(k, torch.tensor(old, dtype=torch.float64))
        assert type(opt.hypers[0][k]) in (int, float) and opt.hypers[0][k] == old

# Hypers that are read and set by group

@pytest.mark.parametrize('info', records, ids=lambda o: o.name)
def test_hypers_are_no_copy(info):
    "what fastai's `ReduceLROnPlateau` does"
    made = info.opt_func([ps(), ps()], lr=info.lr)
    made.set_hyper('lr', [.1, .2])
    for h in made.hypers: h['lr'] /= 10
    assert [h['lr'] for h in made.hypers] == [.01, .02]
    if inner(made):
        step(made)
        assert [g['lr'] for g in inner(made).param_groups] == [.01, .02]
    if 'k' in made.hypers[0]:
        made.hypers[1]['k'] = 3
        assert [h['k'] for h in made.hypers] == [made.hypers[0]['k'], 3] == [h['k'] for h in made.hypers]
        made.hypers[0].update(k=2)
        assert made.hypers[0]['k'] == 2

def test_hypers_around_pytorchs():
    "are those of both: what a scheduler writes into the groups is seen at once, what is written into them at the next step"
    for f in (lookahead(torch.optim.SGD), diloco(torch.optim.AdamW)):
        opt = f([ps(), ps()], lr=.1)
        step(opt)
        inner(opt).param_groups[1]['lr'] = .3
        assert [h['lr'] for h in opt.hypers] == [.1, .3]
        opt.hypers[0]['lr'] = .2
        step(opt)
        assert [g['lr'] for g in inner(opt).param_groups] == [.2, .3] == [h['lr'] for h in opt.hypers]
        opt.hypers[0]['lr'] = -1
        before = [p.detach().clone() for pg in opt.param_lists for p in pg]
        with pytest.raises(ValueError, match='`lr` must be'): step(opt)
        assert all(map(torch.equal, before, [p for pg in opt.param_lists for p in pg]))

def test_a_rate_that_pytorchs_optimizer_holds_as_a_tensor():
    rate = torch.tensor(.1)
    opt = lookahead(partial(torch.optim.SGD, foreach=False))(ps(), lr=rate)
    opt.set_hyper('lr', .5)
    step(opt)
    assert inner(opt).param_groups[0]['lr'] is rate and rate.item() == .5
