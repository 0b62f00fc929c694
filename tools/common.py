"""What the training tools share: the command line, and what they make of the keys in common."""

import argparse
import dataclasses
import json
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det import apply_tract, distributed, find_stem, set_lambda, set_micro_batches
from tract_det.engine import ds
from tract_det.engine.loop import StopSignal, train
from tract_det.engine.optimizer import Rule, StemRule, build_optimizer, parameter_groups
from tract_det.engine.run import Evaluate, Run
from tract_det.engine.schedule import lambda_schedule, lr_schedule
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.files import write_text
from tract_det.modeling.loading import LoadReport

HERE = Path(__file__).resolve().parent.parent  # the checkout, or the installed package
LambdaAt = Callable[[int], float | None]


def parse(description: str | None, default: Path, argv: list[str] | None) -> argparse.Namespace:
    """detectron2's command line; `default` is the config file where none is named."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default=str(default), metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="go on where OUTPUT_DIR stopped")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    # Launchers append one or the other; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)


def find_config(name: str) -> Path:
    """The file as given, else the one that was installed with the package."""
    places = (Path(name), HERE / name, HERE / "configs" / name)
    return next((path for path in places if path.is_file()), Path(name))


def plain(node: Any) -> Any:
    """A config's node as a dict of plain values."""
    return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else node


