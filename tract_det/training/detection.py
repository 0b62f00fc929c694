"""The detection task: data in VOC layout, a Faster R-CNN, mean average precision."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from tract_det import distributed
from tract_det.config.detection import get_cfg
from tract_det.data.annotations import DetectionSplit
from tract_det.data.check import summary
from tract_det.data.datasets import Holdout, read_dataset
from tract_det.data.detection import DetectionDataset, aspect_groups, drop_empty
from tract_det.data.detection_loaders import detection_evaluation_loader, detection_loader
from tract_det.data.detection_transforms import detection_train
from tract_det.data.exif import check_headers, with_sizes
from tract_det.data.images import shown
from tract_det.engine.loop import infer
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.evaluation.detection_results import details, sampled_means
from tract_det.evaluation.evaluators import DetectionEvaluator
from tract_det.evaluation.report_figures import report_figures
from tract_det.evaluation.samples import write_samples
from tract_det.evaluation.tables import format_details, format_table
from tract_det.files import write_json
from tract_det.modeling.faster_rcnn import resize_shorter_side
from tract_det.report.folder import FIGURES
from tract_det.training import assembly
from tract_det.training.detectors import build_detector, check_backend, read_detector_weights
from tract_det.training.task import Meta, Plan, Task
from tract_det.visualize import Picture, beside_the_results, detection_grid

_PICTURES = 16  # in detections.png

Results = dict[str, Any]


def _read(cfg: CfgNode, names: Sequence[str], class_names: Sequence[str] | None) -> DetectionSplit:
    root = Path(cfg.DATASETS.ROOT) if cfg.DATASETS.ROOT else None
    data = cfg.DATASETS
    holdout = Holdout(data.HOLDOUT, data.HOLDOUT_SEED)
    exif, max_pixels = cfg.INPUT.EXIF, cfg.INPUT.MAX_PIXELS
    channels = assembly.channels_in(cfg)
    split = read_dataset(
        names,
        root,
        class_names,
        format=data.FORMAT,
        holdout=holdout,
        upright=exif != "ignore",
    )
    say(f"{split.name}: {split.origin}")
    say(summary(split))
    orientations = distributed.on_main(
        lambda: check_headers(split.annotations, exif, channels, max_pixels)
    )
    if orientations.oriented:
        fate = "is ignored" if exif == "ignore" else "turns them upright"
        say(
            f"{split.name}: {orientations.oriented} of {len(split)} images have an EXIF "
            f"orientation, which {fate} (INPUT.EXIF {exif})"
        )
    annotations = with_sizes(split.annotations, orientations)
    read_as = {"max_pixels": max_pixels, "exif": exif, "channels": channels}
    return replace(split, annotations=annotations, **read_as)


def read_data(cfg: CfgNode) -> tuple[DetectionSplit, DetectionSplit]:
    """The training split and the evaluation split, with the same classes."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a split to train on")
    training = _read(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.CLASSES or None)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        training = drop_empty(training, use_difficult=cfg.DATALOADER.USE_DIFFICULT)
    return training, _read(cfg, cfg.DATASETS.TEST, training.class_names)


def read_evaluation_data(cfg: CfgNode, known_classes: Sequence[str] | None) -> DetectionSplit:
    """The evaluation split: with the config's classes, else with those that the weights know."""
    return _read(cfg, cfg.DATASETS.TEST, cfg.DATASETS.CLASSES or known_classes)


def make_plan(cfg: CfgNode, images: int) -> Plan:
    """The lengths as the config has them: they do not depend on the number of images."""
    solver = cfg.SOLVER
    return Plan(
        max_iter=solver.MAX_ITER,
        milestones=solver.STEPS,
        warmup_iters=solver.WARMUP_ITERS,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
    )


def length_keys(cfg: CfgNode, images: int, epochs: float, period: float) -> dict[str, Any]:
    """The keys that set a run's length and the period of its evaluations, both in epochs."""
    solver = cfg.SOLVER
    max_iter = max(1, round(epochs * images / solver.IMS_PER_BATCH))
    keys: dict[str, Any] = {
        # Rounded up, so that the last evaluation of a whole number of periods is the final one.
        "TEST.EVAL_PERIOD": math.ceil(period * images / solver.IMS_PER_BATCH - 1e-6)
    }
    if max_iter == solver.MAX_ITER:
        return keys
    factor = max_iter / solver.MAX_ITER
    keys["SOLVER.MAX_ITER"] = max_iter
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        keys["SOLVER.STEPS"] = sorted({max(1, round(step * factor)) for step in solver.STEPS})
    return keys | assembly.scaled_stop(cfg, factor)


