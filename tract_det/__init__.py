"""TrAct for detection: the first layer of a vision model learns from its pre-activations."""

from tract_det.tract import (
    TrActConv2d,
    TrActError,
    TrActLayer,
    TrActLinear,
    apply_tract,
    find_stem,
    patch_gram,
    register_layer,
    remove_tract,
    set_image_sizes,
    set_lambda,
    set_micro_batches,
    tract_conv2d,
    tract_diagnostics,
    tract_linear,
)
from tract_det.version import __version__

__all__ = [
    "TrActConv2d",
    "TrActError",
    "TrActLayer",
    "TrActLinear",
    "__version__",
    "apply_tract",
    "find_stem",
    "patch_gram",
    "register_layer",
    "remove_tract",
    "set_image_sizes",
    "set_lambda",
    "set_micro_batches",
    "tract_conv2d",
    "tract_diagnostics",
    "tract_linear",
]
