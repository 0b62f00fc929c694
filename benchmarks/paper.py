"""Writes `benchmarks/paper.md`: every experiment of the TrAct paper, with what was measured here.

    tract-det bench paper                                      # the page anew
    tract-det bench paper --add output/compare/CIFAR/cpu_small cifar10-cpu_small

The rows are those of `configs/paper.yaml`. A row that `tract-det paper ROW --run` has run to its
end is found in `output/paper`, and its figure is kept in `benchmarks/results/rows.json`. `--add`
keeps a comparison, as `tract-det compare` makes it, as `benchmarks/results/NAME/`; an experiment of
`paper.yaml` that names it under `reduced` shows its verdict. Folders of the machine are left out of
what is kept. Tables and verdicts follow the statistics of the version that writes them.
"""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from tract_det.cli import run
from tract_det.config import tasks
from tract_det.config.files import flat, read_config
from tract_det.config.paper import Row, read_rows
from tract_det.config.resuming import decisive, differences
from tract_det.engine import provenance
from tract_det.errors import UserError
from tract_det.evaluation.comparison_file import JSON, MARKDOWN, PICTURE, markdown, rows_of
from tract_det.evaluation.comparison_report import as_values, unfinished, verdicts
from tract_det.files import atomically, write_json, write_text

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = "rows.json"
PAGE = Path(__file__).resolve().parent / "paper.md"

_ABSOLUTE = re.compile(r"""(?<![\w.])~?/(?:[^,\]'"]*/)?([^/,\]'"]+)""")
# Keys of a command whose values are folders or files, though they may be relative.
_PLACES = {"DATASETS.ROOT", "MODEL.WEIGHTS", "OUTPUT_DIR", "--output"}

Measured = dict[str, dict[str, Any]]  # by row, then by seed


def measured_rows(runs: Path, known: Measured) -> Measured:
    """The figures of rows that are kept, and of those that have been run since.

    Args:
        runs: the folder that has `output/paper`.
        known: what is kept.

    Raises:
        UserError: a run is damaged, or is not the row's: shortened, say.
    """
    measured = {name: dict(seeds) for name, seeds in known.items()}
    for name, row in read_rows().items():
        pattern = f"{row.output().rpartition('/')[2]}*"
        for folder in sorted((runs / row.output()).parent.glob(pattern)):
            suffix = folder.name.removeprefix(row.output().rpartition("/")[2])
            seed = suffix.removeprefix("-seed") if suffix else "0"
            is_finished = (folder / "results.json").is_file()
            if seed.isdigit() and suffix in ("", f"-seed{seed}") and is_finished:
                measured.setdefault(name, {})[seed] = _figure(folder, row, seed)
    return measured


def _figure(folder: Path, row: Row, seed: str) -> dict[str, Any]:
    """What a finished run says, and where it was made."""
    cfg = flat(read_config(folder / "config.yaml"))
    _refuse_other_settings(folder, cfg, row, seed)
    metric = cfg["TEST.BEST_METRIC"]
    try:
        value = json.loads((folder / "results.json").read_text())
        for part in metric.split("."):
            value = value[part]
        value = float(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'results.json'} has no {metric}: move the folder away, or run the row again"
        ) from error
    start = (provenance.read(folder) or [{}])[-1]
    kept = {key: start.get(key) or "unknown" for key in ("commit", "hardware", "date")}
    return {"metric": metric, "value": value, **kept}


def _refuse_other_settings(folder: Path, cfg: Mapping[str, Any], row: Row, seed: str) -> None:
    """Refuses a run that was given other settings than its row has.

    Raises:
        UserError: names the first key that differs.
    """
    task = tasks.task_of([row.config])
    pairs = row.arguments(seed)[4:]  # behind --config-file FILE --arm ARM
    expected = flat(tasks.loader_of(task)([row.config], pairs, row.arm))
    defaults = flat(tasks.MODULES[task].get_cfg())
    changes = differences(decisive(cfg), decisive(expected), defaults)
    if changes:
        change = changes[0].replace("now it is", "the row has")
        raise UserError(
            f"{folder} is not a run of {row.name}: {change}: move it out of output/paper"
        )


def add(folder: Path, name: str) -> None:
    """Keeps a comparison in `results/`.

    Raises:
        UserError: the folder has none, or not all of it.
    """
    for part in (JSON, PICTURE):
        if not (folder / part).is_file():
            raise UserError(
                f"{folder / part} is missing: give the folder of a `tract-det compare`, and its "
                "command again if need be"
            )
    content = json.loads((folder / JSON).read_text())
    content["command"] = without_places(content["command"])
    for record in content["runs"]:
        for start in record["starts"]:
            start["command"] = without_places(start["command"])
    write_json(RESULTS / name / JSON, content)
    picture = RESULTS / name / PICTURE
    atomically(picture, lambda path: shutil.copyfile(folder / PICTURE, path))


def judged(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A comparison that is kept, and its page, judged by the statistics of this version.

    Args:
        content: of comparison.json.
    """
    rows = rows_of(content)
    sentences = verdicts(rows) + unfinished(content["runs"])
    content = {**content, "rows": [as_values(row) for row in rows], "verdicts": sentences}
    arms = list(dict.fromkeys(row.group.arm for row in rows))
    return content, markdown(
        arms, content["command"], content["runs"], rows, content["metric"], sentences
    )


def without_places(command: str) -> str:
    """A command with `path/to/NAME` for folders and files of the machine."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        if i and words[i - 1] in _PLACES and word:
            words[i] = f"path/to/{Path(word).name}"
        # Absolute ones stand by themselves, behind `--option=`, and in lists and sweeps.
        words[i] = _ABSOLUTE.sub(r"path/to/\1", words[i])
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
    first, *_ = figures.values()
    seeds = ", ".join(f"seed {seed}: {figure['value']:.2f}" for seed, figure in figures.items())
    config = f"[{row.config}](../configs/{row.config})"
    made = dict.fromkeys(
        f"commit {figure['commit']}, {figure['hardware']}, {figure['date'][:10]}"
        for figure in figures.values()
    )
    return f"{first['metric']}, {seeds}; {config}, {' and '.join(made)}"


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
    comparisons = {}
    for path in sorted(RESULTS.glob(f"*/{JSON}")):
        content, text = judged(json.loads(path.read_text()))
        write_json(path, content)
        write_text(path.with_name(MARKDOWN), text)
        comparisons[path.parent.name] = content
    write_text(PAGE, page(measured, comparisons))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    run(main)
