"`sync`, `to_slow`, `to_fast` and the callback `SlowWeights`"
from functools import partial

import fastai.optimizer as stock
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from helpers import Overflow, equal, param, same, sgd_ahead, slow, state, steps
from workflows import digits_learner, fit, largest, weights

# Without a Learner

@pytest.mark.parametrize('forgotten', (True, False))
@pytest.mark.parametrize('clipped', (True, False))
def test_a_visit_changes_nothing(forgotten, clipped):
    "also if the next update has to bring the fast weights back, and in a run that clips its weights"
    def run(visit):
        p,q = param(1., 2.), param(3.)
        opt = ranger([[p], [q]], lr=.1)
        def edit(i):
            if clipped:
                with torch.no_grad(): p.clamp_(-.9, 1.9)
            if not visit or i%4: return
            fast = [o.tolist() for o in (p, q)]
            for _ in range(2): opt.to_slow()
            assert all(torch.equal(o, opt.state[o]['slow']) for o in (p, q))
            if not forgotten:
                for _ in range(2): opt.to_fast()
                assert [o.tolist() for o in (p, q)] == fast and 'fast' not in opt.state[p]
        steps(opt, 20, edit)
        return p.tolist(), q.tolist()
    assert run(True) == run(False)

def test_where_the_weights_lie_stays():
    p = param(1., 2.)
    opt = ranger([p], lr=.1)
    steps(opt, 4)
    where = p.data_ptr(), opt.state[p]['slow'].data_ptr()
    for f in (opt.to_slow, opt.to_fast, opt.sync, opt.step): f()
    assert where == (p.data_ptr(), opt.state[p]['slow'].data_ptr())

@pytest.mark.parametrize('alpha', [0., .5, 1., [.2, .8]])
def test_sync(alpha):
    p,q = param(1.), param(1.)
    opt = sgd_ahead([[p], [q]])
    opt.set_hyper('alpha', alpha)
    steps(opt, 2) # both at .8, with slow weights at 1
    for _ in range(2):
        opt.sync()
        for o,a in zip((p, q), alpha if isinstance(alpha, list) else [alpha]*2): assert o.item() == pytest.approx(1-.2*a) and torch.equal(o, opt.state[o]['slow'])
    steps(opt, 3)
    assert [opt.state[o]['slow_step'] for o in (p, q)] == [3, 3] and torch.equal(p, opt.state[p]['slow'])

def test_sync_after_to_slow_keeps_the_slow_weights():
    p = param(1.)
    opt = sgd_ahead([p])
    steps(opt, 2)
    opt.to_slow()
    opt.sync()
    assert p.item() == 1 and set(opt.state[p]) == {'slow', 'slow_step'}

@pytest.mark.parametrize('then', ['to_fast', 'sync', 'to_slow', 'step'])
@pytest.mark.parametrize('visiting,clipped', [(True, True), (True, False), (False, False)])
def test_weights_that_were_loaded_meanwhile_stay(then, visiting, clipped):
    p = param(1.)
    opt = sgd_ahead([p])
    def clip(i):
        with torch.no_grad(): p.clamp_(-2, 2)
    steps(opt, 5, clip if clipped else None)
    if visiting: opt.to_slow()
    with torch.no_grad(): p.fill_(7.)
    opt.restart()
    opt.set_hyper('lr', 0.)
    getattr(opt, then)()
    assert p.item() == 7
    steps(opt, 6)
    assert p.item() == 7

@pytest.mark.parametrize('f', ['sync', 'to_slow', 'to_fast'])
def test_no_slow_weights(f):
    opt = RAdam([param(1.)], lr=.1)
    with pytest.raises(ValueError, match='keeps no slow weights'): getattr(opt, f)()
    getattr(ranger([param(1.)], lr=.1), f)() # not begun yet

@stepper(hypers=dict(k=hyper(2, 1, whole=True)))
def pull_to_zero(p, grad, k, alpha=.5, slow_step=0, **kwargs):
    "Has a `k` and an `alpha` of its own, and synchronises nothing"
    if not slow_step%k: torch._foreach_mul_(p, alpha)

