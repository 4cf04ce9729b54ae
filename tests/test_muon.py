"Who gets Muon, and what becomes of that in a `Learner`, in copies and in checkpoints"
import copy
import warnings

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import AWD_LSTM
from fastai_ranger.all import *
from torch import nn

def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 2))

def learner(model, **kwargs):
    torch.manual_seed(0)
    items = [(torch.randn(3, 8, 8), torch.tensor(i%2)) for i in range(24)]
    dl = DataLoader(items, bs=8)
    return Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), opt_func=ranger_muon, lr=.01, **kwargs)

def hidden(opt, model): return {n for n,p in model.named_parameters() if opt.state[p].get('do_muon')}

def step(opt, model):
    for p in model.parameters(): p.grad = torch.ones_like(p)
    opt.step()

def test_a_learner_finds_the_ends():
    learn = learner(net())
    learn.fit(1)
    assert hidden(learn.opt, learn.model)=={'0.weight', '4.weight'}
    learn.opt.clear_state()
    learn.fit(1)
    assert hidden(learn.opt, learn.model)=={'0.weight', '4.weight'}
    twin = copy.deepcopy(learn)
    assert hidden(twin.opt, twin.model)=={'0.weight', '4.weight'}

def test_groups_and_freezing():
    learn = learner(net(), splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.freeze()
    before = learn.model[0].weight.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model[0].weight, before)
    learn.unfreeze()
    learn.fit(1, slice(1e-3, 1e-2))
    assert not torch.equal(learn.model[0].weight, before) and hidden(learn.opt, learn.model)=={'0.weight', '4.weight'}

def test_embeddings_and_what_is_tied_to_them():
    model = AWD_LSTM(20, 6, 8, 1)
    tied = nn.Sequential(model, nn.Linear(6, 20))
    tied[1].weight = model.encoder.weight
    opt = muon(list(tied.parameters()), lr=.01)
    spare_ends(opt, tied)
    step(opt, tied)
    assert hidden(opt, tied) and not any('encoder' in n for n in hidden(opt, tied))

@pytest.mark.parametrize('shape,theirs', [((3, 4), True), ((3, 4, 1, 1), True), ((6, 2, 3, 3), True), ((6, 1, 3, 3), False), ((1, 4), False), ((4, 1), False), ((1, 5, 8), False), ((4,), False), ((), False)])
def test_by_shape(shape, theirs):
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    opt = muon([p], lr=.1)
    opt.step()
    assert opt.state[p]['do_muon'] is theirs and ('sqr_avg' in opt.state[p]) is not theirs and p.isfinite().all() and (p < 1).all()

def test_checkpoints():
    model,other = net(),net()
    opt,theirs = ranger_muon(list(model.parameters()), lr=.01),ranger(list(other.parameters()), lr=.01)
    for o,m in ((opt, model), (theirs, other)): step(o, m)
    spare_ends(opt, model)
    opt.load_state_dict(theirs.state_dict())
    assert all(('sqr_avg' in s) != s['do_muon'] for p,_,s,_ in opt.all_params() if 'do_muon' in s)
    step(opt, model)
    assert hidden(opt, model)=={'0.weight', '4.weight'}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        theirs.load_state_dict(opt.state_dict()) # averages of squares are missing for some
    assert 'sqr_avg' not in theirs.state[other[0].weight] and not seen
    step(theirs, other)
    bad = copy.deepcopy(opt.state_dict())
    bad['state'][0]['do_muon'] = 1
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='`do_muon` of parameter 0 of group 0 must be True or False'), pytest.warns(UserWarning): opt.load_state_dict(bad)
    assert all(map(torch.equal, before, model.parameters()))

@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon came with torch 2.9')
def test_lookahead_around_pytorchs():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    opt = lookahead(torch.optim.Muon, k=2)(list(model.parameters()), lr=.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2): step(opt, model)
    for p,s in zip(model.parameters(), before): assert torch.equal(opt.state[p]['slow'], p) and not torch.equal(p, s)

def test_a_checkpoint_of_muons_weights_alone():
    "If no weight of RAdam's was trained, none lacks its average of squares"
    def make():
        ps = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3))]
        return ps, ranger_muon(ps, lr=.1)
    (w,b),opt = make()
    w.grad = torch.randn(3, 4)
    opt.step()
    (_,bias),again = make()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again.load_state_dict(opt.state_dict())
    bias.grad = torch.ones(3)
    again.step()
    assert 'sqr_avg' in again.state[bias] and 'sqr_avg' not in opt.state[w]
