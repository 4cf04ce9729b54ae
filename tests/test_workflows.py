"`ranger` in fastai's workflows, beside fastai's own, which is right in few of them"
import copy, os, pickle, subprocess, sys
from functools import partial
from pathlib import Path

import fastai.optimizer as stock
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler, SchedLin, SchedNo, combine_scheds
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
import fastai.distributed # `to_parallel`, which needs accelerate
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.optimizers.adam import rectify
from fastcore.all import L
from fastai_ranger.compare.registry import optimizers
from fastai_ranger.learner import restart_on_load
from helpers import Float64, Overflow, equal, has_slow, param, records, same, sgd_ahead, state, steps
from workflows import (clip, digits_learner, export, fit, largest, resume, skipped_steps, slow_of, stand_still, swap,
    weights, workflows)

stock_is_right = {clip, swap, skipped_steps, resume, export}
each = pytest.mark.parametrize('f,right', workflows, ids=[f.__name__ for f,_ in workflows])

@each
def test_right(f, right): assert right(f(ranger))

@each
def test_stock(f, right): assert right(f(partial(stock.ranger))) == (f in stock_is_right)

def test_no_folder_is_left(tmp_path):
    saves = 'from fastai_ranger.all import ranger; from workflows import *; load_weights(ranger); gan(ranger)'
    env = {**os.environ, 'TMPDIR': str(tmp_path)}
    subprocess.run([sys.executable, '-c', saves], cwd=Path(__file__).parent, env=env, capture_output=True, check=True)
    assert not list(tmp_path.iterdir())

# Weights that change from outside

@pytest.mark.parametrize('put', [lambda m: torch.nn.utils.vector_to_parameters(torch.full((8,), 5.), m.parameters()), lambda m: [setattr(p, 'data', torch.full_like(p, 5.)) for p in m.parameters()]])
def test_weights_that_are_put_in_place_are_the_users_restart(put):
    model = torch.nn.Linear(3, 2)
    opt = sgd_ahead(model.parameters())
    steps(opt, 5)
    put(model)
    opt.restart()
    opt.set_hyper('lr', 0.)
    steps(opt, 7)
    assert all((p==5).all() for p in model.parameters())

@pytest.mark.parametrize('every', range(1, 6))
def test_edits_are_training(every):
    "One bias that is clamped to bounds it never reaches: every synchronisation comes, with the weights of fastai's `Lookahead`"
    def run(opt_func):
        w,b = param(1., 2.), param(1.)
        opt = opt_func([[w], [b]])
        def edit(i):
            if i%every == 0:
                with torch.no_grad(): b.clamp_(-100, 100)
        steps(opt, 30, edit)
        return w,b,opt
    (w,b,opt),(x,y,_) = run(lambda ps: ranger(ps, lr=.1)),run(lambda ps: stock.ranger(ps, lr=.1))
    assert opt.state[w]['slow_step'] == opt.state[b]['slow_step'] == 30 and torch.equal(w, opt.state[w]['slow'])
    assert torch.allclose(w, x, atol=1e-14) and torch.allclose(b, y, atol=1e-14)

def test_loaded_twice_in_a_run_that_clips():
    "in a `Learner`: nothing is pulled back"
    class Clip(Callback):
        def after_step(self):
            with torch.no_grad():
                for p in self.model.parameters(): p.clamp_(-.2, .2)
    learn = fit(digits_learner(ranger, cbs=Clip()), 2)
    other = {k: v*.5 for k,v in learn.model.state_dict().items()}
    for _ in range(2):
        learn.model.load_state_dict(other)
        assert stand_still(learn) == 0
        fit(learn)

def test_loads_with_frozen_ends():
    "as with LoRA: twice without an update between, and often"
    ps = [param(1.), param(1., 2.), param(1.)]
    for p in (ps[0], ps[-1]): p.requires_grad_(False)
    opt = sgd_ahead(ps)
    def update():
        ps[1].grad = torch.ones_like(ps[1])
        opt.step()
    for n in (0, 1, 2, 7):
        for _ in range(n): update()
        for value in (5., 7.):
            with torch.no_grad():
                for p in ps: p.fill_(value)
            opt.restart()
        opt.set_hyper('lr', 0.)
        for _ in range(4): update()
        assert all((p==7).all() for p in ps)
        opt.set_hyper('lr', .1)

