"The step is fast because it keeps its buckets, works in chunks and allocates nothing; here it is held to the plain chain while everything changes"
import copy, weakref
from functools import partial

import pytest
import torch
from fastai_ranger.core import kernels, lookahead as lookahead_module
from fastai_ranger.optimizers import adam as radam
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.compare.bench import memory
from fastai_ranger.core.kernels import chunks, follow
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

chain = [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, radam_step]
hypers = dict(lr=1e-2, mom=.95, sqr_mom=.99, wd=.1, eps=1e-6, beta=0.)

class Forgetful(MultiTensorOptimizer):
    "Makes its buckets anew for each step"
    def buckets(self):
        self._last = None
        return super().buckets()

def plain(params): return Forgetful(params, [slow_weights, *chain, lookahead_step], **hypers)
def fast(params): return ranger(params, 1e-2, wd=.1)

def model(dtype=torch.float64):
    torch.manual_seed(0)
    return [[torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes] for shapes in ([(4, 3), (4,)], [(2, 3, 2, 2), (5,), ()])]

def same(a, b, tol=1e-12): return all(torch.allclose(x.double(), y.double(), atol=tol, rtol=0) for g,h in zip(a, b) for x,y in zip(g, h))

def give_grads(gs, skip=()):
    for g in gs:
        for p in g: p.grad = None if any(p is o for o in skip) else torch.randn_like(p)

## Buckets

def _state(o, g): return o.state[g[0][0]]

changes = dict(
    nothing        = (True, lambda o, g: None),
    lr             = (True, lambda o, g: o.set_hyper('lr', 3e-3)),
    lr_of_a_group  = (False, lambda o, g: o.set_hyper('lr', [3e-3, 1e-2])),
    k_and_alpha    = (True, lambda o, g: o.set_hypers(k=2, alpha=.3)),
    zero_grad      = (True, lambda o, g: o.zero_grad()),
    freeze         = (False, lambda o, g: o.freeze_to(1)),
    clear_state    = (False, lambda o, g: o.clear_state()),
    load           = (False, lambda o, g: o.load_state_dict(copy.deepcopy(o.state_dict()))),
    do_wd          = (False, lambda o, g: _state(o, g).update(do_wd=False)),
    count          = (False, lambda o, g: _state(o, g).update(step=3)),
    new_average    = (False, lambda o, g: _state(o, g).update(grad_avg=torch.ones(4, 3, dtype=torch.float64))),
    average_in_place=(True, lambda o, g: _state(o, g)['grad_avg'].fill_(1.)),
    new_state      = (False, lambda o, g: o.state.update({g[0][0]: dict(_state(o, g))})),
    extra_state    = (False, lambda o, g: _state(o, g).update(note=1)),
    lost_state     = (False, lambda o, g: [_state(o, g).pop(k) for k in ('slow', 'slow_step')]),
    dtype          = (False, lambda o, g: setattr(g[0][1], 'data', g[0][1].data.float())),
    layout         = (False, lambda o, g: setattr(g[1][0], 'data', g[1][0].data.to(memory_format=torch.channels_last))),
    transposed     = (False, lambda o, g: setattr(g[1][0], 'data', g[1][0].data.transpose(2, 3))), # in the same memory
    regrouped      = (False, lambda o, g: setattr(o, 'param_lists', type(o.param_lists)([g[0][:1], g[0][1:]+g[1]]))),
    other_object   = (False, lambda o, g: (g[0].__setitem__(0, torch.nn.Parameter(g[0][0].data)), setattr(o, 'param_lists', type(o.param_lists)(g)))),
    slow           = (False, lambda o, g: o.to_slow()),
    weights        = (True, lambda o, g: [p.add_(1) for h in g for p in h]),
)

