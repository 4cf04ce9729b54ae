"What `MultiTensorOptimizer` guarantees, whatever the steppers"
import copy, pickle, warnings
from functools import partial

import fastai.optimizer as stock
import numpy as np
import pytest
import torch
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.interop import TorchOptimizer

def param(*vals, grad=None, dtype=torch.float64):
    p = torch.nn.Parameter(torch.tensor(vals, dtype=dtype))
    p.grad = torch.ones_like(p) if grad is None else torch.tensor(grad, dtype=dtype)
    return p

calls = []
@stepper(state=dict(step=0))
def spy(p, grad, lr, step, do_wd=True, **kwargs):
    "Notes with how many tensors it was called"
    calls.append((len(p), lr, step, do_wd))
    return {'step': step+1}

@pytest.fixture(autouse=True)
def no_calls(): calls.clear()

def test_one_call_for_parameters_that_are_alike():
    opt = MultiTensorOptimizer([[param(1.), param(1., 2.)], [param(3.)]], spy, lr=.1)
    for _ in range(2): opt.step()
    assert calls == [(3, .1, 0, True), (3, .1, 1, True)]

def test_buckets_by_hypers_step_do_wd_and_dtype():
    a,b,c,d,e = param(1.), param(1.), param(1.), param(1.), param(1., dtype=torch.float32)
    opt = MultiTensorOptimizer([[a, b, e], [c, d]], spy, lr=.1)
    opt.state[b]['do_wd'] = False
    opt.state[d]['step'] = 7
    opt.set_hyper('lr', [.1, .2])
    opt.step()
    assert sorted(calls) == sorted([(1, .1, 0, True), (1, .1, 0, False), (1, .1, 0, True), (1, .2, 0, True), (1, .2, 7, True)])
    assert [opt.state[o]['step'] for o in (a, b, c, d, e)] == [1, 1, 1, 8, 1]

def test_changes_between_steps_are_seen():
    a,b = param(1.), param(1.)
    opt = MultiTensorOptimizer([[a], [b]], spy, lr=.1)
    def now():
        calls.clear()
        opt.step()
        return [o[0] for o in calls]
    assert now() == [2]
    b.grad = None
    assert now() == [1]
    b.grad = torch.ones_like(b)
    assert now() == [1, 1] # `b` is an update behind
    opt.clear_state()
    assert now() == [2]
    opt.set_hyper('lr', [.1, .2])
    assert now() == [1, 1]
    opt.set_hyper('lr', .1)
    opt.state[a] = {'step': 5}
    assert now() == [1, 1]

def test_plain_functions_and_partials_run_too():
    "Stock steppers, a user's own, and partials of ours, before and after ours"
    def halve(p, **kwargs): p.data.mul_(.5)
    def odd(p, count=0, **kwargs): return {'count': count+1, 'flag': p.numel()%2}
    ps = [param(1., 2.), param(3.)]
    opt = MultiTensorOptimizer(ps, [odd, stock.step_stat, partial(average_grad, dampening=True), spy, halve, stock.momentum_step], lr=.1)
    assert opt.hypers[0]['mom'] == .9 # a partial keeps the defaults of its function
    opt.step()
    assert sorted(o[0] for o in calls) == [1, 1] # `flag` differs
    assert ps[0].tolist() == pytest.approx([.5-.01, 1-.01]) and ps[1].tolist() == pytest.approx([1.5-.01])
    assert opt.state[ps[0]]['count'] == 1 and opt.state[ps[1]]['flag'] == 1

def test_a_partial_settles_a_hyper():
    def run(cls, stepper):
        p = param(1., 2.)
        opt = cls([p], [stepper, stock.momentum_step], lr=.1)
        for _ in range(3): opt.step()
        return p.tolist(), opt.hypers[0].get('mom')
    settled = run(stock.Optimizer, partial(stock.average_grad, mom=.5))
    for f in (stock.average_grad, average_grad): assert run(MultiTensorOptimizer, partial(f, mom=.5)) == settled
    p = param(1.)
    opt = MultiTensorOptimizer([p], [slow_weights, sgd_step, partial(lookahead_step, k=2)], lr=.1)
    for _ in range(2): opt.step()
    assert p.item() == pytest.approx(.9)

class Logged:
    "A callable of the user's, with an attribute that is called `func`"
    def __init__(self, func): self.func,self.n = func,0
    def __call__(self, p, **kwargs):
        self.n += 1
        return self.func(p, **kwargs)

