"""Decodes image files of any kind to (3, H, W) uint8 RGB."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tract_det.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_image, read_file
except ImportError:  # deprecated in torchvision 0.29 and to be removed
    decode_image = None


class CorruptImageError(UserError):
    """The file exists but does not decode."""


def read_rgb(path: Path) -> torch.Tensor:
    """(3, H, W) uint8 from JPEG or PNG; grey, palette, CMYK and transparent images become RGB.

    The pixels are as stored: an EXIF rotation is not applied, as in torchvision's and timm's data
    sets.

    torchvision's decoder gives the same pixels as Pillow's, bit for bit, two to three times as fast
    (benchmarks/data_design_notes.md). Pillow takes over where it fails: in builds without libjpeg,
    for rare formats, and in releases without the decoder.

    Raises:
        CorruptImageError: It does not decode.
        UserError: The file cannot be opened.
    """
    if decode_image is None:
        return _read_rgb_pillow(path)
    try:
        image = decode_image(read_file(str(path)), ImageReadMode.RGB)
    except RuntimeError:
        return _read_rgb_pillow(path)
    if image.ndim != 3:  # an animation
        return _read_rgb_pillow(path)
    if image.dtype != torch.uint8:  # a PNG with 16 bits per channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def _read_rgb_pillow(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))  # (H, W, 3)
    # These are what Pillow raises on broken files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # errno is set by the system: a file that is missing or not readable is not corrupt.
        is_system_error = isinstance(error, OSError) and error.errno is not None
        raise (UserError if is_system_error else CorruptImageError)(
            f"{path}: the image cannot be read ({error}): replace it or remove it from the split"
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
