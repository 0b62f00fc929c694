"""Checkpoints: DeepSpeed's whole state to resume from, and plain fp32 weights to use elsewhere.

    OUTPUT_DIR/last_checkpoint            the name of the newest complete checkpoint
    OUTPUT_DIR/checkpoints/iter_0001000/  DeepSpeed's files
    OUTPUT_DIR/model_best.pth, model_final.pth

`last_checkpoint` and the `.pth` files appear only when what they name or hold is complete.
"""

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_det import distributed
from tract_det.engine import ds
from tract_det.errors import UserError
from tract_det.files import cannot_write, write_binary, write_text

_POINTER = "last_checkpoint"
_FOLDER = "checkpoints"


def save_weights(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes `{"model": state_dict, "meta": meta}`, floating tensors in fp32. One rank calls it."""
    state = {
        key: value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for key, value in model.state_dict().items()
    }
    content = {"model": {k: v.contiguous() for k, v in state.items()}, "meta": dict(meta)}
    write_binary(path, lambda file: torch.save(content, file))


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's floating-point buffers, on the CPU: batch norm statistics of its own images."""
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }


def restore_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Restores what `buffers_of` returned, in place."""
    for name, value in buffers.items():
        model.get_buffer(name).copy_(value)


def save(engine: Any, output: Path, iteration: int, state: Mapping[str, Any]) -> None:
    """Saves everything that resuming needs, then deletes older checkpoints.

    Every rank must call it.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        iteration: number of steps done.
        state: plain values that `load` returns.
    """
    tag = f"iter_{iteration:07d}"
    content = {
        **state,
        "iteration": iteration,
        "world_size": distributed.world_size(),
        "random": distributed.gather(_random_state(engine.device)),
        # Of each rank: with averages, an interrupted run would differ from an uninterrupted one.
        "buffers": distributed.gather(buffers_of(engine.module)),
    }
    try:
        ds.save(engine, output / _FOLDER, tag, content)
    except OSError as error:
        raise cannot_write(output / _FOLDER / tag, error) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "iostream" not in str(error):
            raise
        # So torch's writer reports that a disk is full, or a quota used up.
        full = OSError(errno.ENOSPC, "the disk is full, or a quota is used up")
        raise cannot_write(output / _FOLDER / tag, full) from error
    if distributed.is_main():
        write_text(output / _POINTER, tag + "\n")
        for old in (output / _FOLDER).glob("iter_*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def load(engine: Any, output: Path) -> dict[str, Any]:
    """Restores the newest checkpoint of a run, random state included; returns its `state`.

    Every rank must call it.

    Raises:
        UserError: there is none, or the run had another number of processes.
    """
    tag = last(output)
    state = ds.load(engine, output / _FOLDER, tag)
    if state["world_size"] != distributed.world_size():
        raise UserError(
            f"checkpoint {output / _FOLDER / tag} is of {state['world_size']} processes, this run "
            f"has {distributed.world_size()}: resume with {state['world_size']}"
        )
    restore_buffers(engine.module, state.pop("buffers")[distributed.rank()])
    random = state.pop("random")[distributed.rank()]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and engine.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], engine.device)
    return state


def last(output: Path) -> str:
    """The name of a run's newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    pointer = output / _POINTER
    tag = pointer.read_text().strip() if pointer.is_file() else ""
    if not tag or not (output / _FOLDER / tag).is_dir():
        raise UserError(f"--resume: there is no checkpoint in {output}; start without --resume")
    return tag


def forget(output: Path) -> None:
    """Deletes the checkpoints of an earlier run, so that none is taken for one of a new run."""
    (output / _POINTER).unlink(missing_ok=True)
    shutil.rmtree(output / _FOLDER, ignore_errors=True)
