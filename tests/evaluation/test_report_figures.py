"""The curves and the worst images of a report, against cases worked by hand."""

import numpy as np
import pytest

from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.detection_results import class_figures, evaluate_detections
from tract_det.evaluation.ground_truth import GroundTruth
from tract_det.evaluation.report_figures import curve, report_figures, worst_images

BOX, ELSEWHERE = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]


def evaluated(found):
    """Four images with an object each; `found` has (image, score, whether the box is right)."""
    n = 4
    objects = Objects(
        np.arange(n), np.array([BOX] * n), np.zeros(n, dtype=int), np.zeros(n, dtype=bool)
    )
    ids = tuple("abcd")
    truth = GroundTruth(ids, ("disc",), objects, {name: i for i, name in enumerate(ids)}, {}, {})
    detections = Detections(
        np.array([image for image, _, _ in found], dtype=int),
        np.array([BOX if right else ELSEWHERE for _, _, right in found]).reshape(-1, 4),
        np.array([score for _, score, _ in found], dtype=float),
        np.zeros(len(found), dtype=int),
    )
    return evaluate_detections(truth, detections)


CASE = [(0, 0.9, True), (1, 0.8, False), (1, 0.7, True), (2, 0.6, True), (3, 0.2, False)]


def test_a_curve_has_recall_and_precision_at_each_score():
    points = curve(evaluated(CASE).voc[0])
    assert points["recall"] == pytest.approx([25, 25, 50, 75, 75])
    assert points["precision"] == pytest.approx([100, 50, 100 * 2 / 3, 75, 60])


def test_detections_of_equal_scores_are_one_point_of_a_curve():
    points = curve(evaluated([(0, 0.9, True), (1, 0.9, False)]).voc[0])
    assert points == {"recall": [25.0], "precision": [50.0]}


def test_a_long_curve_keeps_its_ends_in_few_points():
    many = [(i % 4, 1 - i / 1000, i < 4) for i in range(900)]
    points = curve(evaluated(many).voc[0])
    assert len(points["recall"]) == 200
    assert points["precision"][-1] == pytest.approx(100 * 4 / 900)


def test_the_best_f1_lies_on_the_curve():
    case = evaluated(CASE)
    best = class_figures(case)["disc"]
    points = curve(case.voc[0])
    pairs = list(zip(points["recall"], points["precision"], strict=True))
    assert min(abs(r - best["recall"]) + abs(p - best["precision"]) for r, p in pairs) < 1e-9


def test_the_worst_images_come_first_and_good_ones_are_left_out():
    worst = worst_images(evaluated(CASE), 12)
    # The missed object loses 1/4. The false box of image 1 comes before two found objects, whose
    # precision it lowers to 3/4: it loses 2 * (1 - 3/4) / 4.
    assert [(entry["image"], round(entry["loss"], 9)) for entry in worst] == [
        ("d", 25.0),
        ("b", 12.5),
    ]
    assert len(worst_images(evaluated(CASE), 1)) == 1


def test_what_is_shown_of_an_image_is_what_the_best_f1_keeps():
    worst = {entry["image"]: entry for entry in worst_images(evaluated(CASE), 12)}
    assert worst["d"]["detections"] == []  # a score of 0.2 is below the best F1's 0.6
    assert [d["verdict"] for d in worst["b"]["detections"]] == ["false", "true"]
    assert worst["b"]["objects"] == [{"box": BOX, "label": 0, "difficult": False}]


def test_a_split_without_detections_has_figures():
    figures = report_figures(evaluated([]))
    assert figures["curves"]["disc"] == {"recall": [], "precision": []}
    assert [entry["image"] for entry in figures["worst"]] == ["a", "b", "c", "d"]
