"""Reads COCO's files: ground truth and results of detection, both of boxes (x, y, width, height).

Format: https://cocodataset.org/#format-data and #format-results.
"""

import json
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np

from tract_det.errors import UserError, shortened
from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.ground_truth import GroundTruth

_WHITESPACE = " \t\n\r"


def read_coco_ground_truth(path: Path) -> GroundTruth:
    """Reads a COCO ground truth file.

    A crowd is a difficult object to VOC's rules. So is what has a true `ignore` or `difficult`,
    keys that VOC's data sets have when they are converted.

    Args:
        path: with the lists `images`, `annotations` and `categories`. A file of detections may call
            an image by its `id` or by its `file_name` without suffix.

    Raises:
        UserError: the file cannot be read, or an entry of a list is malformed, repeated, or names
            an image or a category that is not there.
    """
    text = _read_text(path)
    content = _parse(path, text)
    lists: list[Any] = [content.get(k) for k in _LISTS] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) for entries in lists):
        raise UserError(
            f"{path}: is no COCO ground truth: write an object with {', '.join(_LISTS)}"
        )
    images, annotations, categories = lists
    where = _Where(path, text)
    image_ids = _unique(images, "images", where, _image_problem)
    category_ids = _unique(categories, "categories", where, _category_problem)
    labels = {number: k for k, number in enumerate(sorted(category_ids))}
    by_id = {entry["id"]: entry for entry in categories}
    names = tuple(by_id[number]["name"] for number in sorted(category_ids))
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two categories have the same name: give each its own")
    objects = _objects(annotations, image_ids, labels, where)
    positions: dict[Any, int] = {str(number): k for number, k in image_ids.items()}
    stems = [Path(entry.get("file_name") or str(entry["id"])).stem for entry in images]
    if len(set(stems)) == len(stems):
        positions |= {stem: k for k, stem in enumerate(stems)}
    # An id goes before a name.
    positions |= {str(number): k for number, k in image_ids.items()} | image_ids
    return GroundTruth(tuple(stems), names, objects, positions, labels)


def read_coco_results(path: Path, truth: GroundTruth) -> Detections:
    """Reads a COCO result file of detected boxes.

    Args:
        path: a list of objects with `image_id`, `category_id`, `bbox` and `score`.
        truth: the split that the detections belong to.

    Returns:
        The detections in the order of the file.

    Raises:
        UserError: the file cannot be read, or an entry is malformed, or names an image or a
            category that is not in the split.
    """
    text = _read_text(path)
    entries = _parse(path, text)
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no COCO result file: write a list of detections")

    def problem(entry: Any) -> str:
        return _box_problem(entry, truth.positions, truth.categories) or (
            "" if _is_number(entry.get("score")) else "score is not a finite number"
        )

    try:
        image, labels, boxes = _columns(entries, truth.positions, truth.categories)
        scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
        is_good = scores.ndim == 1 and _are_good(boxes, scores)
    except _MALFORMED:
        is_good = False
    if not is_good:
        _Where(path, text).refuse(entries, "", problem)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(image, boxes, scores, labels)


_LISTS = ("images", "annotations", "categories")
# Of a number: areas and sums of larger ones would not be finite.
_LARGEST = 1e15
# What an entry of any other shape raises when its values are taken.
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError, AttributeError)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): write it again") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: is no JSON ({error.msg}): write it again"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise UserError(f"{path}: cannot be read ({error}): write it again") from None


