"""A run: what happens between the steps, in one folder. Writing, evaluation, checkpoints."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tract_det import distributed
from tract_det.engine import checkpoint, ds
from tract_det.engine.ema import Ema
from tract_det.engine.loop import Step
from tract_det.engine.writers import Writers, say
from tract_det.errors import UserError

Means = Mapping[str, float]
Models = tuple[nn.Module, nn.Module | None]  # a model and, where there is one, its moving average
Evaluate = Callable[[nn.Module, nn.Module | None], Means]  # figures by name of both


class Run:
    """The state of a training run. Every rank has one, and calls its methods together.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        max_iter: steps in all.
        log_period: steps between lines of the log.
        checkpoint_period: steps between checkpoints to resume from.
        eval_period: steps between evaluations; 0 = at the end alone.
        evaluate: gives the figures by name.
        best_metric: the figure by which `model_best.pth` is kept; more is better.
        meta: saved with the weights.
        identity: config keys with the values that a resumed run must share.
        ema: the moving average that goes along, if any.
        saved_part: the part of the model whose weights are saved.
        diagnostics: figures of the last step that belong into the log.
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
        evaluate: Evaluate,
        best_metric: str,
        meta: Mapping[str, Any],
        identity: Mapping[str, Any],
        ema: Ema | None = None,
        saved_part: Callable[[nn.Module], nn.Module] = lambda model: model,
        diagnostics: Callable[[], Means] = dict,
    ) -> None:
        self.engine, self.output, self.max_iter = engine, output, max_iter
        self.log_period, self.checkpoint_period = log_period, checkpoint_period
        self.eval_period, self.evaluate, self.best_metric = eval_period, evaluate, best_metric
        self.meta, self.identity = meta, dict(identity)
        self.ema, self.saved_part, self.diagnostics = ema, saved_part, diagnostics
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
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"]["state"])
                own = state["ema"]["buffers"][distributed.rank()]
                checkpoint.restore_buffers(self.ema.model, own)
            say(f"resumed {self.output} at step {state['iteration']}")
        elif distributed.is_main():
            checkpoint.forget(self.output)
        self.writers = Writers(
            self.output,
            start=state["iteration"],
            max_iter=self.max_iter,
            period=self.log_period,
            device=self.engine.device,
            diagnostics=self.diagnostics,
        )
        if state["pending"]:
            pending = state["pending"][distributed.rank()]
            self.writers.pending = [Step(**step) for step in pending]
        return state["iteration"]

    def after_step(self, step: Step) -> None:
        """To be called by the loop after each step."""
        if self.ema is not None:
            self.ema.update(self.engine.module, step.iteration)
        self.writers.step(step)
        if step.iteration == self.max_iter:  # `finish` does it all
            return
        if self.eval_period > 0 and step.iteration % self.eval_period == 0:
            models = self._models()
            self._note(self.evaluate(*models), step.iteration, models)
        if step.iteration % self.checkpoint_period == 0:
            self.save(step.iteration)

    def save(self, iteration: int) -> None:
        """Saves what resuming needs, once a step."""
        if iteration == self.saved:
            return
        ema = None
        if self.ema is not None:
            own = distributed.gather(checkpoint.buffers_of(self.ema.model))
            ema = {"state": self.ema.state_dict(), "buffers": own}
        pending = distributed.gather([dataclasses.asdict(step) for step in self.writers.pending])
        state = {"best": self.best, "pending": pending, "identity": self.identity, "ema": ema}
        checkpoint.save(self.engine, self.output, iteration, state)
        self.saved = iteration

    def finish(self, report: Evaluate) -> None:
        """Saves the final weights, then evaluates them by `report`."""
        self.save(self.max_iter)
        models = self._models()
        self._save_weights("model_final", models)
        self._note(report(*models), self.max_iter, models)

    def _models(self) -> Models:
        """The model and its moving average, whole and the same on every rank."""
        distributed.average_buffers(self.engine.module)
        if self.ema is None:
            return ds.whole_model(self.engine), None
        distributed.average_buffers(self.ema.model)
        return ds.whole_model(self.engine), self.ema.model

    def _note(self, means: Means, iteration: int, models: Models) -> None:
        """Logs an evaluation, and keeps the weights if they are the best so far."""
        self.writers.scalars(iteration, means)
        value = means[self.best_metric]
        say(f"step {iteration}: {self.best_metric} {value:.2f}")
        if value > self.best:
            self.best = value
            self._save_weights("model_best", models)

    def _save_weights(self, name: str, models: Models) -> None:
        if not distributed.is_main():
            return
        for suffix, model in zip(("", "_ema"), models, strict=True):
            if model is not None:
                path = self.output / f"{name}{suffix}.pth"
                checkpoint.save_weights(path, self.saved_part(model), self.meta)
