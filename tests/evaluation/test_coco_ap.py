"""COCO's six figures against pycocotools, on random and on adversarial sets."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.coco_ap import coco_ap, coco_rankings, rank_in_group
from tract_det.evaluation.metrics import COCO_STATS
from tract_det.evaluation.pycocotools_ap import pycocotools_ap

IMAGES, CLASSES = 4, 2


def figures(objects, detections, images=IMAGES, classes=CLASSES):
    return {
        name: ap[0] for name, ap in coco_ap(coco_rankings(objects, detections, classes)).items()
    }


def assert_equals_pycocotools(objects, detections, images=IMAGES, classes=CLASSES):
    expected = pycocotools_ap(objects, detections, images, classes)
    computed = figures(objects, detections, images, classes)
    assert list(computed) == list(COCO_STATS)
    assert computed == pytest.approx(expected, abs=1e-9, nan_ok=True)


def random_set(rng, images, classes, objects, detections, side):
    """Objects, and detections around them and elsewhere."""
    xy = rng.uniform(0, 300, (objects, 2))
    boxes = np.concatenate([xy, xy + rng.uniform(*side, (objects, 2))], axis=1)
    ground_truth = Objects(
        rng.integers(0, images, objects),
        boxes,
        rng.integers(0, classes, objects),
        rng.random(objects) < 0.2,
    )
    source = rng.integers(0, objects, detections)
    shift = (
        rng.normal(0, 0.08, (detections, 4))
        * (boxes[source, 2:] - boxes[source, :2])[:, [0, 1, 0, 1]]
    )
    is_near = rng.random(detections) < 0.7
    return ground_truth, Detections(
        np.where(is_near, ground_truth.image[source], rng.integers(0, images, detections)),
        boxes[source] + shift,
        rng.random(detections),
        np.where(is_near, ground_truth.labels[source], rng.integers(0, classes, detections)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_random_sets_equal_pycocotools(seed):
    rng = np.random.default_rng(seed)
    case = random_set(rng, 30, 3, 150, 1500, (8, 160))
    assert_equals_pycocotools(*case, 30, 3)
    assert 5 < figures(*case, 30, 3)["AP"] < 95


def test_more_than_a_hundred_detections_of_an_image_equal_pycocotools():
    case = random_set(np.random.default_rng(9), 2, 1, 40, 600, (20, 120))
    assert_equals_pycocotools(*case, 2, 1)


# Few positions and scores, so that many overlaps are equal to each other or to a threshold; sides
# of which many areas are 32^2 and 96^2, the ends of the ranges; negative and empty sizes.
SIDES = st.sampled_from([-3, 0, 8, 16, 32, 64, 96, 128])
BOXES = st.tuples(st.sampled_from([0, 4, 8, 16]), st.sampled_from([0, 8]), SIDES, SIDES).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
PLACES = st.tuples(st.integers(0, IMAGES - 1), st.integers(0, CLASSES - 1), BOXES)
GROUND_TRUTH = st.lists(st.tuples(PLACES, st.booleans(), st.booleans()), max_size=10)
DETECTIONS = st.lists(st.tuples(PLACES, st.integers(0, 4)), max_size=24)


def columns(places):
    image, label, box = zip(*places, strict=True) if places else ((), (), ())
    return (
        np.array(image, dtype=int),
        np.array(label, dtype=int),
        np.array(box, dtype=float).reshape(-1, 4) * 1.1,
    )


@settings(max_examples=120, deadline=None)
@given(GROUND_TRUTH, DETECTIONS, st.booleans())
def test_adversarial_sets_equal_pycocotools(ground_truth, detections, has_crowds):
    image, label, boxes = columns([place for place, _, _ in ground_truth])
    crowd = np.array([is_crowd for _, _, is_crowd in ground_truth], dtype=bool) & has_crowds
    difficult = np.array([hard for _, hard, _ in ground_truth], dtype=bool) | crowd
    area = np.arange(len(image)) * 900.0 if has_crowds else None
    objects = Objects(image, boxes, label, difficult, area, crowd if has_crowds else None)
    image, label, boxes = columns([place for place, _ in detections])
    scores = np.array([score / 4 for _, score in detections], dtype=float)
    assert_equals_pycocotools(objects, Detections(image, boxes, scores, label))


def test_without_objects_every_figure_is_nan():
    nothing = np.zeros(0, dtype=int)
    objects = Objects(nothing, np.zeros((0, 4)), nothing, nothing.astype(bool))
    detections = Detections(np.zeros(1, int), np.ones((1, 4)), np.ones(1), np.zeros(1, int))
    assert all(map(math.isnan, figures(objects, detections).values()))


def test_rank_in_group_counts_those_before():
    assert rank_in_group(np.array([7, 3, 7, 7, 3])).tolist() == [0, 0, 1, 2, 1]
