"""Faster R-CNN on torchvision's parts: ResNet-FPN, and VGG-16 with its fc6/fc7 head.

The interface is torchvision's: `model(images, targets) -> losses` in training,
`model(images) -> detections` in evaluation. Two things differ from `torchvision.models.detection`,
so that a step is the same for any number of ranks and micro-batches:

- the loss of a batch is the mean over its images of the image's own loss (torchvision divides by
  the number of boxes sampled in the local batch; where every image yields its full quota of samples
  the two agree);
- a target may carry a `seed`, from which that image's anchors and proposals are sampled.

Paper: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature Pyramid Networks",
CVPR 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as tvf

from tract_det.errors import UserError
from tract_det.modeling.backbones import (
    VGGBackbone,
    VGGHead,
    build_resnet_fpn,
    build_vgg,
    freeze,
)
from tract_det.modeling.weights import IMAGENET_MEAN, IMAGENET_STD
from tract_det.tract import set_image_sizes

Losses = dict[str, Tensor]

_FPN_LEVELS = ["0", "1", "2", "3"]  # those that boxes are pooled from


class BalancedSampler:
    """Chooses, in each image, which anchors or proposals the loss is computed on.

    At most `positive_fraction` of `batch_size_per_image` are objects, the rest background
    (Faster R-CNN, section 3.1.3).
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.salt = salt  # so that the two samplers of a detector draw differently
        self.seeds: list[int] = []  # of the images to come; empty: torch's global generator

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks `(anchors,)` of each image's chosen objects, and of its chosen background.

        The labels are above 0 for an object, 0 for background, below for what is ignored.
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
    """torchvision's region proposal network; the loss is the mean of the images' losses."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss, each the mean over the images."""
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
    """torchvision's box head, without masks and keypoints; the loss is the mean of the images'."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], Losses]:
        """Losses in training, detections in the resized image's pixels in evaluation."""
        if self.training:
            proposals, _, labels, regression_targets = self.select_training_samples(
                proposals, targets
            )
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        if not self.training:
            boxes, scores, found = self.postprocess_detections(
                class_logits, box_regression, proposals, image_shapes
            )
            rows = zip(boxes, scores, found, strict=True)
            return [{"boxes": b, "scores": s, "labels": c} for b, s, c in rows], {}
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
        return [], {"loss_classifier": classifier, "loss_box_reg": box}


def _mean_of_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*pairs, strict=True)
    return torch.stack(first).mean(), torch.stack(second).mean()


