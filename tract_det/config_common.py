"""What both tools' configurations share: the machinery, the keys and the checks of them.

fvcore's CfgNode, detectron2's key names where they exist. Files inherit with `_BASE_`; `KEY VALUE`
pairs on the command line override them. Unknown keys and wrong types are errors that name the key
and the nearest known one.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from tract_det.errors import UserError

OPTIMIZERS = ("SGD", "Adam", "AdamW", "LAMB")

# What SOLVER already says; writing it again under DEEPSPEED could only contradict it.
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
    """MODEL.TRACT, the same in both tools."""
    return {
        "ENABLED": False,
        "LAMBDA": 0.1,  # of standardised pixels; the tools scale it to the model's own
        "RELATIVE": False,  # LAMBDA is in units of the patches' mean square instead
        "LAMBDA_END": -1.0,  # where a schedule leads to; -1 = LAMBDA
        "SCHEDULE": "constant",  # or linear, cosine
        "STOP_AT": 0,  # the first step without TrAct; 0 = never
        "GRAM_PATCHES": 0,  # estimate the Gram matrix from so many patches; 0 = exact
        "SYNC": True,  # one Gram matrix of all ranks' images
        "STEM": "",  # the layer's name; "" = the first layer
    }


def solver_keys() -> dict[str, Any]:
    """What SOLVER has in both tools."""
    return {
        "OPTIMIZER": "SGD",  # or Adam, AdamW, LAMB
        "ACCUMULATION": 1,  # micro-batches a step
        "MOMENTUM": 0.9,  # this and NESTEROV: SGD's
        "NESTEROV": False,
        "BETAS": [0.9, 0.999],  # this and EPS: the other optimizers'
        "EPS": 1e-8,
        "WEIGHT_DECAY": 1e-4,
        "WEIGHT_DECAY_NORM": 0.0,
        # The first layer's weight by itself: "" and -1 = as the others.
        "STEM": {"OPTIMIZER": "", "BASE_LR": -1.0, "WEIGHT_DECAY": -1.0, "MOMENTUM": -1.0},
        "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # or WarmupCosineLR
        "GAMMA": 0.1,
        "BASE_LR_END": 0.0,  # where the cosine ends
        "WARMUP_FACTOR": 0.001,
        "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_VALUE": 1.0},  # by the global norm
        "AMP": {"ENABLED": False},  # bf16 autocast around the forward
    }


def with_run_keys(cfg: CfgNode) -> CfgNode:
    """The same with what both tools have at the top."""
    cfg.OUTPUT_DIR = "./output"
    cfg.SEED = 0
    cfg.LOG_PERIOD = 20  # iterations
    # DeepSpeed's own keys, in its own spelling, pass through.
    cfg.DEEPSPEED = CfgNode({"zero_optimization": CfgNode({"stage": 0}, new_allowed=True)})
    cfg.DEEPSPEED.set_new_allowed(True)
    return cfg


def load(
    cfg: CfgNode,
    check: Callable[[CfgNode], None],
    config_file: str | Path,
    overrides: Sequence[str] = (),
) -> CfgNode:
    """`load_cfg` for any defaults: `cfg` is filled in place, checked by `check`, and frozen."""
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
    check(cfg)
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
    return f": did you mean '{by_lower[close[0]]}'?" if close else ": get_cfg() lists all"


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


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def one_of(cfg: CfgNode, key: str, allowed: Sequence[str]) -> None:
    """Refuses a value of `cfg.<key>` that is not allowed."""
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    require(value in allowed, f"{key} is '{value}': it takes one of {', '.join(allowed)}")


def check_common(cfg: CfgNode) -> None:
    """Refuses what neither tool takes, naming the key."""
    model, solver = cfg.MODEL, cfg.SOLVER
    one_of(cfg, "SOLVER.OPTIMIZER", OPTIMIZERS)
    one_of(cfg, "SOLVER.STEM.OPTIMIZER", ("", *OPTIMIZERS))
    require(
        len(solver.BETAS) == 2 and all(0 <= beta < 1 for beta in solver.BETAS),
        "SOLVER.BETAS takes two numbers from 0 to below 1",
    )
    for key in ("MOMENTUM", "EPS", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"):
        require(solver[key] >= 0, f"SOLVER.{key} is {solver[key]}: it must not be negative")
    for key in ("BASE_LR", "WEIGHT_DECAY", "MOMENTUM"):
        own = solver.STEM[key]
        require(own == -1 or own >= 0, f"SOLVER.STEM.{key} is {own}: not negative, or -1")
    require(
        not solver.NESTEROV or (solver.MOMENTUM > 0 and solver.STEM.MOMENTUM != 0),
        "SOLVER.NESTEROV True needs a positive SOLVER.MOMENTUM and SOLVER.STEM.MOMENTUM",
    )
    require(
        list(solver.STEPS) == sorted(set(solver.STEPS)),
        f"SOLVER.STEPS is {list(solver.STEPS)}: it must ascend",
    )
    one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupCosineLR"))
    one_of(cfg, "MODEL.DEVICE", ("", "cpu", "cuda"))
    for key, value in (("SEED", cfg.SEED), ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS)):
        require(value >= 0, f"{key} is {value}: it must not be negative")
    for key in ("FLIP_PROB", "COLOR_JITTER"):
        require(0 <= cfg.INPUT[key] <= 1, f"INPUT.{key} is {cfg.INPUT[key]}: it takes 0 to 1")
    for key in ("IMS_PER_BATCH", "ACCUMULATION", "BASE_LR"):
        require(solver[key] > 0, f"SOLVER.{key} is {solver[key]}: it must be positive")
    require(cfg.LOG_PERIOD > 0, f"LOG_PERIOD is {cfg.LOG_PERIOD}: it must be positive")
    require(cfg.TEST.IMS_PER_BATCH > 0, "TEST.IMS_PER_BATCH must be positive")
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        require(len(model[key]) in (0, 3), f"MODEL.{key} takes three numbers (RGB), or []")
    require(
        bool(model.PIXEL_MEAN) == bool(model.PIXEL_STD),
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are given together or not at all",
    )
    require(all(std > 0 for std in model.PIXEL_STD), "MODEL.PIXEL_STD must be positive")
    for key, source in DERIVED_DEEPSPEED_KEYS.items():
        require(key not in cfg.DEEPSPEED, f"DEEPSPEED.{key} is derived: set {source} instead")
    _check_tract(cfg)


def _check_tract(cfg: CfgNode) -> None:
    tract = cfg.MODEL.TRACT
    one_of(cfg, "MODEL.TRACT.SCHEDULE", ("constant", "linear", "cosine"))
    require(
        tract.LAMBDA > 0 and math.isfinite(tract.LAMBDA),
        f"MODEL.TRACT.LAMBDA is {tract.LAMBDA}: it must be positive (the paper: 0.05 to 0.2)",
    )
    require(
        tract.LAMBDA_END == -1 or (tract.LAMBDA_END > 0 and math.isfinite(tract.LAMBDA_END)),
        f"MODEL.TRACT.LAMBDA_END is {tract.LAMBDA_END}: it must be positive, or -1 for LAMBDA",
    )
    require(
        (tract.SCHEDULE == "constant") == (tract.LAMBDA_END == -1),
        f"MODEL.TRACT.SCHEDULE {tract.SCHEDULE} and LAMBDA_END {tract.LAMBDA_END} contradict each "
        "other: linear and cosine lead to LAMBDA_END, constant has none (-1)",
    )
    for key in ("STOP_AT", "GRAM_PATCHES"):
        require(tract[key] >= 0, f"MODEL.TRACT.{key} is {tract[key]}: it must not be negative")
