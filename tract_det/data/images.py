"""Decodes image files of any kind to (3, H, W) uint8 RGB, as stored or turned upright.

JPEG, PNG, WebP, BMP, TIFF and whatever else Pillow reads. For a model of other channels than three
a file must have just as many, which are taken as they are: see `bands.py`. What RGB is made of:

| in the file | RGB |
|---|---|
| grey, one bit | the value three times; a bit is 0 or 255 |
| palette | its colours; a transparent one too |
| alpha | left out: transparent pixels have the colour that is stored below |
| CMYK | by Pillow's rule, (255 - C) (255 - K) / 255, without a colour profile; also YCbCr and HSV |
| 16 bits per channel | the upper 8 bits: 10 or 12 bits that are not stretched to 16 become dark |
| other whole numbers, floating-point numbers, Lab | refused, since their range is not known |
| several pages or frames | the first |
| `.npy` | its three channels; one with another number of them is refused |
"""

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from tract_det.data.bands import (
    ORIENTATION,
    SamplesError,
    array_pixels,
    array_shape,
    channels_of,
    eight_bits,
    is_array,
    pixels_of,
    unread_samples,
)
from tract_det.errors import UserError, shortened
from tract_det.pixels import shown_channels

try:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:  # deprecated in torchvision 0.29 and to be removed
    decode_jpeg = None

# Pillow also logs what it cannot read; to stderr, where nobody has set logging up.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# By default an image with more is refused: a file of a few bytes can ask for any amount of memory.
MAX_PIXELS = 100_000_000

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
_INVERSE = {6: 8, 8: 6}  # all others undo themselves


# JPEG's markers of a frame header: SOF0 to SOF15 without those that mean something else.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# What an orientation may stand in before the pixels of a PNG, by Pillow's names.
_SAY = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


class CorruptImageError(UserError):
    """The file exists but does not decode."""


class Header(NamedTuple):
    """What an image file says before its pixels.

    Attributes:
        stored: Width and height of the pixels as stored.
        orientation: EXIF's, 1 to 8; 1 = upright, or the file does not say.
    """

    stored: tuple[int, int]
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image turned as the orientation says."""
        width, height = self.stored
        return (height, width) if is_turned(self.orientation) else (width, height)


def read_header(path: Path, channels: int | None = None) -> Header:
    """Size and orientation of an image, without decoding it.

    Args:
        path: The file.
        channels: As in `read_upright`; None = any.

    Raises:
        CorruptImageError: It is not an image, or has other channels.
        UserError: The file cannot be opened.
    """
    if is_array(path):
        with _readable(path):
            height, width, count = array_shape(path)
        _refuse_channels(path, count, channels or count)
        return Header((width, height), 1)
    with _opened(path) as image:
        if channels is not None and channels != 3:
            _refuse_channels(path, channels_of(image), channels)
        size = image.size
        if isinstance(image, TiffImageFile):  # Pillow says the upright one's since version 11.1
            size = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        return Header(size, _orientation(image))


def orientation_of(path: Path) -> int:
    """EXIF's orientation of an image file, 1 to 8; 1 = upright, or the file does not say."""
    return _turn_of(path)[0]


def _turn_of(path: Path) -> tuple[int, bool]:
    """EXIF's orientation, and whether `read_rgb` applies it: Pillow does so where it reads TIFF."""
    try:
        with Image.open(path) as image:
            return _orientation(image), isinstance(image, TiffImageFile)
    except Exception:  # Pillow raises many kinds; `read_rgb` says whether the file is an image
        return 1, False


