"""A step as the loop reports it. Its losses stay on the device until somebody reads them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tract_det.errors import DivergedError


@dataclass
class Step:
    """What the loop tells `after_step` about a finished optimizer step.

    Attributes:
        iteration: number of steps done, this one included.
        losses: by name, this rank's means over the micro-batches; their sum is `loss`. Empty until
            `read`.
        lr: learning rate.
        seconds: wall time; of the steps up to a read together, that of the device as well.
        data_seconds: the part of it spent waiting for the loader.
        images: number of images in the global batch.
        unread: where the losses are meanwhile; None = there are none to come.
    """

    iteration: int
    losses: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0
    images: int = 0
    unread: "Unread | None" = field(default=None, repr=False, compare=False)

    def read(self) -> None:
        """Fills in the losses of all steps so far; waits for the device.

        Raises:
            DivergedError: as `Unread.read`.
        """
        if self.unread is not None:
            self.unread.read()


def mean_steps(ranks: Sequence[Sequence[Step]]) -> list[Step]:
    """The steps of several ranks as one rank would have reported them, losses read.

    Args:
        ranks: the same steps of each rank.
    """

    def mean(steps: Sequence[Step]) -> Step:
        names = steps[0].losses
        losses = {name: sum(step.losses[name] for step in steps) / len(steps) for name in names}
        return replace(steps[0], losses=losses)

    return [mean(steps) for steps in zip(*ranks, strict=True)]


class Unread:
    """The losses of the steps since the last read.

    To read a number waits for the device, which has nothing to do until its next work arrives. So
    the losses of many steps are read at once, and only then is it checked that they are finite.

    Args:
        accumulation: micro-batches per step.
    """

    def __init__(self, accumulation: int) -> None:
        self.accumulation = accumulation
        self._micro_batches: list[tuple[Step, dict[str, Tensor], list[str] | None]] = []

    def add(self, step: Step, losses: Mapping[str, Tensor], targets: Any) -> None:
        """Takes in the losses of a micro-batch of this step, without reading them."""
        ids = None
        if isinstance(targets, list):
            ids = [str(target.get("image_id", "?")) for target in targets]
        tensors = {name: loss.detach() for name, loss in losses.items()}
        self._micro_batches.append((step, tensors, ids))

    def read(self) -> None:
        """Fills in the losses of the steps, by a single transfer.

        Raises:
            DivergedError: a loss is not finite; names the first such step, its losses and images.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches:
            return
        began = time.perf_counter()
        tensors = [loss for _, losses, _ in micro_batches for loss in losses.values()]
        numbers = iter(torch.stack(tensors).tolist())
        micro_batches[-1][0].seconds += time.perf_counter() - began
        for step, losses, ids in micro_batches:
            values = {name: next(numbers) for name in losses}
            values["loss"] = sum(values.values())
            if not math.isfinite(values["loss"]):
                facts = {"step": step.iteration, "lr": step.lr, "losses": values, "images": ids}
                raise DivergedError(_diverged(step.iteration, values, ids), facts)
            for name, value in values.items():
                step.losses[name] = step.losses.get(name, 0.0) + value / self.accumulation


def _diverged(iteration: int, losses: Mapping[str, float], ids: list[str] | None) -> str:
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    images = "" if ids is None else f"images: {', '.join(ids)}; "
    return (
        f"the loss is not finite at step {iteration}: {parts}; {images}lower SOLVER.BASE_LR, "
        "lengthen the warm-up or set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )
