"""What the shared keys describe: optimizer, schedules, TrAct and DeepSpeed's engine."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from tract_det import apply_tract, find_stem, set_lambda, set_micro_batches, set_workspace
from tract_det.config.machinery import plain
from tract_det.engine import ds
from tract_det.engine.ema import Ema
from tract_det.engine.optimizer import (
    Fallback,
    Rule,
    StemRule,
    build_optimizer,
    parameter_groups,
)
from tract_det.engine.schedule import lambda_schedule, lr_schedule
from tract_det.engine.writers import say
from tract_det.modeling.outputs import output_layers
from tract_det.modeling.weight_files import Weights
from tract_det.modeling.whitening import (
    check_whitens,
    inputs_of,
    patch_covariance,
    whitening_weight,
)
from tract_det.pixels import lambda_in_unit, lambda_in_words
from tract_det.tract import trainable_layers
from tract_det.training.task import BuiltModel, Plan

LambdaAt = Callable[[int], float | None]


def channels_in(cfg: CfgNode) -> int:
    """The number of channels of the images: of MODEL.PIXEL_MEAN, and three where it is empty."""
    return len(cfg.MODEL.PIXEL_MEAN) or 3


def place(cfg: CfgNode, network: nn.Module, device: torch.device) -> nn.Module:
    """The network on its device, in the config's precision."""
    if cfg.SOLVER.AMP.ENABLED:
        ds.autocast_forward(network, device)
    return network.to(device)


def build_ema(cfg: CfgNode, network: nn.Module) -> Ema | None:
    """The moving average of the network, which is on its device; None where there is none."""
    settings = cfg.MODEL.EMA
    if not settings.ENABLED:
        return None
    return Ema(network, decay=settings.DECAY, period=settings.PERIOD, warmup=settings.WARMUP)


def freeze_at(cfg: CfgNode, weights: Weights | None, *, strict: bool, default: int) -> int:
    """How many stages are frozen: MODEL.BACKBONE.FREEZE_AT, or a choice where it is -1.

    Args:
        cfg: MODEL.BACKBONE.FREEZE_AT and MODEL.TRACT.ENABLED are read.
        weights: MODEL.WEIGHTS.
        strict: for evaluation. Frozen batch norms compute the same in another order; as many as in
            the training give the same figures to the last bit.
        default: what a training from weights without TrAct freezes.
    """
    stages = cfg.MODEL.BACKBONE.FREEZE_AT
    if strict and weights is not None:
        return weights.meta.get("freeze_at", stages)
    if stages >= 0:
        return stages
    return 0 if cfg.MODEL.TRACT.ENABLED or weights is None else default


_ALL = "all"  # MODEL.TRACT.STEM: every layer that TrAct can train

_SAMPLE = 256  # images; the covariance of their patches is exact to a few per cent


def named_stem(cfg: CfgNode) -> str:
    """The first layer's name where MODEL.TRACT.STEM gives one; "" = it is to be found."""
    names = _tract_names(cfg)
    return names[0] if len(names) == 1 and names != [_ALL] else ""


def _tract_names(cfg: CfgNode) -> list[str]:
    return [name for name in cfg.MODEL.TRACT.STEM if name]


def sample_of(images: int, seed: int) -> list[int]:
    """Positions of a few of so many images, the same on every rank; the random state stays."""
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(images, generator=generator)[:_SAMPLE].tolist())


