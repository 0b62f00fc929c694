"""Training throughput of the two trainers against a bare PyTorch loop, in one run.

    python benchmarks/train.py                      # the quick start's detector
    python benchmarks/train.py --config-file FILE --rounds 8 --steps 10 KEY VALUE ...
    python benchmarks/train.py --config-file configs/detectron2/FILE KEY VALUE ...
    python benchmarks/train.py --classifier --config-file \
        configs/ImageNet-Classification/resnet50.yaml DATASETS.ROOT path/to/images

Both train the same model on the same data with the same number of reader processes and threads, in
turns, so that a disturbance of the machine meets both; the medians of the rounds are compared.
Loss, augmentation and optimizer are the same as well; the bare loop has no DeepSpeed, no log, no
seeds and no checks. For a detectron2 model it is the loop of its own plain_train_net.py, with its
readers, optimizer, log and checks.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tract_det.cli import run
from tract_det.config import classification as classification_config
from tract_det.config import detection as detection_config
from tract_det.data.annotations import Annotation
from tract_det.data.detection_loaders import collate
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.engine.provenance import hardware
from tract_det.engine.step import Step
from tract_det.errors import UserError
from tract_det.training import assembly, classification, detection, session
from tract_det.training.task import BuiltModel, Task


class Loops(NamedTuple):
    """The two loops: the same model, data and optimizer in both."""

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


def build(task: Task, cfg: CfgNode, device: torch.device) -> tuple[Any, BuiltModel]:
    """The training split, and the model from random weights, with TrAct as the config says."""
    split, _ = task.read_data(cfg)
    built = session.build(task, cfg, split, None)
    return split, built


def detector(cfg: CfgNode, device: torch.device) -> Loops:
    """A detector: as `tract-det train` trains it, and bare."""
    split, built = build(detection.TASK, cfg, device)
    bare_model = copy.deepcopy(built.network).to(device).to(memory_format=built.memory_format)
    engine, _ = session.prepare(cfg, built, device)
    loader = detection.build_loader(cfg, split, built.meta, 0)
    if cfg.MODEL.DETECTRON2.CONFIG_FILE:
        if cfg.SOLVER.OPTIMIZER != "SGD" or cfg.INPUT.COLOR_JITTER:
            raise UserError(
                "detectron2's plain loop has SGD and no colour jitter: set SOLVER.OPTIMIZER SGD "
                "and INPUT.COLOR_JITTER 0.0"
            )
        return Loops(engine, iter(loader), detectron2_loop(cfg, bare_model, split.annotations))

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        images, targets = batch
        inputs = (
            [image.to(device) for image in images],
            [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets],
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            return sum(model(*inputs).values())

    return loops(cfg, engine, loader, bare_model, loss_of, collate)


def classifier(cfg: CfgNode, device: torch.device) -> Loops:
    """A classifier: as `tract-det pretrain` trains it, and bare."""
    if cfg.MIX.PROB > 0 and (cfg.MIX.MIXUP_ALPHA > 0 or cfg.MIX.CUTMIX_ALPHA > 0):
        raise UserError("the bare loop does not mix images: set MIX.PROB 0")
    split, built = build(classification.TASK, cfg, device)
    form = built.memory_format
    bare_model = copy.deepcopy(built.network).to(device).to(memory_format=form)
    engine, _ = session.prepare(cfg, built, device)
    loader = classification.build_loader(cfg, split, built.meta, 0)

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch[0].to(device, memory_format=form), batch[1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED):
            return model(images, labels)["loss_cls"]

    return loops(cfg, engine, loader, bare_model, loss_of, stack)


def stack(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a batch, each in one tensor."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor([target["label"] for target in targets])


def loops(
    cfg: CfgNode,
    engine: Any,
    loader: Any,
    bare_model: nn.Module,
    loss_of: Callable[[nn.Module, Any], torch.Tensor],
    collate_fn: Callable[[list], Any],
) -> Loops:
    """Both loops over the same data set: reading and augmentation are not compared."""
    dataset = getattr(loader.dataset, "dataset", loader.dataset)  # without the seeds around it
    stream = endless(dataset, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, collate_fn)
    if cfg.SOLVER.ACCUMULATION != 1 or cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        raise UserError(
            "the bare loop neither accumulates nor clips: set SOLVER.ACCUMULATION 1 and "
            "SOLVER.CLIP_GRADIENTS.ENABLED False"
        )
    optimizer = assembly.optimizer_of(cfg, bare_model)
    return Loops(engine, iter(loader), bare_steps(bare_model, optimizer, stream, loss_of))


def detectron2_batches(
    cfg: CfgNode, annotations: Sequence[Annotation], order: str
) -> Iterator[Any]:
    """detectron2's own training loader over the same images, in this channel order."""
    from detectron2.data import DatasetMapper, build_detection_train_loader
    from detectron2.data import transforms as T

    from tract_det.d2.data import to_records

    sizes = [size for size in cfg.INPUT.MIN_SIZE_TRAIN if size]
    resize = [T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TRAIN, "choice")] if sizes else []
    mapper = DatasetMapper(True, augmentations=[*resize, T.RandomFlip()], image_format=order)
    return build_detection_train_loader(
        to_records(annotations),
        mapper=mapper,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def detectron2_loop(
    cfg: CfgNode, model: nn.Module, annotations: Sequence[Annotation]
) -> Iterator[None]:
    """The loop of detectron2's `tools/plain_train_net.py`, with its data, optimizer and writers.

    Args:
        cfg: this project's configuration of the run.
        model: a detectron2 model in this project's interface, on its device.
        annotations: of the training images.

    Yields:
        After each step.
    """
    from detectron2.config import get_cfg
    from detectron2.engine import default_writers
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils import comm
    from detectron2.utils.events import EventStorage

    from tract_det.d2 import apply_tract

    model.__class__ = type(model).__bases__[-1]  # without this project's interface
    model.get_submodule("backbone")._forward_hooks.clear()
    if cfg.MODEL.TRACT.ENABLED:
        tract = cfg.MODEL.TRACT
        apply_tract(model, tract.LAMBDA, unit=tract.UNIT)  # also passes the padding on to TrAct
    recipe = get_cfg()
    recipe.SOLVER.BASE_LR, recipe.SOLVER.WEIGHT_DECAY = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
    recipe.SOLVER.WARMUP_ITERS, recipe.SOLVER.STEPS = 0, ()
    model.train()
    optimizer = build_optimizer(recipe, model)
    scheduler = build_lr_scheduler(recipe, optimizer)
    writers = default_writers(tempfile.mkdtemp(), recipe.SOLVER.MAX_ITER)
    order = getattr(model, "input_format", None) or "BGR"
    with EventStorage(0) as storage:
        for iteration, batch in enumerate(detectron2_batches(cfg, annotations, order)):
            storage.iter = iteration
            losses = model(batch)
            loss = sum(losses.values())
            if not torch.isfinite(loss).all():
                raise FloatingPointError(f"the loss is not finite at step {iteration}")
            reduced = {name: value.item() for name, value in comm.reduce_dict(losses).items()}
            storage.put_scalars(total_loss=sum(reduced.values()), **reduced)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            if (iteration + 1) % cfg.LOG_PERIOD == 0:
                for writer in writers:
                    writer.write()
            yield


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
    parser.add_argument("--classifier", action="store_true", help="pretraining, not detection")
    parser.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--arm", default="", metavar="NAME", help="frozen, plain or tract")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a round")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    load_cfg, default = detection_config.load_cfg, "quickstart/shapes.yaml"
    if args.classifier:
        load_cfg, default = classification_config.load_cfg, "CIFAR/cpu_small.yaml"
    cfg = load_cfg(args.config_file or default, args.opts, args.arm)
    device = ds.start(cfg.MODEL.DEVICE)
    torch.manual_seed(cfg.SEED)
    engine, batches, bare = (classifier if args.classifier else detector)(cfg, device)
    batch = cfg.SOLVER.IMS_PER_BATCH
    images = args.steps * batch
    form = torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.preserve_format

    def trainer() -> None:
        steps: list[Step] = []
        with StopSignal() as stop:
            train(
                engine,
                batches,
                start=0,
                max_iter=args.steps,
                accumulation=1,
                lr_at=lambda step: cfg.SOLVER.BASE_LR,
                after_step=steps.append,
                stop=stop,
                memory_format=form,
            )

    def bare_loop() -> None:
        list(islice(bare, args.steps))

    trainer()  # worker processes start, memory is allocated
    bare_loop()
    times: dict[str, list[float]] = {"tract_det": [], "bare": []}
    for _ in range(args.rounds):
        times["bare"].append(timed(bare_loop, device))
        times["tract_det"].append(timed(trainer, device))
    rates = {name: images / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{hardware(device)}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    title = args.config_file or "default config"
    print(f"{title}: {batch} images per step, {args.rounds} rounds of {args.steps} steps")
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.2f} images/s (median)")
    print(f"ratio {rates['tract_det'] / rates['bare']:.3f}")
    ds.stop()


if __name__ == "__main__":
    run(main)
