"""Puts TrAct on the stem of a model and takes it off again, by changing the class of that layer."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from tract_det.tract.registry import TRACT_CLASSES, tract_class_of
from tract_det.tract.state import State, TrActError

ModelT = TypeVar("ModelT", bound=nn.Module)


def _is_tract(module: nn.Module) -> bool:
    return type(module) in TRACT_CLASSES.values()


def _named_by_timm(prefix: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers that see the pixels of a timm model, as its `pretrained_cfg` names them.

    Args:
        prefix: name of `module` in the whole model.
        module: possibly a timm model.
        modules: all modules of the whole model by name.

    Returns:
        Names in the whole model; empty where `module` is not a timm model.

    Raises:
        TrActError: the model declares that it has no such layer.
    """
    config = getattr(module, "pretrained_cfg", None)
    first = config.get("first_conv") if isinstance(config, Mapping) else None
    if first is None:
        return []
    if not first:
        raise TrActError(
            f"no single layer of {type(module).__name__} sees the pixels, according to its "
            "pretrained_cfg: name the layers yourself, with stem=['...', '...']"
        )
    names = []
    for name in [first] if isinstance(first, str) else first:
        # timm's feature extractors flatten the top level: "stem.0" becomes "stem_0".
        for spelling in dict.fromkeys((name, name.replace(".", "_", 1))):
            full = f"{prefix}.{spelling}" if prefix else spelling
            if isinstance(modules.get(full), nn.Conv2d | nn.Linear):
                names.append(full)
    return names


def _is_backbone(module: nn.Module) -> bool:
    """Whether it is a `Backbone` of detectron2."""
    return hasattr(type(module), "size_divisibility")


def _backbone_of_pyramid(module: nn.Module) -> str:
    """The name of the backbone inside a feature pyramid of detectron2; "" for other modules.

    The backbone sees the images, but the pyramid registers its own layers first.
    """
    if _is_backbone(module):
        for name in ("bottom_up", "net"):  # FPN, SimpleFeaturePyramid
            if isinstance(getattr(module, name, None), nn.Module):
                return name
    return ""


def find_stem(model: nn.Module) -> str:
    """The name of the layer that sees the pixels, as in `model.named_modules()`.

    In a timm model this is the layer that `pretrained_cfg["first_conv"]` names. In a model of
    detectron2 it is sought in its first `Backbone`, since others register layers before it, as DETR
    does its transformer; and in a feature pyramid in the backbone of that. Otherwise it is the
    first layer with parameters, in the order in which the model registers its modules. That is
    correct for torchvision's classifiers and detectors and for the vision models of Hugging Face.

    Raises:
        TrActError: several layers see the pixels, or the first layer is neither a convolution nor a
            linear layer, or no layer has parameters.
    """
    modules = dict(model.named_modules())
    start = next((name for name, module in modules.items() if _is_backbone(module)), "")
    for name, module in modules[start].named_modules(prefix=start):
        named = _named_by_timm(name, module, modules)
        if len(named) > 1:
            raise TrActError(
                f"{len(named)} layers of {type(module).__name__} see the pixels: name them with "
                f"stem=[{', '.join(map(repr, named))}], or only one of them"
            )
        if named:
            return named[0]
        if backbone := _backbone_of_pyramid(module):
            prefix = f"{name}.{backbone}" if name else backbone
            return f"{prefix}.{find_stem(modules[prefix])}"
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module) in TRACT_CLASSES:
            return name
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_parameters and not any(True for _ in module.children()):
            raise TrActError(_not_a_stem(name, modules))
    raise TrActError(
        f"{type(model).__name__} has no layer with parameters: TrAct needs a Conv2d or a Linear"
    )


def _not_a_stem(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The message that the layer `name`, which comes first, cannot learn by TrAct."""
    convolutions = [key for key, module in modules.items() if isinstance(module, nn.Conv2d)]
    hint = f"; the first Conv2d is '{convolutions[0]}'" if convolutions else ""
    return (
        f"the first layer, '{name}', is a {type(modules[name]).__name__}: TrAct needs a Conv2d or "
        f"a Linear; name another layer with stem='...'{hint}"
    )


def _stem_module(model: nn.Module, stem: str) -> nn.Module:
    try:
        return model.get_submodule(stem)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise TrActError(
            f"{type(model).__name__} has no module '{stem}'; its children are: {children}"
        ) from None


def trainable_layers(model: nn.Module) -> list[str]:
    """The names of all layers that can learn by TrAct, in the order of `model.named_modules()`.

    These are the convolutions without groups and the linear layers of known classes whose weights
    are not frozen.
    """
    return [
        name
        for name, module in model.named_modules()
        if (_is_tract(module) or tract_class_of(type(module)) is not None)
        and getattr(module, "groups", 1) == 1
        and module.weight.requires_grad
    ]


def apply_tract(
    model: ModelT,
    lambda_: float = 0.1,
    *,
    stem: str | Sequence[str] | None = None,
    sync: bool = True,
    relative: bool = False,
    power: float = 1.0,
    gram_patches: int = 0,
) -> ModelT:
    """Makes the first layer of `model` learn by TrAct, in place.

    Only the class of that one layer changes: its parameters stay the same objects, and hooks,
    state-dict keys and outputs stay as they are. Another call replaces all settings except the
    number of micro-batches.

    Args:
        model: any model whose first layer is an `nn.Conv2d` or an `nn.Linear`.
        lambda_: damping, in units of standardised pixels (mean 0, variance 1). The paper uses 0.1,
            and 0.2 for long trainings.
        stem: name of the layer, or names if several layers see the pixels; None = what `find_stem`
            returns.
        sync: whether to sum `G` over all ranks, where a process group exists: many ranks then learn
            what one process with the whole batch would learn, and every rank must take part in
            every training forward pass. False: `G` of each rank's own batch.
        relative: whether `lambda_` is in units of `trace(G) / K`, the mean square of the layer's
            input, for inputs that are not standardised. The damping then varies with the batch.
        power: of the inverse, from 0, the plain gradient, to 1, TrAct, and beyond: the gradient is
            `dZ^T X (G + lambda_ I)^-power`.
        gram_patches: number of random patches, per batch and rank, from which to estimate `G`, with
            the error that `tract.gram.estimated_gram_sum` documents; 0 = exact, from all patches.

    Returns:
        The same model.

    Raises:
        TrActError: the layer is frozen, of an unknown class, or missing; `lambda_` is not positive;
            `power` or `gram_patches` is negative.
    """
    stem = find_stem(model) if stem is None else stem
    for name in [stem] if isinstance(stem, str) else stem:
        state = State(lambda_, relative=relative, power=power, sync=sync, gram_patches=gram_patches)
        _change(_stem_module(model, name), name, state)
    return model


def _change(module: nn.Module, name: str, state: State) -> None:
    """Makes `module`, whose name in the model is `name`, a TrAct layer with this state."""
    tract_class = type(module) if _is_tract(module) else tract_class_of(type(module))
    if tract_class is None:
        raise TrActError(
            f"'{name}' is a {type(module).__module__}.{type(module).__name__}: TrAct knows "
            f"{', '.join(map(_short_name, TRACT_CLASSES))}; add this class with register_layer, or "
            "name another layer with stem='...'"
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
    """Gives every TrAct layer of `model` its plain class back, in place.

    Returns:
        The same model.
    """
    plain = {tract_class: layer for layer, tract_class in TRACT_CLASSES.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            for name in ("tract", "image_sizes", "edges"):
                vars(module).pop(name, None)
    return model
