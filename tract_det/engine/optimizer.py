"""Parameter groups and the optimizer."""

from collections.abc import Iterator

import torch
from torch import nn

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, weight_decay_norm: float, weight_decay_bias: float
) -> list[dict]:
    """The trainable parameters in at most three groups, by what their weight decay is.

    Args:
        model: frozen parameters are left out.
        weight_decay: of weights.
        weight_decay_norm: of norms' scales and shifts.
        weight_decay_bias: of the other layers' biases.
    """
    decays = {"weight": weight_decay, "norm": weight_decay_norm, "bias": weight_decay_bias}
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for kind, parameter in _kinds(model):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups.setdefault(decays[kind], []).append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "norm" if isinstance(module, _NORMS) else "bias" if name == "bias" else "weight"
            yield kind, parameter


def build_optimizer(
    groups: list[dict], *, name: str, lr: float, momentum: float = 0.9, nesterov: bool = False
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW.

    Args:
        groups: as `parameter_groups` makes them.
        name: "SGD" or "AdamW".
        lr: of the first step; the loop sets it anew at every step.
        momentum: SGD's.
        nesterov: SGD's.
    """
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
