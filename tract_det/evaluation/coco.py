"""COCO's average precision, computed by pycocotools from VOC's ground truth."""

import contextlib
import io
import math
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tract_det.evaluation.metrics import COCO_STATS
from tract_det.evaluation.voc_ap import Detections, Objects


class _VOCasCOCO(COCOeval):
    """COCO's evaluation that ignores VOC's difficult objects.

    An ignored object is not in the recall, and the detection matched to it is neither a true nor a
    false positive. pycocotools overwrites an annotation's `ignore` with its `iscrowd`. Marking
    difficult objects as crowds instead would be wrong: the overlap with a crowd is relative to the
    detection's area alone, and any number of detections may match it.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for annotation in objects:
                annotation["ignore"] = annotation["difficult"]


def coco_ap(
    objects: Objects, detections: Detections, num_images: int, num_classes: int
) -> dict[str, float]:
    """COCO's average precision: 101 recall points, at most 100 detections per image.

    Difficult objects are ignored, see `_VOCasCOCO`. The areas that separate small, medium and large
    objects are in pixels of the annotated image.

    Args:
        objects: the ground truth.
        detections: the detections of the split.
        num_images: number of images in the split.
        num_classes: K.

    Returns:
        The `COCO_STATS` in per cent; NaN where there is no ground truth.
    """
    common = {
        "images": [{"id": image + 1} for image in range(num_images)],
        "categories": [{"id": label + 1} for label in range(num_classes)],
    }
    ground_truth, results = COCO(), COCO()
    ground_truth.dataset = {
        **common,
        "annotations": _coco_boxes(objects, "difficult", objects.difficult.astype(int)),
    }
    results.dataset = {**common, "annotations": _coco_boxes(detections, "score", detections.scores)}
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
        results.createIndex()
        evaluation = _VOCasCOCO(ground_truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats[: len(COCO_STATS)]
    return {
        name: math.nan if value < 0 else 100 * float(value)
        for name, value in zip(COCO_STATS, stats, strict=True)
    }


def _coco_boxes(boxes: Objects | Detections, key: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Boxes as COCO annotations, each with the additional entry `key`."""
    size = boxes.boxes[:, 2:] - boxes.boxes[:, :2]
    columns = (
        (boxes.image + 1).tolist(),
        (boxes.labels + 1).tolist(),
        np.concatenate([boxes.boxes[:, :2], size], axis=1).tolist(),
        size.prod(axis=1).tolist(),
        values.tolist(),
    )
    # Ids count from 1: in pycocotools 0 means "unmatched", so an object 0 would never match.
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            key: value,
        }
        for number, (image, category, box, area, value) in enumerate(
            zip(*columns, strict=True), start=1
        )
    ]
