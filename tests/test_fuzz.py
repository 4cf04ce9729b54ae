"Any sequence of what may happen to an optimizer, against a slow model in float64: one tensor after another, in the steppers of fastai or an optimizer of PyTorch"
import copy, math, os, pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fastai_ranger.all import *
from fastai_ranger.steppers import *
from fastai_ranger.learner import restart_on_load
from fastai_ranger.interop import to_torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from helpers import as_it_is, channels_last, flat, has_slow, holes, inner, records, through_a_file, turned
from reference import references
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

long = int(os.environ.get('FUZZ') or 0) # sequences, drawn anew each time
settings.register_profile('fuzz', max_examples=long or 200, stateful_step_count=50 if long else 30, derandomize=not long, deadline=None, suppress_health_check=list(HealthCheck))

def alone(opt_func, info): return opt_func([nn.Parameter(torch.zeros(1))], lr=info.lr)

infos = {o.name: o for o in records if references[o.name] or inner(alone(o.opt_func, o))}
shapes = [(4, 3), (4,), (2, 3, 2, 2)], [(5,), (1, 4), ()]

def torch_step(p, made, torch_opt=None, **h):
    "A step of PyTorch's optimizer, as one of fastai's steppers"
    opt = torch_opt or made([p], foreach=False)
    g = opt.param_groups[0]
    g.update(lr=h['lr'], weight_decay=h['wd'], **({'betas': (h['mom'], h['sqr_mom'])} if 'betas' in g else {'momentum': h['mom']}))
    opt.step()
    return dict(torch_opt=opt)

class Model:
    "What an optimizer should do: for each weight a copy, a gradient, a dict of state, and the slow weights"
    def __init__(self, info):
        made = alone(references[info.name] or info.opt_func, info)
        self.ahead = hasattr(made, 'opt') or inner(made) is not None
        self.usual = dict(made.hypers[0])
        opt = inner(made) or (made.opt if self.ahead else made)
        self.cbs = [partial(torch_step, made=type(opt))] if inner(made) else list(opt.cbs)
        self.n = getattr(opt, 'n', len(self.cbs)) # steppers before Ranger21's mean of all
        self.hypers,self.group,self.weights,self.grads,self.state,self.slow,self.count,self.frozen = [],[],[],[],[],[],[],0
        self.before = {} # of each that was loaded since its last update: its weights, slow weights and count from before

    def add(self, ps, hypers):
        for p in ps:
            for k,v in dict(group=len(self.hypers), weights=nn.Parameter(p.clone()), grads=None, state={}, slow=None, count=0).items(): getattr(self, k).append(v)
        self.hypers.append({**self.usual, **hypers})

    def trained(self, i): return self.group[i] >= self.frozen
    def drop(self, which=lambda i: True): self.grads = [None if which(i) else g for i,g in enumerate(self.grads)]

    def freeze(self, n):
        self.frozen = n
        self.drop(lambda i: not self.trained(i))

    def run(self, i, cbs):
        for cb in cbs:
            new = cb(self.weights[i], **{**self.state[i], **self.hypers[self.group[i]]})
            if isinstance(new, dict): self.state[i].update(new)

    @torch.no_grad()
    def step(self):
        on = [i for i,g in enumerate(self.grads) if g is not None]
        for i in on: self.before.pop(i, None)
        for i in on:
            self.weights[i].grad = self.grads[i].clone()
            self.start(i)
            self.run(i, self.cbs[:self.n])
        if on and self.n < len(self.cbs):
            rms = (sum(self.state[i]['sqr_avg'].sum()/(1-self.hypers[self.group[i]]['sqr_mom']**self.state[i]['step']) for i in on)/sum(self.grads[i].numel() for i in on)).sqrt()
            for i in on: self.state[i]['rms'] = rms if rms.isfinite() else math.inf # no decay
        for i in on:
            self.run(i, self.cbs[self.n:])
            self.count[i] += 1
            if self.ahead and self.count[i]%self.hypers[self.group[i]]['k']==0: self.sync(i)

    def start(self, i):
        if self.slow[i] is None: self.slow[i],self.count[i] = self.weights[i].detach().clone(),0

    @torch.no_grad()
    def sync(self, i):
        w,s = self.weights[i],self.slow[i]
        s += self.hypers[self.group[i]]['alpha']*(torch.where(w.isfinite(), w, s)-s)
        w.copy_(s)

    def restart(self): self.slow,self.before = [None]*len(self.slow),{}

    @torch.no_grad()
    def load(self, new):
        "Weights by number: what is given other ones begins anew, and what gets its own back goes on"
        for i,w in new.items():
            if self.slow[i] is not None: self.before.setdefault(i, (self.weights[i].clone(), self.slow[i], self.count[i]))
            self.weights[i].copy_(w)
            if i not in self.before: continue
            was,slow,count = self.before[i]
            if torch.allclose(was, w, rtol=0, atol=0, equal_nan=True):
                self.slow[i],self.count[i] = slow,count
                del self.before[i]
            else: self.slow[i] = None

    def reshape(self, i, w):
        self.weights[i],self.grads[i],self.slow[i] = nn.Parameter(w.clone()),None,None
        self.state[i] = {k: v for k,v in self.state[i].items() if k=='do_wd'}
        self.before.pop(i, None)

    def clear(self):
        self.restart()
        self.state = [{k: v for k,v in s.items() if k=='do_wd'} for s in self.state]

