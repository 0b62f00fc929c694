"""Reads COCO's result files of detected boxes (x, y, width, height).

Format: https://cocodataset.org/#format-results. The number of an image or a class may belong to
another one in other data. So `tract-det detect` writes names beside the numbers, as `image_name`
and `category_name`; where an entry has a name, the name counts.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tract_det.errors import UserError, shortened
from tract_det.evaluation.boxes import Detections
from tract_det.evaluation.detection_files import read_text
from tract_det.evaluation.ground_truth import GroundTruth, WithOthers

_SHOWN = 5  # examples in a message
_WHITESPACE = " \t\n\r"
# Of a number: areas and sums of larger ones would not be finite.
_LARGEST = 1e15
# What an entry of any other shape raises when its values are taken.
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError, AttributeError)


def read_coco_results(path: Path, truth: GroundTruth, *, others: bool = False) -> Detections:
    """Reads a COCO result file of detected boxes.

    Args:
        path: a list of objects with `image_id`, `category_id`, `bbox` and `score`.
        truth: the split that the detections belong to.
        others: whether images may be there that are not in the split.

    Returns:
        The detections in the order of the file. Those of classes that are none of the split's are
        left out, and a warning names the classes. Images that are not in the split have the
        position -1.

    Raises:
        UserError: the file cannot be read, or an entry is malformed, or names an image or a
            category that is not in the split, or the split does not number its classes.
    """
    if others:
        positions, numbers = WithOthers(truth.positions), WithOthers(truth.numbers)
        truth = replace(truth, positions=positions, numbers=numbers)
    text = read_text(path)
    entries = _parse(path, text)
    if not isinstance(entries, list):
        raise UserError(f"{path}: is no COCO result file: write a list of detections")
    try:
        image, names, boxes, scores = _columns(entries, truth)
    except _MALFORMED:
        _refuse(path, text, entries, truth)
    labels = {name: k for k, name in enumerate(truth.class_names)}
    left_out = set(names) - set(labels)
    if names and left_out == set(names):
        raise UserError(
            f"{path}: none of its classes ({_some(sorted(left_out))}) is one of the split's "
            f"({_some(truth.class_names)}): evaluate the data that these detections belong to"
        )
    if left_out:
        warnings.warn(
            f"{path}: left out are detections of classes that this split does not have: "
            f"{_some(sorted(left_out))}",
            stacklevel=2,
        )
    label = np.array([labels.get(name, -1) for name in names], dtype=np.int64)
    boxes[:, 2:] += boxes[:, :2]
    kept = label >= 0
    return Detections(image[kept], boxes[kept], scores[kept], label[kept])


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: is no JSON ({error.msg}): write it again"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise UserError(f"{path}: cannot be read ({error}): write it again") from None


def _columns(
    entries: Sequence[Any], truth: GroundTruth
) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
    """Images (n,), names of classes, boxes (n, 4) as in the file, and scores (n,).

    Raises:
        Any of _MALFORMED: an entry has a `_problem`.
    """
    ids = [entry[_key(entry, "image_name", "image_id")] for entry in entries]
    classes = [entry[_key(entry, "category_name", "category_id")] for entry in entries]
    lists, values = [entry["bbox"] for entry in entries], [entry["score"] for entry in entries]
    _check_types(ids, int, str)
    _check_types(classes, int, str)
    _check_types(lists, list)
    _check_types((value for box in lists for value in box), int, float)
    _check_types(values, int, float)
    _check_types((entry["image_name"] for entry in entries if "image_name" in entry), str)
    image = [
        (truth.positions if "image_name" in entry else truth.numbers)[image_id]
        for entry, image_id in zip(entries, ids, strict=True)
    ]
    names = [
        name if "category_name" in entry else truth.categories[name]
        for entry, name in zip(entries, classes, strict=True)
    ]
    _check_types(names, str)
    boxes = np.array([box for box in lists if len(box) == 4], dtype=np.float64).reshape(-1, 4)
    scores = np.array(values, dtype=np.float64)
    if len(boxes) < len(entries) or not _are_good(boxes, scores):
        raise ValueError
    return np.array(image, dtype=np.int64), names, boxes, scores


def _key(entry: Mapping[str, Any], name: str, number: str) -> str:
    """The key that says which image or class it is: its name, where the entry has it."""
    return name if name in entry else number


def _check_types(values: Iterable[Any], *types: type) -> None:
    """Refuses values of other types; a bool is no int here, and JSON has no subclasses."""
    if not set(map(type, values)) <= set(types):
        raise TypeError


def _are_good(boxes: np.ndarray, scores: np.ndarray) -> bool:
    """Whether all are numbers in the sense of `_is_number`, and no size is negative."""
    are_numbers = all((np.abs(values) <= _LARGEST).all() for values in (boxes, scores))
    return are_numbers and bool((boxes[:, 2:] >= 0).all())


def _refuse(path: Path, text: str, entries: Sequence[Any], truth: GroundTruth) -> NoReturn:
    """Raises an error that names the first entry with a problem, and its line."""
    for index, entry in enumerate(entries):
        if problem := _problem(entry, truth):
            line = text.count("\n", 0, _offset(text, index)) + 1
            raise UserError(f"{path}, line {line}: entry {index + 1}: {problem}")
    raise AssertionError("every entry is well-formed")


def _problem(entry: Any, truth: GroundTruth) -> str:
    """What is wrong with an entry; "" = nothing."""
    if not isinstance(entry, dict):
        return "is not an object: write image_id, category_id, bbox and score"
    keys = (
        _key(entry, "image_name", "image_id"),
        _key(entry, "category_name", "category_id"),
        *("bbox", "score"),
    )
    if missing := [key for key in keys if key not in entry]:
        return f"has no {' and no '.join(missing)}: write image_id, category_id, bbox and score"
    box, score = entry["bbox"], entry["score"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return f"bbox {shortened(repr(box))} is not [x, y, width, height]: write finite numbers"
    if min(box[2:]) < 0:
        return (
            f"bbox {shortened(repr(box))} has a negative width or height: write [x, y, width, "
            "height]"
        )
    if not _is_number(score):
        return f"score {shortened(repr(score))} is not a finite number: write one"
    return _image_problem(entry, truth) or _category_problem(entry, truth)


def _image_problem(entry: Mapping[str, Any], truth: GroundTruth) -> str:
    key = _key(entry, "image_name", "image_id")
    known: Mapping[Any, int] = truth.positions if key == "image_name" else truth.numbers
    if type(entry[key]) not in ((int, str) if key == "image_id" else (str,)):
        return f"{key} {shortened(repr(entry[key]))} is not what an image is called: write that"
    with suppress(KeyError):
        known[entry[key]]
        return ""
    # What is of the same type as the id is the better example.
    alike = [repr(image_id) for image_id in known if type(image_id) is type(entry[key])]
    examples = _some(alike or [repr(image_id) for image_id in known])
    return (
        f"{key} {shortened(repr(entry[key]))} is not in the split, whose images are {examples}: "
        "evaluate the split that these detections belong to, or leave out others by "
        "--ignore-other-images"
    )


def _category_problem(entry: Mapping[str, Any], truth: GroundTruth) -> str:
    if "category_name" in entry:
        name = entry["category_name"]
        return (
            ""
            if isinstance(name, str)
            else f"category_name {shortened(repr(name))} is not a name: write that of the class"
        )
    number = entry["category_id"]
    if type(number) in (int, str) and number in truth.categories:
        return ""
    if not truth.categories:
        return (
            "the data do not say which class has which category_id: give --classes, in the order "
            "of the numbers from 1"
        )
    known = _some([f"{key!r} ({name})" for key, name in truth.categories.items()])
    return f"category_id {shortened(repr(number))} is none of the data's: {known}"


def _some(texts: Sequence[str]) -> str:
    """The first of them, each at a length that can be read."""
    more = ", ..." if len(texts) > _SHOWN else ""
    return ", ".join(shortened(text) for text in texts[:_SHOWN]) + more


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _offset(text: str, index: int) -> int:
    """Where an entry of a list begins. The text is known to be JSON."""
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, _skip(text, 0) + 1)
    for _ in range(index):
        at = _skip(text, _skip(text, decode(text, at)[1]) + 1)
    return at


def _skip(text: str, at: int) -> int:
    while text[at] in _WHITESPACE:
        at += 1
    return at
