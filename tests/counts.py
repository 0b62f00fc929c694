"""Counts what a training step would make a GPU wait for, on a CPU."""

from collections import Counter
from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCHRONISING = {"_local_scalar_dense": "read", "nonzero": "nonzero"}
_TRANSFERS = {"tolist", "numpy", "cpu"}


class _Operators(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = _SYNCHRONISING.get(function._schema.name.split("::")[1])
        if kind:
            self.counts[kind] += 1
        return function(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _TRANSFERS:
            self.counts["transfer"] += 1
        is_new = name in ("tensor", "as_tensor") and not torch.is_tensor(args[0])
        if is_new and kwargs.get("device") is not None:
            self.counts["constant"] += 1
        return function(*args, **kwargs)


class Waits(ExitStack):
    """Counts, while it is open, what the host would wait for if the tensors were on a GPU.

    Attributes:
        counts: `read` = numbers read one by one; `nonzero`; `transfer` = tensors taken to the host
            as lists or arrays, which no operator tells of on a CPU; `constant` = Python numbers
            copied to a device that is named.
    """

    def __enter__(self):
        self.counts = Counter()
        self.enter_context(_Calls(self.counts))
        self.enter_context(_Operators(self.counts))
        return self
