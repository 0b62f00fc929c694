"""Compares the arms of an experiment: differences with their uncertainty, and speed-ups.

An arm is one way to train (frozen, plain, tract, ...), run once per seed. Runs of two arms with the
same seed share initial weights and the order of the data, so differences are taken within seeds.
Metrics are in per cent, greater is better, and the last evaluation of a run is its final one.

Means and intervals are over the seeds that finished, for these test images; `samples.over_images`
says how sure a difference is of these images. If an arm fails for some seeds, its mean is that
of the easier seeds, so failures are counted and named wherever a mean is.

Shapes: E evaluations of a run, S seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, geometric_mean, mean, stdev

import numpy as np

from tract_det.errors import UserError
from tract_det.evaluation.student_t import t_interval, t_probability, t_quantile

_RESAMPLES = 2000
ROUNDING = 1e-9  # points: figures that differ by less are equal
# A baseline that reaches its own final figures so many times earlier than at its end, in the
# geometric mean over seeds, has stopped improving, or fluctuates.
_FLAT = 1.05

Interval = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """The evaluations of one finished run.

    Attributes:
        epochs: (E,) float, ascending, not negative; the last is the length of the run, above 0.
        values: (E,) float, finite, the metric in per cent.
        is_early: the run ended before its full length, by SOLVER.PATIENCE.
    """

    epochs: np.ndarray
    values: np.ndarray
    is_early: bool = False

    def __post_init__(self) -> None:
        if self.epochs.ndim != 1 or self.epochs.shape != self.values.shape:
            raise ValueError(f"epochs {self.epochs.shape} and values {self.values.shape}: not (E,)")
        if not (np.isfinite(self.epochs) & np.isfinite(self.values)).all():
            raise ValueError("a curve must be finite: give None for a run that diverged")
        is_ascending = self.epochs.size and (np.diff(self.epochs) > 0).all()
        if not is_ascending or self.epochs[0] < 0 or self.epochs[-1] == 0:
            raise ValueError("epochs must ascend from 0 or later to a length above 0")


@dataclass(frozen=True)
class Arm:
    """The runs of an arm at one length.

    Attributes:
        name: what sentences and errors call it.
        runs: the run of each seed, None if it diverged or was not finished.

    Raises:
        UserError: two runs of full length have different lengths.
    """

    name: str
    runs: Mapping[int, Curve | None]

    def __post_init__(self) -> None:
        whole = (curve for curve in self.curves.values() if not curve.is_early)
        lengths = sorted({float(curve.epochs[-1]) for curve in whole})
        if len(lengths) > 1:
            raise UserError(
                f"runs of {self.name} are {lengths[0]:g} and {lengths[-1]:g} epochs long: "
                "give the runs of each length as an arm of their own"
            )

    @property
    def curves(self) -> dict[int, Curve]:
        """The finished runs by seed."""
        return {seed: run for seed, run in self.runs.items() if run is not None}

    @property
    def finals(self) -> dict[int, float]:
        """The final metric of each finished run by seed."""
        return {seed: float(curve.values[-1]) for seed, curve in self.curves.items()}

    @property
    def failed(self) -> int:
        """Number of runs that did not finish."""
        return len(self.runs) - len(self.curves)

    @property
    def length(self) -> float:
        """Epochs of a finished run, in the mean if some ended early; a UserError if there is none.

        What a baseline took, not what it might have: an early end is no speed-up of the others.
        """
        _require_finished(self)
        return mean(float(curve.epochs[-1]) for curve in self.curves.values())

    @property
    def early(self) -> list[float]:
        """Epochs of the runs that ended early, ascending."""
        return sorted(float(curve.epochs[-1]) for curve in self.curves.values() if curve.is_early)


@dataclass(frozen=True)
class Summary:
    """The final metrics of an arm.

    Attributes:
        n: number of finished runs.
        mean: in per cent, NaN for n = 0.
        sd: standard deviation with Bessel's correction, in points, NaN for n < 2.
        failed: number of runs that did not finish.
    """

    n: int
    mean: float
    sd: float
    failed: int


@dataclass(frozen=True)
class Difference:
    """The final metric of an arm minus that of a baseline, over their n common finished seeds.

    Attributes:
        n: number of pairs, at least 1.
        mean: in points.
        sd: standard deviation of the differences with Bessel's correction, NaN for n = 1.
        interval: 95 % by Student's t, None for n = 1.
        p_value: of the paired t-test, two-sided, NaN for n = 1.
        detectable: the smallest true difference that n seeds show (p < 0.05) with probability 0.8,
            see `paired_difference`; NaN for n = 1.
    """

    n: int
    mean: float
    sd: float
    interval: Interval | None
    p_value: float
    detectable: float


@dataclass(frozen=True)
class MeanCurve:
    """The mean of an arm's curves, for a plot.

    Attributes:
        epochs: (E,) float, ascending.
        mean: (E,) float, in per cent.
        sd: (E,) float, standard deviation over seeds with Bessel's correction, NaN for n < 2.
        n: number of finished runs.
    """

    epochs: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    n: int


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


def of_common_seeds(arm: Arm, baseline: Arm) -> tuple[Arm, Arm]:
    """Two arms without the seeds that either has not finished: those left are no easier for one.

    Raises:
        UserError: no seed is left.
    """
    common = arm.curves.keys() & baseline.curves.keys()
    _require_common_seeds(len(common), [arm, baseline])
    left = [
        Arm(side.name, {seed: run for seed, run in side.runs.items() if seed in common})
        for side in (arm, baseline)
    ]
    return left[0], left[1]


def summarize(arm: Arm) -> Summary:
    """The mean and spread of an arm's final metrics."""
    finals = list(arm.finals.values())
    average = mean(finals) if finals else math.nan
    return Summary(len(finals), average, _sd(finals), arm.failed)


