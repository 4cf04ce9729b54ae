"Ranger for fastai: the optimizers and what goes with them"
__version__ = "0.1.0"

import warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore') # what fastai's own imports warn of
    from . import learner # what changes in a `Learner`
    from .all import *
