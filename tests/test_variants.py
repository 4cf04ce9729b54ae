"Each variant of Ranger against an implementation that is not ours, and each of its switches"
from functools import partial
from importlib import import_module

import fastai.optimizer as stock
import pytest
import pytorch_optimizer
import pytorch_ranger
import torch
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.contrib.variants import fastai_hypers
from fastai_ranger.all import ranger
from fastai_ranger.compare.data import digits_dls
from pytorch_optimizer.optimizer import ranger21 as their_ranger21
from pytorch_optimizer.optimizer.utils.gradient import normalize_gradient
from ranger_adabelief import RangerAdaBelief
from torch import nn

shapes = (4, 3, 3, 3), (6, 5), (7,), (), (3, 1), (1, 4)

def params(seed=0, shapes=shapes, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]

def apart(a, b): return max((x.detach()-y.detach()).abs().max().item() for x,y in zip(a, b))

def train(ps, opt, n=50, late=(), seed=1, before=lambda i: None):
    "`n` updates with random gradients; the parameters `late` get none in the first seven"
    torch.manual_seed(seed)
    for i in range(n):
        before(i)
        for j,p in enumerate(ps):
            g = torch.randn_like(p)*10**torch.randn((), dtype=p.dtype)+.1
            p.grad = None if j in late and i < 7 else g
        opt.step()
    return ps

def trained(opt_func, n=50, shapes=shapes, late=(), dtype=torch.float64, **kwargs):
    ps = params(shapes=shapes, dtype=dtype)
    return train(ps, opt_func(ps, **kwargs), n, late)

@pytest.fixture
def in_float64(monkeypatch):
    "Code that casts everything to float32 works in float64"
    monkeypatch.setattr(torch.Tensor, 'float', lambda self: self)
    theirs = import_module('ranger_adabelief.ranger_adabelief')
    in_place = theirs.centralized_gradient
    monkeypatch.setattr(theirs, 'centralized_gradient', lambda g, **kwargs: in_place(g.clone(), **kwargs)) # or it changes the momentum, where that is the update

# A filter of one number is centralized to zero by the peers, and left alone here
filters = shapes[:4]

@pytest.mark.parametrize('gc', ['grad', 'update', False])
@pytest.mark.parametrize('conv_only', [False, True])
def test_gc_is_theirs(gc, conv_only, in_float64):
    "`ranger_adabelief` without AdaBelief is Less Wright's Ranger of 2020; its `eps` stands elsewhere, and decay leaks into its momentum"
    theirs = trained(partial(RangerAdaBelief, lr=.01, eps=1e-300, adabelief=False, use_gc=bool(gc), gc_conv_only=conv_only, gc_loc=gc!='update'), shapes=filters)
    assert apart(trained(partial(ranger_gc, lr=.01, eps=0, gc=gc, conv_only=conv_only), shapes=filters), theirs) < 1e-10

@pytest.mark.parametrize('gc', ['grad', 'update'])
def test_gc_matters(gc):
    assert apart(trained(partial(ranger_gc, lr=.01, gc=gc)), trained(partial(ranger_gc, lr=.01, gc=False))) > 1e-3

@pytest.mark.parametrize('kwargs', [{}, dict(nus=(1., 1.)), dict(nus=(.5, .6)), dict(nus=(1., .3)), dict(nus=(0., 1.)), dict(weight_decay=.1), dict(weight_decay=.1, decouple_weight_decay=True, k=1, alpha=1.), dict(k=3, alpha=.8, betas=(.95, .99), eps=1e-3)])
@pytest.mark.filterwarnings('ignore')
def test_qh_is_theirs(kwargs):
    "Theirs takes its slow weights after the first decay, so that case is without Lookahead"
    names = dict(weight_decay='wd', decouple_weight_decay='decouple_wd')
    ours = {names.get(k, k): v for k,v in kwargs.items() if k not in ('nus', 'betas')}
    if 'nus' in kwargs: ours.update(zip(('nu_1', 'nu_2'), kwargs['nus']))
    if 'betas' in kwargs: ours.update(zip(('mom', 'sqr_mom'), kwargs['betas']))
    theirs = trained(partial(pytorch_ranger.RangerQH, lr=.01, **kwargs))
    assert apart(trained(partial(ranger_qh, lr=.01, **ours)), theirs) < 1e-10

@pytest.mark.parametrize('gc', [True, False])
def test_adabelief_is_theirs(gc, in_float64):
    "With an `eps` of next to nothing: theirs is added only in rectified updates, and before the bias correction"
    theirs = trained(partial(RangerAdaBelief, lr=.01, betas=(.9, .999), eps=1e-300, use_gc=gc), shapes=filters)
    assert apart(trained(partial(ranger_adabelief, lr=.01, eps=0, gc=gc), shapes=filters), theirs) < 1e-10

@pytest.mark.parametrize('eps', [1e-12, 1e-3])
@pytest.mark.parametrize('wd', [0., .1])
def test_adabelief_is_the_papers(eps, wd):
    "Without rectification and Lookahead: another peer has `eps` where the paper has it"
    theirs = trained(partial(pytorch_optimizer.AdaBelief, lr=.01, eps=eps, weight_decay=wd))
    assert apart(trained(partial(ranger_adabelief, lr=.01, eps=eps, wd=wd, gc=False, rectified=False, k=1, alpha=1)), theirs) < 1e-10

