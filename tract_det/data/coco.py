"""Reads data sets in COCO's format: a JSON file for each split, and images beside it.

    root/annotations/instances_<split>.json     COCO's own, CVAT's
    root/<split>/_annotations.coco.json         Roboflow's
    root/<split>.json, root/result.json, ...    others, Label Studio's

A box is (x, y, width, height) in pixels counted from 0, edges of pixels: so it is taken as it is.
Crowds are difficult objects: VOC's rules ignore them, and COCO's treat them in their own way. So is
what has a true `difficult` or `ignore`, keys that converters from VOC write.

Format: https://cocodataset.org/#format-data.
"""

import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tract_det.data.annotations import (
    LARGEST,
    Contents,
    DetectionSplit,
    Record,
    build_split,
    is_object,
)
from tract_det.data.faults import Faults
from tract_det.data.files import Listing, Source, is_hidden
from tract_det.errors import UserError, brief, shortened

EXPECTED = "COCO: a JSON file with images, annotations and categories for each split"

_LISTS = ("images", "annotations", "categories")


def find_splits(root: Path) -> dict[str, Source]:
    """The JSON files with annotations of boxes at and below `root`, by the names of their splits.

    Raises:
        UserError: Two of them have the same name.
    """
    files = [root] if root.suffix == ".json" else sorted(root.glob("*.json"))
    files += sorted(root.glob("annotations/*.json")) if root.is_dir() else []
    below = (
        path for path in sorted(root.glob("[!.]*/*.json")) if path.parent.name != "annotations"
    )
    splits: dict[str, Source] = {}
    for path in [*files, *below]:
        if not _is_ground_truth(path):
            continue
        split = _split_name(path, root)
        if split in splits:
            raise UserError(
                f"{splits[split].where} and {path} are both the split {split!r}: move one of them "
                "away"
            )
        base = root.parent if root.suffix == ".json" else root
        folders = (
            path.parent,
            path.parent / "images",
            base / split,
            base / split / "images",
            base / "images" / split,
            base / "images",
            base,
        )
        splits[split] = Source(path, tuple(dict.fromkeys(folders)))
    return splits


def near_miss(root: Path) -> str:
    """A JSON file of the root, or of `annotations`, that lacks what annotations of boxes have."""
    files = sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    return f"{files[0]} has no lists 'images' and 'categories', as COCO's has" if files else ""


def _is_ground_truth(path: Path) -> bool:
    """Whether the file has COCO's lists, and is not of captions, key points or segments."""
    others = r"(captions|person_keypoints|panoptic|stuff|image_info)_"
    if is_hidden(path) or re.match(others, path.name):
        return False
    # Datumaro writes labels_train.json, of whole images, beside instances_train.json.
    boxes = re.sub(r"^labels_", "instances_", path.name)
    if boxes != path.name and path.with_name(boxes).is_file():
        return False
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return all(data.find(f'"{key}"'.encode()) >= 0 for key in ("images", "categories"))
    except (OSError, ValueError):  # unreadable, or empty
        return False


def _split_name(path: Path, root: Path) -> str:
    stem = path.stem.removesuffix(".coco").removeprefix("instances_")
    is_named_by_folder = path.parent not in (root, root / "annotations", root.parent)
    return path.parent.name if is_named_by_folder else stem


def read_file(path: Path) -> DetectionSplit:
    """All of a ground truth file for an evaluation, as COCO's own program takes it.

    Every category is a class, in the order of their ids, though none of its objects is there, and a
    box without an area is an object. No images are needed.

    Raises:
        UserError: The file is malformed, or has no images or categories.
    """
    source = Source(path, (path.parent,))
    images, categories = describe(path.parent, source, need_images=False, keep_all=True)
    for key, entries in (("images", images), ("categories", categories)):
        if not entries:
            raise UserError(f"{path}: its list {key!r} is empty: export it again")
    # Numbers before words, which have no order among each other.
    by_id = sorted(categories, key=lambda key: (isinstance(key, str), str(key).zfill(20)))
    names = tuple(dict.fromkeys(categories[key] for key in by_id))
    split = build_split(path.stem, path, images, names, need_images=False)
    return replace(split, origin=f"COCO, {path}", categories=categories)


def describe(
    root: Path,
    source: Source,
    *,
    need_images: bool,
    upright: bool = True,
    keep_all: bool = False,
) -> Contents:
    """Id, file and record of every image in a JSON file, in its order, and its categories.

    Args:
        root: Of the data, for messages.
        source: From `find_splits`.
        need_images: Whether every image must be there.
        upright: Not needed: no image is opened.
        keep_all: Whether boxes that are no objects (`is_object`) are kept, as COCO's own program
            does. A negative width or height is refused then.

    Raises:
        UserError: The file is malformed, or an image is missing; says what is wrong with all its
            entries at once.
    """
    content = _read(source.where)
    faults = Faults()
    names = _category_names(source.where, content["categories"], faults)
    entries = dict(_images(source.where, content["images"], faults, need_images))
    faults.refuse()
    records = {
        number: _record(_where(source.where, entry), entry) for number, entry in entries.items()
    }
    for annotation in content["annotations"]:
        with faults.noted():
            _add(source.where, annotation, names, records, keep_all)
    faults.refuse()
    find = _Finder(source, need_images)
    paths = []
    for number, record in records.items():
        with faults.noted():
            paths.append(find.path(record, number))
    faults.refuse()
    ids = _ids(record.filename for record in records.values())
    return Contents(list(zip(ids, paths, records.values(), strict=True)), names)


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