def test_a_part_of_the_model_that_is_loaded():
    "begins anew, and no other; copies of the model tell nobody, and need no fastai_ranger"
    learn = fit(digits_learner(ranger))
    learn.model[0].load_state_dict({k: v+1 for k,v in learn.model[0].state_dict().items()})
    assert [p for p in learn.model.parameters() if 'slow' not in learn.opt.state[p]] == list(learn.model[0].parameters())
    before = weights(learn.model[0])
    stand_still(learn)
    assert largest(before, weights(learn.model[0])) == 0
    for other in (copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))):
        other.load_state_dict(learn.model.state_dict())
        assert 'slow' in learn.opt.state[next(learn.model.parameters())]
    assert b'fastai_ranger' not in pickle.dumps(torch.nn.Sequential(*learn.model[:2]))

alone = """
import torch
from fastai.learner import Learner
from fastai_ranger import ranger
model = torch.nn.Linear(2, 2)
learn = Learner([], model, loss_func=torch.nn.MSELoss(), opt_func=ranger, lr=.1)
learn.create_opt()
for p in model.parameters(): p.grad = torch.ones_like(p)
for _ in range(2): learn.opt.step()
assert 'slow' in learn.opt.state[model.weight]
model.load_state_dict(model.state_dict())
assert 'slow' in learn.opt.state[model.weight]
model.load_state_dict({k: v+1 for k,v in model.state_dict().items()})
assert 'slow' not in learn.opt.state[model.weight]
"""

def pair():
    "A net and its target, as in DQN or BYOL, and a `Learner` that has an optimizer"
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(dict(net=torch.nn.Linear(2, 1), target=torch.nn.Linear(2, 1).requires_grad_(False)))
    return model

all_with_lookahead = pytest.mark.parametrize('info', [o for o in records if has_slow(o.opt_func([param(1.)], lr=o.lr))], ids=lambda o: o.name)

def with_optimizer(model, info):
    learn = Learner([], model, loss_func=torch.nn.MSELoss(), opt_func=info.opt_func, lr=info.lr)
    learn.create_opt()
    return learn

def update(learn, n):
    for _ in range(n):
        for p in learn.model.parameters():
            if p.requires_grad: p.grad = torch.ones_like(p)
        learn.opt.step()

def scaled(model, by): return {k: v*by for k,v in model.state_dict().items()}

@all_with_lookahead
def test_a_target_net_that_is_loaded(info):
    "is no load into what is trained: every synchronisation comes"
    ends = []
    for loads in (True, False):
        model = pair()
        learn = with_optimizer(model, info)
        for _ in range(13):
            update(learn, 1)
            if loads: model.target.load_state_dict(model.net.state_dict())
        assert learn.opt.state[model.net.weight]['slow_step'] == 13
        ends.append(weights(model.net))
    assert equal(*ends)

@all_with_lookahead
def test_weights_that_are_loaded_and_put_back(info):
    "as an average of the weights, to validate on: training goes on to the bit"
    ends = []
    for visits in (False, True):
        model = pair()
        learn = with_optimizer(model, info)
        for i in range(13):
            update(learn, 1)
            own = {k: v.clone() for k,v in model.state_dict().items()}
            if not visits: continue
            for _ in range(2):
                model.load_state_dict(scaled(model, .5))
                assert 'slow' not in learn.opt.state[model.net.weight] # loaded for good, for all one knows
            model.load_state_dict(own)
        ends.append((weights(model), slow_of(learn.opt)))
    assert equal(ends[0][0], ends[1][0]) and equal(ends[0][1], ends[1][1])

