"What `test_distributed.py` runs in each process: `torchrun diloco_ranks.py FOLDER CASE...`"
import os, signal, sys, torch, warnings
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
import fastai.optimizer as stock
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai_ranger.all import *
import fastai_ranger.fixes # `DistributedDL` without a GPU
from fastai_ranger.steppers import *
from fastai_ranger.core.stepper import common
from fastai_ranger.compare.data import cnn, digits_dls

folder = Path(sys.argv[1])

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()

def batch(i, rank=None):
    "What `rank` gets for update `i`"
    g = torch.Generator().manual_seed(1000*(dist.get_rank() if rank is None else rank) + i)
    return torch.randn(8, 4, dtype=torch.float64, generator=g),torch.randn(8, 3, dtype=torch.float64, generator=g)

def update(m, opt, i, rank=None):
    x,y = batch(i, rank)
    opt.zero_grad()
    (m(x)-y).pow(2).mean().backward()
    opt.step()

def train(m, opt, n, start=0):
    for i in range(start, n): update(m, opt, i)
    return m

def difference(a, b): return max((p-q).abs().max().item() for p,q in zip(a.parameters(), b.parameters()))

def on_all(t):
    "`t` as each rank has it"
    res = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(res, t.contiguous())
    return res

def same_on_all(m): return all(torch.equal(t, first) for o in m.state_dict().values() for first,*rest in [on_all(o)] for t in rest)

class Sent(TorchDispatchMode):
    "Bytes of the tensors that are reduced"
    def __init__(self):
        super().__init__()
        self.bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is torch.ops.c10d.allreduce_.default: self.bytes += sum(t.nbytes for t in args[0])
        return f(*args, **(kwargs or {}))

def ddp():
    "SGD, averaged in each update: equal to DDP. Averaged in each fifth: a fifth of the bytes"
    ref,n = DistributedDataParallel(net()),20
    with Sent() as theirs: train(ref, torch.optim.SGD(ref.parameters(), lr=.1), n)
    for o in (stock.SGD, torch.optim.SGD):
        m = net()
        with Sent() as ours: train(m, diloco(o, k=1, alpha=1., outer_mom=0.)(m.parameters(), lr=.1), n)
        assert difference(m, ref) < 1e-14, difference(m, ref)
        assert ours.bytes == theirs.bytes == n*sum(p.nbytes for p in m.parameters()), (ours.bytes, theirs.bytes)
        with Sent() as ours: train(m, diloco(o, k=5)(m.parameters(), lr=.1), n)
        assert ours.bytes*5 == theirs.bytes

def paper(rounds=6, k=4, spoil=None):
    "Algorithm 1, written out: all ranks in one process"
    world = dist.get_world_size()
    common,outer = net(),None
    outer = torch.optim.SGD(common.parameters(), lr=.7, momentum=.9, nesterov=True)
    workers = [net() for _ in range(world)]
    inner = [torch.optim.AdamW(m.parameters(), lr=.01, weight_decay=.1) for m in workers]
    ours = {name: (m := net(), diloco(f, k=k)(m.parameters(), lr=.01, **kwargs)) for name,f,kwargs in (
        ('Adam', Adam, dict(mom=.9, sqr_mom=.999, eps=1e-8, wd=.1)), ('AdamW', torch.optim.AdamW, dict(weight_decay=.1)))}
    for t in range(rounds):
        for rank,(m,o) in enumerate(zip(workers, inner)):
            m.load_state_dict(common.state_dict())
            for h in range(k): update(m, o, t*k+h, rank)
        for p,*ps in zip(common.parameters(), *(m.parameters() for m in workers)): p.grad = sum((p-q).detach() for q in ps)/world
        outer.step()
        for name,(m,o) in ours.items():
            train(m, o, (t+1)*k-1, t*k)
            assert not same_on_all(m)
            update(m, o, (t+1)*k-1)
            assert same_on_all(m), f'{name}: the ranks differ after round {t}'
            assert difference(m, common) < 1e-12, f'{name} differs from the paper by {difference(m, common)}'
            if spoil and t==1 and dist.get_rank()==world-1: spoil(m, o)

def spoilt():
    def spoil(m, o): o.state[m[0].weight]['slow' if o.declared.guests else 'grad_avg'][0,0] += 1e-6
    paper(spoil=spoil)

def raises(what, f):
    try: f()
    except RuntimeError as e: assert what in str(e), e
    else: raise AssertionError(f'expected: {what}')

