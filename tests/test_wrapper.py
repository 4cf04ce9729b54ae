"`lookahead` around fastai's optimizers, PyTorch's and others', in a `Learner` and in a bare loop"
import copy, pickle, warnings, weakref
from functools import partial
from operator import getitem

import fastai.optimizer as stock
import pytest
import torch
from fastai.callback.core import Callback
import fastai.callback.schedule
from fastai.data.core import Datasets
from fastai.learner import Learner, load_learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from helpers import Skip, Until, equal, inner, load, param, same, slow, state, through_a_file
from workflows import digits_learner, fit, weights

stepwise = [torch.optim.SGD, stock.SGD] # one for each of the two roads

def of(module, name, **kwargs):
    "An `opt_func` of another package, if that is installed"
    return lambda: partial(getattr(pytest.importorskip(module), name), **kwargs)

def own_step(p, lr, damp, **kwargs): p.data.add_(p.grad.data.sign(), alpha=-lr*damp)

in_learner = dict(
    SGD=lambda: stock.SGD, momentum=lambda: partial(stock.SGD, mom=.9), RMSProp=lambda: stock.RMSProp, Adam=lambda: stock.Adam, QHAdam=lambda: partial(stock.QHAdam, wd=.1),
    Larc=lambda: stock.Larc, Lamb=lambda: stock.Lamb, RAdam=lambda: stock.RAdam, ours=lambda: RAdam, steppers=lambda: [weight_decay, sgd_step], own=lambda: [own_step],
    wrapped=lambda: partial(OptimWrapper, opt=torch.optim.AdamW), torch_sgd=lambda: torch.optim.SGD, torch_rms=lambda: partial(torch.optim.RMSprop, momentum=.5),
    torch_adam=lambda: torch.optim.AdamW, fused=lambda: partial(torch.optim.Adam, fused=True), built=lambda: 'built',
    optimi=of('optimi', 'AdamW', triton=False), stable=of('optimi', 'StableAdamW', triton=False), lion=of('optimi', 'Lion', triton=False), free=of('schedulefree', 'AdamWScheduleFree'),
    belief=of('pytorch_optimizer', 'AdaBelief'), adan=of('pytorch_optimizer', 'Adan'))

class Free(Callback):
    "What schedule-free optimizers need"
    def set(self, mode):
        if hasattr(o := inner(self.opt), mode): getattr(o, mode)()
    def before_train(self): self.set('train')
    def after_train(self): self.set('eval')

def learner(x, *cbs, **kwargs):
    "A `Learner` with Lookahead around `in_learner[x]`"
    opt_func,k = in_learner[x](),dict(k=3, alpha=.6)
    learn = digits_learner(None, cbs=[Free(), *cbs], **{**dict(lr=1e-2), **kwargs})
    if opt_func=='built': learn.opt_func = lookahead(OptimWrapper(learn.splitter(learn.model), torch.optim.AdamW, lr=1e-2), **k)
    else: learn.opt_func = lookahead(opt_func, **k)
    if x=='own': learn.opt_func = partial(learn.opt_func, damp=.1)
    return learn

def ahead_of(learn): return [{k: s[k] for k in ('slow', 'slow_step')} for s in state(learn)]

