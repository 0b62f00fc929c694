"""The sums `X^T X` and `N` of a layer's input, over all ranks. Symbols: see `gram`."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tract_det.tract.gram import estimated_gram_sum, patch_count, patch_gram_sum, row_gram_sum


def is_pooled(sync: bool) -> bool:
    """Whether `G` is summed over several ranks."""
    return sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Sums(NamedTuple):
    """Numerator and denominator of `G`.

    Attributes:
        total: `X^T X`, `(groups, K, K)`, float64.
        number: `N`, a float64 scalar.
        factor: the Cholesky factor of `X^T X + N lambda_ I`; None = made when it is needed.
    """

    total: Tensor
    number: Tensor
    factor: Tensor | None = None


def over_ranks(total: Tensor, count: int, *, sync: bool) -> Sums:
    """The sums of this rank, or where `sync` is set, the sums over all ranks.

    Only the backward pass needs them, so the all-reduce overlaps with the forward pass.

    Args:
        total: `X^T X` of this rank.
        count: `N` of this rank.
        sync: whether to sum over the ranks, where a process group exists.
    """
    sums = Sums(total, total.new_full((), count))
    if not is_pooled(sync):
        return sums
    # These collectives can be compiled, and wait where a sum is first used.
    from torch.distributed import _functional_collectives as collectives

    group = dist.group.WORLD
    assert group is not None
    pooled = Sums(*(collectives.all_reduce(part, "sum", group) for part in sums[:2]))
    if not torch.compiler.is_compiling():
        _wait_for_previous(pooled)
    return pooled


_PREVIOUS: list[Tensor] = []


def _wait_for_previous(sums: Sums) -> None:
    """Waits for the all-reduce before this one, which has long finished.

    Without a backward pass nothing else waits for it, and its buffers would leak.
    """
    for part in _PREVIOUS:
        if hasattr(part, "trigger_wait"):
            part.trigger_wait()
    _PREVIOUS[:] = sums[:2]


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
        kernel_size: height and width.
        stride: as for `F.conv2d`.
        padding: as for `F.conv2d`.
        dilation: as for `F.conv2d`.
        groups: as for `F.conv2d`.
        patches: number of random patches from which to estimate the sum; 0 = exact, from all.
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
    """The sums of a linear layer's input; None where the `N x N` system is smaller.

    The `N x N` system needs all the rows, so it is not used where several ranks or micro-batches
    (`pending`) share a `G`.

    Args:
        input: `(..., K)`.
        sync: whether to sum over the ranks, where a process group exists.
        pending: whether the micro-batches of a step are summed.
    """
    rows = input.numel() // max(1, input.shape[-1])
    if rows < input.shape[-1] and not pending and not is_pooled(sync):
        return None
    return over_ranks(*linear_sums(input), sync=sync)
