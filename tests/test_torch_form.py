"`as_torch`: a `torch.optim.Optimizer` with the numbers of fastai's kind, in what PyTorch and Accelerate do with one"
import collections, copy, pickle, warnings

import fastai.optimizer as stock
import pytest
import torch
from accelerate import Accelerator
from fastai_ranger.all import *
from fastai_ranger.steppers import *
import fastai_ranger.fixes # Accelerate's `prepare`
from fastai_ranger.interop import to_torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

opt_funcs = pytest.mark.parametrize('opt_func', (ranger, RAdam, Adam, ranger_muon, ranger_gc, ranger21, lookahead(stock.SGD)))
x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

def loss(model): return (model(x)-x.sum(1, keepdim=True)).pow(2).mean()

def train(model, opt, n, sched=None):
    for _ in range(n):
        opt.zero_grad()
        loss(model).backward()
        opt.step()
        if sched: sched.step()
    return [p.detach().clone() for p in model.parameters()]

def same(a, b): assert all(map(torch.equal, a, b))

@opt_funcs
def test_the_same_numbers(opt_func):
    a,b = net(),net()
    same(train(a, as_torch(opt_func)(a.parameters(), lr=.05), 20), train(b, opt_func(list(b.parameters()), lr=.05), 20))

@pytest.mark.parametrize('sched', (lambda o: CosineAnnealingLR(o, 20), lambda o: OneCycleLR(o, .1, total_steps=21, cycle_momentum=False), lambda o: SWALR(o, .01, anneal_epochs=5)))
def test_schedulers_set_the_rate(sched):
    a,b = net(),net()
    opt,plain = as_torch(ranger)(a.parameters(), lr=.05),ranger(list(b.parameters()), lr=.05)
    s = sched(opt)
    for _ in range(20):
        plain.set_hyper('lr', opt.param_groups[0]['lr'])
        same(train(a, opt, 1, s), train(b, plain, 1))

def test_a_scheduler_that_watches():
    opt = as_torch(ranger)(net().parameters(), lr=.05)
    sched = ReduceLROnPlateau(opt, patience=0)
    for _ in range(3): sched.step(1.)
    opt.step()
    assert opt.inner.hypers[0]['lr'] == opt.param_groups[0]['lr'] < .05

@opt_funcs
@pytest.mark.parametrize('carry', (copy.deepcopy, lambda o: o))
def test_goes_on_from_a_checkpoint(opt_func, carry, tmp_path):
    model = net()
    opt = as_torch(opt_func)(model.parameters(), lr=.05)
    train(model, opt, 8)
    torch.save(dict(opt=opt.state_dict(), model=model.state_dict()), tmp_path/'both.pth')
    whole = train(model, opt, 8)
    saved = torch.load(tmp_path/'both.pth', weights_only=True)
    other = net()
    again = as_torch(opt_func)(other.parameters(), lr=.3)
    other.load_state_dict(saved['model'])
    again.load_state_dict(carry(saved['opt']))
    same(train(other, again, 8), whole)

def test_refuses_a_checkpoint_with_nothing_changed():
    model = net()
    opt = as_torch(ranger)(model.parameters(), lr=.05)
    train(model, opt, 3)
    before = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(before)
    bad['state'][0]['grad_avg'] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match='`grad_avg` of parameter 0 of group 0 has shape'): opt.load_state_dict(bad)
    assert str(opt.state_dict()) == str(before)

@pytest.mark.parametrize('twin', (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))))
def test_copies(twin):
    model = net()
    opt = as_torch(ranger)(model.parameters(), lr=.05)
    train(model, opt, 3)
    model2,opt2 = twin((model, opt))
    assert opt2.state is opt2.inner.state
    same(train(model2, opt2, 8), train(model, opt, 8))

