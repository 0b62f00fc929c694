"""`benchmarks/spectrum.py`: the directions in which a stem learns."""

import pytest
import torch
from torch import nn

from benchmarks.spectrum import Batch, adam_step, at_stem, directions, report

torch.manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q


def test_directions_are_counted_by_their_energy():
    assert directions(BASIS[:, 2].expand(4, 6), BASIS) == pytest.approx(1)
    assert directions(BASIS.T, BASIS) == pytest.approx(6)
    assert directions(BASIS.T[:3], BASIS) == pytest.approx(3)


def test_adams_step_of_steady_gradients_is_their_sign():
    gradient = torch.tensor([[3.0, -0.1, 0.0]])
    assert torch.equal(adam_step(gradient.expand(5, 1, 3)).sign(), gradient.sign())
    assert adam_step(gradient.expand(5, 1, 3)).abs().max() == pytest.approx(1)


def small_stem():
    """As models for small images change it."""
    stem = nn.Conv2d(3, 5, 3)
    stem.padding = (1, 1)
    return stem


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(3, 5, 7, stride=2, padding=3),
        nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"),
        small_stem(),
        nn.Linear(12, 5),
    ],
)
def test_the_gradient_at_the_stem_is_autograds(stem):
    stem = stem.double()
    is_linear = isinstance(stem, nn.Linear)
    x = torch.randn(2, 4, 12) if is_linear else torch.randn(2, 3, 20, 17)
    y = stem(x.double())
    dz = torch.randn_like(y)
    y.backward(dz)
    batch = at_stem(stem, x.double(), dz)
    torch.testing.assert_close(batch.gradient, stem.weight.grad.flatten(1))
    # The mean square of the pre-activations without their bias is w^T G w.
    bias = stem.bias if is_linear else stem.bias[:, None, None]
    by_channel = (y - bias).movedim(-1 if is_linear else 1, 0).flatten(1).square().mean(1)
    w = stem.weight.flatten(1)
    torch.testing.assert_close((w @ batch.gram * w).sum(1), by_channel)


def test_tract_learns_in_the_directions_above_lambda():
    eigenvalues = torch.tensor([1e-8, 1e-8, 1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    gram = BASIS @ torch.diag(eigenvalues) @ BASIS.T
    activations = torch.randn(200, 6, dtype=torch.float64) @ BASIS.T
    batch = Batch(gram, activations @ gram)  # a gradient proportional to the contrast, as dZ^T X is
    lines = report([batch], [0.01], "input", 1.0).splitlines()
    plain, tract = lines[-2].split(), lines[-1].split()
    assert plain[0] == "plain" and float(plain[1]) == pytest.approx(1, abs=0.1)
    assert tract[:3] == ["lambda", "0.01", "4"] and float(tract[3]) == pytest.approx(4, abs=0.3)


def test_the_unit_of_lambda_is_the_configs():
    gram = torch.diag(torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64))
    batches = [Batch(gram, torch.randn(4, 3, dtype=torch.float64))]
    above = [
        report(batches, [1.0], unit, 2.0).splitlines()[-1].split()[2]
        for unit in ("input", "standardised", "trace")
    ]
    assert above == ["2", "1", "1"]  # 1, 1 x 2, and 1 x trace / K = 1.5
