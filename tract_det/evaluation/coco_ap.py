"""COCO's average precision of boxes: pycocotools' sums in numpy, for all images at once.

It is pycocotools' `COCOeval` for boxes, at most 100 detections per image and class, but that VOC's
difficult objects are ignored: such an object is not in the recall, and the detection matched to it
is neither a true nor a false positive. Overlaps and thresholds are computed in the same order of
floating point operations, so that every match falls on the same side.

The matching is greedy: in descending order of score, each detection takes the free object of its
image and class that it overlaps most (the last of equals). Objects that count go before ignored
ones; an object out of the range of areas is ignored, and so is an unmatched detection out of it. A
crowd is overlapped by the detection's area alone, and is never taken.

Shapes: K classes, A ranges of areas, T IoU thresholds, D detections, n objects.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tract_det.evaluation.boxes import Detections, Objects, pairs_in_groups
from tract_det.evaluation.metrics import COCO_STATS
from tract_det.evaluation.ranking import Ranking, by_class
from tract_det.evaluation.weighted_ap import weighted_ap

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
# Ranges of areas in square pixels, both ends included: all, small, medium, large.
AREAS = np.array([(0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10)])
_MAX_DETECTIONS = 100
# The range of areas of each of COCO_STATS, and its IoU thresholds.
_PARTS = {
    "AP": (0, slice(None)),
    "AP50": (0, slice(0, 1)),
    "AP75": (0, slice(5, 6)),
    "APs": (1, slice(None)),
    "APm": (2, slice(None)),
    "APl": (3, slice(None)),
}

ByArea = Sequence[Sequence[Ranking]]


def coco_rankings(objects: Objects, detections: Detections, num_classes: int) -> ByArea:
    """Matches the detections of a split.

    Args:
        objects: the ground truth.
        detections: in any order of images, but within an image in the detector's order.
        num_classes: K.

    Returns:
        For each of `AREAS` and each class the ranked detections, at every IoU threshold.
    """
    order = np.lexsort((detections.image, -detections.scores, detections.labels))
    group = (detections.image * num_classes + detections.labels)[order]
    if np.bincount(detections.image, minlength=1).max() > _MAX_DETECTIONS:
        kept = rank_in_group(group) < _MAX_DETECTIONS
        order, group = order[kept], group[kept]
    labels, image, scores, edges = (
        values[order]
        for values in (detections.labels, detections.image, detections.scores, detections.boxes)
    )
    boxes, object_boxes = _with_size(edges), _with_size(objects.boxes)
    area = object_boxes[:, 2] * object_boxes[:, 3] if objects.area is None else objects.area
    ignored = _is_outside(area) | objects.difficult.astype(bool)  # (A, n)
    inside = ~_is_outside(boxes[:, 2] * boxes[:, 3])  # (A, D)
    object_group = objects.image * num_classes + objects.labels
    pairs = _overlapping_pairs(group, boxes, object_group, object_boxes, objects.crowd)
    rows, taken = _greedy(group, *pairs, ignored, objects.crowd)
    by_area = []
    for object_of, is_ignored, is_inside in zip(taken, ignored, inside, strict=True):
        true_positive, false_positive = np.zeros((2, len(IOU_THRESHOLDS), len(order)), dtype=bool)
        # -1, where no object is taken, picks the appended entry.
        true_positive[:, rows] = np.append(~is_ignored, False)[object_of]
        false_positive[:] = is_inside
        false_positive[:, rows] &= object_of < 0
        whole = Ranking(
            order, image, scores, true_positive, false_positive, objects.image[~is_ignored]
        )
        by_area.append(by_class(whole, labels, objects.labels[~is_ignored], num_classes))
    return by_area


def coco_ap(by_area: ByArea, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """COCO's six figures.

    Args:
        by_area: see `coco_rankings`.
        weights: (B, I) int, how many times each image counts in each of B samples; None = once, in
            one sample.

    Returns:
        The `COCO_STATS` in per cent, (B,) float each; NaN where there is no ground truth.
    """
    # (A, B, K, T)
    ap = np.array(
        [
            np.stack([weighted_ap(r, RECALLS, weights)[0] for r in by_class], axis=1)
            for by_class in by_area
        ]
    )
    figures = {}
    for name in COCO_STATS:
        area, thresholds = _PARTS[name]
        figures[name] = 100 * mean_without_nan(ap[area, :, :, thresholds])
    return figures


def mean_without_nan(ap: np.ndarray) -> np.ndarray:
    """Mean over all axes but the first, of what is not NaN; NaN where there is nothing else."""
    flat = ap.reshape(len(ap), -1)
    count = np.count_nonzero(~np.isnan(flat), axis=1)
    total = np.nansum(flat, axis=1)
    return np.divide(total, count, out=np.full(len(ap), math.nan), where=count > 0)


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many members of its group go before each. (D,) int -> (D,) int."""
    by_group = np.argsort(group, kind="stable")
    ordered = group[by_group]
    rank = np.empty(len(group), dtype=int)
    rank[by_group] = np.arange(len(group)) - np.searchsorted(ordered, ordered, side="left")
    return rank


