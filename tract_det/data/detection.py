"""The data set that a detector trains on: images and boxes of a `DetectionSplit`.

Two conventions meet here. `Annotation` labels classes 0..K-1, as detectron2 does; torchvision's
detectors expect 1..K, with 0 for the background. `DetectionDataset` is the only place that adds the
1.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors

from tract_det.data.annotations import Annotation, DetectionSplit
from tract_det.data.exif import check_size, reader

Target = dict[str, Any]

# In pixels. A thinner box may hold no pixel, and torchvision's detectors refuse a width of 0.
MIN_SIDE = 1.0


class DetectionDataset(torch.utils.data.Dataset):
    """Pairs (image, target) of a split.

    The image is a tv_tensors.Image, uint8 (C, H, W), RGB if C is 3, turned upright by the file's
    EXIF orientation, as detectron2 reads it. Annotators show images upright, so boxes refer to them
    so; where <size> is that of the pixels as stored, the image is refused.

    The target has

    - `boxes`: tv_tensors.BoundingBoxes, (n, 4) float32 XYXY pixel edges, within the image and at
      least 1 pixel wide and high. (0, 4) for an image without objects.
    - `labels`: (n,) int64, 1..K.
    - `image_id`: str.
    - `index`: int, the position in `split.annotations`.

    Args:
        split: The images and boxes.
        transform: A torchvision.transforms.v2 transform of (image, target).
        use_difficult: Whether the targets include objects marked difficult. detectron2 trains on
            them, py-faster-rcnn does not.
    """

    def __init__(
        self,
        split: DetectionSplit,
        transform: Callable[[Any, Target], tuple[Any, Target]] | None = None,
        *,
        use_difficult: bool = True,
    ) -> None:
        self.split = split
        self.transform = transform
        self.use_difficult = use_difficult
        self._read = reader(split.exif)
        _warn_outside(split)

    def __len__(self) -> int:
        return len(self.split.annotations)

    def read(self, index: int) -> torch.Tensor:
        """(C, H, W) uint8: an image without its objects; C is `split.channels`.

        Raises:
            UserError: It cannot be read.
        """
        split = self.split
        return self._read(split.annotations[index].path, split.max_pixels, split.channels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        """Reads and transforms one image, and drops boxes that have become too thin.

        Raises:
            UserError: The image cannot be read, or its size is not the one in its annotation.
        """
        annotation = self.split.annotations[index]
        image = tv_tensors.Image(self.read(index))
        check_size(annotation, (image.shape[-1], image.shape[-2]))
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


def aspect_groups(split: DetectionSplit) -> np.ndarray:
    """(n,) int64: 1 for images higher than wide, 0 for all others.

    A batch is padded to its largest width and height, which wastes little within one group.
    """
    return np.array([int(a.width < a.height) for a in split.annotations], dtype=np.int64)


def drop_empty(split: DetectionSplit, *, use_difficult: bool = True) -> DetectionSplit:
    """The split without the images for which `DetectionDataset` would have no box."""
    annotations = [
        a for a in split.annotations if (_inside(a) & (use_difficult | ~a.difficult)).any()
    ]
    return replace(split, annotations=annotations)


def _clip(annotation: Annotation) -> np.ndarray:
    """(n, 4) boxes clipped to the image."""
    w, h = annotation.width, annotation.height
    return np.clip(annotation.boxes, 0, (w, h, w, h))


def _inside(annotation: Annotation) -> np.ndarray:
    """(n,) bool: boxes that are at least `MIN_SIDE` wide and high within the image."""
    boxes = _clip(annotation)
    return ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(axis=1)


def _warn_outside(split: DetectionSplit) -> None:
    """Warns of boxes outside their image: a sign of a wrong <size>, or of coordinates in 0..1."""
    outside = [(int((~_inside(a)).sum()), a.image_id) for a in split.annotations]
    total = sum(count for count, _ in outside)
    if total:
        first = [image_id for count, image_id in outside if count][:3]
        warnings.warn(
            f"{split.name}: {total} boxes are less than a pixel wide or high within their image "
            f"and are not trained on (first: {', '.join(first)})",
            stacklevel=3,
        )


def _drop_thin(target: Target) -> Target:
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    keep = (sides >= MIN_SIDE).all(dim=1)
    if bool(keep.all()):
        return target
    boxes = tv_tensors.wrap(target["boxes"][keep], like=target["boxes"])
    return target | {"boxes": boxes, "labels": target["labels"][keep]}
