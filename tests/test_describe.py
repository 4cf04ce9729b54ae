"What an optimizer says of itself, and what it says of names it does not know"
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
import fastai.optimizer as stock
from fastai_ranger.all import *
import fastai_ranger.fixes # `summary`
from fastai_ranger.steppers import *
from fastai_ranger.compare.data import cnn, digits_dls
from fastai_ranger.core.optimizer import named
from torch import nn
from fastai.learner import Learner

def params(): return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]

def step(opt, n):
    for _ in range(n):
        for pg in opt.param_lists:
            for p in pg: p.grad = torch.ones_like(p)
        opt.step()

@pytest.mark.parametrize('opt_func,name', [(ranger, 'ranger'), (RAdam, 'RAdam'), (Adam, 'Adam'), (ranger_gc, 'ranger_gc'), (ranger21, 'ranger21'),
    (ranger_muon, 'ranger_muon'), (muon, 'muon'), (ranger_kahan, 'ranger_kahan'), (lookahead(SGD), 'lookahead(SGD)'), (lookahead(RAdam), 'lookahead(RAdam)'),
    (lookahead(torch.optim.Adam), 'lookahead(Adam)'), (lookahead([sgd_step]), 'lookahead([sgd_step])')])
def test_name_and_place(opt_func, name):
    opt = opt_func(params(), lr=.01)
    assert repr(opt).startswith(f'{name}(lr=0.01, ') and '1 group, 2 tensors' in repr(opt) and 'step ' not in repr(opt)
    step(opt, 8)
    k = opt.hypers[0].get('k')
    assert repr(opt).endswith(f'step 8, {8%k} of {k} in the cycle)' if k else 'step 8)')

def test_groups_frozen_and_set():
    opt = ranger([[o] for o in params()], lr=[.1, .2])
    opt.set_hyper('mom', .8)
    opt.freeze_to(1)
    assert 'lr=[0.1, 0.2], mom=0.8,' in repr(opt) and '2 groups, 2 tensors; 1 frozen)' in repr(opt)

def test_a_look_changes_nothing():
    opt = ranger_muon(params(), lr=.1)
    assert 'Muon for 1 of them, 67% of the numbers' in repr(opt) and not opt.state

@pytest.mark.parametrize('opt_func', (ranger, RAdam, ranger_muon, lookahead(SGD), lookahead(torch.optim.SGD)))
def test_unknown_hypers_are_refused(opt_func):
    opt = opt_func(params(), lr=.1)
    before = repr(opt)
    with pytest.raises(ValueError, match='no hyper `momm`: did you mean `mom`?'): opt.set_hypers(lr=.5, momm=.9)
    with pytest.raises(ValueError, match='no hyper `xyz`: known are'): opt.set_hyper('xyz', .9)
    assert repr(opt) == before

def test_what_to_write():
    with pytest.raises(TypeError, match=r'ranger needs a learning rate: ranger\(params, lr=...\)'): ranger(params())
    with pytest.raises(TypeError, match=r'write `opt_func=lookahead\(Adam\)`'): learner(lookahead).create_opt()

def test_unknown_keywords_are_refused():
    "by the function that was called; one that takes `**kwargs` passes them on"
    with pytest.raises(TypeError, match='^ranger has no parameter `wdd`: did you mean `wd`?'): ranger(params(), lr=.1, wdd=.1)
    with pytest.raises(TypeError, match='^ranger_muon has no parameter `xyz`: known are lr, '): ranger_muon(params(), lr=.1, xyz=.1)
    @named
    def passes_on(params, lr, **kwargs): return MultiTensorOptimizer(params, sgd_step, lr=lr, **kwargs)
    assert passes_on(params(), lr=.1, wdd=.2).hypers[0]['wdd']==.2

def learner(opt_func): return Learner(digits_dls(), cnn(c_in=1), CrossEntropyLossFlat(), opt_func=opt_func)

def test_summary():
    learn = learner(ranger)
    assert 'Optimizer used: <function ranger' in learn.summary()
    learn.create_opt()
    assert 'Optimizer used: ranger(lr=0.001, ' in learn.summary()

def test_fastai_s_ranger_after_ours(recwarn):
    learner(ranger).create_opt()
    assert not [o for o in recwarn if 'fastai_ranger' in str(o.message)]
    with pytest.warns(UserWarning, match="opt_func is fastai's own `ranger`"): learner(stock.ranger).create_opt()

def test_weights_without_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 6), nn.Linear(6, 1))
    assert 'Muon for 1 of them, 65% of the numbers' in repr(ranger_muon(list(model.parameters()), lr=.1))
