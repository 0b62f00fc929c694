"""TrAct, the method. Imports torch and nothing else."""

from tract_det.tract.functional import TrActError, tract_conv2d, tract_linear
from tract_det.tract.gram import patch_gram
from tract_det.tract.modifier import apply_tract, find_stem, register_layer, remove_tract
from tract_det.tract.modules import (
    TrActConv2d,
    TrActLayer,
    TrActLinear,
    set_image_sizes,
    set_micro_batches,
)

__all__ = [
    "TrActConv2d",
    "TrActError",
    "TrActLayer",
    "TrActLinear",
    "apply_tract",
    "find_stem",
    "patch_gram",
    "register_layer",
    "remove_tract",
    "set_image_sizes",
    "set_micro_batches",
    "tract_conv2d",
    "tract_linear",
]