@pytest.mark.parametrize('name', list(changes))
@torch.no_grad()
def test_buckets_are_kept_until_something_changes(name):
    kept,change = changes[name]
    def run(opt_func):
        gs,seen = model(),[]
        opt = opt_func(gs)
        held = opt.state[gs[0][0]] # what was taken before a step can be written to after it
        for i in range(22):
            if i in (9, 16): change(opt, gs)
            torch.manual_seed(i)
            give_grads([[p for p in g if p.requires_grad] for g in gs])
            opt.step()
            seen.append(opt._last.buckets)
        return gs,seen
    (ours,seen),(theirs,_) = run(fast),run(plain)
    assert same(ours, theirs, 1e-6 if name=='dtype' else 1e-12)
    assert (seen[9] is seen[8]) == kept and seen[8] is seen[2] and seen[-1] is seen[-3]

def test_a_state_that_was_taken_before_is_read_and_written():
    gs = model()
    opt = fast(gs)
    give_grads(gs)
    opt.step()
    held = opt.state[gs[0][0]]
    for _ in range(3): opt.step()
    assert held['step'] == 4
    held['do_wd'] = False
    opt.step()
    assert len(opt.buckets()) == 2

def test_a_bucket_holds_no_gradient():
    "so that memory is free after `zero_grad`"
    gs = model()
    opt = fast(gs)
    give_grads(gs)
    for _ in range(3): opt.step()
    ref = weakref.ref(gs[0][0].grad)
    opt.zero_grad()
    assert ref() is None

@pytest.mark.parametrize('drop', (lambda o: o.clear_state(), lambda o: o.load_state_dict(copy.deepcopy(o.state_dict()))))
def test_dropped_state_is_free(drop):
    gs = model()
    opt = fast(gs)
    give_grads(gs)
    for _ in range(3): opt.step()
    ref = weakref.ref(opt.state[gs[0][0]]['grad_avg'])
    drop(opt)
    assert ref() is None

def test_another_parameter_on_the_same_memory():
    "which PyTorch does not count as a change"
    ps = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    opt = RAdam(ps, lr=.1, unrectified='skip')
    for p in ps: p.grad = torch.ones(3)
    for _ in range(7): opt.step()
    new = torch.nn.Parameter(ps[1].data)
    new.grad = torch.ones(3)
    opt.param_lists = type(opt.param_lists)([[ps[0], new]])
    opt.step()
    assert opt.state[new]['step'] == 1 and opt.state[ps[1]]['step'] == 7

## Any tensors

def tensor(kind, dtype):
    "A parameter, and a function that makes its gradients"
    def t(*s): return torch.randn(s, dtype=dtype)
    cl = torch.channels_last
    return dict(scalar=lambda: (t(), t), empty=lambda: (t(0, 2), lambda: t(0, 2)), one=lambda: (t(1), lambda: t(1)), vector=lambda: (t(7), lambda: t(7)),
                matrix=lambda: (t(3, 4), lambda: t(3, 4)), turned=lambda: (t(4, 3), lambda: t(3, 4).t()), grad_cl=lambda: (t(2, 3, 2, 2), lambda: t(2, 3, 2, 2).to(memory_format=cl)),
                cl=lambda: (t(2, 3, 2, 2).to(memory_format=cl), lambda: t(2, 3, 2, 2)), holes=lambda: (t(10)[::2], lambda: t(5)))[kind]()

kinds = st.sampled_from(['scalar', 'empty', 'one', 'vector', 'matrix', 'turned', 'grad_cl', 'cl', 'holes'])
lists = st.lists(st.lists(st.tuples(kinds, st.sampled_from([torch.float64, torch.float32]), st.integers(0, 3), st.booleans()), max_size=4), min_size=1, max_size=3).filter(any)

