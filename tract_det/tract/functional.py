"""The two layers as functions: the framework's forward, TrAct's weight gradient.

Where autograd would give the weight `dZ^T X`, these give `dZ^T X (G + lambda_ I)^-1` (Petersen,
Borgelt, Ermon: "TrAct", NeurIPS 2024, equation for `grad_W`). Output and input gradient are the
framework's, to the bit; the bias gradient is the sum of `dZ`.

`G` is that of the whole batch: the sums `X^T X` and `N` are added up over the data-parallel ranks,
and over the micro-batches of a step (`state.Pending`), so that neither changes what is learnt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_det.tract.autograd import learning_conv2d, learning_linear
from tract_det.tract.state import check_lambda
from tract_det.tract.sums import conv_sums, over_ranks, smaller_system


def trains(weight: Tensor) -> bool:
    """Whether a gradient of this weight will be asked for."""
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

    The output and the input's gradient are those of `conv2d`, to the bit. The weight gradient is
    `dZ^T X (G + lambda_ I)^-1`. Under `no_grad`, and for a weight that needs no gradient, it is
    plain `conv2d` at no cost.

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
    if not trains(weight):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    conv = (stride, padding, dilation, groups)
    sums = over_ranks(*conv_sums(input, tuple(weight.shape[2:]), *conv), sync=sync)
    return learning_conv2d(input, weight, bias, *conv, sums, lambda_=lambda_)


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
        input: `(..., K)`; every row counts as one of the `N`. With fewer rows than columns the
            `N x N` system is solved (Woodbury).
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
    if not trains(weight):
        return F.linear(input, weight, bias)
    sums = smaller_system(input, sync=sync)
    return learning_linear(input, weight, bias, sums, lambda_=lambda_)
