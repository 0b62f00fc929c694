"""The best F1 of a class, and the images to which the loss of AP is due."""

import math

import numpy as np
import pytest

from tests.evaluation.detections import CLASSES, random_split
from tract_det.evaluation.boxes import Detections
from tract_det.evaluation.evaluators import flat_detections
from tract_det.evaluation.ground_truth import from_annotations
from tract_det.evaluation.ranking import (
    Ranking,
    ap_under_envelope,
    best_f1,
    loss_by_image,
    mean_ap,
)
from tract_det.evaluation.voc_ap import match


def ranking(outcomes, scores=None, images=None, object_image=(0, 0)):
    """A class by the outcome of each detection: "t" true, "f" false, "i" ignored."""
    marks = np.array([list(outcomes)]).reshape(1, -1)
    count = marks.shape[1]
    return Ranking(
        np.arange(count),
        np.zeros(count, dtype=int) if images is None else np.array(images),
        np.linspace(0.9, 0.1, count) if scores is None else np.array(scores),
        marks == "t",
        marks == "f",
        np.array(object_image, dtype=int),
    )


def test_the_best_f1_has_its_precision_recall_and_score():
    # F1 after each: 2/3, 1/2, 4/5, 2/3.
    best = best_f1(ranking("tftf", scores=[0.9, 0.8, 0.7, 0.6]))
    assert best == pytest.approx((0.8, 2 / 3, 1, 0.7))


def test_ignored_detections_do_not_change_the_f1():
    assert best_f1(ranking("itit", scores=[0.9, 0.8, 0.7, 0.6])).f1 == 1


def test_a_score_threshold_takes_all_detections_of_that_score():
    # The first detection alone would have 2/3; with its equal, one of two is right.
    assert best_f1(ranking("tf", scores=[0.5, 0.5])).f1 == pytest.approx(0.5)


def test_f1_without_true_positives_is_zero_and_without_objects_nan():
    assert best_f1(ranking("ff"))[:3] == (0, 0, 0)
    assert math.isnan(best_f1(ranking("ff")).score)
    assert all(map(math.isnan, best_f1(ranking("f", object_image=()))))


def test_loss_is_due_to_misses_and_to_false_positives_before_a_true_one():
    # Image 0 has a false positive before the only true positive, in image 1: precision 1/2 at it.
    # The object of image 2 is missed. The last false positive costs nothing.
    one_class = ranking("ftf", images=[0, 1, 3], object_image=[1, 2])
    np.testing.assert_allclose(loss_by_image([one_class], 4), [0.25, 0, 0.5, 0])


def test_losses_of_all_images_sum_to_the_loss_of_the_mean_ap():
    images, image_detections = random_split(40)
    truth = from_annotations(images, CLASSES)
    detections = flat_detections(image_detections)
    by_class = match(truth.objects, detections).rankings(len(CLASSES))
    for threshold in (0, 5):
        lost = loss_by_image(by_class, 40, threshold)
        mean = mean_ap(np.array([ap_under_envelope(r)[threshold] for r in by_class]))
        assert 0.1 < mean < 0.9
        assert (lost >= 0).all()
        assert lost.sum() == pytest.approx(1 - mean)


def test_a_class_without_objects_loses_nothing():
    assert loss_by_image([ranking("ff", object_image=())], 2).tolist() == [0, 0]


def test_perfect_images_lose_nothing_and_a_worse_image_loses_more():
    images, image_detections = random_split(30)
    truth = from_annotations(images, CLASSES)
    detections = flat_detections(image_detections)
    emptied = detections.image != 3
    without = Detections(
        detections.image[emptied],
        detections.boxes[emptied],
        detections.scores[emptied],
        detections.labels[emptied],
    )
    assert (truth.objects.image == 3).any()

    def lost(some: Detections) -> np.ndarray:
        return loss_by_image(match(truth.objects, some).rankings(len(CLASSES)), 30)

    assert lost(without)[3] > lost(detections)[3]
