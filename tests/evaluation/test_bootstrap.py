"""Resampled images: weights are repetitions, and intervals cover."""

import math

import numpy as np
import pytest

from tract_det.evaluation.bootstrap import (
    difference_interval,
    draw,
    interval,
    intervals,
    weighted_means,
    with_zero,
)
from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.coco_ap import coco_rankings
from tract_det.evaluation.metrics import METRICS
from tract_det.evaluation.ranking import ap_11_point, ap_under_envelope, mean_ap
from tract_det.evaluation.voc_ap import RULES, match

CLASSES = 3
SIDES = (24, 60, 150)  # of a small, a medium and a large object


def made_split(images, seed):
    """A split with objects that are found more easily in some images; a function makes detections.

    Any number of splits can be made, so that the mean of a figure over splits is known.
    """
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 4, images)
    image = np.repeat(np.arange(images), count)
    n = len(image)
    labels, side = rng.integers(0, CLASSES, n), rng.choice(SIDES, n)
    left = 200 * (np.arange(n) - np.repeat(np.cumsum(count) - count, count))
    boxes = np.stack([left, np.zeros(n), left + side, side], axis=1)
    ease = np.repeat(rng.normal(0, 1, images), count)

    def detect(number):
        """Detections of one of several detectors, all equally good."""
        rng = np.random.default_rng([seed, number])
        is_found = rng.random(n) < 1 / (1 + np.exp(-1.2 - 0.8 * ease))
        found = boxes + rng.normal(0, 0.07, (n, 4)) * side[:, None]
        false_image = np.repeat(np.arange(images), rng.poisson(1.2, images))
        false = len(false_image)
        logits = [rng.normal(0.8 + 0.6 * ease), rng.normal(-0.6, 1, false)]
        return Detections(
            np.concatenate([image[is_found], false_image]),
            np.concatenate([found[is_found], np.tile([[900.0, 900, 960, 960]], (false, 1))]),
            1 / (1 + np.exp(-np.concatenate([logits[0][is_found], logits[1]]))),
            np.concatenate([labels[is_found], rng.integers(0, CLASSES, false)]),
        )

    return Objects(image, boxes, labels, rng.random(n) < 0.1), detect


def rankings(objects, detections, rule="devkit"):
    voc = match(objects, detections, rule).rankings(CLASSES)
    return voc, coco_rankings(objects, detections, CLASSES)


def means(objects, detections, weights=None, rule="devkit"):
    return weighted_means(*rankings(objects, detections, rule), rule, weights)


def first(by_name):
    return {name: float(values[0]) for name, values in by_name.items()}


def figures(objects, detections):
    return first(means(objects, detections))


def repeated(split, times):
    """A split in which each image occurs so many times, as images of their own."""
    position = np.repeat(np.arange(len(times)), times)  # the image of each copy
    rows = [np.flatnonzero(split.image == image) for image in position]
    copy = np.repeat(np.arange(len(position)), [len(row) for row in rows])
    row = np.concatenate(rows)
    rest = [np.asarray(getattr(split, name))[row] for name in list(split.__dataclass_fields__)[1:4]]
    return type(split)(copy, *rest)


@pytest.mark.parametrize("rule", RULES)
def test_without_weights_the_means_are_those_of_the_evaluation(rule):
    objects, detect = made_split(80, seed=1)
    detections = detect(0)
    computed = means(objects, detections, rule=rule)
    voc = match(objects, detections, rule).rankings(CLASSES)
    eleven = np.array([ap_11_point(ranking, rule) for ranking in voc])
    area = np.array([ap_under_envelope(ranking) for ranking in voc])
    assert tuple(computed) == METRICS
    for name, ap in (("voc_07", eleven), ("voc_area", area)):
        assert computed[f"{name}.mAP"] == pytest.approx(100 * mean_ap(ap[:, 0]), abs=1e-10)
        assert computed[f"{name}.mAP_50_95"] == pytest.approx(
            100 * mean_ap(ap.mean(axis=1)), abs=1e-10
        )


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_counts_an_image_as_often_as_the_split_would_have_it(rule):
    objects, detect = made_split(60, seed=2)
    detections = detect(0)
    if rule == "detectron2":  # its rounded scores are equal often, and copies of images mix then
        scores = np.random.default_rng(0).permutation(len(detections.scores)) / 1000
        detections = Detections(detections.image, detections.boxes, scores, detections.labels)
    weights = draw(60, 5, seed=3)
    assert weights.max() > 2 and weights.min() == 0
    sampled = means(objects, detections, weights, rule)
    for number, times in enumerate(weights):
        copies = means(repeated(objects, times), repeated(detections, times), rule=rule)
        for name, values in sampled.items():
            assert values[number] == pytest.approx(copies[name][0], abs=1e-9, nan_ok=True)


def test_a_class_that_a_sample_does_not_have_is_not_in_its_mean():
    box = np.array([[0.0, 0, 50, 50]])
    objects = Objects(np.arange(2), np.repeat(box, 2, axis=0), np.arange(2), np.zeros(2, bool))
    detections = Detections(np.zeros(1, int), box, np.ones(1), np.zeros(1, int))
    sampled = means(objects, detections, np.array([[2, 0], [0, 2], [1, 1]], dtype=np.int32))
    assert sampled["voc_area.mAP"].tolist() == pytest.approx([100, 0, 50])
    assert sampled["coco.AP"].tolist() == pytest.approx([100, 0, 50])


