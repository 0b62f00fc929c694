"""A fingerprint of a split: whether two trainings had the same images, wherever these lie."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

_SAMPLED = 16  # images whose content counts; of the others the name does
_BEGINNING = 2**16  # bytes of a file


def fingerprint(parts: Iterable[bytes], images: int, content: Callable[[int], bytes]) -> str:
    """Sixteen hexadecimal digits of whatever makes up a split.

    Args:
        parts: classes, names, labels.
        images: number of images.
        content: of an image, by its position; that of a few images is looked at.
    """
    digest = hashlib.sha256()
    sampled = np.linspace(0, images - 1, min(images, _SAMPLED)).astype(int)
    for part in (*parts, *(content(int(index)) for index in sampled)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def names_as_bytes(names: Iterable[str]) -> bytes:
    """Names in their order; they may come from a file system."""
    return "\0".join(names).encode("utf-8", "surrogatepass")


def beginning(path: Path) -> bytes:
    """The first bytes of a file; none if it cannot be read, which the training will say."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(_BEGINNING)
    return b""
