"""detectron2's `.pkl` files: read without running their code, and written as detectron2 reads them.

Beside the arrays in `model`, such a file may say which images the network takes and where its
bottlenecks stride: `FORMAT`, `PIXEL_MEAN`, `PIXEL_STD` (in the order of FORMAT), `STRIDE_IN_1X1`.
detectron2 itself is not needed here.
"""

import codecs
import importlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tract_det.errors import UserError, shortened
from tract_det.files import atomically
from tract_det.modeling.choices import CHANNELS
from tract_det.modeling.detector_forms import detector_from_detectron2, is_detectron2_detector
from tract_det.modeling.forms import Meta, State, flip_stem, from_detectron2, is_vgg
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD

CAFFE2 = "Caffe2"  # the author that detectron2 assumes for files that name none
_TORCHVISION = "torchvision"  # the author that detectron2's converter writes
_PROPERTIES = {"FORMAT": "format", "STRIDE_IN_1X1": "stride_in_1x1"}
_STATISTICS = {"PIXEL_MEAN": "pixel_mean", "PIXEL_STD": "pixel_std"}


@dataclass(frozen=True)
class Detectron2File:
    """The content of a `.pkl`, under the file's own names and in its own order of channels.

    Attributes:
        state: name to tensor.
        meta: what the file says of itself or is known of its author, without other keys: `author`
            (`CAFFE2` for the bare arrays of Detectron and Caffe2), `format` ("RGB" or "BGR"),
            `pixel_mean` and `pixel_std` (of RGB in [0, 255]), `stride_in_1x1`, and the meta that
            this project writes.
        others: names of the entries that are not arrays.
    """

    state: State
    meta: Meta
    others: list[str]


def is_detectron2(path: Path) -> bool:
    """Whether a file is a plain pickle, and not one of torch's archives."""
    return path.suffix == ".pkl" and not zipfile.is_zipfile(path)


def read_detectron2(path: Path, source: str, *, channels: str = "") -> Detectron2File:
    """Reads a `.pkl` of detectron2, Detectron or Caffe2, without an optimizer's momentum.

    Args:
        path: of the file.
        source: the file as the user named it, for messages.
        channels: "RGB" or "BGR", for a file that does not say.

    Raises:
        UserError: the file cannot be read, or holds anything but arrays and plain containers.
    """
    content = read_pickle(path, source)
    if not isinstance(content, Mapping):
        raise _not_detectron2(source)
    author, arrays = content.get("__author__"), content.get("model")
    if not isinstance(arrays, Mapping):
        author, arrays = CAFFE2, content.get("blobs", content)
    if not isinstance(arrays, Mapping):
        raise _not_detectron2(source)
    arrays = {str(k): v for k, v in arrays.items() if not str(k).endswith("_momentum")}
    others = [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]
    state = {key: _tensor(arrays[key], source) for key in arrays if key not in others}
    meta = _known(author, state) | _meta(content, author, channels)
    return Detectron2File(state, meta, others)


def _known(author: str | None, state: State) -> Meta:
    """What files that say nothing of themselves were trained on."""
    if author == _TORCHVISION:
        statistics = {"pixel_mean": list(IMAGENET_MEAN), "pixel_std": list(IMAGENET_STD)}
        return {"format": "RGB", "stride_in_1x1": False, **statistics}
    if not _has_caffe2s_names(state):
        return {}
    grouped = any(k.endswith("branch2b_w") and t.shape[1] < t.shape[0] for k, t in state.items())
    if grouped:  # FAIR's ResNeXts; of their pixels, each has its own
        return {"format": "BGR", "stride_in_1x1": False}
    statistics = {"pixel_mean": list(IMAGENET_MEAN), "pixel_std": [1.0, 1.0, 1.0]}
    has_gn = any("_gn_" in key for key in state)  # FAIR's; the others are MSRA's
    return {"format": "BGR", "stride_in_1x1": not has_gn, **statistics}


def _has_caffe2s_names(state: State) -> bool:
    return any(re.match(r"res\d_\d+_branch", key) for key in state)


def read_as_torchvision(
    path: Path, source: str, *, channels: str = "", stride_in_3x3: bool = False
) -> tuple[State, Meta]:
    """detectron2's `.pkl`, as `as_torchvision` gives it.

    Args:
        path: of the file.
        source: the file as the user named it, for messages.
        channels: "RGB" or "BGR", for a file that does not say.
        stride_in_3x3: bottlenecks stride in their 3x3 convolution, for a file that does not say.

    Raises:
        UserError: it is another network, or torchvision's ResNet cannot compute what it does.
    """
    file = read_detectron2(path, source, channels=channels)
    if file.others:
        raise _not_detectron2(source)
    return as_torchvision(file.state, file.meta, source, stride_in_3x3=stride_in_3x3)


