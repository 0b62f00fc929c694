"""The configuration: fvcore's CfgNode, detectron2's key names where they exist.

Files inherit with `_BASE_`; `KEY VALUE` pairs on the command line override them. Unknown keys and
wrong types are errors that name the key and the nearest known one. No other module of the package
reads a `cfg`: the tools take it apart into plain arguments.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from tract_det.errors import UserError

BACKBONES = (
    *(f"resnet{depth}_fpn" for depth in (18, 34, 50, 101)),
    "vgg16",
    "vgg16_bn",
)
METRICS = (
    *(f"{rule}.{mean}" for rule in ("voc_07", "voc_area") for mean in ("mAP", "mAP_50_95")),
    *(f"coco.{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")),
)
NORMS = ("BN", "FrozenBN", "SyncBN", "GN")

# What SOLVER already says; writing it again under DEEPSPEED could only contradict it.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "SOLVER.IMS_PER_BATCH",
    "train_micro_batch_size_per_gpu": "SOLVER.IMS_PER_BATCH and SOLVER.ACCUMULATION",
    "gradient_accumulation_steps": "SOLVER.ACCUMULATION",
    "gradient_clipping": "SOLVER.CLIP_GRADIENTS",
    "optimizer": "SOLVER.OPTIMIZER",
    "scheduler": "SOLVER.LR_SCHEDULER_NAME",
    "fp16": "SOLVER.AMP.ENABLED (bf16 autocast; a detector is never cast to half)",
    "bf16": "SOLVER.AMP.ENABLED (bf16 autocast; a detector is never cast to half)",
    "torch_autocast": "SOLVER.AMP.ENABLED",
}


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
            "FPN": {"OUT_CHANNELS": 256},
            "TRACT": {"ENABLED": False, "LAMBDA": 0.1},
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
            "OPTIMIZER": "SGD",  # or AdamW
            "IMS_PER_BATCH": 16,  # images a step, over all ranks and micro-batches
            "ACCUMULATION": 1,  # micro-batches a step
            "BASE_LR": 0.02,
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "WEIGHT_DECAY": 1e-4,
            "WEIGHT_DECAY_NORM": 0.0,
            "WEIGHT_DECAY_BIAS": 1e-4,
            "MAX_ITER": 18000,
            "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # or WarmupCosineLR
            "STEPS": [12000, 16000],
            "GAMMA": 0.1,
            "BASE_LR_END": 0.0,  # where the cosine ends
            "WARMUP_ITERS": 100,
            "WARMUP_FACTOR": 0.001,
            "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_VALUE": 1.0},  # by the global norm
            "AMP": {"ENABLED": False},  # bf16 autocast around the forward
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
    cfg.OUTPUT_DIR = "./output"
    cfg.SEED = 0
    cfg.LOG_PERIOD = 20  # iterations
    # DeepSpeed's own keys, in its own spelling, pass through.
    cfg.DEEPSPEED = CfgNode({"zero_optimization": CfgNode({"stage": 0}, new_allowed=True)})
    cfg.DEEPSPEED.set_new_allowed(True)
    return cfg


def load_cfg(config_file: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file with its bases, then `KEY VALUE` pairs; validated and frozen.

    Raises:
        UserError: naming the file or key, for an unknown key, a value of the wrong type, a value
            out of range or a contradiction.
    """
    cfg = get_cfg()
    if not Path(config_file).is_file():
        raise UserError(f"config file {config_file} does not exist")
    try:
        loaded = CfgNode.load_yaml_with_base(str(config_file))
    except (OSError, yaml.YAMLError, AssertionError, TypeError, AttributeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"config file {config_file} cannot be read: {message}") from error
    if not isinstance(loaded, Mapping):
        raise UserError(f"config file {config_file} cannot be read: it holds no keys")
    _merge(cfg, loaded, where=f"{config_file}: ")
    _merge(cfg, pairs_to_tree(overrides), where="")
    validate(cfg)
    cfg.freeze()
    return cfg


def pairs_to_tree(pairs: Sequence[str]) -> CfgNode:
    """`["A.B", "1"]` becomes `{"A": {"B": 1}}`."""
    if len(pairs) % 2:
        raise UserError(f"overrides are KEY VALUE pairs: '{pairs[-1]}' has no value")
    tree: dict[str, Any] = {}
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"override '{key}': '{parent}' is a value, not a section")
        node[leaf] = _decode(text)
    return CfgNode(tree)


def _decode(text: str) -> Any:
    """A Python literal, a list whose words need no quotes (`[RBC, WBC]`), or the text itself."""
    value = CfgNode._decode_cfg_value(text)
    if value == text and text.startswith("["):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(text)
    return value


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _merge(cfg: CfgNode, other: Mapping[str, Any], *, where: str) -> None:
    known = list(_leaves(cfg))
    _merge_node(cfg, other, "", known, where)


