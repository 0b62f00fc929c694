"""Keeps the first layer's filters as they are before a training, to be seen beside the final."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from tract_det.files import atomically
from tract_det.report.folder import STEM_AT_START
from tract_det.tract import TrActError, find_stem


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

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, name=np.array(filters.name), weight=filters.weight)

    atomically(output / STEM_AT_START, write)
