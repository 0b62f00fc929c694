import multiprocessing
import os
import random
import subprocess
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from torchvision import tv_tensors

from tract_det.data.detection import VOCDetection, aspect_groups
from tract_det.data.loaders import (
    SeededDataset,
    collate,
    evaluation_batches,
    evaluation_loader,
    training_loader,
    training_stream,
)
from tract_det.data.transforms import detection_train
from tract_det.data.voc import read_split
from tract_det.errors import UserError

few = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 40)
batches = st.integers(1, 12)


def take(n, batch_size, count, **options):
    return list(islice(training_stream(n, batch_size, seed=3, **options), count))


def some_groups(n):
    return np.arange(n) % 5 // 4


class Noisy(Dataset):
    """Images and targets made of random numbers from all three generators."""

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        noise = torch.rand(3).double() + np.random.rand() + random.random()
        image = tv_tensors.Image((noise[:, None, None] * 60).to(torch.uint8).expand(3, 4, 4))
        boxes = tv_tensors.BoundingBoxes(torch.rand(1, 4), format="XYXY", canvas_size=(4, 4))
        return image, {"boxes": boxes, "labels": torch.tensor([1]), "index": index, "noise": noise}


class Broken(Noisy):
    def __getitem__(self, index):
        raise UserError("/data/JPEGImages/x.jpg: the image cannot be read: replace it")


