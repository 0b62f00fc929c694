"""What detections are compared with: the images of a split in order, their classes and objects."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tract_det.evaluation.boxes import Objects


class Annotation(Protocol):
    """The ground truth of one image, as `tract_det.data.voc` reads it."""

    @property
    def image_id(self) -> str:
        """Name of the image in its split."""

    @property
    def boxes(self) -> np.ndarray:
        """(n, 4) float, pixel edges."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int, 0..K-1."""

    @property
    def difficult(self) -> np.ndarray:
        """(n,) bool."""


@dataclass(frozen=True)
class GroundTruth:
    """A split of I images and K classes.

    Attributes:
        image_ids: I names, in the order of the split.
        class_names: K names; label k is class_names[k].
        objects: of all images.
        positions: the position of each image by its name, as the challenge's files have it.
        numbers: the same by what a COCO result file calls the image.
        categories: the name of the class by what a COCO result file calls it; empty where the data
            do not number their classes. Not every name is one of the K.
    """

    image_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    objects: Objects
    positions: Mapping[str, int]
    numbers: Mapping[int | str, int]
    categories: Mapping[int | str, str]


def from_annotations(
    annotations: Sequence[Annotation],
    class_names: Sequence[str],
    categories: Mapping[int | str, str] | None = None,
) -> GroundTruth:
    """The ground truth of a split.

    Args:
        annotations: all images of the split, in order. What those of COCO's data have more, `area`,
            `crowd` and `number` of `tract_det.data.annotations.Annotation`, is used where it is
            there.
        class_names: the K names that the labels index.
        categories: see `GroundTruth`.

    Raises:
        ValueError: a class name or image id occurs twice, or a label has no name.
    """
    ids, names = tuple(a.image_id for a in annotations), tuple(class_names)
    for kind, values in (("class names", names), ("image ids", ids)):
        if len(set(values)) < len(values):
            raise ValueError(f"{len(values) - len(set(values))} {kind} occur more than once")
    image, boxes = flat([a.boxes for a in annotations])
    crowd = _of_each(annotations, "crowd", False, bool)
    objects = Objects(
        image,
        boxes,
        joined([a.labels for a in annotations], np.int64),
        joined([a.difficult for a in annotations], bool),
        _areas(annotations, boxes),
        crowd if crowd.any() else None,
    )
    if not are_labels(objects.labels, len(names)):
        raise ValueError(f"ground truth has labels outside 0..{len(names) - 1}")
    numbers = [getattr(a, "number", None) for a in annotations]
    by_name = _by_name(ids)
    by_number = _by_number(by_name, numbers)
    return GroundTruth(ids, names, objects, by_name, by_number, dict(categories or {}))


def _of_each(annotations: Sequence[Annotation], name: str, default: Any, dtype: type) -> np.ndarray:
    """An attribute of all objects, (n,), that an image may lack."""
    columns = []
    for annotation in annotations:
        values = getattr(annotation, name, None)
        columns.append(np.full(len(annotation.boxes), default) if values is None else values)
    return joined(columns, dtype)


def _areas(annotations: Sequence[Annotation], boxes: np.ndarray) -> np.ndarray | None:
    """(n,) float; None where no file says any, so that they are those of the boxes."""
    areas = _of_each(annotations, "area", np.nan, np.float64)
    if np.isnan(areas).all():
        return None
    return np.where(np.isnan(areas), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), areas)


def _by_name(ids: Sequence[str]) -> dict[str, int]:
    """Positions by names, and by names without folders where only one image has it."""
    stems = [name.rpartition("/")[2] for name in ids]
    counts = Counter(stems)
    positions = {stem: k for k, stem in enumerate(stems) if counts[stem] == 1}
    return positions | {name: k for k, name in enumerate(ids)}


def _by_number(
    by_name: Mapping[str, int], numbers: Sequence[int | str | None]
) -> dict[int | str, int]:
    """Positions by COCO's ids, or by numbers that are names.

    A text is an id if ids are texts, else a name, else a number in words.
    """
    ids = {number: k for k, number in enumerate(numbers) if number is not None}
    if ids:
        return {str(number): k for number, k in ids.items()} | dict(by_name.items()) | ids
    values = {name: int(name) for name in by_name if name.isascii() and name.isdigit()}
    counts = Counter(values.values())
    unique = {value: by_name[name] for name, value in values.items() if counts[value] == 1}
    return dict(by_name.items()) | unique


class WithOthers(dict[Any, int]):
    """Positions where images that are not in the split have -1.

    A name that may mean one of the split's images, by its last part with or without a suffix, is
    no other image: it has none, and nor has what is no name.
    """

    def __missing__(self, image_id: object) -> int:
        """The position of an image that is not in the split.

        Raises:
            KeyError: it may be in the split, or is no name and no number.
        """
        if type(image_id) is int:
            return -1
        if not isinstance(image_id, str) or not image_id.strip():
            raise KeyError(image_id)
        last = image_id.rpartition("/")[2]
        if last in self or last.rpartition(".")[0] in self:
            raise KeyError(image_id)
        return -1


def are_labels(labels: np.ndarray, num_classes: int) -> bool:
    """Whether all are in 0..K-1."""
    return bool(((labels >= 0) & (labels < num_classes)).all())


def joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenates (n_0,), (n_1,), ... to (n,)."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def flat(boxes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the boxes of each image, (n_i, 4), to image positions (n,) and boxes (n, 4)."""
    image = np.repeat(np.arange(len(boxes)), [len(image_boxes) for image_boxes in boxes])
    return image, np.concatenate([np.empty((0, 4)), *boxes])
