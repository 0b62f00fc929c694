"""`X^T X` and `dZ^T X` of convolutions in few, large launches: the way of accelerators.

Symbols: see `gram`. The images are unfolded along their rows only. `Y[r]` has the taps of all
windows that begin in any column, on row `r` of the padded images: `F = C * kw` features at
`B * Wo` places. Then the block of `X^T X` between the taps of window rows `i` and `i + l` is the
sum, over output rows `o`, of `Y[s o + i] Y[s o + i + l]^T` with the stride `s`, and the `kh` rows
that follow each other in `Y` are the columns of `X` for one output row. So one batched product over
the rows gives all of it, from an array that is `kh / s` times smaller than `X`, and no border needs
a correction. Where windows do not overlap, or rows are skipped, whole patches are unfolded.

What makes float32 (TF32, for `X^T X`) good enough, at any scale of the pixels:

- *Centring.* From every pixel, zeros of the padding included, the mean of its channel is subtracted
  while it is copied, and put back exactly, in float64: with `X = Y + 1 c^T`,
  `X^T X = Y^T Y + u c^T + c u^T`, where `u = X^T 1 - c N / 2`, and
  `dZ^T X = dZ^T Y + (dZ^T 1) c^T`. The mean is by far the largest direction of pixels; the solve
  magnifies the rounding errors that it causes. The mean is rounded to bfloat16, so that centred
  8-bit pixels are exact in TF32.
- *Many sums.* Each row of the images, or group of images, is summed on its own; the sums are added
  in float64.
- *Float64* for few patches, where the solve magnifies most and `X` is hardly larger than `K x K`.

Nothing is read back from the device. Errors and counts: benchmarks/tract_design_notes.md.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tract_det.tract.device import products_for_gradient, products_for_gram, workspace
from tract_det.tract.solve import FEW_PATCHES
from tract_det.tract.windows import Windows, crop

# Of the workspace: what small tensors may take, and the least that is left to the copies of pixels
# and gradients beside the sums.
_SMALL, _COPIES = 0.05, 0.25
# Patches that are summed in float32, at least, where whole patches are unfolded.
_PATCHES = 4096


class _Block(NamedTuple):
    """Images `[first, last)` and their output rows `[top, bottom)`."""

    first: int
    last: int
    top: int
    bottom: int


def _takes_rows(windows: Windows) -> bool:
    """Whether to unfold along the rows only."""
    return windows.kernel[0] > windows.stride[0] and windows.dilation[0] == 1


def _blocks(
    images: int, rows: int, row_bytes: int, *, sums: int, extra_rows: int = 0, group: int = 1
) -> list[_Block]:
    """Blocks that fit into the workspace.

    Args:
        images: number of images.
        rows: output rows of each.
        row_bytes: bytes of the copies that an output row of one image takes.
        sums: bytes of the float32 sums.
        extra_rows: what a block takes beyond its output rows, in rows.
        group: the number of images in a block is a multiple of this, or smaller.
    """
    size = max(_COPIES * workspace(), (1 - _SMALL) * workspace() - sums)
    room = int(size) // max(1, row_bytes)
    together = max(1, room // (rows + extra_rows))
    together -= together % group if together > group else 0
    whole = images - images % group
    bounds = [*range(0, whole, together), whole, images]
    band = max(1, min(rows, room - extra_rows))
    return [
        _Block(first, last, top, min(top + band, rows))
        for first, last in pairwise(bounds)
        for top in range(0, rows, band)
        if first < last
    ]


class _Buffer:
    """Memory for the blocks, which follow each other on one stream and so can share it."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: Tensor | None = None

    def take(self, *shape: int) -> Tensor:
        """Uninitialised, contiguous; what was taken before is overwritten."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # before the larger one is allocated
            self._memory = self._like.new_empty(size, dtype=self._dtype)
        return self._memory[:size].view(shape)


def _taps(x: Tensor, windows: Windows, top: int, bottom: int) -> Tensor:
    """A view of the patches of output rows `[top, bottom)`, `(B, C, Ho, Wo, kh, kw)`."""
    kernel, stride, dilation, origin, (_, Wo) = windows
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    first = origin[0] + top * stride[0]
    rows = (first, first + (bottom - top - 1) * stride[0] + reach[0])
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach[1])
    taps = crop(x, rows, columns).unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])
    return taps if dilation == (1, 1) else taps[..., :: dilation[0], :: dilation[1]]


def _row_taps(x: Tensor, windows: Windows, first: int, last: int) -> Tensor:
    """A view of rows `[first, last)` of the padded images, unfolded: `(B, C, rows, Wo, kw)`."""
    kernel, stride, dilation, origin, (_, Wo) = windows
    reach = dilation[1] * (kernel[1] - 1) + 1
    columns = (origin[1], origin[1] + (Wo - 1) * stride[1] + reach)
    rows = crop(x, (origin[0] + first, origin[0] + last), columns)
    taps = rows.unfold(3, reach, stride[1])
    return taps if dilation[1] == 1 else taps[..., :: dilation[1]]


def _unfold_rows(
    x: Tensor, windows: Windows, rows: tuple[int, int], centre: Tensor, buffer: _Buffer
) -> Tensor:
    """`Y` of rows `[first, last)` of the padded images, `(rows, C kw, B Wo)`, centred."""
    taps = _row_taps(x, windows, *rows).permute(2, 1, 4, 0, 3)  # (rows, C, kw, B, Wo)
    Y = buffer.take(*taps.shape)
    torch.sub(taps, centre.view(-1, 1, 1, 1), out=Y)
    return Y.view(taps.shape[0], taps.shape[1] * taps.shape[2], -1)


def _unfold_patches(
    x: Tensor, windows: Windows, block: _Block, group: int, centre: Tensor, buffer: _Buffer
) -> Tensor:
    """`X^T` of a block, `(groups of images, K, patches)`, centred."""
    taps = _taps(x[block.first : block.last], windows, block.top, block.bottom)
    taps = _grouped(taps, group).permute(0, 2, 5, 6, 1, 3, 4)
    Y = buffer.take(*taps.shape)
    torch.sub(taps, centre.view(-1, 1, 1, 1, 1, 1), out=Y)
    return Y.view(len(Y), math.prod(Y.shape[1:4]), -1)


def _grouped(images: Tensor, group: int) -> Tensor:
    """A view `(groups, images of a group, ...)`; fewer images than that are one group."""
    return images.unflatten(0, (-1, min(group, len(images))))


def _most_groups(blocks: list[_Block], group: int) -> int:
    return max((-(-(block.last - block.first) // group) for block in blocks), default=0)


def _following(Y: Tensor, rows: int, step: int, taps: int) -> Tensor:
    """A view of `taps` rows of `Y` from each of the rows `0, step, ...`: `(rows, taps F, B Wo)`."""
    _, F, places = Y.shape
    return Y.as_strided((rows, taps * F, places), (step * F * places, places, 1))


def _product_dtype(x: Tensor, windows: Windows) -> torch.dtype:
    """Float32; float64 for few patches, whose `G` is singular or nearly so: they are cheap."""
    few = FEW_PATCHES * x.shape[1] * math.prod(windows.kernel)
    is_few = len(x) * math.prod(windows.out) <= few
    return torch.float64 if is_few or x.dtype == torch.float64 else torch.float32


def _group(images: int, windows: Windows) -> int:
    """Images whose patches are summed in float32 together, where whole patches are unfolded."""
    return min(images, -(-_PATCHES // math.prod(windows.out)))


def _by_tap(centre: Tensor, windows: Windows) -> Tensor:
    """`c`, `(K,)`, float64, from the centre of each channel."""
    taps = math.prod(windows.kernel)
    return centre.double()[:, None].expand(-1, taps).reshape(-1)


def gram_sum(x: Tensor, windows: Windows) -> Tensor:
    """`X^T X` of a convolution without groups, `(K, K)`, float64.

    Args:
        x: `(B, C, H, W)`.
        windows: on these images.
    """
    K = x.shape[1] * math.prod(windows.kernel)
    if not len(x):
        return x.new_zeros((K, K), dtype=torch.float64)
    image = x.mean(0, dtype=torch.float64)
    centre = image.mean((1, 2), dtype=torch.bfloat16)
    # `X^T 1` of one image, as what is put back is: the sum of the mean image's patches.
    sums = _taps(image[None], windows, 0, windows.out[0]).sum((0, 2, 3)).flatten()
    del image  # its memory is the blocks'
    with products_for_gram(x):
        gram = (_gram_by_rows if _takes_rows(windows) else _by_patches)(x, windows, centre)
    c = _by_tap(centre, windows)
    u = torch.sub(sums, c, alpha=math.prod(windows.out) / 2)
    return gram.addr_(u, c, alpha=len(x)).addr_(c, u, alpha=len(x))


def _gram_by_rows(x: Tensor, windows: Windows, centre: Tensor) -> Tensor:
    (kh, kw), (sh, _), _, _, (Ho, Wo) = windows
    B, C = x.shape[:2]
    F, height = C * kw, (Ho - 1) * sh + kh
    dtype = _product_dtype(x, windows)
    buffer, mean = _Buffer(x, dtype), centre.to(dtype)
    # Of each row with itself and the `kh - 1` rows after it.
    pairs = x.new_zeros((height, F, kh * F), dtype=dtype)
    row_bytes = dtype.itemsize * sh * C * (kw + windows.stride[1]) * Wo
    extra = -(-(kh - 1) // sh)
    for block in _blocks(B, Ho, row_bytes, sums=pairs.nbytes, extra_rows=extra):
        first = block.top * sh
        last = height if block.bottom == Ho else block.bottom * sh
        images = x[block.first : block.last]
        Y = _unfold_rows(images, windows, (first, last + kh - 1), mean, buffer)
        rows = last - first
        pairs[first:last].baddbmm_(Y[:rows], _following(Y, rows, 1, kh).mT)
    # Summed over the output rows: of the window's row `i` with the row `i + l`, `(kh, F, kh F)`.
    step = F * kh * F
    by_lag = pairs.as_strided((kh, Ho, F, kh * F), (step, sh * step, kh * F, 1))
    return _from_lags(by_lag.sum(1, dtype=torch.float64), C)


def _from_lags(by_lag: Tensor, C: int) -> Tensor:
    """`(K, K)` from the sums of window row `i` with row `i + l`, `(kh, C kw, kh C kw)`.

    Entries with `i + l >= kh` are ignored.
    """
    kh, F, _ = by_lag.shape
    by_lag[..., :F].div_(2)  # the lag 0 is added twice
    width = (2 * kh - 1) * F
    upper = by_lag.new_zeros((kh, F, width))
    # Writes (i, l) where (i, i + l) belongs: each row of blocks begins one block further right.
    upper.as_strided((kh, F, kh * F), (F * width + F, width, 1)).copy_(by_lag)
    half = upper[..., : kh * F].reshape(kh * F, kh * F)
    order = (1, 0, 2, 4, 3, 5)
    gram = (half + half.mT).view(kh, C, -1, kh, C, F // C).permute(order)
    return gram.reshape(kh * F, kh * F)


def _by_patches(x: Tensor, windows: Windows, centre: Tensor, dZ: Tensor | None = None) -> Tensor:
    """`Y^T Y`, `(K, K)`, of whole patches; or `dZ^T Y`, `(M, K)`."""
    B, C = x.shape[:2]
    K, Wo = C * math.prod(windows.kernel), windows.out[1]
    dtype = _product_dtype(x, windows)
    buffer, mean = _Buffer(x, dtype), centre.to(dtype)
    gradients, M = (None, K) if dZ is None else (_Gradients(dZ, dtype), dZ.shape[1])
    group = _group(B, windows)
    row_bytes = dtype.itemsize * (2 * K + (0 if dZ is None else M)) * Wo
    sums = dtype.itemsize * M * K * -(-B // group)
    blocks = _blocks(B, windows.out[0], row_bytes, sums=sums, group=group)
    total = x.new_zeros((_most_groups(blocks, group), M, K), dtype=dtype)
    for block in blocks:
        Y = _unfold_patches(x, windows, block, group, mean, buffer)
        left = Y if gradients is None else gradients.by_groups(block, group)
        total[: len(Y)].baddbmm_(left, Y.mT)
    return total.sum(0, dtype=torch.float64)


def gradient_sum(x: Tensor, dZ: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """`dZ^T X` of a convolution without groups, and the sum of `dZ`.

    Args:
        x: `(B, C, H, W)`.
        dZ: `(B, M, Ho, Wo)`.
        windows: on these images.

    Returns:
        `(M, K)` and `(M,)`, float64.
    """
    sum_dZ = dZ.sum((0, 2, 3), dtype=torch.float64)
    if not len(x):
        K = x.shape[1] * math.prod(windows.kernel)
        return sum_dZ.new_zeros((dZ.shape[1], K)), sum_dZ
    centre = x.mean((0, 2, 3), dtype=torch.bfloat16)
    with products_for_gradient(dZ):
        by_rows = _takes_rows(windows)
        gradient = (_gradient_by_rows if by_rows else _by_patches)(x, windows, centre, dZ)
    return gradient.addr_(sum_dZ, _by_tap(centre, windows)), sum_dZ


def _gradient_by_rows(x: Tensor, windows: Windows, centre: Tensor, dZ: Tensor) -> Tensor:
    (kh, kw), (sh, sw), _, _, (Ho, Wo) = windows
    (B, C), M = x.shape[:2], dZ.shape[1]
    F = C * kw
    dtype = _product_dtype(x, windows)
    buffer, mean = _Buffer(x, dtype), centre.to(dtype)
    gradients = _Gradients(dZ, dtype)
    total = x.new_zeros((Ho, M, kh * F), dtype=dtype)
    row_bytes = dtype.itemsize * (sh * C * (kw + sw) + M) * Wo
    extra = -(-(kh - 1) // sh)
    for block in _blocks(B, Ho, row_bytes, sums=total.nbytes, extra_rows=extra):
        rows = (block.top * sh, (block.bottom - 1) * sh + kh)
        Y = _unfold_rows(x[block.first : block.last], windows, rows, mean, buffer)
        X = _following(Y, block.bottom - block.top, sh, kh)
        total[block.top : block.bottom].baddbmm_(gradients.by_rows(block), X.mT)
    by_tap = total.sum(0, dtype=torch.float64).view(M, kh, C, kw)
    return by_tap.transpose(1, 2).reshape(M, kh * F)


class _Gradients:
    """Copies of `dZ` in the order of `Y` and in the precision of its products."""

    def __init__(self, dZ: Tensor, dtype: torch.dtype) -> None:
        self._dZ, self._buffer = dZ, _Buffer(dZ, dtype)

    def by_rows(self, block: _Block) -> Tensor:
        """`(rows, M, B Wo)`."""
        dZ = self._of(block)
        return self._copy(dZ.permute(2, 1, 0, 3))

    def by_groups(self, block: _Block, group: int) -> Tensor:
        """`(groups of images, M, patches)`."""
        dZ = _grouped(self._of(block), group)
        return self._copy(dZ.transpose(1, 2))

    def _of(self, block: _Block) -> Tensor:
        return self._dZ[block.first : block.last, :, block.top : block.bottom]

    def _copy(self, dZ: Tensor) -> Tensor:
        """`(sums, M, ...)` contiguous, or with the channels last if they are so in memory."""
        if dZ.stride(1) != 1:
            return self._buffer.take(*dZ.shape).copy_(dZ).flatten(2)
        last = dZ.movedim(1, -1)
        return self._buffer.take(*last.shape).copy_(last).flatten(1, -2).mT


_ROW = Windows((1, 1), (1, 1), (1, 1), (0, 0), (1, 1))


def row_gram_sum(rows: Tensor) -> Tensor:
    """`X^T X` of explicit rows: `(..., N, K)` to `(..., K, K)`, float64."""
    batches = rows.reshape(-1, *rows.shape[-2:])
    sums = [gram_sum(X[..., None, None], _ROW) for X in batches]
    return torch.stack(sums).view(*rows.shape[:-2], *sums[0].shape)


def linear_gradient_sum(X: Tensor, dZ: Tensor) -> Tensor:
    """`dZ^T X` of rows `(N, K)` and `(N, M)`, `(M, K)`, float64."""
    return gradient_sum(X[..., None, None], dZ[..., None, None], _ROW)[0]
