"""Puts TrAct on a model's stem, and takes it off: nothing changes but the layer's class."""

from typing import TypeVar

from torch import nn

from tract_det.tract.functional import TrActError, check_lambda
from tract_det.tract.modules import TrActConv2d, TrActLayer, TrActLinear

ModelT = TypeVar("ModelT", bound=nn.Module)

# Layer class -> its TrAct class. An exact match: a subclass may do more in its forward than its
# parent does (detectron2's convolution holds a norm), and losing that would be silent.
TRACT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: TrActConv2d,
    nn.Linear: TrActLinear,
}


def register_layer(layer: type[nn.Module], tract_layer: type[nn.Module]) -> None:
    """Teaches `apply_tract` another layer class.

    Args:
        layer: the class as models use it.
        tract_layer: a subclass of it and of `TrActLayer`, with TrAct in its forward; it must need
            no attribute that `layer.__init__` does not set.
    """
    if not (issubclass(tract_layer, layer) and issubclass(tract_layer, TrActLayer)):
        raise TrActError(
            f"{tract_layer.__name__} must be a subclass of {layer.__name__} and of TrActLayer"
        )
    TRACT_CLASSES[layer] = tract_layer


def _is_tract(module: nn.Module) -> bool:
    return type(module) in TRACT_CLASSES.values()


def find_stem(model: nn.Module) -> str:
    """The name of the model's first layer, as in `model.named_modules()`.

    That is the first module with parameters of its own and no submodules, in the order in which the
    model registers them: for torchvision's classifiers and detectors, the layer that sees the
    pixels. In a detector that is a layer of its backbone.

    Raises:
        TrActError: that module is neither a convolution nor a linear layer, or there is none.
    """
    for name, module in model.named_modules():
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if not has_parameters or any(True for _ in module.children()):
            continue
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module) in TRACT_CLASSES:
            return name
        raise TrActError(
            f"the first layer, '{name}', is a {type(module).__name__}: TrAct is for Conv2d and "
            "Linear; name another layer with stem='...'"
        )
    raise TrActError(
        f"{type(model).__name__} has no layer with parameters: nothing to put TrAct on"
    )


def _stem_module(model: nn.Module, stem: str) -> nn.Module:
    try:
        return model.get_submodule(stem)
    except AttributeError:
        top = ", ".join(name for name, _ in model.named_children())
        raise TrActError(
            f"{type(model).__name__} has no module '{stem}'; its children are: {top}"
        ) from None


def apply_tract(
    model: ModelT, lambda_: float = 0.1, *, stem: str | None = None, sync: bool = True
) -> ModelT:
    """Makes the first layer of `model` learn by TrAct, in place.

    Only the class of that one layer changes: its parameters stay the same objects; hooks,
    state-dict keys and outputs stay as they are. Applied again, it sets `lambda_` anew.

    Args:
        model: any model whose first layer is an `nn.Conv2d` or an `nn.Linear`.
        lambda_: damping, in units of standardised pixels (mean 0, variance 1). The paper uses 0.1,
            and 0.2 for long trainings.
        stem: the layer's name where `find_stem` is not right.
        sync: where a process group exists, learn from all ranks' batch as one process would from
            the whole; every rank must then take part in every training forward pass. False: each
            rank's batch by itself.

    Returns:
        The same model.

    Raises:
        TrActError: the layer is frozen, of an unknown class, or missing; `lambda_` is not positive.
    """
    lambda_ = check_lambda(lambda_)
    name = find_stem(model) if stem is None else stem
    module = _stem_module(model, name)
    if not _is_tract(module):
        tract_class = TRACT_CLASSES.get(type(module))
        if tract_class is None:
            raise TrActError(
                f"'{name}' is a {type(module).__module__}.{type(module).__name__}: TrAct knows "
                f"{', '.join(c.__name__ for c in TRACT_CLASSES)}; teach it this class with "
                "register_layer, or name another layer with stem='...'"
            )
    if not module.weight.requires_grad:
        raise TrActError(
            f"'{name}' is frozen (weight.requires_grad is False), so TrAct would do nothing: call "
            f"model.get_submodule('{name}').requires_grad_(True) first, or build the model with "
            "nothing frozen (FREEZE_AT 0, trainable_backbone_layers=5)"
        )
    if not _is_tract(module):
        module.__class__ = tract_class  # type: ignore[assignment]
    module.lambda_, module.sync = lambda_, sync  # type: ignore[assignment]
    return model


def remove_tract(model: ModelT) -> ModelT:
    """Gives every TrAct layer of `model` its plain class back, in place; returns the same model."""
    plain = {tract_class: layer for layer, tract_class in TRACT_CLASSES.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            for name in ("lambda_", "sync", "pending", "image_sizes"):
                vars(module).pop(name, None)
    return model
