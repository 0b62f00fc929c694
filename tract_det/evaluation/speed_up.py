"""How many times fewer epochs an arm needs than its baseline, within a length and over lengths.

Shapes: E evaluations of a run, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, geometric_mean, mean, stdev

import numpy as np

from tract_det.errors import UserError
from tract_det.evaluation.comparison import (
    Arm,
    Interval,
    of_common_seeds,
    require_common_seeds,
    require_finished,
)
from tract_det.evaluation.student_t import t_quantile

_RESAMPLES = 2000
# A baseline that reaches its own final figures so many times earlier than at its end, in the
# geometric mean over seeds, has stopped improving, or fluctuates.
_FLAT = 1.05


@dataclass(frozen=True)
class SpeedUp:
    """How many times fewer epochs an arm needs than its baseline, as far as the runs tell.

    Attributes:
        low: the speed-up is at least this; 0 if the arm does not reach the target.
        high: the speed-up is at most this; infinite if the first measurement is above the target.
            Equal to `low` where the speed-up is measured.
        interval: 95 %, less over lengths with few seeds; None for a bound, for n = 1, or where it
            cannot be told.
        n: number of seeds.
        never: number of seeds that do not reach the target, where seeds are judged one by one.
    """

    low: float
    high: float
    interval: Interval | None
    n: int
    never: int = 0


def speed_up(arm: Arm, baseline: Arm) -> SpeedUp:
    """Length of the baseline over the epoch at which the arm's curves reach its mean final metric.

    Over the seeds that both finished. The epoch is the first at which a seed's curve, linear
    between evaluations, reaches the target; the result is the geometric mean over seeds. A seed
    that never reaches the target bounds the speed-up from above by what reaching it at the end
    would give; one that is there at the first evaluation bounds it from below.

    The interval is Student's t with the jackknife's standard error of the logarithm: each seed is
    left out of both arms in turn, so that the target's own uncertainty counts. There is none where
    a mean that is left cannot be measured.

    This is not the time that a shorter training saves. Under a schedule that anneals the learning
    rate, much of the gain comes in the last epochs whatever came before, which hides a head start;
    where annealing brings the baseline little, the arm with the faster early progress is flattered.
    So is a curve that fluctuates, by its first crossing: `speed_up_of_flat` finds baselines for
    which that is all. An arm that equals the baseline misses its mean on about half of the seeds.
    `speed_up_over_lengths` compares complete trainings instead.

    Raises:
        UserError: no seed was finished by both arms.
    """
    arm, baseline = of_common_seeds(arm, baseline)
    bounds = _bounds_by_seed(arm, baseline)
    lows, highs = zip(*bounds, strict=True)
    low, high = (geometric_mean(lows) if all(lows) else 0.0), geometric_mean(highs)
    interval = _jackknife(arm, baseline, math.log(low)) if lows == highs else None
    return SpeedUp(low, high, interval, len(lows), never=lows.count(0.0))


def _bounds_by_seed(arm: Arm, baseline: Arm) -> list[Interval]:
    full, target = baseline.length, mean(baseline.finals.values())
    return [_speed_up_bounds(c.epochs, c.values, target, full) for c in arm.curves.values()]


def _jackknife(arm: Arm, baseline: Arm, center: float) -> Interval | None:
    """The interval of a speed-up that is measured on every seed; `center` is its logarithm."""
    seeds = [*arm.runs]
    if len(seeds) == 1:
        return None
    logs = []
    for left_out in seeds:
        sides = (
            Arm(side.name, {seed: run for seed, run in side.runs.items() if seed != left_out})
            for side in (arm, baseline)
        )
        bounds = _bounds_by_seed(*sides)
        if any(low != high for low, high in bounds):
            return None
        logs.append(mean(math.log(low) for low, _ in bounds))
    n = len(logs)
    error = math.sqrt((n - 1) ** 2 / n) * stdev(logs)
    half = t_quantile(0.95, n - 1) * error
    return math.exp(center - half), math.exp(center + half)


def speed_up_of_flat(baseline: Arm) -> SpeedUp | None:
    """How much earlier than at its end a baseline reaches its own final figures, if it does.

    That is what `speed_up` gives for an arm that does not differ from a baseline which has stopped
    improving, or which fluctuates. None for one that improves until its end.

    Raises:
        UserError: no run of the baseline is finished.
    """
    require_finished(baseline)
    bounds = [
        _speed_up_bounds(c.epochs, c.values, float(c.values[-1]), float(c.epochs[-1]))
        for c in baseline.curves.values()
    ]
    low, high = map(geometric_mean, zip(*bounds, strict=True))
    return SpeedUp(low, high, None, len(bounds)) if low > _FLAT else None


def speed_up_over_lengths(arms: Sequence[Arm], baseline: Arm, *, seed: int = 0) -> SpeedUp:
    """Length of the baseline over the shortest training of the arm with the same final metric.

    Over the seeds that all finished, the arm's mean final metric at each length is interpolated
    linearly in the logarithm of the length. The shortest length that reaches the baseline's mean
    counts. If none does, or the shortest one measured does, only a bound is known.

    The interval is Hesterberg's expanded percentile bootstrap ("What Teachers Should Know About the
    Bootstrap", The American Statistician 69(4), 2015): seeds are drawn with replacement, the same
    for all lengths and the baseline. Where a resample gives a bound only, an end may be 0 or
    infinite. It cannot leave the range of the S seeds, so it covers the truth with a probability of
    about 1 - 2^(1 - S) at most: 75 % for 3 seeds, 94 % for 5.

    Args:
        arms: the runs of one arm, an `Arm` for each length.
        baseline: the runs of the baseline at its full length.
        seed: of the bootstrap.

    Raises:
        UserError: an arm has no finished run, two have the same length, or no seed is common.
    """
    arms = sorted(arms, key=lambda arm: arm.length)
    full, lengths = baseline.length, np.array([arm.length for arm in arms])
    if (np.diff(lengths) == 0).any():
        raise UserError(f"{arms[0].name} has two arms of the same length: give each length once")
    finals = [arm.finals for arm in (*arms, baseline)]
    common = set.intersection(*map(set, finals))
    require_common_seeds(len(common), [*arms, baseline])
    # Sorted by value, so that the names of the seeds do not influence the resampling.
    table = np.array(sorted([run[s] for run in finals] for s in common))  # (S, lengths + 1)

    def bounds(means: np.ndarray) -> Interval:
        return _speed_up_bounds(lengths, means[:-1], float(means[-1]), full, log=True)

    low, high = bounds(table.mean(axis=0))
    interval, n = None, len(common)
    if low == high and n > 1:
        draws = np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))
        lows, highs = np.sort([bounds(m) for m in table[draws].mean(axis=1)], axis=0).T
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(0.95, n - 1))
        outside = int(tail * _RESAMPLES)
        interval = (float(lows[outside]), float(highs[-1 - outside]))
    return SpeedUp(low, high, interval, n)


def _speed_up_bounds(
    x: np.ndarray, y: np.ndarray, target: float, full: float, *, log: bool = False
) -> Interval:
    """Bounds of `full` over the first x at which a polyline reaches the target.

    The line goes through x (E,), ascending, and y (E,); with `log` y is linear in log x.
    """
    reached = np.flatnonzero(y >= target)
    if not reached.size:
        return 0.0, full / float(x[-1])
    i = int(reached[0])
    if i == 0:
        return full / float(x[x > 0][0]), math.inf
    fraction = (target - y[i - 1]) / (y[i] - y[i - 1])
    before, after = x[i - 1], x[i]
    at = before * (after / before) ** fraction if log else before + fraction * (after - before)
    return full / float(at), full / float(at)
