"""Parses a label file of YOLO's format.

A line is `class x y width height`: the class's number and the box's centre and size as fractions of
the image's. A line with three points or more, `class x1 y1 x2 y2 x3 y3 ...`, is a polygon, whose
bounding box is taken.

Numbers are written with few digits. An edge that is a whole pixel within what the digits leave open
is taken to be that pixel: so boxes that were whole pixels come back as they were.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from tract_det.data.annotations import Record, is_object
from tract_det.data.files import read_text
from tract_det.errors import UserError, brief

_SLACK = 1e-3  # by which a fraction may lie outside 0..1: exporters round
_SNAP = 0.05  # pixels: no edge is moved by more


def parse_labels(
    path: Path, image: Path, size: tuple[int, int], class_names: Mapping[int, str]
) -> Record:
    """Reads a label file; one that is not there has no objects.

    Args:
        path: The file.
        image: Its image.
        size: Width and height of the image, pixels.
        class_names: By number.

    Raises:
        UserError: A line is malformed; the message names it.
    """
    record = Record(path, image.name, size, [], [], [], [], [])
    text = read_text(path) if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        name = _class_name(words[0], class_names, where)
        x1, y1, x2, y2 = _edges(words[1:], where)
        width, height = size
        decimals = max(
            len(word.partition(".")[2]) if "e" not in word.lower() else 16 for word in words[1:]
        )
        box = (
            _snapped(x1 * width, decimals, width),
            _snapped(y1 * height, decimals, height),
            _snapped(x2 * width, decimals, width),
            _snapped(y2 * height, decimals, height),
        )
        record.classes.append(name)
        if not is_object(box):
            record.dropped.append(f"{path.name} line {number} ({name})")
            continue
        record.labelled.append(name)
        record.boxes.append(box)
        record.difficult.append(False)
    return record


def _class_name(word: str, class_names: Mapping[int, str], where: str) -> str:
    try:
        number = float(word)  # some exporters write 0.0
        return class_names[int(number) if number.is_integer() else -1]
    except (ValueError, OverflowError, KeyError):
        raise UserError(
            f"{where}: class {brief(word)} is none of the {len(class_names)} classes "
            f"({min(class_names)} to {max(class_names)}): correct it, or the list of classes"
        ) from None


def _edges(words: list[str], where: str) -> tuple[float, float, float, float]:
    """Edges of a line's box or polygon, as fractions of the image."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{where}: has something that is no number: write class x y width height")
    if len(numbers) == 4:
        x, y, width, height = numbers
        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[::2], numbers[1::2]
        edges = (min(xs), min(ys), max(xs), max(ys))
    else:
        raise UserError(
            f"{where}: has {len(numbers)} numbers behind the class: a box has 4 (x y width "
            "height), a polygon 6 or more, two for each point"
        )
    if min(numbers) < -_SLACK or max(numbers) > 1 + _SLACK:
        raise UserError(
            f"{where}: has {max(numbers, key=abs):g}: x, y, width and height are fractions of the "
            "image, 0 to 1; divide pixels by its size"
        )
    return edges


def _snapped(edge: float, decimals: int, size: int) -> float:
    """An edge, or the whole pixel that it may be by the digits that were written.

    Args:
        edge: In pixels.
        decimals: Digits behind the point of its centre and width.
        size: Of the image in this direction, pixels.
    """
    # A centre is off by half a unit of its last digit, half a width by a quarter.
    tolerance = min(_SNAP, max(0.75 * 10.0**-decimals, 1e-12) * size)
    whole = round(edge)
    return float(whole) if abs(edge - whole) <= tolerance else edge
