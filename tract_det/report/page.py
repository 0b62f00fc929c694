"""The page: sections of what the runs have left, put into one HTML file.

Everything that comes from data (names of classes, files and keys, values) goes through the
template's escaping, or through `html.escape` where SVG is put together.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from tract_det.files import steps_and_values, write_text
from tract_det.report.folder import RunFolder, read_run
from tract_det.report.images import drawn_boxes, filter_sheet, picture
from tract_det.report.stem import mean_turn
from tract_det.report.svg import Series, bar_chart, line_chart
from tract_det.version import __version__

_MOST_CLASSES = 10  # with a curve of their own
_MOST_CELLS = 25  # rows of a confusion matrix that is shown as a table
_HEADLINE = {"detection": "voc_area.mAP", "classification": "top1"}
_TITLES = {
    "voc_area.mAP": "mAP (area)",
    "voc_07.mAP": "mAP (11 points)",
    "coco.AP": "COCO AP",
    "coco.AP50": "COCO AP50",
    "coco.AP75": "COCO AP75",
    "top1": "top-1",
    "top5": "top-5",
    "ema.top1": "top-1 of the average",
}


class _ClassColumns(NamedTuple):
    """What a table of classes has.

    Attributes:
        note: what to know of it.
        total: the key of the number of examples.
        columns: keys and titles, the main figure first.
    """

    note: str
    total: str
    columns: Sequence[tuple[str, str]]


_CLASS_COLUMNS = {
    "detection": _ClassColumns(
        "AP is the area under the precision envelope; precision and recall are those of the "
        "best F1, at IoU 0.5.",
        "objects",
        [
            ("voc_area.AP_50", "AP@.5"),
            ("voc_area.AP_75", "AP@.75"),
            ("voc_area.AP_50_95", "AP@.5:.95"),
            ("f1", "best F1"),
            ("score", "at score"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("max_recall", "max recall"),
            ("objects", "objects"),
            ("difficult", "difficult"),
            ("detections", "detections"),
        ],
    ),
    "classification": _ClassColumns(
        "Top-1 is in per cent of the class's images, with Wilson's 95 % interval.",
        "images",
        [("top1", "top-1"), ("interval", "95 % interval"), ("images", "images")],
    ),
}


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Writes a report of the runs in these folders.

    Args:
        folders: OUTPUT_DIRs; runs of detectors and classifiers do not mix.
        path: the HTML file.

    Raises:
        UserError: a folder holds no run, or a file is damaged.
    """
    names = _names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    write_text(path, render(runs))


def render(runs: Sequence[RunFolder]) -> str:
    """The text of the page."""
    return fill(
        "report.html.j2",
        title=" and ".join(run.name for run in runs),
        runs=runs,
        verdicts=[verdict(run) for run in runs],
        figures=_figures(runs),
        charts=_charts(runs),
        classes=_class_table(runs),
        details=[_details(run) for run in runs],
        configs=_configs(runs),
    )


