"""Models as a file of weights alone describes them, in its `meta`.

`training.saved` writes the description. Nothing in it is run: it is names to choose from, numbers
and texts, and each is checked.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from tract_det.errors import UserError, shortened
from tract_det.modeling.choices import BACKBONES, CLASSIFIER_NORMS, DETECTOR_NORMS, LOSSES
from tract_det.modeling.detectron2_files import Meta
from tract_det.modeling.faster_rcnn import FasterRCNN, build_faster_rcnn
from tract_det.modeling.heads import BoxHeadOptions, ProposalOptions
from tract_det.modeling.loading import load_matching
from tract_det.modeling.weight_files import Weights

Check = Callable[[Any], bool]

_LARGEST = 1_000_000  # of the counts and sizes below, in any model


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _among(*names: str) -> Check:
    return lambda value: isinstance(value, str) and value in names


def _list_of(check: Check, length: int = 0) -> Check:
    def is_list(value: Any) -> bool:
        is_long = isinstance(value, list | tuple) and 0 < len(value) < 100
        return is_long and all(map(check, value)) and length in (0, len(value))

    return is_list


def _dict_of(checks: Mapping[str, Check]) -> Check:
    def is_dict(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and value.keys() == checks.keys()
            and all(check(value[key]) for key, check in checks.items())
        )

    return is_dict


_COMMON: dict[str, Check] = {
    "class_names": lambda value: len(value) > 0,  # `read_weights` has checked these three
    "freeze_at": lambda value: type(value) is int and -1 <= value <= 100,
    "pixel_mean": lambda value: True,
    "pixel_std": lambda value: True,
    "max_pixels": lambda value: type(value) is int and value > 0,
    "amp": _is_flag,
    "channels_last": _is_flag,
    "batch_size": _is_count,
}
_SIZES: dict[str, Check] = {"min_size": _is_size, "max_size": _is_count}
_DETECTOR: dict[str, Check] = {
    **_COMMON,
    **_SIZES,
    "backbone": _among(*BACKBONES),
    "norm": _among(*DETECTOR_NORMS),
    "fpn_channels": _is_count,
    "proposals": _dict_of(
        {
            "anchor_sizes": _list_of(_is_positive),
            "aspect_ratios": _list_of(_is_positive),
            "pre_nms": _list_of(_is_count, 2),
            "post_nms": _list_of(_is_count, 2),
            "nms_thresh": _is_fraction,
            "batch_size": _is_count,
            "positive_fraction": _is_fraction,
        }
    ),
    "box_head": _dict_of(
        {
            "batch_size": _is_count,
            "positive_fraction": _is_fraction,
            "fc_dim": _is_count,
            "dropout": _is_fraction,
            "score_thresh": _is_fraction,
            "nms_thresh": _is_fraction,
            "detections_per_image": _is_count,
        }
    ),
}
_DETECTRON2: dict[str, Check] = {
    **_COMMON,
    **_SIZES,
    "detectron2": _dict_of(
        {
            "CONFIG_FILE": lambda value: isinstance(value, str),
            "OPTS": lambda value: isinstance(value, list | tuple),
        }
    ),
}
_CLASSIFIER: dict[str, Check] = {
    **_COMMON,
    "model": lambda value: isinstance(value, str),
    "small_images": _is_flag,
    "small_pool": _is_flag,
    "norm": _among(*CLASSIFIER_NORMS),
    "patch_norm": lambda value: isinstance(value, str),
    "width": _is_count,
    "loss": _among(*LOSSES),
    "image_size": _is_count,
    "resize": _is_size,
    "interpolation": _among("bilinear", "bicubic"),
    "standardize": _is_flag,
    "value_range": _is_positive,
}


def is_detectron2(meta: Meta) -> bool:
    """Whether the weights are those of a model that detectron2 builds."""
    return "detectron2" in meta


def check_described(weights: Weights) -> None:
    """Refuses weights whose file does not say all that is needed to use them alone.

    Raises:
        UserError: names what is missing and what to give, or what is malformed.
    """
    meta = weights.meta
    kind = _DETECTRON2 if is_detectron2(meta) else _DETECTOR if weights.is_detector else _CLASSIFIER
    missing = [key for key in kind if key not in meta]
    if missing and "class_names" in missing:
        raise UserError(
            f"{weights.source} does not name its classes: it takes a file that `tract-det train` "
            "or `tract-det pretrain` has saved, such as model_final.pth"
        )
    if missing:
        raise UserError(
            f"{weights.source} was saved by a version whose files lack {', '.join(missing)}: give "
            "the run's config.yaml, which lies beside it, as config_file (--config-file)"
        )
    for key, is_good in kind.items():
        if not is_good(meta[key]):
            raise UserError(
                f"{weights.source}: '{key}' in its metadata is {shortened(repr(meta[key]))}, which "
                "describes no model: the file is damaged or was changed, take the one that the "
                "training has saved"
            )


def detector_of(meta: Meta) -> FasterRCNN:
    """One of torchvision's detectors, with random weights.

    Args:
        meta: `training.saved.detector_settings` with `class_names`, `pixel_mean`, `pixel_std` and
            `freeze_at`.

    Raises:
        UserError: as `build_faster_rcnn`.
    """
    return build_faster_rcnn(
        backbone=meta["backbone"],
        num_classes=len(meta["class_names"]),
        norm=meta["norm"],
        freeze_at=meta["freeze_at"],
        fpn_channels=meta["fpn_channels"],
        pixel_mean=meta["pixel_mean"],
        pixel_std=meta["pixel_std"],
        min_size=meta["min_size"],
        max_size=meta["max_size"],
        proposals=ProposalOptions(**meta["proposals"]),
        box_head=BoxHeadOptions(**meta["box_head"]),
    )


def classifier_of(meta: Meta, **training: Any) -> nn.Module:
    """A classifier with random weights, nothing of it frozen.

    Args:
        meta: `training.saved.classifier_settings` with `class_names` and `pixel_mean`.
        **training: options of `build_classifier` that only a training needs.

    Raises:
        UserError: as `build_classifier`.
    """
    from tract_det.modeling.classifiers import build_classifier  # a detector does not need timm

    return build_classifier(
        meta["model"],
        len(meta["class_names"]),
        small_images=meta["small_images"],
        small_pool=meta["small_pool"],
        norm=meta["norm"],
        patch_norm=meta["patch_norm"],
        image_size=meta["image_size"],
        channels=len(meta["pixel_mean"]),
        width=meta["width"],
        **training,
    )


def load_saved(weights: Weights) -> nn.Module:
    """The model that the weights' own file describes, with its weights, in evaluation mode.

    The random state stays as it was. Batch norms that were synchronised over ranks are plain ones:
    in evaluation they compute the same.

    Args:
        weights: described in full; see `check_described`.

    Raises:
        UserError: the tensors are not those of the model that the file describes.
    """
    meta = weights.meta
    if meta["norm"] == "SyncBN":
        meta = {**meta, "norm": "BN"}
    build = _frozen_detector if weights.is_detector else _frozen_classifier
    with torch.random.fork_rng(devices=[]):
        # Without memory at first, since a damaged description may ask for any amount of it. The few
        # models that compute something when they are built cannot be built so.
        with torch.device("meta"), suppress(RuntimeError):
            _check_tensors(build(meta), weights)
        model = build(meta)
    _check_tensors(model, weights)
    load_matching(model, model.state_dict(), weights.state)
    return model.eval()


def _frozen_detector(meta: Meta) -> nn.Module:
    return detector_of(meta)


def _frozen_classifier(meta: Meta) -> nn.Module:
    from tract_det.modeling.freezing import freeze_stages

    model = classifier_of(meta)
    # Frozen batch norms compute the same in another order.
    freeze_stages(model, meta["freeze_at"], meta["model"])
    return model


def _check_tensors(model: nn.Module, weights: Weights) -> None:
    shapes = {k: v.shape for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    state = {k: v for k, v in weights.state.items() if "num_batches_tracked" not in k}
    for key in dict.fromkeys([*shapes, *state]):
        if key not in state or key not in shapes or state[key].shape != shapes[key]:
            raise UserError(
                f"{weights.source}: its tensor '{shortened(key)}' is not that of the model that "
                "its metadata describes: take the file that the training has saved"
            )
        if not state[key].isfinite().all():
            raise UserError(
                f"{weights.source}: '{key}' has values that are not finite: the training that "
                "wrote the file has diverged, or it is damaged"
            )
