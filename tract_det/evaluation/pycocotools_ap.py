"""COCO's average precision, computed by pycocotools: the oracle of `coco_ap`, which is faster."""

import contextlib
import io
import math
from typing import Any

import numpy as np

from tract_det.errors import UserError
from tract_det.evaluation.boxes import Detections, Objects
from tract_det.evaluation.metrics import COCO_STATS

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    raise UserError("pycocotools is not installed: pip install pycocotools") from None


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


def pycocotools_ap(
    objects: Objects, detections: Detections, num_images: int, num_classes: int
) -> dict[str, float]:
    """COCO's average precision: 101 recall points, at most 100 detections per image and class.

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
        "annotations": [
            annotation | {"difficult": int(is_difficult), "iscrowd": int(is_crowd), "area": area}
            for annotation, is_difficult, is_crowd, area in zip(
                _coco_boxes(objects), objects.difficult, *_crowds_and_areas(objects), strict=True
            )
        ],
    }
    results.dataset = {
        **common,
        "annotations": [
            annotation | {"score": score}
            for annotation, score in zip(
                _coco_boxes(detections), detections.scores.tolist(), strict=True
            )
        ],
    }
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


def _crowds_and_areas(objects: Objects) -> tuple[np.ndarray, list[float]]:
    size = objects.boxes[:, 2:] - objects.boxes[:, :2]
    crowd = np.zeros(len(size), dtype=bool) if objects.crowd is None else objects.crowd
    return crowd, (size.prod(axis=1) if objects.area is None else objects.area).tolist()


def _coco_boxes(boxes: Objects | Detections) -> list[dict[str, Any]]:
    """Boxes as COCO annotations."""
    size = boxes.boxes[:, 2:] - boxes.boxes[:, :2]
    columns = (
        (boxes.image + 1).tolist(),
        (boxes.labels + 1).tolist(),
        np.concatenate([boxes.boxes[:, :2], size], axis=1).tolist(),
        size.prod(axis=1).tolist(),
    )
    # Ids count from 1: in pycocotools 0 means "unmatched", so an object 0 would never match.
    return [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area}
        | {"iscrowd": 0}
        for number, (image, category, box, area) in enumerate(zip(*columns, strict=True), start=1)
    ]
