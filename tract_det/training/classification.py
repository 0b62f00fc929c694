"""The classification task: image folders and small known sets, a classifier, top-1 and top-5."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from tract_det import distributed
from tract_det.config.classification import get_cfg
from tract_det.data.classification import (
    ClassificationDataset,
    ClassificationSplit,
    read_classification,
)
from tract_det.data.classification_loaders import (
    ImageBatches,
    classification_evaluation_loader,
    classification_loader,
)
from tract_det.data.classification_transforms import Mix, classification_test, classification_train
from tract_det.data.headers import check_headers
from tract_det.data.sampling import training_stream
from tract_det.engine.loop import infer
from tract_det.engine.writers import say
from tract_det.errors import UserError
from tract_det.evaluation.classification import Mistakes, TopK, sampled_accuracies
from tract_det.evaluation.samples import write_samples
from tract_det.files import write_json
from tract_det.modeling.weight_files import read_weights
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD
from tract_det.report.folder import FIGURES
from tract_det.training import assembly
from tract_det.training.classifiers import build_classifier, is_mixed, memory_format
from tract_det.training.task import Meta, Plan, Task

Results = dict[str, Any]


# Data


def _read(cfg: CfgNode, *, train: bool) -> ClassificationSplit:
    data = cfg.DATASETS
    if not data.ROOT:
        raise UserError("DATASETS.ROOT is empty: name the folder that holds the data set")
    split = read_classification(
        data.NAME,
        Path(data.ROOT),
        train=train,
        holdout=data.HOLDOUT,
        seed=data.HOLDOUT_SEED,
        limit=data.LIMIT if train else 0,
    )
    max_pixels, channels = cfg.INPUT.MAX_PIXELS, assembly.channels_in(cfg)
    if split.files is not None and not data.SKIP_CORRUPT:
        names = [split.image_id(index) for index in range(len(split))]
        distributed.on_main(lambda: check_headers(split.root, names, max_pixels, channels))
    return replace(split, max_pixels=max_pixels, channels=channels)


def read_data(cfg: CfgNode) -> tuple[ClassificationSplit, ClassificationSplit]:
    """The training split and the evaluation split, with the same classes."""
    return _read(cfg, train=True), _read(cfg, train=False)


def read_evaluation_data(cfg: CfgNode, known_classes: Sequence[str] | None) -> ClassificationSplit:
    """The evaluation split. Its folders name the classes, whatever the weights know."""
    return _read(cfg, train=False)


def make_plan(cfg: CfgNode, images: int) -> Plan:
    """What the config counts in epochs, in steps over so many training images."""
    solver = cfg.SOLVER

    def steps(epochs: float) -> int:
        return max(1, round(epochs * images / solver.IMS_PER_BATCH))

    max_iter = solver.MAX_ITER or steps(solver.EPOCHS)
    return Plan(
        max_iter=max_iter,
        milestones=[round(at * max_iter) if at < 1 else steps(at) for at in solver.STEPS],
        warmup_iters=steps(solver.WARMUP_EPOCHS) if solver.WARMUP_EPOCHS > 0 else 0,
        # Rounded up, so that the last evaluation of a whole number of periods is the final one.
        eval_period=math.ceil(cfg.TEST.EVAL_EPOCHS * images / solver.IMS_PER_BATCH - 1e-6),
        checkpoint_period=steps(solver.CHECKPOINT_EPOCHS),
    )


def length_keys(cfg: CfgNode, images: int, epochs: float, period: float) -> dict[str, Any]:
    """The keys that set a run's length and the period of its evaluations, both in epochs."""
    solver = cfg.SOLVER
    max_iter = make_plan(cfg, images).max_iter
    keys: dict[str, Any] = {"TEST.EVAL_EPOCHS": period}
    steps = max(1, round(epochs * images / solver.IMS_PER_BATCH))
    if steps == max_iter:
        return keys
    factor = steps / max_iter
    keys |= {"SOLVER.MAX_ITER": steps} if solver.MAX_ITER else {"SOLVER.EPOCHS": epochs}
    if any(step >= 1 for step in solver.STEPS):
        keys["SOLVER.STEPS"] = [step * factor for step in solver.STEPS]
    return keys | assembly.scaled_stop(cfg, factor)


