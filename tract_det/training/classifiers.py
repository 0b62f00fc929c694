"""Classifiers as the config describes them, with their loss and weights."""

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det.errors import UserError
from tract_det.modeling.classification_loss import ClassifierWithLoss
from tract_det.modeling.classifiers import check_image_size
from tract_det.modeling.freezing import freeze_stages
from tract_det.modeling.loading import load_into_classifier
from tract_det.modeling.saved import classifier_of
from tract_det.modeling.weight_files import Weights
from tract_det.pixels import DATA_STD, IMAGENET_STD, input_variance, pixel_statistics
from tract_det.training import assembly
from tract_det.training.saved import classifier_settings, refuse_another_model
from tract_det.training.task import BuiltModel
from tract_det.version import __version__


def _pixel_statistics(cfg: CfgNode, weights: Weights | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation in [0, 255] that take the pixels to what the model sees.

    Without standardisation, those that take them to [0, VALUE_RANGE].
    """
    known = weights.meta if weights else None
    source = weights.source if weights else ""
    if cfg.MODEL.STANDARDIZE:
        return pixel_statistics(known, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, source=source)
    mean, std = [0.0] * 3, [255.0 / cfg.MODEL.VALUE_RANGE] * 3
    try:
        return pixel_statistics(known, mean, std, source=source)
    except UserError:
        raise UserError(
            f"MODEL.WEIGHTS {source} was trained with other pixels than MODEL.STANDARDIZE False "
            f"with MODEL.VALUE_RANGE {cfg.MODEL.VALUE_RANGE:g} gives: leave both keys out"
        ) from None


def build_classifier(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> BuiltModel:
    """The classifier with its loss and weights; see `task.Task.build_model`."""
    settings = cfg.MODEL
    mean, std = _pixel_statistics(cfg, weights)
    said = classifier_settings(cfg)
    if strict and weights is not None:
        refuse_another_model(weights, said)
    model = classifier_of(
        said | {"class_names": class_names, "pixel_mean": mean},
        drop_rate=settings.DROP_RATE,
        drop_path_rate=settings.DROP_PATH_RATE,
        checkpointing=settings.CHECKPOINTING,
    )
    check_image_size(model, settings.NAME, cfg.INPUT.SIZE, len(mean))
    stages = max(0, assembly.freeze_at(cfg, weights, strict=strict, default=0))
    freeze_stages(model, stages, settings.NAME)
    report = load_into_classifier(model, weights, class_names, strict=strict) if weights else None
    meta = {
        "version": __version__,
        **said,
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "pixel_mean": mean,
        "pixel_std": std,
        "freeze_at": stages,
    }
    return BuiltModel(
        _with_loss(cfg, model),
        meta,
        _stem_variance(cfg, std),
        report,
        inner="model",
        memory_format=memory_format(cfg),
        compile=model.compile if settings.COMPILE else None,
    )


def _stem_variance(cfg: CfgNode, std: Sequence[float]) -> float:
    """The variance of what the stem sees, in units of pixels that the data standardise."""
    if cfg.MODEL.PATCH_NORM:
        return 1.0
    return input_variance(std, DATA_STD.get(cfg.DATASETS.NAME, IMAGENET_STD))


def _with_loss(cfg: CfgNode, model: nn.Module) -> ClassifierWithLoss:
    is_bce = cfg.MODEL.LOSS == "bce"
    # Mixed targets are smooth already, except those that the loss turns into 1 and 0.
    smoothing = 0.0 if is_mixed(cfg) and not is_bce else cfg.MIX.SMOOTHING
    return ClassifierWithLoss(model, smoothing=smoothing, bce=is_bce)


def is_mixed(cfg: CfgNode) -> bool:
    """Whether batches are mixed by mixup or CutMix."""
    return cfg.MIX.PROB > 0 and (cfg.MIX.MIXUP_ALPHA > 0 or cfg.MIX.CUTMIX_ALPHA > 0)


def memory_format(cfg: CfgNode) -> torch.memory_format:
    """Of the images and the weights."""
    return torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.preserve_format
