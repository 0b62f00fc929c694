"""Batches of images to classify: tensors, where a detector's are lists.

Which image comes when, and with which random numbers, is `sampling.py`'s; mixing within a batch is
seeded by the batch's first draw, so that it too depends on (seed, iteration, slice) alone.
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
    """A DataLoader's batches without their last part, the corrupt images that were skipped.

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
        return self._count(iter(self._loader))  # the readers start here, not at the first batch

    def _count(self, batches: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
        for *batch, skipped in batches:
            self.skipped.update(skipped)
            if len(batch[0]):  # not where all images of an evaluation batch are corrupt
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
    """This rank's micro-batches, without end; `accumulation` of them are an iteration.

    Args:
        dataset: With a transform that makes all images the same size.
        micro_batch: B, as all that is not said here as in `detection_loader`.
        accumulation: Micro-batches of an iteration.
        rank: This process.
        world_size: Number of processes.
        seed: Of everything random here.
        start: First iteration.
        num_workers: Processes that read images.
        mix: Applied to each micro-batch, where it is read.
        repeats: As in `training_stream`.

    Returns:
        An iterable of (images (B, 3, H, W) float32, targets): (B,) int64 labels, or (B, C) float32
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
    return ImageBatches(
        dataset,
        data_loader(
            SeededDataset(dataset, seed), batches, _Collate(mix), num_workers, persistent=True
        ),
    )


def classification_evaluation_loader(
    dataset: ClassificationDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> ImageBatches:
    """This rank's share of the data set, in order, once.

    The batches do not depend on the number of ranks. Corrupt images are an error or, with
    `dataset.skip_corrupt`, missing in their batch and counted.

    Returns:
        An iterable of (images (B, 3, H, W), labels (B,) int64, ids: list of B str).
    """
    batches = evaluation_batches(len(dataset), batch_size, rank, world_size)
    loader = data_loader(
        _LeavingOut(dataset), batches, _collate_evaluation, num_workers, persistent=False
    )
    return ImageBatches(dataset, loader)


class _LeavingOut(Dataset):
    """In evaluation nothing stands in for a corrupt image: its sample has an empty image."""

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
    """A training batch: (images, targets, ids of skipped images)."""

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
    kept = [sample for sample in samples if "label" in sample[1]]
    ids = [target["image_id"] for _, target in kept]
    images, labels = _stack(kept) if kept else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, labels, ids, _skipped(samples)


def _stack(samples: _Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (in shared memory where this is a reading process) and labels."""
    labels = torch.tensor([target["label"] for _, target in samples])
    return default_collate([image for image, _ in samples]), labels


def _skipped(samples: _Samples) -> list[str]:
    return [name for _, target in samples for name in target.get("skipped", ())]
