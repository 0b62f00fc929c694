"""Where the windows of a convolution lie, and how to crop an image around them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Bytes of float64 pixels in one block; a spectrum of the same size and smaller copies come on top.
# With larger blocks every call gets fresh pages from the operating system, and smaller blocks slow
# down large images. Measurements: benchmarks/tract_design_notes.md.
BLOCK_BYTES = 8 * 2**20


class Windows(NamedTuple):
    """Where the windows of a convolution lie; every field is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    origin: tuple[int, int]  # first pixel of the first window: minus the zeros before the image
    out: tuple[int, int]  # number of windows

    def pack(self) -> list[int]:
        """All fields as one flat list: an operator takes lists of integers, but no tuples."""
        return [number for field in self for number in field]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> "Windows":
        """The windows that `pack` made a list of."""
        return cls(*zip(numbers[::2], numbers[1::2], strict=True))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def windows_of(
    size: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    dilation: int | tuple[int, ...],
) -> Windows:
    """The windows on an image of `size` (height, width), with the arguments of `F.conv2d`.

    Raises:
        ValueError: the kernel is larger than the padded image.
    """
    kernel, step, spread = _pair(kernel_size), _pair(stride), _pair(dilation)
    reach = tuple(d * (k - 1) for k, d in zip(kernel, spread, strict=True))
    if padding == "same":  # an odd number of zeros has one more after the image, as in PyTorch
        before, zeros = (reach[0] // 2, reach[1] // 2), reach
    else:
        before = (0, 0) if isinstance(padding, str) else _pair(padding)
        zeros = (2 * before[0], 2 * before[1])
    height, width = ((size[i] + zeros[i] - reach[i] - 1) // step[i] + 1 for i in (0, 1))
    if height < 1 or width < 1:
        raise ValueError(
            f"kernel {kernel} with dilation {spread} is too large for an image of {tuple(size)} "
            f"with {zeros} zeros of padding: use larger images or more padding"
        )
    return Windows(kernel, step, spread, (-before[0], -before[1]), (height, width))


def touching(size: tuple[int, int], windows: Windows) -> int:
    """How many windows of a canvas touch an image of `size` (height, width) at its top left."""
    counts = (
        min(n, -(-(length - first) // step))
        for n, length, first, step in zip(
            windows.out, size, windows.origin, windows.stride, strict=True
        )
    )
    return math.prod(counts)


def crop(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Rows and columns `[first, last)` of `x`, `(B, C, H, W)`, with zeros wherever it ends."""
    pads: list[int] = []
    for axis, (first, last) in ((3, columns), (2, rows)):
        before = min(max(-first, 0), last - first)
        start = min(max(first, 0), x.shape[axis])
        length = max(min(last, x.shape[axis]) - start, 0)
        x = x if length == x.shape[axis] else x.narrow(axis, start, length)
        pads += [before, last - first - before - length]
    return F.pad(x, pads) if any(pads) else x