def test_wrapped_steppers_get_one_tensor():
    def wrapped(p, **kwargs):
        p.data.add_(1.)
        return sgd_step(p, **kwargs)
    logged,ps = Logged(sgd_step),[param(1.), param(2., 3.)]
    opt = MultiTensorOptimizer(ps, [logged, wrapped], lr=.5)
    opt.step()
    assert logged.n == 2 and ps[1].tolist() == pytest.approx([2., 3.])

@stepper(state=dict(avg=torch.zeros_like))
def replaces(p, grad, avg, **kwargs):
    "Puts new tensors into the list it was given"
    for i,g in enumerate(grad): avg[i] = avg[i]*.5 + g
    return {'avg': avg}

@stepper()
def returns_tuple(p, grad, avg=None, **kwargs):
    "State that is not declared is kept too"
    return {'avg': tuple(torch._foreach_add(grad if avg is None else avg, 1.))}

@pytest.mark.parametrize('cls', (stock.Optimizer, MultiTensorOptimizer))
@pytest.mark.parametrize('cb,expected', [(replaces, [1.75, 3.5]), (returns_tuple, [4., 5.])])
def test_new_state_is_kept(cls, cb, expected):
    ps = [param(1., 2., grad=[1., 2.]), param(3.)]
    opt = cls(ps, cb, lr=.1)
    for _ in range(3): opt.step()
    assert opt.state[ps[0]]['avg'].tolist() == expected

def test_state_that_differs_in_kind():
    "fastai's `Larc` keeps a number for some parameters and a tensor for others"
    ours,theirs = ([param(1., 2.), param(1e-6), param(30., 2.)] for _ in range(2))
    a = MultiTensorOptimizer(ours, [average_grad, partial(stock.larc_layer_lr, clip=True), stock.larc_step, spy], lr=.1, trust_coeff=.02, wd=0., eps=1e-8)
    b = stock.Larc(theirs, lr=.1)
    for _ in range(5): a.step(); b.step()
    for o,t in zip(ours, theirs): assert torch.allclose(o, t, atol=1e-14)

@pytest.mark.parametrize('f,declared,message', [
    (lambda p, lr, **kwargs: None, {}, 'is one of p, lr, kwargs'),
    (lambda p, grad, lr: None, {}, r'and `\*\*kwargs`'),
    (lambda p, grad, **kwargs: None, dict(state=dict(origin=torch.clone), anchored='orign'), '`anchored` must be names in `state`, .* has orign'),
    (lambda p, grad, **kwargs: None, dict(scope='al'), "`scope` must be one of 'alike', 'all', 'each'"),
    (lambda p, grad, **kwargs: None, dict(scope='all', dense=True), "`dense` is for the scope 'alike'")])
def test_a_stepper_that_cannot_be_called_is_refused(f, declared, message):
    with pytest.raises((TypeError, ValueError), match=message): stepper(**declared)(f)

def test_what_a_stepper_needs_must_be_there():
    for cbs,name in (([sgd_step, momentum_step], '`grad_avg`'), (fused_averages, '`sqr_mom`')):
        with pytest.raises(ValueError, match=f'needs .*{name}'): MultiTensorOptimizer([param(1.)], cbs, lr=.1, mom=.9)
    MultiTensorOptimizer([param(1.)], [stock.average_grad, momentum_step], lr=.1, mom=.9).step() # whose state is not declared

def test_anchored_may_be_one_name():
    @stepper(state=dict(origin=torch.clone), anchored='origin')
    def keep(p, grad, origin, **kwargs): torch._foreach_copy_(p, origin)
    p = param(1.)
    opt = MultiTensorOptimizer([p], keep, lr=.1)
    opt.step()
    p.data.fill_(7.)
    opt.restart()
    opt.step()
    assert p.item() == 7

@pytest.mark.parametrize('scope', ['alike', 'all'])
def test_what_a_stepper_returns(scope):
    "A list for each, anything else for all, `None` to drop it"
    @stepper(state=dict(n=0), scope=scope)
    def count(p, grad, n, **kwargs):
        n = n[0] if scope=='all' else n
        return dict(n=n+1, shared=n, own=[o.detach()*n for o in p], at_times=None if n==1 else p[0].detach().clone())
    ps = param(2.),param(3.)
    opt = MultiTensorOptimizer(ps, count, lr=.1)
    for i in range(3):
        opt.step()
        assert [(s['n'], s['shared'], s['own'].item(), 'at_times' in s) for s in map(opt.state.get, ps)] == [(i+1, i, 2.*i, i != 1), (i+1, i, 3.*i, i != 1)]

