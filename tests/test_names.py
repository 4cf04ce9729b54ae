"Public names, and which room imports which"
import ast, inspect, re
from pathlib import Path
from types import ModuleType

import fastai.vision.all
import fastai_ranger
import fastai_ranger.all
import fastai_ranger.steppers
import pytest
import torch
from fastai_ranger.core.stepper import Stepper

root = Path(__file__).parents[1]
public = [k for k in vars(fastai_ranger.all) if not k.startswith('_')]
of_01 = '''Stepper stepper hyper common unless named sgd_step momentum_step average_grad average_sqr_grad step_stat weight_decay l2_reg
    MultiTensorOptimizer Adam RAdam rectify radam_step fused_averages fused_radam_step slow_weights lookahead_step ranger SlowWeights
    ranger_kahan kahan_radam_step kahan_lookahead_step lookahead LookaheadWrapper ranger_gc ranger_va ranger_qh ranger_adabelief
    ranger_lars fastai_hypers spare_embeddings inside_lookahead centralize centralized_radam_step fused_amsgrad_step qh_step
    adabelief_step lars_radam_step ranger21 adaptive_clip normalize_grad average_pnm max_sqr_avg pnm_step stable_decay norm_loss_step
    sched_ranger21 muon ranger_muon orthogonalize muon_step muon_radam_step hidden_weights spare_ends as_torch TorchOptimizer
    plot_rectification plot_lookahead FastAndSlow UpdateSizes diloco DiLoCoTrainer average_ranks outer_step ranger_lr
    restart_on_load'''.split()

@pytest.mark.parametrize('name', public)
def test_a_name_is_what_it_says(name):
    "a function or a class, never a module, and the same one wherever it is imported from"
    o = getattr(fastai_ranger, name)
    assert o is getattr(fastai_ranger.all, name) and callable(o) and not isinstance(o, ModuleType)

def test_few_names_and_none_in_the_way():
    assert len(public) <= 36
    assert {k for k in public if hasattr(fastai.vision.all, k)} == {'ranger', 'Adam', 'RAdam'}

def test_steppers_are_in_one_place():
    "all of them"
    names = {k for k,o in vars(fastai_ranger.steppers).items() if isinstance(o, Stepper)}
    declared = set()
    for f in (root/'fastai_ranger').rglob('*.py'):
        for o in ast.walk(ast.parse(f.read_text())):
            if isinstance(o, ast.FunctionDef) and any(ast.unparse(d).startswith('stepper(') for d in o.decorator_list): declared.add(o.name)
    assert names == declared

def test_what_went_is_in_the_changelog():
    gone = [k for k in of_01 if k not in public]
    said = (root/'CHANGELOG.md').read_text().split('\n## ')[1]
    assert gone and not [k for k in gone if f'`{k}`' not in said]

@pytest.mark.parametrize('name', [k for k in public if inspect.isfunction(getattr(fastai_ranger, k)) and 'lr' in inspect.signature(getattr(fastai_ranger, k)).parameters
                                  and 'params' in inspect.signature(getattr(fastai_ranger, k)).parameters])
def test_help(name):
    "has the parameters with their ranges, an example and the papers"
    text = getattr(fastai_ranger, name).__doc__
    for k in inspect.signature(getattr(fastai_ranger, name)).parameters: assert re.search(rf'^    {k}: \w', text, re.M), k
    assert re.search(r'^    lr: .*a number in \[0, inf\)$', text, re.M)
    assert 'Example:' in text and 'Papers:' in text

# From the ground up: a room imports those before it

rooms = ['core.layout', 'core.stepper', 'core.route', 'core.declared', 'core.kernels', 'core.checkpoint', 'core.bucket', 'core.optimizer', 'core.lookahead',
         'interop', 'optimizers.adam', 'optimizers.around', 'optimizers.ranger', 'optimizers.muon', 'optimizers.kahan', 'contrib.variants', 'contrib.ranger21',
         'distributed', 'callback', 'learner', 'fixes', 'plot', 'steppers', 'all']

def imports_of(room):
    f = root/f"fastai_ranger/{room.replace('.', '/')}.py"
    for o in ast.walk(ast.parse(f.read_text())):
        if not isinstance(o, ast.ImportFrom) or not o.level: continue
        parts = ('fastai_ranger.'+room).split('.')[1:-o.level]
        yield '.'.join([*parts, *filter(None, [o.module])])

@pytest.mark.parametrize('room', rooms)
def test_imports_go_one_way(room): assert {o for o in imports_of(room)} <= set(rooms[:rooms.index(room)])

def test_every_room_is_in_its_place():
    package = root/'fastai_ranger'
    there = {'.'.join(f.relative_to(package).with_suffix('').parts) for f in package.rglob('*.py') if f.name[0] != '_' and f.parent.name != 'compare'}
    assert there == set(rooms)
