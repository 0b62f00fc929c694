"""Reads and writes the PASCAL VOC challenge's files of detections.

In Python, boxes are pixel edges as in `voc_ap`. The files count pixels from 1 and include the last
one, so `xmin` and `ymin` are greater by 1 there.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tract_det.errors import UserError, shortened
from tract_det.evaluation.boxes import ONE_BASED, Detections
from tract_det.evaluation.ground_truth import WithOthers
from tract_det.files import file_name_part, write_text

# The challenge's detection competitions: trained on its own data only (3), or on any data (4).
_COMPETITIONS = ("comp3", "comp4")
_COLUMNS = "image_id score xmin ymin xmax ymax"


class ImageDetections(NamedTuple):
    """The detections of one image.

    Attributes:
        boxes: (n, 4) float64, pixel edges.
        scores: (n,) float64.
        labels: (n,) int64, 0..K-1.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def write_detections(
    folder: Path,
    split: str,
    class_names: Sequence[str],
    detections: Mapping[str, ImageDetections],
) -> None:
    """Writes the challenge's files, `comp4_det_<split>_<class>.txt`.

    Each file is written atomically. Numbers keep their full precision, so that the files give the
    same average precision when they are read back.

    Args:
        folder: created if it does not exist.
        split: name of the split.
        class_names: the K classes.
        detections: by image id, in the order of the split.

    Raises:
        UserError: a file cannot be written.
    """
    lines: list[list[str]] = [[] for _ in class_names]
    for image_id, (boxes, scores, labels) in detections.items():
        rows = zip(
            labels.tolist(),
            scores.tolist(),
            (boxes + ONE_BASED).tolist(),
            strict=True,
        )
        for label, score, box in rows:
            lines[label].append(f"{image_id} {score!r} {' '.join(map(repr, box))}\n")
    for name, class_lines in zip(class_names, lines, strict=True):
        write_text(_detection_file(folder, "comp4", split, name), "".join(class_lines))


def read_detections(
    folder: Path,
    split: str,
    class_names: Sequence[str],
    positions: Mapping[str, int],
    *,
    others: bool = False,
) -> Detections:
    """Reads the challenge's files `comp3_det_<split>_<class>.txt` or `comp4_det_...`.

    Args:
        folder: the folder of the files.
        split: name of the split.
        class_names: the K classes. Each must have a file, which may be empty.
        positions: of the images in the split, by image id.
        others: whether images may be there that are not in the split.

    Returns:
        The detections, class by class, in the order of the files. Images that are not in the split
        have the position -1.

    Raises:
        UserError: a folder or file is missing, both competitions have files, a line is not an image
            id and five finite numbers, an image is not in the split, or a width or height is
            negative. Files of other classes are named by a warning.
    """
    files = _find_detection_files(Path(folder), split, class_names)
    positions = WithOthers(positions) if others else positions
    tables = [_read_file(path, positions) for path in files]
    labels = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    table = np.concatenate([np.empty((0, 6)), *tables])
    return Detections(table[:, 0].astype(np.int64), table[:, 2:] - ONE_BASED, table[:, 1], labels)


def read_text(path: Path) -> str:
    """The text of a file of detections.

    Raises:
        UserError: it cannot be read, or is in another encoding than UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): write it again") from None


def _detection_file(folder: Path, competition: str, split: str, class_name: str) -> Path:
    """The challenge's name of the file; what no file name can have is escaped."""
    split, class_name = file_name_part(split), file_name_part(class_name)
    return folder / f"{competition}_det_{split}_{class_name}.txt"


def _find_detection_files(folder: Path, split: str, class_names: Sequence[str]) -> list[Path]:
    """The path of each class's file. All exist and belong to one competition."""
    pattern = f"comp[34]_det_{split}_<class>.txt"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such file or folder: give a COCO result file, or the folder that "
            f"holds {pattern}"
        )
    files = [
        [_detection_file(folder, competition, split, name) for name in class_names]
        for competition in _COMPETITIONS
    ]
    existing = [[path for path in paths if path.exists()] for paths in files]
    if all(existing):
        raise UserError(
            f"{folder}: has both {existing[0][0].name} and {existing[1][0].name}: move the files of"
            " one competition elsewhere"
        )
    if not any(existing):
        raise UserError(
            f"{folder}: no {pattern} for any of {', '.join(class_names)}: check folder, split and"
            " classes"
        )
    class_files = files[1] if existing[1] else files[0]
    for path in class_files:
        if not path.exists():
            raise UserError(f"{path}: is missing: create it, empty if there are no detections")
    _warn_of_others(folder, class_files, class_files[0].name.partition("_")[0], split)
    return class_files


