"""Keeps the filters of the first layer as a training begins, and says how far they have turned."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from tract_det.files import naming_damage, write_binary
from tract_det.tract import TrActError, find_stem

STEM_AT_START = "stem_at_start.npz"


class Filters(NamedTuple):
    """The weight of a first layer.

    Attributes:
        name: in the model's state.
        weight: `(M, C, kh, kw)` float32.
    """

    name: str
    weight: np.ndarray


def filters_of(model: nn.Module, stem: str = "", channels: int = 3) -> Filters | None:
    """The stem's filters, if it is a convolution of the images' channels that is found.

    Args:
        model: as its training begins.
        stem: the layer's name; "" = find it.
        channels: C, of the images.
    """
    try:
        name = stem or find_stem(model)
        layer = model.get_submodule(name)
    except (TrActError, AttributeError):
        return None
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dim() != 4 or weight.shape[1] != channels:
        return None
    return Filters(f"{name}.weight", weight.detach().float().cpu().numpy().copy())


def write_filters(output: Path, filters: Filters) -> None:
    """Writes them into a run's folder, where the report looks for them."""
    arrays = {"name": np.array(filters.name), "weight": filters.weight}
    write_binary(output / STEM_AT_START, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def read_filters(output: Path) -> Filters | None:
    """Reads them from a run's folder; None if they are not there.

    Raises:
        UserError: the file is damaged.
    """
    path = output / STEM_AT_START
    if not path.is_file():
        return None
    with naming_damage(path, "delete it"), np.load(path, allow_pickle=False) as content:
        return Filters(str(content["name"]), content["weight"])


def mean_turn(start: np.ndarray, now: np.ndarray) -> float:
    """The angle between a filter and what it was, in the mean over the filters.

    Where a norm follows the stem, it undoes the scale of a filter, so that its direction is all
    that a training changes: 0 degrees if the stem has learned nothing, 90 if nothing is left of
    what it was. Elsewhere the length of a filter counts as well, which this leaves out.

    Args:
        start: `(M, C, kh, kw)`.
        now: likewise.

    Returns:
        In degrees; filters that are 0 or not finite have none and are left out, NaN if all are.
    """
    directions = [w.reshape(len(w), -1).astype(np.float64) for w in (start, now)]
    lengths = [np.linalg.norm(w, axis=1, keepdims=True) for w in directions]
    product = lengths[0] * lengths[1]
    is_there = (np.isfinite(product) & (product > 0))[:, 0]
    if not is_there.any():
        return math.nan
    before, after = (w[is_there] / n[is_there] for w, n in zip(directions, lengths, strict=True))
    # Half the angle by its tangent: the arc cosine is inexact where little has changed.
    opposite, adjacent = (np.linalg.norm(after + s * before, axis=1) for s in (-1, 1))
    return float(np.degrees(2 * np.arctan2(opposite, adjacent)).mean())