def test_samples_of_images_without_objects_are_left_out_of_the_interval():
    low, high = interval(50.0, np.array([np.nan, *np.linspace(40, 60, 999)]))
    assert 40 < low < 42
    assert 58 < high < 60
    assert all(map(math.isnan, interval(math.nan, np.full(3, np.nan))))


def test_draws_have_as_many_images_as_the_split_and_depend_on_the_seed_alone():
    weights = draw(50, 8)
    assert weights.shape == (8, 50) and (weights.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(weights, draw(50, 8))
    assert (weights != draw(50, 8, seed=1)).any()


def test_the_interval_is_that_of_the_percentiles_around_the_figure():
    sampled = np.random.default_rng(0).normal(71, 2, 20_001)
    low, high = interval(70.0, sampled)
    assert (low, high) == pytest.approx((70 - 1.96 * 2, 70 + 1.96 * 2), abs=0.15)


def test_samples_that_are_all_equal_have_no_interval():
    """Those of one image, of a single sample, of perfect detections."""
    for sampled in (np.full(100, 40.0), np.array([40.0]), np.array([40.0, np.nan])):
        assert all(map(math.isnan, interval(40.0, sampled)))


def test_two_that_agree_in_every_sample_do_not_differ():
    assert difference_interval(0.0, np.zeros(100)) == (0, 0)
    assert all(map(math.isnan, difference_interval(3.0, np.full(100, 3.0))))
    assert difference_interval(0.0, np.array([0.0, np.nan, 0.0])) == (0, 0)
    assert all(map(math.isnan, difference_interval(math.nan, np.full(3, np.nan))))
    sampled = np.random.default_rng(0).normal(3, 1, 1000)
    assert difference_interval(3.0, sampled) == pytest.approx((1.04, 4.96), abs=0.2)


def test_the_interval_of_a_difference_has_the_samples_as_they_are_too():
    """Where they lie is a bias of the mean, or that some have nothing of the difference."""
    sampled = np.random.default_rng(0).normal(5, 1, 1000)
    low, high = difference_interval(8.0, sampled)
    assert (low, high) == pytest.approx((3.04, 9.96), abs=0.2)
    assert interval(8.0, sampled) == pytest.approx((6.04, 9.96), abs=0.2)


def test_no_interval_ends_where_no_figure_can_be():
    sampled = np.random.default_rng(0).normal(97, 5, 2000)
    low, high = intervals({"AP": 98.0}, {"AP": sampled})["AP"]
    assert 85 < low < 95 and high == 100
    low, high = interval(-97.0, sampled - 194)
    assert low == -100 and -95 < high < -85


def test_an_interval_is_extended_to_zero():
    assert with_zero((1.0, 2.0)) == (0.0, 2.0)
    assert with_zero((-2.0, -1.0)) == (-2.0, 0.0)
    assert with_zero((-1.0, 1.0)) == (-1.0, 1.0)
    assert all(map(math.isnan, with_zero((math.nan, math.nan))))


def test_the_paired_interval_is_narrower_than_that_of_either():
    objects, detect = made_split(100, seed=6)
    detections = detect(0)
    fewer = np.random.default_rng(0).random(len(detections.scores)) < 0.97
    worse = Detections(*(getattr(detections, name)[fewer] for name in detections.__dict__))
    weights = draw(100, 200)
    name = "voc_area.mAP"
    samples = [means(objects, side, weights)[name] for side in (detections, worse)]
    both = [figures(objects, side)[name] for side in (detections, worse)]
    paired = interval(both[0] - both[1], samples[0] - samples[1])
    assert np.ptp(paired) < np.ptp(interval(both[0], samples[0])) / 2


@pytest.mark.slow
def test_intervals_cover_the_known_mean_and_the_difference_of_none():
    """400 repetitions; the mean over splits of this size is known from 2,000 others."""
    repetitions, images = 400, 400
    others = [made_split(images, seed) for seed in range(10_000, 12_000)]
    of_others = [figures(objects, detect(0)) for objects, detect in others]
    known = {name: np.mean([others[name] for others in of_others]) for name in METRICS}
    covered, excluded = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0)
    for seed in range(repetitions):
        objects, detect = made_split(images, seed)
        weights = draw(images, 300, seed)
        matched = [rankings(objects, detect(number)) for number in (0, 1)]
        both = tuple(first(weighted_means(*ranks, "devkit", None)) for ranks in matched)
        samples = tuple(weighted_means(*ranks, "devkit", weights) for ranks in matched)
        for name, (low, high) in intervals(both[0], samples[0]).items():
            covered[name] += 100 / repetitions * (low <= known[name] <= high)
        for name in METRICS:
            sampled = samples[0][name] - samples[1][name]
            low, high = difference_interval(both[0][name] - both[1][name], sampled)
            excluded[name] += 100 / repetitions * (not low <= 0 <= high)
    assert covered == pytest.approx(dict.fromkeys(METRICS, 95), abs=3.01)
    assert excluded == pytest.approx(dict.fromkeys(METRICS, 5.0), abs=3.3)  # 3 standard errors