@all_with_lookahead
def test_what_is_loaded_begins_anew_and_nothing_else(info):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    learn = with_optimizer(model, info)
    def begun(): return ['slow' in learn.opt.state[p] for p in model.parameters()]
    update(learn, 4)
    model.load_state_dict(model.state_dict())
    model.load_state_dict({'1.bias': torch.full((2,), 7.)}, strict=False)
    assert begun() == [True, True, True, False] # at once
    model[1].load_state_dict({'weight': torch.full((2, 2), 7.)}, strict=False)
    assert begun() == [True, True, False, False]
    learn.opt.set_hypers(**{k: 0. for k in ('lr', 'wd', 'norm_loss') if k in learn.opt.hypers[0]})
    update(learn, 7)
    assert (model[1].weight==7).all() and (model[1].bias==7).all()
    assert [learn.opt.state[p]['slow_step'] for p in model.parameters()] == [11, 11, 7, 7]
    for by in (1.5, 2.): # twice between two updates
        model.load_state_dict(scaled(model, by))
        assert not any(begun())

def test_a_load_back_after_an_update_is_a_load():
    model = pair()
    learn = with_optimizer(model, optimizers['ranger'])
    update(learn, 4)
    own = {k: v.clone() for k,v in model.state_dict().items()}
    model.load_state_dict(scaled(model, .5))
    update(learn, 1)
    model.load_state_dict(own)
    assert 'slow' not in learn.opt.state[model.net.weight] and not learn.opt.state[model.net.weight].keys() & {'slow_step', 'fast'}

def test_loads_around_other_events():
    "`restart`, a cleared state, a checkpoint of the optimizer, weights that are no numbers, a part that loads itself"
    class OfItsOwn(torch.nn.Linear):
        def _load_from_state_dict(self, sd, prefix, *args):
            with torch.no_grad(): self.weight.copy_(sd[prefix+'weight'])
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), OfItsOwn(2, 2))
    learn = with_optimizer(model, optimizers['ranger'])
    opt,(w,v) = learn.opt,(model[0].weight, model[1].weight)
    update(learn, 4)
    own = {k: v.clone() for k,v in model.state_dict().items()}
    model.load_state_dict(scaled(model, .5))
    assert 'slow' not in opt.state[w] and 'slow' not in opt.state[v]
    opt.restart()
    model.load_state_dict(own)
    assert 'slow' not in opt.state[w]
    update(learn, 3)
    sd = copy.deepcopy(opt.state_dict())
    model.load_state_dict(own)
    opt.load_state_dict(sd)
    assert opt.state[w]['slow_step'] == 3
    model.load_state_dict(own)
    assert opt.state[w]['slow_step'] == 3
    with torch.no_grad(): w[0,0] = torch.nan
    update(learn, 1)
    model.load_state_dict(model.state_dict())
    assert opt.state[w]['slow_step'] == 4

def test_equal_loads_around_what_is_training():
    "a visit to the slow weights, `sync` and clipping between two loads of the weights that are there"
    for between in (lambda opt, p: opt.to_slow(), lambda opt, p: opt.sync(), lambda opt, p: p.data.clamp_(-.1, .1)):
        model = pair()
        learn = with_optimizer(model, optimizers['ranger'])
        update(learn, 4)
        for _ in range(2):
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            between(learn.opt, model.net.weight)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert all('slow' in learn.opt.state[p] for p in model.net.parameters())
    model.load_state_dict(own := copy.deepcopy(model.state_dict()))
    model.net.weight.data.clamp_(-.01, .01)
    model.load_state_dict(own)
    assert 'slow' not in learn.opt.state[model.net.weight]

@pytest.mark.parametrize('change', (torch.nn.Module.half, torch.nn.Module.double, torch.nn.Module.bfloat16))
def test_loads_in_another_dtype(change):
    model = pair()
    learn = with_optimizer(model, optimizers['ranger'])
    update(learn, 4)
    own = {k: v.clone() for k,v in model.state_dict().items()}
    model.load_state_dict(scaled(model, .5))
    for p in model.parameters(): p.grad = None
    change(model)
    model.load_state_dict(own)
    assert 'slow' not in learn.opt.state[model.net.weight]
    update(learn, 7)
    assert learn.opt.state[model.net.weight]['slow'].dtype is model.net.weight.dtype

