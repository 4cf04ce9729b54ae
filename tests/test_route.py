"`route`, flags and `around`: a user's own optimizers"
import copy, pickle, warnings
from functools import partial

import fastai.optimizer as stock
import pytest
import torch
from fastai_ranger.all import *
from fastai_ranger.core.route import Route
from fastai_ranger.core.stepper import flag
from fastai_ranger.steppers import *
from helpers import equal, through_a_file
from torch import nn
from workflows import digits_learner, fit

def is_vector(p): return p.ndim < 2

def by_hand(): return route('do_sgd', [weight_decay, sgd_step], [partial(fused_radam_step, decouple_wd=False), partial(weight_decay, wd=.5)], by=is_vector)

hypers = dict(lr=.05, mom=.9, sqr_mom=.99, wd=.1)

def params(): return [nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)), nn.Parameter(torch.ones(4, dtype=torch.float64)), nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]

def go(opt, ps, n, seed=0):
    for i in range(n):
        g = torch.Generator().manual_seed(seed+i)
        for p in ps: p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        opt.step()
    return ps

def test_each_goes_its_way():
    "as in two optimizers of one kind each"
    ps,qs = params(),params()
    opt = MultiTensorOptimizer(ps, by_hand(), **hypers)
    sgd = MultiTensorOptimizer(qs[1:2], [weight_decay, sgd_step], lr=.05, wd=.1)
    rest = MultiTensorOptimizer([qs[0], qs[2]], [partial(fused_radam_step, decouple_wd=False), partial(weight_decay, wd=.5)], **hypers)
    go(opt, ps, 20)
    for i in range(20):
        go(sgd, qs, 1, i)
        rest.step()
    assert equal(ps, qs)
    assert set(opt.state[ps[1]]) == {'do_sgd'} and set(opt.state[ps[0]]) == {'do_sgd', 'step', 'grad_avg', 'sqr_avg'}
    assert [p is ps[1] for p in opt.params_with('do_sgd')] == [True] and 'Sgd for 1 of them, 20% of the numbers' in repr(opt)

def test_the_flag_stays():
    "when the state is cleared, in a checkpoint, in a copy; and the averages begin anew when it changes"
    ps = params()
    opt = MultiTensorOptimizer(ps, by_hand(), **hypers)
    opt.set_flag('do_sgd', [ps[0]], True)
    go(opt, ps, 3)
    opt.clear_state()
    assert [opt.has_flag('do_sgd', p) for p in ps] == [True, True, False]
    go(opt, ps, 3)
    for again in (lambda o: copy.deepcopy((o, ps)), lambda o: pickle.loads(pickle.dumps((o, ps)))):
        other,qs = again(opt)
        assert [other.has_flag('do_sgd', p) for p in qs] == [True, True, False]
        assert equal(go(other, qs, 5), go(*copy.deepcopy((opt, ps)), 5))
    qs = params()
    other = MultiTensorOptimizer(qs, by_hand(), **hypers)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [other.has_flag('do_sgd', p) for p in qs] == [True, True, False] and set(other.state[qs[0]]) == {'do_sgd'}
    opt.set_flag('do_sgd', [ps[0]], False)
    go(opt, ps, 1)
    assert opt.state[ps[0]]['step'] == 1 and opt.state[ps[2]]['step'] == 4

def test_routes_in_routes():
    inner = route('do_wide', [sgd_step], [average_grad, momentum_step], by=lambda p: p.shape[-1] > 3)
    ps,qs = params(),params()
    opt = MultiTensorOptimizer(ps, route('do_matrix', [inner], [weight_decay, sgd_step], by=lambda p: p.ndim > 1), lr=.05, wd=.1)
    go(opt, ps, 10)
    go(MultiTensorOptimizer(qs[:1], sgd_step, lr=.05), qs, 0)
    opts = MultiTensorOptimizer(qs[:1], sgd_step, lr=.05),MultiTensorOptimizer(qs[1:2], [weight_decay, sgd_step], lr=.05, wd=.1),MultiTensorOptimizer(qs[2:], [average_grad, momentum_step], lr=.05)
    for i in range(10):
        go(opts[0], qs, 1, i)
        for o in opts[1:]: o.step()
    assert equal(ps, qs) and opt.declared.routes == ['do_matrix', 'do_wide']
    assert [set(opt.state[p]) for p in ps] == [{'do_matrix', 'do_wide'}, {'do_matrix'}, {'do_matrix', 'do_wide', 'grad_avg'}]

