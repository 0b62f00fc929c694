"""Synthetic splits and detections, and their evaluation."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tract_det.evaluation.detection_files import ImageDetections
from tract_det.evaluation.evaluators import DetectionEvaluator

CLASSES = ("cat", "dog", "bus")
BOX = np.array([[0.0, 0.0, 5.0, 5.0]])
NONE = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=int))


@dataclass(frozen=True)
class Image:
    image_id: str
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray


def image(image_id: str, boxes: Sequence, labels: Sequence, difficult: Sequence = ()) -> Image:
    return Image(
        image_id,
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(difficult or [False] * len(labels), dtype=bool),
    )


def random_split(num_images: int, seed: int = 0) -> tuple[list[Image], list[ImageDetections]]:
    """Images and imperfect detections with many equal scores and full-precision coordinates."""
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for number in range(num_images):
        n = int(rng.integers(0, 5))
        xy, wh = rng.integers(0, 200, (n, 2)), rng.integers(20, 150, (n, 2))
        boxes, labels = np.concatenate([xy, xy + wh], axis=1), rng.integers(0, len(CLASSES), n)
        images.append(image(f"{number:06d}", boxes, labels, (rng.random(n) < 0.2).tolist()))
        source = np.repeat(np.arange(n), 3)
        detections.append(
            ImageDetections(
                boxes[source] + rng.normal(0, 6, (3 * n, 4)),
                rng.integers(0, 8, 3 * n) / 7,
                np.where(rng.random(3 * n) < 0.8, labels[source], 0),
            )
        )
    return images, detections


def evaluate(
    images: Sequence[Image], detections: Sequence, rule: str = "devkit"
) -> tuple[DetectionEvaluator, dict[str, Any]]:
    evaluator = DetectionEvaluator(images, CLASSES, rule=rule)
    for annotation, image_detections in zip(images, detections, strict=True):
        evaluator.add(annotation.image_id, *image_detections)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without objects: tested in test_voc_ap
        return evaluator, evaluator.evaluate()


def perfect(images: Sequence[Image]) -> list[tuple]:
    return [
        (annotation.boxes, np.full(len(annotation.boxes), 0.9), annotation.labels)
        for annotation in images
    ]
