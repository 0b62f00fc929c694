"""The confusion matrix, by hand."""

import numpy as np
import pytest

from tests.evaluation.test_error_breakdown import CAT, DOG, FAR, A, B, case
from tract_det.evaluation.confusion import confusion_matrix
from tract_det.evaluation.voc_ap import RULES

BACKGROUND = 2


def cells(objects, detections, score_threshold=0.5, rule="devkit"):
    """{(true class, detected class): number} of what is not 0."""
    matrix = confusion_matrix(*case(objects, detections), 2, score_threshold, rule)
    assert matrix.shape == (3, 3)
    return {(int(i), int(j)): int(matrix[i, j]) for i, j in zip(*np.nonzero(matrix), strict=True)}


@pytest.mark.parametrize("rule", RULES)
def test_right_wrong_false_and_missed_are_in_their_cells(rule):
    objects = [(A, CAT, False), (B, CAT, False), ((0, 200, 50, 250), DOG, False)]
    detections = [(A, CAT, 0.9), (B, DOG, 0.8), (FAR, CAT, 0.7)]
    assert cells(objects, detections, rule=rule) == {
        (CAT, CAT): 1,
        (CAT, DOG): 1,
        (BACKGROUND, CAT): 1,
        (DOG, BACKGROUND): 1,
    }


def test_a_score_of_the_threshold_counts_and_a_lower_one_does_not():
    assert cells([(A, CAT, False)], [(A, CAT, 0.5)]) == {(CAT, CAT): 1}
    assert cells([(A, CAT, False)], [(A, CAT, 0.49)]) == {(CAT, BACKGROUND): 1}


def test_the_right_class_goes_before_a_better_score_or_box():
    detections = [(A, DOG, 0.9), ((0, 0, 100, 60), CAT, 0.6)]
    assert cells([(A, CAT, False)], detections) == {(CAT, CAT): 1, (BACKGROUND, DOG): 1}


def test_an_object_has_one_detection():
    assert cells([(A, CAT, False)], [(A, CAT, 0.9), (A, CAT, 0.8)]) == {
        (CAT, CAT): 1,
        (BACKGROUND, CAT): 1,
    }


def test_a_difficult_object_and_its_detections_are_in_no_cell():
    assert cells([(A, CAT, True)], [(A, CAT, 0.9), (A, CAT, 0.8), (A, DOG, 0.7)]) == {}
    assert cells([(A, CAT, True)], [(FAR, CAT, 0.9)]) == {(BACKGROUND, CAT): 1}


def test_an_iou_of_one_half_is_a_match_by_devkit_only():
    detections = [((0, 0, 100, 50), CAT, 0.9)]
    assert cells([(A, CAT, False)], detections) == {(CAT, CAT): 1}
    assert (CAT, CAT) not in cells([(A, CAT, False)], detections, rule="detectron2")


def test_rows_sum_to_the_objects_and_columns_to_the_detections():
    rng = np.random.default_rng(0)
    objects = [((x, 0, x + 60, 60), int(rng.integers(2)), False) for x in range(0, 2000, 40)]
    detections = [
        ((x, 5, x + 60, 65), int(rng.integers(2)), float(rng.random())) for x in range(0, 2000, 25)
    ]
    matrix = confusion_matrix(*case(objects, detections), 2, 0.3)
    labels = [label for _, label, _ in objects]
    assert matrix[:2].sum(axis=1).tolist() == [labels.count(CAT), labels.count(DOG)]
    kept = [label for _, label, score in detections if score >= 0.3]
    assert matrix[:, :2].sum(axis=0).tolist() == [kept.count(CAT), kept.count(DOG)]


def test_without_detections_all_is_background():
    objects, detections = case([(A, CAT, False)], [(A, CAT, 0.1)])
    assert confusion_matrix(objects, detections, 2, 0.5).tolist() == [[0, 0, 1], [0] * 3, [0] * 3]
