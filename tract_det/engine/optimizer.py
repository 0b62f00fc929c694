"""Parameter groups and the optimizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb
from torch import nn

from tract_det.errors import UserError

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)

OPTIMIZERS = ("SGD", "Adam", "AdamW", "LAMB")


@dataclass(frozen=True)
class Rule:
    """How weights are updated.

    Attributes:
        name: one of `OPTIMIZERS`.
        momentum: SGD's.
        nesterov: SGD's.
        betas: of Adam, AdamW and LAMB.
        eps: of Adam, AdamW and LAMB.
    """

    name: str = "SGD"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class StemRule:
    """What the first layer's weight has for itself; None: what the other weights have.

    Attributes:
        name: the layer, as in `model.named_modules()`.
        rule: its optimizer.
        lr_scale: its learning rate, in units of the others'.
        weight_decay: of its weight.
    """

    name: str
    rule: Rule | None = None
    lr_scale: float = 1.0
    weight_decay: float | None = None


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_bias: float,
    stem: StemRule | None = None,
) -> list[dict]:
    """The trainable parameters in at most three groups, by what their weight decay is, and a stem.

    Args:
        model: frozen parameters are left out.
        weight_decay: of weights.
        weight_decay_norm: of norms' scales and shifts.
        weight_decay_bias: of the other layers' biases, of scales a channel (LayerScale), and of
            what the model's own `no_weight_decay()` names (timm: position embeddings and tokens).
        stem: the first layer, if its weight is to be a group of its own, marked `"stem": True`.
    """
    decays = {"weight": weight_decay, "norm": weight_decay_norm, "bias": weight_decay_bias}
    stem_weight = model.get_submodule(stem.name).weight if stem else None
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = {id(stem_weight)}
    for kind, parameter in _kinds(model):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups.setdefault(decays[kind], []).append(parameter)
    plain: list[dict] = [{"params": p, "weight_decay": decay} for decay, p in groups.items()]
    if stem is None:
        return plain
    decay = weight_decay if stem.weight_decay is None else stem.weight_decay
    own = {"params": [stem_weight], "weight_decay": decay, "lr_scale": stem.lr_scale, "stem": True}
    return [*plain, own]


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    spared: set[str] = set()
    for prefix, module in model.named_modules():
        names: Callable[[], set[str]] | None = getattr(module, "no_weight_decay", None)
        dot = f"{prefix}." if prefix else ""
        spared |= {dot + name for name in names()} if names else set()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS):
                yield "norm", parameter
            elif name == "bias" or parameter.ndim <= 1 or dot + name in spared:
                yield "bias", parameter
            else:
                yield "weight", parameter


class TwoRules(torch.optim.Optimizer):
    """One optimizer for two: the groups marked `"stem": True` are updated by another rule.

    SGD and Adam are elementwise: whatever part of the parameters ZeRO hands over is updated as it
    would be in the whole. The groups and the state are this object's; the two rules see them anew
    at every step, since DeepSpeed and `load_state_dict` exchange them.
    """

    def __init__(
        self, rest: torch.optim.Optimizer, stem: torch.optim.Optimizer, groups: list[dict]
    ) -> None:
        self.rules = {False: rest, True: stem}
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for is_stem, rule in self.rules.items():
            rule.param_groups = [g for g in self.param_groups if g.get("stem", False) == is_stem]
            rule.state = self.state
            rule.step()
        return loss


def build_optimizer(
    groups: list[dict], rule: Rule, *, lr: float, stem: Rule | None = None, zero_stage: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of all groups.

    Args:
        groups: as `parameter_groups` makes them.
        rule: of the weights.
        lr: of the first step; the loop sets it anew at every step.
        stem: of the group marked as the stem, where it is another rule.
        zero_stage: DeepSpeed's.

    Raises:
        UserError: LAMB under ZeRO.
    """
    for one in (rule, stem):
        if one and one.name == "LAMB" and zero_stage > 0:
            raise UserError(
                f"SOLVER.OPTIMIZER LAMB scales a step by the norm of the whole weight, and ZeRO "
                f"stage {zero_stage} hands it slices of all weights in one: set "
                "DEEPSPEED.zero_optimization.stage 0 or another optimizer"
            )
    if stem is None or stem == rule:
        return _one_rule(groups, rule, lr)
    marked = [group for group in groups if group.get("stem")]
    others = [group for group in groups if not group.get("stem")]
    # Each of the two writes its own defaults into the groups that it is built with.
    rest, own = _one_rule(others, rule, lr), _one_rule(marked, stem, lr * marked[0]["lr_scale"])
    return TwoRules(rest, own, [*rest.param_groups, *own.param_groups])


def _one_rule(groups: list[dict], rule: Rule, lr: float) -> torch.optim.Optimizer:
    if rule.name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=rule.momentum, nesterov=rule.nesterov)
    if rule.name == "LAMB":  # clipping is DeepSpeed's
        return Lamb(groups, lr=lr, betas=rule.betas, eps=rule.eps, max_grad_norm=None)
    adam = torch.optim.AdamW if rule.name == "AdamW" else torch.optim.Adam
    return adam(groups, lr=lr, betas=rule.betas, eps=rule.eps)
