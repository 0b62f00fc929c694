"""Rank, world size and the few collectives needed; all work without a process group as well."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from tract_det.errors import UserError

T = TypeVar("T")


def gpus() -> int:
    """The number of GPUs of this machine."""
    return torch.cuda.device_count()


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process: from the process group, else the launcher's environment, else 0."""
    return dist.get_rank() if is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes: from the process group, else the launcher's environment, else 1."""
    return dist.get_world_size() if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process on its machine: from the launcher's environment, else 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine: from the launcher's environment.

    `torchrun` and `deepspeed` set it, under different names. Where neither did, all processes are
    assumed to be on this machine.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def is_main() -> bool:
    """Whether this process is rank 0, which writes the files and prints to the console."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank has called it."""
    if is_initialized() and world_size() > 1:
        dist.barrier()


def gather(item: T) -> list[T]:
    """Returns the items of all ranks, in rank order. Every rank must call it."""
    if not is_initialized() or world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def on_every_rank(work: Callable[[], T]) -> list[T]:
    """Calls `work` on every rank; returns all results, or fails on every rank if it fails on one.

    Raises:
        UserError: that of the first rank that failed.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as failure:
        error = failure
    outcomes = gather((result, error))
    for _, refusal in outcomes:
        if refusal is not None:
            raise refusal
    return [outcome for outcome, _ in outcomes]  # type: ignore[misc]


def on_main(function: Callable[[], T]) -> T:
    """Calls a function on rank 0; every rank waits for what it returns or raises.

    Every rank must call it.
    """
    if not is_initialized() or world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class AnyRank:
    """Whether a flag is set on at least one rank, agreed on without waiting for the other ranks.

    With several ranks the answer is about the call before: the flags of that call were on their way
    meanwhile, between the processes and not through their devices. Every rank must make one, and
    call it equally often.
    """

    def __init__(self) -> None:
        self._is_alone = not is_initialized() or world_size() == 1
        self._group: Any = None  # the default one
        self._call: tuple[torch.Tensor, Any] | None = None
        if not self._is_alone and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def __call__(self, flag: bool) -> bool:
        """Returns whether the flag of the call before was set on any rank; alone, of this one."""
        if self._is_alone:
            return flag
        if self._call is not None:
            last_flag, work = self._call
            work.wait()
            if last_flag.numpy().any():
                return True
        tensor = torch.tensor([flag], dtype=torch.uint8)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._call = tensor, work
        return False


def average_buffers(model: nn.Module) -> None:
    """Replaces every floating-point buffer with its mean over the ranks, in place.

    DeepSpeed never synchronises buffers. Without this, each rank would evaluate, and rank 0 would
    save, BatchNorm statistics from its own images only. Integer buffers (`num_batches_tracked`) are
    equal on all ranks anyway. Every rank must call it.
    """
    if not is_initialized() or world_size() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer, op=dist.ReduceOp.SUM)
            buffer.div_(world_size())
