"""Room on the disk for what a run writes: its sizes are known before anything is written."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from tract_det import distributed
from tract_det.engine.ema import Ema
from tract_det.errors import UserError

_FP32 = 4  # bytes


def weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, also of those that ZeRO 3 has partitioned."""
    parameters = sum(_numbers(p) * p.element_size() for p in model.parameters())
    return parameters + _buffer_bytes(model)


def checkpoint_bytes(engine: Any, ema: Ema | None) -> int:
    """Bytes of a checkpoint to resume from, over all ranks.

    Weights, their moving average, the buffers of every rank and the optimizer's state, which counts
    as it is from the first step on.
    """
    models = [engine.module, *([ema.model] if ema is not None else [])]
    size = sum(weights_bytes(m) + distributed.world_size() * _buffer_bytes(m) for m in models)
    groups = engine.optimizer.param_groups
    if not engine.zero_optimization():
        return size + sum(_FP32 * _slots(g) * p.numel() for g in groups for p in g["params"])
    # The groups of ZeRO have no whole parameters.
    learning = (p for p in engine.module.parameters() if p.requires_grad)
    return size + _FP32 * max(map(_slots, groups)) * sum(map(_numbers, learning))


def require_for_run(output: Path, engine: Any, ema: Ema | None, checkpoints: int) -> None:
    """Refuses a run for which there is no room: checkpoints, best weights and final ones.

    Args:
        output: the run's folder.
        engine: as `ds.initialize` makes it.
        ema: the moving average of the weights, if any.
        checkpoints: to be written and to be there at the same time.

    Raises:
        UserError: on every rank, with what is missing.
    """
    models = [engine.module, *([ema.model] if ema is not None else [])]
    needed = checkpoints * checkpoint_bytes(engine, ema) + 2 * sum(map(weights_bytes, models))
    mend = "free some space, or set OUTPUT_DIR to a folder on another disk"
    _require(output, needed, f"checkpoints and weights of this run take {_words(needed)}", mend)


def require_for_checkpoint(output: Path, engine: Any, ema: Ema | None, iteration: int) -> None:
    """Refuses to begin a checkpoint for which there is no room; see `require_for_run`."""
    needed = checkpoint_bytes(engine, ema)
    what = f"the checkpoint of step {iteration} takes {_words(needed)}"
    _require(output, needed, what, "free some space, then go on with --resume")


def _require(folder: Path, needed: int, what: str, mend: str) -> None:
    def look() -> None:
        # Some folder above it is there, if not this one.
        place = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            missing = _words(needed - free)
            raise UserError(f"{folder} has {_words(free)} free, but {what}, {missing} more: {mend}")

    distributed.on_main(look)


def _slots(group: dict[str, Any]) -> int:
    """Numbers that an optimizer keeps for every weight of a group."""
    if group.get("use_muon"):
        return 1
    return 2 if "betas" in group else int(group.get("momentum", 0) > 0)


def _numbers(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _buffer_bytes(model: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def _words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
