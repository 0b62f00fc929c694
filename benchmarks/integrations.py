"""TrAct's share of a training step in Lightning's trainer: a ResNet-18, on the CPU.

    tract-det bench integrations
    tract-det bench integrations --batch 8 --size 64 --turns 3

One training takes steps with TrAct and without it by turns, so that a disturbance of the machine
meets both; without it the layer is the plain one. A step is all between the trainer's beginning
and end of a batch, the optimizer's part included, the data apart. The ratio is the median over the
turns of (step with TrAct / plain step of the same turn).
"""

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tract_det.cli import run
from tract_det.commands.bench import print_and_keep
from tract_det.engine.provenance import hardware
from tract_det.errors import UserError

LAMBDA, WARMUP = 0.1, 2


def seconds_of_steps(network: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """Seconds of each step of a training in which every other one, from the second, is TrAct's."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from tract_det.integrations.lightning import TrActCallback

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    seconds: list[float] = []
    tract = TrActCallback(
        LAMBDA, schedule=lambda done: LAMBDA if round(done * steps) % 2 else None, log_every=0
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[tract, Clock()],  # in this order: setting lambda is no part of a step
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = [batch] * steps
    trainer.fit(Classifier(), DataLoader(data, batch_size=None))
    return seconds


def report(batch_size: int, side: int, turns: int) -> Iterator[str]:
    """The lines of the measurement, as they come."""
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, side, side), torch.randint(1000, (batch_size,))
    yield (
        f"{hardware(torch.device('cpu'))}. Python {platform.python_version()}, torch "
        f"{torch.__version__}, lightning {version('lightning')}, float32, lambda {LAMBDA}"
    )
    yield f"ResNet-18, {batch_size} x {side}^2, {turns} turns after {WARMUP} to warm up"
    network = torchvision.models.resnet18()
    seconds = seconds_of_steps(network, batch, 2 * (turns + WARMUP))[2 * WARMUP :]
    plain, tract = seconds[::2], seconds[1::2]
    ratios = sorted(a / b for a, b in zip(tract, plain, strict=True))
    yield f"plain step: {statistics.median(plain):.3f} s"
    yield f"TrAct's step: {statistics.median(tract):.3f} s"
    yield (
        f"ratio: {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f} "
        "over the turns)"
    )


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, metavar="FILE", help="write what is printed")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("lightning") is None:
        raise UserError("Lightning is not installed: pip install lightning")
    torch.set_num_threads(args.threads)
    print_and_keep(report(args.batch, args.size, args.turns), args.output)


if __name__ == "__main__":
    run(main)
