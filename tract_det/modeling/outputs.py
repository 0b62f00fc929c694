"""The layers that give a model's outputs: class scores, and boxes where it detects."""

from collections.abc import Callable

from torch import nn

# The output layers of torchvision's and detectron2's detectors, of both stages.
_PREDICTORS = ("cls_score", "bbox_pred", "cls_logits", "objectness_logits", "anchor_deltas")


def output_layers(model: nn.Module) -> list[str]:
    """The names of the output layers, as in `model.named_modules()`.

    Args:
        model: a detector, or a classifier, possibly inside other modules. Where a classifier does
            not name its head, as timm's do by `get_classifier`, it is the last layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    predictors = [name for name in layers if name.rpartition(".")[2] in _PREDICTORS]
    if predictors:
        return predictors
    heads = {id(layer) for module in model.modules() for layer in _head_of(module)}
    return [name for name, layer in layers.items() if id(layer) in heads] or list(layers)[-1:]


def _head_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the head that a timm model names, one or several; none of other modules."""
    get_classifier: Callable[[], object] = getattr(module, "get_classifier", lambda: None)
    head = get_classifier()
    parts = head if isinstance(head, tuple | list) else [head]
    return [layer for part in parts if isinstance(part, nn.Module) for layer in part.modules()]