def test_a_gradient_that_changes_inside():
    "is seen by the steppers after the route"
    @stepper()
    def double(p, grad, **kwargs): return dict(grad=[2*g for g in grad])
    ps,qs = params(),params()
    go(MultiTensorOptimizer(ps, [route('do_double', [double], [], by=is_vector), sgd_step], lr=.1), ps, 3)
    go(MultiTensorOptimizer(qs, sgd_step, lr=.1), qs, 3)
    start = params()
    assert equal([ps[0], ps[2]], [qs[0], qs[2]]) and torch.allclose(ps[1]-start[1], 2*(qs[1]-start[1]))

def test_a_model_says_which():
    "in a `Learner`"
    def heads(model): return list(model[-1].parameters())
    steppers = route('do_head', [weight_decay, sgd_step], [fused_radam_step], by=False, select=heads)
    learn = fit(digits_learner(partial(MultiTensorOptimizer, cbs=[steppers], mom=.9, sqr_mom=.99)), lr=1e-3)
    ps = list(learn.model.parameters())
    assert [learn.opt.has_flag('do_head', p) for p in ps] == [False]*(len(ps)-2) + [True]*2
    assert 'sqr_avg' not in learn.opt.state[ps[-1]] and 'sqr_avg' in learn.opt.state[ps[0]]

def test_groups_of_pytorch():
    ps = params()
    opt = as_torch(partial(MultiTensorOptimizer, cbs=by_hand(), mom=.9, sqr_mom=.99))([dict(params=ps[:1], use_sgd=True), dict(params=ps[1:])], lr=.1)
    go(opt, ps, 2)
    assert [opt.inner.has_flag('do_sgd', p) for p in ps] == [True, True, False]
    with pytest.raises(ValueError, match='`use_sgd` must be one of True, False, got 1'): as_torch(partial(MultiTensorOptimizer, cbs=by_hand(), mom=.9, sqr_mom=.99))([dict(params=ps, use_sgd=1)], lr=.1)

def test_a_group_wins_over_the_model():
    "whenever the model is shown, with nothing dropped: after a checkpoint was loaded, too"
    model,other = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double() for _ in range(2))
    def make(m): return RangerMuon([dict(params=[m[0].weight], use_muon=False), dict(params=[m[1].weight, m[2].weight])], lr=.1)
    def train(m, opt, n):
        for i in range(n):
            g = torch.Generator().manual_seed(i)
            for o in m: o.weight.grad = torch.randn(o.weight.shape, generator=g, dtype=torch.float64)
            opt.step()
    opt,again = make(model),make(other)
    opt.set_flags(model)
    train(model, opt, 8)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(opt.state_dict()))
    again.set_flags(other)
    spare_ends(again, other)
    train(model, opt, 8), train(other, again, 8)
    assert equal([o.weight for o in model], [o.weight for o in other]) and [p is other[1].weight for p in again.params_with('do_muon')] == [True]
    del again.param_groups[0]['use_muon']
    again.set_flags(other)
    assert len(again.params_with('do_muon')) == 2

def test_what_a_route_refuses():
    @stepper(scope='all')
    def at_once(p, grad, **kwargs): pass
    with pytest.raises(ValueError, match="a route needs steppers of scope 'alike', at_once has 'all'"): route('do_x', [at_once], [sgd_step], by=True)
    with pytest.raises(TypeError, match='a stepper must be a function, got 3'): route('do_x', [3], [sgd_step], by=True)
    with pytest.raises(ValueError, match='`ns_steps` must be a whole number'): route('do_x', [partial(muon_step, ns_steps=0)], [], by=True)
    with pytest.raises(ValueError, match='momentum_step needs `grad_avg`|needs `grad_avg`'): MultiTensorOptimizer(params(), route('do_x', [momentum_step], [], by=True), lr=.1)
    opt = MultiTensorOptimizer(params(), route('do_x', [sgd_step], [], by=False, allowed=is_vector, why='these are for vectors'), lr=.1)
    with pytest.raises(ValueError, match=r'a parameter of shape \(3, 4\): these are for vectors'): opt.set_flag('do_x', opt.param_lists[0], True)
    assert not opt.params_with('do_x')

# Options and hypers

