"""The training loop and the inference loop. They know no model, data set or config."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from tract_det import distributed
from tract_det.engine import ds
from tract_det.engine.step import Step, Unread

# Images and targets: lists of tensors and of dicts for a detector, tensors for a classifier.
Batch = tuple[Any, ...]


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
    after_step: Callable[[Step], object],
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
        after_step: called on every rank when a step is done; its losses are not read yet. If it
            returns true, on all ranks, the training ends there.
        stop: a signal to any rank stops all of them after the same step: the one that it came in,
            or, with several ranks, the one after that.
        before_step: called on every rank with the number of steps done.
        memory_format: of the images, if they are one tensor.

    Raises:
        DivergedError: a loss is not finite; names the step, the losses and the images. It is
            noticed when a step is read, at the latest when the training ends, in whatever way.
    """
    engine.train()
    stream, unread, is_set = iter(batches), Unread(accumulation), distributed.AnyRank()
    try:
        for iteration in range(start, max_iter):
            began = time.perf_counter()
            step = Step(iteration + 1, lr=lr_at(iteration), unread=unread)
            ds.set_lr(engine, step.lr)
            if before_step is not None:
                before_step(iteration)
            for _ in range(accumulation):
                images, targets = _to(engine.device, _timed_next(stream, step), memory_format)
                losses = engine(images, targets)
                unread.add(step, losses, targets)
                engine.backward(sum(losses.values()))
                engine.step()
                step.images += len(images) * distributed.world_size()
            step.seconds = time.perf_counter() - began
            if after_step(step) or is_set(bool(stop.number)):
                return iteration + 1
        return max_iter
    finally:  # an error may be a consequence of losses that are not finite: this says so
        unread.read()


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
    """`value` with its tensors on the device, four-dimensional ones in this memory format.

    What goes to a GPU does not wait for it: the loader has put it into pinned memory. What comes
    from there is complete.
    """
    if torch.is_tensor(value):
        form = memory_format if value.ndim == 4 else torch.preserve_format
        is_upload = torch.device(device).type != "cpu"
        return value.to(device, non_blocking=is_upload, memory_format=form)
    if isinstance(value, dict):
        return {key: _to(device, item, memory_format) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(device, item, memory_format) for item in value)
    return value


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
