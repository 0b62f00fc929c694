"""Reads and writes the PASCAL VOC challenge's files of detections.

In Python, boxes are pixel edges as in `voc_ap`. The files count pixels from 1 and include the last
one, so `xmin` and `ymin` are greater by 1 there.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tract_det.errors import UserError
from tract_det.files import file_name_part, write_text

# The challenge's detection competitions: trained on its own data only (3), or on any data (4).
_COMPETITIONS = ("comp3", "comp4")
_COLUMNS = "image_id score xmin ymin xmax ymax"
_ONE_BASED = np.array([1.0, 1.0, 0.0, 0.0])


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
            (boxes + _ONE_BASED).tolist(),
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
    image_ids: Collection[str] | None = None,
) -> dict[str, ImageDetections]:
    """Reads the challenge's files `comp3_det_<split>_<class>.txt` or `comp4_det_...`.

    Args:
        folder: the folder of the files.
        split: name of the split.
        class_names: the K classes. Each must have a file, which may be empty.
        image_ids: the images of the split. None accepts every image id without blanks.

    Returns:
        The detections by image id: for each of `image_ids` in order, even if it has no detections;
        without `image_ids`, for the images in the files.

    Raises:
        UserError: a folder or file is missing, both competitions have files, a line is not an image
            id and five numbers, or an image is not in the split.
    """
    rows: dict[str, list[tuple[float, ...]]] = {image_id: [] for image_id in image_ids or ()}
    known_ids = None if image_ids is None else set(rows)
    for label, path in enumerate(_find_detection_files(Path(folder), split, class_names)):
        for image_id, numbers in _read_detection_file(path, known_ids):
            rows.setdefault(image_id, []).append((*numbers, label))
    tables = {
        image_id: np.array(row, dtype=np.float64).reshape(-1, 6) for image_id, row in rows.items()
    }
    return {
        image_id: ImageDetections(
            table[:, 1:5] - _ONE_BASED, table[:, 0], table[:, 5].astype(np.int64)
        )
        for image_id, table in tables.items()
    }


def _detection_file(folder: Path, competition: str, split: str, class_name: str) -> Path:
    """The challenge's name of the file; what no file name can have is escaped."""
    split, class_name = file_name_part(split), file_name_part(class_name)
    return folder / f"{competition}_det_{split}_{class_name}.txt"


def _find_detection_files(folder: Path, split: str, class_names: Sequence[str]) -> list[Path]:
    """The path of each class's file. All exist and belong to one competition."""
    pattern = f"comp[34]_det_{split}_<class>.txt"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the one that holds {pattern}")
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
    return class_files


def _read_detection_file(
    path: Path, known_ids: Collection[str] | None
) -> Iterator[tuple[str, list[float]]]:
    """Yields the image id and (score, xmin, ymin, xmax, ymax) of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): write it again") from None
    for number, line in enumerate(lines, start=1):
        columns = line.strip().rsplit(None, 5)  # an image id may contain blanks
        if not columns:
            continue
        where = f"{path}, line {number}"
        image_id = columns[0]
        is_known = known_ids is not None and image_id in known_ids
        if len(columns) != 6 or (not is_known and len(image_id.split()) > 1):
            raise UserError(f"{where}: has {len(line.split())} columns: write {_COLUMNS}")
        try:
            values = [float(column) for column in columns[1:]]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise UserError(f"{where}: {line.strip()!r} is not {_COLUMNS}: write finite numbers")
        if known_ids is not None and not is_known:
            raise UserError(
                f"{where}: image {image_id!r} is not in the split: evaluate the split that these"
                " detections belong to, or remove the line"
            )
        yield image_id, values