@pytest.mark.parametrize('settled', (dict(k=4, alpha=1.), dict(k=4)))
def test_sync_runs_what_synchronises(settled):
    "and no other stepper, each with its own keywords"
    p = param(0.)
    opt = MultiTensorOptimizer([p], [slow_weights, sgd_step, partial(lookahead_step, **settled), partial(pull_to_zero, k=100, alpha=.25)], lr=1.)
    steps(opt, 1)
    assert p.item() == -1
    opt.sync()
    assert p.item() == -settled.get('alpha', .5)

def test_what_a_synchronising_stepper_needs_and_returns():
    for kwargs,message in ((dict(), "`syncs` is for the scope 'alike' and a stepper with `k`, f has 'alike'"), (dict(scope='all', hypers=dict(k=hyper(6, 1))), "f has 'all'")):
        with pytest.raises(ValueError, match=message):
            @stepper(**kwargs, syncs=True)
            def f(p, grad, **kwargs): pass
    @stepper(state=dict(n=0), hypers=dict(k=hyper(6, 1, whole=True)), syncs=True)
    def count(p, grad, n, k, **kwargs): return dict(n=n+1)
    p = param(0.)
    opt = MultiTensorOptimizer([p], [slow_weights, sgd_step, count, lookahead_step], lr=1.)
    steps(opt, 2)
    opt.zero_grad()
    opt.sync()
    assert opt.state[p]['n'] == 3 and p.item() == -1

def test_nothing_synchronises():
    opt = MultiTensorOptimizer([param(0.)], [slow_weights, sgd_step, partial(pull_to_zero, k=100)], lr=1.)
    steps(opt, 1)
    with pytest.raises(ValueError, match='no stepper of this optimizer synchronises.*syncs=True'): opt.sync()

def test_frozen_weights_stay():
    a,b = param(1.), param(1.)
    opt = sgd_ahead([[a], [b]])
    steps(opt, 2)
    a.requires_grad_(False)
    opt.to_slow()
    opt.sync()
    assert a.item() == pytest.approx(.8) and b.item() == 1

def test_hypers_that_are_settled():
    p = param(1.)
    opt = MultiTensorOptimizer([p], [slow_weights, sgd_step, partial(lookahead_step, k=3, alpha=.25)], lr=.1)
    steps(opt, 2)
    opt.sync()
    assert p.item() == pytest.approx(.95)

def test_a_visit_by_layers_that_change_in_their_forward_pass():
    "`max_norm` of an embedding renormalises what it looks up"
    emb,lin = torch.nn.Embedding(5, 3, max_norm=1.),torch.nn.Linear(3, 1)
    forward = lambda: lin(emb(torch.arange(5))).pow(2).mean()
    opt = ranger([*emb.parameters(), *lin.parameters()], lr=.1)
    for i in range(15):
        opt.zero_grad()
        forward().backward()
        opt.step()
    fast = weights(lin)
    opt.to_slow()
    assert not torch.equal(fast[0], lin.weight)
    for _ in range(2): forward()
    opt.to_fast()
    assert equal(fast, weights(lin)) and opt.state[lin.weight]['slow_step'] == 15

# The callback

def trained(*cbs, n=2, opt_func=ranger, **kwargs): return fit(digits_learner(opt_func, metrics=accuracy, cbs=list(cbs)), n, **kwargs)

def loss_of(learn, ws=None):
    "Validation loss with the weights `ws`"
    own = weights(learn.model)
    with torch.no_grad():
        for p,w in zip(learn.model.parameters(), ws or own): p.data.copy_(w)
        cbs = learn.cbs.filter(lambda o: isinstance(o, SlowWeights))
        with learn.removed_cbs(cbs), learn.no_bar(): res = learn.validate()[0]
        for p,w in zip(learn.model.parameters(), own): p.data.copy_(w)
    return res

