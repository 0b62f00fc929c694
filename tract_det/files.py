"""Atomic writing: a file appears under its name only once it is complete."""

import errno
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote
from zipfile import BadZipFile

from tract_det.errors import UserError

_NOT_IN_FILE_NAMES = frozenset('/\\:*?"<>|%')
_LONGEST_PART = 150
_WRITING = ".writing-"  # then a process: the one that writes a temporary file


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
    temporary = path.with_name(f".{path.stem}{_WRITING}{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave the name without the content
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of processes that were killed in `atomically`.

    Args:
        folder: it and the folders in it are searched; it need not exist.
    """
    for depth in ("", "*/"):
        for temporary in folder.glob(f"{depth}.*{_WRITING}*"):
            process = temporary.name.rpartition(_WRITING)[2].partition(".")[0]
            if process.isdecimal() and not is_running(int(process)):
                with suppress(OSError):  # another start has removed it, or may
                    temporary.unlink()


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        pass
    return True


ASIDE = "previous-"


def move_aside(folder: Path, entries: Sequence[Path]) -> Path:
    """Moves entries of a folder into a new `previous-N` within it; returns that.

    Raises:
        UserError: they cannot be moved.
    """
    numbers = (path.name.removeprefix(ASIDE) for path in folder.glob(f"{ASIDE}*"))
    number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
    aside = folder / f"{ASIDE}{number}"
    try:
        aside.mkdir()
        for path in entries:
            path.rename(aside / path.name)
    except OSError as error:
        raise cannot_write(aside, error) from error
    return aside


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error that a file cannot be written, with the mend where there is one."""
    full = ": free some space, then start again (a training: go on with --resume)"
    mend = full if error.errno == errno.ENOSPC else ""
    return UserError(f"{path} cannot be written: {error.strerror or error}{mend}")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_binary(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a binary file; see `atomically`.

    Unlike a name, an open file lets torch's writer report that the disk is full, not that the file
    is broken.
    """

    def write_open(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    atomically(path, write_open)


@contextmanager
def naming_damage(path: Path, mend: str) -> Iterator[None]:
    """Around the reading of a file of numpy's arrays: whatever is wrong with it is one line.

    Args:
        path: the file, which is there.
        mend: what to do about a damaged one.

    Raises:
        UserError: the file is damaged, or lacks what is looked for within.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {mend}") from error


def append_line(path: Path, line: str) -> None:
    """Appends a line to a UTF-8 text file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(path: Path, key: str = "") -> None:
    """Makes a folder with its parents, if it does not exist.

    Args:
        path: the folder.
        key: the configuration's key that names it, for the message.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key} {path} cannot be made: {error.strerror}".lstrip()) from error


def file_name_part(text: str) -> str:
    """A name from the data as a part of a file's name; different texts give different parts.

    Separators, control characters and what some systems refuse are percent-encoded, so that a name
    is never a path. A part is at most 150 bytes long; longer ones end with a hash.
    """
    encoded = "".join(
        quote(c, safe="", errors="surrogatepass")
        if c in _NOT_IN_FILE_NAMES or not c.isprintable()
        else c
        for c in text
    )
    if encoded.strip(".") == "":  # "." and "..", and an empty name
        encoded = "%2E" * len(encoded) or "%"
    if len(encoded.encode()) <= _LONGEST_PART:
        return encoded
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return encoded.encode()[: _LONGEST_PART - 17].decode(errors="ignore") + f"-{digest}"


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file; see `atomically`."""
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented; see `atomically`. The value is converted by `plain_values`."""
    write_text(path, json.dumps(plain_values(value), indent=2, allow_nan=False) + "\n")


def plain_values(value: Any) -> Any:
    """Nested values for JSON: dataclasses become dicts, arrays lists, NaN and infinity None."""
    if is_dataclass(value):
        return {field.name: plain_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return plain_values(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for half a line at the end of a killed run.

    Raises:
        UserError: the file is missing, or a line is no JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: give the OUTPUT_DIR of a training run")
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def steps_and_values(
    entries: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[int], list[float]]:
    """The steps of a figure in the lines of `read_metrics`, and its values; null is left out."""
    points = [
        (entry["iteration"], entry[key])
        for entry in entries
        if isinstance(entry.get(key), int | float)
    ]
    return [step for step, _ in points], [value for _, value in points]
