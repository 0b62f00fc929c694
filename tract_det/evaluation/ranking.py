"""The detections of a class in order of their scores, and the curves and figures made of them.

Every rule of average precision (AP) ranks detections and says which are true positives, which are
false ones, and which are ignored. What follows is here: precision, recall, AP, the best F1, and the
images to which the loss of AP is due. Pure functions that need numpy only.

Shapes: T IoU thresholds, D detections of the class, n objects that count, I images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# The recalls of the 2007 challenge, each the double nearest to its decimal: a recall of 3/10
# reaches 0.3. detectron2's have rounding errors.
RECALLS_07 = {"devkit": np.arange(11) / 10, "detectron2": np.arange(0.0, 1.1, 0.1)}


@dataclass(frozen=True)
class Ranking:
    """The detections of one class, in descending order of score.

    Attributes:
        detection: (D,) int, positions in the split's detections.
        image: (D,) int, the image of each.
        scores: (D,) float, as the rule sees them.
        true_positive: (T, D) bool.
        false_positive: (T, D) bool. An ignored detection is neither true nor false.
        object_image: (n,) int, the image of each object that counts.
    """

    detection: np.ndarray
    image: np.ndarray
    scores: np.ndarray
    true_positive: np.ndarray
    false_positive: np.ndarray
    object_image: np.ndarray

    @property
    def num_objects(self) -> int:
        """Number of objects that count: those that are not difficult."""
        return len(self.object_image)

    @cached_property
    def true_positives(self) -> np.ndarray:
        """(T, D) int, true positives up to and including each detection."""
        return np.cumsum(self.true_positive, axis=1)

    @cached_property
    def false_positives(self) -> np.ndarray:
        """(T, D) int, false positives likewise."""
        return np.cumsum(self.false_positive, axis=1)

    @cached_property
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

    @cached_property
    def envelope(self) -> np.ndarray:
        """(T, D) float, the best precision at this or any later detection."""
        return np.maximum.accumulate(self.precision[:, ::-1], axis=1)[:, ::-1]

    def at(self, threshold: int) -> "Ranking":
        """The same at one of the T IoU thresholds, as T = 1."""
        return replace(
            self,
            true_positive=self.true_positive[threshold : threshold + 1],
            false_positive=self.false_positive[threshold : threshold + 1],
        )


def by_class(
    whole: Ranking, labels: np.ndarray, object_labels: np.ndarray, num_classes: int
) -> list[Ranking]:
    """Divides the ranked detections of all classes.

    Args:
        whole: ranked by class, and in a class by descending score.
        labels: (D,) int, 0..K-1, ascending.
        object_labels: (n,) int.
        num_classes: K.

    Returns:
        The rankings of the K classes, which share the memory of `whole`.
    """
    bounds = np.searchsorted(labels, np.arange(num_classes + 1))
    return [
        Ranking(
            whole.detection[begin:end],
            whole.image[begin:end],
            whole.scores[begin:end],
            whole.true_positive[:, begin:end],
            whole.false_positive[:, begin:end],
            whole.object_image[object_labels == label],
        )
        for label, (begin, end) in enumerate(pairwise(bounds))
    ]


def ap_11_point(ranking: Ranking, rule: str = "devkit") -> np.ndarray:
    """The 2007 challenge's AP: mean of the interpolated precision at recall 0, 0.1, ..., 1.

    The interpolated precision at a recall is the highest precision at this or any greater recall.

    Args:
        ranking: of the class.
        rule: the key in `RECALLS_07`.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    num_thresholds = len(ranking.true_positive)
    if ranking.num_objects == 0:
        return np.full(num_thresholds, np.nan)
    beyond = np.zeros((num_thresholds, 1))  # the precision at a recall that no detection reaches
    envelope = np.concatenate([ranking.envelope, beyond], axis=1)
    recalls = RECALLS_07[rule]
    total = np.zeros(num_thresholds)
    for row, recall in enumerate(ranking.recall):
        # Recall never falls, so this is the first detection that reaches each of the eleven.
        for index in np.searchsorted(recall, recalls, side="left"):
            total[row] += envelope[row, index]
    return total / len(recalls)


