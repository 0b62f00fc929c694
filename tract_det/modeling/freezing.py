"""Frozen first stages of classifiers; detectors have `backbones.freeze`."""

from collections.abc import Callable

from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from torch import nn
from torchvision.models import VGG, ResNet

from tract_det.errors import UserError
from tract_det.tract import find_stem

_RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def freeze_stages(model: nn.Module, freeze_at: int, name: str) -> None:
    """Freezes the first stages, in place; their batch norms keep their running statistics as well.

    Args:
        model: as `build_classifier` makes it.
        freeze_at: 0 or less = nothing, 1 = the stem, 2 = also the first stage (a ViT's first
            block), and so on. Models of torchvision that are neither ResNets nor VGGs have a stem
            alone.
        name: as the user wrote it, for the message.

    Raises:
        UserError: the model does not have as many stages; the message names the key.
    """
    if freeze_at <= 0:
        return
    stages = _stages(model)
    if freeze_at > len(stages):
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {name} can be frozen up to stage "
            f"{len(stages)}: set at most that"
        )
    frozen = {parameter for stage in stages[:freeze_at] for parameter in stage}
    for key, parameter in model.named_parameters():
        if key in frozen:
            parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            is_norm = isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm)
            if is_norm and not any(weight.requires_grad for weight in child.parameters()):
                setattr(parent, key, freeze_batch_norm_2d(child))


def _stages(model: nn.Module) -> list[list[str]]:
    """The names of each stage's parameters, from the stem on, without the head."""
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ResNet):
        return [
            [name for name in names if name.partition(".")[0] in layers]
            for layers in _RESNET_STAGES
        ]
    if isinstance(model, VGG):
        poolings = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
        numbers = {name: int(name.split(".")[1]) for name in names if name.startswith("features")}
        starts = [0, *poolings]
        return [
            [name for name, number in numbers.items() if start <= number < end]
            for start, end in zip(starts, poolings, strict=False)
        ]
    matcher: Callable | None = getattr(model, "group_matcher", None)  # timm's
    if matcher is None:
        return [[name for name in names if name.startswith(f"{find_stem(model)}.")]]
    groups = group_parameters(model, matcher(coarse=True))
    return list(groups.values())[:-1]  # the last one is the head
