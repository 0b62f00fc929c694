"""The Gram matrix against explicit float64 patches, the solve against an explicit inverse."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import photo_like
from tests.reference import patches
from tract_det import patch_gram
from tract_det.tract import correlation, gram, windows
from tract_det.tract.gram import patch_count, row_gram_sum
from tract_det.tract.solve import damped_solve, damped_solve_rows


def by_patches(images, kernel, stride, padding, dilation, groups):
    """`G`, `(groups, K, K)`, from `tests.reference.patches`."""
    X = patches(images, kernel, stride, (padding[1],) * 2 + (padding[0],) * 2, dilation, "zeros")
    return torch.stack([x.flatten(1).T @ x.flatten(1) / len(x) for x in X.chunk(groups, 1)])


pairs = st.tuples


@st.composite
def geometries(draw):
    kernel = draw(pairs(st.integers(1, 9), st.integers(1, 9)))
    stride = draw(pairs(st.integers(1, 7), st.integers(1, 7)))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3), (2, 2)]))
    padding = draw(pairs(st.integers(0, 4), st.integers(0, 4)))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    size = [draw(st.integers(low, low + 24)) for low in least]
    batch = draw(st.integers(1, 3))
    return (
        (batch, groups * draw(st.integers(1, 2)), *size),
        kernel,
        stride,
        padding,
        dilation,
        groups,
    )


@settings(max_examples=120, deadline=None)
@given(geometries())
def test_equals_explicit_patches_in_every_geometry(case):
    shape, kernel, stride, padding, dilation, groups = case
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = patch_gram(images, kernel, stride, padding, dilation, groups)
    expected = by_patches(images, kernel, stride, padding, dilation, groups)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (7, 2, 3, (61, 74)),
        (3, 1, 1, (70, 33)),
        (16, 16, 0, (64, 50)),
        (16, 1, 8, (20, 40)),
        (11, 4, 2, (63, 63)),
        (5, 16, 0, (40, 40)),
        (13, 1, 6, (3, 3)),
    ],
)
def test_equals_unfolding_for_stems_in_use(kernel, stride, padding, size, generator):
    images = photo_like(generator, 2, 3, *size).double()
    X = F.unfold(images, kernel, 1, padding, stride).movedim(1, -1).flatten(0, 1)
    ours = patch_gram(images.float(), kernel, stride, padding)[0]
    # Beyond K = 256 blocks are multiplied in fp32 and added in float64.
    accuracy = 1e-12 if X.shape[1] <= 256 else 1e-6
    torch.testing.assert_close(ours, X.T @ X / len(X), rtol=accuracy, atol=accuracy * 10)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 2, 3), (3, 1, 1), (5, 5, 0)])
def test_the_size_of_the_blocks_changes_nothing(kernel, stride, padding, generator, monkeypatch):
    images = photo_like(generator, 5, 3, 90, 51)
    whole = patch_gram(images, kernel, stride, padding)
    for module in (windows, correlation, gram):
        if hasattr(module, "BLOCK_BYTES"):
            monkeypatch.setattr(module, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(correlation, "_BAND", 16)
    monkeypatch.setattr(correlation, "_SPECTRA_BYTES", 10_000)
    torch.testing.assert_close(patch_gram(images, kernel, stride, padding), whole, rtol=1e-11, atol=1e-11)  # fmt: skip  # noqa: E501


def test_the_gram_of_a_batch_is_the_mean_of_its_images(generator):
    images = photo_like(generator, 4, 3, 40, 40)
    parts = [patch_gram(image, 7, 2, 3) for image in images]
    torch.testing.assert_close(patch_gram(images, 7, 2, 3), sum(parts) / 4)


def test_order_of_entries_is_that_of_the_flattened_weight(generator):
    # With Z = X W^T, the mean of Z^2 is the quadratic form of G.
    images, weight = photo_like(generator, 2, 3, 31, 31).double(), torch.randn(1, 3, 4, 5).double()
    z = F.conv2d(images, weight, stride=(2, 1), padding=(1, 2))
    G = patch_gram(images, (4, 5), (2, 1), (1, 2))[0]
    w = weight.reshape(1, -1)
    torch.testing.assert_close((w @ G @ w.T).squeeze(), z.square().mean())
    assert patch_count(images, (4, 5), (2, 1), (1, 2)) == z.numel()


@pytest.mark.parametrize("kernel", [3, 7])
def test_pixels_up_to_255_are_as_exact_as_standardised_ones(kernel, generator):
    # lambda 0.1 beside entries of 1e4: an fp32 Gram is useless here.
    images = (photo_like(generator, 2, 3, 96, 96) * 57 + 118).clamp(0, 255).round()
    padding = kernel // 2
    X = F.unfold(images.double(), kernel, 1, padding).movedim(1, -1).flatten(0, 1)
    gradient = torch.randn(1, 8, X.shape[1], generator=generator)
    ours = damped_solve(gradient, patch_gram(images, kernel, 1, padding), 0.1)[0].double()
    damped = X.T @ X / len(X) + 0.1 * torch.eye(X.shape[1], dtype=torch.float64)
    expected = gradient[0].double() @ torch.linalg.inv(damped)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_windows_come_out_of_a_list_of_numbers_as_they_went_in():
    whole = windows.windows_of((31, 40), (7, 3), (2, 1), (3, 2), (1, 4))
    assert windows.Windows.unpack(whole.pack()) == whole
    assert all(type(number) is int for number in whole.pack())


def test_a_kernel_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="too large for"):
        patch_gram(torch.randn(1, 3, 4, 4), 5)


@pytest.mark.parametrize("K", [6, 300])
def test_rows_equal_the_plain_product(K, generator):
    X = torch.randn(700, K, generator=generator)
    torch.testing.assert_close(
        row_gram_sum(X), X.double().T @ X.double(), rtol=1e-5, atol=1e-3 if K > 256 else 1e-9
    )


def test_woodbury_equals_the_direct_solve(generator):
    X = torch.randn(20, 50, generator=generator)
    gradient = torch.randn(4, 50, generator=generator)
    direct = damped_solve(gradient[None], (row_gram_sum(X) / 20)[None], 0.1)[0]
    torch.testing.assert_close(damped_solve_rows(gradient, X, 0.1), direct, rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_not_positive_definite_gives_nan_in_its_group_alone():
    G = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    solved = damped_solve(torch.ones(2, 4, 3), G, 0.1)
    assert solved[0].isfinite().all() and solved[1].isnan().all()
