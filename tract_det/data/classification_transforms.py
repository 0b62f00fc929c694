"""Transforms of images to classify: uint8 (3, H, W) in, float32 (3, S, S) out.

torchvision.transforms.v2 on tensors, with three steps of our own where v2 is slow: on 32 x 32
pixels its cost is Python's, and PadCrop and ToModel take 10 and 6 us where v2 takes 32 and 30 (one
core, torchvision 0.29); v2's blur of 224 x 224 takes 3.6 ms and Pillow's 1.9. On tensors resizing
costs a third of Pillow's (0.22 ms against 0.75 for a 350 x 300 crop), with the same pixels to
within one level.

Everything draws from torch's generator alone. No step writes to the image that it is given.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2

from tract_det.errors import UserError

CROPS = ("random_resized", "pad", "simple", "none")
AUTO_AUGMENTS = ("", "randaugment", "trivialaugment", "three_augment")
# Pixels in units of [0, 255], RGB: ImageNet's.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def classification_train(
    size: int,
    *,
    crop: str = "random_resized",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    padding: int = 4,
    flip: float = 0.5,
    auto_augment: str = "",
    magnitude: int = 9,
    num_ops: int = 2,
    color_jitter: float = 0.0,
    erasing: float = 0.0,
    interpolation: str = "bilinear",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    value_range: float = 1.0,
    standardize: bool = True,
) -> v2.Transform:
    """Crop, mirroring, automatic augmentation, colours, scaling, erasing, in this order.

    Args:
        size: S, of the result.
        crop: `random_resized`: a part of random area and shape, resized. `pad`: a random part of
            the image with `padding` black pixels on each side (CIFAR). `simple`: the shorter side
            resized to S, then as `pad`, the margin a reflection (DeiT-III). `none`: the center.
        scale: Least and largest share of the image's area, of `random_resized`.
        ratio: Least and largest width / height, of `random_resized`.
        padding: Of `pad` and `simple`, in pixels.
        flip: Probability of a horizontal mirroring.
        auto_augment: `randaugment`; `trivialaugment` (wide); `three_augment`: grey, solarised or
            blurred, one of them with equal probability (DeiT-III, arXiv 2204.07118).
        magnitude: Of RandAugment's operations, 0 to 30.
        num_ops: RandAugment's operations on an image.
        color_jitter: Brightness, contrast and saturation are scaled by up to this share; 0 with
            `three_augment` means DeiT-III's 0.3.
        erasing: Probability of erasing a rectangle of 2 to 33 % of the area, to the mean colour.
        interpolation: `bilinear` or `bicubic`, with antialiasing.
        mean: Of each channel, RGB in [0, 255].
        std: Of each channel, in the same unit.
        value_range: What 255 becomes without `standardize`: 1.0 or 255.0.
        standardize: The result is (pixels - mean) / std; otherwise pixels in [0, value_range].

    Raises:
        UserError: A number out of range or an unknown name.
    """
    _check(size, {"flip": flip, "erasing": erasing, "color_jitter": color_jitter})
    steps: list[nn.Module] = [_crop(crop, size, scale, ratio, padding, _mode(interpolation))]
    if flip:
        steps.append(Flip(flip))
    steps += _auto_augment(auto_augment, magnitude, num_ops)
    if jitter := color_jitter or (0.3 if auto_augment == "three_augment" else 0.0):
        steps.append(v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter))
    to_model = ToModel(mean, std, value_range, standardize)
    steps.append(to_model)
    if erasing:
        steps.append(v2.RandomErasing(erasing, value=to_model.mean_colour))
    return v2.Compose(steps)


def classification_test(
    size: int,
    *,
    resize: int = 0,
    interpolation: str = "bilinear",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    value_range: float = 1.0,
    standardize: bool = True,
) -> v2.Transform:
    """The center of the image.

    Args:
        size: S, of the result.
        resize: The shorter side before the crop, at least `size`; 0: as it is.
        interpolation: As in `classification_train`, like the rest.
        mean: RGB in [0, 255].
        std: In the same unit.
        value_range: Without `standardize`.
        standardize: Whether mean and std are used.

    Raises:
        UserError: A number out of range.
    """
    _check(size, {})
    if resize and resize < size:
        raise UserError(
            f"INPUT.RESIZE_TEST {resize} is less than INPUT.SIZE {size}: the center crop does not "
            "fit"
        )
    steps: list[nn.Module] = []
    if resize:
        steps.append(v2.Resize(resize, _mode(interpolation), antialias=True))
    return v2.Compose([*steps, CenterCrop(size), ToModel(mean, std, value_range, standardize)])


class PadCrop(nn.Module):
    """A random part of S x S pixels of the image with a black margin, at once."""

    def __init__(self, size: int, padding: int) -> None:
        super().__init__()
        self.size, self.padding = size, padding

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        down, along = torch.rand(2).tolist()
        top, bottom, above = self._range(image.shape[-2], down)
        left, right, before = self._range(image.shape[-1], along)
        part = image[:, top:bottom, left:right]
        if part.shape[-1] == part.shape[-2] == self.size:
            return part
        out = image.new_zeros((image.shape[0], self.size, self.size))
        out[:, above : above + bottom - top, before : before + right - left] = part
        return out

    def _range(self, length: int, where: float) -> tuple[int, int, int]:
        """First and last + 1 pixel of the image along one side, and black pixels before them.

        `where` is in [0, 1).
        """
        room = length + 2 * self.padding - self.size
        if room < 0:
            raise UserError(
                f"a side of {length} pixels with {self.padding} on each end is less than "
                f"INPUT.SIZE {self.size}: set INPUT.CROP random_resized"
            )
        start = int(where * (room + 1)) - self.padding
        return max(start, 0), min(start + self.size, length), max(-start, 0)


class Flip(nn.Module):
    """Mirrors left and right with this probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return image.flip(-1) if torch.rand(()).item() < self.probability else image


