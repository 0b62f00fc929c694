"""AP against hand-worked cases and against both rules written out slowly in plain Python."""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tract_det.evaluation import boxes as module
from tract_det.evaluation.boxes import Detections, Objects, best_overlaps, paired_iou
from tract_det.evaluation.ranking import mean_ap
from tract_det.evaluation.voc_ap import RULES, match, round_decimals, voc_ap

Box = tuple[float, float, float, float]  # pixel edges
GroundTruth = tuple[int, Box, bool]  # image, box, difficult
Detection = tuple[int, Box, float]  # image, box, score

A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)


def arrays(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detection]
) -> tuple[Objects, Detections]:
    """Flat arrays of one class, label 0."""
    return (
        Objects(
            np.array([image for image, _, _ in ground_truth], dtype=int),
            np.array([box for _, box, _ in ground_truth], dtype=float).reshape(-1, 4),
            np.zeros(len(ground_truth), dtype=int),
            np.array([difficult for _, _, difficult in ground_truth], dtype=bool),
        ),
        Detections(
            np.array([image for image, _, _ in detections], dtype=int),
            np.array([box for _, box, _ in detections], dtype=float).reshape(-1, 4),
            np.array([score for _, _, score in detections], dtype=float),
            np.zeros(len(detections), dtype=int),
        ),
    )


def ap_at_half(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detection], rule: str = "devkit"
) -> tuple[float, float]:
    """11-point and area AP at IoU 0.5."""
    result = voc_ap(*arrays(ground_truth, detections), ["thing"], rule)
    return result.ap_07[0, 0], result.ap_area[0, 0]


# ---- The slow, obvious evaluation in plain Python, one detection and object at a time. ----


def inclusive_iou(a: Box, b: Box, number: type) -> float:
    """The devkit's overlap of 1-based inclusive boxes, in the given arithmetic."""
    ax1, ay1, ax2, ay2 = map(number, a)
    bx1, by1, bx2, by2 = map(number, b)
    width = min(ax2, bx2) - max(ax1, bx1) + 1
    height = min(ay2, by2) - max(ay1, by1) + 1
    if width <= 0 or height <= 0:
        return 0
    area_a = (ax2 - ax1 + 1) * (ay2 - ay1 + 1)
    area_b = (bx2 - bx1 + 1) * (by2 - by1 + 1)
    return width * height / (area_a + area_b - width * height)


def slow_ap(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detection], rule: str, percent: int
) -> tuple[float, float]:
    """11-point and area AP at an IoU of `percent` / 100."""
    total = sum(not difficult for _, _, difficult in ground_truth)
    if total == 0:
        return math.nan, math.nan
    exact = rule == "devkit"
    number = Fraction if exact else float

    def in_file(box: Box) -> Box:
        x1, y1, x2, y2 = box[0] + 1, box[1] + 1, box[2], box[3]
        return (x1, y1, x2, y2) if exact else tuple(float(f"{x:.1f}") for x in (x1, y1, x2, y2))

    def score_in_file(score: float) -> float:
        return score if exact else float(f"{score:.3f}")

    matched, tp, fp, history = set(), 0, 0, []
    for image, box, _ in sorted(detections, key=lambda d: (-score_in_file(d[2]), d[0])):
        best_iou, best = 0, None
        for index, (object_image, object_box, _) in enumerate(ground_truth):
            if object_image == image:
                one_based = (object_box[0] + 1, object_box[1] + 1, object_box[2], object_box[3])
                iou = inclusive_iou(in_file(box), one_based, number)
                if iou > best_iou:
                    best_iou, best = iou, index
        threshold = Fraction(percent, 100) if exact else percent / 100.0
        reached = best_iou >= threshold if exact else best_iou > threshold
        if not reached:
            fp += 1
        elif ground_truth[best][2]:
            pass
        elif best in matched:
            fp += 1
        else:
            matched.add(best)
            tp += 1
        history.append((number(tp) / total, tp / (tp + fp) if tp + fp else 0.0))

    thresholds = [Fraction(k, 10) for k in range(11)] if exact else np.arange(0.0, 1.1, 0.1)
    eleven = [max((p for r, p in history if r >= recall), default=0.0) for recall in thresholds]
    area, previous = 0.0, 0
    for position, (recall, _) in enumerate(history):
        area += float(recall - previous) * max(p for _, p in history[position:])
        previous = recall
    return sum(eleven) / 11, area


