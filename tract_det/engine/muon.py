"""timm's Muon with its matrix iteration in float32 on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm.optim
import torch
from timm.optim import muon as _module

_ITERATION = "zeropower_via_newtonschulz"


class Muon(timm.optim.Muon):
    """`timm.optim.Muon`, in the precision that the device is fast in.

    timm orthogonalises in bfloat16, which is made for GPUs. On a CPU without instructions for it,
    that takes 15 times (128 x 1152) to 35 times (512 x 4608) as long as in float32 (one thread,
    PyTorch 2.14), and a step of a small detector more than a minute.
    """

    def step(self, closure: Any = None) -> Any:
        """A step, as timm's."""
        first = next(p for group in self.param_groups for p in group["params"])
        if first.device.type != "cpu":
            return super().step(closure)
        with _in_float32():
            return super().step(closure)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Gives timm's iteration another default for its dtype, which its optimizer does not pass."""
    original = getattr(_module, _ITERATION)
    setattr(_module, _ITERATION, partial(original, dtype=torch.float32))
    try:
        yield
    finally:
        setattr(_module, _ITERATION, original)
