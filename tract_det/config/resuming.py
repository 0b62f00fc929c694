"""What a resumed run must have in common with the run that stopped.

A key that is not listed here must be equal. So no key is ignored, and none that comes later.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config.files import flat
from tract_det.config.machinery import plain
from tract_det.errors import shortened

# Keys that change where a run is, what it says and how often it saves, but not what it learns.
INCIDENTAL = frozenset(
    {
        *("OUTPUT_DIR", "ARM", "LOG_PERIOD", "LOGGERS", "MODEL.DEVICE"),
        "MODEL.TRACT.WORKSPACE",
        *("DATASETS.ROOT", "DATASETS.CACHE", "DATALOADER.NUM_WORKERS", "INPUT.MAX_PIXELS"),
        *("TEST.EVAL_PERIOD", "TEST.EVAL_EPOCHS", "TEST.IMS_PER_BATCH", "TEST.BOOTSTRAP"),
        *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_EPOCHS", "SOLVER.CHECKPOINT_KEEP"),
    }
)

# Keys, and sections, that say how a step is computed: the same but for rounding.
ROUNDING = frozenset(
    {
        *("DEEPSPEED", "SOLVER.ACCUMULATION"),
        *("MODEL.COMPILE", "MODEL.CHANNELS_LAST", "MODEL.CHECKPOINTING"),
    }
)

# Keys, and sections, that `--resume` takes as they are now.
TAKES_EFFECT = (INCIDENTAL | ROUNDING) | {
    # The length, and the learning rates of the steps to come.
    *("SOLVER.MAX_ITER", "SOLVER.EPOCHS", "SOLVER.PATIENCE", "SOLVER.STEPS", "SOLVER.GAMMA"),
    "SOLVER.BASE_LR",
    *("SOLVER.BASE_LR_END", "SOLVER.FALLBACK_LR"),
    *("SOLVER.STEM.BASE_LR", "SOLVER.STEM.LR_FACTOR"),
}


def must_be_equal(cfg: CfgNode) -> dict[str, Any]:
    """The values that a resumed run must share, by their dotted keys."""
    return _without(flat(plain(cfg)), TAKES_EFFECT)


def not_incidental(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values, by their dotted keys, on which the result of a run depends, to the last bit."""
    return _without(values, INCIDENTAL)


def decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values, by their dotted keys, on which the result of a run depends but for rounding."""
    return _without(values, INCIDENTAL | ROUNDING | {"SEED"})


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not any(key == name or key.startswith(f"{name}.") for name in names)
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """What differs, each as `KEY was A, now it is B`.

    Args:
        before: of the run that stopped, as JSON gives it back.
        now: of the run that is to go on.
        defaults: for keys that did not exist when the run began.
    """
    known = {**defaults, **before}
    return [
        text
        for key, value in now.items()
        for text in _difference(key, known.get(key, value), value)
    ]


def _difference(key: str, first: Any, last: Any) -> list[str]:
    first, last = (list(value) if isinstance(value, tuple) else value for value in (first, last))
    # The type of a value may have changed between versions: "", [] and 0 all mean none.
    if (first or None) == (last or None):
        return []
    if isinstance(first, list) and isinstance(last, list) and len(first) == len(last) > 1:
        pairs = enumerate(zip(first, last, strict=True))
        index, (first, last) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        key = f"{key}[{index}]"
    return [f"{key} was {shortened(repr(first), 200)}, now it is {shortened(repr(last), 200)}"]
