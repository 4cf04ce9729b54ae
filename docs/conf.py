"What Sphinx asks for; `make_site.py` stages the pages and calls it"
import ast
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from fastcore.foundation import L
from nbdev.doclinks import patch_name

project,author,copyright = 'fastai_ranger','The fastai_ranger authors','The fastai_ranger authors'
language,html_title,html_theme = 'en','fastai_ranger','furo'
extensions = ['myst_nb', 'sphinx.ext.viewcode', 'sphinx_copybutton']
nb_execution_mode,nb_merge_streams = 'off',True
nb_code_prompt_show = nb_code_prompt_hide = 'Source'
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_block']
myst_heading_anchors = 3
add_module_names = html_copy_source = html_show_sourcelink = html_show_sphinx = False
python_maximum_signature_line_length = 70
toc_object_entries_show_parents = 'hide'
html_static_path,html_css_files = ['static'],['style.css']
html_math_renderer = 'mathml'

def mathml(block):
    "A formula as MathML, which a browser shows without a script"
    def visit(self, node):
        self.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode
    return visit, None

def find_source(app, name):
    "The source of the module `name`, and the lines of each definition; a method made by `patch` is found under its class"
    code = Path(import_module(name).__file__).read_text()
    tags = {}
    def add(o, pre=''):
        if isinstance(o, ast.ClassDef):
            for m in o.body: add(m, f'{o.name}.')
        elif not isinstance(o, ast.FunctionDef): return
        first = min([o.lineno, *(d.lineno for d in o.decorator_list)])
        for nm in L(patch_name(o)): tags[pre+nm] = ('class' if isinstance(o, ast.ClassDef) else 'def', first, o.end_lineno)
    for o in ast.parse(code).body: add(o)
    return code, tags

def setup(app):
    app.add_html_math_renderer('mathml', mathml(False), mathml(True))
    app.connect('viewcode-find-source', find_source)
