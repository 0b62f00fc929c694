"""The configuration of `tools/train_net.py`, a detector's.

No other module of the package reads a `cfg`: the tools take it apart into plain arguments. A
classifier's keys are in `config_classification.py`, what both share in `config_common.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config_common import (
    check_common,
    load,
    one_of,
    require,
    solver_keys,
    tract_keys,
    with_run_keys,
)
from tract_det.evaluation.metrics import METRICS
from tract_det.evaluation.voc_ap import RULES
from tract_det.modeling.choices import BACKBONES, DETECTOR_NORMS


def _model() -> CfgNode:
    return CfgNode(
        {
            # "" = from scratch; "ResNet50_Weights.IMAGENET1K_V2"; or a file: a classifier's state
            # dict with torchvision's keys, or this project's own model_final.pth.
            "WEIGHTS": "",
            "DEVICE": "",  # "" = cuda where there is one, else cpu
            # RGB, in units of [0, 255]. [] = those the weights were trained with; ImageNet's
            # where there are no weights. Others than the weights' own are refused.
            "PIXEL_MEAN": [],
            "PIXEL_STD": [],
            "BACKBONE": {
                "NAME": "resnet50_fpn",
                "NORM": "BN",
                # 0: nothing is frozen, 1: stem, 2: stem and first stage, ...; -1: 0 where TrAct is
                # on or the weights are random, else 2 (detectron2's default).
                "FREEZE_AT": -1,
            },
            # A model of detectron2's in the place of torchvision's: the keys that describe that one
            # (NORM, FPN, ANCHOR_GENERATOR, RPN, ROI_HEADS, ROI_BOX_HEAD) stay as they are here.
            "DETECTRON2": {
                # Its configuration: a file, or a name of its model zoo's; .yaml or LazyConfig .py.
                "CONFIG_FILE": "",
                "OPTS": [],  # [KEY, VALUE, ...] for it; of a .py [key=value, ...] below `model`
            },
            "FPN": {"OUT_CHANNELS": 256},
            "TRACT": tract_keys(),
            "ANCHOR_GENERATOR": {
                # One scale a level for an FPN, all scales on the one level of a VGG. In pixels.
                "SIZES": [32, 64, 128, 256, 512],
                "ASPECT_RATIOS": [0.5, 1.0, 2.0],
            },
            "RPN": {
                "PRE_NMS_TOPK_TRAIN": 2000,
                "PRE_NMS_TOPK_TEST": 1000,
                "POST_NMS_TOPK_TRAIN": 2000,
                "POST_NMS_TOPK_TEST": 1000,
                "NMS_THRESH": 0.7,
                "BATCH_SIZE_PER_IMAGE": 256,
                "POSITIVE_FRACTION": 0.5,
            },
            "ROI_HEADS": {
                "BATCH_SIZE_PER_IMAGE": 512,
                "POSITIVE_FRACTION": 0.25,
                "SCORE_THRESH_TEST": 0.05,
                "NMS_THRESH_TEST": 0.5,
            },
            "ROI_BOX_HEAD": {"FC_DIM": 1024, "DROPOUT": 0.5},  # FPN's width; VGG's dropout
        }
    )


def _data() -> dict[str, Any]:
    return {
        "INPUT": {
            "MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
            "MAX_SIZE_TRAIN": 1333,
            "MIN_SIZE_TEST": 800,
            "MAX_SIZE_TEST": 1333,
            "FLIP_PROB": 0.5,
            "COLOR_JITTER": 0.0,
        },
        "DATASETS": {
            # voc_2007_trainval, voc_2012_train, ...; shapes_train (drawn on first use); or the
            # name of a split file of the tree at ROOT.
            "TRAIN": ["shapes_train"],
            "TEST": ["shapes_test"],
            "ROOT": "",  # "" = $DETECTRON2_DATASETS, else ./datasets
            "CLASSES": [],  # [] = VOC's twenty, or the classes found in the training split
        },
        "DATALOADER": {
            "NUM_WORKERS": 2,
            "ASPECT_RATIO_GROUPING": True,
            "FILTER_EMPTY_ANNOTATIONS": False,
            "USE_DIFFICULT": True,  # train on objects marked difficult, as detectron2 does
        },
    }


def _solver() -> dict[str, Any]:
    return {
        "SOLVER": {
            **solver_keys(),
            "IMS_PER_BATCH": 16,  # images a step, over all ranks and micro-batches
            "BASE_LR": 0.02,
            "WEIGHT_DECAY_BIAS": 1e-4,
            "MAX_ITER": 18000,
            "STEPS": [12000, 16000],
            "WARMUP_ITERS": 100,
            "CHECKPOINT_PERIOD": 5000,
        },
        "TEST": {
            "EVAL_PERIOD": 0,  # 0: at the end alone
            "IMS_PER_BATCH": 1,
            "DETECTIONS_PER_IMAGE": 100,
            "VOC_RULE": "devkit",  # or detectron2
            "BEST_METRIC": "voc_area.mAP",
        },
    }


def get_cfg() -> CfgNode:
    """The defaults, every key with its meaning beside it in this file's source."""
    cfg = CfgNode({**_data(), **_solver()})
    cfg.MODEL = _model()
    return with_run_keys(cfg)


