"""Student's t distribution for an integer number of degrees of freedom, without scipy."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def t_probability(t: float, df: int) -> float:
    """The probability that |T| <= t for Student's T with an integer number of degrees of freedom.

    The finite sums are exact: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3
    and 26.7.4.

    Args:
        t: not negative, may be infinite.
        df: degrees of freedom, at least 1.
    """
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    odd = df % 2
    # Odd: cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 + ...; even: 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def t_quantile(probability: float, df: int) -> float:
    """The t with `t_probability(t, df) == probability`, by bisection of its angle.

    Args:
        probability: two-sided, in (0, 1): 0.95 gives what tables call t_0.975.
        df: degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # to the last bit of the angle
        middle = (low + high) / 2
        if t_probability(math.sqrt(df) * math.tan(middle), df) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of at least two values."""
    n, average = len(values), mean(values)
    half = t_quantile(0.95, n - 1) * stdev(values) / math.sqrt(n)
    return average - half, average + half
