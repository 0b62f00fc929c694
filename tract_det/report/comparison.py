"""comparison.html: what `tract-det compare` has found, on one page that opens offline."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from tract_det.errors import UserError
from tract_det.evaluation.comparison import mean_curve
from tract_det.evaluation.comparison_file import JSON, rows_of
from tract_det.evaluation.comparison_report import Group, Row, in_points, origin, table_cells
from tract_det.files import write_text
from tract_det.report.page import fill
from tract_det.report.svg import Series, Whisker, interval_chart, line_chart


def write_comparison(folder: Path, path: Path) -> None:
    """Writes the page of a comparison, from its comparison.json.

    Args:
        folder: of the comparison, with those of its runs.
        path: the HTML file; its links to the runs' reports are relative.

    Raises:
        UserError: comparison.json is missing or damaged.
    """
    source = folder / JSON
    try:
        content = json.loads(source.read_text())
        text = _render(content, folder, path.parent)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} is damaged ({error}): give the command of `tract-det compare` again"
        ) from error
    write_text(path, text)


def _render(content: Mapping[str, Any], folder: Path, place: Path) -> str:
    rows = rows_of(content)
    groups, metric = [row.group for row in rows], content["metric"]
    head, *cells = table_cells(rows, metric)
    arms = list(dict.fromkeys(group.arm for group in groups))
    charts = [
        (
            "Mean over the epochs, with one standard deviation to either side",
            _curves(groups, arms, metric),
        ),
        ("Differences at the end, with 95 % intervals", _differences(rows, arms)),
    ]
    return fill(
        "comparison.html.j2",
        title=f"Comparison of {', '.join(arms)}",
        verdicts=content["verdicts"],
        origin=origin(content["runs"]),
        head=head,
        rows=cells,
        charts=[{"title": title, "svg": Markup(svg)} for title, svg in charts if svg],
        metric=metric,
        runs=[_run(run, folder, place) for run in content["runs"]],
        command=content["command"],
    )


def _curves(groups: Sequence[Group], arms: Sequence[str], metric: str) -> str:
    """A line for each arm and length, of an arm in one colour; dashed but for the longest."""
    longest = max(group.epochs for group in groups)
    has_lengths = any(group.epochs < longest for group in groups)
    series = []
    for group in groups:
        mean = mean_curve(group.as_arm())
        series.append(
            Series(
                f"{group.arm}, {group.epochs:g} epochs" if has_lengths else group.arm,
                mean.epochs.tolist(),
                mean.mean.tolist(),
                arms.index(group.arm),
                is_dashed=group.epochs < longest,
                spread=mean.sd.tolist() if mean.n > 1 else (),
            )
        )
    return line_chart(series, x_label="epoch", y_label=f"{metric}, %")


def _differences(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """The difference of each arm to its baseline, at the same length and at the greatest."""
    whiskers = []
    longest = max(row.group.epochs for row in rows)
    for row in rows:
        group = row.group
        control = group.baseline or group.arm
        at_longest = f"{control} at {longest:g} epochs"
        for difference, other in ((row.difference, control), (row.to_longest, at_longest)):
            if difference is not None:
                whiskers.append(
                    Whisker(
                        f"{group.arm} at {group.epochs:g} epochs, minus {other}",
                        difference.mean,
                        difference.interval,
                        f"{in_points(difference)}, n = {difference.n}",
                        arms.index(group.arm),
                    )
                )
    return interval_chart(whiskers, x_label="difference, points")


def _run(run: Mapping[str, Any], folder: Path, place: Path) -> dict[str, Any]:
    """A row of the table of runs."""
    report = folder / run["folder"] / "report.html"
    link = quote(Path(os.path.relpath(report, place)).as_posix()) if report.is_file() else ""
    is_finished = run["status"] == "finished"
    return {
        "arm": run["arm"],
        "epochs": run["epochs"],
        "seed": run["seed"],
        "status": run["status"],
        "final": run["curve"]["values"][-1] if is_finished else None,
        "seconds": run["training_seconds"] if is_finished else None,
        "folder": run["folder"],
        "link": link,
    }
