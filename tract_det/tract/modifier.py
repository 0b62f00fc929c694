"""Puts TrAct on a model's stem, and takes it off: nothing changes but the layer's class."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from tract_det.tract.registry import TRACT_CLASSES, tract_class_of
from tract_det.tract.state import State, TrActError

ModelT = TypeVar("ModelT", bound=nn.Module)


def _is_tract(module: nn.Module) -> bool:
    return type(module) in TRACT_CLASSES.values()


def _named_by_timm(prefix: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers that see the pixels where `module`, named `prefix`, is a timm model; or none."""
    config = getattr(module, "pretrained_cfg", None)
    first = config.get("first_conv") if isinstance(config, Mapping) else None
    if first is None:
        return []
    if not first:
        raise TrActError(
            f"no single layer of {type(module).__name__} sees the pixels, says its pretrained_cfg: "
            "name the layers with stem='...', one call of apply_tract each"
        )
    found = []
    for name in [first] if isinstance(first, str) else first:
        # In a feature extractor the stages of a stem can be children of the model themselves.
        for spelling in dict.fromkeys((name, name.replace(".", "_", 1))):
            full = f"{prefix}.{spelling}" if prefix else spelling
            if isinstance(modules.get(full), nn.Conv2d | nn.Linear):
                found.append(full)
    return found


def _under_a_pyramid(module: nn.Module) -> str:
    """The child of a feature pyramid of detectron2's that sees the images; "" elsewhere.

    Its own layers are registered before that child.
    """
    if hasattr(type(module), "size_divisibility"):  # detectron2's Backbone
        for name in ("bottom_up", "net"):  # FPN, SimpleFeaturePyramid
            if isinstance(getattr(module, name, None), nn.Module):
                return name
    return ""


def find_stem(model: nn.Module) -> str:
    """The name of the layer that sees the pixels, as in `model.named_modules()`.

    In a timm model that is the layer that `pretrained_cfg["first_conv"]` names, in a feature
    pyramid of detectron2's a layer of the backbone under it. Elsewhere it is the first module that
    is a convolution or a linear layer, or else has parameters of its own and no submodules, in the
    order in which the model registers them: right for torchvision's classifiers and detectors, and
    for the vision models of Hugging Face. In a detector it is a layer of the backbone.

    Raises:
        TrActError: several layers see the pixels; or the first is neither a convolution nor a
            linear layer; or there is none.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        named = _named_by_timm(name, module, modules)
        if len(named) > 1:
            raise TrActError(
                f"{len(named)} layers of {type(module).__name__} see the pixels: name each with "
                f"stem='...', one call of apply_tract each: {', '.join(map(repr, named))}"
            )
        if named:
            return named[0]
        if under := _under_a_pyramid(module):
            prefix = f"{name}.{under}" if name else under
            return f"{prefix}.{find_stem(modules[prefix])}"
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module) in TRACT_CLASSES:
            return name
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_parameters and not any(True for _ in module.children()):
            raise TrActError(_not_a_stem(name, modules))
    raise TrActError(
        f"{type(model).__name__} has no layer with parameters: nothing to put TrAct on"
    )


def _not_a_stem(name: str, modules: Mapping[str, nn.Module]) -> str:
    convolutions = [other for other, module in modules.items() if isinstance(module, nn.Conv2d)]
    hint = f"; the first Conv2d is '{convolutions[0]}'" if convolutions else ""
    return (
        f"the first layer, '{name}', is a {type(modules[name]).__name__}: TrAct is for Conv2d and "
        f"Linear; name another layer with stem='...'{hint}"
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
    model: ModelT,
    lambda_: float = 0.1,
    *,
    stem: str | Sequence[str] | None = None,
    sync: bool = True,
    relative: bool = False,
    gram_patches: int = 0,
) -> ModelT:
    """Makes the first layer of `model` learn by TrAct, in place.

    Only the class of that one layer changes: its parameters stay the same objects; hooks,
    state-dict keys and outputs stay as they are. Applied again, it sets everything anew but the
    number of micro-batches.

    Args:
        model: any model whose first layer is an `nn.Conv2d` or an `nn.Linear`.
        lambda_: damping, in units of standardised pixels (mean 0, variance 1). The paper uses 0.1,
            and 0.2 for long trainings.
        stem: the layer's name where `find_stem` is not right; several where several see the pixels.
        sync: where a process group exists, learn from all ranks' batch as one process would from
            the whole; every rank must then take part in every training forward pass. False: each
            rank's batch by itself.
        relative: take `lambda_` in units of `trace(G) / K`, the mean square of what the layer sees,
            for inputs that are not standardised. The effective value then follows the batch.
        gram_patches: estimate `G` from so many random patches of each batch and rank, with the
            error that `tract.gram.estimated_gram_sum` documents; 0 = exact.

    Returns:
        The same model.

    Raises:
        TrActError: the layer is frozen, of an unknown class, or missing; `lambda_` is not positive.
    """
    stem = find_stem(model) if stem is None else stem
    for name in [stem] if isinstance(stem, str) else stem:
        state = State(lambda_, relative=relative, sync=sync, gram_patches=gram_patches)
        _change(_stem_module(model, name), name, state)
    return model


def _change(module: nn.Module, name: str, state: State) -> None:
    """Makes `module`, which the model calls `name`, a TrAct layer with this state."""
    tract_class = type(module) if _is_tract(module) else tract_class_of(type(module))
    if tract_class is None:
        raise TrActError(
            f"'{name}' is a {type(module).__module__}.{type(module).__name__}: TrAct knows "
            f"{', '.join(map(_short_name, TRACT_CLASSES))}; teach it this class with "
            "register_layer, or name another layer with stem='...'"
        )
    if not module.weight.requires_grad:
        raise TrActError(
            f"'{name}' is frozen (weight.requires_grad is False), so TrAct would do nothing: call "
            f"model.get_submodule('{name}').requires_grad_(True) first, or build the model with "
            "nothing frozen (FREEZE_AT 0, freeze_at=0, trainable_backbone_layers=5)"
        )
    if _is_tract(module):
        state.pending = module.tract.pending  # type: ignore[union-attr, assignment]
    module.__class__ = tract_class
    module.tract = state  # type: ignore[assignment]


def _short_name(layer: type[nn.Module]) -> str:
    return f"{layer.__module__.split('.')[0]}'s {layer.__name__}"


def remove_tract(model: ModelT) -> ModelT:
    """Gives every TrAct layer of `model` its plain class back, in place; returns the same model."""
    plain = {tract_class: layer for layer, tract_class in TRACT_CLASSES.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            for name in ("tract", "image_sizes", "edges"):
                vars(module).pop(name, None)
    return model
