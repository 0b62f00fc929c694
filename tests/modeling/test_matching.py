"""Matching, sampling and coding of boxes: torchvision's results to the bit, without its pauses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection import _utils as theirs

from tests.counts import Waits
from tract_det.modeling.matching import BalancedSampler, BoxCoder, Matcher, positions


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def boxes(generator, n):
    corners = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([corners, corners + 1 + torch.rand(n, 2, generator=generator) * 60], dim=1)


@given(st.lists(st.booleans(), max_size=20))
def test_positions_are_nonzeros(values):
    mask = torch.tensor(values, dtype=torch.bool)
    assert torch.equal(positions(mask, sum(values)), mask.nonzero().squeeze(1))


def drawn_image_by_image(sampler, labels, seeds):
    """The definition: masks of a quota of objects and of background, drawn anew for each image."""
    chosen = ([], [])
    for k, image in enumerate(labels):
        generator = None
        if seeds:
            generator = torch.Generator().manual_seed(2 * seeds[k] + sampler.salt)
        quota = int(sampler.batch_size_per_image * sampler.positive_fraction)
        for masks, candidates in zip(chosen, (image >= 1, image == 0), strict=True):
            indices = candidates.nonzero().squeeze(1)
            order = torch.randperm(len(indices), generator=generator)
            masks.append(torch.zeros_like(candidates))
            masks[-1][indices[order[:quota]]] = True
            quota = sampler.batch_size_per_image - int(masks[-1].sum())
    return chosen


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 2), max_size=30), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 1),
)
def test_a_batch_is_sampled_as_image_by_image(labels, is_seeded, salt):
    labels = [torch.tensor(image, dtype=torch.int64) for image in labels]
    seeds = list(range(7, 7 + len(labels))) if is_seeded else []
    sampler = BalancedSampler(8, 0.5, salt)
    torch.manual_seed(3)
    expected = drawn_image_by_image(sampler, labels, seeds)
    for form in ("masks", "positions"):
        torch.manual_seed(3)
        sampler.seeds = list(seeds)
        if form == "masks":
            found = sampler(labels)
            for masks, others in zip(found, expected, strict=True):
                assert all(map(torch.equal, masks, others)) and len(masks) == len(labels)
            continue
        samples = sampler.sample(labels)
        for kind, masks in zip(samples[:2], expected, strict=True):
            assert torch.equal(kind, torch.cat(masks).nonzero().squeeze(1))
        assert samples.objects == [int(mask.sum()) for mask in expected[0]]
        assert samples.sizes == [int(a.sum() + b.sum()) for a, b in zip(*expected, strict=True)]


def test_a_batch_is_sampled_with_one_transfer(generator):
    labels = [torch.randint(-1, 2, (50,), generator=generator) for _ in range(8)]
    sampler = BalancedSampler(16, 0.5, salt=0)
    with Waits() as waits:
        sampler.sample(labels)
    assert waits.counts == {"transfer": 1}


@pytest.mark.parametrize("low_quality", [True, False])
def test_matches_are_torchvisions(generator, low_quality):
    quality = torch.rand(5, 200, generator=generator).square()
    quality[:, 3] = quality[:, 4]  # anchors that fit equally well
    arguments = (0.8, 0.5, low_quality)
    with Waits() as waits:
        found = Matcher(*arguments)(quality)
    assert torch.equal(found, theirs.Matcher(*arguments)(quality))
    assert waits.counts == {}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_the_numbers_of_a_box_are_torchvisions(generator, weights):
    anchors, others = boxes(generator, 60), boxes(generator, 60)
    codes = torch.randn(60, 4 * 3, generator=generator) * 4  # some grow beyond the bound
    ours, reference = BoxCoder(weights), theirs.BoxCoder(weights)
    with Waits() as waits:
        encoded, decoded = ours.encode([others], [anchors]), ours.decode(codes, [anchors])
    assert waits.counts == {}
    assert torch.equal(encoded[0], reference.encode([others], [anchors])[0])
    assert torch.equal(decoded, reference.decode(codes, [anchors]))
