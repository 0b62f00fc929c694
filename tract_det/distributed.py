"""Rank, world size and the few collectives that are needed; right when nothing is initialised."""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank: of the group, else of the launcher's environment, else 0."""
    return dist.get_rank() if is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes: of the group, else of the launcher's environment, else 1."""
    return dist.get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine, from the launcher's environment.

    `torchrun` and `deepspeed` both write it; all processes are taken to be here otherwise.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def is_main() -> bool:
    """Whether this process writes the files and the console."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank is here."""
    if is_initialized() and world_size() > 1:
        dist.barrier()


def gather(item: T) -> list[T]:
    """The items of all ranks, in rank order, on every rank. Every rank must call it."""
    if not is_initialized() or world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set on at least one rank. Every rank must call it."""
    if not is_initialized() or world_size() == 1:
        return flag
    tensor = torch.tensor(int(flag), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def average_buffers(model: nn.Module) -> None:
    """Replaces every floating-point buffer by its mean over the ranks, in place.

    DeepSpeed never synchronises buffers: without this each rank evaluates, and rank 0 saves,
    BatchNorm statistics of its own images alone. Integer buffers (`num_batches_tracked`) are equal
    on all ranks already. Every rank must call it.
    """
    if not is_initialized() or world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
            buffer.div_(world_size())
