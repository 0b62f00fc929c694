"""Images with annotated boxes, whatever format they were read from.

A reader (`voc.py`, `coco.py`, `yolo.py`) makes a `Record` of each image, and `build_split` makes
the split of the records: class list, labels, sizes. Boxes are edges of pixels counted from 0, so
that a width is a difference and a flip is `width - x`.
"""

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from tract_det.data.faults import Faults
from tract_det.data.files import is_file
from tract_det.data.fingerprint import beginning, fingerprint, names_as_bytes
from tract_det.data.images import MAX_PIXELS, stored_size, upright_size
from tract_det.errors import CONTROLS, UserError, brief

LARGEST = 1e9  # of a coordinate or a side, in pixels
READERS = 8  # threads that read files, which on a network's disk wait most of the time

_ROUNDING = 1e-6  # pixels: of a side that is a difference of coordinates

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Annotation:
    """One image and its n objects.

    Attributes:
        image_id: The line of the split file, and the name of the XML file without its suffix; in
            other formats the image's file name without suffix.
        path: The image file.
        width: In pixels, of the image as it is read: turned upright by its EXIF orientation, unless
            that is ignored. 0 = neither the annotation nor an image says, where none is needed.
        height: In pixels, likewise.
        boxes: (n, 4) float64, pixel edges x1, y1, x2, y2; as read, not clipped to the image.
        labels: (n,) int64, 0..K-1, positions in the split's class names.
        difficult: (n,) bool, objects that the evaluation ignores.
        area: (n,) float64, square pixels, by which COCO tells small objects from large ones; NaN
            for those whose file does not say. None = those of the boxes.
        crowd: (n,) bool, difficult objects that are regions of many to COCO; None = there are none.
        number: What COCO's files call the image; None in other formats.
    """

    image_id: str
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    area: np.ndarray | None = None
    crowd: np.ndarray | None = None
    number: int | str | None = None


@dataclass
class DetectionSplit:
    """The annotations of a split, in the order of the split file.

    Attributes:
        name: The split's name; several names are joined by "+".
        class_names: K names; label k is class_names[k].
        annotations: One per image, including images without objects.
        dropped: Number of boxes that are no object (`is_object`), which were left out.
        max_pixels: An image with more is refused.
        exif: What EXIF's orientation does to an image, one of `choices.EXIF_MODES`: see `exif.py`.
        channels: Of the images, as in `images.read_upright`.
        origin: Format and place that it was read from, for the log.
        categories: Name of the class by what a COCO result file calls it, where the format of the
            data numbers its classes.
    """

    name: str
    class_names: tuple[str, ...]
    annotations: list[Annotation]
    dropped: int
    max_pixels: int = MAX_PIXELS
    exif: str = "auto"
    channels: int = 3
    origin: str = ""
    categories: Mapping[int | str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.annotations)

    def first(self, count: int) -> "DetectionSplit":
        """The first images, at most so many."""
        return replace(self, annotations=self.annotations[:count])

    def fingerprint(self) -> str:
        """Equal for the same images with the same annotations, wherever they lie."""
        ids = (annotation.image_id for annotation in self.annotations)
        parts = [names_as_bytes(self.class_names), names_as_bytes(ids)]
        for annotation in self.annotations:
            parts += [
                annotation.boxes.tobytes(),
                annotation.labels.tobytes(),
                annotation.difficult.tobytes(),
            ]
            if annotation.crowd is not None and annotation.crowd.any():
                parts.append(annotation.crowd.tobytes())
            if annotation.area is not None and not np.isnan(annotation.area).all():
                parts.append(annotation.area.tobytes())
        return fingerprint(parts, len(self), lambda index: beginning(self.annotations[index].path))


class Record(NamedTuple):
    """What an annotation file says of one image.

    Attributes:
        source: The file, and where in it, for messages.
        filename: Of the image, as the file has it; empty if missing.
        size: (width, height) in pixels; None if missing.
        classes: Classes of all objects, in file order.
        labelled: Classes of the boxes that are objects (`is_object`); parallel to `boxes` and
            `difficult`.
        boxes: Pixel edges x1, y1, x2, y2.
        difficult: Whether the evaluation ignores the object.
        dropped: A description of each of the others.
        areas: Square pixels as the file has them, NaN where it has none; None in other formats
            than COCO's, as the following.
        crowd: Whether the object is a region of many.
        number: What the file calls the image.
    """

    source: Path | str
    filename: str
    size: tuple[int, int] | None
    classes: list[str]
    labelled: list[str]
    boxes: list[tuple[float, float, float, float]]
    difficult: list[bool]
    dropped: list[str]
    areas: list[float] | None = None
    crowd: list[bool] | None = None
    number: int | str | None = None


class Contents(NamedTuple):
    """What a reader finds of a split.

    Attributes:
        images: Of each image its id, its file and its record.
        categories: As in `DetectionSplit`.
    """

    images: list[tuple[str, Path, Record]]
    categories: Mapping[int | str, str] = {}


