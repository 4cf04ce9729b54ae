"All steppers, for those who write optimizers: `from fastai_ranger.steppers import *`"
from .core.stepper import average_grad,average_sqr_grad,l2_reg,momentum_step,sgd_step,step_stat,weight_decay
from .core.lookahead import lookahead_step,slow_weights
from .optimizers.adam import fused_averages,fused_radam_step,radam_step
from .optimizers.kahan import kahan_lookahead_step,kahan_radam_step
from .optimizers.muon import muon_step
from .distributed import average_ranks,outer_step
from .contrib.variants import (adabelief_step,centralize,centralized_radam_step,fused_amsgrad_step,lars_radam_step,
    qh_step)
from .contrib.ranger21 import (adaptive_clip,average_pnm,max_sqr_avg,norm_loss_step,normalize_grad,pnm_step,
    stable_decay)
