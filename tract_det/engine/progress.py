"""How the evaluations of a run have gone so far, and whether they end it early."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """The evaluations of a run so far. Its fields are plain values, which a checkpoint holds.

    Attributes:
        best: the highest value of the metric; -infinity before the first evaluation.
        best_step: the step of that evaluation.
        since: evaluations after it.
        evaluated: the step of the newest evaluation; -1 = there was none.
    """

    best: float = -math.inf
    best_step: int = 0
    since: int = 0
    evaluated: int = -1

    @classmethod
    def of(cls, saved: float | Mapping[str, Any]) -> "Progress":
        """From a checkpoint; those of earlier versions have the highest value alone."""
        return cls(**saved) if isinstance(saved, Mapping) else cls(saved)

    def note(self, value: float, step: int) -> bool:
        """Takes in an evaluation; returns whether it is the best so far. NaN never is."""
        self.evaluated = step
        self.since += 1
        if not value > self.best:
            return False
        self.best, self.best_step, self.since = value, step, 0
        return True