@pytest.mark.parametrize('n', (5, 2**20))
@pytest.mark.parametrize('decouple_wd,beta', [(True, 0.), (False, 0.), (True, 3.)])
def test_any_tensors(n, decouple_wd, beta, monkeypatch):
    "Groups of some, one or no parameters, of any shape, type and layout, some not decayed, whose gradients are missing now and then; whole or in `chunks`"
    for module in (lookahead_module, radam): monkeypatch.setattr(module, 'chunks', partial(chunks, n=n))
    cbs = [slow_weights, *(chain if decouple_wd else [l2_reg, *chain[1:]]), lookahead_step]
    @settings(max_examples=25, deadline=None)
    @given(lists, st.lists(st.floats(1e-4, 1e-2), min_size=3, max_size=3))
    def check(groups, lrs):
        def run(opt_func):
            torch.manual_seed(5)
            made = [[(*tensor(kind, dtype), every, wd) for kind,dtype,every,wd in g] for g in groups]
            opt = opt_func([[o[0] for o in g] for g in made])
            for g in made:
                for p,_,_,wd in g:
                    if not wd: opt.state[p]['do_wd'] = False
            for i in range(15):
                opt.set_hyper('lr', [lr*(1-i/20) for lr in lrs[:len(groups)]])
                for g in made:
                    for p,grad,every,_ in g:
                        new = grad().clone(memory_format=torch.preserve_format) # `l2_reg` writes to it
                        p.grad = None if every and i%(every+1)==0 else new
                opt.step()
            return [[o[0] for o in g] for g in made]
        ours,theirs = run(partial(ranger, lr=0., wd=.1, decouple_wd=decouple_wd, beta=beta)),run(lambda ps: Forgetful(ps, cbs, **{**hypers, 'beta': beta}))
        for a,b in zip(sum(ours, []), sum(theirs, [])): assert torch.allclose(a, b, rtol=0, atol=1e-11 if a.dtype is torch.float64 else 1e-5)
    check()