def moved(a, b): return not any(map(torch.equal, a, b))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('x', in_learner)
def test_in_a_learner(x, tmp_path):
    "Trains; is resumed in mid-cycle to the bit; is exported and trains on; is frozen and unfrozen"
    whole,other = learner(x, Until(4)),learner(x, Skip(4))
    start = weights(whole.model)
    fit(whole, 2, 1e-2)
    assert moved(start, weights(whole.model)) and whole.recorder.losses[-1] < whole.recorder.losses[0]
    load(other, whole.path/whole.model_dir/'x')
    fit(other, 2, 1e-2)
    assert equal(weights(whole.model), weights(other.model)) and same(state(whole), state(other))

    learn = learner(x, splitter=params)
    learn.opt_func = learn.opt_func if x=='built' else partial(learn.opt_func, lr=1e-2)
    fit(learn, 1, 1e-2)
    xs,ys = zip(*learn.dls.train_ds[:16])
    dls,learn.dls = learn.dls,Datasets(range(16), [[partial(getitem, xs)], [partial(getitem, ys)]]).dataloaders(bs=8)
    learn.path = tmp_path
    ws,ahead = weights(learn.model),ahead_of(learn)
    learn.export('x.pkl')
    assert equal(ws, weights(learn.model)) and same(ahead, ahead_of(learn))
    again = load_learner(tmp_path/'x.pkl')
    assert equal(ws, weights(again.model))
    again.dls = dls
    fit(again, 1, 1e-2)
    assert moved(ws, weights(again.model)) and again.opt.has_slow_weights and again.opt.hypers[0]['k'] == 3

    learn = other
    learn.freeze()
    assert not any('slow' in s for s in state(learn))
    ws = weights(learn.model)
    fit(learn, 1, 1e-2, wd=.1)
    frozen = [not p.requires_grad for p in learn.model.parameters()]
    assert any(frozen) and all(torch.equal(a, b) == f for a,b,f in zip(ws, weights(learn.model), frozen))
    learn.unfreeze()
    ws = weights(learn.model)
    fit(learn, 1, 1e-2)
    assert moved(ws, weights(learn.model)) and all('slow' in s for s in state(learn))

# The numbers

def walk(opt, p, n=6, step=None):
    def one():
        p.grad = torch.ones_like(p)
        (step or opt.step)()
        return p.item()
    return [one() for _ in range(n)]

there = [.9, .8, .85, .75, .65, .7]

forms = [lambda p: [p], lambda p: iter([p]), lambda p: [[p]]] # PyTorch's own take no list of lists
sgds = [stock.SGD, torch.optim.SGD, partial(OptimWrapper, opt=torch.optim.SGD), [sgd_step], [stock.sgd_step]]

@pytest.mark.parametrize('opt_func,form', [*((o, f) for o in sgds for f in forms), *((lambda ps, lr: torch.optim.SGD(ps, lr=lr), f) for f in forms[:2])])
def test_walk(opt_func, form):
    p = param(1.)
    assert walk(lookahead(opt_func, k=3)(form(p), lr=.1), p) == pytest.approx(there)

@pytest.mark.parametrize('built', [torch.optim.SGD, lambda ps, lr: OptimWrapper(ps, torch.optim.SGD, lr=lr)])
def test_walk_of_what_is_built(built):
    p = param(1.)
    opt = lookahead(built([p], lr=.1), k=3)
    assert type(inner(opt)) is torch.optim.SGD and walk(opt, p) == pytest.approx(there)

fastais = dict(SGD=stock.SGD, momentum=partial(stock.SGD, mom=.9, wd=.1), sgd_l2=partial(stock.SGD, mom=.9, wd=.1, decouple_wd=False), RMSProp=stock.RMSProp,
               rms_momentum=partial(stock.RMSProp, mom=.9, wd=.1), Adam=stock.Adam, adam_l2=partial(stock.Adam, decouple_wd=False, wd=.1), QHAdam=partial(stock.QHAdam, wd=.1),
               Larc=partial(stock.Larc, trust_coeff=1.5, wd=.1), LARS=partial(stock.Larc, clip=False), Lamb=stock.Lamb, RAdam=stock.RAdam, sadam=partial(stock.RAdam, beta=9., wd=.1))

def twenty(opt_func, lr=(1e-2, 3e-2)):
    torch.manual_seed(0)
    gs = [[torch.nn.Parameter(torch.randn(*o, dtype=torch.float64)) for o in ((5, 3), (3,))],[torch.nn.Parameter(torch.randn(2, 3, dtype=torch.float64)) for _ in range(4)]]
    opt = opt_func(gs, lr=list(lr))
    for p in (gs[0][1], gs[1][1]): opt.state[p]['do_wd'] = False
    for i in range(20):
        for p in sum(gs, []): p.grad = torch.randn_like(p)
        if i==7: opt.set_hyper('wd', .3)
        opt.step()
    return sum(gs, []),opt

