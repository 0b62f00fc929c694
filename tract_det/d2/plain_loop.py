"""detectron2's plain training loop, a step at a time: what throughput is compared with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.engine import default_writers
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from tract_det.d2.data import to_records
from tract_det.data.voc import Annotation


def _check_finite(loss: torch.Tensor, iteration: int) -> None:
    if not torch.isfinite(loss).all():
        raise FloatingPointError(f"the loss is not finite at step {iteration}")


def plain_steps(
    model: nn.Module,
    annotations: Sequence[Annotation],
    *,
    batch_size: int,
    num_workers: int,
    min_size: Sequence[int],
    max_size: int,
    learning_rate: float,
    weight_decay: float,
    log_period: int,
    output_dir: Path,
) -> Iterator[None]:
    """Trains as detectron2's `tools/plain_train_net.py` does, with its data, optimizer and writers.

    Args:
        model: a meta-architecture with detectron2's interface, on its device.
        annotations: what is trained on.
        batch_size: images a step.
        num_workers: reader processes.
        min_size: the shorter side becomes one of these, pixels; empty = no resizing.
        max_size: bound of the longer side, pixels.
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of all but norms.
        log_period: steps between two lines of the log.
        output_dir: where the log goes.

    Yields:
        After each step.
    """
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = learning_rate, weight_decay
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0, ()
    resize = [T.ResizeShortestEdge(list(min_size), max_size, "choice")] if min_size else []
    order = getattr(model, "input_format", None) or "BGR"
    mapper = DatasetMapper(True, augmentations=[*resize, T.RandomFlip()], image_format=order)
    sizes = {"total_batch_size": batch_size, "num_workers": num_workers}
    loader = build_detection_train_loader(to_records(annotations), mapper=mapper, **sizes)
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    writers = default_writers(str(output_dir), cfg.SOLVER.MAX_ITER)
    with EventStorage(0) as storage:
        for iteration, batch in enumerate(loader):
            storage.iter = iteration
            losses = model(batch)
            loss = sum(losses.values())
            _check_finite(loss, iteration)
            reduced = {name: value.item() for name, value in comm.reduce_dict(losses).items()}
            storage.put_scalars(total_loss=sum(reduced.values()), **reduced)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            if (iteration + 1) % log_period == 0:
                for writer in writers:
                    writer.write()
            yield
