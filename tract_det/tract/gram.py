"""Patch Gram matrices, and the damped solves against them: the arithmetic of TrAct.

| symbol    | meaning                                                                    |
|-----------|----------------------------------------------------------------------------|
| `N`       | patches in the batch: `B * Ho * Wo`, or the rows of a linear layer's input |
| `K`       | patch length: `C / groups * kh * kw`, or `in_features`                     |
| `M`       | output channels of one group                                               |
| `X`       | patches, `(N, K)`, columns in the order `(c, kh, kw)` of `F.unfold`        |
| `dZ`      | gradient of the loss by the pre-activations, `(N, M)`                      |
| `G`       | patch Gram matrix `X^T X / N`, `(K, K)`                                    |
| `lambda_` | damping                                                                    |

TrAct's weight gradient is `dZ^T X (G + lambda_ I)^-1` (Petersen, Borgelt and Ermon, "TrAct: Making
First-layer Pre-Activations Trainable", NeurIPS 2024). The inverse magnifies what is wrong in `G` by
up to `1 / lambda_`, so `G` is float64. Two exact algorithms, neither of which unfolds the whole
input: *correlation* where windows overlap (`correlation.py`), and *direct* where they do not and
for rare geometries: `X^T X`, a block at a time.

Both work in blocks, so memory does not grow with the batch or the image. Neither branches on
values, so nothing waits for the device. Times in the comments are milliseconds on one thread of an
AMD EPYC 9004 (AVX-512), PyTorch 2.14 with MKL, float32 input, for the stems
A: 7x7/2, 16 x 3 x 224^2; B: 7x7/2, 2 x 3 x 608 x 800; C: 3x3, 16 x 3 x 224^2; D: 16x16/16, as C.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tract_det.tract.correlation import correlation_sum
from tract_det.tract.windows import BLOCK_BYTES, Windows, crop, windows_of

# The correlation pays for pairs of channels after space-to-depth, the direct sum for pairs of taps.
# Correlation and direct on the images of C: 3x3/2 37 and 57 ms, 7x7/4 72 and 103, 11x11/4 102 and
# 210; but 5x5/4 99 and 61, and 16x16/8 (192 channels) 346 and 148.
_MAX_CHANNELS = 64
_MIN_TAPS_PER_CHANNEL = 2
# Direct sums up to this K are float64. Beyond, they are most of the cost (D: 86 ms, 30 in float32),
# and `_CHUNK` rows are multiplied in float32, the chunks added in float64.
_FLOAT64_K = 256
_CHUNK = 1024
# Columns of one product in the lower triangle of `X^T X`. D: 40 ms whole, 30 in blocks of 192.
_COLUMNS = 192


def row_gram_sum(rows: Tensor) -> Tensor:
    """`X^T X` of explicit rows.

    Args:
        rows: `(..., N, K)`.

    Returns:
        `(..., K, K)`, float64.
    """
    K = rows.shape[-1]
    if K <= _FLOAT64_K or rows.dtype == torch.float64:
        rows = rows.double()
        return rows.mT @ rows
    rows = rows.float()
    total = torch.zeros((*rows.shape[:-2], K, K), dtype=torch.float64, device=rows.device)
    lows = range(0, K, _COLUMNS)
    for X in rows.split(_CHUNK, -2):
        for low in lows:
            high = min(low + _COLUMNS, K)
            total[..., low:high, :high] += X[..., low:high].mT @ X[..., :high]
    for low in lows:
        high = min(low + _COLUMNS, K)
        total[..., :low, low:high] = total[..., low:high, :low].mT
    return total


def _direct_sum(x: Tensor, windows: Windows, groups: int, first_row: int = 0) -> Tensor:
    """`X^T X`, `(groups, K, K)`, from the patches of output rows `first_row` on."""
    kernel, stride, dilation, origin, (Ho, Wo) = windows
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    K = x.shape[1] // groups * kernel[0] * kernel[1]
    row_bytes = groups * Wo * K * 8
    step = max(1, min(Ho - first_row, BLOCK_BYTES // row_bytes))
    images = max(1, BLOCK_BYTES // (step * row_bytes))
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach[1])
    total = torch.zeros((groups, K, K), dtype=torch.float64, device=x.device)
    for top in range(first_row, Ho, step):
        first = origin[0] + top * stride[0]
        rows = (first, first + (min(step, Ho - top) - 1) * stride[0] + reach[0])
        for block in x.split(images):
            taps = crop(block, rows, columns).unfold(2, reach[0], stride[0])
            taps = taps.unfold(3, reach[1], stride[1])[..., :: dilation[0], :: dilation[1]]
            taps = taps.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2, 5, 6)
            total += row_gram_sum(taps.reshape(groups, -1, K))
    return total


def _gram_sum(x: Tensor, windows: Windows, groups: int) -> Tensor:
    """`X^T X`, `(groups, K, K)`, by the algorithm that is faster for this geometry."""
    taps, step = math.prod(windows.kernel), math.prod(windows.stride)
    if (
        groups == 1
        and windows.dilation == (1, 1)
        and taps >= _MIN_TAPS_PER_CHANNEL * step
        and x.shape[1] * step <= _MAX_CHANNELS
    ):
        gram, rows = correlation_sum(x, windows)
        return gram if rows == windows.out[0] else gram + _direct_sum(x, windows, 1, rows)
    return _direct_sum(x, windows, groups)


# An operator of its own, so that torch.compile takes it as it is: traced, its blocks are thousands
# of nodes that a compiler can make no faster.
@torch.library.custom_op("tract_det::patch_gram_sum", mutates_args=())
def _gram_sum_op(x: Tensor, geometry: Sequence[int], groups: int) -> Tensor:
    fields = ((geometry[i], geometry[i + 1]) for i in range(0, len(geometry), 2))
    return _gram_sum(x.detach(), Windows(*fields), groups)


@_gram_sum_op.register_fake
def _(x: Tensor, geometry: Sequence[int], groups: int) -> Tensor:
    K = x.shape[1] // groups * geometry[0] * geometry[1]
    return x.new_empty((groups, K, K), dtype=torch.float64)


@torch.no_grad()
def patch_gram_sum(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`X^T X` for the patches that a convolution sees. The arguments are those of `F.conv2d`.

    Args:
        input: `(B, C, H, W)` or `(C, H, W)`, floating point.
        kernel_size: height and width.
        stride: height and width.
        padding: zeros on both sides, "same" or "valid"; pad beforehand for other padding modes.
        dilation: height and width.
        groups: blocks of channels, as in a grouped convolution.

    Returns:
        `(groups, K, K)`, float64; the order of K is that of `weight.flatten(1)`.
    """
    images = input if input.dim() == 4 else input.unsqueeze(0)
    windows = windows_of(images.shape[2:], kernel_size, stride, padding, dilation)
    return _gram_sum_op(images, [number for field in windows for number in field], groups)


