"""Convolution and linear layer with PyTorch's forward pass and TrAct's weight gradient.

The weight gradient is an operator, which `torch.compile` does not trace. It looks up the settings
of its layer when it runs, so that a compiled model follows a schedule without recompilation. For
its side effects, see `operators`.
"""

from collections.abc import Callable
from typing import Any, Sequence, TypeVar  # noqa: UP035 - torch 2.4 takes only this one in an operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tract_det.tract.device import await_beside, beside_forward, is_accelerated
from tract_det.tract.gradient import conv_gradient, linear_gradient
from tract_det.tract.operators import operator
from tract_det.tract.solve import (
    damped_factor,
    damped_power,
    damped_power_rows,
    damped_solve,
    damped_solve_rows,
    effective_lambda,
    float64_is_cheap,
    needs_float64,
    solve_with,
    trace,
)
from tract_det.tract.state import NO_KEY, STATES, Diagnosis, State, TrActError
from tract_det.tract.sums import Sums
from tract_det.tract.windows import Windows, windows_of

SumsT = TypeVar("SumsT", Sums, Sums | None)


def _settings(lambda_: float, key: int) -> tuple[float, bool, State | None]:
    """`lambda_`, whether it is relative, and the layer's state (None without a layer)."""
    if key == NO_KEY:
        return lambda_, False, None
    state = STATES.get(key)
    if state is None:
        raise TrActError(
            "a TrAct layer was deleted between its forward and its backward pass: keep a reference "
            "to the model until the backward pass is done"
        )
    return state.lambda_, state.relative, state


def _damping(total: Tensor, count: Tensor, lambda_: float, relative: bool) -> Tensor:
    """The damping of each group, `(groups,)`, float64."""
    return effective_lambda(trace(total) / (count * total.shape[-1]), lambda_, relative)


def _needs_float64(dZ: Tensor, total: Tensor, count: Tensor, lambda_: float, key: int) -> bool:
    """Whether `dZ^T X` has to be computed in float64.

    Never on an accelerator: to read the answer back would wait for it, and centred products suffice
    there (`launches`).
    """
    if is_accelerated(dZ):
        return False
    if float64_is_cheap(dZ, total.shape[-1]):
        return True
    value, relative, _ = _settings(lambda_, key)
    gram_trace = trace(total) / count.clamp(min=1)
    damping = effective_lambda(gram_trace / total.shape[-1], value, relative)
    return needs_float64(gram_trace, damping)


def prepared(
    sums: Callable[[], SumsT], input: Tensor, *, lambda_: float = 0.0, key: int = NO_KEY
) -> SumsT:
    """The sums over a layer's input; on an accelerator made beside the forward pass, and factored.

    Args:
        sums: makes them.
        input: of the layer.
        lambda_: damping; not used where `key` names a layer.
        key: key of the layer's state, or `NO_KEY`.
    """
    if torch.compiler.is_compiling() or not is_accelerated(input):
        return sums()
    with torch.no_grad(), beside_forward(input):
        made = sums()
        return made if made is None else made._replace(factor=_factor(made, lambda_, key))


def _factor(sums: Sums, lambda_: float, key: int) -> Tensor | None:
    """The Cholesky factor of `X^T X + N lambda_ I`; None if it takes more than these sums."""
    lambda_, relative, state = _settings(lambda_, key)
    if state is not None and (state.pending is not None or state.power != 1):
        return None
    N = sums.number.clamp(min=1)
    damping = _damping(sums.total, N, lambda_, relative)
    return damped_factor(sums.total, damping * N, dtype=torch.float64)


