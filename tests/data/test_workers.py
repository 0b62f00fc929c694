"""Worker processes leave signals and the training's random numbers alone."""

import multiprocessing
import os
import random
import signal
import subprocess
from itertools import islice

import numpy as np
import pytest
import torch

from tests.conftest import run_python
from tests.data.noisy import Broken, Noisy
from tract_det.data.detection_loaders import detection_evaluation_loader, detection_loader
from tract_det.errors import UserError


class Worker(Noisy):
    """Its targets describe the process that reads them."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image, target | {"pid": os.getpid(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_numbers_of_the_training_alone(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(islice(detection_loader(Noisy(), micro_batch=2, seed=1, num_workers=workers), 2))
    if workers:
        list(detection_evaluation_loader(Noisy(), batch_size=8, num_workers=workers))
    else:
        iter(detection_evaluation_loader(Noisy(), batch_size=8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_worker_remains_one(workers):
    batches = iter(detection_loader(Broken(), micro_batch=2, seed=0, num_workers=workers))
    with pytest.raises(UserError, match=r"JPEGImages/x\.jpg"):
        next(batches)
    if workers:  # the traceback that pytest keeps would keep the worker processes alive
        batches._shutdown_workers()


def test_workers_have_one_thread_and_outlive_the_signals_that_stop_a_training():
    batches = iter(detection_loader(Worker(), micro_batch=1, seed=0, num_workers=1))
    _, (target,) = next(batches)
    assert target["threads"] == 1
    assert target["pid"] != os.getpid()
    for name in ("INT", "TERM"):  # from another process, as a launcher does
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {target['pid']}"], check=True)
    for _ in range(12):  # more than are prefetched
        _, (target_after,) = next(batches)
    assert target_after["pid"] == target["pid"]


def test_workers_end_when_their_own_training_process_says_so():
    """Python terminates them at exit, and would wait forever for one that ignored the signal."""
    batches = iter(detection_loader(Worker(), micro_batch=1, seed=0, num_workers=1))
    _, (target,) = next(batches)
    (process,) = (p for p in multiprocessing.active_children() if p.pid == target["pid"])
    process.terminate()
    process.join(timeout=20)
    assert process.exitcode == 0


ORPHANS = """
import os, signal, time
from tests.data.noisy import Noisy
from tract_det.data.detection_loaders import detection_loader

class Stuck(Noisy):
    def __getitem__(self, index):
        self.read = getattr(self, "read", 0) + 1
        if self.read > 1:
            time.sleep(600)
        return super().__getitem__(index)

batches = iter(detection_loader(Stuck(), micro_batch=1, seed=0, num_workers=3))
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_in_the_middle_of_a_file_when_their_training_process_is_killed():
    """They hold its output open, so that the output ends with the last of them."""
    killed = run_python("-c", ORPHANS, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
