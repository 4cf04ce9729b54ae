"""What users do beside calling `step`: load, freeze, save, resume, schedule. Each is done and measured

Few people call `step`. They call `fine_tune`, `freeze`, `load`, `lr_find`, and expect the optimizer to follow.
A small net trains on scikit-learn's digits, with any `opt_func`.
"""
import contextlib
import io
import tempfile
import warnings
from copy import deepcopy
from functools import partial
from operator import getitem

import fastai.optimizer as stock
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler, SchedNo
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import apply_init, params, set_seed
from fastai.vision.gan import GANLearner
from fastai_ranger.callback import SlowWeights
from fastai_ranger.compare.data import cnn, digits_dls
from fastai_ranger.fixes import lr_find_of_fastai
from fastai_ranger.learner import fit_flat_cos_of_fastai
from fastai_ranger.optimizers.ranger import ranger
from fastcore.all import first
from torch import nn

_folder = tempfile.TemporaryDirectory() # of the learners' folders; removed when Python ends

# The net

def halves(m): return [params(m[:2]), params(m[2:])]

def digits_learner(
    opt_func, # Optimizer
    **kwargs # To `Learner`
)->Learner: # With two parameter groups
    "A small net and eight batches of digits, always the same: an epoch ends in mid-cycle of Lookahead"
    set_seed(0, reproducible=True)
    dls = digits_dls()
    dls.train.n = 512
    dls.train.shuffle = False
    defaults = dict(splitter=halves, path=tempfile.mkdtemp(dir=_folder.name), loss_func=CrossEntropyLossFlat())
    return Learner(dls, cnn(c_in=1), opt_func=opt_func, **{**defaults, **kwargs})

def fit(learn, n=1, lr=8e-3, method=Learner.fit, **kwargs):
    "Fit without output"
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): method(learn, n, lr, **kwargs)
    return learn

# What is measured

def weights(m):
    "A copy of each parameter of `m`"
    return [p.detach().clone() for p in m.parameters()]

def largest(a, b):
    "The largest difference of two lists of tensors"
    return max((x-y).abs().max().item() for x,y in zip(a, b))

def random_step(learn):
    for p in learn.model.parameters(): p.grad = torch.randn_like(p)
    learn.opt.step()

def stand_still(learn):
    """The largest change of a weight in six updates with a learning rate of 0 and no decay

    Such updates change nothing. What moves is pulled by slow weights of a run that is over.
    """
    before = weights(learn.model)
    learn.opt.set_hypers(lr=0, wd=0)
    for _ in range(6): random_step(learn)
    learn.opt.zero_grad()
    return largest(before, weights(learn.model))

def slow_of(opt):
    "The slow weights of fastai's `ranger` or of ours, by parameter"
    res = {}
    if isinstance(opt, stock.Lookahead):
        for group,slow in zip(opt.param_lists, opt.slow_weights or ()): res.update(zip(group, slow))
        return res
    for p,state in opt.state.items():
        if 'slow' in state: res[p] = state['slow']
    return res

def gap(slow, ps):
    "The largest difference of slow weights, by parameter, to the tensors `ps`, by parameter"
    return max((s-ps[p]).abs().max().item() for p,s in slow.items())

# The list of workflows, each a function of an `opt_func` that returns what it measured

workflows = []

def workflow(
    right # Function of what is measured: is it as it should be?
):
    "Add a function to `workflows`"
    def _f(f):
        workflows.append((f, right))
        return f
    return _f

def zero(x): return x==0
def ok(x): return x=='ok'

# Weights from elsewhere

@workflow(zero)
def load_weights(opt_func):
    learn = fit(digits_learner(opt_func))
    learn.save('x')
    fit(learn).load('x', with_opt=False)
    return stand_still(learn)

@workflow(zero)
def save_model(opt_func):
    learn = digits_learner(opt_func)
    fit(learn, 2, cbs=SaveModelCallback(comp=np.greater)) # which reloads the first epoch: its loss is the greater
    return stand_still(learn)

@workflow(zero)
def load_state_dict(opt_func):
    learn = digits_learner(opt_func)
    start = deepcopy(learn.model.state_dict())
    fit(learn).model.load_state_dict(start)
    return stand_still(learn)

@workflow(zero)
def init(opt_func):
    learn = fit(digits_learner(opt_func))
    apply_init(learn.model)
    if opt_func is ranger: learn.opt.restart() # fastai's has nothing of the kind
    return stand_still(learn)

