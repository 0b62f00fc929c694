import math
from dataclasses import astuple

import numpy as np
import pytest

from tests.evaluation.arms import EPOCHS, PLAIN, TRACT, arm, constant, curves
from tract_det.errors import UserError
from tract_det.evaluation.comparison import Arm, Curve, mean_curve, paired_difference, summarize
from tract_det.evaluation.speed_up import speed_up, speed_up_over_lengths

# Summaries and differences


def test_the_summary_has_bessels_correction_and_counts_failures():
    summary = summarize(arm("plain", [1.0, 2.0, None, 3.0]))
    assert astuple(summary) == (3, 2.0, 1.0, 1)


def test_one_run_has_no_spread_and_no_run_no_mean():
    assert math.isnan(summarize(arm("plain", [5.0])).sd)
    none = summarize(arm("plain", [None, None]))
    assert (none.n, none.failed) == (0, 2)
    assert math.isnan(none.mean) and math.isnan(none.sd)


def test_a_worked_example_of_a_paired_t_test():
    """Mean 3.4, variance 0.925; t = 3.4 / sqrt(0.925 / 5) = 7.905 with p = 0.00138."""
    difference = paired_difference(arm("tract", TRACT), arm("plain", PLAIN))
    error = math.sqrt(0.925 / 5)
    assert (difference.n, difference.mean) == (5, pytest.approx(3.4))
    assert difference.sd == pytest.approx(math.sqrt(0.925))
    assert difference.interval == pytest.approx((3.4 - 2.7764 * error, 3.4 + 2.7764 * error), 1e-4)
    assert difference.p_value == pytest.approx(0.00138, abs=1e-5)
    assert difference.detectable == pytest.approx((2.7764 + 0.9410) * error, rel=1e-4)


def test_a_constant_offset_is_found_exactly_however_much_seeds_vary():
    difference = paired_difference(arm("tract", [12.0, 52.0, 92.0]), arm("plain", [10, 50, 90]))
    assert difference.interval == (2.0, 2.0)
    assert (difference.sd, difference.p_value, difference.detectable) == (0, pytest.approx(0), 0)


def test_an_arm_does_not_differ_from_itself():
    difference = paired_difference(arm("plain", PLAIN), arm("plain", PLAIN))
    assert (difference.mean, difference.interval, difference.p_value) == (0, (0, 0), 1)


def test_differences_that_are_rounding_alone_are_none():
    finals = [0.1 + 0.2, 0.7, 1.1 + 2.2]
    difference = paired_difference(arm("tract", finals), arm("plain", [0.3, 0.7, 3.3]))
    assert (difference.mean, difference.interval, difference.p_value) == (0, (0, 0), 1)


def test_swapping_the_arms_changes_the_sign_alone():
    forth = paired_difference(arm("tract", TRACT), arm("plain", PLAIN))
    back = paired_difference(arm("plain", PLAIN), arm("tract", TRACT))
    assert (back.mean, back.interval) == (-forth.mean, (-forth.interval[1], -forth.interval[0]))
    assert (back.sd, back.p_value) == (forth.sd, forth.p_value)


def test_one_seed_has_a_difference_and_no_interval():
    difference = paired_difference(arm("tract", [63.0]), arm("plain", [60.0]))
    assert (difference.n, difference.mean, difference.interval) == (1, 3.0, None)
    assert math.isnan(difference.p_value) and math.isnan(difference.detectable)


def test_pairs_are_the_seeds_that_both_arms_finished():
    tract = Arm("tract", {1: constant(5.0), 2: None, 3: constant(7.0), 4: constant(99.0)})
    plain = Arm("plain", {0: constant(0.0), 1: constant(4.0), 2: constant(0.0), 3: constant(4.0)})
    difference = paired_difference(tract, plain)
    assert (difference.n, difference.mean) == (2, 2.0)


def test_no_common_seed_is_an_error_that_names_the_arms():
    tract, plain = Arm("tract", {0: constant(5.0), 1: None}), Arm("plain", {1: constant(4.0)})
    with pytest.raises(UserError, match=r"^no finished seed is common to tract and plain: .*$"):
        paired_difference(tract, plain)
    with pytest.raises(UserError, match="common to tract and plain"):
        speed_up_over_lengths([tract], plain)


