"Every optimizer by every contract: what `register` knows on our engine is tested here"
import copy, math, pickle, warnings
from functools import partial
from unittest.mock import patch

import fastai.optimizer as stock
import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.compare.registry import OptInfo, optimizers, register
from helpers import (as_it_is, channels_last, equal, flat, has_slow, holes, inner, is_whole, load, ours, records, same,
    through_a_file, turned, whole)
from reference import references
from torch import nn
from workflows import digits_learner, fit

## Weights, gradients, state

shapes = [(4, 3), (4,), (), (0, 2)], [(2, 3, 2, 2), (5,), (1, 4), (1,)]

def model(dtype=torch.float64, shapes=shapes):
    g = torch.Generator().manual_seed(0)
    return [[nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in ss] for ss in shapes]

def weights(gs): return [p.detach().clone() for p in flat(gs)]
def apart(a, b): return max((x.detach().double()-y.detach().double()).abs().max().item() for x,y in zip(a, b) if x.numel())
def moved(a, b): return not any(torch.equal(x, y) for x,y in zip(a, b) if x.numel())

def random(p, i, j):
    "The gradient of parameter `j` in update `i`"
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000*i+j), dtype=torch.float64).to(p.dtype)

def give(gs, i, lacks=lambda i,j: False, grad=random):
    for j,p in enumerate(flat(gs)): p.grad = None if lacks(i, j) else grad(p, i, j)

def go(opt, gs, n, first=0, **kwargs):
    "`n` updates with gradients that depend on the number of the update alone"
    for i in range(first, first+n):
        give(gs, i, **kwargs)
        opt.step()
    return gs

def make(info, gs):
    "With weight decay, but for one parameter"
    opt = info.opt_func(gs, lr=info.lr)
    if 'wd' in opt.hypers[0]: opt.set_hyper('wd', .1)
    if len(gs[0]) > 1: opt.state[gs[0][1]]['do_wd'] = False
    return opt


def states(opt, gs):
    "A copy of all state, that of a PyTorch optimizer inside included"
    return [{k: torch.as_tensor(v).clone() for k,v in whole(opt.state[p]).items()} for p in flat(gs)]

## Saved, loaded, copied

def goes_on_from_a_checkpoint(info, dtype):
    "to the bit, from any place in the inner loop, on slow weights or fast ones, and tells of nothing that starts anew"
    gs = model(dtype)
    opt,saved = make(info, gs),[]
    if has_slow(opt): opt.set_hypers(k=4, alpha=.3)
    for i in range(9):
        if i==6 and has_slow(opt): opt.to_slow()
        if i in (1, 4, 5, 6): saved.append((i, through_a_file(opt.state_dict()), copy.deepcopy(gs)))
        go(opt, gs, 1, i)
    for i,sd,ws in saved:
        other = info.opt_func(ws, lr=info.lr/2)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            other.load_state_dict(sd)
        go(other, ws, 9-i, i)
        assert equal(flat(ws), flat(gs)) and same(states(other, ws), states(opt, gs)) and list(other.hypers)==list(opt.hypers)

def is_read_safely(info):
    "and goes on to the bit: what it saves after a restart, with groups frozen, with rates of NumPy, as a PyTorch optimizer, and from a `Learner`"
    gs,ws = model(),model()
    opt,other = make(info, gs),make(info, ws)
    go(opt, gs, 4)
    opt.restart()
    opt.freeze_to(1)
    opt.set_hyper('lr', info.lr*np.array([1, 2]))
    other.load_state_dict(through_a_file(opt.state_dict()))
    with torch.no_grad():
        for p,w in zip(flat(gs), flat(ws)): w.copy_(p)
    go(opt, gs, 8), go(other, ws, 8)
    assert equal(flat(gs), flat(ws))
    if isinstance(opt, MultiTensorOptimizer):
        opt,other = (as_torch(info.opt_func)([dict(params=g, lr=np.float64(info.lr)) for g in model()]) for _ in range(2))
        go(opt.inner, opt.inner.param_lists, 3)
        other.load_state_dict(through_a_file(opt.state_dict()))
        assert same(states(other.inner, other.inner.param_lists), states(opt.inner, opt.inner.param_lists))
    learn,other = (digits_learner(info.opt_func) for _ in range(2))
    fit(learn, 1, slice(info.lr/10, info.lr), Learner.fit_one_cycle)
    file = learn.save('x')
    assert set(torch.load(file, weights_only=True))=={'model', 'opt'}
    load(other, file.with_suffix(''))
    fit(learn, lr=info.lr), fit(other, lr=info.lr)
    assert equal(learn.model.parameters(), other.model.parameters())

