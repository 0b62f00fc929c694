"""Detections of all ranks in; PASCAL VOC and COCO figures, and the challenge's files, out."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tract_det.distributed import gather, is_main
from tract_det.errors import UserError
from tract_det.evaluation.coco import coco_ap
from tract_det.evaluation.detection_files import ImageDetections, write_detections
from tract_det.evaluation.voc_ap import RULES, Detections, Objects, VOCResult, mean_ap, voc_ap
from tract_det.files import write_text


class Annotation(Protocol):
    """The ground truth of one image, as `tract_det.data.voc` reads it."""

    @property
    def image_id(self) -> str:
        """The image's name in its split."""

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
    """Collects the detections of a split, each image on any one rank, and evaluates them.

    Args:
        annotations: the images of the split, in its order, the same on every rank.
        class_names: the K names that the labels point to.
        rule: one of `voc_ap.RULES`.

    Raises:
        ValueError: for an unknown rule, a class name or image id that occurs twice, or a label that
            has no name.
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
        self._known = set(self._ids)
        for what, names in (("class names", self.class_names), ("image ids", self._ids)):
            if len(set(names)) < len(names):
                raise ValueError(f"{len(names) - len(set(names))} {what} occur more than once")
        self._objects = Objects(
            *_flat([a.boxes for a in annotations]),
            _joined([a.labels for a in annotations], np.int64),
            _joined([a.difficult for a in annotations], bool),
        )
        if not _are_labels(self._objects.labels, len(self.class_names)):
            raise ValueError(f"ground truth has labels outside 0..{len(self.class_names) - 1}")
        self._own: dict[str, ImageDetections] = {}
        self._all: dict[str, ImageDetections] | None = None
        self._voc: VOCResult | None = None

    def add(self, image_id: str, boxes: Any, scores: Any, labels: Any) -> None:
        """Takes the detections of one image, also when there are none.

        Args:
            image_id: an image of the split that was not added before, on any rank.
            boxes: (n, 4) array or tensor, pixel edges.
            scores: (n,) array or tensor.
            labels: (n,) array or tensor, 0..K-1.

        Raises:
            UserError: for an image that is not in the split or was added before, a label without a
                class, or boxes or scores that are not finite.
            ValueError: if the shapes do not agree.
        """
        if image_id not in self._known:
            raise UserError(
                f"image {image_id!r} is not among the {len(self._ids)} images of the split:"
                " evaluate the split that the detections are of"
            )
        if image_id in self._own:
            raise UserError(f"image {image_id!r} was added twice: add each image once")
        found = ImageDetections(
            _array(boxes, np.float64), _array(scores, np.float64), _array(labels, np.int64)
        )
        n = found.scores.size
        if (found.boxes.shape, found.scores.shape, found.labels.shape) != ((n, 4), (n,), (n,)):
            raise ValueError(
                f"image {image_id!r}: boxes {found.boxes.shape}, scores {found.scores.shape} and"
                f" labels {found.labels.shape} must be (n, 4), (n,) and (n,)"
            )
        if not _are_labels(found.labels, len(self.class_names)):
            raise UserError(
                f"image {image_id!r}: detections have labels {found.labels.min()} to"
                f" {found.labels.max()}; the {len(self.class_names)} classes are 0 to"
                f" {len(self.class_names) - 1}: use the detector's own class list"
            )
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
            raise UserError(
                f"image {image_id!r}: a detected box or score is not finite: check the weights"
            )
        self._own[image_id] = found

    def evaluate(self) -> dict[str, Any]:
        """Evaluates what all ranks added. Every rank must call it.

        Returns:
            On every rank `images`, `rule`, `voc_07` and `voc_area` (each with `mAP`, `mAP_50_95`,
            and per class `AP` and `AP_50_95`) and `coco` (see `coco_ap`); in per cent, NaN where
            there is nothing to find.

        Raises:
            UserError: on every rank, unless each image of the split was added exactly once.
        """
        self._all = self._merged(gather(self._own))
        detections = self._flat_detections()
        with warnings.catch_warnings():
            if not is_main():
                warnings.simplefilter("ignore")  # once, not once a rank
            self._voc = voc_ap(self._objects, detections, self.class_names, self.rule)
        return {
            "images": len(self._ids),
            "rule": self.rule,
            "voc_07": self._per_class(self._voc.ap_07),
            "voc_area": self._per_class(self._voc.ap_area),
            "coco": coco_ap(self._objects, detections, len(self._ids), len(self.class_names)),
        }

    @property
    def detections(self) -> dict[str, ImageDetections]:
        """The detections of all ranks by image, in the split's order. After `evaluate`."""
        if self._all is None:
            raise RuntimeError("call evaluate() first: it gathers the detections of all ranks")
        return self._all

    @property
    def voc(self) -> VOCResult:
        """AP at every IoU threshold, and precision over recall by class. After `evaluate`."""
        if self._voc is None:
            raise RuntimeError("call evaluate() first")
        return self._voc

    def write_detections(self, folder: Path, split: str) -> None:
        """Writes the challenge's files, after `evaluate`; see `detection_files.write_detections`.

        One rank is enough.
        """
        write_detections(Path(folder), split, self.class_names, self.detections)

    def _merged(self, ranks: Sequence[dict[str, ImageDetections]]) -> dict[str, ImageDetections]:
        """The ranks' detections as one, in the split's order."""
        merged: dict[str, ImageDetections] = {}
        twice: list[str] = []
        for own in ranks:
            twice += [image_id for image_id in own if image_id in merged]
            merged.update(own)
        missing = [image_id for image_id in self._ids if image_id not in merged]
        for ids, fault in ((missing, "were not evaluated"), (twice, "were evaluated twice")):
            if ids:
                some = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                raise UserError(
                    f"{len(ids)} of {len(self._ids)} images {fault} ({some}):"
                    " give each image of the split to exactly one rank"
                )
        return {image_id: merged[image_id] for image_id in self._ids}

    def _flat_detections(self) -> Detections:
        found = list(self.detections.values())
        return Detections(
            *_flat([one.boxes for one in found]),
            _joined([one.scores for one in found], np.float64),
            _joined([one.labels for one in found], np.int64),
        )

    def _per_class(self, ap: np.ndarray) -> dict[str, Any]:
        """`ap` is (K, T), in 0..1."""
        percent = 100 * ap
        return {
            "mAP": mean_ap(percent[:, 0]),
            "mAP_50_95": mean_ap(percent.mean(axis=1)),
            "AP": dict(zip(self.class_names, percent[:, 0].tolist(), strict=True)),
            "AP_50_95": dict(zip(self.class_names, percent.mean(axis=1).tolist(), strict=True)),
        }