def _pixel_options(cfg: CfgNode, meta: Meta) -> dict[str, Any]:
    """How the transforms turn uint8 pixels into what the model sees."""
    if cfg.MODEL.STANDARDIZE:
        return {"mean": meta["pixel_mean"], "std": meta["pixel_std"]}
    return {
        "standardize": False,
        "value_range": cfg.MODEL.VALUE_RANGE,
        "mean": IMAGENET_MEAN,  # the colour of erased rectangles
        "std": IMAGENET_STD,
    }


def _dataset(cfg: CfgNode, split: ClassificationSplit, transform: Any) -> ClassificationDataset:
    data = cfg.DATASETS
    return ClassificationDataset(split, transform, skip_corrupt=data.SKIP_CORRUPT, cache=data.CACHE)


def build_loader(cfg: CfgNode, split: ClassificationSplit, meta: Meta, start: int) -> ImageBatches:
    """This rank's micro-batches from step `start` on."""
    options, mix = cfg.INPUT, cfg.MIX
    transform = classification_train(
        options.SIZE,
        crop=options.CROP,
        scale=tuple(options.SCALE),
        ratio=tuple(options.RATIO),
        padding=options.PADDING,
        flip=options.FLIP_PROB,
        rotation=options.ROTATION,
        auto_augment=options.AUTO_AUGMENT,
        magnitude=options.MAGNITUDE,
        num_ops=options.NUM_OPS,
        color_jitter=options.COLOR_JITTER,
        erasing=options.ERASING,
        interpolation=options.INTERPOLATION,
        **_pixel_options(cfg, meta),
    )
    mixer = Mix(
        len(split.class_names),
        mixup_alpha=mix.MIXUP_ALPHA,
        cutmix_alpha=mix.CUTMIX_ALPHA,
        prob=mix.PROB,
        switch_prob=mix.SWITCH_PROB,
        smoothing=0.0 if cfg.MODEL.LOSS == "bce" else mix.SMOOTHING,
    )
    parts = cfg.SOLVER.ACCUMULATION * distributed.world_size()
    return classification_loader(
        _dataset(cfg, split, transform),
        micro_batch=cfg.SOLVER.IMS_PER_BATCH // parts,
        accumulation=cfg.SOLVER.ACCUMULATION,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=cfg.SEED,
        start=start,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        mix=mixer if is_mixed(cfg) else None,
        repeats=options.REPEATS,
    )


def _test_dataset(cfg: CfgNode, split: ClassificationSplit, meta: Meta) -> ClassificationDataset:
    """The images of a split without random augmentation."""
    transform = classification_test(
        cfg.INPUT.SIZE,
        resize=meta["resize"],
        interpolation=cfg.INPUT.INTERPOLATION,
        **_pixel_options(cfg, meta),
    )
    return _dataset(cfg, split, transform)


def plain_images(
    cfg: CfgNode, split: ClassificationSplit, meta: Meta, indices: Sequence[int]
) -> Iterator[Tensor]:
    """The images at these positions as in evaluation, `(1, C, H, W)` each."""
    dataset = _test_dataset(cfg, split, meta)
    return (dataset[index][0][None] for index in indices)


def say_skipped(loader: ImageBatches) -> None:
    """Says how many corrupt images were replaced. Every rank must call it."""
    total: Counter[str] = sum(distributed.gather(loader.skipped), Counter())
    if total:
        names = ", ".join(sorted(total)[:5]) + (", ..." if len(total) > 5 else "")
        say(f"{len(total)} corrupt images were replaced, {total.total()} times: {names}")


# Evaluation