def test_two_optimizers_of_one_model():
    "are both told; one that is gone is not"
    model = pair()
    a,b = (with_optimizer(model, optimizers['ranger']) for _ in range(2))
    for learn in (a, b): update(learn, 4)
    model.load_state_dict(scaled(model, .5))
    assert not any('slow' in o.opt.state[model.net.weight] for o in (a, b))
    n = len(model.net._load_state_dict_post_hooks)
    for _ in range(3): b.create_opt()
    assert len(model.net._load_state_dict_post_hooks) == n == 2

def test_a_loop_of_ones_own():
    model = pair()
    opt = as_torch(ranger)([p for p in model.parameters() if p.requires_grad], lr=.1)
    restart_on_load(opt, model)
    for _ in range(7):
        model.net.weight.grad = torch.ones_like(model.net.weight)
        opt.step()
        model.target.load_state_dict(model.net.state_dict())
    assert opt.state[model.net.weight]['slow_step'] == 7
    model.load_state_dict(scaled(model, 2.))
    assert 'slow' not in opt.state[model.net.weight]

def test_the_one_import_is_enough():
    "`from fastai_ranger import ranger` without the rest: loading restarts Lookahead"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', alone], check=True)

def test_buckets_are_kept_after_a_load_with_a_frozen_group():
    body,head = param(1.), param(1.)
    opt = sgd_ahead([[body], [head]])
    opt.freeze_to(1)
    def step():
        head.grad = torch.ones_like(head)
        opt.step()
        return opt._last.buckets
    step()
    with torch.no_grad(): body.fill_(2.)
    opt.restart()
    seen = [step() for _ in range(4)]
    assert seen[1] is seen[2] is seen[3]

def test_swapped_and_back_is_the_same():
    def run(visit):
        p,q = param(*range(100)), param(1.)
        opt = sgd_ahead([p, q])
        def edit(i):
            if visit and i%5==1:
                own = [o.detach().clone() for o in (p, q)]
                with torch.no_grad():
                    for o in (p, q): o.mul_(.5)
                    for o,w in zip((p, q), own): o.copy_(w)
        steps(opt, 20, edit)
        return p.tolist()+q.tolist()
    assert run(True) == run(False)

def test_max_norm_of_an_embedding():
    "A layer that renormalises its weights in every forward pass"
    emb,lin = torch.nn.Embedding(5, 3, max_norm=1.), torch.nn.Linear(3, 1)
    opt = ranger([*emb.parameters(), *lin.parameters()], lr=.1)
    for i in range(30):
        opt.zero_grad()
        lin(emb(torch.arange(5))).pow(2).mean().backward()
        opt.step()
    assert opt.state[lin.weight]['slow_step'] == 30

@pytest.mark.parametrize('both', (True, False))
def test_what_has_no_gradient_then_starts_anew_later(both):
    "The first updates after the restart leave one parameter out"
    p,q = param(1.), param(1.)
    opt = sgd_ahead([p, q])
    steps(opt, 5)
    with torch.no_grad():
        for o in (p, q) if both else (p,): o.fill_(7.)
    opt.restart()
    stays = q.item()
    opt.set_hyper('lr', 0.)
    for _ in range(4):
        p.grad,q.grad = torch.ones_like(p),None
        opt.step()
    steps(opt, 7)
    assert p.item() == 7 and q.item() == stays and set(opt.state[q]) == {'slow', 'slow_step'} and opt.state[q]['slow_step'] == 7

def test_dtype_changes_between_updates():
    "`model.double()` takes the state along"
    for name in ('double', 'half', 'bfloat16'):
        model = torch.nn.Linear(3, 2)
        for n in (3, 8):
            opt = ranger(model.parameters(), lr=.01)
            steps(opt, n)
            opt.zero_grad()
            getattr(model, name)()
            steps(opt, 7)
            p = model.weight
            assert {v.dtype for v in opt.state[p].values() if isinstance(v, torch.Tensor)} == {p.dtype} and p.isfinite().all()
            assert opt.state[p]['step'] == n+7
            model.float()

