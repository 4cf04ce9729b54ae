"Compare optimizers on data of your own: `from fastai_ranger.compare import compare`"
from importlib import import_module

__all__ = ['compare', 'Comparison', 'remake_report', 'register', 'optimizers', 'summarize']

def __getattr__(name): # imported when it is asked for: a module beside it, such as `data`, needs less
    if name in __all__: return getattr(import_module('.comparison', __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
