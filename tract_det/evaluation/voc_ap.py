"""Average precision (AP) as PASCAL VOC defines it: pure functions, numpy only.

Boxes are *pixel edges*: float (xmin, ymin, xmax, ymax), 0-based, half-open. The box (xmin, ymin,
xmax, ymax) of a VOC file counts pixels from 1 and includes the last one; here it is (xmin - 1,
ymin - 1, xmax, ymax). The "+1 pixel" that the VOC devkit adds to every width and height is thereby
done: its overlap of 1-based inclusive boxes is the plain intersection over union (IoU) of pixel
edges.

Two rules are in use for what counts as found. Both look, for each detection in descending order of
score, at the one ground truth object of the class and image that it overlaps most (the first of
equals), and both leave out difficult objects: they are not in the recall, and a detection of one is
neither right nor wrong. A second detection of an object is wrong.

=================  =============================  =================================================
                   `devkit` (the default)         `detectron2` (and py-faster-rcnn)
=================  =============================  =================================================
overlap            IoU >= threshold               IoU > threshold
scores             as they are                    rounded to 3 decimals
detected boxes     as they are                    rounded to 1 decimal, 1-based
recall thresholds  exactly 0, 1/10, ..., 1        `np.arange(0, 1.1, 0.1)`: 0.3, 0.6, 0.7 are 1 ulp
                                                  too high, so a recall of 3/10 misses 0.3
=================  =============================  =================================================

Equal scores keep the order of the split's images, then that of an image's detections, under both
rules (detectron2's own order of equal scores is left to its sorting algorithm).

Sources: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section
4.2 (11 points), and the VOC2010 development kit (area).

Shapes: K classes, T IoU thresholds, D detections of one class, n objects or detections.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("devkit", "detectron2")
# 0.5, 0.55, ..., 0.95. From integers: each is the double nearest to its decimal, as is an IoU of
# small integers, so that an IoU of exactly 11/20 reaches 0.55.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
# detectron2's recall thresholds, with its rounding errors.
_INEXACT_RECALLS = np.arange(0.0, 1.1, 0.1)
# Detections whose overlaps are computed at once: bounds the memory on crowded images.
_BLOCK = 32768


@dataclass(frozen=True)
class Objects:
    """The ground truth of a split, or of one of its classes, in flat arrays.

    Attributes:
        image: (n,) int, position of the object's image in the split.
        boxes: (n, 4) float, pixel edges.
        labels: (n,) int, 0..K-1.
        difficult: (n,) bool.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray

    def of_class(self, label: int) -> "Objects":
        """The objects of one class."""
        own = self.labels == label
        return Objects(self.image[own], self.boxes[own], self.labels[own], self.difficult[own])


