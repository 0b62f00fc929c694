"""A run: what happens between the steps, in one folder. Writing, evaluation, checkpoints."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tract_det import distributed
from tract_det.engine import checkpoint
from tract_det.engine.loop import Step
from tract_det.engine.writers import Writers, say
from tract_det.errors import UserError

Means = Mapping[str, float]


class Run:
    """The state of a training run. Every rank has one, and calls its methods together.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        max_iter: steps in all.
        log_period: steps between lines of the log.
        checkpoint_period: steps between checkpoints to resume from.
        eval_period: steps between evaluations; 0 = at the end alone.
        evaluate: gives a model's figures by name.
        best_metric: the figure by which `model_best.pth` is kept; more is better.
        meta: saved with the weights.
        identity: config keys with the values that a resumed run must share.
    """

    def __init__(
        self,
        engine: Any,
        output: Path,
        *,
        max_iter: int,
        log_period: int,
        checkpoint_period: int,
        eval_period: int,
        evaluate: Callable[[nn.Module], Means],
        best_metric: str,
        meta: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> None:
        self.engine, self.output, self.max_iter = engine, output, max_iter
        self.log_period, self.checkpoint_period = log_period, checkpoint_period
        self.eval_period, self.evaluate, self.best_metric = eval_period, evaluate, best_metric
        self.meta, self.identity = meta, dict(identity)
        self.best = -math.inf
        self.saved = -1  # the step of the newest checkpoint
        self.writers: Writers

    def start(self, *, resume: bool) -> int:
        """Opens the writers, restores the newest checkpoint; returns the steps done before.

        Raises:
            UserError: there is nothing to resume, or the run was another one.
        """
        state: dict[str, Any] = {"iteration": 0, "pending": None}
        if resume:
            state = checkpoint.load(self.engine, self.output)
            for key, value in self.identity.items():
                before = state["identity"].get(key, value)
                if before != value:
                    raise UserError(
                        f"--resume: {key} was {before} when the run began, now it is {value}: set "
                        "it back"
                    )
            self.best, self.saved = state["best"], state["iteration"]
            say(f"resumed {self.output} at step {state['iteration']}")
        elif distributed.is_main():
            checkpoint.forget(self.output)
        self.writers = Writers(
            self.output,
            start=state["iteration"],
            max_iter=self.max_iter,
            period=self.log_period,
            device=self.engine.device,
        )
        if state["pending"]:
            pending = state["pending"][distributed.rank()]
            self.writers.pending = [Step(**step) for step in pending]
        return state["iteration"]

    def after_step(self, step: Step) -> None:
        """To be called by the loop after each step."""
        self.writers.step(step)
        if step.iteration == self.max_iter:  # `finish` does it all
            return
        if self.eval_period > 0 and step.iteration % self.eval_period == 0:
            distributed.average_buffers(self.engine.module)
            self._note(self.evaluate(self.engine.module), step.iteration)
        if step.iteration % self.checkpoint_period == 0:
            self.save(step.iteration)

    def save(self, iteration: int) -> None:
        """Saves what resuming needs, once a step."""
        if iteration == self.saved:
            return
        pending = distributed.gather([dataclasses.asdict(step) for step in self.writers.pending])
        state = {"best": self.best, "pending": pending, "identity": self.identity}
        checkpoint.save(self.engine, self.output, iteration, state)
        self.saved = iteration

    def finish(self, report: Callable[[nn.Module], Means]) -> None:
        """Saves the final weights, then evaluates them by `report`."""
        self.save(self.max_iter)
        self._save_weights("model_final.pth")
        self._note(report(self.engine.module), self.max_iter)

    def _note(self, means: Means, iteration: int) -> None:
        """Logs an evaluation, and keeps the weights if they are the best so far."""
        self.writers.scalars(iteration, means)
        value = means[self.best_metric]
        say(f"step {iteration}: {self.best_metric} {value:.2f}")
        if value > self.best:
            self.best = value
            self._save_weights("model_best.pth")

    def _save_weights(self, name: str) -> None:
        if distributed.is_main():
            checkpoint.save_weights(self.output / name, self.engine.module, self.meta)
