"""Checkpoints: the whole state to resume from, and plain fp32 weights to use elsewhere.

    OUTPUT_DIR/checkpoints/iter_0001000/
        model.pt                    weights, their moving average, what the run has counted
        rank_0000.pt, ...           of each rank: optimizer, random state, batch norm's buffers
        manifest.json               checksums of these files, and what a resumed run must share
    OUTPUT_DIR/last_checkpoint      the name of the newest: edit it to go on from an older one
    OUTPUT_DIR/model_best.pth, model_final.pth

All files are plain values and tensors, which are read without running code. A folder appears under
its name when all of it is written; so do the other files. A checkpoint fits any number of ranks and
any stage of ZeRO.
"""

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tract_det import distributed
from tract_det.engine import ds, manifest, optimizer_state
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.files import cannot_write, plain_values, sync_folder, write_binary, write_text

_POINTER = "last_checkpoint"
_FOLDER = "checkpoints"
_MODEL = "model.pt"


def save_weights(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes `{"model": state_dict, "meta": meta}`, floating tensors in fp32. One rank calls it."""
    state = {
        key: value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
        for key, value in model.state_dict().items()
    }
    content = {"model": {k: v.contiguous() for k, v in state.items()}, "meta": dict(meta)}
    write_binary(path, lambda file: torch.save(content, file))


# What a rank has of its own


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's floating-point buffers: batch norm's statistics of its own images."""
    return {k: buffer for k, buffer in model.named_buffers() if buffer.is_floating_point()}


def _restore_buffers(model: nn.Module, saved: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Gives a model this rank's buffers, in place; with other ranks than before, their mean.

    Args:
        model: any.
        saved: of each rank that saved.
    """
    is_same = len(saved) == distributed.world_size()
    for name in saved[0]:
        buffer = model.get_buffer(name)
        if is_same:
            buffer.copy_(saved[distributed.rank()][name])
        else:
            buffer.copy_(torch.stack([buffers[name] for buffers in saved]).mean(0))


# Saving


def save(
    engine: Any,
    output: Path,
    iteration: int,
    *,
    keep: int,
    shared: Mapping[str, Any],
    per_rank: Mapping[str, Any],
    identity: Mapping[str, Any],
    average: nn.Module | None = None,
) -> "Future[None]":
    """Saves everything that resuming needs, then deletes the oldest checkpoints.

    Every rank must call it, and wait for what it returns before the next call. When it returns, the
    checkpoint can be resumed from, and a crash of this process does not harm it. That it is on the
    disk itself, for a crash of the machine, is seen to beside the training; until then the
    checkpoints before it stay.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        iteration: number of steps done.
        keep: how many checkpoints are kept, this one included.
        shared: plain values that are equal on all ranks.
        per_rank: plain values of this rank.
        identity: what a resumed run must share, by name; see `config.resuming`.
        average: the moving average of the model, if there is one.

    Returns:
        Ends when all is on the disk, and the oldest checkpoints are deleted.

    Raises:
        UserError: it cannot be written, on whatever rank. Earlier checkpoints are as they were.
    """
    folder = output / _FOLDER / _tag(iteration)
    unfinished = folder.with_name(f".{folder.name}")
    model = ds.whole_model(engine)
    contents = {_rank_file(distributed.rank()): _own_state(engine, average, per_rank)}
    if distributed.is_main():
        contents[_MODEL] = {
            "model": model.state_dict(),
            "average": average.state_dict() if average is not None else None,
            **shared,
        }
    distributed.on_main(lambda: _make_empty(unfinished))
    written = distributed.on_every_rank(lambda: _write(unfinished, contents))
    files = {name: entry for rank in written for name, entry in rank.items()}
    distributed.on_main(lambda: _complete(unfinished, folder, files, identity))
    sync = partial(_sync, [folder / name for name in contents])
    if keep == 1:  # or the only checkpoint would go before every rank's part of this one is safe
        distributed.on_every_rank(sync)
        sync = partial(_sync, [])
    return _in_background(sync, partial(_delete_others, folder, keep))


def _in_background(sync: Callable[[], None], tidy: Callable[[], None]) -> "Future[None]":
    is_main = distributed.is_main()

    def work() -> None:
        sync()
        if is_main:
            tidy()

    pool = ThreadPoolExecutor(1, "checkpoint")
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def _sync(paths: Sequence[Path]) -> None:
    """Waits until the files, and the names in their folder, are on the disk."""
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from error


def _delete_others(folder: Path, keep: int) -> None:
    """Deletes what is older than the newest so many, and what a killed run has left."""
    others = _folders(folder.parents[1])
    newer = [other for other in others if other.name > folder.name]  # see `newest`
    older = [other for other in others if other.name < folder.name]
    torn = folder.parent.glob(".iter_*")
    for other in [*newer, *older[keep - 1 :], *torn]:
        shutil.rmtree(other, ignore_errors=True)


def _own_state(
    engine: Any, average: nn.Module | None, per_rank: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "optimizer": optimizer_state.part_of(engine),
        "random": _random_state(engine.device),
        # With means over the ranks, an interrupted run would differ from an uninterrupted one.
        "buffers": _buffers_of(engine.module),
        "average_buffers": _buffers_of(average) if average is not None else {},
        **per_rank,
    }


def _make_empty(folder: Path) -> None:
    """Makes the folder, without what a killed run has left in it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _write(folder: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Writes files; returns what the manifest is to say of each, by name."""
    entries = {}
    for name, content in contents.items():
        try:
            with (folder / name).open("wb") as file:
                torch.save(content, file)
            entries[name] = manifest.described(folder / name)
        except OSError as error:
            raise cannot_write(folder / name, error) from error
        except RuntimeError as error:
            if "inline_container" not in str(error) and "iostream" not in str(error):
                raise
            # So torch's writer reports that a disk is full, or a quota used up.
            full = OSError(errno.ENOSPC, "the disk is full, or a quota is used up")
            raise cannot_write(folder / name, full) from error
    return entries


def _complete(
    unfinished: Path, folder: Path, files: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Gives a written checkpoint its manifest and its name."""
    manifest.write(unfinished, {"files": files, "identity": plain_values(identity)})
    try:
        # A checkpoint of this name is damaged, or was passed over to go on from an older one.
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    write_text(folder.parents[1] / _POINTER, folder.name + "\n")


# Finding


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk.

    Attributes:
        folder: where it is.
        ranks: how many wrote it.
        identity: what a resumed run must share, by name.
    """

    folder: Path
    ranks: int
    identity: Mapping[str, Any]

    @property
    def iteration(self) -> int:
        """The number of steps done."""
        return int(self.folder.name.removeprefix("iter_"))

    def shared(self) -> dict[str, Any]:
        """What all ranks share: `model`, `average`, and `shared` of `save`."""
        return _read(self.folder / _MODEL)

    def of_ranks(self) -> list[dict[str, Any]]:
        """What each rank that saved had of its own."""
        return [_read(self.folder / _rank_file(rank)) for rank in range(self.ranks)]


def newest(output: Path) -> Checkpoint:
    """The checkpoint to resume from: what `last_checkpoint` names, else the newest whole one.

    Damaged ones are named and passed over. Every rank must call it; the main rank looks.

    Raises:
        UserError: there is none, or none that is whole.
    """
    return distributed.on_main(lambda: _newest(output))


def _newest(output: Path) -> Checkpoint:
    folders = _folders(output)
    pointer = output / _POINTER
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    folders.sort(key=lambda folder: folder.name != name)  # the named one first
    faults = []
    for folder in folders:
        try:
            checkpoint = _whole(folder)
        except UserError as fault:
            faults.append(str(fault))
            continue
        for fault_text in faults:
            say(f"{fault_text}: passed over")
        return checkpoint
    if faults:
        raise UserError(
            f"--resume: no checkpoint is whole: {'; '.join(faults)}: start anew with --overwrite, "
            "which moves this run aside"
        )
    raise UserError(f"--resume: there is no checkpoint in {output}; start without --resume")


def iterations(output: Path) -> list[int]:
    """The steps of a run's checkpoints, whole or not, the newest first."""
    return [int(folder.name.removeprefix("iter_")) for folder in _folders(output)]


def _folders(output: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    folders = (output / _FOLDER).glob("iter_*")
    named = [f for f in folders if f.is_dir() and f.name.removeprefix("iter_").isdecimal()]
    return sorted(named, key=lambda folder: folder.name, reverse=True)


def _whole(folder: Path) -> Checkpoint:
    """The checkpoint in this folder.

    Raises:
        UserError: it is damaged or torn; says which file.
    """
    if not (folder / manifest.NAME).is_file() and any(folder.glob("mp_rank_*")):
        raise UserError(
            f"checkpoint {folder} is of an earlier version: finish the run with that, or give "
            "MODEL.WEIGHTS its weights"
        )
    content = manifest.read(folder)
    return Checkpoint(folder, len(content["files"]) - 1, content["identity"])


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not one of tract_det's checkpoints: it holds more than numbers, text and "
            "tensors, and is not read"
        ) from error


def _tag(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _rank_file(rank: int) -> str:
    return f"rank_{rank:04d}.pt"


# Restoring


@dataclass(frozen=True)
class Restored:
    """What a run goes on with.

    Attributes:
        shared: `shared` of `save`.
        per_rank: `per_rank` of `save`, of each rank that saved.
    """

    shared: Mapping[str, Any]
    per_rank: Sequence[Mapping[str, Any]]


def restore(
    checkpoint: Checkpoint, engine: Any, *, seed: int, average: nn.Module | None = None
) -> Restored:
    """Restores all but the weights, which `Checkpoint.shared` has: they come before the engine.

    With as many ranks as before, each goes on with its own buffers and random state. With others,
    each gets the mean of the buffers, and a random state of the seed, the step and its rank.

    Args:
        checkpoint: as `newest` returns it.
        engine: as `ds.initialize` makes it, before its first step.
        seed: of the run.
        average: the moving average of the model, if there is one; restored as well.
    """
    shared, ranks = checkpoint.shared(), checkpoint.of_ranks()
    optimizer_state.restore(engine, [state.pop("optimizer") for state in ranks])
    _restore_buffers(engine.module, [state.pop("buffers") for state in ranks])
    if average is not None:
        average.load_state_dict(shared["average"])
        _restore_buffers(average, [state["average_buffers"] for state in ranks])
    _restore_random(engine.device, [state.pop("random") for state in ranks], seed, checkpoint)
    return Restored(shared, ranks)


def _restore_random(
    device: torch.device,
    saved: Sequence[Mapping[str, torch.Tensor]],
    seed: int,
    checkpoint: Checkpoint,
) -> None:
    rank = distributed.rank()
    if len(saved) != distributed.world_size():
        sequence = np.random.SeedSequence((seed, checkpoint.iteration, rank))
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return
    torch.set_rng_state(saved[rank]["cpu"])
    if "cuda" in saved[rank] and device.type == "cuda":
        torch.cuda.set_rng_state(saved[rank]["cuda"], device)