def _solve(
    plain: Tensor,
    total: Tensor,
    count: Tensor,
    factor: Tensor | None,
    lambda_: float,
    key: int,
) -> Tensor:
    """TrAct's gradient, `(groups, M, K)`; zero before the last micro-batch of a step.

    Args:
        plain: `dZ^T X`, `(groups, M, K)`.
        total: `X^T X`, `(groups, K, K)`.
        count: `N`, a scalar.
        factor: as in `Sums`.
        lambda_: damping, where there is no layer.
        key: key of the layer's state, or `NO_KEY`.
    """
    lambda_, relative, state = _settings(lambda_, key)
    if state is not None and state.pending is not None:
        totals = state.pending.add(total, count, plain)
        if totals is None:
            return torch.zeros_like(plain)
        total, count, plain = totals
    N = count.clamp(min=1)
    damping = _damping(total, N, lambda_, relative)
    if factor is not None:
        solved = solve_with(factor, plain) * N
    elif state is None or state.power == 1:
        # N G + N lambda_ instead of G + lambda_: saves a division of all K^2 entries.
        solved = damped_solve(plain, total, damping * N) * N
    else:
        solved = damped_power(plain, total / N, damping, state.power)
    if state is not None:
        # A copy: an operator must not keep its arguments.
        state.last = Diagnosis(total.clone(), N, damping, plain.norm(), solved.norm())
    return solved


def _solve_rows(plain: Tensor, X: Tensor, lambda_: float, key: int) -> Tensor:
    """TrAct's gradient, `(1, M, K)`, for a linear layer with fewer rows than columns."""
    lambda_, relative, state = _settings(lambda_, key)
    rows = X.double()[None]
    mean_square = rows.square().sum((1, 2)) / max(1, rows[0].numel())
    damping = effective_lambda(mean_square, lambda_, relative)
    if state is None or state.power == 1:
        solved = damped_solve_rows(plain, rows, damping)
    else:
        solved = damped_power_rows(plain, rows, damping, state.power)
    if state is not None:
        N = damping.new_full((), max(1, rows.shape[1]))
        norms = (plain.norm(), solved.norm())
        state.last = Diagnosis(rows @ rows.mT, N, damping, *norms, singular=True)
    return solved