class Worker(Noisy):
    """Says what its process is like."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image, target | {"pid": os.getpid(), "threads": torch.get_num_threads()}


def contents(batches):
    """Everything of some batches that can be compared."""
    return [
        (target["index"], target["seed"], target["noise"].tolist(), target["boxes"].tolist())
        for _, targets in batches
        for target in targets
    ]


@few
@given(sizes, batches)
def test_every_epoch_is_a_permutation_of_all_images(n, batch_size):
    pairs = [pair for batch in take(n, batch_size, 4 * n) for pair in batch]
    assert [draw for _, draw in pairs] == list(range(4 * n * batch_size))
    epochs = [[i for i, _ in pairs[e : e + n]] for e in range(0, len(pairs) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_epochs_and_seeds_have_different_orders():
    first, second = (
        [i for batch in islice(training_stream(50, 50, seed=seed), 2) for i, _ in batch]
        for seed in (0, 1)
    )
    assert len({tuple(first[:50]), tuple(first[50:]), tuple(second[:50])}) == 3


@few
@given(sizes, batches)
def test_a_batch_has_images_of_one_group_and_none_is_lost(n, batch_size):
    groups = some_groups(n)
    found = take(n, batch_size, 3 * n, groups=groups)
    assert all(len(batch) == batch_size for batch in found)
    assert all(len({groups[i] for i, _ in batch}) == 1 for batch in found)
    draws = {draw: index for batch in found for index, draw in batch}
    assert len(draws) == 3 * n * batch_size  # none twice
    # Those handed out and not in a batch yet wait in the buckets, which are never full.
    waiting = max(draws) + 1 - len(draws)
    assert waiting <= len(set(groups)) * (batch_size - 1)
    # Ungrouped, the same draws are the same images.
    plain = {d: i for b in take(n, 1, max(draws) + 1) for i, d in b}
    assert all(plain[draw] == index for draw, index in draws.items())


@few
@given(sizes, batches, st.integers(0, 30), st.booleans())
def test_starting_late_is_skipping(n, batch_size, start, grouped):
    groups = some_groups(n) if grouped else None
    late = take(n, batch_size, 5, groups=groups, start=start)
    assert late == take(n, batch_size, start + 5, groups=groups)[start:]


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_ranks_and_accumulation_tile_the_global_batch(micro, accumulation, world, start):
    options = {"micro_batch": micro, "accumulation": accumulation, "world_size": world}
    ranks = [
        iter(
            training_loader(
                Noisy(), **options, rank=rank, seed=3, groups=some_groups(24), start=start
            )
        )
        for rank in range(world)
    ]
    for batch in take(24, micro * accumulation * world, 2, groups=some_groups(24), start=start):
        steps = [next(ranks[rank]) for _ in range(accumulation) for rank in range(world)]
        assert all(len(images) == micro for images, _ in steps)
        assert [t["index"] for _, targets in steps for t in targets] == [i for i, _ in batch]


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_workers(workers):
    alone, helped = (
        contents(islice(training_loader(Noisy(), micro_batch=4, seed=1, num_workers=w), 8))
        for w in (0, workers)
    )
    assert alone == helped
    assert len({seed for _, seed, *_ in alone}) == len(alone)  # every draw has its own


def test_samples_do_not_depend_on_ranks_accumulation_or_interruption():
    def run(start=0, **options):
        return contents(islice(training_loader(Noisy(), seed=1, start=start, **options), 4))

    one = run(micro_batch=4)
    assert run(micro_batch=4, start=2)[:8] == one[8:]
    halves = [run(micro_batch=2, rank=r, world_size=2) for r in (0, 1)]
    rebuilt = [halves[r][2 * i : 2 * i + 2] for i in range(4) for r in (0, 1)]
    assert [sample for part in rebuilt for sample in part] == one
    assert run(micro_batch=1, accumulation=4) == one[:4]


def test_another_seed_gives_other_samples():
    first, second = (
        contents(islice(training_loader(Noisy(), micro_batch=4, seed=s), 1)) for s in (0, 1)
    )
    assert {c[1] for c in first}.isdisjoint(c[1] for c in second)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_numbers_of_the_training_alone(workers):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(islice(training_loader(Noisy(), micro_batch=2, seed=1, num_workers=workers), 2))
    if workers:
        list(evaluation_loader(Noisy(), batch_size=8, num_workers=workers))
    else:
        iter(evaluation_loader(Noisy(), batch_size=8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_an_error_leaves_them_alone_too():
    state = random.getstate(), torch.get_rng_state()
    with pytest.raises(UserError):
        SeededDataset(Broken(), 0)[0, 0]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_collated_targets_are_plain_tensors():
    images, targets = collate([Noisy()[0], Noisy()[1]])
    for tensor in (*images, targets[0]["boxes"]):
        assert type(tensor) is torch.Tensor
    assert [t["index"] for t in targets] == [0, 1]


@given(st.integers(0, 60), batches, st.integers(1, 9))
def test_evaluation_shards_partition_the_split_whatever_the_ranks(n, batch_size, world):
    shards = [evaluation_batches(n, batch_size, rank, world) for rank in range(world)]
    joined = [batch for shard in shards for batch in shard]
    assert joined == evaluation_batches(n, batch_size, 0, 1)
    assert [index for batch in joined for index in batch] == list(range(n))
    assert all(len(batch) == batch_size for batch in joined[:-1])
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_an_evaluation_loader_gives_its_shard_in_order():
    loader = evaluation_loader(Noisy(10), batch_size=3, rank=1, world_size=2)
    assert len(loader) == 2
    assert [[t["index"] for t in targets] for _, targets in loader] == [[6, 7, 8], [9]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_in_a_worker_remains_one(workers):
    batches = iter(training_loader(Broken(), micro_batch=2, seed=0, num_workers=workers))
    with pytest.raises(UserError, match=r"JPEGImages/x\.jpg"):
        next(batches)
    if workers:  # pytest keeps the traceback, the traceback the readers: end them here
        batches._shutdown_workers()


def test_workers_have_one_thread_and_outlive_the_signals_that_stop_a_training():
    batches = iter(training_loader(Worker(), micro_batch=1, seed=0, num_workers=1))
    _, (target,) = next(batches)
    assert target["threads"] == 1
    assert target["pid"] != os.getpid()
    for name in ("INT", "TERM"):  # from another process, as a launcher does
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {target['pid']}"], check=True)
    for _ in range(12):  # more than are prefetched
        _, (target_after,) = next(batches)
    assert target_after["pid"] == target["pid"]


def test_workers_end_when_their_own_training_process_says_so():
    """As Python does at exit: it would wait for ever for a reader that ignores it."""
    batches = iter(training_loader(Worker(), micro_batch=1, seed=0, num_workers=1))
    _, (target,) = next(batches)
    (process,) = (p for p in multiprocessing.active_children() if p.pid == target["pid"])
    process.terminate()
    process.join(timeout=20)
    assert process.exitcode == 0


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="no images"):
        next(iter(training_loader(Noisy(0), micro_batch=2, seed=0)))
    with pytest.raises(ValueError, match="3 groups for 24 images"):
        take(24, 2, 1, groups=np.zeros(3))


def test_augmented_photographs_are_the_same_from_any_worker(tree):
    for name in "abcd":
        tree.add(name, ("cat", (2, 3, 10, 8)), size=(20, 10) if name < "c" else (10, 20))
    tree.split("train", list("abcd"))
    split = read_split(tree.root, "train")
    transform = detection_train(min_size=(10, 12, 14), max_size=40, color_jitter=0.3)

    def run(workers):
        loader = training_loader(
            VOCDetection(split, transform),
            micro_batch=2,
            seed=0,
            groups=aspect_groups(split),
            num_workers=workers,
        )
        return list(islice(loader, 6))

    for (images, targets), (other_images, other_targets) in zip(run(0), run(2), strict=True):
        assert len({image.shape[1] > image.shape[2] for image in images}) == 1
        for image, other in zip(images, other_images, strict=True):
            assert image.dtype == torch.uint8
            assert torch.equal(image, other)
        for target, other in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])
            assert (target["seed"], target["image_id"]) == (other["seed"], other["image_id"])
