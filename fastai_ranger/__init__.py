__version__ = "0.1.0"

from .optimizer import ranger
from . import learner # what changes in fastai
