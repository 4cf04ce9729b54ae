"What is made from the notebooks agrees with them"
import ast, configparser, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10

root,bin = Path(__file__).parents[1],Path(sys.executable).parent

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the files git knows of, in which everything was made anew"
    dest = tmp_path_factory.mktemp('repo')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=root, check=True, capture_output=True, text=True).stdout.split('\n')[:-1]
    files = [f for f in files if (root/f).exists()]
    for f in files:
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, dest/f)
    (dest/'.venv').mkdir()
    (dest/'.venv/installed').touch()
    env = {**os.environ, 'PYTHONPATH': str(dest)}
    for cmd in ([bin/'nbdev-export'], [bin/'nbdev-clean'], ['make', '-s', '-o', '.venv/installed', 'readme', f'bin={bin}']): subprocess.run(cmd, cwd=dest, check=True, env=env)
    return dest, files

def test_made_from_the_notebooks(copy):
    "After a change: `nbdev-export`, `nbdev-clean`, `make readme`"
    dest,files = copy
    made = {str(p.relative_to(dest)) for p in dest.rglob('*') if p.is_file()} - {'.venv/installed'}
    assert made == set(files)
    assert not [f for f in files if (dest/f).read_bytes() != (root/f).read_bytes()]

def test_what_the_readme_shows_is_here():
    targets = re.findall(r'\]\(([^)]+)\)', (root/'README.md').read_text())
    assert targets and not [o for o in targets if not o.startswith('http') and not (root/o).exists()]

def test_no_field_in_both_files():
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    cfg = configparser.ConfigParser()
    cfg.read(root/'setup.cfg')
    there = set(cfg['metadata']) | {dict(install_requires='dependencies').get(o, o) for o in cfg['options']}
    assert not (set(project)-{'dynamic'}) & there

def imported(f):
    "All that the module in file `f` imports: `.compare.data.cnn` for `from .compare.data import cnn`"
    for o in ast.walk(ast.parse(f.read_text())):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        if isinstance(o, ast.ImportFrom): yield from ('.'*o.level + '.'.join(filter(None, (o.module, a.name))) for a in o.names)

def test_the_library_never_imports_the_commands():
    "nor what only these need; `plot` alone draws"
    package = root/'fastai_ranger'
    library = [f for f in package.rglob('*.py') if f.parent.name != 'compare']
    foreign = r'(fastai_ranger)?\.+compare\b|(scipy|sklearn|matplotlib|pandas)\b'
    mine = {f.name: [o for o in imported(f) if re.match(foreign, o)] for f in library}
    assert mine.pop('plot.py')==['matplotlib.pyplot']
    assert len(mine) > 9 and not any(mine.values()), mine

def test_no_test_imports_another():
    assert not [f.name for f in (root/'tests').glob('*.py') if any(o.startswith('test_') for o in imported(f))]
