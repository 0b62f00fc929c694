"""The power of the inverse: TrAct at 1, the plain gradient at 0, and what lies between."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import photo_like
from tests.reference import power_gradient
from tract_det import TrActError, apply_tract, set_micro_batches
from tract_det.tract.solve import damped_power, damped_power_rows, damped_solve


def stem(**keywords):
    torch.manual_seed(0)
    return apply_tract(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), **keywords)


def gradient(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return model[0].weight.grad.clone()


@pytest.mark.parametrize("power", [0.25, 0.5, 1.5])
def test_a_convolution_has_the_power_of_its_patches(power, generator):
    images = photo_like(generator, 2, 3, 12, 12)
    model = stem(power=power)
    Z = model(images)
    dZ = torch.randn(Z.shape, generator=generator)
    Z.backward(dZ)
    X = F.unfold(images.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    expected = power_gradient(X, dZ.movedim(1, -1).flatten(0, 2), 0.1, power)
    torch.testing.assert_close(
        model[0].weight.grad.flatten(1).double(), expected, rtol=1e-5, atol=0.001
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("N", [1, 5, 40])
def test_a_linear_layer_with_few_rows_or_many(N, power, generator):
    X, dZ = torch.randn(N, 12, generator=generator), torch.randn(N, 4, generator=generator)
    model = apply_tract(nn.Sequential(nn.Linear(12, 4)), 0.2, power=power)
    model(X).backward(dZ)
    expected = power_gradient(X, dZ, 0.2, power).float()
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_the_power_1_is_tract_and_the_power_0_the_plain_gradient(generator):
    images = photo_like(generator, 2, 3, 16, 16)
    assert torch.equal(gradient(stem(power=1.0), images), gradient(stem(), images))
    torch.manual_seed(0)
    plain = gradient(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), images)
    torch.testing.assert_close(gradient(stem(power=0.0), images), plain, rtol=1e-5, atol=1e-4)


def test_two_half_powers_are_the_whole_and_both_systems_agree(generator):
    X, g = torch.randn(2, 8, 12, generator=generator), torch.randn(2, 4, 12, generator=generator)
    X, g, lambda_ = X.double(), g.double(), torch.tensor([0.1, 0.3], dtype=torch.float64)
    gram = X.mT @ X / 8
    half = damped_power(g, gram, lambda_, 0.5)
    whole = damped_solve(g, gram, lambda_)
    torch.testing.assert_close(damped_power(half, gram, lambda_, 0.5), whole)
    torch.testing.assert_close(damped_power_rows(g, X, lambda_, 0.5), half)
    torch.testing.assert_close(damped_power_rows(g, X, lambda_, 1.0), whole)


def test_micro_batches_give_the_step_of_the_whole_batch(generator):
    images = photo_like(generator, 4, 3, 16, 16)
    model = stem(power=0.5)
    expected = gradient(model, images)
    model.zero_grad()
    set_micro_batches(model, 2)
    for part in images.chunk(2):
        model(part).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_what_is_black_or_not_finite_gives_what_it_gives_by_tract(power):
    assert not gradient(stem(power=power), torch.zeros(2, 3, 8, 8)).any()
    images = torch.full((1, 3, 8, 8), torch.inf)
    assert not gradient(stem(power=power), images).isfinite().any()
    linear = apply_tract(nn.Sequential(nn.Linear(8, 4)), power=power)
    linear(torch.zeros(0, 8)).sum().backward()
    assert not linear[0].weight.grad.any()


def test_the_power_is_a_setting_that_a_copy_and_the_text_have():
    model = copy.deepcopy(stem(power=0.5))
    assert model[0].tract.power == 0.5 and "power=0.5" in str(model)
    assert apply_tract(model)[0].tract.power == 1
    for power in (-0.5, float("nan"), float("inf")):
        with pytest.raises(TrActError, match=r"power is .*: it must be at least 0"):
            stem(power=power)
