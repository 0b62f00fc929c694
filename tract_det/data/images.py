"""Decoding: a file becomes (3, H, W) uint8 RGB, whatever it holds."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tract_det.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_image, read_file
except ImportError:  # deprecated in torchvision 0.29, to be removed
    decode_image = None


class CorruptImageError(UserError):
    """The file is there, but does not decode."""


def read_rgb(path: Path) -> torch.Tensor:
    """(3, H, W) uint8 from JPEG or PNG; grey, palette, CMYK and transparent images become RGB.

    An EXIF rotation is not applied, as in torchvision's and timm's data sets: the pixels are those
    stored.

    torchvision's decoder: the same pixels as Pillow's, bit for bit, in 0.7 ms instead of 2.0 ms
    for a 640 x 480 JPEG (one core, torchvision 0.29, Pillow 13). Pillow where it fails: builds
    without libjpeg, rare formats, releases without the decoder.

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
    if image.dtype != torch.uint8:  # a PNG of 16 bits a channel
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def _read_rgb_pillow(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))  # (H, W, 3)
    # What Pillow raises on broken files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # An error with a number is the system's: a file gone or not ours to read is not corrupt.
        system = isinstance(error, OSError) and error.errno is not None
        raise (UserError if system else CorruptImageError)(
            f"{path}: the image cannot be read ({error}): replace it or remove it from the split"
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