@pytest.mark.parametrize('valid', (True, False))
@pytest.mark.parametrize('end', (True, False))
def test_switches(valid, end):
    plain,learn = trained(),trained(SlowWeights(valid=valid, end=end))
    ws = slow(plain)
    assert equal(slow(learn), ws) and equal(weights(learn.model), ws if end else weights(plain.model))
    seen = learn.recorder.values[-1][1]
    assert seen == pytest.approx(loss_of(plain, ws if valid else None), abs=1e-6) and abs(loss_of(plain, ws)-loss_of(plain)) > 1e-5
    assert same(state(learn), state(plain)) == (not end)

def test_training_is_the_same():
    "and so is every epoch but for its validation"
    class See(Callback):
        order = 80
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append(weights(self.model)[0])
    with_,without = trained(SlowWeights(), See()),trained(See())
    assert equal(with_.see.seen, without.see.seen) and len(with_.see.seen) == 16

def test_next_fit_goes_on_from_the_slow_weights():
    learn = trained(SlowWeights())
    ws = weights(learn.model)
    class First(Callback):
        def before_batch(self):
            if self.train_iter==0 and self.training: assert equal(weights(self.model), ws)
    fit(learn, cbs=First())
    assert learn.opt.state[next(learn.model.parameters())]['slow_step'] == 0

@pytest.mark.parametrize('with_opt', (True, False))
def test_save_model_saves_what_was_scored(with_opt):
    learn = trained(SlowWeights(), SaveModelCallback(comp=np.greater, with_opt=with_opt), n=3) # keeps the first epoch
    best = learn.recorder.values[0][1]
    assert loss_of(learn) == pytest.approx(best, abs=1e-6)
    before = weights(learn.model)
    learn.opt.set_hypers(lr=0, wd=0)
    with learn.removed_cbs(learn.cbs.filter(lambda o: isinstance(o, (SlowWeights, SaveModelCallback)))): fit(learn, lr=0, wd=0)
    assert equal(before, weights(learn.model))

def test_every_epoch_checkpoint_resumes():
    "saved by `SaveModelCallback` while the model is on slow weights"
    learn = trained(SlowWeights(end=False), SaveModelCallback(every_epoch=1, with_opt=True), n=2)
    other = digits_learner(ranger, cbs=SlowWeights(end=False))
    other.load(learn.path/learn.model_dir/'model_0')
    assert largest(weights(fit(other).model), weights(learn.model)) == 0

def test_early_stopping():
    learn = trained(SlowWeights(), EarlyStoppingCallback(min_delta=2., patience=1), n=5)
    assert learn.epoch == 1 and equal(weights(learn.model), slow(learn))
    assert learn.recorder.values[-1][1] == pytest.approx(loss_of(learn), abs=1e-6)

@pytest.mark.parametrize('fitted', (True, False))
def test_lr_find(fitted):
    learn,other = (digits_learner(ranger, cbs=o) for o in (SlowWeights(end=False), None))
    for o in (learn, other):
        if fitted: fit(o)
        else: o.create_opt()
    before = weights(learn.model),state(learn)
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.lr_find(num_it=20, show_plot=False)
    assert equal(before[0], weights(learn.model)) and same(before[1], state(learn)) and same(before[1], state(other))
    for o in (SlowWeights(), None): # stopped in mid-cycle, and then with the callback
        learn.remove_cb(SlowWeights)
        learn.add_cbs(o)
        before = weights(learn.model),state(learn)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
        assert equal(before[0], weights(learn.model)) and same(before[1], state(learn))

class Stop(Callback):
    "Raises `e` in the second epoch"
    order = 90
    def __init__(self, e, training): self.e,self.at,self.done = e,training,False
    def after_pred(self):
        if self.epoch==1 and self.iter==2 and self.training==self.at and not self.done:
            self.done = True
            raise self.e

