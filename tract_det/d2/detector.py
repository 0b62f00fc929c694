"""Gives detectron2's models this project's detector interface, so that its trainer can use them."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.faster_rcnn import resize_shorter_side
from tract_det.tract import set_image_sizes

Losses = dict[str, Tensor]


class _DetectorInterface(nn.Module):
    """`forward(images, targets)` in front of the meta-architecture's own `forward`.

    Attributes:
        test_size: in evaluation, the shorter side and the upper bound of the longer side, pixels;
            a shorter side of 0 = no resizing.
    """

    test_size: tuple[int, int]

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None = None
    ) -> Losses | list[dict[str, Tensor]]:
        """Losses in training; in evaluation, detections in the pixels of the input images.

        Args:
            images: `(3, H, W)` each, RGB, uint8 or float in [0, 1]; sizes may differ.
            targets: for each image, `boxes (n, 4)` in xyxy pixels and `labels (n,)` in 1..K.

        Returns:
            In training the model's own losses by name; in evaluation a dict of `boxes`, `scores`
            and `labels` for each image.
        """
        if not self.training:
            return self._detect(images)
        if targets is None:
            raise ValueError("in training the detector needs targets")
        inputs = [
            {"image": self._pixels(image), "instances": _instances(image, target)}
            for image, target in zip(images, targets, strict=True)
        ]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        set_image_sizes(self, sizes, edges=True)
        with EventStorage():  # the model's parts log into it and fail without one
            try:
                return super().forward(inputs)
            except FloatingPointError:  # proposals that are not finite; the trainer has the words
                weight = next(weight for weight in self.parameters() if weight.requires_grad)
                return {"loss_proposals": weight.sum() * float("nan")}

    def _detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        inputs = [
            {
                "image": self._pixels(resize_shorter_side(image, *self.test_size)),
                "height": image.shape[-2],
                "width": image.shape[-1],
            }
            for image in images
        ]
        outputs = [output["instances"] for output in super().forward(inputs)]
        return [
            {"boxes": o.pred_boxes.tensor, "scores": o.scores, "labels": o.pred_classes + 1}
            for o in outputs
        ]

    def _pixels(self, image: Tensor) -> Tensor:
        """The image as detectron2's data loaders deliver it: in [0, 255], in the model's format."""
        image = image.as_subclass(Tensor)
        image = image * 255 if image.is_floating_point() else image
        return image.flip(0) if self.input_format == "BGR" else image


def _instances(image: Tensor, target: dict[str, Any]) -> Instances:
    boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor)
    labels = torch.as_tensor(target["labels"])
    size = (image.shape[-2], image.shape[-1])
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=labels - 1)


def _in_full_precision(module: nn.Module, args: Any, features: dict[str, Tensor]) -> Any:
    """The backbone's features in float32: RoIAlign casts boxes to their type, which may be bf16."""
    return {key: value.float() for key, value in features.items()}


def as_detector(
    model: nn.Module, *, min_size: int, max_size: int, input_format: str = ""
) -> nn.Module:
    """Gives a detectron2 model this project's detector interface, in place.

    The keys of its state dict stay as they are.

    Args:
        model: a meta-architecture that detects boxes, such as `GeneralizedRCNN` or `RetinaNet`.
        min_size: shorter side in evaluation, pixels; 0 = no resizing.
        max_size: upper bound of the longer side in evaluation, pixels.
        input_format: "RGB" or "BGR", for a model without the attribute `input_format`.

    Returns:
        The same model.

    Raises:
        UserError: the model needs more than boxes to learn from, or does not detect boxes.
    """
    if isinstance(model, _DetectorInterface):
        return model
    _check_learns_from_boxes(model)
    order = getattr(model, "input_format", None) or input_format or "BGR"
    model.input_format = order  # type: ignore[assignment]
    model.test_size = (min_size, max_size)  # type: ignore[assignment]
    backbone = model.get_submodule("backbone")
    backbone.register_forward_hook(_in_full_precision)
    model.__class__ = type(type(model).__name__, (_DetectorInterface, type(model)), {})
    return model


def _check_learns_from_boxes(model: nn.Module) -> None:
    heads, proposals = getattr(model, "roi_heads", None), getattr(model, "proposal_generator", ...)
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"{kind}_on", False):
            raise UserError(
                f"{type(model).__name__} has a {kind} head, but the data have only boxes: set "
                f"MODEL.{kind.upper()}_ON False (LazyConfig: roi_heads.{kind}_in_features=null) in "
                "MODEL.DETECTRON2.OPTS"
            )
    other = ""
    if hasattr(model, "sem_seg_head") or hasattr(model, "panoptic_on"):
        other = "learns to segment, but the data have only boxes: use a model that detects boxes"
    elif heads is None and proposals is not ...:
        other = "predicts proposals without classes: use a model that detects boxes"
    elif proposals is None:
        other = "takes proposals from a file, which the data lack: use one that generates them"
    if other:
        raise UserError(f"{type(model).__name__} {other}")