@pytest.mark.parametrize('name', fastais)
def test_fastais_lookahead(name):
    "gives the same, of several groups, some of which do not decay"
    f = fastais[name]
    (theirs,_),(ours,opt) = twenty(lambda ps, lr: stock.Lookahead(f(ps, lr=lr), k=3, alpha=.6)),twenty(lookahead(f, k=3, alpha=.6))
    assert max((a-b).abs().max().item() for a,b in zip(theirs, ours)) < 1e-12
    assert type(opt) is MultiTensorOptimizer and [o['lr'] for o in opt.hypers] == [1e-2, 3e-2]
    assert not {getattr(o, 'func', o) for o in opt.cbs} & {stock.weight_decay, stock.l2_reg, stock.average_grad, stock.average_sqr_grad, stock.step_stat, stock.sgd_step, stock.momentum_step, stock.radam_step}

def by_hand(opt, ps, grad, n=20, k=6, alpha=.5):
    for i in range(n):
        if not i%k: start = [p.detach().clone() for p in ps]
        for p in ps: p.grad = grad(p)
        opt.step()
        if not (i+1)%k:
            with torch.no_grad():
                for p,s in zip(ps, start): p.copy_(s + alpha*(p-s))

@pytest.mark.parametrize('f', [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Adafactor])
def test_torch_by_hand(f):
    def run(go):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(*o, dtype=torch.float64)) for o in ((5, 3), (3,))]
        go(ps)
        return ps
    def ours(ps):
        opt = lookahead(f)(ps, lr=.1)
        for _ in range(20):
            for p in ps: p.grad = torch.randn_like(p)
            opt.step()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a,b in zip(run(lambda ps: by_hand(f(ps, lr=.1), ps, torch.randn_like)), run(ours)))

# PyTorch's way of stepping

def quadratic(opt, p, **kwargs):
    def closure():
        opt.zero_grad()
        loss = ((p-torch.arange(4.))**2 * torch.arange(1., 5)).sum()
        loss.backward()
        return loss
    return opt.step(closure, **kwargs) if not kwargs else opt.step(closure=closure)

@pytest.mark.parametrize('f', [partial(torch.optim.LBFGS, max_iter=2), torch.optim.SGD])
@pytest.mark.parametrize('keyword', [{}, dict(keyword=True)])
def test_closure(f, keyword):
    p,q = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt,plain = lookahead(f, k=2)([p], lr=.02),f([q], lr=.02)
    for i in range(6):
        if not i%2: start = q.detach().clone()
        losses = quadratic(opt, p, **keyword),quadratic(plain, q)
        if i%2:
            with torch.no_grad(): q.lerp_(start, .5)
        assert torch.equal(*losses) and torch.allclose(p, q)
        assert opt.state[p]['slow_step'] == i+1 and torch.equal(opt.state[p]['slow'], torch.zeros(4)) == (i==0)

def test_users_hooks_run():
    p,seen = param(1.),[]
    opt = torch.optim.SGD([p], lr=.1)
    opt.register_step_pre_hook(lambda *_: seen.append('before'))
    opt = lookahead(opt, k=1)
    inner(opt).register_step_post_hook(lambda *_: seen.append(p.item()))
    walk(opt, p, 1)
    assert seen == ['before', pytest.approx(.9)] and p.item() == pytest.approx(.95)

def test_zero_grad():
    p = param(1.)
    opt = lookahead(torch.optim.SGD([p], lr=.1))
    p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=False)
    assert p.grad.item() == 0
    opt.zero_grad()
    assert p.grad is None

