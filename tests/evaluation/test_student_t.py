import math

import numpy as np
import pytest

from tract_det.evaluation.student_t import t_interval, t_probability, t_quantile

# t_0.975 and t_0.8 of the usual tables, for the two-sided probabilities 0.95 and 0.6.
TABLE = [
    (1, 12.7062, 1.3764),
    (2, 4.3027, 1.0607),
    (3, 3.1824, 0.9785),
    (4, 2.7764, 0.9410),
    (9, 2.2622, 0.8834),
    (30, 2.0423, 0.8538),
]


@pytest.mark.parametrize(("df", "t_975", "t_80"), TABLE)
def test_quantiles_are_the_tables(df, t_975, t_80):
    assert t_quantile(0.95, df) == pytest.approx(t_975, abs=6e-5)
    assert t_quantile(0.6, df) == pytest.approx(t_80, abs=6e-5)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 12])
def test_the_probability_is_the_integral_of_the_density(df):
    x = np.linspace(-1.7, 1.7, 2001)
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    density = constant * (1 + x**2 / df) ** (-(df + 1) / 2)
    integral = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
    assert t_probability(1.7, df) == pytest.approx(integral, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 50, 999])
def test_the_quantile_inverts_the_probability(df):
    for probability in (0.1, 0.6, 0.95, 0.999):
        assert t_probability(t_quantile(probability, df), df) == pytest.approx(probability)


@pytest.mark.parametrize("df", [1, 2, 3, 4])
def test_all_probability_lies_below_infinity_and_none_below_zero(df):
    assert t_probability(0.0, df) == 0
    assert t_probability(math.inf, df) == pytest.approx(1)


def test_many_degrees_of_freedom_give_the_normal_distribution():
    assert t_quantile(0.95, 100_000) == pytest.approx(1.95996, abs=1e-4)


def test_the_interval_of_a_worked_example():
    """Mean 3, standard error sqrt(2.5 / 5), t_0.975 = 2.7764 for 4 degrees of freedom."""
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