class CenterCrop(nn.Module):
    """The middle S x S pixels; v2's pads a smaller image with black, silently."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        height, width = image.shape[-2:]
        if min(height, width) < self.size:
            raise UserError(
                f"an image of {width} x {height} pixels is less than INPUT.SIZE {self.size}: set "
                "INPUT.RESIZE_TEST"
            )
        return v2.functional.center_crop(image, [self.size, self.size])


class Blur(nn.Module):
    """Gaussian blur of a standard deviation drawn from [0.1, 2] pixels, as in DeiT-III."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        blurred = np.array(pixels.filter(ImageFilter.GaussianBlur(sigma)))
        return torch.from_numpy(blurred).permute(2, 0, 1)


class ToModel(nn.Module):
    """Uint8 to float32: (pixels - mean) / std, or pixels in [0, value_range].

    `mean_colour` is what the mean becomes.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], value_range: float, standardize: bool
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or value_range <= 0:
            raise UserError(
                "mean and std take three numbers (RGB), std and value_range positive ones, not "
                f"{list(mean)}, {list(std)}, {value_range}"
            )
        unit = value_range / 255
        self.mean_colour = [0.0] * 3 if standardize else [m * unit for m in mean]
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None] if standardize else None
        self.std = torch.tensor(std if standardize else [1 / unit] * 3)[:, None, None].float()

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        out = image.to(torch.float32)
        if self.mean is not None:
            out.sub_(self.mean)
        return out.div_(self.std)


def _check(size: int, shares: dict[str, float]) -> None:
    if size < 1:
        raise UserError(f"INPUT.SIZE is {size}: it must be positive")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} takes 0 to 1, not {value}")


def _mode(interpolation: str) -> v2.InterpolationMode:
    if interpolation not in ("bilinear", "bicubic"):
        raise UserError(f"interpolation is bilinear or bicubic, not {interpolation!r}")
    return v2.InterpolationMode(interpolation)


def _crop(
    crop: str,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    padding: int,
    mode: v2.InterpolationMode,
) -> nn.Module:
    if crop == "random_resized":
        if not (0 < scale[0] <= scale[1] and 0 < ratio[0] <= ratio[1]):
            raise UserError(f"scale and ratio ascend from above 0, not {scale} and {ratio}")
        return v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), mode, antialias=True)
    if crop == "pad":
        return PadCrop(size, padding)
    if crop == "simple":
        return v2.Compose(
            [
                v2.Resize(size, mode, antialias=True),
                v2.RandomCrop(size, padding=padding, padding_mode="reflect"),
            ]
        )
    if crop == "none":
        return CenterCrop(size)
    raise UserError(f"crop is one of {', '.join(CROPS)}, not {crop!r}")


def _auto_augment(name: str, magnitude: int, num_ops: int) -> list[nn.Module]:
    bilinear = v2.InterpolationMode.BILINEAR  # v2 rotates and shears tensors so, or by the nearest
    if name == "":
        return []
    if name == "randaugment":
        if not (0 <= magnitude <= 30 and num_ops >= 1):
            raise UserError(
                f"RandAugment takes a magnitude of 0 to 30 and num_ops of 1 or more, not "
                f"{magnitude} and {num_ops}"
            )
        return [v2.RandAugment(num_ops, magnitude, interpolation=bilinear)]
    if name == "trivialaugment":
        return [v2.TrivialAugmentWide(interpolation=bilinear)]
    if name == "three_augment":
        solarize = v2.RandomSolarize(threshold=128, p=1.0)
        return [v2.RandomChoice([v2.Grayscale(num_output_channels=3), solarize, Blur()])]
    raise UserError(f"auto_augment is one of {', '.join(AUTO_AUGMENTS[1:])} or '', not {name!r}")


class Mix:
    """Mixup, CutMix and label smoothing of a batch: labels become soft targets.

    An image is mixed with the one before it in the batch, all of them in one proportion, as in
    torchvision's v2. Draws from torch's generator.

    Args:
        num_classes: C.
        mixup_alpha: Of the Beta distribution that mixup's proportion is drawn from; 0: no mixup.
        cutmix_alpha: The same of CutMix's area; 0: no CutMix.
        prob: Of mixing a batch at all.
        switch_prob: Of CutMix, where both are on.
        smoothing: Share of a target that is spread over all classes, also where nothing is mixed.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
    ) -> None:
        if mixup_alpha < 0 or cutmix_alpha < 0:
            raise UserError(f"alphas are not negative, got {mixup_alpha} and {cutmix_alpha}")
        for name, value in (("prob", prob), ("switch_prob", switch_prob), ("smoothing", smoothing)):
            if not 0 <= value <= 1:
                raise UserError(f"MIX: {name} takes 0 to 1, not {value}")
        self.num_classes, self.smoothing, self.prob = num_classes, smoothing, prob
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        both = bool(mixup_alpha and cutmix_alpha)
        self.cutmix_prob = switch_prob if both else float(bool(cutmix_alpha))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) float and (B,) int64 to images of the same shape and (B, C) float32."""
        targets = nn.functional.one_hot(labels, self.num_classes).float()
        mixes = bool(self.mixup_alpha or self.cutmix_alpha)
        if mixes and float(torch.rand(())) < self.prob:
            if float(torch.rand(())) < self.cutmix_prob:
                images, targets = v2.CutMix(alpha=self.cutmix_alpha)(images, targets)
            else:
                images, targets = v2.MixUp(alpha=self.mixup_alpha)(images, targets)
        return images, targets * (1 - self.smoothing) + self.smoothing / self.num_classes
