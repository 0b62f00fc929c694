"""Image classifiers for pretraining: torchvision's and timm's, with the options of the recipes.

All have random weights and keep their library's names, so that their weights can be loaded into a
detector, or into that library, without a conversion.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import timm
import timm.layers
import torch
import torchvision
from torch import nn
from torchvision.models import ResNet

from tract_det.errors import UserError, shortened
from tract_det.modeling.channels import set_channels
from tract_det.modeling.checkpointing import checkpoint_activations, checkpoint_timm
from tract_det.modeling.choices import CLASSIFIER_NORMS
from tract_det.modeling.cifar_models import CIFAR_MODELS, build_cifar_model
from tract_det.modeling.patch_norm import add_patch_norm
from tract_det.modeling.resnets import STEM_WIDTH, build_resnet
from tract_det.modeling.small_images import make_small, small_patch

_TIMM = "timm:"


def build_classifier(
    name: str,
    num_classes: int,
    *,
    small_images: bool = False,
    small_pool: bool = False,
    norm: str = "BN",
    patch_norm: str = "",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int = 224,
    channels: int = 3,
    width: int = STEM_WIDTH,
    checkpointing: bool = False,
) -> nn.Module:
    """A classifier with random weights: images `(B, C, H, W)` to logits `(B, num_classes)`.

    Args:
        name: one of torchvision's classifiers ("vgg16_bn", "resnet18", "vit_b_16", ...);
            "resnet10", with one basic block in each stage; one of `CIFAR_MODELS`, which need
            `small_images`; or "timm:NAME" for one of timm's.
        num_classes: of the head.
        small_images: the form for images of CIFAR's size. Convolutional models: a 3x3/1 stem under
            its usual name, without the pooling near it (`make_small`). VGGs: features averaged to
            1 x 1, and one `nn.Linear(512, num_classes)`. timm's ViTs: a grid of 8 x 8 patches,
            whatever patch size the name says.
        small_pool: `small_images` keeps the 3x3/2 max-pooling of torchvision's ResNets, as the
            CIFAR-10 code of TrAct's authors does.
        norm: one of `choices.CLASSIFIER_NORMS`: "BN" keeps what the model has; "SyncBN" or "GN"
            replaces its batch norms.
        patch_norm: one of `choices.PATCH_NORMS`, for ViTs (`add_patch_norm`).
        drop_rate: dropout. In all models but timm's it sets every `nn.Dropout`, also to the default
            of 0: ask for the 0.5 that a VGG was published with.
        drop_path_rate: stochastic depth, in timm's models.
        image_size: height and width of the images in pixels, for models whose shape depends on it.
        channels: C, of the images; with 3 the model is its library's to the last bit.
        width: channels of a ResNet's stem.
        checkpointing: compute the activations of each stage again in the backward pass. The batch
            norms of timm's models then count every batch twice.

    Raises:
        UserError: an unknown name, or an option that the model does not have, naming the key.
    """
    is_timm = name.startswith(_TIMM)
    if is_timm:
        _refuse_width(name, width)
        options: dict[str, Any] = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        options |= {"in_chans": channels} if channels != 3 else {}
        model = _timm_model(name, num_classes, small_images, image_size, options)
    else:
        if drop_path_rate:
            raise UserError(
                f"MODEL.DROP_PATH_RATE is {drop_path_rate}, which {name} does not take: "
                "set 0, or MODEL.NAME to a model of timm's"
            )
        if name in CIFAR_MODELS:
            _refuse_width(name, width)
            if not small_images:
                raise UserError(f"MODEL.NAME {name} needs MODEL.SMALL_IMAGES True")
            model = build_cifar_model(name, num_classes, image_size, small_pool=small_pool)
        else:
            model = _torchvision_model(name, num_classes, image_size, width)
            if small_images:
                make_small(model, name, num_classes, small_pool=small_pool)
        set_channels(model, channels)
        _set_dropout(model, name, drop_rate)
    if small_pool and not (small_images and isinstance(model, ResNet)):
        raise UserError(
            "MODEL.SMALL_POOL True needs MODEL.SMALL_IMAGES True and one of torchvision's ResNets, "
            f"not {name}: set it False"
        )
    model = _with_norm(model, name, norm)
    if patch_norm:
        add_patch_norm(model, patch_norm, name)
    if checkpointing:
        # Some of CIFAR_MODELS are of timm's classes.
        by_timm = is_timm or hasattr(model, "set_grad_checkpointing")
        (checkpoint_timm if by_timm else checkpoint_activations)(model, name)
    return model


def check_image_size(model: nn.Module, name: str, image_size: int, channels: int = 3) -> None:
    """Runs one image through the model, which stays as it was.

    Args:
        model: on the CPU.
        name: as the user wrote it, for the message.
        image_size: height and width of the image in pixels.
        channels: of the image.

    Raises:
        UserError: the model does not take images of that size.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _refused(name, image_size, error, channels) from error
    finally:
        model.train(was_training)


