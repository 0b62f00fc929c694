"""Weights: where they come from, which pixels they expect, and how they enter a model.

A file of this project is `{"model": state_dict, "meta": {...}}`, tensors and plain values alone, so
that `torch.load(..., weights_only=True)` reads it: a checkpoint from the internet runs no code.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from tract_det.errors import UserError
from tract_det.modeling import convert
from tract_det.modeling.backbones import VGGBackbone

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB in [0, 255]
IMAGENET_STD = (58.395, 57.12, 57.375)

State = dict[str, Tensor]


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


def read_weights(
    source: str, *, key: str = "MODEL.WEIGHTS", channels: str = "", stride_in_3x3: bool = False
) -> Weights:
    """Reads a file, or one of torchvision's weights by its name (`ResNet50_Weights.IMAGENET1K_V2`).

    Files are torch's, `.safetensors`, and detectron2's `.pkl`: the latter as torchvision names its
    tensors, for RGB.

    Args:
        source: the file or name.
        key: where the user gave it, for messages.
        channels: as in `convert.read_detectron2`.
        stride_in_3x3: as there.

    Raises:
        UserError: the file is missing, is no state dict, or would run code; the name is unknown;
            no network.
    """
    path, what = Path(source), f"{key} {source}"
    if "_Weights." in source and not path.exists():
        return _torchvision_weights(source, key)
    if not path.is_file():
        raise UserError(
            f"{what} is no file: give a file, or one of torchvision's names like "
            "ResNet50_Weights.IMAGENET1K_V2"
        )
    if convert.is_detectron2(path):
        state, meta = convert.read_detectron2(
            path, what, channels=channels, stride_in_3x3=stride_in_3x3
        )
        return Weights(source, state, meta)
    if path.suffix == ".safetensors":
        return Weights(source, *convert.read_safetensors(path, what))
    content, meta = convert.read_torch(path, what)
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"{what} holds no state dict (names of tensors)")
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    return Weights(source, state, meta)


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
        if mean and not same_statistics([*mean, *std], [*own["pixel_mean"], *own["pixel_std"]]):
            raise UserError(
                f"MODEL.PIXEL_MEAN {list(mean)} and MODEL.PIXEL_STD {list(std)} are not those that "
                f"{weights.source} was trained with, {rounded(own['pixel_mean'])} and "
                f"{rounded(own['pixel_std'])}: leave both keys out"
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


def same_statistics(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether pixel statistics are the same but for how many digits were written down."""
    return all(abs(x - y) <= 1e-3 * max(1.0, abs(y)) for x, y in zip(a, b, strict=True))


def rounded(values: Sequence[float]) -> list[float]:
    """For messages."""
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
    """Which tensors were used, which of the model stay random, which of the file were left.

    Attributes:
        resampled: those of the used ones that were fitted to another image size.
    """

    used: list[str]
    random: list[str]
    left: list[str]
    resampled: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        for what, keys in (
            ("stay random", self.random),
            ("left", self.left),
            ("resampled", self.resampled),
        ):
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
        weights: a ResNet or VGG with torchvision's keys, or timm's; or a detector of this project.
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
        state = convert.to_torchvision(state)
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
    _check_norm(own, state, weights, "MODEL.BACKBONE.NORM to BN, FrozenBN or SyncBN")
    _check_stem(own, state, weights)
    needed = [
        key for key in own if strict or key.startswith(("backbone.body.", "backbone.features."))
    ]
    _check_fit(
        own,
        state,
        weights,
        needed,
        missing="MODEL.BACKBONE.NAME and NORM",
        shape="MODEL.BACKBONE.NAME and DATASETS.CLASSES",
    )
    return load_matching(detector, own, state)


def load_matching(
    model: nn.Module, own: State, state: State, resampled: Sequence[str] = ()
) -> LoadReport:
    """Copies the tensors whose keys are in `own`, the model's state dict, in place."""
    used = {key: tensor for key, tensor in state.items() if key in own}
    model.load_state_dict(used, strict=False)
    return LoadReport(
        used=list(used),
        random=[key for key in own if key not in used and _counts(key)],
        left=[key for key in state if key not in own and _counts(key)],
        resampled=resampled,
    )


def _counts(key: str) -> bool:
    return "num_batches_tracked" not in key


def _check_norm(own: State, state: State, weights: Weights, mend: str) -> None:
    theirs = [key for key in state if "running_mean" in key and not key.startswith("rpn.")]
    if theirs and not any("running_mean" in key for key in own):
        raise UserError(f"MODEL.WEIGHTS {weights.source} was trained with batch norm: set {mend}")


