"""Frozen first stages of classifiers; detectors have `backbones.freeze`."""

from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from torch import nn
from torchvision.models import VGG, ResNet

from tract_det.errors import UserError
from tract_det.modeling.backbones import RESNET_STAGES, vgg_stages
from tract_det.tract import find_stem


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
            f"{len(stages)}: set it to {len(stages)}, and leave --arm frozen out if that has set it"
        )
    for stage in stages[:freeze_at]:
        for parameter in stage:
            parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm) and _is_frozen(child):
                setattr(parent, key, freeze_batch_norm_2d(child))


def _is_frozen(norm: nn.Module) -> bool:
    """Whether a norm has scales and shifts, and all of them are frozen."""
    learns = [parameter.requires_grad for parameter in norm.parameters()]
    return bool(learns) and not any(learns)


def _stages(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each stage, from the stem on, without the head."""
    if isinstance(model, ResNet):
        layers = [[model.get_submodule(name) for name in names] for names in RESNET_STAGES]
    elif isinstance(model, VGG):
        layers = vgg_stages(model.features)
    elif (matcher := getattr(model, "group_matcher", None)) is not None:  # timm's
        groups = group_parameters(model, matcher(coarse=True))
        by_name = dict(model.named_parameters())
        *stages, _head = ([by_name[name] for name in names] for names in groups.values())
        return stages
    else:
        layers = [[model.get_submodule(find_stem(model))]]
    return [
        [weight for layer in stage for weight in layer.parameters()] for stage in layers if stage
    ]
