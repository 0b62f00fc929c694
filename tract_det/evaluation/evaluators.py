"""Collects the detections of a split from all ranks, and evaluates them on one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tract_det.distributed import gather, on_main
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.boxes import Detections
from tract_det.evaluation.detection_files import ImageDetections, write_detections
from tract_det.evaluation.detection_results import Evaluated, evaluate_detections, summary
from tract_det.evaluation.ground_truth import (
    Annotation,
    are_labels,
    flat,
    from_annotations,
    joined,
)
from tract_det.evaluation.metrics import DIVERGED_MEND
from tract_det.evaluation.voc_ap import RULES


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
        self._truth = from_annotations(annotations, class_names)
        self._ids = self._truth.image_ids
        self._id_set = set(self._ids)
        self._local: dict[str, ImageDetections] = {}  # of this rank
        self._merged: dict[str, ImageDetections] | None = None  # of all ranks
        self._evaluated: Evaluated | None = None

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
        if not are_labels(labels, num_classes):
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
        """Evaluates the detections of all ranks. Every rank must call it; rank 0 evaluates.

        Returns:
            On every rank `detection_results.summary`.

        Raises:
            UserError: an image of the split was not added, or was added twice. Every rank raises.
        """
        ranks = gather(self._local)

        def of_all_ranks() -> dict[str, Any]:
            self._merged = self._merge(ranks)
            detections = flat_detections(list(self._merged.values()))
            self._evaluated = evaluate_detections(self._truth, detections, self.rule)
            return summary(self._evaluated)

        return on_main(of_all_ranks)

    @property
    def detections(self) -> dict[str, ImageDetections]:
        """The detections of all ranks by image id, in the order of the split.

        Raises:
            RuntimeError: `evaluate` was not called, or this is not rank 0.
        """
        if self._merged is None:
            raise RuntimeError("call evaluate() first: it gathers the detections on rank 0")
        return self._merged

    @property
    def evaluated(self) -> Evaluated:
        """The matched detections of all ranks, for `detection_results.details`.

        Raises:
            RuntimeError: `evaluate` was not called, or this is not rank 0.
        """
        if self._evaluated is None:
            raise RuntimeError("call evaluate() first: it matches the detections on rank 0")
        return self._evaluated

    def write_detections(self, folder: Path, split: str) -> None:
        """Writes the challenge's files; see `detection_files.write_detections`.

        After `evaluate`, on rank 0.
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


def flat_detections(images: Sequence[ImageDetections]) -> Detections:
    """The detections of all images of a split, in its order, in flat arrays."""
    return Detections(
        *flat([image.boxes for image in images]),
        joined([image.scores for image in images], np.float64),
        joined([image.labels for image in images], np.int64),
    )


def _array(values: Any, dtype: type) -> np.ndarray:
    """A copy of an array or tensor on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.array(values, dtype=dtype)
