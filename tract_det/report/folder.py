"""Reads what a run has left in its folder, as far as it is there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tract_det.config.files import check_values, flat
from tract_det.config.tasks import MODULES
from tract_det.errors import UserError, shortened
from tract_det.files import read_metrics
from tract_det.modeling.weight_files import read_weights
from tract_det.report.stem import read_filters

FIGURES = "report.json"


@dataclass(frozen=True)
class RunFolder:
    """What a run has left.

    Attributes:
        folder: of the run.
        name: that tells it from other runs of the report.
        task: "detection" or "classification".
        config: of the run, by dotted keys.
        changed: its values that are not the defaults, with these, by key.
        metrics: lines of metrics.jsonl, in their order.
        results: results.json; {} where the run is not finished.
        figures: report.json; {} likewise.
        starts: provenance.json.
        stem: the first layer's filters, `(M, C, kh, kw)`, at the start and now; None where unknown.
    """

    folder: Path
    name: str
    task: str
    config: dict[str, Any]
    changed: dict[str, tuple[Any, Any]]
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    figures: dict[str, Any]
    starts: list[dict[str, Any]]
    stem: tuple[np.ndarray | None, np.ndarray | None]


def read_run(folder: Path, name: str) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: no run is there, or a file is damaged.
    """
    results = _json(folder / "results.json", {})
    config = _config(folder)
    if not results and not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} holds no run: give an OUTPUT_DIR, which has results.json or metrics.jsonl"
        )
    task = "detection" if "voc_area" in results or "MODEL.RPN.NMS_THRESH" in config else ""
    task = task or "classification"
    defaults = flat(MODULES[task].get_cfg())
    changed = {
        key: (value, defaults[key])
        for key, value in sorted(config.items())
        if key in defaults and value != defaults[key]
    }
    metrics = []
    if (folder / "metrics.jsonl").is_file():
        metrics = list(read_metrics(folder / "metrics.jsonl"))
    return RunFolder(
        folder,
        name,
        task,
        config,
        changed,
        metrics,
        results,
        _json(folder / FIGURES, {}),
        _json(folder / "provenance.json", []),
        _stem(folder),
    )


def _json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}): it is damaged, remove it") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
        check_values(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = shortened(str(error), 200)
        raise UserError(f"{path}: is no configuration ({why}): it is damaged, remove it") from None
    return flat(content) if isinstance(content, dict) else {}


def _stem(folder: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The filters at the start, and in the final weights."""
    start = read_filters(folder)
    if start is None:
        return None, None
    weights = folder / "model_final.pth"
    if not weights.is_file():
        return start.weight, None
    tensor = read_weights(str(weights)).state.get(start.name)
    return start.weight, None if tensor is None else tensor.float().numpy()
