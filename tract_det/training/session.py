"""The one spine of every run, of detectors and classifiers: build, then train or evaluate.

    check -> data -> weights -> model (TrAct on its stem) -> engine -> resume -> train -> report

What can be refused is refused early: the configuration before this module is imported, the data
before weights are downloaded, all of it before anything but a lock is in OUTPUT_DIR.
"""

import dataclasses
import json
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det import distributed, tract_diagnostics
from tract_det.config.machinery import plain
from tract_det.config.resuming import differences, must_be_equal
from tract_det.engine import checkpoint, ds, provenance, run_folder, trackers
from tract_det.engine.checkpoint import Checkpoint
from tract_det.engine.ema import Ema
from tract_det.engine.loop import StopSignal, train
from tract_det.engine.run import Means, Report, Run
from tract_det.engine.watch import watched
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.files import remove_abandoned, write_text
from tract_det.modeling.weight_files import Weights
from tract_det.report.page import write_report
from tract_det.report.stem import Filters, filters_of, mean_turn, read_filters, write_filters
from tract_det.training import assembly
from tract_det.training.task import BuiltModel, Evaluation, Plan, Split, Task
from tract_det.visualize import beside_the_results


def run(
    task: Task,
    cfg: CfgNode,
    *,
    resume: bool = False,
    eval_only: bool = False,
    overwrite: bool = False,
) -> int:
    """Trains, or evaluates MODEL.WEIGHTS; returns the exit code. Every rank must call it.

    Args:
        task: detection or classification.
        cfg: its configuration.
        resume: go on from the checkpoint in OUTPUT_DIR.
        eval_only: evaluate.
        overwrite: move aside a run that is in OUTPUT_DIR.

    Raises:
        UserError: for anything that the user can mend.
    """
    task.check(cfg)
    device = ds.start(cfg.MODEL.DEVICE)
    torch.manual_seed(cfg.SEED)
    if distributed.is_main():
        remove_abandoned(Path(cfg.OUTPUT_DIR))
    with watched("start again" if eval_only else "go on with --resume"):
        if eval_only:
            code = _evaluate(task, cfg, device)
        else:
            with run_folder.sole_use(Path(cfg.OUTPUT_DIR)):
                code = _train(task, cfg, device, resume=resume, overwrite=overwrite)
    ds.stop()
    return code


def _train(task: Task, cfg: CfgNode, device: torch.device, *, resume: bool, overwrite: bool) -> int:
    output = Path(cfg.OUTPUT_DIR)
    if cfg.MODEL.STEM_INIT and cfg.MODEL.WEIGHTS:
        raise UserError(
            f"MODEL.STEM_INIT {cfg.MODEL.STEM_INIT} would undo the first layer of MODEL.WEIGHTS "
            f"{cfg.MODEL.WEIGHTS}: leave one of them empty"
        )
    ds.check_config(assembly.engine_config(cfg))
    distributed.on_main(lambda: trackers.require(cfg.LOGGERS))
    stopped = checkpoint.newest(output) if resume else None
    _refuse_changes(stopped, must_be_equal(cfg), must_be_equal(task.defaults()))
    if not resume and not overwrite:
        distributed.on_main(lambda: run_folder.refuse_old_run(output))
    training, test = task.read_data(cfg)
    _refuse_changes(stopped, _facts(training), {})
    weights = task.read_weights(cfg)
    plan = task.plan(cfg, len(training))
    built = build(task, cfg, training, weights)
    if overwrite:
        distributed.on_main(lambda: run_folder.move_aside(output))
    if weights is not None:
        _write_load_report(output, weights.source, built)
    if stopped is not None:
        built.network.load_state_dict(stopped.shared()["model"])
    filters = _filters(cfg, built, built.model) if stopped is None else read_filters(output)
    engine, ema = prepare(cfg, built, device)
    evaluation = task.evaluation(cfg, test, built.meta, device)
    this_run = build_run(task, cfg, plan, built, engine, ema, evaluation, training, filters)
    start = _begin(cfg, this_run, training, test, stopped)
    if filters is not None and stopped is None and distributed.is_main():
        write_filters(output, filters)
    _announce(cfg, plan, training, test, device)
    loader = task.loader(cfg, training, built.meta, start)

    def report(model: nn.Module, average: nn.Module | None, stopped: Mapping | None) -> Means:
        return evaluation.report(model, average, output, stopped)

    code = _fit(cfg, plan, built, this_run, loader, report, start)
    task.closing(loader)
    if code == 0:
        _write_page(output)
    return code