def _warn_of_others(
    folder: Path, class_files: Sequence[Path], competition: str, split: str
) -> None:
    """Names files that may be of classes that the split does not have."""
    begin = f"{competition}_det_{file_name_part(split)}_"
    names = {path.name for path in folder.iterdir()} - {path.name for path in class_files}
    others = sorted(name for name in names if name.startswith(begin) and name.endswith(".txt"))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.warn(
            f"{folder}: left out are {len(others)} files of classes or splits other than these: "
            f"{shown}",
            stacklevel=4,
        )


def _read_file(path: Path, positions: Mapping[str, int]) -> np.ndarray:
    """A file as rows of the image's position, score and box as in the file. (n, 6) float."""
    text = read_text(path)
    table = _table(text, positions)
    if table is None:
        rows = [
            _row(f"{path}, line {number}", line, positions)
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip()
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return table


def _table(text: str, positions: Mapping[str, int]) -> np.ndarray | None:
    """A file without mistakes, several times as fast as line by line.

    Returns:
        (n, 6) float; None if a line is malformed, or an image id has blanks.
    """
    words = text.split()
    if not words:
        return np.empty((0, 6))
    if not _has_six_columns(text, len(words)):
        return None
    table = np.array(words, dtype=object).reshape(-1, 6)
    try:
        table[:, 0] = [positions[image_id] for image_id in words[::6]]
        if text.count("_") > sum(image_id.count("_") for image_id in words[::6]):
            return None
        numbers = table.astype(np.float64)
    except (KeyError, ValueError):
        return None
    is_plain = np.isfinite(numbers).all() and not _is_negative(numbers[:, 2:]).any()
    return numbers if is_plain else None


def _has_six_columns(text: str, words: int) -> bool:
    """Whether each line has six words or none, counted without making a list of each line."""
    characters = np.frombuffer(text.encode(), dtype=np.uint8)
    is_word = characters > ord(" ")
    begins_word = is_word.copy()
    begins_word[1:] &= ~is_word[:-1]
    line_begins = np.append(0, np.flatnonzero(characters[:-1] == ord("\n")) + 1)
    in_line = np.add.reduceat(begins_word, line_begins, dtype=np.int64)
    # Other blanks than those of ASCII make the sum another: such a file is read line by line.
    return bool(((in_line == 6) | (in_line == 0)).all() and in_line.sum() == words)


def _row(where: str, line: str, positions: Mapping[str, int]) -> tuple[float, ...]:
    """The image's position, score and box of a line.

    Raises:
        UserError: the line is malformed.
    """
    columns = line.strip().rsplit(None, 5)  # an image id may contain blanks
    image_id = columns[0]
    position = _position(image_id, positions)
    if len(columns) != 6 or (position is None and len(image_id.split()) > 1):
        raise UserError(f"{where}: has {len(line.split())} columns: write {_COLUMNS}")
    try:
        values = [float(column) for column in columns[1:]]
        if "_" in "".join(columns[1:]):  # Python reads 1_000 as a number
            raise ValueError
    except ValueError:
        values = [math.nan]
    shown = shortened(line.strip(), 200)
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: {shown!r} is not {_COLUMNS}: write finite numbers")
    if position is None:
        raise UserError(
            f"{where}: image {shortened(image_id, 200)!r} is not in the split, whose images are "
            f"such as {shortened(str(next(iter(positions), '')))!r}: evaluate the split that these "
            "detections belong to, or leave out others by --ignore-other-images"
        )
    if _is_negative(np.array([values[1:]])).any():
        raise UserError(
            f"{where}: {shown!r} has xmax < xmin or ymax < ymin: write {_COLUMNS}, the corners of"
            " the box from its top left one"
        )
    return position, *values


def _position(image_id: str, positions: Mapping[str, int]) -> int | None:
    """The position of an image; None if it has none, or if its id is one with more columns."""
    try:
        position = positions[image_id]
    except KeyError:
        return None
    words = image_id.split()
    has_columns = len(words) > 1 and (words[0] in positions or _is_number(words[-1]))
    return None if position < 0 and has_columns else position


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_negative(boxes: np.ndarray) -> np.ndarray:
    """Whether a box of the challenge's files has a negative width or height. (n, 4) -> (n,) bool.

    Pixels are inclusive, so that a box of less than a pixel has xmax < xmin, by less than 1.
    """
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return (size < -1e-6).any(axis=1)  # adding 1 to a coordinate rounds it
