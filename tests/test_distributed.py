"Sharded parameters (`fully_shard`), DiLoCo, Accelerate and `distrib_ctx`: real processes on gloo"
import os, pytest, runpy, subprocess, sys, torch, torch.multiprocessing as mp, warnings
from pathlib import Path
from time import perf_counter
from torch.distributed.elastic.utils.distributed import get_free_port
from helpers import forked

def rank(i, n, port, args):
    "What `torchrun` does in process `i` of `n`"
    os.environ.update(RANK=f'{i}', LOCAL_RANK=f'{i}', WORLD_SIZE=f'{n}', LOCAL_WORLD_SIZE=f'{n}', MASTER_ADDR='127.0.0.1', MASTER_PORT=f'{port}')
    sys.argv = args
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    runpy.run_path(args[0], run_name='__main__')

def ranks(n, folder, *cases, script='sharded.py'):
    "Run `script` in `n` processes that share `folder`, each case in turn; what the first to fail says"
    args = [str(Path(__file__).parent/script), str(folder), *cases]
    context,end = mp.start_processes(rank, (n, get_free_port(), args), n, join=False, start_method=forked.get_start_method()),perf_counter()+240
    try:
        while not context.join(1):
            if perf_counter() > end: context.processes[0].kill() # they wait for each other
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as e: return str(e)

fully_shard = pytest.mark.skipif(torch.__version__ < (2, 6), reason='no `torch.distributed.fsdp.fully_shard`')

@fully_shard
def test_two_and_four(tmp_path):
    "Equal to one process; refused in a sentence; a checkpoint of two processes goes on in four"
    assert not (err := ranks(2, tmp_path, 'equal', 'slow', 'refused', 'save')), err
    assert not (err := ranks(4, tmp_path, 'equal', 'load')), err

@fully_shard
def test_a_spoilt_rank_is_seen(tmp_path):
    "One number in the state of the last process, and the comparison fails"
    assert 'differs from one process' in ranks(2, tmp_path, 'spoilt')

def test_diloco(tmp_path):
    "Equal to DDP with SGD in each update, and to the paper with AdamW; what the ranks do not share is refused; a `Learner`"
    assert not (err := ranks(2, tmp_path, 'ddp', 'paper', 'unlike', 'undefined', 'learner', script='diloco_ranks.py')), err

def test_diloco_with_a_spoilt_rank_is_seen(tmp_path): assert 'differ' in ranks(2, tmp_path, 'spoilt', script='diloco_ranks.py')

def test_diloco_goes_on_after_a_rank_has_died(tmp_path):
    "The others end with an error, and their checkpoints go on to the bit"
    start = perf_counter()
    assert 'SIGKILL' in ranks(2, tmp_path, 'dies', script='diloco_ranks.py')
    assert perf_counter()-start < 120, 'the other rank waited'
    assert not (err := ranks(2, tmp_path, 'resumes', script='diloco_ranks.py')), err

def test_accelerate_and_distrib_ctx(tmp_path):
    "Equal to one process; a checkpoint goes on to the bit; a spoilt rank is seen"
    assert not (err := ranks(2, tmp_path, 'accumulate', 'checkpoint', 'mixed', 'spoilt', 'learner', script='accelerated.py')), err

def test_without_accelerate():
    "fastai.distributed cannot be imported then, and nobody needs it"
    code = "import sys; sys.modules['accelerate'] = None; from fastai_ranger.all import *; from fastai_ranger.learner import *"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
