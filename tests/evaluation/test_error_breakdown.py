"""TIDE's kinds of mistakes in hand-worked cases, and against tidecv where it is installed."""

import importlib.util
import math

import numpy as np
import pytest

from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.error_breakdown import KINDS, find_errors, gains, mend
from tract_det.evaluation.ranking import Ranking
from tract_det.evaluation.voc_ap import RULES, match

CAT, DOG = 0, 1
A, B = (0, 0, 100, 100), (200, 0, 300, 100)
NEAR_A = (0, 0, 100, 40)  # IoU 0.4
TOUCHING_A = (0, 0, 100, 10)  # IoU 0.1
FAR = (500, 500, 600, 600)


def case(objects, detections):
    """Objects (box, label, difficult) and detections (box, label, score), all of image 0."""
    boxes, labels, difficult = zip(*objects, strict=True) if objects else ((), (), ())
    ground_truth = Objects(
        np.zeros(len(boxes), dtype=int),
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array(labels, dtype=int),
        np.array(difficult, dtype=bool),
    )
    boxes, labels, scores = zip(*detections, strict=True)
    return ground_truth, Detections(
        np.zeros(len(boxes), dtype=int),
        np.array(boxes, dtype=float),
        np.array(scores, dtype=float),
        np.array(labels, dtype=int),
    )


def kinds(objects, detections, rule="devkit"):
    """The kind of each detection in their order, "" = no mistake; and the missed objects."""
    ground_truth, found = case(objects, detections)
    matching = match(ground_truth, found, rule)
    errors = find_errors(found, matching)
    names = [""] * len(detections)
    for position, kind in zip(matching.detection, errors.kind, strict=True):
        names[position] = KINDS[kind] if kind >= 0 else ""
    return names, np.flatnonzero(errors.missed).tolist()


def added(objects, detections, classes=2, rule="devkit"):
    """What mending each kind adds to the mean AP under the envelope."""
    ground_truth, found = case(objects, detections)
    matching = match(ground_truth, found, rule)
    by_kind = gains(matching, find_errors(found, matching), classes)
    return {kind: gain.ap_area for kind, gain in by_kind.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("box", "label", "kind"),
    [
        (A, CAT, ""),
        (NEAR_A, CAT, "localisation"),
        (A, DOG, "classification"),
        (NEAR_A, DOG, "both"),
        (FAR, CAT, "background"),
        (FAR, DOG, "background"),
    ],
)
def test_one_detection_of_one_cat_is_of_the_kind_that_its_box_and_class_say(rule, box, label, kind):
    names, missed = kinds([(A, CAT, False)], [(box, label, 0.9)], rule)
    assert names == [kind]
    # What another class or box would mend is not missed besides.
    assert missed == ([0] if kind in ("both", "background") else [])


def test_the_second_detection_of_an_object_is_a_duplicate():
    names, missed = kinds([(A, CAT, False)], [(A, CAT, 0.8), (A, CAT, 0.9)])
    assert (names, missed) == (["duplicate", ""], [])


def test_an_iou_of_a_tenth_is_a_bad_box_of_its_class_and_background_of_another():
    objects = [(A, CAT, False)]
    assert kinds(objects, [(TOUCHING_A, CAT, 0.9)])[0] == ["localisation"]
    assert kinds(objects, [(TOUCHING_A, DOG, 0.9)])[0] == ["background"]


def test_an_iou_of_one_half_is_a_match_by_devkit_and_a_bad_box_by_detectron2():
    objects, detections = [(A, CAT, False)], [((0, 0, 100, 50), CAT, 0.9)]
    assert kinds(objects, detections, "devkit")[0] == [""]
    assert kinds(objects, detections, "detectron2")[0] == ["localisation"]


def test_a_detection_of_a_difficult_object_is_no_mistake_and_it_is_not_missed():
    assert kinds([(A, CAT, True)], [(A, CAT, 0.9), (A, CAT, 0.8)]) == (["", ""], [])
    assert kinds([(A, CAT, True)], [(FAR, CAT, 0.9)]) == (["background"], [])


def test_a_difficult_object_is_not_background():
    objects = [(A, CAT, True)]
    assert kinds(objects, [(NEAR_A, CAT, 0.9)])[0] == ["localisation"]
    assert kinds(objects, [(A, DOG, 0.9)])[0] == ["classification"]


def test_a_mended_mistake_of_a_difficult_object_goes_away():
    # The false positive before the true one halves the AP of cats; mended, it would be ignored.
    objects = [(A, CAT, True), (B, CAT, False)]
    gain = added(objects, [(NEAR_A, CAT, 0.9), (B, CAT, 0.8)], classes=1)
    assert gain["localisation"] == pytest.approx(0.5)


def test_mending_a_class_moves_the_detection_and_its_recall():
    # Cats: nothing found. Dogs: a cat before the dog.
    gain = added([(A, CAT, False), (B, DOG, False)], [(A, DOG, 0.9), (B, DOG, 0.8)])
    # Cats go from 0 to 1, dogs from 1/2 to 1.
    assert gain["classification"] == pytest.approx((1 + 0.5) / 2)
    assert gain == pytest.approx(dict.fromkeys(KINDS, 0) | {"classification": 0.75})


