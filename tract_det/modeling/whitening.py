"""Filters that whiten the patches of images: an initialisation of the first layer.

They are the eigenvectors of the patches' covariance, each divided by the square root of its
eigenvalue, with both signs, as a rectifier cuts off half of a filter's response. Source: Jordan,
"94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024, arXiv 2404.00498). Symbols: see
`tract.gram`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.tract.gram import patch_count, patch_gram_sum, row_gram_sum

# What is added to the eigenvalues, as a fraction of their mean: the source's 5e-4 is for pixels of
# variance 1. It keeps the directions that hold only noise from being magnified without bound.
_EPS = 5e-4

# Whole classes, since a subclass may change the weight or the input before it convolves.
_KNOWN = ("Conv2d", "Conv2dSame", "Linear")  # Conv2dSame: timm's; detectron2's has the same name


def check_whitens(layer: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """Returns the layer; refuses one that cannot be initialised by whitening filters.

    Args:
        layer: the first layer of a model.
        name: of the layer, for the message.

    Raises:
        UserError: it is neither a linear layer nor a convolution of one group.
    """
    groups = getattr(layer, "groups", 1)
    if type(layer).__name__ in _KNOWN and isinstance(layer, nn.Conv2d | nn.Linear) and groups == 1:
        return layer
    raise UserError(
        f"MODEL.STEM_INIT whitened: the first layer, '{name}', is a {type(layer).__name__} with "
        f"groups {groups}; it takes a Conv2d with groups 1 or a Linear: leave the key empty"
    )


class _SeenError(Exception):
    """Ends a forward pass: its first layer has been reached."""


def inputs_of(network: nn.Module, layer: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What a layer sees of each batch, in evaluation mode; nothing after it is computed.

    Args:
        network: takes batches of images.
        layer: of the network.
        batches: as the network takes them.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())
        raise _SeenError

    with _evaluating(network), torch.no_grad():
        handle = layer.register_forward_pre_hook(stop)
        try:
            for batch in batches:
                with suppress(_SeenError):
                    network(batch)
                yield from seen
                seen.clear()
        finally:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def patch_covariance(inputs: Iterable[Tensor], layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The covariance of the patches that lie within the images.

    Args:
        inputs: `(B, C, H, W)` of a convolution, `(..., K)` of a linear layer; sizes may differ.
        layer: for its kernel size, stride and dilation.

    Returns:
        `(K, K)`, float64, K in the order of `weight.flatten(1)`.

    Raises:
        UserError: there are no patches, or all are the same.
    """
    K = layer.weight[0].numel()
    total, patch = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    N = 0
    for input in inputs:
        sums = _sums(input, layer)
        total, patch, N = total + sums[0], patch + sums[1], N + sums[2]
    gram, mean = total / max(1, N), patch / max(1, N)
    covariance = gram - torch.outer(mean, mean)
    if covariance.trace() > 1e-12 * gram.trace():
        return covariance
    raise UserError(
        "MODEL.STEM_INIT whitened: the patches of the training images have no variance: check the "
        "images, or leave the key empty"
    )


def _sums(input: Tensor, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor, int]:
    """`X^T X`, `(K, K)`, the sum of the patches, `(K,)`, and N."""
    if isinstance(layer, nn.Linear):
        rows = input.reshape(-1, input.shape[-1])
        return row_gram_sum(rows), rows.double().sum(0), len(rows)
    geometry = (layer.kernel_size, layer.stride, 0, layer.dilation)
    count = patch_count(input, *geometry)
    rows_of, columns_of = (
        [
            slice(tap * dilation, tap * dilation + size - dilation * (kernel - 1), stride)
            for tap in range(kernel)
        ]
        for size, kernel, stride, dilation in zip(
            input.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )
    taps = [input[:, :, y, x].double().sum((0, 2, 3)) for y in rows_of for x in columns_of]
    return patch_gram_sum(input, *geometry)[0], torch.stack(taps, 1).flatten(), count


def whitening_weight(covariance: Tensor, weight: Tensor) -> Tensor:
    """The weight of a layer whose responses to the patches are uncorrelated, with equal variance.

    The rows are `+v, -v` of the eigenvectors `v`, by falling eigenvalue, as many as there are
    output channels; channels beyond the `2 K` rows keep their weights. All rows have one factor: it
    gives the responses the mean variance that those of `weight` have, so that the learning rates
    of the recipe and the scale of all that follows stay as they are.

    Args:
        covariance: of the patches, `(K, K)`, float64.
        weight: as it is initialised by default, `(M, ...)` with K values for each channel.

    Returns:
        In the shape and dtype of `weight`.
    """
    default = weight.detach().double().flatten(1)
    eigenvalues, vectors = (part.flip(-1) for part in torch.linalg.eigh(covariance))
    eigenvalues = eigenvalues.clamp(min=0)
    filters = vectors.mT / (eigenvalues + _EPS * eigenvalues.mean()).sqrt()[:, None]
    rows = torch.stack((filters, -filters), 1).flatten(0, 1)[: len(default)]
    ratio = _variance(default, covariance) / _variance(rows, covariance)
    whole = torch.cat((rows * math.sqrt(ratio), default[len(rows) :]))
    return whole.reshape(weight.shape).to(weight.dtype)


def _variance(rows: Tensor, covariance: Tensor) -> float:
    """The mean over the rows `(M, K)` of the variance of their responses."""
    return float(((rows @ covariance) * rows).sum(1).mean())
