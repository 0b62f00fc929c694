"""The two layers as functions, with PyTorch's forward pass and TrAct's weight gradient.

Where autograd computes the weight gradient `dZ^T X`, these functions compute
`dZ^T X (G + lambda_ I)^-1` (Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations
Trainable", NeurIPS 2024). Output and input gradient are PyTorch's, to the bit; the bias gradient is
the sum of `dZ`.

`G` belongs to the whole batch: the sums `X^T X` and `N` are added up over the data-parallel ranks,
and over the micro-batches of a step (`state.Pending`), so that neither changes the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_det.tract.autograd import learning_conv2d, learning_linear, prepared
from tract_det.tract.state import check_lambda
from tract_det.tract.sums import conv_sums, over_ranks, smaller_system


def trains(weight: Tensor) -> bool:
    """Whether this forward pass can lead to a gradient of this weight."""
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
    """`torch.nn.functional.conv2d` with TrAct's weight gradient, `dZ^T X (G + lambda_ I)^-1`.

    Output and input gradient are the same as with `conv2d`, to the bit. Under `no_grad`, and for a
    weight that needs no gradient, this is plain `conv2d` at no extra cost.

    Args:
        input: `(B, C, H, W)` or `(C, H, W)`.
        weight: `(M, C / groups, kh, kw)`.
        bias: `(M,)` or None.
        stride: as for `conv2d`.
        padding: as for `conv2d`, also "same" and "valid".
        dilation: as for `conv2d`.
        groups: as for `conv2d`; each group has its own Gram matrix.
        lambda_: damping, in units of standardised pixels.
        sync: whether to sum `G` over all ranks, where a process group exists; then every rank must
            call the function.

    Returns:
        `(B, M, Ho, Wo)`, or `(M, Ho, Wo)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if not trains(weight):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    conv = (stride, padding, dilation, groups)
    sums = prepared(
        lambda: over_ranks(*conv_sums(input, tuple(weight.shape[2:]), *conv), sync=sync),
        input,
        lambda_=lambda_,
    )
    return learning_conv2d(input, weight, bias, *conv, sums, lambda_=lambda_)


def tract_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lambda_: float = 0.1,
    sync: bool = True,
) -> Tensor:
    """`torch.nn.functional.linear` with TrAct's weight gradient; see `tract_conv2d`.

    Args:
        input: `(..., K)`; every row is one of the `N` patches. With fewer rows than columns, the
            smaller `N x N` system is solved instead (Woodbury's identity).
        weight: `(M, K)`.
        bias: `(M,)` or None.
        lambda_: damping, in units of standardised inputs.
        sync: as for `tract_conv2d`.

    Returns:
        `(..., M)`.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    check_lambda(lambda_)
    if not trains(weight):
        return F.linear(input, weight, bias)
    sums = prepared(lambda: smaller_system(input, sync=sync), input, lambda_=lambda_)
    return learning_linear(input, weight, bias, sums, lambda_=lambda_)
