"""Reference implementations: the formulas of each optimizer in fastai's own steppers

fastai's steppers take one tensor at a time, inside its `Optimizer` and its `Lookahead`: slow, short and easy to check.
The tests compare every optimizer of the package with one of these. To time one, name it by its module:

    PYTHONPATH=tests ranger-bench --opts stock,ranger_va,reference:stock_va
"""
from functools import partial

import fastai.optimizer as stock
import torch
from fastai_ranger.contrib.variants import fastai_hypers
from fastai_ranger.optimizers.adam import rectify
from torch.nn import functional as F

# What the formulas share

def over_rows(x): return tuple(range(1, x.ndim))

def row_mean(x): return x.mean(over_rows(x), keepdim=True)

def row_norm(x):
    "The norm of each row; of a bias, the norm of the whole"
    if x.ndim < 2: return x.norm()
    return torch.linalg.vector_norm(x, dim=over_rows(x), keepdim=True)

def unbiased(avg, factor, step):
    "An average that began at zero, without its bias towards zero"
    return avg/(1-factor**step)

# Steppers of the variants

def centralize_one(p, **kwargs):
    "Take the mean off each row of the gradient"
    if p.ndim > 1 and p.numel() > len(p): p.grad.sub_(row_mean(p.grad))

def radam_update_one(p, step, mom, sqr_mom, eps, grad_avg, sqr_avg, **kwargs):
    "Put RAdam's update, without the learning rate, in the place of the gradient"
    r = rectify(step, sqr_mom)
    update = unbiased(grad_avg, mom, step)
    if r: update = update*r/(unbiased(sqr_avg, sqr_mom, step).sqrt()+eps)
    p.grad.copy_(update)

def max_sqr_one(p, sqr_avg, max_avg=None, **kwargs):
    "Keep the largest `sqr_avg` so far, as AMSGrad does"
    if max_avg is None: max_avg = sqr_avg
    return dict(max_avg=torch.max(max_avg, sqr_avg))

def calibrated_one(p, lr, step, mom, sqr_mom, eps, beta, grad_avg, max_avg, **kwargs):
    "Adam's step with a softplus of the denominator"
    denom = F.softplus(unbiased(max_avg, sqr_mom, step).sqrt()+eps, beta)
    p.data.addcdiv_(grad_avg, denom, value=-lr/(1-mom**step))

def belief_one(p, sqr_mom, eps, grad_avg, sqr_avg=None, **kwargs):
    "Average the square of what the average did not foresee, as AdaBelief does"
    if sqr_avg is None: sqr_avg = torch.zeros_like(p)
    surprise = p.grad-grad_avg
    return dict(sqr_avg=sqr_avg.mul_(sqr_mom).addcmul_(surprise, surprise, value=1-sqr_mom).add_(eps))

def trust_one(p, **kwargs):
    "Scale the update to the norm of the weight, at most 10, as LARS does"
    weight,update = p.data.norm(),p.grad.norm()
    if weight > 0 and update > 0: p.grad.mul_(weight.clamp(max=10)/update)

def muon_one(p, lr, mom, grad_avg, **kwargs):
    "Five Newton-Schulz iterations on the update of a hidden weight; RAdam's step on others"
    is_matrix = p.ndim > 1 and len(p) > 1 and p.numel() > len(p)
    is_depthwise = p.ndim > 2 and p.shape[1]==1
    if not is_matrix or is_depthwise: return stock.radam_step(p, lr=lr, mom=mom, grad_avg=grad_avg, **kwargs)
    x = p.grad.lerp(grad_avg, mom).reshape(len(p), -1)
    if x.norm(): x = x/x.norm()
    is_wide = x.shape[0] < x.shape[1]
    for _ in range(5):
        if is_wide: gram = x@x.T
        else: gram = x.T@x
        poly = 3.4445*torch.eye(len(gram), dtype=x.dtype) - 4.775*gram + 2.0315*gram@gram
        if is_wide: x = poly@x
        else: x = x@poly
    p.data.add_(x.reshape(p.shape), alpha=-lr*.2*max(x.shape)**.5)

# Steppers of Ranger21

def clip_one(p, clip, **kwargs):
    "Scale each row of the gradient to at most `clip` times the norm of the weight's row"
    most = row_norm(p.data).clamp(min=1e-3)*clip
    now = row_norm(p.grad).clamp(min=1e-6)
    p.grad.copy_(torch.where(now > most, p.grad*(most/now), p.grad))

def normalize_one(p, **kwargs):
    "Divide the gradient by its standard deviation"
    if p.numel() > 2: p.grad.div_(p.grad.std()+1e-8)

def average_pnm_one(p, mom, step, odd_avg=None, even_avg=None, **kwargs):
    "Average the gradients of odd and of even steps apart"
    if odd_avg is None:
        odd_avg = torch.zeros_like(p)
        even_avg = torch.zeros_like(p)
    if step%2: now = odd_avg
    else: now = even_avg
    now.mul_(mom**2).add_(p.grad, alpha=1-mom**2)
    return dict(odd_avg=odd_avg, even_avg=even_avg)