def _category_names(path: Path, categories: list[Any], faults: Faults) -> dict[Any, str]:
    """Names of the categories by their ids, which need not be consecutive."""
    names: dict[Any, str] = {}
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


def _images(
    path: Path, images: list[Any], faults: Faults, need_images: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    ids, files = set(), set()
    for entry in images:
        with faults.noted():
            if not isinstance(entry, dict) or not _is_id(entry.get("id")):
                raise UserError(f"{path}: image {brief(entry)} has no id: write one")
            file = entry.get("file_name", None if need_images else str(entry["id"]))
            if not isinstance(file, str) or not file.strip():
                raise UserError(f"{path}: image {brief(entry['id'])} has no file_name: write it")
            if PurePosixPath(_with_slashes(file)).name in ("", ".."):
                raise UserError(f"{path}: file_name {brief(file)} names no file: correct it")
            if entry["id"] in ids:
                raise UserError(f"{path}: image id {entry['id']} occurs twice: give each its own")
            if file in files:
                raise UserError(f"{path}: file_name {brief(file)} occurs twice: remove one of them")
            ids.add(entry["id"])
            files.add(file)
            yield entry["id"], entry | {"file_name": file}


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _with_slashes(file: str) -> str:
    """A file name that may be written with Windows' separators."""
    return file.strip().replace("\\", "/")


def _where(path: Path, entry: Mapping[str, Any]) -> str:
    return f"{path}: image {entry['id']} ({shortened(entry['file_name'], 200)})"


def _record(where: str, entry: Mapping[str, Any]) -> Record:
    file, size, number = entry["file_name"], _size(entry), entry["id"]
    return Record(where, file, size, [], [], [], [], [], areas=[], crowd=[], number=number)


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height; None if they are missing or, as some tools write them, 0."""
    sides = [entry.get("width"), entry.get("height")]
    if not all(isinstance(side, int | float) and 1 <= side < LARGEST for side in sides):
        return None
    return int(sides[0]), int(sides[1])  # type: ignore[arg-type]


def _add(
    path: Path,
    annotation: Any,
    names: Mapping[Any, str],
    records: Mapping[Any, Record],
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
    crowd, *others = (_flag(path, annotation, key) for key in ("iscrowd", "difficult", "ignore"))
    record.difficult.append(crowd or any(others))
    assert record.areas is not None and record.crowd is not None
    record.areas.append(_area(path, annotation))
    record.crowd.append(crowd)


def _flag(path: Path, annotation: Mapping[str, Any], key: str) -> bool:
    value = annotation.get(key)
    if not isinstance(value, int | float | None):
        raise UserError(f"{_place(path, annotation)}: {key} is {brief(value)}: write 0 or 1")
    return bool(value)


def _area(path: Path, annotation: Mapping[str, Any]) -> float:
    """Of the object's outline, in square pixels; NaN where the file does not say."""
    area = annotation.get("area")
    if area is None:
        return math.nan
    if not _are_numbers([area]):
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


def _are_numbers(values: list[Any]) -> bool:
    return all(
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < LARGEST  # neither infinite nor NaN
        for value in values
    )


class _Finder:
    """Finds the images of one JSON file: all of them in one of the folders that are usual."""

    def __init__(self, source: Source, need_images: bool) -> None:
        self._source, self._need_images = source, need_images
        self._listing = Listing()
        self._folder: Path | None = None

    def path(self, record: Record, number: Any) -> Path:
        """The file that `file_name` names; it may be a path on the annotator's machine."""
        file = PurePosixPath(_with_slashes(record.filename))
        names = [Path(file)] if not file.is_absolute() else []
        names.append(Path(file.name))
        folders = self._source.folders if self._folder is None else (self._folder,)
        for name in names:
            for folder in folders:
                if self._listing.has(folder / name):
                    self._folder = folder
                    return folder / name
        if self._need_images:
            places = ", ".join(str(folder) for folder in folders)
            raise UserError(
                f"{record.source}: the file is missing in {places}: add it, correct file_name, or "
                "remove the image"
            )
        return folders[0] / names[0]


def _ids(files: Iterator[str]) -> list[str]:
    """Ids of images: their file names without suffix, unless two would have the same."""
    names = [_with_slashes(file) for file in files]
    names = [
        PurePosixPath(name).name if name.startswith("/") or ".." in name or ":" in name else name
        for name in names
    ]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    return stems if len(set(stems)) == len(stems) else names
