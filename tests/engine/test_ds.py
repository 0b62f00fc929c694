"""DeepSpeed's door: what it sets in the process."""

import platform

import pytest

from tests.conftest import run_python

FAULTS = """
import resource, torch
from tract_det.engine import ds
ds.start("cpu")
def step():
    return torch.ones(64, 1024, 256).sum()  # 64 MiB
for _ in range(20):  # the heap finds its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_memory_that_a_step_frees_serves_the_next_one_on_a_cpu():
    def faults(**env):
        done = run_python("-c", FAULTS, env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    pages = 10 * 64 * 2**20 // 4096
    assert faults() < pages / 10
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages / 2  # the user's own setting stands


THREADS = """
import pathlib, torch
from torch import nn
from tract_det.engine import ds
def threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
def train():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds.initialize(model, optimizer, ds.ds_config(batch_size=2, accumulation=1))
    return threads()
ds.start("cpu")
print("threads", train())
ds.stop()
print("threads", threads())
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_no_thread_of_a_process_group_outlives_it():
    """One that is still there at the exit may abort the process when all its work is done."""
    done = run_python("-c", THREADS)
    assert done.returncode == 0, done.stderr
    before, after = (int(x.split()[1]) for x in done.stdout.splitlines() if "threads" in x)
    assert before > 0 and after == 0
