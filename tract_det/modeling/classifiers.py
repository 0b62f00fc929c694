"""Image classifiers for pretraining: torchvision's and timm's, with the options of the recipes.

All have random weights and keep their library's names, so that their weights enter a detector, or
that library, as they are.
"""

import difflib
import math
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.checkpointing import checkpoint_activations
from tract_det.modeling.patch_norm import PATCH_NORMS, add_patch_norm
from tract_det.modeling.resnets import STEM_WIDTH, build_resnet
from tract_det.modeling.small_images import make_small

_TIMM = "timm:"
_SMALL_GRID = 8  # patches along a side of a small image, as in CIFAR ViTs


def build_classifier(
    name: str,
    num_classes: int,
    *,
    small_images: bool = False,
    norm: str = "BN",
    patch_norm: str = "",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int = 224,
    width: int = STEM_WIDTH,
    checkpointing: bool = False,
) -> nn.Module:
    """A classifier with random weights: images `(B, 3, H, W)` to logits `(B, num_classes)`.

    Args:
        name: one of torchvision's classifiers ("vgg16_bn", "resnet18", "vit_b_16", ...);
            "resnet10", with one basic block a stage; or "timm:NAME" for one of timm's.
        num_classes: of the head.
        small_images: the form for CIFAR's. Convolutional models: a 3x3/1 stem under its name, and
            no pooling near it; `make_small` says which. VGGs: features averaged to 1 x 1, and one
            `nn.Linear(512, num_classes)`. timm's ViTs: 8 x 8 patches, whatever the name says.
        norm: "BN" (what the model has), "SyncBN", or "GN", in place of its batch norms.
        patch_norm: "", "layer_norm" or "dual", as `add_patch_norm` has them, on ViTs.
        drop_rate: dropout. Of torchvision's models it is that of every `nn.Dropout`, the default
            included: VGG's published 0.5 is to be asked for.
        drop_path_rate: stochastic depth of timm's models.
        image_size: of the images' sides, pixels; for models whose shape depends on it.
        width: channels of a ResNet's stem.
        checkpointing: compute the activations of each stage again in the backward pass. timm's
            batch norms then count every batch twice.

    Raises:
        UserError: an unknown name, or an option that the model does not have, naming the key.
    """
    if patch_norm not in PATCH_NORMS:
        known = ", ".join(map(repr, PATCH_NORMS))
        raise UserError(f"MODEL.PATCH_NORM is {patch_norm!r}: it takes one of {known}")
    is_timm = name.startswith(_TIMM)
    if is_timm:
        _refuse_width(name, width)
        model = _timm_model(name, num_classes, small_images, drop_rate, drop_path_rate, image_size)
    else:
        if drop_path_rate:
            raise UserError(
                f"MODEL.DROP_PATH_RATE is {drop_path_rate}, which torchvision's {name} does not "
                "take: set 0, or MODEL.NAME to a model of timm's"
            )
        model = _torchvision_model(name, num_classes, image_size, width)
        if small_images:
            make_small(model, name, num_classes)
        _set_dropout(model, name, drop_rate)
    model = _with_norm(model, name, norm)
    if patch_norm:
        add_patch_norm(model, patch_norm, name)
    if checkpointing and is_timm:
        _checkpoint_timm(model, name)
    elif checkpointing:
        checkpoint_activations(model, name)
    return model


