"""Patch Gram matrices: the `G` of TrAct's weight gradient.

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
First-layer Pre-Activations Trainable", NeurIPS 2024). The inverse magnifies errors in `G` by up to
`1 / lambda_`, so `G` is float64. There are two exact algorithms, and neither unfolds the whole
input: *correlation* (`correlation.py`) where windows overlap, and *direct* (`X^T X`, a block of
patches at a time) where they do not, and for rare geometries.

Both work in blocks, so memory grows neither with the batch nor with the image. On a GPU neither
branches on values, so neither synchronises. The constants follow from measurements:
benchmarks/tract_design_notes.md.
"""

import math
from typing import Sequence  # noqa: UP035 - the one that torch 2.4 takes in an operator

import torch
from torch import Tensor

from tract_det.tract import launches
from tract_det.tract.correlation import correlation_sum
from tract_det.tract.device import float32_products, is_accelerated
from tract_det.tract.operators import operator
from tract_det.tract.solve import FEW_PATCHES, trace
from tract_det.tract.windows import BLOCK_BYTES, Windows, crop, windows_of

# The cost of a correlation grows with the pairs of channels after space-to-depth, the cost of a
# direct sum with the pairs of taps. Within these limits the correlation is faster.
_MAX_CHANNELS = 64
_MIN_TAPS_PER_CHANNEL = 2
# Direct sums up to this K are float64. Beyond it they would cost more than the rest of the layer:
# blocks are multiplied in float32 and added in float64. The exception is an input whose mean square
# is far above 1, the value of standardised pixels: a `lambda_` meant for those would be too small
# beside the rounding errors of float32.
_FLOAT64_K = 256
_FLOAT64_MEAN_SQUARE = 30.0
# Columns of one product in the lower triangle of `X^T X`: faster than the whole square at once.
_COLUMNS = 128


def row_gram_sum(rows: Tensor) -> Tensor:
    """`X^T X` of explicit rows, a block at a time.

    Args:
        rows: `(..., N, K)`.

    Returns:
        `(..., K, K)`, float64.
    """
    if is_accelerated(rows):
        return launches.row_gram_sum(rows)
    first, *others = rows.split(_block_rows(rows.shape[-1]), -2)
    total = _product(first).double()
    for X in others:
        total += _product(X)
    return total


def _product(X: Tensor) -> Tensor:
    """`X^T X` of one block."""
    N, K = X.shape[-2:]
    if K > _FLOAT64_K and X.dtype != torch.float64:
        product = _float32_product(X)
        if bool((trace(product) <= _FLOAT64_MEAN_SQUARE * N * K).all()):
            return product
    X = X.double()
    return X.mT @ X


