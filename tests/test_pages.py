"The names, options and commands on the pages are those of the code"
import ast, builtins, inspect, json, re
from functools import cache
from pathlib import Path

import fastai.distributed # `Learner.distrib_ctx`
import fastai.vision.all
import pytest
import torch
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
from accelerate import Accelerator

import fastai_ranger.all
from fastai_ranger.compare.bench import epoch_opts,ranger_bench
from fastai_ranger.compare.comparison import ranger_compare
from fastai_ranger.compare.registry import optimizers

root = Path(__file__).parents[1]
pages = [root/'README.md', root/'CONTRIBUTING.md', *sorted((root/'nbs').rglob('*.ipynb'))]
public = {k: o for k,o in vars(fastai_ranger.all).items() if getattr(o, '__module__', '').startswith('fastai_ranger')}

def words(text): return {*re.findall(r'\w+', text)}
spaces = (builtins, fastai.vision.all, fastai.vision.all.Learner, torch, torch.nn, torch.nn.utils, torch.optim, torch.optim.Optimizer,
          torch.distributed.fsdp, torch.distributed.checkpoint.state_dict, Accelerator)
foreign = 'RangerAdaBelief','avx512_bf16' # another package, a processor
known = {*foreign, *optimizers, *(k for o in spaces for k in dir(o)), *(k for f in (root/'fastai_ranger').rglob('*.py') for k in words(f.read_text()))}

@cache
def read(f, kind):
    "The text of a page, or the code that it runs"
    if f.suffix=='.md': return f.read_text() if kind=='markdown' else ''
    return '\n\n'.join(''.join(c['source']) for c in json.loads(f.read_text())['cells'] if c['cell_type']==kind)

def wrong_names(text, code=''):
    "Names in backticks that nobody has"
    return sorted({*re.findall(r'(?<!`)`([A-Za-z_]\w*)(?:\(\))?`(?!`)', text)} - known - words(code))

def calls(text):
    "The calls in code that the text shows, in backticks or as a block"
    shown = [*re.findall(r'(?<!`)`([^`\n]+)`(?!`)', text), *re.findall(r'```python\n(.*?)```', text, re.S), *re.findall(r'(?:^    .*\n?)+', text, re.M)]
    for o in shown:
        try: tree = ast.parse(inspect.cleandoc(o))
        except SyntaxError: continue
        yield from (n for n in ast.walk(tree) if isinstance(n, ast.Call))

def wrong_keywords(text):
    "Keywords in calls of our functions that these do not take"
    for call in calls(text):
        name,args = getattr(call.func, 'id', None),call.args
        if name=='partial' and args: name = getattr(args[0], 'id', None)
        if name not in public: continue
        params = inspect.signature(public[name]).parameters
        if any(o.kind is o.VAR_KEYWORD for o in params.values()): continue
        yield from (f'{name}({k.arg}=)' for k in call.keywords if k.arg and k.arg not in params)

def wrong_options(text):
    "Options and optimizers in commands that these do not have"
    known = dict(compare=inspect.signature(ranger_compare).parameters, bench=inspect.signature(ranger_bench).parameters)
    for which,line in re.findall(r'ranger-(compare|bench) ((?:[^`\n\\]|\\\n)*)', text):
        yield from (f'{which} {o}' for o in re.findall(r'--([a-z-]+)', line) if o.replace('-', '_') not in known[which])
        for opts in re.findall(r'--opts ([\w,]+)(?=[\s\\]|$)', line): yield from (o for o in opts.split(',') if o and o not in optimizers and o not in epoch_opts)

@pytest.mark.parametrize('page', pages, ids=lambda f: f.stem)
def test_names_calls_and_commands(page):
    text,code = read(page, 'markdown'),read(page, 'code')
    assert not [*wrong_names(text, code), *wrong_keywords(text), *wrong_options(text)]

def test_what_is_wrong_is_seen():
    assert wrong_names('`ranger`, `ranger_mouon` and `fit_flatcos()`, and `mine`', 'mine = 1')==['fit_flatcos', 'ranger_mouon']
    assert list(wrong_keywords('`ranger(params, beta1=.9)` and `partial(ranger_muon, k=5, nesterof=True)`'))==['ranger(beta1=)', 'ranger_muon(nesterof=)']
    assert list(wrong_options('    ranger-compare digits --opts ranger,adamm \\\n      --epoch 5\n    ranger-bench --list small\n    ranger-compare runs --report'))==['compare epoch', 'adamm', 'bench list']
