"""What a TrAct layer keeps between passes: its settings, the micro-batches of a step, diagnostics.

The backward pass looks a layer's state up by its key when it runs, because a compiled graph cannot
refer to a Python object: it would freeze the object as it was when the graph was traced. The side
effects and why they are safe: see `operators`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor


class TrActError(ValueError):
    """TrAct cannot do what it was asked for; the message names the module and a remedy."""


def check_lambda(lambda_: float) -> float:
    """Returns `lambda_`; raises TrActError if it is not positive and finite."""
    if not 0 < lambda_ < float("inf"):
        raise TrActError(
            f"lambda_ is {lambda_}: it must be positive and finite (the paper uses 0.05 to 0.2)"
        )
    return float(lambda_)


def check_power(power: float) -> float:
    """Returns `power`; raises TrActError if it is negative or not finite."""
    if not 0 <= power < float("inf"):
        raise TrActError(
            f"power is {power}: it must be at least 0 (the plain gradient) and finite; TrAct's is 1"
        )
    return float(power)


class Pending:
    """The sums over the micro-batches of the current step so far.

    The exact step of `k` micro-batches needs the sum of their plain gradients and the `G` of all
    their patches. The first `k - 1` return a gradient of zero, the last one the gradient of all.

    Attributes:
        micro_batches: `k`, or a function that tells whether the current micro-batch is the last.
        passes: micro-batches of the current step so far.
        sums: their sums; empty before the first.
    """

    def __init__(self, micro_batches: int | Callable[[], bool]) -> None:
        self.micro_batches = micro_batches
        self.clear()

    def clear(self) -> None:
        """Starts a new step; the sums of an unfinished one are dropped."""
        self.passes = 0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, *sums: Tensor) -> tuple[Tensor, ...] | None:
        """Adds the sums of one micro-batch; returns the totals with the last one, and else None."""
        if self.sums:
            self.sums = tuple(a + b for a, b in zip(self.sums, sums, strict=True))
        else:  # copies: an operator must not keep its arguments
            self.sums = tuple(part.clone() for part in sums)
        self.passes += 1
        limit = self.micro_batches
        if not (limit() if callable(limit) else self.passes >= limit):
            return None
        totals = self.sums
        self.clear()
        return totals


@dataclass
class Diagnosis:
    """The last weight gradient of a layer, for `tract_diagnostics`.

    Attributes:
        total: `X^T X`, `(groups, K, K)`; where `singular`, `X X^T`.
        count: `N`.
        lambda_: effective damping, `(groups,)`.
        plain_norm: norm of `dZ^T X`.
        norm: norm of TrAct's gradient.
        singular: whether `X^T X` has eigenvalues of zero that `total` lacks.
    """

    total: Tensor
    count: Tensor
    lambda_: Tensor
    plain_norm: Tensor
    norm: Tensor
    singular: bool = False


class State:
    """The state of one TrAct layer.

    A copy or an unpickled state has the same settings, a key of its own and an empty step. A
    function that tells the last micro-batch stays behind: it belongs to the trainer of the model.

    Attributes:
        lambda_: damping, in units of standardised inputs, or of `trace(G) / K` where `relative`.
        relative: whether `lambda_` is in units of `trace(G) / K`.
        power: of the inverse of `G + lambda_ I`; 1 = TrAct, 0 = the plain gradient.
        sync: whether to sum `G` over all ranks, where a process group exists.
        gram_patches: number of random patches from which to estimate `G`; 0 = exact, from all.
        enabled: whether the layer learns by TrAct; otherwise it is the plain layer, at no cost.
        pending: sums over the micro-batches of a step; None = every micro-batch is a step.
        last: the last gradient; None before the first.
        key: key of this state in `STATES`.
    """

    def __init__(
        self,
        lambda_: float = 0.1,
        *,
        relative: bool = False,
        power: float = 1.0,
        sync: bool = True,
        gram_patches: int = 0,
    ) -> None:
        if gram_patches < 0:
            raise TrActError(
                f"gram_patches is {gram_patches}: it must be 0 (all patches) or a positive number"
            )
        self.lambda_, self.relative = check_lambda(lambda_), relative
        self.power = check_power(power)
        self.sync, self.gram_patches = sync, gram_patches
        self.enabled = True
        self.pending: Pending | None = None
        self._register()

    def _register(self) -> None:
        self.last: Diagnosis | None = None
        self.key = next(_KEYS)
        STATES[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        limit = None if self.pending is None else self.pending.micro_batches
        pending = None if limit is None or callable(limit) else Pending(limit)
        settings = {key: value for key, value in vars(self).items() if key not in ("key", "last")}
        return settings | {"pending": pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def __repr__(self) -> str:
        if not self.enabled:
            return "TrAct off"
        relative = " * trace(G) / K" if self.relative else ""
        patches = f", gram_patches={self.gram_patches}" if self.gram_patches else ""
        power = f", power={self.power:g}" if self.power != 1 else ""
        return f"lambda_={self.lambda_:g}{relative}{power}{patches}"


_KEYS = itertools.count(1)
NO_KEY = 0  # of the functions `tract_conv2d` and `tract_linear`, which have no state
# Key -> state, of every layer that is alive.
STATES: "WeakValueDictionary[int, State]" = WeakValueDictionary()
