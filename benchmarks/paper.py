"""Writes `benchmarks/paper.md`: every experiment of the TrAct paper, with what was measured here.

    tract-det bench paper                                      # the page anew
    tract-det bench paper --add output/compare/CIFAR/cpu_small cifar10-cpu_small

The rows are those of `configs/paper.yaml`. A row that `tract-det paper ROW --run` has run to its
end is found in `output/paper`, and its figure is kept in `benchmarks/results/rows.json`. `--add`
keeps a comparison, as `tract-det compare` makes it, as `benchmarks/results/NAME/`; an experiment of
`paper.yaml` that names it under `reduced` shows its verdict. Folders of the machine are left out of
what is kept.
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from tract_det.cli import run
from tract_det.config.paper import Row, read_rows
from tract_det.engine import provenance
from tract_det.errors import UserError
from tract_det.files import atomically, write_json, write_text

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = "rows.json"
PAGE = Path(__file__).resolve().parent / "paper.md"

# Keys of a command whose values are folders or files of the machine.
_PLACES = {"DATASETS.ROOT", "MODEL.WEIGHTS", "OUTPUT_DIR", "--output"}

Measured = dict[str, dict[str, Any]]  # by row, then by seed


def measured_rows(runs: Path, known: Measured) -> Measured:
    """The figures of rows that are kept, and of those that have been run since.

    Args:
        runs: the folder that has `output/paper`.
        known: what is kept.
    """
    measured = {name: dict(seeds) for name, seeds in known.items()}
    for name, row in read_rows().items():
        pattern = f"{row.output().rpartition('/')[2]}*"
        for folder in sorted((runs / row.output()).parent.glob(pattern)):
            suffix = folder.name.removeprefix(row.output().rpartition("/")[2])
            seed = suffix.removeprefix("-seed") if suffix else "0"
            is_finished = (folder / "results.json").is_file()
            if seed.isdigit() and suffix in ("", f"-seed{seed}") and is_finished:
                measured.setdefault(name, {})[seed] = _figure(folder)
    return measured


def _figure(folder: Path) -> dict[str, Any]:
    """What a finished run says, and where it was made."""
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    value = json.loads((folder / "results.json").read_text())
    metric = cfg["TEST"]["BEST_METRIC"]
    for part in metric.split("."):
        value = value[part]
    start = (provenance.read(folder) or [{}])[-1]
    kept = {key: start.get(key, "unknown") for key in ("commit", "hardware", "date")}
    return {"metric": metric, "value": value, **kept}


def add(folder: Path, name: str) -> None:
    """Keeps a comparison in `results/`.

    Raises:
        UserError: the folder has none.
    """
    source = folder / "comparison.json"
    if not source.is_file():
        raise UserError(f"{source} is missing: give the folder of a `tract-det compare`")
    content = json.loads(source.read_text())
    command = content["command"]
    content["command"] = without_places(command)
    for record in content["runs"]:
        for start in record["starts"]:
            start["command"] = without_places(start["command"])
    write_json(RESULTS / name / "comparison.json", content)
    page = (folder / "comparison.md").read_text().replace(command, content["command"])
    write_text(RESULTS / name / "comparison.md", page)
    picture = RESULTS / name / "comparison.png"
    atomically(picture, lambda path: shutil.copyfile(folder / "comparison.png", path))


def without_places(command: str) -> str:
    """A command with `path/to/NAME` for folders and files of the machine."""
    words = shlex.split(command)
    for i, word in enumerate(words[:-1]):
        if word in _PLACES:
            words[i + 1] = f"path/to/{Path(words[i + 1]).name}"
    return shlex.join(words)


def page(measured: Measured, comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, in Markdown.

    Args:
        measured: figures of the paper's rows.
        comparisons: the content of `comparison.json` by name.
    """
    lines = [
        "# The paper's experiments",
        "",
        "Petersen, Borgelt, Ermon: TrAct, NeurIPS 2024. Written by `tract-det bench paper` from",
        "`configs/paper.yaml` and `benchmarks/results/`; do not edit it by hand.",
        "",
        "Each row runs: `tract-det paper EXPERIMENT/ROW/VARIANT --run DATASETS.ROOT path/to/data`",
        "(`tract-det paper EXPERIMENT` lists the variants, without `--run` a command is printed).",
        '"runs" means: not measured here; it loads, and its recipe takes two steps in the tests.',
        "What each row sets beside its config is in `configs/paper.yaml`.",
    ]
    for what, rows in groupby(read_rows().values(), key=lambda row: (row.source, row.what)):
        lines += _experiment(what[1], list(rows), measured, comparisons)
    return "\n".join(lines) + "\n"


def _experiment(
    what: str,
    rows: Sequence[Row],
    measured: Measured,
    comparisons: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Heading, runs made instead and table of an experiment."""
    first = rows[0]
    yield from ("", f"## {first.name.partition('/')[0]}: {first.source}", "", f"{what}.", "")
    for name in first.reduced:
        if name in comparisons:
            link = f"[{name}](results/{name}/comparison.md)"
            sentences = " ".join(comparisons[name]["verdicts"])
            yield from (f"Run instead, {link}: {sentences}", "")
    if not first.unit:
        yield from (f"The paper: {first.paper}.", "")
    variants = list(dict.fromkeys(row.variant for row in rows))
    yield "| " + " | ".join([first.unit and f"paper, {first.unit} / here", *variants]) + " |"
    yield "|---" * (len(variants) + 1) + "|"
    for group, members in groupby(rows, key=lambda row: row.group):
        cells = {row.variant: _cell(row, measured) for row in members}
        line = [group.partition("/")[2], *(cells.get(variant, "") for variant in variants)]
        yield "| " + " | ".join(line) + " |"
    yield ""
    for row in rows:
        if row.name in measured:
            yield f"- {row.name.partition('/')[2]}: {_origin(row, measured[row.name])}"
        elif row.not_carried and row.variant == variants[0]:
            yield f"- {row.group.partition('/')[2]} is not carried: {row.not_carried}"


def _cell(row: Row, measured: Measured) -> str:
    """`paper / here`."""
    values = [figure["value"] for figure in measured.get(row.name, {}).values()]
    here = f"{mean(values):.2f}" if values else "not carried" if row.not_carried else "runs"
    return f"{row.paper} / {here}" if row.unit else here


def _origin(row: Row, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Where a measured figure comes from."""
    *_, last = figures.values()
    seeds = ", ".join(f"seed {seed}: {figure['value']:.2f}" for seed, figure in figures.items())
    config = f"[{row.config}](../configs/{row.config})"
    where = f"commit {last['commit']}, {last['hardware']}, {last['date'][:10]}"
    return f"{last['metric']}, {seeds}; {config}, {where}"


def main(argv: list[str] | None = None) -> None:
    """Keeps what is new and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", nargs=2, metavar=("FOLDER", "NAME"), help="keep a comparison")
    args = parser.parse_args(argv)
    if not PAGE.is_file():
        raise UserError(f"{PAGE} is not there: the page is one of a checkout, run this in one")
    if args.add:
        add(Path(args.add[0]), args.add[1])
    rows = RESULTS / ROWS
    known = json.loads(rows.read_text()) if rows.is_file() else {}
    measured = measured_rows(Path(), known)
    if measured != known:
        write_json(rows, measured)
    comparisons = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(RESULTS.glob("*/comparison.json"))
    }
    write_text(PAGE, page(measured, comparisons))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run(main)
