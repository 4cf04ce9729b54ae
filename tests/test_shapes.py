"A parameter, gradient or state that has changed its shape is refused before any weight moves, and never reaches a fused kernel"
import copy, math
from functools import partial

import fastai.optimizer as stock
import pytest
import torch
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from helpers import equal, finish, fork, has_slow, inner, records, same, whole
from torch import nn

infos = {o.name: o for o in records}

def make(name, ps, form):
    info = infos[name]
    return (as_torch(info.opt_func) if form=='as_torch' else info.opt_func)(ps, lr=info.lr)

def state_of(opt, p): return {k: torch.as_tensor(v).clone() for k,v in whole(opt.state.get(p, {})).items()}

def step(opt, ps):
    for p in ps: p.grad = torch.randn_like(p)
    opt.step()

changes = dict(
    smaller=lambda t: torch.randn(4, 3), larger=lambda t: torch.randn(400, 3), as_many=lambda t: torch.randn(3, 6), other_ndim=lambda t: torch.randn(18),
    rows=lambda t: t[:4], columns=lambda t: t[:, :2], view=lambda t: t.view(3, 6), turned=lambda t: t.t()) # the last four have the old address

def refuses_another_shape(name, form, change):
    ps = [nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(5))]
    opt = make(name, ps, form)
    for _ in range(2): step(opt, ps)
    p,q = ps
    has_state = any(isinstance(v, torch.Tensor) for v in opt.state[p].values())
    p.grad = None
    p.data = changes[change](p.data)
    for _ in range(7):
        before,state = [o.detach().clone() for o in ps],[state_of(opt, o) for o in ps]
        if not has_state: return step(opt, ps)
        with pytest.raises(ValueError, match=rf"cannot step parameter 0 of group 0: it has shape .* in place of .*drop the state"): step(opt, ps)
        assert equal(before, ps) and same(state, [state_of(opt, o) for o in ps])
    if has_slow(opt):
        for f in opt.to_slow,opt.to_fast,opt.sync:
            with pytest.raises(ValueError, match='cannot step parameter 0'): f()
        assert equal(before, ps)
    opt.state.pop(p)
    for _ in range(7): step(opt, ps)
    assert all(o.isfinite().all() for o in ps) and not torch.equal(before[0], p)

@pytest.mark.parametrize('form', ('plain', 'as_torch'))
@pytest.mark.parametrize('name', infos)
def test_a_parameter_of_another_shape(name, form):
    "in a process of its own, which must not crash"
    finish(fork(_all_changes, name, form))

def _all_changes(name, form):
    for o in changes: refuses_another_shape(name, form, o)

puts = dict(
    assigned=lambda s, k: s.update({k: torch.zeros(3, 6)}), larger=lambda s, k: s.update({k: torch.zeros(400, 3)}), smaller=lambda s, k: s.update({k: torch.zeros(2)}),
    data=lambda s, k: setattr(s[k], 'data', torch.zeros(2)), resized=lambda s, k: s[k].resize_(400, 3), sparse=lambda s, k: s.update({k: torch.zeros(6, 3).to_sparse()}),
    whole=lambda s, k: s.update({k: torch.zeros(6, 3, dtype=torch.int64)}), a_number=lambda s, k: s.update({k: 1.}), a_string=lambda s, k: s.update({k: 'zeros'}))

def refuses_a_state(name, put):
    for n in (1, 7):
        ps = [nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(5))]
        opt = make(name, ps, 'plain')
        for _ in range(n): step(opt, ps)
        state = opt.state[ps[0]]
        for k in [k for k,v in state.items() if isinstance(v, torch.Tensor)]:
            good = state[k]
            state[k] = good.clone()
            step(opt, ps)
            puts[put](state, k)
            before = [o.detach().clone() for o in ps]
            with pytest.raises(ValueError, match='parameter 0 of group 0'): step(opt, ps)
            assert equal(before, ps)
            state[k] = good
            step(opt, ps)
            assert not equal(before, ps) or name=='ranger_skip' and n==1 # which leaves the weights alone at first

def _all_puts(name):
    for o in puts: refuses_a_state(name, o)

@pytest.mark.parametrize('name', infos)
def test_state_that_somebody_has_put_there(name): finish(fork(_all_puts, name))

def _directly():
    "The steppers, called by hand and in fastai's own `Optimizer`"
    ok,bad = torch.zeros(400, 3),torch.zeros(2)
    values = dict(lr=.1, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., step=9)
    for f in (fused_radam_step, fused_averages):
        for given in (dict(grad_avg=[bad], sqr_avg=[ok]), dict(grad_avg=[ok], sqr_avg=[bad]), dict(grad_avg=[ok.double()], sqr_avg=[ok])):
            with pytest.raises(ValueError, match='must agree'): f([torch.zeros(400, 3)], [torch.ones(400, 3)], **given, **values)
        with pytest.raises(ValueError, match='must agree'): f([torch.zeros(400, 3)], [bad], grad_avg=[ok.clone()], sqr_avg=[ok.clone()], **values)
    p = nn.Parameter(torch.zeros(6, 3))
    opt = stock.Optimizer([p], [fused_radam_step], lr=.1, mom=.9, sqr_mom=.99)
    step(opt, [p])
    p.data = torch.zeros(400, 3)
    p.grad = None
    with pytest.raises(ValueError, match='must agree'): step(opt, [p])

