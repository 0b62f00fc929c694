"""What a TrAct layer keeps between passes: its settings, the micro-batches of a step, diagnostics.

The backward pass finds it by a number, not by reference, so that it is looked up when the pass
runs: also in a compiled graph, where every Python object is as it was when the graph was traced.
"""

import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor


class TrActError(ValueError):
    """TrAct cannot do what it was asked for; the message names the module and says the mend."""


def check_lambda(lambda_: float) -> float:
    """Returns `lambda_`, or raises TrActError where it is not positive and finite."""
    if not 0 < lambda_ < float("inf"):
        raise TrActError(f"lambda_ is {lambda_}: it must be positive (the paper: 0.05 to 0.2)")
    return float(lambda_)


class Pending:
    """What the micro-batches of a step have left so far.

    The exact step of `k` micro-batches needs the sum of their plain gradients and their pooled `G`:
    the first `k - 1` give a gradient of zero, the last one that of them all.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.clear()

    def clear(self) -> None:
        """Forgets what there is: a step was given up."""
        self.seen = 0
        self.parts: tuple[Tensor, ...] = ()

    def add(self, *parts: Tensor) -> tuple[Tensor, ...] | None:
        """Takes a micro-batch's sums in; returns those over all with the last one."""
        if self.parts:
            parts = tuple(a + b for a, b in zip(self.parts, parts, strict=True))
        self.seen, self.parts = self.seen + 1, parts
        if self.seen < self.micro_batches:
            return None
        self.clear()
        return parts


@dataclass
class Diagnosis:
    """The last weight gradient that a layer gave.

    Attributes:
        total: `X^T X`, `(groups, K, K)`; `X X^T` where `singular`.
        count: `N`.
        lambda_: effective damping, `(groups,)`.
        plain_norm: of `dZ^T X`.
        norm: of TrAct's gradient.
        singular: `X^T X` has eigenvalues of zero besides those of `total`.
    """

    total: Tensor
    count: Tensor
    lambda_: Tensor
    plain_norm: Tensor
    norm: Tensor
    singular: bool = False


class State:
    """The state of one TrAct layer. A copy has the settings of its original and a key of its own.

    Attributes:
        lambda_: damping, in units of standardised inputs, or of `trace(G) / K` where `relative`.
        relative: the unit of `lambda_`.
        sync: where a process group exists, `G` is that of all ranks.
        gram_patches: patches from which `G` is estimated; 0 = all of them: exact.
        enabled: whether the layer learns by TrAct. False: it is the plain layer, at no cost.
        pending: collects the micro-batches of a step; None = each is a step.
        last: the last gradient; None before the first.
        key: of `STATES`.
    """

    def __init__(
        self,
        lambda_: float = 0.1,
        *,
        relative: bool = False,
        sync: bool = True,
        gram_patches: int = 0,
    ) -> None:
        if gram_patches < 0:
            raise TrActError(f"gram_patches is {gram_patches}: it takes 0 (all of them) or more")
        self.lambda_, self.relative = check_lambda(lambda_), relative
        self.sync, self.gram_patches = sync, gram_patches
        self.enabled = True
        self.pending: Pending | None = None
        self._register()

    def _register(self) -> None:
        self.last: Diagnosis | None = None
        self.key = next(_KEYS)
        STATES[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        pending = self.pending and Pending(self.pending.micro_batches)
        left = {key: value for key, value in vars(self).items() if key not in ("key", "last")}
        return left | {"pending": pending}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def __repr__(self) -> str:
        if not self.enabled:
            return "TrAct off"
        relative = " * trace(G) / K" if self.relative else ""
        patches = f", gram_patches={self.gram_patches}" if self.gram_patches else ""
        return f"lambda_={self.lambda_:g}{relative}{patches}"


_KEYS = itertools.count(1)
NO_KEY = 0
# Key -> the state of a layer that lives.
STATES: "WeakValueDictionary[int, State]" = WeakValueDictionary()
