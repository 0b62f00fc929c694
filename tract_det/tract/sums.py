"""The sums `X^T X` and `N` of a layer's input, over all ranks. Symbols: see `gram`."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tract_det.tract.gram import estimated_gram_sum, patch_count, patch_gram_sum, row_gram_sum


def is_pooled(sync: bool) -> bool:
    """Whether `G` is that of several ranks."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Sums(NamedTuple):
    """What `G` is made of.

    Attributes:
        total: `X^T X`, `(groups, K, K)`, float64.
        number: `N`, one float64 number.
    """

    total: Tensor
    number: Tensor


def over_ranks(total: Tensor, count: int, *, sync: bool) -> Sums:
    """The sums of this rank, added up over all where `sync` is set.

    They are needed in the backward pass alone, and travel while the forward pass goes on.
    """
    number = total.new_full((), count)
    if not is_pooled(sync):
        return Sums(total, number)
    # The form that torch.compile takes; it waits where a sum is first used.
    from torch.distributed import _functional_collectives as collectives

    group = dist.group.WORLD
    assert group is not None
    found = Sums(*(collectives.all_reduce(part, "sum", group) for part in (total, number)))
    if not torch.compiler.is_compiling():
        _wait_for_the_last(found)
    return found


_LAST: list[Tensor] = []


def _wait_for_the_last(sums: Sums) -> None:
    """Ends the sums before these, long done: without a backward pass nobody has, and they leak."""
    for part in _LAST:
        if hasattr(part, "trigger_wait"):
            part.trigger_wait()
    _LAST[:] = sums


def conv_sums(
    input: Tensor,
    kernel_size: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    patches: int = 0,
) -> tuple[Tensor, int]:
    """`X^T X`, `(groups, K, K)`, and `N` of a convolution; outside autograd and autocast.

    Args:
        input: `(B, C, H, W)`.
        kernel_size: as for `F.conv2d`, as are the next four.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        patches: estimate the sum from so many random patches; 0 = all of them.
    """
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        count = patch_count(input, kernel_size, stride, padding, dilation)
        geometry = (input.detach(), kernel_size, stride, padding, dilation, groups)
        if 0 < patches < count:
            return estimated_gram_sum(*geometry, patches=patches), count
        return patch_gram_sum(*geometry), count


def linear_sums(input: Tensor) -> tuple[Tensor, int]:
    """`X^T X`, `(1, K, K)`, and `N` of the rows `(..., K)`; outside autograd and autocast."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        X = input.detach().reshape(1, -1, input.shape[-1])
        return row_gram_sum(X), X.shape[1]


def smaller_system(input: Tensor, *, sync: bool, pending: bool = False) -> Sums | None:
    """The sums of a linear layer's input; None where the `N x N` system is the smaller one.

    That system needs the rows: where sums over ranks or micro-batches are needed, it cannot be.
    """
    rows = input.numel() // max(1, input.shape[-1])
    if rows < input.shape[-1] and not pending and not is_pooled(sync):
        return None
    return over_ranks(*linear_sums(input), sync=sync)
