"""How sure a difference is of its test images, from the samples that each run has left.

All evaluations of a split draw the same samples of its images (see `bootstrap`), so that those of
two runs are pairs, though each run draws its own.

Shapes: B samples.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tract_det.evaluation.bootstrap import Means, difference_interval
from tract_det.evaluation.metrics import ROUNDING
from tract_det.files import naming_damage, write_binary

SAMPLES = "samples.npz"  # in a run's folder
_SPLIT = "split"  # the array that is no figure


@dataclass(frozen=True)
class Samples:
    """A figure of a run in samples of its evaluation images.

    Attributes:
        split: tells the images, in their order, from others.
        images: their number.
        figure: on the split itself, in per cent.
        values: (B,) float, likewise.
    """

    split: str
    images: int
    figure: float
    values: np.ndarray


@dataclass(frozen=True)
class OverImages:
    """How sure the mean difference of n pairs of runs is of the images that it is measured on.

    Attributes:
        low: end of the 95 % interval of the mean difference over all images like these, in points.
        high: the other end.
        images: number of images of the split.
        n: number of pairs.
    """

    low: float
    high: float
    images: int
    n: int


def write_samples(
    folder: Path,
    ids: Iterable[str],
    figures: Mapping[str, float],
    of_model: Means,
    of_average: Means | None = None,
) -> None:
    """Writes `samples.npz`; without figures there is none, and an older one is removed.

    Args:
        folder: of the run.
        ids: of the images of the split, in its order.
        figures: on the split itself, in per cent; those of the average by `ema.` and their name.
        of_model: (B,) float by name, in per cent.
        of_average: the same of the moving average of the weights, whose names get `ema.`.

    Raises:
        UserError: the file cannot be written.
    """
    if not of_model:
        (folder / SAMPLES).unlink(missing_ok=True)
        return
    ids = list(ids)
    digest = hashlib.sha256("\0".join(ids).encode("utf-8", "surrogatepass")).hexdigest()
    average = {f"ema.{name}": values for name, values in (of_average or {}).items()}
    arrays = {_SPLIT: np.array([digest, str(len(ids))])}
    for name, values in (of_model | average).items():
        arrays[name] = np.concatenate([[figures[name]], values])  # (1 + B,)
    write_binary(folder / SAMPLES, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_samples(folder: Path, metric: str) -> Samples | None:
    """Reads a figure from a run's `samples.npz`; None if it is not there.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SAMPLES
    if not path.is_file():
        return None
    mend = "delete it, and its arm does without the interval over images"
    with naming_damage(path, mend), np.load(path, allow_pickle=False) as content:
        if metric not in content:
            return None
        digest, images = content[_SPLIT].tolist()
        figure, *values = content[metric].tolist()
        return Samples(digest, int(images), figure, np.array(values))


def over_images(
    pairs: Sequence[tuple[Samples | None, Samples | None]], difference: float
) -> OverImages | None:
    """The interval of a mean difference over the images, for the runs as they are.

    In each sample, the runs of all pairs are judged on the same images. It says nothing about other
    seeds, as an interval over seeds says nothing about other images. Where a class has objects in
    few images, it is a little too narrow.

    Args:
        pairs: samples of a run and of its baseline's, for each seed.
        difference: the mean difference on the split, in points.

    Returns:
        None if a run has no samples, if they are of different images, of a single one, or all
        equally different, or if they are not of the weights that make the difference: an evaluation
        of others may have left them.
    """
    runs = [run for pair in pairs for run in pair if run is not None]
    kinds = {(run.split, run.values.shape) for run in runs}
    if len(runs) < 2 * len(pairs) or len(kinds) != 1 or runs[0].images < 2:
        return None
    figures = [run.figure for run in runs]
    if abs(np.mean(figures[::2]) - np.mean(figures[1::2]) - difference) > ROUNDING:
        return None
    values = [run.values for run in runs]
    sampled = np.mean(values[::2], axis=0) - np.mean(values[1::2], axis=0)  # (B,)
    ends = difference_interval(difference, sampled)
    if math.isnan(ends[0]):
        return None
    return OverImages(*ends, runs[0].images, len(pairs))
