"""The data set that a detector trains on: images and boxes of a `VOCSplit`.

Two conventions meet here. `Annotation` labels classes 0..K-1 (detectron2's and the devkit's order);
torchvision's detectors want 1..K, with 0 for the background. `VOCDetection` adds that 1, nobody
else does.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from tract_det.data.images import read_rgb
from tract_det.data.voc import Annotation, VOCSplit
from tract_det.errors import UserError

Target = dict[str, Any]

# A thinner box has no pixel of its own, and torchvision's detectors assert on a width of 0.
MIN_SIDE = 1.0


class VOCDetection(torch.utils.data.Dataset):
    """Pairs (image, target) of a split.

    image: tv_tensors.Image, uint8 (3, H, W), RGB. Any EXIF rotation is *not* applied: VOC's boxes
    are in the pixels as stored, and the devkit's and detectron2's tools read them so.

    target:
        boxes: tv_tensors.BoundingBoxes, (n, 4) float32 XYXY pixel edges, within the image; none is
            thinner than 1 px. (0, 4) for an image without objects.
        labels: (n,) int64, 1..K.
        image_id: str.
        index: int, the position in `split.annotations`.

    Args:
        split: What to read.
        transform: A torchvision.transforms.v2 transform of (image, target).
        use_difficult: Whether objects marked difficult are in the targets, as detectron2 does;
            py-faster-rcnn leaves them out.
    """

    def __init__(
        self,
        split: VOCSplit,
        transform: Callable[[Any, Target], tuple[Any, Target]] | None = None,
        *,
        use_difficult: bool = True,
    ) -> None:
        self.split = split
        self.transform = transform
        self.use_difficult = use_difficult
        _warn_outside(split)

    def __len__(self) -> int:
        return len(self.split.annotations)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """Reads, transforms and cleans one image.

        Raises:
            UserError: The image cannot be read, or is not as large as its annotation says.
        """
        annotation = self.split.annotations[index]
        image = tv_tensors.Image(read_rgb(annotation.path))
        _check_size(annotation, height=image.shape[-2], width=image.shape[-1])
        keep = np.ones(len(annotation.boxes), dtype=bool)
        if not self.use_difficult:
            keep = ~annotation.difficult
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(_clip(annotation)[keep]).float(),
                format=tv_tensors.BoundingBoxFormat.XYXY,
                canvas_size=(annotation.height, annotation.width),
            ),
            "labels": torch.from_numpy(annotation.labels[keep] + 1),
            "image_id": annotation.image_id,
            "index": index,
        }
        if self.transform is not None:
            image, target = self.transform(image, target)
        return image, _drop_thin(target)


def aspect_groups(split: VOCSplit) -> np.ndarray:
    """(n,) int64: 0 for images at least as wide as high, 1 for higher ones.

    A batch is padded to its largest width and height: images of one group waste little.
    """
    return np.array([int(a.width < a.height) for a in split.annotations], dtype=np.int64)


def drop_empty(split: VOCSplit, *, use_difficult: bool = True) -> VOCSplit:
    """The split without the images that would give `VOCDetection` no box."""
    kept = [a for a in split.annotations if (_inside(a) & (use_difficult | ~a.difficult)).any()]
    return replace(split, annotations=kept)


def _clip(annotation: Annotation) -> np.ndarray:
    """(n, 4) boxes cut to the image."""
    w, h = annotation.width, annotation.height
    return np.clip(annotation.boxes, 0, (w, h, w, h))


def _inside(annotation: Annotation) -> np.ndarray:
    """(n,) bool: boxes with at least a pixel within the image."""
    boxes = _clip(annotation)
    return ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(axis=1)


def _warn_outside(split: VOCSplit) -> None:
    """Not silently: boxes outside their image mean a wrong <size>, or coordinates in 0..1."""
    outside = [(int((~_inside(a)).sum()), a.image_id) for a in split.annotations]
    total = sum(count for count, _ in outside)
    if total:
        first = [image_id for count, image_id in outside if count][:3]
        warnings.warn(
            f"{split.name}: {total} boxes have less than a pixel within their image and are not "
            f"trained on (first: {', '.join(first)})",
            stacklevel=3,
        )


def _drop_thin(target: Target) -> Target:
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    keep = (sides >= MIN_SIDE).all(dim=1)
    if bool(keep.all()):
        return target
    boxes = tv_tensors.wrap(target["boxes"][keep], like=target["boxes"])
    return target | {"boxes": boxes, "labels": target["labels"][keep]}


def _check_size(annotation: Annotation, *, height: int, width: int) -> None:
    if (width, height) == (annotation.width, annotation.height):
        return
    turned = (height, width) == (annotation.width, annotation.height)
    raise UserError(
        f"{annotation.path}: the image is {width} x {height} but its annotation says "
        f"{annotation.width} x {annotation.height}: "
        + (
            "it was annotated turned, by its EXIF orientation; save the image upright"
            if turned
            else "put back the annotated image, or correct <size> and the boxes"
        )
    )