def test_groups():
    model = net()
    opt = as_torch(ranger)([dict(params=model[0].parameters(), lr=.01, k=3)], lr=.05, wd=.1)
    with pytest.raises(ValueError, match='`mom` must be'): opt.add_param_group(dict(params=model[2].parameters(), mom=8.))
    assert len(opt.param_groups) == len(opt.inner.hypers) == 1
    opt.add_param_group(dict(params=model[2].parameters(), mom=.8))
    assert [(g['lr'], g['k'], g['betas'], g['weight_decay']) for g in opt.param_groups] == [(.01, 3, (.95, .99), .1), (.05, 6, (.8, .99), .1)]
    train(model, opt, 4)
    assert [(h['lr'], h['k'], h['mom']) for h in opt.inner.hypers] == [(.01, 3, .95), (.05, 6, .8)]

def no_gradients(opt, n=3):
    for _ in range(n):
        for g in opt.param_groups:
            for p in g['params']: p.grad = torch.zeros_like(p)
        opt.step()

def ones(*shape): return nn.Parameter(torch.ones(*shape, dtype=torch.float64))

@opt_funcs
def test_groups_have_pytorchs_names(opt_func):
    "Three updates at zero gradient decay as those of PyTorch's own do"
    a,b = ones(1),ones(1)
    if 'wd' not in opt_func([ones(1)], lr=.1).hypers[0]: return
    opt = as_torch(opt_func)([dict(params=[a], weight_decay=.5), dict(params=[b], weight_decay=0.)], lr=.1)
    if 'norm_loss' in opt.param_groups[0]:
        for g in opt.param_groups: g['norm_loss'] = 0.
    assert [g['weight_decay'] for g in opt.param_groups] == [.5, 0.] and [h['wd'] for h in opt.inner.hypers] == [.5, 0.]
    no_gradients(opt)
    assert b.item() == 1
    if opt_func is ranger21 or 'l2_reg' in str(opt.inner.cbs): return # which divides decay by the variance
    plain = opt_func([a2 := ones(1)], lr=.1, wd=.5)
    for _ in range(3):
        a2.grad = torch.zeros_like(a2)
        plain.step()
    assert torch.equal(a, a2) and a.item() < .97

def test_decays_as_adamw():
    a,b,x,y = (ones(1) for _ in range(4))
    groups = lambda p, q: [dict(params=[p], weight_decay=.5), dict(params=[q], weight_decay=0.)]
    for opt in (as_torch(Adam)(groups(a, b), lr=.1), torch.optim.AdamW(groups(x, y), lr=.1)): no_gradients(opt)
    torch.testing.assert_close((a, b), (x, y))
    assert a.item() == pytest.approx(.95**3)

def test_names_in_the_call_in_a_group_and_later():
    model = net()
    opt = as_torch(ranger)([dict(params=model[0].parameters(), betas=(.5, .9)), dict(params=model[2].parameters(), momentum=.7)], lr=.05, weight_decay=.2)
    assert [(g['betas'], g['weight_decay']) for g in opt.param_groups] == [((.5, .9), .2), ((.7, .99), .2)]
    assert not any({'wd', 'mom', 'sqr_mom', 'momentum'} & set(g) for g in opt.param_groups)
    opt.param_groups[0].update(betas=[.6, .8], weight_decay=.3)
    opt.param_groups[1].update(mom=.8, wd=.4) # fastai's names, as in version 0.1
    train(model, opt, 1)
    assert [(h['mom'], h['sqr_mom'], h['wd']) for h in opt.inner.hypers] == [(.6, .8, .3), (.8, .99, .4)]
    assert opt.param_groups[1]['betas'] == (.8, .99) and not {'wd', 'mom'} & set(opt.param_groups[1])
    for ours,theirs in ((dict(wd=.1), dict(weight_decay=.7)), (dict(mom=.1), dict(betas=(.7, .8)))):
        other = as_torch(ranger)(net().parameters(), lr=.05)
        other.param_groups[0].update(**ours, **theirs)
        with pytest.raises(ValueError, match='set the same hyper: give one of them'): other.step()
    assert opt.defaults['betas'] == (.95, .99) and opt.defaults['weight_decay'] == .2
    sgd = as_torch(lookahead([average_grad, momentum_step]))(net().parameters(), lr=.1, momentum=.8)
    assert sgd.param_groups[0]['momentum'] == .8 == sgd.inner.hypers[0]['mom']

