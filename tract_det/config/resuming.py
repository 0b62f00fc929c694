"""What a resumed run must have in common with the run that stopped.

A key that is not listed here must be equal. So no key is ignored, and none that comes later.
"""

from collections.abc import Mapping
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config.files import flat
from tract_det.config.machinery import plain
from tract_det.errors import shortened

# Keys, and sections, that `--resume` takes as they are now.
TAKES_EFFECT = (
    # Where the run is, what it says, and how fast it is.
    *("OUTPUT_DIR", "ARM", "LOG_PERIOD", "DEEPSPEED", "DATASETS.ROOT", "DATASETS.CACHE"),
    "INPUT.MAX_PIXELS",
    *("DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "MODEL.COMPILE", "MODEL.CHANNELS_LAST"),
    *("MODEL.CHECKPOINTING", "MODEL.TRACT.WORKSPACE", "TEST.IMS_PER_BATCH", "SOLVER.ACCUMULATION"),
    # Periods.
    *("TEST.EVAL_PERIOD", "TEST.EVAL_EPOCHS", "TEST.BOOTSTRAP", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.CHECKPOINT_EPOCHS", "SOLVER.CHECKPOINT_KEEP"),
    # The length, and the learning rates of the steps to come.
    *("SOLVER.MAX_ITER", "SOLVER.EPOCHS", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.BASE_LR"),
    *("SOLVER.BASE_LR_END", "SOLVER.FALLBACK_LR", "SOLVER.STEM.BASE_LR"),
)


def must_be_equal(cfg: CfgNode) -> dict[str, Any]:
    """The values that a resumed run must share, by their dotted keys."""
    return {
        key: value
        for key, value in flat(plain(cfg)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in TAKES_EFFECT)
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
    changed = []
    for key, value in now.items():
        first, last = (list(v) if isinstance(v, tuple) else v for v in (before.get(key), value))
        if key not in before:
            first = defaults.get(key, last)
        changed += _difference(key, first, last)
    return changed


def _difference(key: str, first: Any, last: Any) -> list[str]:
    if first == last:
        return []
    if isinstance(first, list) and isinstance(last, list) and len(first) == len(last) > 1:
        pairs = enumerate(zip(first, last, strict=True))
        index, (first, last) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        key = f"{key}[{index}]"
    return [f"{key} was {shortened(repr(first), 200)}, now it is {shortened(repr(last), 200)}"]