def is_object(box: tuple[float, float, float, float]) -> bool:
    """Whether a box of pixel edges, as a file has it, can be an object: it is more than a pixel.

    A click without a drawn box leaves a single pixel in VOC, whose corners are pixels, and by the
    converter one or none in COCO and YOLO. All of them are left out. A line of pixels is kept.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    return min(width, height) > 0 and max(width, height) > 1 + _ROUNDING


def build_split(
    name: str,
    where: Path,
    images: Sequence[tuple[str, Path, Record]],
    class_names: Sequence[str] | None,
    *,
    need_images: bool = True,
    upright: bool = True,
) -> DetectionSplit:
    """Makes a split of what was read. Of boxes that were dropped a single warning speaks.

    Args:
        name: Of the split.
        where: The file or folder that lists its images, for messages.
        images: Of each image its id, its file and its record.
        class_names: The classes, in the order of the labels; None or empty: the sorted classes of
            all objects in the split.
        need_images: Whether a size that no annotation states must be found in the image.
        upright: Whether such a size is that of the image turned upright by its EXIF orientation.

    Raises:
        UserError: A class is not in the list, there is no object to take classes from, two images
            have the same file, or a size is missing and the image cannot be read. What is wrong
            with images is said of all at once.
    """
    records = [record for _, _, record in images]
    if need_images:
        _refuse_shared_files(images)
    names = class_list(class_names, records, where)
    label_of = {name: k for k, name in enumerate(names)}

    def size_of(image: tuple[str, Path, Record]) -> tuple[int, int]:
        _, path, record = image
        if record.size is not None:
            return record.size
        if not need_images and not is_file(path):
            return 0, 0
        try:
            return upright_size(path) if upright else stored_size(path)
        except UserError as error:
            raise UserError(f"{record.source}: no <size>, and {error}; or add <size>") from None

    # Headers are read in threads; where all sizes are stated, threads would only take time.
    stated = all(record.size is not None for record in records)
    sizes = [size_of(image) for image in images] if stated else in_threads(size_of, images)
    annotations = [
        Annotation(
            image_id,
            path,
            width,
            height,
            boxes=np.array(record.boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array([label_of[name] for name in record.labelled], dtype=np.int64),
            difficult=np.array(record.difficult, dtype=bool),
            area=None if record.areas is None else np.array(record.areas, dtype=np.float64),
            crowd=None if record.crowd is None else np.array(record.crowd, dtype=bool),
            number=record.number,
        )
        for (image_id, path, record), (width, height) in zip(images, sizes, strict=True)
    ]
    dropped = [text for record in records for text in record.dropped]
    if dropped:
        total = sum(len(record.classes) for record in records)
        warnings.warn(
            f"{where}: {len(dropped)} of {total} boxes have no area, or that of a pixel, and were "
            f"dropped: {shorten(dropped, 3)}",
            stacklevel=3,
        )
    return DetectionSplit(name, names, annotations, len(dropped))


def _refuse_shared_files(images: Sequence[tuple[str, Path, Record]]) -> None:
    """Refuses a file that two annotations take for their image, by a name that is not its own."""
    faults, sources = Faults(), dict[Path, Record]()
    for _, path, record in images:
        with faults.noted():
            if (first := sources.setdefault(path, record)) is not record:
                raise UserError(
                    f"{record.source}: its image {path} is also that of {first.source}: correct "
                    "the file name in one of them"
                )
    faults.refuse()


def in_threads(function: Callable[[Item], Value], items: Iterable[Item]) -> list[Value]:
    """The values of a function that reads a file for each item.

    Raises:
        UserError: It raised one; says what is wrong with all items at once.
    """

    def values() -> Iterator[Value]:
        faults = Faults()
        with ThreadPoolExecutor(READERS) as pool:
            for future in [pool.submit(function, item) for item in items]:
                with faults.noted():
                    yield future.result()
        faults.refuse()

    return list(values())


def class_list(
    class_names: Sequence[str] | None, records: Sequence[Record], where: Path
) -> tuple[str, ...]:
    """The configured classes, checked against the records; without any, those in the records.

    Raises:
        UserError: There is none, one is there twice, or one is not among those configured.
    """
    annotated = {name for record in records for name in record.classes}
    if strange := [name for name in annotated if CONTROLS.search(name)]:
        raise UserError(
            f"{where}: class {brief(strange[0])} has a character that cannot be printed: correct "
            "its name"
        )
    if not class_names:
        if not annotated:
            raise UserError(f"{where}: none of its annotations has an object: set DATASETS.CLASSES")
        return tuple(sorted(annotated))
    names = tuple(class_names)
    if len(set(names)) < len(names):
        raise UserError(f"the class list (DATASETS.CLASSES) has a name twice: {', '.join(names)}")
    if not annotated <= set(names):
        source, name = next((r.source, n) for r in records for n in r.classes if n not in names)
        close = difflib.get_close_matches(name, names, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"{source}: class {name!r} is not in the class list ({', '.join(names)}): {guess}"
            "correct the annotation or add the class (DATASETS.CLASSES; register_voc's class_names)"
        )
    return names


def relabel(split: DetectionSplit, class_names: tuple[str, ...]) -> list[Annotation]:
    """The split's annotations with labels for another class list that has all of its classes."""
    if split.class_names == class_names:
        return split.annotations
    table = np.array([class_names.index(name) for name in split.class_names], dtype=np.int64)
    return [replace(a, labels=table[a.labels]) for a in split.annotations]


def check_unique(ids: Sequence[str], where: str) -> None:
    """Refuses an image id that occurs twice.

    Raises:
        UserError: Names the id.
    """
    earlier: set[str] = set()
    for image_id in ids:
        if image_id in earlier:
            raise UserError(f"{where}: image id {image_id!r} occurs twice: remove one of them")
        earlier.add(image_id)


def shorten(items: Sequence[str], count: int) -> str:
    """The first items, separated by commas."""
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")
