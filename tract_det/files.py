"""A file appears under its name only when it is whole."""

import os
from collections.abc import Callable
from pathlib import Path

from tract_det.errors import UserError


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary name in the same folder, then renames it to `path`.

    Raises:
        UserError: the file cannot be written; nothing of it stays.
    """
    # The suffix stays at the end: it tells savers like matplotlib the format.
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
    """Writes a whole text file in UTF-8."""
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
