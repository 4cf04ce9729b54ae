"Classes of `as_torch` where others name them: hydra, Lightning's command line, the Trainer of transformers, pickle"
import copy, inspect, multiprocessing, pickle, sys
from functools import partial

import cloudpickle, hydra, pytest, torch
from fastai_ranger import Ranger, RangerMuon, as_torch, diloco, lookahead, ranger, ranger_muon, spare_ends
from fastai_ranger.interop import engine_of
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

classes = pytest.mark.parametrize('cls', (Ranger, RangerMuon))
xs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    def forward(self, x, labels): return dict(loss=(self.layers(x)-labels).pow(2).mean())

def step(opt):
    "Every parameter of `opt` moves by a gradient of ones"
    for g in opt.param_groups:
        for p in g['params']: p.grad = torch.ones_like(p)
    opt.step()
    return opt

def same(a, b): assert all(map(torch.equal, a.parameters(), b.parameters()))

# hydra

def make(cfg, *args): return hydra.utils.instantiate(OmegaConf.create(cfg), *args)

@classes
def test_hydra(cls):
    hypers = dict(lr=.01, weight_decay=.1, betas=[.9, .98])
    make_opt = make(dict(_target_=f'fastai_ranger.{cls.__name__}', _partial_=True, **hypers))
    model = Net()
    opt = step(make_opt([dict(params=model.layers[0].parameters()),
                         dict(params=model.layers[2].parameters(), betas=OmegaConf.create([.8, .97]))]))
    assert type(opt) is cls
    assert [g['betas'] for g in opt.param_groups] == [(.9, .98), (.8, .97)]
    assert [(g['lr'], g['weight_decay']) for g in opt.param_groups] == [(.01, .1)]*2

def test_hydra_makes_the_class():
    sgd = dict(_target_='torch.optim.SGD', _partial_=True, momentum=.9)
    ahead = dict(_target_='fastai_ranger.lookahead', opt_func=sgd, k=3)
    cls = make(dict(_target_='fastai_ranger.as_torch', opt_func=ahead))
    group = step(cls(Net().parameters(), lr=.1, weight_decay=.2)).param_groups[0]
    assert (group['k'], group['momentum'], group['weight_decay']) == (3, .9, .2)

@classes
def test_misspelt(cls):
    cfg = dict(_target_=f'fastai_ranger.{cls.__name__}', lr=.1, weight_deca=.1)
    with pytest.raises(InstantiationException, match='there is no hyper `weight_deca`: did you mean `weight_decay`?'):
        make(cfg, Net().parameters())

# Lightning

class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def training_step(self, x, i): return self.net(x, x.sum(1, keepdim=True))['loss']
    def on_train_start(self):
        if isinstance(self.optimizers(), RangerMuon): spare_ends(self.optimizers(), self)
    def train_dataloader(self): return DataLoader(xs, batch_size=len(xs)) # Lightning resumes where an epoch begins