@pytest.mark.parametrize('group,message', [
    (dict(sqrmom=.5), 'there is no hyper `sqrmom`.*did you mean `sqr_mom`'), (dict(weight_decy=.5), 'did you mean `weight_decay`'), (dict(beta1=.5), 'did you mean `beta'),
    (dict(betas=.9), '`betas` must be a pair of numbers, got 0.9'), (dict(betas=(.9, 2.)), '`sqr_mom` must be .*got 2.0'), (dict(weight_decay=-1), '`wd` must be .*got -1'),
    (dict(wd=.1, weight_decay=.1), '`wd` and `weight_decay` set the same hyper'), (dict(momentum=.9, betas=(.9, .99)), '`momentum` and `betas` set the same hyper'),
    (dict(maximize=True), 'ranger cannot have maximize=True in a parameter group'), (dict(amsgrad=True), 'cannot have amsgrad=True'), (dict(nesterov=True), 'cannot have nesterov=True'),
    (dict(use_muon=True), 'cannot have use_muon=True'), (dict(decoupled_weight_decay=False), 'cannot have decoupled_weight_decay=False')])
def test_groups_that_are_refused(group, message):
    "when the optimizer is made, and when the group is added, with nothing changed"
    a,b = net(),net()
    with pytest.raises(ValueError, match=message): as_torch(ranger)([dict(params=a.parameters(), **group)], lr=.1)
    opt = as_torch(ranger)(a.parameters(), lr=.1)
    before = str(opt.state_dict())
    with pytest.raises(ValueError, match=message): opt.add_param_group(dict(params=b.parameters(), **group))
    assert str(opt.state_dict()) == before and len(opt.inner.hypers) == len(opt.param_groups) == 1

def test_what_tools_keep_stays():
    kept = dict(initial_lr=.1, max_lr=.2, lr_scale=.5, name='body', foreach=None, fused=True, maximize=False, amsgrad=False)
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt = as_torch(ranger)([dict(params=model.parameters(), **kept)], lr=.1)
    train(model, opt, 3)
    again = as_torch(ranger)(net().parameters(), lr=.3)
    again.load_state_dict(opt.state_dict())
    for o in (opt, again): assert kept.items() <= o.param_groups[0].items()
    with pytest.warns(UserWarning, match='`depth` in a parameter group is no hyper of ranger: it stays there'): as_torch(ranger)([dict(params=model.parameters(), depth=3)], lr=.1)

def test_groups_of_a_pytorch_optimizer():
    "go over as they are"
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opt = as_torch(Adam)(torch.optim.AdamW(model.parameters(), lr=.02, weight_decay=.3, betas=(.8, .9)).param_groups, lr=.1)
    assert [opt.inner.hypers[0][k] for k in ('lr', 'wd', 'mom', 'sqr_mom')] == [.02, .3, .8, .9]

def test_muon_by_group():
    w,v,b = ones(4, 3),ones(4, 3),ones(4)
    opt = as_torch(ranger_muon)([dict(params=[w], use_muon=True), dict(params=[v, b], use_muon=False)], lr=.1)
    for _ in range(7):
        for p in (w, v, b): p.grad = torch.ones_like(p)
        opt.step()
    assert len(opt.params_with('do_muon')) == 1 and opt.params_with('do_muon')[0] is w and [g['use_muon'] for g in opt.param_groups] == [True, False]
    assert 'sqr_avg' in opt.state[v] and 'sqr_avg' not in opt.state[w]
    with pytest.raises(ValueError, match=r'use_muon=True and a parameter of shape \(4,\)'): as_torch(ranger_muon)([dict(params=[b], use_muon=True)], lr=.1)
    with pytest.raises(ValueError, match='`use_muon` must be one of True, False, got 1'): as_torch(ranger_muon)([dict(params=[w], use_muon=1)], lr=.1)

