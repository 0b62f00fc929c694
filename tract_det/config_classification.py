"""The configuration of `tools/pretrain_net.py`; `config_common.py` has the rest.

Whatever is counted in epochs is counted in images handed out, not in steps: 90 epochs are 90 times
the training images, whatever the batch and the number of ranks.
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
from tract_det.data.choices import AUTO_AUGMENTS, CLASSIFICATION_SETS, CROPS, INTERPOLATIONS
from tract_det.evaluation.metrics import CLASSIFICATION_METRICS
from tract_det.modeling.choices import CLASSIFIER_NORMS, LOSSES, PATCH_NORMS


def _model() -> CfgNode:
    return CfgNode(
        {
            # One of torchvision's, "resnet10" (one basic block a stage), or "timm:<name>".
            "NAME": "resnet50",
            # "" = from scratch; a file of this project; ResNet50_Weights.IMAGENET1K_V2; ...
            "WEIGHTS": "",
            "DEVICE": "",  # "" = cuda where there is one, else cpu
            # RGB, in units of [0, 255]. [] = those the weights were trained with; ImageNet's
            # where there are no weights.
            "PIXEL_MEAN": [],
            "PIXEL_STD": [],
            "STANDARDIZE": True,  # False: the model sees pixels in [0, VALUE_RANGE]
            "VALUE_RANGE": 1.0,  # or 255.0
            "NORM": "BN",  # what the model has; or SyncBN, GN in place of batch norms
            # CIFAR's forms: a 3x3/1 stem without pooling (ResNets, DenseNets, Inceptions, ...:
            # modeling/small_images.py lists them), one linear layer as the classifier (VGGs),
            # 8 x 8 patches (timm's ViTs).
            "SMALL_IMAGES": False,
            "PATCH_NORM": "",  # of ViTs: layer_norm of each raw patch, or dual (DualPatchNorm)
            "WIDTH": 64,  # channels of a ResNet's stem
            "DROP_RATE": 0.0,  # of every dropout; a VGG was published with 0.5
            "DROP_PATH_RATE": 0.0,  # timm's models
            "CHECKPOINTING": False,  # compute activations again in the backward pass
            "CHANNELS_LAST": False,  # the weights under ZeRO 0 alone, the images always
            "COMPILE": False,  # torch.compile
            "LOSS": "ce",  # or bce, with one sigmoid a class (DeiT-III)
            "EMA": {
                "ENABLED": False,
                "DECAY": 0.9999,
                "PERIOD": 1,  # steps between updates
                "WARMUP": False,  # a smaller decay at the start
            },
            "TRACT": tract_keys(),
        }
    )


def _data() -> dict[str, Any]:
    return {
        "INPUT": {
            "SIZE": 224,
            # random_resized; pad (CIFAR: PADDING black pixels on each side, then a random part);
            # simple (DeiT-III: resized, PADDING reflected pixels, then a random part); none
            "CROP": "random_resized",
            "SCALE": [0.08, 1.0],  # this and RATIO: of the random resized crop
            "RATIO": [0.75, 1.3333333333],
            "PADDING": 4,
            "FLIP_PROB": 0.5,
            "AUTO_AUGMENT": "",  # or randaugment, trivialaugment, three_augment (DeiT-III)
            "MAGNITUDE": 9,  # this and NUM_OPS: RandAugment's
            "NUM_OPS": 2,
            "COLOR_JITTER": 0.0,  # of brightness, contrast and saturation
            "ERASING": 0.0,  # probability of random erasing
            "INTERPOLATION": "bilinear",  # or bicubic; in evaluation as well
            # The shorter side in evaluation, before the center crop of SIZE; 0 = as it is, -1 =
            # SIZE * 256 / 224.
            "RESIZE_TEST": -1,
            "REPEATS": 1,  # times that each image is handed out in turn (repeated augmentation)
        },
        "MIX": {
            "MIXUP_ALPHA": 0.0,
            "CUTMIX_ALPHA": 0.0,
            "PROB": 1.0,  # of mixing a batch at all
            "SWITCH_PROB": 0.5,  # of CutMix where both are on
            "SMOOTHING": 0.0,  # label smoothing, also where nothing is mixed
        },
        "DATASETS": {
            # imagefolder (train/<class>/*.jpg, val/<class>/*.jpg; test/ will do as well), or one of
            # torchvision's: cifar10, cifar100, flowers102, stanford_cars
            "NAME": "imagefolder",
            "ROOT": "",
            "HOLDOUT": 0.0,  # fraction of the training images to evaluate on where there is no val
            "HOLDOUT_SEED": 0,
            "LIMIT": 0,  # training images, the first of each class; 0 = all
            # True: in training another image takes the place of one that does not decode, in
            # evaluation it is left out; both are counted.
            "SKIP_CORRUPT": False,
            "CACHE": 0,  # MiB of decoded images that each reader keeps
        },
        "DATALOADER": {"NUM_WORKERS": 2},
    }


def _solver() -> dict[str, Any]:
    return {
        "SOLVER": {
            **solver_keys(),
            "IMS_PER_BATCH": 256,  # images a step, over all ranks and micro-batches
            "BASE_LR": 0.1,
            "WEIGHT_DECAY_NORM": 1e-4,  # 0 with WEIGHT_DECAY_BIAS 0: weights alone decay
            "WEIGHT_DECAY_BIAS": 1e-4,
            "EPOCHS": 90.0,
            "MAX_ITER": 0,  # steps, in place of EPOCHS; 0 = EPOCHS
            "STEPS": [30.0, 60.0],  # epochs
            "WARMUP_EPOCHS": 0.0,
            "CHECKPOINT_EPOCHS": 1.0,  # between checkpoints to resume from
        },
        "TEST": {
            "EVAL_EPOCHS": 1.0,  # between evaluations; 0: at the end alone
            "IMS_PER_BATCH": 100,  # on each rank
            "BEST_METRIC": "top1",
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
    check_common(cfg)
    _check_data(cfg)
    one_of(cfg, "MODEL.NORM", CLASSIFIER_NORMS)
    one_of(cfg, "MODEL.PATCH_NORM", PATCH_NORMS)
    one_of(cfg, "MODEL.LOSS", LOSSES)
    one_of(cfg, "TEST.BEST_METRIC", CLASSIFICATION_METRICS)
    model, solver, ema = cfg.MODEL, cfg.SOLVER, cfg.MODEL.EMA
    require(
        model.STANDARDIZE or not model.PIXEL_MEAN,
        "MODEL.PIXEL_MEAN is set, but MODEL.STANDARDIZE False uses none: leave one out",
    )
    require(model.VALUE_RANGE > 0, f"MODEL.VALUE_RANGE is {model.VALUE_RANGE}: it must be positive")
    require(
        not (model.COMPILE and model.CHECKPOINTING),
        "MODEL.COMPILE and MODEL.CHECKPOINTING do not go together: set one of them False",
    )
    require(
        model.NORM != "SyncBN" or model.DEVICE != "cpu", "MODEL.NORM SyncBN needs MODEL.DEVICE cuda"
    )
    for key in ("DROP_RATE", "DROP_PATH_RATE"):
        require(0 <= model[key] < 1, f"MODEL.{key} is {model[key]}: it takes 0 to below 1")
    require(model.WIDTH > 0, f"MODEL.WIDTH is {model.WIDTH}: it must be positive")
    require(0 <= ema.DECAY < 1, f"MODEL.EMA.DECAY is {ema.DECAY}: it takes 0 to 1")
    require(ema.PERIOD > 0, f"MODEL.EMA.PERIOD is {ema.PERIOD}: it must be positive")
    require(
        ema.ENABLED or not cfg.TEST.BEST_METRIC.startswith("ema."),
        f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC} needs MODEL.EMA.ENABLED True",
    )
    require(
        solver.MAX_ITER > 0 or solver.EPOCHS > 0,
        f"SOLVER.EPOCHS is {solver.EPOCHS}: it must be positive",
    )
    require(
        solver.CHECKPOINT_EPOCHS > 0,
        f"SOLVER.CHECKPOINT_EPOCHS is {solver.CHECKPOINT_EPOCHS}: it must be positive",
    )
    _check_zero(cfg)


def _check_data(cfg: CfgNode) -> None:
    data, given, mix = cfg.DATASETS, cfg.INPUT, cfg.MIX
    one_of(cfg, "DATASETS.NAME", CLASSIFICATION_SETS)
    one_of(cfg, "INPUT.CROP", CROPS)
    one_of(cfg, "INPUT.AUTO_AUGMENT", AUTO_AUGMENTS)
    one_of(cfg, "INPUT.INTERPOLATION", INTERPOLATIONS)
    require(0 <= data.HOLDOUT < 1, f"DATASETS.HOLDOUT is {data.HOLDOUT}: it takes 0 to below 1")
    for key in ("LIMIT", "CACHE", "HOLDOUT_SEED"):
        require(data[key] >= 0, f"DATASETS.{key} is {data[key]}: it must not be negative")
    for key in ("SIZE", "NUM_OPS", "REPEATS"):
        require(given[key] > 0, f"INPUT.{key} is {given[key]}: it must be positive")
    require(
        given.RESIZE_TEST in (-1, 0) or given.RESIZE_TEST >= given.SIZE,
        f"INPUT.RESIZE_TEST {given.RESIZE_TEST} is less than INPUT.SIZE {given.SIZE}: the center "
        "crop does not fit",
    )
    for key in ("SCALE", "RATIO"):
        require(
            len(given[key]) == 2 and 0 < given[key][0] <= given[key][1],
            f"INPUT.{key} is {given[key]}: it takes two positive numbers, the smaller one first",
        )
    require(given.PADDING >= 0, f"INPUT.PADDING is {given.PADDING}: it must not be negative")
    require(0 <= given.MAGNITUDE <= 30, f"INPUT.MAGNITUDE is {given.MAGNITUDE}: it takes 0 to 30")
    require(0 <= given.ERASING <= 1, f"INPUT.ERASING is {given.ERASING}: it takes 0 to 1")
    for key in ("PROB", "SWITCH_PROB", "SMOOTHING"):
        require(0 <= mix[key] <= 1, f"MIX.{key} is {mix[key]}: it takes 0 to 1")
    for key in ("MIXUP_ALPHA", "CUTMIX_ALPHA"):
        require(mix[key] >= 0, f"MIX.{key} is {mix[key]}: it must not be negative")


def _check_zero(cfg: CfgNode) -> None:
    stage = cfg.DEEPSPEED.zero_optimization.stage
    key = f"DEEPSPEED.zero_optimization.stage {stage}"
    require(stage in (0, 1, 2, 3), f"{key}: it takes 0, 1, 2 or 3")
    for other, is_on in (("EMA.ENABLED", cfg.MODEL.EMA.ENABLED), ("COMPILE", cfg.MODEL.COMPILE)):
        require(
            stage < 3 or not is_on,
            f"{key} leaves no rank whole weights, which MODEL.{other} needs: set one of them back",
        )
