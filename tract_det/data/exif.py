"""What EXIF's orientation does to the images of a detector.

Cameras store a picture on its side and note in EXIF how to turn it. Viewers show it upright, some
programs read it as stored, and boxes mean the one or the other. The size in an annotation tells
which, where the two sizes differ:

| mode (INPUT.EXIF) | size of the upright image, of both, or none | size of the stored image alone |
|---|---|---|
| auto | turned upright | refused: it must be said what the boxes mean |
| apply | turned upright | turned upright; width and height are exchanged |
| refuse | refused | refused |

Under `ignore` no image is turned: its size must be that of the image as stored.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tract_det.data.annotations import Annotation, shorten
from tract_det.data.faults import Faults
from tract_det.data.headers import read_headers
from tract_det.data.images import (
    MAX_PIXELS,
    Header,
    is_turned,
    read_header,
    read_stored,
    read_upright,
    refuse_too_many,
)
from tract_det.errors import UserError

_WHERE = "INPUT.EXIF (register_voc's exif)"


class Orientations(NamedTuple):
    """What the headers of a split's images have shown.

    Attributes:
        oriented: Number of images with an EXIF orientation other than upright.
        sizes: Width and height as read of images whose annotation has them exchanged, by their
            positions.
    """

    oriented: int
    sizes: Mapping[int, tuple[int, int]]


def reader(mode: str) -> Callable[[Path, int, int], torch.Tensor]:
    """The function that reads an image: `read_stored` under `ignore`, otherwise `read_upright`."""
    return read_stored if mode == "ignore" else read_upright


def size_as_read(header: Header, mode: str) -> tuple[int, int]:
    """Width and height of an image as `reader` reads it."""
    return header.stored if mode == "ignore" else header.upright


def check_headers(
    annotations: Sequence[Annotation],
    mode: str = "auto",
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
) -> Orientations:
    """Refuses images that are not as their annotations say, before any of them is decoded.

    Args:
        annotations: Of all images of a split.
        mode: One of `choices.EXIF_MODES`.
        channels: As in `images.read_upright`.
        max_pixels: An image with more is refused.

    Raises:
        UserError: An image cannot be read, has another size than its annotation, other channels or
            too many pixels, or an orientation that `mode` refuses; says so of all of them at once.
    """
    faults = Faults()
    oriented: list[Path] = []
    exchanged: list[int] = []
    sizes: dict[int, tuple[int, int]] = {}
    paths = [a.path.absolute() for a in annotations]
    folder = Path(os.path.commonpath([path.parent for path in paths] or [Path()]))
    headers = read_headers(folder, paths, channels)
    for index, annotation in enumerate(annotations):
        with faults.noted():
            header = headers.header(index)
            if header.orientation != 1:
                oriented.append(annotation.path)
            size = size_as_read(header, mode)
            if _is_exchanged((annotation.width, annotation.height), size, header):
                exchanged.append(index)
                sizes[index] = size
            else:
                check_size(annotation, size)
            refuse_too_many(annotation.path, size, max_pixels)
    names = [annotations[index].path.name for index in exchanged]
    faults.messages[:0] = _refusals(mode, [path.name for path in oriented], names, len(annotations))
    faults.refuse()
    return Orientations(len(oriented), sizes)


def _is_exchanged(stated: tuple[int, int], size: tuple[int, int], header: Header) -> bool:
    """Whether an annotation's size is that of the image the other way round, because of EXIF."""
    return is_turned(header.orientation) and stated != size and stated == size[::-1]


def _refusals(mode: str, oriented: list[str], exchanged: list[str], images: int) -> list[str]:
    """Why the images with an orientation are refused, in a line each; none where they are not."""
    if mode == "refuse" and oriented:
        return [
            f"{len(oriented)} of {images} images have an EXIF orientation ({shorten(oriented, 3)}),"
            f" and {_WHERE} is refuse: rewrite them upright, or set it to auto"
        ]
    if mode == "auto" and exchanged:
        return [
            f"{len(exchanged)} of {images} images have an EXIF orientation that turns them, and an "
            f"annotation with the size of the pixels as stored ({shorten(exchanged, 3)}): set "
            f"{_WHERE} to ignore if their boxes mean the pixels as stored too, or to apply if they "
            "mean the image as viewers show it"
        ]
    if mode == "ignore" and exchanged:
        return [
            f"{len(exchanged)} of {images} images have an annotation with the size of the image as "
            f"their EXIF orientation turns it ({shorten(exchanged, 3)}), and {_WHERE} is ignore: "
            "set it to auto, or correct these annotations"
        ]
    return []


def with_sizes(annotations: list[Annotation], orientations: Orientations) -> list[Annotation]:
    """The annotations with the sizes of the images as they are read."""
    corrected = list(annotations)
    for index, (width, height) in orientations.sizes.items():
        corrected[index] = replace(corrected[index], width=width, height=height)
    return corrected


def check_size(annotation: Annotation, size: tuple[int, int]) -> None:
    """Refuses an image that is not as its annotation says.

    Args:
        annotation: Of the image.
        size: Width and height of the image as it is read.

    Raises:
        UserError: They are not those of the annotation; says which of the two to correct.
    """
    stated = (annotation.width, annotation.height)
    if size == stated:
        return
    header = read_header(annotation.path)
    turned, mend = "", "restore the annotated image, or correct <size> and the boxes"
    if is_turned(header.orientation):
        how = "upright by" if size == header.upright else "as stored, without"
        turned = f", {how} its EXIF orientation {header.orientation},"
    if size == stated[::-1]:
        mend = "width and height are swapped in <size>: correct it, and the boxes if they lie wrong"
        if turned:
            other = "as stored" if size == header.upright else "turned upright"
            mend = f"<size> is that of the pixels {other}: correct it, or set {_WHERE}"
    raise UserError(
        f"{annotation.path}: the image is {size[0]} x {size[1]}{turned} but its annotation says "
        f"{stated[0]} x {stated[1]}: {mend}"
    )