def format_table(results: dict[str, Any]) -> str:
    """The results of `DetectionEvaluator.evaluate` as text: a line a class, the means, and COCO."""
    columns = [(rule, ap) for rule in ("voc_07", "voc_area") for ap in ("AP", "AP_50_95")]
    names = list(results["voc_07"]["AP"])
    width = max(map(len, [*names, "class"]))
    rows = [(name, [results[rule][ap][name] for rule, ap in columns]) for name in names]
    rows.append(("mean", [results[rule][f"m{ap}"] for rule, ap in columns]))
    head = ("07 @.5", "07 @.5:.95", "area @.5", "area @.5:.95")
    lines = [
        f"VOC AP in per cent, {results['rule']} rule, {results['images']} images",
        f"{'class':{width}}" + "".join(f"{title:>14}" for title in head),
        *(f"{name:{width}}" + "".join(f"{_percent(ap):>14}" for ap in aps) for name, aps in rows),
        "COCO: " + "  ".join(f"{name} {_percent(ap)}" for name, ap in results["coco"].items()),
    ]
    return "\n".join(lines)


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, whole or not at all; NaN becomes null.

    Raises:
        UserError: if the file cannot be written.
    """
    write_text(Path(path), json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _array(values: Any, dtype: type) -> np.ndarray:
    """A copy on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.array(values, dtype=dtype)


def _are_labels(labels: np.ndarray, num_classes: int) -> bool:
    return bool(((labels >= 0) & (labels < num_classes)).all())


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """(n_0,), (n_1,), ... -> (n,)."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def _flat(boxes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes image by image, (n_i, 4) -> image positions (n,) and boxes (n, 4)."""
    image = np.repeat(np.arange(len(boxes)), [len(one) for one in boxes])
    return image, np.concatenate([np.empty((0, 4)), *boxes])
