"""What happens between the steps of a run: logging, evaluation, checkpoints."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tract_det import distributed
from tract_det.engine import checkpoint, ds, space
from tract_det.engine.ema import Ema
from tract_det.engine.step import Step
from tract_det.engine.writers import Writers, say
from tract_det.errors import UserError

Means = Mapping[str, float]
Models = tuple[nn.Module, nn.Module | None]  # a model and its moving average, if there is one
Evaluate = Callable[[nn.Module, nn.Module | None], Means]


class Run:
    """The state of a training run. Every rank has one, and all call its methods together.

    Args:
        engine: as `ds.initialize` makes it.
        output: the run's folder.
        max_iter: number of steps in all.
        log_period: steps between two lines of the log.
        checkpoint_period: steps between two checkpoints to resume from.
        eval_period: steps between two evaluations; 0 = only at the end.
        evaluate: gives the figures by name, of the model and its moving average.
        best_metric: the figure that decides which weights `model_best.pth` has; more is better.
        meta: saved with the weights.
        identity: config keys, with the values that a resumed run must have too.
        ema: the moving average of the weights, if any.
        saved_part: gives the part of the model whose weights are saved.
        diagnostics: gives further figures of the last step, for the log.
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
        """Opens the writers and, to resume, restores the newest checkpoint.

        Returns:
            The number of steps done before.

        Raises:
            UserError: there is nothing to resume, or the run began with other settings.
        """
        state: dict[str, Any] = {"iteration": 0, "pending": None}
        # A checkpoint goes when the next is complete; the one to resume from is there already.
        checkpoints = 1 if resume or self.checkpoint_period >= self.max_iter else 2
        space.require_for_run(self.output, self.engine, self.ema, checkpoints)
        if resume:
            state = checkpoint.load(self.engine, self.output)
            for key, value in self.identity.items():
                first_value = state["identity"].get(key, value)
                if first_value != value:
                    raise UserError(
                        f"--resume: {key} was {first_value} when the run began, now it is {value}: "
                        "set it back"
                    )
            self.best, self.saved = state["best"], state["iteration"]
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"]["state"])
                buffers = state["ema"]["buffers"][distributed.rank()]
                checkpoint.restore_buffers(self.ema.model, buffers)
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
        """Logs, evaluates and saves as the periods say; the loop calls it after each step."""
        if self.ema is not None:
            self.ema.update(self.engine.module, step.iteration)
        self.writers.step(step)
        if step.iteration == self.max_iter:  # `finish` evaluates and saves
            return
        if self.eval_period > 0 and step.iteration % self.eval_period == 0:
            self.writers.read()  # a model that has diverged is not evaluated
            models = self._models()
            self._note(self.evaluate(*models), step.iteration, models)
        if step.iteration % self.checkpoint_period == 0:
            self.save(step.iteration)

    def save(self, iteration: int) -> None:
        """Saves what resuming needs, unless this step is saved already.

        Raises:
            DivergedError: a loss so far is not finite; nothing is saved then.
        """
        if iteration == self.saved:
            return
        self.writers.read()
        space.require_for_checkpoint(self.output, self.engine, self.ema, iteration)
        ema = None
        if self.ema is not None:
            buffers = distributed.gather(checkpoint.buffers_of(self.ema.model))
            ema = {"state": self.ema.state_dict(), "buffers": buffers}
        steps = [dataclasses.replace(step, unread=None) for step in self.writers.pending]
        pending = distributed.gather([dataclasses.asdict(step) for step in steps])
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
        """The model and its moving average: whole, and the same on every rank."""
        distributed.average_buffers(self.engine.module)
        if self.ema is None:
            return ds.whole_model(self.engine), None
        distributed.average_buffers(self.ema.model)
        return ds.whole_model(self.engine), self.ema.model

    def _note(self, means: Means, iteration: int, models: Models) -> None:
        """Logs an evaluation, and saves the weights if they are the best so far."""
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
