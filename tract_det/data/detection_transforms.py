"""Augmentation for training a detector: torchvision.transforms.v2 pipelines of (image, target).

Images stay uint8, so that worker processes hand over a quarter of the bytes; the model standardizes
them. In evaluation there is no transform: the model resizes.
"""

from collections.abc import Sequence

from torchvision.transforms import v2


def detection_train(
    *,
    min_size: Sequence[int],
    max_size: int,
    flip: float = 0.5,
    color_jitter: float = 0.0,
) -> v2.Transform:
    """Random size, horizontal flip and colour jitter, in this order.

    Args:
        min_size: The shorter side becomes one of these, in pixels, chosen at random for each image;
            empty or 0: no resizing.
        max_size: The longer side becomes at most this, in pixels, even if the shorter side then
            falls below `min_size`.
        flip: Probability of a horizontal flip.
        color_jitter: Brightness, contrast and saturation are scaled by a factor of 1 +- this; the
            hue changes by up to a tenth of it.

    Returns:
        The transform. All its random numbers come from torch's generator.
    """
    steps: list[v2.Transform] = []
    if sizes := [size for size in min_size if size]:
        steps.append(v2.RandomShortestSize(sizes, max_size=max_size, antialias=True))
    steps.append(v2.RandomHorizontalFlip(flip))
    if color_jitter:
        j = color_jitter
        steps.append(v2.ColorJitter(brightness=j, contrast=j, saturation=j, hue=j / 10))
    return v2.Compose(steps)
