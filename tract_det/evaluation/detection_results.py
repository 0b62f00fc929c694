"""The figures of a set of detections: what results.json holds, in functions on arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tract_det.evaluation.bootstrap import (
    LEVEL,
    Means,
    difference_interval,
    draw,
    intervals,
    weighted_means,
    with_zero,
)
from tract_det.evaluation.boxes import Detections
from tract_det.evaluation.coco_ap import ByArea, coco_ap, coco_rankings
from tract_det.evaluation.confusion import confusion_matrix
from tract_det.evaluation.error_breakdown import KINDS, find_errors, gains
from tract_det.evaluation.ground_truth import GroundTruth
from tract_det.evaluation.metrics import METRICS
from tract_det.evaluation.permutation import (
    differing_images,
    draw_swaps,
    p_values,
    swapped_differences,
)
from tract_det.evaluation.ranking import Ranking, best_f1, mean_ap
from tract_det.evaluation.voc_ap import Matching, VOCResult, class_aps, match, warn_of_empty

SCORE_THRESHOLD = 0.5  # of the confusion matrix
_AT_75 = 5  # the position of IoU 0.75 among the thresholds


@dataclass(frozen=True)
class Evaluated:
    """Detections of a split, matched by a VOC rule and by COCO's.

    Attributes:
        truth: the split.
        detections: of all its images.
        matching: by the VOC rule.
        voc: the K classes' rankings by it.
        coco: the same by COCO's rule, for each range of areas.
        ap: the K classes' AP by both definitions of VOC.
    """

    truth: GroundTruth
    detections: Detections
    matching: Matching
    voc: Sequence[Ranking]
    coco: ByArea
    ap: VOCResult

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.truth.class_names)


def evaluate_detections(
    truth: GroundTruth, detections: Detections, rule: str = "devkit"
) -> Evaluated:
    """Matches the detections of a split. A class without objects is named by a warning.

    Args:
        truth: the split.
        detections: in any order of images, but within an image in the detector's order.
        rule: one of `voc_ap.RULES`.

    Raises:
        ValueError: if the rule is unknown.
    """
    matching = match(truth.objects, detections, rule)
    voc = matching.rankings(len(truth.class_names))
    ap = class_aps(voc, rule)
    warn_of_empty(truth.class_names, ap)
    coco = coco_rankings(truth.objects, detections, len(truth.class_names))
    return Evaluated(truth, detections, matching, voc, coco, ap)


def summary(evaluated: Evaluated) -> dict[str, Any]:
    """The means, and AP by class.

    Returns:
        `images`, `rule`, `voc_07` and `voc_area` (each with `mAP`, `mAP_50_95`, and per class `AP`
        and `AP_50_95`) and `coco` (its six figures); in per cent, NaN where there is no ground
        truth.
    """
    names = evaluated.truth.class_names
    return {
        "images": len(evaluated.truth.image_ids),
        "rule": evaluated.matching.rule,
        "voc_07": _per_class(evaluated.ap.ap_07, names),
        "voc_area": _per_class(evaluated.ap.ap_area, names),
        "coco": {
            # The NaN that is equal to itself in comparisons of results.
            name: math.nan if np.isnan(ap[0]) else float(ap[0])
            for name, ap in coco_ap(evaluated.coco).items()
        },
    }


def details(
    evaluated: Evaluated,
    *,
    samples: Means | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> dict[str, Any]:
    """What goes beyond the means.

    Args:
        evaluated: the matched detections.
        samples: from `sampled_means`, for the intervals; None or {} = no intervals.
        score_threshold: of the confusion matrix.

    Returns:
        `classes` (see `class_figures`), `errors` (see `error_figures`), `confusion`, and
        `intervals` with the interval of every mean, in per cent.
    """
    matrix = confusion_matrix(
        evaluated.truth.objects,
        evaluated.detections,
        evaluated.num_classes,
        score_threshold,
        evaluated.matching.rule,
    )
    results: dict[str, Any] = {
        "classes": class_figures(evaluated),
        "errors": error_figures(evaluated),
        "confusion": {
            "score_threshold": score_threshold,
            "classes": [*evaluated.truth.class_names, "background"],
            "matrix": matrix,
        },
    }
    if samples:
        number = len(next(iter(samples.values())))
        results["intervals"] = {"samples": number, "level": LEVEL}
        results["intervals"] |= intervals(_means(evaluated), samples)
    return results


def class_figures(evaluated: Evaluated) -> dict[str, dict[str, float]]:
    """Figures of each class.

    Returns:
        By class name: `AP_50`, `AP_75` and `AP_50_95` by both rules (`voc_07.AP_50`, ...), best
        `f1` with its `precision`, `recall` and `score`, and the `max_recall` of all detections, all
        at IoU 0.5; in per cent but for the score, which is a threshold. `objects` without the
        difficult ones, the `images` that have them, `difficult` and `detections` are numbers.
    """
    labels, difficult = evaluated.truth.objects.labels, evaluated.truth.objects.difficult
    figures = {}
    for label, (name, ranking) in enumerate(
        zip(evaluated.truth.class_names, evaluated.voc, strict=True)
    ):
        row: dict[str, float] = {}
        for group, ap in (
            ("voc_07", 100 * evaluated.ap.ap_07[label]),
            ("voc_area", 100 * evaluated.ap.ap_area[label]),
        ):
            row[f"{group}.AP_50"] = float(ap[0])
            row[f"{group}.AP_75"] = float(ap[_AT_75])
            row[f"{group}.AP_50_95"] = float(ap.mean())
        best = best_f1(ranking)
        row |= {
            "f1": 100 * best.f1,
            "precision": 100 * best.precision,
            "recall": 100 * best.recall,
            "score": best.score,
            "max_recall": 100 * _max_recall(ranking),
            "objects": ranking.num_objects,
            "images": len(np.unique(ranking.object_image)),
            "difficult": int(np.count_nonzero(difficult[labels == label])),
            "detections": len(ranking.scores),
        }
        figures[name] = row
    return figures


def error_figures(evaluated: Evaluated) -> dict[str, Any]:
    """The mistakes of each of `error_breakdown.KINDS`.

    Returns:
        By kind: `count`, and what mending it alone adds to the mean APs at IoU 0.5, `voc_07` and
        `voc_area`, in points of per cent.
    """
    errors = find_errors(evaluated.detections, evaluated.matching)
    counts = errors.counts()
    mended = gains(evaluated.matching, errors, evaluated.num_classes)
    return {
        kind: {
            "count": counts[kind],
            "voc_07": 100 * mended[kind].ap_07,
            "voc_area": 100 * mended[kind].ap_area,
        }
        for kind in KINDS
    }


def compare(evaluated: Evaluated, other: Evaluated, samples: Means) -> dict[str, Any]:
    """The means of the first detections minus those of the second, on the same split.

    An interval holds 0 wherever the test that gives the p-value does not see a difference: where a
    few images make it, the bootstrap cannot tell.

    Args:
        evaluated: the first.
        other: the second.
        samples: the first's, from `sampled_means`; the others are as many.

    Returns:
        `samples`, `level`, numbers of `images` and of `images_that_differ`, and by name of the mean
        its `difference`, `interval` and `p`.
    """
    number, images = len(next(iter(samples.values()))), len(evaluated.truth.image_ids)
    of_other, means, other_means = sampled_means(other, number), _means(evaluated), _means(other)
    differences = {name: value - other_means[name] for name, value in means.items()}
    both = (evaluated.detections, other.detections)
    differing = differing_images(*both, images)
    swapped = swapped_differences(
        evaluated.truth.objects,
        both,
        num_images=images,
        num_classes=evaluated.num_classes,
        rule=evaluated.matching.rule,
        swaps=draw_swaps(differing, number),
    )
    p = p_values(differences, swapped)
    rows = {}
    for name, difference in differences.items():
        ends = difference_interval(difference, samples[name] - of_other[name])
        ends = with_zero(ends) if p[name] >= 1 - LEVEL else ends
        rows[name] = {"difference": difference, "interval": ends, "p": p[name]}
    count = int(np.count_nonzero(differing))
    counts = {"samples": number, "images": images, "images_that_differ": count}
    return {**counts, "level": LEVEL, **rows}


def sampled_means(evaluated: Evaluated, bootstrap: int) -> Means:
    """The means over so many samples of the images; {} for 0 samples.

    Those of other detections on the same split are of the same samples.

    Returns:
        The figures of `metrics.METRICS` by name, in per cent, (bootstrap,) float each.
    """
    if not bootstrap:
        return {}
    weights = draw(len(evaluated.truth.image_ids), bootstrap)
    return weighted_means(evaluated.voc, evaluated.coco, evaluated.matching.rule, weights)


def _means(evaluated: Evaluated) -> dict[str, float]:
    results = summary(evaluated)
    paths = (metric.split(".") for metric in METRICS)
    return {f"{group}.{name}": results[group][name] for group, name in paths}


def _max_recall(ranking: Ranking) -> float:
    if not ranking.num_objects:
        return math.nan
    return float(np.count_nonzero(ranking.true_positive[0]) / ranking.num_objects)


def _per_class(ap: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Means and per-class entries in per cent, from (K, T) APs in 0..1."""
    percent = 100 * ap
    return {
        "mAP": mean_ap(percent[:, 0]),
        "mAP_50_95": mean_ap(percent.mean(axis=1)),
        "AP": dict(zip(names, percent[:, 0].tolist(), strict=True)),
        "AP_50_95": dict(zip(names, percent.mean(axis=1).tolist(), strict=True)),
    }
