"""Weights: where they come from, which pixels they expect, and how they enter a detector.

A file of this project is `{"model": state_dict, "meta": {...}}`, tensors and plain values alone, so
that `torch.load(..., weights_only=True)` reads it: a checkpoint from the internet runs no code.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.backbones import VGGBackbone

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB in [0, 255]
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Weights:
    """A state dict and what is known of it.

    Attributes:
        source: file or name, for messages.
        state: key to tensor, on the CPU.
        meta: `pixel_mean` and `pixel_std` (RGB in [0, 255]), `class_names`, ...; what is unknown is
            not in it.
    """

    source: str
    state: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def is_detector(self) -> bool:
        """Whether these are a whole detector's weights, not a classifier's."""
        return any(key.startswith("roi_heads.") for key in self.state)


def read_weights(source: str) -> Weights:
    """Reads a file, or one of torchvision's weights by its name (`ResNet50_Weights.IMAGENET1K_V2`).

    Raises:
        UserError: the file is missing or is no state dict; the name is unknown; no network.
    """
    if "_Weights." in source and not Path(source).exists():
        return _torchvision_weights(source)
    if not Path(source).is_file():
        raise UserError(
            f"MODEL.WEIGHTS {source} is no file: give a file, one of torchvision's names like "
            "ResNet50_Weights.IMAGENET1K_V2, or '' for random weights"
        )
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"MODEL.WEIGHTS {source} cannot be read as a file of tensors: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    meta: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("meta"), dict):
        meta = content["meta"]
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"MODEL.WEIGHTS {source} holds no state dict (names of tensors)")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    return Weights(source, state, meta)


def _torchvision_weights(name: str) -> Weights:
    try:
        entry = torchvision.models.get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"MODEL.WEIGHTS {name}: torchvision has no such weights") from error
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
            f"MODEL.WEIGHTS {name} cannot be downloaded ({error}): fetch {entry.url} elsewhere and "
            f"put it into {torch.hub.get_dir()}/checkpoints"
        ) from error


def pixel_statistics(
    weights: Weights | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in [0, 255] that the model is to standardise with.

    Args:
        weights: whose statistics rule, or None for random weights.
        mean: as configured; empty = those of the weights, or ImageNet's for random weights.
        std: as configured, likewise.

    Raises:
        UserError: the configured ones are not the weights' own, or nobody knows them.
    """
    own = weights.meta if weights else {}
    if weights and "pixel_mean" in own:
        if mean and not _close([*mean, *std], [*own["pixel_mean"], *own["pixel_std"]]):
            raise UserError(
                f"MODEL.PIXEL_MEAN {list(mean)} and MODEL.PIXEL_STD {list(std)} are not those that "
                f"{weights.source} was trained with, {_short(own['pixel_mean'])} and "
                f"{_short(own['pixel_std'])}: leave both keys out"
            )
        return list(own["pixel_mean"]), list(own["pixel_std"])
    if mean:
        return list(mean), list(std)
    if weights:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} does not say which pixel statistics it was trained "
            "with: set MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (RGB in [0, 255]; torchvision's "
            f"classifiers: {list(IMAGENET_MEAN)} and {list(IMAGENET_STD)})"
        )
    return list(IMAGENET_MEAN), list(IMAGENET_STD)


def input_variance(std: Sequence[float]) -> float:
    """The variance of what a model with these statistics sees, in units of standardised pixels.

    TrAct's `lambda_` is meant for inputs of variance 1 and grows with this number: 1 for ImageNet's
    statistics, about 3,300 for weights of Caffe's kind, with a standard deviation of 1.

    Args:
        std: `MODEL.PIXEL_STD`, of RGB in [0, 255].
    """
    return sum((a / b) ** 2 for a, b in zip(IMAGENET_STD, std, strict=True)) / 3


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) <= 1e-3 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def _short(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]


def _detector_key(key: str, backbone: nn.Module) -> str:
    """The name of a classifier's tensor inside the detector."""
    if isinstance(backbone, VGGBackbone):
        for index, layer in (("0", "fc6"), ("3", "fc7")):
            if key.startswith(f"classifier.{index}."):
                return key.replace(f"classifier.{index}.", f"roi_heads.box_head.{layer}.")
        return f"backbone.{key}"
    return f"backbone.body.{key}"


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were used, which of the model stay random, which of the file were left."""

    used: list[str]
    random: list[str]
    left: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        for what, keys in (("stay random", self.random), ("left", self.left)):
            if keys:
                names = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
                lines.append(f"{len(keys)} {what} ({names})")
        return "; ".join(lines)


def load_into(
    detector: nn.Module, weights: Weights, class_names: Sequence[str], *, strict: bool = False
) -> LoadReport:
    """Copies weights into a detector, in place: a classifier's into its backbone, or a detector's.

    Args:
        detector: as `build_faster_rcnn` makes it.
        weights: a classifier with torchvision's keys, or a detector of this project.
        class_names: the detector's classes. A detector's weights of other classes keep their box
            predictor to themselves.
        strict: every tensor of the model must be in the file (for evaluation).

    Raises:
        UserError: the weights are of another architecture, norm or (strict) other classes.
    """
    state = weights.state
    if not weights.is_detector:
        if strict:
            raise UserError(
                f"MODEL.WEIGHTS {weights.source} is a classifier: --eval-only takes a detector's"
            )
        backbone = detector.get_submodule("backbone")
        state = {_detector_key(key, backbone): tensor for key, tensor in state.items()}
    theirs = weights.meta.get("class_names")
    if weights.is_detector and theirs is not None and list(theirs) != list(class_names):
        if strict:
            raise UserError(
                f"MODEL.WEIGHTS {weights.source} detects {', '.join(theirs)}; the data set's "
                f"classes are {', '.join(class_names)}: set DATASETS.CLASSES or other weights"
            )
        state = {k: v for k, v in state.items() if not k.startswith("roi_heads.box_predictor.")}
    own = detector.state_dict()
    state = {
        key: tensor
        for key, tensor in state.items()
        # VGG16_Weights.IMAGENET1K_FEATURES fills the classifier that it lacks with NaN.
        if not (key.startswith("roi_heads.box_head.") and not tensor.isfinite().all())
    }
    _check_fit(own, state, weights, strict=strict)
    used = {key: tensor for key, tensor in state.items() if key in own}
    detector.load_state_dict(used, strict=False)
    return LoadReport(
        used=list(used),
        random=[key for key in own if key not in used and "num_batches_tracked" not in key],
        left=[key for key in state if key not in own and "num_batches_tracked" not in key],
    )


def _check_fit(
    own: dict[str, Tensor], state: dict[str, Tensor], weights: Weights, *, strict: bool
) -> None:
    statistics = [key for key in state if key.startswith("backbone.") and "running_mean" in key]
    if statistics and not any("running_mean" in key for key in own):
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} was trained with batch norm: set MODEL.BACKBONE.NORM "
            "to BN, FrozenBN or SyncBN"
        )
    needed = [
        key
        for key in own
        if "num_batches_tracked" not in key
        and (strict or key.startswith(("backbone.body.", "backbone.features.")))
    ]
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is not for this model: {len(missing)} of its tensors "
            f"are missing, the first '{missing[0]}'; check MODEL.BACKBONE.NAME and NORM"
        )
    for key, tensor in state.items():
        if key in own and own[key].shape != tensor.shape:
            raise UserError(
                f"MODEL.WEIGHTS {weights.source} is not for this model: '{key}' is "
                f"{tuple(tensor.shape)} there and {tuple(own[key].shape)} here; check "
                "MODEL.BACKBONE.NAME and DATASETS.CLASSES"
            )
