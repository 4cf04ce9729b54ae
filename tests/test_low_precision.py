"bfloat16 and float16 weights, with and without compensated summation"
from functools import partial

import optimi
import pytest
import torch
from fastai_ranger.all import *
from fastai_ranger.steppers import *

low = pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))

def start(n=64, seed=0): return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).bfloat16().float()

def go(opt, p, n, first=0):
    "`n` updates toward a target, on gradients that depend on the update alone"
    for i in range(first, first+n):
        g = torch.Generator().manual_seed(i)
        p.grad = (.1*start(p.shape[0])+.3*torch.randn(p.shape, generator=g)).bfloat16().to(p.dtype)
        opt.step()
    return p

def train(opt_func, dtype, n=400):
    p = torch.nn.Parameter(start().to(dtype))
    return go(opt_func([p], lr=1e-3), p, n).detach().float()

def distance(a, b): return (a-b).abs().mean().item()

@low
def test_low_precision_trains_in_its_dtype(dtype):
    "State has the dtype of its weight, and only rounding, of weights, averages and slow weights, tells the result from float32's"
    p = torch.nn.Parameter(start().to(dtype))
    opt = ranger([p], lr=.1)
    go(opt, p, 20)
    assert {v.dtype for v in opt.state[p].values() if isinstance(v, torch.Tensor)} == {dtype}
    q = torch.nn.Parameter(start())
    go(ranger([q], lr=.1), q, 20)
    assert distance(p.float(), q) < .05*distance(q, start())

@low
def test_compensation_finds_what_float32_does(dtype):
    exact = train(ranger, torch.float32)
    rounding = distance(exact.to(dtype).float(), exact)
    assert distance(train(ranger_kahan, dtype), exact) < 1.5*rounding
    assert distance(train(ranger_kahan, dtype), exact) < .1*distance(train(ranger, dtype), exact) or dtype is torch.float16

def test_closer_than_the_peer():
    exact = train(ranger, torch.float32)
    with pytest.warns(DeprecationWarning):
        theirs = train(partial(optimi.Ranger, betas=(.95, .99), eps=1e-6, weight_decay=.01, kahan_sum=True, foreach=True), torch.bfloat16)
    assert distance(train(ranger_kahan, torch.bfloat16), exact) < .5*distance(theirs, exact)

@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_nothing_to_compensate(dtype): assert torch.equal(train(ranger_kahan, dtype, 30), train(ranger, dtype, 30))

def test_the_sum_is_what_counts():
    "Weight and `comp`, slow weight and `slow_comp`, are a number of twice the bits"
    p,q = torch.nn.Parameter(start().bfloat16()),torch.nn.Parameter(start())
    opt,ref = ranger_kahan([p], lr=1e-3),ranger([q], lr=1e-3)
    for i in range(14):
        go(opt, p, 1, i)
        go(ref, q, 1, i)
        s,r = opt.state[p],ref.state[q]
        for a,b,c in ((p, s['comp'], q), (s['slow'], s['slow_comp'], r['slow'])): assert distance(a.float()+b, c) < .1*distance(a.float(), c)+1e-6

def test_weight_decay_is_not_rounded_away():
    def decay(opt_func, dtype, do_wd=True):
        p = torch.nn.Parameter(torch.ones(1, dtype=dtype))
        opt = opt_func([p], lr=1e-3, wd=.1)
        opt.state[p]['do_wd'] = do_wd
        p.grad = torch.zeros_like(p)
        for _ in range(2000): opt.step()
        return p.item()
    assert decay(ranger_kahan, torch.bfloat16) == pytest.approx(decay(ranger, torch.float32), abs=.004)
    assert decay(ranger_kahan, torch.bfloat16, do_wd=False) == decay(ranger, torch.bfloat16) == 1

def test_takes_a_checkpoint_of_ranger():
    "Averages and slow weights go on; what rounding took from the weights is not known"
    p,q = (torch.nn.Parameter(start().bfloat16()) for _ in range(2))
    opt,other = ranger([p], lr=1e-2),ranger_kahan([q], lr=1e-2)
    go(opt, p, 9)
    with torch.no_grad(): q.copy_(p)
    with pytest.warns(UserWarning, match='no `comp`, `slow_comp`: started anew'): other.load_state_dict(opt.state_dict())
    assert other.state[q]['step'] == 9 and all(torch.equal(other.state[q][k], opt.state[p][k]) for k in ('slow', 'grad_avg', 'sqr_avg'))
    go(other, q, 4, 9)
    assert q.isfinite().all()
    sd = other.state_dict()
    sd['state'][0]['comp'] = sd['state'][0]['comp'][:3]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='`comp` of parameter 0 of group 0 has shape'): other.load_state_dict(sd)

def test_follows_the_model_to_another_dtype():
    p = torch.nn.Parameter(start().bfloat16())
    opt = ranger_kahan([p], lr=1e-2)
    for dtype in torch.float16,torch.float32,torch.bfloat16:
        go(opt, p, 7)
        p.data = p.data.to(dtype)
        p.grad = None
    go(opt, p, 7)
    assert opt.state[p]['step'] == 28 and opt.state[p]['comp'].dtype is torch.bfloat16 and p.isfinite().all()

def test_sync_keeps_what_rounding_takes():
    "Half way to the fast weights, both with what they lack; or, from a visit to the slow ones, nowhere"
    def whole(s, p=None): return s['slow'].float()+s['slow_comp'].float() if p is None else p.float()+s['comp'].float()
    for visit in (False, True):
        p = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16())
        opt = ranger_kahan([p], lr=1e-3)
        for i in range(9):
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16()
            opt.step()
        s = opt.state[p]
        want = whole(s) if visit else whole(s).lerp(whole(s, p), .5)
        if visit: opt.to_slow()
        opt.sync()
        assert (whole(s, p).detach()-want.detach()).abs().max() < 2e-5 and torch.equal(whole(s), whole(s, p)), visit
