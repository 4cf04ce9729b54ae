from .stepper import *
from .radam import *
from .lookahead import *
from .optimizer import *
from .callback import *
from .kahan import *
from .family import *
