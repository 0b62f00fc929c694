"""Functions that `torch.compile` takes as they are."""

import inspect
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
        # In a CUDA graph, what the function looks up would be what it was when it was captured.
        tag = getattr(torch._C.Tag, "cudagraph_unsafe", None)
        takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
        tags: dict[str, Any] = {"tags": (tag,)} if tag is not None and takes_tags else {}
        self.op = torch.library.custom_op(f"tract_det::{name}", function, mutates_args=(), **tags)

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
