"""Average precision (AP) as PASCAL VOC defines it: pure functions that need numpy only.

Boxes are *pixel edges*: float (xmin, ymin, xmax, ymax), 0-based, half-open. A VOC file counts
pixels from 1 and includes the last one, so its box (xmin, ymin, xmax, ymax) is (xmin - 1, ymin - 1,
xmax, ymax) here. The conversion makes the "+1 pixel" that the VOC devkit adds to every width and
height unnecessary: the devkit's overlap of inclusive boxes equals the plain intersection over union
(IoU) of pixel edges.

Each detection of a class, in descending order of score, is compared with the one ground truth
object of its class and image that it overlaps most (the first of equals):

- The overlap does not reach the threshold, or there is no such object: false positive.
- The object is marked difficult: the detection is ignored, and so is the object in the recall.
- Otherwise the first detection of the object is a true positive, every later one a false positive.

Two rules are in use for the details:

=================  =============================  =================================================
                   `devkit` (the default)         `detectron2` (and py-faster-rcnn)
=================  =============================  =================================================
overlap            IoU >= threshold               IoU > threshold
scores             as they are                    rounded to 3 decimals
detected boxes     as they are                    rounded to 1 decimal, 1-based
recall thresholds  exactly 0, 1/10, ..., 1        `np.arange(0, 1.1, 0.1)`: 0.3, 0.6, 0.7 are 1 ulp
                                                  too high, so a recall of 3/10 misses 0.3
=================  =============================  =================================================

Under both rules, detections of equal score are ordered by the position of their image in the split,
then by their position in the image (detectron2 itself leaves this to its sorting algorithm).

Sources: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section
4.2 (11 points), and the VOC2010 development kit (area).

Shapes: K classes, T IoU thresholds, D detections of one class, n objects or detections.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULES = ("devkit", "detectron2")
# 0.5, 0.55, ..., 0.95, computed from integers so that each is the double nearest to its decimal. An
# IoU of integer areas is such a double too: an IoU of exactly 11/20 reaches 0.55.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
# detectron2's recall thresholds, with its rounding errors.
_INEXACT_RECALLS = np.arange(0.0, 1.1, 0.1)
# Number of detections whose overlaps are computed at once: bounds the memory on crowded images.
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
        mask = self.labels == label
        return Objects(self.image[mask], self.boxes[mask], self.labels[mask], self.difficult[mask])


@dataclass(frozen=True)
class Detections:
    """The detections of a split, or of one of its classes, in flat arrays.

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
        mask = self.labels == label
        return Detections(self.image[mask], self.boxes[mask], self.scores[mask], self.labels[mask])


@dataclass(frozen=True)
class Matches:
    """Running counts over the detections of one class, in descending order of score.

    Attributes:
        true_positives: (T, D) int, true positives up to and including each detection.
        false_positives: (T, D) int, false positives likewise. Ignored detections are in neither.
        num_objects: number of objects that are not difficult.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    num_objects: int

    @property
    def precision(self) -> np.ndarray:
        """(T, D) float; 0 as long as every detection was ignored."""
        counted = self.true_positives + self.false_positives
        return self.true_positives / np.maximum(counted, 1)

    @property
    def recall(self) -> np.ndarray:
        """(T, D) float; NaN where the class has no objects."""
        if self.num_objects == 0:
            return np.full(self.true_positives.shape, np.nan)
        return self.true_positives / self.num_objects


@dataclass(frozen=True)
class VOCResult:
    """AP of every class by both definitions, in 0..1; NaN for a class without objects.

    Attributes:
        ap_07: (K, T) float, the 2007 challenge's 11-point AP at each of `IOU_THRESHOLDS`.
        ap_area: (K, T) float, the area under the precision envelope (VOC2010 and later).
    """

    ap_07: np.ndarray
    ap_area: np.ndarray


def voc_ap(
    objects: Objects, detections: Detections, class_names: Sequence[str], rule: str = "devkit"
) -> VOCResult:
    """Evaluates the detections of a split, class by class.

    Args:
        objects: the ground truth.
        detections: in any order of images, but within an image in the detector's order.
        class_names: the K names that the labels index.
        rule: one of `RULES`.

    Returns:
        Both APs at every IoU threshold. A class without objects, or with difficult ones only, has
        no AP: its entries are NaN, and a warning names it.

    Raises:
        ValueError: if the rule is unknown.
    """
    num_classes = len(class_names)
    ap_07 = np.full((num_classes, len(IOU_THRESHOLDS)), np.nan)
    ap_area = ap_07.copy()
    for label in range(num_classes):
        matches = match(objects.of_class(label), detections.of_class(label), rule)
        ap_07[label] = ap_11_point(matches, exact=rule == "devkit")
        ap_area[label] = ap_under_envelope(matches)
    empty = [name for name, ap in zip(class_names, ap_area[:, 0], strict=True) if np.isnan(ap)]
    if empty:
        warnings.warn(
            f"{len(empty)} of {num_classes} classes have no objects in this split (difficult ones"
            f" are ignored), so they have no AP and are left out of the mean: {', '.join(empty)}",
            stacklevel=2,
        )
    return VOCResult(ap_07, ap_area)


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
    """Counts the true and false positives of one class at every IoU threshold.

    Args:
        objects: the ground truth of the class.
        detections: the detections of the class.
        rule: one of `RULES`.
        iou_thresholds: (T,) float.

    Returns:
        The running counts, in descending order of score.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    scores, boxes, object_boxes, pixel = detections.scores, detections.boxes, objects.boxes, 0.0
    if rule == "detectron2":
        # detectron2 rounds 1-based inclusive boxes and computes the overlap from them. So does this
        # branch, so that an overlap near the threshold falls on the same side in floating point.
        one_based = np.array([1.0, 1.0, 0.0, 0.0])
        scores, boxes = round_decimals(scores, 3), round_decimals(boxes + one_based, 1)
        object_boxes, pixel = objects.boxes + one_based, 1.0
    order = np.lexsort((detections.image, -scores))  # stable: ties keep the order in an image
    best_iou, best_object = best_overlaps(
        detections.image[order], boxes[order], objects.image, object_boxes, pixel
    )
    thresholds = iou_thresholds[:, None]
    overlapping = best_iou >= thresholds if rule == "devkit" else best_iou > thresholds  # (T, D)
    difficult = objects.difficult.astype(bool)
    # `best_object` is -1 where the image has no object of the class: that picks the appended False.
    is_difficult = np.append(difficult, False)[best_object]  # (D,)
    true_positive = np.zeros(overlapping.shape, dtype=bool)
    for row, matched in zip(true_positive, overlapping & ~is_difficult, strict=True):
        candidates = np.flatnonzero(matched)
        # The first detection of each object, which has the highest score.
        _, first = np.unique(best_object[candidates], return_index=True)
        row[candidates[first]] = True
    false_positive = ~true_positive & ~(overlapping & is_difficult)
    return Matches(
        np.cumsum(true_positive, axis=1),
        np.cumsum(false_positive, axis=1),
        int(np.count_nonzero(~difficult)),
    )


