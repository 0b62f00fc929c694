"""Reads data sets in YOLO's format: a text file of normalised boxes for each image.

    root/data.yaml               names, and where train, val and test lie (Ultralytics, Roboflow)
    root/images/<split>/*.jpg    with root/labels/<split>/*.txt and classes.txt
    root/<split>/images/*.jpg    with root/<split>/labels/*.txt and classes.txt
    root/<split>.txt, obj.names  lists of images, with label files beside them (CVAT, Darknet)
    root/<split>/*.jpg, *.txt    with classes.txt or _darknet.labels in each (labelImg, Roboflow)
    root/images, root/labels     with classes.txt, no splits (Label Studio)
    root/*.jpg, root/*.txt       with classes.txt, no splits (labelImg)

An image without a label file, or with an empty one, has no objects; `yolo_labels.py` reads them.

Format: https://docs.ultralytics.com/datasets/detect.
"""

import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tract_det.data.annotations import Contents, Record, check_unique, in_threads
from tract_det.data.files import Source, exists, is_file, is_hidden, is_image, read_text
from tract_det.data.images import stored_size, upright_size
from tract_det.data.yolo_labels import parse_labels
from tract_det.errors import UserError, brief, shortened

EXPECTED = (
    "YOLO: data.yaml with names and train, or classes.txt (obj.names) with images and label files"
)

# Also as CVAT writes them: Train, Validation, Test.
_SPLITS = ("train", "val", "valid", "validation", "test")
_LISTS = ("classes.txt", "obj.names", "labels/classes.txt", "_darknet.labels")
_DEEPEST = 16  # folders of a path of another machine that are looked at
_LOOKED_AT = 100  # text files, when nothing in a folder is recognised


def find_splits(root: Path) -> dict[str, Source]:
    """Where the images of each split lie; the name of data without splits is "".

    Raises:
        UserError: The file that names the classes is malformed.
    """
    if root.suffix in (".yaml", ".yml") and root.is_file():
        return _described_splits(root.parent, root)
    if not root.is_dir():
        return {}
    description = _description(root)
    if description is not None:
        return _described_splits(root, description)
    names = _class_list(root)
    return _listed_splits(root, names) if names else {}


def _any_labels(root: Path) -> Path | None:
    """A label file in a folder or two levels below, of the first text files there."""
    for pattern in ("*.txt", "*/*.txt", "*/*/*.txt"):
        for path in islice(root.glob(pattern), _LOOKED_AT):
            with suppress(OSError), path.open("rb") as file:
                if re.match(rb"\d+(\s+[\d.]+){4}", file.read(200)) and not is_hidden(path):
                    return path
    return None


def _class_list(root: Path) -> dict[int, str]:
    """The classes of the list at the root, or of those in the folders of splits; {} = no list."""
    for folders in ([root], [root / split for split in _SPLITS]):
        paths = [folder / name for folder in folders for name in _LISTS]
        lists = {path: _read_names(path) for path in paths if path.is_file()}
        for path, names in lists.items():
            first = next(iter(lists))
            if folders != [root] and names != lists[first]:
                raise UserError(f"{first} and {path} have different classes: write the same ones")
        if lists:
            return next(iter(lists.values()))
    return {}


def near_miss(root: Path) -> str:
    """A description without classes, or label files without a list of them."""
    if files := _yaml_files(root):
        return f"{files[0]} has no names, as YOLO's description has"
    labels = _any_labels(root)
    if labels is None:
        return ""
    return (
        f"{labels} looks like YOLO's labels, but no list says which classes they number: write "
        f"{root / 'classes.txt'} with a class in each line, in their order"
    )


def _yaml_files(root: Path) -> list[Path]:
    """Those of a folder; `data.yaml` goes before others."""
    files = [path for path in [*root.glob("*.yaml"), *root.glob("*.yml")] if not is_hidden(path)]
    return sorted(files, key=lambda path: path.stem != "data")


def _description(root: Path) -> Path | None:
    """The YAML file that describes the data."""
    for path in _yaml_files(root):
        if re.search(r"^\s*['\"]?names['\"]?\s*:", read_text(path), re.M):
            return path
    return None


def _described_splits(root: Path, path: Path) -> dict[str, Source]:
    try:
        content = yaml.load(
            read_text(path), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
        )
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML ({shortened(str(error), 200)}): repair it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no description of a data set: {EXPECTED}")
    names = _numbered(path, content.get("names"))
    count = content.get("nc", len(names))
    if count != len(names):
        raise UserError(
            f"{path}: nc is {brief(count)}, but names has {len(names)} classes: correct one"
        )
    if "kpt_shape" in content:
        raise UserError(
            f"{path}: has kpt_shape: its label files are of key points, and boxes are needed; keep "
            "the first five columns of each line, and remove kpt_shape"
        )
    base = content.get("path") or "."
    keys = {split: key for key in content for split in _SPLITS if str(key).lower() == split}
    splits: dict[str, Source] = {}
    for split in sorted(keys, key=_SPLITS.index):
        entries = content[keys[split]]
        if not entries:
            continue
        entries = entries if isinstance(entries, list) else [entries]
        if not all(isinstance(text, str) for text in [base, *entries]):
            raise UserError(
                f"{path}: path is {brief(base)}, and {split} {brief(entries)}: write folders"
            )
        places = [_place(root, base, entry) for entry in entries]
        if None in places and split == "test" and splits:
            continue  # Roboflow names test also where it has no images
        files: list[Path] = []
        for entry, place in zip(entries, places, strict=True):
            if place is None:
                where = " or ".join(dict.fromkeys(str(root / folder) for folder in (base, ".")))
                raise UserError(
                    f"{path}: {split}: there is no {entry!r:.200} in {where:.200}: correct it"
                )
            files += _in_folder(place) if place.is_dir() else _in_list(place)
        splits[str(keys[split])] = Source(path, (root,), names, tuple(files))
    if not splits:
        raise UserError(f"{path}: has none of {', '.join(_SPLITS)}: say where the images are")
    return splits