def test_a_number_that_becomes_a_tensor_of_another_dtype():
    @stepper(state=dict(scale=0.))
    def rise(p, grad, scale, **kwargs): return dict(scale=[torch.ones((), dtype=torch.float32) for _ in p])
    opt = MultiTensorOptimizer([param(1.)], rise, lr=.1)
    for _ in range(2): opt.step()

def test_dense_is_without_holes():
    seen = []
    @stepper(dense=True)
    def look(p, grad, **kwargs): seen.extend(o.stride() for o in p+grad)
    p = torch.nn.Parameter(torch.zeros(4, 4)[:, ::2])
    p.grad = torch.zeros(4, 4)[:, ::2]
    MultiTensorOptimizer([p], look, lr=.1).step()
    assert seen == [(2, 1)]*2

def test_dense_leaves_state_of_another_shape_alone():
    @stepper(state=dict(rows=lambda p: p.new_zeros(len(p), 1)), dense=True)
    def count(p, grad, rows, **kwargs): torch._foreach_add_(rows, 1.)
    p = torch.nn.Parameter(torch.zeros(2, 3).t())
    p.grad = torch.zeros(3, 2)
    opt = MultiTensorOptimizer([p], count, lr=.1)
    for _ in range(2): opt.step()
    assert opt.state[p]['rows'].tolist() == [[2]]*3

def test_gradients_are_values():
    "What a stepper returns as `grad`, the next ones get, whatever their kind; nobody writes to `p.grad`"
    seen = []
    @stepper()
    def double(p, grad, **kwargs): return dict(grad=torch._foreach_mul(grad, 2.))
    @stepper(scope='all')
    def add_one(p, grad, **kwargs): return dict(grad=torch._foreach_add(grad, 1.))
    def look(p, **kwargs): seen.append(p.grad.tolist())
    def replace(p, **kwargs): p.grad = p.grad*10
    ps = [param(0., 0., grad=[1., 2.]), param(0., grad=[3.])]
    kept = [p.grad for p in ps]
    MultiTensorOptimizer(ps, [double, look, double, add_one, replace, double, sgd_step], lr=1.).step()
    assert seen == [[2, 4], [6]] and [p.tolist() for p in ps] == [[-100, -180], [-260]]
    assert all(p.grad is g for p,g in zip(ps, kept)) and [g.tolist() for g in kept] == [[1, 2], [3]]

@pytest.mark.parametrize('cls', (stock.Optimizer, MultiTensorOptimizer))
def test_declared_state(cls):
    "starts before the first update, in whichever optimizer"
    @stepper(state=dict(first=torch.clone, n=3, at_times=None))
    def count(p, grad, first, n, at_times=None, **kwargs):
        torch._foreach_sub_(p, 1.)
        return dict(n=n+1)
    p = param(1., 2.)
    opt = cls([p], count, lr=.1)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[p]['first'].tolist() == [1, 2] and opt.state[p]['n'] == 5 and 'at_times' not in opt.state[p] and p.tolist() == [-1, 0]

def test_sync_right_after_another_dtype():
    model = torch.nn.Linear(2, 2)
    opt = ranger(model.parameters(), lr=.1)
    for _ in range(3):
        for p in model.parameters(): p.grad = torch.ones_like(p)
        opt.step()
    opt.zero_grad()
    model.double()
    opt.sync()
    assert all(torch.equal(p, opt.state[p]['slow']) for p in model.parameters())

def test_steppers_pickle():
    for f in (radam_step, fused_radam_step, slow_weights, lookahead_step, weight_decay, partial(ranger, k=5)):
        g = pickle.loads(pickle.dumps(f))
        assert g is f or g.func is f.func

bad = [('k', 0), ('k', 2.5), ('k', float('inf')), ('k', None), ('alpha', -.1), ('alpha', 1.1), ('alpha', float('nan')), ('eps', -1e-9), ('mom', 1.), ('mom', -.1),
       ('sqr_mom', 1), ('sqr_mom', -.5), ('lr', -1e-3), ('lr', float('nan')), ('lr', float('inf')), ('lr', '1e-3'), ('wd', -.01), ('beta', -1.)]

