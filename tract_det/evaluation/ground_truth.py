"""What detections are compared with: the images of a split in order, their classes and objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
        positions: the position of each image by what a file of detections may call it.
        categories: the label of each class by its number in a COCO file.
    """

    image_ids: tuple[str, ...]
    class_names: tuple[str, ...]
    objects: Objects
    positions: Mapping[str | int, int]
    categories: Mapping[int, int]


def from_annotations(annotations: Sequence[Annotation], class_names: Sequence[str]) -> GroundTruth:
    """The ground truth of a split in VOC layout.

    In a COCO file, an image may be called by the number that its name is, and a class by its
    position, counted from 1.

    Args:
        annotations: all images of the split, in order.
        class_names: the K names that the labels index.

    Raises:
        ValueError: a class name or image id occurs twice, or a label has no name.
    """
    ids, names = tuple(a.image_id for a in annotations), tuple(class_names)
    for kind, values in (("class names", names), ("image ids", ids)):
        if len(set(values)) < len(values):
            raise ValueError(f"{len(values) - len(set(values))} {kind} occur more than once")
    objects = Objects(
        *flat([a.boxes for a in annotations]),
        joined([a.labels for a in annotations], np.int64),
        joined([a.difficult for a in annotations], bool),
    )
    if not are_labels(objects.labels, len(names)):
        raise ValueError(f"ground truth has labels outside 0..{len(names) - 1}")
    positions: dict[str | int, int] = {name: number for number, name in enumerate(ids)}
    numbers = [int(name) if name.isascii() and name.isdigit() else None for name in ids]
    if None not in numbers and len(set(numbers)) == len(numbers):
        positions |= {number: k for k, number in enumerate(numbers) if number is not None}
    categories = {label + 1: label for label in range(len(names))}
    return GroundTruth(ids, names, objects, positions, categories)


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
