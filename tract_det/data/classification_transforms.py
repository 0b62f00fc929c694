"""Transforms of images to classify: uint8 (C, H, W) in, float32 (C, S, S) out.

These are torchvision.transforms.v2 pipelines on tensors, which resize faster than Pillow images.
`PadCrop`, `Blur` and `ToModel` replace steps of v2 that are slow: on 32 x 32 pixels v2 spends most
of its time in Python. Measurements: benchmarks/data_design_notes.md.

Automatic augmentations and colour jitter are for RGB, C = 3; all else is for any C.

All random numbers come from torch's generator. No step writes to its input.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2

from tract_det.data.choices import AUTO_AUGMENTS, CROPS
from tract_det.errors import UserError


def classification_train(
    size: int,
    *,
    crop: str = "random_resized",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    padding: int = 4,
    flip: float = 0.5,
    rotation: float = 0.0,
    auto_augment: str = "",
    magnitude: int = 9,
    num_ops: int = 2,
    color_jitter: float = 0.0,
    erasing: float = 0.0,
    interpolation: str = "bilinear",
    mean: Sequence[float],
    std: Sequence[float],
    value_range: float = 1.0,
    standardize: bool = True,
) -> v2.Transform:
    """Crop, flip, rotation, automatic augmentation, colour jitter, scaling, erasing: in this order.

    Args:
        size: S, side of the result in pixels.
        crop: `random_resized`: a part of random area and aspect ratio, resized. `pad`: a random
            part of the image padded with black (CIFAR). `simple`: the shorter side resized to S,
            then a random part of the image padded by reflection (DeiT-III). `none`: the center.
        scale: `random_resized`: smallest and largest share of the image's area.
        ratio: `random_resized`: smallest and largest width / height.
        padding: `pad` and `simple`: pixels on each side.
        flip: Probability of a horizontal flip.
        rotation: Largest angle of a rotation to either side in degrees; corners become black.
        auto_augment: `randaugment`; `trivialaugment` (the wide variant); `three_augment`: one of
            greyscale, solarize and blur, equally often (DeiT-III, arXiv 2204.07118);
            `autoaugment_cifar10`: AutoAugment's policy for CIFAR-10 (arXiv 1805.09501); "": none.
        magnitude: RandAugment: strength of its operations, 0 to 30.
        num_ops: RandAugment: operations on each image.
        color_jitter: Brightness, contrast and saturation are scaled by a factor of 1 +- this; 0
            with `three_augment` means DeiT-III's 0.3.
        erasing: Probability of filling a rectangle of 2 to 33 % of the area with the mean colour.
        interpolation: `bilinear` or `bicubic`, with antialiasing.
        mean: Mean of each channel in [0, 255].
        std: Standard deviation of each channel in the same unit; unused without `standardize`.
        value_range: Without `standardize`, pixels are scaled from [0, 255] to [0, value_range].
        standardize: Whether the result is (pixels - mean) / std.
    """
    mode = v2.InterpolationMode(interpolation)
    steps: list[nn.Module] = [_crop(crop, size, scale, ratio, padding, mode)]
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if rotation:
        steps.append(v2.RandomRotation(rotation))
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
    mean: Sequence[float],
    std: Sequence[float],
    value_range: float = 1.0,
    standardize: bool = True,
) -> v2.Transform:
    """The center of the image.

    Args:
        size: S, side of the result in pixels.
        resize: The shorter side is resized to this before the crop, at least `size`; 0: not at all.
        interpolation: This and the rest as in `classification_train`.
        mean: Of each channel in [0, 255].
        std: In the same unit.
        value_range: Used without `standardize`.
        standardize: Whether mean and std are used.
    """
    steps: list[nn.Module] = []
    if resize:
        steps.append(v2.Resize(resize, v2.InterpolationMode(interpolation), antialias=True))
    return v2.Compose([*steps, CenterCrop(size), ToModel(mean, std, value_range, standardize)])


class PadCrop(nn.Module):
    """A random part of S x S pixels of the image padded with black.

    The padded image itself is never built.
    """

    def __init__(self, size: int, padding: int) -> None:
        super().__init__()
        self.size, self.padding = size, padding

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        vertical, horizontal = torch.rand(2).tolist()
        top, bottom, above = self._range(image.shape[-2], vertical)
        left, right, before = self._range(image.shape[-1], horizontal)
        part = image[:, top:bottom, left:right]
        if part.shape[-1] == part.shape[-2] == self.size:
            return part
        out = image.new_zeros((image.shape[0], self.size, self.size))
        out[:, above : above + bottom - top, before : before + right - left] = part
        return out

    def _range(self, length: int, position: float) -> tuple[int, int, int]:
        """The crop along one side of the image: start and end in the image, padding before start.

        `position` in [0, 1) goes from the first possible crop to the last.
        """
        slack = length + 2 * self.padding - self.size
        if slack < 0:
            raise UserError(
                f"an image side of {length} pixels, padded by {self.padding} at each end, is "
                f"smaller than INPUT.SIZE {self.size}: set INPUT.CROP random_resized"
            )
        start = int(position * (slack + 1)) - self.padding
        return max(start, 0), min(start + self.size, length), max(-start, 0)


class CenterCrop(nn.Module):
    """The middle S x S pixels. A smaller image is an error; v2 would pad it with black silently."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        height, width = image.shape[-2:]
        if min(height, width) < self.size:
            raise UserError(
                f"an image of {width} x {height} pixels is smaller than INPUT.SIZE {self.size}: "
                "set INPUT.RESIZE_TEST"
            )
        return v2.functional.center_crop(image, [self.size, self.size])


