"""Backbones of detectors, with torchvision's module names, and the freezing of their stages."""

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tract_det.errors import UserError

RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """The constructor of a norm, to be called with the number of channels.

    Args:
        name: one of `choices.DETECTOR_NORMS`.

    Raises:
        UserError: SyncBN without CUDA, which torch does not support.
    """
    if name == "SyncBN" and not torch.cuda.is_available():
        raise UserError("MODEL.BACKBONE.NORM SyncBN needs CUDA: on a CPU take BN, FrozenBN or GN")
    return {
        "BN": nn.BatchNorm2d,
        "FrozenBN": FrozenBatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "GN": partial(nn.GroupNorm, 32),
    }[name]


def build_resnet_fpn(name: str, norm: str, out_channels: int) -> BackboneWithFPN:
    """A ResNet-18 to 152 with a feature pyramid of `out_channels` channels on five levels."""
    resnet = getattr(torchvision.models, name)(weights=None, norm_layer=norm_layer(norm))
    width = resnet.inplanes // 8
    return BackboneWithFPN(
        resnet,
        return_layers={f"layer{level + 1}": str(level) for level in range(4)},
        in_channels_list=[width * 2**level for level in range(4)],
        out_channels=out_channels,
        extra_blocks=LastLevelMaxPool(),
    )


class VGGBackbone(nn.Module):
    """The convolutions of a VGG up to conv5_3, stride 16, 512 channels."""

    out_channels = 512

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features[:-1]  # RoIAlign takes the place of the last pooling

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, 512, H / 16, W / 16)`."""
        return self.features(images)


def build_vgg(name: str, norm: str) -> VGGBackbone:
    """A VGG-16 with (`vgg16_bn`) or without (`vgg16`) norms."""
    if norm != "BN" and not name.endswith("_bn"):
        raise UserError(f"MODEL.BACKBONE.NORM is {norm} but {name} has no norms: take {name}_bn")
    features = getattr(torchvision.models, name)(weights=None).features
    if norm != "BN":
        new_norm = norm_layer(norm)
        for key, module in features.named_children():
            if isinstance(module, nn.BatchNorm2d):
                setattr(features, key, new_norm(module.num_features))
    return VGGBackbone(features)


def batch_in_channels_last(backbone: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook for a detector's backbone: the batch in that memory format.

    A detector gets its images one by one, and puts them together itself.
    """
    return tuple(batch.contiguous(memory_format=torch.channels_last) for batch in args)


def _stages(backbone: nn.Module) -> list[list[nn.Module]]:
    """The layers of each stage, from the stem on; the stages of a VGG end at its poolings."""
    if isinstance(backbone, BackboneWithFPN):
        return [[backbone.body[name] for name in names] for names in RESNET_STAGES]
    return vgg_stages(backbone.get_submodule("features"))


def vgg_stages(features: nn.Module) -> list[list[nn.Module]]:
    """The layers of each stage of a VGG, which end at its poolings; empty after the last one."""
    stages: list[list[nn.Module]] = [[]]
    for layer in features.children():
        stages[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            stages.append([])
    return stages


def freeze(backbone: nn.Module, freeze_at: int) -> None:
    """Freezes the first stages; their batch norms keep their running statistics as well.

    Args:
        backbone: as `build_resnet_fpn` and `build_vgg` make it.
        freeze_at: 0 = nothing, 1 = the stem, 2 = the stem and the first stage, ..., up to 5, as in
            detectron2.
    """
    layers = [layer for stage in _stages(backbone)[:freeze_at] for layer in stage]
    for layer in layers:
        layer.requires_grad_(False)
    frozen = {id(module) for layer in layers for module in layer.modules()}
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if id(child) in frozen and isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(parent, name, FrozenBatchNorm2d(child.num_features, child.eps))
