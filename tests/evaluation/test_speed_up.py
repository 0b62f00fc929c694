"""Speed-ups of made curves whose answers are known."""

import math

import numpy as np
import pytest

from tests.evaluation.arms import arm, curves
from tract_det.errors import UserError
from tract_det.evaluation.comparison import Arm, Curve, mean_curve, paired_difference
from tract_det.evaluation.comparison_words import verdict
from tract_det.evaluation.speed_up import SpeedUp, speed_up, speed_up_of_flat, speed_up_over_lengths

# Speed-up within one length


def test_a_curve_that_is_twice_as_fast_has_a_speed_up_of_2():
    rates = (3.0, 3.0, 3.0)
    plain = curves("plain", *(lambda e, r=r: r * e for r in rates))
    tract = curves("tract", *(lambda e, r=r: r * 2 * e for r in rates))
    speed = speed_up(tract, plain)
    assert (speed.low, speed.high) == pytest.approx((2, 2))
    assert speed.interval == pytest.approx((2, 2))


def test_seeds_are_averaged_geometrically_with_students_t_on_the_logarithms():
    plain = curves("plain", lambda e: e, lambda e: e)
    speed = speed_up(curves("tract", lambda e: 2 * e, lambda e: 4 * e), plain)
    half = 12.7062 * math.log(2) / 2  # the standard error of log 2 and log 4
    assert speed.low == speed.high == pytest.approx(math.sqrt(8))
    logs = math.log(8) / 2 - half, math.log(8) / 2 + half
    assert np.log(speed.interval) == pytest.approx(logs, rel=1e-4)


def test_crossing_lines_are_judged_where_the_target_is_first_reached():
    """It rises faster, ends lower: 10 is reached at epoch 5, between 8 at 4 and 12 at 6."""
    plain = Arm("plain", {0: Curve(np.array([2.0, 10.0]), np.array([0.0, 10.0]))})
    falling = Curve(np.array([4.0, 6.0, 10.0]), np.array([8.0, 12.0, 9.0]))
    assert speed_up(Arm("tract", {0: falling}), plain) == SpeedUp(2.0, 2.0, None, 1)
    assert paired_difference(Arm("tract", {0: falling}), plain).mean == -1.0


def test_a_seed_that_never_reaches_the_target_leaves_an_upper_bound():
    plain = curves("plain", lambda e: e, lambda e: e)
    speed = speed_up(curves("tract", lambda e: 4 * e, lambda e: e / 2), plain)
    assert speed == SpeedUp(0.0, pytest.approx(2.0), None, 2, never=1)  # sqrt(4 * 1)


def test_a_seed_at_the_target_from_the_first_evaluation_leaves_a_lower_bound():
    plain = curves("plain", lambda e: e)
    speed = speed_up(curves("tract", lambda e: 50 + e), plain)
    assert speed == SpeedUp(pytest.approx(10.0), math.inf, None, 1)
    from_start = Arm("tract", {0: Curve(np.array([0.0, 5.0, 10.0]), np.full(3, 99.0))})
    assert speed_up(from_start, plain).low == pytest.approx(2.0)  # not by 0


def test_seeds_that_bound_it_from_both_sides_leave_nothing():
    plain = curves("plain", lambda e: e, lambda e: e)
    speed = speed_up(curves("tract", lambda e: 50 + e, lambda e: e / 2), plain)
    assert (speed.low, speed.high, speed.interval, speed.never) == (0, math.inf, None, 1)


def test_equal_runs_have_a_speed_up_of_1_in_spite_of_rounding():
    plain = curves("plain", *[lambda e: e / 100] * 3)
    assert speed_up(plain, plain).low == pytest.approx(1)


@pytest.mark.parametrize("failed", ["tract", "plain"])
def test_a_speed_up_needs_a_finished_run_of_both_arms(failed):
    arms = [arm(name, [None if name == failed else 1.0]) for name in ("tract", "plain")]
    with pytest.raises(UserError, match="no finished seed is common to tract and plain"):
        speed_up(*arms)


@pytest.mark.parametrize(
    ("of_rate", "of_arm", "of_baseline"),
    [(0.2, 0.0, 0.0), (0.0, 0.5, 0.5), (0.1, 0.2, 0.5)],
    ids=["seeds differ in rate", "in level, so that the target is uncertain", "in both"],
)
@pytest.mark.parametrize("seeds", [3, 8])
def test_speed_up_intervals_cover_the_truth_in_95_per_cent_of_experiments(
    seeds, of_rate, of_arm, of_baseline
):
    rng = np.random.default_rng(0)
    experiments, covered = 400, 0
    for _ in range(experiments):
        rates = 3 * np.exp(of_rate * rng.normal(size=seeds))
        levels, targets = rng.normal(size=(2, seeds)) * [[of_arm], [of_baseline]]
        lines = zip(rates, levels, strict=True)
        tract = curves("tract", *(lambda e, r=r, u=u: r * e + u for r, u in lines))
        plain = curves("plain", *(lambda e, u=u: e + u for u in targets))
        low, high = speed_up(tract, plain).interval
        covered += low <= 3 <= high
    # Curves through a few points make it wider rather than narrower.
    error = 4.5 * math.sqrt(0.95 * 0.05 / experiments)
    assert 0.95 - error < covered / experiments < 0.95 + error


