"""How sure the means of an evaluation are: the images of the split are resampled.

A sample draws as many images as the split has, with replacement; an image drawn twice counts twice.
All figures of a sample come from the same draw, and those of two sets of detections as well, so
that their difference is paired. Nothing is matched again.

An average precision is a little higher the fewer images it has, since an envelope takes the best of
its noise, and that of a sample, with repeated images, is higher still. So the samples are centred
on the figure of the split: the interval is that of the mean over splits of as many images, and the
p-value is the level at which it would end at 0.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 10 and 13.

Shapes: B samples, I images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tract_det.evaluation.coco_ap import ByArea, coco_ap, mean_without_nan
from tract_det.evaluation.ranking import RECALLS_07, Ranking
from tract_det.evaluation.weighted_ap import weighted_ap

LEVEL = 0.95

Means = dict[str, np.ndarray]


class Difference(NamedTuple):
    """A difference of two means.

    Attributes:
        difference: as the figures, in per cent.
        low: end of the interval.
        high: the other end.
        p: two-sided p-value.
    """

    difference: float
    low: float
    high: float
    p: float


def draws(num_images: int, samples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image is drawn, (I,) int32 with the sum I, in one sample after the other."""
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        drawn = rng.integers(0, num_images, num_images)
        yield np.bincount(drawn, minlength=num_images).astype(np.int32)


def draw(num_images: int, samples: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn in each sample. (B, I) int32, rows sum to I."""
    counts = list(draws(num_images, samples, seed))
    return np.array(counts, dtype=np.int32).reshape(samples, num_images)


def weighted_means(
    voc: Sequence[Ranking], coco: ByArea, rule: str, weights: np.ndarray | None
) -> Means:
    """The means of an evaluation in each sample.

    Args:
        voc: the classes' rankings by a VOC rule.
        coco: the same by COCO's, see `coco_rankings`.
        rule: one of `voc_ap.RULES`.
        weights: see `draw`; None = the split itself.

    Returns:
        The figures of `metrics.METRICS` by name, in per cent, (B,) float each.
    """
    by_class = [weighted_ap(ranking, RECALLS_07[rule], weights) for ranking in voc]
    means: Means = {}
    for name, aps in zip(("voc_07", "voc_area"), zip(*by_class, strict=True), strict=True):
        stacked = 100 * np.stack(aps, axis=1)  # (B, K, T)
        means[f"{name}.mAP"] = mean_without_nan(stacked[:, :, 0])
        means[f"{name}.mAP_50_95"] = mean_without_nan(stacked)
    return means | {f"coco.{name}": ap for name, ap in coco_ap(coco, weights).items()}


def intervals(
    figures: Mapping[str, float], samples: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The confidence interval of each mean; NaN where no sample has it.

    Args:
        figures: the means on the split, by name.
        samples: the same in each of B samples.
    """
    return {name: interval(value, samples[name]) for name, value in figures.items()}


def differences(
    figures: tuple[Mapping[str, float], Mapping[str, float]],
    samples: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
) -> dict[str, Difference]:
    """Each mean of the first detections minus that of the second.

    Args:
        figures: the means on the split, by name, of both.
        samples: the same in each of B samples, of the same draw.
    """
    compared = {}
    for name, value in figures[0].items():
        difference, sampled = value - figures[1][name], samples[0][name] - samples[1][name]
        ends = interval(difference, sampled)
        compared[name] = Difference(difference, *ends, p_value(difference, sampled))
    return compared


def interval(value: float, sampled: np.ndarray) -> tuple[float, float]:
    """The percentile interval at `LEVEL` of the centred samples.

    Args:
        value: the figure on the split.
        sampled: (B,) float, the figure in each sample; NaN is left out.

    Returns:
        Both ends; NaN where every sample is NaN.
    """
    centred = _centred(value, sampled)
    if not len(centred):
        return math.nan, math.nan
    low, high = np.quantile(centred, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_value(difference: float, sampled: np.ndarray) -> float:
    """The two-sided p-value of a difference: 1 - the level at which `interval` would end at 0.

    Args:
        difference: on the split.
        sampled: (B,) float, in each sample; NaN is left out.

    Returns:
        1 / (B + 1) at least; 1 if all samples are 0, NaN if all are NaN.
    """
    centred = _centred(difference, sampled)
    if not len(centred):
        return math.nan
    below = np.count_nonzero(centred < 0) + np.count_nonzero(centred == 0) / 2
    share = (below + 0.5) / (len(centred) + 1)
    return float(2 * min(share, 1 - share))


def _centred(value: float, sampled: np.ndarray) -> np.ndarray:
    """The samples that are not NaN, moved so that their mean is the value."""
    sampled = sampled[~np.isnan(sampled)]
    return sampled - sampled.mean() + value if len(sampled) else sampled
