"""Batches of images for a detector: lists, because the images differ in size."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tract_det.data.sampling import MicroBatches, SeededDataset, evaluation_batches
from tract_det.data.workers import data_loader

Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def detection_loader(
    dataset: Dataset,
    *,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    groups: np.ndarray | None = None,
    start: int = 0,
    num_workers: int = 0,
) -> Iterable[Batch]:
    """This rank's micro-batches, without end; `accumulation` of them make an iteration.

    An iteration has micro_batch * accumulation * world_size images; `MicroBatches` says which rank
    gets which.

    Args:
        dataset: Indexed by image; gives (image, target) with target a dict.
        micro_batch: Images of one forward pass on one rank.
        accumulation: Micro-batches of an iteration.
        rank: This process.
        world_size: Number of processes.
        seed: Determines everything random here; the same on all ranks.
        groups: As in `training_stream`.
        start: First iteration.
        num_workers: Worker processes that read images; 0: this process does.

    Returns:
        An iterable of (images, targets): lists of uint8 (3, H, W) tensors and of dicts of plain
        tensors. `target["seed"]` is a number for the model's own sampling (anchors, proposals), so
        that it too depends only on (seed, draw).
    """
    batches = MicroBatches(
        len(dataset),  # type: ignore[arg-type]  # torch's Dataset declares no __len__
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        groups=groups,
        start=start,
    )
    return data_loader(SeededDataset(dataset, seed), batches, collate, num_workers, persistent=True)


def detection_evaluation_loader(
    dataset: Dataset, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader:
    """This rank's share of the data set, once and in order; (images, targets) as in training."""
    n = len(dataset)  # type: ignore[arg-type]
    batches = evaluation_batches(n, batch_size, rank, world_size)
    return data_loader(dataset, batches, collate, num_workers, persistent=False)


def collate(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> Batch:
    """Lists of images and of targets; tv_tensors become plain tensors of the same storage."""
    images = [_plain(image) for image, _ in samples]
    targets = [{key: _plain(value) for key, value in target.items()} for _, target in samples]
    return images, targets


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
