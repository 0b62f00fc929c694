"""Which way a device takes, and what it may use for it: the only place that asks for the device.

A CPU cuts its sums into blocks that stay in the cache. An accelerator cuts them into few, large
launches (`launches.py`), reads nothing back, and on CUDA computes what needs the input alone on a
stream of its own, beside the forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ContextManager  # noqa: UP035 - an annotation of a function that is compiled

import torch
from torch import Tensor

from tract_det.tract.state import TrActError


@dataclass
class _Settings:
    """Of the process.

    Attributes:
        workspace: bytes that the sums on an accelerator may take.
        always: whether tensors on the CPU go the way of accelerators.
    """

    workspace: int = 256 * 2**20
    always: bool = False


_SETTINGS = _Settings()


def set_workspace(mebibytes: int) -> None:
    """Bounds the memory that TrAct takes on an accelerator, beyond that of the plain layer.

    It is 256 MiB unless set, for each TrAct layer that computes. With less memory the sums take
    more launches.

    Raises:
        TrActError: it is not positive.
    """
    if mebibytes < 1:
        raise TrActError(f"the workspace is {mebibytes} MiB: it must be at least 1")
    _SETTINGS.workspace = mebibytes * 2**20


def workspace() -> int:
    """Bytes that the sums on an accelerator may take."""
    return _SETTINGS.workspace


def is_accelerated(tensor: Tensor) -> bool:
    """Whether the sums of this tensor go the way of accelerators."""
    return _SETTINGS.always or tensor.device.type != "cpu"


@contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Sends tensors on the CPU the way of accelerators: for tests and measurements."""
    before, _SETTINGS.always = _SETTINGS.always, True
    try:
        yield
    finally:
        _SETTINGS.always = before


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _has_streams(tensor: Tensor) -> bool:
    # A fake tensor can be on CUDA where there is none.
    return tensor.device.type == "cuda" and torch.cuda.is_available()


@contextmanager
def beside_forward(input: Tensor) -> Iterator[None]:
    """On CUDA, what is launched here runs on a stream of its own, after what made `input`."""
    if not _has_streams(input):
        yield
        return
    side = _SIDE_STREAMS.get(input.device)
    if side is None:
        side = _SIDE_STREAMS[input.device] = torch.cuda.Stream(input.device)
    side.wait_stream(torch.cuda.current_stream(input.device))
    with torch.cuda.stream(side):
        yield
    # Without a backward pass, the memory of the input could be used again before `side` is done.
    input.record_stream(side)


def await_beside(*tensors: Tensor | None) -> None:
    """The current stream waits for what `beside_forward` has launched; the host does not.

    Args:
        tensors: what it made and the current stream uses.
    """
    for tensor in tensors:
        if tensor is None or tensor.device not in _SIDE_STREAMS:
            continue
        main = torch.cuda.current_stream(tensor.device)
        main.wait_stream(_SIDE_STREAMS[tensor.device])
        tensor.record_stream(main)


@contextmanager
def float32_products(precision: str = "highest") -> Iterator[None]:
    """Float32 products of matrices at this precision, whatever the user has set for the network.

    Args:
        precision: "highest", or "high" for products of TF32 where the hardware has them.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user chose by the newer `fp32_precision`, which excludes this one
        with _fp32_precision("ieee" if precision == "highest" else "tf32"):
            yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _fp32_precision(precision: str) -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def products_for_gram(x: Tensor) -> ContextManager[None]:
    """Precision of the products in `X^T X`: TF32 on CUDA, whose rounding costs `G` next to nothing.

    Errors of the gradient: benchmarks/tract_design_notes.md.
    """
    return float32_products("high" if x.device.type == "cuda" else "highest")


def products_for_gradient(dZ: Tensor) -> ContextManager[None]:
    """Precision of the products in `dZ^T X` on an accelerator.

    TF32 where `dZ` has half precision, which TF32 holds exactly; otherwise what the user has
    allowed the gradients of convolutions.
    """
    if dZ.device.type != "cuda":
        return nullcontext()
    is_half = dZ.dtype in (torch.float16, torch.bfloat16)
    return float32_products("high" if is_half or _convolutions_take_tf32() else "highest")


def _convolutions_take_tf32() -> bool:
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    if convolutions is not None:  # of PyTorch 2.9
        return bool(convolutions.fp32_precision != "ieee")
    return bool(torch.backends.cudnn.allow_tf32)
