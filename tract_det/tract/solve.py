"""The damped solves against a Gram matrix: precision, damping, condition. Symbols: see `gram`.

The measurements behind the constants: benchmarks/tract_design_notes.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tract_det.tract.device import is_accelerated

# Beyond this condition number float32 loses the gradient. Standardised pixels stay below it, at
# about K / lambda_; pixels in [0, 255] with a `lambda_` meant for standardised ones exceed it.
_FLOAT32_CONDITION = 1e5
# `dZ^T X` is computed in float64 up to this number of operations: one or two small images.
_CHEAP_FLOPS = 4e8
# It is also computed in float64, as is `X^T X`, up to this number of patches per column of `X`.
FEW_PATCHES = 2
# Up to this K the diagnosis computes all eigenvalues; beyond it, so many steps of Lanczos's method
# find the extreme ones.
_EIGENVALUES_K = 256
_LANCZOS = 12
# Systems up to this K are solved in float64, which is cheap; larger ones in float32, at half the
# time, where their condition number allows it.
_FLOAT64_K = 512


def trace(gram: Tensor) -> Tensor:
    """`trace(G)` of each group, `(groups,)`."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def effective_lambda(mean_square: Tensor, lambda_: float, relative: bool) -> Tensor:
    """The damping of each group, `(groups,)`, float64.

    Args:
        mean_square: `trace(G) / K`, the mean square of the layer's input, `(groups,)`, float64.
        lambda_: damping.
        relative: whether `lambda_` is in units of `mean_square`.
    """
    if not relative:
        return torch.full_like(mean_square, lambda_)
    # A black batch has a mean square of zero. Its gradient is zero, and must not become NaN.
    return lambda_ * torch.where(mean_square == 0, 1.0, mean_square)


def needs_float64(gram_trace: Tensor, damping: Tensor) -> bool:
    """Whether float32 would lose the gradient in the solve. It is asked on a CPU only.

    Args:
        gram_trace: `trace(G)`, `(groups,)`.
        damping: `(groups,)`.
    """
    return bool((gram_trace > _FLOAT32_CONDITION * damping).any())


def float64_is_cheap(dZ: Tensor, K: int) -> bool:
    """Whether `dZ^T X` in float64 takes little time compared with a training step.

    The solve magnifies rounding errors along the many small eigenvalues of smooth photographs, and
    more so with few patches; float64 removes this error.

    Args:
        dZ: `(B, M, Ho, Wo)` or `(N, M)`.
        K: patch length.
    """
    few = dZ.numel() <= FEW_PATCHES * K * dZ.shape[1]
    return few or 2 * dZ.numel() * K <= _CHEAP_FLOPS


