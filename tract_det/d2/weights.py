"""Weights of detectron2, of torchvision and of this project, into a detectron2 model."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from tract_det.errors import UserError
from tract_det.modeling.detector_forms import CONSTANTS
from tract_det.modeling.detectron2_files import CAFFE2, Meta, is_detectron2, read_detectron2
from tract_det.modeling.forms import flip_stem, is_resnet, is_vgg, to_form
from tract_det.modeling.loading import LoadReport, load_matching
from tract_det.modeling.weight_files import Weights, read_weights
from tract_det.pixels import pixel_statistics, rounded, same_statistics
from tract_det.tract import find_stem


def meta_of(model: nn.Module) -> Meta:
    """What a detectron2 model takes: what is checked of weights, and noted in those it saves."""
    step = -1 if model.input_format == "BGR" else 1
    statistics = {
        name: model.get_buffer(name).flatten().tolist()[::step]  # of RGB in [0, 255]
        for name in ("pixel_mean", "pixel_std")
    }
    return statistics | {"format": model.input_format, "stride_in_1x1": _strides_in_1x1(model)}


def _strides_in_1x1(model: nn.Module) -> bool | None:
    """Whether bottlenecks stride in the first of their convolutions; None = there are none."""
    for block in model.modules():
        convs = [getattr(block, f"conv{i}", None) for i in (1, 2, 3)]
        strides: list[Any] = [getattr(conv, "stride", None) for conv in convs]
        if None not in strides and strides[0] != strides[1]:
            return bool(strides[0] > strides[1])
    return None


def read(source: str) -> Weights:
    """Reads what `modeling.weight_files.read_weights` does, and detectron2's addresses.

    A `.pkl` keeps detectron2's names and order of channels; what it says of itself, or is known of
    its author, is in `meta`: `pixel_mean` and `pixel_std` (of RGB), `format`, `stride_in_1x1`,
    `author`.

    Raises:
        UserError: it cannot be fetched or read, or would run code.
    """
    where = source
    if "://" in source:
        try:
            where = PathManager.get_local_path(source)
        except Exception as error:  # of the network, of many classes
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"MODEL.WEIGHTS {source} cannot be fetched ({reason}): fetch it elsewhere and give "
                "the file"
            ) from error
    path = Path(where)
    if not (path.is_file() and is_detectron2(path)):
        return read_weights(where)
    file = read_detectron2(path, f"MODEL.WEIGHTS {source}")
    return Weights(source, file.state, file.meta)


def load_into(
    model: nn.Module,
    weights: Weights,
    class_names: Sequence[str],
    *,
    pixel_mean: Sequence[float] = (),
    pixel_std: Sequence[float] = (),
    strict: bool = False,
) -> LoadReport:
    """Copies weights into a detectron2 model, in place, by detectron2's own matching of names.

    Args:
        model: as `build.build_detector` makes it.
        weights: as `read` reads them: a classifier's or a detector's.
        class_names: the detector's classes. A detector's weights of other classes keep their
            predictors to themselves.
        pixel_mean: of RGB, the user's word where the file does not say; checked wherever it is
            given.
        pixel_std: likewise.
        strict: every tensor of the model must be in the file (for evaluation).

    Raises:
        UserError: nothing fits, or the weights are for other pixels, strides or (strict) classes.
    """
    model_state, takes = model.state_dict(), meta_of(model)
    if strict:
        _check_whole(model_state, weights, class_names)
        _check_input(takes, weights, pixel_mean, pixel_std)
        return load_matching(model, model_state, weights.state)
    state = weights.state
    is_torchvision = is_resnet(state) or is_vgg(state)
    if is_torchvision:
        state = flip_stem(state) if model.input_format == "BGR" else state
        state = to_form(state, "detectron2", f"MODEL.WEIGHTS {weights.source}")
    _check_input(takes, weights, pixel_mean, pixel_std, is_torchvision=is_torchvision)
    if _knows_other_classes(weights, class_names):
        state = {k: v for k, v in state.items() if ".box_predictor" not in k and "cls_" not in k}
    state = {k: v for k, v in state.items() if not CONSTANTS.fullmatch(k) and v.isfinite().all()}
    logger = logging.getLogger(align_and_update_state_dicts.__module__)
    logger.disabled = True  # what is not loaded is in the report
    try:
        is_caffe2 = weights.meta.get("author") == CAFFE2
        matched = align_and_update_state_dicts(model_state, state, c2_conversion=is_caffe2)
    finally:
        logger.disabled = False
    misshapen = _check_fit(model, model_state, matched, weights)
    fitting = {key: value for key, value in matched.items() if key not in misshapen}
    report = load_matching(model, model_state, fitting)
    return replace(report, left=[*report.left, *misshapen])


def _check_whole(
    model_state: Mapping[str, Tensor], weights: Weights, class_names: Sequence[str]
) -> None:
    absent = [key for key in model_state if key not in weights.state]
    other = [
        k for k in model_state if k not in absent and model_state[k].shape != weights.state[k].shape
    ]
    if absent or other:
        what = f"lacks '{absent[0]}'" if absent else f"has another shape of '{other[0]}'"
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} is not this model's, it {what}: evaluate with the "
            "MODEL.DETECTRON2 and the classes that it was trained with"
        )
    if _knows_other_classes(weights, class_names):
        theirs = ", ".join(weights.meta["class_names"])
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} detects {theirs}; the data set's "
            f"classes are {', '.join(class_names)}: set DATASETS.CLASSES or other weights"
        )


def check_file(
    source: str, form: str, mean: Sequence[float], std: Sequence[float], in_1x1: bool
) -> None:
    """Refuses a file that says it is for other images or strides; detectron2 does not ask it.

    A file that is not here, or that only detectron2 can read, is left to it.

    Args:
        source: the file.
        form: "RGB" or "BGR", the order of the model's channels.
        mean: the model's pixel statistics, in this order.
        std: likewise.
        in_1x1: whether the model's bottlenecks, if it has any, stride in their 1x1 convolution.

    Raises:
        UserError: the file says something else; says which keys to set.
    """
    if len(mean) != 3 or not Path(source).is_file():
        return
    try:
        weights = read(source)
    except UserError:
        return
    step = -1 if form == "BGR" else 1
    has_bottlenecks = any(re.search(r"conv3\.weight|branch2c_w", key) for key in weights.state)
    takes: Meta = {"format": form, "pixel_mean": mean[::step], "pixel_std": std[::step]}
    takes["stride_in_1x1"] = in_1x1 if has_bottlenecks else None
    _check_input(takes, weights, where="")


_OPTS = " in MODEL.DETECTRON2.OPTS"


def _check_input(
    takes: Meta,
    weights: Weights,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    is_torchvision: bool = False,
    where: str = _OPTS,
) -> None:
    """Refuses weights for other pixels or strides than the model's, as far as these are known.

    Files with detectron2's names that do not say are what the configuration is written for.
    """
    form, own_form = weights.meta.get("format", takes["format"]), takes["format"]
    if form != own_form:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} takes {form} and the model {own_form}: set "
            f"INPUT.FORMAT {form} and MODEL.PIXEL_MEAN and PIXEL_STD in that order (LazyConfig: "
            f"input_format, pixel_mean, pixel_std){where}"
        )
    if mean or "pixel_mean" in weights.meta or is_torchvision:
        theirs = pixel_statistics(weights.meta, mean, std, source=weights.source)
        check_pixels(takes, *theirs, f"MODEL.WEIGHTS {weights.source} was trained with", where)
    in_1x1 = weights.meta.get("stride_in_1x1", False if is_torchvision else None)
    if None not in (in_1x1, takes["stride_in_1x1"]) and in_1x1 != takes["stride_in_1x1"]:
        raise UserError(
            f"MODEL.WEIGHTS {weights.source} strides in the {'1x1' if in_1x1 else '3x3'} "
            f"convolutions of its bottlenecks: set MODEL.RESNETS.STRIDE_IN_1X1 {in_1x1}{where} "
            f"(LazyConfig: backbone.bottom_up.stages.stride_in_1x1={str(in_1x1).lower()})"
        )


def check_pixels(
    takes: Meta, mean: Sequence[float], std: Sequence[float], whose: str, where: str = _OPTS
) -> None:
    """Refuses other pixel statistics, of RGB, than the model's; `whose` begins the message."""
    if not same_statistics([*takes["pixel_mean"], *takes["pixel_std"]], [*mean, *std]):
        step = -1 if takes["format"] == "BGR" else 1
        wanted = [rounded(values[::step]) for values in (mean, std)]
        raise UserError(
            f"{whose} other pixel statistics than the model's: set MODEL.PIXEL_MEAN {wanted[0]} "
            f"and MODEL.PIXEL_STD {wanted[1]}{where} (LazyConfig: pixel_mean=[...], "
            f"pixel_std=[...]; {takes['format']} in [0, 255])"
        )


