"""TrAct in a loop of Accelerate's: `prepare_tract(accelerator, model)` before `prepare`."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from tract_det.errors import UserError
from tract_det.integrations.core import ModelT, applied
from tract_det.tract import set_micro_batches

REMEDY = "call prepare_tract(accelerator, model) before accelerator.prepare and torch.compile"


def prepare_tract(
    accelerator: Accelerator,
    model: ModelT,
    lambda_: float = 0.1,
    stem: str | Sequence[str] | None = None,
    **settings: Any,
) -> ModelT:
    """Makes the stem of `model` learn by TrAct, in place, in steps as the accelerator makes them.

    With several micro-batches per step, the last one is the one of which `accelerator.accumulate`
    says so, also where a data loader ends early. Between steps, `set_lambda` and
    `tract_diagnostics` take the prepared model as well.

    Args:
        accelerator: made with its `gradient_accumulation_steps`; the loop runs forward and backward
            passes under `with accelerator.accumulate(model):`.
        model: the model, not prepared yet.
        lambda_: damping, in units of standardised pixels.
        stem: name of the layer, or names; None = what `find_stem` finds.
        **settings: further ones of `apply_tract`.

    Returns:
        The same model.

    Raises:
        UserError: the model is prepared, wrapped or compiled, or its optimizer is prepared.
        TrActError: as of `apply_tract`.
    """
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if any(accelerator.unwrap_model(prepared) is bare for prepared in accelerator._models):
        raise UserError(f"{type(bare).__name__} is already prepared: {REMEDY}")
    settings |= {"lambda_": lambda_, "stem": stem}
    applied(model, remedy=REMEDY, optimizers=accelerator._optimizers, **settings)
    accumulates = accelerator.gradient_accumulation_steps > 1
    set_micro_batches(model, (lambda: accelerator.sync_gradients) if accumulates else 1)
    return model