def _refused(name: str, image_size: int, error: Exception, channels: int = 3) -> UserError:
    reason = str(error).partition("\n")[0]
    others = f", and MODEL.PIXEL_MEAN for {channels} channels" if channels != 3 else ""
    return UserError(
        f"INPUT.SIZE is {image_size}{others}, which MODEL.NAME {name} refuses ({reason}): take "
        "another size or model, or MODEL.SMALL_IMAGES True where the model has that form"
    )


def _unknown(name: str, known: list[str], prefix: str = "") -> UserError:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"; similar names: {', '.join(prefix + match for match in near)}" if near else ""
    library = "timm" if prefix else "torchvision"
    return UserError(f"MODEL.NAME {prefix}{name}: {library} has no such classifier{hint}")


def _refuse_width(name: str, width: int) -> None:
    if width != STEM_WIDTH:
        raise UserError(f"MODEL.WIDTH is {width}, but {name} has a fixed width: set {STEM_WIDTH}")


def _timm_model(
    name: str,
    num_classes: int,
    small_images: bool,
    image_size: int,
    more: Mapping[str, Any],
) -> nn.Module:
    """One of timm's models; of `more`, options of timm's, it is given those that are not 0."""
    key = name.removeprefix(_TIMM)
    if not timm.is_model(key):
        raise _unknown(key, timm.list_models(), _TIMM)
    options: dict[str, Any] = {"num_classes": num_classes, "img_size": image_size}
    options |= {option: value for option, value in more.items() if value}
    if small_images:
        options["patch_size"] = small_patch(image_size)
    try:
        try:
            return timm.create_model(key, pretrained=False, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            del options["img_size"]  # the model has no such option: it takes images of any size
            options.pop("patch_size", None)
            model = timm.create_model(key, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if small_images:
            raise UserError(
                f"MODEL.SMALL_IMAGES True: {name} takes no patch size for small images ({error}); "
                "take one of timm's ViTs, or torchvision's ResNets and VGGs"
            ) from error
        raise UserError(
            f"MODEL.NAME {name} cannot be built at this size: {shortened(str(error), 300)}"
        ) from error
    if small_images:
        make_small(model, name, num_classes)
    return model


def _torchvision_model(name: str, num_classes: int, image_size: int, width: int) -> nn.Module:
    known = [
        *torchvision.models.list_models(module=torchvision.models),
        "resnet10",
        *CIFAR_MODELS,
    ]
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
    """32 groups (Wu and He 2018), or fewer where 32 does not divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _with_norm(model: nn.Module, name: str, norm: str) -> nn.Module:
    if norm == "BN":
        return model
    if norm not in CLASSIFIER_NORMS:
        raise UserError(f"MODEL.NORM is {norm}: it takes one of {', '.join(CLASSIFIER_NORMS)}")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        raise UserError(f"MODEL.NORM is {norm} but {name} has no batch norms: leave it at BN")
    if norm == "SyncBN":
        if not torch.cuda.is_available():
            raise UserError("MODEL.NORM SyncBN needs CUDA: on a CPU take BN or GN")
        return timm.layers.convert_sync_batchnorm(model)
    if any(type(module) is not nn.BatchNorm2d for module in norms):
        raise UserError(
            f"MODEL.NORM is GN but the norms of {name} do more than a batch norm: take BN, or a "
            "model of torchvision's"
        )
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, _group_norm(child.num_features))
    return model