class _Where:
    """Finds an entry in a file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def refuse(self, entries: list, key: str, problem: Callable[[Any], str]) -> None:
        """Raises an error that names the first entry with a problem.

        Args:
            entries: of the list.
            key: of the list in the file's object; "" = the file is the list.
            problem: what is wrong with an entry; "" = nothing.
        """
        for index, entry in enumerate(entries):
            if text := problem(entry):
                line = self.text.count("\n", 0, self._offset(key, index)) + 1
                list_name = f" of {key}" if key else ""
                raise UserError(f"{self.path}, line {line}: entry {index + 1}{list_name}: {text}")
        raise AssertionError("every entry is well-formed")

    def _offset(self, key: str, index: int) -> int:
        """Where an entry begins. The text is known to be JSON."""
        decode = json.JSONDecoder().raw_decode
        at = self._skip(0)
        if key:
            name = None
            while name != key:
                name, at = decode(self.text, self._skip(at + 1))
                at = self._skip(self._skip(at) + 1)  # behind the colon
                if name != key:
                    at = self._skip(decode(self.text, at)[1])
        at = self._skip(at + 1)
        for _ in range(index):
            at = self._skip(self._skip(decode(self.text, at)[1]) + 1)
        return at

    def _skip(self, at: int) -> int:
        while self.text[at] in _WHITESPACE:
            at += 1
        return at


def _unique(
    entries: list, key: str, where: _Where, problem: Callable[[Any], str]
) -> dict[Any, int]:
    """The entries' positions by their ids."""
    seen: dict[Any, int] = {}

    def any_problem(entry: Any) -> str:
        if text := problem(entry):
            return text
        if entry["id"] in seen:
            return f"id {entry['id']} occurs twice: give each its own"
        seen[entry["id"]] = len(seen)
        return ""

    if any(map(any_problem, entries)):
        seen.clear()
        where.refuse(entries, key, any_problem)
    return seen


def _image_problem(entry: Any) -> str:
    if not isinstance(entry, dict) or type(entry.get("id")) not in (int, str):
        return "has no id: write a whole number"
    if not isinstance(entry.get("file_name", ""), str):
        return "file_name is not a string"
    return ""


def _category_problem(entry: Any) -> str:
    if not isinstance(entry, dict) or type(entry.get("id")) is not int:
        return "has no id: write a whole number"
    return "" if isinstance(entry.get("name"), str) and entry["name"] else "has no name: write one"


def _objects(
    entries: list, image_ids: Mapping[Any, int], labels: Mapping[int, int], where: _Where
) -> Objects:
    def problem(entry: Any) -> str:
        if text := _box_problem(entry, image_ids, labels):
            return text
        if not _is_number(entry.get("area", 0)):
            return "area is not a finite number"
        flags = ("iscrowd", "ignore", "difficult")
        if not all(_is_number(entry.get(flag, 0)) for flag in flags):
            return f"{', '.join(flags)} are not 0 or 1"
        return ""

    try:
        image, label, boxes = _columns(entries, image_ids, labels)
        areas = [entry.get("area", 0) for entry in entries]
        area = np.array(areas, dtype=np.float64).reshape(len(entries))
        flags = [
            [entry.get(flag, 0) for entry in entries] for flag in ("iscrowd", "ignore", "difficult")
        ]
        numbers = np.array(flags, dtype=np.float64).reshape(3, len(entries))
        is_good = _are_good(boxes, area, numbers)
    except _MALFORMED:
        is_good = False
    if not is_good:
        where.refuse(entries, "annotations", problem)
    has_area = np.array(["area" in entry for entry in entries], dtype=bool)
    area = np.where(has_area, area, boxes[:, 2] * boxes[:, 3])
    boxes[:, 2:] += boxes[:, :2]
    crowd, ignore, difficult = numbers != 0
    return Objects(
        image, boxes, label, crowd | ignore | difficult, area, crowd if crowd.any() else None
    )


def _columns(
    entries: list, positions: Mapping[Any, int], labels: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n,), labels (n,) and boxes (n, 4), as in the file."""
    image = np.array([positions[entry["image_id"]] for entry in entries], dtype=np.int64)
    label = np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64)
    return image, label, boxes.reshape(len(entries), 4)


def _box_problem(entry: Any, positions: Mapping[Any, int], labels: Mapping[int, int]) -> str:
    """What is wrong with an entry's image, category or box."""
    if not isinstance(entry, dict):
        return "is not an object"
    for key, known, kinds in (("image_id", positions, (int, str)), ("category_id", labels, (int,))):
        value = entry.get(key)
        if type(value) not in kinds or value not in known:
            return f"{key} {shortened(repr(value))} is not in the ground truth"
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return f"bbox {shortened(repr(box))} is not [x, y, width, height]: write finite numbers"
    return (
        "" if min(box[2:]) >= 0 else f"bbox {shortened(repr(box))} has a negative width or height"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _are_good(boxes: np.ndarray, *others: np.ndarray) -> bool:
    """Whether all are numbers in the sense of `_is_number`, and no size is negative."""
    are_numbers = all((np.abs(values) <= _LARGEST).all() for values in (boxes, *others))
    return are_numbers and bool((boxes[:, 2:] >= 0).all())
