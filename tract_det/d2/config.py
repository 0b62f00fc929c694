"""Adds MODEL.TRACT and MODEL.VGG to detectron2's configuration; `build_model` follows them."""

import copy
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from torch import nn

from tract_det.d2.modifier import apply_tract
from tract_det.d2.weights import check_file
from tract_det.tract import TrActError, find_stem

_TRACT = {
    "ENABLED": False,
    # The model's own names, while MODEL.META_ARCHITECTURE is TrAct and MODEL.BACKBONE.NAME ours.
    "META_ARCHITECTURE": "",
    "BACKBONE": "",
    "LAMBDA": 0.1,  # damping
    # Unit of LAMBDA: standardised = of standardised pixels, whatever PIXEL_STD is; input = the
    # number as the stem uses it; trace = of the mean square of what the stem sees, trace(G) / K.
    "UNIT": "standardised",
    "POWER": 1.0,  # of the inverse: 1 = TrAct, 0 = the plain gradient
    "GRAM_PATCHES": 0,  # patches of each batch and rank to estimate the Gram matrix from; 0 = all
    "SYNC": True,  # one Gram matrix over the images of all ranks; False: each rank has its own
    "STEM": "",  # name of the layer that learns by TrAct; "" = the first layer of the backbone
}
_VGG = {
    "DEPTH": 16,  # 11, 13, 16 or 19
    "NORM": "",  # "" = no norms; or BN, FrozenBN, SyncBN, GN, ...
    # Outputs of the stages: conv1 to conv5, each before its pooling (strides 1 to 16), and pool5
    # (stride 32).
    "OUT_FEATURES": ["conv5"],
    "DROPOUT": 0.5,  # probability of dropout after VGGBoxHead's fc6 and fc7
}


def add_tract_config(cfg: CfgNode) -> None:
    """Adds MODEL.TRACT and MODEL.VGG to detectron2's `cfg`, in place; `build_model` follows them.

    Call it after `get_cfg()` and before merging a file. Existing keys keep their values. While
    MODEL.TRACT.ENABLED is True, `cfg.MODEL.META_ARCHITECTURE` is "TrAct", whose builder this module
    registers, and `cfg.MODEL.TRACT.META_ARCHITECTURE` is the model's own. `cfg.freeze()` refuses
    a file in MODEL.WEIGHTS that says it is for other images than MODEL's and INPUT's.

    Raises:
        TrActError: the `cfg` is frozen and a key is missing, or it is not detectron2's.
    """
    if type(cfg) not in (CfgNode, _TractCfg):
        raise TrActError(
            f"add_tract_config takes the cfg of detectron2's get_cfg(), and this is a "
            f"{type(cfg).__module__}.{type(cfg).__name__}: give it a detectron2.config.CfgNode"
        )
    for name, defaults in (("TRACT", _TRACT), ("VGG", _VGG)):
        node = cfg.MODEL.get(name, CfgNode())
        if node.keys() >= defaults.keys():
            continue
        if cfg.is_frozen():
            raise TrActError(
                f"add_tract_config cannot add MODEL.{name} to a frozen cfg: call it before "
                "cfg.freeze(), or cfg.defrost() first"
            )
        cfg.MODEL[name] = CfgNode(copy.deepcopy(defaults) | node)
    object.__setattr__(cfg, "__class__", _TractCfg)  # CfgNode's own would set a key
    if not cfg.key_is_renamed("MODEL.TRACT.RELATIVE"):
        cfg.register_renamed_key("MODEL.TRACT.RELATIVE", "MODEL.TRACT.UNIT", "True is UNIT trace")


