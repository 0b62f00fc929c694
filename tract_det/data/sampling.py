"""Which image comes when, on which rank and with which random numbers.

In training, everything random is a function of (seed, draw) alone, where `draw` numbers the samples
handed out since the first iteration. Nothing depends on the number of ranks, worker processes or
accumulation steps, nor on interruptions: a run that starts at iteration 500 gets the samples that
an uninterrupted run gets.

In evaluation, the split is cut into batches that do not depend on the number of ranks, and each
rank takes whole batches: every image comes once, in the same batch, and the results are equal to
the last bit.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tract_det.errors import UserError

# Keep the two uses of one seed apart.
_PERMUTATION, _SAMPLE = 0, 1


def training_stream(
    n: int,
    batch_size: int,
    *,
    seed: int,
    groups: np.ndarray | None = None,
    start: int = 0,
    repeats: int = 1,
) -> Iterator[list[tuple[int, int]]]:
    """The global batches of iterations `start`, `start + 1`, ..., without end.

    Each epoch is a permutation of the n images. Every image goes into the bucket of its group, and
    a full bucket is a batch, as in detectron2's aspect-ratio grouping. Images left in the buckets
    at the end of an epoch wait for the next: none is dropped, and none is put into a bucket again
    before all images of the epoch have been.

    Args:
        n: Number of images.
        batch_size: Images in a global batch, over all ranks and accumulation steps.
        seed: Not negative.
        groups: (n,) group of each image; a batch holds images of one group. None: all in one.
        start: The first iteration. With groups, the earlier batches are computed and discarded.
        repeats: How many times in a row each image is drawn, each time with new random numbers
            (repeated augmentation, Hoffer et al., arXiv 1901.09335). Within a global batch all
            first draws come before all second ones, so that the copies of an image go to different
            ranks if there are several, and are not mixed with each other. An epoch has n * repeats
            draws, of all images; DeiT ends it after n draws, of a part of the images.

    Yields:
        `batch_size` pairs (index of the image, draw).

    Raises:
        UserError: There are no images.
    """
    if n < 1:
        raise UserError("there are no images to train on: check the split and the filter settings")
    if groups is None:  # one bucket: iteration i starts at draw i * batch_size
        draws = _draws(n, seed, start * batch_size, repeats)
        while True:
            batch = list(islice(draws, batch_size))
            yield batch if repeats == 1 else sorted(batch, key=lambda pair: pair[1] % repeats)
    if repeats != 1:
        raise ValueError("repeats and groups do not go together")
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} images")
    yield from islice(_grouped(_draws(n, seed, 0), groups.tolist(), batch_size), start, None)


def evaluation_batches(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's batches of the indices 0..n-1: consecutive ones, at most one more than others.

    The batches themselves do not depend on the number of ranks.
    """
    batches = [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    first, last = (len(batches) * r // world_size for r in (rank, rank + 1))
    return batches[first:last]


class MicroBatches:
    """The batch sampler of one rank: its slices of the batches of `training_stream`.

    A global batch has accumulation * world_size slices of `micro_batch` images. Rank r takes slice
    j * world_size + r as its micro-batch j.
    """

    def __init__(
        self,
        n: int,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        groups: np.ndarray | None = None,
        start: int = 0,
        repeats: int = 1,
    ) -> None:
        count = accumulation * world_size
        self.stream = partial(
            training_stream,
            n,
            micro_batch * count,
            seed=seed,
            groups=groups,
            start=start,
            repeats=repeats,
        )
        self.micro_batch = micro_batch
        self.slices = range(rank, count, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        m = self.micro_batch
        for batch in self.stream():
            for number in self.slices:
                yield batch[number * m : (number + 1) * m]


class SeededDataset(Dataset):
    """Indexed by (index, draw): image `index`, read with random numbers from (seed, draw) alone.

    The global generators of torch (CPU), numpy and Python are seeded for each sample and restored
    afterwards, since without worker processes the training itself uses them. They are restored once
    for a whole batch, because that takes longer than augmenting a 32 x 32 image
    (benchmarks/data_design_notes.md).
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.__getitems__([key])[0]

    def __getitems__(
        self, keys: list[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The samples of a batch, which is how a DataLoader asks for them."""
        numpy_state, python_state = np.random.get_state(), random.getstate()
        # The CPU's generator alone: torch.manual_seed would reseed the GPU's as well.
        with torch.random.fork_rng(devices=[]):
            try:
                # All seeds before the first image: interleaved, numpy takes several times as long.
                seeds = [self._seeds(draw) for _, draw in keys]
                return [self._sample(index, *s) for (index, _), s in zip(keys, seeds, strict=True)]
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)

    def _seeds(self, draw: int) -> list[int]:
        return np.random.SeedSequence((self.seed, _SAMPLE, draw)).generate_state(4).tolist()

    def _sample(
        self, index: int, for_torch: int, for_numpy: int, for_python: int, for_model: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        torch.default_generator.manual_seed(for_torch)
        np.random.seed(for_numpy)
        random.seed(for_python)
        image, target = self.dataset[index]
        return image, target | {"seed": for_model}


def _draws(n: int, seed: int, first: int, repeats: int = 1) -> Iterator[tuple[int, int]]:
    """(index, draw) for draw = first, first + 1, ...: one permutation of 0..n-1 after another.

    Each index of a permutation has `repeats` draws in a row.
    """
    draws_per_epoch = n * repeats
    epoch, skip = divmod(first, draws_per_epoch)
    while True:
        order = np.random.default_rng((seed, _PERMUTATION, epoch)).permutation(n)
        draws = range(epoch * draws_per_epoch, (epoch + 1) * draws_per_epoch)
        yield from islice(zip(order.repeat(repeats).tolist(), draws, strict=True), skip, None)
        epoch, skip = epoch + 1, 0


def _grouped(
    draws: Iterator[tuple[int, int]], groups: list[int], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Batches of draws whose images are of one group, in the order in which they fill up."""
    buckets: dict[int, list[tuple[int, int]]] = {group: [] for group in groups}
    for index, draw in draws:
        bucket = buckets[groups[index]]
        bucket.append((index, draw))
        if len(bucket) == batch_size:
            yield bucket
            buckets[groups[index]] = []
