"""A detector's batches do not depend on worker processes, ranks or interruptions."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.noisy import Noisy
from tract_det.data.detection import DetectionDataset, aspect_groups
from tract_det.data.detection_loaders import (
    collate,
    detection_evaluation_loader,
    detection_loader,
)
from tract_det.data.detection_transforms import detection_train
from tract_det.data.sampling import training_stream
from tract_det.data.voc import read_split
from tract_det.errors import UserError

few = settings(max_examples=40, deadline=None)
GROUPS = np.arange(24) % 5 // 4


def contents(batches):
    """The comparable contents of some batches."""
    return [
        (target["index"], target["seed"], target["noise"].tolist(), target["boxes"].tolist())
        for _, targets in batches
        for target in targets
    ]


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_ranks_and_accumulation_tile_the_global_batch(micro, accumulation, world, start):
    options = {"micro_batch": micro, "accumulation": accumulation, "world_size": world}
    options |= {"seed": 3, "groups": GROUPS, "start": start}
    ranks = [iter(detection_loader(Noisy(), **options, rank=rank)) for rank in range(world)]
    size = micro * accumulation * world
    for batch in islice(training_stream(24, size, seed=3, groups=GROUPS, start=start), 2):
        steps = [next(ranks[rank]) for _ in range(accumulation) for rank in range(world)]
        assert all(len(images) == micro for images, _ in steps)
        assert [t["index"] for _, targets in steps for t in targets] == [i for i, _ in batch]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_batches_are_in_pinned_memory_where_there_is_a_gpu(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_gpu)
    training = detection_loader(Noisy(), micro_batch=2, seed=0)
    evaluation = detection_evaluation_loader(Noisy(), batch_size=2)
    assert training.pin_memory == evaluation.pin_memory == has_gpu


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_workers(workers):
    alone, helped = (
        contents(islice(detection_loader(Noisy(), micro_batch=4, seed=1, num_workers=w), 8))
        for w in (0, workers)
    )
    assert alone == helped
    assert len({seed for _, seed, *_ in alone}) == len(alone)  # every draw has its own


def test_samples_do_not_depend_on_ranks_accumulation_or_interruption():
    def run(start=0, **options):
        return contents(islice(detection_loader(Noisy(), seed=1, start=start, **options), 4))

    alone = run(micro_batch=4)
    assert run(micro_batch=4, start=2)[:8] == alone[8:]
    halves = [run(micro_batch=2, rank=r, world_size=2) for r in (0, 1)]
    rebuilt = [halves[r][2 * i : 2 * i + 2] for i in range(4) for r in (0, 1)]
    assert [sample for part in rebuilt for sample in part] == alone
    assert run(micro_batch=1, accumulation=4) == alone[:4]


def test_another_seed_gives_other_samples():
    first, second = (
        contents(islice(detection_loader(Noisy(), micro_batch=4, seed=s), 1)) for s in (0, 1)
    )
    assert {c[1] for c in first}.isdisjoint(c[1] for c in second)


def test_collated_targets_are_plain_tensors():
    images, targets = collate([Noisy()[0], Noisy()[1]])
    for tensor in (*images, targets[0]["boxes"]):
        assert type(tensor) is torch.Tensor
    assert [t["index"] for t in targets] == [0, 1]


def test_an_evaluation_loader_gives_its_shard_in_order():
    loader = detection_evaluation_loader(Noisy(10), batch_size=3, rank=1, world_size=2)
    assert len(loader) == 2
    assert [[t["index"] for t in targets] for _, targets in loader] == [[6, 7, 8], [9]]


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="no images"):
        next(iter(detection_loader(Noisy(0), micro_batch=2, seed=0)))


def test_augmented_photographs_are_the_same_from_any_worker(tree):
    for name in "abcd":
        tree.add(name, ("cat", (2, 3, 10, 8)), size=(20, 10) if name < "c" else (10, 20))
    tree.split("train", list("abcd"))
    split = read_split(tree.root, "train")
    transform = detection_train(min_size=(10, 12, 14), max_size=40, color_jitter=0.3)

    def run(workers):
        loader = detection_loader(
            DetectionDataset(split, transform),
            micro_batch=2,
            seed=0,
            groups=aspect_groups(split),
            num_workers=workers,
        )
        return list(islice(loader, 6))

    for (images, targets), (other_images, other_targets) in zip(run(0), run(2), strict=True):
        assert len({image.shape[1] > image.shape[2] for image in images}) == 1
        for image, other_image in zip(images, other_images, strict=True):
            assert image.dtype == torch.uint8
            assert torch.equal(image, other_image)
        for target, other_target in zip(targets, other_targets, strict=True):
            assert torch.equal(target["boxes"], other_target["boxes"])
            for key in ("seed", "image_id"):
                assert target[key] == other_target[key]
