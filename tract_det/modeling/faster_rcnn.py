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
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as tvf

from tract_det.errors import UserError
from tract_det.modeling.backbones import VGGHead, build_resnet_fpn, build_vgg, freeze

Losses = dict[str, Tensor]


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
        if self.training or not self.min_size[-1]:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = [int(height * scale), int(width * scale)]
        return tvf.resize(image, size, antialias=True), target


class FasterRCNN(GeneralizedRCNN):
    """A two-stage detector; see the module's docstring for what differs from torchvision's."""

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
        seeds = [t["seed"] for t in targets if "seed" in t] if targets and self.training else []
        for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
            sampler.seeds = list(seeds)
        if targets is not None:
            targets = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
        return super().forward(images, targets)


def build_faster_rcnn(
    *,
    backbone: str,
    num_classes: int,
    norm: str = "BN",
    freeze_at: int = 0,
    fpn_channels: int = 256,
    pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
    pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    min_size: int = 800,
    max_size: int = 1333,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    rpn_pre_nms: tuple[int, int] = (2000, 1000),
    rpn_post_nms: tuple[int, int] = (2000, 1000),
    rpn_nms_thresh: float = 0.7,
    rpn_batch_size: int = 256,
    rpn_positive_fraction: float = 0.5,
    roi_batch_size: int = 512,
    roi_positive_fraction: float = 0.25,
    fc_dim: int = 1024,
    dropout: float = 0.5,
    score_thresh: float = 0.05,
    nms_thresh: float = 0.5,
    detections_per_image: int = 100,
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
        anchor_sizes: pixels; one a level for an FPN (five), all on the one level of a VGG.
        aspect_ratios: height / width of the anchors.
        rpn_pre_nms: proposals before suppression, (training, evaluation).
        rpn_post_nms: proposals after suppression, (training, evaluation).
        rpn_nms_thresh: IoU above which a proposal is suppressed.
        rpn_batch_size: anchors an image in the loss.
        rpn_positive_fraction: share of objects among them, at most.
        roi_batch_size: proposals an image in the loss.
        roi_positive_fraction: share of objects among them, at most.
        fc_dim: width of the two fully connected layers of an FPN's head.
        dropout: of a VGG's fc6 and fc7.
        score_thresh: detections below are dropped.
        nms_thresh: IoU above which a detection is suppressed.
        detections_per_image: at most.

    Raises:
        UserError: a combination that does not exist, naming the config key.
    """
    is_fpn = backbone.endswith("_fpn")
    if is_fpn:
        body = build_resnet_fpn(backbone.removesuffix("_fpn"), norm, fpn_channels)
        head: nn.Module = TwoMLPHead(body.out_channels * 7 * 7, fc_dim)
        sizes: tuple[tuple[int, ...], ...] = tuple((size,) for size in anchor_sizes)
        levels = ["0", "1", "2", "3"]
        if len(sizes) != len(levels) + 1:
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.SIZES has {len(sizes)} entries: an FPN takes five, one a "
                "level"
            )
    else:
        body, head = build_vgg(backbone, norm), VGGHead(dropout)
        sizes, levels, fc_dim = (tuple(anchor_sizes),), ["0"], 4096
    freeze(body, freeze_at)
    anchors = AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes))
    rpn = ImagewiseRPN(
        anchors,
        RPNHead(body.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rpn_batch_size,
        positive_fraction=rpn_positive_fraction,
        pre_nms_top_n={"training": rpn_pre_nms[0], "testing": rpn_pre_nms[1]},
        post_nms_top_n={"training": rpn_post_nms[0], "testing": rpn_post_nms[1]},
        nms_thresh=rpn_nms_thresh,
    )
    rpn.fg_bg_sampler = BalancedSampler(rpn_batch_size, rpn_positive_fraction, salt=0)
    roi_heads = ImagewiseRoIHeads(
        MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        head,
        FastRCNNPredictor(fc_dim, num_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=roi_batch_size,
        positive_fraction=roi_positive_fraction,
        bbox_reg_weights=None,  # torchvision's default, (10, 10, 5, 5)
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_image,
    )
    roi_heads.fg_bg_sampler = BalancedSampler(roi_batch_size, roi_positive_fraction, salt=1)
    transform = DetectorTransform(
        min_size,
        max_size,
        [mean / 255 for mean in pixel_mean],
        [std / 255 for std in pixel_std],
    )
    return FasterRCNN(body, rpn, roi_heads, transform)