class Clip(Callback):
    "Clip the weights after every update, and count the synchronisations"
    def __init__(self, limit):
        self.limit = limit
        self.n = 0
    def after_step(self):
        self.n += all(torch.equal(p, s) for p,s in slow_of(self.opt).items())
        with torch.no_grad():
            for p in self.model.parameters(): p.clamp_(-self.limit, self.limit)

@workflow(lambda n: n==8)
def clip(opt_func):
    "Clipped weights are still those of the run: 48 updates have eight synchronisations"
    return fit(digits_learner(opt_func, cbs=Clip(.3)), 6).clip.n

class Swap(Callback):
    "Validate on other weights, as with an average of the weights, and put the own ones back"
    def put(self, ws):
        with torch.no_grad():
            for p,w in zip(self.model.parameters(), ws): p.copy_(w)
    def before_validate(self):
        self.own = weights(self.model)
        self.put([w*.9 for w in self.own])
    def after_validate(self): self.put(self.own)

@workflow(zero)
def swap(opt_func):
    usual = fit(digits_learner(opt_func), 3)
    swapped = fit(digits_learner(opt_func, cbs=Swap()), 3)
    return largest(weights(usual.model), weights(swapped.model))

# Slow weights

@workflow(zero)
def end_of_fit(opt_func):
    cbs = []
    if opt_func is ranger: cbs.append(SlowWeights())
    learn = fit(digits_learner(opt_func, cbs=cbs))
    return gap(slow_of(learn.opt), {p: p for p in learn.model.parameters()})

class Spoil(Callback):
    "One gradient that is not a number"
    def before_step(self):
        if self.train_iter==3: first(self.model.parameters()).grad[0] = float('nan')

@workflow(zero)
def one_nan(opt_func):
    learn = fit(digits_learner(opt_func, cbs=Spoil()), 2)
    return sum((~s.isfinite()).sum().item() for s in slow_of(learn.opt).values())

class SkippedSteps(Callback):
    "PyTorch's `GradScaler` for the CPU, and three batches whose gradients overflow"
    order = MixedPrecision.order+1
    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu')
        self.start = {p: p.detach().clone() for p in self.model.parameters()}
        self.steps = 0
    def before_backward(self):
        if self.train_iter < 3: self.learn.loss_grad = self.loss_grad*2.**126
    def before_step(self): self.steps += 1 # after `MixedPrecision`: this one is not skipped
    def after_step(self):
        if self.steps==1: self.gap = gap(slow_of(self.opt), self.start)

@workflow(zero)
def skipped_steps(opt_func):
    learn = digits_learner(opt_func, cbs=[MixedPrecision(), SkippedSteps()])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # there is no CUDA
        fit(learn)
    assert learn.skipped_steps.steps==5
    return learn.skipped_steps.gap

# Checkpoints

def outcome(f):
    "`ok`, the error that `f` raises, or that the optimizer was not loaded"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: f()
        except Exception as e: return f"{type(e).__name__}: {e}"
    if any('Could not load' in str(o.message) for o in caught): return 'not loaded'
    return 'ok'

def file_of(learn): return learn.path/learn.model_dir/'x'

@workflow(zero)
def resume(opt_func):
    learn = digits_learner(opt_func)
    other = digits_learner(opt_func)
    fit(learn).save('x')
    other.load(file_of(learn))
    return largest(weights(fit(learn).model), weights(fit(other).model))

@workflow(ok)
def load_twice(opt_func):
    learn = fit(digits_learner(opt_func))
    sd = learn.opt.state_dict()
    def twice():
        for _ in range(2): learn.opt.load_state_dict(sd)
    return outcome(twice)

@workflow(ok)
def from_adam(opt_func):
    learn = digits_learner(stock.Adam)
    other = fit(digits_learner(opt_func))
    fit(learn).save('x')
    return outcome(lambda: other.load(file_of(learn)))

@workflow(lambda said: 'shape' in said)
def other_shapes(opt_func):
    learn = fit(digits_learner(opt_func))
    other = fit(digits_learner(opt_func))
    sd = deepcopy(other.opt.state_dict())
    for state in sd['state']: state.update({k: torch.zeros(3, 7) for k in state if k.endswith('_avg')})
    return outcome(lambda: learn.opt.load_state_dict(sd))

@workflow(ok)
def export(opt_func):
    learn = fit(digits_learner(partial(opt_func, eps=1e-5), splitter=params))
    xs,ys = zip(*learn.dls.train_ds[:16])
    tfms = [[partial(getitem, xs)], [partial(getitem, ys)]] # that can be exported
    learn.dls = Datasets(range(16), tfms).dataloaders(bs=8)
    learn.export('x.pkl')
    return outcome(lambda: load_learner(learn.path/'x.pkl'))

