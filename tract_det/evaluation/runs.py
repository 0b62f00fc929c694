"""What a training run has left in its folder: the curve of a metric and the time that it took."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tract_det.errors import UserError
from tract_det.evaluation.comparison import Curve
from tract_det.files import read_metrics

_TURN = "stem_turn"


@dataclass(frozen=True)
class Record:
    """A run, as far as it has come.

    Attributes:
        curve: the evaluations that gave a figure; None before the first one, and where the last
            one gave none.
        is_finished: whether the last step was evaluated: that of the full length, or the one after
            which SOLVER.PATIENCE ended the run.
        seconds: wall time of the training steps, without evaluations and checkpoints.
        evaluated: the step of the last evaluation; 0 before the first one.
        stem_turn: by how many degrees the stem's filters had turned then; None where unknown.
    """

    curve: Curve | None
    is_finished: bool
    seconds: float
    evaluated: int
    stem_turn: float | None = None


def read_run(folder: Path, metric: str, *, steps: int, batch: int, images: int) -> Record:
    """Reads the run in a folder.

    Args:
        folder: its OUTPUT_DIR.
        metric: which of the figures; those in [0, 100] are in per cent.
        steps: its length.
        batch: images per step.
        images: of an epoch.

    Raises:
        UserError: `metrics.jsonl` is missing, or that or `results.json` is damaged.
    """
    entries = _entries(folder / "metrics.jsonl", metric)
    points = {
        entry["iteration"]: math.nan if entry[metric] is None else entry[metric]
        for entry in entries
        if metric in entry
    }
    curve = None
    if points and math.isfinite(points[max(points)]):
        measured = [step for step in sorted(points) if math.isfinite(points[step])]
        epochs = np.array(measured) * batch / images
        curve = Curve(epochs, np.array([points[step] for step in measured], dtype=float))
    seconds, done = 0.0, 0
    for entry in entries:
        if "images_per_second" in entry:
            seconds += (entry["iteration"] - done) * batch / entry["images_per_second"]
            done = entry["iteration"]
    end = _stopped_at(folder)
    is_early = end is not None and end == max(points, default=None) and end == done
    if curve is not None and is_early:
        curve = replace(curve, is_early=True)
    is_finished = (is_early or steps in points) and (folder / "results.json").is_file()
    turns = [entry[_TURN] for entry in entries if entry.get(_TURN) is not None]
    last = turns[-1] if turns else None
    return Record(curve, is_finished, seconds, max(points, default=0), last)


def _entries(path: Path, metric: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, each with its step, and numbers where numbers are used."""
    mend = f"delete {path.parent} to make the run again"
    try:
        entries = read_metrics(path)
    except UserError as error:
        raise UserError(f"{error}: {mend}") from error
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not _is_step(entry.get("iteration")):
            raise UserError(f"{path} is damaged: line {number} has no iteration: {mend}")
        speed = entry.get("images_per_second", 1.0)
        figures = entry.get(metric), entry.get(_TURN)
        are_numbers = all(isinstance(figure, int | float | None) for figure in figures)
        if not are_numbers or not _is_positive(speed):
            raise UserError(f"{path} is damaged: line {number} has no number: {mend}")
    return entries


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _stopped_at(folder: Path) -> int | None:
    """The step after which SOLVER.PATIENCE ended the run, as `results.json` says."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())["stopped"]["step"]
    except KeyError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}: delete it to make the run again") from error
