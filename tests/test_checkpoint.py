"Saved and resumed: to the bit, from other optimizers and into them, or refused with nothing changed"
import copy, pickle, warnings
from functools import partial

import fastai.optimizer as stock
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import params
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from helpers import Skip, Until, finish, fork, load, param, same, state, steps
from workflows import digits_learner, fit, largest, stand_still, weights

class Clip(Callback):
    def after_step(self):
        with torch.no_grad():
            for p in self.model.parameters(): p.clamp_(-.2, .2)

@pytest.mark.parametrize('n,cbs', [(1, []), (5, []), (6, []), (8, []), (5, [Clip])])
def test_resumed_at_any_point(n, cbs):
    "of the inner loop, also of a run that clips its weights"
    whole = fit(digits_learner(ranger, cbs=[Until(n), *(o() for o in cbs)]), 2)
    other = digits_learner(ranger, cbs=[Skip(n), *(o() for o in cbs)])
    load(other, whole.path/whole.model_dir/'x')
    fit(other, 2)
    assert largest(weights(whole.model), weights(other.model)) == 0 and same(state(whole), state(other))

def resume(a, b):
    learn = digits_learner(partial(ranger, k=5))
    load(learn, a)
    fit(learn, 2)
    learn.save(b)

def test_resumed_in_a_new_process(tmp_path):
    learn = fit(digits_learner(partial(ranger, k=5)))
    learn.save(tmp_path/'a')
    finish(fork(resume, tmp_path/'a', tmp_path/'b', threads=torch.get_num_threads()))
    fit(learn, 2)
    other = load(digits_learner(partial(ranger, k=5)), tmp_path/'b')
    assert largest(weights(learn.model), weights(other.model)) == 0 and same(state(learn), state(other))

def test_what_is_in_it():
    "Only what `torch.load` reads under `weights_only=True`"
    sd = fit(digits_learner(ranger)).opt.state_dict()
    for s in sd['state']:
        assert set(s) <= {'slow', 'slow_step', 'step', 'grad_avg', 'sqr_avg', 'do_wd', 'force_train'}
        assert all(type(v) in (int, bool) or type(v) is torch.Tensor for v in s.values())

def bad():
    def of(**kwargs): return lambda sd: {**sd, **kwargs}
    def shape(sd):
        sd['state'][3]['slow'] = torch.zeros(9, 9)
        return sd
    def hyper(sd):
        sd['hypers'][1]['k'] = 2.5
        return sd
    return dict(groups=(lambda sd: {**sd, 'hypers': sd['hypers'][:1]}, 'the checkpoint has 1 parameter groups, this optimizer has 2'),
                params=(lambda sd: {**sd, 'state': sd['state'][:-1]}, 'the checkpoint has 10 parameters, this optimizer has 11'),
                shape=(shape, r'`slow` of parameter 3 of group 0 has shape \(9, 9\), the parameter has \(64, 32, 3, 3\)'),
                hyper=(hyper, '`k` must be a whole number'),
                torch=(lambda sd: {'state': {}, 'param_groups': []}, "has `state` and `hypers`, this one has .'param_groups', 'state'."))

@pytest.mark.parametrize('name', bad())
def test_refused_with_nothing_changed(name):
    spoil,message = bad()[name]
    learn = fit(digits_learner(ranger))
    sd = spoil(copy.deepcopy(fit(digits_learner(ranger)).opt.state_dict()))
    before,hypers = state(learn),copy.deepcopy(list(learn.opt.hypers))
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match=message): learn.opt.load_state_dict(sd)
    assert same(before, state(learn)) and list(learn.opt.hypers) == hypers
    torch.save({'model': learn.model.state_dict(), 'opt': sd}, learn.path/'bad.pth')
    with pytest.warns(UserWarning) as caught: learn.load(learn.path/'bad')
    said = [str(o.message) for o in caught]
    assert 'Could not load the optimizer state.' in said and any(o in m for m in said for o in ('checkpoint', 'has shape', 'must be'))

wrong = dict(step=['seven', -1, 2.5, True, None, torch.tensor(3)], grad_avg=[[1., 2.], 3., torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), 'x'],
             slow=[torch.ones(3, dtype=torch.float64), None], fast=[torch.ones(3, 1), 4.])

@pytest.mark.parametrize('name,value', [(k, v) for k,vs in wrong.items() for v in vs], ids=str)
def test_content_that_is_wrong(name, value):
    "is refused when it is loaded, not at the next step"
    p,q = param(1., 2.), param(1., 2.)
    opt,other = ranger([p], lr=.1),ranger([q], lr=.1)
    for o in (opt, other): steps(o, 3)
    sd = opt.state_dict()
    sd['state'] = [{**sd['state'][0], name: value}]
    before,weights = {k: torch.as_tensor(v).tolist() for k,v in other.state[q].items()},q.tolist()
    with pytest.raises(ValueError, match=f'`{name}` of parameter 0 of group 0'), pytest.warns(UserWarning): other.load_state_dict(sd)
    assert {k: torch.as_tensor(v).tolist() for k,v in other.state[q].items()} == before and q.tolist() == weights
    steps(other, 7)