@pytest.fixture(scope='module', autouse=True)
def mesh():
    "Of one rank"
    global mesh
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh('cpu', (1,))
    yield
    dist.destroy_process_group()

def here(p):
    "The memory of `p`, sharded or not"
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p

def finite(t): return t.detach().where(t.isfinite(), math.nan) # whether it is infinite or no number depends on the order of operations

class Fuzz(RuleBasedStateMachine):
    @initialize(name=st.sampled_from(sorted(infos)), as_torch=st.booleans(), sharded=st.sampled_from([False, False, True]))
    def begin(self, name, as_torch, sharded):
        self.info,self.n,self.model = infos[name],0,Model(infos[name])
        ours = alone(self.info.opt_func, self.info)
        self.as_torch = as_torch
        self.each = all(f.shards=='any' for f in ours.declared.leaves) # does it treat each number by itself?
        self.sharded = sharded and self.each and torch.__version__ >= (2, 6) # from which on a file may hold a `DTensor`
        g = torch.Generator().manual_seed(0)
        self.gs = [[self.parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ss] for ss in shapes]
        self.made = self.make(self.info.lr)
        self.usual = dict(self.opt.hypers[0])
        for ps in self.gs: self.model.add(map(here, ps), self.usual)
        for s in (self.opt.state[self.gs[0][1]], self.model.state[1]): s['do_wd'] = False
        self.tie()

    def make(self, lr): return as_torch(self.info.opt_func)([dict(params=g) for g in self.gs], lr=lr) if self.as_torch else self.info.opt_func(self.gs, lr=lr)

    opt = property(lambda self: self.made.inner if self.as_torch else self.made)

    def shard(self, t): return DTensor.from_local(t, mesh, [Shard(0) if t.ndim else Replicate()], run_check=False) if self.sharded else t
    def parameter(self, t): return nn.Parameter(self.shard(t))

    def tie(self): self.tied = [here(p) for p in flat(self.gs)] # the same memory, as in a layer that shares the weight

    def give(self, grads, layout=as_it_is):
        self.model.grads = grads
        for p,g in zip(flat(self.gs), grads): p.grad = None if g is None else self.shard(layout(g.clone()))

    def update(self):
        self.model.step()
        self.made.step()

    @rule(lacks=st.sets(st.integers(0, 7), max_size=3), layout=st.sampled_from([as_it_is, turned, channels_last, holes]), size=st.sampled_from([1e-3, 1., 30.]), n=st.integers(1, 7))
    def step(self, lacks, layout, size, n): self.updates(n, lacks, layout, size)

    def updates(self, n, lacks=(), layout=as_it_is, size=1.):
        for _ in range(n):
            self.n += 1
            g = torch.Generator().manual_seed(self.n)
            grads = [size*torch.randn(w.shape, generator=g, dtype=w.dtype) for w in self.model.weights]
            self.give([o if self.model.trained(i) and i not in lacks else None for i,o in enumerate(grads)], layout)
            self.update()

    @rule()
    def step_again(self): self.update()

    @rule()
    def zero_grad(self):
        self.made.zero_grad()
        self.model.drop()
        self.update()

    @rule(i=st.integers(0, 5), value=st.sampled_from([math.nan, math.inf, -math.inf]))
    def not_finite(self, i, value):
        if not self.model.trained(i): return
        grad = torch.zeros_like(self.model.weights[i])
        grad[(0,)*grad.ndim] = value if self.each else math.nan # the norm of what is infinite depends on the order of operations
        self.give([grad if j==i else g for j,g in enumerate(self.model.grads)])
        self.update()

    @rule(n=st.integers(0, 1))
    def freeze(self, n):
        self.opt.freeze_to(n)
        self.model.freeze(n)

    @precondition(lambda self: len(self.gs)==2 and self.as_torch)
    @rule()
    def add_group(self):
        self.gs.append([self.parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (3, 2)])
        own = {'lr': self.info.lr/2, **({'weight_decay': .2} if 'wd' in self.usual else {})}
        self.made.add_param_group(dict(params=self.gs[-1], **own))
        hypers = {**self.usual, 'lr': own['lr']}
        if 'weight_decay' in own: hypers['wd'] = own['weight_decay']
        self.model.add(map(here, self.gs[-1]), hypers)
        self.tie()

    @rule(values=st.dictionaries(st.sampled_from(['lr', 'wd', 'mom', 'k', 'alpha']), st.tuples(*[st.floats(0, 1)]*3), min_size=1),
          form=st.sampled_from([lambda x: x, np.array, torch.tensor, lambda x: np.float64(x) if isinstance(x, float) else np.int64(x)]), torchs_names=st.booleans())
    def hypers(self, values, form, torchs_names):
        ranges = dict(lr=lambda x: 2*x*self.info.lr, wd=lambda x: .3*x, mom=lambda x: .5+.48*x, k=lambda x: 1+int(6*x), alpha=lambda x: x)
        new = {k: [ranges[k](x) for x in v[:len(self.gs)]] for k,v in values.items() if k in self.usual}
        for i,h in enumerate(self.model.hypers): h.update({k: v[i] for k,v in new.items()})
        if form is torch.tensor: form = partial(torch.tensor, dtype=torch.float64)
        given = [{k: form(v[i]) for k,v in new.items()} for i in range(len(self.gs))]
        if not self.as_torch: return self.opt.set_hypers(**{k: [o[k] for o in given] for k in new})
        repr(self.made) # takes over what was written by other names before
        for g,h,own in zip(self.made.param_groups, self.model.hypers, given):
            both = to_torch({**{k: v for k,v in h.items() if k in ('mom', 'sqr_mom')}, **own}) if torchs_names else own
            g.update({k: v for k,v in both.items() if k in g or not torchs_names})

    @rule(how=st.sampled_from([copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]))
    def copy(self, how):
        self.made,self.gs = how((self.made, self.gs))
        self.model.before = {}
        self.give([None]*len(self.model.grads))
        self.tie()

    @rule()
    def checkpoint(self):
        "through a file, into a new optimizer with other hypers; slow weights that are to start do so as it is saved"
        for i,s in enumerate(self.model.state):
            if set(s)-{'do_wd'}: self.model.start(i)
        sd = through_a_file(self.made.state_dict())
        self.gs = [[nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in g] for g in self.gs]
        self.made = self.make(self.info.lr*3)
        self.made.load_state_dict(sd)
        self.model.drop()
        self.model.before = {}
        self.tie()

    @rule()
    def clear_state(self):
        self.opt.clear_state()
        self.model.clear()

    @rule()
    def restart(self):
        self.made.restart()
        self.model.restart()

    def write(self, f):
        with torch.no_grad():
            for w in (*map(here, flat(self.gs)), *self.model.weights): f(w)

    @rule(most=st.floats(.1, 2))
    def clip(self, most): self.write(lambda w: w.nan_to_num_(0, 0, 0).clamp_(-most, most))

    @rule()
    def other_weights(self):
        self.write(lambda w: w.copy_(torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view(w.shape)))
        self.restart()

    @precondition(lambda self: not self.sharded)
    @rule(layout=st.sampled_from([turned, channels_last, torch.Tensor.contiguous]))
    def turn(self, layout):
        for p in flat(self.gs): p.data = layout(p.data)
        self.tie()

    def load(self, which, edit):
        "Each side from its own weights, which may differ by rounding"
        ps = nn.ParameterList(flat(self.gs))
        restart_on_load(self.made, ps)
        ps.load_state_dict({str(i): edit(i, ps[i].detach().clone()) for i in which}, strict=False)
        self.model.load({i: edit(i, self.model.weights[i].detach().clone()) for i in which})

    @precondition(lambda self: not self.sharded)
    @rule(which=st.sets(st.integers(0, 5), min_size=1), by=st.sampled_from([.5, 1., 2.]), back=st.booleans(), n=st.integers(1, 7))
    def load_some(self, which, by, back, n):
        "other weights, or those that are there; and, perhaps, back: between updates that show what has begun anew"
        self.updates(n)
        self.load_and_back(which, by, back)
        self.same_weights()
        self.updates(7)

    def load_and_back(self, which, by, back):
        sides = flat(self.gs),self.model.weights
        own = [{i: side[i].detach().clone() for i in which} for side in sides]
        self.load(which, (lambda i, w: torch.full_like(w, by)) if by < 1 else lambda i, w: w*by)
        if not back: return
        kept = iter([own[0][i] for i in which]+[own[1][i] for i in which])
        self.load(which, lambda i, w: next(kept))

    @precondition(lambda self: not self.sharded)
    @rule(i=st.integers(0, 5))
    def other_shape(self, i):
        "A parameter that grows: refused until its state is dropped"
        p = flat(self.gs)[i]
        if not self.model.trained(i): return
        shape = (len(p)+1, *p.shape[1:]) if p.ndim else (3,) # the norm of two numbers, one of them nan, is up to the order of operations
        p.grad,p.data = None,torch.linspace(-1, 1, math.prod(shape), dtype=p.dtype).view(shape)
        if any(isinstance(v, torch.Tensor) for v in self.opt.state.get(p, {}).values()):
            p.grad = torch.ones_like(p)
            with pytest.raises(ValueError, match='cannot step parameter .* in place of'): self.made.step()
            p.grad = None
        self.opt.state.pop(p, None)
        self.model.reshape(i, p.detach())
        if i==1: self.opt.state[p]['do_wd'] = False
        self.tie()

    def started(self): return [i for i,s in enumerate(self.model.slow) if s is not None and self.model.trained(i)]

    @precondition(lambda self: has_slow(self.opt))
    @rule()
    def look_at_slow_weights(self):
        self.opt.to_slow()
        self.compare([s if i in self.started() else w for i,(s,w) in enumerate(zip(self.model.slow, self.model.weights))])
        self.opt.to_fast()

    @precondition(lambda self: has_slow(self.opt) and not self.as_torch) # which takes hypers over when it steps
    @rule()
    def sync(self):
        for i in self.started():
            self.model.sync(i)
            self.model.count[i] = 0
        self.opt.sync()

    def compare(self, ws):
        for i,(p,t,w) in enumerate(zip(flat(self.gs), self.tied, ws)):
            for o in (here(p), t): torch.testing.assert_close(finite(o), finite(w), rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m: f'{self.info.name}, weight {i}: {m}')

    @invariant()
    def same_weights(self):
        if hasattr(self, 'made'): self.compare(self.model.weights)

Fuzz.TestCase.settings = settings.get_profile('fuzz')
test_any_sequence = Fuzz.TestCase