def own(sd): return sd.get('lookahead', sd)
def plain(sd): return [{k: torch.as_tensor(v).clone() for k,v in s.items()} for s in own(sd)['state']], [dict(h) for h in own(sd)['hypers']]

def leaves_the_checkpoint_as_it_is(info):
    gs,ws = model(),model()
    opt = make(info, gs)
    go(opt, gs, 5)
    sd = copy.deepcopy(opt.state_dict())
    state,hypers = plain(sd)
    other = make(info, ws)
    other.load_state_dict(sd)
    go(other, ws, 8)
    other.set_hyper('lr', 7.)
    assert same(plain(sd)[0], state) and plain(sd)[1]==hypers

def spoilt(sd, names):
    "Copies of `sd`, each with something wrong in it"
    def edited(f):
        new = copy.deepcopy(sd)
        f(own(new))
        return new
    for k in names: yield edited(lambda o: o['state'][-1].update({k: torch.zeros(9, 9)}))
    for k in {'lr', 'k'} & set(own(sd)['hypers'][0]): yield edited(lambda o: o['hypers'][1].update({k: -1}))
    for k in ('state', 'hypers'): yield edited(lambda o: o.update({k: list(o[k])[:-1]}))
    yield edited(lambda o: o.update(state=3))

def refuses_a_bad_checkpoint(info):
    "with a `ValueError`, and a warning for those who load it in a `Learner`, before anything is changed"
    gs,ws = model(),model()
    opt,other = make(info, gs),make(info, ws)
    go(opt, gs, 4), go(other, ws, 5)
    sd = other.state_dict()
    before,hypers,state = weights(gs),[dict(h) for h in opt.hypers],states(opt, gs)
    for bad in spoilt(sd, [k for k,v in own(sd)['state'][-1].items() if k in opt.declared.starters and isinstance(v, torch.Tensor)]):
        with pytest.raises(ValueError), pytest.warns(UserWarning): opt.load_state_dict(bad)
        assert equal(before, flat(gs)) and same(states(opt, gs), state) and list(opt.hypers)==hypers

def copies_go_on(info):
    "their own way, to the bit"
    gs = model()
    opt = make(info, gs)
    go(opt, gs, 8)
    copies = copy.deepcopy((opt, gs)),pickle.loads(pickle.dumps((opt, gs)))
    go(opt, gs, 9, 8)
    for o in copies: assert equal(flat(go(*o, 9, 8)), flat(gs)) and same(states(*o), states(opt, gs))

## Which parameters are stepped

def frozen_parameters_stay(info):
    "bit by bit, and go on where they were"
    gs,(ws,_) = model(),model()
    opt = make(info, gs)
    go(opt, gs, 4)
    opt.freeze_to(1)
    body,head = map(weights, ([gs[0]], [gs[1]]))
    go(opt, gs, 9, 4, lacks=lambda i,j: j < len(ws))
    assert equal(body, gs[0]) and moved(head, gs[1])
    opt.freeze_to(0)
    go(opt, gs, 9, 13)
    assert moved(body, gs[0])
    if is_whole(info): return
    alone = make(info, [ws])
    go(alone, [ws], 4), go(alone, [ws], 9, 13)
    assert apart(ws, gs[0]) < 1e-12

def no_gradient_no_step(info):
    "nor state; with an empty group, and with no gradient at all"
    gs = [*model(), []]
    opt,start = make(info, gs),weights(gs)
    empty = states(opt, gs)
    go(opt, gs, 2, lacks=lambda i,j: True)
    assert equal(start, flat(gs)) and same(states(opt, gs), empty)
    go(opt, gs, 7, lacks=lambda i,j: j==4)
    assert torch.equal(flat(gs)[4], start[4]) and states(opt, gs)[4]=={} and moved(start[5:], flat(gs)[5:])
    go(opt, gs, 1)
    now,state = weights(gs),states(opt, gs)
    go(opt, gs, 8, lacks=lambda i,j: j==4)
    assert torch.equal(flat(gs)[4], now[4]) and same(states(opt, gs)[4:5], state[4:5])

