"""The layers as modules: their parents' parameters, state-dict keys and forward, to the bit."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det.tract.functional import (
    Pending,
    Sums,
    TrActError,
    check_lambda,
    conv_sums,
    linear_sums,
    precondition,
)


class TrActLayer(nn.Module):
    """What the layers share. Class attributes are the defaults: `apply_tract` calls no `__init__`.

    Attributes:
        lambda_: damping, in units of standardised inputs.
        sync: where a process group exists, `G` is that of all ranks. Every rank must then take part
            in every training forward pass.
        pending: collects the micro-batches of a step; None = each is a step.
    """

    lambda_: float
    sync: bool = True
    pending: Pending | None = None

    def _preconditioned(self, weight: Tensor, sums: tuple[Tensor, int]) -> Tensor:
        return precondition(weight, Sums(*sums, sync=self.sync), self.lambda_, self.pending)

    def _learns(self, weight: Tensor) -> bool:
        return self.training and torch.is_grad_enabled() and weight.requires_grad


class TrActConv2d(nn.Conv2d, TrActLayer):
    """`nn.Conv2d` whose weight learns by TrAct while the module is in training mode.

    Takes `nn.Conv2d`'s arguments and `lambda_`, the damping in units of standardised pixels.
    In evaluation mode, under `no_grad` and for a frozen weight it is `nn.Conv2d`, at no cost.

    Attributes:
        image_sizes: `(height, width)` of each image of a batch that is padded with zeros at the
            bottom and right: `G` is then that of the images without the padding. None = no padding.
    """

    image_sizes: Sequence[tuple[int, int]] | None = None

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda_ = check_lambda(lambda_)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._learns(weight):
            weight = self._preconditioned(weight, self._sums(input.detach()))
        return super()._conv_forward(input, weight, bias)

    def _sums(self, input: Tensor) -> tuple[Tensor, int]:
        """`X^T X` and `N` of the images, each at its own size."""
        sizes = self.image_sizes
        if sizes is None or all(tuple(size) == tuple(input.shape[-2:]) for size in sizes):
            return self._sums_of(input)
        if len(sizes) != len(input):
            raise TrActError(f"image_sizes has {len(sizes)} entries for {len(input)} images")
        parts = []
        for height, width in dict.fromkeys(map(tuple, sizes)):  # those of one size at once
            alike = [i for i, size in enumerate(sizes) if tuple(size) == (height, width)]
            parts.append(self._sums_of(input[alike, :, :height, :width]))
        return torch.stack([total for total, _ in parts]).sum(0), sum(n for _, n in parts)

    def _sums_of(self, images: Tensor) -> tuple[Tensor, int]:
        padding = self.padding
        if self.padding_mode != "zeros":  # as the parent pads, before the convolution
            images = F.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return conv_sums(images, self.kernel_size, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The parent's, and lambda_."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


class TrActLinear(nn.Linear, TrActLayer):
    """`nn.Linear` whose weight learns by TrAct while the module is in training mode.

    Takes `nn.Linear`'s arguments and `lambda_`, the damping in units of standardised inputs.
    """

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda_ = check_lambda(lambda_)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K)` to `(..., M)`."""
        weight: Tensor = self.weight
        if self._learns(weight):
            weight = self._preconditioned(weight, linear_sums(input))
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """The parent's, and lambda_."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


def set_micro_batches(model: nn.Module, micro_batches: int) -> None:
    """Makes each step of `micro_batches` backward passes exact, in place.

    To be called once before training with gradient accumulation. The stem's gradient is zero after
    the first passes, and that of the whole batch after the last.

    Args:
        model: with TrAct layers, or without: then nothing happens.
        micro_batches: backward passes a step, each of its share of the loss; 1 = no accumulation.
            Called again, it also forgets the passes of a step that was given up.
    """
    if micro_batches < 1:
        raise TrActError(f"micro_batches is {micro_batches}: it must be at least 1")
    for module in model.modules():
        if isinstance(module, TrActLayer):
            module.pending = Pending(micro_batches) if micro_batches > 1 else None


def set_image_sizes(model: nn.Module, sizes: Sequence[tuple[int, int]] | None) -> None:
    """Tells TrAct convolutions the images' sizes in the padded batch that comes next, in place.

    Args:
        model: with TrAct layers, or without: then nothing happens.
        sizes: `(height, width)` of each image, pixels; None = no padding. They hold until the next
            call.
    """
    for module in model.modules():
        if isinstance(module, TrActConv2d):
            module.image_sizes = sizes