def as_torchvision(
    state: State, meta: Meta, source: str, *, channels: str = "", stride_in_3x3: bool = False
) -> tuple[State, Meta]:
    """A ResNet, a VGG or a Faster R-CNN of them with torchvision's names, for RGB.

    Args:
        state: with detectron2's names.
        meta: what its file says; see `Detectron2File`.
        source: the file as the user named it, for messages.
        channels: "RGB" or "BGR", if the meta does not say.
        stride_in_3x3: as in `read_as_torchvision`.

    Returns:
        The state dict, and its meta: `pixel_mean` and `pixel_std` where the file has them, and what
        this project wrote.

    Raises:
        UserError: as `read_as_torchvision`.
    """
    meta = dict(meta)
    keys = ("author", *_PROPERTIES.values(), "detectron2")
    author, order, in_1x1, _ = (meta.pop(key, None) for key in keys)
    if _has_caffe2s_names(state):
        raise UserError(
            f"{source} has Caffe2's names: such ResNets (MSRA's) stride in the 1x1 convolution and "
            "torchvision's in the 3x3; take weights of torchvision instead"
        )
    if author == CAFFE2:
        raise _not_detectron2(source)
    if is_detectron2_detector(state):
        state, meta = detector_from_detectron2(state, meta, source)
    else:
        state = from_detectron2(state, source)
    if not is_vgg(state):
        _check_stride(state, source, in_1x1, stride_in_3x3)
    order = order or channels
    if order not in CHANNELS:
        raise UserError(
            f"{source} does not say whether it takes RGB or BGR: convert it with "
            "tools/convert_weights.py and --input-format"
        )
    return flip_stem(state) if order == "BGR" else state, meta


def write_detectron2(path: Path, state: State, meta: Meta, channels: str, source: str) -> None:
    """Writes a `.pkl`, whole or not at all.

    Args:
        path: of the file.
        state: with detectron2's names, for images in the order `channels`.
        meta: with `pixel_mean` and `pixel_std`, of RGB in [0, 255].
        channels: "RGB" or "BGR".
        source: where the tensors come from, for messages.

    Raises:
        UserError: numpy has no such number type, or the file cannot be written.
    """
    try:
        arrays = {key: tensor.numpy() for key, tensor in state.items()}
    except TypeError as error:
        raise UserError(
            f"{source} cannot be written in detectron2's form, which is numpy's: {error}"
        ) from error
    step = -1 if channels == "BGR" else 1
    content = {
        "model": arrays,
        "__author__": "tract_det",
        "matching_heuristics": True,
        "FORMAT": channels,
        "PIXEL_MEAN": list(meta["pixel_mean"])[::step],
        "PIXEL_STD": list(meta["pixel_std"])[::step],
        "STRIDE_IN_1X1": False,
        "meta": {k: v for k, v in meta.items() if k not in _STATISTICS.values()},
    }
    atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(content, 4)))


def read_pickle(path: Path, source: str) -> Any:
    """The content of a pickle of arrays and plain containers.

    Raises:
        UserError: it cannot be read, or holds an object of another class, naming the class.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{source} cannot be read as a file of arrays: {shortened(str(error), 300)}"
        ) from error


def _not_detectron2(source: str) -> UserError:
    return UserError(f"{source} is not a detectron2 file: it has no 'model' of named arrays")


def _meta(content: Mapping[str, Any], author: str | None, channels: str) -> Meta:
    meta: Meta = {} if author is None else {"author": str(author)}
    meta |= content.get("meta", {})
    if channels:
        meta["format"] = channels
    meta |= {name: content[key] for key, name in _PROPERTIES.items() if key in content}
    step = -1 if meta.get("format") == "BGR" else 1
    for key, name in _STATISTICS.items():
        if key in content:
            meta[name] = [float(value) for value in content[key]][::step]
    return meta


def _tensor(array: np.ndarray, source: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UserError(f"{source} holds an array of {array.dtype}, which is no number") from error


def _check_stride(state: State, source: str, in_1x1: bool | None, known_in_3x3: bool) -> None:
    """Refuses bottlenecks that stride elsewhere than torchvision's.

    Args:
        state: with torchvision's names.
        source: for messages.
        in_1x1: what the file says; None = nothing.
        known_in_3x3: whether they stride in the 3x3 if the file says nothing.
    """
    if not any(key.endswith("layer1.0.conv3.weight") for key in state):  # basic blocks have no 1x1
        return
    if in_1x1 is None:
        in_1x1 = not known_in_3x3
    if in_1x1:
        raise UserError(
            f"{source} strides in the 1x1 convolutions of its bottlenecks (STRIDE_IN_1X1), or does "
            "not say where; torchvision's ResNets stride in the 3x3: take weights that do, or, if "
            "these do, convert them with tools/convert_weights.py and --stride-in-3x3"
        )


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `codecs.encode`, which runs any registered codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return codecs.latin_1_encode(text)[0]


def _from_numpy(module: str, name: str) -> Any:
    core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0b1" else "numpy.core"
    return getattr(importlib.import_module(f"{core}.{module}"), name)


# What numpy and pickle call to rebuild arrays and plain containers, in numpy 1's spelling.
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _from_numpy("multiarray", "_reconstruct"),
    "numpy.core.multiarray.scalar": _from_numpy("multiarray", "scalar"),
    "numpy.core.numeric._frombuffer": _from_numpy("numeric", "_frombuffer"),
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain containers; a file cannot name any other class or function to call."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.", 1)
        if name not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it holds a {module_name}.{global_name}, and only arrays and plain containers are "
                "read, since anything else may run code"
            )
        return _ADMITTED[name]
