"""TrAct, the method. Imports torch and nothing else."""

from tract_det.tract.device import set_workspace
from tract_det.tract.functional import tract_conv2d, tract_linear
from tract_det.tract.gram import patch_gram
from tract_det.tract.modifier import apply_tract, find_stem, remove_tract, trainable_layers
from tract_det.tract.modules import (
    TrActConv2d,
    TrActLayer,
    TrActLinear,
    set_image_sizes,
    set_lambda,
    set_micro_batches,
    tract_diagnostics,
)
from tract_det.tract.registry import register_layer
from tract_det.tract.state import TrActError

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
    "set_lambda",
    "set_micro_batches",
    "set_workspace",
    "tract_conv2d",
    "tract_diagnostics",
    "tract_linear",
    "trainable_layers",
]
