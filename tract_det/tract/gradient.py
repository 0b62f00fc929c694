"""The plain weight gradient `dZ^T X`, a block at a time. Symbols: see `gram`.

PyTorch's kernel computes it, but not for the whole batch at once: with sums in float32 within a
block and in float64 over the blocks it is more exact than one long float32 sum, and blocks that
stay in the cache are faster. Measurements: benchmarks/tract_design_notes.md.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tract_det.tract import launches
from tract_det.tract.device import is_accelerated
from tract_det.tract.windows import BLOCK_BYTES, Windows, crop

# Bytes of `dZ` in one block of whole images. Larger blocks get fresh pages from the operating
# system, which takes longer than the arithmetic.
_IMAGES_BYTES = 16 * 2**20
# Bytes of `dZ` in one block of rows, where a single image is larger than that.
_ROWS_BYTES = 8 * 2**20
# Patch lengths around 147 (7x7) take smaller blocks of either kind: half the error at the same
# speed. Shorter (3x3) and longer (16x16) patches would lose speed.
_MIDDLE_K, _MIDDLE_BYTES = range(100, 512), 4 * 2**20


def _blocks(dZ: Tensor, K: int) -> Iterator[tuple[int, int, int, int]]:
    """`(first image, last image, first row, last row)` of each block; the last ones are excluded.

    Args:
        dZ: `(B, M, Ho, Wo)`.
        K: patch length.
    """
    B, M, Ho, Wo = dZ.shape
    images_bytes, rows_bytes = _IMAGES_BYTES, _ROWS_BYTES
    if K in _MIDDLE_K:
        images_bytes = rows_bytes = _MIDDLE_BYTES
    image_bytes = M * Ho * Wo * 4
    images = max(1, images_bytes // image_bytes)
    rows = Ho if image_bytes <= images_bytes else max(1, rows_bytes // (M * Wo * 4))
    for image in range(0, B, images):
        for row in range(0, Ho, rows):
            yield image, min(image + images, B), row, min(row + rows, Ho)


def conv_gradient(
    input: Tensor, dZ: Tensor, windows: Windows, groups: int, *, bias: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """`dZ^T X` of a convolution, and the sum of `dZ`.

    Args:
        input: `(B, C, H, W)`.
        dZ: `(B, M, Ho, Wo)`.
        windows: of the convolution, with as many zeros after the image as before.
        groups: of the convolution.
        bias: whether the sum of `dZ` is needed; otherwise it is zero.
        exact: compute in float64, which is several times slower.

    Returns:
        `(M, C / groups, kh, kw)` and `(M,)`. For several blocks they are float64; for one block
        they are bit for bit what PyTorch's kernel returns.
    """
    if is_accelerated(dZ):
        return _accelerated_gradient(input, dZ, windows, groups)
    if exact and bias:  # float32 is enough for the sum, and the same as PyTorch's to the bit
        _, sum_dZ = conv_gradient(input, dZ, windows, groups, bias=True, exact=False)
        return conv_gradient(input, dZ, windows, groups, bias=False, exact=True)[0], sum_dZ
    kernel, stride, dilation, origin, (Ho, Wo) = windows
    M = dZ.shape[1]
    size = (M, input.shape[1] // groups, *kernel)
    if not dZ.numel():
        return dZ.new_zeros(size), dZ.new_zeros(M)
    # Never in half precision: the solve would magnify the rounding errors.
    dtype = torch.float64 if exact else torch.promote_types(dZ.dtype, torch.float32)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach[1])
    weight = dZ.new_empty(1, dtype=dtype).expand(size)  # the kernel reads only its shape
    total: list[Tensor] = []
    for image, last_image, row, last_row in _blocks(dZ, math.prod(size[1:])):
        x, padding = input[image:last_image].to(dtype), (-origin[0], -origin[1])
        if last_row - row < Ho:
            top = origin[0] + row * stride[0]
            x = crop(x, (top, top + (last_row - row - 1) * stride[0] + reach[0]), columns)
            padding = (0, 0)
        z = dZ[image:last_image, :, row:last_row].to(dtype)
        _, *part = torch.ops.aten.convolution_backward(
            *(z, x, weight, [M], stride, padding, dilation, False, (0, 0), groups),
            output_mask=(False, True, bias),
        )
        part = part if bias else part[:1]
        total = [a.double() + b for a, b in zip(total, part, strict=True)] if total else part
    return total[0], total[1] if bias else dZ.new_zeros(M)


def _accelerated_gradient(
    input: Tensor, dZ: Tensor, windows: Windows, groups: int
) -> tuple[Tensor, Tensor]:
    parts = zip(input.chunk(groups, 1), dZ.chunk(groups, 1), strict=True)
    gradients, sums = zip(*(launches.gradient_sum(x, z, windows) for x, z in parts), strict=True)
    gradient = gradients[0] if groups == 1 else torch.cat(gradients)
    sum_dZ = sums[0] if groups == 1 else torch.cat(sums)
    return gradient.view(-1, input.shape[1] // groups, *windows.kernel), sum_dZ


def linear_gradient(input: Tensor, dZ: Tensor, exact: bool) -> Tensor:
    """`dZ^T X` of a linear layer.

    Args:
        input: `(N, K)`.
        dZ: `(N, M)`.
        exact: compute in float64.

    Returns:
        `(M, K)`, float64.
    """
    if is_accelerated(dZ):
        return launches.linear_gradient_sum(input, dZ)
    dtype = torch.float64 if exact or input.dtype == torch.float64 else torch.float32
    total = dZ.new_zeros((dZ.shape[1], input.shape[1]), dtype=torch.float64)
    rows = BLOCK_BYTES // (8 * input.shape[1])
    for X, z in zip(input.split(max(1, rows)), dZ.split(max(1, rows)), strict=True):
        total += z.to(dtype).mT @ X.to(dtype)
    return total