@dataclass(frozen=True)
class Detections:
    """What a detector found on a split, or of one class, in flat arrays.

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

    def of_class(self, label: int) -> "Detections":
        """The detections of one class."""
        own = self.labels == label
        return Detections(self.image[own], self.boxes[own], self.scores[own], self.labels[own])


@dataclass(frozen=True)
class Matches:
    """How the detections of one class fared, best score first.

    Attributes:
        true_positives: (T, D) int, how many were right up to and including each detection.
        false_positives: (T, D) int, how many were wrong; those of difficult objects are neither.
        num_objects: objects that are not difficult.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    num_objects: int

    @property
    def precision(self) -> np.ndarray:
        """(T, D) float; 0 as long as nothing has counted."""
        counted = self.true_positives + self.false_positives
        return self.true_positives / np.maximum(counted, 1)

    @property
    def recall(self) -> np.ndarray:
        """(T, D) float; NaN where the class has no objects."""
        if self.num_objects == 0:
            return np.full(self.true_positives.shape, np.nan)
        return self.true_positives / self.num_objects


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one class at IoU 0.5: two (D,) arrays, best score first."""

    precision: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class VOCResult:
    """AP of every class by both definitions, as fractions; NaN for a class without objects.

    Attributes:
        ap_07: (K, T) float, the 2007 challenge's 11-point AP at each of `IOU_THRESHOLDS`.
        ap_area: (K, T) float, the area under the precision envelope (VOC2010 and later).
        curves: one curve a class.
    """

    ap_07: np.ndarray
    ap_area: np.ndarray
    curves: tuple[Curve, ...]


def voc_ap(
    objects: Objects, detections: Detections, class_names: Sequence[str], rule: str = "devkit"
) -> VOCResult:
    """Evaluates the detections of a split, class by class.

    Args:
        objects: the ground truth.
        detections: what was found; in any order, but one image's in the detector's order.
        class_names: the K names that the labels point to.
        rule: one of `RULES`.

    Returns:
        Both APs at every IoU threshold and the curves at 0.5. A class that has no objects, or only
        difficult ones, has no AP: it is NaN and the class is named in a warning.

    Raises:
        ValueError: if the rule is unknown.
    """
    num_classes = len(class_names)
    ap_07 = np.full((num_classes, len(IOU_THRESHOLDS)), np.nan)
    ap_area = ap_07.copy()
    curves = []
    for label in range(num_classes):
        matches = match(objects.of_class(label), detections.of_class(label), rule)
        ap_07[label] = ap_11_point(matches, exact=rule == "devkit")
        ap_area[label] = ap_under_envelope(matches)
        curves.append(Curve(matches.precision[0], matches.recall[0]))
    empty = [name for name, ap in zip(class_names, ap_area[:, 0], strict=True) if np.isnan(ap)]
    if empty:
        warnings.warn(
            f"{len(empty)} of {num_classes} classes have no objects (other than difficult ones) in"
            f" this split, so no AP and no part in the mean: {', '.join(empty)}",
            stacklevel=2,
        )
    return VOCResult(ap_07, ap_area, tuple(curves))


def mean_ap(ap: np.ndarray) -> float:
    """Mean over the classes that have an AP; NaN if none has."""
    valid = ap[~np.isnan(ap)]
    return float(valid.mean()) if valid.size else float("nan")


def match(
    objects: Objects,
    detections: Detections,
    rule: str = "devkit",
    iou_thresholds: np.ndarray = IOU_THRESHOLDS,
) -> Matches:
    """Decides which detections of one class are right, at every IoU threshold.

    Args:
        objects: the ground truth of the class.
        detections: the detections of the class.
        rule: one of `RULES`.
        iou_thresholds: (T,) float.

    Returns:
        Counts of right and wrong detections, best score first.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    scores, boxes, object_boxes, pixel = detections.scores, detections.boxes, objects.boxes, 0.0
    if rule == "detectron2":
        # The arithmetic too is done on 1-based inclusive boxes: 0.1 is not a binary fraction, and
        # an overlap near the threshold must fall on the side where detectron2's falls.
        one_based = np.array([1.0, 1.0, 0.0, 0.0])
        scores, boxes = round_decimals(scores, 3), round_decimals(boxes + one_based, 1)
        object_boxes, pixel = objects.boxes + one_based, 1.0
    order = np.lexsort((detections.image, -scores))  # stable: ties keep an image's own order
    best_iou, best = best_overlaps(
        detections.image[order], boxes[order], objects.image, object_boxes, pixel
    )
    column = iou_thresholds[:, None]
    overlapping = best_iou >= column if rule == "devkit" else best_iou > column  # (T, D)
    # `best` is -1 where the image has no object of the class: the appended entry.
    of_difficult = np.append(objects.difficult.astype(bool), False)[best]  # (D,)
    right = np.zeros(overlapping.shape, dtype=bool)
    for row, found in zip(right, overlapping & ~of_difficult, strict=True):
        candidates = np.flatnonzero(found)
        _, first = np.unique(best[candidates], return_index=True)  # best-scored one of each object
        row[candidates[first]] = True
    wrong = ~right & ~(overlapping & of_difficult)
    return Matches(
        np.cumsum(right, axis=1),
        np.cumsum(wrong, axis=1),
        int(np.count_nonzero(~objects.difficult.astype(bool))),
    )


