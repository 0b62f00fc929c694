"""A moving average of the weights, and of BatchNorm's statistics with them."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn


class Ema:
    """An exponential moving average of everything in a model's state dict.

    Buffers are averaged like weights, as torchvision's and timm's recipes do, so that BatchNorm's
    statistics fit the averaged weights. The average begins with the weights after the first step.

    Args:
        model: is copied; its weights must be whole (ZeRO 0 to 2).
        decay: of an update.
        period: steps between updates.
        warmup: a smaller decay at the start, `1 - (1 + updates)^(-2/3)`.
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
        """To be called after each step; `iteration` counts them from 1."""
        if iteration % self.period == 0:
            self._average.update(model, step=iteration // self.period)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` takes."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved average."""
        self.model.load_state_dict(state)