def fill(template: str, **values: Any) -> str:
    """The text of a page; all values are escaped but for those that are `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tract_det.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(values, version=__version__)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above them as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < 8 and len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def number(value: Any) -> str:
    """A figure as the tables show it."""
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value)
    if isinstance(value, list):
        return " to ".join(map(number, value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.2f}"
    return str(value)


def verdict(run: RunFolder) -> str:
    """What the run has reached, in a sentence."""
    results = run.results
    metric = _HEADLINE[run.task]
    value = _at(results, metric)
    stem = "a plain stem"
    if run.config.get("MODEL.TRACT.ENABLED"):
        stem = f"a TrAct stem (lambda {run.config.get('MODEL.TRACT.LAMBDA')})"
    elif run.config.get("MODEL.STEM_INIT"):
        stem = f"a {run.config['MODEL.STEM_INIT']} stem"
    steps = max((line["iteration"] for line in run.metrics), default=0)
    after = f" after {steps:,} steps" if steps else ""
    if value is None:
        return f"Not finished{after}, with {stem}."
    interval = _interval(results, metric)
    sure = f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
    images = f" on {results['images']:,} images" if "images" in results else ""
    with_stem = f", with {stem}" if run.config else ""
    return f"{_TITLES[metric]} {value:.1f} %{sure}{images}{after}{with_stem}."


def _at(results: dict[str, Any], metric: str) -> float | None:
    value: Any = results
    for part in metric.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _interval(results: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """The ends of a figure's interval, None where there is none, as of one image.

    Those of the moving average are with its own figures.
    """
    if metric.startswith("ema."):
        results, metric = results.get("ema", {}), metric.removeprefix("ema.")
    ends = results.get("intervals", {}).get(metric)
    return None if ends is None or None in ends else ends


def _figures(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Rows of the table of figures: title, and of each run value and interval."""
    rows = []
    for metric, title in _TITLES.items():
        values = [_at(run.results, metric) for run in runs]
        if any(value is not None for value in values):
            intervals = [_interval(run.results, metric) for run in runs]
            rows.append({"title": title, "cells": list(zip(values, intervals, strict=True))})
    speed = [_mean(run, "images_per_second") for run in runs]
    memory = [_most(run, "peak_memory_gib") for run in runs]
    for title, values in (("images/s in training", speed), ("peak memory, GiB", memory)):
        if any(value is not None for value in values):
            rows.append({"title": title, "cells": [(value, None) for value in values]})
    return rows


def _mean(run: RunFolder, key: str) -> float | None:
    values = [line[key] for line in run.metrics if key in line]
    return sum(values) / len(values) if values else None


def _most(run: RunFolder, key: str) -> float | None:
    return max((line[key] for line in run.metrics if key in line), default=None)


