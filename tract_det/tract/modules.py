"""The two layers as modules, with the parameters, state-dict keys and outputs of their parents."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det.tract.autograd import learning_conv2d, learning_linear, prepared
from tract_det.tract.solve import condition_number
from tract_det.tract.state import Pending, State, TrActError, check_lambda
from tract_det.tract.sums import Sums, conv_sums, over_ranks, smaller_system
from tract_det.tract.windows import touching, windows_of


class TrActLayer(nn.Module):
    """What all TrAct layers have in common.

    Attributes:
        tract: settings, and what the layer keeps between passes. Unless `tract.sync` is False,
            every rank of a process group must take part in every training forward pass.
    """

    tract: State

    @property
    def lambda_(self) -> float:
        """Damping, in units of standardised inputs."""
        return self.tract.lambda_

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        self.tract.lambda_ = check_lambda(value)

    def learns(self, weight: Tensor) -> bool:
        """Whether TrAct computes the weight gradient of this forward pass."""
        trains = self.training and torch.is_grad_enabled() and weight.requires_grad
        return trains and self.tract.enabled

    def extra_repr(self) -> str:
        """The parent's representation and TrAct's settings."""
        return f"{super().extra_repr()}, {self.tract}"


class TrActConv2d(TrActLayer, nn.Conv2d):
    """`nn.Conv2d` with TrAct's weight gradient while the module is in training mode.

    Takes `nn.Conv2d`'s arguments and `lambda_`, the damping in units of standardised pixels.
    In evaluation mode, under `no_grad` and for a frozen weight it is `nn.Conv2d`, at no extra cost.

    Attributes:
        image_sizes: `(height, width)` of each image in a batch that is padded with zeros at the
            bottom and right; `G` then leaves the padding out. None = no padding.
        edges: whether `G` includes the windows that reach from an image into its padding.
    """

    image_sizes: Sequence[tuple[int, int]] | None = None
    edges: bool = False

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tract = State(lambda_)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.learns(weight):
            return super()._conv_forward(input, weight, bias)
        sums = self.prepared(lambda: self._sums(input.detach()), input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input), (0, 0)
        conv = (self.stride, padding, self.dilation, self.groups)
        return learning_conv2d(input, weight, bias, *conv, sums, key=self.tract.key)

    def prepared(self, sums: Callable[[], tuple[Tensor, int]], input: Tensor) -> Sums:
        """What the backward pass needs of `sums`, which makes `X^T X` and `N` of this rank."""
        sync, key = self.tract.sync, self.tract.key
        return prepared(lambda: over_ranks(*sums(), sync=sync), input, key=key)

    def _padded(self, input: Tensor) -> Tensor:
        """The input padded as the parent class pads it for modes other than "zeros"."""
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _sums(self, input: Tensor) -> tuple[Tensor, int]:
        """`X^T X` and `N` of the images, each without its padding."""
        sizes = self.image_sizes
        if sizes is None:
            return self._sums_of(input, self.tract.gram_patches)
        if len(sizes) != len(input):
            raise TrActError(
                f"image_sizes has {len(sizes)} entries for {len(input)} images: call "
                "set_image_sizes for each batch, with one (height, width) per image"
            )
        if all(tuple(size) == tuple(input.shape[-2:]) for size in sizes):
            return self._sums_of(input, self.tract.gram_patches)
        if self.edges:  # the padding adds nothing to `X^T X`, only `N` has to leave it out
            conv = (self.kernel_size, self.stride, self.padding, self.dilation)
            windows = windows_of(input.shape[-2:], *conv)
            total, _ = self._sums_of(input, self.tract.gram_patches)
            return total, sum(touching(size, windows) for size in sizes)
        parts = []
        for height, width in dict.fromkeys(map(tuple, sizes)):  # all images of one size at once
            images = [i for i, size in enumerate(sizes) if tuple(size) == (height, width)]
            patches = -(-self.tract.gram_patches * len(images) // len(sizes))
            parts.append(self._sums_of(input[images, :, :height, :width], patches))
        return torch.stack([total for total, _ in parts]).sum(0), sum(n for _, n in parts)

    def _sums_of(self, images: Tensor, patches: int) -> tuple[Tensor, int]:
        """`X^T X` and `N` of whole images, estimated from `patches` unless that is 0."""
        padding = self.padding
        if self.padding_mode != "zeros":
            images, padding = self._padded(images), (0, 0)
        conv = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        return conv_sums(images, *conv, patches=patches)


class TrActLinear(TrActLayer, nn.Linear):
    """`nn.Linear` with TrAct's weight gradient while the module is in training mode.

    Takes `nn.Linear`'s arguments and `lambda_`, the damping in units of standardised inputs.
    """

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tract = State(lambda_)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K)` to `(..., M)`."""
        if not self.learns(self.weight):
            return F.linear(input, self.weight, self.bias)
        pending = self.tract.pending is not None
        sync, key = self.tract.sync, self.tract.key
        sums = prepared(lambda: smaller_system(input, sync=sync, pending=pending), input, key=key)
        return learning_linear(input, self.weight, self.bias, sums, key=self.tract.key)


