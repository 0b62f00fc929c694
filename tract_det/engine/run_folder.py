"""A run's folder: one run at a time writes into it, and a new run spares an old one."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from tract_det import distributed, files
from tract_det.engine import checkpoint
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.files import cannot_write, make_folder

_LOCK = ".lock"


def refuse_old_run(output: Path) -> None:
    """Refuses a folder that has a run's weights or checkpoints in it.

    Raises:
        UserError: says how far that run came.
    """
    steps = checkpoint.iterations(output)
    weights = sorted(path.name for path in output.glob("model_*.pth"))
    if not steps and not weights:
        return
    holds = f"a run up to step {steps[0]}" if steps else f"a run's {weights[-1]}"
    go_on = "--resume to go on with it, " if steps else ""
    raise UserError(
        f"OUTPUT_DIR {output} holds {holds}: give {go_on}another OUTPUT_DIR, or --overwrite to "
        "move it aside"
    )


def move_aside(output: Path) -> None:
    """Moves whatever is in the folder into `previous-N` within it.

    Raises:
        UserError: it cannot be moved.
    """
    entries = [
        path
        for path in sorted(output.iterdir())
        if path.name != _LOCK and not path.name.startswith(files.ASIDE)
    ]
    if not entries:
        return
    aside = files.move_aside(output, entries)
    say(f"moved the run in {output} to {aside}")


@contextlib.contextmanager
def sole_use(output: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; leaves no folder behind that stays empty.

    The lock is the operating system's: it is free when its process is gone, whatever ended it. It
    is the process's alone, so that data loaders which outlive it do not hold it. Every rank must
    enter; the main rank locks.

    Raises:
        UserError: another process writes into the folder, or it cannot be made.
    """
    created = [path for path in (output, *output.parents) if not path.exists()]
    locks: list[IO[str]] = []

    def lock() -> None:
        if distributed.is_main():
            locks.append(_lock(output))

    try:
        distributed.on_every_rank(lock)
        yield
    finally:
        for file in locks:
            (output / _LOCK).unlink(missing_ok=True)
            file.close()
        if distributed.is_main():
            with contextlib.suppress(OSError):  # something is in it
                for path in created:
                    path.rmdir()


def _lock(output: Path) -> IO[str]:
    make_folder(output, "OUTPUT_DIR")
    path = output / _LOCK
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise UserError(f"OUTPUT_DIR {output} is in use{_by_whom(path)}") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # its owner has just left, and taken the file with it
    file.truncate(0)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    json.dump({"process": os.getpid(), "host": socket.gethostname(), "since": now}, file)
    file.flush()
    return file


def _by_whom(path: Path) -> str:
    mend = "wait for it, or set another OUTPUT_DIR"
    try:
        owner = json.loads(path.read_text())
        return f" by process {owner['process']} on {owner['host']} since {owner['since']}: {mend}"
    except (OSError, ValueError, KeyError, TypeError):
        return f" by another process: {mend}"
