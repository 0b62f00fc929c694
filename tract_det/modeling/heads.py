"""The two stages of Faster R-CNN: the region proposal network and the box head.

They are torchvision's, except that the loss of a batch is the mean over its images of each image's
own loss, that a seed can fix which anchors and proposals of an image are sampled for the loss, and
that boxes stay in float32 under autocast. The device is asked for numbers three times in a training
step, for all images at once; non-maximum suppression and RoIAlign, torchvision's own, wait besides.

Paper: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from tract_det.modeling.matching import BalancedSampler, BoxCoder, Matcher, positions

Losses = dict[str, Tensor]

POOLED_SIZE = 7  # height and width of a box's features after RoIAlign

# IoU with an object from which an anchor counts as one, and below which as background.
_FG_IOU, _BG_IOU = 0.7, 0.3


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


class Float32RPNHead(RPNHead):
    """torchvision's head of the first stage; its outputs are float32 under autocast as well."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness and boxes of each level's anchors."""
        objectness, boxes = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in boxes]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's output layers of the second stage; likewise."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(boxes, K + 1)`, and box regression `(boxes, 4 * (K + 1))`."""
        logits, boxes = super().forward(x)
        return logits.float(), boxes.float()


class ImagewiseRPN(RegionProposalNetwork):
    """torchvision's region proposal network; the loss is the mean over the images."""

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best proposals of each image, `(n, 4)`, and their scores.

        Args:
            proposals: `(B, anchors, 4)`.
            objectness: logits `(B * anchors, 1)`.
            image_shapes: height and width of each image without its padding.
            num_anchors_per_level: of each image.
        """
        objectness = objectness.detach().reshape(len(proposals), -1)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)  # (B, k)
        scores = objectness.gather(1, best).sigmoid()
        boxes = proposals.gather(1, best[..., None].expand(-1, -1, 4))
        boxes = torch.stack(list(map(clip_boxes_to_image, boxes, image_shapes)))
        ends = accumulate(num_anchors_per_level[:-1])  # none if there is one level
        levels = torch.stack([best >= end for end in ends] or [best < 0]).sum(0)
        is_large = (boxes[..., 2:] - boxes[..., :2] >= self.min_size).all(-1)
        is_kept = is_large & (scores >= self.score_thresh)
        counts = is_kept.sum(1).tolist()
        kept = positions(is_kept.flatten(), sum(counts))
        images = [x.flatten(0, 1)[kept].split(counts) for x in (boxes, scores, levels)]
        best_boxes, best_scores = [], []
        for image_boxes, image_scores, image_levels in zip(*images, strict=True):
            kept = batched_nms(image_boxes, image_scores, image_levels, self.nms_thresh)
            kept = kept[: self.post_nms_top_n()]
            best_boxes.append(image_boxes[kept])
            best_scores.append(image_scores[kept])
        return best_boxes, best_scores

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
        positive, negative, objects, sizes = self.fg_bg_sampler.sample(labels)
        background = [size - count for size, count in zip(sizes, objects, strict=True)]
        pairs = zip(positive.split(objects), negative.split(background), strict=True)
        sampled = torch.cat(list(chain.from_iterable(pairs)))  # image by image
        loss_objectness = _mean_over_images(
            F.binary_cross_entropy_with_logits(*image)
            for image in zip(
                objectness.flatten()[sampled].split(sizes),
                torch.cat(labels)[sampled].split(sizes),
                strict=True,
            )
        )
        targets = torch.cat(regression_targets)[positive]
        return loss_objectness, _box_loss(pred_bbox_deltas[positive], targets, objects, sizes)


class Truth(NamedTuple):
    """What the sampled proposals of all images, one after the other, are.

    Attributes:
        labels: `(samples,)`, 1..K for an object, 0 for background.
        deltas: `(samples, 4)`, what makes an object's box of the proposal.
        objects: how many objects of each image.
        sizes: how many samples of each image.
    """

    labels: Tensor
    deltas: Tensor
    objects: list[int]
    sizes: list[int]


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
            assert targets is not None
            proposals, truth = self._sample(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        if self.training:
            return [], _box_losses(class_logits, box_regression, truth)
        detections = self.postprocess_detections(
            class_logits, box_regression, proposals, image_shapes
        )
        return [
            {"boxes": boxes, "scores": scores, "labels": classes}
            for boxes, scores, classes in zip(*detections, strict=True)
        ], {}

    def _sample(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], Truth]:
        """The proposals of each image that count in the loss, and what they are.

        The objects themselves are among the proposals.
        """
        boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        proposals = self.add_gt_proposals(proposals, boxes)
        classes = [target["labels"] for target in targets]
        matches, labels = self.assign_targets_to_proposals(proposals, boxes, classes)
        positive, negative, objects, sizes = self.fg_bg_sampler.sample(labels)
        sampled = torch.cat([positive, negative]).sort().values
        # An image without objects has one of zeros, which no loss sees.
        boxes = [image if len(image) else image.new_zeros(1, 4) for image in boxes]
        starts = accumulate((len(image) for image in boxes[:-1]), initial=0)
        matches = [match + start for match, start in zip(matches, starts, strict=True)]
        chosen = torch.cat(proposals)[sampled]
        deltas = self.box_coder.encode_single(torch.cat(boxes)[torch.cat(matches)[sampled]], chosen)
        truth = Truth(torch.cat(labels)[sampled], deltas, objects, sizes)
        return list(chosen.split(sizes)), truth


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
        Float32RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=_FG_IOU,
        bg_iou_thresh=_BG_IOU,
        batch_size_per_image=options.batch_size,
        positive_fraction=options.positive_fraction,
        pre_nms_top_n=dict(zip(("training", "testing"), options.pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), options.post_nms, strict=True)),
        nms_thresh=options.nms_thresh,
    )
    rpn.fg_bg_sampler = BalancedSampler(options.batch_size, options.positive_fraction, salt=0)
    rpn.proposal_matcher = Matcher(_FG_IOU, _BG_IOU, allow_low_quality_matches=True)
    rpn.box_coder = BoxCoder(rpn.box_coder.weights)
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
        Float32Predictor(width, num_classes + 1),
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
    roi_heads.box_coder = BoxCoder(roi_heads.box_coder.weights)
    return roi_heads


def _box_losses(class_logits: Tensor, box_regression: Tensor, truth: Truth) -> Losses:
    """Classification and box loss, each the mean over the images.

    Args:
        class_logits: `(samples, K + 1)`.
        box_regression: `(samples, 4 * (K + 1))`.
        truth: of the samples.
    """
    labels, targets, objects, sizes = truth
    classifier = _mean_over_images(
        F.cross_entropy(*image)
        for image in zip(class_logits.split(sizes), labels.split(sizes), strict=True)
    )
    positive = positions(labels > 0, sum(objects))
    deltas = box_regression.reshape(len(labels), -1, 4)[positive, labels[positive]]
    box = _box_loss(deltas, targets[positive], objects, sizes)
    return {"loss_classifier": classifier, "loss_box_reg": box}


def _box_loss(deltas: Tensor, targets: Tensor, objects: list[int], sizes: list[int]) -> Tensor:
    """The smooth L1 loss of the objects' boxes, the mean over the images.

    Args:
        deltas: `(objects of all images, 4)`.
        targets: likewise.
        objects: how many objects of each image.
        sizes: what to divide each image's sum by: the number of its samples.
    """
    images = zip(deltas.split(objects), targets.split(objects), sizes, strict=True)
    return _mean_over_images(
        F.smooth_l1_loss(image_deltas, image_targets, beta=1 / 9, reduction="sum") / size
        for image_deltas, image_targets, size in images
    )


def _mean_over_images(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
