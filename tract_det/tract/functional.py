"""TrAct as an identity on the weight, and the two layers as functions.

The forward hands the weight on as it is; the backward solves the gradient that comes in, `dZ^T X`,
against `G + lambda_ I` (Petersen, Borgelt, Ermon: "TrAct", NeurIPS 2024, equation for `grad_W`).
The convolution itself is the framework's, so that everything around it stays as it is: stride,
padding, memory formats, autocast, the input's and the bias's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tract_det.tract.gram import damped_solve, patch_gram, row_gram_sum


class TrActError(ValueError):
    """TrAct cannot do what it was asked for; the message names the module and says the mend."""


def check_lambda(lambda_: float) -> float:
    """Returns `lambda_`, or raises TrActError where it is not positive and finite."""
    if not 0 < lambda_ < float("inf"):
        raise TrActError(f"lambda_ is {lambda_}: it must be positive (the paper: 0.05 to 0.2)")
    return float(lambda_)


class _Precondition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gram: Tensor, lambda_: float) -> Tensor:
        ctx.save_for_backward(gram)
        ctx.lambda_ = lambda_
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gram,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            by_group = gradient.reshape(gram.shape[0], -1, gram.shape[-1])
            solved = damped_solve(by_group, gram, ctx.lambda_)
        return solved.reshape(gradient.shape).to(gradient.dtype), None, None


def precondition(weight: Tensor, gram: Tensor, lambda_: float) -> Tensor:
    """The weight itself, whose gradient comes back as `gradient (G + lambda_ I)^-1`.

    Args:
        weight: `(M, ...)` with `K` entries an output channel.
        gram: `(groups, K, K)`; output channels belong to the groups in order.
        lambda_: damping, positive, in units of standardised pixels.
    """
    return _Precondition.apply(weight, gram, lambda_)


def conv_gram(
    input: Tensor,
    kernel_size: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`patch_gram`, outside autograd and autocast."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        return patch_gram(input, kernel_size, stride, padding, dilation, groups)


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

    Returns:
        `(B, M, Ho, Wo)`, or `(M, Ho, Wo)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if _trains(weight):
        kh, kw = weight.shape[2:]
        gram = conv_gram(input, (kh, kw), stride, padding, dilation, groups)
        weight = precondition(weight, gram, lambda_)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def linear_gram(input: Tensor) -> Tensor:
    """`G`, `(1, K, K)`, of the rows `(..., K)` of a linear layer, outside autograd and autocast."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        X = input.detach().reshape(1, -1, input.shape[-1])
        return row_gram_sum(X) / max(1, X.shape[1])


def tract_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, lambda_: float = 0.1
) -> Tensor:
    """`torch.nn.functional.linear` whose weight learns by TrAct; see `tract_conv2d`.

    Args:
        input: `(..., K)`; every row counts as one of the `N`.
        weight: `(M, K)`.
        bias: `(M,)` or None.
        lambda_: damping, in units of standardised inputs.

    Returns:
        `(..., M)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if _trains(weight):
        weight = precondition(weight, linear_gram(input), lambda_)
    return F.linear(input, weight, bias)