def patch_count(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> int:
    """`N`; the arguments are those of `patch_gram_sum`."""
    windows = windows_of(input.shape[-2:], kernel_size, stride, padding, dilation)
    return math.prod(input.shape[:-3]) * math.prod(windows.out)


def patch_gram(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """`G`, `(groups, K, K)`, float64; the arguments are those of `patch_gram_sum`."""
    total = patch_gram_sum(input, kernel_size, stride, padding, dilation, groups)
    return total / patch_count(input, kernel_size, stride, padding, dilation)


def damped_solve(grad: Tensor, gram: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (G + lambda_ I)^-1` by Cholesky, in float64.

    Args:
        grad: plain weight gradient `dZ^T X`, `(groups, M, K)`.
        gram: `G`, `(groups, K, K)`.
        lambda_: damping, a number or a tensor of one element.

    Returns:
        `(groups, M, K)` in the dtype of `grad`; NaN for a group that is not positive definite.
    """
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_(lambda_)
    factor, info = torch.linalg.cholesky_ex(damped)
    # From the right as the rows lie: D 17 ms, 20 with `cholesky_solve`.
    half = torch.linalg.solve_triangular(factor.mT, grad.double(), upper=True, left=False)
    solved = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return torch.where((info == 0)[..., None, None], solved, torch.nan).to(grad.dtype)


def damped_solve_rows(grad: Tensor, rows: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (X^T X / N + lambda_ I)^-1` through an `N x N` system, cheaper if N < K.

    Woodbury: `(X^T X / N + lambda I)^-1 = (I - X^T (X X^T + N lambda I)^-1 X) / lambda`.

    Args:
        grad: plain weight gradient `dZ^T X`, `(..., M, K)`.
        rows: `X`, `(..., N, K)`.
        lambda_: damping, more than 0.

    Returns:
        `(..., M, K)` in the dtype of `grad`; NaN where the system is not positive definite.
    """
    X, g = rows.double(), grad.double()
    inner = damped_solve(g @ X.mT, X @ X.mT, lambda_ * X.shape[-2])
    return ((g - inner @ X) / lambda_).to(grad.dtype)
