"""Looks at the header of every image at the start, so that all unreadable ones are said at once.

Of many images, what the headers said is remembered in the user's cache folder, by path, size and
time of the last change: a second start looks at no file that has stayed as it was. Measurements:
benchmarks/data_design_notes.md.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tract_det.data.faults import Faults
from tract_det.data.images import Header, read_header, refuse_too_many
from tract_det.errors import UserError

_READERS = 8  # threads, which on a network's disk wait most of the time
_PART = 256  # files that a thread takes at a time
_WORTH = 1000  # files; to remember fewer would save less than a second
# What is remembered: a hash of a file's path, size and time, and what its header says.
_RECORD = np.dtype([("key", "<u8"), ("width", "<u4"), ("height", "<u4"), ("orientation", "u1")])


class Headers(NamedTuple):
    """What the headers of n image files say.

    Attributes:
        records: (n,) with the fields `width` and `height` in pixels as stored and `orientation`.
        errors: Why files were refused, by position.
    """

    records: np.ndarray
    errors: Mapping[int, UserError]

    def header(self, index: int) -> Header:
        """The header of a file.

        Raises:
            UserError: As `images.read_header`.
        """
        if index in self.errors:
            raise self.errors[index]
        _, width, height, orientation = self.records[index].tolist()
        return Header((width, height), orientation)


def check_headers(root: Path, names: Sequence[str], max_pixels: int, channels: int = 3) -> None:
    """Refuses image files that cannot be read, before any of them is decoded.

    Args:
        root: The folder of the data set.
        names: Of the files, below root.
        max_pixels: A file with more is refused.
        channels: As in `images.read_upright`.

    Raises:
        UserError: A file cannot be read, or has other channels or too many pixels; says so of all
            of them at once.
    """
    headers = read_headers(root, names, channels)
    pixels = headers.records["width"].astype(np.int64) * headers.records["height"]
    faults = Faults()
    for index in sorted({*headers.errors, *np.flatnonzero(pixels > max_pixels).tolist()}):
        with faults.noted():
            refuse_too_many(root / names[index], headers.header(index).stored, max_pixels)
    faults.refuse()


def read_headers(root: Path, names: Sequence[str | Path], channels: int | None = None) -> Headers:
    """Reads the headers of image files in several threads, or remembers them.

    Args:
        root: The folder of the data set.
        names: Of the files, below root or absolute.
        channels: As in `images.read_header`.
    """
    records = np.zeros(len(names), _RECORD)
    records["key"] = [_key(root / name, channels) for name in names]
    is_remembered = len(names) >= _WORTH
    known = _read_cache(root) if is_remembered else np.empty(0, _RECORD)
    _, old, new = np.intersect1d(known["key"], records["key"], return_indices=True)
    records[new] = known[old]
    unknown = np.setdiff1d(np.arange(len(names)), new)
    errors = {}
    for index, header in _look_at(root, names, unknown, channels):
        if isinstance(header, UserError):
            errors[index] = header
        else:
            records[index] = (records[index]["key"], *header.stored, header.orientation)
    if is_remembered and unknown.size:
        _write_cache(root, np.concatenate((known, np.delete(records, list(errors)))))
    return Headers(records, errors)


def _look_at(
    root: Path, names: Sequence[str | Path], indices: np.ndarray, channels: int | None
) -> Iterator[tuple[int, Header | UserError]]:
    """The headers of these files, or why they are refused, with their positions."""

    def look(part: np.ndarray) -> list[Header | UserError]:
        return [_header(root / names[index], channels) for index in part]

    parts = [indices[start : start + _PART] for start in range(0, len(indices), _PART)]
    with ThreadPoolExecutor(_READERS) as pool:
        for part, headers in zip(parts, pool.map(look, parts), strict=True):
            yield from zip(part.tolist(), headers, strict=True)


def _header(path: Path, channels: int | None) -> Header | UserError:
    try:
        return read_header(path, channels)
    except UserError as error:
        return error


def _key(path: Path, channels: int | None) -> int:
    """Stands for a file as it is now, 64 bits; a file that is not there has a key as well."""
    size, changed = -1, -1
    with suppress(OSError):
        status = path.stat()
        size, changed = status.st_size, status.st_mtime_ns
    text = os.fsencode(path) + f"\0{size}\0{changed}\0{channels}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _cache_file(root: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
    return Path(os.path.expanduser(base), "tract_det", "headers", f"{name}.npy")  # noqa: PTH111


def _read_cache(root: Path) -> np.ndarray:
    """The records of readable files; none if the cache is not there or damaged."""
    with suppress(OSError, ValueError, EOFError, MemoryError):
        records = np.load(_cache_file(root), allow_pickle=False)
        if isinstance(records, np.ndarray) and records.dtype == _RECORD and records.ndim == 1:
            return records
    return np.empty(0, _RECORD)


def _write_cache(root: Path, records: np.ndarray) -> None:
    """Writes it, or does nothing where that is not possible."""
    path = _cache_file(root)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.save(temporary, np.unique(records))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