def best_overlaps(
    image: np.ndarray,
    boxes: np.ndarray,
    object_image: np.ndarray,
    object_boxes: np.ndarray,
    pixel: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """For each box, the object in the same image that it overlaps most.

    Args:
        image: (D,) int, the image of each box.
        boxes: (D, 4) float.
        object_image: (n,) int, the image of each object.
        object_boxes: (n, 4) float.
        pixel: added to widths and heights: 0 for pixel edges, 1 for inclusive boxes.

    Returns:
        The IoU with that object, (D,) float, and the object's index, (D,) int (the lowest of equal
        overlaps); -inf and -1 for a box whose image has no objects.
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
        last = len(object_boxes)  # greater than every index, so it is never the minimum
        best[block] = by_image[np.minimum.reduceat(np.where(is_highest, pair_object, last), first)]
        best_iou[block] = highest
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
    overlap = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]) + pixel
    intersection = np.maximum(overlap, 0.0).prod(axis=1)
    size_a, size_b = a[:, 2:] - a[:, :2] + pixel, b[:, 2:] - b[:, :2] + pixel
    union = size_a.prod(axis=1) + size_b.prod(axis=1) - intersection
    # Boxes that overlap have positive areas. The union of others may be 0 or less: do not divide.
    return np.divide(intersection, union, out=np.zeros(len(a)), where=intersection > 0)


def ap_11_point(matches: Matches, *, exact: bool = True) -> np.ndarray:
    """The 2007 challenge's AP: mean of the interpolated precision at recall 0, 0.1, ..., 1.

    The interpolated precision at a recall is the highest precision at this or any greater recall.

    Args:
        matches: the counts of the class.
        exact: compare recall with tenths in integers; otherwise with detectron2's inexact floats.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    num_thresholds = len(matches.true_positives)
    if matches.num_objects == 0:
        return np.full(num_thresholds, np.nan)
    beyond = np.zeros((num_thresholds, 1))  # the precision at a recall that no detection reaches
    envelope = np.concatenate([_envelope(matches.precision), beyond], axis=1)
    total = np.zeros(num_thresholds)
    for tenth, inexact_recall in enumerate(_INEXACT_RECALLS):
        if exact:
            below = 10 * matches.true_positives < tenth * matches.num_objects
        else:
            below = matches.recall < inexact_recall
        # Recall never falls, so the count of detections below the threshold is the index of the
        # first that reaches it.
        total += envelope[np.arange(num_thresholds), below.sum(axis=1)]
    return total / len(_INEXACT_RECALLS)


def ap_under_envelope(matches: Matches) -> np.ndarray:
    """The AP of VOC2010 and later: the area under the precision envelope over recall.

    Args:
        matches: the counts of the class.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    if matches.num_objects == 0:
        return np.full(len(matches.true_positives), np.nan)
    # Recall grows by 1 / num_objects at each true positive and does not change at the others.
    true_positive = np.diff(matches.true_positives, axis=1, prepend=0)
    return (true_positive * _envelope(matches.precision)).sum(axis=1) / matches.num_objects


def round_decimals(values: np.ndarray, decimals: int) -> np.ndarray:
    """Rounds to the nearest decimal, exactly as formatting with that many decimals does.

    `np.round` multiplies first, which loses the exact value: it turns 0.35 into 0.4, although the
    double 0.35 is slightly less than the tie and is formatted as 0.3.

    Args:
        values: float, any shape.
        decimals: number of digits after the decimal point.

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
