"""Reads the named splits of a data set, in whatever format lies in its folder.

    format  recognised by                                           splits
    VOC     Annotations/ with ImageSets/Main/                       the lists in ImageSets/Main
    VOC     XML files beside images or in Annotations/              folders, or held out
    COCO    JSON files with images and annotations                  one a file, or held out
    YOLO    data.yaml; classes.txt or obj.names with labels         entries, folders, held out

Without a class list, the classes are the sorted classes of the objects, in every format: so the
same pictures have the same labels in all of them.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tract_det.data import coco, voc, voc_folders, yolo
from tract_det.data.annotations import (
    DetectionSplit,
    Record,
    build_split,
    check_unique,
    relabel,
    shorten,
)
from tract_det.data.files import Source, folders_in
from tract_det.data.shapes import SHAPES_CLASSES, ensure_shapes
from tract_det.errors import UserError

_READERS: dict[str, ModuleType] = {"voc": voc_folders, "coco": coco, "yolo": yolo}
_TITLES = {"coco": "COCO", "yolo": "YOLO", "voc": "VOC"}
# Names of the two parts of a data set that has no splits of its own.
_TRAINING = ("train", "trainval")
_HELD_OUT = ("val", "valid", "test")
# Names that people give to one split, however they are capitalised.
_VALIDATION = ("val", "valid", "validation")
_LOOKED_AT = 50  # folders of a level below one that holds no data set


class Holdout(NamedTuple):
    """What is held out of a data set that has no splits.

    Attributes:
        fraction: Of the images, 0 to 1; 0 = such a data set is refused.
        seed: Of the draw.
    """

    fraction: float = 0.0
    seed: int = 0


_NOTHING = Holdout()


def read_dataset(
    names: Sequence[str],
    root: Path | None,
    class_names: Sequence[str] | None,
    *,
    format: str = "auto",
    holdout: Holdout = _NOTHING,
    need_images: bool = True,
    upright: bool = True,
) -> DetectionSplit:
    """Reads and joins the named splits.

    Args:
        names: `voc_<year>_<split>` for a PASCAL VOC devkit, `shapes_train` and `shapes_test` for
            the drawn shapes, any other name for the split of that name in the data at `root`.
        root: Folder of the data, or of the devkits; None: devkits under $DETECTRON2_DATASETS or
            ./datasets.
        class_names: Overrides the class list; None or empty: VOC_CLASSES, SHAPES_CLASSES, or for
            other data the sorted classes of all objects in the named splits.
        format: Of the data at `root`: voc, coco, yolo, or auto for what lies there.
        holdout: Makes the splits train and test (or val, or valid) of data without splits.
        need_images: Whether every image must be there.
        upright: Whether sizes that no annotation states, and YOLO's boxes, are those of the images
            turned upright by their EXIF orientation.

    Raises:
        UserError: Something is missing or malformed, the message names the file; there are no
            names; a name of its own without root; an image id occurs twice; the splits have
            different class lists.
    """
    if not names:
        raise UserError("no data set is named: name at least one split")
    root = Path(root).expanduser() if root else None
    splits: list[DetectionSplit] = []
    fixed_lists: set[tuple[str, ...]] = set()
    for name in names:
        located = _locate(name, root)
        if located is None:
            assert root is not None
            options = (class_names, format, holdout, need_images, upright)
            splits.append(_read_split(root, name, *options))
            continue
        folder, split_name, fixed_classes = located
        classes = class_names or fixed_classes
        splits.append(
            voc.read_split(folder, split_name, classes, need_images=need_images, upright=upright)
        )
        if not class_names:
            fixed_lists.add(fixed_classes)
    all_classes = tuple(sorted({c for split in splits for c in split.class_names}))
    joined = tuple(class_names) if class_names else next(iter(fixed_lists), all_classes)
    for name, split in zip(names, splits, strict=True):
        if fixed_lists and split.class_names != joined:
            raise UserError(
                f"data sets {' and '.join(names)} have different classes ({name}: "
                f"{', '.join(split.class_names)}): use one of them, or set DATASETS.CLASSES"
            )
    annotations = [a for split in splits for a in relabel(split, joined)]
    check_unique([a.image_id for a in annotations], f"data sets {' + '.join(names)}")
    return DetectionSplit(
        "+".join(names),
        joined,
        annotations,
        sum(split.dropped for split in splits),
        origin="; ".join(split.origin for split in splits),
        categories=splits[0].categories if len(splits) == 1 else {},
    )


def splits_of(root: Path, format: str = "auto") -> list[str]:
    """Names of the splits of the data at `root`; [""] where they have none.

    Raises:
        UserError: nothing there is known.
    """
    root = Path(root).expanduser()
    if format in ("auto", "voc") and voc.is_tree(root):
        return voc.split_names(root)
    _, sources = _sources(root, format)
    return list(sources)


def read_whole(
    root: Path,
    name: str,
    class_names: Sequence[str] | None,
    format: str = "auto",
    upright: bool = True,
) -> DetectionSplit:
    """One of the splits that `splits_of` names, whose name is "all" where data have none.

    Raises:
        UserError: As `read_dataset`.
    """
    root = Path(root).expanduser()
    if name:
        return _read_split(root, name, class_names, format, _NOTHING, True, upright)
    format, sources = _sources(root, format)
    source = sources[name]
    contents = _READERS[format].describe(root, source, need_images=True, upright=upright)
    split = build_split("all", source.where, contents.images, class_names, upright=upright)
    origin = f"{_TITLES[format]}, {source.where}"
    return replace(split, origin=origin, categories=contents.categories)


def _locate(name: str, root: Path | None) -> tuple[Path, str, tuple[str, ...]] | None:
    """Folder, split name and class list of a data set that is known by name; None: another."""
    if match := re.fullmatch(r"voc_(\d{4})_(\w+)", name):
        devkits = root or Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
        return voc.find_devkit(devkits, int(match[1])), match[2], voc.VOC_CLASSES
    if name in ("shapes_train", "shapes_test"):
        return ensure_shapes(), name.removeprefix("shapes_"), SHAPES_CLASSES
    if root is None:
        raise UserError(
            f"data set {name!r}: set DATASETS.ROOT to the folder that holds its images and "
            "annotations"
        )
    return None


def _read_split(
    root: Path,
    name: str,
    class_names: Sequence[str] | None,
    format: str,
    holdout: Holdout,
    need_images: bool,
    upright: bool = True,
) -> DetectionSplit:
    """One split of the data at `root`."""
    if not root.exists():
        raise UserError(f"{root}: there is no such folder: correct DATASETS.ROOT")
    if format in ("auto", "voc") and voc.is_tree(root):
        return voc.read_split(root, name, class_names, need_images=need_images, upright=upright)
    format, sources = _sources(root, format)
    source, part = _choose(root, name, sources, holdout)
    images, categories = _READERS[format].describe(
        root, source, need_images=need_images, upright=upright
    )
    origin = f"{_TITLES[format]}, {source.where}"
    if part:
        images = _held_out(images, holdout) if part == "held out" else _kept(images, holdout)
        origin += f", of which {holdout.fraction:g} of the images are held out; these are {part}"
    if not images:
        raise UserError(f"{source.where}: there is no image in split {name!r}")
    split = build_split(
        name, source.where, images, class_names, need_images=need_images, upright=upright
    )
    return replace(split, origin=origin, categories=categories)


def _sources(root: Path, format: str) -> tuple[str, Mapping[str, Source]]:
    """The format of what lies in a folder, and its splits by name."""
    candidates = list(_READERS) if format == "auto" else [format]
    recognised = {name: _READERS[name].find_splits(root) for name in candidates}
    recognised = {name: sources for name, sources in recognised.items() if sources}
    if len(recognised) > 1:
        titles = " and ".join(_TITLES[name] for name in recognised)
        raise UserError(f"{root} holds {titles}: set DATASETS.FORMAT to {' or '.join(recognised)}")
    if not recognised:
        raise _unrecognised(root, format, candidates)
    return next(iter(recognised.items()))


def _unrecognised(root: Path, format: str, candidates: Sequence[str]) -> UserError:
    """Says what is missing, as far as what lies there lets it be guessed."""
    if "voc" in candidates and voc.is_begun(root):
        voc.check_tree(root)
    if below := _folders_below(root, candidates):
        return UserError(
            f"{root}: no data set is recognised here, but in {shorten(below, 3)}: set "
            "DATASETS.ROOT to that"
        )
    misses = [_READERS[name].near_miss(root) for name in candidates if name != "voc"]
    if reasons := "; ".join(filter(None, misses)):
        return UserError(f"{root}: no data set is recognised: {reasons}")
    if format != "auto":
        expected = _READERS[format].EXPECTED
        return UserError(
            f"{root}: nothing here is in the format {format} (DATASETS.FORMAT): {expected}"
        )
    return UserError(
        f"{root}: no data set is recognised: {'; or '.join(r.EXPECTED for r in _READERS.values())}"
        ". `datum convert` brings other formats into COCO's, see the README"
    )


def _folders_below(root: Path, candidates: Sequence[str]) -> list[str]:
    """Folders up to two levels below that hold a data set; a devkit's tree goes before others."""
    if not root.is_dir():
        return []
    children = folders_in(root)[:_LOOKED_AT]
    levels = [children, [below for child in children for below in folders_in(child)][:_LOOKED_AT]]
    for holds_data in (voc.is_tree, partial(_is_any, candidates)):
        for folders in levels:
            if names := [str(folder) for folder in folders if holds_data(folder)]:
                return names
    return []


