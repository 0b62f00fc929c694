"""Weights in the forms of torchvision, timm and detectron2: their names and their files.

A ResNet has the same names in torchvision and timm. detectron2's are those of its own converter:
`conv1`, `bn1` -> `stem.conv1`, `stem.conv1.norm`; `layer1.0.bn2` -> `res2.0.conv2.norm`;
`downsample.0`, `.1` -> `shortcut`, `shortcut.norm`; and `fc` -> `linear`, as its classifier has it.

A VGG's fully connected layers `classifier.0`, `.3` and `.6` are convolutions in timm:
`pre_logits.fc1`, `pre_logits.fc2`, and `head.fc`. detectron2's VGG is that of `tract_det.d2`: its
matching by suffix finds torchvision's `features` in the backbone, and in the box head `fc6` and
`fc7`, which `classifier.0` and `.3` become; `classifier.6` becomes `fc8`, Caffe's name.

Files say which pixels they expect, within what the library itself reads: a torch file is a plain
state dict with an attribute `meta`, a `.safetensors` file has metadata, and detectron2's has
`PIXEL_MEAN`, `PIXEL_STD`, `FORMAT` and `STRIDE_IN_1X1` beside `model`. No reader runs code of the
file's.
"""

import codecs
import importlib
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tract_det.errors import UserError
from tract_det.files import atomically

FORMS = ("torchvision", "timm", "detectron2")
CHANNELS = ("RGB", "BGR")

State = dict[str, Tensor]
Meta = dict[str, Any]

_OURS = "tract_det"  # our entry in the metadata of .safetensors files
_LEAVES = {
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)},
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_LEAVES_BACK = {theirs: ours for ours, theirs in _LEAVES.items()}
_VGG_TIMM = {
    "classifier.0": "pre_logits.fc1",
    "classifier.3": "pre_logits.fc2",
    "classifier.6": "head.fc",
}
_VGG_TIMM_BACK = {theirs: ours for ours, theirs in _VGG_TIMM.items()}
_VGG_DETECTRON2 = {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}
_VGG_DETECTRON2_BACK = {theirs: ours for ours, theirs in _VGG_DETECTRON2.items()}


def _to_detectron2(key: str) -> str | None:
    module, _, tensor = key.rpartition(".")
    if module == "fc":
        return f"linear.{tensor}"
    found = re.fullmatch(r"(?:layer([1-4])\.(\d+)\.)?(.+)", module)
    if not found or found[3] not in _LEAVES:
        return None
    place = f"res{int(found[1]) + 1}.{found[2]}" if found[1] else "stem"
    return f"{place}.{_LEAVES[found[3]]}.{tensor}"


def _from_detectron2(key: str) -> str | None:
    module, _, tensor = key.rpartition(".")
    if module in ("linear", "stem.fc"):  # detectron2's converter writes the latter
        return f"fc.{tensor}"
    found = re.fullmatch(r"(?:res([2-5])\.(\d+)|stem)\.(.+)", module)
    if not found or found[3] not in _LEAVES_BACK:
        return None
    place = f"layer{int(found[1]) - 1}.{found[2]}." if found[1] else ""
    return f"{place}{_LEAVES_BACK[found[3]]}.{tensor}"


def _renamed(state: State, name: Callable[[str], str | None], what: str) -> State:
    names = {key: name(key) for key in state}
    for key, new in names.items():
        if new is None:
            raise UserError(f"{what}: '{key}' is no tensor of a ResNet; only ResNets and VGGs are")
    return {str(names[key]): tensor for key, tensor in state.items()}


def _vgg_renamed(state: State, names: Mapping[str, str]) -> State:
    """The fully connected layers under other names, as convolutions in timm's."""
    renamed = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        new = names.get(module, module)
        value = tensor
        if kind == "weight" and new == "pre_logits.fc1":
            value = tensor.unflatten(1, (-1, 7, 7))
        elif kind == "weight" and new == "pre_logits.fc2":
            value = tensor[..., None, None]
        elif kind == "weight" and module in ("pre_logits.fc1", "pre_logits.fc2"):
            value = tensor.flatten(1)
        renamed[f"{new}.{kind}" if module else key] = value
    return renamed


def is_resnet(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of torchvision's ResNets."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def is_vgg(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of torchvision's VGGs, or of timm's; their features suffice."""
    heads = ("classifier.3.weight", "classifier.weight", "pre_logits.fc1.weight")
    return "features.0.weight" in state and (
        any(key in state for key in heads) or all(key.startswith("features.") for key in state)
    )


def to_torchvision(state: State) -> State:
    """A VGG of timm's with torchvision's names and shapes; other state dicts as they are."""
    return _vgg_renamed(state, _VGG_TIMM_BACK) if "pre_logits.fc1.weight" in state else state


def to_timm(state: State) -> State:
    """A VGG of torchvision's with timm's names and shapes; other state dicts as they are."""
    return _vgg_renamed(state, _VGG_TIMM) if "classifier.3.weight" in state else state


def _vgg_to_detectron2(state: State) -> State:
    # VGG16_Weights.IMAGENET1K_FEATURES fills the classifier that it lacks with NaN, which
    # detectron2 would load.
    there = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith("classifier.") or tensor.isfinite().all()
    }
    return _vgg_renamed(there, _VGG_DETECTRON2)


