"""Parameter groups and the optimizer."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb
from torch import nn

from tract_det.engine.muon import Muon
from tract_det.errors import UserError

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


_MATRICES = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)

# The optimizers that are not elementwise, and why they need whole weights.
_WHOLE = {
    "LAMB": "scales a step by the norm of the whole weight",
    "Muon": "orthogonalises the step of the whole weight",
}


@dataclass(frozen=True)
class Rule:
    """An optimizer and its settings, without learning rate and weight decay.

    Attributes:
        name: one of `choices.OPTIMIZERS`.
        momentum: for SGD and Muon.
        nesterov: for SGD and Muon.
        betas: for Adam, AdamW, LAMB, and what Muon leaves to AdamW.
        eps: likewise.
    """

    name: str = "SGD"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True)
class StemRule:
    """How the first layer's weight is updated where it differs from the other weights.

    Attributes:
        name: the layer, as in `model.named_modules()`.
        rule: its optimizer; None = that of the other weights.
        lr_scale: its learning rate, as a multiple of that of the other weights.
        weight_decay: None = that of the other weights.
    """

    name: str
    rule: Rule | None = None
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Fallback:
    """What Muon leaves to AdamW: all but the weights of hidden convolutions and linear layers.

    Its author leaves to AdamW the gains and biases, the embeddings, and the layers that give the
    model's outputs (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). The kernels of
    depthwise convolutions, which are no matrices, are left to it as well.

    Attributes:
        outputs: names of the output layers, as in `model.named_modules()`.
        lr_scale: AdamW's learning rate, as a multiple of Muon's.
    """

    outputs: Collection[str]
    lr_scale: float = 1.0


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_bias: float,
    stem: StemRule | None = None,
    fallback: Fallback | None = None,
) -> list[dict]:
    """The trainable parameters, grouped by their weight decay, with the stem's weight apart.

    Args:
        model: frozen parameters are left out.
        weight_decay: for weights.
        weight_decay_norm: for scales and shifts of norms.
        weight_decay_bias: for the biases of other layers, for scales of single channels
            (LayerScale), and for what the model's `no_weight_decay()` names (timm: position
            embeddings and tokens).
        stem: if given, the stem's weight is a group of its own, marked `"stem": True`.
        fallback: for Muon; what it leaves to AdamW is in groups of its own.

    Returns:
        At most three groups, one for each distinct weight decay, and that of the stem; with
        `fallback` at most two for each weight decay.
    """
    decays = {"weight": weight_decay, "norm": weight_decay_norm, "bias": weight_decay_bias}
    stem_weight = model.get_submodule(stem.name).weight if stem else None
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    seen: set[int] = {id(stem_weight)}
    matrices = {id(matrix) for matrix in _matrices(model, fallback.outputs)} if fallback else None
    for kind, parameter in _kinds(model):
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            is_left = matrices is not None and id(parameter) not in matrices
            groups.setdefault((decays[kind], is_left), []).append(parameter)
    result: list[dict] = [
        {"params": parameters, "weight_decay": decay, **_muon_options(fallback, is_left)}
        for (decay, is_left), parameters in groups.items()
    ]
    if stem is not None:
        decay = weight_decay if stem.weight_decay is None else stem.weight_decay
        group = {"params": [stem_weight], "weight_decay": decay, "lr_scale": stem.lr_scale}
        if stem.rule is None or stem.rule.name == "Muon":  # as the fallback would have it
            options = _muon_options(
                fallback, matrices is not None and id(stem_weight) not in matrices
            )
            scale = options.get("lr_scale", 1.0) * stem.lr_scale
            group |= options | {"lr_scale": scale}
        result.append(group | {"stem": True})
    return result


def _matrices(model: nn.Module, outputs: Collection[str]) -> Iterator[nn.Parameter]:
    """The weights that Muon updates."""
    for name, module in model.named_modules():
        if isinstance(module, _MATRICES) and name not in outputs:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1 and min(parameter.shape[:2]) > 1:
                    yield parameter


def _muon_options(fallback: Fallback | None, is_left: bool) -> dict[str, Any]:
    """What a group tells timm's Muon, which would otherwise go by the shapes alone."""
    if fallback is None:
        return {}
    if not is_left:
        return {"use_muon": True}
    # With Nesterov's momentum, timm would take NAdamW for AdamW.
    return {"use_fallback": True, "lr_scale": fallback.lr_scale, "nesterov": False}


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    without_decay: set[str] = set()
    for prefix, module in model.named_modules():
        names: Callable[[], set[str]] | None = getattr(module, "no_weight_decay", None)
        dot = f"{prefix}." if prefix else ""
        without_decay |= {dot + name for name in names()} if names else set()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS):
                yield "norm", parameter
            elif name == "bias" or parameter.ndim <= 1 or dot + name in without_decay:
                yield "bias", parameter
            else:
                yield "weight", parameter


