"""torchvision's ResNets, also of other widths and with one block in each stage."""

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tract_det.errors import UserError

STEM_WIDTH = 64  # of the published ResNets

_BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet10": (BasicBlock, [1, 1, 1, 1]),
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


class ScaledResNet(ResNet):
    """A ResNet whose stem has `width` channels, and whose stages have 1, 2, 4 and 8 times as many.

    Module names, forward pass and initialisation are torchvision's.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        *,
        width: int = STEM_WIDTH,
        num_classes: int = 1000,
    ) -> None:
        with torch.device("meta"):  # the parent's layers have a fixed width: all are replaced
            super().__init__(block, [1, 1, 1, 1])
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._make_layer(block, width, layers[0])
        self.layer2 = self._make_layer(block, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 8 * width, layers[3], stride=2)
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)


def init_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """Draws the weight as torchvision's ResNets and VGGs do (He et al. 2015, fan-out)."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def build_resnet(name: str, num_classes: int = 1000, *, width: int = STEM_WIDTH) -> ResNet:
    """A ResNet with random weights and batch norm.

    Args:
        name: torchvision's ("resnet18", "wide_resnet50_2", "resnext50_32x4d", ...), or "resnet10",
            with one basic block in each stage.
        num_classes: of the head `fc`.
        width: channels of the stem.

    Raises:
        UserError: the width is not the published one, and this ResNet takes no other.
    """
    if width == STEM_WIDTH and name != "resnet10":
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    if name not in _BLOCKS:
        raise UserError(
            f"MODEL.WIDTH is {width}, but {name} has a fixed width: set {STEM_WIDTH}, or "
            f"MODEL.NAME to one of {', '.join(_BLOCKS)}"
        )
    return ScaledResNet(*_BLOCKS[name], width=width, num_classes=num_classes)
