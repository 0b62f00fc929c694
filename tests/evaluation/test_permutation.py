"""Swapped images: as evaluated anew, exact for few of them, and a test that keeps its level."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.test_bootstrap import CLASSES, figures, made_split, means
from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.detection_results import compare, evaluate_detections, sampled_means
from tract_det.evaluation.ground_truth import GroundTruth
from tract_det.evaluation.metrics import METRICS
from tract_det.evaluation.permutation import (
    differing_images,
    draw_swaps,
    p_values,
    swapped_differences,
)
from tract_det.evaluation.voc_ap import RULES

AREA = "voc_area.mAP"


def every(images):
    """All images differ."""
    return np.ones(images, dtype=bool)


def swapped(objects, both, swaps, rule="devkit"):
    options = {"num_images": swaps.shape[1], "num_classes": CLASSES, "rule": rule}
    return swapped_differences(objects, both, swaps=swaps, **options)


def chosen(both, is_swapped):
    """The first set, but for the swapped images, which have the second's detections."""
    first, second = both
    kept = ~is_swapped[first.image], is_swapped[second.image]
    columns = {
        name: np.concatenate([values[kept[0]], getattr(second, name)[kept[1]]])
        for name, values in vars(first).items()
    }
    order = np.argsort(columns["image"], kind="stable")  # ties: by image, as in the split
    return Detections(**{name: values[order] for name, values in columns.items()})


def changed_in(detections, images, seed=0):
    """The detections with other scores in some images."""
    scores = np.random.default_rng(seed).random(len(detections.scores))
    scores = np.where(np.isin(detections.image, images), scores, detections.scores)
    return replace(detections, scores=scores)


@pytest.mark.parametrize("rule", RULES)
def test_swapped_images_give_what_an_evaluation_of_the_swapped_detections_gives(rule):
    objects, detect = made_split(40, seed=1)
    crowd = np.random.default_rng(0).random(len(objects.image)) < 0.1
    objects = replace(objects, difficult=objects.difficult | crowd, crowd=crowd)
    both = detect(0), detect(1)
    swaps = draw_swaps(every(40), 6)
    assert 0.3 < swaps.mean() < 0.7
    computed = swapped(objects, both, swaps, rule)
    assert tuple(computed) == METRICS
    for number, row in enumerate(swaps):
        sides = [means(objects, chosen(both, swap), rule=rule) for swap in (row, ~row)]
        for name, values in computed.items():
            expected = sides[0][name][0] - sides[1][name][0]
            assert values[number] == pytest.approx(expected, abs=1e-9)


def test_of_all_swaps_the_p_value_is_the_share_that_differs_at_least_as_much():
    objects, detect = made_split(8, seed=3)
    both = detect(0), detect(1)
    ways = np.array(list(itertools.product([False, True], repeat=8)))
    differences = swapped(objects, both, ways)
    as_they_are = {name: float(values[0]) for name, values in differences.items()}
    swaps = draw_swaps(every(8), 255)
    assert {tuple(row) for row in swaps.tolist()} == set(map(tuple, ways[1:].tolist()))
    p = p_values(as_they_are, swapped(objects, both, swaps))
    for name, values in differences.items():
        great = [v for v in values.tolist() if abs(v) >= abs(as_they_are[name]) - 1e-9]
        assert p[name] == pytest.approx(len(great) / 2**8, nan_ok=True)
    assert 0.05 < p[AREA] < 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("samples", [20, 1000])
def test_few_images_that_differ_are_never_significant(count, samples):
    """Whatever they are: with k of them, two of two to the k ways differ as much."""
    for seed in range(5):
        objects, detect = made_split(60, seed)
        first = detect(0)
        second = changed_in(first, np.unique(first.image)[:count])
        differing = differing_images(first, second, 60)
        assert differing.sum() == count
        values = [figures(objects, side) for side in (first, second)]
        differences = {name: values[0][name] - values[1][name] for name in METRICS}
        swaps = draw_swaps(differing, samples)
        assert len(swaps) == 2**count - 1 and not swaps[:, ~differing].any()
        p = p_values(differences, swapped(objects, (first, second), swaps))
        assert min(p.values()) >= 2 ** (1 - count) - 1e-12


def test_more_ways_than_are_counted_are_drawn_among_the_images_that_differ():
    differing = np.arange(100) % 2 == 0
    swaps = draw_swaps(differing, 300)
    assert swaps.shape == (300, 100) and not swaps[:, ~differing].any()
    assert swaps[:, differing].mean() == pytest.approx(0.5, abs=0.02)
    assert len(draw_swaps(np.arange(100) < 10, 20)) == 2**10 - 1
    assert draw_swaps(np.zeros(100, dtype=bool), 20).tolist() == [[False] * 100]