def _charts(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The curves of the training, all runs in one chart."""
    metric = _HEADLINE[runs[0].task]
    keys = [
        ("Evaluation", metric, f"{_TITLES[metric]}, %", False),
        ("Loss", "loss", "loss", True),
        ("Learning rate", "lr", "rate", False),
        ("How far the stem's filters have turned", "stem_turn", "degrees", False),
        ("TrAct: condition of G + lambda I", "tract_condition", "condition number", True),
        ("TrAct: norm of the stem's gradient", "stem_grad_norm", "norm", True),
    ]
    charts = []
    for title, key, label, log_y in keys:
        series = [_series(run, key, run.name, i) for i, run in enumerate(runs)]
        if key == "stem_grad_norm":
            series += [
                _series(run, "stem_plain_grad_norm", f"{run.name}, plain gradient", i, True)
                for i, run in enumerate(runs)
            ]
        svg = line_chart(series, x_label="step", y_label=label, log_y=log_y)
        if svg:
            charts.append({"title": title, "svg": Markup(svg)})
    return charts


def _series(run: RunFolder, key: str, name: str, color: int, is_dashed: bool = False) -> Series:
    return Series(name, *steps_and_values(run.metrics, key), color, is_dashed=is_dashed)


def _class_table(runs: Sequence[RunFolder]) -> dict[str, Any] | None:
    """Rows by class, with the main figure of each run; of one run, all that is known."""
    tables = [run.results.get("classes") or {} for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return None
    note, total, columns = _CLASS_COLUMNS[runs[0].task]
    if len(runs) > 1:
        main, title = columns[0]
        head = ["class", total, *(f"{title} {run.name}" for run in runs)]
        rows = [
            [
                name,
                next((table[name].get(total) for table in tables if name in table), None),
                *(table.get(name, {}).get(main) for table in tables),
            ]
            for name in names
        ]
    else:
        head = ["class", *(title for _, title in columns)]
        rows = [[name, *(tables[0][name].get(key) for key, _ in columns)] for name in names]
    return {"note": note, "head": head, "rows": rows}


def _details(run: RunFolder) -> dict[str, Any]:
    """What is shown of one run."""
    return {
        "name": run.name,
        "curves": Markup(_precision_recall(run)),
        "errors": Markup(_errors(run)),
        "confusion": _confusion(run),
        "confused": _confused(run),
        "worst": _worst(run),
        "filters": [
            (title, Markup(filter_sheet(weight)))
            for title, weight in zip(("at the start", _turn(run)), run.stem, strict=True)
            if weight is not None
        ],
        "starts": run.starts,
        "folder": run.folder,
    }


def _turn(run: RunFolder) -> str:
    """What is said of the filters now."""
    start, now = run.stem
    if start is None or now is None or start.shape != now.shape:
        return "now"
    turn = mean_turn(start, now)
    return f"now: turned by {turn:.0f} degrees in the mean" if math.isfinite(turn) else "now"


def _precision_recall(run: RunFolder) -> str:
    """A curve for each class, with the point of the best F1; of many classes for the worst."""
    curves, classes = run.figures.get("curves", {}), run.results.get("classes", {})
    names = [name for name, curve in curves.items() if curve["recall"] and name in classes]
    names.sort(key=lambda name: classes[name]["voc_area.AP_50"])
    series = []
    for i, name in enumerate(names[:_MOST_CLASSES]):
        figures = classes[name]
        mark = (figures["recall"], figures["precision"])
        is_marked = all(isinstance(x, int | float) and math.isfinite(x) for x in mark)
        curve = curves[name]
        series.append(
            Series(name, curve["recall"], curve["precision"], i, mark if is_marked else None)
        )
    span = (0.0, 100.0)
    return line_chart(
        series, x_label="recall, %", y_label="precision, %", x_range=span, y_range=(0.0, 100.0)
    )


def _errors(run: RunFolder) -> str:
    errors = run.results.get("errors", {})
    names = [f"{kind} ({entry['count']:,})" for kind, entry in errors.items()]
    values = [entry["voc_area"] for entry in errors.values()]
    values = [value if isinstance(value, int | float) else 0.0 for value in values]
    return bar_chart(names, values, unit="mAP")


def _confusion(run: RunFolder) -> dict[str, Any] | None:
    """The matrix, with each cell's share of its row; None if it is too large for a table."""
    confusion = run.results.get("confusion") or run.figures.get("confusion")
    if not confusion or len(confusion["classes"]) > _MOST_CELLS:
        return None
    rows = []
    for name, counts in zip(confusion["classes"], confusion["matrix"], strict=True):
        total = max(1, sum(counts))
        rows.append({"name": name, "cells": [(count, count / total) for count in counts]})
    return {
        "classes": confusion["classes"],
        "rows": rows,
        "score_threshold": confusion.get("score_threshold"),
    }


def _confused(run: RunFolder) -> list[tuple[str, str, int]]:
    """Of a matrix that is too large for a table, the pairs of classes that are confused most."""
    if _confusion(run) is not None:
        return []
    if "confused" in run.figures:
        entries = run.figures["confused"]
        return [(entry["true"], entry["predicted"], entry["count"]) for entry in entries]
    confusion = run.results.get("confusion")
    if not confusion:
        return []
    names, matrix = confusion["classes"], np.array(confusion["matrix"])
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:20]
    pairs = [divmod(int(i), len(names)) for i in order]
    return [(names[i], names[j], int(matrix[i, j])) for i, j in pairs if matrix[i, j]]


def _worst(run: RunFolder) -> list[dict[str, Any]]:
    """The worst images, each with its picture as text, or the reason why there is none."""
    class_names = run.figures.get("classes", [])
    shown = []
    for number_, entry in enumerate(run.figures.get("worst", [])):
        item = dict(entry) | {"id": f"{run.folder.name}-{number_}"}
        try:
            data, (width, height) = picture(Path(entry["path"]))
        except (OSError, ValueError) as error:
            item |= {"missing": f"the image cannot be read: {error}"}
        else:
            item |= {"missing": "", "data": data, "width": width, "height": height}
            if "objects" in entry:
                item["truth"] = Markup(drawn_boxes(entry["objects"], class_names, width))
                item["found"] = Markup(drawn_boxes(entry["detections"], class_names, width))
        shown.append(item)
    return shown


def _configs(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Rows of the keys that are not at their defaults in some run."""
    keys = sorted({key for run in runs for key in run.changed})
    rows = []
    for key in keys:
        default = next(run.changed[key][1] for run in runs if key in run.changed)
        values = [run.config.get(key) for run in runs]
        rows.append({"key": key, "default": default, "cells": values})
    return rows
