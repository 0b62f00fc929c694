"""The patch Gram matrix and the damped solve: pure functions of tensors.

Symbols (the whole project uses them): `N` patches in the batch, `K` patch length
`C / groups * kh * kw`, `M` output channels, `X` patches `(N, K)`, `dZ` gradient of the loss by the
pre-activations `(N, M)`, `G = X^T X / N` the patch Gram matrix `(K, K)`, `lambda_` the damping.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 4 << 20  # patch entries unfolded at a time: 16 MiB of fp32


def patch_gram(
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The Gram matrix `G = X^T X / N` of a convolution's input patches.

    Args:
        input: images, `(B, C, H, W)` or `(C, H, W)`, of any floating type.
        kernel_size: `(kh, kw)`.
        stride: step between patches, `(vertical, horizontal)`, in pixels.
        padding: zeros added on both sides, `(vertical, horizontal)`, in pixels.
        dilation: step between a patch's pixels, `(vertical, horizontal)`.
        groups: number of channel groups, each with a Gram matrix of its own.

    Returns:
        `(groups, K, K)` in fp32; rows in the order of `weight.reshape(M, K)`.
    """
    images = (input if input.dim() == 4 else input.unsqueeze(0)).float()
    batch, channels, height, width = images.shape
    kh, kw = kernel_size
    rows = (height + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    K = channels // groups * kh * kw
    total = images.new_zeros(groups, K, K, dtype=torch.float64)
    block = max(1, _BLOCK_ELEMENTS // (groups * K * rows * columns))
    for chunk in images.split(block):
        X = F.unfold(chunk, kernel_size, dilation, padding, stride)
        X = X.unflatten(1, (groups, K)).permute(1, 2, 0, 3).flatten(2)  # (groups, K, N)
        total += X @ X.mT
    return (total / (batch * rows * columns)).float()


def rows_gram(rows: Tensor) -> Tensor:
    """The Gram matrix `G = X^T X / N` of the rows `(..., K)` of a linear layer: `(1, K, K)`."""
    X = rows.reshape(-1, rows.shape[-1]).float()
    return (X.mT @ X / max(1, X.shape[0])).unsqueeze(0)


def damped_solve(gradient: Tensor, gram: Tensor, lambda_: float) -> Tensor:
    """`gradient (G + lambda_ I)^-1`, by Cholesky in fp32.

    Args:
        gradient: `(groups, M / groups, K)`, the plain weight gradient `dZ^T X`.
        gram: `(groups, K, K)`, symmetric and positive semi-definite.
        lambda_: damping, positive.

    Returns:
        `(groups, M / groups, K)` in fp32. NaN where the factorisation fails, which needs an input
        that is not finite or so large that `lambda_` is below its rounding: a training loop sees
        that, and there is no host synchronisation to ask for it here.
    """
    damped = gram + lambda_ * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    solution = torch.cholesky_solve(gradient.float().mT, factor).mT
    return torch.where((info == 0)[:, None, None], solution, torch.nan)
