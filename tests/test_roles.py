"Which weights get Muon: in the nets that people train, whatever the order, and as you say"
import copy, pickle, warnings
from functools import partial

import pytest
import timm
import torch
import torchvision.models as vision
import torchvision.models.detection as detection
import torchvision.models.segmentation as segmentation
from accelerate import Accelerator
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.text.models.awdlstm import AWD_LSTM
from fastai_ranger.all import *
from fastai_ranger.optimizers.muon import find_ends, hidden_weights
from torch import nn

def names(model, modules): return [n for n,m in model.named_modules() if any(m is o for o in modules)]
def ends(model): return set(names(model, find_ends(model)))

def built(f, **kwargs):
    "A net without the memory of its weights"
    with torch.device('meta'): return f(**kwargs)

# Heads

rcnn = {'roi_heads.box_predictor.cls_score', 'roi_heads.box_predictor.bbox_pred'}
lists = {f'head.{h}_head.module_list.{i}' for h in ('classification', 'regression') for i in range(6)}
aux = {'classifier.4', 'aux_classifier.4'}
no_weights = dict(weights=None, weights_backbone=None)
heads = [
    (vision.resnet18, {}, {'fc'}), (vision.vgg11, {}, {'classifier.6'}), (vision.densenet121, {}, {'classifier'}), (vision.squeezenet1_0, {}, {'classifier.1'}),
    (vision.mobilenet_v3_small, {}, {'classifier.3'}), (vision.efficientnet_b0, {}, {'classifier.1'}), (vision.convnext_tiny, {}, {'classifier.2'}),
    (vision.vit_b_16, {}, {'heads.head'}), (vision.swin_t, {}, {'head'}), (vision.maxvit_t, {}, {'classifier.5'}),
    (vision.googlenet, dict(init_weights=False), {'aux1.fc2', 'aux2.fc2', 'fc'}), (vision.inception_v3, dict(init_weights=False), {'AuxLogits.fc', 'fc'}),
    (detection.fasterrcnn_resnet50_fpn, no_weights, rcnn), (detection.maskrcnn_resnet50_fpn, no_weights, rcnn | {'roi_heads.mask_predictor.mask_fcn_logits'}),
    (detection.keypointrcnn_resnet50_fpn, no_weights, rcnn | {'roi_heads.keypoint_predictor.kps_score_lowres'}),
    (detection.retinanet_resnet50_fpn, no_weights, {'head.classification_head.cls_logits', 'head.regression_head.bbox_reg'}),
    (detection.fcos_resnet50_fpn, no_weights, {'head.classification_head.cls_logits', 'head.regression_head.bbox_reg', 'head.regression_head.bbox_ctrness'}),
    (detection.ssd300_vgg16, no_weights, lists), (detection.ssdlite320_mobilenet_v3_large, no_weights, {f'{o}.1' for o in lists}),
    (segmentation.deeplabv3_resnet50, dict(**no_weights, aux_loss=True), aux), (segmentation.fcn_resnet50, dict(**no_weights, aux_loss=True), aux),
    (segmentation.lraspp_mobilenet_v3_large, no_weights, {'classifier.low_classifier', 'classifier.high_classifier'})]
of_timm = dict(
    resnet18={'fc'}, vit_tiny_patch16_224={'head'}, deit_tiny_distilled_patch16_224={'head', 'head_dist'}, convnext_atto={'head.fc'}, mixer_s32_224={'head'},
    swin_tiny_patch4_window7_224={'head.fc'}, levit_128s={'head.linear', 'head_dist.linear'}, efficientformer_l1={'head', 'head_dist'}, inception_v4={'last_linear'},
    cait_xxs24_224={'head'}, volo_d1_224={'aux_head', 'head'}, efficientnet_lite0={'classifier'}, nfnet_f0={'head.fc'}, repvit_m1={'head.head.l', 'head.head_dist.l'})

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('f,kwargs,right', heads, ids=[f.__name__ for f,*_ in heads])
def test_torchvisions_heads(f, kwargs, right): assert ends(built(f, **kwargs)) == right

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', of_timm)
def test_timms_heads(name): assert ends(built(timm.create_model, model_name=name)) == of_timm[name]

