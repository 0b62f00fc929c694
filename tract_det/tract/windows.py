"""Where the windows of a convolution lie, and images cut to any rectangle around them."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Bytes of float64 pixels in one block. A spectrum of the same size and smaller copies come on top.
# With 16 MiB every call gets fresh pages from the system, between the steps of a stem (see `gram`):
# A 60 ms, C 73, against 42 and 54 with 8 MiB (and 54 and 39 with 4 MiB, but B 240 against 77).
BLOCK_BYTES = 8 * 2**20


class Windows(NamedTuple):
    """Where the windows of a convolution lie; every field is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    origin: tuple[int, int]  # first pixel of the first window: minus the zeros before the image
    out: tuple[int, int]  # number of windows


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def windows_of(
    size: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Windows:
    """The windows on an image of `size` (height, width), with the arguments of `F.conv2d`."""
    kernel, step, spread = _pair(kernel_size), _pair(stride), _pair(dilation)
    reach = tuple(d * (k - 1) for k, d in zip(kernel, spread, strict=True))
    if padding == "same":  # odd totals have one more zero after the image, as in PyTorch
        before, zeros = (reach[0] // 2, reach[1] // 2), reach
    else:
        before = (0, 0) if isinstance(padding, str) else _pair(padding)
        zeros = (2 * before[0], 2 * before[1])
    height, width = ((size[i] + zeros[i] - reach[i] - 1) // step[i] + 1 for i in (0, 1))
    if height < 1 or width < 1:
        raise ValueError(
            f"kernel {kernel}, dilation {spread}: too large for {tuple(size)} + {zeros}"
        )
    return Windows(kernel, step, spread, (-before[0], -before[1]), (height, width))


def touching(size: tuple[int, int], windows: Windows) -> int:
    """How many windows touch an image of `size`, at the top left of the one they lie on."""
    counts = (
        min(n, -(-(length - first) // step))
        for n, length, first, step in zip(
            windows.out, size, windows.origin, windows.stride, strict=True
        )
    )
    return math.prod(counts)


def crop(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Rows and columns `[first, last)` of an image with zeros all around it, to any distance."""
    pads: list[int] = []
    for axis, (first, last) in ((3, columns), (2, rows)):
        before = min(max(-first, 0), last - first)
        start = min(max(first, 0), x.shape[axis])
        x = x.narrow(axis, start, max(min(last, x.shape[axis]) - start, 0))
        pads += [before, last - first - before - x.shape[axis]]
    return F.pad(x, pads) if any(pads) else x
