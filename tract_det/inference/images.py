"""Whatever holds an image, as the tensor that a model takes."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tract_det.data.images import from_pillow
from tract_det.errors import UserError

Images = str | Path | Image.Image | np.ndarray | Tensor | Iterable[Any]

_TAKES = (
    "a path, a Pillow image, a uint8 array (H, W, {0}), or a tensor ({0}, H, W), uint8 or float in "
    "[0, 1]"
)


def as_list(images: Images) -> tuple[list[Any], bool]:
    """The images one by one, and whether it was a single one that is no list."""
    is_array = isinstance(images, np.ndarray | Tensor)
    if isinstance(images, str | Path | Image.Image) or (is_array and images.ndim < 4):  # type: ignore[union-attr]
        return [images], True
    return list(images), False


def as_tensor(image: Any, read: Callable[[Path], Tensor], channels: int = 3) -> Tensor:
    """An image as `(C, H, W)`, uint8 or float in [0, 1]; RGB if C is 3.

    Args:
        image: a path, a Pillow image, a uint8 array `(H, W, C)`, or a tensor `(C, H, W)`.
        read: reads the file at a path.
        channels: C, of the model.

    Raises:
        UserError: it is something else, or the file cannot be read.
    """
    if isinstance(image, str | Path):
        return read(Path(image))
    if isinstance(image, Image.Image):
        try:
            return from_pillow(image, channels)
        except ValueError as error:
            raise UserError(f"the image of mode {image.mode}: {error}") from error
    takes = _TAKES.format(channels) + ("; all RGB" if channels == 3 else "")
    shape, dtype = tuple(getattr(image, "shape", ())), getattr(image, "dtype", None)
    if isinstance(image, np.ndarray):
        is_image = len(shape) == 3 and shape[2] == channels and dtype == np.uint8
        tensor = torch.from_numpy(np.ascontiguousarray(image)) if is_image else None
        tensor = tensor.permute(2, 0, 1).contiguous() if tensor is not None else None
    else:
        is_pixels = isinstance(image, Tensor) and (
            dtype == torch.uint8 or image.is_floating_point()
        )
        tensor = image if is_pixels and len(shape) == 3 and shape[0] == channels else None
    if tensor is None or 0 in shape:
        what = f"{dtype} {shape}" if shape else type(image).__name__
        raise UserError(f"an image is {what}: give {takes}")
    if tensor.is_floating_point() and (tensor.min() < 0 or tensor.max() > 1):
        raise UserError(f"an image has numbers outside [0, 1]: give {takes}")
    return tensor
