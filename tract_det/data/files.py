"""Finds the image files that annotations name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tract_det.data.bands import ARRAY_SUFFIX

# If several files have the name that an annotation means, the first suffix in this order wins.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ARRAY_SUFFIX)


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name; an array beside a picture of its name is its cache.

    Ultralytics' trainers leave such ones.
    """
    suffix = path.suffix.lower()
    if suffix != ARRAY_SUFFIX:
        return suffix in IMAGE_SUFFIXES
    return not any(path.with_suffix(other).exists() for other in IMAGE_SUFFIXES[:-1])


class Source(NamedTuple):
    """Where a split was found.

    Attributes:
        where: The file or folder that lists its images, for messages.
        folders: What its images may lie in, the most likely first.
        class_names: By class number, where the format numbers them.
        files: Its image files, where they are listed.
    """

    where: Path
    folders: tuple[Path, ...] = ()
    class_names: Mapping[int, str] = {}
    files: tuple[Path, ...] = ()


def by_stem(files: Iterable[Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files with one of the suffixes by their stem: sorted, the same on every machine."""
    first: dict[str, Path] = {}
    ranked = sorted(
        (suffixes.index(suffix), file.name, file)
        for file in files
        if (suffix := file.suffix.lower()) in suffixes
    )
    for _, _, file in ranked:
        first.setdefault(file.stem, file)
    return first


class Listing:
    """The names in folders, each of which is listed once: a stat for every image is slow."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def has(self, path: Path) -> bool:
        """Whether there is a file or folder of this name."""
        folder = path.parent
        if folder not in self._names:
            try:
                self._names[folder] = {entry.name for entry in folder.iterdir()}
            except OSError:
                self._names[folder] = set()
        return path.name in self._names[folder]