def best_overlaps(
    image: np.ndarray,
    boxes: np.ndarray,
    object_image: np.ndarray,
    object_boxes: np.ndarray,
    pixel: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The object of its own image that each box overlaps most.

    Args:
        image: (D,) int, the boxes' images.
        boxes: (D, 4) float.
        object_image: (n,) int, the objects' images.
        object_boxes: (n, 4) float.
        pixel: added to widths and heights: 0 for pixel edges, 1 for inclusive boxes.

    Returns:
        IoU with that object, (D,) float, and the object's index, (D,) int: the first of equals;
        -inf and -1 for a box whose image has no objects.
    """
    by_image = np.argsort(object_image, kind="stable")
    sorted_image, sorted_boxes = object_image[by_image], object_boxes[by_image]
    begin = np.searchsorted(sorted_image, image, side="left")
    count = np.searchsorted(sorted_image, image, side="right") - begin
    best_iou, best = np.full(len(boxes), -np.inf), np.full(len(boxes), -1)
    with_objects = np.flatnonzero(count)
    for start in range(0, len(with_objects), _BLOCK):
        block = with_objects[start : start + _BLOCK]
        n = count[block]
        first = np.cumsum(n) - n  # where each box's run of (box, object) pairs begins
        pair_object = np.arange(n.sum()) + np.repeat(begin[block] - first, n)
        iou = paired_iou(np.repeat(boxes[block], n, axis=0), sorted_boxes[pair_object], pixel)
        highest = np.maximum.reduceat(iou, first)
        is_highest = iou == np.repeat(highest, n)
        last = len(object_boxes)  # greater than every index: never the minimum
        best[block] = by_image[np.minimum.reduceat(np.where(is_highest, pair_object, last), first)]
        best_iou[block] = highest
    return best_iou, best


def paired_iou(a: np.ndarray, b: np.ndarray, pixel: float = 0.0) -> np.ndarray:
    """IoU of each box of `a` with the box of `b` beside it.

    Args:
        a: (n, 4) float.
        b: (n, 4) float.
        pixel: added to widths and heights: 0 for pixel edges, 1 for inclusive boxes.

    Returns:
        (n,) float; 0 for boxes that do not meet, whatever their areas.
    """
    overlap = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + pixel
    intersection = np.maximum(overlap, 0.0).prod(axis=1)
    size_a, size_b = a[:, 2:] - a[:, :2] + pixel, b[:, 2:] - b[:, :2] + pixel
    union = size_a.prod(axis=1) + size_b.prod(axis=1) - intersection
    # Boxes that meet have areas; others may have none or negative ones, which must not divide.
    return np.divide(intersection, union, out=np.zeros(len(a)), where=intersection > 0)


def ap_11_point(matches: Matches, *, exact: bool = True) -> np.ndarray:
    """The 2007 challenge's AP: the mean over recall 0, 0.1, ..., 1 of the best precision there.

    The best precision at a recall is that of any detection that reaches the recall or more.

    Args:
        matches: the class's right and wrong detections.
        exact: compare tenths of the recall as integers; else with detectron2's rounded thresholds.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    num_thresholds = len(matches.true_positives)
    if matches.num_objects == 0:
        return np.full(num_thresholds, np.nan)
    beyond = np.zeros((num_thresholds, 1))  # the precision at a recall that is never reached
    envelope = np.concatenate([_envelope(matches.precision), beyond], axis=1)
    total = np.zeros(num_thresholds)
    for tenth, inexact_recall in enumerate(_INEXACT_RECALLS):
        if exact:
            below = 10 * matches.true_positives < tenth * matches.num_objects
        else:
            below = matches.recall < inexact_recall
        # Recall never falls: the first detection that reaches the threshold follows all below it.
        total += envelope[np.arange(num_thresholds), below.sum(axis=1)]
    return total / len(_INEXACT_RECALLS)


def ap_under_envelope(matches: Matches) -> np.ndarray:
    """The AP of VOC2010 and later: the area under the precision envelope over recall.

    Args:
        matches: the class's right and wrong detections.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    if matches.num_objects == 0:
        return np.full(len(matches.true_positives), np.nan)
    # Recall grows by 1 / num_objects at each right detection and stays at all others.
    right = np.diff(matches.true_positives, axis=1, prepend=0)
    return (right * _envelope(matches.precision)).sum(axis=1) / matches.num_objects


def round_decimals(values: np.ndarray, decimals: int) -> np.ndarray:
    """Rounds to the nearest decimal fraction, as printing with that many decimals does.

    `np.round` multiplies first and turns 0.35, which lies below the tie, into 0.4.

    Args:
        values: float, any shape.
        decimals: digits after the point.

    Returns:
        A new array of float64.
    """
    values = np.asarray(values, dtype=np.float64)
    scaled = values * 10.0**decimals
    rounded = np.rint(scaled) / 10.0**decimals
    near_tie = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-6
    rounded[near_tie] = [round(value, decimals) for value in values[near_tie].tolist()]
    return rounded


def _envelope(precision: np.ndarray) -> np.ndarray:
    """The best precision at this or any later detection. (T, D) -> (T, D)."""
    return np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
