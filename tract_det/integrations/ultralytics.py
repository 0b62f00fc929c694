"""TrAct in the trainers of Ultralytics: `add_tract(YOLO(...))` before `train`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from tract_det.errors import UserError
from tract_det.integrations.core import Schedule, applied_to_pixels, follow
from tract_det.pixels import input_variance
from tract_det.tract import remove_tract, set_micro_batches

UltralyticsModelT = TypeVar("UltralyticsModelT", bound=Model)

REMEDY = "call add_tract(YOLO(...)) before train, with a model that Ultralytics builds"
PIXEL_STD = (255.0, 255.0, 255.0)  # its models see pixels in [0, 1], which nothing standardises


def add_tract(
    model: UltralyticsModelT,
    lambda_: float = 0.1,
    stem: str | Sequence[str] | None = None,
    schedule: Schedule | None = None,
    **settings: Any,
) -> UltralyticsModelT:
    """Makes the stem learn by TrAct in every `train` of `model`, exactly so also with `nbs`.

    The moving average, and so every file of weights, holds the plain layer. A training that is
    resumed needs this call as well.

    Args:
        model: a `YOLO`, or another model of Ultralytics.
        lambda_: damping, in units of standardised pixels. The models see pixels in [0, 1], whose
            variance is a twentieth; the layer's damping is as much smaller.
        stem: name of the layer in `model.model`, or names; None = what `find_stem` finds.
        schedule: lambda by the fraction of the batches that are done; None = constant.
        **settings: further ones of `apply_tract`.

    Returns:
        The same model.

    Raises:
        UserError: `model` is not a model of Ultralytics.
    """
    if not isinstance(model, Model):
        raise UserError(f"{type(model).__name__} is not a model of Ultralytics: {REMEDY}")
    callbacks = _Callbacks(schedule, {"lambda_": lambda_, "stem": stem, **settings})
    for event in (
        "on_pretrain_routine_end",
        "on_train_epoch_start",
        "on_train_batch_start",
        "teardown",
    ):
        model.add_callback(event, getattr(callbacks, event))
    return model


class _Callbacks:
    """The callbacks of one model, and where its trainer is.

    Only the trainer's loop knows which batch ends a step: the first one that comes `accumulate`
    batches after the last step, and `accumulate` grows while the training warms up. Nothing calls
    back there, so this counts as the loop does.

    Attributes:
        epoch: the current epoch; None before the first.
        following: number of the batch that comes next, from the beginning of the training.
        batch: number of the current batch; -1 before the first.
        stepped: number of the batch that ended the last step, likewise.
    """

    def __init__(self, schedule: Schedule | None, settings: dict[str, Any]) -> None:
        self.schedule, self.settings = schedule, settings
        relative = settings.get("relative", False)
        self.variance = 1.0 if relative else input_variance(PIXEL_STD)

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Applies TrAct in every process, when the moving average has its copy of the model."""
        model = _bare(trainer)
        LOGGER.info(applied_to_pixels(model, self.variance, remedy=REMEDY, **self.settings))
        self.epoch: int | None = None
        self._begin(trainer)

    def _begin(self, trainer: BaseTrainer) -> None:
        """Before the first batch, or the first one after an attempt that is given up."""
        self.batch = self.stepped = -1
        set_micro_batches(_bare(trainer), self._is_last(trainer))

    def _is_last(self, trainer: BaseTrainer) -> Callable[[], bool]:
        return lambda: self.batch - self.stepped >= trainer.accumulate

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        """Counts the epochs; after a lack of memory or a loss of NaN one begins again."""
        if trainer.epoch == self.epoch:
            self._begin(trainer)
        self.epoch = trainer.epoch
        self.following = trainer.epoch * len(trainer.train_loader)

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        """Counts the batches, and sets lambda before the first one of a step."""
        if self._is_last(trainer)():  # the batch before this one ended a step
            self.stepped = self.batch
        if self.stepped == self.batch:
            batches = trainer.epochs * len(trainer.train_loader)
            model = _bare(trainer)
            follow(model, self.schedule, self.following, batches, self.variance)
        self.batch, self.following = self.following, self.following + 1

    def teardown(self, trainer: BaseTrainer) -> None:
        """Leaves a plain model, also after an error."""
        if isinstance(trainer.model, nn.Module):
            remove_tract(_bare(trainer))


def _bare(trainer: Any) -> nn.Module:
    """The model without what compiles and distributes it."""
    return unwrap_model(trainer.model)
