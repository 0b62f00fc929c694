"""Boxes of a split in flat arrays, and their overlaps: pure functions that need numpy only.

Boxes are *pixel edges*: float (xmin, ymin, xmax, ymax), 0-based, half-open.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Added to pixel edges it gives the corners of VOC's files, which count pixels from 1.
ONE_BASED = np.array([1.0, 1.0, 0.0, 0.0])
# Number of pairs whose overlaps are computed at once, or those of one box if it has more: bounds
# the memory on crowded images.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Objects:
    """The ground truth of a split in flat arrays.

    Attributes:
        image: (n,) int, position of the object's image in the split.
        boxes: (n, 4) float, pixel edges.
        labels: (n,) int, 0..K-1.
        difficult: (n,) bool: an object that counts neither as found nor as missed.
        area: (n,) float, by which COCO tells small from large; None = that of the boxes.
        crowd: (n,) bool: difficult, and to COCO a region of many objects; None = there are none.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    area: np.ndarray | None = None
    crowd: np.ndarray | None = None


@dataclass(frozen=True)
class Detections:
    """The detections of a split in flat arrays.

    Attributes:
        image: (n,) int, position of the detection's image in the split.
        boxes: (n, 4) float, pixel edges.
        scores: (n,) float, finite.
        labels: (n,) int, 0..K-1.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class Pairs(NamedTuple):
    """Boxes, each with every object of its group.

    Attributes:
        rows: (R,) int, the boxes that have an object in their group.
        first: (R,) int, where each row's run of pairs begins.
        row: (P,) int, the box of each pair.
        object: (P,) int, the object of each pair; ascending within a run.
    """

    rows: np.ndarray
    first: np.ndarray
    row: np.ndarray
    object: np.ndarray


def pairs_in_groups(group: np.ndarray, object_group: np.ndarray) -> Iterator[Pairs]:
    """All pairs of a box and an object of the same group, in blocks.

    Args:
        group: (D,) int, not negative: the group of each box, such as its image.
        object_group: (n,) int, the group of each object.
    """
    by_group = np.argsort(object_group, kind="stable")
    groups, begins, counts = np.unique(
        object_group[by_group], return_index=True, return_counts=True
    )
    position = np.searchsorted(groups, group)
    has_objects = np.append(groups, -1)[position] == group
    begin, count = np.append(begins, 0)[position], np.append(counts, 0)[position]
    with_objects = np.flatnonzero(has_objects)
    total = np.cumsum(count[with_objects])  # pairs of the first 1, 2, ... boxes
    start = 0
    while start < len(with_objects):
        before = total[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(total, before + _BLOCK, side="right")))
        rows = with_objects[start:end]
        start = end
        n = count[rows]
        first = np.cumsum(n) - n
        run = np.arange(n.sum()) + np.repeat(begin[rows] - first, n)
        yield Pairs(rows, first, np.repeat(rows, n), by_group[run])


def best_overlaps(
    group: np.ndarray,
    boxes: np.ndarray,
    object_group: np.ndarray,
    object_boxes: np.ndarray,
    pixel: float = 0.0,
    other_than: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each box, the object of the same group that it overlaps most.

    Args:
        group: (D,) int, the group of each box, such as its image.
        boxes: (D, 4) float.
        object_group: (n,) int, the group of each object.
        object_boxes: (n, 4) float.
        pixel: added to widths and heights: 0 for pixel edges, 1 for inclusive boxes.
        other_than: labels of the boxes, (D,), and of the objects, (n,): only objects of another
            label are looked at. None = all objects of the group.

    Returns:
        The IoU with that object, (D,) float, and the object's index, (D,) int (the lowest of equal
        overlaps); -inf and -1 for a box whose group has no such object.
    """
    best_iou, best = np.full(len(boxes), -np.inf), np.full(len(boxes), -1)
    none = len(object_boxes)  # greater than every index, so it is the minimum of a run of itself
    for pairs in pairs_in_groups(group, object_group):
        iou = paired_iou(boxes[pairs.row], object_boxes[pairs.object], pixel)
        if other_than is not None:
            labels, object_labels = other_than
            iou[labels[pairs.row] == object_labels[pairs.object]] = -np.inf
        highest = np.maximum.reduceat(iou, pairs.first)
        run_lengths = np.diff(pairs.first, append=len(iou))
        is_highest = (iou == np.repeat(highest, run_lengths)) & (iou > -np.inf)
        lowest = np.minimum.reduceat(np.where(is_highest, pairs.object, none), pairs.first)
        best[pairs.rows] = np.where(lowest == none, -1, lowest)
        best_iou[pairs.rows] = highest
    return best_iou, best


def paired_iou(a: np.ndarray, b: np.ndarray, pixel: float = 0.0) -> np.ndarray:
    """IoU of each box of `a` with the box in the same row of `b`.

    Args:
        a: (n, 4) float.
        b: (n, 4) float.
        pixel: added to widths and heights: 0 for pixel edges, 1 for inclusive boxes.

    Returns:
        (n,) float; 0 for boxes that do not overlap, even if their union is empty.
    """
    ax1, ay1, ax2, ay2 = a.T
    bx1, by1, bx2, by2 = b.T
    width = np.minimum(ax2, bx2) - np.maximum(ax1, bx1) + pixel
    height = np.minimum(ay2, by2) - np.maximum(ay1, by1) + pixel
    intersection = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    area_a = (ax2 - ax1 + pixel) * (ay2 - ay1 + pixel)
    area_b = (bx2 - bx1 + pixel) * (by2 - by1 + pixel)
    union = area_a + area_b - intersection
    # Boxes that overlap have positive areas. The union of others may be 0 or less: do not divide.
    return np.divide(intersection, union, out=np.zeros(len(a)), where=intersection > 0)
