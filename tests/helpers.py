"What several tests use"
import multiprocessing, os, tempfile, warnings
from functools import partial

import fastai.optimizer as stock
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.compare.registry import OptInfo, optimizers
from torch import nn

def ours(info):
    "Does the record `info` make an optimizer on our engine?"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: opt = info.opt_func([torch.nn.Parameter(torch.zeros(1))], lr=info.lr)
        except ImportError: return False # of a package that is not installed
        except ValueError as e:
            if 'requires PyTorch' not in str(e): raise
            return False
    return isinstance(opt, MultiTensorOptimizer)

# Records of all on our engine

more = [
    OptInfo('ranger_skip', partial(ranger, unrectified='skip'), 8e-3),
    OptInfo('ranger_l2_beta', partial(ranger, decouple_wd=False, beta=2.), 8e-3),
    OptInfo('radam_l2', partial(RAdam, decouple_wd=False), 3e-3),
    OptInfo('lookahead_torch_sgd', lookahead(partial(torch.optim.SGD, momentum=.9)), 1e-1),
    OptInfo('lookahead_torch_adamw', lookahead(torch.optim.AdamW), 3e-3),
    OptInfo('fastais_steppers', partial(MultiTensorOptimizer, cbs=[stock.weight_decay, stock.sgd_step]), 1e-1)]

records = [o for o in [*optimizers.values(), *more] if ours(o)]

def flat(gs): return [p for g in gs for p in g]
def inner(opt):
    "PyTorch's optimizer in `opt`, if there is one"
    return opt.declared.guests[0].torch if isinstance(opt, MultiTensorOptimizer) and opt.declared.guests else None
def has_slow(opt): return getattr(opt, 'has_slow_weights', False)
def is_whole(info): return any(f.scope=='all' for f,_ in info.opt_func([nn.Parameter(torch.zeros(1))], lr=info.lr).declared.calls if not f.is_guest)

# Processes of their own

forked = multiprocessing.get_context('forkserver') # from one that has imported everything, which takes seconds, and has run nothing
forked.set_forkserver_preload(['fastai_ranger.compare.comparison', 'sklearn.datasets', 'pytest', 'accelerate', 'fastai.distributed', 'torch.distributed.checkpoint.state_dict'])

def _into(log, threads, f, args, kwargs):
    fd = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
    for o in 1,2: os.dup2(fd, o)
    torch.set_num_threads(threads)
    f(*args, **kwargs)

def fork(f, *args, log=os.devnull, threads=1, **kwargs):
    "A process that calls `f`, with all it writes in `log`"
    p = forked.Process(target=_into, args=(log, threads, f, args, kwargs))
    p.start()
    return p

def finish(p):
    p.join()
    assert p.exitcode==0

# How a tensor lies in memory

def as_it_is(t): return t
def turned(t): return t.mT.contiguous().mT if t.ndim > 1 else t
def channels_last(t): return t.to(memory_format=torch.channels_last) if t.ndim==4 else t
def holes(t): return torch.stack([t, t], -1)[..., 0]

# Parameters, steps, state

def param(*vals): return torch.nn.Parameter(torch.tensor(vals, dtype=torch.float64))

def steps(opt, n, edit=None):
    for i in range(n):
        for pg in opt.param_lists:
            for p in pg: p.grad = torch.ones_like(p)
        opt.step()
        if edit: edit(i)

def sgd_ahead(ps, **kwargs): return MultiTensorOptimizer(ps, [slow_weights, sgd_step, lookahead_step], **{**dict(lr=.1, k=3), **kwargs})

def whole(state):
    "`state`, with that of PyTorch's optimizer beside the rest"
    return {k: v for k,v in {**state, **state.get('inner', {})}.items() if k != 'inner' and v is not None}

def state(learn): return [{k: torch.as_tensor(v).clone() for k,v in whole(learn.opt.state[p]).items()} for p in learn.model.parameters()]
def same(a, b): return len(a)==len(b) and all(x.keys()==y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x,y in zip(a, b))
def slow(learn): return [learn.opt.state[p].get('slow', p).clone() for p in learn.model.parameters()]
def equal(a, b): return all(map(torch.equal, a, b))

def through_a_file(sd):
    "Saved, and read with nothing allowed but what `torch.load` allows"
    with tempfile.NamedTemporaryFile() as f:
        torch.save(sd, f.name)
        return torch.load(f.name, weights_only=True)

# In a `Learner`

def load(learn, *args, **kwargs):
    "`learn.load`, which turns what goes wrong with the optimizer into a warning"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Could not load the optimizer state')
        return learn.load(*args, **kwargs)

class Until(Callback):
    "Save after `n` updates"
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.train_iter == self.n: self.learn.save('x')

class Skip(Callback):
    "Do not train on the first `n` batches"
    order = -20
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.training and self.train_iter < self.n: raise CancelBatchException()

class Overflow(Callback):
    "fastai's `MixedPrecision` with a `GradScaler` that works without CUDA; the gradients of `bad` batches overflow"
    order = MixedPrecision.order+1
    def __init__(self, *bad): self.bad = bad
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu')
    def before_backward(self):
        if self.train_iter in self.bad: self.learn.loss_grad = self.loss_grad*2.**126

class Float64(Callback):
    "Floating point numbers in double precision: what differs then is not rounding"
    order = 95 # after `MixUp`
    def before_fit(self): self.model.double()
    def before_batch(self):
        for name in ('xb', 'yb'): setattr(self.learn, name, tuple(o.double() if o.is_floating_point() else o for o in getattr(self, name)))