def test_va_is_fastais_sadam():
    "fastai takes what is above 20/beta for its own softplus: 4e-11"
    theirs = trained(partial(stock.ranger, lr=.01, beta=50))
    assert apart(trained(partial(ranger_va, lr=.01, amsgrad=False, rectified=True, **fastai_hypers)), theirs) < 1e-10

@pytest.mark.parametrize('softplus', [True, False])
@pytest.mark.parametrize('gc', [True, False])
@pytest.mark.parametrize('norm_grad', [True, False])
def test_ranger21_is_theirs(softplus, gc, norm_grad, monkeypatch):
    "Without decay: theirs counts one too many in the sum of squares. And normalized once: theirs does so twice, which is not quite the same"
    once = lambda g: g if g.numel() > 2 and abs(g.std()-1) < .1 else normalize_gradient(g)
    monkeypatch.setattr(their_ranger21, 'normalize_gradient', once)
    theirs = trained(partial(pytorch_optimizer.Ranger21, num_iterations=50, lr=.01, disable_lr_scheduler=True, weight_decay=0., use_softplus=softplus,
                             centralize_gradients=gc, normalize_gradients=norm_grad), shapes=filters)
    ours = trained(partial(ranger21, lr=.01, pnm=.9, wd=0., beta=50. if softplus else 0., gc=gc, norm_grad=norm_grad), shapes=filters)
    assert apart(ours, theirs) < 1e-10


def groups(ps): return [ps[:3], ps[3:]]

def switched(part):
    "A variant and its keywords with all its parts off but `part`"
    name,on = part
    if name=='ranger_gc': return partial(ranger_gc, gc=on or False)
    if name=='ranger_lars': return partial(ranger_lars, trust=bool(on))
    off = dict(ranger_va=dict(beta=0., amsgrad=False), ranger_qh=dict(nu_1=1., nu_2=1., decouple_wd=True), ranger_adabelief=dict(belief=False, gc=False),
               ranger21=dict(clip=0, gc=False, norm_grad=False, pnm=0, norm_loss=0, stable_wd=False, beta=0, amsgrad=False))
    return partial(globals()[name], rectified=True, **{**off[name], **(on or {})})

hypers = dict(lr=.01, mom=.9, sqr_mom=.99, eps=1e-6, wd=.1, k=5, alpha=.4)
names = 'ranger_gc', 'ranger_va', 'ranger_qh', 'ranger_adabelief', 'ranger_lars', 'ranger21'

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', names)
def test_off_is_ranger_to_the_bit(name, dtype):
    ours,plain = (trained(partial(f, **hypers), dtype=dtype, late=(1,)) for f in (switched((name, None)), ranger))
    for a,b in zip(ours, plain): assert torch.equal(a, b)

@pytest.mark.parametrize('name', [o for o in names if o != 'ranger21'])
def test_off_is_ranger_with_l2_too(name):
    ours,plain = (trained(partial(f, **{**hypers, 'decouple_wd': False})) for f in (switched((name, None)), ranger))
    for a,b in zip(ours, plain): assert torch.equal(a, b)

parts = [('ranger_gc', 'grad'), ('ranger_gc', 'update'), ('ranger_va', dict(beta=5.)), ('ranger_va', dict(amsgrad=True)), ('ranger_qh', dict(nu_1=.7)), ('ranger_qh', dict(nu_2=.5)),
         ('ranger_adabelief', dict(belief=True)), ('ranger_adabelief', dict(gc=True)), ('ranger_lars', True), *[('ranger21', {k: v}) for k,v in
         dict(clip=.01, gc=True, norm_grad=True, pnm=1., norm_loss=.1, stable_wd=True, beta=5., amsgrad=True).items()]]

@pytest.mark.parametrize('part', parts, ids=str)
def test_each_part_does_something(part):
    assert apart(*(trained(partial(f, **hypers)) for f in (switched(part), ranger))) > 1e-5

@pytest.mark.parametrize('part', parts, ids=str)
def test_fast_and_readable_agree_on_each_part(part):
    "One tensor at a time, in fastai's engine: no buckets, nothing put back. (Its stable decay is that of each tensor, so one tensor)"
    def run(cls):
        ps = params(shapes=[(4, 3, 3, 3)])
        made = switched(part)(ps, **hypers)
        opt = made if cls is MultiTensorOptimizer else stock.Optimizer(ps, made.cbs, **made.hypers[0])
        return train(ps, opt)
    assert apart(run(MultiTensorOptimizer), run(stock.Optimizer)) < 1e-12

@pytest.mark.parametrize('f', [ranger_gc, ranger_qh, ranger_adabelief, ranger_lars])
def test_gradients_stay_with_l2(f):
    ps = params()
    opt = f(ps, lr=.01, wd=.1, decouple_wd=False)
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    assert all((p.grad==1).all() for p in ps)

