"""Where a run writes its progress: the console, `metrics.jsonl` and trackers."""

import io
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tract_det import distributed
from tract_det.engine.step import Step
from tract_det.engine.trackers import Trackers
from tract_det.files import append_line, write_text

_METRICS = "metrics.jsonl"
_LEARNING_RATE = "lr"


def say(text: str = "") -> None:
    """Prints on the main rank, above a progress bar where there is one.

    Where nothing can be printed any more (the terminal is closed, the reader of a pipe is gone), a
    training goes on in silence: `metrics.jsonl` has its figures.
    """
    if not distributed.is_main():
        return
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        sys.stdout = io.StringIO()


def peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, this process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Writers:
    """Collects the steps of a run and writes them out every `period` steps, on the main rank.

    Only then are the losses read. They are means over the period and over the ranks;
    `images_per_second` excludes the time for evaluation and checkpoints. Every rank must call
    `step` and `scalars`.

    Args:
        output: the run's folder.
        start: number of steps done before.
        max_iter: number of steps in all.
        period: steps between two lines of the log.
        device: whose peak memory is reported.
        is_evaluated_again: all steps are done, and what comes is their evaluation.
        trackers: that get the same figures; None = none, as on all ranks but the main one.
        diagnostics: gives further figures of the last step; called on every rank.
    """

    def __init__(
        self,
        output: Path,
        *,
        start: int,
        max_iter: int,
        period: int,
        device: torch.device,
        is_evaluated_again: bool = False,
        trackers: Trackers | None = None,
        diagnostics: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.diagnostics = diagnostics
        self.max_iter, self.period, self.device = max_iter, period, device
        self.pending: list[Step] = []
        self.images = 0
        self.seconds = 0.0
        self._bar: tqdm | None = None
        self._trackers = trackers
        self._path = output / _METRICS
        if not distributed.is_main():
            return
        _keep_until(self._path, start, is_evaluated_again=is_evaluated_again)
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_iter, initial=start, unit="step", dynamic_ncols=True)

    def step(self, step: Step) -> None:
        """Takes in a step; writes a line at the end of a period."""
        self.pending.append(step)
        if self._bar is not None:
            self._bar.update()
        if step.iteration % self.period == 0 or step.iteration == self.max_iter:
            self.flush()

    def read(self) -> None:
        """Reads the losses so far.

        Raises:
            DivergedError: they are not finite.
        """
        if self.pending:
            self.pending[-1].read()

    def write_unlogged(self) -> None:
        """Writes the losses of this rank since the last line, a line for each step that was read.

        For a run that ends by an error: what led to it is not lost.
        """
        for step in self.pending:
            if step.losses:
                self.scalars(step.iteration, {**step.losses, _LEARNING_RATE: step.lr})

    def flush(self) -> None:
        """Writes a line of the steps since the last one, if there are any. Every rank calls it."""
        if not self.pending:
            return
        self.read()
        steps, self.pending = self.pending, []
        self._count(steps)
        means = {
            name: sum(step.losses[name] for step in steps) / len(steps) for name in steps[0].losses
        }
        ranks = distributed.gather(means)
        losses = {name: sum(rank[name] for rank in ranks) / len(ranks) for name in means}
        seconds = sum(step.seconds for step in steps)
        rate = sum(step.images for step in steps) / seconds
        now = steps[-1].iteration
        self.scalars(
            now,
            {
                **losses,
                _LEARNING_RATE: steps[-1].lr,
                "images_per_second": rate,
                "data_fraction": sum(step.data_seconds for step in steps) / seconds,
                "peak_memory_gib": peak_memory(self.device),
                **self.diagnostics(),
            },
        )
        parts = "  ".join(f"{name.removeprefix('loss_')} {v:.3f}" for name, v in losses.items())
        eta = clock((self.max_iter - now) * seconds / len(steps))
        line = f"{parts}  lr {steps[-1].lr:.2g}  {rate:.1f} images/s  ETA {eta}"
        if self._bar is not None:
            self._bar.set_postfix_str(line)
        else:
            say(f"step {now}/{self.max_iter}  {line}")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes a line of `metrics.jsonl`, where non-finite values are null, and to trackers."""
        if not distributed.is_main():
            return
        entry = {name: v if math.isfinite(v) else None for name, v in values.items()}
        append_line(self._path, json.dumps({"iteration": iteration, "time": time.time(), **entry}))
        if self._trackers is not None:
            self._trackers.log(values, iteration)

    def results(self, iteration: int, values: Mapping[str, float]) -> None:
        """Passes the figures of the final evaluation on to the trackers."""
        if self._trackers is not None:
            self._trackers.results(values, iteration)

    def _count(self, steps: list[Step]) -> None:
        self.images += sum(step.images for step in steps)
        self.seconds += sum(step.seconds for step in steps)

    def close(self) -> None:
        """Closes the files, and prints time, throughput and memory."""
        self._count(self.pending)
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close()
        if self.seconds:
            say(
                f"trained {self.images} images in {clock(self.seconds)}: "
                f"{self.images / self.seconds:.2f} images/s, peak memory "
                f"{peak_memory(self.device):.2f} GiB a process"
            )


def _keep_until(path: Path, iteration: int, *, is_evaluated_again: bool) -> None:
    """Drops the lines that a resumed run writes again.

    Args:
        path: `metrics.jsonl`.
        iteration: number of steps done.
        is_evaluated_again: as for `Writers`.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        entry = _entry(line)
        is_again = entry["iteration"] > iteration
        if entry["iteration"] == iteration and is_evaluated_again:
            is_again = _LEARNING_RATE not in entry  # unlike the losses, which are not repeated
        if not is_again:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _entry(line: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(line)
        return {**entry, "iteration": entry["iteration"]}
    except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
        return {"iteration": math.inf}
