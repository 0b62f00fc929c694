"""TrAct as an identity on the weight, and the two layers as functions.

The forward hands the weight on as it is; the backward solves the gradient that comes in, `dZ^T X`,
against `G + lambda_ I` (Petersen, Borgelt, Ermon: "TrAct", NeurIPS 2024, equation for `grad_W`).
The convolution itself is the framework's, so that everything around it stays as it is: stride,
padding, memory formats, autocast, the input's and the bias's gradient.

`G` is that of the whole batch: the sums `X^T X` and `N` are added up over the data-parallel ranks,
and over the micro-batches of a step (`Pending`), so that neither changes what is learnt.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tract_det.tract.gram import damped_solve, patch_count, patch_gram_sum, row_gram_sum


class TrActError(ValueError):
    """TrAct cannot do what it was asked for; the message names the module and says the mend."""


def check_lambda(lambda_: float) -> float:
    """Returns `lambda_`, or raises TrActError where it is not positive and finite."""
    if not 0 < lambda_ < float("inf"):
        raise TrActError(f"lambda_ is {lambda_}: it must be positive (the paper: 0.05 to 0.2)")
    return float(lambda_)


class Sums:
    """`X^T X` and `N` of a batch, on their way through the ranks.

    Attributes:
        packed: `(groups, K, K + 1)` float64: `X^T X`, and `N` in the last column.
    """

    def __init__(self, total: Tensor, count: int, *, sync: bool) -> None:
        N = total.new_full((*total.shape[:-1], 1), count)
        self.packed = torch.cat([total, N], -1)
        self._work = None
        if sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Needed in the backward pass alone: it travels while the forward pass goes on.
            self._work = dist.all_reduce(self.packed, async_op=True)

    def wait(self) -> Tensor:
        """`packed`, over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self.packed


def gram_of(packed: Tensor) -> Tensor:
    """`G = X^T X / N`, `(groups, K, K)`, from `Sums.packed`."""
    return packed[..., :-1] / packed[..., -1:].clamp(min=1)


class Pending:
    """What the micro-batches of a step have left so far.

    The exact step of `k` micro-batches needs the sum of their plain gradients and their pooled `G`:
    the first `k - 1` give a gradient of zero, the last one that of them all.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.clear()

    def clear(self) -> None:
        """Forgets what there is: a step was given up."""
        self.seen = 0
        self.packed: Tensor | None = None
        self.gradient: Tensor | None = None

    def add(self, packed: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """Takes a micro-batch in; returns the sums over all with the last one."""
        packed = packed if self.packed is None else self.packed + packed
        gradient = gradient if self.gradient is None else self.gradient + gradient
        self.seen, self.packed, self.gradient = self.seen + 1, packed, gradient
        if self.seen < self.micro_batches:
            return None
        self.clear()
        return packed, gradient


class _Precondition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, sums: Sums, lambda_: float, pending: Pending | None
    ) -> Tensor:
        ctx.sums, ctx.lambda_, ctx.pending = sums, lambda_, pending
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, plain = ctx.sums.wait(), gradient
        if ctx.pending is not None:
            complete = ctx.pending.add(packed, gradient)
            if complete is None:
                return torch.zeros_like(gradient), None, None, None
            packed, plain = complete
        with torch.autocast(gradient.device.type, enabled=False):
            gram = gram_of(packed)
            by_group = plain.reshape(gram.shape[0], -1, gram.shape[-1])
            solved = damped_solve(by_group, gram, ctx.lambda_)
        return solved.reshape(gradient.shape).to(gradient.dtype), None, None, None


def precondition(
    weight: Tensor, sums: Sums, lambda_: float, pending: Pending | None = None
) -> Tensor:
    """The weight itself, whose gradient comes back as `gradient (G + lambda_ I)^-1`.

    Args:
        weight: `(M, ...)` with `K` entries an output channel.
        sums: of the layer's input; output channels belong to its groups in order.
        lambda_: damping, positive, in units of standardised pixels.
        pending: collects the micro-batches of a step; None = each is a step.
    """
    return _Precondition.apply(weight, sums, lambda_, pending)


def conv_sums(
    input: Tensor,
    kernel_size: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> tuple[Tensor, int]:
    """`X^T X`, `(groups, K, K)`, and `N` of a convolution; outside autograd and autocast."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        total = patch_gram_sum(input, kernel_size, stride, padding, dilation, groups)
        return total, patch_count(input, kernel_size, stride, padding, dilation)


def linear_sums(input: Tensor) -> tuple[Tensor, int]:
    """`X^T X`, `(1, K, K)`, and `N` of the rows `(..., K)`; outside autograd and autocast."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        X = input.detach().reshape(1, -1, input.shape[-1])
        return row_gram_sum(X), X.shape[1]


def _trains(weight: Tensor) -> bool:
    return torch.is_grad_enabled() and weight.requires_grad


def tract_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    lambda_: float = 0.1,
    sync: bool = True,
) -> Tensor:
    """`torch.nn.functional.conv2d` whose weight learns by TrAct.

    The output, the input's and the bias's gradient are those of `conv2d`, to the bit. The weight
    gradient is `dZ^T X (G + lambda_ I)^-1`. Under `no_grad`, and for a weight that needs no
    gradient, it is plain `conv2d` at no cost.

    Args:
        input: `(B, C, H, W)` or `(C, H, W)`.
        weight: `(M, C / groups, kh, kw)`.
        bias: `(M,)` or None.
        stride: as for `conv2d`.
        padding: as for `conv2d`, also "same" and "valid".
        dilation: as for `conv2d`.
        groups: as for `conv2d`; each group has a Gram matrix of its own.
        lambda_: damping, in units of standardised pixels.
        sync: where a process group exists, `G` is that of all ranks; every rank must take part.

    Returns:
        `(B, M, Ho, Wo)`, or `(M, Ho, Wo)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if _trains(weight):
        sums = conv_sums(input, tuple(weight.shape[2:]), stride, padding, dilation, groups)
        weight = precondition(weight, Sums(*sums, sync=sync), lambda_)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def tract_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lambda_: float = 0.1,
    sync: bool = True,
) -> Tensor:
    """`torch.nn.functional.linear` whose weight learns by TrAct; see `tract_conv2d`.

    Args:
        input: `(..., K)`; every row counts as one of the `N`.
        weight: `(M, K)`.
        bias: `(M,)` or None.
        lambda_: damping, in units of standardised inputs.
        sync: where a process group exists, `G` is that of all ranks; every rank must take part.

    Returns:
        `(..., M)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if _trains(weight):
        weight = precondition(weight, Sums(*linear_sums(input), sync=sync), lambda_)
    return F.linear(input, weight, bias)
