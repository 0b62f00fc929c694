"""What a file of weights says of its model, so that nothing else is needed to use it.

`modeling.saved` makes the model of it again.
"""

import importlib
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.errors import UserError
from tract_det.modeling.weight_files import Weights
from tract_det.training.task import Meta

# Settings that change what a model computes and the shape of none of its tensors, in a file's
# words, with the keys that set them.
_UNSEEN_IN_SHAPES = {
    ("model",): "MODEL.NAME",
    ("small_images",): "MODEL.SMALL_IMAGES",
    ("small_pool",): "MODEL.SMALL_POOL",
    ("patch_norm",): "MODEL.PATCH_NORM",
    ("backbone",): "MODEL.BACKBONE.NAME",
    ("proposals", "anchor_sizes"): "MODEL.ANCHOR_GENERATOR.SIZES",
    ("proposals", "aspect_ratios"): "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
}


def refuse_another_model(weights: Weights, settings: Meta) -> None:
    """Refuses to evaluate weights as a model that they do not belong to.

    They might load, and the figures would be wrong without a word. Files of other programs and of
    earlier versions do not say what they belong to.

    Args:
        weights: as read.
        settings: what the configuration says, as `detector_settings` or `classifier_settings`.

    Raises:
        UserError: names the keys and what to set them to.
    """
    mends = []
    for path, key in _UNSEEN_IN_SHAPES.items():
        trained, now = _at(weights.meta, path), _at(settings, path)
        if trained is not None and now is not None and trained != now:
            mends.append(f"{key} is {now!r}, and it was trained with {trained!r}")
    if mends:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is another model than the configuration's: "
            f"{'; '.join(mends)}: evaluate it with the configuration of its training"
        )


def _at(settings: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        settings = settings.get(name) if isinstance(settings, dict) else None
    return list(settings) if isinstance(settings, tuple) else settings


def evaluation_settings(cfg: CfgNode) -> Meta:
    """How the model is evaluated, whichever library it comes from."""
    settings = {
        "max_pixels": cfg.INPUT.MAX_PIXELS,
        "amp": cfg.SOLVER.AMP.ENABLED,
        "channels_last": cfg.MODEL.CHANNELS_LAST,
        "batch_size": cfg.TEST.IMS_PER_BATCH,
    }
    if "MIN_SIZE_TEST" in cfg.INPUT:
        settings |= {"min_size": cfg.INPUT.MIN_SIZE_TEST, "max_size": cfg.INPUT.MAX_SIZE_TEST}
    return settings


def detector_settings(cfg: CfgNode) -> Meta:
    """What the configuration alone says of one of torchvision's detectors."""
    anchors, rpn, roi = cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    return {
        **evaluation_settings(cfg),
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "norm": cfg.MODEL.BACKBONE.NORM,
        "fpn_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "proposals": {
            "anchor_sizes": list(anchors.SIZES),
            "aspect_ratios": list(anchors.ASPECT_RATIOS),
            "pre_nms": [rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST],
            "post_nms": [rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST],
            "nms_thresh": rpn.NMS_THRESH,
            "batch_size": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
        },
        "box_head": {
            "batch_size": roi.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": roi.POSITIVE_FRACTION,
            "fc_dim": cfg.MODEL.ROI_BOX_HEAD.FC_DIM,
            "dropout": cfg.MODEL.ROI_BOX_HEAD.DROPOUT,
            "score_thresh": roi.SCORE_THRESH_TEST,
            "nms_thresh": roi.NMS_THRESH_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        },
    }


def classifier_settings(cfg: CfgNode) -> Meta:
    """What the configuration alone says of a classifier."""
    model, size, resize = cfg.MODEL, cfg.INPUT.SIZE, cfg.INPUT.RESIZE_TEST
    return {
        **evaluation_settings(cfg),
        "model": model.NAME,
        "small_images": model.SMALL_IMAGES,
        "small_pool": model.SMALL_POOL,
        "norm": model.NORM,
        "patch_norm": model.PATCH_NORM,
        "width": model.WIDTH,
        "loss": model.LOSS,
        "image_size": size,
        "resize": round(size * 256 / 224) if resize == -1 else resize,
        "interpolation": cfg.INPUT.INTERPOLATION,
        "standardize": model.STANDARDIZE,
        "value_range": model.VALUE_RANGE,
    }


def settings_in(config_file: Path, task: str) -> Meta:
    """What a run's `config.yaml` says of its model.

    Args:
        config_file: the file.
        task: "detection" or "classification".

    Raises:
        UserError: it is not a configuration of the task.
    """
    cfg = importlib.import_module(f"tract_det.config.{task}").load_cfg(str(config_file))
    if task == "classification":
        return classifier_settings(cfg)
    settings: dict[str, Any] = dict(cfg.MODEL.DETECTRON2)
    if settings["CONFIG_FILE"]:
        return {**evaluation_settings(cfg), "detectron2": settings}
    return detector_settings(cfg)
