"""What a comparison says, in sentences."""

import math

from tract_det.evaluation.comparison import Arm, Difference, SpeedUp, paired_difference
from tract_det.evaluation.samples import OverImages


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
        low, high = _number(over_images.low), _number(over_images.high)
        clauses.append(
            f"with these weights, other test images would give {low} to {high} (95 % interval, "
            f"{over_images.images:,} images)"
        )
    if within_length is not None:
        clauses.append(f"speed-up within one length: {_speed_up_in_words(within_length, '95 %')}")
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
        return (
            f"one seed: {arm} {abs(average):.1f} points {side} {baseline}, "
            "which says nothing about other seeds"
        )
    low, high = difference.interval
    if low <= 0 <= high:
        return (
            f"no difference seen between {arm} and {baseline}: {_number(average)} points "
            f"({_number(low)} to {_number(high)}, {n} seeds); "
            f"{n} seeds could have shown {_number(difference.detectable)}"
        )
    side = "better" if average > 0 else "worse"
    low, high = sorted((abs(low), abs(high)))
    digits = next((d for d in (1, 2) if round(low, d)), 3)  # an end that excludes 0 shows it
    return (
        f"{arm} is {side} than {baseline} by {abs(average):.{digits}f} points "
        f"(95 % interval {low:.{digits}f} to {high:.{digits}f}, {n} seeds)"
    )


def _speed_up_in_words(speed: SpeedUp, kind: str) -> str:
    words = _range_in_words(speed.low, speed.high)
    if speed.interval is not None:
        return f"{words} ({kind} interval {_range_in_words(*speed.interval)}, {speed.n} seeds)"
    if speed.never:
        return f"{words} ({speed.never} of {speed.n} seeds never got there)"
    return f"{words} (one seed)" if speed.n == 1 else words


def _range_in_words(low: float, high: float) -> str:
    if low == 0:
        return "unknown" if high == math.inf else f"at most {high:.2f}"
    if high == math.inf:
        return f"at least {low:.2f}"
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _number(points: float) -> str:
    return f"{round(points, 1) + 0.0:.1f}"  # -0.0 + 0.0 is 0.0
