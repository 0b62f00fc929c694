"""Models for images of any number of channels, and weights for RGB in them."""

import torch
from torch import Tensor, nn

from tract_det.modeling.forms import State, to_torchvision
from tract_det.modeling.weight_files import Weights

# The names of the stem's weight, in detectors and in classifiers of torchvision's form.
_STEMS = (
    "backbone.body.conv1.weight",
    "backbone.features.0.weight",
    "conv1.weight",
    "features.0.weight",
)


def stem_of(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """The first convolution of one of torchvision's classifiers or of a backbone, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError("the model has no convolution")


def set_channels(model: nn.Module, channels: int) -> None:
    """Makes the stem one for images of so many channels, in place, if it is not.

    The new weight is random and normal, with the standard deviation of the old one. That is the
    rule of torchvision's ResNets and VGGs, whose deviation depends on the output channels alone.

    Args:
        model: with random weights, as `stem_of` takes it.
        channels: of the images.
    """
    name, old = stem_of(model)
    if channels == old.in_channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    new.weight.data = torch.randn_like(new.weight) * old.weight.detach().std()
    new.bias = old.bias
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def widened_stem(weight: Tensor, channels: int) -> Tensor:
    """Filters for RGB, `(M, 3, kh, kw)`, as filters for other channels, `(M, channels, kh, kw)`.

    One channel has the sum over RGB, so that a grey image gives what its three equal channels gave.
    Two have half of it each. Of more, the first three are R, G and B as they are, and each further
    one has the mean over RGB: a first guess that leaves RGB's share of the output as it was.
    """
    if channels < 3:
        return (weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)
    mean = weight.mean(1, keepdim=True)
    return torch.cat([weight, mean.repeat(1, channels - 3, 1, 1)], dim=1)


def widens(weights: Weights, channels: int) -> bool:
    """Whether a stem for so many channels is made of the weights' stem for RGB.

    Args:
        weights: of a detector, or of a ResNet or VGG.
        channels: of the images.
    """
    state = weights.state if weights.is_detector else to_torchvision(weights.state)
    stems = [state[key] for key in _STEMS if key in state]
    return channels != 3 and any(stem.dim() == 4 and stem.shape[1] == 3 for stem in stems)


def fit_channels(model_state: State, state: State) -> tuple[State, str]:
    """Weights for RGB with their stem widened, for a model of another number of channels.

    Args:
        model_state: the model's state dict.
        state: the weights, under the model's names.

    Returns:
        The weights, and what was done to them in words; "" = nothing.
    """
    stems = [key for key, old in state.items() if _is_for_rgb_alone(old, model_state.get(key))]
    if not stems:
        return state, ""
    channels = model_state[stems[0]].shape[1]
    rule = "RGB kept, further channels the mean of RGB"
    if channels < 3:
        rule = "the sum of RGB" + (", a half each" if channels == 2 else "")
    names = ", ".join(f"'{key}'" for key in stems)
    widened = {key: widened_stem(state[key], channels) for key in stems}
    return {**state, **widened}, f"{names} widened from 3 to {channels} channels ({rule})"


def _is_for_rgb_alone(old: Tensor, new: Tensor | None) -> bool:
    """Whether a convolution of the file sees RGB, and that of the model other channels."""
    if new is None or old.dim() != 4 or new.dim() != 4:
        return False
    is_same = old.shape[0] == new.shape[0] and old.shape[2:] == new.shape[2:]
    return is_same and old.shape[1] == 3 != new.shape[1]