@pytest.mark.parametrize('sd', [None, [], dict(state=3, hypers=[{}]), dict(state=[3], hypers=[{}]), dict(state={}, hypers=[{}]), dict(state=[{}], hypers=None), dict(state=[{}], hypers=['lr'])], ids=str)
def test_containers_that_are_wrong(sd):
    opt = ranger([param(1.)], lr=.1)
    with pytest.raises(ValueError, match='checkpoint'), pytest.warns(UserWarning): opt.load_state_dict(sd)

@pytest.mark.parametrize('opt_func', [ranger, ranger_kahan, RAdam, ranger_va, ranger_adabelief, ranger21], ids=lambda o: o.__name__)
def test_a_checkpoint_of_version_0_1(opt_func):
    "made key by key, with the notes on replaced weights that it kept: goes on to the bit"
    names = dict(ranger=['slow', 'grad_avg', 'sqr_avg'], ranger_kahan=['slow', 'grad_avg', 'sqr_avg', 'comp', 'slow_comp'], RAdam=['grad_avg', 'sqr_avg'], ranger_va=['slow', 'grad_avg', 'sqr_avg', 'max_avg'],
                 ranger_adabelief=['slow', 'grad_avg', 'var_avg'], ranger21=['slow', 'odd_avg', 'even_avg', 'sqr_avg', 'max_avg'])[opt_func.__name__]
    dtype = torch.bfloat16 if opt_func is ranger_kahan else torch.float64
    ps,qs = ([torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)), torch.nn.Parameter(torch.ones(3, dtype=dtype))] for _ in range(2))
    opt,other = (opt_func([[o] for o in x], lr=.01) for x in (ps, qs))
    def go(opt, ps, first, n):
        for i in range(first, first+n):
            torch.manual_seed(i)
            for p in ps: p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
    go(opt, ps, 0, 8)
    count = {'step': 8} | ({} if opt_func is RAdam else {'slow_step': 8})
    sd = dict(hypers=[dict(h) for h in opt.hypers], state=[{**{k: opt.state[p][k].clone() for k in names}, **count, 'edits': 2} for p in ps])
    if opt_func is ranger21: sd['state'] = [{**s, 'rms': torch.tensor(1.)} for s in sd['state']]
    with torch.no_grad():
        for p,q in zip(ps, qs): q.copy_(p)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        other.load_state_dict(sd)
    assert 'edits' not in other.state[qs[0]]
    go(opt, ps, 8, 9)
    go(other, qs, 8, 9)
    assert all(map(torch.equal, ps, qs))

def ahead(ps, lr, **kwargs): return stock.Lookahead(stock.SGD(ps, lr, mom=.9), k=6)

@pytest.mark.parametrize('opt_func,lacks', [(stock.ranger, '`slow`, `slow_step`'), (stock.RAdam, '`slow`, `slow_step`'), (stock.Adam, '`slow`, `slow_step`'), (RAdam, '`slow`, `slow_step`'),
                                            (ahead, '`slow`, `slow_step`, `step`, `grad_avg`, `sqr_avg`'), (partial(stock.SGD, mom=.9), '`slow`, `slow_step`, `step`, `grad_avg`, `sqr_avg`')])
def test_from_others(opt_func, lacks):
    "One line says what starts anew; slow weights start from the weights"
    learn,other = fit(digits_learner(opt_func)),digits_learner(partial(ranger, k=5))
    learn.save('x')
    with pytest.warns(UserWarning, match=f'^the checkpoint has no {lacks}: started anew$') as caught: load(other, learn.path/learn.model_dir/'x')
    assert len([o for o in caught if 'checkpoint' in str(o.message)]) == 1
    assert other.opt.hypers[0]['k'] == 5 and other.opt.hypers[0]['lr'] == learn.opt.hypers[0]['lr']
    before = copy.deepcopy(other)
    assert stand_still(other) == 0
    fit(before)
    assert all(o.isfinite().all() for o in weights(before.model)) and largest(weights(learn.model), weights(before.model)) < .2

def test_radam_goes_on_as_ranger():
    "The averages and the count are taken over: without a synchronisation it is RAdam that goes on"
    learn,other = fit(digits_learner(stock.RAdam, splitter=params)),digits_learner(partial(ranger, k=10**9), splitter=params)
    learn.save('x')
    with pytest.warns(UserWarning, match='no `slow`'): load(other, learn.path/learn.model_dir/'x')
    assert other.opt.hypers[0]['mom'] == learn.opt.hypers[0]['mom'] == .9
    assert largest(weights(fit(learn).model), weights(fit(other).model)) < 1e-5