def _block_rows(K: int) -> int:
    """Rows of `X` in one block."""
    bytes_of_row = K * (8 if K <= _FLOAT64_K else 4)
    return max(1, (BLOCK_BYTES if K <= _FLOAT64_K else 2 * BLOCK_BYTES) // bytes_of_row)


def _float32_product(rows: Tensor) -> Tensor:
    """`X^T X` in float32: the lower triangle is computed, the upper one copied from it."""
    K = rows.shape[-1]
    product = rows.new_empty((*rows.shape[:-2], K, K), dtype=torch.float32)
    lows = range(0, K, _COLUMNS)
    with float32_products():
        for X, out in zip(
            rows.float().reshape(-1, *rows.shape[-2:]), product.view(-1, K, K), strict=True
        ):
            for low in lows:
                high = low + _COLUMNS
                torch.mm(X[:, low:high].mT, X[:, :high], out=out[low:high, :high])
    for low in lows:
        high = low + _COLUMNS
        product[..., :low, low:high] = product[..., low:high, :low].mT
    return product


def _direct_sum(x: Tensor, windows: Windows, groups: int, first_row: int = 0) -> Tensor:
    """`X^T X`, `(groups, K, K)`, of the patches in the output rows from `first_row` on."""
    kernel, stride, dilation, origin, (Ho, Wo) = windows
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    K = x.shape[1] // groups * kernel[0] * kernel[1]
    block = _block_rows(K) // groups
    step = max(1, min(Ho - first_row, block // Wo))
    images = max(1, block // (step * Wo))
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach[1])
    total = torch.zeros((groups, K, K), dtype=torch.float64, device=x.device)
    if len(x) * Ho * Wo <= FEW_PATCHES * K:
        x = x.double()  # cheap, and float32 would lose too much: see `float64_is_cheap`
    for top in range(first_row, Ho, step):
        first = origin[0] + top * stride[0]
        rows = (first, first + (min(step, Ho - top) - 1) * stride[0] + reach[0])
        for part in x.split(images):
            taps = crop(part, rows, columns).unfold(2, reach[0], stride[0])
            taps = taps.unfold(3, reach[1], stride[1])[..., :: dilation[0], :: dilation[1]]
            taps = taps.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 2, 5, 6)
            total += row_gram_sum(taps.reshape(groups, -1, K))
    return total


def _gram_sum(x: Tensor, windows: Windows, groups: int) -> Tensor:
    """`X^T X`, `(groups, K, K)`, by the fastest algorithm for this device and geometry."""
    if is_accelerated(x):
        sums = [launches.gram_sum(part, windows) for part in x.chunk(groups, 1)]
        return sums[0][None] if groups == 1 else torch.stack(sums)
    taps, step = math.prod(windows.kernel), math.prod(windows.stride)
    if (
        len(x)  # MKL refuses empty transforms
        and groups == 1
        and windows.dilation == (1, 1)
        and taps >= _MIN_TAPS_PER_CHANNEL * step
        and x.shape[1] * step <= _MAX_CHANNELS
    ):
        gram, rows = correlation_sum(x, windows)
        return gram if rows == windows.out[0] else gram + _direct_sum(x, windows, 1, rows)
    return _direct_sum(x, windows, groups)


# An operator, so that torch.compile does not trace it: its blocks would become thousands of nodes
# that a compiler cannot speed up.
@operator("patch_gram_sum", repeatable=True)
def _gram_sum_op(x: Tensor, geometry: Sequence[int], groups: int) -> Tensor:
    return _gram_sum(x.detach(), Windows.unpack(geometry), groups)


@_gram_sum_op.register_fake
def _(x: Tensor, geometry: Sequence[int], groups: int) -> Tensor:
    K = x.shape[1] // groups * math.prod(Windows.unpack(geometry).kernel)
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
    """`X^T X` of the patches that a convolution sees; the arguments are those of `F.conv2d`.

    Args:
        input: `(B, C, H, W)` or `(C, H, W)`, floating point.
        kernel_size: height and width.
        stride: height and width.
        padding: zeros on both sides, "same" or "valid"; for other padding modes, pad beforehand.
        dilation: height and width.
        groups: blocks of channels, as in a grouped convolution.

    Returns:
        `(groups, K, K)`, float64; K has the order of `weight.flatten(1)`.
    """
    images = input if input.dim() == 4 else input.unsqueeze(0)
    windows = windows_of(images.shape[2:], kernel_size, stride, padding, dilation)
    return _gram_sum_op(images, windows.pack(), groups)


@operator("estimated_gram_sum", repeatable=False)
def _estimated_sum_op(x: Tensor, geometry: Sequence[int], groups: int, patches: int) -> Tensor:
    kernel, stride, dilation, origin, (Ho, Wo) = Windows.unpack(geometry)
    count = len(x) * Ho * Wo
    patch = torch.randint(count, (patches,), device=x.device)
    image, row, column = patch // (Ho * Wo), patch // Wo % Ho, patch % Wo
    taps = [torch.arange(k, device=x.device) * d for k, d in zip(kernel, dilation, strict=True)]
    rows = (row * stride[0] + origin[0])[:, None, None] + taps[0][:, None]
    columns = (column * stride[1] + origin[1])[:, None, None] + taps[1]
    H, W = x.shape[2:]
    inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
    nearest = (image[:, None, None], rows.clamp(0, H - 1), columns.clamp(0, W - 1))
    X = x.detach().movedim(1, -1)[nearest] * inside[..., None]  # (patches, kh, kw, C)
    X = X.unflatten(-1, (groups, -1)).permute(3, 0, 4, 1, 2).flatten(2)
    return row_gram_sum(X) * (count / patches)


@_estimated_sum_op.register_fake
def _(x: Tensor, geometry: Sequence[int], groups: int, patches: int) -> Tensor:
    K = x.shape[1] // groups * math.prod(Windows.unpack(geometry).kernel)
    return x.new_empty((groups, K, K), dtype=torch.float64)


@torch.no_grad()
def estimated_gram_sum(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    patches: int,
) -> Tensor:
    """An estimate of `X^T X` from random patches, drawn by the device's default generator.

    The error of `G` falls with the square root of the number of patches, and the solve magnifies
    it: with 16,384 patches of standardised photographs and `lambda_` 0.1, the gradient is off by a
    few per cent. On a CPU the exact sum is as fast wherever windows overlap. Measurements:
    benchmarks/tract_design_notes.md.

    Args:
        input: as for `patch_gram_sum`.
        kernel_size: as for `patch_gram_sum`.
        stride: as for `patch_gram_sum`.
        padding: as for `patch_gram_sum`.
        dilation: as for `patch_gram_sum`.
        groups: as for `patch_gram_sum`.
        patches: number of patches, drawn with replacement.

    Returns:
        `(groups, K, K)`, float64.
    """
    images = input if input.dim() == 4 else input.unsqueeze(0)
    windows = windows_of(images.shape[2:], kernel_size, stride, padding, dilation)
    return _estimated_sum_op(images, windows.pack(), groups, patches)


def patch_count(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
) -> int:
    """`N`, the number of patches; the arguments are those of `patch_gram_sum`."""
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