def to_form(state: State, form: str, source: str, model: str = "") -> State:
    """A classifier's tensors as a library names them.

    Args:
        state: with torchvision's names, or timm's.
        form: one of `FORMS`. detectron2's has no tensor of a classifier that is not finite.
        source: of the tensors, for messages.
        model: the classifier's name where it is known. Other models than ResNets and VGGs stay in
            the library that they come from.

    Raises:
        UserError: the library has no such model.
    """
    state = to_torchvision(state)
    if not is_resnet(state) and not is_vgg(state):
        home = "timm" if model.startswith("timm:") else "torchvision"
        if not model or form != home:
            raise UserError(
                f"{source} is neither a ResNet nor a VGG with torchvision's names: {form} has no "
                f"form of {model or 'it'}"
            )
        return state
    if is_vgg(state):
        if form == "timm" and "classifier.weight" in state:
            raise UserError(f"{source} is a VGG for small images, which timm does not have")
        if form == "detectron2":
            return _vgg_to_detectron2(state)
        return to_timm(state) if form == "timm" else state
    if form != "detectron2":
        return state
    if state["conv1.weight"].shape[-1] != 7:
        raise UserError(f"{source} has a stem for small images: detectron2's ResNets have 7x7")
    return _renamed(state, _to_detectron2, f"{source} cannot take detectron2's form")


def flip_stem(state: State) -> State:
    """The same network for images with their channels in the other order (RGB, BGR)."""
    stem = "conv1.weight" if is_resnet(state) else "features.0.weight"
    return {key: tensor.flip(1) if key == stem else tensor for key, tensor in state.items()}


# Readers


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return codecs.latin_1_encode(text)[0]


def _numpys(module: str, name: str) -> Any:
    core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0b1" else "numpy.core"
    return getattr(importlib.import_module(f"{core}.{module}"), name)


# What arrays and plain containers are pickled by, in numpy 1's spelling.
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _numpys("multiarray", "_reconstruct"),
    "numpy.core.multiarray.scalar": _numpys("multiarray", "scalar"),
    "numpy.core.numeric._frombuffer": _numpys("numeric", "_frombuffer"),
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain containers: no other class of a file is looked up, or run."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.", 1)
        if name not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it holds a {module_name}.{global_name}, and only arrays and plain containers are "
                "read, since anything else may run code"
            )
        return _ADMITTED[name]


def read_pickle(path: Path, source: str) -> Any:
    """The content of a pickle of arrays and plain containers.

    Raises:
        UserError: it is none, or holds anything else; naming the class.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{source} cannot be read as a file of arrays: {error}") from error


def read_detectron2(
    path: Path, source: str, *, channels: str = "", stride_in_3x3: bool = False
) -> tuple[State, Meta]:
    """detectron2's `.pkl` of a ResNet or VGG, with torchvision's names, for RGB.

    Args:
        path: of the file.
        source: the file, for messages.
        channels: "RGB" or "BGR", where the file does not say.
        stride_in_3x3: where the file does not say: whether bottlenecks stride where torchvision's
            do.

    Raises:
        UserError: it is another network, or torchvision's ResNet cannot compute what it does.
    """
    content = read_pickle(path, source)
    model = content.get("model") if isinstance(content, dict) else None
    names = set(model if isinstance(model, dict) else content if isinstance(content, dict) else ())
    if "blobs" in names or any(re.match(r"res\d_\d+_branch", str(name)) for name in names):
        raise UserError(
            f"{source} has Caffe2's names: such ResNets (MSRA's) stride in the 1x1 convolution, "
            "torchvision's in the 3x3; take weights of torchvision's"
        )
    if not isinstance(model, dict) or not all(isinstance(v, np.ndarray) for v in model.values()):
        raise UserError(f"{source} is no file of detectron2's: it has no 'model' of named arrays")
    state = {str(key): _tensor(value, source) for key, value in model.items()}
    state = _vgg_renamed(state, _VGG_DETECTRON2_BACK)
    if not is_vgg(state):
        what = f"{source} is no classifier with detectron2's names"
        state = _renamed(state, _from_detectron2, what)
        _check_stride(content, state, source, stride_in_3x3)
    order = content.get("FORMAT", channels)
    if not order and content.get("__author__") == "torchvision":  # what the converter leaves out
        order = "RGB"
    if order not in CHANNELS:
        raise UserError(
            f"{source} does not say whether it takes RGB or BGR: write it anew with "
            "tools/convert_weights.py and --input-format"
        )
    step = -1 if order == "BGR" else 1
    meta = dict(content.get("meta", {}))
    for key, name in (("PIXEL_MEAN", "pixel_mean"), ("PIXEL_STD", "pixel_std")):
        if key in content:
            meta[name] = [float(value) for value in content[key]][::step]
    return flip_stem(state) if order == "BGR" else state, meta


def _tensor(array: np.ndarray, source: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UserError(f"{source} holds an array of {array.dtype}, which is no number") from error


def _check_stride(content: Meta, state: State, source: str, stride_in_3x3: bool) -> None:
    if "layer1.0.conv3.weight" not in state:
        return
    known = stride_in_3x3 or content.get("__author__") == "torchvision"
    if content.get("STRIDE_IN_1X1", not known):
        raise UserError(
            f"{source} strides in the 1x1 convolutions of its bottlenecks (STRIDE_IN_1X1), or does "
            "not say where; torchvision's ResNets stride in the 3x3: take such weights, or, if "
            "they are, convert them with tools/convert_weights.py and --stride-in-3x3"
        )


def read_safetensors(path: Path, source: str) -> tuple[State, Meta]:
    """A `.safetensors` file; in the order of its writer where that was this project."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            ours = json.loads((file.metadata() or {}).get(_OURS, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read as a file of tensors: {error}") from error
    order = [key for key in ours.get("keys", []) if key in state]
    return {key: state[key] for key in dict.fromkeys([*order, *state])}, ours.get("meta", {})