@pytest.mark.parametrize('sched', (lambda o: OneCycleLR(o, .1, total_steps=21), lambda o: CyclicLR(o, .01, .1, step_size_up=5)))
@pytest.mark.parametrize('opt_func', (ranger, ranger_muon, RAdam, lookahead([average_grad, momentum_step])))
def test_schedulers_cycle_the_momentum(opt_func, sched):
    "by default, as with PyTorch's own"
    a,b = net(),net()
    opt = as_torch(opt_func)(a.parameters(), lr=.05)
    betas = 'betas' in opt.defaults
    theirs = torch.optim.RAdam(b.parameters(), lr=.05, betas=(.9, .99)) if betas else torch.optim.SGD(b.parameters(), lr=.05, momentum=.9)
    scheds = sched(opt),sched(theirs)
    for _ in range(20):
        train(a, opt, 1, scheds[0])
        train(b, theirs, 1, scheds[1])
        for k in ('lr', 'betas' if betas else 'momentum'): assert opt.param_groups[0][k] == theirs.param_groups[0][k]
    opt.step()
    assert opt.inner.hypers[0]['mom'] == (opt.param_groups[0]['betas'][0] if betas else opt.param_groups[0]['momentum'])

def test_options_are_what_the_optimizer_does():
    "whichever that is"
    w = ones(4, 3)
    for f,fine,not_fine in ((muon, dict(nesterov=True), dict(nesterov=False)), (ranger_va, dict(amsgrad=True), dict(amsgrad=False)),
            (ranger, dict(decoupled_weight_decay=True), dict(decoupled_weight_decay=False))):
        as_torch(f)([dict(params=[w], **fine)], lr=.1)
        with pytest.raises(ValueError, match='in a parameter group: it has'): as_torch(f)([dict(params=[w], **not_fine)], lr=.1)
    as_torch(RAdam)([dict(params=[w], decoupled_weight_decay=False)], lr=.1, decouple_wd=False)
    as_torch(RAdam)(torch.optim.Adam([w]).param_groups, lr=.1) # no decay, of either kind
    if hasattr(torch.optim, 'Muon'): as_torch(ranger_muon)([{k: v for k,v in torch.optim.Muon([w]).param_groups[0].items() if k not in ('ns_coefficients', 'adjust_lr_fn')}], lr=.1)

def test_the_flag_of_a_group_counts():
    "whatever `spare_ends` says, and when it changes; averages begin anew with their count"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    opt = as_torch(ranger_muon)([dict(params=[model[0].weight], use_muon=False), dict(params=[model[1].weight]), dict(params=[model[2].weight], use_muon=True)], lr=.01)
    def has_muon(): return [any(p is m.weight for p in opt.params_with('do_muon')) for m in model]
    spare_ends(opt, model)
    assert has_muon() == [False, True, True]
    train(model, opt, 3)
    opt.param_groups[0]['use_muon'] = True
    train(model, opt, 1)
    assert has_muon() == [True, True, True] and [opt.state[m.weight]['step'] for m in model] == [1, 4, 4]
    opt.param_groups[2]['use_muon'] = 1
    with pytest.raises(ValueError, match='`use_muon` must be one of True, False'): opt.step()

def test_what_is_added_by_name():
    w,v = ones(4, 3),ones(4, 3)
    opt = as_torch(ranger_muon)([w], lr=.1)
    if torch.__version__ >= (2, 6):
        opt = as_torch(ranger_muon)([('w', w)], lr=.1)
        opt.add_param_group(dict(params=[('v', v)], use_muon=True))
        assert len(opt.params_with('do_muon')) == 2
    with pytest.raises(TypeError, match='ordered'): opt.add_param_group(dict(params={v}))

