"""A comparison as it is kept: comparison.json, its rows read back, and comparison.md."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tract_det.evaluation.comparison import Curve
from tract_det.evaluation.comparison_report import Group, Row, hardware_of, judge, origin, table
from tract_det.evaluation.samples import OverImages

# The files in a comparison's folder.
JSON, MARKDOWN, PICTURE = "comparison.json", "comparison.md", "comparison.png"


def rows_of(content: Mapping[str, Any]) -> list[Row]:
    """The rows of a comparison, judged anew by the curves of its runs.

    The intervals over images are those that were measured: the samples are in the runs' folders.

    Args:
        content: of comparison.json.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
    """
    return [
        replace(row, over_images=_over_images(values))
        for row, values in zip(judge(_groups(content)), content["rows"], strict=True)
    ]


def _groups(content: Mapping[str, Any]) -> list[Group]:
    """The runs by arm and length, in the order of the rows."""
    groups = []
    for row in content["rows"]:
        arm, epochs = row["arm"], row["epochs"]
        mine = [run for run in content["runs"] if (run["arm"], run["epochs"]) == (arm, epochs)]
        curves = {run["seed"]: _curve(run) for run in mine if run["status"] != "missing"}
        seconds = {
            run["seed"]: run["training_seconds"] for run in mine if run["status"] == "finished"
        }
        turns = {run["seed"]: run.get("stem_turn") for run in mine if run["seed"] in seconds}
        known = {seed: turn for seed, turn in turns.items() if turn is not None}
        machines = {run["seed"]: hardware_of(run["starts"]) for run in mine}
        groups.append(
            Group(
                arm, epochs, curves, seconds, row["baseline"], stem_turns=known, hardware=machines
            )
        )
    return groups


def _over_images(row: Mapping[str, Any]) -> OverImages | None:
    values = row.get("over_images")  # older files have none
    return OverImages(**values) if values else None


def _curve(run: Mapping[str, Any]) -> Curve | None:
    if run["status"] != "finished":
        return None
    curve = run["curve"]
    epochs, values = (np.array(curve[key], dtype=float) for key in ("epochs", "values"))
    return Curve(epochs, values, curve.get("is_early", False))


def markdown(
    arms: Sequence[str],
    command: str,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    metric: str,
    sentences: Sequence[str],
) -> str:
    """comparison.md.

    Args:
        arms: their names, for the heading.
        command: that made the runs.
        records: of the runs, for where they were made.
        rows: of the table.
        metric: that is compared.
        sentences: below the table.
    """
    parts = [
        f"# Comparison of {', '.join(arms)}",
        f"`{command}`",
        origin(records),
        f"![metric]({PICTURE})",
        table(rows, metric),
        *sentences,
    ]
    return "\n\n".join(parts) + "\n"
