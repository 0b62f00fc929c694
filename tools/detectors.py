"""The detectors of `train_net.py`: torchvision's and detectron2's, as the config describes them."""

import importlib
import logging
import warnings
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn
from tract_det.tools.common import plain, put_tract, say_loaded

from tract_det import __version__
from tract_det.errors import UserError
from tract_det.modeling.faster_rcnn import build_faster_rcnn
from tract_det.modeling.heads import BoxHeadOptions, ProposalOptions
from tract_det.modeling.loading import LoadReport, load_into
from tract_det.modeling.weight_files import Weights, read_weights
from tract_det.pixels import input_variance, pixel_statistics

Built = tuple[nn.Module, dict[str, Any], LoadReport | None]


def detectron2_side() -> Any:
    """`tract_det.d2`.

    Raises:
        UserError: detectron2 is not installed.
    """
    # What a newer torch says of detectron2's sources, each to be mended there.
    for message in ("torch.meshgrid: in an upcoming", "`torch.jit.script` is deprecated"):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        return importlib.import_module("tract_det.d2")
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise UserError(f"MODEL.DETECTRON2.CONFIG_FILE: {error}") from error


def read_model_weights(cfg: CfgNode) -> Weights | None:
    """MODEL.WEIGHTS, or None where there are none."""
    # Asked for first: without detectron2 nothing else matters.
    read = detectron2_side().read_weights if cfg.MODEL.DETECTRON2.CONFIG_FILE else read_weights
    return read(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None


def freeze_at(cfg: CfgNode, weights: Weights | None, *, strict: bool) -> int:
    """`MODEL.BACKBONE.FREEZE_AT`, chosen where it is -1.

    Frozen batch norms compute the same in another order. For evaluation they are those of the
    training, so that the figures are the same to the last bit.
    """
    if strict and weights:
        return weights.meta.get("freeze_at", 0)
    if cfg.MODEL.BACKBONE.FREEZE_AT >= 0:
        return cfg.MODEL.BACKBONE.FREEZE_AT
    return 0 if cfg.MODEL.TRACT.ENABLED or not weights else 2


def build_model(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], *, strict: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The detector with its weights and TrAct, and what is to be saved with it."""
    build = _detectron2s if cfg.MODEL.DETECTRON2.CONFIG_FILE else _torchvisions
    model, meta, report = build(cfg, weights, class_names, strict)
    if weights is not None:
        say_loaded(cfg, weights.source, report, strict=strict)
    if not strict:
        put_tract(cfg, model, input_variance(meta["pixel_std"]))
    return model, {"version": __version__, **meta, "class_names": list(class_names)}


def _torchvisions(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> Built:
    if weights is not None and "detectron2" in weights.meta:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is a detectron2 model's: set MODEL.DETECTRON2 as in "
            f"its training, CONFIG_FILE {weights.meta['detectron2'].get('CONFIG_FILE')}"
        )
    known, source = (weights.meta, weights.source) if weights else (None, "")
    mean, std = pixel_statistics(known, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, source=source)
    rpn, roi = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    frozen = freeze_at(cfg, weights, strict=strict)
    model = build_faster_rcnn(
        backbone=cfg.MODEL.BACKBONE.NAME,
        num_classes=len(class_names),
        norm=cfg.MODEL.BACKBONE.NORM,
        freeze_at=frozen,
        fpn_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        pixel_mean=mean,
        pixel_std=std,
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
        proposals=ProposalOptions(
            anchor_sizes=cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            aspect_ratios=cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            pre_nms=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            post_nms=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            nms_thresh=rpn.NMS_THRESH,
            batch_size=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
        ),
        box_head=BoxHeadOptions(
            batch_size=roi.BATCH_SIZE_PER_IMAGE,
            positive_fraction=roi.POSITIVE_FRACTION,
            fc_dim=cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
            dropout=cfg.MODEL.ROI_BOX_HEAD.DROPOUT,
            score_thresh=roi.SCORE_THRESH_TEST,
            nms_thresh=roi.NMS_THRESH_TEST,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        ),
    )
    report = load_into(model, weights, class_names, strict=strict) if weights else None
    meta = {
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "norm": cfg.MODEL.BACKBONE.NORM,
        "freeze_at": frozen,
        "pixel_mean": mean,
        "pixel_std": std,
    }
    return model, meta, report


def _detectron2s(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], strict: bool
) -> Built:
    d2 = detectron2_side()
    given = plain(cfg.MODEL.DETECTRON2)
    frozen = cfg.MODEL.BACKBONE.FREEZE_AT
    if strict and weights:
        frozen = weights.meta.get("freeze_at", frozen)
    elif frozen < 0 and (cfg.MODEL.TRACT.ENABLED or not weights):
        frozen = 0
    model = d2.build_detector(
        given["CONFIG_FILE"],
        given["OPTS"],
        num_classes=len(class_names),
        freeze_at=frozen if frozen >= 0 else None,  # else what its file says
        min_size=cfg.INPUT.MIN_SIZE_TEST,
        max_size=cfg.INPUT.MAX_SIZE_TEST,
    )
    statistics = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    report = None
    if weights is not None:
        report = d2.load_into(model, weights, class_names, **statistics, strict=strict)
    elif cfg.MODEL.PIXEL_MEAN:
        d2.check_pixels(model, *statistics.values(), "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are")
    return model, {"detectron2": given, "freeze_at": frozen, **d2.meta_of(model)}, report