@pytest.mark.parametrize('name,value', bad)
def test_bad_hypers(name, value):
    with pytest.raises(ValueError, match=rf'`{name}` must be a (whole )?number in \[.*, got {value!r}'): ranger([param(1.)], **{'lr': .1, name: value})
    opt = ranger([[param(1.)], [param(2.)]], lr=.1)
    before = copy.deepcopy(opt.hypers)
    with pytest.raises(ValueError, match=f'`{name}` must be'): opt.set_hyper(name, [before[0][name], value]) # the second is bad: the first is not set either
    assert opt.hypers == before

good = [('k', 1), ('k', 6.), ('k', np.int64(5)), ('alpha', 0), ('alpha', 1), ('eps', 0), ('mom', 0), ('lr', 0), ('lr', np.float64(.1)), ('lr', torch.tensor(.1)), ('wd', 0), ('lr', 1e9)]

@pytest.mark.parametrize('name,value', good)
def test_good_hypers(name, value):
    opt = ranger([param(1., 2.)], **{'lr': .1, name: value})
    opt.set_hyper(name, value)
    for _ in range(7): opt.step()

def test_lr_slices():
    opt = ranger([[param(1.)], [param(1.)], [param(1.)]], lr=slice(1e-4, 1e-2))
    assert list(opt.hypers.itemgot('lr')) == pytest.approx([1e-4, 1e-3, 1e-2])

def test_never_rectified_warns():
    for sqr_mom in (0., .5, 2/3):
        with pytest.warns(UserWarning, match='rectifies only above 2/3'): opt = ranger([param(1.)], lr=.1, sqr_mom=sqr_mom)
        for _ in range(7): opt.step()
    opt = ranger([param(1.)], lr=.1)
    with pytest.warns(UserWarning): opt.set_hyper('sqr_mom', .3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ranger([param(1.)], lr=.1, sqr_mom=.7)

@pytest.mark.parametrize('params,match', [([], 'empty'), ([[], []], 'empty'), ([{'params': []}], 'dict'), ([1.], 'float'), ([torch.ones(1), [torch.ones(1)]], 'list')])
def test_bad_params(params, match):
    with pytest.raises(ValueError, match=f'`params`.*{match}'): ranger(params, lr=.1)

def test_a_parameter_given_twice():
    p = param(1.)
    with pytest.raises(ValueError, match='more than once'): ranger([[p], [p]], lr=.1)

def test_closure():
    "is called once, with gradients on, before the update; its value is returned"
    p,q = param(1.),param(1.)
    opt,plain = ranger([p], lr=.1),ranger([q], lr=.1)
    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss
    for i in range(7):
        loss = opt.step(closure)
        q.grad = 2*q.detach()
        assert loss.item() == pytest.approx(q.item()**2)
        plain.step()
    assert torch.equal(p, q)
    def fails(): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): opt.step(fails)
    assert opt.state[p]['step'] == 7

def inference(t):
    with torch.inference_mode(): return t.clone()

@pytest.mark.parametrize('opt_func', (ranger, ranger_muon, as_torch(ranger), lookahead(torch.optim.SGD)))
@pytest.mark.parametrize('kind', (torch.Tensor.to_mkldnn, torch.Tensor.to_sparse, inference, lambda t: torch.nested.nested_tensor([t, t[:1]])))
def test_frozen_of_a_kind_that_cannot_be_stepped(opt_func, kind):
    "does not stop the others"
    w,q = torch.nn.Parameter(torch.randn(4, 4)),torch.nn.Parameter(kind(torch.randn(3, 4)), requires_grad=False)
    opt = opt_func([dict(params=[q]), dict(params=[w])] if isinstance(opt_func, type) else [[q], [w]], lr=.1)
    if hasattr(opt, 'freeze_to'): opt.freeze_to(1)
    for _ in range(7):
        w.grad = torch.ones_like(w)
        before = w.tolist()
        opt.step()
        assert w.tolist() != before
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    repr(opt)

@pytest.mark.parametrize('opt_func', (ranger, ranger_muon, as_torch(ranger), lookahead(torch.optim.SGD)))
def test_compiled(opt_func):
    "It runs as it is, in no graph"
    both = [[torch.nn.Parameter(torch.linspace(0, 1, 12).view(3, 4))] for _ in range(2)]
    opts = [opt_func(ps, lr=.1) for ps in both]
    for _ in range(7):
        for (p,),step in zip(both, (opts[0].step, torch.compile(opts[1].step, backend='aot_eager'))):
            p.grad = torch.linspace(1, 2, 12).view(3, 4)
            step()
    assert torch.equal(both[0][0], both[1][0])
