"""The keys that the configurations of detectors and classifiers share, and their checks."""

from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config.machinery import one_of, require, value_at
from tract_det.config.ranges import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_NONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Names,
    Number,
    Numbers,
    Rule,
)
from tract_det.engine.choices import LAMBDA_SCHEDULES, LR_SCHEDULES, OPTIMIZERS, TRACKERS
from tract_det.modeling.choices import LAMBDA_UNITS, STEM_INITS

# Keys of DeepSpeed's that are derived from SOLVER: set in two places, they could contradict.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "SOLVER.IMS_PER_BATCH",
    "train_micro_batch_size_per_gpu": "SOLVER.IMS_PER_BATCH and SOLVER.ACCUMULATION",
    "gradient_accumulation_steps": "SOLVER.ACCUMULATION",
    "gradient_clipping": "SOLVER.CLIP_GRADIENTS",
    "optimizer": "SOLVER.OPTIMIZER",
    "scheduler": "SOLVER.LR_SCHEDULER_NAME",
    "fp16": "SOLVER.AMP.ENABLED (bf16 autocast; a model is never cast to half)",
    "bf16": "SOLVER.AMP.ENABLED (bf16 autocast; a model is never cast to half)",
    "torch_autocast": "SOLVER.AMP.ENABLED",
}


def tract_keys() -> dict[str, Any]:
    """MODEL.TRACT."""
    return {
        "ENABLED": False,  # True: the stem (the first layer) learns by TrAct
        "LAMBDA": 0.1,  # damping; the log shows the effective value
        # Unit of LAMBDA and LAMBDA_END. standardised = of pixels standardised by the data's own
        # statistics (ImageNet's, where the data set has none of its own): LAMBDA is multiplied by
        # the variance of what the stem sees in this unit. input = the number as the stem uses it,
        # as in the paper. trace = of the mean square of what the stem sees, trace(G) / K.
        "UNIT": "standardised",
        # Power of the inverse: the gradient is dZ^T X (G + LAMBDA I)^-POWER. 1 = TrAct, 0 = plain.
        "POWER": 1.0,
        "LAMBDA_END": -1.0,  # LAMBDA at the end of a linear or cosine SCHEDULE; -1 = LAMBDA
        "SCHEDULE": "constant",  # how LAMBDA changes over the steps: constant, linear or cosine
        # From when on TrAct is off, and where SCHEDULE ends as well: a fraction of the training, or
        # a step if it is 1 or above; 0 = never.
        "STOP_AT": 0.0,
        # Random patches of each batch and rank to estimate the Gram matrix from; 0 = all, exact.
        "GRAM_PATCHES": 0,
        # MiB that TrAct may take on a GPU beyond the plain layer; with fewer it takes longer.
        "WORKSPACE": 256,
        "SYNC": True,  # one Gram matrix over the images of all ranks; False: each rank has its own
        # Names of the layers that learn by TrAct; [] = find the first layer. all, for classifiers =
        # every convolution without groups and every linear layer that learns.
        "STEM": [],
    }


def ema_keys() -> dict[str, Any]:
    """MODEL.EMA: an exponential moving average of the weights, evaluated and saved beside them."""
    return {
        "ENABLED": False,  # True: a moving average of the weights, evaluated and saved beside them
        "DECAY": 0.9999,  # weight of the previous average in an update
        "PERIOD": 1,  # steps between updates
        "WARMUP": False,  # True: a smaller decay at the start
    }


