"""What kinds of mistakes stand behind an AP, and the AP that mending each would give.

The six kinds are TIDE's. A false positive is, by the first of these that holds (f is the overlap
that a match takes, 0.5; b is 0.1):

==============  ===================================================================================
localisation    it overlaps an object of its class by b at least, but by less than f
classification  it overlaps an object of another class by f
duplicate       it overlaps an object of its class by f, which another detection has found
background      it overlaps no object by more than b
both            what remains: neither its class nor its box is right
==============  ===================================================================================

A *missed* object is found by no detection, and is not the object of any error of the first two
kinds. Mending moves the class or the box of the best-scored of the detections that mistake the same
object; the others, and all of the kinds duplicate, background and both, go away. Mending misses
takes the missed objects out of the recall.

Matching and AP are those of the VOC rule. A difficult object is no background, and it is never
missed: a detection that mistakes one goes away when it is mended, as it would be ignored.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020.

Shapes: K classes, D detections, n objects.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tract_det.evaluation.boxes import Detections, best_overlaps
from tract_det.evaluation.ranking import Ranking, ap_11_point, ap_under_envelope, by_class, mean_ap
from tract_det.evaluation.voc_ap import IOU_THRESHOLDS, Matching, reaches, view_of

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
BACKGROUND_IOU = 0.1
_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))


@dataclass(frozen=True)
class Errors:
    """The mistakes of a matching at its lowest IoU threshold.

    Attributes:
        kind: (D,) int, position in `KINDS`, in the order of the matching; -1 = no mistake.
        mistaken: (D,) int, the object that a classification or localisation error mistakes; -1.
        is_mended: (D,) bool, whether mending makes a true positive of the detection.
        missed: (n,) bool.
    """

    kind: np.ndarray
    mistaken: np.ndarray
    is_mended: np.ndarray
    missed: np.ndarray

    def counts(self) -> dict[str, int]:
        """The number of mistakes of each of `KINDS`."""
        kinds = np.bincount(self.kind[self.kind >= 0], minlength=len(KINDS))
        kinds[_MISSED] = np.count_nonzero(self.missed)
        return dict(zip(KINDS, kinds.tolist(), strict=True))


class Gain(NamedTuple):
    """What mending a kind of mistakes adds to both mean APs, in 0..1; NaN without objects."""

    ap_07: float
    ap_area: float


def find_errors(detections: Detections, matching: Matching) -> Errors:
    """Says of every false positive and of every object that was not found what is wrong.

    Args:
        detections: those that were matched.
        matching: of all classes; its first IoU threshold is used.
    """
    objects, rule, threshold = matching.objects, matching.rule, IOU_THRESHOLDS[0]
    view = view_of(objects, detections, rule)
    other_iou, other_object = best_overlaps(
        matching.image,
        view.boxes[matching.detection],
        objects.image,
        view.object_boxes,
        view.pixel,
        other_than=(matching.labels, objects.labels),
    )
    is_overlap = reaches(matching.best_iou, threshold, rule)
    conditions = {
        _LOCALISATION: (matching.best_iou >= BACKGROUND_IOU) & ~is_overlap,
        _CLASSIFICATION: reaches(other_iou, threshold, rule),
        _DUPLICATE: is_overlap,
        _BACKGROUND: np.maximum(matching.best_iou, other_iou) <= BACKGROUND_IOU,
        _BOTH: np.ones(len(other_iou), dtype=bool),
    }
    kind = np.select(list(conditions.values()), list(conditions), default=-1)
    kind[~matching.false_positive[0]] = -1
    mistaken = np.select(
        [kind == _CLASSIFICATION, kind == _LOCALISATION],
        [other_object, matching.best_object],
        default=-1,
    )
    is_found = np.zeros(len(objects.labels), dtype=bool)
    is_found[matching.best_object[matching.true_positive[0]]] = True
    wanted = ~is_found & ~objects.difficult.astype(bool)
    return Errors(kind, mistaken, *_mended(matching, mistaken, wanted))


def _mended(
    matching: Matching, mistaken: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best-scored detection that mistakes each wanted object, and the objects without one."""
    candidates = np.flatnonzero((mistaken >= 0) & np.append(wanted, False)[mistaken])
    by_score = np.lexsort((matching.image[candidates], -matching.scores[candidates]))
    candidates = candidates[by_score]
    mistaken_objects, first = np.unique(mistaken[candidates], return_index=True)
    is_mended = np.zeros(len(mistaken), dtype=bool)
    is_mended[candidates[first]] = True
    missed = wanted.copy()
    missed[mistaken_objects] = False
    return is_mended, missed


def mend(matching: Matching, errors: Errors, kind: str, num_classes: int) -> list[Ranking]:
    """The rankings of the K classes, at one IoU threshold, without the mistakes of a kind.

    Args:
        matching: of all classes.
        errors: its mistakes.
        kind: one of `KINDS`.
        num_classes: K.
    """
    objects, code = matching.objects, KINDS.index(kind)
    is_of_kind = errors.kind == code
    is_mended = is_of_kind & errors.is_mended
    labels = matching.labels.copy()
    labels[is_mended] = objects.labels[errors.mistaken[is_mended]]
    # Most kinds change no class, and the order stays.
    order = np.arange(len(labels))
    if (labels != matching.labels).any():
        order = np.lexsort((matching.detection, matching.image, -matching.scores, labels))
    counts = ~objects.difficult.astype(bool)
    if code == _MISSED:
        counts &= ~errors.missed
    whole = Ranking(
        matching.detection[order],
        matching.image[order],
        matching.scores[order],
        (matching.true_positive[:1] | is_mended)[:, order],
        (matching.false_positive[:1] & ~is_of_kind)[:, order],
        objects.image[counts],
    )
    return by_class(whole, labels[order], objects.labels[counts], num_classes)


def gains(matching: Matching, errors: Errors, num_classes: int) -> dict[str, Gain]:
    """What mending each of `KINDS` alone adds to the mean APs at the lowest IoU threshold.

    A class all of whose objects were missed has an AP of 1 without its misses, where it has
    detections or not.
    """
    before = [ranking.at(0) for ranking in matching.rankings(num_classes)]
    ap_07, ap_area = _aps(before, matching.rule)
    gains = {}
    for kind in KINDS:
        mended_07, mended_area = _aps(mend(matching, errors, kind, num_classes), matching.rule)
        for mended in (mended_07, mended_area):
            mended[np.isnan(mended) & ~np.isnan(ap_07)] = 1
        gains[kind] = Gain(
            mean_ap(mended_07) - mean_ap(ap_07), mean_ap(mended_area) - mean_ap(ap_area)
        )
    return gains


def _aps(rankings: list[Ranking], rule: str) -> tuple[np.ndarray, np.ndarray]:
    """(K,) each."""
    return (
        np.array([ap_11_point(ranking, rule)[0] for ranking in rankings]),
        np.array([ap_under_envelope(ranking)[0] for ranking in rankings]),
    )