def init_stem(cfg: CfgNode, built: BuiltModel, images: Iterable[Any]) -> None:
    """Initialises the first layer's weight by filters that whiten what it sees, in place.

    The random state is afterwards as before: all else is as without it.

    Args:
        cfg: MODEL.TRACT.STEM is read.
        built: with random weights, on the CPU.
        images: as `Task.plain_images` gives them.
    """
    name = named_stem(cfg) or find_stem(built.model)
    layer = check_whitens(built.model.get_submodule(name), name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        covariance = patch_covariance(_without_padding(built.network, layer, images), layer)
        layer.weight.copy_(whitening_weight(covariance, layer.weight))
    say(f"'{name}' is initialised by whitening filters")


def _without_padding(
    network: nn.Module, layer: nn.Module, batches: Iterable[Any]
) -> Iterator[Tensor]:
    """What the layer sees of each image, without the zeros that a detector puts around it."""
    sizes: list[torch.Size] = []

    def note(batch: Any) -> Any:
        sizes.append(batch[0].shape)
        return batch

    for seen in inputs_of(network, layer, map(note, batches)):
        height, width = sizes.pop()[-2:]
        yield seen[..., :height, :width] if isinstance(layer, nn.Conv2d) else seen


def put_tract(cfg: CfgNode, model: nn.Module, input_variance: float) -> None:
    """Puts TrAct on the model's stem, or on the layers that are named, if the config says so.

    Args:
        cfg: MODEL.TRACT and SOLVER.ACCUMULATION are read.
        model: a classifier or detector.
        input_variance: of what the stem sees, in units of standardised pixels.
    """
    tract = cfg.MODEL.TRACT
    if not tract.ENABLED:
        return
    names = _tract_names(cfg) or [find_stem(model)]
    layers = trainable_layers(model) if names == [_ALL] else names
    apply_tract(
        model,
        lambda_in_unit(tract.LAMBDA, tract.UNIT, input_variance),
        stem=layers,
        sync=tract.SYNC,
        relative=tract.UNIT == "trace",
        power=tract.POWER,
        gram_patches=tract.GRAM_PATCHES,
    )
    set_micro_batches(model, cfg.SOLVER.ACCUMULATION)
    set_workspace(tract.WORKSPACE)
    words = lambda_in_words(tract.LAMBDA, tract.UNIT, input_variance)
    schedule = "" if tract.SCHEDULE == "constant" else f", {tract.SCHEDULE} to {tract.LAMBDA_END:g}"
    power = "" if tract.POWER == 1 else f", power {tract.POWER:g} of the inverse"
    where = f"'{layers[0]}'" if len(layers) == 1 else f"{len(layers)} layers"
    say(f"TrAct on {where}, {words}{power}{schedule}{_stop_in_words(tract.STOP_AT)}")


def _stop_in_words(stop_at: float) -> str:
    if 0 < stop_at < 1:
        return f", off after {stop_at:.3g} of the training"
    return f", off from step {stop_at:.0f}" if stop_at else ""


def stop_step(stop_at: float, max_iter: int) -> int:
    """MODEL.TRACT.STOP_AT as a step; 0 = never. A fraction has at least one step with TrAct."""
    return max(1, round(stop_at * max_iter)) if 0 < stop_at < 1 else int(stop_at)


def scaled_stop(cfg: CfgNode, factor: float) -> dict[str, int]:
    """MODEL.TRACT.STOP_AT of a training so many times as long; a fraction stays as it is."""
    stop_at = cfg.MODEL.TRACT.STOP_AT
    return {"MODEL.TRACT.STOP_AT": max(1, round(stop_at * factor))} if stop_at >= 1 else {}


def build_lambda(cfg: CfgNode, input_variance: float, max_iter: int) -> LambdaAt | None:
    """TrAct's lambda of a step, in the model's own units; None where TrAct is off."""
    tract = cfg.MODEL.TRACT
    if not tract.ENABLED:
        return None
    in_unit = partial(lambda_in_unit, unit=tract.UNIT, variance=input_variance)
    return lambda_schedule(
        lambda_=in_unit(tract.LAMBDA),
        end=None if tract.LAMBDA_END == -1 else in_unit(tract.LAMBDA_END),
        kind=tract.SCHEDULE,
        stop_at=stop_step(tract.STOP_AT, max_iter),
        max_iter=max_iter,
    )


def lambda_hook(model: nn.Module, lambda_at: LambdaAt | None) -> Callable[[int], None] | None:
    """Sets the model's lambda before a step, whenever it changes."""
    if lambda_at is None:
        return None
    current: list[float | None] = []

    def before_step(iteration: int) -> None:
        value = lambda_at(iteration)
        if current != [value]:
            current[:] = [value]
            set_lambda(model, value)

    return before_step


def _rule(solver: CfgNode, name: str, momentum: float) -> Rule:
    first, second = solver.BETAS
    return Rule(name, momentum, solver.NESTEROV, (first, second), solver.EPS)


def _stem_rule(solver: CfgNode, stem: str) -> StemRule:
    """SOLVER.STEM, where "" and -1 stand for the values of SOLVER itself."""
    settings = solver.STEM
    momentum = solver.MOMENTUM if settings.MOMENTUM == -1 else settings.MOMENTUM
    scale = 1.0 if settings.BASE_LR == -1 else settings.BASE_LR / solver.BASE_LR
    return StemRule(
        stem,
        _rule(solver, settings.OPTIMIZER or solver.OPTIMIZER, momentum),
        scale * settings.LR_FACTOR,
        None if settings.WEIGHT_DECAY == -1 else settings.WEIGHT_DECAY,
    )


def _fallback(solver: CfgNode, network: nn.Module) -> Fallback:
    scale = 1.0 if solver.FALLBACK_LR == -1 else solver.FALLBACK_LR / solver.BASE_LR
    return Fallback(output_layers(network), scale)


def optimizer_of(
    cfg: CfgNode, network: nn.Module, stem: str | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the config.

    Args:
        cfg: SOLVER and DEEPSPEED are read.
        network: on its device.
        stem: the first layer's name, if it is not what `find_stem` finds.
    """
    solver, settings = cfg.SOLVER, cfg.SOLVER.STEM
    stem_rule = None
    numbers = (settings.BASE_LR, settings.WEIGHT_DECAY, settings.MOMENTUM)
    is_apart = any(number != -1 for number in numbers) or settings.LR_FACTOR != 1
    if settings.OPTIMIZER or is_apart:
        stem_rule = _stem_rule(solver, stem or find_stem(network))
    groups = parameter_groups(
        network,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        stem=stem_rule,
        fallback=_fallback(solver, network) if solver.OPTIMIZER == "Muon" else None,
    )
    return build_optimizer(
        groups,
        _rule(solver, solver.OPTIMIZER, solver.MOMENTUM),
        lr=solver.BASE_LR,
        stem=stem_rule.rule if stem_rule else None,
        zero_stage=cfg.DEEPSPEED.zero_optimization.stage,
    )


def engine_config(cfg: CfgNode) -> dict[str, Any]:
    """DeepSpeed's configuration; SOLVER and DEEPSPEED are read.

    Raises:
        UserError: the batch does not divide into ranks and micro-batches.
    """
    solver = cfg.SOLVER
    return ds.ds_config(
        batch_size=solver.IMS_PER_BATCH,
        accumulation=solver.ACCUMULATION,
        clip_norm=solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else 0.0,
        extra=plain(cfg.DEEPSPEED),
    )


def build_engine(cfg: CfgNode, network: nn.Module, stem: str | None = None) -> Any:
    """DeepSpeed's engine with the optimizer of the config; arguments as for `optimizer_of`."""
    return ds.initialize(network, optimizer_of(cfg, network, stem), engine_config(cfg))


def build_schedule(cfg: CfgNode, plan: Plan) -> Callable[[int], float]:
    """The learning rate of a step."""
    solver = cfg.SOLVER
    is_cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    return lr_schedule(
        base_lr=solver.BASE_LR,
        max_iter=plan.max_iter,
        steps=None if is_cosine else plan.milestones,
        gamma=solver.GAMMA,
        end_lr=solver.BASE_LR_END,
        warmup_iters=plan.warmup_iters,
        warmup_factor=solver.WARMUP_FACTOR,
    )