def test_lazy_and_expanded_parameters():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.ReLU(), torch.nn.LazyLinear(1))
    opt = ranger(list(model.parameters()), lr=.1)
    for _ in range(7):
        model(torch.ones(2, 3)).sum().backward()
        opt.step()
        opt.zero_grad()
    assert opt.state[model[0].weight]['slow_step'] == 7
    p = param(1.)
    opt = ranger([torch.nn.Parameter(torch.zeros(1).expand(8), requires_grad=False), p], lr=.1)
    p.grad = torch.ones_like(p)
    opt.step()

def test_copies_restart_too():
    learn = fit(digits_learner(ranger))
    start = weights(learn.model)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        assert same(state(learn), state(other))
        other.model.load_state_dict({k: v+1 if v.is_floating_point() else v for k,v in other.model.state_dict().items()})
        assert stand_still(other) == 0
    assert largest(start, weights(learn.model)) == 0 and 'slow' in learn.opt.state[next(learn.model.parameters())]

# Frozen

@pytest.mark.parametrize('wd', (0., .1))
def test_frozen_is_frozen(wd):
    learn = digits_learner(ranger, train_bn=False)
    learn.unfreeze()
    fit(learn, wd=wd)
    learn.freeze()
    before,head = weights(learn.model[:2]),weights(learn.model[2:])
    fit(learn, wd=wd)
    assert all(map(torch.equal, before, weights(learn.model[:2]))) and largest(head, weights(learn.model[2:])) > 0
    assert not any({'slow', 'grad_avg'} & set(learn.opt.state[p]) for p in learn.model[:2].parameters())
    learn.unfreeze()
    assert largest(before, weights(fit(learn, wd=wd).model[:2])) > 0

def test_norms_of_a_frozen_part_are_trained():
    learn = digits_learner(ranger)
    learn.freeze()
    before = {n: p.detach().clone() for n,p in learn.model[:2].named_parameters()}
    fit(learn)
    moved = {n: not torch.equal(p, before[n]) for n,p in learn.model[:2].named_parameters()}
    assert all(m == (p.ndim==1) for (n,p),m in zip(learn.model[:2].named_parameters(), moved.values()))

def test_frozen_by_hand_and_with_gradients_left():
    learn = fit(digits_learner(ranger, splitter=params))
    for p in learn.model[:2].parameters(): p.requires_grad_(False)
    before = weights(learn.model[:2])
    assert largest(before, weights(fit(learn, wd=.1).model[:2])) == 0
    learn = digits_learner(ranger, train_bn=False)
    fit(learn, cbs=GradientAccumulation(384)) # 128 of 512 are left over
    assert all(p.grad is not None for p in learn.model.parameters())
    learn.freeze()
    before = weights(learn.model[:2])
    assert largest(before, weights(fit(learn, wd=.1).model[:2])) == 0

# The first updates

@pytest.mark.parametrize('wd', (0., .1))
def test_skip(wd):
    torch.manual_seed(0)
    start = torch.randn(10, dtype=torch.float64)
    p,q = start.clone(),start.clone()
    skip,momentum = ranger([p], lr=8e-3, wd=wd, unrectified='skip'),ranger([q], lr=8e-3, wd=wd)
    for i in range(6):
        p.grad = q.grad = torch.full_like(p, 1e4)
        for o in (skip, momentum): o.step()
        if i < 5: assert torch.equal(p, start) and (q-start).abs().min() > 79*(i+1)
    r = rectify(6, .99)
    assert torch.allclose(p, start - .5*8e-3*(r+start*wd), atol=1e-9) # the sixth is synchronised at once
    for k in ('step', 'grad_avg', 'sqr_avg'): assert torch.equal(torch.as_tensor(skip.state[p][k]), torch.as_tensor(momentum.state[q][k]))