def solver_keys() -> dict[str, Any]:
    """SOLVER."""
    return {
        "OPTIMIZER": "SGD",  # SGD, Adam, AdamW, LAMB or Muon
        # For Muon: learning rate of AdamW, which it leaves norms, biases, embeddings and the output
        # layers to; -1 = BASE_LR.
        "FALLBACK_LR": -1.0,
        "ACCUMULATION": 1,  # micro-batches per step (gradient accumulation)
        "MOMENTUM": 0.9,  # for SGD and Muon
        "NESTEROV": False,  # for SGD and Muon
        "BETAS": [0.9, 0.999],  # for Adam, AdamW, LAMB, and Muon's AdamW
        "EPS": 1e-8,  # likewise
        "WEIGHT_DECAY": 1e-4,  # of the weights of convolutional and linear layers
        "WEIGHT_DECAY_NORM": 0.0,  # of the scales and shifts of norms
        # Separate settings for the weight of the first layer; "" and -1 = as for other weights.
        "STEM": {
            "OPTIMIZER": "",
            "BASE_LR": -1.0,
            "LR_FACTOR": 1.0,  # multiplies the learning rate of the first layer's weight
            "WEIGHT_DECAY": -1.0,
            "MOMENTUM": -1.0,
        },
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # WarmupMultiStepLR (STEPS) or WarmupCosineLR
        "GAMMA": 0.1,  # factor of the learning rate at each of STEPS (WarmupMultiStepLR)
        "BASE_LR_END": 0.0,  # learning rate at the end of the cosine (WarmupCosineLR)
        # Learning rate at the first step of the warm-up, as a fraction of that at its end.
        "WARMUP_FACTOR": 0.001,
        "CLIP_GRADIENTS": {
            "ENABLED": False,  # True: the gradients are scaled down where their norm is too large
            "CLIP_VALUE": 1.0,  # largest norm over all gradients together
        },
        # How many checkpoints are kept; when the newest is damaged, --resume takes the one before.
        "CHECKPOINT_KEEP": 3,
        "AMP": {"ENABLED": False},  # True: bf16 autocast around the forward pass
        # The training ends after so many evaluations in turn without a better TEST.BEST_METRIC, if
        # that comes before its full length; 0 = never. Schedules are those of the full length.
        "PATIENCE": 0,
    }


def with_run_keys(cfg: CfgNode) -> CfgNode:
    """Adds the keys outside every section, in place; returns the same node."""
    # The arm of a comparison: a file of configs/arms by its name, or several as tract+muon. --arm
    # sets it, or a config file: there it lies over the file's bases and under its own keys. "" =
    # none.
    cfg.ARM = ""
    # Folder of the log, weights, checkpoints and results; "" = output/<config>/<arm>.
    cfg.OUTPUT_DIR = ""
    cfg.SEED = 0  # seed of initial weights, data order, augmentation and sampling
    cfg.LOG_PERIOD = 20  # steps between lines of the log
    # Where figures, config and results go beside metrics.jsonl: tensorboard, wandb, trackio; [] =
    # nowhere.
    cfg.LOGGERS = ["tensorboard"]
    # DeepSpeed's own keys, in its own spelling; those not listed here are passed on to it. `stage`
    # is that of ZeRO: 0 to 2, for classifiers also 3.
    cfg.DEEPSPEED = CfgNode({"zero_optimization": CfgNode({"stage": 0}, new_allowed=True)})
    cfg.DEEPSPEED.set_new_allowed(True)
    return cfg


SHARED_RANGES: dict[str, Rule] = {
    "SEED": Number(0, 2**32 - 1, whole=True),
    "LOG_PERIOD": COUNT,
    "LOGGERS": Names(),
    "MODEL.PIXEL_MEAN": Numbers(),
    "MODEL.PIXEL_STD": Numbers(),
    "MODEL.BACKBONE.FREEZE_AT": Number(-1, 5, whole=True),
    "MODEL.EMA.DECAY": BELOW_ONE,
    "MODEL.EMA.PERIOD": COUNT,
    "MODEL.TRACT.LAMBDA": POSITIVE,
    "MODEL.TRACT.LAMBDA_END": Number(0, above=True, also=-1),
    "MODEL.TRACT.POWER": NOT_NEGATIVE,
    "MODEL.TRACT.STOP_AT": NOT_NEGATIVE,
    "MODEL.TRACT.GRAM_PATCHES": COUNT_OR_NONE,
    "MODEL.TRACT.WORKSPACE": COUNT,
    "MODEL.TRACT.STEM": Names(),
    # The upper bound is Pillow's own: it refuses more.
    "INPUT.MAX_PIXELS": Number(1, 178_956_970, whole=True),
    "INPUT.FLIP_PROB": FRACTION,
    "INPUT.COLOR_JITTER": FRACTION,
    "DATALOADER.NUM_WORKERS": Number(0, 1024, whole=True),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.ACCUMULATION": COUNT,
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": NOT_NEGATIVE,
    "SOLVER.FALLBACK_LR": Number(0, also=-1),
    "SOLVER.MOMENTUM": BELOW_ONE,
    "SOLVER.BETAS": Numbers(),
    "SOLVER.EPS": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": NOT_NEGATIVE,
    "SOLVER.STEM.BASE_LR": Number(0, also=-1),
    "SOLVER.STEM.LR_FACTOR": NOT_NEGATIVE,
    "SOLVER.STEM.WEIGHT_DECAY": Number(0, also=-1),
    "SOLVER.STEM.MOMENTUM": Number(0, 1, below=True, also=-1),
    "SOLVER.STEPS": Numbers(),
    "SOLVER.GAMMA": NOT_NEGATIVE,
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CHECKPOINT_KEEP": COUNT,
    "SOLVER.PATIENCE": COUNT_OR_NONE,
    "TEST.IMS_PER_BATCH": COUNT,
}


