import math
from dataclasses import astuple

import numpy as np
import pytest

from tract_det.errors import UserError
from tract_det.evaluation.comparison import (
    Arm,
    Curve,
    SpeedUp,
    mean_curve,
    paired_difference,
    speed_up,
    speed_up_of_flat,
    speed_up_over_lengths,
    summarize,
)
from tract_det.evaluation.comparison_words import verdict

EPOCHS = np.arange(1.0, 11.0)


def constant(final, length=10.0):
    return Curve(np.array([length / 2, length]), np.array([0.0, final]))


def arm(name, finals, length=10.0):
    """An arm with these final metrics, for the seeds 0, 1, ...; None failed."""
    runs = [None if final is None else constant(final, length) for final in finals]
    return Arm(name, dict(enumerate(runs)))


def curves(name, *functions):
    return Arm(name, {s: Curve(EPOCHS, f(EPOCHS)) for s, f in enumerate(functions)})


PLAIN = [60.0, 61.0, 59.5, 60.5, 62.0]
TRACT = [63.0, 64.5, 63.5, 62.5, 66.5]  # 3, 3.5, 4, 2, 4.5 above


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


# Verdicts


def test_verdict_better_and_worse():
    tract, plain = arm("tract", TRACT), arm("plain", PLAIN)
    numbers = "by 3.4 points (95 % interval 2.2 to 4.6, 5 seeds)."
    assert verdict(tract, plain) == f"tract is better than plain {numbers}"
    assert verdict(plain, tract) == f"plain is worse than tract {numbers}"


def test_verdict_no_difference_says_what_could_have_been_seen():
    sentence = verdict(arm("tract", [60.0, 61.5, 60.0]), arm("plain", [60.5, 61.0, 60.06]))
    assert sentence == (
        "no difference seen between tract and plain: 0.0 points (-1.3 to 1.2, 3 seeds); "
        "3 seeds could have shown 1.6."
    )


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (0.0, "no difference seen between tract and plain: 0.0 points (0.0 to 0.0, 3 seeds)"),
        (0.4, "tract is better than plain by 0.4 points (95 % interval 0.4 to 0.4, 3 seeds)"),
    ],
)
def test_verdict_of_equal_differences_claims_no_power(offset, words):
    finals = np.array([60.0, 61.5, 59.0])
    sentence = verdict(arm("tract", finals + offset), arm("plain", finals))
    assert sentence.startswith(words) and sentence.endswith("unknown.")
    assert "could have shown 0" not in sentence


def test_verdict_shows_as_many_digits_as_a_small_detectable_difference_needs():
    sentence = verdict(arm("tract", [60.0, 61.007, 59.502]), arm("plain", [60.008, 61.0, 59.5]))
    assert "0.00 points (-0.02 to 0.02, 3 seeds); 3 seeds could have shown 0.02" in sentence


@pytest.mark.parametrize("sign", [1, -1])
def test_verdict_shows_no_end_of_0_where_the_interval_excludes_0(sign):
    differences = sign * np.array([0.4, 0.561, 0.239])  # 0.00007 to 0.79993
    sentence = verdict(arm("tract", 60 + differences), arm("plain", [60.0] * 3))
    assert "by 0.4000 points (95 % interval 0.0001 to 0.7999, 3 seeds)" in sentence


def test_verdict_of_an_interval_that_ends_at_0_is_no_difference():
    t_975 = 12.706204736432095  # of two seeds: the interval is 1 -+ t spread / 2
    tract = arm("tract", [61 + 1 / t_975, 61 - 1 / t_975])
    assert "no difference seen" in verdict(tract, arm("plain", [60.0, 60.0]))


def test_verdict_of_a_flat_baseline_says_that_its_speed_up_is_none():
    flat = curves("plain", *[lambda e: 0 * e + 10] * 3)
    assert verdict(flat, flat, speed_up(flat, flat)).endswith(
        "speed-up within one length: at least 10.00; plain itself has at least 10.00, as it "
        "reaches its final figures before its end."
    )
    rising = curves("plain", *[lambda e: e] * 3)
    assert "plain itself" not in verdict(rising, rising, speed_up(rising, rising))


def test_a_baseline_is_flat_or_not_however_much_its_seeds_differ():
    levels, rng = (40.0, 50.0, 60.0), np.random.default_rng(0)
    early = curves("plain", *(lambda e, u=u: u + np.minimum(e, 4.0) for u in levels))
    noisy = curves("plain", *(lambda e, u=u: u + rng.normal(size=e.shape) for u in levels))
    rising = curves("plain", *(lambda e, u=u: u + np.log(e) for u in levels))
    assert speed_up_of_flat(early).low == pytest.approx(2.5)
    assert speed_up_of_flat(noisy).low > 1.05
    assert speed_up_of_flat(rising) is None


def test_verdict_one_seed():
    assert verdict(arm("tract", [63.1]), arm("plain", [60.0])) == (
        "one seed: tract 3.1 points above plain, which says nothing about other seeds."
    )
    assert "3.1 points below plain" in verdict(arm("tract", [56.9]), arm("plain", [60.0]))
    assert "0.01 points above plain" in verdict(arm("tract", [60.01]), arm("plain", [60.0]))
    assert "one seed: tract equals plain, which" in verdict(arm("tract", [6.0]), arm("plain", [6]))


def test_verdict_names_failed_runs():
    sentence = verdict(arm("tract", [*TRACT[:4], None]), arm("plain", [*PLAIN[:4], None]))
    assert sentence.endswith("; 1 of 5 runs of tract failed; 1 of 5 runs of plain failed.")


def test_verdict_shows_the_digits_that_exclude_no_difference():
    sentence = verdict(arm("tract", [60.05, 61.06, 59.54]), arm("plain", [60.0, 61.0, 59.5]))
    assert "better than plain by 0.05 points (95 % interval 0.03 to 0.07" in sentence


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (SpeedUp(2.0, 2.0, (1.5, 2.5), 5), "2.00 ({} interval 1.50 to 2.50, 5 seeds)"),
        (SpeedUp(2.0, 2.0, (0.0, 2.5), 5), "2.00 ({} interval at most 2.50, 5 seeds)"),
        (SpeedUp(2.0, 2.0, (2.0, 2.0), 5), "2.00 (5 seeds without any spread)"),
        (SpeedUp(2.0, 2.0, None, 1), "2.00 (one seed)"),
        (SpeedUp(4.0, math.inf, None, 5), "at least 4.00"),
        (SpeedUp(0.0, 0.9, None, 5, never=2), "at most 0.90 (2 of 5 seeds never got there)"),
        (SpeedUp(0.0, math.inf, None, 5, never=2), "unknown (2 of 5 seeds never got there)"),
    ],
)
def test_verdict_words_of_a_speed_up(speed, words):
    tract, plain = arm("tract", TRACT), arm("plain", PLAIN)
    within, over = words.format("95 %"), words.format("bootstrap")
    assert verdict(tract, plain, speed).endswith(f"; speed-up within one length: {within}.")
    assert verdict(tract, plain, None, speed).endswith(f"; speed-up over lengths: {over}.")


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