@pytest.mark.parametrize('decouple_wd,wd', [(True, 0.), (False, 0.), (False, .1)])
def test_skip_in_the_chain(decouple_wd, wd):
    chain = [weight_decay if decouple_wd else l2_reg, partial(average_grad, dampening=True), average_sqr_grad, step_stat, partial(radam_step, unrectified='skip')]
    def run(cbs):
        torch.manual_seed(0)
        p = torch.randn(10, dtype=torch.float64)
        opt = MultiTensorOptimizer([p], cbs, lr=.1, wd=wd, mom=.9, sqr_mom=.99)
        for _ in range(30):
            p.grad = torch.randn_like(p)
            opt.step()
        return p
    assert torch.allclose(run(chain), run(partial(fused_radam_step, decouple_wd=decouple_wd, unrectified='skip')), atol=1e-12)

def test_fine_tune_with_large_gradients():
    "A loss that is scaled by 1e4 throws the unfrozen model about, unless the first updates are skipped"
    class Scale(Callback):
        def before_backward(self): self.learn.loss_grad = self.loss_grad*1e4
    def moved(unrectified):
        learn = digits_learner(partial(ranger, unrectified=unrectified), cbs=Scale())
        before = weights(learn.model)
        fit(learn, 1, 2e-2, method=Learner.fine_tune)
        return largest(before, weights(learn.model))
    assert moved('skip') < .1 < 10 < moved('momentum')

@pytest.mark.parametrize('f', [ranger, RAdam])
def test_bad_choice(f):
    with pytest.raises(ValueError, match="`unrectified` must be one of 'momentum', 'skip', got 'sgd'"): f([param(1.)], lr=.1, unrectified='sgd')
    with pytest.raises(ValueError, match='`k` must be'): MultiTensorOptimizer([param(1.)], [slow_weights, sgd_step, partial(lookahead_step, k=0)], lr=.1)

# Schedules

@pytest.mark.parametrize('opt_func', [ranger, lookahead(torch.optim.SGD), lookahead(stock.SGD)])
def test_k_and_alpha_scheduled(opt_func):
    class See(Callback):
        def before_fit(self): self.seen = []
        def after_step(self):
            p = next(self.model.parameters())
            self.seen.append((self.opt.hypers[0]['k'], self.opt.hypers[0]['alpha'], torch.equal(p, self.opt.state[p]['slow'])))
    sched = {'k': combine_scheds([.5, .5], [SchedNo(2, 2), SchedNo(3, 3)]), 'alpha': SchedLin(.5, .9)}
    seen = fit(digits_learner(opt_func, cbs=[ParamScheduler(sched), See()]), 3).see.seen
    assert [o[2] for o in seen] == [i%k==0 for i,(k,*_) in enumerate(seen, 1)]
    assert [o[0] for o in seen] == [2]*12+[3]*12 and seen[0][1] == .5 and seen[23][1] > .85
    with pytest.raises(ValueError, match='`k` must be a whole number'): fit(digits_learner(opt_func, cbs=ParamScheduler({'k': SchedLin(2, 9)})))

def test_per_group():
    learn = digits_learner(ranger, lr=slice(1e-4, 1e-2))
    learn.create_opt()
    learn.opt.set_hypers(k=[2, 5], alpha=[.3, .8])
    fit(learn, lr=slice(1e-3, 1e-2), cbs=ParamScheduler({'alpha': lambda pct: np.array([.3, .8])}))
    assert [(h['lr'], h['k'], h['alpha']) for h in learn.opt.hypers] == [(pytest.approx(1e-3), 2, .3), (pytest.approx(1e-2), 5, .8)]
    assert learn.recorder.hps['alpha'] == [.8]*8

def fit_sgdr(learn, n, lr): learn.fit_sgdr(n, 1, lr)

@pytest.mark.parametrize('method,lr', [(Learner.fine_tune, 8e-3), *((o, lr) for o in (Learner.fit_one_cycle, Learner.fit_flat_cos, fit_sgdr) for lr in (8e-3, slice(1e-3, 8e-3)))])
def test_schedules_are_stocks(method, lr):
    ours,theirs = (fit(digits_learner(f, cbs=Float64()), 2, lr, method=method) for f in (ranger, stock.ranger))
    assert largest(weights(ours.model), weights(theirs.model)) < 1e-9 and ours.recorder.lrs == theirs.recorder.lrs