def _orientation(image: Image.Image) -> int:
    if (
        isinstance(image, PngImageFile)
        and not _SAY & image.info.keys()
        and _ends_with_pixels(image.filename)
    ):
        return 1  # `getexif` would decode the pixels to look behind them
    try:
        value = image.getexif().get(ORIENTATION, 1)
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
    return read_header(path).upright


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as `read_stored` reads it; otherwise as `upright_size`."""
    return read_header(path).stored


def read_upright(path: Path, max_pixels: int = MAX_PIXELS, channels: int = 3) -> torch.Tensor:
    """As `read_rgb`, but turned as the file's EXIF orientation says, as viewers show the image.

    detectron2 reads its images so, by the same tag.

    Args:
        path: The file.
        max_pixels: An image with more is refused.
        channels: 3 = RGB, of whatever Pillow reads. Any other number = `(channels, H, W)` of a file
            that has as many; see `bands.py`.
    """
    image = read_as_decoded(path, max_pixels, channels)
    orientation, is_applied = _turn_of(path)
    return image if is_applied else _turned(image, orientation)


def read_stored(path: Path, max_pixels: int = MAX_PIXELS, channels: int = 3) -> torch.Tensor:
    """As `read_upright`, but never turned."""
    image = read_as_decoded(path, max_pixels, channels)
    orientation, is_applied = _turn_of(path)
    return _turned(image, _INVERSE.get(orientation, orientation)) if is_applied else image


def usual_channels(path: Path) -> int:
    """The channels of an array, and three of any other file: it becomes RGB."""
    if not is_array(path):
        return 3
    with _readable(path):
        return array_shape(path)[2]


def shown(image: torch.Tensor) -> torch.Tensor:
    """`(C, H, W)` as `(3, H, W)` for a picture; see `pixels.shown_channels`."""
    return image[shown_channels(len(image))]


def read_as_decoded(path: Path, max_pixels: int = MAX_PIXELS, channels: int = 3) -> torch.Tensor:
    """`(channels, H, W)` uint8: `read_rgb`, and of other channels and arrays the same.

    Args:
        path: The file.
        max_pixels: An image with more is refused.
        channels: As in `read_upright`.

    Raises:
        CorruptImageError: As `read_rgb`, or it has other channels.
        UserError: The file cannot be opened.
    """
    if is_array(path):
        with _readable(path):
            height, width, count = array_shape(path)
            _refuse_channels(path, count, channels)
            refuse_too_many(path, (width, height), max_pixels)
            return _channels_first(array_pixels(path))
    if channels == 3:
        return read_rgb(path, max_pixels)
    with _opened(path) as image:
        _refuse_channels(path, channels_of(image), channels)
        refuse_too_many(path, image.size, max_pixels)
        return _channels_first(pixels_of(image, channels))


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _refuse_channels(path: Path, count: int, channels: int) -> None:
    if count != channels:
        raise CorruptImageError(
            f"{path}: the image has {count} channels, and MODEL.PIXEL_MEAN is for {channels}: give "
            "it and MODEL.PIXEL_STD a number for each channel of the images, which of a detector's "
            f"data `tract-det check --channels {count} --statistics` measures"
        )


def _turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    if orientation == 1:
        return image
    is_exchanged, flipped = _TURNS[orientation]
    return (image.transpose(-2, -1) if is_exchanged else image).flip(flipped).contiguous()


def read_rgb(path: Path, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """(3, H, W) uint8 from an image file; grey, palette, CMYK and transparent ones become RGB.

    The pixels are as Pillow and torchvision decode them, as in torchvision's and timm's data sets
    of classes: an EXIF orientation is applied to TIFF alone, by Pillow. Of 16 bits per channel the
    upper 8 are taken, and alpha is left out.

    torchvision reads JPEG, with the same pixels as Pillow, bit for bit, two to three times as fast
    (benchmarks/data_design_notes.md). Pillow reads all other files: torchvision's PNG decoder ends
    the process on damaged ones. It also takes over where torchvision fails: in builds without
    libjpeg, for rare kinds of JPEG, and in releases without the decoder.

    Args:
        path: The file.
        max_pixels: An image with more is refused, by its header, before it is decoded.

    Raises:
        CorruptImageError: It does not decode, or has too many pixels.
        UserError: The file cannot be opened.
    """
    if decode_jpeg is not None:
        try:
            data = read_file(str(path))
            size = _jpeg_size(memoryview(data.numpy()))
            if size is not None:
                refuse_too_many(path, size, max_pixels)
                return decode_jpeg(data, ImageReadMode.RGB)
        except RuntimeError:
            pass
    with _opened(path) as image:
        refuse_too_many(path, image.size, max_pixels)
        return from_pillow(image)


def from_pillow(image: Image.Image, channels: int = 3) -> torch.Tensor:
    """A Pillow image of any mode as (3, H, W) uint8 RGB, as it is stored: EXIF does not turn it.

    For other channels than three, it must have as many: (channels, H, W).

    Raises:
        ValueError: Its pixels are floating-point numbers, or it has other channels.
    """
    if channels != 3:
        if (count := channels_of(image)) != channels:
            raise ValueError(f"it has {count} channels, not {channels}")
        return _channels_first(pixels_of(image, channels))
    return _channels_first(_rgb_pixels(image))


def _jpeg_size(data: memoryview) -> tuple[int, int] | None:
    """Width and height in the first frame header of a JPEG file's bytes; None: it is no JPEG."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    position = 2
    while position + 9 <= len(data):
        start, kind, length = struct.unpack_from(">BBH", data, position)
        if start != 0xFF:
            return None
        if kind in _FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        is_filler = kind == 0xFF
        position += 1 if is_filler else 2 + length
    return None


def refuse_too_many(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    """Refuses an image with more pixels than a bound.

    Args:
        path: Of the file, for the message.
        size: Width and height.
        max_pixels: The bound.

    Raises:
        CorruptImageError: It has more.
    """
    if size[0] * size[1] > max_pixels:
        raise CorruptImageError(
            f"{path}: {size[0]} x {size[1]} pixels are more than INPUT.MAX_PIXELS {max_pixels}: "
            "scale the image down, or raise the bound if there is the memory for it"
        )


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 bits")
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        return np.repeat(eight_bits(np.asarray(image))[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with _readable(path):
        try:
            file = Image.open(path)
        except Exception:  # of any kind: Ultralytics puts a function of its own before Pillow's
            if count := unread_samples(path):
                raise SamplesError(count) from None
            raise
        with file:
            yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says which file it was that did not open or decode."""
    try:
        yield
    except CorruptImageError:
        raise
    except SamplesError as error:
        raise CorruptImageError(f"{path}: {error}") from None
    # Pillow's plug-ins and NumPy raise almost anything on broken files.
    except Exception as error:
        # errno is set by the system: a file that is missing or not readable is not corrupt.
        is_system_error = isinstance(error, OSError) and error.errno is not None
        raise (UserError if is_system_error else CorruptImageError)(
            f"{path}: the image cannot be read ({shortened(str(error), 200)}): replace it or "
            "remove it from the split"
        ) from None
