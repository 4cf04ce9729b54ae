"Every kind of fastai `Learner`, a few batches each: where fastai's `ranger` is right, ours ends at the same weights"
from functools import partial

import fastai.optimizer as stock
import pandas as pd
import pytest
import timm # noqa: F401, before fastai looks for it
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config, language_model_learner, text_classifier_learner
from fastai.torch_core import set_seed, tensor
from fastai.vision.all import resnet18, unet_learner, vision_learner, xresnet18
from fastai_ranger.all import ranger
from helpers import Float64
from sklearn import datasets
from workflows import fit, gan_learner, largest, weights

def dls_of(items, bs=16, n=80):
    dls = DataLoaders.from_dsets(items[:n], items[n:n+bs], bs=bs, num_workers=0)
    dls.train.shuffle = False
    return dls

def scans(size):
    "Digits as images of three channels"
    x,y = datasets.load_digits(return_X_y=True)
    x = torch.nn.functional.interpolate(tensor(x[:96]).float().view(-1, 1, 8, 8)/16, size=(size, size), mode='bilinear')
    return x.expand(-1, 3, -1, -1).contiguous(), tensor(y[:96]).long()

def image_dls(target=lambda x,y: y, size=16, **kwargs): return dls_of([(x, target(x, y)) for x,y in zip(*scans(size))], **kwargs)

def vision(arch, opt_func):
    return vision_learner(image_dls(n=48), arch, pretrained=False, n_out=10, normalize=False, loss_func=CrossEntropyLossFlat(), opt_func=opt_func)

def vit(opt_func):
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, num_classes=10)
    return Learner(image_dls(size=32), model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func)

def unet(opt_func):
    "Which pixels are ink"
    return unet_learner(image_dls(lambda x,y: (x[0] > .5).long(), bs=4, n=12), resnet18, pretrained=False, n_out=2, normalize=False, loss_func=CrossEntropyLossFlat(axis=1), opt_func=opt_func)

def xresnet(opt_func): return Learner(image_dls(n=48), xresnet18(n_out=10, pretrained=False), loss_func=CrossEntropyLossFlat(), opt_func=opt_func)

def multi_label(opt_func):
    "Is the digit odd, above four, a square? Any number of these"
    target = lambda x,y: tensor([y%2, y > 4, y in (0, 1, 4, 9)]).float()
    return vision_learner(image_dls(target, n=48), resnet18, pretrained=False, n_out=3, normalize=False, loss_func=BCEWithLogitsLossFlat(), opt_func=opt_func)

def regression(opt_func):
    "How much ink there is"
    return vision_learner(image_dls(lambda x,y: x.mean()[None], n=48), resnet18, pretrained=False, n_out=1, normalize=False, loss_func=MSELossFlat(), opt_func=opt_func)

def tabular(opt_func):
    "Cultivars of wine, with one continuous variable made a category"
    df = datasets.load_wine(as_frame=True).frame.iloc[::2].reset_index(drop=True)
    df['dark'] = (df['color_intensity'] > 5).astype(str)
    df['target'] = df['target'].astype(str)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['dark'], cont_names=list(df.columns[:8]), y_names='target', valid_idx=list(range(70, 89)), bs=16)
    dls.train.shuffle = False
    return tabular_learner(dls, layers=[32, 16], opt_func=opt_func)

def tabular_regression(opt_func):
    df = datasets.load_diabetes(as_frame=True).frame[:96]
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=list(df.columns[:-1]), y_names='target', valid_idx=list(range(80, 96)), bs=16)
    dls.train.shuffle = False
    return tabular_learner(dls, layers=[32, 16], opt_func=opt_func)

def collab(opt_func):
    "What twenty men did in three exercises"
    df = datasets.load_linnerud(as_frame=True).data.rename_axis('man').reset_index().melt('man', var_name='exercise', value_name='rating')
    dls = CollabDataLoaders.from_df(df, valid_pct=.1, seed=0, bs=8)
    dls.train.shuffle = False
    return collab_learner(dls, n_factors=8, y_range=(0, 250), opt_func=opt_func)

def texts():
    "scikit-learn's descriptions of its data, by paragraph"
    found = {n: getattr(datasets, f'load_{n}')().DESCR.split('\n\n') for n in ('iris', 'wine', 'diabetes', 'breast_cancer')}
    return pd.DataFrame([dict(text=' '.join(o.split()), about=n) for n,os in found.items() for o in os if 40 < len(o) < 1500])

def text_dls(**kwargs): return TextDataLoaders.from_df(texts(), text_col='text', label_col='about', seed=0, bs=8, **kwargs)

small = dict(emb_sz=16, n_hid=24, n_layers=2)

def language_model(opt_func):
    return language_model_learner(text_dls(is_lm=True, seq_len=20), AWD_LSTM, config={**awd_lstm_lm_config, **small}, pretrained=False, opt_func=opt_func)

def text_classifier(opt_func):
    return text_classifier_learner(text_dls(), AWD_LSTM, config={**awd_lstm_clas_config, **small}, pretrained=False, opt_func=opt_func)

apps = dict(vision=partial(vision, resnet18), timm=partial(vision, 'resnet10t'), vit=vit, xresnet=xresnet, unet=unet, multi_label=multi_label, regression=regression,
            tabular=tabular, tabular_regression=tabular_regression, collab=collab, language_model=language_model, text_classifier=text_classifier)

@pytest.mark.parametrize('app', apps)
def test_ends_where_stock_does(app):
    def trained(opt_func):
        set_seed(0, reproducible=True)
        learn = apps[app](opt_func)
        fit(learn, 3, 3e-3, cbs=Float64())
        assert learn.train_iter > 8 # rectified, and synchronised
        return weights(learn.model)
    ours,theirs = trained(ranger),trained(stock.ranger)
    assert ours[0].dtype is torch.float64 and largest(ours, theirs) < (1e-11 if torch.__version__ >= (2, 6) else 1e-10)

class OneForEach(Callback):
    "An optimizer for the generator and one for the critic, where fastai has one for both"
    def before_fit(self): self.opts = {True: self.opt_func(list(self.model.generator.parameters()), lr=1e-3), False: self.opt_func(list(self.model.critic.parameters()), lr=1e-3)}
    def before_step(self): self.learn.opt = self.opts[self.gan_trainer.gen_mode]

def test_gan_trains_as_if_each_network_had_its_own_optimizer():
    "`.data` clipping, five updates of the critic for each of the generator"
    def trained(opt_func, **kwargs): return weights(fit(gan_learner(opt_func, wd_bn_bias=True, **kwargs), 6, 1e-3).model)
    theirs = trained(stock.ranger, cbs=OneForEach())
    assert largest(trained(ranger), theirs) < 1e-6 and largest(trained(ranger, cbs=OneForEach()), theirs) < 1e-6
    assert largest(trained(stock.ranger), theirs) > 1e-4 # one for both moves the frozen one
