"""The training loop and the inference loop. They know no model, data set or config."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from tract_det import distributed
from tract_det.engine import ds
from tract_det.errors import DivergedError

# Images and targets: lists of tensors and of dicts for a detector, tensors for a classifier.
Batch = tuple[Any, ...]


@dataclass
class Step:
    """What the loop tells `after_step` about a finished optimizer step.

    Attributes:
        iteration: number of steps done, this one included.
        losses: by name, this rank's means over the micro-batches; their sum is `loss`.
        lr: learning rate.
        seconds: wall time.
        data_seconds: the part of it spent waiting for the loader.
        images: number of images in the global batch.
    """

    iteration: int
    losses: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0
    images: int = 0


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop checks after each step.

    A second SIGINT interrupts at once.

    Attributes:
        number: the signal that this rank has received; 0 = none.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "StopSignal":
        self._handlers = {n: signal.signal(n, self._on) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def train(
    engine: Any,
    batches: Iterable[Batch],
    *,
    start: int,
    max_iter: int,
    accumulation: int,
    lr_at: Callable[[int], float],
    after_step: Callable[[Step], None],
    stop: StopSignal,
    before_step: Callable[[int], None] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> int:
    """Trains from step `start` to `max_iter`; returns the number of steps done.

    Args:
        engine: as `ds.initialize` makes it.
        batches: micro-batches from step `start` on; at least as many as the steps take.
        start: number of steps done before.
        max_iter: number of steps in all.
        accumulation: micro-batches per step.
        lr_at: gives the learning rate of a step, counted from 0.
        after_step: called on every rank when a step is done.
        stop: checked after each step; a signal to any rank stops all of them.
        before_step: called on every rank with the number of steps done.
        memory_format: of the images, if they are one tensor.

    Raises:
        DivergedError: a loss is not finite; names the step, the losses and the images.
    """
    engine.train()
    stream = iter(batches)
    for iteration in range(start, max_iter):
        began = time.perf_counter()
        step = Step(iteration + 1, lr=lr_at(iteration))
        ds.set_lr(engine, step.lr)
        if before_step is not None:
            before_step(iteration)
        for _ in range(accumulation):
            images, targets = _to(engine.device, _timed_next(stream, step), memory_format)
            losses = engine(images, targets)
            loss = sum(losses.values())
            _record(step, losses, targets, accumulation)
            engine.backward(loss)
            engine.step()
            step.images += len(images) * distributed.world_size()
        step.seconds = time.perf_counter() - began
        after_step(step)
        if distributed.any_rank(bool(stop.number), engine.device):
            return iteration + 1
    return max_iter


def _timed_next(stream: Iterator[Batch], step: Step) -> Batch:
    began = time.perf_counter()
    batch = next(stream)
    step.data_seconds += time.perf_counter() - began
    return batch


def _to(
    device: torch.device | str,
    value: Any,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Any:
    """`value` with its tensors on the device, four-dimensional ones in this memory format."""
    if torch.is_tensor(value):
        form = memory_format if value.ndim == 4 else torch.preserve_format
        return value.to(device, non_blocking=device != "cpu", memory_format=form)
    if isinstance(value, dict):
        return {key: _to(device, item, memory_format) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(device, item, memory_format) for item in value)
    return value


def _record(
    step: Step, losses: Mapping[str, torch.Tensor], targets: Any, accumulation: int
) -> None:
    """Adds a micro-batch's losses to the step's means; refuses losses that are not finite."""
    values = {name: float(value.detach()) for name, value in losses.items()}
    values["loss"] = sum(values.values())
    if not math.isfinite(values["loss"]):
        names = ""
        if isinstance(targets, list):
            names = "images: " + ", ".join(str(t.get("image_id", "?")) for t in targets) + "; "
        parts = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise DivergedError(
            f"the loss is not finite at step {step.iteration}: {parts}; {names}lower "
            "SOLVER.BASE_LR, lengthen the warm-up or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    for name, value in values.items():
        step.losses[name] = step.losses.get(name, 0.0) + value / accumulation


@torch.inference_mode()
def infer(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    consume: Callable[..., None],
    memory_format: torch.memory_format = torch.preserve_format,
) -> int:
    """Runs the model over this rank's batches; returns the number of images.

    Args:
        model: is in evaluation mode meanwhile, and in its former mode afterwards.
        batches: `(images, ...)`; what follows the images is passed to `consume`.
        device: where the model is.
        consume: called with the rest of each batch and the model's output, on the CPU.
        memory_format: of the images, if they are one tensor.
    """
    was_training = model.training
    model.eval()
    count = 0
    for images, *others in batches:
        predictions = model(_to(device, images, memory_format))
        consume(*others, _to("cpu", predictions))
        count += len(images)
    model.train(was_training)
    return count
