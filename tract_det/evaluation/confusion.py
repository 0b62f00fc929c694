"""The confusion matrix of a detector at a score threshold, with the background as a class.

First each detection, in descending order of score, takes the free object of its image and class
that it overlaps most; then those that are left take what is left of any class, likewise. A
detection without an object is one of the background, an object without a detection is taken for
background. A difficult object is in no cell, nor is a detection that takes one; any number may.
"""

import numpy as np

from tract_det.evaluation.boxes import Detections, Objects, paired_iou, pairs_in_groups
from tract_det.evaluation.voc_ap import IOU_THRESHOLDS, reaches, view_of


def confusion_matrix(
    objects: Objects,
    detections: Detections,
    num_classes: int,
    score_threshold: float,
    rule: str = "devkit",
) -> np.ndarray:
    """Counts objects by their class and by the class of their detection.

    Args:
        objects: the ground truth.
        detections: those with a score below the threshold are left out.
        num_classes: K.
        score_threshold: the lowest score, as the rule sees scores.
        rule: one of `voc_ap.RULES`, for the overlap that a match takes.

    Returns:
        (K + 1, K + 1) int: row = class of the object, column = class of the detection, the last of
        both = background.
    """
    view = view_of(objects, detections, rule)
    order = np.lexsort((detections.image, -view.scores))
    order = order[view.scores[order] >= score_threshold]
    labels = detections.labels[order]
    difficult = objects.difficult.astype(bool)
    object_of = _assign(
        detections.image[order],
        view.boxes[order],
        labels,
        objects,
        view.object_boxes,
        view.pixel,
        rule,
    )
    is_matched = object_of >= 0
    is_ignored = np.append(difficult, False)[object_of]
    is_found = np.zeros(len(difficult), dtype=bool)
    is_found[object_of[is_matched]] = True
    rows = np.append(objects.labels, num_classes)[object_of][~is_ignored]
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=int)
    np.add.at(matrix, (rows, labels[~is_ignored]), 1)
    np.add.at(matrix, (objects.labels[~is_found & ~difficult], num_classes), 1)
    return matrix


def _assign(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    objects: Objects,
    object_boxes: np.ndarray,
    pixel: float,
    rule: str,
) -> np.ndarray:
    """The object that each detection takes, (D,) int; -1 = none."""
    parts: list[tuple[np.ndarray, ...]] = []
    for pairs in pairs_in_groups(image, objects.image):
        iou = paired_iou(boxes[pairs.row], object_boxes[pairs.object], pixel)
        near = reaches(iou, IOU_THRESHOLDS[0], rule)
        parts.append((pairs.row[near], pairs.object[near], iou[near]))
    object_of = np.full(len(image), -1)
    if not parts:
        return object_of
    row, candidate, iou = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    is_other = labels[row] != objects.labels[candidate]
    order = np.lexsort((candidate, -iou, row, is_other))
    is_free = [True] * len(objects.labels)
    is_difficult = objects.difficult.tolist()
    taken = object_of.tolist()
    for detection, index in zip(row[order].tolist(), candidate[order].tolist(), strict=True):
        if taken[detection] < 0 and is_free[index]:
            taken[detection] = index
            is_free[index] = is_difficult[index]
    return np.array(taken)
