"""Collects detections from all ranks; reports PASCAL VOC and COCO metrics, and writes files."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tract_det.distributed import gather, is_main
from tract_det.errors import DivergedError, UserError, shortened
from tract_det.evaluation.coco import coco_ap
from tract_det.evaluation.detection_files import ImageDetections, write_detections
from tract_det.evaluation.metrics import DIVERGED_MEND
from tract_det.evaluation.voc_ap import RULES, Detections, Objects, mean_ap, voc_ap


class Annotation(Protocol):
    """The ground truth of one image, as `tract_det.data.voc` reads it."""

    @property
    def image_id(self) -> str:
        """Name of the image in its split."""

    @property
    def boxes(self) -> np.ndarray:
        """(n, 4) float, pixel edges."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int, 0..K-1."""

    @property
    def difficult(self) -> np.ndarray:
        """(n,) bool."""


class DetectionEvaluator:
    """Collects the detections of a split and evaluates them. Each image belongs to one rank.

    Args:
        annotations: all images of the split, in order, the same on every rank.
        class_names: the K names that the labels index.
        rule: one of `voc_ap.RULES`.

    Raises:
        ValueError: the rule is unknown, a class name or image id occurs twice, or a label has no
            name.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        class_names: Sequence[str],
        *,
        rule: str = "devkit",
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
        self.class_names = tuple(class_names)
        self.rule = rule
        self._ids = [annotation.image_id for annotation in annotations]
        self._id_set = set(self._ids)
        for kind, names in (("class names", self.class_names), ("image ids", self._ids)):
            if len(set(names)) < len(names):
                raise ValueError(f"{len(names) - len(set(names))} {kind} occur more than once")
        self._objects = Objects(
            *_flat([a.boxes for a in annotations]),
            _joined([a.labels for a in annotations], np.int64),
            _joined([a.difficult for a in annotations], bool),
        )
        if not _are_labels(self._objects.labels, len(self.class_names)):
            raise ValueError(f"ground truth has labels outside 0..{len(self.class_names) - 1}")
        self._local: dict[str, ImageDetections] = {}  # of this rank
        self._merged: dict[str, ImageDetections] | None = None  # of all ranks

    def add(self, image_id: str, boxes: Any, scores: Any, labels: Any) -> None:
        """Adds the detections of one image. An image without detections must be added as well.

        Args:
            image_id: an image of the split that no rank has added before.
            boxes: (n, 4) array or tensor, pixel edges.
            scores: (n,) array or tensor.
            labels: (n,) array or tensor, 0..K-1.

        Raises:
            UserError: the image is not in the split or was added before, or a label has no class.
            DivergedError: a box or score is not finite.
            ValueError: the shapes do not agree.
        """
        if image_id not in self._id_set:
            raise UserError(
                f"image {image_id!r} is not among the {len(self._ids)} images of the split:"
                " evaluate the split that these detections belong to"
            )
        if image_id in self._local:
            raise UserError(f"image {image_id!r} was added twice: add each image once")
        detections = ImageDetections(
            _array(boxes, np.float64), _array(scores, np.float64), _array(labels, np.int64)
        )
        self._check(image_id, detections)
        self._local[image_id] = detections

    def _check(self, image_id: str, detections: ImageDetections) -> None:
        boxes, scores, labels = detections
        n, num_classes = scores.size, len(self.class_names)
        if (boxes.shape, scores.shape, labels.shape) != ((n, 4), (n,), (n,)):
            raise ValueError(
                f"image {image_id!r}: boxes {boxes.shape}, scores {scores.shape} and labels"
                f" {labels.shape} must be (n, 4), (n,) and (n,)"
            )
        if not _are_labels(labels, num_classes):
            raise UserError(
                f"image {image_id!r}: detections have labels {labels.min()} to {labels.max()}; the"
                f" {num_classes} classes are 0 to {num_classes - 1}: use the class list that the"
                " detector was trained with"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise DivergedError(
                f"image {image_id!r}: a detected box or score is not finite: {DIVERGED_MEND}"
            )

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the detections of all ranks. Every rank must call it.

        Returns:
            On every rank `images`, `rule`, `voc_07` and `voc_area` (each with `mAP`, `mAP_50_95`,
            and per class `AP` and `AP_50_95`) and `coco` (see `coco_ap`); in per cent, NaN where
            there is no ground truth.

        Raises:
            UserError: an image of the split was not added, or was added twice. Every rank raises.
        """
        self._merged = self._merge(gather(self._local))
        detections = self._flat_detections()
        with warnings.catch_warnings():
            if not is_main():
                warnings.simplefilter("ignore")  # rank 0 warns for all
            voc = voc_ap(self._objects, detections, self.class_names, self.rule)
        return {
            "images": len(self._ids),
            "rule": self.rule,
            "voc_07": self._per_class(voc.ap_07),
            "voc_area": self._per_class(voc.ap_area),
            "coco": coco_ap(self._objects, detections, len(self._ids), len(self.class_names)),
        }

    @property
    def detections(self) -> dict[str, ImageDetections]:
        """The detections of all ranks by image id, in the order of the split. After `evaluate`.

        Raises:
            RuntimeError: `evaluate` was not called.
        """
        if self._merged is None:
            raise RuntimeError("call evaluate() first: it gathers the detections of all ranks")
        return self._merged

    def write_detections(self, folder: Path, split: str) -> None:
        """Writes the challenge's files; see `detection_files.write_detections`. After `evaluate`.

        Only one rank needs to call it.
        """
        write_detections(Path(folder), split, self.class_names, self.detections)

    def _merge(self, ranks: Sequence[dict[str, ImageDetections]]) -> dict[str, ImageDetections]:
        """Merges the detections of all ranks, in the order of the split."""
        merged: dict[str, ImageDetections] = {}
        repeated: list[str] = []
        for detections in ranks:
            repeated += [image_id for image_id in detections if image_id in merged]
            merged.update(detections)
        missing = [image_id for image_id in self._ids if image_id not in merged]
        for ids, problem in ((missing, "were not evaluated"), (repeated, "were evaluated twice")):
            if ids:
                examples = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                raise UserError(
                    f"{len(ids)} of {len(self._ids)} images {problem} ({examples}):"
                    " give each image of the split to exactly one rank"
                )
        return {image_id: merged[image_id] for image_id in self._ids}

    def _flat_detections(self) -> Detections:
        images = list(self.detections.values())
        return Detections(
            *_flat([image.boxes for image in images]),
            _joined([image.scores for image in images], np.float64),
            _joined([image.labels for image in images], np.int64),
        )

    def _per_class(self, ap: np.ndarray) -> dict[str, Any]:
        """Means and per-class entries in per cent, from (K, T) APs in 0..1."""
        percent = 100 * ap
        return {
            "mAP": mean_ap(percent[:, 0]),
            "mAP_50_95": mean_ap(percent.mean(axis=1)),
            "AP": dict(zip(self.class_names, percent[:, 0].tolist(), strict=True)),
            "AP_50_95": dict(zip(self.class_names, percent.mean(axis=1).tolist(), strict=True)),
        }


