"""TrAct for detection: the first layer of a vision model learns from its pre-activations."""

from tract_det.tract import (
    TrActConv2d,
    TrActError,
    TrActLinear,
    apply_tract,
    find_stem,
    patch_gram,
    register_layer,
    remove_tract,
    tract_conv2d,
    tract_linear,
)
from tract_det.version import __version__

__all__ = [
    "TrActConv2d",
    "TrActError",
    "TrActLinear",
    "__version__",
    "apply_tract",
    "find_stem",
    "patch_gram",
    "register_layer",
    "remove_tract",
    "tract_conv2d",
    "tract_linear",
]
