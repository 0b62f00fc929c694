"""Files of weights, and the pixel statistics that travel in them.

A file of this project is `{"model": state_dict, "meta": {...}}`. Files for other libraries say
which pixels their weights expect in a way that the library itself ignores: a `.pth` is a plain
state dict with an attribute `meta`, a `.safetensors` file has metadata, and detectron2's `.pkl` has
keys of its own (`detectron2_files`). No reader runs code from a file
(`torch.load(..., weights_only=True)`), since checkpoints come from the internet.
"""

import argparse
import json
import math
import re
import warnings
import zipfile
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import safetensors
import safetensors.torch
import torch
import torchvision

from tract_det.errors import UserError, shortened
from tract_det.files import atomically, write_binary
from tract_det.modeling.detector_forms import detector_to_detectron2
from tract_det.modeling.detectron2_files import (
    Meta,
    is_detectron2,
    read_as_torchvision,
    write_detectron2,
)
from tract_det.modeling.forms import State, flip_stem, to_form, to_torchvision

_METADATA = "tract_det"  # our entry in the metadata of .safetensors files


@dataclass(frozen=True)
class Weights:
    """A state dict and what is known of it.

    Attributes:
        source: file or name, for messages.
        state: name to tensor, on the CPU.
        meta: `pixel_mean` and `pixel_std` (RGB in [0, 255]), `class_names`, ..., without the keys
            that are not known.
    """

    source: str
    state: State
    meta: Meta

    @property
    def is_detector(self) -> bool:
        """Whether these are the weights of a whole detector, not of a classifier."""
        return is_detector(self.state)


def is_detector(state: State) -> bool:
    """Whether the names are those of a detector with two stages, of any library."""
    return any(key.startswith("roi_heads.") for key in state)


def read_weights(
    source: str, *, key: str = "MODEL.WEIGHTS", channels: str = "", stride_in_3x3: bool = False
) -> Weights:
    """Reads a file, or one of torchvision's weights by its name (`ResNet50_Weights.IMAGENET1K_V2`).

    A file is one of torch's, `.safetensors`, or detectron2's `.pkl`; the tensors of the latter get
    torchvision's names, and a stem for BGR is turned for RGB.

    Args:
        source: the file or name.
        key: the option that the user gave it with, for messages.
        channels: as in `read_as_torchvision`.
        stride_in_3x3: likewise.

    Raises:
        UserError: the file is missing, is not a state dict, or would run code; the name is unknown;
            there is no network.
    """
    path, where = Path(source), f"{key} {source}"
    if "_Weights." in source and not path.exists():
        return _torchvision_weights(source, key)
    if not path.is_file():
        raise UserError(
            f"{where} is not a file: give a file, or one of torchvision's names like "
            "ResNet50_Weights.IMAGENET1K_V2"
        )
    if is_detectron2(path):
        state, meta = read_as_torchvision(
            path, where, channels=channels, stride_in_3x3=stride_in_3x3
        )
    elif path.suffix == ".safetensors":
        state, meta = _read_safetensors(path, where)
    else:
        state, meta = _read_torch(path, where)
    _check_meta(meta, where)
    state, prefixes = _without_prefixes(state)
    if prefixes:
        warnings.warn(
            f"{where}: its names lost the prefix {' and '.join(prefixes)}, which a wrapper of the "
            "model has put there",
            stacklevel=2,
        )
    for name, tensor in state.items():
        if fault := _fault(tensor):
            raise UserError(f"{where}: the tensor '{shortened(name)}' {fault}")
    return Weights(source, state, meta)


# What wrappers of a model put in front of every name: DistributedDataParallel, torch.compile,
# trainers, and mmpretrain in front of a backbone beside its head.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_BACKBONE, _BESIDE_BACKBONE = "backbone.", ("head.", "neck.")