def _result(solved: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor, as the operators promise."""
    return solved.to(dtype, memory_format=torch.contiguous_format).contiguous()


@operator("conv_weight_gradient", repeatable=False)
def _conv_weight_gradient(
    dZ: Tensor,
    input: Tensor,
    total: Tensor,
    count: Tensor,
    factor: Tensor | None,
    geometry: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    bias: bool,
    lambda_: float,
    key: int,
) -> tuple[Tensor, Tensor]:
    exact = _needs_float64(dZ, total, count, lambda_, key)
    plain, grad_bias = conv_gradient(
        input.detach(), dZ.detach(), Windows.unpack(geometry), groups, bias=bias, exact=exact
    )
    by_group = plain.reshape(groups, -1, total.shape[-1])
    solved = _solve(by_group, total, count, factor, lambda_, key).reshape(plain.shape)
    return _result(solved, dtype), grad_bias.to(dtype)


@_conv_weight_gradient.register_fake
def _(dZ, input, total, count, factor, geometry, groups, dtype, *others):  # type: ignore[no-untyped-def]
    size = (dZ.shape[1], input.shape[1] // groups, *Windows.unpack(geometry).kernel)
    return dZ.new_empty(size, dtype=dtype), dZ.new_empty(dZ.shape[1], dtype=dtype)


@operator("linear_weight_gradient", repeatable=False)
def _linear_weight_gradient(
    dZ: Tensor,
    input: Tensor,
    total: Tensor | None,
    count: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    lambda_: float,
    key: int,
) -> Tensor:
    X, dZ = input.detach().reshape(-1, input.shape[-1]), dZ.detach().reshape(-1, dZ.shape[-1])
    if total is None or count is None:
        solved = _solve_rows(linear_gradient(X, dZ, True)[None], X, lambda_, key)
    else:
        plain = linear_gradient(X, dZ, _needs_float64(dZ, total, count, lambda_, key))
        solved = _solve(plain[None], total, count, factor, lambda_, key)
    return _result(solved[0], dtype)


@_linear_weight_gradient.register_fake
def _(dZ, input, total, count, factor, dtype, *others):  # type: ignore[no-untyped-def]
    return dZ.new_empty((dZ.shape[-1], input.shape[-1]), dtype=dtype)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        total: Tensor,
        count: Tensor,
        factor: Tensor | None,
        conv: tuple[Any, ...],
        lambda_: float,
        key: int,
    ) -> Tensor:
        ctx.conv, ctx.lambda_, ctx.key, ctx.dtype = conv, lambda_, key, weight.dtype
        ctx.geometry = windows_of(input.shape[2:], weight.shape[2:], *conv[:3]).pack()
        trained = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(input, trained, total, count, factor)
        # Detached because autocast caches its low-precision copy of a weight that requires grad. A
        # copy made here has no autograd history, and other uses of the weight would get it.
        return F.conv2d(input, weight.detach(), None if bias is None else bias.detach(), *conv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, *sums = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.conv
        await_beside(*sums)
        grad_input = None
        with torch.autocast(dZ.device.type, enabled=False):
            if weight is not None:
                x, w = input.to(dZ.dtype), weight.to(dZ.dtype)
                grad_input, _, _ = torch.ops.aten.convolution_backward(
                    *(dZ, x, w, None, stride, padding, dilation, False, (0, 0), groups),
                    output_mask=(True, False, False),
                )
                grad_input = grad_input.to(input.dtype)
            grad_weight, sum_dZ = _conv_weight_gradient(
                *(dZ, input, *sums, ctx.geometry, groups, ctx.dtype),
                *(ctx.needs_input_grad[2], ctx.lambda_, ctx.key),
            )
        grad_bias = sum_dZ if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, *(None,) * 6


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        total: Tensor | None,
        count: Tensor | None,
        factor: Tensor | None,
        lambda_: float,
        key: int,
    ) -> Tensor:
        ctx.lambda_, ctx.key, ctx.dtype = lambda_, key, weight.dtype
        trained = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(input, trained, total, count, factor)
        return F.linear(input, weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, *sums = ctx.saved_tensors
        await_beside(*sums)
        grad_input = grad_bias = None
        with torch.autocast(dZ.device.type, enabled=False):
            if weight is not None:
                grad_input = (dZ @ weight.to(dZ.dtype)).to(input.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = dZ.flatten(0, -2).sum(0, dtype=ctx.dtype) if dZ.dim() > 1 else dZ
            grad_weight = _linear_weight_gradient(dZ, input, *sums, ctx.dtype, ctx.lambda_, ctx.key)
        return grad_input, grad_weight, grad_bias, *(None,) * 5


def learning_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, ...],
    groups: int,
    sums: Sums,
    *,
    lambda_: float = 0.0,
    key: int = NO_KEY,
) -> Tensor:
    """`F.conv2d` with TrAct's weight gradient, given the sums over its input.

    Args:
        input: `(B, C, H, W)` or `(C, H, W)`.
        weight: `(M, C / groups, kh, kw)`.
        bias: `(M,)` or None.
        stride: as for `F.conv2d`.
        padding: as for `F.conv2d`.
        dilation: as for `F.conv2d`.
        groups: as for `F.conv2d`.
        sums: as `prepared` makes them.
        lambda_: damping; not used where `key` names a layer.
        key: key of the layer's state, or `NO_KEY`.
    """
    if input.dim() == 3:
        args = (weight, bias, stride, padding, dilation, groups, sums)
        return learning_conv2d(input[None], *args, lambda_=lambda_, key=key)[0]
    windows = windows_of(input.shape[2:], tuple(weight.shape[2:]), stride, padding, dilation)
    if padding == "same":  # as in F.conv2d: an odd zero goes after the image
        odd = [d * (k - 1) % 2 for d, k in zip(windows.dilation, windows.kernel, strict=True)]
        input = F.pad(input, (0, odd[1], 0, odd[0])) if any(odd) else input
    zeros = (-windows.origin[0], -windows.origin[1])
    conv = (windows.stride, zeros, windows.dilation, groups)
    return _Conv2d.apply(input, weight, bias, *sums, conv, lambda_, key)


def learning_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sums: Sums | None,
    *,
    lambda_: float = 0.0,
    key: int = NO_KEY,
) -> Tensor:
    """`F.linear` with TrAct's weight gradient, given the sums over its input.

    Args:
        input: `(..., K)`.
        weight: `(M, K)`.
        bias: `(M,)` or None.
        sums: as `prepared` makes them; None = solve the `N x N` system of this batch.
        lambda_: damping; not used where `key` names a layer.
        key: key of the layer's state, or `NO_KEY`.
    """
    return _Linear.apply(input, weight, bias, *(sums or (None, None, None)), lambda_, key)