def test_gradients_come_back_after_an_error():
    def broken(p, **kwargs): raise RuntimeError('broken')
    for cbs in ([centralize, stepper()(lambda p, grad, **kwargs: broken(p))], [centralize, broken, sgd_step]):
        p = params()[0]
        p.grad = g = torch.ones_like(p)
        with pytest.raises(RuntimeError, match='broken'): MultiTensorOptimizer([p], cbs, lr=.1).step()
        assert p.grad is g

def test_update_position_keeps_the_mean_of_every_filter():
    ps = params()
    before = [p.detach().clone() for p in ps]
    train(ps, ranger_gc(ps, lr=.05, gc='update', **{**fastai_hypers, 'wd': 0.}), n=100)
    for p,b in zip(ps, before):
        dims = tuple(range(1, p.ndim))
        moved = (p.detach()-b).abs().max()
        assert moved > .1
        if p.ndim > 1 and p.numel() > len(p): assert (p.detach().mean(dims)-b.mean(dims)).abs().max() < 1e-14
        else: assert (p.detach()-b).mean().abs() > 1e-4 # a vector, and a filter of one number

class Tagger(nn.Module):
    "An embedding, a convolution in one dimension, and a linear layer"
    def __init__(self):
        super().__init__()
        self.emb,self.conv,self.out = nn.Embedding(17, 6),nn.Conv1d(6, 8, 3),nn.Linear(8, 10)
    def forward(self, x): return self.out(self.conv(self.emb((x*16).round().long().clamp(0, 16).flatten(1)).transpose(1, 2)).mean(2))

@pytest.mark.parametrize('kwargs,fixed', [(dict(gc='update'), {'conv.weight', 'out.weight'}), (dict(gc='update', conv_only=True), {'conv.weight'}), (dict(gc=False), set())])
def test_learner_spares_embeddings(kwargs, fixed):
    set_seed(0, reproducible=True)
    learn = Learner(digits_dls(), Tagger(), CrossEntropyLossFlat(), partial(ranger_gc, wd=0., **kwargs))
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters() if p.ndim > 1}
    def still():
        return {n for n,p in learn.model.named_parameters() if n in before and (p.detach().flatten(1).mean(1)-before[n].flatten(1).mean(1)).abs().max() < 1e-6}
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 8e-3)
        assert still()==fixed
        learn.unfreeze() # which clears the state

def test_spare_embeddings_without_a_learner():
    model = Tagger()
    other = nn.Embedding(3, 2)
    opt = ranger_gc([model.emb.weight, model.out.weight], lr=.1)
    spare_embeddings(opt, nn.ModuleList([model, other]))
    assert opt.state[model.emb.weight]=={'do_gc': False} and other.weight not in opt.state

@pytest.mark.parametrize('part', parts, ids=str)
def test_all_steppers_take_many_tensors(part):
    opt = switched(part)(params(), lr=.1)
    assert all(f.scope != 'each' for f,_ in opt.declared.calls)

def test_parts_are_hypers():
    ps = params()
    opt = ranger21(groups(ps), lr=.01)
    opt.set_hypers(clip=[.01, .02], pnm=.5, norm_loss=0.)
    assert [h['clip'] for h in opt.hypers]==[.01, .02]
    with pytest.raises(ValueError, match='`clip` must be'): opt.set_hyper('clip', -1)
    train(ps, opt, n=3)

@pytest.mark.parametrize('gc', ['grad', 'update'])
def test_spared_is_not_centralized(gc):
    "A weight with `do_gc=False` ends where it does without centralization"
    def run(gc):
        ps = params(shapes=[(4, 3)])
        opt = ranger_gc(ps, lr=.01, gc=gc)
        opt.state[ps[0]]['do_gc'] = False
        return train(ps, opt)
    assert apart(run(gc), run(False)) < 1e-13

def test_trust_ratio_moves_weights_of_zero():
    "No norm, no ratio: the update as it is"
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor([1., 2, 3], dtype=torch.float64)
    ranger_lars([p], lr=.1).step()
    assert torch.allclose(p.detach(), -.1*p.grad, atol=1e-12)

def test_limit_of_the_trust_ratio():
    "`max_norm` limits the norm of the weights, and is an option with a range"
    p = nn.Parameter(torch.full((4,), 10., dtype=torch.float64)) # of norm 20
    p.grad = torch.ones_like(p)
    def opt(max_norm): return MultiTensorOptimizer([p], partial(lars_radam_step, max_norm=max_norm), lr=.1, mom=.9, sqr_mom=.99)
    opt(5.).step()
    assert torch.allclose(p.detach(), torch.full_like(p, 10-.1*5/2), atol=1e-12)
    with pytest.raises(ValueError, match='`max_norm` must be'): opt(-1.)
    with pytest.raises(ValueError, match='`max_norm` is an option'): opt(5.).set_hyper('max_norm', 2.)

def test_clip_leaves_small_weights_room():
    "Weights of norm 1e-6 count as 1e-3"
    p = nn.Parameter(torch.full((1, 4), 5e-7))
    grad, = adaptive_clip([p], [torch.ones(1, 4)], clip=.01)['grad']
    assert torch.allclose(grad.norm(), torch.tensor(1e-5))