def nothing_to_do(info):
    "Gradients of zero and no decay"
    gs = model()
    opt,start = info.opt_func(gs, lr=info.lr),weights(gs)
    opt.set_hypers(**{k: 0. for k in ('wd', 'norm_loss') if k in opt.hypers[0]})
    go(opt, gs, 8, grad=lambda p,i,j: torch.zeros_like(p))
    assert equal(start, flat(gs))

def gradients_come_and_go(info):
    "Each parameter on its own schedule, as in an optimizer of its own"
    def lacks(i, j): return i%(j+2)==0
    gs,ws = model(),flat(model())
    go(make(info, gs), gs, 16, lacks=lacks)
    for j,p in enumerate(ws):
        opt = make(info, [[p]])
        if j==1: opt.state[p]['do_wd'] = False
        go(opt, [[p]], 16, lacks=lambda i,_: lacks(i, j), grad=lambda p,i,_: random(p, i, j))
    assert apart(ws, flat(gs)) < 1e-12

def gradients_stay(info, dtype):
    "The same objects with the same numbers, never written to"
    gs = model(dtype)
    opt = make(info, gs)
    for i in range(8):
        give(gs, i)
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in flat(gs)]
        opt.step()
        assert all(p.grad is g and torch.equal(g, c) and g._version==v for p,(g,c,v) in zip(flat(gs), kept))

def storage_stays(info):
    "Weights, and the state that is declared, are updated in place"
    gs = model()
    opt = make(info, gs)
    def where(): return [p.data_ptr() for p in flat(gs)] + [v.data_ptr() for p in flat(gs) for k,v in opt.state[p].items() if k in opt.declared.starters and isinstance(v, torch.Tensor)]
    go(opt, gs, 1)
    before = where()
    go(opt, gs, 12, 1)
    assert where()==before

def plain_tensors_are_stepped(info):
    "They do not require a gradient, and get one by hand"
    gs,ws = model(),[[p.detach() for p in g] for g in model()]
    go(make(info, gs), gs, 8), go(make(info, ws), ws, 8)
    assert not any(p.requires_grad for p in flat(ws)) and equal(flat(ws), flat(gs))

def works_where_autograd_is_on(info):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = info.opt_func([w], lr=info.lr)
    for _ in range(8):
        (w**2).sum().backward()
        opt.step()
        opt.zero_grad()
    assert w.is_leaf and w.requires_grad and w.grad is None and (w != 1).all()

## Hypers

def groups_are_optimizers_of_their_own(info):
    gs,ws = model(),model()
    opt = make(info, gs)
    own = dict(lr=[info.lr, info.lr/3], wd=[.1, .3], mom=[.9, .8], sqr_mom=[.99, .98], eps=[1e-6, 1e-3], k=[2, 5], alpha=[.5, .3])
    own = {k: v for k,v in own.items() if k in opt.hypers[0]}
    opt.set_hypers(**own)
    go(opt, gs, 14)
    for i,g in enumerate(ws):
        other = make(info, [g])
        if i: other.state[g[1]].pop('do_wd')
        other.set_hypers(**{k: v[i] for k,v in own.items()})
        go(other, [g], 14, grad=lambda p,n,j: random(p, n, j+i*len(ws[0])))
    assert apart(flat(ws), flat(gs)) < 1e-12

checked = 'lr', 'wd', 'eps', 'mom', 'sqr_mom', 'k', 'alpha', 'beta', 'clip', 'pnm', 'norm_loss'

def refused_hypers_leave_all_as_it_was(info):
    "whichever of several is refused, and in whichever group"
    gs = model()
    opt = make(info, gs)
    now = {k: v for k,v in opt.hypers[0].items() if k in checked}
    good = {k: 4 if k=='k' else v*.999 for k,v in now.items()}
    before = copy.deepcopy(list(opt.hypers))
    with pytest.raises(ValueError, match='lr|learning rate'): info.opt_func(model(), lr=-1.)
    for k in now:
        for bad in ({**good, k: -1}, {k: [good[k], -1]}):
            with pytest.raises(ValueError, match=f'`{k}` must be'): opt.set_hypers(**bad)
            assert list(opt.hypers)==before
    opt.set_hypers(**good)
    assert all({k: h[k] for k in good}==good for h in opt.hypers)

