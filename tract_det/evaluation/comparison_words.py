"""What a comparison says, in sentences."""

import math

from tract_det.evaluation.comparison import (
    Arm,
    Difference,
    of_common_seeds,
    paired_difference,
)
from tract_det.evaluation.metrics import ROUNDING
from tract_det.evaluation.samples import OverImages
from tract_det.evaluation.speed_up import SpeedUp, speed_up_of_flat


def verdict(
    arm: Arm,
    baseline: Arm,
    within_length: SpeedUp | None = None,
    over_lengths: SpeedUp | None = None,
    over_images: OverImages | None = None,
) -> str:
    """What the runs say about an arm against its baseline, in one sentence.

    It mentions the results of `speed_up`, `speed_up_over_lengths` and `over_images` where they are
    given.

    Raises:
        UserError: the arms have no finished seed in common.
    """
    clauses = [_difference_in_words(arm.name, baseline.name, paired_difference(arm, baseline))]
    if over_images is not None:
        ends = over_images.low, over_images.high
        digits = max(map(_digits, ends))
        low, high = (_number(end, digits) for end in ends)
        clauses.append(
            f"for these weights, over all images like the {over_images.images:,} of the test: "
            f"{low} to {high} (95 % interval)"
        )
    if within_length is not None:
        clauses.append(f"speed-up within one length: {_speed_up_in_words(within_length, '95 %')}")
        over_itself = speed_up_of_flat(of_common_seeds(arm, baseline)[1])
        if over_itself:
            bounds = _range_in_words(over_itself.low, over_itself.high)
            why = "as it reaches its final figures before its end"
            clauses.append(f"{baseline.name} itself has {bounds}, {why}")
    if over_lengths is not None:
        clauses.append(f"speed-up over lengths: {_speed_up_in_words(over_lengths, 'bootstrap')}")
    clauses += [
        f"{side.failed} of {len(side.runs)} runs of {side.name} failed"
        for side in (arm, baseline)
        if side.failed
    ]
    clauses += [
        f"{len(side.early)} of {len(side.runs)} runs of {side.name} ended early (SOLVER.PATIENCE), "
        f"after {side.early[0]:.4g} to {side.early[-1]:.4g} epochs"
        for side in (arm, baseline)
        if side.early
    ]
    return "; ".join(clauses) + "."


def _difference_in_words(arm: str, baseline: str, difference: Difference) -> str:
    average, n = difference.mean, difference.n
    if difference.interval is None:
        side = "below" if average < 0 else "above"
        by = f"{_number(abs(average), _digits(average))} points {side}" if average else "equals"
        return f"one seed: {arm} {by} {baseline}, which says nothing about other seeds"
    low, high = difference.interval
    if low <= ROUNDING and high >= -ROUNDING:
        digits = _digits(difference.detectable)
        average_in_words, low_in_words, high_in_words, detectable = (
            _number(points, digits) for points in (average, low, high, difference.detectable)
        )
        shown = f"{n} seeds could have shown {detectable}"
        if not difference.sd:
            shown = f"all {n} differences are equal, so what {n} seeds could have shown is unknown"
        return (
            f"no difference seen between {arm} and {baseline}: {average_in_words} points "
            f"({low_in_words} to {high_in_words}, {n} seeds); {shown}"
        )
    side = "better" if average > 0 else "worse"
    low, high = sorted((abs(low), abs(high)))
    digits = _digits(low)  # an end that excludes 0 shows it
    equal = "" if difference.sd else "; all differences are equal, so their spread is unknown"
    return (
        f"{arm} is {side} than {baseline} by {abs(average):.{digits}f} points "
        f"(95 % interval {low:.{digits}f} to {high:.{digits}f}, {n} seeds){equal}"
    )


def _speed_up_in_words(speed: SpeedUp, kind: str) -> str:
    words = _range_in_words(speed.low, speed.high)
    if speed.interval is not None:
        if math.isclose(*speed.interval):
            return f"{words} ({speed.n} seeds without any spread)"
        return f"{words} ({kind} interval {_range_in_words(*speed.interval)}, {speed.n} seeds)"
    if speed.never:
        return f"{words} ({speed.never} of {speed.n} seeds never got there)"
    if speed.n == 1:
        return f"{words} (one seed)"
    measured = speed.low == speed.high
    return f"{words} ({speed.n} seeds, too uncertain for an interval)" if measured else words


def _range_in_words(low: float, high: float) -> str:
    if low == 0:
        return "unknown" if high == math.inf else f"at most {high:.2f}"
    if high == math.inf:
        return f"at least {low:.2f}"
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _digits(points: float) -> int:
    """So many that points other than 0 are shown as such."""
    return next((digits for digits in range(1, 10) if round(points, digits)), 1)


def _number(points: float, digits: int) -> str:
    return f"{round(points, digits) + 0.0:.{digits}f}"  # -0.0 + 0.0 is 0.0
