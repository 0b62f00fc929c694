"""Trains an image classifier, with or without TrAct, and reports its top-1 and top-5.

    python tools/pretrain_net.py DATASETS.ROOT path/to/cifar10    # 10,000 images, minutes on a CPU
    python tools/pretrain_net.py --config-file configs/CIFAR/cpu_small_tract.yaml
    deepspeed --num_gpus 8 tools/pretrain_net.py --config-file FILE   # many processes; or torchrun
    python tools/pretrain_net.py --config-file FILE --resume      # goes on where OUTPUT_DIR stopped
    python tools/pretrain_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE.pth
    python tools/pretrain_net.py --config-file FILE SOLVER.EPOCHS 5 OUTPUT_DIR output/short

Files inherit with `_BASE_`; trailing `KEY VALUE` pairs override them. All keys with their meaning:
`tract_det/config_classification.py`. The weights go into a detector by `MODEL.WEIGHTS` of
`tools/train_net.py`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from tract_det.tools import common
from tract_det.tools.classification import (
    Plan,
    build_loader,
    build_model,
    dataset,
    pixels,
    plan,
    read_data,
    seen_variance,
)

from tract_det import distributed, tract_diagnostics
from tract_det.cli import run
from tract_det.config_classification import load_cfg
from tract_det.data.classification import ClassificationSplit
from tract_det.data.classification_loaders import ImageBatches, classification_evaluation_loader
from tract_det.data.classification_transforms import classification_test
from tract_det.engine import checkpoint, ds
from tract_det.engine.ema import Ema
from tract_det.engine.loop import infer
from tract_det.engine.run import Run
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.evaluation.classification import TopK
from tract_det.evaluation.evaluators import write_json
from tract_det.files import write_text
from tract_det.modeling.classification_loss import ClassifierWithLoss
from tract_det.modeling.weight_files import read_weights

DEFAULT = common.HERE / "configs" / "CIFAR" / "cpu_small.yaml"

Results = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return common.parse(__doc__, DEFAULT, argv)


def memory_format(cfg: CfgNode) -> torch.memory_format:
    """Of the images, and of the weights where ZeRO does not flatten them."""
    return torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.preserve_format


class Evaluation:
    """Evaluates a model on the evaluation split, as often as it is asked to."""

    def __init__(
        self, cfg: CfgNode, split: ClassificationSplit, meta: dict[str, Any], device: torch.device
    ) -> None:
        self.cfg, self.device = cfg, device
        size, resize = cfg.INPUT.SIZE, cfg.INPUT.RESIZE_TEST
        transform = classification_test(
            size,
            resize=round(size * 256 / 224) if resize == -1 else resize,
            interpolation=cfg.INPUT.INTERPOLATION,
            **pixels(cfg, meta),
        )
        self.dataset = dataset(cfg, split, transform)

    def __call__(self, model: nn.Module, average: nn.Module | None = None) -> Results:
        """The results, those of the moving average under `ema`. Every rank must call it."""
        results = self._results(model)
        if average is not None:
            results["ema"] = self._results(average)
        return results

    def _results(self, model: nn.Module) -> Results:
        top = TopK(len(self.dataset))
        loader = classification_evaluation_loader(
            self.dataset,
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )
        infer(
            model,
            loader,
            device=self.device,
            consume=lambda labels, ids, logits: top.add(logits, labels, ids),
            memory_format=memory_format(self.cfg),
        )
        return top.evaluate(skipped=len(loader.skipped))

    def report(self, model: nn.Module, average: nn.Module | None, output: Path) -> Results:
        """Evaluates, prints the figures and writes `results.json`."""
        results = self(model, average)
        if distributed.is_main():
            write_json(output / "results.json", results)
            for name, one in (("", results), ("moving average: ", results.get("ema"))):
                if one:
                    say(
                        f"{name}top-1 {one['top1']:.2f} %, top-5 {one['top5']:.2f} % of "
                        f"{one['images']} images"
                    )
            say(f"wrote {output / 'results.json'}")
        return results


def means(results: Results) -> dict[str, float]:
    """The figures by their path: `top1`, `top5`, `ema.top1`, `ema.top5`."""
    found = {name: results[name] for name in ("top1", "top5")}
    if "ema" in results:
        found |= {f"ema.{name}": results["ema"][name] for name in ("top1", "top5")}
    return found


def prepare(
    cfg: CfgNode, model: ClassifierWithLoss, device: torch.device
) -> tuple[Any, Ema | None]:
    """DeepSpeed's engine around the model, and the moving average of its weights."""
    common.place(cfg, model, device)
    # Copied before DeepSpeed and the compiler have put their hooks on the model.
    given = cfg.MODEL.EMA
    ema = (
        Ema(model, decay=given.DECAY, period=given.PERIOD, warmup=given.WARMUP)
        if given.ENABLED
        else None
    )
    if cfg.MODEL.COMPILE:
        model.model.compile()
    stem = f"model.{cfg.MODEL.TRACT.STEM}" if cfg.MODEL.TRACT.STEM else None
    engine = common.build_engine(cfg, model, stem)
    if cfg.DEEPSPEED.zero_optimization.stage == 0:  # the others flatten the weights
        # Now: what DeepSpeed broadcasts at its start must be contiguous.
        for one in (model, *([ema.model] if ema else [])):
            one.to(memory_format=memory_format(cfg))
    return engine, ema


