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

Shapes: K classes, T IoU thresholds, D detections of the split, n objects.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tract_det.evaluation.boxes import ONE_BASED, Detections, Objects, best_overlaps
from tract_det.evaluation.ranking import Ranking, ap_11_point, ap_under_envelope, by_class

RULES = ("devkit", "detectron2")
# 0.5, 0.55, ..., 0.95, computed from integers so that each is the double nearest to its decimal. An
# IoU of integer areas is such a double too: an IoU of exactly 11/20 reaches 0.55.
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


@dataclass(frozen=True)
class Matching:
    """The detections of a split, by class and in descending order of score, as a rule matches them.

    Attributes:
        objects: the ground truth.
        rule: one of `RULES`.
        detection: (D,) int, positions in the split's detections.
        image: (D,) int, the image of each.
        labels: (D,) int, 0..K-1.
        scores: (D,) float, as the rule sees them.
        best_iou: (D,) float, IoU with the object of its class that it overlaps most; -inf without.
        best_object: (D,) int, that object; -1 without.
        true_positive: (T, D) bool.
        false_positive: (T, D) bool. An ignored detection is neither true nor false.
    """

    objects: Objects
    rule: str
    detection: np.ndarray
    image: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    best_iou: np.ndarray
    best_object: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray

    def rankings(self, num_classes: int) -> list[Ranking]:
        """The detections of each of the K classes."""
        counts = ~self.objects.difficult.astype(bool)
        whole = Ranking(
            self.detection,
            self.image,
            self.scores,
            self.true_positive,
            self.false_positive,
            self.objects.image[counts],
        )
        return by_class(whole, self.labels, self.objects.labels[counts], num_classes)


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
    result = class_aps(match(objects, detections, rule).rankings(len(class_names)), rule)
    warn_of_empty(class_names, result)
    return result


def class_aps(rankings: Sequence[Ranking], rule: str) -> VOCResult:
    """Both APs of each of the K classes."""
    return VOCResult(
        np.array([ap_11_point(ranking, rule) for ranking in rankings]),
        np.array([ap_under_envelope(ranking) for ranking in rankings]),
    )


def warn_of_empty(class_names: Sequence[str], result: VOCResult) -> None:
    """Names the classes without an AP."""
    is_empty = np.isnan(result.ap_area[:, 0])
    empty = [name for name, no_ap in zip(class_names, is_empty, strict=True) if no_ap]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(class_names)} classes have no objects in this split (difficult"
            f" ones are ignored), so they have no AP and are left out of the mean:"
            f" {', '.join(empty)}",
            stacklevel=3,
        )


def match(
    objects: Objects,
    detections: Detections,
    rule: str = "devkit",
    iou_thresholds: np.ndarray = IOU_THRESHOLDS,
) -> Matching:
    """Finds the true and false positives of all classes at every IoU threshold.

    Args:
        objects: the ground truth.
        detections: the detections.
        rule: one of `RULES`.
        iou_thresholds: (T,) float.

    Raises:
        ValueError: if the rule is unknown.
    """
    view = view_of(objects, detections, rule)
    # Stable: ties keep the order in an image.
    order = np.lexsort((detections.image, -view.scores, detections.labels))
    image, labels = detections.image[order], detections.labels[order]
    num_labels = 1 + max(labels.max(initial=0), objects.labels.max(initial=0))
    best_iou, best_object = best_overlaps(
        image * num_labels + labels,
        view.boxes[order],
        objects.image * num_labels + objects.labels,
        view.object_boxes,
        view.pixel,
    )
    overlapping = reaches(best_iou, iou_thresholds[:, None], rule)  # (T, D)
    # `best_object` is -1 where the image has no object of the class: that picks the appended False.
    is_difficult = np.append(objects.difficult.astype(bool), False)[best_object]  # (D,)
    true_positive = np.zeros(overlapping.shape, dtype=bool)
    for row, matched in zip(true_positive, overlapping & ~is_difficult, strict=True):
        candidates = np.flatnonzero(matched)
        # The first detection of each object, which has the highest score.
        _, first = np.unique(best_object[candidates], return_index=True)
        row[candidates[first]] = True
    false_positive = ~true_positive & ~(overlapping & is_difficult)
    return Matching(
        objects,
        rule,
        order,
        image,
        labels,
        view.scores[order],
        best_iou,
        best_object,
        true_positive,
        false_positive,
    )


class View(NamedTuple):
    """Scores and boxes as a rule sees them.

    Attributes:
        scores: (D,) float.
        boxes: (D, 4) float, of the detections.
        object_boxes: (n, 4) float.
        pixel: what is to be added to widths and heights.
    """

    scores: np.ndarray
    boxes: np.ndarray
    object_boxes: np.ndarray
    pixel: float


def view_of(objects: Objects, detections: Detections, rule: str) -> View:
    """Scores and boxes as the rule sees them.

    Raises:
        ValueError: if the rule is unknown.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    if rule == "devkit":
        return View(detections.scores, detections.boxes, objects.boxes, 0.0)
    # detectron2 rounds 1-based inclusive boxes and computes the overlap from them. So does this, so
    # that an overlap near the threshold falls on the same side in floating point.
    return View(
        round_decimals(detections.scores, 3),
        round_decimals(detections.boxes + ONE_BASED, 1),
        objects.boxes + ONE_BASED,
        1.0,
    )


def reaches(iou: np.ndarray, threshold: float | np.ndarray, rule: str) -> np.ndarray:
    """Whether an overlap is one by the rule, (...) bool."""
    return iou >= threshold if rule == "devkit" else iou > threshold


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
