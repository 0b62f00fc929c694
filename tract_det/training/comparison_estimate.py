"""Estimates what the runs of a comparison will take, from a few measured steps."""

import contextlib
import heapq
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from tract_det.engine import checkpoint, ds
from tract_det.engine.loop import StopSignal, train
from tract_det.engine.step import Step
from tract_det.engine.writers import clock
from tract_det.training import assembly, session
from tract_det.training.comparison import Comparison, PlannedRun
from tract_det.training.comparison_folders import missing
from tract_det.training.task import Task

_WARM_UP, _MEASURED = 3, 10  # steps until the speed is steady, and those that count
_SECONDS = 20.0  # after which fewer steps have to do
_ENOUGH = -1  # stops the loop as a signal does


@dataclass(frozen=True)
class Measured:
    """What a run costs here.

    Attributes:
        step: seconds of a training step.
        evaluation: seconds of an evaluation.
        weights: bytes of a file of weights, and of that of their moving average.
        checkpoint: bytes of a checkpoint.
    """

    step: float
    evaluation: float
    weights: int
    checkpoint: int


def estimate(planned: Comparison, jobs: int, threads: int) -> str:
    """The runs, with the time and the disk space that they will take, from a few measured steps.

    Args:
        planned: all runs.
        jobs: runs beside each other.
        threads: of a run on a CPU.
    """
    todo = missing(planned)
    measured: dict[tuple, Measured] = {}
    lines, seconds_of, disk = [], dict[str, float](), 0
    for variant in planned.variants:
        runs = [run for run in todo if run.variant == variant]
        finished = sum(run.variant == variant for run in planned.runs) - len(runs)
        if not runs:
            lines.append(f"{variant.name}: {finished} runs, all done")
            continue
        if variant.model not in measured:
            measured[variant.model] = measure(planned.task, runs[0].cfg, threads)
        cost = measured[variant.model]
        seconds_of |= {run.name: _seconds(planned, run, cost) for run in runs}
        seconds = sum(seconds_of[run.name] for run in runs)
        disk += len(runs) * 2 * cost.weights  # model_best.pth and model_final.pth
        lines.append(
            f"{variant.name}: {len(runs)} runs to be made, {finished} done; {cost.step:.3g} s a "
            f"step, {cost.evaluation:.3g} s an evaluation, {clock(seconds)} in all"
        )
    # A new checkpoint is complete before the oldest is deleted.
    kept = 1 + max((run.cfg.SOLVER.CHECKPOINT_KEEP for run in todo), default=0)
    disk += (
        kept
        * min(jobs, len(todo))
        * max((cost.checkpoint for cost in measured.values()), default=0)
    )
    total = seconds_beside([seconds_of[run.name] for run in todo], jobs)
    lines.append(
        f"{len(todo)} of {len(planned.runs)} runs, {jobs} at a time: {clock(total)}, "
        f"{disk / 2**30:.2f} GiB in {planned.output}"
    )
    return "\n".join(lines)


def seconds_beside(runs: Sequence[float], jobs: int) -> float:
    """Until the last of these runs has ended, each begun in turn when one before it ends."""
    ends = [0.0] * jobs
    for seconds in runs:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def _seconds(planned: Comparison, run: PlannedRun, cost: Measured) -> float:
    plan = planned.task.plan(run.cfg, len(planned.training))
    steps = plan.max_iter - max(checkpoint.iterations(run.folder), default=0)
    evaluations = steps / plan.eval_period if plan.eval_period else 1
    return steps * cost.step + max(1, evaluations) * cost.evaluation


def measure(task: Task, cfg: CfgNode, threads: int) -> Measured:
    """Trains a few steps, evaluates a few images and saves a checkpoint, in a temporary folder."""
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        device = ds.start(cfg.MODEL.DEVICE)
        if device.type == "cpu":
            torch.set_num_threads(threads)
        torch.manual_seed(cfg.SEED)
        ds.check_config(assembly.engine_config(cfg))
        training, test = task.read_data(cfg)
        built = session.build(task, cfg, training, task.read_weights(cfg))
        engine, ema = session.prepare(cfg, built, device)
        average = ema.model if ema is not None else None
        loader = task.loader(cfg, training, built.meta, 0)
        step = _seconds_of_a_step(engine, loader, cfg.SOLVER.ACCUMULATION, built.memory_format)
        network = ds.whole_model(engine)

        def evaluate(images: int) -> float:
            began = time.perf_counter()
            task.evaluation(cfg, test.first(images), built.meta, device)(network, average)
            return time.perf_counter() - began

        few = min(len(test), max(8, 2 * cfg.TEST.IMS_PER_BATCH))
        evaluation = _extrapolated(evaluate, few, len(test))
        checkpoint.save_weights(Path(scratch, "weights.pth"), built.model, {})
        output = Path(scratch, "run")
        checkpoint.save(
            engine, output, 1, keep=1, shared={}, per_rank={}, identity={}, average=average
        ).result()
        ds.stop()
        return Measured(
            step,
            evaluation,
            Path(scratch, "weights.pth").stat().st_size * (1 if average is None else 2),
            sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
        )


def _seconds_of_a_step(
    engine: Any, loader: Iterable[Any], accumulation: int, memory_format: torch.memory_format
) -> float:
    """The median of a few training steps, without those that warm up."""
    steps: list[Step] = []

    def note(step: Step) -> None:
        step.read()  # its time is that of the device, too
        steps.append(step)
        is_long = sum(step.seconds for step in steps) > _SECONDS
        if len(steps) >= _WARM_UP + 2 and is_long:
            stop.number = stop.number or _ENOUGH

    with StopSignal() as stop:
        train(
            engine,
            loader,
            start=0,
            max_iter=_WARM_UP + _MEASURED,
            accumulation=accumulation,
            lr_at=lambda step: 0.0,
            after_step=note,
            stop=stop,
            memory_format=memory_format,
        )
    if stop.number not in (0, _ENOUGH):
        raise KeyboardInterrupt
    return statistics.median(step.seconds for step in steps[_WARM_UP:])


def _extrapolated(seconds: Callable[[int], float], few: int, images: int) -> float:
    """Seconds of all images, from those of a few and of three times as many, or of all."""
    more = min(images, 3 * few)
    first, second = seconds(few), seconds(more)
    an_image = max(0.0, second - first) / max(1, more - few)
    return first + an_image * (images - few)
