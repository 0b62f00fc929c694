"""Compares the arms of an experiment: differences with their uncertainty.

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
from statistics import mean, stdev

import numpy as np

from tract_det.errors import UserError
from tract_det.evaluation.metrics import ROUNDING
from tract_det.evaluation.student_t import t_interval, t_probability, t_quantile

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
        require_finished(self)
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


def of_common_seeds(arm: Arm, baseline: Arm) -> tuple[Arm, Arm]:
    """Two arms without the seeds that either has not finished: those left are no easier for one.

    Raises:
        UserError: no seed is left.
    """
    common = arm.curves.keys() & baseline.curves.keys()
    require_common_seeds(len(common), [arm, baseline])
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
    require_common_seeds(len(differences), [arm, baseline])
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


def require_finished(arm: Arm) -> None:
    """Raises a UserError if no run of an arm is finished."""
    if not arm.curves:
        raise UserError(f"no run of {arm.name} finished: a speed-up needs one")


def require_common_seeds(common: int, arms: Sequence[Arm]) -> None:
    """Raises a UserError that names the arms if the number of their common seeds is 0."""
    if not common:
        names = " and ".join(dict.fromkeys(arm.name for arm in arms))
        raise UserError(f"no finished seed is common to {names}: run them with the same seeds")


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan
