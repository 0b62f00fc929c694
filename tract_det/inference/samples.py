"""Images to compare an exported model on."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from tract_det.inference.models import Classifier, Detector

_SIDES = ((240, 320), (301, 203), (200, 250))  # height and width where any will do


def made(count: int, size: tuple[int, int] | None, channels: int = 3) -> list[Tensor]:
    """Made images `(channels, H, W)` uint8: coloured patches under noise, always the same."""
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Tensor:
        patches = torch.rand(1, channels, 6, 6, generator=generator)
        smooth = F.interpolate(patches, (height, width), mode="nearest")[0]
        noise = torch.rand(channels, height, width, generator=generator)
        return (255 * (0.8 * smooth + 0.2 * noise)).to(torch.uint8)

    return [image(*(size or _SIDES[number % len(_SIDES)])) for number in range(count)]


def sized(model: Detector | Classifier, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """An image as the exported model takes it."""
    if isinstance(model, Classifier):
        return model.pixels(image)
    return image if size is None else tvf.resize(image, list(size), antialias=True)