def fit(folder, *args):
    save = ModelCheckpoint(folder, filename='{step}', every_n_train_steps=3, save_top_k=-1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu')
    return LightningCLI(Lit, args=['fit', *args], save_config_kwargs=dict(overwrite=True),
                        trainer_defaults=dict(max_steps=7, default_root_dir=folder, callbacks=save, **quiet))

@classes
def test_lightning_cli(cls, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    run = fit(tmp_path, '--optimizer', f'fastai_ranger.{cls.__name__}', '--optimizer.lr', '0.01',
              '--optimizer.betas', '[0.9, 0.99]', '--optimizer.weight_decay', '0.1')
    opt = run.trainer.optimizers[0]
    group = opt.param_groups[0]
    assert type(opt) is cls and (group['betas'], group['weight_decay']) == ((.9, .99), .1)
    if cls is RangerMuon: assert opt.params_with('do_muon') == [run.model.net.layers[0].weight]
    again = fit(tmp_path, '--config', str(tmp_path/'config.yaml'), '--ckpt_path', str(tmp_path/'step=3.ckpt'))
    same(run.model, again.model)
    assert repr(again.trainer.optimizers[0]) == repr(opt)

# The Trainer of transformers

@pytest.mark.parametrize('form', (Ranger, RangerMuon, 'made before'))
def test_hf_trainer(form, tmp_path):
    data = [dict(x=x, labels=x.sum(0, keepdim=True)) for x in xs]
    args = TrainingArguments(tmp_path, max_steps=7, save_steps=3, per_device_train_batch_size=4, use_cpu=True,
                             weight_decay=.1, report_to=[], disable_tqdm=True, logging_strategy='no')
    def trained(**kwargs):
        model = Net()
        if form=='made before': given = dict(optimizers=(Ranger(model.parameters(), lr=.02), None))
        else: given = dict(optimizer_cls_and_kwargs=(form, dict(lr=.02, betas=[.9, .98])))
        trainer = Trainer(model, args, train_dataset=data, **given)
        trainer.train(**kwargs)
        return trainer
    one = trained()
    assert engine_of(one.optimizer).name == ('ranger_muon' if form is RangerMuon else 'ranger')
    if form != 'made before':
        shown = [(g['weight_decay'], g['betas']) for g in one.optimizer.param_groups]
        assert shown == [(.1, (.9, .98)), (0., (.9, .98))]
    same(one.model, trained(resume_from_checkpoint=str(tmp_path/'checkpoint-3')).model)

# pickle

def through_pickle(o): return pickle.loads(pickle.dumps(o))
def through_cloudpickle(o): return cloudpickle.loads(cloudpickle.dumps(o))

@pytest.mark.parametrize('again', (through_pickle, copy.deepcopy, through_cloudpickle))
def test_pickle(again):
    for cls in Ranger, RangerMuon, as_torch(lookahead(torch.optim.SGD)), as_torch(diloco(ranger)):
        opt = step(cls(Net().parameters(), lr=.1))
        other = again(opt)
        assert repr(other) == repr(opt) and type(other).__name__ == again(cls).__name__ == cls.__name__
        for o in opt, other: step(o)
        assert all(map(torch.equal, opt.param_groups[0]['params'], other.param_groups[0]['params']))

def test_pickled_by_name():
    assert as_torch(ranger) is Ranger and as_torch(ranger_muon) is RangerMuon
    for cls in Ranger, RangerMuon: assert through_pickle(cls) is cls
    class Mine(Ranger): pass
    with pytest.raises((pickle.PicklingError, AttributeError), match='Mine'): pickle.dumps(Mine)

def test_pickle_into_a_new_process():
    opt = step(Ranger([nn.Parameter(torch.zeros(3))], lr=.1))
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.apply(repr, (opt,)) == repr(opt)
        assert pool.apply(pickle.dumps, (Ranger,)) == pickle.dumps(Ranger)

# What a reader and `inspect` see

def test_signature():
    hypers = 'betas: tuple[float, float] = (0.95, 0.99), eps: float = 1e-06, weight_decay: float = 0.01, k: int = 6'
    assert str(inspect.signature(Ranger)).startswith(f'(params, lr: float = None, *, {hypers}, alpha: float = 0.5')
    assert 'hidden: Callable = None' in str(inspect.signature(RangerMuon))
    mine = inspect.signature(as_torch(partial(ranger_muon, k=3, hidden=lambda model: []))).parameters
    assert mine['k'].default==3 and 'hidden' not in mine # Lightning writes no function into its config

@classes
def test_docstring(cls):
    for k in inspect.signature(cls).parameters: assert f'\n    {k}: ' in cls.__doc__, k
    example = cls.__doc__.split('Example:')[1]
    names = dict(model=Net(), **{cls.__name__: cls})
    for line in example.strip().splitlines(): exec(line.strip().removeprefix('>>> '), names)
    assert type(names['opt']) is cls

def test_compiled():
    def trained(wrap):
        model = Net()
        opt = Ranger(model.parameters(), lr=.1)
        def update():
            opt.zero_grad()
            model(xs, xs.sum(1, keepdim=True))['loss'].backward()
            opt.step()
        update = wrap(update)
        for _ in range(7): update()
        return model
    same(trained(partial(torch.compile, backend='eager')), trained(lambda f: f))
