"""Models as graphs for other runtimes: their evaluation for uint8 images, from pixels to results.

The modules here compute what the models themselves compute, with the same weights, in operations
that `torch.export`, `torch.jit.trace` and ONNX can follow: no lists of images, no numbers read from
a tensor. A graph has the pixel statistics and the resizing within it, and nothing of a training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align

from tract_det.modeling.faster_rcnn import FasterRCNN

Size = tuple[int, int]  # height and width; symbolic in `torch.export`

_STRIDE = 32  # a batch of torchvision's is padded to multiples of it
_SMALLEST = 1e-2  # sides of detections, pixels, as in torchvision


class DetectorGraph(nn.Module):
    """One image to its detections.

    Args:
        detector: has seen an image: its pooling then knows the scales of its levels.
        size: height and width of all images; None = any.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: FasterRCNN, size: Size | None = None) -> None:
        super().__init__()
        transform = detector.transform
        self.detector, self.size = detector, size
        self.sides = (transform.min_size[-1], transform.max_size)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(transform, f"image_{name}"))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes `(n, 4)`, labels `(n,)` and scores `(n,)`.

        Args:
            image: `(C, H, W)` uint8.

        Returns:
            Boxes in pixels of the image, xyxy; labels 0..K-1; scores, which fall.
        """
        height, width = self.size or tuple(image.shape[-2:])
        pixels = (image.float() / 255 - self.mean) / self.std
        size = self._resized(height, width)
        if self.sides[0]:
            pixels = F.interpolate(
                pixels[None], list(size), mode="bilinear", antialias=True, align_corners=False
            )[0]
        right, below = ((side + _STRIDE - 1) // _STRIDE * _STRIDE - side for side in size[::-1])
        batch = F.pad(pixels, (0, right, 0, below))[None]
        features = self.detector.backbone(batch)
        if isinstance(features, Tensor):
            features = {"0": features}
        proposals = self._propose(batch, list(features.values()), size)
        boxes, labels, scores = self._detect(features, proposals, size)
        scales = [torch.sym_float(a) / b for a, b in zip((height, width), size, strict=True)]
        corners: Any = [edge * scales[1 - k % 2] for k, edge in enumerate(boxes.unbind(1))]
        return torch.stack(corners, 1), labels, scores

    def _resized(self, height: int, width: int) -> Size:
        """As `faster_rcnn.resize_shorter_side` does it."""
        shorter, longer = self.sides
        if not shorter:
            return height, width
        scale = torch.sym_min(
            shorter / torch.sym_min(height, width), longer / torch.sym_max(height, width)
        )
        return torch.sym_int(height * scale), torch.sym_int(width * scale)

    def _propose(self, batch: Tensor, maps: list[Tensor], size: Size) -> Tensor:
        """The first stage: `(n, 4)`."""
        rpn = self.detector.rpn
        levels, deltas = rpn.head(maps)
        anchors = rpn.anchor_generator(ImageList(batch, [size]), maps)[0]
        counts = [level.shape[1] * level.shape[2] * level.shape[3] for level in levels]
        objectness, deltas = concat_box_prediction_layers(levels, deltas)
        boxes = rpn.box_coder.decode(deltas, [anchors]).reshape(-1, 4)
        best, groups, start = [], [], 0
        for level, count in enumerate(counts):
            logits = objectness.flatten()[start : start + count]
            top = logits.topk(_smaller(count, rpn.pre_nms_top_n()))[1]
            best.append(top + start)
            groups.append(torch.full_like(top, level))
            start += count
        chosen, group = torch.cat(best), torch.cat(groups)
        scores = objectness.flatten()[chosen].sigmoid()
        boxes = clip_boxes_to_image(boxes[chosen], size)
        is_kept = _are_large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        kept = is_kept.nonzero()[:, 0]
        boxes, scores, group = boxes[kept], scores[kept], group[kept]
        return boxes[_nms(boxes, scores, group, rpn.nms_thresh, size)[: rpn.post_nms_top_n()]]

    def _detect(
        self, features: dict[str, Tensor], proposals: Tensor, size: Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The second stage, in pixels of the batch."""
        heads = self.detector.roi_heads
        pooled = _pool(heads.box_roi_pool, features, proposals)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        classes = logits.shape[1] - 1
        boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, [proposals]), size)
        boxes = boxes[:, 1:].reshape(-1, 4)  # without the background
        scores = logits.softmax(-1)[:, 1:].flatten()
        labels = torch.arange(classes, device=boxes.device).expand(logits.shape[0], -1).flatten()
        is_kept = _are_large(boxes, _SMALLEST) & (scores > heads.score_thresh)
        kept = is_kept.nonzero()[:, 0]
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        best = _nms(boxes, scores, labels, heads.nms_thresh, size)[: heads.detections_per_img]
        return boxes[best], labels[best], scores[best]


class ClassifierGraph(nn.Module):
    """Images of the model's size to probabilities.

    Args:
        classifier: gives logits.
        mean: `(C, 1, 1)`, in [0, 255]; None = zero.
        std: likewise.
        has_sigmoid: one sigmoid for each class instead of a softmax.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, classifier: nn.Module, mean: Tensor | None, std: Tensor, *, has_sigmoid: bool
    ) -> None:
        super().__init__()
        self.classifier, self.has_sigmoid = classifier, has_sigmoid
        self.register_buffer("mean", torch.zeros_like(std) if mean is None else mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, S, S)` uint8 to `(B, K)`."""
        logits = self.classifier((images.float() - self.mean) / self.std)
        return logits.sigmoid() if self.has_sigmoid else logits.softmax(1)


def _smaller(count: int, most: int) -> Any:
    # A trace holds sizes as tensors, which are constants of it.
    return min(int(count), most) if torch.jit.is_tracing() else torch.sym_min(count, most)


def _are_large(boxes: Tensor, side: float) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2] >= side).all(1)


def _nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, size: Size) -> Tensor:
    """Non-maximum suppression within each group, which is moved to where no other group is."""
    side: Any = torch.sym_max(*size)
    offset: Tensor = groups.to(boxes) * (side + 1)
    return nms(boxes + offset[:, None], scores, threshold)


def _pool(pooler: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """The features of each box, `(n, C, 7, 7)`, from the level that its size asks for."""
    assert pooler.scales is not None and pooler.map_levels is not None
    maps = [features[name] for name in pooler.featmap_names]
    rois = F.pad(boxes, (1, 0))  # with the position of the image: 0
    size, ratio = pooler.output_size, pooler.sampling_ratio
    if len(maps) == 1:
        return roi_align(maps[0], rois, size, pooler.scales[0], ratio)
    levels: Any = pooler.map_levels([boxes])
    rows = [(levels == level).nonzero()[:, 0] for level in range(len(maps))]
    pooled = [
        roi_align(level_map, rois[level_rows], size, scale, ratio)
        for level_map, level_rows, scale in zip(maps, rows, pooler.scales, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(rows).argsort()]
