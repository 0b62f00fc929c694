"""Reads what a JSON file in COCO's format says: categories, images and objects.

Format: https://cocodataset.org/#format-data.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tract_det.data.annotations import LARGEST, Record, is_object
from tract_det.data.faults import Faults
from tract_det.data.voc_xml import FLAGS
from tract_det.errors import UserError, brief, shortened

_LISTS = ("images", "annotations", "categories")
_NUMBERS = (int, float)

Categories = dict[int | str, str]


def read_json(path: Path, *, keep_all: bool = False) -> tuple[Categories, dict[int | str, Record]]:
    """Names of the categories, and records of the images, both by their ids.

    Args:
        path: The file.
        keep_all: Whether it is read as COCO's own program does: boxes that are no objects
            (`is_object`) are kept, but for a negative width or height, and file names are not
            needed.

    Raises:
        UserError: The file is malformed; says what is wrong with all its entries at once.
    """
    content = _read(path)
    names = _category_names(path, content["categories"])
    records = _images(path, content["images"], keep_all)
    faults = Faults()
    for annotation in content["annotations"]:
        try:
            _add(path, annotation, names, records, keep_all)
        except UserError as error:
            faults.note(error)
    faults.refuse()
    return names, records


def with_slashes(file: str) -> str:
    """A file name that may be written with Windows' separators."""
    return file.strip().replace("\\", "/")


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: is no JSON ({error.msg}): export it again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): export it again") from None
    if not isinstance(content, dict):
        content = {}
    for key in _LISTS:
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list {key!r}, which COCO's format has")
    return content


def _category_names(path: Path, categories: list[Any]) -> Categories:
    """Names of the categories by their ids, which need not be consecutive."""
    names: Categories = {}
    faults = Faults()
    for entry in categories:
        with faults.noted():
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name.strip() or not _is_id(entry.get("id")):
                raise UserError(f"{path}: category {brief(entry)} has no id and name: write them")
            if entry["id"] in names:
                raise UserError(
                    f"{path}: category id {entry['id']} occurs twice: give each its own"
                )
            names[entry["id"]] = " ".join(name.split())
    faults.refuse()
    return names


def _images(path: Path, images: list[Any], keep_all: bool) -> dict[int | str, Record]:
    """A record without objects for every image, by its id."""
    records: dict[int | str, Record] = {}
    files, faults = set(), Faults()
    for entry in images:
        with faults.noted():
            if not isinstance(entry, dict) or not _is_id(entry.get("id")):
                raise UserError(f"{path}: image {brief(entry)} has no id: write one")
            number = entry["id"]
            if number in records:
                raise UserError(f"{path}: image id {number} occurs twice: give each its own")
            file = _file(path, entry, keep_all)
            if file in files and not keep_all:
                raise UserError(f"{path}: file_name {brief(file)} occurs twice: remove one of them")
            files.add(file)
            where = f"{path}: image {number} ({shortened(file, 200)})"
            size = _size(entry)
            records[number] = Record(where, file, size, [], [], [], [], [], [], [], number)
    faults.refuse()
    return records