def place(cfg: CfgNode, model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, in the config's precision."""
    if cfg.SOLVER.AMP.ENABLED:
        ds.autocast_forward(model, device)
    return model.to(device)


def say_loaded(cfg: CfgNode, source: str, report: LoadReport, *, strict: bool) -> None:
    """Says what was loaded; a training (not strict) has all the names in OUTPUT_DIR."""
    path, more = Path(cfg.OUTPUT_DIR) / "weights_report.json", ""
    if not strict:
        more = f"; all names in {path}"
        if distributed.is_main():
            content = {"source": source, **dataclasses.asdict(report)}
            write_text(path, json.dumps(content, indent=2) + "\n")
    say(f"weights {source}: {report}{more}")


def put_tract(cfg: CfgNode, model: nn.Module, variance: float) -> None:
    """TrAct on the model's stem, in place, if the config says so.

    Args:
        cfg: MODEL.TRACT and SOLVER.ACCUMULATION are read.
        model: whose stem is meant.
        variance: of the model's input, in units of standardised pixels.
    """
    tract = cfg.MODEL.TRACT
    if not tract.ENABLED:
        return
    lambda_ = _effective(cfg, variance)(tract.LAMBDA)
    stem = tract.STEM or find_stem(model)
    apply_tract(
        model,
        lambda_,
        stem=stem,
        sync=tract.SYNC,
        relative=tract.RELATIVE,
        gram_patches=tract.GRAM_PATCHES,
    )
    set_micro_batches(model, cfg.SOLVER.ACCUMULATION)
    unit = "of the patches' mean square" if tract.RELATIVE else "of standardised pixels"
    own = "" if tract.RELATIVE else f", {lambda_:g} of this model's"
    later = "" if tract.SCHEDULE == "constant" else f", {tract.SCHEDULE} to {tract.LAMBDA_END:g}"
    off = f", off from step {tract.STOP_AT}" if tract.STOP_AT else ""
    say(f"TrAct on '{stem}', lambda {tract.LAMBDA:g} {unit}{own}{later}{off}")


def _effective(cfg: CfgNode, variance: float) -> Callable[[float], float]:
    return lambda lambda_: lambda_ if cfg.MODEL.TRACT.RELATIVE else lambda_ * variance


def build_lambda(cfg: CfgNode, variance: float, max_iter: int) -> LambdaAt | None:
    """TrAct's lambda of a step, in this model's units; None where TrAct is off."""
    tract, effective = cfg.MODEL.TRACT, _effective(cfg, variance)
    if not tract.ENABLED:
        return None
    return lambda_schedule(
        lambda_=effective(tract.LAMBDA),
        end=None if tract.LAMBDA_END == -1 else effective(tract.LAMBDA_END),
        kind=tract.SCHEDULE,
        stop_at=tract.STOP_AT,
        max_iter=max_iter,
    )


def _lambda_hook(model: nn.Module, lambda_at: LambdaAt | None) -> Callable[[int], None] | None:
    """Sets the model's lambda before each step for which it is another than before."""
    if lambda_at is None:
        return None
    known: list[float | None] = []

    def before_step(iteration: int) -> None:
        value = lambda_at(iteration)
        if known != [value]:
            known[:] = [value]
            set_lambda(model, value)

    return before_step


def _rule(solver: CfgNode, name: str, momentum: float) -> Rule:
    first, second = solver.BETAS
    return Rule(name, momentum, solver.NESTEROV, (first, second), solver.EPS)


def optimizer_of(cfg: CfgNode, model: nn.Module, stem: str | None = None) -> torch.optim.Optimizer:
    """The optimizer of the config.

    Args:
        cfg: SOLVER and DEEPSPEED are read.
        model: on its device.
        stem: the first layer, if it is not what `find_stem` finds.
    """
    solver, own = cfg.SOLVER, cfg.SOLVER.STEM
    rule, stem_rule = _rule(solver, solver.OPTIMIZER, solver.MOMENTUM), None
    if own.OPTIMIZER or any(own[key] != -1 for key in ("BASE_LR", "WEIGHT_DECAY", "MOMENTUM")):
        momentum = solver.MOMENTUM if own.MOMENTUM == -1 else own.MOMENTUM
        stem_rule = StemRule(
            stem or find_stem(model),
            _rule(solver, own.OPTIMIZER or solver.OPTIMIZER, momentum),
            1.0 if own.BASE_LR == -1 else own.BASE_LR / solver.BASE_LR,
            None if own.WEIGHT_DECAY == -1 else own.WEIGHT_DECAY,
        )
    groups = parameter_groups(
        model,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        stem=stem_rule,
    )
    return build_optimizer(
        groups,
        rule,
        lr=solver.BASE_LR,
        stem=stem_rule.rule if stem_rule else None,
        zero_stage=cfg.DEEPSPEED.zero_optimization.stage,
    )


def build_engine(cfg: CfgNode, model: nn.Module, stem: str | None = None) -> Any:
    """DeepSpeed's engine with the optimizer of the config; the arguments are `optimizer_of`'s."""
    solver = cfg.SOLVER
    config = ds.ds_config(
        batch_size=solver.IMS_PER_BATCH,
        accumulation=solver.ACCUMULATION,
        clip_norm=solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else 0.0,
        extra=plain(cfg.DEEPSPEED),
    )
    return ds.initialize(model, optimizer_of(cfg, model, stem), config)


def build_schedule(
    cfg: CfgNode, *, max_iter: int, steps: Sequence[int], warmup_iters: int
) -> Callable[[int], float]:
    """The learning rate of a step."""
    solver = cfg.SOLVER
    return lr_schedule(
        base_lr=solver.BASE_LR,
        max_iter=max_iter,
        steps=None if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" else steps,
        gamma=solver.GAMMA,
        end_lr=solver.BASE_LR_END,
        warmup_iters=warmup_iters,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def identity(cfg: CfgNode) -> dict[str, Any]:
    """The keys in common that a resumed run must share."""
    return {
        "SEED": cfg.SEED,
        "SOLVER.IMS_PER_BATCH": cfg.SOLVER.IMS_PER_BATCH,
        "SOLVER.ACCUMULATION": cfg.SOLVER.ACCUMULATION,
        "SOLVER.OPTIMIZER": cfg.SOLVER.OPTIMIZER,
        "SOLVER.STEM": plain(cfg.SOLVER.STEM),
        "DATALOADER": plain(cfg.DATALOADER) | {"NUM_WORKERS": 0},  # readers change nothing
        "MODEL.TRACT": plain(cfg.MODEL.TRACT),
        "DEEPSPEED.zero_optimization.stage": cfg.DEEPSPEED.zero_optimization.stage,
    }


def make_output(output: Path) -> None:
    """Makes OUTPUT_DIR.

    Raises:
        UserError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {output} cannot be made: {error.strerror}") from error


def begin(cfg: CfgNode, this_run: Run, *, resume: bool) -> int:
    """Starts the run's folder, seeds this process; returns the steps done before."""
    torch.manual_seed(cfg.SEED + distributed.rank())  # the ranks' dropout differs
    start = this_run.start(resume=resume)
    if distributed.is_main():
        write_text(Path(cfg.OUTPUT_DIR) / "config.yaml", cfg.dump())
    return start


def fit(
    cfg: CfgNode,
    this_run: Run,
    loader: Iterable[Any],
    report: Evaluate,
    *,
    start: int,
    lr_at: Callable[[int], float],
    lambda_at: LambdaAt | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> int:
    """Trains to the end or to a signal; returns the exit code.

    Args:
        cfg: SOLVER.ACCUMULATION is read.
        this_run: what happens between the steps.
        loader: micro-batches from step `start` on.
        report: evaluates the final weights and writes the results.
        start: steps done before.
        lr_at: learning rate of a step.
        lambda_at: TrAct's lambda of a step.
        memory_format: of the images.
    """
    engine = this_run.engine
    with StopSignal() as stop:
        done = train(
            engine,
            loader,
            start=start,
            max_iter=this_run.max_iter,
            accumulation=cfg.SOLVER.ACCUMULATION,
            lr_at=lr_at,
            after_step=this_run.after_step,
            stop=stop,
            before_step=_lambda_hook(engine.module, lambda_at),
            memory_format=memory_format,
        )
        if done < this_run.max_iter:
            this_run.save(done)
            say(f"stopped after step {done}: the checkpoint is saved, go on with --resume")
        else:
            this_run.finish(report)
        this_run.writers.close()
    return 0 if done == this_run.max_iter else 128 + (stop.number or signal.SIGTERM)
