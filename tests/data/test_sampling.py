"""Which image comes when, and with which random numbers."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.noisy import Broken
from tract_det.data.sampling import SeededDataset, evaluation_batches, training_stream
from tract_det.errors import UserError

few = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 40)
batches = st.integers(1, 12)


def take(n, batch_size, count, **options):
    return list(islice(training_stream(n, batch_size, seed=3, **options), count))


def some_groups(n):
    return np.arange(n) % 5 // 4


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
    grouped = take(n, batch_size, 3 * n, groups=groups)
    assert all(len(batch) == batch_size for batch in grouped)
    assert all(len({groups[i] for i, _ in batch}) == 1 for batch in grouped)
    draws = {draw: index for batch in grouped for index, draw in batch}
    assert len(draws) == 3 * n * batch_size  # none twice
    # Draws that are in no batch yet wait in the buckets, which are never full.
    waiting = max(draws) + 1 - len(draws)
    assert waiting <= len(set(groups)) * (batch_size - 1)
    # Without groups, the same draws are the same images.
    plain = {d: i for b in take(n, 1, max(draws) + 1) for i, d in b}
    assert all(plain[draw] == index for draw, index in draws.items())


@few
@given(sizes, batches, st.integers(0, 30), st.booleans())
def test_starting_late_is_skipping(n, batch_size, start, grouped):
    groups = some_groups(n) if grouped else None
    late = take(n, batch_size, 5, groups=groups, start=start)
    assert late == take(n, batch_size, start + 5, groups=groups)[start:]


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_images_have_every_draw_of_their_own_and_are_apart(repeats):
    n, size = 10, 12
    batches = list(islice(training_stream(n, size, seed=0, repeats=repeats), 5 * repeats))
    pairs = [pair for batch in batches for pair in batch]
    assert sorted(draw for _, draw in pairs) == list(range(len(pairs)))
    index = {draw: i for i, draw in pairs}
    epoch_draws = n * repeats
    for epoch in range(len(pairs) // epoch_draws):
        images = [index[d] for d in range(epoch * epoch_draws, (epoch + 1) * epoch_draws)]
        assert sorted(images) == sorted(list(range(n)) * repeats)
        assert all(len(set(images[i : i + repeats])) == 1 for i in range(0, epoch_draws, repeats))
    for i, batch in enumerate(batches):
        assert sorted(draw for _, draw in batch) == list(range(i * size, (i + 1) * size))
    first = batches[0]
    assert all(a != b for (a, _), (b, _) in zip(first, first[1:] + first[:1], strict=True))


def test_starting_late_is_skipping_with_repeats_too():
    def run(start, count):
        return list(islice(training_stream(7, 5, seed=0, repeats=3, start=start), count))

    assert run(4, 6) == run(0, 10)[4:]


def test_repeats_of_one_change_nothing():
    assert list(islice(training_stream(7, 5, seed=0, repeats=1), 9)) == list(
        islice(training_stream(7, 5, seed=0), 9)
    )


def test_repeats_and_groups_are_refused_together():
    with pytest.raises(ValueError, match="repeats and groups"):
        next(training_stream(4, 2, seed=0, groups=np.zeros(4), repeats=2))


def test_every_image_has_a_group():
    with pytest.raises(ValueError, match="3 groups for 24 images"):
        take(24, 2, 1, groups=np.zeros(3))


def test_an_error_in_a_sample_leaves_the_random_numbers_of_the_training_alone():
    state = random.getstate(), torch.get_rng_state()
    with pytest.raises(UserError):
        SeededDataset(Broken(), 0)[0, 0]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


@given(st.integers(0, 60), batches, st.integers(1, 9))
def test_evaluation_shards_partition_the_split_whatever_the_ranks(n, batch_size, world):
    shards = [evaluation_batches(n, batch_size, rank, world) for rank in range(world)]
    joined = [batch for shard in shards for batch in shard]
    assert joined == evaluation_batches(n, batch_size, 0, 1)
    assert [index for batch in joined for index in batch] == list(range(n))
    assert all(len(batch) == batch_size for batch in joined[:-1])
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