class ClassificationEvaluation:
    """Evaluates a classifier on a split; see `task.Evaluation`."""

    def __init__(
        self, cfg: CfgNode, split: ClassificationSplit, meta: Meta, device: torch.device
    ) -> None:
        self.cfg, self.device = cfg, device
        self.dataset = _test_dataset(cfg, split, meta)

    def __call__(self, model: nn.Module, average: nn.Module | None) -> dict[str, float]:
        """`top1`, `top5`, `ema.top1`, `ema.top5`."""
        return means(_results(self._of_each(model, average)))

    def _of_each(
        self, model: nn.Module, average: nn.Module | None, mistakes: Mistakes | None = None
    ) -> list[TopK]:
        """The counts of the model, whose mistakes are noted, and of its moving average if any."""
        counts = [self._count(model, mistakes)]
        return counts + ([self._count(average)] if average is not None else [])

    def _count(self, model: nn.Module, mistakes: Mistakes | None = None) -> TopK:
        """The counts of this rank's images."""
        top = TopK(len(self.dataset))

        def consume(labels: Tensor, ids: Sequence[str], logits: Tensor) -> None:
            top.add(logits, labels, ids)
            if mistakes is not None:
                mistakes.add(logits, labels, ids)

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
            consume=consume,
            memory_format=memory_format(self.cfg),
        )
        top.skipped = len(loader.skipped)
        return top

    def report(
        self,
        model: nn.Module,
        average: nn.Module | None,
        output: Path,
        stopped: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Evaluates, prints the figures and writes `results.json`."""
        split = self.dataset.split
        mistakes = Mistakes(split.class_names)
        counts = self._of_each(model, average, mistakes)
        results = _results(counts)
        images = [top.by_image() for top in counts]
        results["classes"] = mistakes.by_class()
        shown = mistakes.figures()
        if distributed.is_main():
            ending = {"stopped": stopped} if stopped else {}
            write_json(output / "results.json", results | ending)
            for entry in shown["worst"]:
                is_file = split.files is not None
                entry["path"] = str((split.root / entry["image"]).absolute()) if is_file else ""
            write_json(output / FIGURES, shown)
            samples = self.cfg.TEST.BOOTSTRAP
            sampled = [sampled_accuracies(correct, samples) for _, correct in images]
            write_samples(output, images[0][0], means(results), *sampled)
            for name, figures in (("", results), ("moving average: ", results.get("ema"))):
                if figures:
                    say(
                        f"{name}top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} % of "
                        f"{figures['images']} images"
                    )
            say(f"wrote {output / 'results.json'}")
        return means(results)


def _results(counts: Sequence[TopK]) -> Results:
    """The results of a model, with those of its moving average, if there is one, under `ema`."""
    of_model, *of_average = (top.evaluate() for top in counts)
    return of_model | ({"ema": of_average[0]} if of_average else {})


def means(results: Results) -> dict[str, float]:
    """The figures by their path: `top1`, `top5`, `ema.top1`, `ema.top5`."""
    figures = {name: results[name] for name in ("top1", "top5")}
    if "ema" in results:
        figures |= {f"ema.{name}": results["ema"][name] for name in ("top1", "top5")}
    return figures


def images_of_step(cfg: CfgNode, split: ClassificationSplit, step: int) -> list[str]:
    """The ids of the images of a step, counted from 1, over all ranks and micro-batches."""
    stream = training_stream(
        len(split),
        cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        start=step - 1,
        repeats=cfg.INPUT.REPEATS,
    )
    return [split.image_id(index) for index, _ in next(stream)]


TASK = Task(
    check=lambda cfg: None,
    read_data=read_data,
    read_evaluation_data=read_evaluation_data,
    read_weights=lambda cfg: read_weights(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None,
    plan=make_plan,
    build_model=build_classifier,
    loader=build_loader,
    plain_images=plain_images,
    evaluation=ClassificationEvaluation,
    defaults=get_cfg,
    images_of=images_of_step,
    length=length_keys,
    closing=say_skipped,
)