@pytest.mark.parametrize('training', (True, False))
@pytest.mark.parametrize('e', [KeyboardInterrupt(), ZeroDivisionError('x')])
def test_interrupted(training, e):
    "Whatever comes next, fit or validate, finds the weights that training left"
    def interrupted(*cbs, end=True):
        learn = digits_learner(ranger, cbs=[*cbs, Stop(e, training)])
        with pytest.raises(type(e)): fit(learn, 2)
        return learn
    plain,learn = interrupted(),interrupted(SlowWeights())
    assert equal(slow(plain), slow(learn))
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert equal(weights(plain.model), weights(learn.model)) and same(state(plain), state(learn))
    again = interrupted(SlowWeights(end=False))
    for o in (plain, again):
        o.dls = digits_learner(ranger).dls
        fit(o)
    assert equal(weights(plain.model), weights(again.model))
    bare = interrupted(SlowWeights())
    bare.remove_cb(SlowWeights)
    fit(bare, lr=0, wd=0)
    assert not any('fast' in o for o in state(bare)) # they came back with the first update

def test_cancelled_fit_ends_on_slow_weights():
    learn = trained(SlowWeights(), Stop(CancelFitException(), True))
    assert equal(weights(learn.model), slow(learn)) and learn.opt.state[next(learn.model.parameters())]['slow_step'] == 0

def test_validate_and_predict():
    "use the slow weights, and leave the fast ones in place"
    learn,plain = trained(SlowWeights(end=False)),trained()
    before = weights(learn.model)
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[0] == pytest.approx(loss_of(plain, slow(plain)), abs=1e-6)
        preds,_ = learn.get_preds()
    assert equal(before, weights(learn.model)) and same(state(learn), state(plain))
    for p,w in zip(plain.model.parameters(), slow(plain)): p.data.copy_(w)
    with plain.no_bar(): assert torch.allclose(preds, plain.get_preds()[0], atol=1e-6)
    fresh = digits_learner(ranger, cbs=SlowWeights())
    with fresh.no_bar(): fresh.validate() # there is no optimizer yet

def test_a_checkpoint_that_was_saved_on_slow_weights_stays_on_them():
    "until it is trained"
    learn = trained(SlowWeights(), SaveModelCallback(every_epoch=1, with_opt=True), n=1)
    other = digits_learner(ranger, cbs=SlowWeights(), path=learn.path)
    other.load('model_0')
    before = weights(other.model)
    with other.no_bar(), other.no_logging(): other.validate()
    assert equal(before, weights(other.model)) and equal(before, weights(learn.model))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('cbs', [lambda: [MixedPrecision(), Overflow(0, 1, 9)], lambda: [GradientAccumulation(128)]])
def test_with_others(cbs):
    plain,learn = trained(*cbs()),trained(SlowWeights(), *cbs())
    assert equal(weights(learn.model), slow(plain)) and not equal(weights(plain.model), slow(plain))

def test_only_what_is_trained_has_slow_weights():
    learn = digits_learner(ranger, cbs=SlowWeights(), train_bn=False)
    learn.freeze()
    before = weights(learn.model[:2])
    fit(learn)
    assert equal(before, weights(learn.model[:2])) and equal(weights(learn.model[2:]), [learn.opt.state[p]['slow'] for p in learn.model[2:].parameters()])

@pytest.mark.parametrize('opt_func,name', [(stock.ranger, 'Lookahead'), (stock.Adam, 'Optimizer'), (RAdam, 'MultiTensorOptimizer'), (partial(OptimWrapper, opt=torch.optim.Adam), 'OptimWrapper')])
def test_other_optimizers(opt_func, name):
    learn = digits_learner(opt_func, cbs=SlowWeights())
    before = weights(learn.model)
    with pytest.raises(ValueError, match=f'`SlowWeights` needs .* `fastai_ranger.ranger`, got a {name} that keeps none'): fit(learn)
    assert equal(before, weights(learn.model))

def test_sync_after_another_k():
    "that divides the count: the weights are not where a synchronisation has left them"
    p = param(1., 2.)
    opt = sgd_ahead([p], k=6)
    steps(opt, 4)
    opt.set_hyper('k', 2)
    fast,slow = p.detach().clone(),opt.state[p]['slow'].clone()
    opt.sync()
    assert torch.equal(p, (fast+slow)/2) and torch.equal(p, opt.state[p]['slow'])