def paired_difference(arm: Arm, baseline: Arm) -> Difference:
    """The difference of two arms' final metrics over the seeds that both finished.

    The detectable difference is (t_0.975 + t_0.8) sd / sqrt(n) with n - 1 degrees of freedom:
    Bloom, "Minimum Detectable Effects", Evaluation Review 19(5), 1995. The noncentral t
    distribution gives 16 % more for 2 seeds, 5 % for 3 and 1 % for 5. The sd is an estimate, from
    few seeds a rough one.

    Raises:
        UserError: the arms have no finished seed in common.
    """
    finals, others = arm.finals, baseline.finals
    differences = [finals[seed] - others[seed] for seed in finals if seed in others]
    _require_common_seeds(len(differences), [arm, baseline])
    if max(differences) - min(differences) < ROUNDING:
        differences = [round(differences[0], 9)] * len(differences)
    n, average, sd = len(differences), mean(differences), _sd(differences)
    if n == 1:
        return Difference(n, average, sd, None, math.nan, math.nan)
    df, error = n - 1, sd / math.sqrt(n)
    t = abs(average) / error if error else math.inf if average else 0.0
    return Difference(
        n,
        average,
        sd,
        t_interval(differences),
        p_value=max(0.0, 1 - t_probability(t, df)),
        detectable=(t_quantile(0.95, df) + t_quantile(0.6, df)) * error,  # t_0.975, t_0.8
    )


def mean_curve(arm: Arm) -> MeanCurve:
    """The mean and spread of an arm's curves, each interpolated linearly between evaluations.

    The epochs are those of all evaluations from where every run has had its first. A run that ended
    early keeps its final figure.
    """
    curves = list(arm.curves.values())
    if not curves:
        return MeanCurve(np.empty(0), np.empty(0), np.empty(0), 0)
    epochs = np.unique(np.concatenate([curve.epochs for curve in curves]))
    epochs = epochs[epochs >= max(curve.epochs[0] for curve in curves)]
    values = np.stack([np.interp(epochs, curve.epochs, curve.values) for curve in curves])  # (S, E)
    sd = values.std(axis=0, ddof=1) if len(curves) > 1 else np.full(len(epochs), np.nan)
    return MeanCurve(epochs, values.mean(axis=0), sd, len(curves))


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
    _require_finished(baseline)
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
    _require_common_seeds(len(common), [*arms, baseline])
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


def _require_finished(arm: Arm) -> None:
    if not arm.curves:
        raise UserError(f"no run of {arm.name} finished: a speed-up needs one")


def _require_common_seeds(common: int, arms: Sequence[Arm]) -> None:
    if not common:
        names = " and ".join(dict.fromkeys(arm.name for arm in arms))
        raise UserError(f"no finished seed is common to {names}: run them with the same seeds")


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


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
