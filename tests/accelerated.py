"What `test_distributed.py` runs in each process: `torchrun accelerated.py FOLDER CASE...`"
import sys, torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fastai.basics import *
from fastai.distributed import *
from fastai_ranger.all import *
import fastai_ranger.fixes # `distrib_ctx` without a GPU
from fastai_ranger.compare.data import digits
from fastcore.test import test_close
from helpers import Float64
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader as TorchDL, TensorDataset

folder = sys.argv[1]
x = torch.randn(16*12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

def loss(model, x): return (model(x)-x.sum(1, keepdim=True)).pow(2).mean()

def numbers(model, opt): return [p.detach().clone() for p in model.parameters()] + [opt.state[p][k] for p in model.parameters() for k in ('grad_avg', 'sqr_avg', 'slow')]

def check(ours, others, tol=0.):
    worst = max((a-b).abs().max().item() for a,b in zip(ours, others, strict=True))
    assert worst <= tol, f'differs from what it should be by {worst}'

def same_everywhere(ours):
    every = [None]*num_distrib()
    dist.all_gather_object(every, ours)
    for o in every: check(ours, o)

class Run:
    "A net in Accelerate: each process takes every other batch of four, and two batches make an update"
    def __init__(self, opt_func=ranger, dtype=torch.float64, **kwargs):
        AcceleratorState._reset_state()
        self.acc = Accelerator(cpu=True, gradient_accumulation_steps=2, **kwargs)
        model = net().to(dtype)
        opt = as_torch(opt_func)(model.parameters(), lr=.05)
        self.model,self.opt,self.dl,self.sched = self.acc.prepare(model, opt, TorchDL(TensorDataset(x.to(dtype)), 4), CosineAnnealingLR(opt, 60))

    def epoch(self):
        for o, in self.dl:
            with self.acc.accumulate(self.model):
                self.acc.backward(loss(self.model, o))
                self.opt.step()
                self.sched.step()
                self.opt.zero_grad()
        return numbers(self.model, self.opt)

def alone(opt_func, n):
    "The same `n` epochs of fastai's kind in one process, with the batches of all"
    model = net()
    opt = opt_func(model.parameters(), lr=.05)
    for i,o in enumerate([*x.split(8*num_distrib())]*n):
        opt.set_hyper('lr', .025*(1+math.cos(math.pi*i*num_distrib()/60))) # Accelerate's scheduler makes a step for each process
        loss(model, o).backward()
        opt.step()
        opt.zero_grad()
    return numbers(model, opt)

def accumulate():
    "Equal to one process with the batches of all, scheduler included"
    for o in ranger,ranger_gc:
        run = Run(o)
        ours = [run.epoch() for _ in range(2)][-1]
        same_everywhere(ours)
        check(ours, alone(o, 2), 1e-12)

def checkpoint():
    "Goes on to the bit in a net and an optimizer that are new"
    for kwargs in {},dict(dtype=torch.float32, mixed_precision='bf16'):
        run = Run(**kwargs)
        run.epoch()
        run.acc.save_state(folder)
        whole = run.epoch()
        again = Run(**kwargs)
        again.acc.load_state(folder)
        check(again.epoch(), whole)

def mixed():
    "Weights and state stay in float32"
    run = Run(dtype=torch.float32, mixed_precision='bf16')
    ours = [run.epoch() for _ in range(2)][-1]
    same_everywhere(ours)
    assert all(o.dtype is torch.float32 for o in ours)
    check(ours, alone(ranger, 2), .1)
    try: check(ours, alone(ranger, 2), 1e-5)
    except AssertionError: pass
    else: raise AssertionError('not in bfloat16')

def spoilt():
    "One number in the state of the last process, and it is seen"
    run = Run()
    run.epoch()
    if rank_distrib()==num_distrib()-1: run.opt.state[next(run.model.parameters())]['sqr_avg'][0,0] += 1e-6
    try: same_everywhere(run.epoch())
    except AssertionError: pass
    else: raise AssertionError('not seen')

class Batches(Callback):
    "Keeps what was trained on"
    order = Float64.order+1
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append((self.x, self.y))

def learner():
    "`distrib_ctx`: equal to one process with the batches of all"
    def make(dls, *cbs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).double()
        return Learner(dls, model, CrossEntropyLossFlat(), ranger, metrics=accuracy, path=folder, cbs=[Float64(), *cbs])
    dls = digits().take(1408).dls(bs=32)
    learn = make(dls, Batches(), SlowWeights())
    torch.manual_seed(rank_distrib()) # each process would take another order
    random.seed(rank_distrib())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_flat_cos(1, 1e-2)
    every = [None]*num_distrib()
    dist.all_gather_object(every, learn.batches.seen)
    whole = [tuple(torch.cat(o) for o in zip(*b)) for b in zip(*every)]
    assert len(torch.cat([o for o,_ in whole]).unique(dim=0)) > 1400 # each image once: a few are equal
    other = make(DataLoaders(DataLoader(whole, bs=None), dls.valid), SlowWeights())
    with other.no_bar(), other.no_logging(): other.fit_flat_cos(1, 1e-2)
    ours,alone = (numbers(o.model, o.opt) for o in (learn, other))
    same_everywhere(ours)
    check(ours, alone, 1e-12)
    test_close(learn.recorder.values[0][1:], other.recorder.values[0][1:], 1e-6) # loss and accuracy in validation
    learn.save('x') # by the first process
    again = make(dls)
    again.load('x')
    check(ours, numbers(again.model, again.opt))

for case in sys.argv[2:]: globals()[case]()