def test_of_several_mistakes_of_an_object_the_best_scored_is_mended_and_the_others_go_away():
    objects = [(A, CAT, False), (B, CAT, False)]
    detections = [(NEAR_A, CAT, 0.7), (NEAR_A, CAT, 0.9), (B, CAT, 0.8)]
    ground_truth, found = case(objects, detections)
    matching = match(ground_truth, found)
    errors = find_errors(found, matching)
    (cats,) = mend(matching, errors, "localisation", 1)
    assert cats.scores.tolist() == [0.9, 0.8, 0.7]
    assert cats.true_positive.tolist() == [[True, True, False]]
    assert cats.false_positive.tolist() == [[False, False, False]]


def test_a_mistake_of_an_object_that_another_detection_found_goes_away():
    gain = added([(A, CAT, False)], [(NEAR_A, CAT, 0.9), (A, CAT, 0.8)], classes=1)
    assert gain["localisation"] == pytest.approx(0.5)


def test_mending_misses_takes_them_out_of_the_recall():
    objects = [(A, CAT, False), (B, CAT, False)]
    gain = added(objects, [(A, CAT, 0.9)], classes=1)
    assert gain == pytest.approx(dict.fromkeys(KINDS, 0) | {"missed": 0.5})
    # Were all objects missed, nothing would be left to find.
    assert added([(A, CAT, False)], [(FAR, CAT, 0.9)], classes=1)["missed"] == 1


def test_without_objects_no_gain_is_known():
    assert all(map(math.isnan, added([], [(A, CAT, 0.9)]).values()))


def crowded(seed, rule):
    """Two classes that overlap each other; objects of a class do not: there the rules agree."""
    rng = np.random.default_rng(seed)
    images, slots = 40, 4
    n = images * slots * 2
    image = np.repeat(np.arange(images), slots * 2)
    labels = np.tile(np.repeat([CAT, DOG], slots), images)
    left = 200.0 * np.tile(np.arange(slots), images * 2) + rng.uniform(0, 60, n)
    boxes = np.stack([left, rng.uniform(0, 60, n), left + 100, np.full(n, 140.0)], axis=1)
    kept = rng.random(n) < 0.6
    objects = Objects(image[kept], boxes[kept], labels[kept], np.zeros(kept.sum(), dtype=bool))
    source = rng.integers(0, kept.sum(), 700)
    spread = rng.choice([3.0, 25.0, 90.0], 700)[:, None]
    decimals = 1 if rule == "detectron2" else 9
    edges = np.round(objects.boxes[source] + rng.normal(0, 1, (700, 4)) * spread, decimals)
    edges = np.concatenate([np.minimum(edges[:, :2], edges[:, 2:]), edges[:, 2:]], axis=1)
    return objects, Detections(
        objects.image[source],
        edges,
        rng.permutation(700) / 1000,
        np.where(rng.random(700) < 0.7, objects.labels[source], 1 - objects.labels[source]),
    )


def ap_101(ranking: Ranking) -> float:
    """Tidecv's AP: the envelope at 101 recalls."""
    recall, envelope = ranking.recall[0], np.append(ranking.envelope[0], 0)
    return envelope[np.searchsorted(recall, np.arange(101) / 100)].mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.skipif(importlib.util.find_spec("tidecv") is None, reason="tidecv is not installed")
def test_numbers_and_gains_equal_tidecv(seed):
    from tidecv import TIDE
    from tidecv.data import Data

    objects, detections = crowded(seed, "devkit")
    truth, found = Data("truth"), Data("found")
    for image in range(40):
        truth.add_image(image, str(image))
    for data, boxes, scores in ((truth, objects, None), (found, detections, detections.scores)):
        for k, (x1, y1, x2, y2) in enumerate(boxes.boxes.tolist()):
            place = int(boxes.image[k]), int(boxes.labels[k])
            box = [x1, y1, x2 - x1, y2 - y1]
            if scores is None:
                data.add_ground_truth(*place, box)
            else:
                data.add_detection(*place, float(scores[k]), box)
    run = TIDE().evaluate(truth, found, pos_threshold=0.5, mode=TIDE.BOX)
    short = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))
    by_tidecv = {error.short_name: count for error, count in run.count_errors().items()}
    gain_by_tidecv = {error.short_name: gain for error, gain in run.fix_main_errors().items()}
    matching = match(objects, detections)
    errors = find_errors(detections, matching)
    assert errors.counts() == {kind: by_tidecv[short[kind]] for kind in KINDS}
    before = np.mean([ap_101(ranking.at(0)) for ranking in matching.rankings(2)])
    assert 100 * before == pytest.approx(run.ap)
    for kind in KINDS:
        mended = np.mean([ap_101(ranking) for ranking in mend(matching, errors, kind, 2)])
        gain = 100 * max(mended - before, 0)
        assert gain == pytest.approx(gain_by_tidecv[short[kind]], abs=1e-9), kind


@pytest.mark.parametrize("rule", RULES)
def test_every_false_positive_has_a_kind_and_every_kind_occurs(rule):
    objects, detections = crowded(5, rule)
    matching = match(objects, detections, rule)
    errors = find_errors(detections, matching)
    assert ((errors.kind >= 0) == matching.false_positive[0]).all()
    assert all(count > 0 for count in errors.counts().values())
    by_kind = gains(matching, errors, 2)
    assert all(gain.ap_area > 0 for gain in by_kind.values())
