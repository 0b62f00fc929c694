"""The challenge's detection files, in and out.

Boxes are pixel edges, as in `voc_ap`. The files count pixels from 1, the last included: `xmin` and
`ymin` are one higher there.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tract_det.errors import UserError
from tract_det.files import write_text

# The challenge's competitions for detection: trained on its own data alone (3) or on any (4).
_COMPETITIONS = ("comp3", "comp4")
_COLUMNS = "image_id score xmin ymin xmax ymax"
_ONE_BASED = np.array([1.0, 1.0, 0.0, 0.0])


class ImageDetections(NamedTuple):
    """What was found on one image.

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

    Each file appears whole or not at all. Numbers are written in full, so that reading them back
    gives the same average precision.

    Args:
        folder: made if it is not there.
        split: the split's name.
        class_names: the K classes.
        detections: by image, in the split's order.

    Raises:
        UserError: if a file cannot be written.
    """
    lines: list[list[str]] = [[] for _ in class_names]
    for image_id, found in detections.items():
        rows = zip(
            found.labels.tolist(),
            found.scores.tolist(),
            (found.boxes + _ONE_BASED).tolist(),
            strict=True,
        )
        for label, score, box in rows:
            lines[label].append(f"{image_id} {score!r} {' '.join(map(repr, box))}\n")
    for name, own in zip(class_names, lines, strict=True):
        write_text(_detection_file(folder, "comp4", split, name), "".join(own))


def read_detections(
    folder: Path,
    split: str,
    class_names: Sequence[str],
    image_ids: Collection[str] | None = None,
) -> dict[str, ImageDetections]:
    """Reads the challenge's files `comp3_det_<split>_<class>.txt` or `comp4_det_...`.

    Args:
        folder: where the files are.
        split: the split's name.
        class_names: the K classes; each must have a file, which may be empty.
        image_ids: the images of the split; None: any image is accepted whose id has no blanks.

    Returns:
        The detections by image: of every one of `image_ids` in their order, also where there are
        none, else of the images that occur.

    Raises:
        UserError: for a missing folder or file, files of two competitions, a line that is not an
            image id and five numbers, or an image that is not in the split.
    """
    rows: dict[str, list[tuple[float, ...]]] = {image_id: [] for image_id in image_ids or ()}
    known = None if image_ids is None else set(rows)
    for label, path in enumerate(_find_detection_files(Path(folder), split, class_names)):
        for image_id, numbers in _read_detection_file(path, known):
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
    return folder / f"{competition}_det_{split}_{class_name}.txt"


def _find_detection_files(folder: Path, split: str, class_names: Sequence[str]) -> list[Path]:
    """One existing file for each class, all of one competition."""
    wanted = f"comp[34]_det_{split}_<class>.txt"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give the one that holds {wanted}")
    files = [
        [_detection_file(folder, competition, split, name) for name in class_names]
        for competition in _COMPETITIONS
    ]
    there = [[path for path in paths if path.exists()] for paths in files]
    if all(there):
        raise UserError(
            f"{folder}: has both {there[0][0].name} and {there[1][0].name}: move one competition's"
            " files elsewhere"
        )
    if not any(there):
        raise UserError(
            f"{folder}: no {wanted} for any of {', '.join(class_names)}: check folder, split and"
            " classes"
        )
    for path in files[bool(there[1])]:
        if not path.exists():
            raise UserError(f"{path}: is missing: make it, empty if nothing was found")
    return files[bool(there[1])]


def _read_detection_file(
    path: Path, known: Collection[str] | None
) -> Iterator[tuple[str, list[float]]]:
    """Image id and (score, xmin, ymin, xmax, ymax) of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): write it anew") from None
    for number, line in enumerate(lines, start=1):
        columns = line.strip().rsplit(None, 5)  # from the right: an image id may have blanks
        if not columns:
            continue
        where = f"{path}, line {number}"
        image_id = columns[0]
        is_known = known is not None and image_id in known
        if len(columns) != 6 or (not is_known and len(image_id.split()) > 1):
            raise UserError(f"{where}: has {len(line.split())} columns: write {_COLUMNS}")
        try:
            values = [float(column) for column in columns[1:]]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise UserError(f"{where}: {line.strip()!r} is not {_COLUMNS}: write finite numbers")
        if known is not None and not is_known:
            raise UserError(
                f"{where}: image {image_id!r} is not in the split: evaluate the split that the"
                " detections are of, or remove the line"
            )
        yield image_id, values