@pytest.mark.parametrize('method', [Learner.fit_one_cycle, Learner.fit_flat_cos])
@pytest.mark.parametrize('stop', (1, 2))
def test_start_epoch(method, stop):
    "Resumed after `stop` of 3 epochs: the rates and the weights of the uninterrupted run"
    class Keep(Callback):
        order = 70
        def after_epoch(self): self.learn.save(f'{self.epoch+1}')
    whole = fit(digits_learner(ranger, cbs=Keep()), 3, method=method)
    other = digits_learner(ranger)
    other.load(whole.path/whole.model_dir/str(stop))
    fit(other, 3, method=method, start_epoch=stop)
    assert other.recorder.lrs == whole.recorder.lrs[stop*8:] and len(other.recorder.lrs) == (3-stop)*8
    assert all(map(torch.equal, weights(other.model), weights(whole.model))) and same(state(other), state(whole))

@pytest.mark.parametrize('method', [Learner.fit_one_cycle, Learner.fit_flat_cos])
def test_resumed_with_callbacks_that_watch(method):
    "They wait for the first epoch that is trained: nothing is saved before, nothing overwritten"
    keep = lambda: [SaveModelCallback(every_epoch=1, with_opt=True, fname='run'), EarlyStoppingCallback(patience=9)]
    whole = fit(digits_learner(ranger, cbs=keep()), 3, method=method)
    files = {f.name: f.stat().st_mtime_ns for f in (whole.path/whole.model_dir).iterdir()}
    other = digits_learner(ranger, cbs=keep(), path=whole.path)
    other.load('run_1')
    fit(other, 3, method=method, start_epoch=2)
    assert {f.name for f in (whole.path/whole.model_dir).iterdir() if f.stat().st_mtime_ns != files[f.name]} == {'run_2.pth'}
    assert largest(weights(whole.model), weights(other.model)) == 0
    best = digits_learner(ranger, cbs=SaveModelCallback(), path=whole.path)
    best.load('run_1')
    fit(best, 3, method=method, start_epoch=2)
    assert largest(weights(whole.model), weights(best.model)) == 0 and best.save_model.run

@pytest.mark.parametrize('fitted', (True, False))
def test_lr_find_leaves_nothing_behind(fitted):
    learn,other = digits_learner(ranger),digits_learner(ranger)
    for o in (learn, other):
        o.create_opt()
        if fitted: fit(o, method=Learner.fit_one_cycle)
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.lr_find(num_it=20, show_plot=False)
    assert largest(weights(learn.model), weights(other.model)) == 0 and same(state(learn), state(other)) and list(learn.opt.hypers)==list(other.opt.hypers)
    learn.dls,other.dls = (digits_learner(ranger).dls for _ in range(2))
    assert largest(*(weights(fit(o).model) for o in (learn, other))) == 0
    def fails(*args): raise ZeroDivisionError
    with learn.no_bar(), learn.no_logging(), pytest.raises(ZeroDivisionError): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=fails)
    wrapped = digits_learner(partial(OptimWrapper, opt=torch.optim.Adam))
    fit(wrapped)
    for o in (learn, wrapped):
        hypers = copy.deepcopy(list(o.opt.hypers))
        with o.no_bar(), o.no_logging(): o.lr_find(num_it=20, show_plot=False)
        assert list(o.opt.hypers) == hypers
    fresh = digits_learner(ranger)
    with fresh.no_bar(), fresh.no_logging(): fresh.lr_find(num_it=20, show_plot=False) # makes the optimizer

