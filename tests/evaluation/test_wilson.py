"""Wilson's interval is what its definition says, and agrees with numbers known from elsewhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tract_det.evaluation.wilson import wilson_interval

Z = 1.959963984540054

counts = st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_it_has_the_numbers_worked_by_hand():
    end = Z**2 / (10 + Z**2)  # p = z sqrt(p (1 - p) / n)
    assert wilson_interval(0, 10) == pytest.approx((0, end))
    half = Z / 2 / math.sqrt(10 + Z**2)
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_it_has_the_numbers_that_newcombe_published(count, total, low, high):
    """Method 3 of table I, "Two-sided confidence intervals for the single proportion", 1998."""
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=5.1e-5)


@given(counts)
def test_its_ends_are_z_standard_errors_from_what_was_seen(case):
    count, total = case
    seen = count / total
    for end in wilson_interval(count, total):
        distance = Z * math.sqrt(end * (1 - end) / total)
        assert abs(seen - end) == pytest.approx(distance, rel=1e-6, abs=1e-9)


@given(counts)
def test_right_and_wrong_are_alike(case):
    count, total = case
    low, high = wilson_interval(count, total)
    assert 0 <= low <= count / total <= high <= 1
    assert wilson_interval(total - count, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_it_equals_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for count, total in ((0, 1), (1, 1), (3, 7), (480, 500), (39_999, 50_000)):
        expected = stats.binomtest(count, total).proportion_ci(method="wilson")
        assert wilson_interval(count, total) == pytest.approx(tuple(expected), abs=1e-12)
