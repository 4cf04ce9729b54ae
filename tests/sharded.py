"What `test_distributed.py` runs in each process: `torchrun sharded.py FOLDER CASE...`"
import sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from functools import partial
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from fastai.optimizer import SGD
from fastai_ranger.all import *

folder = sys.argv[1]
x = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
opts = [ranger, RAdam, Adam, lookahead(SGD), ranger_gc, ranger_va, ranger_qh, ranger_adabelief, ranger_kahan, partial(ranger, beta=5.),
        as_torch(ranger), as_torch(ranger_gc)]

def net(shard=True):
    "Shards that are uneven (7, 5) or empty (1), and a layer that each process has whole"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)).double()
    if shard: fully_shard(m, ignored_params=set(m[4].parameters()))
    return m

def train(m, opt, n):
    for _ in range(n):
        m(x).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()

def whole(t): return t.full_tensor() if hasattr(t, 'full_tensor') else t

def compare(a, oa, b, ob):
    "`b` is sharded, `a` is not: equal weights, and equal state, which is sharded as the weights are"
    worst = 0.
    for p,q in zip(a.parameters(), b.parameters()):
        assert oa.state[p].keys()==ob.state[q].keys()
        assert all(type(v) is type(q.data) and v.placements==q.placements for v in ob.state[q].values() if hasattr(q, 'placements') and isinstance(v, torch.Tensor))
        for v,w in [(p, q), *((oa.state[p][k], ob.state[q][k]) for k in oa.state[p])]:
            worst = max(worst, (torch.as_tensor(v)-whole(torch.as_tensor(w))).abs().max().item())
    assert worst < 1e-12, f'{ob} differs from one process by {worst}'

def both(opt_func, n=15, **kwargs):
    a,b = net(False),net()
    oa,ob = (opt_func(m.parameters(), lr=.05, **kwargs) for m in (a, b))
    train(a, oa, n)
    train(b, ob, n)
    return a,oa,b,ob

def equal():
    for o in opts: compare(*both(o))

def slow():
    "Slow weights in the middle of a cycle, and a synchronisation by hand"
    a,oa,b,ob = both(ranger)
    for o in (oa, ob): o.to_slow()
    compare(a, oa, b, ob)
    for o in (oa, ob): o.to_fast()
    for m,o in ((a, oa), (b, ob)): train(m, o, 2)
    for o in (oa, ob): o.sync()
    compare(a, oa, b, ob)

def refused():
    for o in (ranger_muon, ranger21, ranger_lars):
        m = net()
        before = [whole(p.detach()).clone() for p in m.parameters()]
        try: train(m, o(m.parameters(), lr=.05), 1)
        except ValueError as e: assert 'must see whole tensors' in str(e) and 'shape (5, 1, 3, 3)' in str(e), e
        else: raise AssertionError(f'{o} was not refused')
        assert all(torch.equal(p, whole(q.detach())) for p,q in zip(before, m.parameters()))

def save():
    _,_,b,ob = both(as_torch(ranger), 8)
    dcp.save(dict(zip(('model', 'optim'), get_state_dict(b, ob))), checkpoint_id=f'{folder}/checkpoint')

def load():
    "Eight updates were made by two processes, seven more are made by these"
    a = net(False)
    oa = as_torch(ranger)(a.parameters(), lr=.05)
    train(a, oa, 15)
    b = net()
    ob = as_torch(ranger)(b.parameters(), lr=.05)
    sd = dict(zip(('model', 'optim'), get_state_dict(b, ob)))
    dcp.load(sd, checkpoint_id=f'{folder}/checkpoint') # which puts counts into `sd` itself
    set_state_dict(b, ob, model_state_dict=sd['model'], optim_state_dict=sd['optim'])
    train(b, ob, 7)
    compare(a, oa, b, ob)

def spoilt():
    a,oa,b,ob = both(ranger)
    if dist.get_rank()==dist.get_world_size()-1: ob.state[b[2].weight]['sqr_avg'].to_local()[0,0] += 1e-6
    compare(a, oa, b, ob)

dist.init_process_group('gloo')
for case in sys.argv[2:]: globals()[case]()
dist.destroy_process_group()
