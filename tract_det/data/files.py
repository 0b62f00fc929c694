"""Finds the image files that annotations name."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tract_det.data.bands import ARRAY_SUFFIX
from tract_det.errors import UserError

# If several files have the name that an annotation means, the first suffix in this order wins.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ARRAY_SUFFIX)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is none of the user's: ._x.jpg, __MACOSX, Jupyter's checkpoints."""
    return path.name.startswith(".") or "__MACOSX" in path.parts


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, and neither hidden nor a picture's cache.

    Ultralytics' trainers leave an array beside a picture, of its name.
    """
    if is_hidden(path):
        return False
    suffix = path.suffix.lower()
    if suffix != ARRAY_SUFFIX:
        return suffix in IMAGE_SUFFIXES
    return not any(path.with_suffix(other).exists() for other in IMAGE_SUFFIXES[:-1])


def folders_in(place: Path) -> list[Path]:
    """The folders in a folder, sorted, but for hidden ones; a stat for each image is not needed."""
    with os.scandir(place) as entries:
        folders = sorted(Path(entry) for entry in entries if entry.is_dir())
    return [folder for folder in folders if not is_hidden(folder)]


def exists(path: Path) -> bool:
    """Whether there is a file or folder; pathlib raises where a name from data is too long."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether there is a file; see `exists`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_below(name: str) -> bool:
    """Whether a name with folders stays within the folder that it is taken from."""
    return not name.startswith("/") and ".." not in name.split("/")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        UserError: It cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): save it as UTF-8") from None


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
    """Files with one of the suffixes by their stem, but for hidden ones.

    They are sorted, the same on every machine.
    """
    first: dict[str, Path] = {}
    ranked = sorted(
        (suffixes.index(suffix), file.name, file)
        for file in files
        if (suffix := file.suffix.lower()) in suffixes and not is_hidden(file)
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
            except (OSError, ValueError):  # not there, or a name that no folder can have
                self._names[folder] = set()
        return path.name in self._names[folder]
