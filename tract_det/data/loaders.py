"""Which image goes into which batch, on which rank, with which random numbers.

Training's randomness is a pure function of (seed, draw), where `draw` numbers the samples handed
out since the beginning. Nothing depends on how many ranks, workers or accumulation steps there
are, nor on interruptions: a run started at iteration 500 gets what an uninterrupted one gets.

Evaluation cuts the split into batches that do not depend on the number of ranks, and deals whole
batches: every image is seen once, in the same batch, and the results are equal to the last bit.
"""

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tract_det.errors import UserError

# Separate the two uses of one seed.
_PERMUTATION, _SAMPLE = 0, 1

Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


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


def training_loader(
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
    """This rank's micro-batches, without end; `accumulation` of them are an iteration.

    An iteration has micro_batch * accumulation * world_size images. Micro-step j on rank r takes
    slice number j * world_size + r of them.

    Args:
        dataset: Indexed by image; gives (image, target) with target a dict.
        micro_batch: Images of one forward pass on one rank.
        accumulation: Micro-batches of an iteration.
        rank: This process.
        world_size: Number of processes.
        seed: Of everything random here; the same on all ranks.
        groups: As in `training_stream`.
        start: First iteration.
        num_workers: Processes that read images; 0: this one does.

    Returns:
        An iterable of (images, targets): lists of uint8 (3, H, W) tensors and of dicts of plain
        tensors. `target["seed"]` is a number for the model's own sampling (anchors, proposals), so
        that it too depends on nothing but (seed, draw).
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


def evaluation_batches(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's batches of the indices 0..n-1: contiguous, and some ranks have one more.

    The batches themselves do not depend on the number of ranks.
    """
    batches = [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
    first, last = (len(batches) * r // world_size for r in (rank, rank + 1))
    return batches[first:last]


def evaluation_loader(
    dataset: Dataset, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> DataLoader:
    """This rank's share of the data set, in order, once; (images, targets) as in training."""
    n = len(dataset)  # type: ignore[arg-type]
    batches = evaluation_batches(n, batch_size, rank, world_size)
    return data_loader(dataset, batches, collate, num_workers, persistent=False)


def collate(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> Batch:
    """Lists of images and of targets; tv_tensors become plain tensors of the same storage."""
    images = [_plain(image) for image, _ in samples]
    targets = [{key: _plain(value) for key, value in target.items()} for _, target in samples]
    return images, targets


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


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value


class _Loader(DataLoader):
    """A DataLoader whose readers have SIGTERM blocked from their first instruction on.

    Blocked later, in `_init_worker`, it would reach the threads that libraries start in a reader
    before.
    """

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def data_loader(
    dataset: Dataset,
    batches: Any,
    collate_fn: Callable[[list[Any]], Any],
    num_workers: int,
    *,
    persistent: bool,
) -> DataLoader:
    """A DataLoader of `batches` of keys, whose readers leave signals and random numbers alone."""
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        prefetch_factor=4 if num_workers > 0 else None,
        pin_memory=torch.cuda.is_initialized(),  # not on a CPU run beside a GPU
        worker_init_fn=_init_worker,
        # DataLoader draws a number at every start of an iteration. From a generator of its own:
        # evaluating must not change the training's random numbers.
        generator=torch.Generator(),
    )


def _init_worker(worker: int) -> None:
    """Readers outlive Ctrl-C and SIGTERM: the training process finishes its step and saves.

    A terminal and the deepspeed launcher send both signals to readers too; a reader that dies of
    one makes the DataLoader raise in the middle of the step. SIGTERM from the training process
    itself is how Python ends its readers at exit: that one is obeyed. (torch has set readers to one
    thread each already.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.pid,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """Ends this process at the first SIGTERM that `parent` sends; others are ignored."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
