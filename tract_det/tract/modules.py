"""The layers as modules: their parents' parameters, state-dict keys and forward, to the bit."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det.tract.autograd import learning_conv2d, learning_linear
from tract_det.tract.solve import condition_number
from tract_det.tract.state import Pending, State, TrActError, check_lambda
from tract_det.tract.sums import conv_sums, over_ranks, smaller_system
from tract_det.tract.windows import touching, windows_of


class TrActLayer(nn.Module):
    """What the layers share.

    Attributes:
        tract: settings, and what the layer keeps between passes. Every rank of a process group must
            take part in every training forward pass, unless `tract.sync` is False.
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
        """Whether this forward pass is one that TrAct learns from."""
        wanted = self.training and torch.is_grad_enabled() and weight.requires_grad
        return wanted and self.tract.enabled

    def extra_repr(self) -> str:
        """The parent's, and TrAct's settings."""
        return f"{super().extra_repr()}, {self.tract}"


class TrActConv2d(TrActLayer, nn.Conv2d):
    """`nn.Conv2d` whose weight learns by TrAct while the module is in training mode.

    Takes `nn.Conv2d`'s arguments and `lambda_`, the damping in units of standardised pixels.
    In evaluation mode, under `no_grad` and for a frozen weight it is `nn.Conv2d`, at no cost.

    Attributes:
        image_sizes: `(height, width)` of each image of a batch that is padded with zeros at the
            bottom and right: `G` is then that of the images without the padding. None = no padding.
        edges: `G` is also of the windows that reach from an image into its padding.
    """

    image_sizes: Sequence[tuple[int, int]] | None = None
    edges: bool = False

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tract = State(lambda_)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.learns(weight):
            return super()._conv_forward(input, weight, bias)
        sums = over_ranks(*self._sums(input.detach()), sync=self.tract.sync)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input), (0, 0)
        conv = (self.stride, padding, self.dilation, self.groups)
        return learning_conv2d(input, weight, bias, *conv, sums, key=self.tract.key)

    def _padded(self, input: Tensor) -> Tensor:
        """As the parent pads, before the convolution."""
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _sums(self, input: Tensor) -> tuple[Tensor, int]:
        """`X^T X` and `N` of the images, each at its own size."""
        sizes = self.image_sizes
        if sizes is None:
            return self._sums_of(input, self.tract.gram_patches)
        if len(sizes) != len(input):
            raise TrActError(f"image_sizes has {len(sizes)} entries for {len(input)} images")
        if all(tuple(size) == tuple(input.shape[-2:]) for size in sizes):
            return self._sums_of(input, self.tract.gram_patches)
        if self.edges:  # zeros add nothing to `X^T X`
            conv = (self.kernel_size, self.stride, self.padding, self.dilation)
            windows = windows_of(input.shape[-2:], *conv)
            total, _ = self._sums_of(input, self.tract.gram_patches)
            return total, sum(touching(size, windows) for size in sizes)
        parts = []
        for height, width in dict.fromkeys(map(tuple, sizes)):  # those of one size at once
            alike = [i for i, size in enumerate(sizes) if tuple(size) == (height, width)]
            patches = -(-self.tract.gram_patches * len(alike) // len(sizes))
            parts.append(self._sums_of(input[alike, :, :height, :width], patches))
        return torch.stack([total for total, _ in parts]).sum(0), sum(n for _, n in parts)

    def _sums_of(self, images: Tensor, patches: int) -> tuple[Tensor, int]:
        padding = self.padding
        if self.padding_mode != "zeros":
            images, padding = self._padded(images), (0, 0)
        conv = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        return conv_sums(images, *conv, patches=patches)


class TrActLinear(TrActLayer, nn.Linear):
    """`nn.Linear` whose weight learns by TrAct while the module is in training mode.

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
        sums = smaller_system(input, sync=self.tract.sync, pending=pending)
        return learning_linear(input, self.weight, self.bias, sums, key=self.tract.key)


def tract_layers(model: nn.Module) -> Iterator[tuple[str, TrActLayer]]:
    """Name and module of every TrAct layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, TrActLayer):
            yield name, module


def set_lambda(model: nn.Module, lambda_: float | None) -> None:
    """Sets the damping of every TrAct layer, or switches TrAct off and on again, in place.

    To be called between steps, as often as a schedule asks for it; the optimizer, and a compiled
    model, stay as they are.

    Args:
        model: with TrAct layers, or without: then nothing happens.
        lambda_: damping, in the units in which it was given to `apply_tract`. None: off; the layers
            are the plain ones, at no cost.
    """
    for _, module in tract_layers(model):
        module.tract.enabled = lambda_ is not None
        if lambda_ is None and module.tract.pending is not None:
            module.tract.pending.clear()
        if lambda_ is not None:
            module.lambda_ = lambda_


def set_micro_batches(model: nn.Module, micro_batches: int) -> None:
    """Makes each step of `micro_batches` backward passes exact, in place.

    To be called once before training with gradient accumulation. The stem's gradient is zero after
    the first passes, and that of the whole batch after the last.

    Args:
        model: with TrAct layers, or without: then nothing happens.
        micro_batches: backward passes a step, each of its share of the loss; 1 = no accumulation.
            Called again, it also forgets the passes of a step that was given up. Each must go
            through the layer once.
    """
    if micro_batches < 1:
        raise TrActError(f"micro_batches is {micro_batches}: it must be at least 1")
    for _, module in tract_layers(model):
        module.tract.pending = Pending(micro_batches) if micro_batches > 1 else None


def set_image_sizes(
    model: nn.Module, sizes: Sequence[tuple[int, int]] | None, *, edges: bool = False
) -> None:
    """Tells TrAct convolutions the images' sizes in the padded batch that comes next, in place.

    Args:
        model: with TrAct layers, or without: then nothing happens.
        sizes: `(height, width)` of each image, pixels; None = no padding. They hold until the next
            call.
        edges: for a model that learns from the outputs at the images' edges as well, where a window
            sees a part of an image and zeros, as detectors do. Without them in `G` their part of
            the gradient would be magnified by up to `1 / lambda_`. False: as if each image were
            alone, without the padding.
    """
    for _, module in tract_layers(model):
        if isinstance(module, TrActConv2d):
            module.image_sizes, module.edges = sizes, edges


def tract_diagnostics(model: nn.Module) -> dict[str, float]:
    """What the last backward pass of a model's TrAct layer did, for a log.

    Costs an eigenvalue decomposition (K = 147: milliseconds; 768: a tenth of a second): for a step
    in every few.

    Returns:
        `tract_lambda`, the effective damping; `tract_condition`, the condition number of
        `G + lambda_ I`; `stem_plain_grad_norm`, of `dZ^T X`; `stem_grad_norm`, of TrAct's gradient.
        Means over a layer's groups, except the condition, which is the largest; with several
        layers, each key ends with the layer's name. Empty where TrAct is off or nothing was learnt.
    """
    layers = [(name, layer) for name, layer in tract_layers(model) if layer.tract.enabled]
    found: dict[str, float] = {}
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
        end = "" if len(layers) == 1 else f"/{name}"
        found |= {key + end: float(value) for key, value in values.items()}
    return found
