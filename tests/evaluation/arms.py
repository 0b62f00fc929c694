"""Arms of made runs."""

import numpy as np

from tract_det.evaluation.comparison import Arm, Curve

EPOCHS = np.arange(1.0, 11.0)


def constant(final, length=10.0):
    return Curve(np.array([length / 2, length]), np.array([0.0, final]))


def arm(name, finals, length=10.0):
    """An arm with these final metrics, for the seeds 0, 1, ...; None failed."""
    runs = [None if final is None else constant(final, length) for final in finals]
    return Arm(name, dict(enumerate(runs)))


def curves(name, *functions):
    return Arm(name, {s: Curve(EPOCHS, f(EPOCHS)) for s, f in enumerate(functions)})


PLAIN = [60.0, 61.0, 59.5, 60.5, 62.0]
TRACT = [63.0, 64.5, 63.5, 62.5, 66.5]  # 3, 3.5, 4, 2, 4.5 above