class TwoRules(torch.optim.Optimizer):
    """Two optimizers as one: the groups marked `"stem": True` have an optimizer of their own.

    SGD and Adam are elementwise, so that any slice of the parameters that ZeRO hands over is
    updated as it would be in the whole. This object holds the groups and the state and passes them
    to the two optimizers at every step, because DeepSpeed and `load_state_dict` replace them.
    """

    def __init__(
        self, others: torch.optim.Optimizer, stem: torch.optim.Optimizer, groups: list[dict]
    ) -> None:
        self.optimizers = {False: others, True: stem}
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for is_stem, optimizer in self.optimizers.items():
            optimizer.param_groups = [
                group for group in self.param_groups if group.get("stem", False) == is_stem
            ]
            optimizer.state = self.state
            optimizer.step()
        return loss


def build_optimizer(
    groups: list[dict], rule: Rule, *, lr: float, stem: Rule | None = None, zero_stage: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of all groups.

    Args:
        groups: as `parameter_groups` makes them.
        rule: for all groups but the stem's.
        lr: of the first step; the training loop sets it at every step.
        stem: for the group marked as the stem; None = `rule`.
        zero_stage: of DeepSpeed's ZeRO.

    Raises:
        UserError: LAMB or Muon under ZeRO.
    """
    for choice in (rule, stem):
        if zero_stage > 0 and choice is not None and choice.name in _WHOLE:
            raise UserError(
                f"SOLVER.OPTIMIZER {choice.name} {_WHOLE[choice.name]}, but ZeRO stage "
                f"{zero_stage} hands it slices that span several weights: set "
                "DEEPSPEED.zero_optimization.stage 0 or another optimizer"
            )
    if stem is None or stem == rule:
        return _single_optimizer(groups, rule, lr)
    stem_groups = [group for group in groups if group.get("stem")]
    other_groups = [group for group in groups if not group.get("stem")]
    # Each optimizer writes its own defaults into the groups that it is built with.
    others = _single_optimizer(other_groups, rule, lr)
    stem_optimizer = _single_optimizer(stem_groups, stem, lr * stem_groups[0]["lr_scale"])
    groups = [*others.param_groups, *stem_optimizer.param_groups]
    return TwoRules(others, stem_optimizer, groups)


def _single_optimizer(groups: list[dict], rule: Rule, lr: float) -> torch.optim.Optimizer:
    if rule.name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=rule.momentum, nesterov=rule.nesterov)
    if rule.name == "LAMB":  # DeepSpeed clips
        return Lamb(groups, lr=lr, betas=rule.betas, eps=rule.eps, max_grad_norm=None)
    if rule.name == "Muon":
        return Muon(
            groups, lr=lr, momentum=rule.momentum, nesterov=rule.nesterov, betas=rule.betas,
            eps=rule.eps, adjust_lr_fn="original",
        )  # fmt: skip
    adam = torch.optim.AdamW if rule.name == "AdamW" else torch.optim.Adam
    return adam(groups, lr=lr, betas=rule.betas, eps=rule.eps)
