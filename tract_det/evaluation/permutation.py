"""Whether two sets of detections differ: their images are swapped.

If it does not matter which of two detectors made which detections, then those of an image can be
swapped between both sets, and the difference of their means is as likely to be that of any of the
2^I ways to do so. The p-value is the share of ways whose difference is at least as great: of all
where few images differ, else of a random sample. It keeps its level for every figure and any number
of images: for few that differ, k, the share is at least 2^(1 - k), and a class with a single object
makes no difference significant.

Source: Noreen, "Computer-Intensive Methods for Testing Hypotheses", 1989, chapter 2 (approximate
randomization); Phipson and Smyth, "Permutation P-values Should Never Be Zero", 2010.

Shapes: B samples, I images.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from tract_det.evaluation.bootstrap import Means, weighted_means
from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.coco_ap import coco_rankings
from tract_det.evaluation.metrics import ROUNDING
from tract_det.evaluation.voc_ap import match

Boxes = TypeVar("Boxes", Objects, Detections)

_FEW = 1023  # ways to swap ten images
# Of image, label, score and box, each: files of results may round an edge, in pixels.
_TOLERANCE = np.array([0, 0, 0, 1e-9, 1e-9, 1e-9, 1e-9])


def swapped_differences(
    objects: Objects,
    detections: tuple[Detections, Detections],
    *,
    num_images: int,
    num_classes: int,
    rule: str,
    swaps: np.ndarray,
) -> Means:
    """The differences of the means, the first detections' minus the second's, after each swap.

    Args:
        objects: the ground truth.
        detections: both sets, in any order of images, but within an image in the detector's order.
        num_images: I.
        num_classes: K.
        rule: one of `voc_ap.RULES`.
        swaps: (B, I) bool, whether an image's detections are swapped; see `draw_swaps`.

    Returns:
        By the names of `metrics.METRICS`, in per cent, (B,) float each; NaN where a mean is.
    """
    # A split in which each image occurs twice, once with the detections of each set: weights of 1
    # and 0 choose one of the two. Copies lie side by side, so that ties keep the split's order.
    copies = _joined(objects, objects), _joined(*detections)
    voc = match(*copies, rule).rankings(num_classes)
    coco = coco_rankings(*copies, num_classes)
    weights = np.empty((len(swaps), 2 * num_images), dtype=np.int32)
    weights[:, 0::2], weights[:, 1::2] = ~swaps, swaps
    first = weighted_means(voc, coco, rule, weights)
    second = weighted_means(voc, coco, rule, 1 - weights)
    return {name: values - second[name] for name, values in first.items()}


def draw_swaps(differing: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Which images are swapped: all ways to do so if they are few, or no more than the samples.

    Args:
        differing: (I,) bool, the images whose detections differ; swapping others changes nothing.
        samples: number of ways to draw if there are more.
        seed: of the draw.

    Returns:
        (B, I) bool. All ways are without the one to swap none, but where no image differs.
    """
    images = np.flatnonzero(differing)
    if 2 ** min(len(images), 63) - 1 <= max(samples, _FEW):
        ways = np.arange(1, max(2, 2 ** len(images)))
        chosen = (ways[:, None] >> np.arange(len(images)) & 1).astype(bool)
    else:
        chosen = np.random.default_rng(seed).random((samples, len(images))) < 0.5
    swaps = np.zeros((len(chosen), len(differing)), dtype=bool)
    swaps[:, images] = chosen
    return swaps


def p_values(
    differences: Mapping[str, float], swapped: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The two-sided p-value of each difference; NaN where it is NaN.

    Args:
        differences: on the split as it is, by name.
        swapped: (B,) float by name, after the swaps.

    Returns:
        1 / (B + 1) at least, since the split as it is counts as one of the ways.
    """
    return {name: _p_value(value, swapped[name]) for name, value in differences.items()}


def _p_value(difference: float, swapped: np.ndarray) -> float:
    if math.isnan(difference):
        return math.nan
    as_great = np.count_nonzero(np.abs(swapped) >= abs(difference) - ROUNDING)
    return (1 + as_great) / (1 + len(swapped))


def differing_images(first: Detections, second: Detections, num_images: int) -> np.ndarray:
    """Whether the detections of each image differ, or their order within a class, (I,) bool.

    What a file of results has rounded of an edge is no difference.
    """
    counts = [np.bincount(side.image, minlength=num_images) for side in (first, second)]
    differs = counts[0] != counts[1]
    first_rows, second_rows = (_sorted_rows(side, ~differs) for side in (first, second))
    unequal = (np.abs(first_rows - second_rows) > _TOLERANCE).any(axis=1)
    differs[first_rows[unequal, 0].astype(np.int64)] = True
    return differs


def _sorted_rows(detections: Detections, of_images: np.ndarray) -> np.ndarray:
    """Image, label, score and box of the detections of some images, class by class, (n, 7)."""
    columns = (detections.image, detections.labels, detections.scores, *detections.boxes.T)
    rows = np.column_stack(columns).astype(np.float64)[of_images[detections.image]]
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def _joined(first: Boxes, second: Boxes) -> Boxes:
    """Both in one split: image i of the first is 2 i there, that of the second 2 i + 1."""
    columns: dict[str, Any] = {
        name: None if values is None else np.concatenate([values, getattr(second, name)])
        for name, values in vars(first).items()
    }
    columns["image"] = np.concatenate([2 * first.image, 2 * second.image + 1])
    return replace(first, **columns)
