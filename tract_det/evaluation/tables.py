"""The results of a detector's evaluation as text for a console."""

import math
from typing import Any

from tract_det.errors import shortened
from tract_det.evaluation.metrics import METRICS

_FEW = 5  # images: samples often miss them all


def format_table(results: dict[str, Any]) -> str:
    """Formats the results of `detection_results.summary`: a row per class, means, and COCO."""
    columns = [(rule, ap) for rule in ("voc_07", "voc_area") for ap in ("AP", "AP_50_95")]
    names = list(results["voc_07"]["AP"])
    width = max(map(len, ["class", *map(shortened, names)]))
    rows = [(shortened(name), [results[rule][ap][name] for rule, ap in columns]) for name in names]
    rows.append(("mean", [results[rule][f"m{ap}"] for rule, ap in columns]))
    head = ("07 @.5", "07 @.5:.95", "area @.5", "area @.5:.95")
    lines = [
        f"VOC AP in per cent, {results['rule']} rule, {results['images']} images",
        f"{'class':{width}}" + "".join(f"{title:>14}" for title in head),
        *(f"{name:{width}}" + "".join(f"{_percent(ap):>14}" for ap in aps) for name, aps in rows),
        "COCO: " + "  ".join(f"{name} {_percent(ap)}" for name, ap in results["coco"].items()),
    ]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def format_details(results: dict[str, Any]) -> str:
    """Formats what `detection_results.details` adds: classes, mistakes and intervals."""
    classes = results["classes"]
    width = max(map(len, ["class", *map(shortened, classes)]))
    titles = {
        "objects": "objects",
        "difficult": "difficult",
        "detections": "detections",
        "voc_07.AP_75": "07 @.75",
        "voc_area.AP_75": "area @.75",
        "f1": "best F1",
        "score": "at score",
        "precision": "precision",
        "recall": "recall",
        "max_recall": "max recall",
    }
    lines = ["", f"{'class':{width}}" + "".join(f"{title:>12}" for title in titles.values())]
    for name, row in classes.items():
        cells = [_cell(key, row[key]) for key in titles]
        lines.append(f"{shortened(name):{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [
        "",
        f"{'mistakes at IoU 0.5':20}{'number':>10}{'07 mAP':>10}{'area mAP':>10}  if mended",
    ]
    for kind, row in results["errors"].items():
        added = "".join(f"{_signed(row[group]):>10}" for group in ("voc_07", "voc_area"))
        lines.append(f"{kind:20}{row['count']:10}{added}")
    if intervals := results.get("intervals"):
        lines += [
            "",
            f"{intervals['level']:.0%} intervals, images resampled {intervals['samples']} times",
        ]
        lines += [
            f"{name:20}{_percent(_at(results, name)):>10}{_interval(intervals[name])}"
            for name in METRICS
        ]
        if rare := [shortened(name) for name, row in classes.items() if 0 < row["images"] < _FEW]:
            lines.append(
                f"too narrow, perhaps: objects in fewer than {_FEW} images have {', '.join(rare)}"
            )
    return "\n".join(lines)


def format_comparison(comparison: dict[str, Any], other: str) -> str:
    """Formats `detection_results.compare`.

    Args:
        comparison: the differences.
        other: where the detections came from that were subtracted.
    """
    lines = [
        "",
        f"minus {other}; {comparison['level']:.0%} intervals of the paired difference",
        f"p-values by swapping images; detections differ in {comparison['images_that_differ']} "
        f"of {comparison['images']} images",
    ]
    for name in METRICS:
        row = comparison[name]
        difference = f"{_signed(row['difference']):>10}{_interval(row['interval'])}"
        lines.append(f"{name:20}{difference}  p = {_p(row['p'])}")
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return ("n/a" if math.isnan(value) else f"{value:.3f}") if key == "score" else _percent(value)


def _at(results: dict[str, Any], path: str) -> float:
    group, name = path.split(".")
    return results[group][name]


def _interval(ends: tuple[float, float]) -> str:
    return f"  [{_percent(ends[0])}, {_percent(ends[1])}]"


def _signed(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:+.2f}"


def _p(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3g}"
