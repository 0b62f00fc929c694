"""TrAct for detection: the first layer of a vision model learns from its pre-activations."""

import importlib
from typing import TYPE_CHECKING, Any

from tract_det.version import __version__

if TYPE_CHECKING:
    from tract_det.inference.loading import load_classifier, load_detector
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
        set_workspace,
        tract_conv2d,
        tract_diagnostics,
        tract_linear,
    )

__all__ = [
    "TrActConv2d",
    "TrActError",
    "TrActLayer",
    "TrActLinear",
    "__version__",
    "apply_tract",
    "find_stem",
    "load_classifier",
    "load_detector",
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
]

_OF_INFERENCE = ("load_classifier", "load_detector")


def __getattr__(name: str) -> Any:
    """Imports the method, or what loads models, and torch with it, when a name is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'tract_det' has no attribute '{name}'")
    module = "tract_det.inference.loading" if name in _OF_INFERENCE else "tract_det.tract"
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