def resize_shorter_side(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Scales the shorter side to `min_size`, the longer one to at most `max_size`, pixels.

    Args:
        image: `(C, H, W)`.
        min_size: 0 = the image as it is.
        max_size: bound of the longer side.
    """
    if not min_size:
        return image
    height, width = image.shape[-2:]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return tvf.resize(image, [int(height * scale), int(width * scale)], antialias=True)


class DetectorTransform(GeneralizedRCNNTransform):
    """Normalises, resizes for evaluation, and batches; takes uint8 or float images.

    In training the data pipeline has resized already, in its worker processes. The resizing is the
    same one, with antialiasing, so that a model is evaluated on what it was trained on.
    """

    def normalize(self, image: Tensor) -> Tensor:
        """`(C, H, W)` in uint8 or in [0, 1] to standardised fp32."""
        return super().normalize(image if image.is_floating_point() else image.float() / 255)

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Scales the shorter side to `min_size`, the longer one to at most `max_size`, pixels."""
        if self.training:
            return image, target
        return resize_shorter_side(image, self.min_size[-1], self.max_size), target


class FasterRCNN(nn.Module):
    """A two-stage detector; see the module's docstring for what differs from torchvision's.

    The submodules have the names of torchvision's `GeneralizedRCNN`, and so do the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rpn: ImagewiseRPN,
        roi_heads: ImagewiseRoIHeads,
        transform: DetectorTransform,
    ) -> None:
        super().__init__()
        self.transform, self.backbone, self.rpn, self.roi_heads = (
            transform,
            backbone,
            rpn,
            roi_heads,
        )

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> Losses | list[dict[str, Tensor]]:
        """Losses in training, detections in the given images' pixels in evaluation.

        Args:
            images: `(3, H, W)` each, RGB, uint8 or float in [0, 1]; sizes may differ.
            targets: per image `boxes (n, 4)` xyxy pixels, `labels (n,)` 1..K, and maybe `seed`.

        Returns:
            In training the four losses by name; else per image `boxes`, `scores`, `labels`.
        """
        if self.training and targets is None:
            raise ValueError("in training the detector needs targets")
        seeds = [t["seed"] for t in targets if "seed" in t] if targets and self.training else []
        for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
            sampler.seeds = list(seeds)
        given_sizes = [tuple(image.shape[-2:]) for image in images]
        if targets is not None:
            targets = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
        batch, targets = self.transform(images, targets)
        # They hold until the next batch: a checkpointed stem runs again in the backward pass.
        set_image_sizes(self.backbone, batch.image_sizes if self.training else None, edges=True)
        features = self.backbone(batch.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        proposals, rpn_losses = self.rpn(batch, features, targets)
        detections, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {**losses, **rpn_losses}
        return self.transform.postprocess(detections, batch.image_sizes, given_sizes)


@dataclass(frozen=True, kw_only=True)
class ProposalOptions:
    """The region proposal network.

    Attributes:
        anchor_sizes: pixels; one a level for an FPN (five), all on the one level of a VGG.
        aspect_ratios: height / width of the anchors.
        pre_nms: proposals before suppression, (training, evaluation).
        post_nms: proposals after suppression, (training, evaluation).
        nms_thresh: IoU above which a proposal is suppressed.
        batch_size: anchors an image in the loss.
        positive_fraction: share of objects among them, at most.
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
        batch_size: proposals an image in the loss.
        positive_fraction: share of objects among them, at most.
        fc_dim: width of the two fully connected layers of an FPN's head.
        dropout: of a VGG's fc6 and fc7.
        score_thresh: detections below are dropped.
        nms_thresh: IoU above which a detection is suppressed.
        detections_per_image: at most.
    """

    batch_size: int = 512
    positive_fraction: float = 0.25
    fc_dim: int = 1024
    dropout: float = 0.5
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections_per_image: int = 100


def build_faster_rcnn(
    *,
    backbone: str,
    num_classes: int,
    norm: str = "BN",
    freeze_at: int = 0,
    fpn_channels: int = 256,
    pixel_mean: Sequence[float] = IMAGENET_MEAN,
    pixel_std: Sequence[float] = IMAGENET_STD,
    min_size: int = 800,
    max_size: int = 1333,
    proposals: ProposalOptions | None = None,
    box_head: BoxHeadOptions | None = None,
) -> FasterRCNN:
    """Faster R-CNN with random weights; `weights.load_into` fills it.

    Args:
        backbone: "resnet18_fpn", ..., "vgg16", "vgg16_bn".
        num_classes: K, without background.
        norm: "BN", "FrozenBN", "SyncBN" or "GN", in the backbone.
        freeze_at: 0 nothing, 1 the stem, 2 the stem and the first stage, ... (detectron2's key).
        fpn_channels: of the feature pyramid.
        pixel_mean: of RGB, in units of [0, 255].
        pixel_std: of RGB, in units of [0, 255].
        min_size: shorter side in evaluation, pixels; 0 = as they are.
        max_size: longer side's bound in evaluation, pixels.
        proposals: of the first stage; None = torchvision's defaults.
        box_head: of the second stage; None = torchvision's defaults.

    Raises:
        UserError: a combination that does not exist, naming the config key.
    """
    proposals, box_head = proposals or ProposalOptions(), box_head or BoxHeadOptions()
    body: BackboneWithFPN | VGGBackbone
    if backbone.endswith("_fpn"):
        body = build_resnet_fpn(backbone.removesuffix("_fpn"), norm, fpn_channels)
        sizes: list[tuple[int, ...]] = [(size,) for size in proposals.anchor_sizes]
        if len(sizes) != len(_FPN_LEVELS) + 1:  # the pooled level has anchors, but no boxes
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.SIZES has {len(sizes)} entries: an FPN takes five, one a "
                "level"
            )
        head: nn.Module = TwoMLPHead(body.out_channels * 7 * 7, box_head.fc_dim)
        roi_heads = _roi_heads(_FPN_LEVELS, head, box_head.fc_dim, num_classes, box_head)
    else:
        body = build_vgg(backbone, norm)
        sizes = [tuple(proposals.anchor_sizes)]
        roi_heads = _roi_heads(["0"], VGGHead(box_head.dropout), 4096, num_classes, box_head)
    freeze(body, freeze_at)
    anchors = AnchorGenerator(tuple(sizes), (tuple(proposals.aspect_ratios),) * len(sizes))
    transform = DetectorTransform(
        min_size,
        max_size,
        [mean / 255 for mean in pixel_mean],
        [std / 255 for std in pixel_std],
    )
    return FasterRCNN(body, _rpn(anchors, body.out_channels, proposals), roi_heads, transform)


def _rpn(anchors: AnchorGenerator, channels: int, options: ProposalOptions) -> ImagewiseRPN:
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


def _roi_heads(
    levels: list[str], head: nn.Module, width: int, num_classes: int, options: BoxHeadOptions
) -> ImagewiseRoIHeads:
    roi_heads = ImagewiseRoIHeads(
        MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        head,
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