def _without_prefixes(state: State) -> tuple[State, list[str]]:
    """The tensors by the names that the model itself gives them, and the prefixes taken off."""
    prefixes = []
    while state:
        usual = [prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state)]
        if not usual:
            break
        prefixes.append(usual[0])
        state = {key.removeprefix(usual[0]): tensor for key, tensor in state.items()}
    is_body = [key.startswith(_BACKBONE) for key in state]
    if any(is_body) and all(key.startswith((_BACKBONE, *_BESIDE_BACKBONE)) for key in state):
        prefixes.append(_BACKBONE)
        state = {key.removeprefix(_BACKBONE): tensor for key, tensor in state.items()}
    return state, prefixes


def _fault(tensor: torch.Tensor) -> str:
    """Why a tensor is no weight; "" if it may be one."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        kind = "complex" if tensor.is_complex() else "quantised or sparse"
        return f"is {kind}: save the model with dense tensors of real numbers"
    if tensor.is_meta:
        return "has no values (it is on the meta device): save the model after it has got them"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "repeats its values to look larger than it is: save a contiguous one"
    return ""


# What the keys of `meta` hold.
_TEXTS = ("version", "backbone", "norm", "model")
_STATISTICS = ("pixel_mean", "pixel_std")


def _check_meta(meta: Any, where: str) -> None:
    """Refuses metadata of another type than this project writes.

    Raises:
        UserError: the message names the entry.
    """

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(
            f"{where}: '{key}' in its metadata is {shortened(repr(meta[key]))}, not {wanted}: take "
            "the entry out of the file's `meta`"
        )

    if not isinstance(meta, dict):
        raise UserError(f"{where}: its metadata is no dict: leave `meta` out of the file")
    for key in _STATISTICS:
        values = meta.get(key, [1.0])
        is_list = isinstance(values, list | tuple) and len(values) > 0
        if not is_list or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise refuse(key, "a number for each channel")
        if key == "pixel_std" and min(values) <= 0:
            raise refuse(key, "a positive number for each channel")
    counts = [len(meta.get(key, [])) for key in _STATISTICS]
    if counts[0] != counts[1]:
        raise UserError(
            f"{where}: 'pixel_mean' and 'pixel_std' in its metadata have {counts[0]} and "
            f"{counts[1]} numbers, not one for each channel: take both out of the file's `meta`"
        )
    names = meta.get("class_names", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise refuse("class_names", "a list of names")
    for key in _TEXTS:
        if not isinstance(meta.get(key, ""), str):
            raise refuse(key, "a text")


def write_weights(
    path: Path, state: State, meta: Meta, form: str, *, channels: str = "RGB", source: str = ""
) -> list[str]:
    """Writes weights as a library reads them; returns the names that the tensors have there.

    Args:
        path: `.pkl` for detectron2, `.safetensors` or `.pth` for timm, `.pth` for torchvision.
        state: of a classifier or a Faster R-CNN, for RGB, with torchvision's names, or timm's.
        meta: with `pixel_mean` and `pixel_std`, of RGB in [0, 255].
        form: one of `choices.FORMS`.
        channels: the order of channels that the written network takes. Only detectron2's files
            record it.
        source: where the tensors come from, for messages.

    Raises:
        UserError: the library has no such model, or the file cannot be written.
    """
    if form == "detectron2" and len(meta["pixel_mean"]) != 3:
        raise UserError(
            f"{source} takes images of {len(meta['pixel_mean'])} channels, and detectron2's models "
            "three: give weights for RGB"
        )
    if channels == "BGR":
        state = flip_stem(to_torchvision(state))
    renamed = state
    if not is_detector(state):
        renamed = to_form(state, form, source, str(meta.get("model", "")))
    elif form == "detectron2":
        renamed, meta = detector_to_detectron2(state, meta, source)
    if form == "detectron2":
        write_detectron2(path, renamed, meta, channels, source)
        return list(renamed)
    tensors = OrderedDict((key, tensor.contiguous()) for key, tensor in renamed.items())
    if path.suffix == ".safetensors":
        # safetensors sorts the names: the order of the state dict is kept beside them.
        record = json.dumps({"keys": list(tensors), "meta": meta})
        metadata = {"format": "pt", _METADATA: record}
        atomically(
            path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata)
        )
    else:
        tensors.meta = dict(meta)  # type: ignore[attr-defined]
        write_binary(path, lambda file: torch.save(tensors, file))
    return list(renamed)


def _torchvision_weights(name: str, key: str) -> Weights:
    try:
        entry = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{key} {name}: torchvision has no such weights") from error
    preset = entry.transforms()
    meta = {}
    if hasattr(preset, "mean"):
        meta = {
            "pixel_mean": [255 * value for value in preset.mean],
            "pixel_std": [255 * value for value in preset.std],
        }
    try:
        return Weights(name, dict(entry.get_state_dict(check_hash=True)), meta)
    except (URLError, OSError) as error:
        raise UserError(
            f"{key} {name} cannot be downloaded ({error}): fetch {entry.url} elsewhere and "
            f"put it into {torch.hub.get_dir()}/checkpoints"
        ) from error


def _read_safetensors(path: Path, source: str) -> tuple[State, Meta]:
    """The tensors, in the order of the state dict where this project wrote the file."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            if not isinstance(record, dict) or not isinstance(record.get("keys", []), list):
                raise ValueError(f"its metadata '{_METADATA}' is not what this project writes")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{source} cannot be read as a file of tensors: {shortened(str(error), 300)}"
        ) from error
    order = [key for key in record.get("keys", []) if isinstance(key, str) and key in state]
    return {key: state[key] for key in dict.fromkeys([*order, *state])}, record.get("meta", {})


