"""TrAct on the stem of a whole detectron2 model, which knows its pixels and their padding."""

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from tract_det import tract
from tract_det.pixels import input_variance
from tract_det.tract import TrActError, find_stem, set_image_sizes

ModelT = TypeVar("ModelT", bound=nn.Module)

_LOG = logging.getLogger("detectron2.tract_det")  # below the one that detectron2's programs set up


def apply_tract(
    model: ModelT,
    lambda_: float = 0.1,
    *,
    stem: str | Sequence[str] | None = None,
    sync: bool = True,
    relative: bool = False,
    gram_patches: int = 0,
    pixel_std: Sequence[float] | None = None,
    pixel_format: str | None = None,
) -> ModelT:
    """`tract_det.apply_tract` for a model of detectron2's, in place; `L(apply_tract)(model=...)`.

    Two things come on top. `lambda_` stays in units of standardised pixels, whatever the model
    divides its images by (`pixel_std` is 1 in detectron2's defaults, and pixels then 3,300 times
    the variance). And the zeros that pad the images of a batch to one size do not count as patches.

    Args:
        model: a meta-architecture, which takes detectron2's list of dicts. Of a backbone alone the
            padding is not known, and `pixel_std` must be given.
        lambda_: damping, in units of standardised pixels, or of `trace(G) / K` where `relative`.
        stem: the layer's name where `find_stem` is not right; several where several see the pixels.
        sync: learn from all ranks' batch; see `tract_det.apply_tract`.
        relative: see there.
        gram_patches: see there.
        pixel_std: what the images, in [0, 255], are divided by; None = the model's own.
        pixel_format: "RGB" or "BGR", the order of `pixel_std`; None = the model's `input_format`.

    Returns:
        The same model.

    Raises:
        TrActError: as there; or the stem does not take the images' channels; or nobody knows
            `pixel_std`.
    """
    variance = 1.0
    if not relative:
        std = _pixel_std(model, pixel_std)
        variance = _variance(std, pixel_format or getattr(model, "input_format", None))
    stem = find_stem(model) if stem is None else stem
    for name in [stem] if isinstance(stem, str) else stem:
        _check_channels(model, name)
    tract.apply_tract(
        model,
        lambda_ * variance,
        stem=stem,
        sync=sync,
        relative=relative,
        gram_patches=gram_patches,
    )
    _hook(model)
    unit = "of the patches' mean square" if relative else "of standardised pixels"
    own = "" if relative else f", {lambda_ * variance:g} of this model's"
    _LOG.info("TrAct on %s, lambda %g %s%s", stem, lambda_, unit, own)
    return model


def _pixel_std(model: nn.Module, given: Sequence[float] | None) -> list[float]:
    if given is not None:
        if not all(value > 0 for value in given):
            raise TrActError(f"pixel_std (MODEL.PIXEL_STD) is {list(given)}: it must be positive")
        return [float(value) for value in given]
    own = getattr(model, "pixel_std", None)
    if not isinstance(own, Tensor) or own.is_meta:
        raise TrActError(
            f"{type(model).__name__} has no pixel_std to put lambda_ into its units: give "
            "pixel_std=[...] (MODEL.PIXEL_STD), or take relative=True"
        )
    return own.flatten().tolist()


def _variance(std: Sequence[float], pixel_format: str | None) -> float:
    """Of what the model sees, in units of standardised pixels."""
    if len(std) != 3:  # no photographs of three colours: each channel as if it were their mean
        return sum(input_variance([value] * 3) for value in std) / len(std)
    return input_variance(std[::-1] if pixel_format == "BGR" else std)


def _check_channels(model: nn.Module, stem: str) -> None:
    """Refuses a layer that cannot see the pixels."""
    mean, layer = getattr(model, "pixel_mean", None), dict(model.named_modules()).get(stem)
    if isinstance(mean, Tensor) and isinstance(layer, nn.Conv2d):
        channels = mean.numel()
        if layer.in_channels != channels:
            raise TrActError(
                f"'{stem}' takes {layer.in_channels} channels and the images have {channels}, so "
                "it is not the first layer: name that one with stem='...' (MODEL.TRACT.STEM)"
            )


def remove_tract(model: ModelT) -> ModelT:
    """`tract_det.remove_tract`, and no hook of `apply_tract` is left; before `torch.jit.script`."""
    tract.remove_tract(model)
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _tell_sizes]:
            del hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def _hook(model: nn.Module) -> None:
    """Tells the stem the images' sizes in every batch that the model is called with."""
    if _tell_sizes not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_tell_sizes, with_kwargs=True)


def _tell_sizes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # They hold until the next batch: a checkpointed stem runs again in the backward pass.
    inputs = next(iter([*args, *kwargs.values()]), None) or ()
    images = [one.get("image") for one in inputs if isinstance(one, dict)]
    sizes = [(i.shape[-2], i.shape[-1]) for i in images if isinstance(i, Tensor)]
    known = model.training and len(sizes) == len(inputs) > 0
    set_image_sizes(model, sizes if known else None, edges=True)
