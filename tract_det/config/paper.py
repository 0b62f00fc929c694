"""The experiments of the TrAct paper as rows: a command and the number that the paper prints."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from tract_det.config.files import CONFIGS
from tract_det.errors import UserError

FILE = CONFIGS / "paper.yaml"


@dataclass(frozen=True)
class Row:
    """One run of one experiment.

    Attributes:
        name: EXPERIMENT/ROW/VARIANT.
        config: a file below `configs/`.
        arm: a file of `configs/arms`.
        settings: keys that change the config.
        paper: the number as the paper prints it, or what its plot shows.
        unit: what the number is; "" for a plot.
        source: table, figure or section of the paper.
        what: the experiment in words.
        gpus: on how many the recipe was trained.
        after: the row whose weights of the same seed this one starts from; "" = none.
        differs: how the model is not that of the code that the paper trained by; "" = not known to.
        not_carried: why the row cannot be run; "" = it can.
        reduced: comparisons that were run instead, smaller or on other data, in benchmarks/results.
    """

    name: str
    config: str
    arm: str
    settings: Mapping[str, Any]
    paper: str
    unit: str
    source: str
    what: str
    gpus: int
    after: str
    differs: str
    not_carried: str
    reduced: tuple[str, ...]

    @property
    def group(self) -> str:
        """EXPERIMENT/ROW."""
        return self.name.rpartition("/")[0]

    @property
    def variant(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def verb(self) -> str:
        """The verb of `tract-det` that runs it."""
        return "train" if "Detection" in self.config else "pretrain"

    def output(self, seed: str = "0") -> str:
        """The folder of the run: each seed has its own."""
        return _output(self.name, seed)

    def arguments(self, seed: str = "0") -> list[str]:
        """What follows the verb on the command line, without SEED itself."""
        settings = dict(self.settings)
        if self.after:
            settings["MODEL.WEIGHTS"] = f"{_output(self.after, seed)}/model_final.pth"
        keys = [str(part) for pair in settings.items() for part in pair]
        files = ["--config-file", self.config, "--arm", self.arm]
        return [*files, *keys, "OUTPUT_DIR", self.output(seed)]


def _output(name: str, seed: str) -> str:
    return f"output/paper/{name}" + (f"-seed{seed}" if seed != "0" else "")


@cache
def read_rows() -> dict[str, Row]:
    """All rows of `configs/paper.yaml` by name, in the paper's order."""
    tree = yaml.safe_load(FILE.read_text())
    rows = [
        _row(f"{experiment}/{name}/{variant}", content, row or {}, str(variant), options)
        for experiment, content in tree.items()
        for name, row in content["rows"].items()
        for variant, options in content["variants"].items()
    ]
    return {row.name: row for row in rows}


def _row(
    name: str, experiment: dict[str, Any], row: dict[str, Any], variant: str, options: Any
) -> Row:
    settings: dict[str, Any] = {}
    for part in (experiment, row, options):
        settings |= part.get("set", {})
    number = row["paper"] if "paper" in row else experiment["paper"]
    return Row(
        name,
        row.get("config", experiment["config"]),
        options["arm"],
        settings,
        number[variant] if isinstance(number, dict) else number,
        experiment.get("number", ""),
        experiment["source"],
        experiment["what"],
        row.get("gpus", experiment.get("gpus", 1)),
        f"{row['after']}/{variant}" if "after" in row else "",
        row.get("differs", ""),
        row.get("not carried", ""),
        tuple(experiment.get("reduced", ())),
    )


def find_rows(name: str = "") -> list[Row]:
    """The row of this name, or all rows below it: "cifar100", or "cifar100/ResNet18".

    Raises:
        UserError: there is none; the message suggests the nearest name.
    """
    rows = read_rows()
    matching = [
        row for key, row in rows.items() if f"{key}/".startswith(f"{name}/" if name else "")
    ]
    if matching:
        return matching
    known = sorted({*rows, *(key.rpartition("/")[0] for key in rows)})
    known += sorted({key.partition("/")[0] for key in rows})
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f": did you mean {close[0]}?" if close else ": `tract-det paper` lists them"
    raise UserError(f"the paper has no row '{name}'{hint}")