def test_a_constant_added_to_both_arms_changes_no_difference():
    before = paired_difference(arm("tract", TRACT), arm("plain", PLAIN))
    shifted = [arm(name, np.array(f) + 7.0) for name, f in (("tract", TRACT), ("plain", PLAIN))]
    after = paired_difference(*shifted)
    assert np.hstack(astuple(after)) == pytest.approx(np.hstack(astuple(before)))


def test_the_names_and_the_order_of_seeds_change_nothing():
    rng = np.random.default_rng(0)
    table = rng.normal([50, 60, 55], 4, size=(6, 3))

    def results(order, seeds):
        tract_5, tract_10, plain = (
            Arm(
                name,
                {
                    s: constant(table[row, column], length)
                    for row, s in zip(order, seeds, strict=True)
                },
            )
            for column, (name, length) in enumerate([("t", 5.0), ("t", 10.0), ("p", 10.0)])
        )
        return (
            summarize(plain),
            paired_difference(tract_10, plain),
            speed_up(tract_10, plain),
            speed_up_over_lengths([tract_5, tract_10], plain),
        )

    assert results(range(6), range(6)) == results(rng.permutation(6), [9, 4, 7, 0, 2, 5])


def test_intervals_cover_the_truth_in_95_per_cent_of_experiments():
    """The bounds are 4.5 standard deviations of the binomial count away."""
    rng = np.random.default_rng(0)
    experiments, covered, rejected = 3000, 0, 0
    for _ in range(experiments):
        seeds = rng.normal(60, 5, size=4)
        tract, plain = seeds + 2 + rng.normal(size=4), seeds + rng.normal(size=4)
        difference = paired_difference(arm("tract", tract), arm("plain", plain))
        covered += difference.interval[0] <= 2 <= difference.interval[1]
        rejected += difference.p_value < 0.05
        includes_zero = difference.interval[0] <= 0 <= difference.interval[1]
        assert includes_zero == (difference.p_value >= 0.05)
    assert abs(covered / experiments - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / experiments)
    assert rejected > 0.3 * experiments


def test_the_detectable_difference_is_seen_in_80_per_cent_of_experiments():
    rng = np.random.default_rng(0)
    n, experiments = 10, 2000
    unit = paired_difference(arm("tract", [0.0, 1.0] * 5), arm("plain", [0.0] * n))
    true = unit.detectable / unit.sd  # for a standard deviation of 1
    seen = [
        paired_difference(arm("tract", rng.normal(true, size=n)), arm("plain", [0.0] * n)).p_value
        < 0.05
        for _ in range(experiments)
    ]
    assert np.mean(seen) == pytest.approx(0.8, abs=4.5 * math.sqrt(0.8 * 0.2 / experiments))


# Curves


def test_the_mean_curve_interpolates_to_the_epochs_that_all_runs_cover():
    runs = {
        0: Curve(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])),
        1: Curve(np.array([2.0, 3.0, 4.0]), np.array([4.0, 6.0, 8.0])),
        2: None,
    }
    curve = mean_curve(Arm("plain", runs))
    assert curve.n == 2
    np.testing.assert_array_equal(curve.epochs, [2, 3, 4])
    np.testing.assert_allclose(curve.mean, [3, 4.5, 6])
    np.testing.assert_allclose(curve.sd, np.array([2, 3, 4]) / math.sqrt(2))


def test_the_mean_curve_of_one_run_is_the_run_and_of_none_is_empty():
    one = mean_curve(curves("plain", np.sqrt))
    np.testing.assert_array_equal(one.mean, np.sqrt(EPOCHS))
    assert np.isnan(one.sd).all()
    assert mean_curve(arm("plain", [None])).epochs.size == 0


@pytest.mark.parametrize(
    ("epochs", "values"),
    [([], []), ([1, 2], [1]), ([2, 1], [1, 1]), ([0], [1]), ([-1, 1], [1, 1]), ([1], [math.nan])],
)
def test_a_curve_that_is_none_is_refused(epochs, values):
    with pytest.raises(ValueError, match=r"epochs|finite"):
        Curve(np.array(epochs, dtype=float), np.array(values, dtype=float))


def test_runs_of_two_lengths_are_not_one_arm():
    with pytest.raises(UserError, match="runs of plain are 5 and 10 epochs long"):
        Arm("plain", {0: constant(1.0, 5.0), 1: constant(1.0, 10.0)})
