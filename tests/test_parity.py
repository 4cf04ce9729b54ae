"The same numbers as fastai's `ranger`, PyTorch's `RAdam` and the plain chain of steppers, in float64"
import itertools
from functools import partial

import fastai.optimizer as stock
import pytest
import torch
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.optimizers.adam import rectify
from hypothesis import given, settings, strategies as st

chain = [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, radam_step]
l2_chain = [l2_reg, *chain[1:]]

def groups(dtype=torch.float64):
    "Two groups of parameters of every kind of shape, always the same"
    torch.manual_seed(0)
    return [[torch.randn(s, dtype=dtype) for s in shapes] for shapes in ([(4, 3), (4,), ()], [(2, 3, 1, 1), (5,), (0, 2), (1,)])]

def train(opt_func, n=200, dtype=torch.float64, size=1.):
    "The weights after `n` updates, in two groups with their own hypers and some parameters that are not decayed"
    gs = groups(dtype)
    opt = opt_func(gs)
    opt.set_hypers(lr=[1e-2, 3e-3], mom=[.95, .9], sqr_mom=[.99, .999], wd=[opt.hypers[0]['wd'], opt.hypers[0]['wd']*2])
    for g in gs: opt.state[g[1]]['do_wd'] = False
    ps = gs[0]+gs[1]
    for _ in range(n):
        for p in ps: p.grad = torch.randn_like(p)*size
        opt.step()
    return torch.cat([p.flatten() for p in ps])

def largest(a, b): return (a-b).abs().max().item()

def composed(cls, wd, decouple_wd, beta):
    cbs = [slow_weights, *(chain if decouple_wd else l2_chain), lookahead_step]
    return partial(cls, cbs=cbs, lr=0., mom=0., sqr_mom=0.99, wd=wd, eps=1e-6, beta=beta)

kinds = pytest.mark.parametrize('wd,decouple_wd,beta', list(itertools.product((0., .01), (True, False), (0., 2.))))

@kinds
def test_ranger_is_stock_float32(wd, decouple_wd, beta):
    kw = dict(lr=0., wd=wd, decouple_wd=decouple_wd, beta=beta)
    assert largest(*(train(partial(f, **kw), dtype=torch.float32) for f in (ranger, stock.ranger))) <= 1e-6

@kinds
def test_plain_chain_and_stock_engine_agree(wd, decouple_wd, beta):
    fused = train(partial(ranger, lr=0., wd=wd, decouple_wd=decouple_wd, beta=beta))
    for cls in MultiTensorOptimizer, stock.Optimizer:
        assert largest(fused, train(composed(cls, wd, decouple_wd, beta))) <= 1e-12

def test_softplus_shows():
    "`beta` 2 is far enough from a straight line for the test above to see it"
    assert largest(*(train(partial(ranger, lr=0., beta=o)) for o in (0., 2.))) > 1e-3

@pytest.mark.parametrize('wd', (0., .1))
def test_lookahead_off_is_torch_radam(wd):
    def run(make):
        torch.manual_seed(1)
        ps = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3, 4), (5,))]
        opt = make(ps)
        for _ in range(200):
            for p in ps: p.grad = torch.randn_like(p)
            opt.step()
        return torch.cat([p.detach().flatten() for p in ps])
    ours = run(lambda ps: ranger(ps, 1e-2, wd=wd, eps=1e-10, k=10**9))
    theirs = run(lambda ps: torch.optim.RAdam(ps, 1e-2, betas=(.95, .99), eps=1e-10, weight_decay=wd, decoupled_weight_decay=True))
    assert largest(ours, theirs) <= 1e-9

def test_k_1_alpha_1_is_the_inner_optimizer():
    "to the bit"
    inner = train(partial(RAdam, lr=0., mom=.95, wd=.01, eps=1e-6))
    assert torch.equal(train(partial(ranger, lr=0., k=1, alpha=1.)), inner)

@pytest.mark.parametrize('k', (1, 3, 6))
def test_alpha_0_returns_to_the_start(k):
    start = torch.cat([p.flatten() for g in groups() for p in g])
    for n in range(1, 13): assert torch.equal(train(partial(ranger, lr=0., k=k, alpha=0.), n=n), start) == (n%k == 0)

@pytest.mark.parametrize('cls', (stock.Optimizer, MultiTensorOptimizer))
@pytest.mark.parametrize('step', (sgd_step, stock.sgd_step))
def test_walk(cls, step):
    p = torch.ones(1, dtype=torch.float64)
    p.grad = torch.ones(1, dtype=torch.float64)
    opt,path = cls([p], [slow_weights, step, lookahead_step], lr=.1, k=3),[]
    for _ in range(6):
        opt.step()
        path.append(p.item())
    assert path == pytest.approx([.9, .8, .85, .75, .65, .70], abs=1e-12)

shapes = st.lists(st.sampled_from([(), (1,), (0,), (7,), (3, 4), (2, 3, 1, 1), (2, 3, 2, 2)]), min_size=1, max_size=6)

@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 5),
       st.sampled_from([0., .1]), st.floats(.7, .999), st.floats(0., .99), st.integers(1, 7), st.floats(0., 1.))
def test_any_parameters(shapes, has_grad, dtype, late, wd, sqr_mom, mom, k, alpha):
    "Any mix of shapes, missing gradients, and parameters that join `late`"
    hypers = dict(lr=1e-2, wd=wd, sqr_mom=sqr_mom, mom=mom, k=k, alpha=alpha, eps=1e-6)
    def run(opt_func):
        torch.manual_seed(4)
        ps = [torch.randn(s, dtype=dtype if i%2 else torch.float64) for i,s in enumerate(shapes)]
        opt = opt_func(ps)
        for n in range(9):
            for p,has in zip(ps, has_grad): p.grad = torch.randn_like(p) if has or n >= late else None
            opt.step()
        return torch.cat([p.double().flatten() for p in ps])
    fused = run(partial(ranger, **hypers))
    plain = run(partial(MultiTensorOptimizer, cbs=[slow_weights, *chain, lookahead_step], beta=0., **hypers))
    one = run(partial(stock.Optimizer, cbs=[slow_weights, *chain, lookahead_step], beta=0., **hypers))
    tol = 1e-5 if dtype is torch.float32 else 1e-10
    assert torch.allclose(fused, plain, atol=tol, rtol=tol) and torch.allclose(fused, one, atol=tol, rtol=tol)

def test_rectify_table():
    "The factor of fastai and PyTorch: off for five updates, then up to 1"
    for sqr_mom in (.9, .95, .98, .99, .999):
        assert [rectify(t, sqr_mom) > 0 for t in range(1, 8)] == [False]*5+[True]*2
        rs = [rectify(t, sqr_mom) for t in range(6, 3000)]
        assert all(a <= b + 1e-12 for a,b in zip(rs, rs[1:])) and rs[-1] <= 1