def format_table(results: dict[str, Any]) -> str:
    """Formats the results of `DetectionEvaluator.evaluate`: a row per class, means, and COCO."""
    columns = [(rule, ap) for rule in ("voc_07", "voc_area") for ap in ("AP", "AP_50_95")]
    names = list(results["voc_07"]["AP"])
    width = max(map(len, ["class", *map(shortened, names)]))
    rows = [(shortened(name), [results[rule][ap][name] for rule, ap in columns]) for name in names]
    rows.append(("mean", [results[rule][f"m{ap}"] for rule, ap in columns]))
    head = ("07 @.5", "07 @.5:.95", "area @.5", "area @.5:.95")
    lines = [
        f"VOC AP in per cent, {results['rule']} rule, {results['images']} images",
        f"{'class':{width}}" + "".join(f"{title:>14}" for title in head),
        *(f"{name:{width}}" + "".join(f"{_percent(ap):>14}" for ap in aps) for name, aps in rows),
        "COCO: " + "  ".join(f"{name} {_percent(ap)}" for name, ap in results["coco"].items()),
    ]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _array(values: Any, dtype: type) -> np.ndarray:
    """A copy of an array or tensor on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.array(values, dtype=dtype)


def _are_labels(labels: np.ndarray, num_classes: int) -> bool:
    return bool(((labels >= 0) & (labels < num_classes)).all())


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenates (n_0,), (n_1,), ... to (n,)."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _flat(boxes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the boxes of each image, (n_i, 4), to image positions (n,) and boxes (n, 4)."""
    image = np.repeat(np.arange(len(boxes)), [len(image_boxes) for image_boxes in boxes])
    return image, np.concatenate([np.empty((0, 4)), *boxes])
