"""Add what `ranger-compare` or `ranger-bench` has written to the tables in this folder: `python nbs/results/add.py FOLDER NAME`

runs.csv, searches.csv   epochs of runs: those of results.csv, and those that looked for learning rates, of tune.csv
settings.csv             what each task of these two was, the command that ran it, and the machine
bench.csv, epoch.csv     benchmarks of a step and of whole batches, with the machine: of bench.json and epoch.json
"""
import json,re,sys
from pathlib import Path

import pandas as pd

here = Path(__file__).parent
key = ['task', 'optimizer', 'sched', 'lr', 'seed', 'epoch']

def read(
    file # A CSV file
)->pd.DataFrame: # Its cells as they are written
    "A table of strings, so that no digit changes"
    return pd.read_csv(file, dtype=str, keep_default_na=False)

def in_order(*tables):
    "The rows of `tables`, sorted by the first column, otherwise in the order in which they came"
    rows = pd.concat(tables).fillna('')
    return rows.sort_values(rows.columns[0], kind='stable')

def add_runs(
    table, # `runs.csv` or `searches.csv`
    file, # A `results.csv` or `tune.csv`
    name # Of the task
)->pd.DataFrame: # The table with those rows of `file` that it lacked
    "Add runs; `ValueError` if the table has one of them with other figures"
    rows = read(file)
    rows.insert(0, 'task', name)
    both = in_order(table, rows).drop_duplicates()
    other = both[both.duplicated(key)]
    if len(other): raise ValueError(f"NAME must not have other figures for a run in FOLDER, got {name}, which has for "
                                    f"{', '.join(other.iloc[0][key[1:]])}")
    return both

def report_says(
    file # A `report.md`, which need not be there
)->dict: # `command` and `machine`
    "What was run, and where"
    if not file.exists(): return {}
    text = file.read_text()
    command = re.search('^    ((ranger-compare |compare[(]).*)$', text, re.M)[1]
    return dict(command=re.sub(' --out .*', '', command),
                machine=re.search(r'\. (.+, \d+ threads, python .+)\.$', text, re.M)[1])

def add_settings(
    table, # `settings.csv`
    file, # A `settings.json`; `report.md` may be beside it
    name # Of the task
)->pd.DataFrame: # The table with a row for `name`
    "Add settings; `ValueError` if `name` has others"
    settings = json.loads(file.read_text())
    settings.pop('plan', None) # what was to be run
    new = {k: '' if v is None else str(v) for k,v in settings.items()}
    others = table[table.task!=name]
    old = {}
    if len(others) < len(table):
        old = table[table.task==name].iloc[0].to_dict()
        compared = {*old, *new} - {'task', 'command', 'machine'}
        changed = sorted(k for k in compared if old.get(k, '') != new.get(k, ''))
        if changed: raise ValueError(f"NAME must be new, or of the settings in FOLDER, got {name}, "
                                     f"which has other {', '.join(changed)}")
    row = {**old, 'task': name, **new, **report_says(file.with_name('report.md'))}
    return in_order(others, pd.DataFrame([row]))

def add_bench(
    table, # `bench.csv` or `epoch.csv`
    file, # A `bench.json` or `epoch.json`
    name # Of the benchmark
)->pd.DataFrame: # The table with the rows of `file`, in place of those that `name` had
    "Add or replace a benchmark: its rows, each with the machine behind it"
    about = json.loads(file.read_text(), parse_float=str)
    rows = pd.DataFrame(about.pop('rows')).assign(**about)
    rows.insert(0, 'bench', name)
    return in_order(table[table.bench!=name], rows.astype(object))

def add(
    folder, # What `ranger-compare` or `ranger-bench` has written
    name, # Of the task or benchmark
    tables=here # Folder of the tables
):
    "Add what is in `folder` as `name`"
    adds = {'settings.json': ('settings', add_settings), 'results.csv': ('runs', add_runs), 'tune.csv': ('searches', add_runs),
            'bench.json': ('bench', add_bench), 'epoch.json': ('epoch', add_bench)}
    new = {}
    for file,(table,f) in adds.items():
        if (Path(folder)/file).exists(): new[table] = f(read(Path(tables)/f'{table}.csv'), Path(folder)/file, name)
    if not new: raise ValueError(f"FOLDER must have one of {', '.join(adds)}, got {folder}")
    for table,rows in new.items(): rows.to_csv(Path(tables)/f'{table}.csv', index=False)

if __name__=='__main__':
    if len(sys.argv)!=3: sys.exit('usage: python nbs/results/add.py FOLDER NAME')
    try: add(*sys.argv[1:])
    except ValueError as e: sys.exit(str(e))