def test_a_speed_up_has_no_interval_where_it_hangs_on_one_seed():
    """Without the weakest baseline the target is 9, which one of the arm's seeds never reaches."""
    plain = curves("plain", lambda e: 0.6 * e, lambda e: 0.9 * e, lambda e: 0.9 * e)
    tract = curves("tract", lambda e: 2 * e, lambda e: 2 * e, lambda e: 0.85 * e)
    speed = speed_up(tract, plain)
    assert speed.low == speed.high and speed.interval is None
    assert "(3 seeds, too uncertain for an interval)" in verdict(tract, plain, speed)


def test_a_baseline_is_flat_or_not_however_much_its_seeds_differ():
    levels, rng = (40.0, 50.0, 60.0), np.random.default_rng(0)
    early = curves("plain", *(lambda e, u=u: u + np.minimum(e, 4.0) for u in levels))
    noisy = curves("plain", *(lambda e, u=u: u + rng.normal(size=e.shape) for u in levels))
    rising = curves("plain", *(lambda e, u=u: u + np.log(e) for u in levels))
    assert speed_up_of_flat(early).low == pytest.approx(2.5)
    assert speed_up_of_flat(noisy).low > 1.05
    assert speed_up_of_flat(rising) is None


# Speed-up over lengths


def lengths(name, finals):
    return [arm(name, values, length) for length, values in finals.items()]


def test_an_arm_that_needs_half_the_length_has_a_speed_up_of_2():
    plain = arm("plain", [70.0, 70.0], 40.0)
    tract = lengths("tract", {10.0: [60, 60], 20.0: [70, 70], 40.0: [75, 75]})
    assert speed_up_over_lengths(tract, plain) == SpeedUp(2.0, 2.0, (2.0, 2.0), 2)


def test_lengths_are_interpolated_in_their_logarithm_in_any_order():
    plain = arm("plain", [65.0], 40.0)
    tract = lengths("tract", {40.0: [70.0], 10.0: [60.0]})
    speed = speed_up_over_lengths(tract, plain)  # half way from 10 to 40 is 20
    assert (speed.low, speed.high, speed.interval) == (pytest.approx(2), pytest.approx(2), None)


def test_a_target_that_no_length_reaches_leaves_an_upper_bound():
    tract = lengths("tract", {10.0: [60, 61], 20.0: [64, 65]})
    assert speed_up_over_lengths(tract, arm("plain", [70, 70], 40.0)) == SpeedUp(0, 2, None, 2)


def test_a_target_below_the_shortest_length_leaves_a_lower_bound():
    tract = lengths("tract", {10.0: [60, 61], 20.0: [64, 65]})
    speed = speed_up_over_lengths(tract, arm("plain", [50, 50], 40.0))
    assert speed == SpeedUp(4, math.inf, None, 2)


def test_resamples_that_never_reach_the_target_leave_the_interval_open_below():
    tract = lengths("tract", {20.0: [60, 60, 60], 40.0: [80, 80, 50]})
    speed = speed_up_over_lengths(tract, arm("plain", [65, 65, 65], 40.0))
    assert speed.low == speed.high == pytest.approx(2 ** (1 / 2))
    assert speed.interval == (0.0, pytest.approx(2 ** (3 / 4)))


def test_seeds_are_resampled_together_so_that_what_they_share_cancels():
    shared = np.array([-8.0, 0.0, 3.0, 5.0])
    tract = lengths("tract", {10.0: 60 + shared, 40.0: 70 + shared})
    speed = speed_up_over_lengths(tract, arm("plain", 65 + shared, 40.0))
    assert speed.interval == pytest.approx((2, 2))


@pytest.mark.parametrize(("seeds", "coverage"), [(3, 0.75), (5, 0.94), (20, 0.95)])
def test_bootstrap_intervals_cover_the_truth_as_documented(seeds, coverage):
    rng = np.random.default_rng(0)
    experiments, covered = 100, 0
    for _ in range(experiments):
        finals = rng.normal([60, 70, 65], 1.0, size=(seeds, 3)).T
        tract = lengths("tract", {10.0: finals[0], 40.0: finals[1]})
        low, high = speed_up_over_lengths(tract, arm("plain", finals[2], 40.0)).interval
        covered += low <= 2 <= high
    tolerance = 4.5 * math.sqrt(coverage * (1 - coverage) / experiments)
    assert covered / experiments == pytest.approx(coverage, abs=tolerance)


def test_a_length_given_twice_is_refused():
    with pytest.raises(UserError, match="tract has two arms of the same length"):
        speed_up_over_lengths([arm("tract", [1.0])] * 2, arm("plain", [1.0]))


def test_runs_that_ended_early_count_and_their_baseline_s_end_is_no_speed_up():
    """An arm that equals its baseline at every epoch is 1 time as fast, whenever both end."""
    values = np.array([10.0, 20.0, 30.0])
    whole = Curve(np.array([1.0, 2.0, 4.0]), values)
    early = Curve(np.array([1.0, 2.0, 3.0]), values, is_early=True)
    plain = Arm("plain", {0: early, 1: early})
    assert plain.length == 3 and Arm("mixed", {0: whole, 1: early}).length == 3.5
    assert speed_up(Arm("tract", {0: early, 1: early}), plain).low == 1
    assert "2 of 2 runs of plain ended early" in verdict(Arm("tract", {0: whole, 1: whole}), plain)
    mixed = mean_curve(Arm("mixed", {0: whole, 1: early}))
    assert mixed.epochs[-1] == 4 and mixed.mean[-1] == 30