def test_an_optimizer_without_a_name():
    with pytest.warns(UserWarning, match='`label` in a parameter group is no hyper of MultiTensorOptimizer'):
        as_torch(lambda ps, **kw: MultiTensorOptimizer(ps, [sgd_step], **kw))([dict(params=[ones(2)], label='head')], lr=.1)

def test_a_checkpoint_of_version_01():
    "has fastai's names in its groups"
    model,other = net(),net()
    opt = as_torch(ranger)(model.parameters(), lr=.05)
    train(model, opt, 8)
    sd = copy.deepcopy(opt.state_dict())
    for g in sd['param_groups']:
        g['mom'],g['sqr_mom'] = g.pop('betas')
        g['wd'] = g.pop('weight_decay')
    other.load_state_dict(model.state_dict())
    again = as_torch(ranger)(other.parameters(), lr=.3, wd=.5)
    again.load_state_dict(sd)
    assert again.param_groups[0].keys() == opt.param_groups[0].keys()
    same(train(other, again, 8), train(model, opt, 8))

def test_closures_hooks_and_errors():
    model,calls = net(),[]
    opt = as_torch(ranger)(model.parameters(), lr=.05)
    opt.register_step_pre_hook(lambda *_: calls.append('pre'))
    opt.register_step_post_hook(lambda *_: calls.append('post'))
    def closure():
        opt.zero_grad()
        res = loss(model)
        res.backward()
        calls.append('closure')
        return res
    assert opt.step(closure) > loss(model) and calls == ['pre', 'closure', 'post']
    assert repr(opt).startswith('ranger(lr=0.05')
    with pytest.raises(TypeError, match='needs a learning rate'): as_torch(ranger)(net().parameters())
    with pytest.raises(ValueError, match='`k` must be'): as_torch(ranger)(net().parameters(), lr=.1, k=0)
    with pytest.raises(ValueError, match='for optimizers of fastai_ranger'): as_torch(stock.Adam)(list(net().parameters()), lr=.1)
    opt.param_groups[0]['lr'] = -1.
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='`lr` must be'): opt.step()
    same(model.parameters(), before)

def test_restart():
    model = net()
    opt = as_torch(ranger)(model.parameters(), lr=0., wd=0.)
    train(model, opt, 3)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(5.)
    opt.restart()
    assert all((s['slow']==5).all() for s in opt.state_dict()['state'].values()) # where a checkpoint would go on
    assert all((p==5).all() for p in train(model, opt, 6))

def test_grad_scaler():
    model,plain = net().float(),net().float()
    xs = x.float()
    opt,other = (as_torch(ranger)(m.parameters(), lr=.05) for m in (model, plain))
    scaler = torch.amp.GradScaler('cpu', init_scale=4.)
    for i in range(8):
        for m,o,s in ((model, opt, scaler), (plain, other, None)):
            o.zero_grad()
            out = (m(xs)-xs.sum(1, keepdim=True)).pow(2).mean()
            if i==3: out = out*torch.inf
            (s.scale(out) if s else out).backward()
            if s:
                s.step(o)
                s.update()
            elif i != 3: o.step()
    for a,b in zip(model.parameters(), plain.parameters()): torch.testing.assert_close(a, b)

def test_accelerate(tmp_path):
    "`accumulate` counts, and `save_state` and `load_state` carry the optimizer"
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model,opt = acc.prepare(model, as_torch(ranger)(model.parameters(), lr=.05))
    def go(n):
        for _ in range(n):
            with acc.accumulate(model):
                acc.backward(loss(model))
                opt.step()
                opt.zero_grad()
        return [p.detach().clone() for p in model.parameters()]
    go(6)
    assert {s['step'] for s in opt.optimizer.state.values()} == {3}
    acc.save_state(tmp_path)
    whole = go(8)
    acc.load_state(tmp_path)
    same(go(8), whole)

