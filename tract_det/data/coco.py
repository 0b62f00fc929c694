"""Reads data sets in COCO's format: a JSON file for each split, and images beside it.

    root/annotations/instances_<split>.json     COCO's own, CVAT's
    root/<split>/_annotations.coco.json         Roboflow's
    root/<split>.json, root/result.json, ...    others, Label Studio's

A box is (x, y, width, height) in pixels counted from 0, edges of pixels: so it is taken as it is.
Crowds are difficult objects: VOC's rules ignore them, and COCO's treat them in their own way. So is
what has a true `difficult` or `ignore`, keys that converters from VOC write.

Format: https://cocodataset.org/#format-data.
"""

import mmap
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from tract_det.data.annotations import Contents, DetectionSplit, Record, build_split
from tract_det.data.coco_json import read_json, with_slashes
from tract_det.data.faults import Faults
from tract_det.data.files import Listing, Source, is_hidden
from tract_det.errors import UserError, shortened

EXPECTED = "COCO: a JSON file with images, annotations and categories for each split"


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

    Images and categories are in the order of their ids, every category is a class, though none of
    its objects is there, and a box without an area is an object. No images are needed.

    Raises:
        UserError: The file is malformed, or has no images or categories.
    """
    categories, records = read_json(path, keep_all=True)
    for key, entries in (("images", records), ("categories", categories)):
        if not entries:
            raise UserError(f"{path}: its list {key!r} is empty: export it again")
    repeated = sorted(name for name, count in Counter(categories.values()).items() if count > 1)
    if repeated:
        warnings.warn(
            f"{path}: several categories are called {shortened(repeated[0])!r}: they are one class "
            "here, as in a training",
            stacklevel=2,
        )
    records = {number: records[number] for number in sorted(records, key=_number_first)}
    images = [
        (image_id, path.parent / record.filename, record._replace(size=record.size or (0, 0)))
        for image_id, record in zip(_ids(records), records.values(), strict=True)
    ]
    names = tuple(dict.fromkeys(categories[key] for key in sorted(categories, key=_number_first)))
    split = build_split(path.stem, path, images, names, need_images=False)
    return replace(split, origin=f"COCO, {path}", categories=categories)


def _number_first(number: int | str) -> tuple[bool, int, str]:
    """Orders ids: numbers, then texts."""
    return (True, 0, number) if isinstance(number, str) else (False, number, "")


def describe(root: Path, source: Source, *, need_images: bool, upright: bool = True) -> Contents:
    """Id, file and record of every image in a JSON file, in its order, and its categories.

    Args:
        root: Of the data, for messages.
        source: From `find_splits`.
        need_images: Whether every image must be there.
        upright: Not needed: no image is opened.

    Raises:
        UserError: The file is malformed, or an image is missing; says what is wrong with all its
            entries at once.
    """
    categories, records = read_json(source.where)
    find, faults = _Finder(source, need_images), Faults()
    paths = []
    for record in records.values():
        with faults.noted():
            paths.append(find.path(record))
    faults.refuse()
    return Contents(list(zip(_ids(records), paths, records.values(), strict=True)), categories)


class _Finder:
    """Finds the images of one JSON file: all of them in one of the folders that are usual."""

    def __init__(self, source: Source, need_images: bool) -> None:
        self._source, self._need_images = source, need_images
        self._listing = Listing()
        self._folder: Path | None = None

    def path(self, record: Record) -> Path:
        """The file that `file_name` names; it may be a path on the annotator's machine."""
        file = PurePosixPath(with_slashes(record.filename))
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


def _ids(records: Mapping[int | str, Record]) -> list[str]:
    """Ids of images: their file names without suffix, unless two would have the same."""
    files = [with_slashes(record.filename) for record in records.values()]
    names = [
        PurePosixPath(name).name if name.startswith("/") or ".." in name or ":" in name else name
        for name in files
    ]
    plain = [str(PurePosixPath(name)) for name in names]
    stems = [re.sub(r"(?<=[^/])\.[^./]+$", "", name) for name in plain]
    for ids in (stems, names, files):
        if len(set(ids)) == len(ids):
            return ids
    return [f"{file} ({number!r})" for file, number in zip(files, records, strict=True)]
