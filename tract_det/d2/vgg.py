"""VGG-11 to VGG-19 for detectron2: the backbone, feature pyramids, and the fc6/fc7 box head.

Inside the backbone the names are torchvision's (`features.0.weight`, ...), in the head `fc6` and
`fc7`: what `tools/convert_weights.py` writes enters both by detectron2's own checkpointer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    ROI_BOX_HEAD_REGISTRY,
    Backbone,
)
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.backbones import build_vgg
from tract_det.modeling.heads import VGGHead

_DEPTHS = (11, 13, 16, 19)
_CHANNELS = {"conv1": 64, "conv2": 128, "conv3": 256, "conv4": 512, "conv5": 512, "pool5": 512}


class VGG(Backbone):
    """The convolutions of a VGG, with torchvision's names.

    Features are the stages before their poolings, after the ReLU, `conv1` (stride 1) to `conv5`
    (stride 16), and `pool5` (stride 32) for pyramids. Layers beyond the last one asked for are not
    built.
    """

    @configurable
    def __init__(
        self,
        depth: int = 16,
        *,
        norm: str | Callable[[int], nn.Module] = "",
        freeze_at: int = 0,
        out_features: Sequence[str] = ("conv5",),
    ) -> None:
        """Random weights, as torchvision draws them.

        Args:
            depth: 11, 13, 16 or 19.
            norm: as `detectron2.layers.get_norm` takes it; "" = none.
            freeze_at: 0 nothing, 1 the first stage, ..., 5 all; batch norms of frozen stages become
                FrozenBatchNorm2d.
            out_features: names of the features to return.

        Raises:
            UserError: there is no such depth, stage or feature; naming the config key.
        """
        super().__init__()
        _check(depth, freeze_at, out_features)
        # The last pooling is not in it.
        layers = build_vgg(f"vgg{depth}_bn" if norm else f"vgg{depth}", "BN").features
        layers.append(nn.MaxPool2d(2, 2))
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        ends = dict(zip(_CHANNELS, [*(i - 1 for i in pools), pools[-1]], strict=True))
        frozen = ends[f"conv{freeze_at}"] if freeze_at else -1
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[index] = get_norm(norm, layer.num_features)
            if index <= frozen:
                layers[index].requires_grad_(False)
                layers[index] = FrozenBatchNorm2d.convert_frozen_batchnorm(layers[index])
        self.features = layers[: max(ends[name] for name in out_features) + 1]
        self._ends = {ends[name]: name for name in out_features}
        self._out_features = list(out_features)
        self._out_feature_channels = _CHANNELS
        self._out_feature_strides = {name: 2**i for i, name in enumerate(_CHANNELS)}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """What MODEL.VGG and MODEL.BACKBONE.FREEZE_AT say."""
        if input_shape.channels != 3:
            raise UserError(
                f"MODEL.PIXEL_MEAN is of {input_shape.channels} channels: a VGG takes three"
            )
        vgg = cfg.MODEL.VGG
        return {
            "depth": vgg.DEPTH,
            "norm": vgg.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "out_features": vgg.OUT_FEATURES,
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`(B, 3, H, W)` to each feature `(B, C, H / stride, W / stride)` by its name."""
        outputs, hidden = {}, images
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in self._ends:
                outputs[self._ends[index]] = hidden
        return outputs


def _check(depth: int, freeze_at: int, out_features: Sequence[str]) -> None:
    if depth not in _DEPTHS:
        raise UserError(f"MODEL.VGG.DEPTH is {depth}: it takes one of {_DEPTHS}")
    if not 0 <= freeze_at <= 5:
        raise UserError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: a VGG takes 0 (nothing) to 5")
    if not out_features or not set(out_features) <= set(_CHANNELS):
        raise UserError(
            f"MODEL.VGG.OUT_FEATURES is {list(out_features)}: it takes some of "
            f"{', '.join(_CHANNELS)}"
        )


@BACKBONE_REGISTRY.register()
def build_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """A VGG as MODEL.VGG says."""
    return VGG(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A pyramid p2 to p6: of MODEL.FPN.IN_FEATURES conv3, conv4, conv5 and pool5."""
    return _pyramid(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's pyramid p3 to p7: of MODEL.FPN.IN_FEATURES conv4, conv5 and pool5."""
    top = LastLevelP6P7(_CHANNELS["pool5"], cfg.MODEL.FPN.OUT_CHANNELS, in_feature="pool5")
    return _pyramid(cfg, input_shape, top)


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, top: nn.Module) -> FPN:
    fpn = cfg.MODEL.FPN
    missing = set(fpn.IN_FEATURES) - set(cfg.MODEL.VGG.OUT_FEATURES)
    if missing or "pool5" not in fpn.IN_FEATURES:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {list(fpn.IN_FEATURES)}: of a VGG it takes features of "
            f"MODEL.VGG.OUT_FEATURES {list(cfg.MODEL.VGG.OUT_FEATURES)} that end with pool5"
        )
    return FPN(
        bottom_up=VGG(cfg, input_shape),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top,
        fuse_type=fpn.FUSE_TYPE,
    )


@ROI_BOX_HEAD_REGISTRY.register()
class VGGBoxHead(VGGHead):
    """fc6 and fc7, each with ReLU and dropout, for StandardROIHeads."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fc_dim: int = 4096, dropout: float = 0.5) -> None:
        """Random weights.

        Args:
            input_shape: of the pooled features; torchvision's weights are for 512 x 7 x 7.
            fc_dim: width of both layers; torchvision's is 4096.
            dropout: after each.
        """
        pooled = input_shape.channels * input_shape.height * input_shape.width
        super().__init__(dropout, pooled, fc_dim)
        self.output_shape = ShapeSpec(channels=fc_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """What MODEL.ROI_BOX_HEAD.FC_DIM and MODEL.VGG.DROPOUT say."""
        return {
            "input_shape": input_shape,
            "fc_dim": cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
            "dropout": cfg.MODEL.VGG.DROPOUT,
        }
