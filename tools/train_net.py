"""Trains Faster R-CNN, with or without TrAct, on data in VOC layout, and reports mAP.

    python tools/train_net.py                                     # quick start: drawn shapes
    python tools/train_net.py --config-file configs/BCCD-Detection/faster_rcnn_R_18_FPN_tract.yaml
    deepspeed --num_gpus 8 tools/train_net.py --config-file FILE  # many processes; torchrun as well
    python tools/train_net.py --config-file FILE --resume         # goes on where OUTPUT_DIR stopped
    python tools/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE.pth
    python tools/train_net.py --config-file FILE SOLVER.MAX_ITER 500 OUTPUT_DIR output/short

Files inherit with `_BASE_`; trailing `KEY VALUE` pairs override them. All keys with their meaning:
`tract_det/config.py`.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn
from tract_det.tools import common
from tract_det.tools.common import (
    HERE,
    begin,
    build_engine,
    build_lambda,
    build_schedule,
    find_config,
    fit,
    identity,
    make_output,
    place,
    plain,
)
from tract_det.tools.detectors import build_model, read_model_weights

from tract_det import distributed, tract_diagnostics
from tract_det.cli import run
from tract_det.config import load_cfg
from tract_det.data.detection import VOCDetection, aspect_groups, drop_empty
from tract_det.data.detection_loaders import detection_evaluation_loader as evaluation_loader
from tract_det.data.detection_loaders import detection_loader as training_loader
from tract_det.data.detection_transforms import detection_train
from tract_det.data.voc import VOCSplit, read_dataset
from tract_det.engine import checkpoint, ds
from tract_det.engine.loop import infer
from tract_det.engine.run import Run
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.evaluation.evaluators import DetectionEvaluator, format_table, write_json
from tract_det.modeling.weight_files import Weights
from tract_det.pixels import input_variance
from tract_det.visualize import Picture, detection_grid

QUICK_START = HERE / "configs" / "quickstart" / "shapes.yaml"
PICTURES = 16

Results = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return common.parse(__doc__, QUICK_START, argv)


def read_data(
    cfg: CfgNode, weights: Weights | None, *, train: bool
) -> tuple[VOCSplit | None, VOCSplit]:
    """The training split (where asked for) and the evaluation split, with the same classes."""
    root = Path(cfg.DATASETS.ROOT) if cfg.DATASETS.ROOT else None
    classes = cfg.DATASETS.CLASSES or None
    if not train:
        classes = classes or (weights.meta.get("class_names") if weights else None)
        return None, read_dataset(cfg.DATASETS.TEST, root, classes)
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a split to train on")
    split = read_dataset(cfg.DATASETS.TRAIN, root, classes)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        split = drop_empty(split, use_difficult=cfg.DATALOADER.USE_DIFFICULT)
    return split, read_dataset(cfg.DATASETS.TEST, root, split.class_names)


class Evaluation:
    """Evaluates a model on the evaluation split, as often as it is asked to."""

    def __init__(self, cfg: CfgNode, split: VOCSplit, device: torch.device) -> None:
        self.cfg, self.split, self.device = cfg, split, device
        self.dataset = VOCDetection(split)

    def __call__(self, model: nn.Module) -> tuple[Results, DetectionEvaluator]:
        """Results and the evaluator that holds the detections. Every rank must call it."""
        evaluator = DetectionEvaluator(
            self.split.annotations, self.split.class_names, rule=self.cfg.TEST.VOC_RULE
        )

        def consume(targets: list[dict], found: list[dict[str, torch.Tensor]]) -> None:
            for target, one in zip(targets, found, strict=True):
                evaluator.add(target["image_id"], one["boxes"], one["scores"], one["labels"] - 1)

        loader = evaluation_loader(
            self.dataset,
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )
        infer(model, loader, device=self.device, consume=consume)
        return evaluator.evaluate(), evaluator

    def report(self, model: nn.Module, output: Path) -> Results:
        """Evaluates, prints the table, and writes results, the challenge's files and pictures."""
        results, evaluator = self(model)
        if not distributed.is_main():
            return results
        # "voc_2007_test" is the challenge's split "test".
        name = re.sub(r"^(voc_\d{4}|shapes)_", "", self.split.name).replace("+", "_")
        evaluator.write_detections(output / "detections", name)
        detection_grid(output / "detections.png", self._pictures(evaluator), self.split.class_names)
        write_json(output / "results.json", results)
        say(format_table(results))
        say(f"wrote {output / 'results.json'}, detections.png and detections/")
        return results

    def _pictures(self, evaluator: DetectionEvaluator) -> list[Picture]:
        """Images spread evenly over the split."""
        annotations = self.split.annotations
        step = max(1, len(annotations) // PICTURES)
        return [
            Picture(one.path, one.boxes, found.boxes, found.labels, found.scores)
            for one in annotations[::step][:PICTURES]
            for found in [evaluator.detections[one.image_id]]
        ]


def build_loader(cfg: CfgNode, split: VOCSplit, start: int) -> Any:
    """This rank's micro-batches from step `start` on."""
    transform = detection_train(
        min_size=cfg.INPUT.MIN_SIZE_TRAIN,
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        flip=cfg.INPUT.FLIP_PROB,
        color_jitter=cfg.INPUT.COLOR_JITTER,
    )
    parts = cfg.SOLVER.ACCUMULATION * distributed.world_size()
    return training_loader(
        VOCDetection(split, transform, use_difficult=cfg.DATALOADER.USE_DIFFICULT),
        micro_batch=cfg.SOLVER.IMS_PER_BATCH // parts,
        accumulation=cfg.SOLVER.ACCUMULATION,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=cfg.SEED,
        groups=aspect_groups(split) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        start=start,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def means(results: Results) -> dict[str, float]:
    """The figures over all classes, by their path: `voc_07.mAP`, `coco.AP50`, ..."""
    return {
        f"{group}.{name}": value
        for group in ("voc_07", "voc_area", "coco")
        for name, value in results[group].items()
        if isinstance(value, float)
    }


def build_run(cfg: CfgNode, engine: Any, meta: dict[str, Any], evaluation: Evaluation) -> Run:
    """What happens between the steps."""
    return Run(
        engine,
        Path(cfg.OUTPUT_DIR),
        max_iter=cfg.SOLVER.MAX_ITER,
        log_period=cfg.LOG_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        eval_period=cfg.TEST.EVAL_PERIOD,
        evaluate=lambda model, _: means(evaluation(model)[0]),
        best_metric=cfg.TEST.BEST_METRIC,
        meta=meta,
        identity=identity(cfg)
        | {
            "DATASETS.TRAIN": list(cfg.DATASETS.TRAIN),
            "MODEL.BACKBONE": plain(cfg.MODEL.BACKBONE),
            "MODEL.DETECTRON2": plain(cfg.MODEL.DETECTRON2),
        },
        diagnostics=lambda: tract_diagnostics(engine.module),
    )


def do_train(cfg: CfgNode, device: torch.device, resume: bool) -> int:
    """Trains, evaluates, saves; returns the exit code."""
    output = Path(cfg.OUTPUT_DIR)
    if resume:
        checkpoint.last(output)  # refuses before anything is read
    weights = read_model_weights(cfg)
    split, test = read_data(cfg, weights, train=True)
    assert split is not None
    model, meta = build_model(cfg, weights, split.class_names, strict=False)
    stem = cfg.MODEL.TRACT.STEM or None
    engine = build_engine(cfg, place(cfg, model, device), stem)
    make_output(output)
    evaluation = Evaluation(cfg, test, device)
    this_run = build_run(cfg, engine, meta, evaluation)
    start = begin(cfg, this_run, resume=resume)
    steps = cfg.SOLVER.MAX_ITER
    epochs = steps * cfg.SOLVER.IMS_PER_BATCH / len(split.annotations)
    say(
        f"{len(split.annotations)} training images ({split.name}), {len(test.annotations)} for "
        f"evaluation ({test.name}), {len(split.class_names)} classes; {steps} steps of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images, {epochs:.1f} epochs; "
        f"{distributed.world_size()} process(es) on {device.type}; output in {output}"
    )
    return fit(
        cfg,
        this_run,
        build_loader(cfg, split, start),
        lambda model, _: means(evaluation.report(model, output)),
        start=start,
        lr_at=build_schedule(
            cfg, max_iter=steps, steps=cfg.SOLVER.STEPS, warmup_iters=cfg.SOLVER.WARMUP_ITERS
        ),
        lambda_at=build_lambda(cfg, input_variance(meta["pixel_std"]), steps),
    )


def do_eval(cfg: CfgNode, device: torch.device) -> int:
    """Evaluates MODEL.WEIGHTS; returns the exit code."""
    if not cfg.MODEL.WEIGHTS:
        raise UserError("--eval-only: set MODEL.WEIGHTS, such as OUTPUT_DIR/model_final.pth")
    weights = read_model_weights(cfg)
    _, test = read_data(cfg, weights, train=False)
    model, _ = build_model(cfg, weights, test.class_names, strict=True)
    Evaluation(cfg, test, device).report(place(cfg, model, device), Path(cfg.OUTPUT_DIR))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = parse(argv)
    cfg = load_cfg(find_config(args.config_file), args.opts)
    device = ds.start(cfg.MODEL.DEVICE)
    torch.manual_seed(cfg.SEED)
    code = do_eval(cfg, device) if args.eval_only else do_train(cfg, device, args.resume)
    ds.stop()
    return code


if __name__ == "__main__":
    run(main)
