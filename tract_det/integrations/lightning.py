"""TrAct in Lightning's trainer: `Trainer(callbacks=[TrActCallback()])`."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from tract_det.errors import UserError
from tract_det.integrations.core import Schedule, applied, follow, require_tract
from tract_det.tract import set_micro_batches, tract_diagnostics

REMEDY = (
    "give TrActCallback to Trainer(callbacks=[...]) before the first fit, build the network in the "
    "module's __init__, and compile it in its setup or configure_model"
)


class TrActCallback(Callback):
    """Makes the stem learn by TrAct in `fit`, exactly so also with accumulated gradients.

    With manual optimization, the accumulation is the module's own: it calls `set_micro_batches`.
    """

    def __init__(
        self,
        lambda_: float = 0.1,
        stem: str | Sequence[str] | None = None,
        schedule: Schedule | None = None,
        log_every: int | None = None,
        **settings: Any,
    ) -> None:
        """Takes the settings of TrAct.

        Args:
            lambda_: damping, in units of standardised pixels.
            stem: name of the layer in the LightningModule, or names; None = what `find_stem` finds.
            schedule: lambda by the fraction of the optimizer steps that are done; None = constant.
            log_every: optimizer steps between two entries of `tract_diagnostics` in the loggers;
                None = the trainer's `log_every_n_steps`; 0 = never.
            **settings: further ones of `apply_tract`.
        """
        self.settings = {"lambda_": lambda_, "stem": stem, **settings}
        self.schedule, self.log_every = schedule, log_every

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Applies TrAct, before the optimizers are made and the module is wrapped."""
        if stage != "fit":
            return
        # Lightning unwraps a module that was compiled as a whole, and keeps this mark of it.
        if pl_module._compiler_ctx is not None:
            raise UserError(f"{type(pl_module).__name__} is already compiled: {REMEDY}")
        optimizers = trainer.strategy.optimizers
        applied(pl_module, remedy=REMEDY, optimizers=optimizers, **self.settings)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that TrAct is still there, and that a schedule knows its length."""
        require_tract(pl_module, REMEDY)
        if self.schedule is not None and trainer.estimated_stepping_batches == float("inf"):
            raise UserError("the schedule of TrActCallback has no end: set max_steps or max_epochs")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first micro-batch of a step, sets lambda and what ends the step."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self.schedule is not None:
            steps = trainer.estimated_stepping_batches
            follow(pl_module, self.schedule, trainer.global_step, steps)
        if not pl_module.automatic_optimization:
            return

        def is_last() -> bool:
            batches = trainer.fit_loop.batch_idx + 1
            ends = trainer.is_last_batch or batches == trainer.num_training_batches
            return ends or batches % trainer.accumulate_grad_batches == 0

        set_micro_batches(pl_module, is_last if trainer.accumulate_grad_batches > 1 else 1)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Logs the diagnostics of the step's gradient."""
        settings: Any = trainer  # Lightning sets this attribute without declaring it
        every = settings.log_every_n_steps if self.log_every is None else self.log_every
        if not (every and trainer.is_global_zero) or (trainer.global_step + 1) % every:
            return
        diagnostics = tract_diagnostics(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(diagnostics, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the layers forget the trainer."""
        set_micro_batches(pl_module, 1)
