"""Detections as files: annotated images, VOC annotations, COCO results, the VOC challenge's files.

All names come from the data: in file names they are escaped, and none is a path.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from tract_det.errors import shortened
from tract_det.evaluation.detection_files import ImageDetections, write_detections
from tract_det.files import atomically, file_name_part, write_json, write_text
from tract_det.inference.models import Detections

# Where a text has a chance to be read: most of the world's letters, at a size that fits the image.
_FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
_LINE, _TEXT = 1 / 300, 1 / 45  # of the image's shorter side
_JPEG_QUALITY = 92


def draw(image: Tensor, detections: Detections) -> Tensor:
    """The image with boxes, classes and scores on it.

    Args:
        image: `(3, H, W)` uint8 RGB.
        detections: what is in it.
    """
    if not len(detections):
        return image
    colors = colormaps["tab20" if int(detections.labels.max()) >= 10 else "tab10"]
    shown = [colors(label % colors.N)[:3] for label in detections.labels.tolist()]
    rgb: list[Any] = [tuple(round(255 * part) for part in color) for color in shown]
    texts = [
        f"{shortened(name)} {score:.2f}"
        for name, score in zip(detections.names, detections.scores.tolist(), strict=True)
    ]
    side = min(image.shape[-2:])
    return draw_bounding_boxes(
        image,
        detections.boxes,
        labels=texts,
        colors=rgb,
        width=max(1, round(side * _LINE)),
        font=str(_FONT),
        font_size=max(10, round(side * _TEXT)),
        label_colors="white",
        label_background_colors=rgb,
        fill_labels=True,
    )


def write_image(folder: Path, image_id: str, image: Tensor) -> None:
    """Writes `<id>.jpg`."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    path = folder / f"{file_name_part(image_id)}.jpg"
    atomically(path, lambda temporary: picture.save(temporary, quality=_JPEG_QUALITY))


def write_voc(
    folder: Path, image_id: str, path: Path, size: tuple[int, int], detections: Detections
) -> None:
    """Writes a VOC annotation, `<id>.xml`, with a score in each object; pixels count from 1.

    Args:
        folder: of the file.
        image_id: names it.
        path: the image.
        size: width and height of the image, pixels.
        detections: its detections; a box that rounds to less than a pixel is widened to one.
    """
    root = ET.Element("annotation")
    _add(root, "folder", path.absolute().parent.name)
    _add(root, "filename", path.name)
    shape = ET.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*size, 3), strict=True):
        _add(shape, tag, value)
    _add(root, "segmented", 0)
    edges = detections.boxes.round().int().tolist()
    for name, score, box in zip(detections.names, detections.scores.tolist(), edges, strict=True):
        element = ET.SubElement(root, "object")
        _add(element, "name", name)
        _add(element, "pose", "Unspecified")
        for tag in ("truncated", "difficult"):
            _add(element, tag, 0)
        _add(element, "score", f"{score:.4f}")
        corners = ET.SubElement(element, "bndbox")
        left, top = (min(edge, side - 1) for edge, side in zip(box[:2], size, strict=True))
        _add(corners, "xmin", left + 1)
        _add(corners, "ymin", top + 1)
        _add(corners, "xmax", max(box[2], left + 1))
        _add(corners, "ymax", max(box[3], top + 1))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode") + "\n"
    write_text(folder / f"{file_name_part(image_id)}.xml", text)


def _add(parent: ET.Element, tag: str, value: object) -> None:
    text = "".join(c if c.isprintable() else " " for c in str(value))  # XML has no control codes
    ET.SubElement(parent, tag).text = text


class ResultFiles:
    """Collects detections for the files of results, which hold all images.

    Args:
        class_names: the K classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names
        self._images: dict[str, ImageDetections] = {}

    def add(self, image_id: str, detections: Detections) -> None:
        """Adds an image, which may have no detections."""
        boxes, scores = detections.boxes.double().numpy(), detections.scores.double().numpy()
        self._images[image_id] = ImageDetections(boxes, scores, detections.labels.numpy())

    def write_challenge(self, folder: Path, split: str) -> None:
        """Writes `comp4_det_<split>_<class>.txt` for each class."""
        write_detections(folder, split, self.class_names, self._images)

    def write_coco(self, path: Path) -> None:
        """Writes a COCO result file.

        `image_id` is the image's id, or the number that it is where all ids are numbers, as COCO's
        own are; `category_id` is the position of the class, counted from 1. Data may mean others
        by these numbers, so `image_name` and `category_name` say what they stand for.
        """
        ids: list[str | int] = list(self._images)
        numbers = [int(name) if name.isascii() and name.isdigit() else -1 for name in self._images]
        if -1 not in numbers and len(set(numbers)) == len(numbers):
            ids = list(numbers)
        entries = [
            {
                "image_id": number,
                "image_name": name,
                "category_id": label + 1,
                "category_name": self.class_names[label],
                "bbox": box,
                "score": score,
            }
            for number, (name, image) in zip(ids, self._images.items(), strict=True)
            for label, box, score in zip(
                image.labels.tolist(),
                _with_sizes(image.boxes).tolist(),
                image.scores.tolist(),
                strict=True,
            )
        ]
        write_json(path, entries)


def _with_sizes(boxes: np.ndarray) -> np.ndarray:
    """(n, 4) xyxy to x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def frame_of(array: np.ndarray) -> Tensor:
    """A video's frame `(H, W, 3)` as `(3, H, W)`."""
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).contiguous()