def boxes_of(coordinate: st.SearchStrategy) -> st.SearchStrategy:
    side = st.integers(1, 6)
    return st.tuples(coordinate, coordinate, side, side).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    )


IMAGES = st.integers(0, 2)
GROUND_TRUTH = st.lists(st.tuples(IMAGES, boxes_of(st.integers(0, 5)), st.booleans()), max_size=8)
# Few scores, so that many are equal; few positions, so that many IoUs equal a threshold.
DETECTIONS = st.lists(
    st.tuples(IMAGES, boxes_of(st.integers(0, 5)), st.integers(0, 6).map(lambda k: k / 8)),
    max_size=14,
)
# Eighths, which detectron2 rounds to decimals; some are exactly between two decimals.
FINE = st.integers(0, 40).map(lambda k: k / 8)
FINE_DETECTIONS = st.lists(
    st.tuples(IMAGES, boxes_of(FINE), st.integers(0, 40).map(lambda k: 0.5 + k / 8192)),
    max_size=14,
)


def assert_equals_slow(
    ground_truth: list[GroundTruth], detections: list[Detection], rule: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = voc_ap(*arrays(ground_truth, detections), ["thing"], rule)
    slow = np.array(
        [slow_ap(ground_truth, detections, rule, percent) for percent in range(50, 100, 5)]
    )
    np.testing.assert_allclose(result.ap_07[0], slow[:, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.ap_area[0], slow[:, 1], rtol=0, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(GROUND_TRUTH, DETECTIONS)
def test_devkit_rule_equals_the_slow_evaluation(ground_truth, detections):
    assert_equals_slow(ground_truth, detections, "devkit")


@settings(max_examples=150, deadline=None)
@given(GROUND_TRUTH, FINE_DETECTIONS)
def test_detectron2_rule_equals_the_slow_evaluation(ground_truth, detections):
    assert_equals_slow(ground_truth, detections, "detectron2")


@pytest.mark.parametrize("rule", RULES)
def test_many_random_objects_equal_the_slow_evaluation(rule):
    rng = np.random.default_rng(7)

    def box() -> Box:
        x, y, w, h = (*rng.integers(0, 60, 2).tolist(), *rng.integers(5, 40, 2).tolist())
        return (x, y, x + w, y + h)

    ground_truth = [(int(rng.integers(12)), box(), bool(rng.random() < 0.2)) for _ in range(60)]
    detections = [
        (image, tuple((np.array(b) + rng.integers(-4, 5, 4)).tolist()), score)
        for image, b, _ in ground_truth
        for score in rng.random(3).round(2).tolist()
    ]
    assert_equals_slow(ground_truth, detections, rule)
    # The case has both true and false positives.
    assert 0.1 < ap_at_half(ground_truth, detections, rule)[1] < 0.9


@given(boxes_of(st.integers(0, 8)), boxes_of(st.integers(0, 8)))
def test_iou_of_pixel_edges_is_the_devkits_inclusive_iou(a, b):
    one_based = [(box[0] + 1, box[1] + 1, box[2], box[3]) for box in (a, b)]
    expected = float(inclusive_iou(*one_based, Fraction))
    assert paired_iou(np.array([a], float), np.array([b], float))[0] == expected
    inclusive = [np.array([box], float) for box in one_based]
    assert paired_iou(*inclusive, pixel=1.0)[0] == expected


# ---- Hand-worked cases. ----


@pytest.mark.parametrize("rule", RULES)
def test_perfect_detections_have_ap_one_at_every_threshold(rule):
    ground_truth = [(0, A, False), (0, B, False), (1, A, True), (1, B, False)]
    detections = [(image, box, 0.9) for image, box, _ in ground_truth]
    result = voc_ap(*arrays(ground_truth, detections), ["thing"], rule)
    np.testing.assert_allclose(result.ap_07, 1, rtol=1e-14)
    np.testing.assert_allclose(result.ap_area, 1, rtol=1e-14)


def test_iou_of_exactly_one_half_is_a_true_positive_by_devkit_and_a_false_one_by_detectron2():
    ground_truth, detections = [(0, A, False)], [(0, (0, 0, 10, 5), 0.9)]
    assert ap_at_half(ground_truth, detections, "devkit") == (1, 1)
    assert ap_at_half(ground_truth, detections, "detectron2") == (0, 0)


@pytest.mark.parametrize("twentieths", range(10, 20))
def test_iou_equal_to_a_threshold_reaches_it_and_no_higher_one(twentieths):
    ground_truth, detections = [(0, (0, 0, 20, 1), False)], [(0, (0, 0, twentieths, 1), 0.9)]
    result = voc_ap(*arrays(ground_truth, detections), ["thing"])
    reached = 5 * twentieths >= np.arange(50, 100, 5)
    np.testing.assert_array_equal(result.ap_area[0], reached)


def test_detections_of_a_difficult_object_are_ignored():
    ground_truth = [(0, A, True), (0, B, False)]
    with_difficult = [(0, A, 0.9), (0, A, 0.85), (0, B, 0.8)]
    assert ap_at_half(ground_truth, with_difficult) == pytest.approx((1, 1))
    assert ap_at_half(ground_truth, [(0, B, 0.8)]) == pytest.approx((1, 1))
    assert match(*arrays(ground_truth, with_difficult)).rankings(1)[0].num_objects == 1


def test_second_detection_of_an_object_is_a_false_positive():
    ground_truth = [(0, A, False), (0, B, False)]
    detections = [(0, A, 0.9), (0, A, 0.8), (0, B, 0.7)]
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    assert ap_at_half(ground_truth, detections) == pytest.approx((6 / 11 + 5 / 11 * 2 / 3, 5 / 6))


def test_detection_whose_best_object_is_already_matched_does_not_get_the_next_best():
    near = (0, 0, 10, 9)  # IoU 0.9 with A: a detection of A's box overlaps both
    ground_truth = [(0, A, False), (0, near, False)]
    assert ap_at_half(ground_truth, [(0, A, 0.9), (0, A, 0.8)])[1] == pytest.approx(0.5)


def test_first_of_two_equal_overlaps_is_the_match():
    # The detection has IoU 3/5 with both objects. It is ignored if the first one is difficult.
    left, right, between = (0, 0, 4, 10), (2, 0, 6, 10), (1, 0, 5, 10)
    assert ap_at_half([(0, left, True), (0, right, False)], [(0, between, 0.9)])[1] == 0
    assert ap_at_half([(0, right, False), (0, left, True)], [(0, between, 0.9)])[1] == 1


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_keep_the_images_order_then_the_detections_order(rule):
    ground_truth = [(0, A, False), (1, A, False)]
    true_positive_first = [(0, A, 0.5), (1, FAR, 0.5)]
    false_positive_first = [(0, FAR, 0.5), (1, A, 0.5)]
    for detections, area in ((true_positive_first, 1 / 2), (false_positive_first, 1 / 4)):
        assert ap_at_half(ground_truth, detections, rule)[1] == pytest.approx(area)
        assert ap_at_half(ground_truth, detections[::-1], rule)[1] == pytest.approx(area)
    within_image = [(0, A, 0.5), (0, FAR, 0.5)]
    assert ap_at_half(ground_truth, within_image, rule)[1] == pytest.approx(1 / 2)
    assert ap_at_half(ground_truth, within_image[::-1], rule)[1] == pytest.approx(1 / 4)


def test_scores_that_differ_in_the_fourth_decimal_are_equal_by_detectron2_only():
    ground_truth, detections = [(0, A, False)], [(0, FAR, 0.50001), (0, A, 0.50002)]
    assert ap_at_half(ground_truth, detections, "devkit")[1] == 1
    assert ap_at_half(ground_truth, detections, "detectron2")[1] == 0.5


def test_boxes_are_rounded_to_a_decimal_by_detectron2_only():
    ground_truth, detections = [(0, A, False)], [(0, (0, 0, 10, 5.04), 0.9)]
    assert ap_at_half(ground_truth, detections, "devkit")[1] == 1
    # 5.04 becomes 5.0: an IoU of exactly one half.
    assert ap_at_half(ground_truth, detections, "detectron2")[1] == 0


def test_recall_of_exactly_three_tenths_reaches_three_tenths():
    ground_truth = [(image, A, False) for image in range(10)]
    detections = [(image, A, 0.9) for image in range(3)]
    assert ap_at_half(ground_truth, detections, "devkit")[0] == pytest.approx(4 / 11)
    assert ap_at_half(ground_truth, detections, "detectron2")[0] == pytest.approx(3 / 11)


@pytest.mark.parametrize("tenths", range(11))
@pytest.mark.parametrize("objects", [10, 30, 70, 90])
def test_recall_of_any_tenth_reaches_that_tenth(tenths, objects):
    ground_truth = [(image, A, False) for image in range(objects)]
    detections = [(image, A, 0.9) for image in range(objects * tenths // 10)]
    expected = (tenths + 1) / 11 if detections else 0
    assert ap_at_half(ground_truth, detections)[0] == pytest.approx(expected)


def test_class_without_objects_is_nan_with_a_warning_and_not_in_the_mean():
    objects, detections = arrays([(0, A, False), (0, B, True)], [(0, A, 0.9), (0, B, 0.8)])
    objects.labels[1] = 1  # class 1 has only a difficult object, class 2 has none
    detections.labels[1] = 2
    with pytest.warns(UserWarning, match=r"2 of 3 classes .*: only difficult, nothing"):
        result = voc_ap(objects, detections, ["detected", "only difficult", "nothing"])
    for ap in (result.ap_07, result.ap_area):
        np.testing.assert_array_equal(np.isnan(ap[:, 0]), [False, True, True])
        assert mean_ap(ap[:, 0]) == pytest.approx(1)


def test_mean_over_no_class_is_nan_without_a_numpy_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(mean_ap(np.array([np.nan, np.nan])))


def test_class_without_detections_has_ap_zero_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ap_at_half([(0, A, False)], []) == (0, 0)


def test_classes_do_not_match_each_other():
    objects, detections = arrays([(0, A, False), (0, B, False)], [(0, B, 0.9), (0, A, 0.9)])
    objects.labels[1] = detections.labels[1] = 1
    assert (voc_ap(objects, detections, ["a", "b"]).ap_area == 0).all()


def test_rankings_give_precision_and_recall_at_each_detection():
    ground_truth = [(0, A, False), (0, B, False)]
    detections = [(0, A, 0.9), (0, FAR, 0.8), (0, (20, 0, 30, 5), 0.7)]  # the last has IoU 0.5
    ranking = match(*arrays(ground_truth, detections)).rankings(1)[0]
    np.testing.assert_allclose(ranking.precision[0], [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(ranking.recall[0], [1 / 2, 1 / 2, 1])


def test_boxes_without_area_overlap_nothing():
    point, inverted = (3, 3, 3, 3), (9, 9, 1, 1)
    with np.errstate(all="raise"):
        assert ap_at_half([(0, A, False)], [(0, point, 0.9), (0, inverted, 0.8)]) == (0, 0)
        assert ap_at_half([(0, point, False)], [(0, point, 0.9)]) == (0, 0)


def test_overlaps_do_not_depend_on_how_they_are_split_into_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    xy, object_xy = rng.integers(0, 9, (50, 2)), rng.integers(0, 9, (30, 2))
    images, object_images = rng.integers(0, 8, 50), rng.integers(0, 6, 30)
    case = (
        images,
        np.concatenate([xy, xy + 5], axis=1).astype(float),
        object_images,
        np.concatenate([object_xy, object_xy + 5], axis=1).astype(float),
    )
    iou, best = best_overlaps(*case)
    assert (best[images >= 6] == -1).all() and (iou[images >= 6] == -np.inf).all()
    assert (object_images[best[best >= 0]] == images[best >= 0]).all()
    for size in (1, 7):
        monkeypatch.setattr(module, "_BLOCK", size)
        for whole, blocks in zip((iou, best), best_overlaps(*case), strict=True):
            np.testing.assert_array_equal(whole, blocks)


def test_a_block_has_a_limited_number_of_pairs_or_those_of_one_box(monkeypatch):
    """A box of the crowded image has 50 pairs, the others have 3, and those without any none."""
    monkeypatch.setattr(module, "_BLOCK", 10)
    images, object_images = np.repeat([0, 1, 2], 8), np.repeat([0, 1], [50, 3])
    blocks = list(module.pairs_in_groups(images, object_images))
    assert [len(block.rows) for block in blocks] == [1] * 8 + [3, 3, 2]
    assert [len(block.object) for block in blocks] == [50] * 8 + [9, 9, 6]
    assert np.concatenate([block.rows for block in blocks]).tolist() == list(range(16))


@given(st.floats(-1e4, 1e4), st.integers(1, 3))
def test_rounding_equals_printing(value, decimals):
    assert round_decimals(np.array([value]), decimals)[0] == float(f"{value:.{decimals}f}")


@pytest.mark.parametrize("value", [0.25, 0.35, 0.45, 2.675, 10.05])
def test_rounding_of_near_ties_equals_printing(value):
    for decimals in (1, 2):
        assert round_decimals(np.array([value]), decimals)[0] == float(f"{value:.{decimals}f}")


def test_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'coco'.*devkit, detectron2"):
        voc_ap(*arrays([], []), ["thing"], "coco")
