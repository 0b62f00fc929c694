"""Run by the tests in two processes: `ranks.py TRAINER OUT` trains two steps of two micro-batches.

The stem's weights after each step go to `OUT/<rank>.pth`.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DistributedSampler, TensorDataset

from tests.integrations.common import BATCH, samples
from tract_det import distributed


def lightning(folder):
    from tests.integrations.test_lightning import fit

    data = TensorDataset(*samples(6 * BATCH))
    # Lightning's own sampler would shuffle.
    sampler = DistributedSampler(data, 2, distributed.local_rank(), shuffle=False)
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    _, _, weights = fit(folder, data, sampler=sampler, use_distributed_sampler=False, **options)
    return weights.after


def accelerate(folder):
    from tests.integrations.test_accelerate import train

    return train(2, 6 * BATCH)[1]


def transformers(folder):
    from tests.integrations.test_transformers import train

    return train(folder, 6 * BATCH, gradient_accumulation_steps=2)[1].after


def mmengine(folder):
    from tests.integrations.test_mmengine import train

    # By itself MMEngine would give every process a GPU.
    torch.distributed.init_process_group("gloo")
    wrapper = {"type": "MMDistributedDataParallel", "device_ids": None}
    options = {"launcher": "pytorch", "cfg": {"model_wrapper_cfg": wrapper}}
    return train(folder, 6 * BATCH, accumulates=2, **options)[1].after


TRAINERS = {
    "lightning": lightning,
    "accelerate": accelerate,
    "transformers": transformers,
    "mmengine": mmengine,
}

if __name__ == "__main__":
    out = Path(sys.argv[2])
    weights = TRAINERS[sys.argv[1]](out)
    torch.save(weights, out / f"{distributed.rank()}.pth")
