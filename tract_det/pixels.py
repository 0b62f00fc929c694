"""Pixels of any number of channels: the statistics that standardise them, and what RGB shows.

Statistics have a number for each channel, RGB if there are three, in units of [0, 255].
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tract_det.errors import UserError

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# Standard deviation of the training images of data sets that come as they are.
DATA_STD = {
    "cifar10": (62.985, 62.0925, 66.708),
    "cifar100": (68.1615, 65.382, 70.4055),
}


def pixel_statistics(
    known: Mapping[str, Any] | None,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    source: str = "",
) -> tuple[list[float], list[float]]:
    """The mean and standard deviation that a model has to standardise its images with.

    Args:
        known: the `meta` of the weights, with `pixel_mean` and `pixel_std` where the weights' file
            says so; None for random weights.
        mean: as configured; empty = the weights' own, or ImageNet's for random weights. Images of
            other than three channels must have it; weights for RGB are widened for them.
        std: as configured, likewise.
        source: file or name of the weights, for messages.

    Raises:
        UserError: the configured statistics differ from the weights' own, also in their number, or
            neither says any.
    """
    if known is not None and "pixel_mean" in known:
        own_mean, own_std = list(known["pixel_mean"]), list(known["pixel_std"])
        if mean and len(own_mean) == 3 != len(mean):
            return list(mean), list(std)
        if len(own_mean) != (len(mean) or 3):
            raise UserError(
                f"MODEL.WEIGHTS {source} takes images of {len(own_mean)} channels, and "
                f"MODEL.PIXEL_MEAN is for {len(mean) or 3}: set MODEL.PIXEL_MEAN "
                f"{rounded(own_mean)} and MODEL.PIXEL_STD {rounded(own_std)}, or other weights"
            )
        if mean and not same_statistics([*mean, *std], [*own_mean, *own_std]):
            raise UserError(
                f"MODEL.PIXEL_MEAN {list(mean)} and MODEL.PIXEL_STD {list(std)} differ from the "
                f"statistics that {source} was trained with, {rounded(own_mean)} and "
                f"{rounded(own_std)}: leave both keys out"
            )
        return own_mean, own_std
    if mean:
        return list(mean), list(std)
    if known is not None:
        raise UserError(
            f"MODEL.WEIGHTS {source} does not say which pixel statistics it was trained with: set "
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (RGB in [0, 255]; torchvision's classifiers: "
            f"{list(IMAGENET_MEAN)} and {list(IMAGENET_STD)})"
        )
    return list(IMAGENET_MEAN), list(IMAGENET_STD)


def input_variance(std: Sequence[float], data_std: Sequence[float] = IMAGENET_STD) -> float:
    """The variance of a model's input, which is 1 if it is standardised by the data's statistics.

    TrAct's `lambda_` is meant for inputs of variance 1 and has to grow with this number: about
    3,300 for weights from Caffe, whose standard deviation is 1. For other than three channels no
    data but the user's are known: `MODEL.PIXEL_STD` is taken for theirs.

    Args:
        std: `MODEL.PIXEL_STD`, which the pixels are divided by, in [0, 255].
        data_std: the data's own, of RGB.
    """
    if len(std) != 3:
        return 1.0
    return sum((a / b) ** 2 for a, b in zip(data_std, std, strict=True)) / 3


def lambda_in_unit(lambda_: float, unit: str, variance: float) -> float:
    """TrAct's `lambda_` as the layer takes it, with `relative` where the unit is "trace".

    Args:
        lambda_: in the unit.
        unit: "standardised", of pixels standardised by the data's own statistics; "input", of the
            layer's input; "trace", of the input's mean square `trace(G) / K`.
        variance: of the layer's input, as `input_variance` gives it.
    """
    return lambda_ * variance if unit == "standardised" else lambda_


def lambda_in_words(lambda_: float, unit: str, variance: float) -> str:
    """`lambda_` with its unit, for a log; arguments as for `lambda_in_unit`."""
    units = {
        "standardised": f"standardised pixels, {lambda_ * variance:g} of this model's",
        "input": "this model's pixels",
        "trace": "the patches' mean square",
    }
    return f"lambda {lambda_:g} of {units[unit]}"


def same_statistics(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two sets of pixel statistics agree up to the number of digits written down."""
    return all(abs(x - y) <= 1e-3 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def rounded(values: Sequence[float]) -> list[float]:
    """Three digits, for messages."""
    return [round(float(value), 3) for value in values]


def shown_channels(count: int) -> list[int]:
    """Which channels a picture in RGB shows of so many: the first three, or the first in grey."""
    return [0, 1, 2] if count >= 3 else [0, 0, 0]