def test_a_step_that_calls_its_parents():
    "is one update"
    class Decayed(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad(): self.param_groups[0]['params'][0].mul_(.5)
            return super().step(closure)
    torch.optim.SGD([param(1.)], lr=.1) # hooks into its `step`
    p = param(1.)
    opt = lookahead(Decayed([p], lr=.1), k=2)
    walk(opt, p, 1)
    assert opt.state[p]['slow_step'] == 1 and p.item() == pytest.approx(.4)
    walk(opt, p, 1)
    assert p.item() == pytest.approx((1+.1)/2)

def test_gradients_that_are_dropped():
    class Drops(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]['params']: p.grad = None
    p = param(1.)
    assert walk(lookahead(Drops([p], lr=.1), k=3), p) == pytest.approx(there)

def test_only_what_takes_part():
    a,b = param(1.),param(1.)
    opt = lookahead(torch.optim.SGD([a, b], lr=.1, weight_decay=.1), k=2)
    walk(opt, a, 3)
    assert b.item() == 1 and 'slow' not in opt.state[b] and opt.state[a]['slow_step'] == 3
    with torch.no_grad(): opt.state[a]['slow'].fill_(5.)
    a.grad = None
    walk(opt, b, 1)
    assert opt.state[a]['slow_step'] == 3 and opt.state[b]['slow_step'] == 1 and opt.state[b]['slow'].item() == 1

def test_failed_step():
    "A step that raises before it gets to an update leaves Lookahead as it was"
    p = param(1.)
    opt = lookahead(torch.optim.SGD([p], lr=.1), k=3)
    def closure(): raise ZeroDivisionError
    res = walk(opt, p, 2)
    with pytest.raises(ZeroDivisionError): opt.step(closure)
    assert res + walk(opt, p, 4) == pytest.approx(there)

def test_scheduler():
    p = param(1.)
    for late in (True, False):
        opt = torch.optim.SGD([p], lr=.1)
        if late: ahead = lookahead(opt)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            sched = torch.optim.lr_scheduler.StepLR(opt, 1)
            if not late: ahead = lookahead(opt)
            walk(ahead, p, 2)
            sched.step()
        assert ahead.hypers[0]['lr'] == pytest.approx(.01) and ahead.state[p]['slow_step'] == 2

def test_add_param_group():
    a,b = param(1.),param(1.)
    opt = as_torch(lookahead(torch.optim.SGD, k=3))([a], lr=.1)
    walk(opt, a, 1)
    opt.add_param_group(dict(params=[b], lr=.2, alpha=0.))
    assert [g['k'] for g in opt.param_groups] == [3, 3]
    for _ in range(2):
        walk(opt, b, 1)
        walk(opt, a, 0)
    assert b.item() == pytest.approx(.6)
    a.grad = None
    walk(opt, b, 1)
    assert b.item() == 1 and [g['lr'] for g in inner(opt.inner).param_groups] == [.1, .2]
    other = as_torch(lookahead(torch.optim.SGD))([{'params': [param(1.)]}, {'params': [param(1.)]}], lr=.1)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [g['alpha'] for g in other.param_groups] == [.5, 0.]

def test_stays_out_of_the_optimizers_state():
    p = param(1.)
    opt = lookahead(torch.optim.RMSprop([p], lr=.1), k=4)
    opt.set_hyper('sqr_mom', .7)
    opt.set_hyper('alpha', .2)
    walk(opt, p, 2)
    plain = torch.optim.RMSprop([q := param(1.)], lr=.1)
    walk(plain, q, 2)
    assert set(opt.state[p]['inner']) == set(plain.state[q]) and set(inner(opt).param_groups[0]) == set(plain.param_groups[0])
    assert inner(opt).param_groups[0]['alpha'] == .7 == opt.hypers[0]['sqr_mom'] and opt.hypers[0]['alpha'] == .2

# Checkpoints

def stepped(p, n, f=torch.optim.AdamW, lr=.1, **kwargs):
    opt = lookahead(f([p], lr=lr), **kwargs)
    walk(opt, p, n)
    return opt

def test_state_dict_keeps_its_hypers():
    opt = stepped(param(1.), 2)
    sd = opt.state_dict()
    opt.set_hypers(k=2, lr=.5)
    assert sd['lookahead']['hypers'] == [dict(k=6, alpha=.5)] and sd['param_groups'][0]['lr'] == .1

def test_plain_checkpoints():
    p,q = param(1.),param(1.)
    opt,plain = stepped(p, 4, k=3, alpha=.3),torch.optim.AdamW([q], lr=.1)
    walk(plain, q, 4)
    with pytest.warns(UserWarning, match='the checkpoint has no `slow`, `slow_step`: started anew'): opt.load_state_dict(plain.state_dict())
    with torch.no_grad(): p.copy_(q)
    assert set(opt.state[p]) == {'inner'} and opt.hypers[0]['k'] == 3
    start = p.item()
    fast = walk(plain, q, 3)
    assert walk(opt, p, 3) == pytest.approx([*fast[:2], start+.3*(fast[2]-start)])
    plain.load_state_dict(through_a_file(opt.state_dict()))
    walk(plain, q, 1)
    assert set(plain.state_dict()) == {'state', 'param_groups'} and set(plain.state[q]) == {'step', 'exp_avg', 'exp_avg_sq'}

def test_plain_checkpoint_in_a_learner():
    plain,learn = (digits_learner(f) for f in (partial(OptimWrapper, opt=torch.optim.AdamW), lookahead(torch.optim.AdamW, k=3)))
    fit(plain).save('x')
    with pytest.warns(UserWarning, match='the checkpoint has no `slow`'): load(learn, plain.path/plain.model_dir/'x')
    assert equal(weights(plain.model), weights(fit(learn, lr=0, wd=0).model))
    fit(learn).save('x')
    load(plain, learn.path/learn.model_dir/'x')
    assert equal(weights(plain.model), weights(learn.model))

def test_what_pytorch_refuses_changes_nothing():
    p,q = param(1.),param(1.)
    opt,sd = stepped(p, 4),copy.deepcopy(stepped(q, 5, lr=.2, k=4).state_dict())
    sd['param_groups'].append(dict(params=[]))
    with pytest.raises(ValueError, match='the checkpoint has 1 parameter groups, this optimizer has 2'), pytest.warns(UserWarning): opt.load_state_dict(sd)
    assert opt.state[p]['slow_step'] == 4 and opt.state[p]['inner']['step'] == 4 and opt.hypers[0]['k'] == 6 and opt.hypers[0]['lr'] == .1

@pytest.mark.parametrize('again', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), lambda o: pickle.loads(pickle.dumps(copy.deepcopy(o)))])
def test_copies(again):
    "go their own way, with Lookahead"
    p = param(1.)
    opt = lookahead(torch.optim.SGD([p], lr=.1), k=3)
    walk(opt, p, 2)
    other = again(opt)
    q = other.param_lists[0][0]
    res = walk(other, q, 2)
    assert q is not p and res == pytest.approx(there[2:4]) and set(other.state) == {q} and p.item() == pytest.approx(.8)
    assert other.state_dict()['lookahead']['state'][0]['slow_step'] == 4 and opt.state[p]['slow_step'] == 2
    assert walk(opt, p, 2) == res

