"""What happens between the steps of a run: logging, evaluation, checkpoints."""

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tract_det import distributed
from tract_det.engine import checkpoint, ds, space
from tract_det.engine.checkpoint import Checkpoint
from tract_det.engine.ema import Ema
from tract_det.engine.progress import Progress
from tract_det.engine.step import Step, mean_steps
from tract_det.engine.trackers import Trackers
from tract_det.engine.writers import Writers, say
from tract_det.errors import DivergedError
from tract_det.files import write_json

Means = Mapping[str, float]
Models = tuple[nn.Module, nn.Module | None]  # a model and its moving average, if there is one
Evaluate = Callable[[nn.Module, nn.Module | None], Means]
Report = Callable[[nn.Module, nn.Module | None, Mapping[str, Any] | None], Means]


class Run:
    """The state of a training run. Every rank has one, and all call its methods together.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        max_iter: number of steps in all.
        log_period: steps between two lines of the log.
        checkpoint_period: steps between two checkpoints to resume from.
        checkpoint_keep: how many of them are kept.
        eval_period: steps between two evaluations; 0 = only at the end.
        evaluate: gives the figures by name, of the model and its moving average.
        best_metric: the figure that decides which weights `model_best.pth` has; more is better.
        patience: evaluations in turn without a better figure that end the run; 0 = none do.
        meta: saved with the weights.
        identity: what a resumed run must share, by name.
        seed: of the run.
        images_of: gives the ids of a step's images, if its targets do not.
        ema: the moving average of the weights, if any.
        saved_part: gives the part of the model whose weights are saved.
        diagnostics: gives further figures of the last step, for the log.
        weight_figures: gives figures of the model's weights, not of their moving average, which are
            noted with every evaluation.
        loggers: names of the trackers that get the figures.
        config: of the run, plain values, for the trackers.
    """

    def __init__(
        self,
        engine: Any,
        output: Path,
        *,
        max_iter: int,
        log_period: int,
        checkpoint_period: int,
        checkpoint_keep: int,
        eval_period: int,
        evaluate: Evaluate,
        best_metric: str,
        patience: int = 0,
        meta: Mapping[str, Any],
        identity: Mapping[str, Any],
        seed: int = 0,
        images_of: Callable[[int], list[str]] | None = None,
        ema: Ema | None = None,
        saved_part: Callable[[nn.Module], nn.Module] = lambda model: model,
        diagnostics: Callable[[], Means] = dict,
        weight_figures: Callable[[nn.Module], Means] = lambda model: {},
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.output, self.max_iter = engine, output, max_iter
        self.log_period, self.checkpoint_period = log_period, checkpoint_period
        self.eval_period, self.evaluate, self.best_metric = eval_period, evaluate, best_metric
        self.checkpoint_keep, self.seed, self.images_of = checkpoint_keep, seed, images_of
        self.meta, self.identity = meta, dict(identity)
        self.ema, self.saved_part, self.diagnostics = ema, saved_part, diagnostics
        self.weight_figures = weight_figures
        self.loggers, self.config = loggers, config or {}
        self.patience, self.progress = patience, Progress()
        self.saved = -1  # the step of the newest checkpoint
        self._settling: Future[None] | None = None
        self.writers: Writers

    def start(self, stopped: Checkpoint | None) -> int:
        """Opens the writers and, to resume, restores all but the weights.

        Args:
            stopped: the checkpoint to go on from; its weights are in the model already.

        Returns:
            The number of steps done before.
        """
        start, pending = 0, []
        space.require_for_run(
            self.output, self.engine, self.ema, self._checkpoints_to_come(stopped)
        )
        if stopped is not None:
            start = self.saved = stopped.iteration
            average = self.ema.model if self.ema is not None else None
            restored = checkpoint.restore(stopped, self.engine, seed=self.seed, average=average)
            self.progress = Progress.of(restored.shared["best"])
            pending = [[Step(**step) for step in state["pending"]] for state in restored.per_rank]
            say(f"resumed {self.output} at step {start}")
        self.writers = Writers(
            self.output,
            start=start,
            max_iter=self.max_iter,
            period=self.log_period,
            device=self.engine.device,
            trackers=self._trackers(start, is_resumed=stopped is not None),
            is_evaluated_again=self._is_at_end(start) and self.progress.evaluated != start,
            diagnostics=self.diagnostics,
        )
        if pending:
            is_same = len(pending) == distributed.world_size()
            steps = pending[distributed.rank()] if is_same else mean_steps(pending)
            self.writers.pending = steps
        return start

    def _trackers(self, start: int, *, is_resumed: bool) -> Trackers | None:
        """Starts the trackers on the main rank; None on the others."""
        started: list[Trackers] = []

        def begin() -> None:
            if distributed.is_main():
                tracked = Trackers(
                    self.loggers,
                    self.output,
                    config=self.config,
                    start=start,
                    is_resumed=is_resumed,
                )
                started.append(tracked)

        distributed.on_every_rank(begin)
        return started[0] if started else None

    def _checkpoints_to_come(self, stopped: Checkpoint | None) -> int:
        """How many will be added to those that are there: the oldest goes after the newest is."""
        start = stopped.iteration if stopped is not None else 0
        saves = math.ceil((self.max_iter - start) / self.checkpoint_period)
        there = min(self.checkpoint_keep, len(checkpoint.iterations(self.output)))
        return min(saves, self.checkpoint_keep + 1 - there)

    def _is_at_end(self, iteration: int) -> bool:
        return iteration == self.max_iter or self.is_over

    @property
    def is_over(self) -> bool:
        """Whether the patience is used up; the same on every rank."""
        return 0 < self.patience <= self.progress.since

    def after_step(self, step: Step) -> bool:
        """Logs, evaluates and saves as the periods say; the loop calls it after each step.

        Returns:
            Whether the training ends here, before its full length.
        """
        if self.ema is not None:
            self.ema.update(self.engine.module, step.iteration)
        self.writers.step(step)
        if step.iteration == self.max_iter:  # `finish` evaluates and saves
            return False
        if self.eval_period > 0 and step.iteration % self.eval_period == 0:
            self.writers.read()  # a model that has diverged is not evaluated
            models = self._models()
            self._note(self.evaluate(*models), step.iteration, models)
        if self.is_over:  # likewise
            return True
        if step.iteration % self.checkpoint_period == 0:
            self.save(step.iteration)
        return False

    def save(self, iteration: int) -> None:
        """Saves what resuming needs, unless this step is saved already.

        Raises:
            DivergedError: a loss so far is not finite; nothing is saved then.
        """
        if iteration == self.saved:
            return
        self.writers.read()
        space.require_for_checkpoint(self.output, self.engine, self.ema, iteration)
        steps = [dataclasses.replace(step, unread=None) for step in self.writers.pending]
        self.settle()
        self._settling = checkpoint.save(
            self.engine,
            self.output,
            iteration,
            keep=self.checkpoint_keep,
            shared={"best": dataclasses.asdict(self.progress)},
            per_rank={"pending": [dataclasses.asdict(step) for step in steps]},
            identity=self.identity,
            average=self.ema.model if self.ema is not None else None,
        )
        self.saved = iteration

    def settle(self) -> None:
        """Waits until the newest checkpoint is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        if self._settling is not None:
            self._settling.result()
            self._settling = None

    @contextmanager
    def noting_divergence(self) -> Iterator[None]:
        """Writes what led to a divergence within, and what is needed to see its step again.

        A run that goes on from the same checkpoint takes the same steps to the last bit; LOG_PERIOD
        1 makes it look at each. Every rank that has noticed writes a file of its own.
        """
        try:
            yield
        except DivergedError as error:
            self.writers.write_unlogged()
            self._write_replay(error)
            raise

    def _write_replay(self, error: DivergedError) -> None:
        again = ["--resume", *_arguments()] if self.saved > 0 else ["--overwrite", *_arguments()]
        facts = dict(error.facts)
        if self.images_of is not None and facts.get("images", ()) is None:
            facts["images"] = self.images_of(facts["step"])
        content = {
            "error": str(error),
            **facts,
            "seed": self.seed,
            "rank": distributed.rank(),
            "ranks": distributed.world_size(),
            "checkpoint": max(0, self.saved),
            "replay": shlex.join([sys.argv[0], *again, "LOG_PERIOD", "1"]),
        }
        write_json(self.output / f"diverged_rank_{distributed.rank()}.json", content)

    def finish(self, report: Report, iteration: int) -> None:
        """Saves the final weights, then evaluates them by `report`.

        Args:
            report: as `evaluate`; it is also told why the run ended early, if it did.
            iteration: number of steps done.
        """
        self.writers.flush()
        self.save(iteration)
        models = self._models()
        self._save_weights("model_final", models)
        means = report(*models, self._stopped(iteration))
        if self.progress.evaluated != iteration:  # or the same weights are noted already
            self._note(means, iteration, models)
        self.writers.results(iteration, means)
        self.settle()

    def _stopped(self, iteration: int) -> dict[str, Any] | None:
        """Where and why the run ended before its full length; None if it did not."""
        if iteration == self.max_iter:
            return None
        progress = self.progress
        why = (
            f"SOLVER.PATIENCE {self.patience}: no {self.best_metric} above {progress.best:.2f}, "
            f"that of step {progress.best_step}, in {progress.since} evaluations"
        )
        say(f"the training ends after step {iteration} of {self.max_iter}: {why}")
        return {"step": iteration, "of": self.max_iter, "why": why}

    def _models(self) -> Models:
        """The model and its moving average: whole, and the same on every rank."""
        distributed.average_buffers(self.engine.module)
        if self.ema is None:
            return ds.whole_model(self.engine), None
        distributed.average_buffers(self.ema.model)
        return ds.whole_model(self.engine), self.ema.model

    def _note(self, means: Means, iteration: int, models: Models) -> None:
        """Logs an evaluation, and saves the weights if they are the best so far."""
        self.writers.scalars(iteration, {**means, **self.weight_figures(models[0])})
        # Rank 0's, so that all ranks agree on when the patience is used up.
        value = distributed.on_main(lambda: means[self.best_metric])
        say(f"step {iteration}: {self.best_metric} {value:.2f}")
        if self.progress.note(value, iteration):
            self._save_weights("model_best", models)

    def _save_weights(self, name: str, models: Models) -> None:
        if not distributed.is_main():
            return
        for suffix, model in zip(("", "_ema"), models, strict=True):
            if model is not None:
                path = self.output / f"{name}{suffix}.pth"
                checkpoint.save_weights(path, self.saved_part(model), self.meta)


def _arguments() -> list[str]:
    """This process's arguments, without what a launcher adds and how it was to start."""
    others = ("--local_rank", "--local-rank", "--resume", "--overwrite")
    return [argument for argument in sys.argv[1:] if not argument.startswith(others)]
