"""Which image goes into which batch, on which rank, with which random numbers.

Training's randomness is a pure function of (seed, draw), where `draw` numbers the samples handed
out since the beginning. Nothing depends on how many ranks, workers or accumulation steps there
are, nor on interruptions: a run started at iteration 500 gets what an uninterrupted one gets.

Evaluation cuts the split into batches that do not depend on the number of ranks, and deals whole
batches: every image is seen once, in the same batch, and the results are equal to the last bit.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tract_det.errors import UserError

# Separate the two uses of one seed.
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

    Each epoch is a permutation of the n images. An image goes into its group's bucket; a full
    bucket is a batch (as in detectron2's aspect-ratio grouping). What the buckets hold at the end
    of an epoch waits for the next: no image is dropped, and none goes into a bucket again before
    all images of the epoch have.

    Args:
        n: Number of images.
        batch_size: Images in a global batch, over all ranks and accumulation steps.
        seed: Not negative.
        groups: (n,) group of each image; a batch holds images of one group. None: all in one.
        start: The first iteration. Replays the index arithmetic, about 0.1 us a sample.
        repeats: Draws in turn of each image, with their own random numbers (repeated augmentation,
            Hoffer et al., arXiv 1901.09335). Within a global batch the first draws come first, then
            the second: the copies of an image get to different ranks where there are several, and
            are not mixed with each other. DeiT begins a new permutation after n draws, of which
            most images have had none; here all of them have had theirs first.

    Yields:
        `batch_size` pairs (index of the image, draw).

    Raises:
        UserError: There are no images.
    """
    if n < 1:
        raise UserError("there are no images to train on: check the split and the filter settings")
    if groups is None:  # one bucket: iteration i is the draws from i * batch_size on
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
    """This rank's batches of the indices 0..n-1: contiguous, and some ranks have one more.

    The batches themselves do not depend on the number of ranks.
    """
    batches = [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    first, last = (len(batches) * r // world_size for r in (rank, rank + 1))
    return batches[first:last]


class MicroBatches:
    """The batch sampler of one rank."""

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
        slices = accumulation * world_size
        self.stream: dict[str, Any] = {"n": n, "batch_size": micro_batch * slices, "seed": seed}
        self.stream |= {"groups": groups, "start": start, "repeats": repeats}
        self.micro_batch = micro_batch
        self.own = range(rank, slices, world_size)  # j * world_size + rank for all j

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        m = self.micro_batch
        for batch in training_stream(**self.stream):
            for number in self.own:
                yield batch[number * m : (number + 1) * m]


class SeededDataset(Dataset):
    """Indexed by (index, draw): reads image `index` with random numbers of (seed, draw) alone.

    The generators of torch (CPU), numpy and Python are seeded for the sample and put back, since
    without worker processes they are those of the training itself. A DataLoader asks for a batch
    at a time: putting them back takes 85 us, more than a 32 x 32 image does.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.__getitems__([key])[0]

    def __getitems__(
        self, keys: list[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The samples of a batch."""
        numpy_state, python_state = np.random.get_state(), random.getstate()
        # The CPU's generator only: torch.manual_seed would reset the GPU's, which stay as they are.
        with torch.random.fork_rng(devices=[]):
            try:
                # All seeds first: between images numpy takes 28 us for one instead of 7.
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

    Each index of a permutation has `repeats` draws in turn.
    """
    m = n * repeats
    epoch, skip = divmod(first, m)
    while True:
        order = np.random.default_rng((seed, _PERMUTATION, epoch)).permutation(n)
        draws = range(epoch * m, (epoch + 1) * m)
        yield from islice(zip(order.repeat(repeats).tolist(), draws, strict=True), skip, None)
        epoch, skip = epoch + 1, 0


def _grouped(
    draws: Iterator[tuple[int, int]], groups: list[int], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    buckets: dict[int, list[tuple[int, int]]] = {group: [] for group in groups}
    for index, draw in draws:
        bucket = buckets[groups[index]]
        bucket.append((index, draw))
        if len(bucket) == batch_size:
            yield bucket
            buckets[groups[index]] = []
