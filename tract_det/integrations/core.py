"""What the integrations have in common: applying TrAct in time, and a schedule for lambda."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from tract_det.errors import UserError
from tract_det.pixels import lambda_in_words
from tract_det.tract import TrActLayer, apply_tract, set_lambda
from tract_det.tract.modules import tract_layers

ModelT = TypeVar("ModelT", bound=nn.Module)

# Fraction of the training's steps that are done, from 0 to 1 -> lambda, or None: TrAct off.
Schedule = Callable[[float], float | None]


def has_tract(model: nn.Module) -> bool:
    """Whether a layer of the model learns by TrAct."""
    return any(isinstance(module, TrActLayer) for module in model.modules())


def applied(
    model: ModelT, *, remedy: str, optimizers: Iterable[Optimizer] = (), **settings: Any
) -> ModelT:
    """Makes the stem of `model` learn by TrAct, in place, unless the training has begun.

    Args:
        model: the bare model.
        remedy: how to apply TrAct in time, for the message.
        optimizers: those that the trainer has made so far.
        **settings: those of `apply_tract`.

    Returns:
        The same model.

    Raises:
        UserError: the model is wrapped or compiled, or an optimizer has its parameters already.
        TrActError: as of `apply_tract`.
    """
    if not has_tract(model):  # otherwise this is a second training, which may have its optimizer
        _refuse_late(model, optimizers, remedy)
    return apply_tract(model, **settings)


def applied_to_pixels(
    model: nn.Module, variance: float, *, remedy: str, lambda_: float, **settings: Any
) -> str:
    """`applied`, for an input that is not standardised.

    Args:
        model: the bare model.
        variance: of its input, in units of standardised pixels; 1 where `relative` is set.
        remedy: as in `applied`.
        lambda_: damping, in units of standardised pixels, or with `relative` of the mean square.
        **settings: further ones of `apply_tract`.

    Returns:
        On what it is, and with which lambda, in words for a log.
    """
    applied(model, remedy=remedy, lambda_=lambda_ * variance, **settings)
    unit = "trace" if settings.get("relative") else "standardised"
    names = ", ".join(name for name, _ in tract_layers(model))
    return f"TrAct on {names}, {lambda_in_words(lambda_, unit, variance)}"


def _refuse_late(model: nn.Module, optimizers: Iterable[Optimizer], remedy: str) -> None:
    for name, module in model.named_modules():
        place = f"'{name}'" if name else "the model"
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise UserError(f"{place} is already wrapped in {type(module).__name__}: {remedy}")
        # What torch.compile returns keeps the original under this name; model.compile() does not.
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise UserError(f"{place} is already compiled: {remedy}")
    parameters = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not parameters.isdisjoint(map(id, group["params"])):
                raise UserError(
                    f"{type(optimizer).__name__} was made before TrAct was applied: {remedy}"
                )


def require_tract(model: nn.Module, remedy: str) -> None:
    """Raises a UserError with this remedy if no layer of the model learns by TrAct."""
    if not has_tract(model):
        raise UserError(
            f"{type(model).__name__} has no TrAct layer, it would train plainly: {remedy}"
        )


def follow(
    model: nn.Module, schedule: Schedule | None, done: int, steps: float, variance: float = 1.0
) -> None:
    """Sets lambda for the step that comes after `done` of `steps`; without a schedule, nothing.

    `variance` is that of the model's input, in units of standardised pixels.
    """
    if schedule is not None:
        lambda_ = schedule(min(done / steps, 1.0))
        set_lambda(model, None if lambda_ is None else lambda_ * variance)