@pytest.mark.parametrize('opt_func', [stock.RAdam, stock.Adam, RAdam])
def test_into_others(opt_func):
    learn,other = fit(digits_learner(partial(ranger, k=10**9))),digits_learner(opt_func)
    learn.save('x')
    load(other, learn.path/learn.model_dir/'x')
    assert other.opt.state[next(other.model.parameters())]['step'] == 8
    fit(other), fit(learn)
    if opt_func is not stock.Adam: assert largest(weights(learn.model), weights(other.model)) < 1e-5

def test_a_fresh_checkpoint_says_nothing():
    learn,other = digits_learner(stock.Adam),digits_learner(ranger)
    learn.create_opt()
    learn.save('x')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', module='fastai_ranger')
        load(other, learn.path/learn.model_dir/'x')

def test_an_older_one_of_ours():
    "Frozen layers have no state; hypers that are new keep their value"
    learn,other = digits_learner(ranger),digits_learner(ranger)
    learn.freeze()
    fit(learn)
    sd = learn.opt.state_dict()
    for h in sd['hypers']: del h['alpha']
    other.create_opt()
    other.opt.set_hyper('alpha', .3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        other.opt.load_state_dict(sd)
    assert [h['alpha'] for h in other.opt.hypers] == [.3, .3]

def test_dtype_follows_the_parameter():
    p,q = torch.nn.Parameter(torch.ones(3)),torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt,other = ranger([p], lr=.1),ranger([q], lr=.1)
    steps(opt, 8)
    other.load_state_dict(opt.state_dict())
    assert {v.dtype for v in other.state[q].values() if isinstance(v, torch.Tensor)} == {torch.float64}
    steps(other, 8)

@stepper(state=dict(master=torch.Tensor.float))
def master(p, grad, lr, master, **kwargs):
    "SGD on a copy in float32"
    torch._foreach_add_(master, [o.float() for o in grad], alpha=-lr)
    torch._foreach_copy_(p, master)

def test_state_of_a_users_stepper_keeps_its_dtype():
    p,q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    opt,other = (MultiTensorOptimizer([o], master, lr=1e-4) for o in (p, q))
    steps(opt, 5)
    other.load_state_dict(opt.state_dict())
    for o in (opt, other): steps(o, 40)
    assert other.state[q]['master'].dtype is torch.float32 and torch.equal(p, q) and p[0] < 1

def test_averages_without_a_count_start_anew():
    "in the chain of steppers too"
    p,q = param(1., 2.), param(1., 2.)
    sgd = stock.SGD([p], lr=.01, mom=.9)
    steps(sgd, 20)
    opt = MultiTensorOptimizer([q], [weight_decay, average_grad, average_sqr_grad, step_stat, radam_step], lr=.01, mom=.9, sqr_mom=.99)
    with pytest.warns(UserWarning, match='no `grad_avg`, `sqr_avg`, `step`'): opt.load_state_dict(sgd.state_dict())
    assert 'grad_avg' not in opt.state[q]

def test_a_scalar_is_a_shape():
    p,q = param(1.)[0].detach(), param(1., 2.)
    p.grad = torch.ones_like(p)
    opt,other = ranger([p], lr=.1),ranger([q], lr=.1)
    opt.step()
    with pytest.raises(ValueError, match=r'has shape \(\), the parameter has \(2,\)'), pytest.warns(UserWarning): other.load_state_dict(opt.state_dict())

def test_do_wd_stays_if_the_checkpoint_has_none():
    p,q = param(1.), param(1.)
    opt,other = ranger([p], lr=.1),ranger([q], lr=.1)
    steps(opt, 2)
    other.state[q]['do_wd'] = False
    other.load_state_dict(opt.state_dict())
    assert other.state[q]['do_wd'] is False and other.state[q]['step'] == 2

@pytest.mark.parametrize('then', ['lr_find', 'save', 'deepcopy', 'pickle', 'nothing'])
def test_weights_loaded_before_it_was_saved(then):
    "A checkpoint, or a copy, made after other weights were loaded begins anew from them"
    learn = fit(digits_learner(ranger))
    learn.save('x')
    fit(learn).load('x', with_opt=False)
    if then == 'lr_find':
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
    elif then == 'save':
        learn.save('y')
        learn = load(digits_learner(ranger, path=learn.path), 'y')
    elif then == 'deepcopy': learn = copy.deepcopy(learn)
    elif then == 'pickle': learn = pickle.loads(pickle.dumps(learn))
    before = weights(learn.model)
    assert stand_still(learn) == 0 and largest(before, weights(learn.model)) == 0
