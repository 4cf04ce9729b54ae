"`fit_ranger21`: Ranger21's own rates, in a `Learner`"
import numpy as np
import pytest
import pytorch_optimizer
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import params
from fastai_ranger.all import ranger, ranger21
from fastai_ranger.compare.data import cnn, digits_dls
from fastai_ranger.contrib.ranger21 import sched_ranger21

def their_rates(n, lr, sqr_mom, lr_end):
    "A peer's, which are those of Ranger21's code"
    opt = pytorch_optimizer.Ranger21([torch.nn.Parameter(torch.ones(2))], num_iterations=n, lr=lr, betas=(.9, sqr_mom), warm_down_min_lr=lr_end)
    return [opt.warm_down(opt.warm_up_dampening(lr, i), i) for i in range(1, n+1)]

def learner(opt_func=ranger21, **kwargs):
    dls = digits_dls()
    dls.train.n = 64*10
    return Learner(dls, cnn(c_in=1), CrossEntropyLossFlat(), opt_func, **kwargs)

def fitted(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_ranger21(*args, **kwargs)
    return learn.recorder.hps['lr']

@pytest.mark.parametrize('sqr_mom', [.9, .999])
def test_rates_are_theirs(sqr_mom):
    "With a short memory of squares a warm-up of twice its length, with a long one of 22%"
    learn = learner(lambda ps, lr: ranger21(ps, lr, sqr_mom=sqr_mom))
    assert np.allclose(fitted(learn, 5, 4e-3), their_rates(50, 4e-3, sqr_mom, 3e-5), rtol=1e-12, atol=0)

def test_groups_and_bounds():
    "Two groups; a rate below the last one does not rise; no warm-up; the way down from the first update on"
    learn = learner(ranger, splitter=lambda m: [params(m[:2]), params(m[2:])])
    fitted(learn, 1, slice(1e-5, 1e-2), warmup=0)
    assert [round(h['lr'], 12) for h in learn.opt.hypers]==[1e-5, 3e-5]
    rates = [sched_ranger21(i/10, 1., 10, 0, 1, 0.) for i in range(10)]
    assert np.allclose(rates, np.arange(.9, -.05, -.1))

def test_resumes_and_takes_callbacks():
    seen = []
    class See(Callback):
        def before_step(self): seen.append(self.opt.hypers[0]['lr'])
    whole = fitted(learner(), 3, 1e-3)
    fitted(learner(), 3, 1e-3, cbs=See(), start_epoch=2)
    assert np.allclose(seen, whole[-10:], rtol=1e-12)
