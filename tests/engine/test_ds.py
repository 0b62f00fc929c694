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