def check_common(cfg: CfgNode) -> None:
    """Refuses contradictions in the shared keys, and words that are no choice.

    Raises:
        UserError: the message names the key.
    """
    model, solver = cfg.MODEL, cfg.SOLVER
    one_of(cfg, "SOLVER.OPTIMIZER", OPTIMIZERS)
    one_of(cfg, "SOLVER.STEM.OPTIMIZER", ("", *OPTIMIZERS))
    require(
        len(solver.BETAS) == 2 and all(0 <= beta < 1 for beta in solver.BETAS),
        "SOLVER.BETAS takes two numbers, each at least 0 and below 1",
    )
    require(
        not solver.NESTEROV or (solver.MOMENTUM > 0 and solver.STEM.MOMENTUM != 0),
        "SOLVER.NESTEROV True needs a positive SOLVER.MOMENTUM and SOLVER.STEM.MOMENTUM",
    )
    require(
        list(solver.STEPS) == sorted(set(solver.STEPS)),
        f"SOLVER.STEPS is {list(solver.STEPS)}: it must ascend strictly",
    )
    one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", LR_SCHEDULES)
    for name in cfg.LOGGERS:
        require(name in TRACKERS, f"LOGGERS has '{name}': it takes of {', '.join(TRACKERS)}")
    one_of(cfg, "MODEL.STEM_INIT", STEM_INITS)
    one_of(cfg, "MODEL.DEVICE", ("", "cpu", "cuda"))
    mean, std = len(model.PIXEL_MEAN), len(model.PIXEL_STD)
    require(
        bool(mean) == bool(std),
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be set together or not at all",
    )
    require(
        mean == std,
        f"MODEL.PIXEL_MEAN has {mean} numbers and MODEL.PIXEL_STD {std}: give each one number for "
        "each channel of the images",
    )
    require(all(std > 0 for std in model.PIXEL_STD), "MODEL.PIXEL_STD must be positive")
    require(
        mean in (0, 3) or not cfg.INPUT.COLOR_JITTER,
        f"INPUT.COLOR_JITTER changes colours, and MODEL.PIXEL_MEAN is for {mean} channels: set "
        "INPUT.COLOR_JITTER 0.0",
    )
    for key, source in DERIVED_DEEPSPEED_KEYS.items():
        require(key not in cfg.DEEPSPEED, f"DEEPSPEED.{key} is derived: set {source} instead")
    metric = cfg.TEST.BEST_METRIC
    require(
        model.EMA.ENABLED or not metric.startswith("ema."),
        f"TEST.BEST_METRIC {metric} needs MODEL.EMA.ENABLED True",
    )
    _check_tract(cfg)


def check_patience(cfg: CfgNode, period_key: str) -> None:
    """Refuses SOLVER.PATIENCE where there are no evaluations to count.

    Args:
        cfg: the configuration.
        period_key: the task's key of the period between evaluations.

    Raises:
        UserError: the message names both keys.
    """
    patience = cfg.SOLVER.PATIENCE
    require(
        not patience or value_at(cfg, period_key) > 0,
        f"SOLVER.PATIENCE {patience} counts evaluations, and {period_key} 0 makes none before the "
        f"end: set {period_key}, or SOLVER.PATIENCE 0",
    )


def _check_tract(cfg: CfgNode) -> None:
    tract = cfg.MODEL.TRACT
    one_of(cfg, "MODEL.TRACT.SCHEDULE", LAMBDA_SCHEDULES)
    one_of(cfg, "MODEL.TRACT.UNIT", LAMBDA_UNITS)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    require(
        not (tract.ENABLED and freeze_at > 0),
        f"MODEL.BACKBONE.FREEZE_AT {freeze_at} freezes the stem that MODEL.TRACT trains: set "
        "MODEL.BACKBONE.FREEZE_AT 0",
    )
    require(
        (tract.SCHEDULE == "constant") == (tract.LAMBDA_END == -1),
        f"MODEL.TRACT.SCHEDULE {tract.SCHEDULE} and LAMBDA_END {tract.LAMBDA_END} contradict each "
        "other: set LAMBDA_END for linear and cosine, and leave it at -1 for constant",
    )
    require(
        tract.STOP_AT < 1 or tract.STOP_AT.is_integer(),
        f"MODEL.TRACT.STOP_AT is {tract.STOP_AT}: it takes a fraction of the training (above 0 and "
        "below 1), a step, or 0 for never",
    )
