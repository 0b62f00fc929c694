"""The names that torchvision, timm and detectron2 give to the tensors of ResNets and VGGs.

ResNets: torchvision and timm use the same names. For detectron2 they are the names that its own
converter writes: `conv1`, `bn1` become `stem.conv1`, `stem.conv1.norm`; `layer1.0.bn2` becomes
`res2.0.conv2.norm`; `downsample.0`, `.1` become `shortcut`, `shortcut.norm`. `fc` becomes `linear`,
its name in detectron2's classifier.

VGGs: timm has convolutions `pre_logits.fc1` and `pre_logits.fc2` where torchvision has the fully
connected layers `classifier.0` and `.3`, and calls `classifier.6` `head.fc`. detectron2 has no VGG
of its own; the one in `tract_det.d2` keeps torchvision's `features` in its backbone, and its box
head has `fc6` and `fc7` for `classifier.0` and `.3`. `classifier.6` becomes `fc8`, Caffe's name.

A state dict maps names to tensors; no function here changes the one that it is called with.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tract_det.errors import UserError

State = dict[str, Tensor]
Meta = dict[str, Any]

_RESNET_LAYERS = {  # torchvision's name to detectron2's, inside the stem or a block
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)},
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_VGG_TIMM = {  # torchvision's name to timm's
    "classifier.0": "pre_logits.fc1",
    "classifier.3": "pre_logits.fc2",
    "classifier.6": "head.fc",
}
_VGG_DETECTRON2 = {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}


_PLACES = ("", "backbone.body.", "backbone.")  # of a classifier, and in a detector
_STEMS = ("conv1.weight", "features.0.weight")


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


_RESNET_LAYERS_BACK = _inverse(_RESNET_LAYERS)


def is_resnet(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of torchvision's ResNets."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def is_vgg(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of torchvision's or timm's VGGs, or of their features alone."""
    heads = ("classifier.3.weight", "classifier.weight", "pre_logits.fc1.weight")
    return "features.0.weight" in state and (
        any(key in state for key in heads) or all(key.startswith("features.") for key in state)
    )


def to_torchvision(state: State) -> State:
    """Torchvision's names and shapes for a VGG of timm; other state dicts are returned as is."""
    if "pre_logits.fc1.weight" not in state:
        return state
    return _rename_vgg(state, _inverse(_VGG_TIMM))


def to_timm(state: State) -> State:
    """Timm's names and shapes for a VGG of torchvision; other state dicts are returned as is."""
    return _rename_vgg(state, _VGG_TIMM) if "classifier.3.weight" in state else state


def to_form(state: State, form: str, source: str, model: str = "") -> State:
    """The tensors of a classifier under the names of one library.

    Args:
        state: with torchvision's or timm's names.
        form: one of `choices.FORMS`. For detectron2, tensors of a VGG's classifier that are not
            finite are left out.
        source: where the tensors come from, for messages.
        model: the classifier's name, where it is known. Models other than ResNets and VGGs only
            have the form of their own library.

    Raises:
        UserError: the library has no such model.
    """
    state = to_torchvision(state)
    if is_vgg(state):
        return _vgg_to_form(state, form, source)
    if is_resnet(state):
        return _resnet_to_form(state, form, source)
    library = "timm" if model.startswith("timm:") else "torchvision"
    if not model or form != library:
        raise UserError(
            f"{source} is neither a ResNet nor a VGG with torchvision's names: {form} has no form "
            f"of {model or 'it'}"
        )
    return state


def from_detectron2(state: State, source: str) -> State:
    """The tensors of a classifier under torchvision's names, from detectron2's.

    Raises:
        UserError: the state dict is not a ResNet's or a VGG's.
    """
    state = _rename_vgg(state, _inverse(_VGG_DETECTRON2))
    if is_vgg(state):
        return state
    return _rename_resnet(
        state, resnet_name_from_detectron2, f"{source} is not a classifier with detectron2's names"
    )


def flip_stem(state: State) -> State:
    """The same network for images whose channels are in the reverse order (RGB, BGR)."""
    stems = (f"{place}{stem}" for place in _PLACES for stem in _STEMS)
    stem = next((name for name in stems if name in state), "")
    return {key: tensor.flip(1) if key == stem else tensor for key, tensor in state.items()}


def _resnet_to_form(state: State, form: str, source: str) -> State:
    if form != "detectron2":
        return state
    if state["conv1.weight"].shape[-1] != 7:
        raise UserError(
            f"{source} has a stem for small images: detectron2's ResNets have a 7x7 stem"
        )
    return _rename_resnet(
        state, resnet_name_to_detectron2, f"{source} cannot be written in detectron2's form"
    )


def _vgg_to_form(state: State, form: str, source: str) -> State:
    if form == "timm":
        if "classifier.weight" in state:
            raise UserError(f"{source} is a VGG for small images, which timm does not have")
        return to_timm(state)
    if form == "torchvision":
        return state
    # VGG16_Weights.IMAGENET1K_FEATURES has no classifier and fills these tensors with NaN, which
    # detectron2 would load.
    filled = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith("classifier.") or tensor.isfinite().all()
    }
    return _rename_vgg(filled, _VGG_DETECTRON2)


def _rename_resnet(state: State, rename: Callable[[str], str | None], refusal: str) -> State:
    renamed = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        name = rename(module)
        if name is None:
            raise UserError(
                f"{refusal}: '{key}' is not a tensor of a ResNet, and only ResNets and VGGs can be "
                "converted"
            )
        renamed[f"{name}.{kind}"] = tensor
    return renamed


def resnet_name_to_detectron2(module: str) -> str | None:
    """`layer1.0.bn2` to `res2.0.conv2.norm`; None for a module of another network."""
    if module == "fc":
        return "linear"
    match = re.fullmatch(r"(?:layer([1-4])\.(\d+)\.)?(.+)", module)
    if not match or match[3] not in _RESNET_LAYERS:
        return None
    place = f"res{int(match[1]) + 1}.{match[2]}" if match[1] else "stem"
    return f"{place}.{_RESNET_LAYERS[match[3]]}"


def resnet_name_from_detectron2(module: str) -> str | None:
    """The inverse of `resnet_name_to_detectron2`."""
    if module in ("linear", "stem.fc"):  # detectron2's converter writes the latter
        return "fc"
    match = re.fullmatch(r"(?:res([2-5])\.(\d+)|stem)\.(.+)", module)
    if not match or match[3] not in _RESNET_LAYERS_BACK:
        return None
    place = f"layer{int(match[1]) - 1}.{match[2]}." if match[1] else ""
    return f"{place}{_RESNET_LAYERS_BACK[match[3]]}"


def _rename_vgg(state: State, names: Mapping[str, str]) -> State:
    """Renames modules; the weights of fully connected layers take timm's shape, or lose it.

    Linear weights `(4096, 512 * 7 * 7)` and `(4096, 4096)` are convolutions `(4096, 512, 7, 7)` and
    `(4096, 4096, 1, 1)` in timm.
    """
    renamed = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        name = names.get(module, module)
        weight = tensor
        if kind == "weight" and name == "pre_logits.fc1":
            weight = tensor.unflatten(1, (-1, 7, 7))
        elif kind == "weight" and name == "pre_logits.fc2":
            weight = tensor[..., None, None]
        elif kind == "weight" and module in ("pre_logits.fc1", "pre_logits.fc2"):
            weight = tensor.flatten(1)
        renamed[f"{name}.{kind}" if module else key] = weight
    return renamed