def small(name, **kwargs):
    import transformers
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    if name=='CLIPModel': config = transformers.CLIPConfig(text_config=sizes, vision_config=dict(**sizes, image_size=16, patch_size=8), projection_dim=16)
    elif name=='GPT2LMHeadModel': config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16, tie_word_embeddings=False)
    else: config = transformers.BertConfig(**sizes)
    return built(getattr(transformers, name), config=config)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name,right', [('CLIPModel', {'visual_projection', 'text_projection'}), ('BertForSequenceClassification', {'classifier'}), ('GPT2LMHeadModel', {'lm_head'})])
def test_heads_of_transformers(name, right): assert ends(small(name)) == right

@pytest.mark.filterwarnings('ignore')
def test_a_linear_layer_with_its_weight_transposed():
    "`Conv1D` of GPT-2"
    assert {n.split('.', 3)[-1] for n in hidden_weights(small('GPT2LMHeadModel'))} == {'attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight'}

class Net(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for k,m in parts.items(): setattr(self, k, m)

def body(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))

@pytest.mark.parametrize('kind', (lambda parts: Net(**parts), nn.ModuleDict), ids=('module', 'ModuleDict'))
@pytest.mark.parametrize('order', ((0, 1, 2), (2, 1, 0), (1, 0, 2)))
def test_heads_side_by_side(kind, order):
    "in any order"
    parts = list(dict(age=nn.Linear(8, 1), name=nn.Linear(8, 5), kind=nn.Linear(8, 3)).items())
    model = kind({'body': body(), **dict(parts[i] for i in order)})
    assert ends(model) == {'age', 'name', 'kind'} and set(hidden_weights(model)) == {'body.0.weight', 'body.2.weight'}

@pytest.mark.parametrize('model,right', [
    (Net(fc1=nn.Linear(784, 64), fc2=nn.Linear(64, 64), fc3=nn.Linear(64, 10)), {'fc3'}), (Net(up=nn.Linear(64, 256), down=nn.Linear(256, 64), out=nn.Linear(64, 10)), {'out'}),
    (Net(conv1=nn.Conv2d(1, 8, 3), conv2=nn.Conv2d(8, 16, 3), fc1=nn.Linear(256, 32), fc2=nn.Linear(32, 10)), {'fc2'}),
    (Net(body=body(), value=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), policy=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))), {'value.2', 'policy.2'}),
    (Net(enc=nn.Linear(20, 9), mu=nn.Linear(9, 2), logvar=nn.Linear(9, 2), dec=nn.Linear(2, 9), out=nn.Linear(9, 20)), {'out'}),
    (Net(body=body(), heads=nn.ModuleList([nn.Linear(8, i) for i in (1, 3, 5)])), {'heads.0', 'heads.1', 'heads.2'}),
    (Net(layers=nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), out=nn.Linear(8, 2)), {'out'}), (nn.ModuleDict(dict(a=nn.Linear(8, 8), b=nn.Linear(8, 3))), {'a', 'b'}),
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 2)), {'1'}), (nn.Linear(3, 4), {''}), (nn.ReLU(), set()), (nn.LSTM(3, 4), set())])
def test_chains_and_heads(model, right): assert ends(model) == right

# Layers, and parameters that are none

class TableNet(nn.Module):
    "Two look-up tables, as parameters or as embeddings"
    def __init__(self, bare):
        super().__init__()
        torch.manual_seed(0)
        tables = [.1*torch.randn(40, 4) for _ in range(2)]
        if bare: self.users,self.items = map(nn.Parameter, tables)
        else: self.users,self.items = (nn.Embedding.from_pretrained(o, freeze=False) for o in tables)
        self.hidden,self.out = nn.Linear(8, 16),nn.Linear(16, 1)
    def forward(self, u, i):
        looked = [o(k) if isinstance(o, nn.Embedding) else o[k] for o,k in ((self.users, u), (self.items, i))]
        return self.out(self.hidden(torch.cat(looked, 1)).relu())

