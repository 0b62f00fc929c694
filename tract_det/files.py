"""Atomic writing: a file appears under its name only once it is complete."""

import os
from collections.abc import Callable
from pathlib import Path

from tract_det.errors import UserError


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path in the same folder, then renames that file to `path`.

    Args:
        path: the file to write. Its folder is created if it does not exist.
        write: writes the content to the path that it is called with.

    Raises:
        UserError: the file cannot be written. The temporary file is removed, and an existing file
            at `path` is unchanged.
    """
    # The suffix stays at the end, since savers such as matplotlib's infer the format from it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file; see `atomically`."""
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