def _facts(training: Split) -> dict[str, Any]:
    """What a resumed run must share beyond the configuration."""
    return {
        "the classes": list(training.class_names),
        "the number of training images": len(training),
    }


def _refuse_changes(
    stopped: Checkpoint | None, now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    changed = differences(stopped.identity, now, defaults) if stopped is not None else []
    if changed:
        raise UserError(
            f"--resume: {'; '.join(changed)}: a resumed run must share this, set it back or start "
            "anew"
        )


def _evaluate(task: Task, cfg: CfgNode, device: torch.device) -> int:
    if not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only: set MODEL.WEIGHTS, such as OUTPUT_DIR/model_final.pth")
    # A file says which classes it knows. A download waits until the data are known to be there.
    weights = task.read_weights(cfg) if Path(cfg.MODEL.WEIGHTS).is_file() else None
    known_classes = weights.meta.get("class_names") if weights is not None else None
    test = task.read_evaluation_data(cfg, known_classes)
    weights = weights or task.read_weights(cfg)
    assert weights is not None
    built = task.build_model(cfg, weights, test.class_names, True)
    say(f"weights {weights.source}: {built.report}")
    network = assembly.place(cfg, built.network, device).to(memory_format=built.memory_format)
    evaluation = task.evaluation(cfg, test, built.meta, device)
    evaluation.report(network, None, Path(cfg.OUTPUT_DIR))
    _write_page(Path(cfg.OUTPUT_DIR))
    return 0


def _write_page(output: Path) -> None:
    """Writes report.html; whatever goes wrong with it costs no result."""
    page = output / "report.html"
    if distributed.is_main():
        with beside_the_results(page):
            write_report([output], page)
            say(f"wrote {page}")


def build(task: Task, cfg: CfgNode, training: Split, weights: Weights | None) -> BuiltModel:
    """The model as its training begins: weights, the stem's initialisation, TrAct on the stem."""
    built = task.build_model(cfg, weights, training.class_names, False)
    if cfg.MODEL.STEM_INIT:
        images = assembly.sample_of(len(training), cfg.SEED)
        assembly.init_stem(cfg, built, task.plain_images(cfg, training, built.meta, images))
    assembly.put_tract(cfg, built.model, built.input_variance)
    return built


def prepare(cfg: CfgNode, built: BuiltModel, device: torch.device) -> tuple[Any, Ema | None]:
    """DeepSpeed's engine around the network, and the moving average of its weights."""
    network = assembly.place(cfg, built.network, device)
    # Copied before DeepSpeed and the compiler put their hooks on the network.
    ema = assembly.build_ema(cfg, network)
    if built.compile is not None:
        built.compile()
    stem = assembly.named_stem(cfg)
    if stem and built.inner:
        stem = f"{built.inner}.{stem}"
    engine = assembly.build_engine(cfg, network, stem or None)
    # After DeepSpeed's first broadcast, which takes contiguous tensors; other stages flatten them.
    if cfg.DEEPSPEED.zero_optimization.stage == 0:
        for module in (network, *([ema.model] if ema else [])):
            module.to(memory_format=built.memory_format)
    return engine, ema


def build_run(
    task: Task,
    cfg: CfgNode,
    plan: Plan,
    built: BuiltModel,
    engine: Any,
    ema: Ema | None,
    evaluation: Evaluation,
    training: Split,
    filters: Filters | None = None,
) -> Run:
    """What happens between the steps; `filters` are the stem's as the run began."""

    def stem_figures(network: nn.Module) -> Means:
        now = _filters(cfg, built, network.get_submodule(built.inner))
        if filters is None or now is None or now.weight.shape != filters.weight.shape:
            return {}
        return {"stem_turn": mean_turn(filters.weight, now.weight)}

    return Run(
        engine,
        Path(cfg.OUTPUT_DIR),
        max_iter=plan.max_iter,
        log_period=cfg.LOG_PERIOD,
        checkpoint_period=plan.checkpoint_period,
        checkpoint_keep=cfg.SOLVER.CHECKPOINT_KEEP,
        eval_period=plan.eval_period,
        evaluate=evaluation,
        best_metric=cfg.TEST.BEST_METRIC,
        patience=cfg.SOLVER.PATIENCE,
        meta=built.meta,
        identity=must_be_equal(cfg) | _facts(training),
        seed=cfg.SEED,
        images_of=partial(task.images_of, cfg, training) if task.images_of else None,
        ema=ema,
        saved_part=lambda network: network.get_submodule(built.inner),
        diagnostics=lambda: tract_diagnostics(engine.module),
        weight_figures=stem_figures,
        loggers=cfg.LOGGERS,
        config=plain(cfg),
    )


def _filters(cfg: CfgNode, built: BuiltModel, model: nn.Module) -> Filters | None:
    return filters_of(model, assembly.named_stem(cfg), len(built.meta["pixel_mean"]))


def _write_load_report(output: Path, source: str, built: BuiltModel) -> None:
    """Says which tensors came from the weights, and writes all their names."""
    assert built.report is not None
    path = output / "weights_report.json"
    if distributed.is_main():
        content = {"source": source, **dataclasses.asdict(built.report)}
        write_text(path, json.dumps(content, indent=2) + "\n")
    say(f"weights {source}: {built.report}; all names in {path}")


def _begin(
    cfg: CfgNode, this_run: Run, training: Split, test: Split, stopped: Checkpoint | None
) -> int:
    """Opens the run's folder and seeds this process; returns the number of steps done before."""
    torch.manual_seed(cfg.SEED + distributed.rank())  # the ranks' dropout differs
    start = this_run.start(stopped)
    if distributed.is_main():
        write_text(this_run.output / "config.yaml", cfg.dump())
        class_names = list(training.class_names)
        index = {name: label for label, name in enumerate(class_names)}
        text = json.dumps({"classes": class_names, "index": index}, indent=2, ensure_ascii=False)
        write_text(this_run.output / "classes.json", text + "\n")
        provenance.record(
            this_run.output,
            this_run.engine.device,
            resume=stopped is not None,
            images=fingerprints(training, test),
        )
    return start


def fingerprints(training: Split, test: Split) -> dict[str, str]:
    """What tells the images of a run from others, by the part that they are."""
    return {"training": training.fingerprint(), "evaluation": test.fingerprint()}


def _announce(cfg: CfgNode, plan: Plan, training: Split, test: Split, device: torch.device) -> None:
    epochs = plan.max_iter * cfg.SOLVER.IMS_PER_BATCH / len(training)
    say(
        f"{len(training)} training images ({training.name}), {len(test)} for evaluation "
        f"({test.name}), {len(training.class_names)} classes; {plan.max_iter} steps of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images, {epochs:.1f} epochs; "
        f"{distributed.world_size()} process(es) on {device.type}; output in {cfg.OUTPUT_DIR}"
    )


def _fit(
    cfg: CfgNode,
    plan: Plan,
    built: BuiltModel,
    this_run: Run,
    loader: Iterable[Any],
    report: Report,
    start: int,
) -> int:
    """Trains to the end, or until a signal stops it; returns the exit code."""
    lambda_at = assembly.build_lambda(cfg, built.input_variance, plan.max_iter)
    with StopSignal() as stop, this_run.noting_divergence():
        done = train(
            this_run.engine,
            loader,
            start=start,
            max_iter=start if this_run.is_over else plan.max_iter,
            accumulation=cfg.SOLVER.ACCUMULATION,
            lr_at=assembly.build_schedule(cfg, plan),
            after_step=this_run.after_step,
            stop=stop,
            before_step=assembly.lambda_hook(this_run.engine.module, lambda_at),
            memory_format=built.memory_format,
        )
        is_finished = done == plan.max_iter or this_run.is_over
        if not is_finished:
            this_run.save(done)
            this_run.settle()
            say(f"stopped after step {done}: the checkpoint is saved, go on with --resume")
        else:
            this_run.finish(report, done)
        this_run.writers.close()
    return 0 if is_finished else 128 + (stop.number or signal.SIGTERM)