@pytest.mark.parametrize('f', [stock.Adam, torch.optim.Adam, partial(stock.Adam, lr=.1), partial(OptimWrapper, opt=torch.optim.Adam, lr=.1)])
def test_picklable(f):
    opt_func = pickle.loads(pickle.dumps(lookahead(f, k=3)))
    p = param(1.)
    assert opt_func([p], lr=.2).hypers[0]['k'] == 3 and opt_func.keywords.get('lr') == (.1 if isinstance(f, partial) else None)
    learn = digits_learner(opt_func)
    learn.create_opt()
    assert learn.opt.hypers[0]['lr'] == (.1 if isinstance(f, partial) else 1e-3)

# As in `ranger`

@pytest.mark.parametrize('f', stepwise)
@pytest.mark.parametrize('n', (1, 3, 5))
def test_loaded_weights_are_a_new_start(f, n):
    learn = fit(digits_learner(lookahead(f, k=3)), lr=.1)
    learn.save('x')
    class Cut(Callback):
        def before_batch(self):
            if self.training and self.train_iter==n: self.learn.load('x', with_opt=False)
    learn = fit(learn, lr=.1, cbs=Cut()).load('x', with_opt=False)
    before = weights(learn.model)
    assert equal(before, weights(fit(learn, lr=0, wd=None if f is torch.optim.SGD else 0).model)) and learn.opt.state[next(learn.model.parameters())]['slow_step'] == 8