def _place(root: Path, base: str, entry: str) -> Path | None:
    """The folder or list that an entry names; None: there is none."""
    names = _readings(entry)
    places = [root / base / entry, root / entry, root.parent / entry]
    places += [folder / name for folder in (root / base, root) for name in names]
    for place in places:
        if exists(place):
            above = place.resolve()
            is_too_high = above != root.resolve() and root.resolve().is_relative_to(above)
            return None if is_too_high else place
    return None


def _readings(name: str) -> list[str]:
    """What a path may mean: itself, or an end of it, since it is often one of another machine.

    Exports write ../train/images for train/images beside the file, data/obj_train_data/x.jpg for
    obj_train_data/x.jpg, and paths with backslashes. `images` alone does not say which split.
    """
    parts = [part for part in re.split(r"[\\/]+", name)[-_DEEPEST:] if part.strip(".")]
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return [name, *ends[:1], *(end for end in ends[1:] if end != "images")]


def _in_folder(folder: Path) -> list[Path]:
    """The images in a folder and below it, sorted."""
    files: list[Path] = []
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        files += [path for name in names if is_image(path := Path(above, name))]
    return sorted(files)


def _in_list(path: Path) -> list[Path]:
    """The images that a text file lists, one a line."""
    files = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        places = (path.parent / reading for reading in _readings(name))
        file = next((place for place in places if is_file(place)), None)
        if file is None:
            raise UserError(
                f"{path}, line {number}: there is no image {name!r:.200}: add it, or correct the "
                "line"
            )
        files.append(file)
    return files


def _listed_splits(root: Path, names: Mapping[int, str]) -> dict[str, Source]:
    """The splits of a folder without a description, by lists, by folders, or none."""
    lists = {path.stem: path for path in root.glob("*.txt")}
    folders = {path.name: path for path in root.glob("*") if path.name.lower() in _SPLITS}
    folders |= {path.name: path for path in (root / "images").glob("*")}
    splits: dict[str, Source] = {}
    for split in sorted({*lists, *folders}, key=lambda name: (name.lower() != "train", name)):
        if split.lower() not in _SPLITS:
            continue
        if split in lists:
            splits[split] = Source(lists[split], (root,), names, tuple(_in_list(lists[split])))
        elif folders[split].is_dir():
            within = folders[split] / "images"
            folder = within if within.is_dir() else folders[split]
            splits[split] = Source(folder, (root,), names, tuple(_in_folder(folder)))
    if splits:
        return splits
    for folder in (root / "images", root / "obj_train_data", root):
        if folder.is_dir() and (files := _in_folder(folder)):
            return {"": Source(folder, (root,), names, tuple(files))}
    return {}


def _read_names(path: Path) -> dict[int, str]:
    return _numbered(path, [line for line in read_text(path).splitlines() if line.strip()])


def _numbered(path: Path, names: Any) -> dict[int, str]:
    """Classes by their numbers, from a list or from a mapping."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    is_good = (
        isinstance(names, dict)
        and names
        and all(
            type(number) is int and number >= 0 and type(name) in (str, int)
            for number, name in names.items()
        )
    )
    if not is_good:
        raise UserError(
            f"{path}: names is {brief(names)}: write a list of classes, in their order, in quotes "
            "where YAML means something else (yes, no, null, dates)"
        )
    numbered = {number: " ".join(str(name).split()) for number, name in names.items()}
    if len(set(numbered.values())) < len(numbered) or "" in numbered.values():
        raise UserError(f"{path}: two classes have the same name, or one has none: correct names")
    return numbered


def describe(root: Path, source: Source, *, need_images: bool, upright: bool = True) -> Contents:
    """Id, file and record of every image of a split, in the order of its folder or list.

    Args:
        root: Of the data; ids do not have its name in them.
        source: From `find_splits`.
        need_images: Images are needed in any case: boxes are fractions of their sizes.
        upright: Whether of the sizes of the images turned upright by their EXIF orientation.

    Raises:
        UserError: What is wrong with all images and label files at once.
    """
    files = list(source.files)
    check_unique([str(file) for file in files], str(source.where))
    labels = [label_file(file) for file in files]
    missing = [file for file, label in zip(files, labels, strict=True) if not label.is_file()]
    if files and len(missing) == len(files):
        raise UserError(
            f"{source.where}: none of its {len(files)} images has a label file, such as "
            f"{labels[0]}: put them there"
        )
    if missing:
        warnings.warn(
            f"{source.where}: {len(missing)} of {len(files)} images have no label file and count "
            f"as images without objects (first: {missing[0]})",
            stacklevel=4,
        )

    size_of = upright_size if upright else stored_size

    def read(pair: tuple[Path, Path]) -> Record:
        image, label = pair
        return parse_labels(label, image, size_of(image), source.class_names)

    records = in_threads(read, zip(files, labels, strict=True))
    # As Ultralytics numbers the classes in result files.
    categories: dict[int | str, str] = {
        number + 1: name for number, name in source.class_names.items()
    }
    return Contents(list(zip(_ids(files), files, records, strict=True)), categories)


def label_file(image: Path) -> Path:
    """The label file of an image: in `labels` instead of the last folder `images`, or beside it."""
    parts = list(image.with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts)


def _ids(files: list[Path]) -> list[str]:
    """Ids of images: their names without suffix, with folders where names alone are not unique."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [re.sub(r"^/|[^/\w.\- ]", "", str(file.with_suffix(""))) for file in files]