# Together with others

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('opt_func,bad', [(ranger, (0, 1, 2)), (ranger, (3, 4)), (ranger, (0, 5, 6, 7)), (lookahead(torch.optim.AdamW), (3, 4))])
def test_skipped_steps_touch_nothing(opt_func, bad):
    class See(Callback):
        order = 20
        def before_backward(self): self.before = (weights(self.model), state(self.learn))
        def after_step(self):
            if self.train_iter in bad: assert largest(self.before[0], weights(self.model)) == 0 and same(self.before[1], state(self.learn))
            else: assert largest(self.before[0], weights(self.model)) > 0
    learn = fit(digits_learner(opt_func, cbs=[MixedPrecision(), Overflow(*bad), See()]), 2)
    assert {learn.opt.state[p]['slow_step'] for p in learn.model.parameters()} == {16-len(bad)}

def summary(learn):
    import contextlib, io
    with contextlib.redirect_stdout(io.StringIO()): repr(learn.summary())

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cbs', [lambda: GradientAccumulation(128), lambda: GradientClip(.1), lambda: [GradientAccumulation(128), GradientClip(.1)], lambda: MixUp(.4),
                                 lambda: [MixedPrecision(), Overflow(2), GradientClip(.1)], lambda: MixedPrecision(amp_mode='bf16')])
def test_callbacks(cbs):
    "They train as they do with stock's"
    def go(f):
        learn = digits_learner(f, cbs=[Float64(), *L(cbs())])
        torch.manual_seed(1)
        return fit(learn, 2)
    ours,theirs = go(ranger),go(stock.ranger)
    assert largest(weights(ours.model), weights(theirs.model)) < 1e-10
    assert ours.opt.state[next(ours.model.parameters())]['step'] == theirs.opt.state[next(theirs.model.parameters())]['step']

def test_summary_and_parallel():
    learn,other = digits_learner(ranger),digits_learner(ranger)
    other.to_parallel()
    for o in (learn, other): fit(o)
    assert learn.recorder.losses == other.recorder.losses and len(learn.recorder.losses) == 8
    before = weights(learn.model)
    summary(learn)
    assert largest(before, weights(learn.model)) == 0 == largest(before, weights(other.model))

fresh = """
import sys, warnings
warnings.simplefilter('ignore')
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
print(learn.opt_func, learn.predict(0)[2].sum().item())
"""

@pytest.mark.parametrize('opt_func', [ranger, partial(ranger, mom=.95, k=5)])
def test_export_to_a_new_process(opt_func, tmp_path):
    from operator import getitem
    from fastai.data.core import Datasets
    learn = fit(digits_learner(opt_func, splitter=params, path=tmp_path))
    xs,ys = zip(*learn.dls.train_ds[:16])
    learn.dls = Datasets(range(16), [[partial(getitem, xs)], [partial(getitem, ys)]]).dataloaders(bs=8)
    learn.export('x.pkl')
    out = subprocess.run([sys.executable, '-c', fresh, tmp_path/'x.pkl'], capture_output=True, text=True)
    assert out.returncode==0 and 'ranger' in out.stdout, out.stderr

# What is not finite

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('opt_func', [ranger, lambda ps, lr: sgd_ahead(ps, lr=lr, k=6)])
def test_nan_stays_out_of_the_slow_weights(bad, dtype, opt_func):
    torch.manual_seed(0)
    gs = [torch.randn(4, dtype=dtype) for _ in range(20)]
    def run(spoil):
        p,q = torch.ones(4, dtype=dtype),torch.ones((), dtype=dtype)
        opt = opt_func([p, q], lr=1e-2)
        for i,g in enumerate(gs):
            p.grad,q.grad = g.clone(),g[0].clone()
            if spoil and i==8: p.grad[2] = bad
            opt.step()
        opt.sync()
        return p,q
    (p,q),(p0,q0) = run(True),run(False)
    others = [0, 1, 3]
    assert p.isfinite().all() and torch.equal(p[others], p0[others]) and torch.equal(q, q0)

def test_large_weights_are_finite():
    "The norm of these overflows, and they are followed all the same"
    p = torch.full((1000,), 1e38)
    opt = sgd_ahead([p], lr=1e36, k=2)
    steps(opt, 2)
    assert torch.allclose(p, torch.full((1000,), 9.9e37)) and torch.equal(p, opt.state[p]['slow'])
