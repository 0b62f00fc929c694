"""The layers as modules: their parents' parameters, state-dict keys and forward, to the bit."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tract_det.tract.functional import check_lambda, conv_gram, linear_gram, precondition


class TrActConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight learns by TrAct while the module is in training mode.

    Takes `nn.Conv2d`'s arguments and `lambda_`, the damping in units of standardised pixels.
    In evaluation mode, under `no_grad` and for a frozen weight it is `nn.Conv2d`, at no cost.
    """

    lambda_: float

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda_ = check_lambda(lambda_)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.training and torch.is_grad_enabled() and weight.requires_grad:
            images, padding = input, self.padding
            if self.padding_mode != "zeros":  # as the parent pads, before the convolution
                images = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = (0, 0)
            gram = conv_gram(
                images, self.kernel_size, self.stride, padding, self.dilation, self.groups
            )
            weight = precondition(weight, gram, self.lambda_)
        return super()._conv_forward(input, weight, bias)

    def extra_repr(self) -> str:
        """The parent's, and lambda_."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


class TrActLinear(nn.Linear):
    """`nn.Linear` whose weight learns by TrAct while the module is in training mode.

    Takes `nn.Linear`'s arguments and `lambda_`, the damping in units of standardised inputs.
    """

    lambda_: float

    def __init__(self, *args: Any, lambda_: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lambda_ = check_lambda(lambda_)

    def forward(self, input: Tensor) -> Tensor:
        """`(..., K)` to `(..., M)`."""
        weight: Tensor = self.weight
        if self.training and torch.is_grad_enabled() and weight.requires_grad:
            weight = precondition(weight, linear_gram(input), self.lambda_)
        return F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """The parent's, and lambda_."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"
