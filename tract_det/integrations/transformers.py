"""TrAct in the `Trainer` of Transformers: `with_tract` for the model, a callback for the steps."""

from collections.abc import Sequence
from typing import Any

from accelerate.state import GradientState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tract_det.errors import UserError
from tract_det.integrations.core import ModelT, Schedule, applied, follow, require_tract
from tract_det.tract import set_micro_batches, tract_diagnostics

REMEDY = "make the trainer with Trainer(with_tract(model, args), args, ...)"


def with_tract(
    model: ModelT,
    args: TrainingArguments,
    lambda_: float = 0.1,
    stem: str | Sequence[str] | None = None,
    **settings: Any,
) -> ModelT:
    """Makes the stem of `model` learn by TrAct, in place, before a `Trainer` is made of it.

    Args:
        model: the model, neither wrapped nor compiled.
        args: those of the trainer.
        lambda_: damping, in units of standardised pixels.
        stem: name of the layer, or names; None = what `find_stem` finds.
        **settings: further ones of `apply_tract`.

    Returns:
        The same model.

    Raises:
        UserError: the model is wrapped or compiled, or the trainer would wrap it in DataParallel.
        TrActError: as of `apply_tract`.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process would train on {args.n_gpu} GPUs by DataParallel, whose threads share "
            "the statistics of TrAct: start with torchrun --nproc-per-node, or show it one GPU by "
            "CUDA_VISIBLE_DEVICES"
        )
    return applied(model, remedy=REMEDY, lambda_=lambda_, stem=stem, **settings)


class TrActTrainerCallback(TrainerCallback):
    """Makes accumulated gradients exact, follows a schedule, and adds the diagnostics to the log.

    Callbacks before this one do not see the diagnostics: `report_to` puts its own first.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        """Takes lambda by the fraction of the optimizer steps that are done; None = constant."""
        self.schedule = schedule

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses a model without TrAct."""
        require_tract(kwargs["model"], REMEDY)

    on_train_begin = on_init_end  # where the callback was added later

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step, sets lambda and what ends the step."""
        accumulates = args.gradient_accumulation_steps > 1
        set_micro_batches(kwargs["model"], _is_last if accumulates else 1)
        follow(kwargs["model"], self.schedule, state.global_step, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the diagnostics of the last step to an entry with a training loss."""
        if "loss" in kwargs["logs"] and state.is_world_process_zero:
            diagnostics = tract_diagnostics(kwargs["model"])
            kwargs["logs"].update(diagnostics)
            state.log_history[-1].update(diagnostics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lets every backward pass be a step again."""
        set_micro_batches(kwargs["model"], 1)


def _is_last() -> bool:
    """Whether the trainer makes a step after the current backward pass."""
    return GradientState().sync_gradients