def build_run(
    cfg: CfgNode,
    engine: Any,
    ema: Ema | None,
    meta: dict[str, Any],
    evaluation: Evaluation,
    lengths: Plan,
) -> Run:
    """What happens between the steps."""
    data = common.plain(cfg.DATASETS) | {"ROOT": ""}  # a data set may move
    return Run(
        engine,
        Path(cfg.OUTPUT_DIR),
        max_iter=lengths.max_iter,
        log_period=cfg.LOG_PERIOD,
        checkpoint_period=lengths.checkpoint_period,
        eval_period=lengths.eval_period,
        evaluate=lambda model, average: means(evaluation(model, average)),
        best_metric=cfg.TEST.BEST_METRIC,
        meta=meta,
        identity=common.identity(cfg)
        | {
            "DATASETS": data,
            "INPUT": common.plain(cfg.INPUT),
            "MIX": common.plain(cfg.MIX),
            "MODEL.NAME": cfg.MODEL.NAME,
            "MODEL.EMA": common.plain(cfg.MODEL.EMA),
        },
        ema=ema,
        saved_part=lambda model: model.get_submodule("model"),
        diagnostics=lambda: tract_diagnostics(engine.module),
    )


def write_classes(output: Path, class_names: list[str]) -> None:
    """Writes `classes.json`: the class list, and the label of each class."""
    index = {name: label for label, name in enumerate(class_names)}
    text = json.dumps({"classes": class_names, "index": index}, indent=2, ensure_ascii=False)
    write_text(output / "classes.json", text + "\n")


def do_train(cfg: CfgNode, device: torch.device, resume: bool) -> int:
    """Trains, evaluates, saves; returns the exit code."""
    output = Path(cfg.OUTPUT_DIR)
    if resume:
        checkpoint.last(output)  # refuses before anything is read
    weights = read_weights(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None
    split, test = read_data(cfg, train=True)
    assert split is not None
    lengths = plan(cfg, len(split))
    model, meta = build_model(cfg, weights, tuple(split.class_names), strict=False)
    engine, ema = prepare(cfg, model, device)
    common.make_output(output)
    evaluation = Evaluation(cfg, test, meta, device)
    this_run = build_run(cfg, engine, ema, meta, evaluation, lengths)
    start = common.begin(cfg, this_run, resume=resume)
    if distributed.is_main():
        write_classes(output, meta["class_names"])
    epochs = lengths.max_iter * cfg.SOLVER.IMS_PER_BATCH / len(split)
    say(
        f"{len(split)} training images ({split.name}), {len(test)} for evaluation ({test.name}), "
        f"{len(split.class_names)} classes; {lengths.max_iter} steps of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images, {epochs:.1f} epochs; "
        f"{distributed.world_size()} process(es) on {device.type}; output in {output}"
    )
    loader = build_loader(cfg, split, meta, start)
    code = common.fit(
        cfg,
        this_run,
        loader,
        lambda model, average: means(evaluation.report(model, average, output)),
        start=start,
        lr_at=common.build_schedule(
            cfg,
            max_iter=lengths.max_iter,
            steps=lengths.milestones,
            warmup_iters=lengths.warmup_iters,
        ),
        lambda_at=common.build_lambda(cfg, seen_variance(cfg, meta["pixel_std"]), lengths.max_iter),
        memory_format=memory_format(cfg),
    )
    say_skipped(loader)
    return code


def say_skipped(loader: ImageBatches) -> None:
    """Says how many corrupt images there were. Every rank must call it."""
    total: Counter[str] = sum(distributed.gather(loader.skipped), Counter())
    if total:
        names = ", ".join(sorted(total)[:5]) + (", ..." if len(total) > 5 else "")
        say(f"{len(total)} corrupt images were replaced, {total.total()} times: {names}")


def do_eval(cfg: CfgNode, device: torch.device) -> int:
    """Evaluates MODEL.WEIGHTS; returns the exit code."""
    if not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only: set MODEL.WEIGHTS, such as OUTPUT_DIR/model_final.pth")
    weights = read_weights(cfg.MODEL.WEIGHTS)
    _, test = read_data(cfg, train=False)
    model, meta = build_model(cfg, weights, tuple(test.class_names), strict=True)
    common.place(cfg, model, device).to(memory_format=memory_format(cfg))
    Evaluation(cfg, test, meta, device).report(model, None, Path(cfg.OUTPUT_DIR))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = parse(argv)
    cfg = load_cfg(common.find_config(args.config_file), args.opts)
    device = ds.start(cfg.MODEL.DEVICE)
    torch.manual_seed(cfg.SEED)
    code = do_eval(cfg, device) if args.eval_only else do_train(cfg, device, args.resume)
    ds.stop()
    return code


if __name__ == "__main__":
    run(main)