def restart_begins_anew(info, dtype):
    "drops what is anchored to the weights, and nothing else; slow weights then begin from the weights there are"
    for n in (1, 5, 6):
        gs = model(dtype)
        opt = make(info, gs)
        go(opt, gs, n)
        before,anchored = states(opt, gs),opt.declared.anchored
        opt.restart()
        assert same(states(opt, gs), [{k: v for k,v in s.items() if k not in anchored} for s in before])
        if not has_slow(opt): continue
        for p in flat(gs): p.data.fill_(5.)
        opt.set_hyper('lr', 0.)
        k = opt.hypers[0]['k']
        go(opt, gs, k, n)
        assert all((p==5).all() for p in flat(gs)) and all(opt.state[p]['slow_step']==k for p in flat(gs))
        opt.set_hyper('lr', info.lr)
        go(opt, gs, k, n+k)
        assert equal(flat(gs), [opt.state[p]['slow'] for p in flat(gs)])

## Memory, types and devices

def rows(t): return t[:1].expand_as(t)
def one_number(t): return t.flatten()[0].expand_as(t)

layouts = [*((w, g) for w in (turned, channels_last, holes) for g in (as_it_is, w)), *((as_it_is, g) for g in (turned, channels_last, holes, rows, one_number))]

def same_numbers_in_any_layout(info, weight, grad):
    start = model(shapes=[[(2, 3, 4, 5), (4, 3, 1, 1), (4, 3)], [(5,)]])
    gs,ws = ([[nn.Parameter(f(p.detach().clone())) for p in g] for g in start] for f in (weight, as_it_is))
    for ps,f in ((gs, as_it_is), (ws, torch.Tensor.contiguous)): go(make(info, ps), ps, 8, grad=lambda p,i,j: f(grad(random(torch.empty(p.shape, dtype=p.dtype), i, j))))
    assert [p.stride() for p in flat(gs)]==[weight(p).stride() for p in flat(start)] and apart(flat(gs), flat(ws)) < 1e-9

def layouts_may_change(info):
    "of gradients, and of weights: a model turned to channels-last, and a weight that is turned in its memory"
    gs,ws = (model(shapes=[[(2, 3, 4, 5), (3, 3)]]) for _ in range(2))
    made = [(make(info, gs), gs, as_it_is), (make(info, ws), ws, torch.Tensor.contiguous)]
    changes = {4: channels_last, 8: lambda t: t.mT if t.ndim==2 else t, 13: torch.Tensor.contiguous}
    for i in range(18):
        for opt,ps,f in made:
            for p in flat(ps):
                if i in changes: p.data = f(changes[i](p.data))
            go(opt, ps, 1, i, grad=lambda p,i,j: f((as_it_is, turned, channels_last)[i%5%3](random(torch.empty(p.shape, dtype=p.dtype), i, j))))
    assert apart(flat(gs), flat(ws)) < 1e-12

roundings = dict(ranger_lars=50) # it scales what rounding has left of an update
products = dict(muon=1e-3, ranger_muon=1e-3) # those of Newton-Schulz are in bfloat16

def low_precision_is_near(info, dtype):
    "Within its rounding, mixed with float64 in one optimizer"
    shape = [(4, 3), (5,), (1, 4), ()]
    exact,low = model(shapes=[shape])[0],model(dtype, shapes=[shape])[0]
    for p,q in zip(exact, low): p.data = q.data.double()
    opt = info.opt_func([exact, low], lr=info.lr)
    go(opt, [exact, low], 14, grad=lambda p,i,j: random(p, i, j%len(shape)).to(dtype).to(p.dtype))
    assert {p.dtype for p in low}=={dtype} and all(p.isfinite().all() for p in low+exact)
    assert apart(low, exact) < roundings.get(info.name, 6)*torch.finfo(dtype).eps*max(1, max(p.abs().max().item() for p in exact)) + products.get(info.name, 0)