def test_a_look_up_table_is_one_however_it_is_written():
    ends = []
    for bare in (True, False):
        model = TableNet(bare)
        opt = ranger_muon(model.parameters(), lr=.02)
        spare_ends(opt, model)
        assert len(opt.params_with('do_muon')) == 1 and opt.params_with('do_muon')[0] is model.hidden.weight
        g = torch.Generator().manual_seed(1)
        for _ in range(20):
            u,i = torch.randint(40, (2, 16), generator=g)
            opt.zero_grad()
            (model(u, i)-((u*i)%7)[:,None]/7).pow(2).mean().backward()
            opt.step()
        ends.append([p.detach() for p in model.parameters()])
    key = lambda ps: sorted((tuple(p.shape), p.double().sum().item()) for p in ps)
    assert key(ends[0]) == key(ends[1])

@pytest.mark.parametrize('model,right', [
    (nn.Sequential(nn.LSTM(4, 6, 2), nn.Linear(6, 2)), {f'0.weight_{o}_l{i}' for o in ('ih', 'hh') for i in (0, 1)}), (nn.Sequential(nn.GRUCell(4, 6), nn.Linear(6, 2)), {'0.weight_ih', '0.weight_hh'}),
    (Net(attn=nn.MultiheadAttention(8, 2), out=nn.Linear(8, 2)), {'attn.in_proj_weight', 'attn.out_proj.weight'}),
    (Net(attn=nn.MultiheadAttention(8, 2, kdim=4, vdim=4), out=nn.Linear(8, 2)), {f'attn.{o}_proj_weight' for o in 'qkv'} | {'attn.out_proj.weight'}),
    (nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 2)), {'0.parametrizations.weight.original'}),
    (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=6), nn.Bilinear(6, 6, 4), nn.BatchNorm2d(6), nn.Linear(6, 2)), set()),
    (Net(rnn=AWD_LSTM(20, 6, 8, 2), out=nn.Linear(6, 2)), {f'rnn.rnns.{i}.{o}' for i in (0, 1) for o in ('weight_hh_l0_raw', 'module.weight_ih_l0')}),
    (nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2)), {'0.weight'})])
def test_layers(model, right): assert set(hidden_weights(model)) == right

def test_a_layer_of_ones_own():
    class Mine(nn.Linear): pass
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
    assert set(hidden_weights(nn.Sequential(Mine(4, 4), Bare(), nn.Linear(4, 2)))) == {'0.weight'}

# As you say

def learner(model, opt_func):
    dl = DataLoader([(torch.randn(4), torch.randn(2)) for _ in range(8)], bs=4)
    return Learner(DataLoaders(dl, dl), model, loss_func=nn.MSELoss(), opt_func=opt_func, lr=.01)

def chain(): return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
def first_only(model): return [model[0].weight]
def which(opt, model): return [n for n,p in model.named_parameters() if any(p is o for o in opt.params_with('do_muon'))]

@pytest.mark.parametrize('hidden,right', [(None, ['0.weight', '1.weight']), (first_only, ['0.weight']), (partial(hidden_weights, ends=['0', '1']), ['2.weight']),
    (partial(hidden_weights, ends='2'), ['0.weight', '1.weight']), (lambda model: {n: p for n,p in model.named_parameters() if p.ndim > 1}, ['0.weight', '1.weight', '2.weight']), (lambda model: [], [])])