def _read_torch(path: Path, source: str) -> tuple[State, Meta]:
    """The state dict of a torch file, bare or under `model` or `state_dict`, and its `meta`."""
    _refuse_inflated(path, source)
    try:
        with _plain_containers():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{source} cannot be read as a file of tensors: {_why(error)}") from error
    meta = _torch_meta(content)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"{source} holds no state dict (names and tensors)")
    return {str(name): tensor for name, tensor in content.items()}, meta


def _plain_containers() -> AbstractContextManager[None]:
    """Lets a file hold command lines and paths, as torchvision's and timm's trainers write them.

    They are containers of values, and nothing here looks at them.
    """
    if not hasattr(torch.serialization, "safe_globals"):  # torch 2.4
        return nullcontext()
    paths = (PurePath, PurePosixPath, PosixPath)
    return torch.serialization.safe_globals([argparse.Namespace, SimpleNamespace, *paths])


_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def _why(error: Exception) -> str:
    """Why torch refuses a file, without its advice to trust it."""
    kind = _GLOBAL.search(str(error))
    if kind:
        return (
            f"it holds an object of {kind[1]}, which could run code: save the tensors alone, with "
            "torch.save({'model': model.state_dict()}, path)"
        )
    return shortened(" ".join(str(error).split()), 200)


def _refuse_inflated(path: Path, source: str) -> None:
    """Refuses a file whose parts are compressed, which torch never does: they could be anything.

    Raises:
        UserError: they would take much more memory than the file, or it cannot be told.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            size = sum(part.file_size for part in parts.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):  # an older file, or damaged: torch tells
        return
    except NotImplementedError as error:
        raise UserError(
            f"{source} cannot be read as a file of tensors: {error}, as torch never writes it"
        ) from error
    if size > 2 * path.stat().st_size + 2**20:
        raise UserError(
            f"{source} cannot be read as a file of tensors: its parts are compressed to a fraction "
            f"of their {size:,} bytes, as torch never writes them"
        )


def _torch_meta(content: Any) -> Meta:
    """The `meta` inside a file of this project, or beside the tensors of a plain state dict."""
    if not isinstance(content, dict):
        return {}
    for meta in (content.get("meta"), getattr(content, "meta", None)):
        if isinstance(meta, dict):
            return meta
    return {}
