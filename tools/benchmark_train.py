"""Training throughput of the two trainers against a bare PyTorch loop, in one run.

    python tools/benchmark_train.py                      # the quick start's detector
    python tools/benchmark_train.py --config-file FILE --rounds 8 --steps 10 KEY VALUE ...
    python tools/benchmark_train.py --config-file configs/detectron2/FILE KEY VALUE ...
    python tools/benchmark_train.py --classifier --config-file \
        configs/ImageNet-Classification/resnet50_90ep.yaml DATASETS.ROOT path/to/images

Both train the same model on the same data with the same number of reader processes and threads, in
turns, so that a disturbance of the machine meets both; the medians of the rounds are compared.
Loss, augmentation and optimizer are the same as well; the bare loop has no DeepSpeed, no log, no
seeds and no checks. For a detectron2 model it is the loop of its own plain_train_net.py, with its
readers, optimizer, log and checks.
"""

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tract_det.tools import classification, pretrain_net, train_net
from tract_det.tools.common import build_engine, find_config, optimizer_of
from tract_det.tools.detectors import detectron2_side

from tract_det.cli import run
from tract_det.data.detection_loaders import collate
from tract_det.data.voc import VOCSplit
from tract_det.engine import ds
from tract_det.engine.loop import Step, StopSignal, train
from tract_det.errors import UserError


class Sides(NamedTuple):
    """What is compared: the same model, data and optimizer on either side."""

    engine: Any
    batches: Iterator[Any]
    bare: Iterator[None]  # a step each


def bare_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Any],
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
) -> Iterator[None]:
    """The loop of a tutorial, a step at a time."""
    model.train()
    for batch in stream:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def detector(cfg: CfgNode, device: torch.device) -> Sides:
    """As `train_net.py` trains it, and bare."""
    split, _ = train_net.read_data(cfg, None, train=True)
    assert split is not None
    model, _ = train_net.build_model(cfg, None, split.class_names, strict=False)
    bare_model = copy.deepcopy(model).to(device)
    engine = build_engine(cfg, model.to(device))
    loader = train_net.build_loader(cfg, split, 0)
    if cfg.MODEL.DETECTRON2.CONFIG_FILE:
        return Sides(engine, iter(loader), detectron2_steps(cfg, bare_model, split))

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        images, targets = batch
        losses = model(
            [image.to(device) for image in images],
            [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets],
        )
        return sum(losses.values())

    return sides(cfg, engine, loader, bare_model, loss_of, collate)


def detectron2_steps(cfg: CfgNode, model: nn.Module, split: VOCSplit) -> Iterator[None]:
    """detectron2's plain loop over the same images, model and recipe."""
    d2 = detectron2_side()
    if cfg.SOLVER.OPTIMIZER != "SGD" or cfg.INPUT.COLOR_JITTER:
        raise UserError(
            "detectron2's plain loop has SGD and no colour jitter: set SOLVER.OPTIMIZER SGD and "
            "INPUT.COLOR_JITTER 0.0"
        )
    model = d2.as_detectron2(model)
    if cfg.MODEL.TRACT.ENABLED:
        d2.apply_tract(model, cfg.MODEL.TRACT.LAMBDA)  # tells it the padding as well
    return d2.plain_steps(
        model,
        split.annotations,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        min_size=cfg.INPUT.MIN_SIZE_TRAIN,
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        learning_rate=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        log_period=cfg.LOG_PERIOD,
        output_dir=Path(tempfile.mkdtemp()),
    )


def classifier(cfg: CfgNode, device: torch.device) -> Sides:
    """As `pretrain_net.py` trains it, and bare."""
    split, _ = classification.read_data(cfg, train=True)
    assert split is not None
    model, meta = classification.build_model(cfg, None, tuple(split.class_names), strict=False)
    if classification.is_mixed(cfg):
        raise UserError("the bare loop does not mix images: set MIX.PROB 0")
    form = pretrain_net.memory_format(cfg)
    bare_model = copy.deepcopy(model).to(device, memory_format=form)
    engine, _ = pretrain_net.prepare(cfg, model, device)
    loader = classification.build_loader(cfg, split, meta, 0)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch[0].to(device, memory_format=form), batch[1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            return model(images, labels)["loss_cls"]

    return sides(cfg, engine, loader, bare_model, loss_of, stack)


def stack(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a batch, each in one tensor."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor([target["label"] for target in targets])


def sides(
    cfg: CfgNode,
    engine: Any,
    loader: Any,
    bare_model: nn.Module,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    collate_fn: Callable[[list], Any],
) -> Sides:
    """Both loops over the same data set: reading and augmentation are not what is compared."""
    dataset = getattr(loader.dataset, "dataset", loader.dataset)  # without the seeds around it
    stream = endless(dataset, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, collate_fn)
    if cfg.SOLVER.ACCUMULATION != 1 or cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        raise UserError(
            "the bare loop neither accumulates nor clips: set SOLVER.ACCUMULATION 1 and "
            "SOLVER.CLIP_GRADIENTS.ENABLED False"
        )
    steps = bare_steps(bare_model, optimizer_of(cfg, bare_model), stream, loss_of)
    return Sides(engine, iter(loader), steps)


def endless(
    dataset: Dataset, batch_size: int, workers: int, collate_fn: Callable[[list], Any]
) -> Iterator[Any]:
    """A shuffled DataLoader, over and over."""
    loader: DataLoader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate_fn,
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
    parser.add_argument("--classifier", action="store_true", help="pretrain_net.py, not train_net")
    parser.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a round")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    tool = pretrain_net if args.classifier else train_net
    args.config_file = args.config_file or str(tool.parse([]).config_file)
    cfg = tool.load_cfg(find_config(args.config_file), args.opts)
    device = ds.start(cfg.MODEL.DEVICE)
    torch.manual_seed(cfg.SEED)
    engine, batches, bare = (classifier if args.classifier else detector)(cfg, device)
    batch = cfg.SOLVER.IMS_PER_BATCH
    images = args.steps * batch
    form = pretrain_net.memory_format(cfg) if args.classifier else torch.preserve_format

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
                memory_format=form,
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
