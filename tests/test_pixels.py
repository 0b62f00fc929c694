"""Pixel statistics: whose they are, and what they mean for lambda."""

import pytest

from tract_det.errors import UserError
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD, input_variance, pixel_statistics


def test_the_weights_own_statistics_rule():
    known = {"pixel_mean": [1.0, 2.0, 3.0], "pixel_std": [4.0, 5.0, 6.0]}
    assert pixel_statistics(known, [], []) == ([1, 2, 3], [4, 5, 6])
    assert pixel_statistics(known, [1, 2, 3], [4, 5, 6]) == ([1, 2, 3], [4, 5, 6])
    with pytest.raises(UserError, match=r"MODEL\.PIXEL_MEAN .* differ from .* that w\.pth"):
        pixel_statistics(known, [1, 2, 3], [1, 1, 1], source="w.pth")


def test_unknown_statistics_are_asked_for_not_guessed():
    with pytest.raises(UserError, match=r"set MODEL\.PIXEL_MEAN and MODEL\.PIXEL_STD"):
        pixel_statistics({}, [], [], source="w.pth")
    assert pixel_statistics(None, [], []) == (list(IMAGENET_MEAN), list(IMAGENET_STD))


def test_lambda_grows_with_the_square_of_the_inputs_scale():
    assert input_variance(IMAGENET_STD) == pytest.approx(1)
    assert input_variance([value / 2 for value in IMAGENET_STD]) == pytest.approx(4)
    assert input_variance([1.0, 1.0, 1.0]) == pytest.approx(3321, rel=1e-3)
