"""MODEL.TRACT and MODEL.VGG in detectron2's configuration, and `build_model` that follows it."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.registry import Registry
from torch import nn

from tract_det.d2.modifier import apply_tract
from tract_det.tract import TrActError


def add_tract_config(cfg: CfgNode) -> None:
    """Adds MODEL.TRACT and MODEL.VGG to detectron2's `cfg`, in place; `build_model` follows them.

    To be called after `get_cfg()` and before a file is merged.
    """
    cfg.MODEL.TRACT = CfgNode(
        {
            "ENABLED": False,
            "LAMBDA": 0.1,  # of standardised pixels, whatever PIXEL_STD is
            "RELATIVE": False,  # LAMBDA is in units of the patches' mean square instead
            "GRAM_PATCHES": 0,  # estimate the Gram matrix from so many patches; 0 = exact
            "SYNC": True,  # one Gram matrix of all ranks' images
            "STEM": "",  # the layer's name; "" = the first layer of the backbone
        }
    )
    cfg.MODEL.VGG = CfgNode(
        {
            "DEPTH": 16,  # or 11, 13, 19
            "NORM": "",  # or BN, FrozenBN, SyncBN, GN, ...
            # conv1 to conv5, each before its pooling, and pool5: strides 1 to 32.
            "OUT_FEATURES": ["conv5"],
            "DROPOUT": 0.5,  # of VGGBoxHead's fc6 and fc7
        }
    )
    META_ARCH_REGISTRY.__class__ = _Registry


class _Registry(Registry):
    """Hands out builders that put TrAct on what they build, where the `cfg` says so.

    A program may hold `build_model` under a name of its own; all of them come here for the
    meta-architecture.
    """

    def get(self, name: str) -> Callable[..., nn.Module]:
        """The builder registered under this name."""
        builder = super().get(name)

        def build(cfg: Any, *args: Any, **kwargs: Any) -> nn.Module:
            tract = cfg.MODEL.get("TRACT")
            if tract is None or not tract.ENABLED:
                return builder(cfg, *args, **kwargs)
            check(cfg)
            return apply_tract(
                builder(cfg, *args, **kwargs),
                tract.LAMBDA,
                stem=tract.STEM or None,
                sync=tract.SYNC,
                relative=tract.RELATIVE,
                gram_patches=tract.GRAM_PATCHES,
                pixel_std=cfg.MODEL.PIXEL_STD,
                pixel_format=cfg.INPUT.FORMAT,
            )

        return build


def check(cfg: CfgNode) -> None:
    """Refuses a `cfg` that freezes the stem that TrAct is to train.

    Raises:
        TrActError: says what to write.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        raise TrActError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at} (2 is detectron2's default) freezes the stem "
            "that MODEL.TRACT trains: set MODEL.BACKBONE.FREEZE_AT 0"
        )
