"""Faster R-CNN on torchvision's parts: ResNet-FPN, and VGG-16 with its fc6/fc7 head.

The interface is torchvision's: `model(images, targets) -> losses` in training,
`model(images) -> detections` in evaluation. Two things differ from `torchvision.models.detection`,
so that a step is the same for any number of ranks and micro-batches (`heads.py` has the code):

- the loss of a batch is the mean over its images of each image's own loss (torchvision divides by
  the number of boxes sampled in the local batch; the two agree where every image yields its full
  quota of samples);
- a target may carry a `seed`, which fixes the sampling of that image's anchors and proposals.

Papers: Ren, He, Girshick, Sun, "Faster R-CNN", NeurIPS 2015; Lin et al., "Feature Pyramid
Networks", CVPR 2017.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as tvf

from tract_det.errors import UserError
from tract_det.modeling.backbones import (
    VGGBackbone,
    build_resnet_fpn,
    build_vgg,
    freeze,
)
from tract_det.modeling.channels import set_channels
from tract_det.modeling.heads import (
    POOLED_SIZE,
    BoxHeadOptions,
    ImagewiseRoIHeads,
    ImagewiseRPN,
    Losses,
    ProposalOptions,
    VGGHead,
    build_roi_heads,
    build_rpn,
)
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD
from tract_det.tract import set_image_sizes

_FPN_LEVELS = ["0", "1", "2", "3"]  # boxes are pooled from these


def resize_shorter_side(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """Scales the shorter side to `min_size` pixels, but the longer side to at most `max_size`.

    Args:
        image: `(C, H, W)`.
        min_size: pixels; 0 = the image as it is.
        max_size: pixels.
    """
    if not min_size:
        return image
    height, width = image.shape[-2:]
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return tvf.resize(image, [int(height * scale), int(width * scale)], antialias=True)


class DetectorTransform(GeneralizedRCNNTransform):
    """Standardises images, uint8 or float, resizes them for evaluation, and makes a batch.

    In training the data pipeline has resized them already, in its worker processes, by the same
    antialiased resizing: a model is evaluated on what it was trained on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known_statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def normalize(self, image: Tensor) -> Tensor:
        """`(C, H, W)` in uint8 or in [0, 1] to standardised fp32."""
        mean, std = self._statistics(image.device)
        image = image if image.is_floating_point() else image.float() / 255
        return (image - mean) / std

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(C, 1, 1)`, which are copied to a device only once."""
        if device not in self._known_statistics:
            values = (self.image_mean, self.image_std)
            with torch.inference_mode(False):  # a training may come after the evaluation
                mean, std = torch.tensor(values, device=device)[..., None, None]
            self._known_statistics[device] = mean, std
        return self._known_statistics[device]

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """In evaluation `resize_shorter_side`; in training nothing."""
        if self.training:
            return image, target
        return resize_shorter_side(image, self.min_size[-1], self.max_size), target


class FasterRCNN(nn.Module):
    """A two-stage detector; the module's docstring says how it differs from torchvision's.

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
        self.transform = transform
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> Losses | list[dict[str, Tensor]]:
        """Losses in training; detections, in pixels of the images as passed in, in evaluation.

        Args:
            images: `(C, H, W)` each, RGB if C is 3, uint8 or float in [0, 1]; sizes may differ.
            targets: for each image `boxes (n, 4)` xyxy pixels, `labels (n,)` 1..K, and optionally
                `seed`.

        Returns:
            In training the four losses by name; in evaluation `boxes`, `scores` and `labels` for
            each image.
        """
        if self.training and targets is None:
            raise ValueError("in training the detector needs targets")
        seeds = [t["seed"] for t in targets if "seed" in t] if targets and self.training else []
        for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
            sampler.seeds = list(seeds)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        if targets is not None:
            targets = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
        batch, targets = self.transform(images, targets)
        # The stem keeps the sizes until the next batch: with activation checkpointing it runs again
        # in the backward pass.
        set_image_sizes(self.backbone, batch.image_sizes if self.training else None, edges=True)
        features = self.backbone(batch.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        # RoIAlign and the anchors take the type of the features, and bf16 has 8 significant bits.
        features = {level: maps.float() for level, maps in features.items()}
        proposals, rpn_losses = self.rpn(batch, features, targets)
        detections, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {**losses, **rpn_losses}
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)


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
    """Faster R-CNN with random weights; `loading.load_into` loads others.

    Args:
        backbone: one of `choices.BACKBONES`.
        num_classes: K, without background.
        norm: one of `choices.DETECTOR_NORMS`, in the backbone.
        freeze_at: as in `backbones.freeze`.
        fpn_channels: channels of the feature pyramid.
        pixel_mean: of each channel of the images, RGB if there are three, in units of [0, 255].
        pixel_std: likewise.
        min_size: shorter side in evaluation, pixels; 0 = images keep their size.
        max_size: most pixels of the longer side in evaluation.
        proposals: options of the first stage; None = torchvision's defaults.
        box_head: options of the second stage; None = torchvision's defaults.

    Raises:
        UserError: the options do not go together, naming the config key.
    """
    proposals, box_head = proposals or ProposalOptions(), box_head or BoxHeadOptions()
    is_fpn = backbone.endswith("_fpn")
    body: BackboneWithFPN | VGGBackbone
    if is_fpn:
        body = build_resnet_fpn(backbone.removesuffix("_fpn"), norm, fpn_channels)
        roi_heads = _fpn_roi_heads(body.out_channels, num_classes, box_head)
    else:
        body = build_vgg(backbone, norm)
        roi_heads = _vgg_roi_heads(body.out_channels, num_classes, box_head)
    set_channels(body, len(pixel_mean))
    freeze(body, freeze_at)
    rpn = build_rpn(_anchors(proposals, is_fpn), body.out_channels, proposals)
    mean, std = ([value / 255 for value in values] for values in (pixel_mean, pixel_std))
    return FasterRCNN(body, rpn, roi_heads, DetectorTransform(min_size, max_size, mean, std))


def _fpn_roi_heads(channels: int, num_classes: int, options: BoxHeadOptions) -> ImagewiseRoIHeads:
    head = TwoMLPHead(channels * POOLED_SIZE**2, options.fc_dim)
    return build_roi_heads(_FPN_LEVELS, head, options.fc_dim, num_classes, options)


def _vgg_roi_heads(channels: int, num_classes: int, options: BoxHeadOptions) -> ImagewiseRoIHeads:
    head = VGGHead(options.dropout, channels * POOLED_SIZE**2)
    return build_roi_heads(["0"], head, head.fc7.out_features, num_classes, options)


def _anchors(proposals: ProposalOptions, is_fpn: bool) -> AnchorGenerator:
    """One anchor size for each level of an FPN; every size on the one level of a VGG."""
    sizes = [tuple(proposals.anchor_sizes)]
    if is_fpn:
        sizes = [(size,) for size in proposals.anchor_sizes]
        if len(sizes) != len(_FPN_LEVELS) + 1:  # the pooled level has anchors, but no boxes
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.SIZES has {len(sizes)} entries: an FPN takes five, one "
                "for each level"
            )
    return AnchorGenerator(tuple(sizes), (tuple(proposals.aspect_ratios),) * len(sizes))