def check_image_size(model: nn.Module, name: str, image_size: int) -> None:
    """Takes one image through the model, which it leaves as it was.

    Args:
        model: on the CPU.
        name: as the user wrote it, for the message.
        image_size: of the images' sides, pixels.

    Raises:
        UserError: the model does not take images of that size.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _refused(name, image_size, error) from error
    finally:
        model.train(was_training)


def _refused(name: str, image_size: int, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"INPUT.SIZE is {image_size}, which MODEL.NAME {name} refuses ({reason}): take another "
        "size or model, or MODEL.SMALL_IMAGES True where the model has that form"
    )


def _unknown(name: str, known: list[str], prefix: str = "") -> UserError:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; near: {', '.join(prefix + other for other in near)}" if near else ""
    library = "timm" if prefix else "torchvision"
    return UserError(f"MODEL.NAME {prefix}{name}: {library} has no such classifier{hint}")


def _refuse_width(name: str, width: int) -> None:
    if width != STEM_WIDTH:
        raise UserError(f"MODEL.WIDTH is {width}: {name} is no ResNet of torchvision's; set 64")


def _timm_model(
    name: str,
    num_classes: int,
    small_images: bool,
    drop_rate: float,
    drop_path_rate: float,
    image_size: int,
) -> nn.Module:
    key = name.removeprefix(_TIMM)
    if not timm.is_model(key):
        raise _unknown(key, timm.list_models(), _TIMM)
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size}
    if small_images:
        options["patch_size"] = max(1, image_size // _SMALL_GRID)
    if drop_rate:
        options["drop_rate"] = drop_rate
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    try:
        try:
            return timm.create_model(key, pretrained=False, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            del options["img_size"]  # its shape is that of any image
            options.pop("patch_size", None)
            model = timm.create_model(key, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if small_images:
            raise UserError(
                f"MODEL.SMALL_IMAGES True: {name} takes no patch size for small images ({error}); "
                "take one of timm's ViTs, or torchvision's ResNets and VGGs"
            ) from error
        raise UserError(f"MODEL.NAME {name} cannot be built at this size: {error}") from error
    if small_images:
        make_small(model, name, num_classes)
    return model


def _torchvision_model(name: str, num_classes: int, image_size: int, width: int) -> nn.Module:
    known = [*torchvision.models.list_models(module=torchvision.models), "resnet10"]
    if name not in known:
        raise _unknown(name, known)
    if "resne" in name:
        return build_resnet(name, num_classes, width=width)
    _refuse_width(name, width)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": image_size}
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except AssertionError as error:
        raise _refused(name, image_size, error) from error


def _set_dropout(model: nn.Module, name: str, rate: float) -> None:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if rate and not layers:
        raise UserError(f"MODEL.DROP_RATE is {rate}, but {name} has no dropout: set 0")
    for layer in layers:
        layer.p = rate


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups (Wu and He 2018), or fewer where the channels do not divide by 32."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _with_norm(model: nn.Module, name: str, norm: str) -> nn.Module:
    if norm == "BN":
        return model
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise UserError(f"MODEL.NORM is {norm} but {name} has no batch norms: leave it at BN")
    if norm == "SyncBN":
        if not torch.cuda.is_available():
            raise UserError("MODEL.NORM SyncBN needs CUDA: on a CPU take BN or GN")
        return timm.layers.convert_sync_batchnorm(model)
    if norm != "GN":
        raise UserError(f"MODEL.NORM is {norm}: it takes BN, SyncBN or GN")
    if any(type(module) is not nn.BatchNorm2d for module in norms):
        raise UserError(
            f"MODEL.NORM is GN but the norms of {name} hold more than a batch norm: take BN, or a "
            "model of torchvision's"
        )
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, _group_norm(child.num_features))
    return model


def _checkpoint_timm(model: Any, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"MODEL.CHECKPOINTING True: timm does not checkpoint {name}; set False"
        ) from error


class ClassifierWithLoss(nn.Module):
    """A classifier that computes its own loss in training, as a detector does.

    Args:
        model: images to logits `(B, C)`.
        smoothing: label smoothing of the targets (Szegedy et al. 2016).
        bce: binary cross-entropy with a sigmoid for each class, instead of the softmax's: every
            class in an image's target counts as wholly there, so that an image mixed of two has
            both (Wightman et al. 2021; DeiT-III). The mean over images and classes.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, bce: bool = False) -> None:
        super().__init__()
        self.model, self.smoothing, self.bce = model, smoothing, bce

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """`{"loss_cls": loss}` in training, the logits `(B, C)` in evaluation.

        Args:
            images: `(B, 3, H, W)`, standardised.
            targets: labels `(B,)`, or each class's share `(B, C)`.
        """
        logits = self.model(images)
        if not self.training:
            return logits
        if targets is None:
            raise ValueError("in training the classifier needs targets")
        logits = logits.float()
        if not self.bce:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        else:
            present = _present(targets, logits.shape[1], self.smoothing)
            loss = F.binary_cross_entropy_with_logits(logits, present)
        return {"loss_cls": loss}


def _present(targets: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Which classes are there at all, `(B, C)`: 1 and 0, moved together by the smoothing.

    The targets are labels, or shares that were not smoothed before: those have no zeros.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets, num_classes).float()
    return (targets > 0).float() * (1 - smoothing) + smoothing / num_classes
