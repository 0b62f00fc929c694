"""Detectors as the config describes them: torchvision's Faster R-CNN, or a model of detectron2."""

import dataclasses
import importlib
import logging
import warnings
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det.config.machinery import plain
from tract_det.errors import UserError
from tract_det.modeling.backbones import batch_in_channels_last
from tract_det.modeling.channels import widens
from tract_det.modeling.loading import load_into
from tract_det.modeling.saved import detector_of
from tract_det.modeling.weight_files import Weights, read_weights
from tract_det.pixels import input_variance, pixel_statistics
from tract_det.tract import TrActLayer
from tract_det.training.assembly import freeze_at
from tract_det.training.saved import (
    detector_settings,
    evaluation_settings,
    refuse_another_model,
)
from tract_det.training.task import BuiltModel
from tract_det.version import __version__

# Stages that a training from weights freezes by default: detectron2's default, and none of ours
# where detectron2's own file decides.
_FROZEN_STAGES, _AS_ITS_FILE_SAYS = 2, -1


def check_backend(cfg: CfgNode) -> None:
    """Refuses a detectron2 model where detectron2 is not installed.

    Raises:
        UserError: naming the key.
    """
    if cfg.MODEL.DETECTRON2.CONFIG_FILE:
        _detectron2_side("config_models")


def _detectron2_side(module: str) -> Any:
    """A module of `tract_det.d2`.

    Raises:
        UserError: detectron2 is not installed.
    """
    # Warnings that a newer torch gives about detectron2's sources; only detectron2 can mend them.
    for message in ("torch.meshgrid: in an upcoming", "`torch.jit.script` is deprecated"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"tract_det.d2.{module}")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise UserError(f"MODEL.DETECTRON2.CONFIG_FILE: {error}") from error


def read_detector_weights(cfg: CfgNode) -> Weights | None:
    """MODEL.WEIGHTS; None where it is empty."""
    if not cfg.MODEL.WEIGHTS:
        return None
    if cfg.MODEL.DETECTRON2.CONFIG_FILE:
        return _detectron2_side("weights").read(cfg.MODEL.WEIGHTS)
    return read_weights(cfg.MODEL.WEIGHTS)


def build_detector(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> BuiltModel:
    """The detector with its weights; see `task.Task.build_model`."""
    build = _build_detectron2 if cfg.MODEL.DETECTRON2.CONFIG_FILE else _build_torchvision
    built = build(cfg, weights, class_names, strict)
    backbone = built.model.get_submodule("backbone")
    if cfg.MODEL.CHANNELS_LAST:
        backbone.register_forward_pre_hook(batch_in_channels_last)
        built = dataclasses.replace(built, memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE:
        built = dataclasses.replace(built, compile=partial(_compile_backbone, backbone))
    return built


def _compile_backbone(backbone: nn.Module) -> None:
    """Compiles all but TrAct's layer, in place.

    That layer knows the sizes of a batch's images, which would be constants of the compiled code.
    """
    for module in backbone.modules():
        if isinstance(module, TrActLayer):
            module.forward = torch.compiler.disable(module.forward)
    backbone.compile()


def _build_torchvision(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> BuiltModel:
    if weights is not None and "detectron2" in weights.meta:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a detectron2 model's: set MODEL.DETECTRON2 as in "
            f"its training, CONFIG_FILE {weights.meta['detectron2'].get('CONFIG_FILE')}"
        )
    settings = detector_settings(cfg)
    if strict and weights is not None:
        refuse_another_model(weights, settings)
    mean, std = pixel_statistics(
        weights.meta if weights else None,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.PIXEL_STD,
        source=weights.source if weights else "",
    )
    # Filters of channels that the weights do not know have to learn.
    default = 0 if weights and widens(weights, len(mean)) else _FROZEN_STAGES
    stages = max(0, freeze_at(cfg, weights, strict=strict, default=default))
    meta = {
        "version": __version__,
        **settings,
        "freeze_at": stages,
        "pixel_mean": mean,
        "pixel_std": std,
        "aspect_ratios": list(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS),
        "class_names": list(class_names),
    }
    model = detector_of(meta)
    report = load_into(model, weights, class_names, strict=strict) if weights else None
    return BuiltModel(model, meta, input_variance(std), report)


def _build_detectron2(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> BuiltModel:
    files = _detectron2_side("weights")
    settings = plain(cfg.MODEL.DETECTRON2)
    stages = freeze_at(cfg, weights, strict=strict, default=_AS_ITS_FILE_SAYS)
    model = _detectron2_side("config_models").build_detector(
        settings["CONFIG_FILE"],
        settings["OPTS"],
        num_classes=len(class_names),
        freeze_at=None if stages == _AS_ITS_FILE_SAYS else stages,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
    )
    statistics = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    report = None
    if weights is not None:
        report = files.load_into(model, weights, class_names, **statistics, strict=strict)
    elif cfg.MODEL.PIXEL_MEAN:
        whose = "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are"
        files.check_pixels(files.meta_of(model), *statistics.values(), whose)
    meta = {
        "version": __version__,
        **evaluation_settings(cfg),
        "detectron2": settings,
        "freeze_at": stages,
        **files.meta_of(model),
        "class_names": list(class_names),
    }
    return BuiltModel(model, meta, input_variance(meta["pixel_std"]), report)
