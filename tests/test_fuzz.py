"Any sequence of what may happen to an optimizer, against a slow model in float64: one tensor after another, in fastai's steppers"
import copy, os, pickle

import fastai.optimizer as stock
import torch
from fastai_ranger.all import *
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from helpers import as_it_is, channels_last, flat, has_slow, holes, inner, is_whole, records, through_a_file, turned, twin_of
from torch import nn

long = int(os.environ.get('FUZZ') or 0) # sequences, drawn anew each time
settings.register_profile('fuzz', max_examples=long or 200, stateful_step_count=50 if long else 30, derandomize=not long, deadline=None, suppress_health_check=list(HealthCheck))

infos = {o.name: o for o in records if not is_whole(o) and not inner(o.opt_func([nn.Parameter(torch.zeros(1))], lr=o.lr)) and twin_of(o) is not o.opt_func}
shapes = [(4, 3), (4,), (2, 3, 2, 2)], [(5,), (1, 4), ()]

class Model:
    "What an optimizer should do: for each weight a copy, a dict of state, and the slow weights"
    def __init__(self, info, gs):
        twin = twin_of(info)([nn.Parameter(torch.zeros(1))], lr=info.lr)
        self.ahead = isinstance(twin, stock.Lookahead)
        self.usual = dict(twin.hypers[0])
        self.cbs,self.weights = (twin.opt if self.ahead else twin).cbs,[nn.Parameter(p.detach().clone()) for p in flat(gs)]
        self.group = [i for i,g in enumerate(gs) for _ in g]
        self.state,self.slow = [{} for _ in self.weights],[None]*len(self.weights)
        self.count = [0]*len(self.weights)

    @torch.no_grad()
    def step(self, grads, hypers):
        for i,(w,g) in enumerate(zip(self.weights, grads)):
            if g is None: continue
            h,w.grad = {**self.usual, **hypers[self.group[i]]},g.clone(memory_format=torch.contiguous_format)
            self.start(i)
            for cb in self.cbs:
                new = cb(w, **{**self.state[i], **h})
                if isinstance(new, dict): self.state[i].update(new)
            self.count[i] += 1
            if self.ahead and self.count[i]%h['k']==0: self.sync(i, h['alpha'])

    def start(self, i):
        if self.slow[i] is None: self.slow[i],self.count[i] = self.weights[i].detach().clone(),0

    @torch.no_grad()
    def sync(self, i, alpha):
        w,s = self.weights[i],self.slow[i]
        s += alpha*(torch.where(w.isfinite(), w, s)-s)
        w.copy_(s)

    def restart(self): self.slow = [None]*len(self.slow)

    def clear(self):
        self.restart()
        self.state = [{k: v for k,v in s.items() if k=='do_wd'} for s in self.state]

class Fuzz(RuleBasedStateMachine):
    @initialize(name=st.sampled_from(sorted(infos)))
    def begin(self, name):
        self.info,self.n = infos[name],0
        g = torch.Generator().manual_seed(0)
        self.gs = [[nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in ss] for ss in shapes]
        self.opt,self.model = self.info.opt_func(self.gs, lr=self.info.lr),Model(self.info, self.gs)
        for s in (self.opt.state[self.gs[0][1]], self.model.state[1]): s['do_wd'] = False

    @rule(lacks=st.sets(st.integers(0, 5), max_size=3), layout=st.sampled_from([as_it_is, turned, channels_last, holes]), size=st.sampled_from([1e-3, 1., 30.]), n=st.integers(1, 7))
    def step(self, lacks, layout, size, n):
        for _ in range(n):
            self.n += 1
            g = torch.Generator().manual_seed(self.n)
            for i,p in enumerate(flat(self.gs)):
                grad = size*torch.randn(p.shape, generator=g, dtype=p.dtype)
                p.grad = layout(grad) if p.requires_grad and i not in lacks else None
            self.update()

    def update(self):
        self.model.step([p.grad for p in flat(self.gs)], self.opt.hypers)
        self.opt.step()

    @rule()
    def step_again(self): self.update()

    @rule()
    def zero_grad(self):
        self.opt.zero_grad()
        self.update()

    @rule(i=st.integers(0, 5))
    def nan(self, i):
        p = flat(self.gs)[i]
        if not p.requires_grad: return
        p.grad = torch.zeros_like(p)
        p.grad[(0,)*p.ndim] = torch.nan
        self.update()

    @rule(n=st.integers(0, 1))
    def freeze(self, n): self.opt.freeze_to(n)

    @rule(values=st.dictionaries(st.sampled_from(['lr', 'wd', 'mom', 'k', 'alpha']), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1))
    def hypers(self, values):
        ranges = dict(lr=lambda x: 2*x*self.info.lr, wd=lambda x: .3*x, mom=lambda x: .5+.48*x, k=lambda x: 1+int(6*x), alpha=lambda x: x)
        self.opt.set_hypers(**{k: [ranges[k](x) for x in v] for k,v in values.items() if k in self.opt.hypers[0]})

    @rule(how=st.sampled_from(['deepcopy', 'pickle']))
    def copy(self, how):
        both = self.opt,self.gs
        self.opt,self.gs = copy.deepcopy(both) if how=='deepcopy' else pickle.loads(pickle.dumps(both))

    @rule()
    def checkpoint(self):
        "through a file, into a new optimizer with other hypers; slow weights that are to start do so as it is saved"
        ps = flat(self.gs)
        for i,p in enumerate(ps):
            if set(self.opt.state[p])-{'do_wd'}: self.model.start(i)
        sd = through_a_file(self.opt.state_dict())
        self.gs = [[nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in g] for g in self.gs]
        self.opt = self.info.opt_func(self.gs, lr=self.info.lr*3)
        self.opt.load_state_dict(sd)

    @rule()
    def clear_state(self):
        self.opt.clear_state()
        self.model.clear()

    def write(self, f):
        with torch.no_grad():
            for w in (*flat(self.gs), *self.model.weights): f(w)

    @rule(most=st.floats(.1, 2))
    def clip(self, most): self.write(lambda w: w.clamp_(-most, most))

    @rule()
    def other_weights(self):
        self.write(lambda w: w.copy_(torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view(w.shape)))
        self.opt.restart()
        self.model.restart()

    @rule(layout=st.sampled_from([turned, channels_last, torch.Tensor.contiguous]))
    def turn(self, layout):
        for p in flat(self.gs): p.data = layout(p.data)

    @precondition(lambda self: has_slow(self.opt))
    @rule()
    def look_at_slow_weights(self):
        self.opt.to_slow()
        for p,w,s in zip(flat(self.gs), self.model.weights, self.model.slow):
            if p.requires_grad and 'fast' in self.opt.state[p]: torch.testing.assert_close(p.detach(), w.detach() if s is None else s, rtol=1e-6, atol=1e-7, equal_nan=True)
        self.opt.to_fast()

    @precondition(lambda self: has_slow(self.opt))
    @rule()
    def sync(self):
        for i,p in enumerate(flat(self.gs)):
            if p.requires_grad and 'slow' in self.opt.state[p]:
                self.model.sync(i, self.opt.hypers[self.model.group[i]]['alpha'])
                self.model.count[i] = 0
        self.opt.sync()

    @invariant()
    def same_weights(self):
        if not hasattr(self, 'model'): return
        for i,(p,w) in enumerate(zip(flat(self.gs), self.model.weights)):
            torch.testing.assert_close(p.detach(), w.detach(), rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m: f'{self.info.name}, weight {i}: {m}')

Fuzz.TestCase.settings = settings.get_profile('fuzz')
test_any_sequence = Fuzz.TestCase