def _merge_node(
    node: CfgNode, other: Mapping[str, Any], prefix: str, known: list[str], where: str
) -> None:
    for key, value in other.items():
        full = prefix + key
        if key not in node:
            if not node.is_new_allowed():
                leaves = _leaves(value, f"{full}.") if isinstance(value, Mapping) else ()
                full = max(leaves, key=len, default=full)  # the section may be what is misspelt
                raise UserError(f"{where}unknown key '{full}'{_nearest(full, known)}")
            node[key] = CfgNode(value, new_allowed=True) if isinstance(value, Mapping) else value
        elif isinstance(node[key], CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}'{full}' is a section: write '{full}.<KEY>'")
            _merge_node(node[key], value, f"{full}.", known, where)
        else:
            node[key] = _coerce(value, node[key], full, where)


def _nearest(key: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.5)
    if not close:  # right name, wrong section
        leaf = key.rsplit(".", 1)[-1].lower()
        close = [name for name in by_lower if name.rsplit(".", 1)[-1] == leaf][:1]
    return f": did you mean '{by_lower[close[0]]}'?" if close else ": tract_det/config.py lists all"


def _coerce(value: Any, default: Any, key: str, where: str) -> Any:
    """The value in its default's type; yacs itself takes 1 for 1.0 as an error."""
    value = CfgNode._decode_cfg_value(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list):
        if isinstance(value, tuple | list):
            return list(value)
        if isinstance(value, str | int | float):  # one split, one size
            return [value]
    if type(value) is not type(default):
        raise UserError(
            f"{where}'{key}' takes {type(default).__name__}, like {default!r}, not {value!r}"
        )
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(cfg: CfgNode, key: str, allowed: Sequence[str]) -> None:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    _require(value in allowed, f"{key} is '{value}': it takes one of {', '.join(allowed)}")


def validate(cfg: CfgNode) -> None:
    """Refuses values out of range and contradictions, naming the key."""
    model, solver = cfg.MODEL, cfg.SOLVER
    _one_of(cfg, "MODEL.BACKBONE.NAME", BACKBONES)
    _one_of(cfg, "MODEL.BACKBONE.NORM", NORMS)
    _one_of(cfg, "SOLVER.OPTIMIZER", ("SGD", "AdamW"))
    _one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupCosineLR"))
    _one_of(cfg, "TEST.VOC_RULE", ("devkit", "detectron2"))
    _one_of(cfg, "TEST.BEST_METRIC", METRICS)
    _one_of(cfg, "MODEL.DEVICE", ("", "cpu", "cuda"))
    for key in ("TRAIN", "TEST", "CLASSES"):
        words = [word for word in cfg.DATASETS[key] if not isinstance(word, str)]
        _require(not words, f"DATASETS.{key} takes names, not {words}: quote them")
    for key, value in (("SEED", cfg.SEED), ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS)):
        _require(value >= 0, f"{key} is {value}: it must not be negative")
    for key in ("IMS_PER_BATCH", "ACCUMULATION", "MAX_ITER", "BASE_LR", "CHECKPOINT_PERIOD"):
        _require(solver[key] > 0, f"SOLVER.{key} is {solver[key]}: it must be positive")
    _require(cfg.LOG_PERIOD > 0, f"LOG_PERIOD is {cfg.LOG_PERIOD}: it must be positive")
    _require(cfg.TEST.IMS_PER_BATCH > 0, "TEST.IMS_PER_BATCH must be positive")
    _require(bool(cfg.DATASETS.TEST), "DATASETS.TEST is empty: name a split to evaluate on")
    lambda_ = model.TRACT.LAMBDA
    _require(
        lambda_ > 0 and math.isfinite(lambda_),
        f"MODEL.TRACT.LAMBDA is {lambda_}: it must be positive (the paper: 0.05 to 0.2)",
    )
    _require(
        -1 <= model.BACKBONE.FREEZE_AT <= 5,
        f"MODEL.BACKBONE.FREEZE_AT is {model.BACKBONE.FREEZE_AT}: it takes 0 to 5, or -1 to choose",
    )
    _require(
        not (model.TRACT.ENABLED and model.BACKBONE.FREEZE_AT > 0),
        f"MODEL.BACKBONE.FREEZE_AT {model.BACKBONE.FREEZE_AT} freezes the stem that MODEL.TRACT "
        "trains: set MODEL.BACKBONE.FREEZE_AT 0",
    )
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        _require(len(model[key]) in (0, 3), f"MODEL.{key} takes three numbers (RGB), or []")
    _require(
        bool(model.PIXEL_MEAN) == bool(model.PIXEL_STD),
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are given together or not at all",
    )
    _require(all(std > 0 for std in model.PIXEL_STD), "MODEL.PIXEL_STD must be positive")
    for key, source in DERIVED_DEEPSPEED_KEYS.items():
        _require(key not in cfg.DEEPSPEED, f"DEEPSPEED.{key} is derived: set {source} instead")
    stage = cfg.DEEPSPEED.zero_optimization.stage
    _require(
        stage in (0, 1, 2),
        f"DEEPSPEED.zero_optimization.stage is {stage}: a detector takes 0, 1 or 2 (stage 3 cannot "
        "see the tensors inside lists of images)",
    )
