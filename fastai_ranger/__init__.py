__version__ = "0.1.0"

import warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore') # what fastai's own imports warn of
    from .optimizers.ranger import ranger
    from . import learner # what changes in fastai
