"""Parses a VOC annotation file, with tags in any order and coordinates as floats."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tract_det.data.annotations import LARGEST, Record, is_object
from tract_det.errors import UserError, brief, shortened

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# What tools write for <difficult> instead of a number; makesense.ai has "Unspecified".
FLAGS = {"": False, "false": False, "no": False, "unspecified": False, "true": True, "yes": True}


def parse_annotation(xml: Path) -> Record:
    """Reads the file.

    Raises:
        UserError: The file is not XML or no annotation, or an object has no class or a bad number;
            the message names the file and the object.
    """
    try:
        content = xml.read_bytes()
        tree = ET.XML(content)
    except ET.ParseError as error:
        line = error.position[0]
        mend = "repair it" if _is_utf8(content) else "it is not in UTF-8: save it again as UTF-8"
        raise UserError(f"{xml}, line {line}: not well-formed XML ({error}): {mend}") from None
    except (OSError, LookupError, ValueError) as error:  # unreadable, or an unknown encoding
        raise UserError(f"{xml}: cannot be read ({error}): save it again as UTF-8") from None
    if tree.tag != "annotation":
        raise UserError(
            f"{xml}: starts with <{shortened(tree.tag)}>, not <annotation>: not a VOC annotation; "
            "export it as Pascal VOC, COCO or YOLO, or remove it"
        )
    record = Record(xml, tree.findtext("filename") or "", _size(tree, xml), [], [], [], [], [])
    # Thousands of files are read: what only a message needs is put together for the message.
    for number, element in enumerate(tree.findall("object"), 1):
        name = " ".join((element.findtext("name") or "").split())
        where = partial("{}: object {} ({})".format, xml, number, name or "no name")
        if not name:
            raise UserError(f"{where()}: no <name>: write its class")
        bndbox = element.find("bndbox")
        if bndbox is None:
            raise UserError(f"{where()}: no <bndbox>: add it or remove the object")
        x1, y1, x2, y2 = [_number(bndbox.findtext(tag), tag, where) for tag in _CORNERS]
        difficult = (element.findtext("difficult") or "").strip()
        flag = FLAGS.get(difficult.lower())
        record.classes.append(name)
        box = (x1 - 1, y1 - 1, x2, y2)
        if not is_object(box):
            record.dropped.append(f"{xml.name} object {number} ({name})")
            continue
        record.labelled.append(name)
        record.boxes.append(box)
        record.difficult.append(
            _number(difficult, "difficult", where) != 0 if flag is None else flag
        )
    return record


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _size(tree: ET.Element, xml: Path) -> tuple[int, int] | None:
    """Width and height; None if they are missing or, as some tools write them, 0."""
    size = tree.find("size")
    if size is None:
        return None
    width, height = [
        _number(size.findtext(tag), tag, partial(str, xml)) for tag in ("width", "height")
    ]
    return (int(width), int(height)) if width >= 1 and height >= 1 else None


def _number(text: str | None, tag: str, where: Callable[[], str]) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not abs(value) < LARGEST:  # also of NaN
        shown = "missing" if text is None else brief(text.strip())
        raise UserError(f"{where()}: <{tag}> is {shown}: write a number")
    return value