def test_an_option_is_fixed():
    opt = muon(params(), lr=.1)
    for k,v in dict(ns_steps=3, nesterov=False, unrectified='skip', decouple_wd=False).items():
        with pytest.raises(ValueError, match=f'`{k}` is an option, fixed when the optimizer is made'): opt.set_hyper(k, v)
    with pytest.raises(ValueError, match=r'`ns_steps` is an option of a stepper, not a hyper: give it as in partial\(step, ns_steps=...\)'):
        MultiTensorOptimizer(params(), muon_step, lr=.1, mom=.9, ns_steps=0)
    with pytest.raises(TypeError, match='`options` must map names to a `hyper` each'): stepper(options=dict(n=3))(lambda p, grad, **kwargs: None)
    with pytest.raises(TypeError, match='`flags` must map names to a `flag` each'): stepper(flags=dict(do_it=True))(lambda p, grad, **kwargs: None)

# `around`

@stepper(hypers=dict(reach=hyper(.5, 0, 1, closed=True)), state=dict(start=torch.clone), anchored='start')
def remember(p, grad, start, **kwargs): pass

@stepper(hypers=dict(pull=hyper(.1, 0, 1)))
def pull_back(p, grad, start, pull, **kwargs): torch._foreach_lerp_(p, start, pull)

makers = [stock.SGD, torch.optim.SGD, [sgd_step], as_torch(partial(MultiTensorOptimizer, cbs=sgd_step)), partial(MultiTensorOptimizer, cbs=sgd_step), lambda ps, lr: torch.optim.SGD(ps, lr=lr)]
built = [torch.optim.SGD, stock.SGD, partial(MultiTensorOptimizer, cbs=sgd_step), as_torch(partial(MultiTensorOptimizer, cbs=sgd_step))]

@pytest.mark.parametrize('opt_func', makers)
def test_around_any(opt_func):
    "the same numbers, and hypers that a schedule can set"
    ps,qs = params(),params()
    opt = around(opt_func, [remember], [pull_back], pull=.2)(ps, lr=.1)
    plain = MultiTensorOptimizer(qs, [remember, sgd_step, pull_back], lr=.1, pull=.2)
    for o in (opt, plain): go(o, o.param_lists[0], 3)
    for o in (opt, plain):
        o.set_hypers(pull=.3, lr=.05)
        go(o, o.param_lists[0], 3, 3)
    assert all(map(torch.allclose, ps, qs)) and opt.hypers[0]['pull'] == .3

@pytest.mark.parametrize('opt_func', built)
def test_around_what_is_built(opt_func):
    ps,qs = params(),params()
    opt,plain = around(opt_func(ps, lr=.1), [remember], [pull_back], pull=.2),MultiTensorOptimizer(qs, [remember, sgd_step, pull_back], lr=.1, pull=.2)
    go(opt, ps, 6), go(plain, qs, 6)
    assert all(map(torch.allclose, ps, qs)) and type(opt) is MultiTensorOptimizer

def test_what_around_refuses():
    with pytest.raises(ValueError, match='`pull` must be a number'): around(stock.SGD, [remember], [pull_back], pull=2)
    with pytest.raises(ValueError, match='there is no hyper `pul`: did you mean `pull`'): around(stock.SGD, [remember], [pull_back], pul=.2)
    with pytest.raises(TypeError, match='a stepper must be a function'): around(stock.SGD, [3])
    with pytest.raises(ValueError, match='`around` cannot be put around 3: it makes no optimizer|cannot be put around int'): around(3, [remember])
    with pytest.raises(ValueError, match='it has slow weights already'): around(ranger, [slow_weights], [lookahead_step])(params(), lr=.1)
    assert 'start' in around(ranger, after=[remember, pull_back])(params(), lr=.1).declared.starters # no slow weights
    twice = around(around(stock.SGD, [remember], [pull_back]), [remember], [pull_back])
    with pytest.raises(ValueError, match=r'`around` cannot be put around around\(SGD\): it has its own `pull` and `reach`'): twice(params(), lr=.1)

# Two adaptors that compose

@pytest.mark.parametrize('opt_func,same_as', [(as_torch(lookahead(torch.optim.SGD)), lookahead(stock.SGD)), (lookahead(as_torch(RAdam)), lookahead(RAdam)), (as_torch(lookahead(as_torch(RAdam))), lookahead(RAdam)),
    (as_torch(diloco(torch.optim.SGD)), diloco(stock.SGD)), (as_torch(diloco(ranger)), diloco(ranger)), (diloco(as_torch(ranger)), diloco(ranger)), (Ranger, ranger), (RangerMuon, ranger_muon)])
def test_adaptors_compose(opt_func, same_as):
    ps,qs = params(),params()
    go(opt_func(ps, lr=.05), ps, 40), go(same_as(qs, lr=.05), qs, 40)
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p,q in zip(ps, qs))