def test_tied_parameters():
    "One parameter in two places of a model gets the sum of both gradients, and one update"
    def run(opt_func):
        torch.manual_seed(6)
        a,b = torch.nn.Linear(3, 3).double(),torch.nn.Linear(3, 3).double()
        b.weight = a.weight
        m = torch.nn.Sequential(a, torch.nn.Tanh(), b)
        opt = opt_func(list(m.parameters()))
        for _ in range(15):
            m(torch.randn(8, 3, dtype=torch.float64)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        assert a.weight is b.weight and a.weight.data_ptr() == b.weight.data_ptr()
        return [list(m.parameters())]
    assert same(run(fast), run(plain))

@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_chunks(shapes, n):
    "Every number is in one chunk, once, and chunks are no larger than they must be"
    ts = [torch.zeros(s) for s in shapes]
    last = n+1
    for a,b in chunks(ts, [t.clone() for t in ts], n=n):
        assert [o.shape for o in a] == [o.shape for o in b] and last+a[0].numel() > n
        last = sum(o.numel() for o in a)
        torch._foreach_add_(a, 1.)
        assert last <= n or len(a)==1 and (len(a[0])==1 or n >= sum(t.numel() for t in ts))
    assert all((t==1).all() for t in ts)

## Memory

def large(n=2):
    ps = [torch.nn.Parameter(torch.randn(1100, 1000)) for _ in range(n)]
    for p in ps: p.grad = torch.randn_like(p)
    return ps

@pytest.mark.parametrize('opt_func', (ranger, partial(ranger, decouple_wd=False), RAdam, partial(ranger, unrectified='skip')))
def test_a_step_allocates_nothing(opt_func):
    "but for a count, from the second step on; rectified, unrectified and synchronising"
    opt = opt_func(large(), lr=1e-3)
    opt.step()
    def steps():
        for i in range(14):
            opt.set_hyper('lr', 1e-3/(i+1))
            opt.step()
    kept,most = memory(steps)
    assert max(kept, most) < 2048

def test_a_softplus_takes_two_chunks():
    ps = large(4)
    opt = ranger(ps, lr=1e-3, beta=2.)
    for _ in range(7): opt.step()
    kept,most = memory(opt.step)
    assert kept < 2048 and most <= 2*4*2**20+2048

def test_memory_sees_what_is_allocated():
    assert memory(lambda: torch.zeros(1000).clone()) == (0, 8000)

def test_pointers_stay():
    "Weights and state stay where they are, in any step"
    gs = [large(), large(1)]
    for opt_func in (ranger, ranger_kahan, partial(ranger, beta=2.)):
        for dtype in torch.float32,torch.bfloat16:
            for g in gs:
                for p in g: p.data,p.grad = p.data.to(dtype),p.grad.to(dtype)
            opt = opt_func(gs, lr=1e-3)
            opt.step()
            def where(): return [p.data_ptr() for g in gs for p in g] + [v.data_ptr() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            before = where()
            for i in range(7):
                opt.set_hyper('lr', 1e-3/(i+1))
                opt.step()
            assert where() == before

## Devices

@pytest.mark.skipif(torch.__version__ < (2, 6), reason='PyTorch 2.5 aborts in a fused kernel on such tensors')
@pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')
@pytest.mark.parametrize('opt_func', (ranger, RAdam, partial(ranger, decouple_wd=False), partial(ranger, beta=2.), ranger_kahan))
def test_nothing_waits_for_a_gpu(opt_func, monkeypatch):
    "On tensors that only claim to be on one: these raise when a number of theirs is asked for. (The kernel of fused SGD has no such form, so it is not called.)"
    called = []
    monkeypatch.setattr(torch, '_fused_sgd_', lambda *args, **kwargs: called.append(1))
    with FakeTensorMode():
        ps = [torch.nn.Parameter(torch.empty(s, device='cuda', dtype=torch.bfloat16 if opt_func is ranger_kahan else torch.float32)) for s in ((10, 10), (3,))]
        opt = opt_func(ps, lr=.1)
        with pytest.raises(Exception, match='scalar'): ps[0].sum().item()
        for i in range(14):
            for p in ps: p.grad = torch.empty_like(p)
            opt.set_hyper('lr', .1/(i+1))
            opt.step()
    assert opt.state[ps[0]]['step'] == 14 and len(called) == (0 if opt_func in (RAdam, ranger_kahan) else 2)

def test_one_kernel_for_what_is_alike_in_memory(monkeypatch):
    "On a GPU, the kernel refuses what is not; and nothing is cut in chunks"
    called = []
    monkeypatch.setattr(torch, '_fused_sgd_', lambda *args, **kwargs: called.append(1))
    with FakeTensorMode():
        p,slow = ([torch.empty(2000, 2000, device='cuda')] for _ in range(2))
        for to in [torch.empty(2000, 2000, device='cuda').t()],p: lookahead_module._synchronise(to, slow, .5)
        assert len(chunks(p, slow)) == 1
    assert len(called) == 1

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('opt_func', (ranger, RAdam, partial(ranger, decouple_wd=False), partial(ranger, beta=2.)))
def test_gpu(opt_func):
    "The weights of the CPU, without waiting for the device"
    def run(device):
        gs = [[p.data.to(device) for p in g] for g in model()]
        opt = opt_func(gs, lr=1e-2)
        for i in range(20):
            torch.manual_seed(i)
            for g in gs:
                for p in g: p.grad = torch.randn(p.shape, dtype=p.dtype).to(device)
            if device=='cuda': torch.cuda.set_sync_debug_mode('error')
            try: opt.step()
            finally:
                if device=='cuda': torch.cuda.set_sync_debug_mode('default')
        return [[p.cpu() for p in g] for g in gs]
    assert same(run('cuda'), run('cpu'), 1e-10)

@pytest.mark.parametrize('alpha', (0., .3, .5, 1.))
def test_synchronisation_in_one_kernel(alpha):
    "What a GPU does, on a CPU: a step of SGD on the slow weights, with weight decay -1, is Lookahead"
    torch.manual_seed(7)
    slow,p = ([torch.randn(s, dtype=torch.float64) for s in ((3, 4), (0,), ())] for _ in range(2))
    expected = torch._foreach_lerp(slow, p, alpha)
    follow(p, slow, alpha)
    assert same([slow], [expected], 1e-15)

@pytest.mark.parametrize('bad', (float('nan'), float('inf'), -float('inf')))
def test_synchronisation_in_one_kernel_keeps_what_is_not_finite_out(bad):
    slow,p = ([torch.ones(3), torch.ones(2)] for _ in range(2))
    p[1][1] = bad
    p[0].fill_(5.)
    follow(p, slow, .5)
    assert all((o==1).all() for o in slow)
