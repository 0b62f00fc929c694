"""The manifest of a checkpoint: sizes and checksums by which damage to its files is noticed.

Every byte counts: those of the tensors, those of the archives around them, and the manifest's own.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tract_det.errors import UserError
from tract_det.files import write_text

NAME = "manifest.json"
_CHUNK = 2**22  # bytes


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest, with a checksum of itself."""
    text = json.dumps(content)
    whole = {"crc32": zlib.crc32(text.encode()), "content": content}
    write_text(folder / NAME, json.dumps(whole, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as it says.

    Raises:
        UserError: the checkpoint is damaged or torn; says which file.
    """
    content = _read_manifest(folder)
    for name, entry in content["files"].items():
        if fault := _fault(folder / name, entry):
            raise UserError(f"checkpoint {folder} is damaged: {name} {fault}")
    return content


def _fault(path: Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file; "" = nothing."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size} of {entry['bytes']} bytes"
    try:
        is_sound = described(path, from_disk=True) == entry
    except (ValueError, EOFError, OSError, RuntimeError, struct.error, zipfile.BadZipFile):
        is_sound = False
    return "" if is_sound else "does not fit its checksums"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        whole = json.loads((folder / NAME).read_bytes())
        content = whole["content"]
        if whole["crc32"] == zlib.crc32(json.dumps(content).encode()):
            return content
    except FileNotFoundError:
        raise UserError(f"checkpoint {folder} is damaged: {NAME} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"checkpoint {folder} is damaged: {NAME} does not fit its checksum")


def described(path: Path, *, from_disk: bool = False) -> dict[str, Any]:
    """The size and the checksums of one of torch's files, for the manifest: plain values.

    torch writes zip archives, and computes the CRC-32 of each record from memory as it writes.
    Those are taken from the archive's directory; that of all bytes between the records is added.

    Args:
        path: the file.
        from_disk: compute the records' checksums from what is in the file.

    Raises:
        ValueError, zipfile.BadZipFile, EOFError: it is no such archive.
    """
    records, between, end = {}, 0, 0
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("torch does not compress")
            file.seek(entry.header_offset + 26)  # the lengths of the name and the extra field
            name, extra = struct.unpack("<HH", file.read(4))
            start = entry.header_offset + 30 + name + extra
            between = _crc32(file, end, start, between)
            end = start + entry.file_size
            crc32 = _crc32(file, start, end) if from_disk else entry.CRC
            records[entry.filename] = [entry.file_size, crc32]
        size = file.seek(0, os.SEEK_END)
        between = _crc32(file, end, size, between)
    return {"bytes": size, "between": between, "records": records}


def _crc32(file: BinaryIO, start: int, end: int, crc32: int = 0) -> int:
    """The checksum of a part of a file, continued from that of what comes before."""
    file.seek(start)
    for position in range(start, end, _CHUNK):
        crc32 = zlib.crc32(file.read(min(_CHUNK, end - position)), crc32)
    return crc32
