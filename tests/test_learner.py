"`ranger` in a real `Learner`, on real data"
from functools import partial

import fastai.callback.schedule
import fastai.optimizer as stock
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import params, set_seed
from fastai_ranger.all import as_torch, lookahead, ranger, ranger_muon
from fastai_ranger.compare.data import cnn, digits_dls

def learner(opt_func, **kwargs):
    set_seed(0, reproducible=True)
    dls = digits_dls()
    dls.train.n = 512 # eight batches an epoch
    learn = Learner(dls, cnn(c_in=1), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func, **kwargs)
    return learn

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def halves(model): return [params(model[:2]), params(model[2:])]

def fit_one_cycle(learn): learn.fit_one_cycle(2, 8e-3)
def fine_tune(learn): learn.fine_tune(1, 8e-3)

@pytest.mark.parametrize('fit', [fit_one_cycle, fine_tune])
@pytest.mark.parametrize('kwargs', [dict(mom=.95, sqr_mom=.99, eps=1e-6, beta=0), dict(decouple_wd=False, k=3, alpha=.8)])
def test_ends_where_stock_does(fit, kwargs):
    learns = [learner(partial(f, **kwargs), splitter=halves) for f in (ranger, stock.ranger)]
    for o in learns:
        with o.no_bar(), o.no_logging(): fit(o)
    ours,theirs = map(weights, learns)
    assert (ours-theirs).abs().max() < 2e-4 # sixteen batches of float32
    assert [list(o.opt.hypers.itemgot('lr')) for o in learns[:1]] == [list(o.opt.hypers.itemgot('lr')) for o in learns[1:]]

def test_no_decay_of_norms_and_biases():
    learn = learner(ranger)
    learn.create_opt()
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    learn.opt.set_hyper('wd', .1)
    learn.opt.set_hyper('lr', .1)
    learn.opt.step()
    for n,p in learn.model.named_parameters(): assert torch.allclose(p, before[n]*(1 if p.ndim==1 else .99)), n

def test_bare_loop():
    set_seed(0)
    dls,model = digits_dls(),cnn(c_in=1)
    opt = ranger(model.parameters(), 8e-3)
    losses = []
    for i,(x,y) in enumerate(dls.train):
        if i==15: opt.set_hyper('lr', 1e-3)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]*.9 and opt.hypers[0]['lr']==1e-3

def test_a_scripted_model():
    "Trains as it does unscripted"
    ends = []
    for script in (lambda o: o, torch.jit.script):
        learn = learner(ranger)
        learn.model = script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
        with torch.no_grad():
            for p in learn.model.parameters(): p.fill_(.01)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        ends.append(weights(learn))
    assert torch.allclose(*ends, atol=1e-6) and (ends[0]-.01).abs().max() > .001

@pytest.mark.parametrize('opt_func,message', [
    (as_torch(ranger), r'write opt_func=ranger, not opt_func=as_torch\(ranger\)'), (partial(as_torch(ranger_muon), wd=.1), 'write opt_func=ranger_muon'),
    (torch.optim.SGD, r'write opt_func=lookahead\(SGD\), or partial\(OptimWrapper, opt=SGD\)'), (partial(torch.optim.AdamW, weight_decay=.1), 'write opt_func=lookahead')])
@pytest.mark.parametrize('splitter', (params, halves))
def test_an_optimizer_of_pytorchs_kind(opt_func, message, splitter):
    "is refused where it is made, with what to write"
    learn = learner(opt_func, splitter=splitter)
    for f in (learn.create_opt, lambda: learn.fit(1)):
        with pytest.raises(TypeError, match=message): f()
    assert learn.opt is None

@pytest.mark.parametrize('opt_func', (ranger, ranger_muon, lookahead(torch.optim.SGD), lookahead(stock.SGD)))
def test_zero_grad_as_pytorchs_loops_call_it(opt_func):
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = opt_func([p], lr=.1)
    for kwargs,left in ((dict(set_to_none=True), None), ({}, None), (dict(set_to_none=False), 0.)):
        p.grad = (kept := torch.ones(2, 2))
        opt.zero_grad(**kwargs)
        if left is None: assert p.grad is None and (kept==1).all()
        else: assert p.grad is kept and (kept==0).all()
        opt.zero_grad(**kwargs) # where there may be no gradient
