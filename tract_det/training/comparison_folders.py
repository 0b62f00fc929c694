"""What the folders of a comparison have: runs that are finished, diverged, stopped, or others."""

from collections.abc import Mapping

from fvcore.common.config import CfgNode

from tract_det.config.files import flat, read_config
from tract_det.config.resuming import differences, not_incidental
from tract_det.engine import checkpoint, provenance
from tract_det.engine.progress import Progress
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.evaluation.runs import Record, read_run
from tract_det.training.comparison import Comparison, PlannedRun

# A run that diverged has this file, with the error: it would diverge again.
DIVERGED = "diverged.txt"


def read(planned: Comparison, run: PlannedRun) -> Record | None:
    """What a run has left; None if it has not begun."""
    if not (run.folder / "metrics.jsonl").is_file():
        return None
    return read_run(
        run.folder,
        planned.metric,
        steps=run.steps,
        batch=run.cfg.SOLVER.IMS_PER_BATCH,
        images=len(planned.training),
    )


def has_diverged(run: PlannedRun) -> bool:
    """Whether a run has ended because its loss was not finite."""
    return (run.folder / DIVERGED).is_file()


def _is_done(planned: Comparison, run: PlannedRun) -> bool:
    """Whether a run has finished, with all that it leaves, or diverged."""
    record = read(planned, run)
    if not (record and record.is_finished):
        return has_diverged(run)
    # Killed between its last figure and its page, it may lack weights: what is left takes no time.
    return not checkpoint.iterations(run.folder) or (run.folder / "report.html").is_file()


def has_results(planned: Comparison) -> bool:
    """Whether there is a run to report."""
    records = (read(planned, run) for run in planned.runs)
    return any(record is not None and record.is_finished for record in records)


def missing(planned: Comparison) -> list[PlannedRun]:
    """The runs that are neither finished nor diverged.

    Raises:
        UserError: a folder has a run with other settings or on other images.
    """
    runs, defaults = [], planned.task.defaults()
    for run in planned.runs:
        refuse_other_settings(run, defaults)
        _refuse_other_images(run, planned.images)
        if not _is_done(planned, run):
            runs.append(run)
    return runs


def _refuse_other_images(run: PlannedRun, images: Mapping[str, str]) -> None:
    """Refuses to take a run on other images for one on these, wherever they lie.

    Raises:
        UserError: names the folder and which images are others.
    """
    for start in provenance.read(run.folder):
        before = start.get("images") or {}
        for part, print_now in images.items():
            if before.get(part, print_now) != print_now:
                raise UserError(
                    f"{run.folder} has a run on other {part} images than those of DATASETS.ROOT "
                    f"{run.cfg.DATASETS.ROOT or '(the default)'}: give this comparison a folder of "
                    "its own by --output"
                )


def can_go_on(planned: Comparison, run: PlannedRun) -> bool:
    """Whether a run has a checkpoint to go on from; says so where it should have."""
    metrics = run.folder / "metrics.jsonl"
    if checkpoint.iterations(run.folder):
        try:
            progress = Progress.of(checkpoint.newest(run.folder).shared()["best"])
        except UserError:
            why = f"no checkpoint in {run.folder} is whole"
        else:
            record = read(planned, run)
            if progress.evaluated <= (record.evaluated if record else 0):
                return True
            why = f"{metrics} lacks evaluations before the checkpoint"
    elif (run.folder / "results.json").is_file():
        why = f"{metrics} lacks the last evaluation, and no checkpoint is left"
    else:
        return False
    say(f"{run.name} is made again: {why}")
    return False


def refuse_other_settings(run: PlannedRun, defaults: CfgNode) -> None:
    """Refuses to take the run in a folder for another one; what is incidental may differ.

    Args:
        run: as it is planned.
        defaults: for keys that did not exist when the run there was made.

    Raises:
        UserError: the run there was made with other settings, and the message names the key; or
            they cannot be told.
    """
    path = run.folder / "config.yaml"
    mend = f"delete {run.folder} to make the run again"
    if not path.is_file():
        if (run.folder / "metrics.jsonl").is_file():
            raise UserError(f"{path} is missing, so whose run this is cannot be told: {mend}")
        return
    try:
        stored, now = flat(read_config(path)), flat(run.cfg)
    except UserError as error:
        raise UserError(f"{error}: {mend}") from error
    if not stored.keys() & now.keys():
        raise UserError(f"{path} has no key of this task, so its run is unknown: {mend}")
    changes = differences(not_incidental(stored), not_incidental(now), flat(defaults))
    if changes:
        raise UserError(
            f"{run.folder} has a run with other settings ({changes[0]}): give this comparison a "
            "folder of its own by --output"
        )
