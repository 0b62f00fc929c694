"""Networks for CIFAR that neither torchvision nor timm names, put together from their classes.

The shapes are those of https://github.com/weiaicunzai/pytorch-cifar100, and the ViT's those of
https://github.com/omihub777/ViT-CIFAR. Initialisation, and whatever is not said here, is the
library's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.inception_resnet_v2 import InceptionResnetV2
from timm.models.resnetv2 import PreActBasic, ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import ResNet, ShuffleNetV2
from torchvision.models.resnet import Bottleneck
from torchvision.models.shufflenetv2 import channel_shuffle

from tract_det.modeling.small_images import make_small, small_patch

_GROUPS = 3  # of ShuffleNet's 1x1 convolutions


def _resnext152(num_classes: int) -> nn.Module:
    layers = [3, 4, 36, 3]  # ResNet-152 has 8 blocks in its second stage
    return ResNet(Bottleneck, layers, num_classes, groups=32, width_per_group=4)


def _wide_resnet40_10(num_classes: int) -> nn.Module:
    """WRN-40-10 (arXiv 1605.07146): dropout between the two convolutions of a block."""
    model = ResNetV2(
        [6, 6, 6],
        (160, 320, 640),
        num_classes,
        stem_chs=16,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )
    for block in model.modules():
        if isinstance(block, PreActBasic):
            block.norm2.drop = nn.Dropout()  # before its ReLU, which makes no difference
    model.head.drop = nn.Identity()  # type: ignore[assignment]  # only the blocks have dropout
    return model


def _inception_resnet_v2(num_classes: int) -> nn.Module:
    """5, 10 and 5 blocks instead of the published 10, 20 and 10."""
    model = InceptionResnetV2(num_classes)
    model.repeat = model.repeat[:5]
    model.repeat_1 = model.repeat_1[:10]
    model.repeat_2 = model.repeat_2[:4]  # block8 is the fifth
    return model


class _ShuffleUnit(nn.Module):
    """A unit of ShuffleNet v1 (arXiv 1707.01083, figure 2), of stride 1 or 2.

    All 1x1 convolutions are grouped, as in that repository; the paper excepts the network's first.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        middle = out_channels // 4
        if stride == 2:
            out_channels -= in_channels  # the shortcut is concatenated
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, groups=_GROUPS, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
        )
        self.expand = nn.Sequential(
            nn.Conv2d(middle, out_channels, 1, groups=_GROUPS, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.expand(self.depthwise(channel_shuffle(self.reduce(x), _GROUPS)))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, padding=1), residual], 1))
        return F.relu(x + residual)


def _shufflenet_g3(num_classes: int) -> nn.Module:
    """ShuffleNet v1 in the frame of torchvision's v2, which has one more convolution at the end."""
    model = ShuffleNetV2([4, 8, 4], [24, 240, 480, 960, 960], num_classes, _ShuffleUnit)
    model.conv5 = nn.Sequential()
    return model


_CONVOLUTIONAL: dict[str, Callable[[int], nn.Module]] = {
    "resnext152_cifar": _resnext152,
    "wide_resnet40_10": _wide_resnet40_10,
    "inception_resnet_v2_cifar": _inception_resnet_v2,
    "shufflenet_g3": _shufflenet_g3,
}
CIFAR_MODELS = ("vit_cifar", *_CONVOLUTIONAL)


def build_cifar_model(
    name: str, num_classes: int, image_size: int, *, small_pool: bool = False
) -> nn.Module:
    """A network with random weights, in its form for small images.

    Args:
        name: one of `CIFAR_MODELS`.
        num_classes: of the head.
        image_size: height and width of the images in pixels, for the ViT.
        small_pool: as in `make_small`.
    """
    if name == "vit_cifar":
        return VisionTransformer(
            img_size=image_size,
            patch_size=small_patch(image_size),
            num_classes=num_classes,
            embed_dim=384,
            depth=7,
            num_heads=12,
            mlp_ratio=1.0,
        )
    model = _CONVOLUTIONAL[name](num_classes)
    make_small(model, name, num_classes, small_pool=small_pool)
    return model