def unlike():
    "What the ranks do not have in common is an error on all of them"
    last = dist.get_rank()==dist.get_world_size()-1
    m = net()
    opt = diloco(stock.SGD, k=2)(m.parameters(), lr=.1)
    train(m, opt, 2)
    if last: opt.state[m[0].weight]['slow'][0,0] += 1e-9
    raises('differ in their slow weights', lambda: train(m, opt, 4))
    m = net()
    opt = diloco(stock.SGD, k=2)(m.parameters(), lr=.1)
    def no_bias():
        m[0].bias.requires_grad_(not last)
        train(m, opt, 2)
    raises('differ in their weights with a gradient: 59, 52', no_bias)
    m = net()
    opt = diloco(stock.SGD, k=2)(m.parameters(), lr=.1)
    if last: opt.set_hyper('k', 3)
    raises('differ in their updates: 2, 3', lambda: train(m, opt, 3))

def undefined():
    "One rank's weight is undefined: it counts as if it had not moved"
    m = net()
    before = m[0].weight[0,0].item()
    opt = diloco(stock.SGD, k=2, alpha=1., outer_mom=0.)(m.parameters(), lr=.1)
    train(m, opt, 1)
    moves = on_all(m[0].weight.detach()[0,0])
    update(m, opt, 1)
    ref = net()
    ro = diloco(stock.SGD, k=2, alpha=1., outer_mom=0.)(ref.parameters(), lr=.1)
    update(ref, ro, 0)
    x,y = batch(1)
    ro.zero_grad()
    (ref(x)-y).pow(2).mean().backward()
    ref[0].weight.grad[0,0] *= float('nan') if dist.get_rank() else 1
    alone = ref[0].weight.detach()[0,0] - .1*ref[0].weight.grad[0,0]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        ro.step()
    assert [str(o.message) for o in w]==['rank 1 has 1 non-finite weights: they count as if they had not moved'], w
    assert same_on_all(ref) and all(p.isfinite().all() for p in ref.parameters())
    want = (on_all(alone)[0].item() + before)/2
    assert abs(ref[0].weight[0,0].item()-want) < 1e-14
    rest = [(p-q).abs() for p,q in zip(m.parameters(), ref.parameters())]
    rest[0][0,0] = 0.
    assert max(o.max().item() for o in rest) < 1e-15

def checkpoint(m, opt, i):
    if i%5==4: torch.save((i+1, m.state_dict(), opt.state_dict()), folder/f'{dist.get_rank()}.pth')

def dies():
    "The last rank is killed after 17 of 30 updates"
    m = net()
    opt = diloco(ranger, k=5)(m.parameters(), lr=.01)
    for i in range(30):
        update(m, opt, i)
        checkpoint(m, opt, i)
        if i==17 and dist.get_rank()==dist.get_world_size()-1: os.kill(os.getpid(), signal.SIGKILL)

def resumes():
    "From the checkpoints of `dies`: equal to a run that was left alone"
    m,ref = net(),net()
    train(ref, diloco(ranger, k=5)(ref.parameters(), lr=.01), 30)
    start,weights,sd = torch.load(folder/f'{dist.get_rank()}.pth', weights_only=False)
    assert start==15
    opt = diloco(ranger, k=5)(m.parameters(), lr=.01)
    m.load_state_dict(weights)
    opt.load_state_dict(sd)
    train(m, opt, 30, start)
    assert difference(m, ref)==0.

class Seen(Callback):
    "Numbers of images, and rank of the batches"
    def before_fit(self): self.n = {True: 0, False: 0}
    def after_batch(self): self.n[self.training] += len(self.yb[0])

def learner():
    def make(seed=0):
        set_seed(seed+dist.get_rank()) # other weights and batches on each rank, had rank 0 not its way
        dls = digits_dls()
        return Learner(dls, cnn(c_in=1), loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=diloco(ranger, k=5, alpha=.7, outer_mom=.5),
                       cbs=[DiLoCoTrainer(), Seen()], path=folder)
    learn = make()
    with learn.no_logging(): learn.fit_flat_cos(3, 8e-3)
    n = [len(dl.dataset) for dl in learn.dls.loaders]
    assert [type(dl).__name__ for dl in learn.dls.loaders]==['TfmdDL', 'TfmdDL']
    seen = [sum(o.item() for o in on_all(torch.tensor(learn.seen.n[o]))) for o in (True, False)]
    assert seen[1] in (3*n[1], 3*n[1]+3) and seen[0] <= 3*n[0]+3 and seen[0] > 3*(n[0]-128), (seen, n)
    assert same_on_all(learn.model)
    values = torch.tensor(learn.recorder.values[-1][1:])
    assert torch.equal(values, on_all(values)[0]) and values[-1] > .85, values
    learn.save('run') # by rank 0
    again = make(5)
    again.load('run')
    with again.no_logging(): again.fit(1, 1e-3)
    assert same_on_all(again.model) and again.recorder.values[-1][-1] > .85

dist.init_process_group('gloo')
for case in sys.argv[2:]: globals()[case]()
dist.destroy_process_group()
