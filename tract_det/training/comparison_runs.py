"""Makes the runs of a comparison and reports what they say."""

import contextlib
import io
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from tract_det.engine import provenance, run_folder
from tract_det.engine.jobs import Ended, Job, run_jobs
from tract_det.engine.writers import clock, say
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.comparison import mean_curve
from tract_det.evaluation.comparison_file import JSON, MARKDOWN, PICTURE, markdown
from tract_det.evaluation.comparison_report import (
    Group,
    as_values,
    hardware_of,
    judge,
    table,
    unfinished,
    verdicts,
    without_samples,
)
from tract_det.evaluation.runs import Record
from tract_det.evaluation.samples import read_samples
from tract_det.files import make_folder, remove_abandoned, write_json, write_text
from tract_det.report.comparison import write_comparison
from tract_det.tract import TrActError
from tract_det.training import session
from tract_det.training.comparison import Comparison, PlannedRun, Variant
from tract_det.training.comparison_folders import (
    DIVERGED,
    can_go_on,
    has_diverged,
    missing,
    read,
)
from tract_det.visualize import Line, beside_the_results, comparison

_LOG = "log.txt"

# Exit codes of a trainer that a signal has stopped: it has saved a checkpoint.
_STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


def _refuse_unfit(planned: Comparison, todo: Sequence[PlannedRun]) -> None:
    """Builds the model of each arm once: one that cannot be is said now, not in hours.

    Raises:
        UserError: names the arm and why its model was refused.
    """
    for run in {run.variant.model: run for run in todo}.values():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                weights = planned.task.read_weights(run.cfg)
                session.build(planned.task, run.cfg, planned.training, weights)
        except (UserError, TrActError) as error:
            raise UserError(f"arm {run.variant.name}: {error}") from error


def _other_code(planned: Comparison) -> str:
    """Says which of the runs so far were made by other code than this; "" if none."""
    now = provenance.code()
    starts = [start for run in planned.runs for start in provenance.read(run.folder)]
    others = {_in_words(start): None for start in starts if _in_words(start) != _in_words(now)}
    if not others:
        return ""
    return (
        f"warning: runs in {planned.output} were made by {' and '.join(others)}, those to come are "
        f"by {_in_words(now)}: give --output another folder to make all by the same code"
    )


def _in_words(code: Mapping[str, str]) -> str:
    commit = code["commit"]
    return f"version {code['version'] or 'unknown'}" + (f", commit {commit}" if commit else "")


def run_missing(
    planned: Comparison, environments: Sequence[Mapping[str, str]], lock: IO[str]
) -> int:
    """Makes the runs that are missing; goes on with those that were interrupted.

    Args:
        planned: all runs.
        environments: of the runs beside each other; see `jobs.shares`.
        lock: of the comparison's folder.

    Returns:
        An exit code: 0 if every run has finished or diverged.

    Raises:
        UserError: a run was made with other settings, or an arm does not fit the model.
    """
    remove_abandoned(planned.output)
    todo = missing(planned)
    _refuse_unfit(planned, todo)
    for run in planned.runs:
        if run not in todo and not has_diverged(run):
            _tidy(run)  # it ended after this program was killed
    done = len(planned.runs) - len(todo)
    say(f"{len(planned.runs)} runs, {done} of them done; {len(environments)} at a time")
    if todo and (warning := _other_code(planned)):
        say(warning)
    by_name = {run.name: run for run in todo}
    left: list[str] = []

    def on_end(ended: Ended) -> None:
        nonlocal done
        done += 1
        run = by_name[ended.job.name]
        outcome, has_ended = _settle(planned, run, ended)
        if not has_ended:
            left.append(run.name)
        say(f"[{done}/{len(planned.runs)}] {run.name}: {outcome} ({clock(ended.seconds)})")

    stopped_by = run_jobs(
        [_job(planned, run) for run in todo], environments, lock=lock, on_end=on_end
    )
    if stopped_by:
        say("stopped: the same command goes on from here")
        return 128 + stopped_by
    return 1 if left else 0


def _job(planned: Comparison, run: PlannedRun) -> Job:
    verb, *arguments = run.arguments
    make_folder(run.folder)  # one that cannot be is said before the first run
    start = []
    if can_go_on(planned, run):
        start = ["--resume"]
    else:
        # Here and not by the run's own --overwrite, which would move the open log as well.
        with run_folder.sole_use(run.folder):
            run_folder.move_aside(run.folder)
    command = [sys.executable, "-m", "tract_det.cli", verb, *start, *arguments]
    return Job(run.name, command, run.folder / _LOG)


def _tidy(run: PlannedRun) -> None:
    """Nothing resumes a finished run, and an optimizer's state is larger than the weights."""
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    (run.folder / "last_checkpoint").unlink(missing_ok=True)


