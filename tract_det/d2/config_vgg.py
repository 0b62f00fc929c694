"""Registers the names by which a detectron2 configuration builds VGG backbones and the box head.

They carry this project's, since several code bases register a `build_vgg_backbone` of their own.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ROI_BOX_HEAD_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from tract_det.d2 import vgg
from tract_det.errors import UserError


@BACKBONE_REGISTRY.register()
def build_tract_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> vgg.VGG:
    """A VGG as MODEL.VGG and MODEL.BACKBONE.FREEZE_AT describe it."""
    if input_shape.channels != 3:
        raise UserError(f"MODEL.PIXEL_MEAN has {input_shape.channels} channels: a VGG takes three")
    settings = cfg.MODEL.VGG
    return vgg.VGG(
        settings.DEPTH,
        norm=settings.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        out_features=settings.OUT_FEATURES,
    )


@BACKBONE_REGISTRY.register()
def build_tract_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A feature pyramid p2 to p6; set MODEL.FPN.IN_FEATURES to conv3, conv4, conv5 and pool5."""
    return _pyramid(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_tract_retinanet_vgg_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """RetinaNet's pyramid p3 to p7; set MODEL.FPN.IN_FEATURES to conv4, conv5 and pool5."""
    channels = vgg.CHANNELS["pool5"]
    top = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature="pool5")
    return _pyramid(cfg, input_shape, top)


def _pyramid(cfg: CfgNode, input_shape: ShapeSpec, top: nn.Module) -> FPN:
    fpn = cfg.MODEL.FPN
    missing = set(fpn.IN_FEATURES) - set(cfg.MODEL.VGG.OUT_FEATURES)
    if missing or "pool5" not in fpn.IN_FEATURES:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {list(fpn.IN_FEATURES)}: set features of "
            f"MODEL.VGG.OUT_FEATURES {list(cfg.MODEL.VGG.OUT_FEATURES)}, among them pool5"
        )
    return FPN(
        bottom_up=build_tract_vgg_backbone(cfg, input_shape),
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=top,
        fuse_type=fpn.FUSE_TYPE,
    )


@ROI_BOX_HEAD_REGISTRY.register()
def TrActVGGBoxHead(cfg: CfgNode, input_shape: ShapeSpec) -> vgg.VGGBoxHead:  # noqa: N802
    """`vgg.VGGBoxHead`, which MODEL.ROI_BOX_HEAD.NAME selects by this name."""
    return vgg.VGGBoxHead(
        input_shape, fc_dim=cfg.MODEL.ROI_BOX_HEAD.FC_DIM, dropout=cfg.MODEL.VGG.DROPOUT
    )