def test_scores_differ_however_little():
    first = made_split(30, seed=7)[1](0)
    for change in (1e-12, -1e-12):
        other = replace(first, scores=first.scores + change)
        assert differing_images(first, other, 30).sum() == len(np.unique(first.image))


def test_a_class_with_a_single_object_makes_no_difference_significant():
    """It makes 50 points here, and its AP leaves the mean of many samples of the images."""
    images = 40
    box = np.array([[0.0, 0, 50, 50]])
    labels = np.zeros(images, dtype=int)
    labels[0] = 1
    boxes = np.repeat(box, images, axis=0)
    objects = Objects(np.arange(images), boxes, labels, np.zeros(images, dtype=bool))
    names = tuple(map(str, range(images)))
    truth = GroundTruth(names, ("common", "rare"), objects, {}, {}, {})
    scores = np.linspace(0.5, 0.9, images)
    first = Detections(np.arange(images), boxes, scores, labels)
    second = Detections(np.arange(images), boxes, scores, np.zeros(images, dtype=int))
    both = [evaluate_detections(truth, side) for side in (first, second)]
    row = compare(*both, sampled_means(both[0], 400))[AREA]
    assert row["difference"] > 45
    assert row["p"] > 0.4
    assert row["interval"][0] <= 0 < row["interval"][1]


def test_detections_that_are_worse_in_many_images_are_seen():
    objects, detect = made_split(100, seed=6)
    first = detect(0)
    second = changed_in(first, np.arange(60))
    both = [figures(objects, side)[AREA] for side in (first, second)]
    sampled = swapped(objects, (first, second), draw_swaps(every(100), 400))
    p = p_values({AREA: both[0] - both[1]}, sampled)[AREA]
    assert p == pytest.approx(1 / 401)


def test_equal_detections_do_not_differ_and_what_is_not_there_has_no_p_value():
    objects, detect = made_split(30, seed=5)
    both = (detect(0), detect(0))
    sampled = swapped(objects, both, draw_swaps(every(30), 50))
    assert p_values(dict.fromkeys(METRICS, 0.0), sampled) == dict.fromkeys(METRICS, 1.0)
    assert math.isnan(p_values({AREA: math.nan}, sampled)[AREA])


def test_images_differ_by_any_column_or_number_and_by_the_order_within_a_class():
    first = made_split(30, seed=7)[1](0)
    by_class = np.argsort(first.labels, kind="stable")
    assert (np.diff(by_class) < 0).any()
    assert not differing_images(first, reordered(first, by_class), 30).any()
    groups = first.image * CLASSES + first.labels
    pair = np.flatnonzero(groups == np.argmax(np.bincount(groups)))[:2]
    order = np.arange(len(first.scores))
    order[pair] = pair[::-1]
    differing = differing_images(first, reordered(first, order), 30)
    assert np.flatnonzero(differing).tolist() == [first.image[pair[0]]]
    without = reordered(first, np.arange(1, len(first.scores)))
    assert differing_images(first, without, 30).sum() == 1
    assert differing_images(without, first, 30).sum() == 1
    size = first.boxes[:, 2:] - first.boxes[:, :2]
    rounded = np.concatenate([first.boxes[:, :2], first.boxes[:, :2] + size], axis=1)
    assert (rounded != first.boxes).any()
    assert not differing_images(first, replace(first, boxes=rounded), 30).any()
    for name, change in (("boxes", 1e-6), ("scores", 1e-6), ("labels", 1)):
        values = getattr(first, name).copy()
        values[0] = values[0] + change
        differing = differing_images(first, replace(first, **{name: values}), 30)
        assert np.flatnonzero(differing).tolist() == [first.image[0]]


def reordered(detections, order):
    return Detections(*(values[order] for values in vars(detections).values()))


@pytest.mark.slow
def test_the_p_value_keeps_its_level():
    """Of 400 pairs of detectors that are equally good, 5 % differ at 5 %, by every figure."""
    repetitions, images = 400, 60
    rejected = dict.fromkeys(METRICS, 0.0)
    for seed in range(repetitions):
        objects, detect = made_split(images, seed)
        both = detect(0), detect(1)
        values = [figures(objects, side) for side in both]
        differences = {name: values[0][name] - values[1][name] for name in METRICS}
        sampled = swapped(objects, both, draw_swaps(every(images), 199, seed))
        for name, p in p_values(differences, sampled).items():
            rejected[name] += 100 / repetitions * (p <= 0.05)
    assert rejected == pytest.approx(dict.fromkeys(METRICS, 5.0), abs=3.3)  # 3 standard errors
