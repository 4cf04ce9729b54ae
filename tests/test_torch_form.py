"`as_torch`: a `torch.optim.Optimizer` with the numbers of fastai's kind, in what PyTorch and Accelerate do with one"
import collections, copy, pickle, warnings

import fastai.optimizer as stock
import pytest
import torch
from accelerate import Accelerator
from fastai_ranger.all import *
from fastai_ranger.torch_form import to_torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
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
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='`grad_avg` of parameter 0 of group 0 has shape'): opt.load_state_dict(bad)
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
