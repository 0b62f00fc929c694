"""Augmentation for training, as torchvision.transforms.v2 pipelines of (image, target).

Images stay uint8, a quarter of the bytes to hand from the worker processes; the model scales them.
In evaluation there is no transform: the model resizes.
"""

from collections.abc import Sequence

from torchvision.transforms import v2

from tract_det.errors import UserError


def detection_train(
    *,
    min_size: Sequence[int],
    max_size: int,
    flip: float = 0.5,
    color_jitter: float = 0.0,
) -> v2.Transform:
    """Random size, mirroring and colours.

    Args:
        min_size: The shorter side becomes one of these, in pixels, drawn anew for each image;
            empty or 0: no resizing.
        max_size: The longer side becomes at most this, in pixels; the shorter one less if need be.
        flip: Probability of a horizontal mirroring.
        color_jitter: Brightness, contrast and saturation are scaled by up to this share, and the
            hue turned by up to a tenth of it.

    Returns:
        The transform. It draws from torch's generator alone.

    Raises:
        UserError: A number out of range.
    """
    sizes = [size for size in min_size if size]
    if any(size < 0 for size in sizes) or (sizes and max_size < max(sizes)):
        raise UserError(f"need 0 <= min_size <= max_size, got {list(min_size)} and {max_size}")
    if not 0 <= flip <= 1:
        raise UserError(f"flip is a probability, got {flip}")
    if not 0 <= color_jitter <= 1:
        raise UserError(f"color_jitter is a share between 0 and 1, got {color_jitter}")
    steps: list[v2.Transform] = []
    if sizes:
        steps.append(v2.RandomShortestSize(sizes, max_size=max_size, antialias=True))
    steps.append(v2.RandomHorizontalFlip(flip))
    if color_jitter:
        j = color_jitter
        steps.append(v2.ColorJitter(brightness=j, contrast=j, saturation=j, hue=j / 10))
    return v2.Compose(steps)