def tract_layers(model: nn.Module) -> Iterator[tuple[str, TrActLayer]]:
    """Name and module of every TrAct layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, TrActLayer):
            yield name, module


def set_lambda(model: nn.Module, lambda_: float | None) -> None:
    """Sets the damping of every TrAct layer, or switches TrAct off and on again, in place.

    Call it between steps, as often as a schedule requires; the optimizer and a compiled model need
    no change.

    Args:
        model: a model with TrAct layers; on any other model this does nothing.
        lambda_: damping, in the units that `apply_tract` was given. None switches TrAct off: the
            layers are then the plain ones, at no extra cost.

    Raises:
        TrActError: `lambda_` is not positive.
    """
    for _, module in tract_layers(model):
        module.tract.enabled = lambda_ is not None
        if lambda_ is None and module.tract.pending is not None:
            module.tract.pending.clear()
        if lambda_ is not None:
            module.lambda_ = lambda_


def set_micro_batches(model: nn.Module, micro_batches: int | Callable[[], bool]) -> None:
    """Makes training with gradient accumulation exact, in place.

    Call it once before training. Each backward pass but the last of a step then adds zero to the
    gradient of the stem, and the last one adds the gradient of the whole batch. Another call drops
    the sums of an unfinished step.

    Args:
        model: a model with TrAct layers; on any other model this does nothing.
        micro_batches: backward passes per step, 1 = no accumulation. Each must go through the layer
            once, with its share of the loss. Where the number varies or is not known in advance:
            a function that tells, during a backward pass, whether it is the last of its step.

    Raises:
        TrActError: `micro_batches` is less than 1.
    """
    if not callable(micro_batches) and micro_batches < 1:
        raise TrActError(f"micro_batches is {micro_batches}: it must be at least 1")
    for _, module in tract_layers(model):
        module.tract.pending = None if micro_batches == 1 else Pending(micro_batches)


def set_image_sizes(
    model: nn.Module, sizes: Sequence[tuple[int, int]] | None, *, edges: bool = False
) -> None:
    """Tells TrAct convolutions the sizes of the images in the next padded batch, in place.

    Args:
        model: a model with TrAct layers; on any other model this does nothing.
        sizes: `(height, width)` of each image in pixels, valid until the next call; None = no
            padding.
        edges: whether `G` includes the windows that see both a part of an image and its padding.
            Set it for models whose loss depends on the outputs there, as detectors do: their share
            of the gradient would otherwise be magnified by up to `1 / lambda_`. False: `G` is that
            of each image alone, without the padding.
    """
    for _, module in tract_layers(model):
        if isinstance(module, TrActConv2d):
            module.image_sizes, module.edges = sizes, edges


def tract_diagnostics(model: nn.Module) -> dict[str, float]:
    """Statistics of the last backward pass through the TrAct layers of a model, for a log.

    They are read from the device, so log them every few steps.

    Returns:
        `tract_lambda`, the effective damping (mean over groups); `tract_condition`, the condition
        number of `G + lambda_ I` (largest over groups, to 5 % for K above 256);
        `stem_plain_grad_norm` and `stem_grad_norm`, the norms of `dZ^T X` and of TrAct's gradient.
        With several layers, each key ends with the layer's name. Empty while TrAct is off and
        before the first gradient.
    """
    layers = [(name, layer) for name, layer in tract_layers(model) if layer.tract.enabled]
    diagnostics: dict[str, float] = {}
    for name, layer in layers:
        last = layer.tract.last
        if last is None:
            continue
        condition = condition_number(last.total / last.count, last.lambda_, singular=last.singular)
        values = {
            "tract_lambda": last.lambda_.mean(),
            "tract_condition": condition,
            "stem_plain_grad_norm": last.plain_norm,
            "stem_grad_norm": last.norm,
        }
        suffix = "" if len(layers) == 1 else f"/{name}"
        diagnostics |= {key + suffix: float(value) for key, value in values.items()}
    return diagnostics