class _TractCfg(CfgNode):
    """A cfg whose MODEL has the names of MODEL.TRACT.ENABLED whenever it is looked at.

    Names that were written when ENABLED is set would be lost to a file that is merged later.
    """

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CfgNode._decode_cfg_value(value)  # nodes below the root stay detectron2's

    @property
    def MODEL(self) -> CfgNode:  # noqa: N802
        """The node, with its names."""
        _set_names(self["MODEL"])
        return self["MODEL"]

    def freeze(self) -> None:
        """As in detectron2; refuses MODEL.WEIGHTS that are for other images than the model's."""
        _check_weights(self)
        super().freeze()


def _check_weights(cfg: CfgNode) -> None:
    model, form = cfg.MODEL, cfg.INPUT.FORMAT
    in_1x1 = model.RESNETS.STRIDE_IN_1X1
    check_file(model.WEIGHTS, form, model.PIXEL_MEAN, model.PIXEL_STD, in_1x1)


def _set_names(model: CfgNode) -> None:
    """Sets the names of builders in `cfg.MODEL` as MODEL.TRACT.ENABLED says, in place."""
    tract = model["TRACT"]
    if model["META_ARCHITECTURE"] == TrAct.__name__ and not tract["BACKBONE"]:
        tract["ENABLED"] = True  # it is the user who named it: this function names both
    for node, key, ours, kept in (
        (model, "META_ARCHITECTURE", TrAct.__name__, "META_ARCHITECTURE"),
        (model["BACKBONE"], "NAME", build_tract_backbone.__name__, "BACKBONE"),
    ):
        if tract["ENABLED"] and node[key] != ours:
            tract[kept], node[key] = node[key], ours
        elif not tract["ENABLED"]:
            node[key] = tract[kept] if node[key] == ours else node[key]
            tract[kept] = ""


@META_ARCH_REGISTRY.register()
def TrAct(cfg: CfgNode) -> nn.Module:  # noqa: N802
    """The model of MODEL.TRACT.META_ARCHITECTURE, whose stem learns by TrAct.

    Raises:
        UserError: MODEL.WEIGHTS are for other images.
        TrActError: the architecture is not named, or the stem cannot learn; names the key to set.
    """
    tract = cfg.MODEL.get("TRACT")
    if tract is None or tract.META_ARCHITECTURE in ("", TrAct.__name__):
        raise TrActError(
            "MODEL.META_ARCHITECTURE is TrAct, but MODEL.TRACT.META_ARCHITECTURE does not name the "
            "model's own: call add_tract_config(cfg) and set it to GeneralizedRCNN or another"
        )
    if not cfg.is_frozen():  # otherwise `freeze` has
        _check_weights(cfg)
    plain = cfg.clone()
    plain.defrost()
    add_tract_config(plain)
    plain.MODEL.TRACT.ENABLED = False
    model = META_ARCH_REGISTRY.get(tract.META_ARCHITECTURE)(plain)
    stem, freeze_at = tract.STEM or find_stem(model), cfg.MODEL.BACKBONE.FREEZE_AT
    weight = dict(model.named_parameters()).get(f"{stem}.weight")
    if freeze_at > 0 and weight is not None and not weight.requires_grad:
        raise TrActError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at} (2 is detectron2's default) freezes '{stem}', "
            "which MODEL.TRACT trains: set MODEL.BACKBONE.FREEZE_AT 0"
        )
    return apply_tract(
        model,
        tract.LAMBDA,
        stem=stem,
        sync=tract.SYNC,
        unit=tract.UNIT,
        power=tract.POWER,
        gram_patches=tract.GRAM_PATCHES,
        pixel_std=cfg.MODEL.PIXEL_STD,
        pixel_format=cfg.INPUT.FORMAT,
    )


@BACKBONE_REGISTRY.register()
def build_tract_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> None:
    """Stands for the backbone of a model that is built past `TrAct`, and so would train plainly.

    Raises:
        TrActError: always.
    """
    raise TrActError(
        "MODEL.TRACT.ENABLED is True, but this model is built past detectron2's build_model(cfg), "
        "which puts TrAct on it: call that; or set the key to False, and call "
        "tract_det.d2.apply_tract(model)"
    )
