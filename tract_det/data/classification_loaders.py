"""Batches of images to classify, as tensors.

`sampling.py` decides which image comes when and with which random numbers. Mixing within a batch is
seeded by the first sample of the batch, so that it too depends only on (seed, iteration, slice).
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from tract_det.data.classification import ClassificationDataset, Target
from tract_det.data.classification_transforms import Mix
from tract_det.data.images import CorruptImageError
from tract_det.data.sampling import MicroBatches, SeededDataset, evaluation_batches
from tract_det.data.workers import data_loader

_Samples = list[tuple[torch.Tensor, Target]]


class ImageBatches:
    """Iterates over the batches of a DataLoader, and counts the corrupt images skipped in them.

    Attributes:
        dataset: The `ClassificationDataset`.
        skipped: How often each corrupt image, by its id, was skipped in the batches handed out so
            far: replaced in training, left out in evaluation. Empty without `skip_corrupt`.
    """

    def __init__(self, dataset: ClassificationDataset, loader: DataLoader) -> None:
        self.dataset = dataset
        self.skipped: Counter[str] = Counter()
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._count(iter(self._loader))  # starts the worker processes before the first batch

    def _count(self, batches: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
        for *batch, skipped in batches:
            self.skipped.update(skipped)
            if len(batch[0]):  # empty if all images of an evaluation batch are corrupt
                yield tuple(batch)


def classification_loader(
    dataset: ClassificationDataset,
    *,
    micro_batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
    mix: Mix | None = None,
    repeats: int = 1,
) -> ImageBatches:
    """This rank's micro-batches, without end; `accumulation` of them make an iteration.

    Args:
        dataset: With a transform that makes all images the same size.
        micro_batch: B, images of one forward pass on one rank.
        accumulation: Micro-batches of an iteration.
        rank: This process.
        world_size: Number of processes.
        seed: Determines everything random here; the same on all ranks.
        start: First iteration.
        num_workers: Worker processes that read images; 0: this process does.
        mix: Applied to each micro-batch, in the process that reads it.
        repeats: As in `training_stream`.

    Returns:
        An iterable of (images (B, C, H, W) float32, targets): (B,) int64 labels, or (B, C) float32
        with `mix`.
    """
    batches = MicroBatches(
        len(dataset),
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start=start,
        repeats=repeats,
    )
    seeded = SeededDataset(dataset, seed)
    loader = data_loader(seeded, batches, _Collate(mix), num_workers, persistent=True)
    return ImageBatches(dataset, loader)


def classification_evaluation_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> ImageBatches:
    """This rank's share of the data set, once and in order.

    The batches do not depend on the number of ranks. A corrupt image is an error or, with
    `dataset.skip_corrupt`, left out of its batch and counted.

    Returns:
        An iterable of (images (B, C, H, W), labels (B,) int64, ids: list of B str).
    """
    batches = evaluation_batches(len(dataset), batch_size, rank, world_size)
    loader = data_loader(
        _LeavingOut(dataset), batches, _collate_evaluation, num_workers, persistent=False
    )
    return ImageBatches(dataset, loader)


class _LeavingOut(Dataset):
    """For evaluation: a corrupt image is not replaced, its sample holds an empty image."""

    def __init__(self, dataset: ClassificationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        try:
            return self.dataset.load(index)
        except CorruptImageError:
            if not self.dataset.skip_corrupt:
                raise
            return torch.empty(0), {"skipped": (self.dataset.split.image_id(index),)}


class _Collate:
    """Makes a training batch: (images, targets, ids of skipped images)."""

    def __init__(self, mix: Mix | None) -> None:
        self.mix = mix

    def __call__(self, samples: _Samples) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        images, labels = _stack(samples)
        if self.mix is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(samples[0][1]["seed"])
                images, labels = self.mix(images, labels)
        return images, labels, _skipped(samples)


def _collate_evaluation(
    samples: _Samples,
) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    """Makes an evaluation batch: (images, labels, ids, ids of skipped images)."""
    decoded = [sample for sample in samples if "label" in sample[1]]
    ids = [target["image_id"] for _, target in decoded]
    if decoded:
        images, labels = _stack(decoded)
    else:
        images, labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
    return images, labels, ids, _skipped(samples)


def _stack(samples: _Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as tensors; default_collate puts a worker's images into shared memory."""
    labels = torch.tensor([target["label"] for _, target in samples])
    return default_collate([image for image, _ in samples]), labels


def _skipped(samples: _Samples) -> list[str]:
    return [image_id for _, target in samples for image_id in target.get("skipped", ())]