def _knows_other_classes(weights: Weights, class_names: Sequence[str]) -> bool:
    theirs = weights.meta.get("class_names")
    return theirs is not None and list(theirs) != list(class_names)


def _check_fit(
    model: nn.Module,
    model_state: Mapping[str, Tensor],
    matched: Mapping[str, Tensor],
    weights: Weights,
) -> list[str]:
    """The predictors of another number of classes; refuses weights of another backbone."""
    what = f"MODEL.WEIGHTS {weights.source} is not for this model"
    mend = "check MODEL.DETECTRON2.CONFIG_FILE and OPTS"
    misshapen = []
    for key, tensor in matched.items():
        # What has another shape keeps its name in the file, if it is not the model's.
        for place in (name for name in model_state if name == key or name.endswith(f".{key}")):
            if model_state[place].shape == tensor.shape:
                continue
            if place.startswith("backbone."):
                raise UserError(
                    f"{what}: '{place}' is {tuple(tensor.shape)} there and "
                    f"{tuple(model_state[place].shape)} here; {mend}"
                )
            misshapen.append(key)
    stem, places = find_stem(model), ("backbone.bottom_up.", "backbone.net.", "backbone.")
    inside = next(place for place in places if stem.startswith(place))
    # Norms' statistics may be missing: old files hold them folded into scale and shift.
    needed = [key for key in model_state if key.startswith(inside) and key.endswith(".weight")]
    absent = [key for key in needed if key not in matched]
    if absent:
        raise UserError(
            f"{what}: {len(absent)} of its backbone's {len(needed)} weights are missing, the first "
            f"'{absent[0]}'; {mend}"
        )
    return misshapen