def another_default_dtype_changes_nothing(info, default):
    def run(default):
        gs,before = model(torch.float32),torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            opt = make(info, gs)
            go(opt, gs, 8)
            if has_slow(opt): opt.sync()
        finally: torch.set_default_dtype(before)
        return flat(gs)
    assert equal(run(default), run(torch.float32))

def what_is_not_finite_harms_no_other(info, bad, dtype):
    "and stays out of the slow weights, to which its own weight returns"
    def run(spoil):
        gs = model(dtype)
        opt = make(info, gs)
        if has_slow(opt): opt.set_hyper('k', 3)
        for i in range(11):
            if i==9 and has_slow(opt): assert all(s[k].isfinite().all() for s in states(opt, gs) for k in opt.declared.anchored & set(s)) and all(p.isfinite().all() for p in flat(gs))
            give(gs, i)
            if spoil and i==7: gs[1][0].grad[1, 2, 1, 0] = bad
            opt.step()
        return opt,gs
    (opt,gs),(_,ws) = run(True),run(False)
    others = [j for j in range(len(flat(gs))) if j != 4]
    for j in others: assert flat(gs)[j].isfinite().all() and (is_whole(info) or torch.equal(flat(gs)[j], flat(ws)[j]))
    if not has_slow(opt): return
    p = gs[1][0]
    fast,slow = p.detach().clone(),opt.state[p]['slow'].clone()
    opt.sync()
    assert p.isfinite().all() and torch.equal(p[~fast.isfinite()], slow[~fast.isfinite()])

def spoil(p, kind):
    p.grad = None
    if kind=='sparse': p.grad = torch.ones_like(p).to_sparse()
    else:
        p.grad_dtype = None
        p.grad = torch.ones_like(p, dtype=kind)

def refuses_a_bad_gradient(info, kind, n):
    "after `n` updates, before any weight has moved"
    if kind != 'sparse' and not hasattr(torch.Tensor, 'grad_dtype'): pytest.skip('this PyTorch refuses it itself')
    gs = model()
    opt,bad = make(info, gs),gs[1][1]
    go(opt, gs, n)
    before,state = weights(gs),states(opt, gs)
    give(gs, n)
    spoil(bad, kind)
    with pytest.raises(ValueError, match=r'cannot step parameter 1 of group 1, shape \(5,\).*must be dense'): opt.step()
    assert equal(before, flat(gs)) and same(states(opt, gs), state)

def refuses_a_bad_parameter(info, dtype):
    good,bad = torch.ones(2, dtype=torch.float64),torch.ones(2).to(dtype)
    for p in (good, bad): p.grad = torch.ones(2).to(p.dtype)
    opt = info.opt_func([[good], [bad]], lr=info.lr)
    with pytest.raises(ValueError, match=f'cannot step parameter 0 of group 1, .*{dtype}'): opt.step()
    assert good.tolist()==[1, 1] and opt.state[good]=={}

def few_at_a_time_are_all_at_once(info):
    "Buckets of ten numbers, or of all"
    def run(most):
        with patch('fastai_ranger.core.optimizer.most_numbers', most):
            gs = model()
            opt = make(info, gs)
            return flat(go(opt, gs, 13)),len(opt.buckets())
    (a,n),(b,m) = run(10),run(10**9)
    assert apart(a, b) < 1e-12 and n > m

def one_at_a_time_are_all_at_once(info):
    "One tensor after another in fastai's engine: no buckets, nothing put back"
    some = [shapes[1][:1]] if is_whole(info) else [sum(shapes, [])]
    gs,ws = model(shapes=some),model(shapes=some)
    opt = info.opt_func(gs, lr=info.lr)
    go(opt, gs, 30), go(stock.Optimizer(ws, opt.cbs, **opt.hypers[0]), ws, 30)
    assert apart(flat(gs), flat(ws)) < 1e-12

def a_device_without_the_kernel_finds_the_same(info):
    def run():
        gs = model()
        return flat(go(make(info, gs), gs, 30))
    fused = run()
    with patch('fastai_ranger.core.kernels.fused_devices', set()): assert apart(run(), fused) < 1e-11

## The same formulas in fastai's steppers

