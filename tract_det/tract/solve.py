"""The damped solves against a Gram matrix, and what can be said of them. Symbols: see `gram`."""

import torch
from torch import Tensor

# Beyond this condition float32 loses the gradient: [0, 255] pixels with a lambda that is meant for
# standardised ones. Standardised pixels have K / lambda_, some thousands.
_FLOAT32_CONDITION = 1e5
# Up to so many operations `dZ^T X` is made in float64: one or two small images.
_CHEAP_FLOPS = 4e8
# And up to so many patches for each column of `X`; `X^T X` as well, where K is large.
FEW_PATCHES = 2
# Larger systems are solved in float32 where their condition allows: D 8 ms, 14 in float64 (see
# `gram`, on two threads); below, the solve is cheap.
_FLOAT64_K = 512


def trace(gram: Tensor) -> Tensor:
    """`trace(G)` of each group, `(groups,)`."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def effective_lambda(mean_square: Tensor, lambda_: float, relative: bool) -> Tensor:
    """The damping of each group, `(groups,)`, float64.

    Args:
        mean_square: `trace(G) / K`, the mean square of the layer's input, `(groups,)`, float64.
        lambda_: damping.
        relative: `lambda_` is in units of `mean_square`.
    """
    # A black batch has no scale of its own; its gradient is zero, and must not become NaN.
    unit = torch.where(mean_square == 0, 1.0, mean_square) if relative else 1.0
    return lambda_ * torch.ones_like(mean_square) * unit


def needs_float64(gram_trace: Tensor, damping: Tensor) -> bool:
    """Whether float32 would lose the gradient in the solve that follows.

    Decided on the CPU alone: reading a number back from another device would wait for it. There the
    cheap parts are float64 in any case, and products as the framework makes them.

    Args:
        gram_trace: `trace(G)`, `(groups,)`.
        damping: `(groups,)`.
    """
    if gram_trace.device.type != "cpu":
        return False
    return bool((gram_trace > _FLOAT32_CONDITION * damping).any())


def is_cheap(dZ: Tensor, K: int) -> bool:
    """Whether `dZ^T X` in float64 costs next to nothing beside a network's step.

    The solve magnifies rounding along the many small eigenvalues of smooth photographs, and more
    where there are few patches: in float32 it leaves an error of 1e-5 to 1e-4 of the gradient, in
    float64 1e-8. Two images of 192 pixels and a 7x7/2 stem: 9 ms on two threads, 2 in float32.

    Args:
        dZ: `(B, M, Ho, Wo)` or `(N, M)`.
        K: patch length.
    """
    few = dZ.numel() <= FEW_PATCHES * K * dZ.shape[1]
    return dZ.device.type == "cpu" and (few or 2 * dZ.numel() * K <= _CHEAP_FLOPS)


def damped_solve(grad: Tensor, gram: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (G + lambda_ I)^-1` by Cholesky.

    Args:
        grad: plain weight gradient `dZ^T X`, `(groups, M, K)`.
        gram: `G`, `(groups, K, K)`.
        lambda_: damping, a number, or one of each group, `(groups,)`.

    Returns:
        `(groups, M, K)` in the dtype of `grad`; NaN for a group that is not positive definite.
    """
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=gram.device)
    large = gram.shape[-1] > _FLOAT64_K and gram.device.type == "cpu"
    fast = large and grad.dtype == torch.float32 and not needs_float64(trace(gram), damping)
    dtype = torch.float32 if fast else torch.float64
    damped = gram.to(dtype, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    factor, info = torch.linalg.cholesky_ex(damped)
    # From the right as the rows lie: D 17 ms on one thread, 20 with `cholesky_solve`.
    half = torch.linalg.solve_triangular(factor.mT, grad.to(dtype), upper=True, left=False)
    solved = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    failed = torch.where(info == 0, 0.0, torch.nan).to(dtype)
    return (solved + failed[..., None, None]).to(grad.dtype)


def damped_solve_rows(grad: Tensor, rows: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (X^T X / N + lambda_ I)^-1` through an `N x N` system, cheaper if N < K.

    Woodbury: `(X^T X / N + lambda I)^-1 = (I - X^T (X X^T + N lambda I)^-1 X) / lambda`.

    Args:
        grad: plain weight gradient `dZ^T X`, `(..., M, K)`.
        rows: `X`, `(..., N, K)`.
        lambda_: damping, more than 0; a number, or `(...)`.

    Returns:
        `(..., M, K)` in the dtype of `grad`; NaN where the system is not positive definite.
    """
    X, g = rows.double(), grad.double()
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=X.device)
    inner = damped_solve(g @ X.mT, X @ X.mT, damping * X.shape[-2])
    return ((g - inner @ X) / damping[..., None, None]).to(grad.dtype)


def condition_number(gram: Tensor, damping: Tensor, *, singular: bool = False) -> Tensor:
    """The largest condition number of `G + lambda_ I` over the groups; NaN where `G` is not finite.

    Args:
        gram: `G`, `(groups, K, K)`, or `X X^T / N`, with the same eigenvalues but for zeros.
        damping: `(groups,)`.
        singular: `G` has eigenvalues of zero besides those of `gram`.
    """
    if not bool(gram.isfinite().all()):
        return damping.new_full((), torch.nan)
    eigenvalues = torch.linalg.eigvalsh(gram.double()).clamp(min=0)
    least = damping if singular else eigenvalues[..., 0] + damping
    return ((eigenvalues[..., -1] + damping) / least).max()