def test_pytorchs_names_go_through():
    opt = lookahead(as_torch(RAdam))(params(), lr=.1, betas=(.8, .9), weight_decay=.3)
    assert (opt.hypers[0]['mom'], opt.hypers[0]['sqr_mom'], opt.hypers[0]['wd']) == (.8, .9, .3)

@pytest.mark.parametrize('f', [torch.optim.AdamW, partial(torch.optim.SGD, momentum=.9), torch.optim.Adagrad])
def test_goes_on_from_a_checkpoint_of_01(f):
    "of Lookahead around PyTorch's: made key by key"
    ps,qs = params(),params()
    plain = f(ps, lr=.05)
    slow = [p.detach().clone() for p in ps]
    for i in range(8):
        go(plain, ps, 1, i)
        if i==5:
            for p,s in zip(ps, slow):
                with torch.no_grad(): p.copy_(s.lerp_(p, .5))
    ahead = dict(state=[dict(slow=s.clone(), slow_step=8) for s in slow], hypers=[dict(k=6, alpha=.5)])
    opt = lookahead(f)(qs, lr=.3)
    with torch.no_grad():
        for p,q in zip(ps, qs): q.copy_(p)
    opt.load_state_dict(through_a_file({**plain.state_dict(), 'lookahead': ahead}))
    go(opt, qs, 9, 8)
    for i in range(8, 17):
        go(plain, ps, 1, i)
        if i==11:
            for p,s in zip(ps, slow):
                with torch.no_grad(): p.copy_(s.lerp_(p, .5))
    assert equal(ps, qs) and opt.hypers[0]['lr'] == .05

def test_a_stepper_changes_the_gradient_of_pytorchs():
    @stepper()
    def double(p, grad, **kwargs): return dict(grad=[2*g for g in grad])
    ps,qs = params(),params()
    opt = MultiTensorOptimizer(ps, [double, from_torch(torch.optim.SGD, momentum=.9)], lr=.1)
    go(opt, ps, 5)
    g = ps[0].grad
    opt.step()
    assert ps[0].grad is g
    plain = torch.optim.SGD(qs, lr=.2, momentum=.9)
    go(plain, qs, 5)
    plain.step()
    assert all(map(torch.allclose, ps, qs))

def test_what_from_torch_refuses():
    for o in (stock.SGD, 3, sgd_step):
        with pytest.raises(TypeError, match='`opt` must be an optimizer of PyTorch or a class of them'): from_torch(o)

# What reading found

def test_a_keyword_of_a_partial_is_fixed():
    "in a route, and beside a stepper that has a hyper of that name"
    def decays(*cbs):
        p = nn.Parameter(torch.ones(2, dtype=torch.float64))
        opt = MultiTensorOptimizer([p], list(cbs), lr=.1)
        p.grad = torch.zeros_like(p)
        opt.step()
        return p[0].item()
    half = partial(weight_decay, wd=.5)
    for cbs in ([half, sgd_step], [route('do_x', [half, sgd_step], [sgd_step], by=True)], [half, weight_decay, sgd_step]): assert decays(*cbs) == pytest.approx(.95)

def test_generators_select():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = muon(m.parameters(), lr=.1, hidden=lambda m: (o.weight for o in m[:1]))
    opt.set_flags(m)
    assert [p is m[0].weight for p in opt.params_with('do_muon')] == [True]
    opt.set_flag('do_muon', (o.weight for o in m[1:]), True)
    assert len(opt.params_with('do_muon')) == 3
    with pytest.raises(ValueError, match='there is no flag `do_muno`: known are do_muon, do_wd'): opt.set_flag('do_muno', m.parameters(), True)

def test_flags_of_routes_in_routes_stay():
    inner = route('do_b', [average_grad, momentum_step, step_stat], [sgd_step], by=True)
    ps = params()
    opt = MultiTensorOptimizer(ps, [route('do_a', [inner], [sgd_step], by=True), fused_averages], lr=.1, mom=.9, sqr_mom=.99)
    go(opt, ps, 3)
    opt.set_flag('do_b', ps[:1], False)
    opt.set_flag('do_a', ps[:1], False)
    opt.set_flag('do_b', ps[:1], True)
    assert not opt.has_flag('do_a', ps[0]) and opt.has_flag('do_b', ps[0]) and opt.state[ps[0]]['step'] > 0 # that of `fused_averages`

