"""Training throughput of `tools/train_net.py` against a bare PyTorch loop, in one run.

    python tools/benchmark_train.py
    python tools/benchmark_train.py --config-file FILE --rounds 8 --steps 10 KEY VALUE ...

Both train the same model on the same data with the same number of reader processes and threads, in
turns, so that a disturbance of the machine meets both; the medians of the rounds are compared. The
bare loop has no DeepSpeed, no log, no seeds and no checks.
"""

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tract_det.tools.train_net import (
    QUICK_START,
    build_engine,
    build_loader,
    build_model,
    find_config,
    read_data,
)

from tract_det.cli import run
from tract_det.config import load_cfg
from tract_det.data.loaders import collate
from tract_det.engine import ds
from tract_det.engine.loop import Step, StopSignal, train


def bare_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, stream: Iterator[Any], device: torch.device
) -> Iterator[None]:
    """The loop of a tutorial, a step at a time."""
    model.train()
    for images, targets in stream:
        losses = model(
            [image.to(device) for image in images],
            [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets],
        )
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def endless(dataset: Dataset, batch_size: int, workers: int) -> Iterator[Any]:
    """A shuffled DataLoader, over and over."""
    loader: DataLoader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(QUICK_START), metavar="FILE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a round")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    cfg = load_cfg(find_config(args.config_file), args.opts)
    device = ds.start(cfg.MODEL.DEVICE)
    split, _ = read_data(cfg, None, train=True)
    assert split is not None
    torch.manual_seed(cfg.SEED)
    model, _ = build_model(cfg, None, split.class_names, strict=False)
    bare_model = copy.deepcopy(model).to(device)
    engine = build_engine(cfg, model.to(device))
    loader = build_loader(cfg, split, 0)
    optimizer = torch.optim.AdamW(bare_model.parameters(), lr=cfg.SOLVER.BASE_LR)
    workers, batch = cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH
    # The same data set under both: reading and augmentation are not what is compared.
    stream = endless(loader.dataset.dataset, batch, workers)
    bare = bare_steps(bare_model, optimizer, stream, device)
    batches = iter(loader)
    images = args.steps * batch

    def ours() -> None:
        seen: list[Step] = []
        with StopSignal() as stop:
            train(
                engine,
                batches,
                start=0,
                max_iter=args.steps,
                accumulation=1,
                lr_at=lambda step: cfg.SOLVER.BASE_LR,
                after_step=seen.append,
                stop=stop,
            )

    def theirs() -> None:
        list(islice(bare, args.steps))

    ours()  # the readers start, memory is allocated
    theirs()
    times: dict[str, list[float]] = {"tract_det": [], "bare": []}
    for _ in range(args.rounds):
        times["bare"].append(timed(theirs, device))
        times["tract_det"].append(timed(ours, device))
    rates = {name: images / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {device}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"{args.config_file}: {batch} images a step, {args.rounds} rounds of {args.steps} steps")
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.2f} images/s (median)")
    print(f"ratio {rates['tract_det'] / rates['bare']:.3f}")
    ds.stop()


if __name__ == "__main__":
    run(main)
