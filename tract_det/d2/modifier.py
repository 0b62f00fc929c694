"""Puts TrAct on the stem of a whole detectron2 model, whose pixels and padding are known."""

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tract_det import tract
from tract_det.modeling.choices import LAMBDA_UNITS
from tract_det.pixels import input_variance, lambda_in_unit, lambda_in_words
from tract_det.tract import TrActError, TrActLayer, find_stem, set_image_sizes

ModelT = TypeVar("ModelT", bound=nn.Module)

_LOG = logging.getLogger("detectron2.tract_det")  # below the logger that detectron2 sets up


def apply_tract(
    model: ModelT,
    lambda_: float = 0.1,
    *,
    stem: str | Sequence[str] | None = None,
    sync: bool = True,
    unit: str = "standardised",
    power: float = 1.0,
    gram_patches: int = 0,
    pixel_std: Sequence[float] | None = None,
    pixel_format: str | None = None,
) -> ModelT:
    """`tract_det.apply_tract` for a detectron2 model, in place.

    In a LazyConfig it is `L(apply_tract)(model=...)`. It adds two things to
    `tract_det.apply_tract`. `lambda_` stays in units of standardised pixels, whatever the model
    divides its images by: with detectron2's default `pixel_std` of 1, the variance of the pixels,
    and so the effective lambda, is about 3,300 times larger. And the zeros that pad the images of a
    batch to a common size do not count as patches.

    Args:
        model: a meta-architecture, which takes detectron2's list of dicts. With a backbone alone,
            the padding is unknown and `pixel_std` must be set.
        lambda_: damping, in this unit.
        stem: the layer's name, if `find_stem` does not find it; several names if several layers
            see the pixels.
        sync: learn from the batch over all ranks; see `tract_det.apply_tract`.
        unit: "standardised", of pixels standardised by ImageNet's statistics; "input", of the
            model's own pixels; "trace", of the mean square of what the stem sees, `trace(G) / K`.
        power: see `tract_det.apply_tract`.
        gram_patches: see `tract_det.apply_tract`.
        pixel_std: the divisor of the images, which are in [0, 255]; None = the model's own.
        pixel_format: "RGB" or "BGR", the order of `pixel_std`; None = the model's `input_format`.

    Returns:
        The same model.

    Raises:
        TrActError: as `tract_det.apply_tract`; or there is no such unit; or the stem does not take
            the images' channels; or `pixel_std` is unknown.
    """
    if unit not in LAMBDA_UNITS:
        raise TrActError(
            f"unit (MODEL.TRACT.UNIT) is '{unit}': it takes one of {', '.join(LAMBDA_UNITS)}"
        )
    variance = 1.0
    if unit == "standardised":
        order = pixel_format or getattr(model, "input_format", None)
        variance = _variance(model, pixel_std, order)
    stem = find_stem(model) if stem is None else stem
    for name in [stem] if isinstance(stem, str) else stem:
        _check_channels(model, name)
    tract.apply_tract(
        model,
        lambda_in_unit(lambda_, unit, variance),
        stem=stem,
        sync=sync,
        relative=unit == "trace",
        power=power,
        gram_patches=gram_patches,
    )
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    _LOG.info("TrAct on %s, %s", stem, lambda_in_words(lambda_, unit, variance))
    return model


def _variance(
    model: nn.Module, pixel_std: Sequence[float] | None, pixel_format: str | None
) -> float:
    """The variance of the model's input, in units of standardised pixels."""
    if pixel_std is None:
        buffer = getattr(model, "pixel_std", None)
        if not isinstance(buffer, Tensor) or buffer.is_meta:
            raise TrActError(
                f"{type(model).__name__} has no pixel_std, which lambda_ is scaled by: set "
                "pixel_std=[...] (MODEL.PIXEL_STD), or unit='trace'"
            )
        pixel_std = buffer.flatten().tolist()
    std = [float(value) for value in pixel_std]
    if not all(value > 0 for value in std):
        raise TrActError(f"pixel_std (MODEL.PIXEL_STD) is {std}: it must be positive")
    if len(std) != 3:  # not RGB: each channel is compared with the mean over R, G and B
        return sum(input_variance([value] * 3) for value in std) / len(std)
    return input_variance(std[::-1] if pixel_format == "BGR" else std)


def _check_channels(model: nn.Module, stem: str) -> None:
    """Refuses a layer whose input cannot be the pixels."""
    mean, layer = getattr(model, "pixel_mean", None), dict(model.named_modules()).get(stem)
    if not (isinstance(mean, Tensor) and isinstance(layer, nn.Conv2d)):
        return
    if layer.in_channels != mean.numel():
        raise TrActError(
            f"'{stem}' takes {layer.in_channels} channels and the images have {mean.numel()}, so "
            "it is not the first layer: name the first layer by stem='...' (MODEL.TRACT.STEM)"
        )


def remove_tract(model: ModelT) -> ModelT:
    """`tract_det.remove_tract`, which also removes the hooks of `apply_tract`, in place.

    Call it before `torch.jit.script`. Returns the same model.
    """
    tract.remove_tract(model)
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _before_forward]:
            del hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a training step that would be a plain one; tells the stem the sizes of the images."""
    layers = [layer for layer in model.modules() if isinstance(layer, TrActLayer)]
    is_tract = any(layer.training and layer.weight.requires_grad for layer in layers)
    if model.training and torch.is_grad_enabled() and not is_tract:
        raise TrActError(
            f"no layer of this {type(model).__name__} learns by TrAct any more: since apply_tract "
            "(MODEL.TRACT.ENABLED) its stem was replaced, frozen, or set to eval(); undo that, or "
            "call tract_det.d2.remove_tract(model)"
        )
    # The sizes stay set until the next batch: a checkpointed stem runs again in the backward pass.
    inputs = next(iter([*args, *kwargs.values()]), None)
    records = inputs if isinstance(inputs, list | tuple) else []
    images = [record.get("image") for record in records if isinstance(record, dict)]
    sizes = [(i.shape[-2], i.shape[-1]) for i in images if isinstance(i, Tensor)]
    known = model.training and len(sizes) == len(records) > 0
    set_image_sizes(model, sizes if known else None, edges=True)
