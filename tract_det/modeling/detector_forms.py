"""The names and orders that torchvision and detectron2 give to the tensors of a Faster R-CNN.

Three orders differ. The background is torchvision's first class and detectron2's last, and has a
box regression in torchvision alone, which is never used; it travels in the meta. The anchors of a
location are sorted by aspect ratio in torchvision and by size in detectron2, which matters for a
VGG, whose anchors are on one level. The channels of the stem are `forms.flip_stem`'s business.

A converted detector computes what its new back end does with these weights: RoIAlign and anchors
differ a little (tract_det/d2/README.md).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from tract_det.errors import UserError
from tract_det.modeling.forms import (
    Meta,
    State,
    resnet_name_from_detectron2,
    resnet_name_to_detectron2,
)

_CLASSES, _BOXES = (f"roi_heads.box_predictor.{name}." for name in ("cls_score", "bbox_pred"))
_LOGITS, _DELTAS = "rpn.head.cls_logits.", "rpn.head.bbox_pred."
_HEADS = {  # torchvision's name to detectron2's
    "rpn.head.conv.0.0.": "proposal_generator.rpn_head.conv.",
    _LOGITS: "proposal_generator.rpn_head.objectness_logits.",
    _DELTAS: "proposal_generator.rpn_head.anchor_deltas.",
    _CLASSES: _CLASSES,
    _BOXES: _BOXES,
}
_VGG = {f"roi_heads.box_head.fc{i}.": f"roi_heads.box_head.fc{i}." for i in (6, 7)}
_FPN = {
    **{f"roi_heads.box_head.fc{i + 5}.": f"roi_heads.box_head.fc{i}." for i in (1, 2)},
    **{f"backbone.fpn.inner_blocks.{i}.0.": f"backbone.fpn_lateral{i + 2}." for i in range(4)},
    **{f"backbone.fpn.layer_blocks.{i}.0.": f"backbone.fpn_output{i + 2}." for i in range(4)},
}
_FEATURES, _BODY, _BOTTOM_UP = (f"backbone.{name}." for name in ("features", "body", "bottom_up"))
# What a configuration says, and old files of detectron2 hold.
CONSTANTS = re.compile(r"pixel_(mean|std)|.*cell_anchors.*")
_BACKGROUND = "background_bbox_pred"  # in the meta


def is_detectron2_detector(state: State) -> bool:
    """Whether the names are those of a two-stage detector of detectron2."""
    return "proposal_generator.rpn_head.conv.weight" in state


def detector_to_detectron2(state: State, meta: Meta, source: str) -> tuple[State, Meta]:
    """A Faster R-CNN of torchvision or of this project with detectron2's names and orders.

    Args:
        state: with torchvision's names.
        meta: what is known of it; `aspect_ratios` of its anchors, if they are not three.
        source: where it comes from, for messages.

    Returns:
        The state dict, and the meta with what has no place in it.

    Raises:
        UserError: it is another detector, naming a tensor.
    """
    heads = _HEADS | (_VGG if _is_vgg(state) else _FPN)
    _check_whole(state, heads, source)
    ratios = _ratios(meta)
    changed = dict(state)
    for kind in ("weight", "bias"):
        for name, per_anchor in ((_LOGITS, 1), (_DELTAS, 4)):
            changed[name + kind] = _transpose(state[name + kind], ratios, per_anchor)
        changed[_CLASSES + kind] = state[_CLASSES + kind].roll(-1, 0)
        changed[_BOXES + kind] = state[_BOXES + kind][4:]
    background = {kind: state[_BOXES + kind][:4].numpy() for kind in ("weight", "bias")}
    renamed = _rename(changed, heads, (_BODY, _BOTTOM_UP), resnet_name_to_detectron2, source)
    return renamed, meta | {_BACKGROUND: background}


def detector_from_detectron2(state: State, meta: Meta, source: str) -> tuple[State, Meta]:
    """The inverse of `detector_to_detectron2`.

    The regression of the background's box is zero for a detector that detectron2 has trained.

    Raises:
        UserError: likewise; or all classes have one regression.
    """
    heads = {new: old for old, new in (_HEADS | (_VGG if _is_vgg(state) else _FPN)).items()}
    _check_whole(state, heads, source)
    state = {key: tensor for key, tensor in state.items() if not CONSTANTS.fullmatch(key)}
    places = (_BOTTOM_UP, _BODY)
    state = _rename(state, heads, places, resnet_name_from_detectron2, source)
    classes = len(state[_CLASSES + "bias"]) - 1
    if len(state[_BOXES + "bias"]) != 4 * classes:
        raise UserError(
            f"{source} has one box regression for all {classes} classes (CLS_AGNOSTIC_BBOX_REG), "
            "which torchvision's detectors do not have: train it with one for each"
        )
    ratios, background = _ratios(meta), meta.get(_BACKGROUND, {})
    for kind in ("weight", "bias"):
        for name, per_anchor in ((_LOGITS, 1), (_DELTAS, 4)):
            sizes = len(state[name + kind]) // (per_anchor * ratios)
            state[name + kind] = _transpose(state[name + kind], sizes, per_anchor)
        state[_CLASSES + kind] = state[_CLASSES + kind].roll(1, 0)
        boxes = state[_BOXES + kind]
        rows = torch.as_tensor(background.get(kind, torch.zeros_like(boxes[:4])))
        state[_BOXES + kind] = torch.cat([rows.to(boxes), boxes])
    return state, {key: value for key, value in meta.items() if key != _BACKGROUND}


def _is_vgg(state: State) -> bool:
    return f"{_FEATURES}0.weight" in state


def _ratios(meta: Meta) -> int:
    """The number of aspect ratios; three, both libraries' default, where the file does not say."""
    return len(meta.get("aspect_ratios", range(3)))


def _transpose(tensor: Tensor, outer: int, per_anchor: int) -> Tensor:
    """`(outer * inner * n, ...)`, n values of each anchor, to `(inner * outer * n, ...)`."""
    if len(tensor) % (outer * per_anchor):
        raise UserError(f"{len(tensor) // per_anchor} anchors do not have {outer} aspect ratios")
    grid = tensor.unflatten(0, (outer, -1, per_anchor))
    return grid.transpose(0, 1).flatten(0, 2).contiguous()


def _check_whole(state: State, heads: dict[str, str], source: str) -> None:
    missing = [name for name in heads if f"{name}weight" not in state]
    if missing:
        raise _other_detector(source, f"it has no '{missing[0]}weight'")


def _rename(
    state: State,
    heads: dict[str, str],
    places: tuple[str, str],
    rename: Callable[[str], str | None],
    source: str,
) -> State:
    """The tensors of the heads, and those of the backbone, from one place to the other."""
    renamed = {}
    for key, tensor in state.items():
        module, kind = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
        name = heads.get(module)
        if module.startswith(places[0]):
            inner = rename(module.removeprefix(places[0]).rstrip("."))
            name = inner and f"{places[1]}{inner}."
        elif module.startswith(_FEATURES):
            name = module
        if name is None:
            raise _other_detector(source, f"'{key}' has no place in the other")
        renamed[name + kind] = tensor
    return renamed


def _other_detector(source: str, why: str) -> UserError:
    return UserError(
        f"{source} is not a Faster R-CNN with a ResNet-FPN or a VGG and a box head of two layers, "
        f"the detectors that both libraries have: {why}"
    )