# Frozen layers

def frozen(learn): return [p for p in learn.model.parameters() if not p.requires_grad]

@workflow(zero)
def freeze(opt_func):
    learn = fit(digits_learner(opt_func))
    learn.freeze()
    before = [p.detach().clone() for p in frozen(learn)]
    fit(learn, wd=.1)
    return largest(before, frozen(learn))

@workflow(zero)
def frozen_copies(opt_func):
    learn = digits_learner(opt_func)
    learn.freeze()
    return len([p for p in slow_of(fit(learn).opt) if not p.requires_grad])

class GeneratorMoves(Callback):
    "The largest move of the generator during an update of the critic"
    def before_fit(self): self.moves = 0.
    def before_step(self): self.before = weights(self.model.generator)
    def after_step(self):
        if self.gan_trainer.gen_mode: return
        self.moves = max(self.moves, largest(self.before, weights(self.model.generator)))

def gan_learner(opt_func, **kwargs):
    "A small WGAN for the digits; one optimizer for generator and critic, as fastai has it"
    set_seed(0, reproducible=True)
    items = [(torch.randn(16), x) for x,_ in digits_dls().train_ds[:320]]
    dls = DataLoaders.from_dsets(items, items[:32], bs=32, num_workers=0)
    dls.train.shuffle = False
    generator = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU(.2), nn.Linear(64, 1), nn.Flatten(0))
    path = tempfile.mkdtemp(dir=_folder.name)
    return GANLearner.wgan(dls, generator, critic, opt_func=opt_func, path=path, **kwargs)

@workflow(zero)
def gan(opt_func): return fit(gan_learner(opt_func, cbs=GeneratorMoves()), 2, lr=1e-3).generator_moves.moves

@workflow(zero)
def large_gradients(opt_func):
    "With `unrectified='skip'`, which fastai's has not"
    if opt_func is ranger: opt_func = partial(opt_func, unrectified='skip')
    learn = digits_learner(opt_func)
    learn.create_opt()
    learn.opt.set_hyper('lr', 8e-3)
    before = weights(learn.model)
    for _ in range(5):
        for p in learn.model.parameters(): p.grad = torch.full_like(p, 1e4)
        learn.opt.step()
    return largest(before, weights(learn.model))

# Schedules

@workflow(lambda difference: difference > 1e-3)
def schedule_alpha(opt_func):
    def trained(alpha):
        scheduler = ParamScheduler({'alpha': SchedNo(alpha, alpha)})
        return weights(fit(digits_learner(opt_func, cbs=scheduler)).model)
    return largest(trained(1.), trained(.5))

@workflow(lambda n: n==[1, 1])
def k_per_group(opt_func):
    "Synchronisations of each group in three updates"
    learn = digits_learner(opt_func)
    learn.create_opt()
    learn.opt.set_hyper('k', [2, 3])
    n = [0, 0]
    for _ in range(3):
        random_step(learn)
        for i,group in enumerate(learn.opt.param_lists): n[i] += torch.equal(slow_of(learn.opt)[group[0]], group[0])
    return n

@workflow(lambda batches: batches==8)
def start_epoch(opt_func):
    method = fit_flat_cos_of_fastai
    if opt_func is ranger: method = Learner.fit_flat_cos
    learn = fit(digits_learner(opt_func), 3, method=method, start_epoch=2)
    return len(learn.recorder.lrs)

def everything(learn):
    "Copies of all that an optimizer works on"
    ps = list(learn.model.parameters())
    state = [{k: torch.as_tensor(v).clone() for k,v in learn.opt.state[p].items()} for p in ps]
    slow = {p: s.clone() for p,s in slow_of(learn.opt).items()}
    return dict(weights=weights(learn.model), slow=slow, hypers=deepcopy(list(learn.opt.hypers)), state=state)

def same(a, b):
    "Are these the same, to the bit?"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a)==len(b) and all(map(same, a, b))
    return a==b

@workflow(lambda changed: changed==[])
def find_lr(opt_func):
    "What `lr_find`, twice after a fit, leaves changed"
    learn = fit(digits_learner(opt_func), method=Learner.fit_one_cycle)
    lr_find = lr_find_of_fastai
    if opt_func is ranger: lr_find = Learner.lr_find
    before = everything(learn)
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): lr_find(learn, num_it=10, suggest_funcs=None, show_plot=False)
    return [k for k,v in everything(learn).items() if not same(v, before[k])]
