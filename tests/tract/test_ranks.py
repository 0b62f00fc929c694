"""Many ranks, ZeRO and accumulation give the steps of one process with the whole batch."""

import socket
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python

SCRIPT = Path(__file__).with_name("ranks.py")
WAYS = ["ddp"] + [
    f"zero {stage} accumulation {parts}"
    for parts in (1, 2, 4)
    for stage in (0, 1, 2, 3)
    if parts == 1 or stage < 3
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights after five steps, by number of processes and way of training."""
    by_ranks = {}
    for ranks in (1, 2, 4):
        path = tmp_path_factory.mktemp("ranks") / f"{ranks}.pth"
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port]
        if ranks == 2:
            launch = ["-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port", port]
        done = run_python(*launch, SCRIPT, path)
        assert done.returncode == 0, done.stderr[-3000:]
        by_ranks[ranks] = torch.load(path, weights_only=True)
    return by_ranks


def distance(weights, expected):
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-3))
        for a, b in zip(weights, expected, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_many_ranks_take_the_steps_of_one(weights, ranks, way):
    assert distance(weights[ranks][way], weights[1]["ddp"]) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulation 4", *WAYS[1:]])
def test_micro_batches_take_the_steps_of_the_whole_batch(weights, way):
    assert distance(weights[1][way], weights[1]["ddp"]) <= 1e-6


@pytest.mark.slow
def test_without_sync_each_rank_learns_from_its_own_batch(weights):
    assert distance(weights[2]["ddp without sync"], weights[1]["ddp"]) > 1e-4
