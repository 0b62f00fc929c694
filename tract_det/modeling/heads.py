"""The two stages of Faster R-CNN: the region proposal network and the box head.

They are torchvision's, except that the loss of a batch is the mean over its images of each image's
own loss, and that a seed can fix which anchors and proposals of an image are sampled for the loss.

Paper: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

Losses = dict[str, Tensor]

POOLED_SIZE = 7  # height and width of a box's features after RoIAlign


@dataclass(frozen=True, kw_only=True)
class ProposalOptions:
    """The region proposal network.

    Attributes:
        anchor_sizes: pixels. For an FPN five, one for each level; for a VGG all are on its one
            level.
        aspect_ratios: height / width of the anchors.
        pre_nms: most proposals before non-maximum suppression, (training, evaluation).
        post_nms: most proposals after it, (training, evaluation).
        nms_thresh: IoU above which a proposal is suppressed.
        batch_size: anchors of each image that count in the loss.
        positive_fraction: the largest share of objects among these.
    """

    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512)
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0)
    pre_nms: tuple[int, int] = (2000, 1000)
    post_nms: tuple[int, int] = (2000, 1000)
    nms_thresh: float = 0.7
    batch_size: int = 256
    positive_fraction: float = 0.5


@dataclass(frozen=True, kw_only=True)
class BoxHeadOptions:
    """The second stage.

    Attributes:
        batch_size: proposals of each image that count in the loss.
        positive_fraction: the largest share of objects among these.
        fc_dim: width of the two fully connected layers of an FPN's head.
        dropout: of a VGG's fc6 and fc7.
        score_thresh: detections with a lower score are dropped.
        nms_thresh: IoU above which a detection is suppressed.
        detections_per_image: the most detections of an image.
    """

    batch_size: int = 512
    positive_fraction: float = 0.25
    fc_dim: int = 1024
    dropout: float = 0.5
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections_per_image: int = 100


class BalancedSampler:
    """Chooses the anchors or proposals of each image that count in the loss.

    At most `positive_fraction` of `batch_size_per_image` are objects, the rest is background
    (Faster R-CNN, section 3.1.3).

    Attributes:
        seeds: for the images to come, one each; empty = torch's global generator.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.salt = salt  # so that the two samplers of a detector draw differently
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks `(anchors,)` of each image's chosen objects, and of its chosen background.

        Args:
            labels: `(anchors,)` for each image: positive for an object, 0 for background, negative
                for an anchor to ignore.
        """
        positives, negatives = [], []
        for image_labels in labels:
            generator = None
            if self.seeds:
                generator = torch.Generator(image_labels.device)
                generator.manual_seed(2 * self.seeds.pop(0) + self.salt)
            quota = int(self.batch_size_per_image * self.positive_fraction)
            positive = self._draw(image_labels >= 1, quota, generator)
            quota = self.batch_size_per_image - int(positive.sum())
            positives.append(positive)
            negatives.append(self._draw(image_labels == 0, quota, generator))
        return positives, negatives

    @staticmethod
    def _draw(candidates: Tensor, quota: int, generator: torch.Generator | None) -> Tensor:
        indices = candidates.nonzero().squeeze(1)
        order = torch.randperm(len(indices), generator=generator, device=indices.device)
        chosen = torch.zeros_like(candidates)
        chosen[indices[order[:quota]]] = True
        return chosen


class ImagewiseRPN(RegionProposalNetwork):
    """torchvision's region proposal network; the loss is the mean over the images."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss, each the mean over the images.

        Args:
            objectness: logits `(images * anchors, 1)`.
            pred_bbox_deltas: `(images * anchors, 4)`.
            labels: `(anchors,)` for each image.
            regression_targets: `(anchors, 4)` for each image.
        """
        n = len(labels)
        losses = [
            super(ImagewiseRPN, self).compute_loss(scores, deltas, [label], [target])
            for scores, deltas, label, target in zip(
                objectness.reshape(n, -1, 1),
                pred_bbox_deltas.reshape(n, -1, 4),
                labels,
                regression_targets,
                strict=True,
            )
        ]
        return _mean_of_pairs(losses)


class ImagewiseRoIHeads(RoIHeads):
    """torchvision's second stage for boxes alone; the loss is the mean over the images."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], Losses]:
        """Classifies and refines the proposals.

        Args:
            features: level to `(B, C, H, W)`.
            proposals: `(n, 4)` for each image, xyxy pixels of the batch.
            image_shapes: height and width of each image without its padding.
            targets: `boxes` and `labels` of each image; needed in training.

        Returns:
            Each image's detections, in pixels of the batch, and no losses in evaluation; no
            detections, and the losses by name, in training.
        """
        if self.training:
            proposals, _, labels, regression_targets = self.select_training_samples(
                proposals, targets
            )
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        if self.training:
            return [], _box_losses(class_logits, box_regression, labels, regression_targets)
        detections = self.postprocess_detections(
            class_logits, box_regression, proposals, image_shapes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": classes}
            for boxes, scores, classes in zip(*detections, strict=True)
        ], {}


