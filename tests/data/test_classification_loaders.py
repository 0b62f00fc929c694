import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tract_det.cli import one_line
from tract_det.data.classification import ClassificationDataset, read_classification
from tract_det.data.classification_loaders import (
    classification_evaluation_loader,
    classification_loader,
)
from tract_det.data.classification_transforms import Mix, classification_test, classification_train
from tract_det.errors import UserError

N = 11  # no number of ranks divides it
PIXELS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, count in (("cat", 4), ("dog", 7)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
                image.save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def corrupted(root, tmp_path):
    """The same folder with two corrupt images in each part."""
    (tmp_path / "copy").mkdir()
    for path in root.rglob("*.png"):
        target = tmp_path / "copy" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[: 60 if path.stem == "2" else None])
    return tmp_path / "copy"


def training(root, **options):
    dataset = ClassificationDataset(
        read_classification("imagefolder", root, train=True),
        classification_train(8, auto_augment="randaugment", erasing=0.5, **PIXELS),
        **options,
    )
    assert len(dataset) == N
    return dataset


def evaluation(root, **options):
    split = read_classification("imagefolder", root, train=False)
    return ClassificationDataset(split, classification_test(8, **PIXELS), **options)


def take(loader, count):
    batches = iter(loader)
    return list(islice(batches, count))


def same(first, second):
    flat = [[part for batch in batches for part in batch] for batches in (first, second)]
    return len(flat[0]) == len(flat[1]) and all(map(torch.equal, *flat))


def test_batches_are_tensors(root):
    (images, labels), *_ = take(classification_loader(training(root), micro_batch=5, seed=0), 1)
    assert (images.shape, images.dtype) == ((5, 3, 8, 8), torch.float32)
    assert images.is_contiguous()
    assert (labels.shape, labels.dtype) == ((5,), torch.int64)
    mix = Mix(2, mixup_alpha=1.0, smoothing=0.1)
    loader = classification_loader(training(root), micro_batch=5, seed=0, mix=mix)
    ((images, targets),) = take(loader, 1)
    assert (targets.shape, targets.dtype) == ((5, 2), torch.float32)


@pytest.mark.parametrize("mix", [None, Mix(2, 0.8, 1.0, smoothing=0.1)], ids=["plain", "mix"])
def test_batches_do_not_depend_on_workers_ranks_or_interruption(root, mix):
    def run(count, **options):
        loader = classification_loader(training(root), seed=3, mix=mix, **options)
        return take(loader, count)

    alone = run(8, micro_batch=4)
    assert not same(alone[:4], alone[4:])
    assert same(run(8, micro_batch=4, num_workers=2), alone)
    assert same(run(5, micro_batch=4, start=3), alone[3:])
    # Slices of 2: two ranks with one micro-batch each get what one rank accumulates over two.
    slices = run(8, micro_batch=2, accumulation=2)
    ranks = [run(4, micro_batch=2, rank=r, world_size=2) for r in (0, 1)]
    assert same([ranks[r][i] for i in range(4) for r in (0, 1)], slices)
    if mix is None:
        pairs = [zip(*slices[i : i + 2], strict=True) for i in (0, 2)]
        assert same([[torch.cat(parts) for parts in pair] for pair in pairs], alone[:2])


def test_mixing_leaves_the_random_numbers_of_the_training_alone(root):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mix = Mix(2, mixup_alpha=1.0)
    take(classification_loader(training(root), micro_batch=4, seed=0, mix=mix), 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_loader_takes_along_can_be_pickled(root):
    """Python 3.14 does not fork worker processes but starts new ones and pickles their data set."""
    loader = classification_loader(training(root), micro_batch=4, seed=0, mix=Mix(2, 0.8, 1.0))
    inner = loader._loader
    copy = pickle.loads(pickle.dumps((inner.dataset, inner.collate_fn, inner.batch_sampler)))
    (keys,) = islice(copy[2], 1)
    images, targets, _ = copy[1](copy[0].__getitems__(keys))
    assert same([(images, targets)], take(loader, 1))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_every_image_once_in_the_same_batches(root, world, workers):
    def run(rank, world_size, num_workers=0):
        loader = classification_evaluation_loader(
            evaluation(root),
            batch_size=3,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        return list(loader)

    alone = run(0, 1)
    if (world, workers) != (1, 0):
        shared = [batch for rank in range(world) for batch in run(rank, world, workers)]
        assert [ids for *_, ids in shared] == [ids for *_, ids in alone]
        assert same([b[:2] for b in shared], [b[:2] for b in alone])
    split = evaluation(root).split
    assert [i for *_, ids in alone for i in ids] == [split.image_id(i) for i in range(N)]
    assert torch.cat([labels for _, labels, _ in alone]).tolist() == split.labels.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_ends_a_training_in_one_line(corrupted, workers):
    loader = classification_loader(training(corrupted), micro_batch=N, seed=0, num_workers=workers)
    batches = iter(loader)
    with pytest.raises(UserError) as caught:
        next(batches)
    line = one_line(caught.value)
    assert "\n" not in line
    assert "/2.png: the image cannot be read" in line
    if workers:  # the traceback that pytest keeps would keep the worker processes alive
        loader._loader._iterator._shutdown_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_alike_by_any_worker_and_counted(corrupted, workers):
    def run(num_workers=0, start=0):
        loader = classification_loader(
            training(corrupted, skip_corrupt=True),
            micro_batch=N,
            seed=0,
            num_workers=num_workers,
            start=start,
        )
        return loader, take(loader, 2 - start)

    loader, batches = run()
    second_loader, second_batches = run(workers)
    assert same(second_batches, batches)
    assert same(run(start=1)[1], batches[1:])
    # Two epochs: each corrupt image comes twice, or more often if it is drawn as a replacement.
    assert second_loader.skipped == loader.skipped
    assert set(loader.skipped) == {"train/cat/2.png", "train/dog/2.png"}
    assert min(loader.skipped.values()) >= 2
    assert sum(loader.skipped.values()) < 12


@pytest.mark.parametrize("batch_size", [1, 3, 20])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_leaves_corrupt_images_out_and_counts_them(corrupted, batch_size, world):
    dataset = evaluation(corrupted, skip_corrupt=True)
    loaders = [
        classification_evaluation_loader(dataset, batch_size=batch_size, rank=r, world_size=world)
        for r in range(world)
    ]
    batches = [batch for loader in loaders for batch in loader]
    skipped = [name for loader in loaders for name in loader.skipped.elements()]
    names = [dataset.split.image_id(i) for i in range(N)]
    assert skipped == [name for name in names if name.endswith("/2.png")]
    assert [i for *_, ids in batches for i in ids] == [
        name for name in names if name not in skipped
    ]
    for images, labels, ids in batches:
        assert len(images) == len(labels) == len(ids) > 0
    with pytest.raises(UserError, match=r"val/cat/2\.png"):
        list(classification_evaluation_loader(evaluation(corrupted), batch_size=batch_size))
