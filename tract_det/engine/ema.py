"""A moving average of the weights, and of BatchNorm's statistics with them."""

from timm.utils import ModelEmaV3
from torch import nn


class Ema:
    """An exponential moving average of everything in a model's state dict.

    Buffers are averaged like weights, as in torchvision's and timm's recipes, so that the
    statistics of batch norms fit the averaged weights. The average starts from the weights after
    the first step.

    Args:
        model: is copied; this process must hold whole weights (ZeRO 0 to 2).
        decay: weight of the previous average in an update.
        period: steps between updates.
        warmup: use a smaller decay at the start, `1 - (1 + updates)^(-2/3)`.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, period: int = 1, warmup: bool = False
    ) -> None:
        self._average = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self._average.requires_grad_(False)
        self.period = period

    @property
    def model(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        return self._average.module

    def update(self, model: nn.Module, iteration: int) -> None:
        """Takes in the model after step `iteration`, counted from 1. Call it after each step."""
        if iteration % self.period == 0:
            self._average.update(model, step=iteration // self.period)
