"""Functions that `torch.compile` takes into a graph as they are, and their side effects.

An operator of this package writes to no argument, keeps no reference to one and returns new
tensors: `mutates_args` is empty. But a schema cannot express what some of them do besides:

- `conv_weight_gradient` and `linear_weight_gradient`, where they belong to a layer, look up its
  `State` when they run. They read `lambda_`, add their sums to `State.pending` (the micro-batches
  of a step) and set `State.last` (the diagnosis).
- `estimated_gram_sum` draws from the default random generator of the device.

Two such calls with equal arguments are not interchangeable, which the tag `nondeterministic_seeded`
tells PyTorch. `patch_gram_sum` depends on its arguments alone. Why this is safe:

- **Eager mode** calls the functions themselves, once for each backward pass through the layer.
  Activation checkpointing repeats only the forward pass, with the same random numbers.
- **Compiled graphs** keep every tagged call: PyTorch checks the tag before it merges equal calls
  (`fx_graph_cse`), folds constants or drops calls (Inductor's scheduler). The dead-code elimination
  of fx ignores the tag during compilation, but it removes only calls whose results nobody uses, and
  a weight gradient is always an output of the backward graph. The partitioner repeats no call:
  weight gradients belong to the backward graph, and Gram sums are used only there, so that it moves
  the sums of a checkpointed region to that graph. The order of the calls is free, since sums over
  micro-batches do not depend on it; the ordered effects of `torch.library` would add nothing. Older
  versions of `fx_graph_cse` ignore the tag: with them, a layer that one graph calls twice on the
  same tensor counts as one micro-batch.
- **CUDA graphs** replay kernels without running the functions: `lambda_` and the count of
  micro-batches would stay as they were at capture. The tag `cudagraph_unsafe` keeps the operators
  out of the graphs of `torch.compile(mode="reduce-overhead")`. Where PyTorch lacks the tag, avoid
  that mode; and do not capture a training step by hand (`torch.cuda.graph`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function that is an operator of PyTorch inside a compiled graph, and itself elsewhere.

    Eager mode bypasses the operator because its first call imports the compiler, which takes much
    memory (measurements: benchmarks/tract_design_notes.md).
    """

    def __init__(self, name: str, function: Callable[..., Any], *, repeatable: bool) -> None:
        self.function = function
        tags = [] if repeatable else [torch.Tag.nondeterministic_seeded]
        if hasattr(torch.Tag, "cudagraph_unsafe"):  # PyTorch 2.4 does not have it
            tags.append(torch.Tag.cudagraph_unsafe)
        takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
        keywords: dict[str, Any] = {"tags": tags} if takes_tags else {}
        self.op = torch.library.custom_op(
            f"tract_det::{name}", function, mutates_args=(), **keywords
        )

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers shapes and dtypes of the results, as `torch.library.custom_op` does."""
        self.op.register_fake(fake)
        return fake

    def __call__(self, *args: Any) -> Any:
        """Calls the operator while a graph is compiled, and the function elsewhere."""
        return self.op(*args) if torch.compiler.is_compiling() else self.function(*args)


def operator(name: str, *, repeatable: bool) -> Callable[[Callable[..., Any]], Operator]:
    """Makes the decorated function an `Operator`.

    Args:
        name: within the namespace `tract_det`.
        repeatable: whether two calls with equal arguments are interchangeable: neither draws random
            numbers nor touches the state of a layer.
    """
    return lambda function: Operator(name, function, repeatable=repeatable)
