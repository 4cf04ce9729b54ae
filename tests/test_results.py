"Finished comparisons and benchmarks are added to the tables of `nbs/results`"
import json, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd
import pytest

from fastai_ranger.compare.comparison import compare

results = Path(__file__).parents[1]/'nbs/results'
sys.path.append(str(results))
from add import add

def lines(file, name, others=False):
    "The lines of a table that are of the task or benchmark `name`, or the `others`"
    return [o for o in file.read_text().splitlines() if o.startswith(f'{name},')!=others]

def texts(tables): return {f.name: f.read_text() for f in tables.glob('*.csv')}

def train(out, seeds=1): compare('digits', opts='adam,sgd', epochs=1, seeds=seeds, lr_grid=2, n_tune=100, out=out)

@pytest.fixture
def tables(tmp_path): return shutil.copytree(results, tmp_path/'tables')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "What a comparison leaves"
    out = tmp_path_factory.mktemp('runs')/'mine'
    train(out)
    return out

def test_a_comparison_that_grows(folder, tables, tmp_path):
    subprocess.run([sys.executable, tables/'add.py', folder, 'mine'], check=True)
    for table,file in dict(runs='results', searches='tune').items():
        rows = (folder/f'{file}.csv').read_text().splitlines()[1:]
        assert rows and lines(tables/f'{table}.csv', 'mine')==[f'mine,{o}' for o in rows]
    settings = pd.read_csv(tables/'settings.csv', index_col='task').loc['mine']
    assert settings.n_tune==100 and re.search(r'^\S.*, \d+ threads, python 3.*torch [\d.]+\w$', settings.machine)
    assert settings.command=='ranger-compare digits --opts adam,sgd --epochs 1 --seeds 1 --lr-grid 2 --n-tune 100'
    first = texts(tables)
    add(folder, 'mine', tables)
    assert texts(tables)==first
    grown = shutil.copytree(folder, tmp_path/'grown')
    train(grown, seeds=2)
    add(grown, 'mine', tables)
    assert len(lines(tables/'runs.csv', 'mine'))==4
    for file in tables.glob('*.csv'): assert lines(file, 'mine', others=True)==(results/file.name).read_text().splitlines()

def test_what_does_not_fit_is_refused(folder, tables, tmp_path):
    add(folder, 'mine', tables)
    before,other = texts(tables),shutil.copytree(folder, tmp_path/'other')
    pd.read_csv(other/'results.csv').assign(seconds=1.).to_csv(other/'results.csv', index=False)
    for args,message in (((folder, 'fashion'), 'got fashion, which has other data, epochs, n_train, n_tune, n_valid'),
                         ((other, 'mine'), 'other figures for a run in FOLDER, got mine, which has for adam, flat_cos,'),
                         ((tmp_path, 'mine'), f'FOLDER must have one of settings.json, .* got {tmp_path}')):
        with pytest.raises(ValueError, match=message): add(*args, tables)
    assert texts(tables)==before

def test_a_benchmark_replaces_the_one_before(tables, tmp_path):
    for cycle in (.1+.2, 7):
        row = dict(list='small', opt='mine', cycle=cycle, x_stock=None)
        (tmp_path/'bench.json').write_text(json.dumps(dict(device='a chip', schedule=False, rows=[row])))
        add(tmp_path, 'growth', tables)
        mine = pd.read_csv(tables/'bench.csv').query('bench=="growth"').squeeze()
        assert mine.cycle==cycle and mine.device=='a chip' and pd.isna(mine.x_stock) and pd.isna(mine.torch)
    assert lines(tables/'bench.csv', 'growth', others=True)==lines(results/'bench.csv', 'growth', others=True)

def test_each_task_has_settings_and_whole_runs():
    settings = pd.read_csv(results/'settings.csv', index_col='task')
    assert settings.index.is_unique
    for table in 'runs','searches':
        df = pd.read_csv(results/f'{table}.csv')
        epochs = df.groupby(['task', 'optimizer', 'sched', 'lr', 'seed']).epoch.agg(list)
        assert all(o==list(range(1, settings.epochs[task]+1)) for (task,*_),o in epochs.items())
