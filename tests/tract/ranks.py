"""Run by test_ranks.py in one or several processes: trains five steps in every way.

The weights go to the file that the command line names.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tract_det import apply_tract, distributed, set_micro_batches
from tract_det.engine import ds

STEPS, BATCH = 5, 16


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    return apply_tract(model)


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        coarse = torch.randn(BATCH, 3, 6, 6, generator=generator)
        images = nn.functional.interpolate(coarse, size=(17, 18), mode="bilinear")
        yield images, torch.randint(5, (BATCH,), generator=generator)


def micro_batches(batch, parts):
    """This rank's micro-batches."""
    chunks = [tensor.chunk(parts * distributed.world_size()) for tensor in batch]
    return list(zip(*chunks, strict=True))[distributed.rank() :: distributed.world_size()]


def plain_loop(model, parts=1):
    """A plain training loop with the two lines that gradient accumulation needs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    set_micro_batches(model, parts)
    for batch in batches():
        optimizer.zero_grad()
        for images, labels in micro_batches(batch, parts):
            (nn.functional.cross_entropy(model(images), labels) / parts).backward()
        optimizer.step()


def deepspeed_loop(model, parts, stage):
    set_micro_batches(model, parts)
    config = ds.ds_config(
        batch_size=BATCH, accumulation=parts, extra={"zero_optimization": {"stage": stage}}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = ds.initialize(model, optimizer, config)
    for batch in batches():
        for images, labels in micro_batches(batch, parts):
            engine.backward(nn.functional.cross_entropy(engine(images), labels))
            engine.step()
    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return [parameter.detach().clone() for parameter in model.parameters()]
    return list(model.parameters())


def main(path):
    ds.start("cpu")
    weights = {}
    model = build()
    plain_loop(DistributedDataParallel(model) if dist.get_world_size() > 1 else model)
    weights["ddp"] = list(model.parameters())
    local = build()
    local[0].tract.sync = False
    plain_loop(DistributedDataParallel(local) if dist.get_world_size() > 1 else local)
    weights["ddp without sync"] = list(local.parameters())
    if dist.get_world_size() == 1:
        model = build()
        plain_loop(model, 4)
        weights["accumulation 4"] = list(model.parameters())
    for parts in (1, 2, 4):
        for stage in (0, 1, 2, 3):
            if parts == 1 or stage < 3:
                name = f"zero {stage} accumulation {parts}"
                weights[name] = deepspeed_loop(copy.deepcopy(build()), parts, stage)
    if distributed.is_main():
        torch.save({k: [p.detach().clone() for p in v] for k, v in weights.items()}, path)
    ds.stop()


if __name__ == "__main__":
    main(sys.argv[-1])
