from .core.stepper import Stepper,stepper,hyper,common,unless,named,sgd_step,momentum_step,average_grad,average_sqr_grad,step_stat,weight_decay,l2_reg
from .core.optimizer import MultiTensorOptimizer
from .optimizers.adam import Adam,RAdam,rectify,radam_step,fused_averages,fused_radam_step
from .core.lookahead import slow_weights,lookahead_step
from .optimizers.ranger import ranger
from .callback import SlowWeights
from .optimizers.kahan import ranger_kahan,kahan_radam_step,kahan_lookahead_step
from .optimizers.around import lookahead,LookaheadWrapper
from .contrib.variants import (ranger_gc,ranger_va,ranger_qh,ranger_adabelief,ranger_lars,fastai_hypers,spare_embeddings,inside_lookahead,
    centralize,centralized_radam_step,fused_amsgrad_step,qh_step,adabelief_step,lars_radam_step)
from .contrib.ranger21 import ranger21,adaptive_clip,normalize_grad,average_pnm,max_sqr_avg,pnm_step,stable_decay,norm_loss_step,sched_ranger21
from .optimizers.muon import muon,ranger_muon,orthogonalize,muon_step,muon_radam_step,hidden_weights,spare_ends
from .interop import as_torch,TorchOptimizer
from .plot import plot_rectification,plot_lookahead,FastAndSlow,UpdateSizes
from .distributed import diloco,DiLoCoTrainer,average_ranks,outer_step
from .learner import ranger_lr,restart_on_load