def has_the_weights_of_its_reference(info, wd):
    "Two groups, one weight that is not decayed, momentum that changes, gradients of any size"
    def heavy(p, i, j): return random(p, i, j)*10**random(torch.empty((), dtype=p.dtype), i, j+500)+.1
    def run(opt_func):
        gs = model()
        opt = opt_func(gs, lr=info.lr)
        opt.set_hypers(lr=[info.lr, info.lr/5], wd=[wd, wd*2])
        opt.state[gs[0][1]]['do_wd'] = False
        for i in range(66):
            if 'mom' in opt.hypers[0]: opt.set_hyper('mom', .95-.002*i)
            go(opt, gs, 1, i, grad=heavy)
        return flat(gs)
    mine = run(info.opt_func)
    assert apart(mine, run(references[info.name])) < 1e-10 and apart(mine, flat(model())) > .01

## All of them

def each(f, **names):
    "`f` for each of the values of its one argument, or two, besides the record"
    k,vs = names.popitem()
    fs = [partial(f, **{k: v}) for v in vs]
    return fs if not names else [o for g in fs for o in each(g, **names)]

low,bits = (torch.bfloat16, torch.float16),(torch.float64, torch.bfloat16)
contracts = [
    *each(goes_on_from_a_checkpoint, dtype=bits), is_read_safely, leaves_the_checkpoint_as_it_is, refuses_a_bad_checkpoint, copies_go_on,
    frozen_parameters_stay, no_gradient_no_step, nothing_to_do, gradients_come_and_go, *each(gradients_stay, dtype=bits), storage_stays, plain_tensors_are_stepped, works_where_autograd_is_on,
    groups_are_optimizers_of_their_own, refused_hypers_leave_all_as_it_was, *each(restart_begins_anew, dtype=bits),
    *[partial(same_numbers_in_any_layout, weight=w, grad=g) for w,g in layouts], layouts_may_change,
    *each(low_precision_is_near, dtype=(torch.float32, *low)), *each(another_default_dtype_changes_nothing, default=(torch.float64, *low)),
    *each(what_is_not_finite_harms_no_other, bad=(math.nan,), dtype=(torch.float64, *low)), *each(what_is_not_finite_harms_no_other, bad=(math.inf, -math.inf), dtype=(torch.float64,)),
    *each(refuses_a_bad_gradient, kind=('sparse', torch.float32, torch.complex128), n=(0, 2)), *each(refuses_a_bad_parameter, dtype=(torch.complex64, torch.int32, torch.float8_e4m3fn)),
    few_at_a_time_are_all_at_once, one_at_a_time_are_all_at_once, a_device_without_the_kernel_finds_the_same, *each(has_the_weights_of_its_reference, wd=(0., .1))]

takes_each_alone = groups_are_optimizers_of_their_own, gradients_come_and_go

def name_of(contract):
    f,kwargs = (contract.func,contract.keywords) if isinstance(contract, partial) else (contract,{})
    return '-'.join([f.__name__, *(getattr(v, '__name__', str(v).removeprefix('torch.')) for v in kwargs.values())])

def holds_for(info, contract):
    "Is `contract` one for this optimizer?"
    f = contract.func if isinstance(contract, partial) else contract
    if f in takes_each_alone: return not is_whole(info)
    if f is one_at_a_time_are_all_at_once: return not inner(info.opt_func([nn.Parameter(torch.zeros(1))], lr=info.lr))
    return f is not has_the_weights_of_its_reference or references[info.name] is not None

@pytest.mark.parametrize('info,contract', [pytest.param(o, c, id=f'{o.name}-{name_of(c)}') for o in records for c in contracts if holds_for(o, c)])
def test_contract(info, contract): contract(info)

@stepper(state=dict(size=0), hypers=dict(drag=hyper(.5, 0, 1)))
def sign_step(p, grad, lr, drag, size, **kwargs):
    torch._foreach_add_(p, [g.sign()+drag*g for g in grad], alpha=-lr)
    return dict(size=size+1)

@patch.dict(optimizers)
@patch.dict(references, mine=None)
def test_an_optimizer_of_your_own():
    "is tested by its record"
    register('mine', partial(MultiTensorOptimizer, cbs=[slow_weights, sign_step, lookahead_step]), 1e-2)
    for o in contracts:
        if holds_for(optimizers['mine'], o): o(optimizers['mine'])