def damped_factor(gram: Tensor, lambda_: float | Tensor, *, dtype: torch.dtype) -> Tensor:
    """The Cholesky factor `L` of `G + lambda_ I = L L^T`.

    Args:
        gram: `G`, `(groups, K, K)`.
        lambda_: damping, a number, or one for each group, `(groups,)`.
        dtype: of the gradient that is to be solved for; it decides the precision.

    Returns:
        `(groups, K, K)`, lower triangular; NaN for groups that are not positive definite.
    """
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=gram.device)
    large = gram.shape[-1] > _FLOAT64_K and not is_accelerated(gram)
    fast = large and dtype == torch.float32 and not needs_float64(trace(gram), damping)
    damped = gram.to(torch.float32 if fast else torch.float64, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    factor, info = torch.linalg.cholesky_ex(damped)
    return factor.masked_fill_((info != 0)[..., None, None], torch.nan)


def solve_with(factor: Tensor, grad: Tensor) -> Tensor:
    """`grad (L L^T)^-1`, `(groups, M, K)`, in the dtype of `grad`."""
    # Solving from the right keeps the rows in place: faster than `cholesky_solve`.
    half = torch.linalg.solve_triangular(factor.mT, grad.to(factor.dtype), upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).to(grad.dtype)


def damped_solve(grad: Tensor, gram: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (G + lambda_ I)^-1` by a Cholesky decomposition.

    Args:
        grad: plain weight gradient `dZ^T X`, `(groups, M, K)`.
        gram: `G`, `(groups, K, K)`.
        lambda_: damping, a number, or one for each group, `(groups,)`.

    Returns:
        `(groups, M, K)` in the dtype of `grad`; NaN for groups that are not positive definite.
    """
    return solve_with(damped_factor(gram, lambda_, dtype=grad.dtype), grad)


def damped_solve_rows(grad: Tensor, rows: Tensor, lambda_: float | Tensor) -> Tensor:
    """`grad (X^T X / N + lambda_ I)^-1` through an `N x N` system, which is cheaper if N < K.

    By Woodbury's identity,
    `(X^T X / N + lambda_ I)^-1 = (I - X^T (X X^T + N lambda_ I)^-1 X) / lambda_`.

    Args:
        grad: plain weight gradient `dZ^T X`, `(..., M, K)`.
        rows: `X`, `(..., N, K)`.
        lambda_: damping, positive; a number, or `(...)`.

    Returns:
        `(..., M, K)` in the dtype of `grad`; NaN where the system is not positive definite.
    """
    X, g = rows.double(), grad.double()
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=X.device)
    inner = damped_solve(g @ X.mT, X @ X.mT, damping * X.shape[-2])
    return ((g - inner @ X) / damping[..., None, None]).to(grad.dtype)


def damped_power(grad: Tensor, gram: Tensor, lambda_: float | Tensor, power: float) -> Tensor:
    """`grad (G + lambda_ I)^-power` by an eigenvalue decomposition in float64.

    There is no further factor. The powers 0 and 1 are then the plain gradient and TrAct's, whose
    learning rates are known, and along each eigenvector of `G` a power between them gives the
    weighted geometric mean of the two: where `G + lambda_ I` has the eigenvalue 1, as in the
    direction of a pixel that is standardised and independent of all others, they all agree.

    Powers of the input's covariance as a preconditioner: Yoshida and Nitanda, "How Does
    Preconditioning Guide Feature Learning in Deep Neural Networks?" (2025, arXiv 2509.25637), whose
    exponent is `-power`.

    Args:
        grad: plain weight gradient `dZ^T X`, `(groups, M, K)`.
        gram: `G`, `(groups, K, K)`.
        lambda_: damping, positive; a number, or one for each group, `(groups,)`.
        power: at least 0; for 1, `damped_solve` takes less time.

    Returns:
        `(groups, M, K)` in the dtype of `grad`; NaN for groups that are not finite.
    """
    if power == 0:
        return grad
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=gram.device)
    eigenvalues, vectors, failed = _eigh(gram)
    factors = (eigenvalues + damping[..., None]) ** -power
    solved = (grad.double() @ vectors * factors[..., None, :]) @ vectors.mT
    return (solved + failed).to(grad.dtype)


def damped_power_rows(grad: Tensor, rows: Tensor, lambda_: float | Tensor, power: float) -> Tensor:
    """`grad (X^T X / N + lambda_ I)^-power` through an `N x N` system, which is cheaper if N < K.

    With the eigenvalues `s` and eigenvectors `U` of `X X^T / N`,
    `(X^T X / N + lambda_ I)^-p = lambda_^-p I + X^T U f(s) U^T X / N`, where
    `f(s) = ((s + lambda_)^-p - lambda_^-p) / s`. For `p = 1` this is Woodbury's identity.

    Args:
        grad: plain weight gradient `dZ^T X`, `(..., M, K)`.
        rows: `X`, `(..., N, K)`.
        lambda_: damping, positive; a number, or `(...)`.
        power: as for `damped_power`.

    Returns:
        `(..., M, K)` in the dtype of `grad`; NaN where the system is not finite.
    """
    if power == 0:
        return grad
    X, g = rows.double(), grad.double()
    damping = torch.as_tensor(lambda_, dtype=torch.float64, device=X.device)[..., None]
    N = X.shape[-2]
    eigenvalues, vectors, failed = _eigh(X @ X.mT / N)
    ratio = (eigenvalues / damping).clamp(
        min=1e-12
    )  # f is continuous: at 0 it is -p lambda_^(-p-1)
    factors = torch.expm1(-power * torch.log1p(ratio)) / (ratio * damping * N)
    inner = (g @ X.mT @ vectors * factors[..., None, :]) @ vectors.mT
    solved = (g + inner @ X) * damping[..., None] ** -power
    return (solved + failed).to(grad.dtype)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, not below 0, eigenvectors, and 0 or, where `gram` is not finite, NaN."""
    is_finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(is_finite, gram, 0.0).double()
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues.clamp(min=0), vectors, torch.where(is_finite, 0.0, torch.nan)


def condition_number(gram: Tensor, damping: Tensor, *, singular: bool = False) -> Tensor:
    """The largest condition number of `G + lambda_ I` over the groups; to 5 % for large K.

    Args:
        gram: `G`, `(groups, K, K)`, or `X X^T / N`, which lacks only eigenvalues of zero.
        damping: `(groups,)`.
        singular: `G` has eigenvalues of zero that `gram` lacks.

    Returns:
        A scalar, at most the condition number; NaN where `G` is not finite.
    """
    is_finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(is_finite[:, None, None], gram, 0.0).double()
    if gram.shape[-1] <= _EIGENVALUES_K:
        eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
        largest, least = eigenvalues[..., -1] + damping, eigenvalues[..., 0] + damping
    else:
        damped = gram + torch.diag_embed(damping[:, None].expand(-1, gram.shape[-1]))
        largest = _largest_eigenvalue(lambda v: damped @ v, gram)
        factor = damped_factor(gram, damping, dtype=torch.float64)
        least = 1 / _largest_eigenvalue(lambda v: torch.cholesky_solve(v, factor), gram)
    condition = largest / (damping if singular else least)
    return torch.where(is_finite, condition, torch.nan).max()


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest eigenvalue of a symmetric operator on vectors, by Lanczos's method.

    Args:
        apply: of `(groups, K, 1)` to the same.
        like: `(groups, K, K)`, for number, size and device.

    Returns:
        `(groups,)`, float64.
    """
    K = like.shape[-1]
    # Any vector does that no structure of pixels makes orthogonal to an eigenvector.
    start = torch.cos(torch.arange(K, dtype=torch.float64, device=like.device).square() + 1)
    basis = (start / start.norm()).expand(len(like), 1, K)
    images = apply(basis.mT).mT
    for _ in range(min(K, _LANCZOS) - 1):
        rest = images[:, -1:]
        for _ in range(2):  # once leaves rounding errors in the directions already there
            rest = rest - rest @ basis.mT @ basis
        new = rest / rest.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
        basis = torch.cat((basis, new), 1)
        images = torch.cat((images, apply(new.mT).mT), 1)
    projected = images @ basis.mT
    finite = torch.where(projected.isfinite(), projected, 0.0)
    return torch.linalg.eigvalsh((finite + finite.mT) / 2)[..., -1]