class Blur(nn.Module):
    """Gaussian blur with a random standard deviation of 0.1 to 2 pixels, as in DeiT-III."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        blurred = np.array(pixels.filter(ImageFilter.GaussianBlur(sigma)))
        return torch.from_numpy(blurred).permute(2, 0, 1)


class ToModel(nn.Module):
    """Uint8 pixels to float32: (pixels - mean) / std, or scaled to [0, value_range].

    Attributes:
        mean_colour: The mean of each channel in the units of the result.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], value_range: float, standardize: bool
    ) -> None:
        super().__init__()
        unit = value_range / 255
        self.mean_colour = [0.0] * len(mean) if standardize else [m * unit for m in mean]
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None] if standardize else None
        scale = std if standardize else [1 / unit] * len(mean)
        self.std = torch.tensor(scale)[:, None, None].float()

    def forward(self, image: torch.Tensor) -> torch.Tensor:  # noqa: D102
        out = image.to(torch.float32)
        if self.mean is not None:
            out.sub_(self.mean)
        return out.div_(self.std)


def _crop(
    name: str,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    padding: int,
    mode: v2.InterpolationMode,
) -> nn.Module:
    if name == "random_resized":
        return v2.RandomResizedCrop(size, tuple(scale), tuple(ratio), mode, antialias=True)
    if name == "pad":
        return PadCrop(size, padding)
    if name == "simple":
        resize = v2.Resize(size, mode, antialias=True)
        return v2.Compose([resize, v2.RandomCrop(size, padding=padding, padding_mode="reflect")])
    if name == "none":
        return CenterCrop(size)
    raise ValueError(f"crop is {name!r}: it takes one of {CROPS}")


def _auto_augment(name: str, magnitude: int, num_ops: int) -> list[nn.Module]:
    bilinear = v2.InterpolationMode.BILINEAR  # v2 cannot rotate or shear tensors bicubically
    if name == "":
        return []
    if name == "randaugment":
        return [v2.RandAugment(num_ops, magnitude, interpolation=bilinear)]
    if name == "trivialaugment":
        return [v2.TrivialAugmentWide(interpolation=bilinear)]
    if name == "autoaugment_cifar10":
        # Grey beyond the edges, as in https://github.com/omihub777/ViT-CIFAR.
        return [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, bilinear, fill=128)]
    if name == "three_augment":
        solarize = v2.RandomSolarize(threshold=128, p=1.0)
        return [v2.RandomChoice([v2.Grayscale(num_output_channels=3), solarize, Blur()])]
    raise ValueError(f"auto_augment is {name!r}: it takes one of {AUTO_AUGMENTS}")


class Mix:
    """Mixup, CutMix and label smoothing of a batch: labels become soft targets.

    Each image is mixed with the one before it in the batch, and all of them in the same proportion,
    as in torchvision's v2. Random numbers come from torch's generator.

    Args:
        num_classes: C.
        mixup_alpha: Mixup draws its proportion from Beta(alpha, alpha); 0: no mixup.
        cutmix_alpha: CutMix draws the pasted share of the area likewise; 0: no CutMix.
        prob: Probability that a batch is mixed at all.
        switch_prob: Probability of CutMix where both are on.
        smoothing: Share of each target that is spread over all classes, mixed or not.
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
        self.num_classes, self.smoothing, self.prob = num_classes, smoothing, prob
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        both = bool(mixup_alpha and cutmix_alpha)
        self.cutmix_prob = switch_prob if both else float(bool(cutmix_alpha))

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes (B, C, H, W) float images with (B,) int64 labels.

        Returns:
            Images of the same shape and (B, C) float32 targets.
        """
        targets = nn.functional.one_hot(labels, self.num_classes).float()
        mixes = bool(self.mixup_alpha or self.cutmix_alpha)
        if mixes and float(torch.rand(())) < self.prob:
            if float(torch.rand(())) < self.cutmix_prob:
                images, targets = v2.CutMix(alpha=self.cutmix_alpha)(images, targets)
            else:
                images, targets = v2.MixUp(alpha=self.mixup_alpha)(images, targets)
        return images, targets * (1 - self.smoothing) + self.smoothing / self.num_classes
