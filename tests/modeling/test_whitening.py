"""The whitening filters of a first layer, and what they are made from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import photo_like
from tract_det.errors import UserError
from tract_det.modeling.whitening import (
    check_whitens,
    inputs_of,
    patch_covariance,
    whitening_weight,
)


def conv(M, **keywords):
    torch.manual_seed(0)
    return nn.Conv2d(3, M, 3, bias=False, **keywords)


def noise(generator, *shape):
    """Images whose patches have no direction of almost no variance, and whose mean is not 0."""
    return 0.5 + F.avg_pool2d(torch.randn(*shape, generator=generator), 2, 1)


def responses(layer, images):
    """`(N, M)`, centred."""
    with torch.no_grad():
        Z = layer(images).movedim(1, -1).flatten(0, 2).double()
    return Z - Z.mean(0)


@pytest.mark.parametrize("keywords", [{}, {"stride": 2}, {"dilation": 2}, {"stride": (3, 1)}])
def test_the_covariance_is_that_of_the_unfolded_patches(keywords, generator):
    layer = conv(4, **keywords)
    images = [noise(generator, 2, 3, 12, 11), noise(generator, 1, 3, 9, 14)]
    X = [F.unfold(x.double(), 3, **keywords).transpose(1, 2).flatten(0, 1) for x in images]
    expected = torch.cov(torch.cat(X).T, correction=0)
    torch.testing.assert_close(patch_covariance(images, layer), expected)


def test_the_rows_of_a_linear_layer_are_its_patches(generator):
    X = torch.randn(2, 30, 5, generator=generator) + 1
    expected = torch.cov(X.flatten(0, 1).double().T, correction=0)
    torch.testing.assert_close(patch_covariance([X], nn.Linear(5, 2)), expected)


@pytest.mark.parametrize("M", [8, 54, 70])
def test_responses_are_uncorrelated_with_the_variance_of_the_default_in_pairs_of_two_signs(
    M, generator
):
    """K is 27: fewer than 2 K channels, as many, and more, of which the last stay."""
    layer, images = conv(M), noise(generator, 8, 3, 20, 20)
    default, before = layer.weight.detach().clone(), responses(layer, images)
    covariance = patch_covariance([images], layer)
    with torch.no_grad():
        layer.weight.copy_(whitening_weight(covariance, layer.weight))
    rows = min(M, 54)
    Z = responses(layer, images)[:, :rows]
    torch.testing.assert_close(Z[:, 1::2], -Z[:, ::2])
    variance = before.square().mean()
    expected = torch.eye(rows // 2, dtype=torch.float64) * variance
    measured = Z[:, ::2].T @ Z[:, ::2] / len(Z)
    torch.testing.assert_close(measured, expected, rtol=0.02, atol=1e-4 * float(variance))
    torch.testing.assert_close(Z.square().mean(), variance, rtol=1e-3, atol=0)
    assert torch.equal(layer.weight[rows:], default[rows:])


def test_the_first_filters_are_those_of_the_largest_eigenvalues(generator):
    images = photo_like(generator, 8, 3, 20, 20)
    covariance = patch_covariance([images], conv(4))
    rows = whitening_weight(covariance, conv(6).weight).double().flatten(1)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    cosines = (F.normalize(rows[::2]) @ vectors.flip(-1)).abs()
    torch.testing.assert_close(cosines[:, :3], torch.eye(3).double(), rtol=0, atol=1e-5)
    assert eigenvalues[-1] > 10 * eigenvalues[0]


def test_an_odd_channel_has_one_sign(generator):
    covariance = patch_covariance([noise(generator, 4, 3, 12, 12)], conv(4))
    five, six = (whitening_weight(covariance, conv(M).weight).flatten(1) for M in (5, 6))
    torch.testing.assert_close(F.normalize(five), F.normalize(six[:5]))


def test_a_layer_sees_its_input_in_evaluation_mode_and_the_network_is_as_before(generator):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 1))
    images = torch.randn(2, 3, 6, 6, generator=generator)  # too large for the last layer
    seen = list(inputs_of(model, model[1], [images, images]))
    torch.testing.assert_close(seen[1], images, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2 and model.training and model[0].num_batches_tracked == 0
    assert not model[1]._forward_pre_hooks


class Standardised(nn.Conv2d):
    """A convolution that changes its weight."""


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), Standardised(3, 4, 3), nn.ReLU()])
def test_a_layer_whose_filters_would_not_whiten_is_refused(layer):
    with pytest.raises(UserError, match=r"STEM_INIT whitened: the first layer, 'a\.b', is a"):
        check_whitens(layer, "a.b")


def test_images_without_variance_are_refused():
    with pytest.raises(UserError, match="have no variance"):
        patch_covariance([torch.ones(2, 3, 8, 8)], conv(4))
    with pytest.raises(UserError, match="have no variance"):
        patch_covariance([], conv(4))