def read_torch(path: Path, source: str) -> tuple[Any, Meta]:
    """The state dict of a torch file, and its `meta` where it has one.

    Raises:
        UserError: it cannot be read, or not without running code of its own.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{source} cannot be read as a file of tensors: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(content, dict):
        return content, {}
    inside, beside = content.get("meta"), getattr(content, "meta", None)
    meta = inside if isinstance(inside, dict) else beside if isinstance(beside, dict) else {}
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return content, meta


def is_detectron2(path: Path) -> bool:
    """Whether a file is a pickle of its own, and not one of torch's archives."""
    return path.suffix == ".pkl" and not zipfile.is_zipfile(path)


# Writers


def write_weights(
    path: Path, state: State, meta: Meta, form: str, *, channels: str = "RGB", source: str = ""
) -> list[str]:
    """Writes a classifier as a library reads it; returns the names that the tensors have there.

    Args:
        path: `.pkl` for detectron2, `.safetensors` or `.pth` for timm, `.pth` for torchvision.
        state: for RGB, with torchvision's names, or timm's.
        meta: with `pixel_mean` and `pixel_std`, of RGB in [0, 255].
        form: one of `FORMS`.
        channels: the order in which the network is to take an image's; detectron2's alone says.
        source: of the tensors, for messages.

    Raises:
        UserError: the library has no such model, or the file cannot be written.
    """
    if channels == "BGR":
        state = flip_stem(to_torchvision(state))
    named = to_form(state, form, source, str(meta.get("model", "")))
    if form == "detectron2":
        content = _detectron2_content(named, meta, channels, source)
        atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(content, 4)))
    elif path.suffix == ".safetensors":
        ours = json.dumps({"keys": list(named), "meta": meta})
        whole = {key: tensor.contiguous() for key, tensor in named.items()}
        head = {"format": "pt", _OURS: ours}
        atomically(path, lambda temporary: safetensors.torch.save_file(whole, temporary, head))
    else:
        plain = OrderedDict((key, tensor.contiguous()) for key, tensor in named.items())
        plain.meta = dict(meta)  # type: ignore[attr-defined]
        atomically(path, lambda temporary: torch.save(plain, temporary))
    return list(named)


def _detectron2_content(state: State, meta: Meta, channels: str, source: str) -> Meta:
    try:
        arrays = {key: tensor.numpy() for key, tensor in state.items()}
    except TypeError as error:
        raise UserError(
            f"{source} cannot take detectron2's form, which is numpy's: {error}"
        ) from error
    step = -1 if channels == "BGR" else 1
    return {
        "model": arrays,
        "__author__": "tract_det",
        "matching_heuristics": True,
        "FORMAT": channels,
        "PIXEL_MEAN": list(meta["pixel_mean"])[::step],
        "PIXEL_STD": list(meta["pixel_std"])[::step],
        "STRIDE_IN_1X1": False,
        "meta": {k: v for k, v in meta.items() if k not in ("pixel_mean", "pixel_std")},
    }