@pytest.mark.parametrize('f', [partial(torch.optim.Adam, lr=.1), partial(stock.Adam, lr=.1)])
def test_state_of_what_is_built_stays(f):
    ps,qs = params(),params()
    plain,inside = f(ps),f(qs)
    go(plain, ps, 5), go(inside, qs, 5)
    opt = lookahead(inside, k=100)
    opt.state_dict()
    go(plain, ps, 5, 5), go(opt, qs, 5, 5)
    assert all(map(torch.allclose, ps, qs))

def test_checkpoints_of_the_optimizer_inside():
    "plain, or of `lookahead`, into `as_torch` of it"
    f = partial(torch.optim.SGD, momentum=.9)
    for made in (f, lookahead(f)):
        ps,qs = params(),params()
        opt,other = made(ps, lr=.1),as_torch(lookahead(f))(qs, lr=.3)
        go(opt, ps, 4)
        with torch.no_grad():
            for p,q in zip(ps, qs): q.copy_(p)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # slow weights start anew
            other.load_state_dict(through_a_file(opt.state_dict()))
        go(opt, ps, 2, 4), go(other, qs, 2, 4)
        assert all(map(torch.allclose, ps, qs)) and other.param_groups[0]['lr'] == .1

@pytest.mark.parametrize('opt_func', [lookahead(torch.optim.AdamW), lookahead(torch.optim.SGD), around(torch.optim.AdamW, [centralize])])
def test_a_checkpoint_before_the_first_step(opt_func):
    "of `as_torch`, with flags alone, is not taken for one of PyTorch's"
    ps,qs = params(),params()
    opt,other = as_torch(opt_func)(ps, lr=.1),as_torch(opt_func)(qs, lr=.3)
    opt.inner.state[ps[1]]['do_wd'] = False
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.state[qs[1]] == {'do_wd': False} and other.param_groups[0]['lr'] == .1
    assert equal(go(opt, ps, 8), go(other, qs, 8))

def test_a_group_that_was_added_has_its_state():
    f = as_torch(lookahead(partial(torch.optim.SGD, momentum=.9)))
    def made(ps):
        opt = f(ps[:1], lr=.1)
        opt.add_param_group(dict(params=ps[1:]))
        return opt
    ps,qs = params(),params()
    opt,other = made(ps),made(qs)
    go(opt, ps, 4)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert all('inner' in other.state[q] for q in qs)

def test_weights_that_come_back_bring_anchored_state_alone():
    ps = params()
    opt = ranger_muon(ps, lr=.1)
    go(opt, ps, 3)
    old = [p.detach().clone() for p in ps]
    def load(values):
        opt.before_load(ps)
        with torch.no_grad():
            for p,v in zip(ps, values): p.copy_(v)
        opt.after_load(ps)
    load([torch.zeros_like(p) for p in ps])
    opt.set_flag('do_muon', ps[:1], False)
    load(old)
    assert 'slow' in opt.state[ps[0]] and not {'grad_avg', 'step'} & set(opt.state[ps[0]])

@pytest.mark.parametrize('opt_func', [torch.optim.SGD, partial(stock.SGD, mom=0.), ranger])
def test_hypers_of_the_steppers_around(opt_func):
    "are theirs, also where PyTorch's optimizer has one of that name"
    opt = around(opt_func, [weight_decay], wd=.5)(params(), lr=.1)
    assert opt.hypers[0]['wd'] == .5 and not any(g.get('weight_decay') for f in opt.declared.guests for g in f.torch.param_groups)

def test_one_optimizer_of_pytorch():
    with pytest.raises(ValueError, match='`cbs` can have one optimizer of PyTorch, got 2'): MultiTensorOptimizer(params(), [from_torch(torch.optim.SGD), from_torch(torch.optim.Adam)], lr=.1)

def test_no_synchronising_in_a_route():
    with pytest.raises(ValueError, match='lookahead_step synchronises slow weights: put it after the route'): route('do_x', [slow_weights, sgd_step, lookahead_step], [sgd_step], by=True)

def test_options_of_a_group():
    for k in ('rectified', 'decouple_wd'):
        with pytest.raises(ValueError, match=f'ranger cannot have {k}=False'): Ranger([dict(params=params(), **{k: False})], lr=.1)
    Ranger([dict(params=params(), rectified=True)], lr=.1)

def test_names_of_classes(): assert [as_torch(o).__name__ for o in (lookahead(torch.optim.SGD), diloco(ranger), ranger_muon)] == ['LookaheadSGD', 'DilocoRanger', 'RangerMuon']