def load_cfg(config_file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file with its bases, then `KEY VALUE` pairs; validated and frozen.

    Raises:
        UserError: naming the file or key, for an unknown key, a value of the wrong type, a value
            out of range or a contradiction.
    """
    return load(get_cfg(), validate, config_file, overrides)


def validate(cfg: CfgNode) -> None:
    """Refuses values out of range and contradictions, naming the key."""
    model, solver = cfg.MODEL, cfg.SOLVER
    check_common(cfg)
    one_of(cfg, "MODEL.BACKBONE.NAME", BACKBONES)
    one_of(cfg, "MODEL.BACKBONE.NORM", DETECTOR_NORMS)
    one_of(cfg, "TEST.VOC_RULE", RULES)
    one_of(cfg, "TEST.BEST_METRIC", METRICS)
    for key in ("TRAIN", "TEST", "CLASSES"):
        words = [word for word in cfg.DATASETS[key] if not isinstance(word, str)]
        require(not words, f"DATASETS.{key} takes names, not {words}: quote them")
    for part, sizes in (("TRAIN", cfg.INPUT.MIN_SIZE_TRAIN), ("TEST", [cfg.INPUT.MIN_SIZE_TEST])):
        largest = cfg.INPUT[f"MAX_SIZE_{part}"]
        for size in sizes:
            require(
                0 <= size <= largest,
                f"INPUT.MIN_SIZE_{part} {size}: it takes 0 to INPUT.MAX_SIZE_{part} {largest}",
            )
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        require(solver[key] > 0, f"SOLVER.{key} is {solver[key]}: it must be positive")
    require(bool(cfg.DATASETS.TEST), "DATASETS.TEST is empty: name a split to evaluate on")
    require(
        -1 <= model.BACKBONE.FREEZE_AT <= 5,
        f"MODEL.BACKBONE.FREEZE_AT is {model.BACKBONE.FREEZE_AT}: it takes 0 to 5, or -1 to choose",
    )
    require(
        not (model.TRACT.ENABLED and model.BACKBONE.FREEZE_AT > 0),
        f"MODEL.BACKBONE.FREEZE_AT {model.BACKBONE.FREEZE_AT} freezes the stem that MODEL.TRACT "
        "trains: set MODEL.BACKBONE.FREEZE_AT 0",
    )
    _check_detectron2(cfg)
    stage = cfg.DEEPSPEED.zero_optimization.stage
    require(
        stage in (0, 1, 2),
        f"DEEPSPEED.zero_optimization.stage is {stage}: a detector takes 0, 1 or 2 (stage 3 cannot "
        "see the tensors inside lists of images)",
    )


# What describes torchvision's model, and nothing of detectron2's.
_TORCHVISIONS = (
    *("MODEL.BACKBONE.NAME", "MODEL.BACKBONE.NORM", "MODEL.FPN", "MODEL.ANCHOR_GENERATOR"),
    *("MODEL.RPN", "MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD", "TEST.DETECTIONS_PER_IMAGE"),
)


def _check_detectron2(cfg: CfgNode) -> None:
    """One place for each number: the keys that a detectron2 model does not follow are not set."""
    given, defaults = cfg.MODEL.DETECTRON2, get_cfg()
    if not given.CONFIG_FILE:
        require(not given.OPTS, "MODEL.DETECTRON2.OPTS is for MODEL.DETECTRON2.CONFIG_FILE: set it")
        return
    for key in _TORCHVISIONS:
        ours, default = cfg, defaults
        for part in key.split("."):
            ours, default = ours[part], default[part]
        require(
            ours == default,
            f"{key} describes torchvision's model, not that of MODEL.DETECTRON2.CONFIG_FILE: leave "
            "it out, and set detectron2's own key in MODEL.DETECTRON2.OPTS",
        )
