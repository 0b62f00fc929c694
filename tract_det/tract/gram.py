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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Sequence  # noqa: UP035 - the one that torch 2.4 takes in an operator

import torch
from torch import Tensor

from tract_det.tract.correlation import correlation_sum
from tract_det.tract.operators import operator
from tract_det.tract.solve import FEW_PATCHES
from tract_det.tract.windows import BLOCK_BYTES, Windows, crop, windows_of

# The correlation pays for pairs of channels after space-to-depth, the direct sum for pairs of taps.
# Correlation and direct on the images of C: 3x3/2 37 and 57 ms, 7x7/4 72 and 103, 11x11/4 102 and
# 210; but 5x5/4 99 and 61, and 16x16/8 (192 channels) 346 and 148.
_MAX_CHANNELS = 64
_MIN_TAPS_PER_CHANNEL = 2
# Direct sums up to this K are float64. Beyond, they are most of the cost (D: 86 ms, 30 in float32),
# and blocks are multiplied in float32 and added in float64; unless the input's mean square is far
# from that of standardised pixels, and thus the lambda_ that goes with it too small.
_FLOAT64_K = 256
_FLOAT64_MEAN_SQUARE = 30.0
# Columns of one product in the lower triangle of `X^T X`. D on two threads: 18 ms whole, 12 in
# blocks of 96 to 192, 14 of 384.
_COLUMNS = 128


@contextmanager
def _float32_products() -> Iterator[None]:
    """Float32 products in float32: a user's TF32 or bf16 setting is for the network's layers."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen by the newer setting, which does not go with this one
        with _ieee_products():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def row_gram_sum(rows: Tensor) -> Tensor:
    """`X^T X` of explicit rows.

    Args:
        rows: `(..., N, K)`.

    Returns:
        `(..., K, K)`, float64.
    """
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
        # Asked on the CPU alone: elsewhere the answer would be waited for.
        trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
        if X.device.type != "cpu" or bool((trace <= _FLOAT64_MEAN_SQUARE * N * K).all()):
            return product
    X = X.double()
    return X.mT @ X


def _block_rows(K: int) -> int:
    """Rows of `X` in one block."""
    bytes_of_row = K * (8 if K <= _FLOAT64_K else 4)
    return max(1, (BLOCK_BYTES if K <= _FLOAT64_K else 2 * BLOCK_BYTES) // bytes_of_row)


def _float32_product(rows: Tensor) -> Tensor:
    """`X^T X` in float32, of which the lower triangle alone is computed."""
    K = rows.shape[-1]
    product = rows.new_empty((*rows.shape[:-2], K, K), dtype=torch.float32)
    lows = range(0, K, _COLUMNS)
    with _float32_products():
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
    """`X^T X`, `(groups, K, K)`, from the patches of output rows `first_row` on."""
    kernel, stride, dilation, origin, (Ho, Wo) = windows
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    K = x.shape[1] // groups * kernel[0] * kernel[1]
    block = _block_rows(K) // groups
    step = max(1, min(Ho - first_row, block // Wo))
    images = max(1, block // (step * Wo))
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach[1])
    total = torch.zeros((groups, K, K), dtype=torch.float64, device=x.device)
    if len(x) * Ho * Wo <= FEW_PATCHES * K and x.device.type == "cpu":
        x = x.double()  # cheap, and needed: see `is_cheap`
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
    """`X^T X`, `(groups, K, K)`, by the algorithm that is faster for this geometry."""
    taps, step = math.prod(windows.kernel), math.prod(windows.stride)
    if (
        len(x)  # MKL refuses transforms of nothing
        and groups == 1
        and windows.dilation == (1, 1)
        and taps >= _MIN_TAPS_PER_CHANNEL * step
        and x.shape[1] * step <= _MAX_CHANNELS
    ):
        gram, rows = correlation_sum(x, windows)
        return gram if rows == windows.out[0] else gram + _direct_sum(x, windows, 1, rows)
    return _direct_sum(x, windows, groups)


# An operator of its own, so that torch.compile takes it as it is: traced, its blocks are thousands
# of nodes that a compiler can make no faster.
@operator("patch_gram_sum")
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


@operator("estimated_gram_sum")
def _estimated_sum_op(x: Tensor, geometry: Sequence[int], groups: int, patches: int) -> Tensor:
    fields = ((geometry[i], geometry[i + 1]) for i in range(0, len(geometry), 2))
    windows = Windows(*fields)
    kernel, stride, dilation, origin, (Ho, Wo) = windows
    count = len(x) * Ho * Wo
    chosen = torch.randint(count, (patches,), device=x.device)
    image, row, column = chosen // (Ho * Wo), chosen // Wo % Ho, chosen % Wo
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
    K = x.shape[1] // groups * geometry[0] * geometry[1]
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

    The error of `G` falls with the root of the number of patches, and the solve magnifies it.
    16 photographs of 224^2, standardised, lambda_ 0.1: the gradient is off by 11, 5 and 3 % with
    4,096, 16,384 and 65,536 patches for a 7x7/2 stem, by 6, 3 and 1.4 % for a 3x3 one. On a CPU the
    exact sum is as fast wherever windows overlap.

    Args:
        input: as for `patch_gram_sum`, as are the next five.
        kernel_size: see there.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        patches: how many, drawn with replacement.

    Returns:
        `(groups, K, K)`, float64.
    """
    images = input if input.dim() == 4 else input.unsqueeze(0)
    windows = windows_of(images.shape[2:], kernel_size, stride, padding, dilation)
    return _estimated_sum_op(images, [n for field in windows for n in field], groups, patches)


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