def _check_stem(own: State, state: State, weights: Weights) -> None:
    key = "backbone.body.conv1.weight"
    if key in own and key in state and state[key].shape[-1] < own[key].shape[-1]:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a ResNet for small images, with a 3x3 stem and no "
            "pooling (MODEL.SMALL_IMAGES True); the detector's MODEL.BACKBONE.NAME has a 7x7 stem: "
            "pretrain with MODEL.SMALL_IMAGES False and larger images (INPUT.SIZE 64)"
        )


def _check_fit(
    own: State, state: State, weights: Weights, needed: Sequence[str], *, missing: str, shape: str
) -> None:
    """Refuses weights that lack `needed` tensors or have other shapes; names the keys to check."""
    absent = [key for key in needed if key not in state and _counts(key)]
    if absent:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is not for this model: {len(absent)} of its tensors "
            f"are missing, the first '{absent[0]}'; check {missing}"
        )
    for key, tensor in state.items():
        if key in own and own[key].shape != tensor.shape:
            raise UserError(
                f"MODEL.WEIGHTS {weights.source} is not for this model: '{key}' is "
                f"{tuple(tensor.shape)} there and {tuple(own[key].shape)} here; check {shape}"
            )


def _heads(model: nn.Module) -> list[str]:
    """The names of the layers that give the logits."""
    config = getattr(model, "pretrained_cfg", None)  # timm's
    named = config.get("classifier") if isinstance(config, Mapping) else None
    if named:
        return [named] if isinstance(named, str) else list(named)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1:]


def load_into_classifier(
    model: nn.Module, weights: Weights, class_names: Sequence[str] = (), *, strict: bool = False
) -> LoadReport:
    """Copies a classifier's weights into a classifier, in place.

    Position embeddings of another image size are resampled, as timm and torchvision do it.

    Args:
        model: as `build_classifier` makes it.
        weights: of the same architecture, by torchvision's keys or timm's.
        class_names: of the data set; weights of others leave the head random.
        strict: every tensor of the model must be in the file (for evaluation).

    Raises:
        UserError: the weights are a detector's, of another architecture, or (strict) other classes.
    """
    if weights.is_detector:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a whole detector: give a classifier's weights"
        )
    own = model.state_dict()
    state = convert.to_torchvision(weights.state)
    if "pre_logits.fc1.weight" in own:
        state = convert.to_timm(state)
    heads = _heads(model)
    in_head = tuple(f"{head}." for head in heads)
    if _other_classes(own, state, weights, class_names, in_head):
        if strict:
            theirs = weights.meta.get("class_names") or []
            raise UserError(
                f"MODEL.WEIGHTS {weights.source} knows other classes than the data set's "
                f"{len(class_names)} ({', '.join(class_names[:3])}, ...): "
                f"{', '.join(theirs[:3]) or 'of another number'}, ...: set DATASETS.ROOT or other "
                "weights"
            )
        state = {key: tensor for key, tensor in state.items() if not key.startswith(in_head)}
    _check_norm(own, state, weights, "MODEL.NORM to BN or SyncBN")
    state, resampled = _fit_positions(model, own, state)
    tops = tuple(f"{head.split('.')[0]}." for head in heads)  # a VGG's fc6 and fc7 are in it
    needed = [key for key in own if strict or not key.startswith(tops)]
    what = "MODEL.NAME, SMALL_IMAGES, NORM, PATCH_NORM and WIDTH"
    _check_fit(own, state, weights, needed, missing=what, shape=f"{what}, and INPUT.SIZE")
    return load_matching(model, own, state, resampled)


def _other_classes(
    own: State, state: State, weights: Weights, class_names: Sequence[str], in_head: tuple[str, ...]
) -> bool:
    theirs = weights.meta.get("class_names")
    if theirs and class_names:
        return list(theirs) != list(class_names)
    shared = [key for key in state if key.startswith(in_head) and key in own]
    return any(len(state[key]) != len(own[key]) for key in shared)


def _fit_positions(model: nn.Module, own: State, state: State) -> tuple[State, list[str]]:
    """The state with a ViT's position embeddings for the model's image size, and their keys."""
    key = "encoder.pos_embedding" if isinstance(model, VisionTransformer) else "pos_embed"
    old, new = state.get(key), own.get(key)
    if old is None or new is None or old.shape == new.shape or old.shape[-1] != new.shape[-1]:
        return state, []
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if isinstance(model, VisionTransformer):
        whole = OrderedDict(state)
        size, patch = model.image_size, model.patch_size
        return dict(interpolate_embeddings(size, patch, whole)), [key]
    prefix = (
        0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    )
    if (
        grid is None
        or old.dim() != 3
        or math.isqrt(old.shape[1] - prefix) ** 2 + prefix != old.shape[1]
    ):
        return state, []
    from timm.layers import resample_abs_pos_embed  # not needed for a detector

    fitted = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)
    return {**state, key: fitted}, [key]
