"Make the site: notebooks through nbdev's processors to Sphinx, nothing executed, every link checked"
import inspect,re,shutil,sys
from collections import Counter
from dataclasses import is_dataclass
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote,urlsplit

import yaml
from fastcore.docments import DocmentTbl,docments
from fastcore.nbio import mk_cell,read_nb,write_nb
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults,_default_exp,add_links,clean_show_doc,exec_show_docs,insert_warning,rm_export
from sphinx.cmd.build import build_main

from fastai_ranger.core.optimizer import ranges_of
from fastai_ranger.core.stepper import Stepper,stepper,switch
from fastai_ranger.interop import TorchOptimizer,to_torch

docs = Path(__file__).parent
root,nbs,pkg = docs.parent,docs.parent/'nbs','fastai_ranger'
procs = [o for o in FilterDefaults().base_procs() if o not in (insert_warning, exec_show_docs, rm_export, add_links, clean_show_doc)]
tags = {('code-fold', 'true'): 'hide-input', ('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output', ('include', 'false'): 'remove-cell'}

# The API

def find(name, mod):
    "The object `name` of `mod`, a method of a class without its binding"
    o = mod
    for a in name.split('.'): o = inspect.getattr_static(o, a) if isinstance(o, type) else getattr(o, a)
    return o.__func__ if isinstance(o, (staticmethod, classmethod)) else o

def members(name, mod):
    "`name`, and the documented methods of the class if it is one"
    o = find(name, mod)
    own = vars(o).items() if isinstance(o, type) else ()
    return [name] + [f'{name}.{k}' for k,v in own if k[0]!='_' and (inspect.isfunction(v) or isinstance(v, property))
                     and v.__doc__ and getattr(v, 'fget', v).__module__==mod.__name__]

def shown(v):
    "A default as one would write it, if that is short"
    res = getattr(v, '__qualname__', None) or repr(v)
    return res if len(res)<40 else '...'

def signature(o):
    "The parameters of `o`, each with its default as one would write it"
    if isinstance(o, type) and not {'__init__', '__new__'} & vars(o).keys(): return '' # as its base
    params = inspect.signature(o).parameters.values()
    res,star = [],False
    for p in params:
        if p.name=='self': continue
        if p.kind==p.KEYWORD_ONLY and not star: res.append('*')
        star |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        default = '' if p.default is p.empty else f'={shown(p.default)}'
        res.append({p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name + default)
    return f"({', '.join(res)})"

empty = inspect.Parameter.empty

@cache
def shared():
    "What each name means that steppers share, and its range: from the table in `core/stepper`"
    text = next(c.source for c in read_nb(nbs/'core/stepper.ipynb').cells if c.source.startswith('## The names that steppers share'))
    return {k: (what[0].upper()+what[1:], at) for k,what,at in re.findall(r'^\| `(\w+)` \| (.*?) \| (.*?) ?\|$', text, re.M)}

def start(v):
    "How a state starts, in words"
    return 'when a stepper returns it' if v is None else f'as `{getattr(v, "__name__", v)}`'

def in_range(h):
    "The range of the hyper or option `h`, as a table shows it"
    return str(h).removeprefix('a number in ').removeprefix('a ').removeprefix('one of ')

def declared(o):
    "The table of the stepper `o`: its arguments, and what it declares"
    params,own = inspect.signature(o).parameters,docments(o, args_kwargs=True)
    names = dict.fromkeys([*params, *(k for k in [*o.hypers, *o.state] if k in shared())])
    if not own.get('kwargs'): names.pop('kwargs', None)
    res = ['| | **Kind** | **Default** | **Range or start** | **Details** |', '| --- | --- | --- | --- | --- |']
    for k in names:
        what,at = shared().get(k, ('', ''))
        default = params[k].default if k in params else empty
        kind = '' if default is empty else 'option'
        if k in o.flags: kind = 'flag'
        if h := o.hypers.get(k) or k not in o.flags and o.options.get(k): at = in_range(h)
        if h := o.hypers.get(k): kind,default = 'hyper',default if h.default is None else h.default
        if k in o.state: kind,at,default = 'anchored '*(k in o.anchored)+'state',f'starts {start(o.state[k])}',empty
        res.append(f'| {k} | {kind} | {"" if default is empty else f"`{shown(default)}`"} | {at} | {own.get(k) or what} |')
    said = ', '.join(f'`{k}={getattr(o, k)!r}`' for k in ('scope', 'dense', 'shards'))
    return '\n'.join([*res, '', f'Declared with {said}.' + (f' Returns {own["return"]}.' if own['return'] else '')])

def said_of(o):
    "What is said of each parameter of `o`; a class of `as_torch` has the words of its `opt_func`"
    if not (isinstance(o, type) and issubclass(o, TorchOptimizer) and o.opt_func): return docments(o, args_kwargs=True)
    own = to_torch(docments(inspect.unwrap(o.opt_func), args_kwargs=True))
    return {k: '; '.join(what) if isinstance(what, tuple) else what for k,what in own.items()}

def table(o):
    "The table of parameters of `o`"
    if isinstance(o, Stepper): return declared(o)
    params = inspect.signature(o).parameters if callable(o) and not isinstance(o, type) else ()
    made = o if {'params', 'lr'} <= {*params} and hasattr(o, '__wrapped__') else None # it is `named`
    o = inspect.unwrap(o)
    to = getattr(o, '__delwrap__', None)
    if to and to.__name__=='__init__': # of a dataclass, the class has the comments
        cls = find(to.__qualname__[:-len('.__init__')], inspect.getmodule(o))
        if is_dataclass(cls): o.__delwrap__ = cls
    tbl = DocmentTbl(o)
    own = said_of(o)
    if o is Stepper: known = docments(stepper)
    else: known = {k: what for k,(what,_) in shared().items()} if {'grad', 'sqr_avg'} & tbl.dm.keys() else {}
    for k,d in tbl.dm.items():
        d.docment = own.get(k) or known.get(k) or empty
        if d.default is not empty: d.default = shown(d.default)
        if d.anno is type(None): d.anno = empty
    tbl.params = tbl.params.filter(lambda k: k not in ('args', 'kwargs') or tbl.dm[k].docment is not empty)
    if made: add_ranges(tbl, ranges_of(made))
    return str(tbl)

def add_ranges(tbl, ranges):
    "Write the ranges that steppers declare beside the parameters of what makes an optimizer of them"
    for k,d in tbl.dm.items():
        if k in ranges and ranges[k] is not switch: d.docment = f'{d.docment}: {in_range(ranges[k])}'

def api(name, mod, link):
    "The object `name` of `mod` for Sphinx: signature, docstring, table of parameters"
    o = find(name, mod)
    kind = 'class' if isinstance(o, type) else 'property' if isinstance(o, property) else 'method' if '.' in name else 'function'
    sig,tbl = ('','') if kind=='property' else (signature(o),table(o))
    about = inspect.getdoc(inspect.unwrap(o)) # without the parameters that `named` adds: they are in the table
    text = '\n\n'.join(link(t) for t in (about, tbl) if t)
    return f":::::{{py:{kind}}} {name}{sig}\n:module: {mod.__name__}\n\n{text}\n:::::"

class Lookup(NbdevLookup):
    "Link names in backticks: ours to their entry in the reference, fastai's and fastcore's to their sites"
    def __init__(self, own): super().__init__(strip_libs=('fastai', 'fastcore')); self.own = own
    def link_line(self, l): return l if l.startswith('#') else super().link_line(l)
    def _link_sym(self, m):
        full = self.own.get(m[1])
        return f'{{py:obj}}`{m[0].strip("`")} <{full}>`' if full else super()._link_sym(m)

# The pages

class Page:
    def __init__(self, name):
        self.name,self.path = name,nbs/f'{name}.ipynb'
        nb = read_nb(self.path)
        exp = _default_exp(nb)
        self.mod = import_module(f'{pkg}.{exp}') if exp else None
        for i,c in enumerate(nb.cells): c.idx_ = i
        NBProcessor(nb=nb, procs=procs, rm_directives='quarto').process()
        self.nb,self.title,self.about = nb,nb.frontmatter_['title'],nb.frontmatter_.get('description', '')
        shown = [c.source[9:-1] for c in nb.cells if c.cell_type=='code' and c.source.startswith('show_doc(')]
        self.names = {o: members(o, self.mod) for o in shown}
        self.own = {o: f'{self.mod.__name__}.{o}' for os in self.names.values() for o in os}

    def stage(self, dest, look):
        "Write the notebook as Sphinx shall read it"
        nb,res = self.nb,[]
        for c in nb.cells:
            d,said = getattr(c, 'directives_', None) or {},dict(re.findall(r'^#\|\s*([\w-]+):\s*(\w+)', c.source, re.M))
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            if c.cell_type=='raw' or c.cell_type=='code' and ({'exporti', 'hide', 'default_exp'} & d.keys() or not c.source): continue
            if c.cell_type=='markdown': c.source = look.linkify(c.source).replace('](nbs/', '](')
            elif c.source.startswith('show_doc('):
                # the entries come before the source that defines them
                entries = [mk_cell(api(o, self.mod, look.linkify), 'markdown') for o in self.names[c.source[9:-1]]]
                at = max(i for i,o in enumerate(res) if o.cell_type=='code')
                res[at:at] = entries
                continue
            elif 'export' in d:
                if not re.search(r'^(def|class) ', c.source, re.M): continue
                c.metadata = dict(tags=['hide-input'])
            else: c.metadata = dict(tags=[t for (k,v),t in tags.items() if said.get(k)==v])
            res.append(c)
        about = f'\n{{.lead}}\n{look.linkify(self.about)}\n' if self.about else ''
        nb.cells = [mk_cell(f'# {self.title}\n{about}', 'markdown'), *res]
        (dest/self.name).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, dest/f'{self.name}.ipynb')

    def plain(self):
        "The page as Markdown: text, code and printed output"
        res = []
        for c in self.nb.cells:
            if c.cell_type=='markdown':
                s = re.sub(r'\{py:obj\}`(\S+) <[^>]+>`', r'`\1`', c.source.replace('{.lead}\n', ''))
                res.append(re.sub(r'^:::::\{py:\w+\} (.*)\n:module: .*\n\n(.*?)\s*:::::$', r'### `\1`\n\n\2', s, flags=re.S|re.M))
                continue
            res.append(f'```python\n{c.source}\n```')
            for o in c.outputs:
                data = o.get('data', {})
                text = ''.join(o.get('text') or data.get('text/plain', ''))
                if text and 'image/png' not in data: res.append(f'```text\n{text}\n```')
        return '\n\n'.join(res)+'\n'

def toctree(names): return '\n'.join(['```{toctree}', ':hidden:', '', *names, '```'])
def bare(s): return re.sub(r'\W+', '-', s.lower())

def stage(dest):
    "Write all that Sphinx reads into the folder `dest`; the pages, by kind"
    kinds = yaml.safe_load((docs/'pages.yaml').read_text())
    names = [o for k in kinds.values() for os in k['pages'].values() for o in os]
    there = {str(f.relative_to(nbs).with_suffix('')) for f in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts} - {'index'}
    wrong = there.symmetric_difference(o for o in names if not o.endswith('.md')) | {o for o,n in Counter(names).items() if n>1}
    if wrong: sys.exit(f'docs/pages.yaml and nbs/ disagree about {", ".join(sorted(wrong))}: each notebook stands in the list once')
    pages = {o: Page(o) for o in ['index', *names] if not o.endswith('.md')}
    public = vars(import_module(f'{pkg}.all'))
    every = {k: v for p in pages.values() for k,v in p.own.items() if '.' in k or k in public}
    look = {o: Lookup({**every, **p.own}) for o,p in pages.items()}
    for o,p in pages.items(): p.stage(dest, look[o])
    for f in nbs.rglob('*.png'):
        (dest/f.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, dest/f.relative_to(nbs))
    for o in names:
        if o.endswith('.md'): shutil.copy(root/o, dest)
    link,lines = look['index'].linkify,[f'# {pages["index"].title}', f'> {pages["index"].about}', '- [Start here](index.md)']
    def line(o, ext):
        if o.endswith('.md'): return f'- [{(root/o).read_text().split(chr(10))[0].strip("# ")}]({o})'
        about = pages[o].about
        return f'- [{pages[o].title}]({o}{ext})' + (f': {link(about) if ext==".ipynb" else about}' if about else '')
    for kind,k in kinds.items():
        head = lambda o: [] if len(k['pages'])==1 else [f'## {o}']
        text = [f'# {kind}', k['about']]
        for group,os in k['pages'].items(): text += [*head(group), '\n'.join(line(o, '.ipynb') for o in os)]
        (dest/f'{bare(kind)}.md').write_text('\n\n'.join([*text, toctree(o for os in k['pages'].values() for o in os)])+'\n')
        lines += [f'## {kind}', '\n'.join(line(o, '.md') for os in k['pages'].values() for o in os)]
    index = read_nb(dest/'index.ipynb')
    index.cells.append(mk_cell(toctree(map(bare, kinds)), 'markdown'))
    write_nb(index, dest/'index.ipynb')
    return pages, '\n\n'.join(lines)+'\n'

# What came of it

class Refs(HTMLParser):
    "Anchors and references of an HTML file"
    def __init__(self, f):
        super().__init__()
        self.ids,self.refs = set(),[]
        self.feed(f.read_text())
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        self.ids |= {d[k] for k in ('id', 'name') if d.get(k)}
        self.refs += [(tag, d[k]) for k in ('href', 'src') if d.get(k)]

def broken(site):
    "References of the site that lead nowhere, or would fetch a file from the net"
    pages,res = {f: Refs(f) for f in site.rglob('*.html')},[]
    for f,p in pages.items():
        for tag,ref in p.refs:
            u = urlsplit(ref)
            to = (f.parent/unquote(u.path)).resolve() if u.path else f
            if u.scheme or u.netloc: why = tag!='a' and u.scheme!='data' and 'from the net'
            elif not to.exists(): why = 'no such file'
            else: why = u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids and 'no such anchor'
            if why: res.append(f'{f.relative_to(site)}: {ref}: {why}')
    return res

def make_site(site, staged):
    "The site in the folder `site`, from what is staged in the folder `staged`"
    site,staged = Path(site).resolve(),Path(staged).resolve()
    for o in (site, staged): shutil.rmtree(o, ignore_errors=True)
    pages,llms = stage(staged/'pages')
    if rc := build_main(['-W', '-n', '-q', '--keep-going', '-c', str(docs), str(staged/'pages'), str(staged/'site')]): sys.exit(rc)
    shutil.move(staged/'site', site) # myst-nb writes beside the folder that it builds
    for o,p in pages.items(): (site/f'{o}.md').write_text(p.plain())
    for f in root.glob('*.md'):
        if (staged/'pages'/f.name).exists(): shutil.copy(f, site)
    (site/'llms.txt').write_text(llms)
    if bad := broken(site): sys.exit('\n'.join(bad))

if __name__=='__main__': make_site(*sys.argv[1:])