@pytest.mark.parametrize('opt_func', (ranger_muon, muon))
def test_your_own_choice(opt_func, hidden, right):
    "in a `Learner`, in a loop, and as a PyTorch optimizer; the repr says how many"
    learn = learner(chain(), partial(opt_func, hidden=hidden))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert which(learn.opt, learn.model) == right
    assert [n for n,p in learn.model.named_parameters() if learn.opt.state[p]['do_muon']] == right == [n for n,p in learn.model.named_parameters() if 'sqr_avg' not in learn.opt.state[p]]
    assert (f'Muon for {len(right)} of them' in repr(learn.opt)) == bool(right)
    for make in (lambda ps: opt_func(ps, lr=.1, hidden=hidden), lambda ps: as_torch(opt_func)(ps, lr=.1, hidden=hidden)):
        model = chain()
        opt = make(model.parameters())
        spare_ends(opt, model)
        assert which(opt, model) == right
    model = chain()
    opt = opt_func(model.parameters(), lr=.1)
    spare_ends(opt, model, hidden)
    assert which(opt, model) == right

def test_what_is_refused():
    model = chain()
    opt = muon(model.parameters(), lr=.1)
    with pytest.raises(ValueError, match="`ends` must be names of modules of the model, got 'haed': did you mean 'head'"): hidden_weights(nn.ModuleDict(dict(head=nn.Linear(4, 2))), ends='haed')
    with pytest.raises(ValueError, match=r'returns 0.bias, of shape \(6,\): Muon is for matrices'): spare_ends(opt, model, lambda m: [m[0].bias])
    with pytest.raises(ValueError, match='`hidden` must be a function of the model'): muon(model.parameters(), lr=.1, hidden=['0.weight'])
    with pytest.raises(ValueError, match='`opt` must be an optimizer that has Muon'): spare_ends(ranger(model.parameters(), lr=.1), model)
    for sgd in (torch.optim.SGD(model.parameters(), lr=.1), Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=.1))):
        with pytest.raises(TypeError, match='`opt` must be an optimizer of fastai_ranger, got a SGD'): spare_ends(sgd, model)
    for bad in (['0.weight'], model, model[0].weight, list(model.named_parameters()), list(chain().parameters()), None, 3):
        with pytest.raises(ValueError, match='`do_muon` must return parameters of the model, or a dict of them, got'): spare_ends(opt, model, lambda m: bad)
    with pytest.raises(ValueError, match='`opt` has no parameter of `model`'): spare_ends(opt, chain())
    for bad in (5, '', [''], [model[0]], model[0]):
        with pytest.raises(ValueError, match='`ends` must be names of modules of the model'): hidden_weights(model, ends=bad)
    assert which(opt, model) == ['0.weight', '1.weight', '2.weight'] # nobody has told it of the model

def test_another_choice_in_mid_training():
    "Averages that the other optimizer needs start anew, with their count"
    model = chain()
    opt = ranger_muon(model.parameters(), lr=.01)
    def step(n):
        for _ in range(n):
            for p in model.parameters(): p.grad = torch.randn_like(p)
            opt.step()
    step(7)
    spare_ends(opt, model)
    step(1)
    assert [opt.state[m.weight]['step'] for m in model] == [8, 8, 1] and [opt.state[m.weight]['slow_step'] for m in model] == [8]*3
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in model.parameters())

def test_copies_checkpoints_and_exports_keep_the_choice(tmp_path):
    learn = learner(chain(), partial(ranger_muon, hidden=first_only))
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))): assert which(other.opt, other.model) == ['0.weight']
    again = learner(chain(), ranger_muon)
    again.create_opt()
    again.opt.load_state_dict(learn.opt.state_dict())
    assert which(again.opt, again.model) == ['0.weight']

def test_prepared_by_accelerate():
    model = nn.Sequential(nn.Embedding(9, 4), *chain())
    for f,say in ((ranger_muon, spare_ends), (ranger_gc, spare_embeddings)):
        acc = Accelerator(cpu=True)
        net,opt = acc.prepare(model, as_torch(f)(model.parameters(), lr=.1))
        say(opt, net)
        assert opt.optimizer.inner.state[model[0].weight] == ({'do_muon': False} if f is ranger_muon else {'do_gc': False})
