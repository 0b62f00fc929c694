"""The verdict's words follow the statistics."""

import math

import numpy as np
import pytest

from tests.evaluation.arms import PLAIN, TRACT, arm, curves
from tract_det.evaluation.comparison_words import verdict
from tract_det.evaluation.speed_up import SpeedUp, speed_up


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
