"""Finds the images and videos that a command line names, and gives each an id of its own."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tract_det.data.files import is_image
from tract_det.errors import UserError

# What is taken from a folder besides images; a file that is named itself may have any suffix.
VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"))


@dataclass(frozen=True)
class Input:
    """A file.

    Attributes:
        id: its name without suffix, or as much more of its path as tells it from the others; in
            one line. Of a video, its name with the suffix.
        path: where it is.
    """

    id: str
    path: Path

    @property
    def is_video(self) -> bool:
        """Whether its suffix is a video's."""
        return _is_video(self.path)

    @property
    def annotated_video(self) -> str:
        """The id that an annotated video of this one has: that of an MP4."""
        return _as_mp4(self.id)


def find_inputs(names: Sequence[str], without: Path) -> list[Input]:
    """The files behind what the user has named, each once.

    Args:
        names: files; folders, which are searched with the folders in them, but for hidden ones; or
            glob patterns.
        without: a folder whose files are left out when a folder is searched: that of the results.

    Raises:
        UserError: names all that do not exist, and folders and patterns with nothing in them.
    """
    paths: list[Path] = []
    faults: list[str] = []
    for name in names:
        files = _files(name, without.resolve())
        if isinstance(files, str):
            faults.append(files)
        else:
            paths += files
    if faults:
        raise UserError("; ".join(faults))
    unique = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
    return [Input(*pair) for pair in zip(_ids(unique), unique, strict=True)]


def _files(name: str, without: Path) -> list[Path] | str:
    """The files, or what is wrong with the name."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_taken(file, path, without)]
        return files or f"{name}: has no image or video in it: name another folder"
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    is_pattern = glob.has_magic(name)
    return files or f"{name}: {'matches no file' if is_pattern else 'does not exist'}: correct it"


def _is_taken(file: Path, folder: Path, without: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    is_known = is_image(file) or _is_video(file)
    return not is_hidden and is_known and file.is_file() and without not in file.resolve().parents


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _as_mp4(name: str) -> str:
    return name if name.endswith(".mp4") else f"{name}.mp4"


def _ids(paths: Sequence[Path]) -> list[str]:
    """For each path the shortest of its names that no other path has."""
    absolute = [path.absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute])) if paths else Path()
    candidates = [_names(path, root) for path in absolute]
    counts = Counter(name for names in candidates for name in dict.fromkeys(names))
    # clip.avi makes clip.avi.mp4, which another file may be called.
    videos = [names for path, names in zip(absolute, candidates, strict=True) if _is_video(path)]
    counts.update(_as_mp4(name) for names in videos for name in names if _as_mp4(name) != name)
    return [next((name for name in names if counts[name] == 1), names[-1]) for names in candidates]


def _names(path: Path, root: Path) -> list[str]:
    """The names that a file may go by, from the shortest to its whole path."""
    relative = path.relative_to(root)
    names = [path.name, str(relative), str(path)]
    if not _is_video(path):
        names = [path.stem, str(relative.with_suffix("")), *names]
    return list(map(_one_line, names))


def _one_line(name: str) -> str:
    """A name as text that fits a line: what does not print is percent-encoded."""
    return "".join(c if c.isprintable() else quote(c, errors="surrogateescape") for c in name)