def _file(path: Path, entry: Mapping[str, Any], keep_all: bool) -> str:
    file = entry.get("file_name")
    if not isinstance(file, str) or not file.strip():
        if keep_all:
            return str(entry["id"])
        raise UserError(f"{path}: image {brief(entry['id'])} has no file_name: write it")
    if not keep_all and PurePosixPath(with_slashes(file)).name in ("", ".."):
        raise UserError(f"{path}: file_name {brief(file)} names no file: correct it")
    return file


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height; None if they are missing or, as some tools write them, 0."""
    sides = [entry.get("width"), entry.get("height")]
    if not all(isinstance(side, int | float) and 1 <= side < LARGEST for side in sides):
        return None
    return int(sides[0]), int(sides[1])  # type: ignore[arg-type]


def _add(
    path: Path,
    annotation: Any,
    names: Categories,
    records: Mapping[int | str, Record],
    keep_all: bool,
) -> None:
    """Adds an object to the record of its image."""
    if not isinstance(annotation, dict):
        raise UserError(f"{path}: annotation {brief(annotation)} is no object: export it again")
    try:
        record = records[annotation["image_id"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{_place(path, annotation)}: {_stray(annotation, 'image', records, 'correct it')}"
        ) from None
    try:
        name = names[annotation["category_id"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{_place(path, annotation)}: "
            f"{_stray(annotation, 'category', names, 'correct it, or add the category')}"
        ) from None
    x, y, width, height = _box(path, annotation)
    record.classes.append(name)
    box = (x, y, x + width, y + height)
    if keep_all and min(width, height) < 0:
        raise UserError(
            f"{_place(path, annotation)}: bbox is {brief(annotation.get('bbox'))}, with a negative "
            "width or height: write [x, y, width, height]"
        )
    if not (keep_all or is_object(box)):
        number = brief(annotation.get("id"))
        record.dropped.append(f"annotation {number} ({name}) of {shortened(record.filename)}")
        return
    record.labelled.append(name)
    record.boxes.append(box)
    crowd = _flag(path, annotation, "iscrowd")
    is_ignored = _flag(path, annotation, "difficult") or _flag(path, annotation, "ignore")
    record.difficult.append(crowd or is_ignored)
    assert record.areas is not None and record.crowd is not None
    record.areas.append(_area(path, annotation))
    record.crowd.append(crowd)


def _flag(path: Path, annotation: Mapping[str, Any], key: str) -> bool:
    """A number, or a word as VOC's files have it; missing, null and an empty text mean no."""
    value = annotation.get(key)
    if not value or type(value) in (bool, *_NUMBERS):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else None
    if word in ("0", "1"):
        return word == "1"
    if word not in FLAGS:
        raise UserError(f"{_place(path, annotation)}: {key} is {brief(value)}: write 0 or 1")
    return FLAGS[word]


def _area(path: Path, annotation: Mapping[str, Any]) -> float:
    """Of the object's outline, in square pixels; NaN where the file does not say."""
    area = annotation.get("area")
    if isinstance(area, str) and re.fullmatch(r"\d+(\.\d*)?", area):
        area = float(area)
    if area in (None, "") or (isinstance(area, float) and math.isnan(area)):
        return math.nan
    if not _are_numbers([area], LARGEST**2):
        raise UserError(f"{_place(path, annotation)}: area is {brief(area)}: write a number")
    return float(area)


def _stray(annotation: Mapping[str, Any], kind: str, ids: Mapping[Any, Any], mend: str) -> str:
    """Says what is wrong with an annotation's reference that is none of the ids."""
    value = annotation.get(f"{kind}_id")
    if isinstance(value, int) and str(value) in ids:
        return f"{kind}_id {value} is a number, the {kind}'s id is text: write both alike"
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value) and int(value) in ids:
        return f"{kind}_id {value!r} is text, the {kind}'s id is a number: write both alike"
    return f"{kind}_id {brief(value)} is no {kind}'s id: {mend}"


def _place(path: Path, annotation: Mapping[str, Any]) -> str:
    number = brief(annotation["id"]) if "id" in annotation else "without id"
    return f"{path}: annotation {number}"


def _box(path: Path, annotation: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """x, y, width and height; of the polygons where there is no box."""
    box = annotation.get("bbox")
    if not box and isinstance(annotation.get("segmentation"), list):
        numbers = [part for part in annotation["segmentation"] if isinstance(part, list)]
        if numbers and all(_are_numbers(part) and len(part) >= 6 for part in numbers):
            xs = [x for part in numbers for x in part[::2]]
            ys = [y for part in numbers for y in part[1::2]]
            return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        raise UserError(
            f"{_place(path, annotation)}: bbox is {brief(box)}: write [x, y, width, height], in "
            "pixels"
        )
    x, y, width, height = box
    return x, y, width, height


def _are_numbers(values: list[Any], largest: float = LARGEST) -> bool:
    """Whether all are numbers, neither infinite nor NaN; a bool is none."""
    return all(type(value) in _NUMBERS and -largest < value < largest for value in values)