def _is_any(candidates: Sequence[str], folder: Path) -> bool:
    try:
        return any(_READERS[name].find_splits(folder) for name in candidates)
    except UserError:  # of a format, but with a fault
        return True


def _choose(
    root: Path, name: str, sources: Mapping[str, Source], holdout: Holdout
) -> tuple[Source, str]:
    """The source of a split, and which part of it: "" = all of it, "kept" or "held out"."""
    if name in sources:
        return sources[name], ""
    alike = [known for known in sources if _meaning(known) == _meaning(name)]
    if len(alike) == 1:
        return sources[alike[0]], ""
    names = [known for known in sources if known]
    if len(sources) == 1 and name in _TRAINING + _HELD_OUT:
        if holdout.fraction:
            part = "kept" if name in _TRAINING else "held out"
            return next(iter(sources.values())), part
        known = f"there is only {names[0]!r}" if names else "the data have no splits"
        raise UserError(
            f"{root}: no split {name!r} here, {known}: set DATASETS.HOLDOUT to the share of the "
            "images to evaluate on, such as 0.2"
        )
    raise UserError(f"{root}: no split {name!r} here; there is: {shorten(names, 8) or 'none'}")


def _meaning(name: str) -> str:
    return "val" if name.lower() in _VALIDATION else name.lower()


Image = tuple[str, Path, Record]


def _held_out(images: Sequence[Image], holdout: Holdout) -> list[Image]:
    held_out = _drawn(images, holdout)
    return [image for image in images if image[0] in held_out]


def _kept(images: Sequence[Image], holdout: Holdout) -> list[Image]:
    held_out = _drawn(images, holdout)
    return [image for image in images if image[0] not in held_out]


def _drawn(images: Sequence[Image], holdout: Holdout) -> set[str]:
    """The ids that are held out. Few of them change when images are added or removed."""

    def place(image_id: str) -> bytes:
        return hashlib.sha256(f"{holdout.seed} {image_id}".encode()).digest()

    ids = sorted((image_id for image_id, _, _ in images), key=place)
    return set(ids[: max(1, round(holdout.fraction * len(ids)))])