def ap_under_envelope(ranking: Ranking) -> np.ndarray:
    """The AP of VOC2010 and later: the area under the precision envelope over recall.

    Args:
        ranking: of the class.

    Returns:
        (T,) float in 0..1, NaN where the class has no objects.
    """
    if ranking.num_objects == 0:
        return np.full(len(ranking.true_positive), np.nan)
    # Recall grows by 1 / num_objects at each true positive and does not change at the others.
    return (ranking.true_positive * ranking.envelope).sum(axis=1) / ranking.num_objects


def mean_ap(ap: np.ndarray) -> float:
    """Mean over the classes that have an AP; NaN if none has."""
    valid = ap[~np.isnan(ap)]
    return float(valid.mean()) if valid.size else float("nan")


class BestF1(NamedTuple):
    """The point of a class's precision-recall curve with the highest F1.

    Attributes:
        f1: 2 precision recall / (precision + recall), in 0..1.
        precision: at this point.
        recall: at this point.
        score: detections with this score or a higher one make it.
    """

    f1: float
    precision: float
    recall: float
    score: float


def best_f1(ranking: Ranking, threshold: int = 0) -> BestF1:
    """The highest F1 that a score threshold reaches, and the highest such score.

    Args:
        ranking: of the class.
        threshold: which of the T IoU thresholds.

    Returns:
        All 0 with a score of NaN without a true positive; all NaN without objects.
    """
    if ranking.num_objects == 0:
        return BestF1(np.nan, np.nan, np.nan, np.nan)
    true_positives = ranking.true_positives[threshold]
    counted = true_positives + ranking.false_positives[threshold]
    f1 = 2 * true_positives / (counted + ranking.num_objects)
    # A threshold takes all detections of a score or none.
    f1[:-1][ranking.scores[:-1] == ranking.scores[1:]] = 0
    if f1.max(initial=0) == 0:
        return BestF1(0.0, 0.0, 0.0, np.nan)
    best = int(f1.argmax())
    return BestF1(
        float(f1[best]),
        float(ranking.precision[threshold, best]),
        float(true_positives[best] / ranking.num_objects),
        float(ranking.scores[best]),
    )


def loss_by_image(rankings: Sequence[Ranking], num_images: int, threshold: int = 0) -> np.ndarray:
    """The mean AP under the envelope that is lost in each image.

    With n objects, a missed object loses 1/n. A found one loses (1 - p)/n, where p is the precision
    of the envelope at its detection, reached after F false and other true positives: its loss is
    due in equal parts to these F false positives.

    Args:
        rankings: of the K classes.
        num_images: I.
        threshold: which of the T IoU thresholds.

    Returns:
        (I,) float; its sum is 1 minus the mean AP. Zeros if no class has objects.
    """
    losses = np.zeros(num_images)
    with_objects = [ranking for ranking in rankings if ranking.num_objects]
    for ranking in with_objects:
        is_true = ranking.true_positive[threshold]
        is_false = ranking.false_positive[threshold]
        missed = np.bincount(ranking.object_image, minlength=num_images).astype(float)
        missed -= np.bincount(ranking.image[is_true], minlength=num_images)
        # Where the envelope's precision is reached: the first maximum at or after each detection.
        precision, envelope = ranking.precision[threshold], ranking.envelope[threshold]
        last = len(precision)
        peak = np.where(precision == envelope, np.arange(last), last)
        peak = np.minimum.accumulate(peak[::-1])[::-1][is_true]
        counted = ranking.true_positives[threshold] + ranking.false_positives[threshold]
        charge = np.bincount(peak, weights=1 / counted[peak], minlength=last)
        charge = np.cumsum(charge[::-1])[::-1]  # of all peaks from a detection on
        false = np.bincount(ranking.image[is_false], charge[is_false], minlength=num_images)
        losses += (missed + false) / ranking.num_objects / len(with_objects)
    return losses
