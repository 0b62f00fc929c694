"""COCO's average precision through pycocotools, on VOC's ground truth."""

import contextlib
import io
import math
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tract_det.evaluation.voc_ap import Detections, Objects

# COCOeval.stats in their order.
_COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class _VOCasCOCO(COCOeval):
    """COCO's evaluation with VOC's difficult objects ignored.

    An ignored object is not in the recall, and the detection that is matched to it is neither right
    nor wrong. pycocotools sets `ignore` to `iscrowd`, whatever the annotation says; but a difficult
    object is one object, not a crowd, whose overlap would be measured by the detection's area and
    which any number of detections may match. So `ignore` is set again.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for one in objects:
                one["ignore"] = one["difficult"]


def coco_ap(
    objects: Objects, detections: Detections, num_images: int, num_classes: int
) -> dict[str, float]:
    """COCO's average precision through pycocotools: 101 points, at most 100 detections an image.

    Difficult objects are ignored, see `_VOCasCOCO`. Areas are in pixels of the annotated image.

    Args:
        objects: the ground truth.
        detections: what was found.
        num_images: images in the split.
        num_classes: K.

    Returns:
        `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl` in per cent; NaN where there is nothing to find.
    """
    common = {
        "images": [{"id": image + 1} for image in range(num_images)],
        "categories": [{"id": label + 1} for label in range(num_classes)],
    }
    truth, found = COCO(), COCO()
    truth.dataset = {
        **common,
        "annotations": _coco_boxes(objects, "difficult", objects.difficult.astype(int)),
    }
    found.dataset = {**common, "annotations": _coco_boxes(detections, "score", detections.scores)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = _VOCasCOCO(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = evaluation.stats[: len(_COCO_STATS)]
    return {
        name: math.nan if value < 0 else 100 * float(value)
        for name, value in zip(_COCO_STATS, stats, strict=True)
    }


def _coco_boxes(boxes: Objects | Detections, key: str, values: np.ndarray) -> list[dict[str, Any]]:
    """Boxes as COCO's annotations, each with one more entry."""
    size = boxes.boxes[:, 2:] - boxes.boxes[:, :2]
    columns = (
        (boxes.image + 1).tolist(),
        (boxes.labels + 1).tolist(),
        np.concatenate([boxes.boxes[:, :2], size], axis=1).tolist(),
        size.prod(axis=1).tolist(),
        values.tolist(),
    )
    # Ids count from 1: pycocotools marks "unmatched" with 0, so an object 0 could not be found.
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
