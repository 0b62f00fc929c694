"""The forms of models for images of CIFAR's size, whose stem must not make them any smaller.

The stems are those of https://github.com/weiaicunzai/pytorch-cifar100, whose recipe the TrAct paper
trains by. The rest of each model, and all names, are the library's.
"""

from typing import NamedTuple

from timm.models.efficientnet import EfficientNet
from timm.models.inception_resnet_v2 import InceptionResnetV2
from timm.models.inception_v4 import InceptionV4
from timm.models.resnet import ResNet as TimmResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.xception import Xception
from torch import nn
from torchvision.models import (
    VGG,
    DenseNet,
    GoogLeNet,
    Inception3,
    MobileNetV2,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
)

from tract_det.errors import UserError
from tract_det.modeling.resnets import init_conv

_GRID = 8  # patches along each side of a small image, as in ViTs for CIFAR


class _Form(NamedTuple):
    """The layers of a model that change, by their names.

    Attributes:
        stem: the convolution that becomes 3x3/1; it keeps its weight if it is 3x3 already.
        whole: convolutions and poolings that get stride 1, and padding to keep the size.
        skipped: poolings that become the identity.
    """

    stem: str
    whole: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


_FORMS: dict[type[nn.Module], _Form] = {
    ResNet: _Form("conv1", skipped=("maxpool",)),
    TimmResNet: _Form("conv1", skipped=("maxpool",)),
    ResNetV2: _Form("stem.conv", skipped=("stem.pool",)),
    DenseNet: _Form("features.conv0", skipped=("features.pool0",)),
    GoogLeNet: _Form("conv1.conv", skipped=("maxpool1",)),
    ShuffleNetV2: _Form("conv1.0", skipped=("maxpool",)),
    MobileNetV2: _Form("features.0.0", whole=("features.14.conv.1.0",)),
    SqueezeNet: _Form("features.0"),
    EfficientNet: _Form("conv_stem"),  # timm's MobileNets are of this class too
    Xception: _Form("conv1", whole=("conv2",)),
    Inception3: _Form(
        "Conv2d_1a_3x3.conv",
        whole=("Conv2d_2a_3x3.conv", "Conv2d_4a_3x3.conv"),
        skipped=("maxpool1", "maxpool2"),
    ),
    InceptionResnetV2: _Form(
        "conv2d_1a.conv",
        whole=("conv2d_2a.conv", "conv2d_4a.conv"),
        skipped=("maxpool_3a", "maxpool_5a"),
    ),
    InceptionV4: _Form(
        "features.0.conv",
        whole=(
            "features.1.conv",
            *(f"features.3.{layer}" for layer in ("maxpool", "conv.conv")),
            *(f"features.4.{branch}.conv" for branch in ("branch0.1", "branch1.3")),
            *(f"features.5.{layer}" for layer in ("maxpool", "conv.conv")),
        ),
    ),
}


def small_patch(image_size: int) -> int:
    """The side in pixels of one of the 8 x 8 patches of a small image."""
    return max(1, image_size // _GRID)


def make_small(model: nn.Module, name: str, num_classes: int, *, small_pool: bool = False) -> None:
    """Gives a model its form for small images, in place.

    Args:
        model: with random weights.
        name: as the user wrote it, for messages.
        num_classes: of the head.
        small_pool: keep the max-pooling after a ResNet's stem, and halve the size there.

    Raises:
        UserError: the model has no such form.
    """
    if isinstance(model, VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
        nn.init.normal_(model.classifier.weight, 0, 0.01)
        nn.init.zeros_(model.classifier.bias)
        return
    form = next((form for cls, form in _FORMS.items() if isinstance(model, cls)), None)
    if form is None or type(model.get_submodule(form.stem)) is not nn.Conv2d:
        classes = ", ".join(sorted({cls.__name__ for cls in (*_FORMS, VGG)}))
        raise UserError(
            f"MODEL.SMALL_IMAGES True: {name} has no form for small images; take one of timm's "
            f"ViTs, or a model whose class is one of {classes}"
        )
    _replace(model, form.stem, _small_stem(model.get_submodule(form.stem)))
    for layer in form.whole:
        _keep_size(model.get_submodule(layer))
    for layer in () if small_pool else form.skipped:
        _replace(model, layer, nn.Identity())


def _small_stem(conv: nn.Module) -> nn.Conv2d:
    assert isinstance(conv, nn.Conv2d)
    if conv.kernel_size != (3, 3):
        bias = conv.bias is not None
        conv = init_conv(nn.Conv2d(conv.in_channels, conv.out_channels, 3, bias=bias))
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    _keep_size(conv)
    return conv


def _keep_size(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        layer.stride, layer.padding = (1, 1), (height // 2, width // 2)
    elif isinstance(layer, nn.MaxPool2d):
        layer.stride, layer.padding = 1, int(layer.kernel_size) // 2  # type: ignore[arg-type]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, layer)
