"""Decodes image files of any kind to (3, H, W) uint8 RGB, as stored or turned upright."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tract_det.errors import UserError

try:
    from torchvision.io import ImageReadMode, decode_image, read_file
except ImportError:  # deprecated in torchvision 0.29 and to be removed
    decode_image = None


_ORIENTATION = 0x0112  # EXIF's tag
# What its values ask for: whether to exchange rows and columns, then the dimensions to flip.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


# What an orientation may stand in before the pixels of a PNG, by Pillow's names.
_SAY = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


class CorruptImageError(UserError):
    """The file exists but does not decode."""


def orientation_of(path: Path) -> int:
    """EXIF's orientation of an image file, 1 to 8; 1 = upright, or the file does not say."""
    try:
        with Image.open(path) as image:
            return _orientation(image)
    except Exception:  # Pillow raises many kinds; `read_rgb` says whether the file is an image
        return 1


def _orientation(image: Image.Image) -> int:
    if (
        isinstance(image, PngImageFile)
        and not _SAY & image.info.keys()
        and _ends_with_pixels(image.filename)
    ):
        return 1  # `getexif` would decode the pixels to look behind them
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF, which viewers and detectron2 ignore as well
        return 1
    return value if value in _TURNS else 1


def _ends_with_pixels(png: str | bytes) -> bool:
    """Whether nothing follows the pixels of a PNG file: each of its parts says how long it is."""
    kinds = []
    with open(png, "rb") as file:  # noqa: PTH123 - Pillow gives the name as text
        file.seek(8)
        while len(head := file.read(8)) == 8:
            kinds.append(head[4:])
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    after = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else [b""]
    return set(after) <= {b"IDAT", b"IEND"}


def is_turned(orientation: int) -> bool:
    """Whether an image with this orientation is stored on its side, so that its sides change."""
    return _TURNS.get(orientation, (False, ()))[0]


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as `read_upright` reads it, from the file's header.

    Raises:
        CorruptImageError: It is not an image.
        UserError: The file cannot be opened.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if is_turned(_orientation(image)) else (width, height)


def read_upright(path: Path) -> torch.Tensor:
    """As `read_rgb`, but turned as the file's EXIF orientation says, as viewers show the image.

    detectron2 reads its images so, by the same tag.
    """
    image = read_rgb(path)
    orientation = orientation_of(path)
    if orientation == 1:
        return image
    is_exchanged, flipped = _TURNS[orientation]
    return (image.transpose(-2, -1) if is_exchanged else image).flip(flipped).contiguous()


def read_rgb(path: Path) -> torch.Tensor:
    """(3, H, W) uint8 from JPEG or PNG; grey, palette, CMYK and transparent images become RGB.

    The pixels are as stored: an EXIF orientation is not applied, as in torchvision's and timm's
    data sets of classes.

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
    with _opened(path) as file:
        pixels = np.array(file.convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    # These are what Pillow raises on broken files.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # errno is set by the system: a file that is missing or not readable is not corrupt.
        is_system_error = isinstance(error, OSError) and error.errno is not None
        raise (UserError if is_system_error else CorruptImageError)(
            f"{path}: the image cannot be read ({error}): replace it or remove it from the split"
        ) from None
