"""Models on the meta device, where weights have no values and need no initialisation."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INITIALISERS = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.clamp_, Tensor.fill_, Tensor.zero_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_),
}


class Uninitialised(TorchFunctionMode):
    """Leaves out what takes most of the time of building a model on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in INITIALISERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def meta():
    """Modules that are built here have shapes but no values."""
    with torch.device("meta"), Uninitialised():
        yield
