"""What `pretrain_net.py` makes of a classifier's config: lengths, data, model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from tract_det.tools import common

from tract_det import __version__, distributed
from tract_det.data.classification import (
    ClassificationDataset,
    ClassificationSplit,
    read_classification,
)
from tract_det.data.classification_loaders import ImageBatches, classification_loader
from tract_det.data.classification_transforms import Mix, classification_train
from tract_det.errors import UserError
from tract_det.modeling.classification_loss import ClassifierWithLoss
from tract_det.modeling.classifiers import build_classifier, check_image_size
from tract_det.modeling.loading import load_into_classifier
from tract_det.modeling.weight_files import Weights
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD, input_variance, pixel_statistics


@dataclass(frozen=True)
class Plan:
    """What the config counts in epochs, in optimizer steps."""

    max_iter: int
    milestones: list[int]
    warmup_iters: int
    eval_period: int
    checkpoint_period: int


def plan(cfg: CfgNode, images: int) -> Plan:
    """The lengths for so many training images."""
    solver = cfg.SOLVER

    def steps(epochs: float) -> int:
        return max(1, round(epochs * images / solver.IMS_PER_BATCH))

    return Plan(
        max_iter=solver.MAX_ITER or steps(solver.EPOCHS),
        milestones=[steps(epochs) for epochs in solver.STEPS],
        warmup_iters=steps(solver.WARMUP_EPOCHS) if solver.WARMUP_EPOCHS > 0 else 0,
        eval_period=steps(cfg.TEST.EVAL_EPOCHS) if cfg.TEST.EVAL_EPOCHS > 0 else 0,
        checkpoint_period=steps(solver.CHECKPOINT_EPOCHS),
    )


def read_data(
    cfg: CfgNode, *, train: bool
) -> tuple[ClassificationSplit | None, ClassificationSplit]:
    """The training split (where asked for) and the evaluation split, with the same classes."""
    data = cfg.DATASETS
    if not data.ROOT:
        raise UserError("DATASETS.ROOT is empty: name the folder that holds the data set")
    root = Path(data.ROOT)
    options: dict[str, Any] = {"holdout": data.HOLDOUT, "seed": data.HOLDOUT_SEED}
    test = read_classification(data.NAME, root, train=False, **options)
    if not train:
        return None, test
    return read_classification(data.NAME, root, train=True, limit=data.LIMIT, **options), test


def statistics(cfg: CfgNode, weights: Weights | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in [0, 255] that take the pixels to what the model sees.

    Without standardisation, those that take them to [0, VALUE_RANGE].
    """
    known, source = (weights.meta, weights.source) if weights else (None, "")
    if cfg.MODEL.STANDARDIZE:
        return pixel_statistics(known, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, source=source)
    mean, std = [0.0] * 3, [255.0 / cfg.MODEL.VALUE_RANGE] * 3
    try:
        return pixel_statistics(known, mean, std, source=source)
    except UserError:
        assert weights is not None
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} was trained with other pixels than MODEL.STANDARDIZE "
            f"False with MODEL.VALUE_RANGE {cfg.MODEL.VALUE_RANGE:g} gives: leave both keys out"
        ) from None


def seen_variance(cfg: CfgNode, std: list[float]) -> float:
    """The variance of what the stem sees, in units of standardised pixels."""
    return 1.0 if cfg.MODEL.PATCH_NORM else input_variance(std)


def build_model(
    cfg: CfgNode, weights: Weights | None, class_names: tuple[str, ...], *, strict: bool
) -> tuple[ClassifierWithLoss, dict[str, Any]]:
    """The classifier with its loss, weights and TrAct, and what is to be saved with it."""
    settings = cfg.MODEL
    mean, std = statistics(cfg, weights)
    options = {
        "small_images": settings.SMALL_IMAGES,
        "norm": settings.NORM,
        "patch_norm": settings.PATCH_NORM,
        "image_size": cfg.INPUT.SIZE,
        "width": settings.WIDTH,
    }
    model = build_classifier(
        settings.NAME,
        len(class_names),
        drop_rate=settings.DROP_RATE,
        drop_path_rate=settings.DROP_PATH_RATE,
        checkpointing=settings.CHECKPOINTING,
        **options,
    )
    check_image_size(model, settings.NAME, cfg.INPUT.SIZE)
    if weights is not None:
        report = load_into_classifier(model, weights, class_names, strict=strict)
        common.say_loaded(cfg, weights.source, report, strict=strict)
    if not strict:
        common.put_tract(cfg, model, seen_variance(cfg, std))
    is_bce = settings.LOSS == "bce"
    # Mixed targets are smooth already, except those that the loss turns into 1 and 0.
    smoothing = 0.0 if is_mixed(cfg) and not is_bce else cfg.MIX.SMOOTHING
    meta = {
        "version": __version__,
        "model": settings.NAME,
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "pixel_mean": mean,
        "pixel_std": std,
        **options,
    }
    return ClassifierWithLoss(model, smoothing=smoothing, bce=is_bce), meta


def is_mixed(cfg: CfgNode) -> bool:
    """Whether batches are mixed by mixup or CutMix."""
    return cfg.MIX.PROB > 0 and (cfg.MIX.MIXUP_ALPHA > 0 or cfg.MIX.CUTMIX_ALPHA > 0)


def pixels(cfg: CfgNode, meta: dict[str, Any]) -> dict[str, Any]:
    """How uint8 pixels become what the model sees, for the transforms."""
    if cfg.MODEL.STANDARDIZE:
        return {"mean": meta["pixel_mean"], "std": meta["pixel_std"]}
    mean, std = IMAGENET_MEAN, IMAGENET_STD  # only the colour of erased rectangles
    return {"mean": mean, "std": std, "standardize": False, "value_range": cfg.MODEL.VALUE_RANGE}


def dataset(cfg: CfgNode, split: ClassificationSplit, transform: Any) -> ClassificationDataset:
    """The images of a split, decoded and transformed."""
    data = cfg.DATASETS
    return ClassificationDataset(split, transform, skip_corrupt=data.SKIP_CORRUPT, cache=data.CACHE)


def build_loader(
    cfg: CfgNode, split: ClassificationSplit, meta: dict[str, Any], start: int
) -> ImageBatches:
    """This rank's micro-batches from step `start` on."""
    given, mix = cfg.INPUT, cfg.MIX
    transform = classification_train(
        given.SIZE,
        crop=given.CROP,
        scale=tuple(given.SCALE),
        ratio=tuple(given.RATIO),
        padding=given.PADDING,
        flip=given.FLIP_PROB,
        auto_augment=given.AUTO_AUGMENT,
        magnitude=given.MAGNITUDE,
        num_ops=given.NUM_OPS,
        color_jitter=given.COLOR_JITTER,
        erasing=given.ERASING,
        interpolation=given.INTERPOLATION,
        **pixels(cfg, meta),
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
        dataset(cfg, split, transform),
        micro_batch=cfg.SOLVER.IMS_PER_BATCH // parts,
        accumulation=cfg.SOLVER.ACCUMULATION,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=cfg.SEED,
        start=start,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        mix=mixer if is_mixed(cfg) else None,
        repeats=given.REPEATS,
    )