def _settle(planned: Comparison, run: PlannedRun, ended: Ended) -> tuple[str, bool]:
    """Notes how a run has ended; returns it in words, and whether it has finished or diverged."""
    log = run.folder / _LOG
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else "without a word"
    if ended.code == DivergedError.exit_code:
        write_text(run.folder / DIVERGED, last + "\n")
        return (
            f"diverged: {last} (it counts as failed; to make it again, delete {run.folder})",
            True,
        )
    record = read(planned, run)
    if ended.code == 0 and record and record.is_finished:
        if not record.curve:
            return (
                f"{planned.metric} of the last evaluation is no number: it counts as failed",
                True,
            )
        _tidy(run)
        return f"{planned.metric} {record.curve.values[-1]:.2f}", True
    if ended.code in _STOPPED:
        return "stopped, its checkpoint is saved", False
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}; the end of {log}: {last}", False
    return f"failed: {last} (see {log})", False


# The report


def groups(planned: Comparison) -> tuple[list[Group], list[dict[str, Any]]]:
    """The runs by arm and length, and a plain record of each run for JSON."""
    ended: dict[tuple[Variant, float], dict[int, tuple[PlannedRun, Record | None]]] = {}
    records = []
    for run in planned.runs:
        record = read(planned, run)
        key, status = (run.variant, run.epochs), "missing"
        if record and record.is_finished and record.curve:
            status = "finished"
            ended.setdefault(key, {})[run.seed] = run, record
        elif has_diverged(run) or (record and record.is_finished):  # the last figure is no number
            status = "diverged"
            ended.setdefault(key, {})[run.seed] = run, None
        records.append(
            {
                "arm": run.variant.name,
                "epochs": run.epochs,
                "seed": run.seed,
                "status": status,
                "folder": str(run.folder.relative_to(planned.output)),
                "curve": record.curve if record else None,
                "training_seconds": record.seconds if record else None,
                "stem_turn": record.stem_turn if record else None,
                "starts": provenance.read(run.folder),
            }
        )
    arms = [_group(planned, *key, runs) for key, runs in ended.items()]
    order = [variant.name for variant in planned.variants]
    return sorted(arms, key=lambda group: (order.index(group.arm), group.epochs)), records


def _group(
    planned: Comparison,
    variant: Variant,
    epochs: float,
    runs: Mapping[int, tuple[PlannedRun, Record | None]],
) -> Group:
    """The runs of a variant at a length that have ended; those without a record diverged."""
    baseline = planned.baselines[variant]
    finished = {seed: (run, record) for seed, (run, record) in runs.items() if record is not None}
    return Group(
        variant.name,
        epochs,
        {seed: record.curve if record else None for seed, (_, record) in runs.items()},
        {seed: record.seconds for seed, (_, record) in finished.items()},
        baseline.name if baseline else None,
        {seed: read_samples(run.folder, planned.metric) for seed, (run, _) in finished.items()},
        {
            seed: record.stem_turn
            for seed, (_, record) in finished.items()
            if record.stem_turn is not None
        },
        {seed: hardware_of(provenance.read(run.folder)) for seed, (run, _) in finished.items()},
    )


def report(planned: Comparison, command: str) -> None:
    """Prints the table and the verdicts; writes them, the JSON, the page and the picture.

    Args:
        planned: all runs.
        command: that made them, for the files.

    Raises:
        UserError: no run is finished.
    """
    arms, records = groups(planned)
    if not any(run is not None for group in arms for run in group.runs.values()):
        diverged = sum(group.as_arm().failed for group in arms)
        why = f"{diverged} of {len(records)} diverged" if diverged else "nothing to compare yet"
        raise UserError(f"no run in {planned.output} is finished: {why}")
    rows = judge(arms)
    sentences = verdicts(rows) + without_samples(arms) + unfinished(records)
    say("\n" + "\n\n".join([table(rows, planned.metric), *sentences]) + "\n")
    names = [variant.name for variant in planned.variants]
    text = markdown(names, command, records, rows, planned.metric, sentences)
    write_text(planned.output / MARKDOWN, text)
    content = {
        "command": command,
        "metric": planned.metric,
        "images": len(planned.training),
        "rows": [as_values(row) for row in rows],
        "verdicts": sentences,
        "runs": records,
    }
    write_json(planned.output / JSON, content)
    say(f"wrote {MARKDOWN} and {JSON} to {planned.output}")
    page = planned.output / "comparison.html"
    with beside_the_results(page):
        write_comparison(planned.output, page)
        say(f"wrote {page}")
    picture = planned.output / PICTURE
    with beside_the_results(picture):
        comparison(picture, [_line(group) for group in arms], planned.metric)
        say(f"wrote {picture}")


def _line(group: Group) -> Line:
    arm = group.as_arm()
    curve = mean_curve(arm)
    return Line(group.arm, group.epochs, curve.epochs, curve.mean, curve.sd, arm.finals)