def test_steppers_called_by_hand(): finish(fork(_directly))

@stepper()
def halves(p, grad, **kwargs): return dict(grad=[g[:len(g)//2].clone() for g in grad])

@stepper()
def doubles(p, grad, **kwargs): return dict(grad=[g.double() for g in grad])

@stepper(state=dict(sqr_avg=torch.zeros_like))
def spoils(p, grad, sqr_avg, **kwargs): return dict(sqr_avg=[o[:1].clone() for o in sqr_avg])

@stepper(state=dict(grad_avg=lambda p: p.new_zeros(1)))
def declares_another(p, grad, grad_avg, **kwargs): pass

def _from_a_stepper():
    for f,message in ((halves, 'got `grad` of shape'), (doubles, 'got `grad` of shape'), (spoils, 'got `sqr_avg` of shape')):
        for more in ([], [normalize_grad]):
            p = nn.Parameter(torch.randn(600, 3))
            with pytest.raises(ValueError, match=message): step(MultiTensorOptimizer([p], [*more, f, fused_radam_step], lr=.1, mom=.9, sqr_mom=.99), [p])
    p = nn.Parameter(torch.randn(600, 3))
    with pytest.raises(ValueError, match='its state `grad_avg`'): step(MultiTensorOptimizer([p], [fused_radam_step, declares_another], lr=.1, mom=.9, sqr_mom=.99), [p])
    step(MultiTensorOptimizer([p], [declares_another, fused_radam_step], lr=.1, mom=.9, sqr_mom=.99), [p]) # the last one starts it

def test_what_a_stepper_makes(): finish(fork(_from_a_stepper))

def test_a_gradient_of_another_shape():
    "`.grad.data` and `.grad.resize_` pass by PyTorch's own check"
    for edit in (lambda p: setattr(p.grad, 'data', torch.ones(2)), lambda p: p.grad.resize_(2), lambda p: setattr(p, 'data', torch.ones(2, 3))):
        for n in (0, 2):
            p,q = nn.Parameter(torch.ones(6, 3)),nn.Parameter(torch.ones(5))
            opt = ranger([q, p], lr=.1)
            for _ in range(n): step(opt, [p, q])
            for o in (p, q): o.grad = torch.ones_like(o)
            edit(p)
            before = [o.detach().clone() for o in (p, q)]
            with pytest.raises(ValueError, match='cannot step parameter 1 of group 0'): opt.step()
            assert equal(before, (p, q))

def test_layers_that_grow_and_shrink():
    "A new optimizer, as the message says, or dropped state: training goes on"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    opt = ranger(model.parameters(), lr=.01)
    def train():
        opt.zero_grad()
        model(torch.randn(8, 3)).pow(2).mean().backward()
        opt.step()
    for _ in range(7): train()
    for layer,dim in ((model[0], 0), (model[2], 1)):
        for p in layer.parameters():
            if p.ndim > dim and (p.ndim==2 or dim==0):
                p.data = torch.cat([p.data, torch.zeros_like(p.data)], dim)
                opt.state.pop(p)
    for _ in range(7): train()
    assert opt.state[model[0].weight]['slow'].shape == (8, 3) and opt.state[model[2].bias]['slow_step'] == 14

def _fused_inside():
    "PyTorch's fused kernel inside Lookahead, and the advice of the message"
    p = nn.Parameter(torch.randn(300, 3))
    opt = lookahead(partial(torch.optim.AdamW, fused=True))([p], lr=.1)
    for _ in range(3): step(opt, [p])
    p.grad,p.data = None,torch.randn(30000, 30)
    with pytest.raises(ValueError, match=r'with opt.state.pop\(p\)'): step(opt, [p])
    opt.state.pop(p)
    for _ in range(7): step(opt, [p])
    p.grad,p.data = None,torch.randn(300, 3)
    opt.restart()
    for _ in range(2):
        with pytest.raises(ValueError, match=r'its state in AdamW is of shape \(30000, 30\)'): step(opt, [p])

def test_pytorchs_fused_kernel(): finish(fork(_fused_inside))

@stepper()
def a_tuple(p, grad, **kwargs): return dict(grad=tuple(g[:1].clone() for g in grad))

@stepper(state=dict(grad_avg=torch.zeros_like))
def averages_in_a_tuple(p, grad, grad_avg, **kwargs): return dict(grad_avg=tuple(o[:1].clone() for o in grad_avg))

def _tuples():
    w = torch.zeros(400, 3)
    values = dict(lr=.1, mom=.9, sqr_mom=.99, eps=1e-5, wd=0., step=9)
    for given in (dict(grad_avg=(torch.zeros(1),), sqr_avg=(torch.zeros(1),)), dict(grad_avg=[w.clone()]*2, sqr_avg=[w.clone()])):
        with pytest.raises(ValueError, match='must agree|got 2 tensors as `grad_avg` for 1 parameters'): fused_radam_step([w], [w.clone()], **given, **values)
    with pytest.raises(ValueError, match='must agree'): fused_radam_step([w], (torch.zeros(1),), grad_avg=[w.clone()], sqr_avg=[w.clone()], **values)
    for f in (a_tuple, averages_in_a_tuple):
        p = nn.Parameter(torch.randn(600, 3))
        with pytest.raises(ValueError, match='must agree'): step(MultiTensorOptimizer([p], [f, fused_radam_step], lr=.1, mom=.9, sqr_mom=.99), [p])

def test_tuples(): finish(fork(_tuples))

kinds = dict(mask=lambda p: torch.rand_like(p)>.5, whole=lambda p: torch.zeros_like(p, dtype=torch.int64), count=lambda p: torch.tensor(0), rows=lambda p: p.new_zeros(1),
             history=lambda p: [], number=lambda p: 0, sparse=lambda p: torch.zeros_like(p).to_sparse(), double=lambda p: torch.zeros_like(p, dtype=torch.float64), nothing=None)

@pytest.mark.parametrize('kind,dense', [(k, dense) for k in kinds for dense in (False, True) if (k, dense) != ('rows', True)]) # which must not grow there
def test_state_that_is_a_steppers_own_affair(kind, dense):
    "of any kind, through steps, gradients that come and go and lie otherwise, and a checkpoint"
    @stepper(state=dict(own=kinds[kind]), dense=dense)
    def step_by(p, grad, lr, own=None, **kwargs):
        torch._foreach_add_(p, grad, alpha=-lr)
        if kind=='nothing': return dict(own=[torch.zeros(2) for _ in p])
        if kind=='number': return dict(own=own-.5)
        if kind=='rows': return dict(own=[torch.cat([o, o]) for o in own])
        if kind=='history':
            for o in own: o.append(1.)
    ps = [nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(5))]
    opt = MultiTensorOptimizer(ps, step_by, lr=.1)
    before = [p.detach().clone() for p in ps]
    for i in range(6):
        for j,p in enumerate(ps): p.grad = None if (i+j)%3==0 else torch.ones_like(p) if i%2 or p.ndim < 2 else torch.ones(3, 6).t()
        opt.step()
    for p,b in zip(ps, before): torch.testing.assert_close(p.detach(), b-.4)
    if kind in ('mask', 'whole', 'count', 'double', 'history'):
        again = MultiTensorOptimizer(ps, step_by, lr=.1)
        again.load_state_dict(opt.state_dict())
        for p in ps: torch.testing.assert_close(again.state[p]['own'], opt.state[p]['own'], rtol=0, atol=0)

def test_memory_that_overlaps():
    ps = [nn.Parameter(torch.randn(6, 3)),nn.Parameter(torch.zeros(1, 3).expand(6, 3))]
    opt = ranger(ps, lr=.1)
    before = ps[0].detach().clone()
    with pytest.raises(ValueError, match='cannot step parameter 1 of group 0, shape .*several of its numbers are one place in memory'): step(opt, ps)
    assert torch.equal(ps[0], before)

def test_a_column_becomes_a_row():
    "at the same address, with as many numbers and the same strides"
    for f in (ranger, Adam, ranger_muon, lookahead(torch.optim.SGD)):
        ps = [nn.Parameter(torch.randn(3, 1)),nn.Parameter(torch.randn(5))]
        opt = f(ps, lr=.01)
        for _ in range(3): step(opt, ps)
        ps[0].grad,ps[0].data = None,ps[0].data.t()
        before = [p.detach().clone() for p in ps]
        with pytest.raises(ValueError, match='cannot step parameter 0'): step(opt, ps)
        assert equal(before, ps)

def test_state_in_place_is_followed():
    "`.data` of a state that fits: the step uses what is there"
    def end(put):
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        opt = ranger([p], lr=.1)
        for i in range(9):
            p.grad = torch.arange(4, dtype=torch.float64)
            opt.step()
            if i==3: put(opt.state[p])
        return p.detach()
    assert torch.equal(end(lambda s: setattr(s['grad_avg'], 'data', torch.zeros(4, dtype=torch.float64))), end(lambda s: s['grad_avg'].zero_()))
