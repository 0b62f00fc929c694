"""TrAct in MMEngine's `Runner`: `custom_hooks=[dict(type="TrActHook")]`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import ImgDataPreprocessor, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tract_det.errors import UserError
from tract_det.integrations.core import Schedule, applied_to_pixels, follow
from tract_det.pixels import input_variance
from tract_det.tract import set_image_sizes, set_micro_batches, tract_diagnostics

REMEDY = "give the Runner the plain model, and compile it by its own `compile`"


@HOOKS.register_module()
class TrActHook(Hook):
    """Makes the stem learn by TrAct in `train`, exactly so also with `accumulative_counts`.

    The Runner wraps the model and makes the optimizer before it calls any hook. Neither has to
    know: the parameters stay the same objects, and DistributedDataParallel averages TrAct's
    gradient as any other. Strategies that cut up the parameters are refused.
    """

    def __init__(
        self,
        lambda_: float = 0.1,
        stem: str | Sequence[str] | None = None,
        schedule: Schedule | None = None,
        log_every: int = 10,
        pixel_std: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        """Takes the settings of TrAct.

        Args:
            lambda_: damping, in units of standardised pixels.
            stem: name of the layer in the model, or names; None = what `find_stem` finds.
            schedule: lambda by the fraction of the optimizer steps that are done; None = constant.
            log_every: iterations between two entries of `tract_diagnostics` in the log; 0 = never.
            pixel_std: the divisor of the images, which are in [0, 255]; None = that of the model's
                `data_preprocessor`, and where that has none, images that come standardised.
            **settings: further ones of `apply_tract`.
        """
        self.settings: dict[str, Any] = {"lambda_": lambda_, "stem": stem, **settings}
        self.schedule, self.log_every, self.pixel_std = schedule, log_every, pixel_std

    def before_train(self, runner: Runner) -> None:
        """Applies TrAct when copies of the model are made and its weights are loaded."""
        model = _bare(runner)
        relative = self.settings.get("relative", False)
        self.variance = 1.0 if relative else _variance(model, self.pixel_std)
        words = applied_to_pixels(model, self.variance, remedy=REMEDY, **self.settings)
        print_log(words, logger="current")
        accumulates = _counts(runner) > 1
        set_micro_batches(model, runner.optim_wrapper.should_sync if accumulates else 1)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the sizes of the images, and lambda before the first micro-batch of a step."""
        model, counts = _bare(runner), _counts(runner)
        set_image_sizes(model, _image_sizes(model, data_batch), edges=True)
        if runner.iter % counts == 0:
            steps = math.ceil(runner.max_iters / counts)
            follow(model, self.schedule, runner.iter // counts, steps, self.variance)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Gives the log the diagnostics of the last step's gradient."""
        if self.log_every and self.every_n_train_iters(runner, self.log_every):
            diagnostics = tract_diagnostics(_bare(runner))
            entries = {f"train/{name}": value for name, value in diagnostics.items()}
            runner.message_hub.update_scalars(entries)

    def after_train(self, runner: Runner) -> None:
        """Lets every backward pass be a step again, of images of one size."""
        set_micro_batches(_bare(runner), 1)
        set_image_sizes(_bare(runner), None)


def _bare(runner: Runner) -> nn.Module:
    """The model without its wrapper; refuses one that replaces the parameters."""
    model = runner.model
    if not is_model_wrapper(model):
        return model
    if not isinstance(model, DistributedDataParallel):
        raise UserError(
            f"the Runner wraps the model in {type(model).__name__}: TrActHook needs "
            "MMDistributedDataParallel (model_wrapper_cfg), or one process"
        )
    return model.module


def _counts(runner: Runner) -> int:
    """Micro-batches of a step."""
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, OptimWrapperDict):
        return wrapper._accumulative_counts
    if any(part._accumulative_counts > 1 for part in wrapper.values()):
        raise UserError(
            "several optimizers with accumulative_counts: TrActHook cannot tell which of them "
            "makes the stem's step; leave accumulative_counts out"
        )
    return 1


def _variance(model: nn.Module, pixel_std: Sequence[float] | None) -> float:
    """The variance of the model's input, in units of standardised pixels."""
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    if pixel_std is None:
        normalizes = getattr(preprocessor, "_enable_normalize", None)
        if normalizes is None:
            return 1.0
        pixel_std = preprocessor.std.flatten().tolist() if normalizes else [1.0]
    if len(pixel_std) != 3:  # not RGB: each channel is compared with the mean over R, G and B
        return sum(input_variance([value] * 3) for value in pixel_std) / len(pixel_std)
    return input_variance(pixel_std)  # in the order BGR this is wrong by less than 0.1 %


def _image_sizes(model: nn.Module, data_batch: Any) -> list[tuple[int, int]] | None:
    """Height and width of each image where the preprocessor pads them with zeros, or else None."""
    preprocessor: Any = getattr(model, "data_preprocessor", None)
    known = isinstance(preprocessor, ImgDataPreprocessor) and isinstance(data_batch, Mapping)
    # mmdet's `batch_augments` may resize the images once they are padded.
    if not known or preprocessor.pad_value or getattr(preprocessor, "batch_augments", None):
        return None
    return [tuple(image.shape[-2:]) for image in data_batch["inputs"]]
