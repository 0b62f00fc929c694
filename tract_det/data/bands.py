"""Images of any number of channels as they are, for models of other than three channels.

What a file has, and which of its kinds are read:

| file | channels |
|---|---|
| `.npy`, (H, W) or (H, W, C) | 1 or C; whole numbers of 8 bits, or the upper 8 of 16 bits |
| grey, one bit; grey with alpha, which is left out | 1 |
| TIFF of several grey pages of one size, all upright | one a page |
| RGB with alpha; RGB with a fourth sample in TIFF | 4 |
| TIFF of RGB with more samples | refused, but for a model of RGB, which takes the first three |
| all others: RGB, palette, CMYK, ... | 3 |

Floating-point and signed numbers are refused, since their range is not known. TIFF in other
layouts, such as more samples than four, does not open in Pillow: `.npy` takes all of it.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    PHOTOMETRIC_INTERPRETATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
    TiffImageFile,
)

ARRAY_SUFFIX = ".npy"

_GREY = ("1", "L", "LA", "La", "F")
_RGB_AND_ONE = "RGBX"
ORIENTATION = 0x0112  # EXIF's tag


class SamplesError(ValueError):
    """A TIFF has more samples in a pixel than Pillow reads."""

    def __init__(self, count: int) -> None:
        super().__init__(
            f"a TIFF with {count} samples in each pixel cannot be read: save it as .npy of shape "
            f"(H, W, {count}) and 8 or 16 bits, or as TIFF with a grey page for each channel"
        )


def is_array(path: Path) -> bool:
    """Whether a file is, by its name, an array and no picture."""
    return path.suffix.lower() == ARRAY_SUFFIX


def array_shape(path: Path) -> tuple[int, int, int]:
    """Height, width and channels of an array in a file, from its header.

    Raises:
        ValueError: it is no image.
        OSError: the file cannot be opened.
    """
    # Mapped into memory, since a damaged header can ask for more than the file has.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        shape = getattr(array, "shape", "several arrays")
        raise ValueError(f"its shape is {shape}, not (H, W) or (H, W, C)")
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ValueError(f"its numbers are {array.dtype}: save it as uint8 or uint16")
    height, width, *channels = array.shape
    return height, width, channels[0] if channels else 1


def array_pixels(path: Path) -> np.ndarray:
    """(H, W, C) uint8 of an array that `array_shape` has looked at."""
    array = np.load(path, allow_pickle=False)
    return eight_bits(array if array.ndim == 3 else array[..., None])


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 as it is; of any wider type, numbers of 16 bits without a sign, the upper 8 bits.

    Raises:
        ValueError: there are other numbers.
    """
    if pixels.dtype == np.uint8:
        return pixels
    wide = pixels.astype(np.int64)
    if wide.size and not 0 <= wide.min() <= wide.max() < 2**16:
        raise ValueError(
            f"its pixels are whole numbers from {wide.min()} to {wide.max()}: save it with 8 "
            "or 16 bits, without a sign"
        )
    return (wide >> 8).astype(np.uint8)


def channels_of(image: Image.Image) -> int:
    """How many channels an opened file has, by its header.

    Raises:
        SamplesError: Pillow would leave some of them out.
    """
    if image.mode in _GREY or image.mode.startswith("I"):
        return _page_count(image)
    if image.mode in ("RGBA", _RGB_AND_ONE):
        return 4
    if isinstance(image, TiffImageFile) and image.mode == "RGB":
        count = image.tag_v2.get(SAMPLESPERPIXEL, 3)
        if count > 4:
            raise SamplesError(count)
        return count
    return 3


def unread_samples(path: Path) -> int:
    """Samples in each pixel of a TIFF in a layout that Pillow does not open; 0 = it is none."""
    with suppress(Exception), path.open("rb") as file:  # of many kinds, on broken files
        directory = ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        count = int(directory.get(SAMPLESPERPIXEL, 1))
        is_grey = directory.get(PHOTOMETRIC_INTERPRETATION) in (0, 1)
        return count if count > (1 if is_grey else 4) else 0
    return 0


def _page_count(image: Image.Image) -> int:
    return image.n_frames if isinstance(image, TiffImageFile) else 1


def pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    """(H, W, C) uint8 of an opened file with so many channels.

    Raises:
        ValueError: Pillow does not read them all, or their range is not known.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with 8 bits")
    if image.mode in _GREY or image.mode.startswith("I"):
        return _pages(image)
    if channels > 3 and image.mode == "RGB":
        _keep_fourth(image)
    pixels = np.array(image)
    if pixels.shape[2:] != (channels,):
        raise ValueError(f"its {channels} channels cannot be read as they are: save it as .npy")
    return pixels


def _pages(image: Image.Image) -> np.ndarray:
    """(H, W, C) uint8 of grey pages."""
    pages, count = [], _page_count(image)
    for page in range(count):
        if page:
            image.seek(page)
        if count > 1 and image.getexif().get(ORIENTATION, 1) != 1:
            raise ValueError("its pages have an EXIF orientation: rewrite them upright")
        grey = image if image.mode.startswith("I") else image.convert("L")
        pages.append(eight_bits(np.asarray(grey)))
    if len({page.shape for page in pages}) > 1:
        raise ValueError("its pages differ in size: save one channel a page")
    return np.stack(pages, axis=-1)


def _keep_fourth(image: Image.Image) -> None:
    """Has Pillow keep the fourth sample that a TIFF does not explain; it would leave it out."""
    tiles = getattr(image, "tile", [])
    modes = {tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in tiles}
    if modes == {_RGB_AND_ONE}:
        image._mode = _RGB_AND_ONE
