"""A second TrAct, slow and obvious, in float64, with which the package is compared."""

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(
    images: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    mode: str,
) -> Tensor:
    """All patches of the padded images, `(N, C, kh, kw)`, in float64.

    `padding` is (left, right, top, bottom).
    """
    if any(padding):
        images = F.pad(images.double(), padding, mode="constant" if mode == "zeros" else mode)
    images = images.double()
    height, width = images.shape[-2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = []
    for image in images:
        for top in range(0, height - reach[0] + 1, stride[0]):
            for left in range(0, width - reach[1] + 1, stride[1]):
                window = image[:, top : top + reach[0], left : left + reach[1]]
                windows.append(window[:, :: dilation[0], :: dilation[1]])
    return torch.stack(windows)


def tract_gradient(X: Tensor, dZ: Tensor, lambda_: float) -> tuple[Tensor, Tensor, Tensor]:
    """`dZ^T X (G + lambda_ I)^-1` by an explicit inverse, `dZ^T X` and `G + lambda_ I`.

    X is `(N, K)`, dZ is `(N, M)`, and `G` is `X^T X / N`.
    """
    X, dZ = X.double(), dZ.double()
    plain = dZ.T @ X
    damped = X.T @ X / len(X) + lambda_ * torch.eye(X.shape[1], dtype=torch.float64)
    return plain @ torch.linalg.inv(damped), plain, damped


def power_gradient(X: Tensor, dZ: Tensor, lambda_: float, power: float) -> Tensor:
    """`dZ^T X (G + lambda_ I)^-power`, `(M, K)`, by the singular values of `X`; as above."""
    X, dZ = X.double(), dZ.double()
    _, singular, V = torch.linalg.svd(X, full_matrices=True)
    eigenvalues = torch.full((X.shape[1],), lambda_, dtype=torch.float64)
    eigenvalues[: len(singular)] += singular**2 / len(X)
    return dZ.T @ X @ V.T @ torch.diag(eigenvalues**-power) @ V


def conv_gradient(
    conv: torch.nn.Conv2d, images: Tensor, dZ: Tensor, lambda_: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`tract_gradient` of a convolution, group by group: three tensors `(groups, ...)`."""
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left) = (t // 2 for t in totals)
        padding = (left, totals[1] - left, top, totals[0] - top)
    elif conv.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        padding = (conv.padding[1],) * 2 + (conv.padding[0],) * 2
    X = patches(images, conv.kernel_size, conv.stride, padding, conv.dilation, conv.padding_mode)
    dZ = dZ.movedim(1, -1).flatten(0, 2)  # (B, M, Ho, Wo) to (N, M)
    groups = [
        tract_gradient(x.flatten(1), z, lambda_)
        for x, z in zip(X.chunk(conv.groups, 1), dZ.chunk(conv.groups, 1), strict=True)
    ]
    return tuple(torch.stack(parts) for parts in zip(*groups, strict=True))