def _with_size(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) edges to (n, 4) corner and size, as COCO's files have them."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _is_outside(area: np.ndarray) -> np.ndarray:
    """Whether an area is out of each range. (n,) -> (A, n)."""
    return (area < AREAS[:, :1]) | (area > AREAS[:, 1:])


def _iou(boxes: np.ndarray, object_boxes: np.ndarray, is_crowd: np.ndarray | None) -> np.ndarray:
    """IoU of boxes in the same row, given by corner and size; of a crowd, by the box's area."""
    edges, object_edges = boxes[:, :2] + boxes[:, 2:], object_boxes[:, :2] + object_boxes[:, 2:]
    overlap = np.minimum(edges, object_edges) - np.maximum(boxes[:, :2], object_boxes[:, :2])
    intersection = overlap[:, 0] * overlap[:, 1]
    area, object_area = boxes[:, 2] * boxes[:, 3], object_boxes[:, 2] * object_boxes[:, 3]
    union = area + object_area - intersection
    if is_crowd is not None:
        union = np.where(is_crowd, area, union)
    is_overlap = (overlap > 0).all(axis=1)
    return np.divide(intersection, union, out=np.zeros(len(boxes)), where=is_overlap)


def _greedy(
    group: np.ndarray,
    row: np.ndarray,
    object_of: np.ndarray,
    iou: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which object each detection takes.

    Args:
        group: (D,) int, image and class of each detection; in a group in descending order of score.
        row: (P,) int, the detection of each pair that overlaps enough.
        object_of: (P,) int, its object.
        iou: (P,) float.
        ignored: (A, n) bool.
        crowd: (n,) bool, or None.

    Returns:
        The R detections that are in a pair, ascending, and the object that each takes, (A, T, R)
        int; -1 = none.
    """
    # A pair's preference: more overlap, then the later object; objects that count before ignored.
    preference = np.empty(len(row), dtype=np.int32)
    preference[np.lexsort((object_of, iou))] = np.arange(len(row))
    priority = preference + len(row) * ~ignored[:, object_of]  # (A, P)
    reaches = iou >= IOU_THRESHOLDS[:, None]  # (T, P)
    is_free = np.ones((len(AREAS), len(IOU_THRESHOLDS), ignored.shape[1]), dtype=bool)
    rows, row_of_pair = np.unique(row, return_inverse=True)
    taken = np.full((*is_free.shape[:2], len(rows)), -1, dtype=np.int32)
    # Detections of different groups do not compete: the first of all groups choose together, then
    # the second of all, and so on.
    turn = rank_in_group(group[rows])[row_of_pair]
    by_turn = np.lexsort((row, turn))
    bounds = np.searchsorted(turn[by_turn], np.arange(turn.max(initial=-1) + 2))
    for begin, end in pairwise(bounds):
        pairs = by_turn[begin:end]
        objects, choosers = object_of[pairs], row_of_pair[pairs]
        is_possible = reaches[:, pairs] & is_free[:, :, objects]
        wish = np.where(is_possible, priority[:, None, pairs], -1)  # (A, T, P')
        first = np.flatnonzero(np.diff(choosers, prepend=-1))
        highest = np.maximum.reduceat(wish, first, axis=2)
        lengths = np.diff(first, append=len(pairs))
        is_chosen = is_possible & (wish == np.repeat(highest, lengths, axis=2))
        area, threshold, position = np.nonzero(is_chosen)
        taken[area, threshold, choosers[position]] = objects[position]
        is_free[area, threshold, objects[position]] = False
        if crowd is not None:
            is_free[:, :, crowd] = True
    return rows, taken


def _overlapping_pairs(
    group: np.ndarray,
    boxes: np.ndarray,
    object_group: np.ndarray,
    object_boxes: np.ndarray,
    crowd: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection, object and IoU of all pairs that reach the lowest threshold, (P,) each."""
    parts = [(np.empty(0, dtype=int), np.empty(0, dtype=int), np.empty(0))]
    for pairs in pairs_in_groups(group, object_group):
        is_crowd = None if crowd is None else crowd[pairs.object]
        iou = _iou(boxes[pairs.row], object_boxes[pairs.object], is_crowd)
        near = iou >= IOU_THRESHOLDS[0]
        parts.append((pairs.row[near], pairs.object[near], iou[near]))
    row, object_of, iou = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return row, object_of, iou