@pytest.mark.parametrize('f', stepwise)
def test_a_series_of_changes_is_training(f):
    a,b = param(1.),param(1.)
    opt = lookahead(f, k=3)([a, b], lr=.1)
    for i in range(20):
        a.grad,b.grad = torch.ones_like(a),torch.ones_like(b)
        opt.step()
        with torch.no_grad():
            for p in (a, b): p.clamp_(min=-.3)
    assert min(opt.state[p]['slow_step'] for p in (a, b)) == 20 and a.item() == b.item() > -.31

def test_lr_find_leaves_nothing_behind():
    learn = fit(digits_learner(lookahead(torch.optim.AdamW)))
    ws,ahead,hypers = weights(learn.model),ahead_of(learn),copy.deepcopy(learn.opt.hypers)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
    assert equal(ws, weights(learn.model)) and same(ahead, ahead_of(learn)) and learn.opt.hypers == hypers

@pytest.mark.parametrize('f', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('end', (True, False))
def test_slow_weights_callback(f, end):
    def go(*cbs): return fit(digits_learner(lookahead(f), cbs=list(cbs)), 2, 1e-2)
    plain,learn = go(),go(SlowWeights(end=end))
    assert equal(slow(learn), slow(plain)) and equal(weights(learn.model), slow(plain) if end else weights(plain.model)) and not equal(slow(plain), weights(plain.model))
    assert learn.recorder.values[-1] != plain.recorder.values[-1]
    assert all((o['slow_step']==0) == end and 'fast' not in o for o in state(learn))

def test_schedules_reach_the_optimizer():
    for f in (stock.Adam, torch.optim.Adam):
        learn = fit(digits_learner(lookahead(f, k=3)), 2, 1e-2, method=Learner.fit_one_cycle)
        theirs = fit(digits_learner(lambda ps, lr: stock.Lookahead(stock.Adam(ps, lr=lr), k=3)), 2, 1e-2, method=Learner.fit_one_cycle)
        assert learn.recorder.hps['mom'] == theirs.recorder.hps['mom'] and learn.recorder.lrs == theirs.recorder.lrs

def test_rates_of_the_groups():
    learn = digits_learner(lookahead(stock.Adam), lr=slice(1e-4, 1e-2))
    learn.create_opt()
    assert [o['lr'] for o in learn.opt.hypers] == pytest.approx([1e-4, 1e-2])

def test_norms_and_biases_do_not_decay():
    learn = fit(digits_learner(lookahead([weight_decay, sgd_step])), lr=.1, wd=0)
    states = state(learn)
    assert any('do_wd' in o for o in states) and not all('do_wd' in o for o in states)
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    before = weights(learn.model)
    learn.opt.set_hyper('wd', .1)
    learn.opt.step()
    assert [torch.equal(a, b) for a,b in zip(before, weights(learn.model))] == ['do_wd' in o or not b.any() for o,b in zip(states, before)]

def test_what_a_built_wrapper_knows_is_kept():
    p = param(1.)
    built = OptimWrapper([p], torch.optim.SGD, hp_map={'momentum': 'm'}, lr=.1)
    built.state[p]['force_train'] = True
    opt = lookahead(built)
    opt.freeze_to(1)
    opt.clear_state()
    assert p.requires_grad and opt.state[p] == {'force_train': True} and opt.hypers[0]['m'] == 0

def test_frozen_batchnorm_is_trained():
    learn = digits_learner(lookahead(torch.optim.SGD))
    learn.freeze()
    assert any('force_train' in o for o in state(learn)) and learn.opt.frozen_idx == 1
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    learn.freeze()
    assert all((p.grad is None) != p.requires_grad for p in learn.model.parameters())

def test_cleared_state_is_freed():
    p = param(1.)
    opt = stepped(p, 2)
    gone = weakref.ref(opt.state[p]['slow'])
    opt.clear_state()
    assert gone() is None and inner(opt).state == {}

# What is refused

class OwnStep(stock.Optimizer):
    def step(self, closure=None): pass

class OwnWrapper(OptimWrapper): pass

class Groups:
    param_groups = [dict(params=[], lr=.1)]

def with_k(p, lr, k, **kwargs): pass

@pytest.mark.parametrize('f,message', [
    (ranger, 'ranger: it has slow weights already'), (stock.ranger, 'slow weights already'), (lambda ps, lr: stock.Lookahead(stock.SGD(ps, lr)), 'slow weights already'),
    (lookahead(stock.Adam), 'slow weights already'), (lookahead(torch.optim.Adam), 'slow weights already'), ([slow_weights, sgd_step], 'slow weights already'),
    (lambda ps, lr: OwnStep(ps, [stock.sgd_step], lr=lr), 'OwnStep has a `step` of its own'), (partial(OwnWrapper, opt=torch.optim.SGD), 'OwnWrapper may do more'),
    (lambda ps, lr: OptimWrapper(opt=Groups()), 'a Groups has no hooks'), ([with_k], 'its own `k`'), ([partial(with_k, k=3)], 'its own `k`'), (partial(stock.Optimizer, cbs=[stock.sgd_step], alpha=1), 'its own `alpha`'),
    (lambda ps, lr: 3, 'it makes a int, which is no optimizer'), (lambda ps, lr: None, 'it makes a NoneType')])
def test_refused(f, message):
    p = param(1.)
    with pytest.raises(ValueError, match=message): lookahead(f)([p], lr=.1)

@pytest.mark.parametrize('module,name', [('optimi', 'Ranger'), ('pytorch_optimizer', 'Ranger')])
def test_others_rangers_are_refused(module, name):
    with pytest.raises(ValueError, match='slow weights already'): lookahead(getattr(pytest.importorskip(module), name))([param(1.)], lr=.1)

@pytest.mark.parametrize('module', ['timm.optim', 'pytorch_optimizer'])
def test_others_lookahead_is_refused(module):
    with pytest.raises(ValueError, match='slow weights already'): lookahead(pytest.importorskip(module).Lookahead(torch.optim.SGD([param(1.)], lr=.1)))

def test_refused_at_once():
    for kwargs in (dict(k=0), dict(k=2.5), dict(alpha=-1), dict(alpha=1.5), dict(alpha=None)):
        with pytest.raises(ValueError, match=f'`{next(iter(kwargs))}` must be'): lookahead(stock.Adam, **kwargs)
    for o in (3, None):
        with pytest.raises(ValueError, match='it makes no optimizer'): lookahead(o)

@pytest.mark.parametrize('form', [lambda o: o, lambda o: OptimWrapper(opt=o)])
def test_refused_with_nothing_changed_in_what_is_built(form):
    p = param(1.)
    opt = torch.optim.SGD([p], lr=.1)
    for kwargs in (dict(k=0), dict(alpha=2)):
        with pytest.raises(ValueError): lookahead(form(opt), **kwargs)
    assert walk(lookahead(form(opt), k=3), p) == pytest.approx(there)

@pytest.mark.parametrize('fused', (False, True))
def test_updates_that_a_grad_scaler_skips(fused):
    "A fused optimizer skips them in its kernel: Lookahead does not count them either"
    p = torch.nn.Parameter(torch.ones(3))
    opt,scaler = as_torch(lookahead(partial(torch.optim.AdamW, fused=fused)))([p], lr=.1),torch.amp.GradScaler('cpu', init_scale=4.)
    for i in range(8):
        scaler.scale((p*(float('inf') if i in (0, 4) else 1.)).sum()).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    state = opt.state_dict()['state'][0]
    assert state['inner']['step']==6==state['slow_step'] and torch.equal(p, state['slow'])