@pytest.mark.parametrize('opt_func', (ranger, lookahead(torch.optim.SGD)))
def test_accelerate_warns(opt_func):
    "of an optimizer of fastai's kind, and of no other"
    ps,acc = list(net().parameters()),Accelerator(cpu=True)
    opt = opt_func(ps, lr=.05)
    with pytest.warns(UserWarning, match='as_torch') as got: assert acc.prepare(opt) is opt
    assert got[0].filename==__file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        acc.prepare(nn.Linear(2, 2), as_torch(ranger)(ps, lr=.05))

def test_other_parameters_in_a_group():
    "Accelerate puts sharded parameters in the place of the old ones"
    model,plain = net(),net()
    opt,other = as_torch(ranger)(net().parameters(), lr=.05),ranger(list(plain.parameters()), lr=.05)
    for g in opt.param_groups: g['params'] = list(model.parameters())
    same(train(model, opt, 8), train(plain, other, 8))
    assert '1 group, 4 tensors' in repr(opt) and set(opt.state_dict()['state']) == {0, 1, 2, 3}

def test_groups_that_come_and_go_in_the_list():
    model,plain = net(),net()
    opt,other = (as_torch(ranger)([dict(params=m[i].parameters()) for i in (0, 2)], lr=.05) for m in (model, plain))
    last = opt.param_groups.pop()
    train(model, opt, 2)
    same(model[2].parameters(), net()[2].parameters())
    opt.param_groups.append({'params': last['params'], 'lr': .01})
    train(model, opt, 2)
    assert [h['lr'] for h in opt.inner.hypers] == [.05, .01] and opt.param_groups[1]['k'] == 6
    opt.param_groups.clear()
    opt.step()
    assert repr(opt).startswith('ranger(')
    opt.param_groups.append(last)
    opt.param_groups[0]['lr'] = -1.
    with pytest.raises(ValueError, match='`lr` must be'): opt.step()

def test_state_that_is_emptied():
    model = net()
    opt = as_torch(ranger)(model.parameters(), lr=.05)
    train(model, opt, 7)
    opt.state = collections.defaultdict(dict)
    again = net()
    again.load_state_dict(model.state_dict())
    same(train(model, opt, 8), train(again, as_torch(ranger)(again.parameters(), lr=.05), 8))

@pytest.mark.filterwarnings('ignore:the checkpoint has no')
@pytest.mark.parametrize('first,then', [(Adam, ranger), (RAdam, ranger), (muon, ranger_muon), (ranger, RAdam)])
def test_a_checkpoint_of_another_kind(first, then):
    "Loads as it does without `as_torch`, and what it lacks stays"
    models,opts = [net(), net()],[]
    for m,form in zip(models, (as_torch, lambda o: lambda ps, lr: o(list(ps), lr))):
        old = form(first)(m.parameters(), lr=.05)
        train(m, old, 3)
        opts.append(form(then)(m.parameters(), lr=.1))
        opts[-1].load_state_dict(old.state_dict())
    assert opts[0].param_groups[0]['lr'] == .05 and set(to_torch(opts[1].hypers[0])) <= set(opts[0].param_groups[0])
    same(train(models[0], opts[0], 14), train(models[1], opts[1], 14))

def test_repr_has_the_rate_of_now():
    opt = as_torch(ranger)(net().parameters(), lr=.05)
    opt.param_groups[0]['lr'] = .5
    assert repr(opt).startswith('ranger(lr=0.5')

def test_spares_what_a_learner_would():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    opt = as_torch(ranger_muon)(model.parameters(), lr=.1)
    spare_ends(opt, model)
    assert [n for n,p in model.named_parameters() if not opt.state.get(p, {}).get('do_muon', True)] == ['0.weight', '2.weight']
    opt = as_torch(ranger_gc)(model.parameters(), lr=.1)
    spare_embeddings(opt, model)
    assert opt.state[model[0].weight] == {'do_gc': False}