class VGGHead(nn.Module):
    """fc6 and fc7 of VGG's classifier, with its dropout (Faster R-CNN, section 3.2)."""

    def __init__(self, dropout: float, in_features: int = 512 * 7 * 7, width: int = 4096) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, width)
        self.fc7 = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """`(boxes, 512, 7, 7)` to `(boxes, width)`."""
        hidden = self.dropout(self.fc6(pooled.flatten(1)).relu())
        return self.dropout(self.fc7(hidden).relu())


def build_rpn(anchors: AnchorGenerator, channels: int, options: ProposalOptions) -> ImagewiseRPN:
    """The first stage, for features of so many channels."""
    rpn = ImagewiseRPN(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.batch_size,
        positive_fraction=options.positive_fraction,
        pre_nms_top_n=dict(zip(("training", "testing"), options.pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), options.post_nms, strict=True)),
        nms_thresh=options.nms_thresh,
    )
    rpn.fg_bg_sampler = BalancedSampler(options.batch_size, options.positive_fraction, salt=0)
    return rpn


def build_roi_heads(
    levels: list[str], box_head: nn.Module, width: int, num_classes: int, options: BoxHeadOptions
) -> ImagewiseRoIHeads:
    """The second stage.

    Args:
        levels: names of the feature maps that boxes are pooled from.
        box_head: pooled features `(boxes, C, 7, 7)` to `(boxes, width)`.
        width: the box head's output channels.
        num_classes: K, without background.
        options: of the sampling and of the detections.
    """
    roi_heads = ImagewiseRoIHeads(
        MultiScaleRoIAlign(levels, output_size=POOLED_SIZE, sampling_ratio=2),
        box_head,
        FastRCNNPredictor(width, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=options.batch_size,
        positive_fraction=options.positive_fraction,
        bbox_reg_weights=None,  # torchvision's default, (10, 10, 5, 5)
        score_thresh=options.score_thresh,
        nms_thresh=options.nms_thresh,
        detections_per_img=options.detections_per_image,
    )
    roi_heads.fg_bg_sampler = BalancedSampler(options.batch_size, options.positive_fraction, salt=1)
    return roi_heads


def _box_losses(
    class_logits: Tensor,
    box_regression: Tensor,
    labels: list[Tensor],
    regression_targets: list[Tensor],
) -> Losses:
    """Classification and box loss, each the mean over the images.

    Args:
        class_logits: `(samples of all images, K + 1)`.
        box_regression: `(samples of all images, 4 * (K + 1))`.
        labels: `(samples,)` for each image.
        regression_targets: `(samples, 4)` for each image.
    """
    counts = [len(label) for label in labels]
    losses = [
        fastrcnn_loss(logits, deltas, [label], [target])
        for logits, deltas, label, target in zip(
            class_logits.split(counts),
            box_regression.split(counts),
            labels,
            regression_targets,
            strict=True,
        )
    ]
    classifier, box = _mean_of_pairs(losses)
    return {"loss_classifier": classifier, "loss_box_reg": box}


def _mean_of_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*pairs, strict=True)
    return torch.stack(first).mean(), torch.stack(second).mean()
