"""Wilson's score interval of a proportion: also for few images, and where all or none are right."""

import math
from statistics import NormalDist

LEVEL = 0.95


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion of which `count` of `total` independent draws were seen.

    It has the proportions p whose distance to the one that was seen is at most z standard errors,
    sqrt(p (1 - p) / total): Wilson, "Probable Inference, the Law of Succession, and Statistical
    Inference", Journal of the American Statistical Association 22(158), 1927.

    Args:
        count: 0..total.
        total: at least 1.

    Returns:
        Its ends, within 0..1.
    """
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    middle = (count + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (count * (total - count) / total + z2 / 4)) / (total + z2)
    # Exact where rounding would leave an end beside 0 or 1.
    low = middle - half if count else 0.0
    return low, middle + half if count < total else 1.0
