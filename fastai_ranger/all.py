"The public names: `from fastai_ranger.all import *`, after fastai"
from .core.stepper import hyper,stepper
from .core.route import route
from .core.optimizer import MultiTensorOptimizer
from .interop import as_torch,from_torch
from .optimizers.adam import Adam,RAdam
from .optimizers.around import around,lookahead
from .optimizers.ranger import Ranger,ranger
from .optimizers.muon import RangerMuon,hidden_weights,muon,ranger_muon,spare_ends
from .optimizers.kahan import ranger_kahan
from .contrib.variants import ranger_adabelief,ranger_gc,ranger_lars,ranger_qh,ranger_va,spare_embeddings
from .contrib.ranger21 import ranger21
from .distributed import DiLoCoTrainer,diloco
from .callback import SlowWeights
from .learner import ranger_lr,restart_on_load
from .plot import FastAndSlow,UpdateSizes,plot_lookahead,plot_rectification