def stable_decay_one(p, lr, wd, rms, do_wd=True, **kwargs):
    "Weight decay over the root of the mean of all averages of squares"
    if do_wd and wd and rms: p.data.mul_(1-lr*wd/rms)

def norm_loss_one(p, lr, norm_loss, eps, do_wd=True, **kwargs):
    "Pull each row to the norm 1"
    if do_wd: p.data.mul_(1-2*lr*norm_loss*(1-1/(row_norm(p.data)+eps)))

def pnm_one(p, lr, mom, sqr_mom, eps, beta, pnm, step, odd_avg, even_avg, max_avg, **kwargs):
    "Adam's step with positive-negative momentum"
    if step%2: now,other = odd_avg,even_avg
    else: now,other = even_avg,odd_avg
    noise = ((1+pnm)**2+pnm**2)**.5
    momentum = unbiased((now*(1+pnm)-other*pnm)/noise, mom, step)
    denom = unbiased(max_avg, sqr_mom, step).sqrt()+eps
    if beta: denom = F.softplus(denom, beta)
    p.data.addcdiv_(momentum, denom, value=-lr)

class Optimizer21(stock.Optimizer):
    "fastai's `Optimizer`, which stops after the first `n` steppers to find the mean of all squares"
    n = 6
    def step(self):
        cbs = self.cbs
        self.cbs = cbs[:self.n]
        super().step()
        rms = self.rms()
        for *_,state,_ in self.all_params(with_grad=True): state['rms'] = rms
        self.cbs = cbs[self.n:]
        super().step()
        self.cbs = cbs

    def rms(self):
        "The root of the mean of `sqr_avg` in all parameters that have a gradient"
        total = count = 0
        for p,_,state,hypers in self.all_params(with_grad=True):
            total = total+unbiased(state['sqr_avg'].sum(), hypers['sqr_mom'], state['step'])
            count += p.numel()
        return (total/count).sqrt()

# Optimizers

def inside_lookahead(*cbs, cls=stock.Optimizer, k=6, **hypers):
    "The `opt_func` of fastai's `Lookahead` around an optimizer with the steppers `cbs`"
    def opt_func(params, lr, k=k, alpha=.5, **kwargs):
        opt = cls(params, cbs, lr=lr, **{**hypers, **kwargs})
        return stock.Lookahead(opt, k, alpha)
    return opt_func

average_grad = partial(stock.average_grad, dampening=True)
averages = average_grad,stock.average_sqr_grad,stock.step_stat
usual = dict(**fastai_hypers, beta=0.)

stock_gc = inside_lookahead(stock.weight_decay, centralize_one, *averages, stock.radam_step, **usual)
stock_gc_update = inside_lookahead(
    stock.weight_decay, *averages, radam_update_one, centralize_one, stock.sgd_step, **usual)
stock_va = inside_lookahead(stock.weight_decay, *averages, max_sqr_one, calibrated_one, **{**usual, 'beta': 50.})
stock_qh = inside_lookahead(stock.weight_decay, *averages, stock.qhadam_step, **usual, nu_1=.7, nu_2=1.)
stock_adabelief = inside_lookahead(
    stock.weight_decay, centralize_one, average_grad, belief_one, stock.step_stat, stock.radam_step,
    **{**usual, 'eps': 1e-12})
stock_lars = inside_lookahead(stock.weight_decay, *averages, radam_update_one, trust_one, stock.sgd_step, **usual)
stock_muon = inside_lookahead(stock.weight_decay, *averages, muon_one, **usual)
stock21 = inside_lookahead(
    clip_one, centralize_one, normalize_one, stock.average_sqr_grad, stock.step_stat, average_pnm_one,
    max_sqr_one, stable_decay_one, norm_loss_one, pnm_one,
    cls=Optimizer21, k=5, mom=.9, sqr_mom=.999, eps=1e-8, wd=1e-4, clip=.01, norm_loss=1e-4, beta=50., pnm=1.)

def lookahead_adam(params, lr): return stock.Lookahead(stock.Adam(params, lr=lr))
def lookahead_sgd(params, lr): return stock.Lookahead(stock.SGD(params, lr=lr, mom=.9))

# By the name of the optimizer, as in the registry or in `helpers.more`; `None` where nothing else has its formulas
references = dict(
    ranger=stock.ranger,
    ranger_l2=partial(stock.ranger, decouple_wd=False),
    ranger_beta=partial(stock.ranger, beta=2.),
    ranger_l2_beta=partial(stock.ranger, decouple_wd=False, beta=2.),
    ranger_kahan=stock.ranger,
    radam=stock.RAdam,
    radam_l2=partial(stock.RAdam, decouple_wd=False),
    fast_adam=stock.Adam,
    ranger_gc=stock_gc,
    ranger_gc_update=stock_gc_update,
    ranger_va=stock_va,
    ranger_qh=stock_qh,
    ranger_adabelief=stock_adabelief,
    ranger_lars=stock_lars,
    ranger_muon=stock_muon,
    ranger21=stock21,
    lookahead_adam=lookahead_adam,
    lookahead_sgd=lookahead_sgd,
    muon=None,
    ranger_skip=None,
    lookahead_torch_sgd=None,
    lookahead_torch_adamw=None,
    fastais_steppers=None,
)
