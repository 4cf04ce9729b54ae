"The commands, word for word as a person sees them, in a terminal and in a file"
import os, platform, pty, re, runpy, subprocess, sys
from pathlib import Path

import pytest
from helpers import fork

bin = Path(sys.executable).parent
env = {**os.environ, 'COLUMNS': '120', 'OMP_NUM_THREADS': '1'}

def run(*args, cwd, terminal=False, strict=False, env=env):
    "What a command writes, exit status first; `strict`: a warning is an error"
    args = [*([sys.executable, '-W', 'error'] if strict else []), bin/args[0], *args[1:]]
    if not terminal:
        res = subprocess.run(args, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return res.returncode,res.stdout
    ours,theirs = pty.openpty()
    p = subprocess.Popen(args, cwd=cwd, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    out = b''
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break # the other end is closed
        if not part: break
        out += part
    return p.wait(),out.decode().replace('\r\n', '\n')

def script(*args):
    sys.argv = list(args)
    runpy.run_path(str(bin/args[0]), run_name='__main__')

def plain(text):
    "`text` with `#` for each number, and without the width of columns"
    text = re.sub(r'\r [^\n]*?\|[^\r\n]*', '\r', text) # the bar is drawn over itself
    text = re.sub(r'-?\d*\.?\d+(e[+-]\d+)?(:\d\d)*', '#', text)
    return '\n'.join(re.sub(r'\s+', ' ', o).strip() for o in text.replace('\r', '\n').splitlines() if o.strip(' \r█'))

compared = ['ranger-compare', 'digits', '--opts', 'adam,adam:wd=.01', '--epochs', '1', '--seeds', '2', '--n-train', '128', '--out', 'out']
table = """adam #%, adam:wd=# #%: the same in each of # seeds.
lr n accuracy (%) sd diff ci# p valid_loss loss_sd s/epoch opt (%)
optimizer
adam # # # # - - - # # # #
adam:wd=# # # # # # - - # # # #
After # epoch, over n seeds: mean and standard deviation (sd). diff is the mean difference to adam, seed by seed, in
points of accuracy, ci# half its #% interval, p from a paired t-test. opt is the optimizer's share of the training
time, s/epoch.
Wrote out/results.csv, out/curves.png, out/report.md"""

def test_bfloat16_on_a_cpu_that_has_none(tmp_path):
    "is said in a line, with how much slower it is, and the command goes on: here oneDNN may use no more than AVX2"
    args = ['ranger-compare', 'digits', '--opts', 'adam', '--epochs', '1', '--seeds', '1', '--n-train', '128', '--precision', 'bf16']
    status,out = run(*args, '--out', 'slow', cwd=tmp_path, strict=True, env={**env, 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'ATEN_CPU_CAPABILITY': 'avx2'})
    line = re.search(r'^16 images in bfloat16 take (\S+) times as long as in float32 on this CPU(.*)$', out, re.MULTILINE)
    assert status == 0 and (tmp_path/'slow/results.csv').exists() and line
    if platform.machine() == 'x86_64': assert float(line[1]) > 1.5 and line[2] == ': --precision fp32 is faster'
    status,out = run(*args[:-2], '--out', 'full', cwd=tmp_path)
    assert status == 0 and 'bfloat16' not in out

def test_compare_into_a_file(tmp_path):
    status,out = run(*compared, cwd=tmp_path, strict=True)
    assert status == 0 and plain(out) == f"""digits: # images to train on, # to validate on (the last fifth), # classes
adam, flat_cos, lr #, seed #: results # of #
adam:wd=#, flat_cos, lr #, seed #: results # of #, about # left
adam, flat_cos, lr #, seed #: results # of #, about # left
adam:wd=#, flat_cos, lr #, seed #: results # of #, about # left
{table}""".replace('wd=.01', 'wd=#')

def test_compare_in_a_terminal(tmp_path):
    status,out = run(*compared, cwd=tmp_path, terminal=True)
    assert status == 0 and '100.00%' in out and 'adam, flat_cos, lr 0.003, seed 0' in out
    assert plain(out) == f"""digits: # images to train on, # to validate on (the last fifth), # classes
optimizer sched lr seed epoch train_loss valid_loss accuracy time
adam flat_cos # # # # # #% #
adam:wd=# flat_cos # # # # # #% #
adam flat_cos # # # # # #% #
adam:wd=# flat_cos # # # # # #% #
{table}"""

def test_bench(tmp_path):
    status,out = run('ranger-bench', '--lists', 'small', '--opts', 'ranger,sgd_foreach', '--rounds', '1', '--out', 'out', cwd=tmp_path, strict=True)
    first,*rest = plain(out).split('\n')
    assert status == 0 and re.search(r', # threads, torch #+, float#$', first)
    assert '\n'.join(rest) == """# tensors of #
step cycle q# q# ns gb_s of_limit state extra
opt
ranger # # # # # # # # #
sgd_foreach # # # # # # # # #
step, cycle: milliseconds of a step, the median of all, and of the means of six, which hold one synchronisation; q#
and q# are quartiles of cycle. ns: nanoseconds a weight. gb_s: gigabytes moved a second, of what a step has to
move; of_limit: that as a share of what the memory can. x_stock: times as fast as fastai's `ranger`, which is stock.
x_adamw: times as long as PyTorch's fused AdamW takes. state, extra: bytes a weight that are kept, and that a step
needs besides."""

@pytest.mark.parametrize('name,words', [
    ('ranger-compare', ['a folder with `train/`', 'optimizers: ranger, stock', 'models: cnn', 'ranger-compare path/to/images']),
    ('ranger-bench', ['lists: xresnet18', 'optimizers: ranger, stock', 'columns:', 'of_limit', 'ranger-bench --epoch'])])
def test_help_and_version(name, words, tmp_path):
    status,out = run(name, '--help', cwd=tmp_path, strict=True)
    assert status == 0 and not [o for o in words if o not in ' '.join(out.split())] and 'Warning' not in out
    p = fork(script, name, '--version', log=tmp_path/'log')
    p.join()
    assert p.exitcode == 0 and re.fullmatch(rf'{name} \d+\.\d+\.\d+\n', (tmp_path/'log').read_text())