def build_loader(cfg: CfgNode, split: DetectionSplit, meta: Meta, start: int) -> Iterable[Any]:
    """This rank's micro-batches from step `start` on."""
    transform = detection_train(
        min_size=cfg.INPUT.MIN_SIZE_TRAIN,
        max_size=cfg.INPUT.MAX_SIZE_TRAIN,
        flip=cfg.INPUT.FLIP_PROB,
        color_jitter=cfg.INPUT.COLOR_JITTER,
    )
    parts = cfg.SOLVER.ACCUMULATION * distributed.world_size()
    return detection_loader(
        DetectionDataset(split, transform, use_difficult=cfg.DATALOADER.USE_DIFFICULT),
        micro_batch=cfg.SOLVER.IMS_PER_BATCH // parts,
        accumulation=cfg.SOLVER.ACCUMULATION,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=cfg.SEED,
        groups=aspect_groups(split) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        start=start,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def plain_images(
    cfg: CfgNode, split: DetectionSplit, meta: Meta, indices: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """The images at these positions in the size of evaluation, a list of one `(C, H, W)` each."""
    dataset = DetectionDataset(split)
    for index in indices:
        image = dataset[index][0].as_subclass(torch.Tensor)
        yield [resize_shorter_side(image, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)]


def means(results: Results) -> dict[str, float]:
    """The figures over all classes, by their path: `voc_07.mAP`, `coco.AP50`, ..."""
    return {
        f"{group}.{name}": value
        for group in ("voc_07", "voc_area", "coco")
        for name, value in results[group].items()
        if isinstance(value, float)
    }


def _figures(of_model: Results, of_average: Results | None = None) -> dict[str, float]:
    """The figures over all classes; those of the moving average by paths that begin with `ema.`."""
    average = means(of_average) if of_average is not None else {}
    return means(of_model) | {f"ema.{path}": value for path, value in average.items()}


class DetectionEvaluation:
    """Evaluates a detector on a split; see `task.Evaluation`."""

    def __init__(
        self, cfg: CfgNode, split: DetectionSplit, meta: Meta, device: torch.device
    ) -> None:
        self.cfg, self.split, self.device = cfg, split, device
        self.dataset = DetectionDataset(split)

    def __call__(self, model: nn.Module, average: nn.Module | None) -> dict[str, float]:
        """The figures over all classes."""
        return _figures(*(evaluator.evaluate() for evaluator in self._of_each(model, average)))

    def _of_each(self, model: nn.Module, average: nn.Module | None) -> Iterator[DetectionEvaluator]:
        """The evaluators of the model and of its moving average, if there is one."""
        return (self._detect(network) for network in (model, average) if network is not None)

    def _detect(self, model: nn.Module) -> DetectionEvaluator:
        """The evaluator with this rank's detections."""
        evaluator = DetectionEvaluator(
            self.split.annotations, self.split.class_names, rule=self.cfg.TEST.VOC_RULE
        )

        def consume(targets: list[dict], detections: list[dict[str, torch.Tensor]]) -> None:
            for target, image in zip(targets, detections, strict=True):
                labels = image["labels"] - 1  # the model counts the background as 0
                evaluator.add(target["image_id"], image["boxes"], image["scores"], labels)

        loader = detection_evaluation_loader(
            self.dataset,
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
        )
        infer(model, loader, device=self.device, consume=consume)
        return evaluator

    def report(
        self,
        model: nn.Module,
        average: nn.Module | None,
        output: Path,
        stopped: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Evaluates, prints the tables, and writes results, the challenge's files and pictures.

        The moving average's results are under `ema`; files and pictures are the model's own.
        """
        evaluators = list(self._of_each(model, average))
        results = [evaluator.evaluate() for evaluator in evaluators]
        if distributed.is_main():
            sampled = [
                sampled_means(evaluator.evaluated, self.cfg.TEST.BOOTSTRAP)
                for evaluator in evaluators
            ]
            detailed = [
                part | details(evaluator.evaluated, samples=samples)
                for part, evaluator, samples in zip(results, evaluators, sampled, strict=True)
            ]
            write_samples(output, evaluators[0].detections, _figures(*results), *sampled)
            ending = {"stopped": stopped} if stopped else {}
            of_average = {"ema": detailed[1]} if average is not None else {}
            write_json(output / "results.json", detailed[0] | of_average | ending)
            self._write_figures(evaluators[0], output)
            self._show(detailed, evaluators[0], output)
        return _figures(*results)

    def _show(
        self, detailed: Sequence[Results], evaluator: DetectionEvaluator, output: Path
    ) -> None:
        """Prints the results of the model and its moving average; draws, and writes detections."""
        headings = ("", "\nmoving average of the weights:\n")
        for heading, part in zip(headings, detailed, strict=False):
            say(heading + format_table(part))
            say(format_details(part))
        # "voc_2007_test" is the challenge's split "test".
        name = re.sub(r"^(voc_\d{4}|shapes)_", "", self.split.name).replace("+", "_")
        evaluator.write_detections(output / "detections", name)
        say(f"wrote {output / 'results.json'} and detections/")
        picture = output / "detections.png"
        with beside_the_results(picture):
            detection_grid(picture, self._pictures(evaluator), self.split.class_names)
            say(f"wrote {picture}")

    def _write_figures(self, evaluator: DetectionEvaluator, output: Path) -> None:
        """What the report shows beyond the results."""
        figures = report_figures(evaluator.evaluated)
        paths = {a.image_id: str(a.path.absolute()) for a in self.split.annotations}
        for entry in figures["worst"]:
            entry["path"] = paths[entry["image"]]
        write_json(output / FIGURES, figures | {"classes": list(self.split.class_names)})

    def _pictures(self, evaluator: DetectionEvaluator) -> list[Picture]:
        """Images spread evenly over the split."""
        annotations = self.split.annotations
        step = max(1, len(annotations) // _PICTURES)
        pictures = []
        for index in range(0, len(annotations), step)[:_PICTURES]:
            annotation = annotations[index]
            boxes, scores, labels = evaluator.detections[annotation.image_id]
            pixels = shown(self.dataset.read(index)).permute(1, 2, 0).numpy()
            pictures.append(
                Picture(annotation.path, annotation.boxes, boxes, labels, scores, pixels)
            )
        return pictures


TASK = Task(
    check=check_backend,
    read_data=read_data,
    read_evaluation_data=read_evaluation_data,
    read_weights=read_detector_weights,
    plan=make_plan,
    build_model=build_detector,
    loader=build_loader,
    plain_images=plain_images,
    evaluation=DetectionEvaluation,
    defaults=get_cfg,
    length=length_keys,
)
