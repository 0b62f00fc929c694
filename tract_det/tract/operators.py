"""Functions that `torch.compile` takes as they are."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function that is an operator of PyTorch inside a compiled graph, and itself elsewhere.

    As an operator, its first call imports the compiler: 150 MiB, which eager training has no use
    for.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(f"tract_det::{name}", function, mutates_args=())

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shape and dtype of the result, as for `torch.library.custom_op`."""
        self.op.register_fake(fake)
        return fake

    def __call__(self, *args: Any) -> Any:
        """Calls it, as what it is here."""
        return self.op(*args) if torch.compiler.is_compiling() else self.function(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes the decorated function an `Operator`."""
    return lambda function: Operator(name, function)
