"""How sure the means of an evaluation are: the images of the split are resampled.

A sample draws as many images as the split has, with replacement; an image drawn twice counts twice.
All figures of a sample come from the same draw, and those of two sets of detections as well, so
that their difference is paired. Nothing is matched again.

An average precision is a little higher the fewer images it has, since an envelope takes the best of
its noise, and that of a sample, with repeated images, is higher still. So the samples are centred
on the figure of the split: the interval is that of the mean over splits of as many images.

Resampling can only show what many images show. A class with objects in a few images is missing from
many samples, and there its AP leaves the mean; a difference that a few images make is missing too.
Whether two sets of detections differ is therefore told by `permutation`, which is exact.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 10 and 13.

Shapes: B samples, I images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tract_det.evaluation.coco_ap import ByArea, coco_ap, mean_without_nan
from tract_det.evaluation.metrics import ROUNDING
from tract_det.evaluation.ranking import RECALLS_07, Ranking
from tract_det.evaluation.weighted_ap import weighted_ap

LEVEL = 0.95
_ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2

Means = dict[str, np.ndarray]


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
    """The confidence interval of each mean; NaN where `interval` has none.

    Args:
        figures: the means on the split, by name, in per cent.
        samples: the same in each of B samples.
    """
    return {name: interval(value, samples[name], (0, 100)) for name, value in figures.items()}


def interval(
    value: float, sampled: np.ndarray, limits: tuple[float, float] = (-100, 100)
) -> tuple[float, float]:
    """The percentile interval at `LEVEL` of the samples, centred on the value.

    Args:
        value: a figure of the split, or a difference of two, in per cent.
        sampled: (B,) float, the same in each sample; NaN is left out.
        limits: what the figure cannot be below and above.

    Returns:
        Both ends; NaN where the samples that are not NaN are all equal: they know of no spread, as
        those of a single image.
    """
    sampled = sampled[~np.isnan(sampled)]
    if not len(sampled) or np.ptp(sampled) < ROUNDING:
        return math.nan, math.nan
    centred = sampled - sampled.mean() + value
    low, high = np.clip(np.quantile(centred, _ENDS), *limits)
    return float(low), float(high)


def difference_interval(difference: float, sampled: np.ndarray) -> tuple[float, float]:
    """The `interval` of a difference, extended to the percentiles of the samples as they are.

    Samples without a class leave its AP out of the mean, and samples without the few images that
    make a difference do not have it. To centre them moves them away from 0, as if they had it.

    Returns:
        Both ends; 0 and 0 for two that agree in every sample.
    """
    sampled = sampled[~np.isnan(sampled)]
    if len(sampled) and (np.abs(sampled) < ROUNDING).all():
        return 0.0, 0.0
    low, high = interval(difference, sampled)
    if math.isnan(low):
        return low, high
    first, last = np.quantile(sampled, _ENDS)
    return min(low, float(first)), max(high, float(last))


def with_zero(ends: tuple[float, float]) -> tuple[float, float]:
    """An interval of a difference, extended to 0; NaN remains."""
    low, high = ends
    return min(low, 0.0), max(high, 0.0)
